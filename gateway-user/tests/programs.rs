//! The rules for frames, one by one, on the loaded programs.

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::{
    hint,
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use aya::programs::{TestRun as _, TestRunOptions};
use common::*;
use gateway_ebpf::{Outcome, SwitchWord, words::Selector};
use handover_gateway::{
    mac::Mac,
    plane::Side,
    table::{WAN_PORT, Write},
};

const DROP: u32 = 1;
const PASS: u32 = 2;
const REDIRECT: u32 = 4;

const ZERO: Mac = Mac([0; 6]);
const PCP5_DEI: u16 = 0b1011 << 12;

#[track_caller]
fn expect(ran: &Ran, outcome: Outcome, verdict: u32, frame: &[u8]) {
    assert_eq!((ran.outcome, ran.verdict), (outcome, verdict));
    assert_eq!(ran.frame, frame, "\n  is {:02x?}\n  not {frame:02x?}", ran.frame);
}

#[track_caller]
fn expect_dropped(ran: &Ran, outcome: Outcome) {
    assert_eq!((ran.outcome, ran.verdict), (outcome, DROP));
}

// user -> WAN

#[test]
fn a_users_frame_gets_the_tag_of_its_network_and_the_routers_mac() {
    let mut rig = Rig::new();
    for (user, vid, router) in [(TARO, 1, ROUTER1), (HANAKO, 2, ROUTER2)] {
        let ran = rig.access(&frame(VIRTUAL, user, None, IPV4, b"payload"));
        let untagged = frame(router, user, None, IPV4, b"payload");
        let mut sent = untagged[..12].to_vec();
        sent.extend([0x81, 0, 0, vid]);
        sent.extend(&untagged[12..]);
        expect(&ran, Outcome::AccessForwarded, REDIRECT, &sent);
    }
}

#[test]
fn a_tag_that_came_along_is_rewritten_keeping_pcp_and_dei() {
    let mut rig = Rig::new();
    for vid in [0, 1, 77, 4094] {
        for priority in (0..16).map(|p| p << 12) {
            let ran = rig.access(&frame(OTHER, TARO, Some(priority | vid), IPV4, b"payload"));
            let sent = frame(OTHER, TARO, Some(priority | 1), IPV4, b"payload");
            expect(&ran, Outcome::AccessForwarded, REDIRECT, &sent);
        }
    }
}

#[test]
fn an_untagged_network_gets_no_tag() {
    let mut rig = Rig::new();
    let sent = frame(ROUTER_FLAT, JIRO, None, IPV4, b"payload");
    let ran = rig.access(&frame(VIRTUAL, JIRO, None, IPV4, b"payload"));
    expect(&ran, Outcome::AccessForwarded, REDIRECT, &sent);
    let tagged = rig.access(&bare(VIRTUAL, JIRO, Some(PCP5_DEI), IPV4, &[7; 50]));
    expect(&tagged, Outcome::AccessForwarded, REDIRECT, &bare(ROUTER_FLAT, JIRO, None, IPV4, &[7; 50]));
}

#[test]
fn what_is_not_for_the_router_keeps_its_destination() {
    let mut rig = Rig::new();
    for dst in [OTHER, BROADCAST, Mac([1, 0, 0x5e, 0, 0, 251])] {
        let ran = rig.access(&bare(dst, TARO, Some(0), IPV4, &[7; 50]));
        expect(&ran, Outcome::AccessForwarded, REDIRECT, &bare(dst, TARO, Some(1), IPV4, &[7; 50]));
    }
}

#[test]
fn unknown_users_are_dropped() {
    let mut rig = Rig::new();
    for src in [OTHER, ROUTER1, BROADCAST, ZERO] {
        expect_dropped(&rig.access(&frame(VIRTUAL, src, None, IPV4, b"")), Outcome::AccessUnknownUser);
    }
    expect_dropped(&rig.access(&frame(VIRTUAL, VIRTUAL, None, IPV4, b"")), Outcome::AccessSpoofed);
}

#[test]
fn a_removed_user_is_unknown_and_a_changed_one_has_its_new_addresses() {
    let mut rig = Rig::new();
    let mut request = inventory();
    request.revision = 2;
    request.users.retain(|u| u.name != "jiro");
    request.users[0] = user("taro", OTHER, "10.1.0.200", "net2");
    rig.configure(&request);
    for gone in [TARO, JIRO] {
        expect_dropped(&rig.access(&frame(VIRTUAL, gone, None, IPV4, b"")), Outcome::AccessUnknownUser);
        expect_dropped(&rig.wan(&frame(gone, ROUTER1, Some(1), IPV4, b"")), Outcome::WanUnknownUser);
    }
    assert_eq!(rig.vid_of(OTHER), Some(1), "taro stays on the network it was on");
    let ask = |ip| frame(BROADCAST, ROUTER1, Some(1), ARP, &arp(1, ROUTER1, R, ZERO, ip));
    expect_dropped(&rig.wan(&ask(TARO_IP)), Outcome::WanUnknownUser);
    assert_eq!(rig.wan(&ask([10, 1, 0, 200])).outcome, Outcome::WanArpForwarded);
}

#[test]
fn a_removed_network_forwards_nothing() {
    let mut rig = Rig::new();
    let mut request = inventory();
    request.revision = 2;
    request.networks.retain(|n| n.name != "net2");
    request.users[1].network = "net1".into();
    rig.configure(&request);
    expect_dropped(&rig.wan(&frame(HANAKO, ROUTER2, Some(2), IPV4, b"")), Outcome::WanUnknownNetwork);
    assert_eq!(rig.vid_of(HANAKO), Some(1), "its network is gone, so the declared one");
}

#[test]
fn link_local_control_frames_go_to_the_host() {
    let mut rig = Rig::new();
    for last in 0..16 {
        let sent = frame(Mac([1, 0x80, 0xc2, 0, 0, last]), OTHER, None, 0x88cc, b"lldp");
        expect(&rig.access(&sent), Outcome::AccessLinkLocal, PASS, &sent);
        expect(&rig.wan(&sent), Outcome::WanLinkLocal, PASS, &sent);
    }
    let sent = frame(Mac([1, 0x80, 0xc2, 0, 0, 16]), TARO, None, 0x88cc, b"");
    assert_eq!(rig.access(&sent).outcome, Outcome::AccessForwarded);
}

#[test]
fn nothing_is_sent_to_a_router_nobody_has_heard() {
    let mut rig = Rig::new();
    let mut request = inventory();
    request.users.push(user("saburo", OTHER, "10.1.0.103", "net3"));
    rig.configure(&request);
    let to_router = frame(VIRTUAL, OTHER, None, IPV4, b"");
    expect_dropped(&rig.access(&to_router), Outcome::AccessRouterUnknown);
    let answer = frame(BROADCAST, OTHER, None, ARP, &arp(2, OTHER, [10, 1, 0, 103], VIRTUAL, R));
    expect_dropped(&rig.access(&answer), Outcome::AccessRouterUnknown);
    assert_eq!(rig.access(&frame(BROADCAST, OTHER, None, IPV4, b"")).outcome, Outcome::AccessForwarded);
    let learned = rig.table.heard((WAN_PORT, 3), IpAddr::from(R), ROUTER2).unwrap();
    rig.apply(&[learned.write.unwrap()]);
    let ran = rig.access(&to_router);
    assert_eq!((ran.outcome, &ran.frame[..6]), (Outcome::AccessForwarded, &ROUTER2.0[..]));
}

#[test]
fn tags_that_are_not_one_8021q_tag_are_dropped_both_ways() {
    let mut rig = Rig::new();
    let stacked = |tpid: u16| [tpid.to_be_bytes().as_slice(), &[0, 1, 8, 0]].concat();
    for (inner, access, wan) in [
        (0x8100, Outcome::AccessStackedTags, Outcome::WanStackedTags),
        (0x88a8, Outcome::AccessStackedTags, Outcome::WanStackedTags),
    ] {
        // the EtherType behind the tag is another TPID
        let nested = stacked(inner);
        let ethertype = u16::from_be_bytes([nested[0], nested[1]]);
        expect_dropped(&rig.access(&frame(VIRTUAL, TARO, Some(1), ethertype, &nested[2..])), access);
        expect_dropped(&rig.wan(&frame(TARO, ROUTER1, Some(1), ethertype, &nested[2..])), wan);
    }
    expect_dropped(&rig.access(&frame(VIRTUAL, TARO, None, 0x88a8, &[0, 1])), Outcome::AccessServiceTag);
    expect_dropped(&rig.wan(&frame(TARO, ROUTER1, None, 0x88a8, &[0, 1])), Outcome::WanUnknownNetwork);
    expect_dropped(&rig.access(&frame(VIRTUAL, TARO, Some(0xfff), IPV4, b"")), Outcome::AccessReservedVid);
    expect_dropped(&rig.wan(&frame(TARO, ROUTER1, Some(0xfff), IPV4, b"")), Outcome::WanUnknownNetwork);
}

#[test]
fn frames_cut_anywhere_are_dropped_or_have_all_that_is_looked_at() {
    let mut rig = Rig::new();
    let whole_arp = bare(BROADCAST, TARO, Some(0), ARP, &arp(1, TARO, TARO_IP, ZERO, R));
    for len in 14..whole_arp.len() {
        expect_dropped(&rig.access(&whole_arp[..len]), Outcome::AccessTruncated);
    }
    assert_eq!(rig.access(&whole_arp).outcome, Outcome::AccessArpAnswered);
    let whole_arp = bare(BROADCAST, ROUTER1, Some(1), ARP, &arp(1, ROUTER1, R, ZERO, TARO_IP));
    for len in 14..whole_arp.len() {
        expect_dropped(&rig.wan(&whole_arp[..len]), Outcome::WanTruncated);
    }
    assert_eq!(rig.wan(&whole_arp).outcome, Outcome::WanArpForwarded);
    // no payload is looked at otherwise
    let empty = bare(VIRTUAL, TARO, None, IPV4, b"");
    assert_eq!(rig.access(&empty).frame, bare(ROUTER1, TARO, Some(1), IPV4, b""));
}

#[test]
fn a_frame_too_long_for_the_other_side_is_dropped_its_tag_not_counted() {
    let mut rig = Rig::new();
    for (payload, fits) in [(1500, true), (1501, false)] {
        for tci in [None, Some(0)] {
            let ran = rig.access(&bare(VIRTUAL, TARO, tci, IPV4, &vec![7; payload]));
            assert_eq!(ran.outcome == Outcome::AccessForwarded, fits, "{payload} {tci:?}");
            assert_eq!(ran.outcome == Outcome::AccessTooLong, !fits, "{payload} {tci:?}");
        }
        let ran = rig.wan(&bare(TARO, ROUTER1, Some(1), IPV4, &vec![7; payload]));
        assert_eq!(ran.outcome, if fits { Outcome::WanForwarded } else { Outcome::WanTooLong });
    }
}

// ARP of users

#[test]
fn who_has_r_is_answered_with_the_virtual_mac() {
    let mut rig = Rig::new();
    for tci in [None, Some(PCP5_DEI)] {
        // to all, and to the one the user knows (a neighbour cache probing)
        for dst in [BROADCAST, VIRTUAL] {
            let ran = rig.access(&frame(dst, TARO, tci, ARP, &arp(1, TARO, TARO_IP, ZERO, R)));
            let answer = frame(TARO, VIRTUAL, tci, ARP, &arp(2, VIRTUAL, R, TARO, TARO_IP));
            expect(&ran, Outcome::AccessArpAnswered, REDIRECT, &answer);
        }
    }
    // is anybody r? (duplicate address detection)
    let ran = rig.access(&frame(BROADCAST, TARO, None, ARP, &arp(1, TARO, [0; 4], ZERO, R)));
    let answer = frame(TARO, VIRTUAL, None, ARP, &arp(2, VIRTUAL, R, TARO, [0; 4]));
    expect(&ran, Outcome::AccessArpAnswered, REDIRECT, &answer);
}

#[test]
fn a_users_answer_to_the_router_names_the_real_router() {
    let mut rig = Rig::new();
    let ran = rig.access(&bare(VIRTUAL, TARO, Some(0), ARP, &arp(2, TARO, TARO_IP, VIRTUAL, R)));
    let sent = bare(ROUTER1, TARO, Some(1), ARP, &arp(2, TARO, TARO_IP, ROUTER1, R));
    expect(&ran, Outcome::AccessForwarded, REDIRECT, &sent);
}

#[test]
fn a_users_other_arp_goes_as_it_is() {
    let mut rig = Rig::new();
    for payload in [arp(1, TARO, TARO_IP, ZERO, [10, 1, 0, 50]), arp(1, TARO, TARO_IP, ZERO, TARO_IP)] {
        let ran = rig.access(&bare(BROADCAST, TARO, Some(0), ARP, &payload));
        expect(&ran, Outcome::AccessForwarded, REDIRECT, &bare(BROADCAST, TARO, Some(1), ARP, &payload));
    }
}

#[test]
fn arp_of_another_kind_is_dropped() {
    let mut rig = Rig::new();
    for at in [0, 2, 4, 5] {
        let mut payload = arp(1, TARO, TARO_IP, ZERO, R);
        payload[at] = 9;
        expect_dropped(
            &rig.access(&frame(BROADCAST, TARO, None, ARP, &payload)),
            Outcome::AccessArpMalformed,
        );
        expect_dropped(&rig.wan(&frame(TARO, ROUTER1, Some(1), ARP, &payload)), Outcome::WanArpMalformed);
    }
}

// WAN -> user

#[test]
fn a_frame_from_the_users_network_loses_its_tag_and_comes_from_the_virtual_router() {
    let mut rig = Rig::new();
    for tci in [1, PCP5_DEI | 1] {
        let ran = rig.wan(&bare(TARO, ROUTER1, Some(tci), IPV4, &[7; 50]));
        expect(&ran, Outcome::WanForwarded, REDIRECT, &bare(TARO, VIRTUAL, None, IPV4, &[7; 50]));
    }
    // not by the router
    let ran = rig.wan(&bare(TARO, OTHER, Some(1), IPV4, &[7; 50]));
    expect(&ran, Outcome::WanForwarded, REDIRECT, &bare(TARO, OTHER, None, IPV4, &[7; 50]));
    // untagged network; a priority tag is no tag
    for tci in [None, Some(PCP5_DEI)] {
        let ran = rig.wan(&bare(JIRO, ROUTER_FLAT, tci, IPV4, &[7; 50]));
        expect(&ran, Outcome::WanForwarded, REDIRECT, &bare(JIRO, VIRTUAL, None, IPV4, &[7; 50]));
    }
}

#[test]
fn a_frame_from_another_network_is_stale() {
    let mut rig = Rig::new();
    for tci in [Some(2), Some(3), None, Some(0)] {
        let ran = rig.wan(&frame(TARO, ROUTER2, tci, IPV4, b""));
        expect_dropped(&ran, Outcome::WanStaleNetwork);
    }
    expect_dropped(&rig.wan(&frame(TARO, ROUTER2, Some(4), IPV4, b"")), Outcome::WanUnknownNetwork);
}

#[test]
fn frames_for_nobody_are_dropped_and_those_for_everybody_are_the_daemons() {
    let mut rig = Rig::new();
    expect_dropped(&rig.wan(&frame(OTHER, ROUTER1, Some(1), IPV4, b"")), Outcome::WanUnknownUser);
    for dst in [BROADCAST, Mac([0x33, 0x33, 0, 0, 0, 1])] {
        let sent = frame(dst, ROUTER1, Some(1), IPV4, b"");
        expect(&rig.wan(&sent), Outcome::WanGroup, PASS, &sent);
        let strange = frame(dst, ROUTER1, Some(9), IPV4, b"");
        expect_dropped(&rig.wan(&strange), Outcome::WanUnknownNetwork);
    }
}

#[test]
fn the_routers_question_for_a_user_goes_to_that_user_alone() {
    let mut rig = Rig::new();
    let ran = rig.wan(&bare(BROADCAST, ROUTER1, Some(1), ARP, &arp(1, ROUTER1, R, ZERO, TARO_IP)));
    let told = bare(TARO, VIRTUAL, None, ARP, &arp(1, VIRTUAL, R, ZERO, TARO_IP));
    expect(&ran, Outcome::WanArpForwarded, REDIRECT, &told);
    // from another of the router's addresses, or by a router whose ARP names another MAC than the frame
    let ran = rig.wan(&bare(TARO, ROUTER1, Some(1), ARP, &arp(1, ROUTER1, [10, 1, 0, 2], ZERO, TARO_IP)));
    let told = bare(TARO, VIRTUAL, None, ARP, &arp(1, VIRTUAL, [10, 1, 0, 2], ZERO, TARO_IP));
    expect(&ran, Outcome::WanArpForwarded, REDIRECT, &told);
    let ran = rig.wan(&bare(BROADCAST, OTHER, Some(1), ARP, &arp(1, OTHER, R, ZERO, TARO_IP)));
    let told = bare(TARO, OTHER, None, ARP, &arp(1, VIRTUAL, R, ZERO, TARO_IP));
    expect(&ran, Outcome::WanArpForwarded, REDIRECT, &told);
    // of nobody, and from a network the user is not on
    let question = |vid, ip| bare(BROADCAST, ROUTER1, Some(vid), ARP, &arp(1, ROUTER1, R, ZERO, ip));
    expect_dropped(&rig.wan(&question(1, [10, 1, 0, 50])), Outcome::WanUnknownUser);
    expect_dropped(&rig.wan(&question(2, TARO_IP)), Outcome::WanStaleNetwork);
}

#[test]
fn what_a_router_says_of_itself_goes_to_the_daemon_and_to_no_user() {
    let mut rig = Rig::new();
    for said in [
        // an answer to an introduction, in the user's network and in the one it is to move to
        bare(TARO, ROUTER1, Some(1), ARP, &arp(2, ROUTER1, R, TARO, TARO_IP)),
        bare(TARO, ROUTER2, Some(2), ARP, &arp(2, ROUTER2, R, TARO, TARO_IP)),
        // announcements
        bare(BROADCAST, ROUTER1, Some(1), ARP, &arp(1, ROUTER1, R, ZERO, R)),
        bare(BROADCAST, OTHER, Some(1), ARP, &arp(2, OTHER, R, BROADCAST, R)),
    ] {
        expect(&rig.wan(&said), Outcome::WanRouterArp, PASS, &said);
    }
}

#[test]
fn answers_of_others_reach_the_user() {
    let mut rig = Rig::new();
    let payload = arp(2, OTHER, [10, 1, 0, 50], TARO, TARO_IP);
    let ran = rig.wan(&bare(TARO, OTHER, Some(1), ARP, &payload));
    expect(&ran, Outcome::WanForwarded, REDIRECT, &bare(TARO, OTHER, None, ARP, &payload));
    let sent = bare(BROADCAST, OTHER, Some(1), ARP, &payload);
    expect(&rig.wan(&sent), Outcome::WanGroup, PASS, &sent);
}

// switches

/// Both directions of taro, as frames.
fn everything_of_taro() -> Vec<(bool, Vec<u8>)> {
    let mut frames = Vec::new();
    for tci in [None, Some(0), Some(PCP5_DEI | 9)] {
        for dst in [VIRTUAL, OTHER, BROADCAST] {
            frames.push((true, frame(dst, TARO, tci, IPV4, b"payload")));
            frames.push((true, frame(dst, TARO, tci, ARP, &arp(1, TARO, TARO_IP, ZERO, R))));
            frames.push((true, frame(dst, TARO, tci, ARP, &arp(2, TARO, TARO_IP, VIRTUAL, R))));
        }
    }
    for (vid, router) in [(1, ROUTER1), (2, ROUTER2), (3, OTHER)] {
        frames.push((false, frame(TARO, router, Some(vid), IPV4, b"payload")));
        for payload in
            [arp(1, router, R, ZERO, TARO_IP), arp(2, router, R, TARO, TARO_IP), arp(1, router, R, ZERO, R)]
        {
            frames.push((false, frame(BROADCAST, router, Some(vid), ARP, &payload)));
        }
    }
    frames
}

fn run_all(rig: &mut Rig) -> Vec<Ran> {
    everything_of_taro()
        .iter()
        .map(|(from_user, frame)| if *from_user { rig.access(frame) } else { rig.wan(frame) })
        .collect()
}

#[test]
fn staging_and_unstaging_alter_no_frame() {
    let mut rig = Rig::new();
    let before = run_all(&mut rig);
    rig.stage("m", &["taro"], "net1", "net2");
    assert_eq!(run_all(&mut rig), before);
    assert!(!rig.abort("m"));
    assert_eq!(run_all(&mut rig), before);
}

#[test]
fn a_switch_turns_its_users_and_nobody_else() {
    let mut rig = Rig::new();
    let mut request = inventory();
    request.users.push(user("saburo", OTHER, "10.1.0.103", "net1"));
    rig.configure(&request);
    let users = ["saburo", "taro"];
    let staged = rig.stage("m", &users, "net1", "net2");
    let others = |rig: &mut Rig| (rig.vid_of(HANAKO), rig.vid_of(JIRO));
    assert_eq!((rig.vid_of(TARO), rig.vid_of(OTHER), others(&mut rig)), (Some(1), Some(1), (Some(2), None)));
    rig.switch("m", &["taro", "saburo"], "net2", staged);
    assert_eq!((rig.vid_of(TARO), rig.vid_of(OTHER), others(&mut rig)), (Some(2), Some(2), (Some(2), None)));
    let ran = rig.access(&bare(VIRTUAL, TARO, Some(0), ARP, &arp(2, TARO, TARO_IP, VIRTUAL, R)));
    let sent = bare(ROUTER2, TARO, Some(2), ARP, &arp(2, TARO, TARO_IP, ROUTER2, R));
    expect(&ran, Outcome::AccessForwarded, REDIRECT, &sent);
}

#[test]
fn between_switch_and_finish_both_networks_reach_the_user_after_it_the_new_alone() {
    let mut rig = Rig::new();
    let from = |rig: &mut Rig, vid, router| rig.wan(&frame(TARO, router, Some(vid), IPV4, b"")).outcome;
    let staged = rig.stage("m", &["taro"], "net1", "net2");
    assert_eq!(from(&mut rig, 2, ROUTER2), Outcome::WanStaleNetwork, "not before the switch");
    rig.switch("m", &["taro"], "net2", staged);
    let ran = rig.wan(&bare(TARO, ROUTER1, Some(1), IPV4, &[7; 50]));
    expect(&ran, Outcome::WanForwarded, REDIRECT, &bare(TARO, VIRTUAL, None, IPV4, &[7; 50]));
    assert_eq!(from(&mut rig, 2, ROUTER2), Outcome::WanForwarded);
    assert_eq!(from(&mut rig, 3, OTHER), Outcome::WanStaleNetwork);
    rig.finish("m");
    assert_eq!(from(&mut rig, 1, ROUTER1), Outcome::WanStaleNetwork);
    assert_eq!(from(&mut rig, 2, ROUTER2), Outcome::WanForwarded);
    assert_eq!(rig.vid_of(TARO), Some(2));
}

#[test]
fn an_abort_after_the_switch_puts_everything_back() {
    let mut rig = Rig::new();
    let before = run_all(&mut rig);
    let staged = rig.stage("m", &["taro"], "net1", "net2");
    rig.switch("m", &["taro"], "net2", staged);
    assert_ne!(run_all(&mut rig), before);
    assert!(rig.abort("m"));
    assert_eq!(run_all(&mut rig), before);
}

#[test]
fn switches_of_different_users_do_not_touch_each_other() {
    let mut rig = Rig::new();
    let first = rig.stage("m1", &["taro"], "net1", "net2");
    let second = rig.stage("m2", &["hanako"], "net2", "flat");
    rig.switch("m2", &["hanako"], "flat", second);
    assert_eq!((rig.vid_of(TARO), rig.vid_of(HANAKO)), (Some(1), None));
    rig.switch("m1", &["taro"], "net2", first);
    rig.abort("m2");
    assert_eq!((rig.vid_of(TARO), rig.vid_of(HANAKO)), (Some(2), Some(2)));
}

#[test]
fn words_of_different_generations_send_nowhere() {
    let mut rig = Rig::new();
    let staged = rig.stage("m", &["taro"], "net1", "net2");
    // as if the switch had been given to another migration without a grace period
    let word = SwitchWord::forward(Selector::B, staged.generation + 1);
    rig.apply(&[Write::Switch { index: staged.switch, word }]);
    expect_dropped(&rig.access(&frame(VIRTUAL, TARO, None, IPV4, b"")), Outcome::AccessGeneration);
    expect_dropped(&rig.wan(&frame(TARO, ROUTER1, Some(1), IPV4, b"")), Outcome::WanGeneration);
}

#[test]
fn the_window_is_from_the_store_to_the_last_frame_under_the_old_network() {
    let mut rig = Rig::new();
    let staged = rig.stage("m", &["taro"], "net1", "net2");
    rig.vid_of(TARO);
    // nothing is on the way now
    assert_eq!(rig.switch("m", &["taro"], "net2", staged), 0);
    // a store back makes frames of the old network go on; the next window ends with the last of them
    rig.vid_of(TARO);
    let committed = rig.plane.commit(staged.switch, SwitchWord::forward(Selector::A, staged.generation));
    assert_eq!(rig.vid_of(TARO), Some(1));
    let window = rig.plane.window(staged.switch, committed);
    assert!(window > 0 && window < 1_000_000_000, "{window}");
}

#[test]
fn after_the_window_no_frame_goes_under_the_old_network_however_fast_they_come() {
    const FLIPS: usize = 5_000;
    let mut rig = Rig::new();
    let staged = rig.stage("m", &["taro"], "net1", "net2");
    let word = |selector| SwitchWord::forward(selector, staged.generation);
    let plane = &rig.plane;
    let sent = frame(VIRTUAL, TARO, None, IPV4, b"payload");
    let stop = AtomicBool::new(false);
    /// Ends the load, also when an assertion ends the test.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let mut windows = Vec::with_capacity(FLIPS);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            let program = plane.program(Side::Access).unwrap();
            while !stop.load(Ordering::Relaxed) {
                let options = TestRunOptions { data_in: Some(&sent), repeat: 10_000, ..Default::default() };
                assert_eq!(program.test_run(options).unwrap().return_value, REDIRECT);
            }
        });
        for _ in 0..FLIPS {
            let back = plane.commit(staged.switch, word(Selector::A));
            // until frames flow under the old network again
            let patience = Instant::now();
            while plane.window(staged.switch, back) == 0 && patience.elapsed() < Duration::from_millis(50) {
                hint::spin_loop();
            }
            let committed = plane.commit(staged.switch, word(Selector::B));
            let window = plane.window(staged.switch, committed);
            for _ in 0..200 {
                hint::spin_loop();
            }
            assert_eq!(plane.window(staged.switch, committed), window, "a later frame under the old network");
            windows.push(window);
        }
    });
    windows.sort_unstable();
    let seen = windows.iter().filter(|w| **w > 0).count();
    println!(
        "{FLIPS} switches under load: {seen} with frames after the store, p50 {} ns, p99 {} ns, longest {} ns",
        windows[FLIPS / 2],
        windows[FLIPS * 99 / 100],
        windows[FLIPS - 1]
    );
    assert!(seen > 0, "the load never met a switch: nothing was tested");
}

// taking over

#[test]
fn maps_are_made_to_hold_what_the_table_says_and_what_they_hold_already_is_not_touched() {
    let mut rig = Rig::new();
    rig.stage("m", &["taro"], "net1", "net2");
    assert_eq!(rig.plane.reconcile(&rig.table.contents()).unwrap(), 0, "as it is");

    // a table that differs in everything: what was in the maps and is not in it goes
    let mut other = Rig::empty(16);
    let mut request = inventory();
    request.networks = vec![network("net2", Some(7), Some(ROUTER1)), network("net9", Some(2), Some(ROUTER2))];
    request.users = vec![
        user("taro", OTHER, "10.1.0.100", "net9"),
        user("kenji", HANAKO, "10.1.0.77", "net2"),
        user("saburo", Mac([0x02, 0, 0, 0, 1, 9]), "10.1.0.101", "net9"),
    ];
    other.configure(&request);
    let wanted = other.table.contents();
    assert!(rig.plane.reconcile(&wanted).unwrap() > 0);
    assert_eq!(rig.plane.reconcile(&wanted).unwrap(), 0);
    assert_eq!((rig.vid_of(OTHER), rig.vid_of(HANAKO)), (Some(2), Some(7)));
    for gone in [TARO, JIRO] {
        expect_dropped(&rig.access(&frame(VIRTUAL, gone, None, IPV4, b"")), Outcome::AccessUnknownUser);
        expect_dropped(&rig.wan(&frame(gone, ROUTER2, Some(2), IPV4, b"")), Outcome::WanUnknownUser);
    }
    expect_dropped(&rig.wan(&frame(HANAKO, ROUTER1, Some(1), IPV4, b"")), Outcome::WanUnknownNetwork);
    expect_dropped(&rig.wan(&frame(HANAKO, ROUTER_FLAT, None, IPV4, b"")), Outcome::WanUnknownNetwork);
    assert_eq!(rig.wan(&frame(HANAKO, ROUTER1, Some(7), IPV4, b"")).outcome, Outcome::WanForwarded);
}

// the verifier

/// Instructions the verifier may look at for a program: some 1.4 times what it is today, far below the kernel's million. A
/// rule that multiplies paths shows here long before it is refused.
const VERIFIED_MAX: u32 = 30_000;

#[test]
fn the_programs_do_not_grow_unnoticed_for_the_verifier() {
    let rig = Rig::new();
    for side in [Side::Access, Side::Wan] {
        let info = rig.plane.program(side).unwrap().info().unwrap();
        // absent before Linux 5.16
        let Some(verified) = info.verified_instruction_count() else { continue };
        println!("{}: {verified} instructions verified", side.name());
        assert!(verified <= VERIFIED_MAX, "{}: {verified} instructions verified", side.name());
    }
}

#[test]
fn users_whose_macs_lead_to_the_same_homes_are_all_found_both_ways() {
    let max_users = 16;
    let groups = gateway_ebpf::home::groups_for(max_users);
    let homes = |mac: Mac| gateway_ebpf::home::homes(mac.word(), groups).map(|home| home.group);
    let wanted = homes(Mac([2, 0, 0, 1, 0, 0]));
    // more than both homes have room for
    let crowd: Vec<Mac> = (0..=u16::MAX)
        .map(|n| Mac([2, 0, 0, 1, n.to_be_bytes()[0], n.to_be_bytes()[1]]))
        .filter(|mac| homes(*mac) == wanted)
        .take(12)
        .collect();
    assert_eq!(crowd.len(), 12);
    let mut request = inventory();
    request.users = crowd
        .iter()
        .enumerate()
        .map(|(i, mac)| {
            user(
                &format!("u{i}"),
                *mac,
                &format!("10.1.0.{}", 100 + i),
                if i % 2 == 0 { "net1" } else { "net2" },
            )
        })
        .collect();
    let mut rig = Rig::empty(max_users);
    rig.configure(&request);
    let found = |rig: &mut Rig, i: usize| {
        let (vid, router) = if i.is_multiple_of(2) { (1, ROUTER1) } else { (2, ROUTER2) };
        assert_eq!(rig.vid_of(crowd[i]), Some(vid), "user {i}");
        let ran = rig.wan(&frame(crowd[i], router, Some(vid), IPV4, b"payload"));
        expect(&ran, Outcome::WanForwarded, REDIRECT, &bare(crowd[i], VIRTUAL, None, IPV4, &ran.frame[14..]));
        let other = rig.wan(&frame(crowd[i], router, Some(3 - vid), IPV4, b"payload"));
        expect_dropped(&other, Outcome::WanStaleNetwork);
        // the same by its second home, or none: with the user's own tag
        let ran = rig.access(&frame(VIRTUAL, crowd[i], Some(77), IPV4, b"payload"));
        assert_eq!((ran.outcome, tci(&ran.frame)), (Outcome::AccessForwarded, Some(vid)));
    };
    for i in 0..crowd.len() {
        found(&mut rig, i);
    }
    // the first go: nobody finds them, and the others stay where they are
    request.revision += 1;
    let gone: Vec<_> = request.users.drain(..5).collect();
    rig.configure(&request);
    for mac in &crowd[..5] {
        expect_dropped(&rig.access(&frame(VIRTUAL, *mac, None, IPV4, b"")), Outcome::AccessUnknownUser);
        expect_dropped(&rig.wan(&frame(*mac, ROUTER1, Some(1), IPV4, b"")), Outcome::WanUnknownUser);
    }
    for i in 5..crowd.len() {
        found(&mut rig, i);
    }
    request.revision += 1;
    request.users.extend(gone);
    rig.configure(&request);
    for i in 0..crowd.len() {
        found(&mut rig, i);
    }
}

#[test]
fn ipv6_data_goes_its_way_cut_off_or_not() {
    let mut rig = Rig::new();
    let mut packet = vec![0x60, 0, 0, 0, 0, 20, 17, 64];
    packet.extend([0x20; 32]);
    packet.extend([7; 20]);
    let ran = rig.access(&bare(VIRTUAL, TARO, None, 0x86dd, &packet));
    expect(&ran, Outcome::AccessForwarded, REDIRECT, &bare(ROUTER1, TARO, Some(1), 0x86dd, &packet));
    let ran = rig.wan(&bare(TARO, ROUTER1, Some(1), 0x86dd, &packet));
    expect(&ran, Outcome::WanForwarded, REDIRECT, &bare(TARO, VIRTUAL, None, 0x86dd, &packet));
    for len in 0..40 {
        let cut = rig.access(&bare(VIRTUAL, TARO, None, 0x86dd, &packet[..len]));
        expect_dropped(&cut, Outcome::AccessTruncated);
        expect_dropped(
            &rig.wan(&bare(TARO, ROUTER1, Some(1), 0x86dd, &packet[..len])),
            Outcome::WanTruncated,
        );
    }
}
