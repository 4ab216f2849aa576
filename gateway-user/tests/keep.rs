//! The rules of hold and release on the loaded programs: what is kept in which phase, in which order it is accounted, and what
//! goes on when something is full or too late. And what a held frame costs.

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::{net::Ipv4Addr, time::Duration};

use aya::programs::{TestRun as _, TestRunOptions};
use common::*;
use gateway_ebpf::{Load, Outcome, Record, words::Selector};
use handover_gateway::{
    hold::Bounds,
    mac::Mac,
    onward::onward,
    plane::{Plane, Side, monotonic_ns},
    table::{HoldFigures, Release, StageAnswer, Write},
};

const V: [u8; 4] = [203, 0, 113, 10];
const DROP: u32 = 1;
const HOUR: Duration = Duration::from_secs(3600);

/// An IPv4 header to `to` with something behind it.
fn ip(to: [u8; 4], payload: usize) -> Vec<u8> {
    [&[0x45; 16][..], &to, &vec![7; payload]].concat()
}

/// taro to the service.
fn to_service(payload: usize) -> Vec<u8> {
    bare(VIRTUAL, TARO, None, IPV4, &ip(V, payload))
}

/// Holds as the service does; `deadline` from now on.
fn hold(rig: &mut Rig, migration: &str, staged: StageAnswer, deadline: Duration) {
    let address = Ipv4Addr::from(V);
    let step = rig.table.hold(migration, staged.switch.into(), staged.generation, address).unwrap();
    assert!(!step.again);
    rig.plane.holds().begin(step.index, address, monotonic_ns() + deadline.as_nanos() as u64);
    rig.apply(&[Write::Switch { index: step.index, word: step.word }]);
    rig.plane.holds().settle().unwrap();
}

fn release(rig: &mut Rig, migration: &str, to: Selector) {
    let Release::Drain { index, word, .. } = rig.table.release(migration, to).unwrap() else { panic!() };
    rig.plane.holds().begin_release(index, word);
}

/// As the releasing thread: the oldest frame goes out.
fn send_one(plane: &Plane) -> Option<Vec<u8>> {
    let (record, frame) = plane.holds().take()?;
    plane.holds().sent(record.slot(), Load::frame(frame.len() as u64));
    Some(frame)
}

/// taro and hanako in one switch from net1 to net2, held.
fn held(deadline: Duration) -> (Rig, StageAnswer) {
    let mut rig = Rig::empty(16);
    let mut request = inventory();
    request.users[1].network = "net1".into();
    rig.configure(&request);
    let staged = rig.stage("m", &["taro", "hanako"], "net1", "net2");
    hold(&mut rig, "m", staged, deadline);
    (rig, staged)
}

#[test]
fn in_phase_hold_the_users_frames_for_the_service_are_kept_and_all_others_go_on() {
    let (mut rig, staged) = held(HOUR);
    for (frames, tci) in [None, Some(0), Some(0xe005)].into_iter().enumerate() {
        // to the router or not: the address in the packet decides
        for dst in [VIRTUAL, OTHER] {
            let sent = bare(dst, TARO, tci, IPV4, &ip(V, 30 + frames));
            let ran = rig.access(&sent);
            assert_eq!((ran.outcome, ran.verdict), (Outcome::AccessHeld, DROP));
            let (record, kept) = rig.plane.holds().take().unwrap();
            assert_eq!(kept, sent, "as it came");
            assert_eq!(record.switch(), staged.switch);
        }
    }
    assert_eq!(rig.plane.holds().take(), None);
    let mut other = V;
    other[3] += 1;
    for goes_on in [
        bare(VIRTUAL, TARO, None, IPV4, &ip(other, 30)),
        bare(VIRTUAL, TARO, None, 0x86dd, &ip(V, 30)),
        // too short to have a destination
        to_service(0)[..33].to_vec(),
        // in no switch
        bare(VIRTUAL, JIRO, None, IPV4, &ip(V, 30)),
    ] {
        assert_eq!(rig.access(&goes_on).outcome, Outcome::AccessForwarded, "{goes_on:02x?}");
    }
    let question = frame(BROADCAST, TARO, None, ARP, &arp(1, TARO, TARO_IP, Mac([0; 6]), R));
    assert_eq!(rig.access(&question).outcome, Outcome::AccessArpAnswered);
    let shortest = rig.access(&to_service(0));
    assert_eq!(shortest.outcome, Outcome::AccessHeld, "an IP header is enough");
    // towards the user nothing is held
    assert_eq!(rig.wan(&bare(TARO, ROUTER1, Some(1), IPV4, &ip(V, 30))).outcome, Outcome::WanForwarded);
    // the switch leaves the phase
    rig.switch("m", &["taro", "hanako"], "net2", staged);
    assert_eq!(rig.access(&to_service(30)).outcome, Outcome::AccessHeld);
    let ran = rig.access(&bare(VIRTUAL, TARO, None, IPV4, &ip(other, 30)));
    assert_eq!(tci(&ran.frame), Some(2), "what is not held is switched");
}

#[test]
fn while_draining_a_user_is_back_when_all_that_was_kept_is_sent_and_not_before() {
    let (mut rig, staged) = held(HOUR);
    let of_hanako = bare(VIRTUAL, HANAKO, None, IPV4, &ip(V, 40));
    for number in 0..3 {
        assert_eq!(rig.access(&to_service(100 + number)).outcome, Outcome::AccessHeld);
    }
    rig.switch("m", &["taro", "hanako"], "net2", staged);
    release(&mut rig, "m", Selector::B);
    // of hanako nothing was kept
    assert_eq!(rig.access(&of_hanako).outcome, Outcome::AccessForwarded);
    // taro's later frames line up behind the first ones
    assert_eq!(rig.access(&to_service(103)).outcome, Outcome::AccessHeld);
    for number in 0..4 {
        assert_eq!(send_one(&rig.plane).unwrap(), to_service(100 + number), "in order");
        if number == 2 {
            assert_eq!(rig.access(&to_service(104)).outcome, Outcome::AccessHeld, "one is still kept");
        }
    }
    assert_eq!(send_one(&rig.plane).unwrap(), to_service(104));
    let ran = rig.access(&to_service(105));
    assert_eq!((ran.outcome, tci(&ran.frame)), (Outcome::AccessForwarded, Some(2)), "nothing is");
    assert_eq!(send_one(&rig.plane), None);
}

#[test]
fn after_the_deadline_the_program_forwards_by_the_selector() {
    let (mut rig, staged) = held(Duration::ZERO);
    let ran = rig.access(&to_service(30));
    assert_eq!((ran.outcome, tci(&ran.frame)), (Outcome::AccessHoldExpired, Some(1)));
    rig.switch("m", &["taro", "hanako"], "net2", staged);
    let ran = rig.access(&to_service(30));
    assert_eq!((ran.outcome, tci(&ran.frame)), (Outcome::AccessHoldExpired, Some(2)));
    assert_eq!(rig.plane.holds().take(), None);
    // a release after it holds nothing again
    release(&mut rig, "m", Selector::B);
    assert_eq!(rig.access(&to_service(30)).outcome, Outcome::AccessForwarded);
}

#[test]
fn a_release_moves_the_deadline_unless_it_has_passed() {
    let (mut rig, _) = held(HOUR);
    rig.access(&to_service(30));
    release(&mut rig, "m", Selector::A);
    assert_eq!(rig.access(&to_service(30)).outcome, Outcome::AccessHeld);
    // kept before the deadline, released after it
    let mut rig = Rig::new();
    let staged = rig.stage("m", &["taro"], "net1", "net2");
    hold(&mut rig, "m", staged, HOUR);
    rig.access(&to_service(30));
    rig.plane.holds().begin(staged.switch, V.into(), 0);
    release(&mut rig, "m", Selector::A);
    assert_eq!(rig.access(&to_service(30)).outcome, Outcome::AccessHoldExpired, "not held again");
}

#[test]
fn one_users_frames_are_bounded_and_no_other_users() {
    let (mut rig, staged) = held(HOUR);
    let len = to_service(1000).len() as u64;
    let fit = HELD.per_user / len;
    for _ in 0..fit {
        assert_eq!(rig.access(&to_service(1000)).outcome, Outcome::AccessHeld);
    }
    for _ in 0..3 {
        let ran = rig.access(&to_service(1000));
        assert_eq!((ran.outcome, ran.verdict), (Outcome::AccessHoldUserBound, DROP));
    }
    let of_hanako = bare(VIRTUAL, HANAKO, None, IPV4, &ip(V, 1000));
    assert_eq!(rig.access(&of_hanako).outcome, Outcome::AccessHeld);
    let figures = rig.plane.holds().figures(staged.switch);
    let expected = HoldFigures {
        frames: fit + 1,
        bytes: (fit + 1) * len,
        dropped_user_bound: 3,
        ..HoldFigures::default()
    };
    assert_eq!(figures, expected);
    assert_eq!(rig.plane.holds().usage(), (HELD, (fit + 1) * len));
    // room again when something has left
    send_one(&rig.plane).unwrap();
    assert_eq!(rig.access(&to_service(1000)).outcome, Outcome::AccessHeld);
}

#[test]
fn all_users_together_are_bounded_and_every_frame_is_accounted_for() {
    // nobody alone is bounded
    let bounds = Bounds { memory: 1 << 16, per_user: 1 << 20 };
    for payload in [0, 26, 1480] {
        let mut rig = Rig::bounded(16, bounds);
        rig.configure(&inventory());
        let staged = rig.stage("m", &["taro"], "net1", "net2");
        hold(&mut rig, "m", staged, HOUR);
        let sent = to_service(payload);
        let mut kept = 0;
        while rig.access(&sent).outcome == Outcome::AccessHeld {
            kept += 1;
        }
        for _ in 0..10 {
            assert_eq!(rig.access(&sent).outcome, Outcome::AccessHoldMemory);
        }
        let figures = rig.plane.holds().figures(staged.switch);
        let len = sent.len() as u64;
        let expected =
            HoldFigures { frames: kept, bytes: kept * len, dropped_memory: 11, ..HoldFigures::default() };
        assert_eq!(figures, expected);
        assert!(kept * len <= bounds.memory.into() && kept > 0);
        println!("{kept} frames of {len} octets in {} octets", bounds.memory);
        assert_eq!(rig.plane.holds().usage().1, kept * len, "what was given up does not count");
        // drained, the user is back: nothing was counted that was not kept
        release(&mut rig, "m", Selector::A);
        for _ in 0..kept {
            assert_eq!(send_one(&rig.plane).as_ref(), Some(&sent));
        }
        assert_eq!(rig.access(&sent).outcome, Outcome::AccessForwarded);
    }
}

#[test]
fn switches_hold_and_drain_beside_each_other() {
    let mut rig = Rig::new();
    let first = rig.stage("m1", &["taro"], "net1", "net2");
    let second = rig.stage("m2", &["hanako"], "net2", "flat");
    hold(&mut rig, "m1", first, HOUR);
    let of_hanako = bare(VIRTUAL, HANAKO, None, IPV4, &ip(V, 40));
    assert_eq!(rig.access(&of_hanako).outcome, Outcome::AccessForwarded, "not held");
    hold(&mut rig, "m2", second, HOUR);
    assert_eq!(rig.access(&to_service(40)).outcome, Outcome::AccessHeld);
    assert_eq!(rig.access(&of_hanako).outcome, Outcome::AccessHeld);
    release(&mut rig, "m2", Selector::A);
    assert_eq!(rig.access(&to_service(40)).outcome, Outcome::AccessHeld);
    let kept: Vec<u16> = std::iter::from_fn(|| rig.plane.holds().take())
        .map(|(record, frame)| {
            rig.plane.holds().sent(record.slot(), Load::frame(frame.len() as u64));
            record.switch()
        })
        .collect();
    assert_eq!(kept, [first.switch, second.switch, first.switch]);
    assert_eq!(rig.access(&of_hanako).outcome, Outcome::AccessForwarded);
    assert_eq!(rig.access(&to_service(40)).outcome, Outcome::AccessHeld);
}

#[test]
fn a_held_frame_goes_on_as_the_program_would_have_sent_it() {
    // taro on net1, jiro on the untagged network
    let mut rig = Rig::new();
    for (user, network) in [(TARO, "net1"), (JIRO, "flat")] {
        let index = rig.table.network(network).unwrap().index;
        let words = rig.plane.network_words(index);
        for tci in [None, Some(0), Some(9), Some(0xb000 | 4094)] {
            for dst in [VIRTUAL, OTHER] {
                for payload in [0, 1, 1400] {
                    let sent = bare(dst, user, tci, IPV4, &ip(V, payload));
                    let ran = rig.access(&sent);
                    assert_eq!(ran.outcome, Outcome::AccessForwarded);
                    assert_eq!(onward(&sent, VIRTUAL, words, 0).as_ref(), Some(&ran.frame));
                }
            }
        }
    }
}

#[test]
fn jumbo_frames_are_kept_whole() {
    let (mut rig, _) = held(HOUR);
    let longest = to_service(3300);
    assert_eq!(rig.access(&longest).outcome, Outcome::AccessHeld);
    assert_eq!(rig.plane.holds().take().map(|(_, frame)| frame), Some(longest));
}

#[test]
fn the_record_says_whose_it_is() {
    let (mut rig, staged) = held(HOUR);
    rig.access(&to_service(30));
    rig.access(&bare(VIRTUAL, HANAKO, None, IPV4, &ip(V, 30)));
    let records: Vec<Record> = std::iter::from_fn(|| rig.plane.holds().take()).map(|(r, _)| r).collect();
    assert_ne!(records[0].slot(), records[1].slot());
    let (word, ..) = rig.plane.switch_word(staged.switch);
    assert!(records.iter().all(|r| r.same_generation(word)));
}

/// Not a bound, a figure: what a held frame costs beside a forwarded one.
#[test]
fn what_holding_costs() {
    const FRAMES: u32 = 20_000;
    let bounds = Bounds { memory: 64 << 20, per_user: 64 << 20 };
    for len in [64_usize, 512, 1514] {
        let mut rig = Rig::bounded(16, bounds);
        rig.configure(&inventory());
        let staged = rig.stage("m", &["taro"], "net1", "net2");
        let sent = to_service(len - 34);
        let mut per_frame = Vec::new();
        for phase in ["forwarded", "held"] {
            if phase == "held" {
                hold(&mut rig, "m", staged, HOUR);
            }
            let program = rig.plane.program(Side::Access).unwrap();
            // the frame is changed in place, and forwarded once only so often: 1 push of a tag each, so one run per frame
            let mut total = Duration::ZERO;
            for _ in 0..FRAMES {
                let options = TestRunOptions { data_in: Some(&sent), ..Default::default() };
                total += program.test_run(options).unwrap().duration;
            }
            per_frame.push(total.as_nanos() / u128::from(FRAMES));
        }
        assert_eq!(rig.plane.holds().figures(staged.switch).frames, u64::from(FRAMES));
        println!(
            "{len} octets: forwarded {} ns, held {} ns (each with the clock's own)",
            per_frame[0], per_frame[1]
        );
    }
}
