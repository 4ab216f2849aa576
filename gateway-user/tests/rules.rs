//! The rules beyond plain frames, one by one, on the loaded programs, each result octet by octet: service tags, access tags,
//! source guard, neighbour discovery, and that nothing of one network's users reaches another's.

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::net::Ipv6Addr;

use common::*;
use gateway_ebpf::Outcome;
use handover_api::v1;
use handover_gateway::mac::Mac;

const DROP: u32 = 1;
const PASS: u32 = 2;
const REDIRECT: u32 = 4;
const IPV6: u16 = 0x86dd;

const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const TARO6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x100);
const HANAKO6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x101);
const OTHER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x999);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The inventory with IPv6 everywhere, a carrier's network (service tag 5) with `carol`, who has tags of her own, and `theo`
/// behind the access side's tag 9.
fn rig() -> Rig {
    let mut request = inventory();
    for network in &mut request.networks {
        network.router_address6 = ROUTER6.to_string();
    }
    request.networks.push(v1::Network {
        tpid: Some(0x88a8),
        router_address6: ROUTER6.to_string(),
        ..network("carrier", Some(5), Some(ROUTER1))
    });
    request.users[0].addresses.push(TARO6.to_string());
    request.users[1].addresses.push(HANAKO6.to_string());
    request.users.push(user("carol", CAROL, "10.1.0.103", "carrier"));
    request.users.push(v1::User {
        mac: String::new(),
        tag: Some(9),
        ..user("theo", THEO, "10.1.0.104", "net1")
    });
    let mut rig = Rig::empty(16);
    rig.configure(&request);
    rig
}

const CAROL: Mac = Mac([0x02, 0, 0, 0, 1, 4]);
const THEO: Mac = Mac([0x02, 0, 0, 0, 1, 5]);

/// A frame with these tags (TPID, TCI), outermost first.
fn tagged(dst: Mac, src: Mac, tags: &[(u16, u16)], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [dst.0, src.0].concat();
    for (tpid, tci) in tags {
        frame.extend(tpid.to_be_bytes());
        frame.extend(tci.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

#[track_caller]
fn forwarded(ran: &Ran, outcome: Outcome, frame: &[u8]) {
    assert_eq!((ran.outcome, ran.verdict), (outcome, REDIRECT));
    assert_eq!(ran.frame, frame, "\n  is {:02x?}\n  not {frame:02x?}", ran.frame);
}

/// With this verdict, and as it came.
#[track_caller]
fn as_it_came(ran: &Ran, outcome: Outcome, verdict: u32, frame: &[u8]) {
    assert_eq!((ran.outcome, ran.verdict), (outcome, verdict));
    assert_eq!(ran.frame, frame, "\n  is {:02x?}\n  not {frame:02x?}", ran.frame);
}

const C: u16 = 0x8100;
const S: u16 = 0x88a8;
const DATA: [u8; 50] = [7; 50];

#[test]
fn a_service_tag_goes_around_a_users_own_and_comes_off_again() {
    let mut rig = rig();
    let own = 5 << 13 | 1 << 12 | 77;
    // pushed, with the priority the user gave the frame; the user's own stays
    let ran = rig.access(&tagged(VIRTUAL, CAROL, &[(C, own)], IPV4, &DATA));
    let out = tagged(ROUTER1, CAROL, &[(S, own & 0xf000 | 5), (C, own)], IPV4, &DATA);
    forwarded(&ran, Outcome::AccessForwarded, &out);
    let ran = rig.access(&tagged(VIRTUAL, CAROL, &[], IPV4, &DATA));
    forwarded(&ran, Outcome::AccessForwarded, &tagged(ROUTER1, CAROL, &[(S, 5)], IPV4, &DATA));
    // a priority tag is no tag of the user's: its place is taken
    let ran = rig.access(&tagged(VIRTUAL, CAROL, &[(C, 3 << 13)], IPV4, &DATA));
    forwarded(&ran, Outcome::AccessForwarded, &tagged(ROUTER1, CAROL, &[(S, 3 << 13 | 5)], IPV4, &DATA));
    // popped
    let ran = rig.wan(&tagged(CAROL, ROUTER1, &[(S, 5), (C, own)], IPV4, &DATA));
    forwarded(&ran, Outcome::WanForwarded, &tagged(CAROL, VIRTUAL, &[(C, own)], IPV4, &DATA));
    let ran = rig.wan(&tagged(CAROL, ROUTER1, &[(S, 7 << 13 | 5)], IPV4, &DATA));
    forwarded(&ran, Outcome::WanForwarded, &tagged(CAROL, VIRTUAL, &[], IPV4, &DATA));
    // ARP for r behind the user's own tag is answered behind it
    let asked = tagged(BROADCAST, CAROL, &[(C, 77)], ARP, &arp(1, CAROL, [10, 1, 0, 103], Mac([0; 6]), R));
    let told = tagged(CAROL, VIRTUAL, &[(C, 77)], ARP, &arp(2, VIRTUAL, R, CAROL, [10, 1, 0, 103]));
    forwarded(&rig.access(&asked), Outcome::AccessArpAnswered, &told);

    for (tags, outcome) in [
        (&[(C, 5)][..], Outcome::WanUnknownNetwork),
        (&[(S, 1)], Outcome::WanUnknownNetwork),
        (&[(C, 5), (C, 77)], Outcome::WanStackedTags),
        (&[(C, 5), (S, 77)], Outcome::WanStackedTags),
        (&[(S, 5), (S, 77)], Outcome::WanStackedTags),
        (&[(S, 5), (C, 77), (C, 78)], Outcome::WanStackedTags),
    ] {
        let frame = tagged(CAROL, ROUTER1, tags, IPV4, &DATA);
        as_it_came(&rig.wan(&frame), outcome, DROP, &frame);
    }
    for (src, tags, outcome) in [
        (CAROL, &[(S, 5)][..], Outcome::AccessServiceTag),
        (CAROL, &[(C, 77), (C, 78)], Outcome::AccessStackedTags),
        (CAROL, &[(C, 4095)], Outcome::AccessReservedVid),
        (TARO, &[(C, 77), (C, 78)], Outcome::AccessStackedTags),
        (TARO, &[(C, 77), (S, 78)], Outcome::AccessStackedTags),
    ] {
        let frame = tagged(VIRTUAL, src, tags, IPV4, &DATA);
        let ran = rig.access(&frame);
        assert_eq!((ran.outcome, ran.verdict), (outcome, DROP), "{tags:04x?}");
    }
}

#[test]
fn a_network_can_set_the_priority() {
    let mut rig = Rig::empty(16);
    let mut request = inventory();
    request.networks[0].pcp = Some(3);
    rig.configure(&request);
    for (came, left) in [(None, 3 << 13 | 1), (Some(7 << 13 | 1 << 12 | 9), 3 << 13 | 1 << 12 | 1)] {
        let tags: Vec<_> = came.iter().map(|tci| (C, *tci)).collect();
        let ran = rig.access(&tagged(VIRTUAL, TARO, &tags, IPV4, &DATA));
        forwarded(&ran, Outcome::AccessForwarded, &tagged(ROUTER1, TARO, &[(C, left)], IPV4, &DATA));
    }
}

#[test]
fn the_access_sides_tag_is_taken_off_and_put_back_on() {
    let mut rig = rig();
    // whatever the MAC
    for mac in [THEO, OTHER] {
        let ran = rig.access(&tagged(VIRTUAL, mac, &[(C, 2 << 13 | 9)], IPV4, &DATA));
        let out = tagged(ROUTER1, mac, &[(C, 2 << 13 | 1)], IPV4, &DATA);
        forwarded(&ran, Outcome::AccessForwarded, &out);
    }
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1];
    packet.extend([10, 1, 0, 104]);
    packet.extend([0; 30]);
    let ran = rig.wan(&tagged(THEO, ROUTER1, &[(C, 6 << 13 | 1)], IPV4, &packet));
    let out = tagged(THEO, VIRTUAL, &[(C, 6 << 13 | 9)], IPV4, &packet);
    forwarded(&ran, Outcome::WanForwarded, &out);
    let other = tagged(VIRTUAL, THEO, &[(C, 10)], IPV4, &DATA);
    as_it_came(&rig.access(&other), Outcome::AccessUnknownUser, DROP, &other);
    // a known MAC behind the tag of another is another's
    let stolen = tagged(VIRTUAL, TARO, &[(C, 9)], IPV4, &DATA);
    as_it_came(&rig.access(&stolen), Outcome::AccessSpoofed, DROP, &stolen);
    for mac in [VIRTUAL, ROUTER1] {
        let stolen = tagged(VIRTUAL, mac, &[(C, 9)], IPV4, &DATA);
        as_it_came(&rig.access(&stolen), Outcome::AccessSpoofed, DROP, &stolen);
    }
}

fn ipv4(src: [u8; 4], protocol: u8, ports: [u16; 2]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0];
    packet.extend(src);
    packet.extend([203, 0, 113, 10]);
    packet.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
    packet.extend([0; 26]);
    packet
}

fn ipv6(src: Ipv6Addr, dst: Ipv6Addr, next: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, hops]);
    packet.extend(src.octets());
    packet.extend(dst.octets());
    packet.extend(payload);
    packet
}

/// With its checksum (RFC 8200, 8.1), as added up here.
fn icmpv6(src: Ipv6Addr, dst: Ipv6Addr, hops: u8, message: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    let mut summed = [&src.octets()[..], &dst.octets()].concat();
    summed.extend((message.len() as u32).to_be_bytes());
    summed.extend([0, 0, 0, 58]);
    summed.extend(&message);
    summed.resize(summed.len().next_multiple_of(2), 0);
    let mut sum: u32 = summed.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    message[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    ipv6(src, dst, 58, hops, &message)
}

fn link_option(kind: u8, mac: Mac) -> Vec<u8> {
    [&[kind, 1][..], &mac.0].concat()
}

fn solicitation(target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), options].concat()
}

fn advertisement(flags: u8, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    [&[136, 0, 0, 0, flags, 0, 0, 0][..], &target.octets(), options].concat()
}

fn router_advertisement(options: &[u8]) -> Vec<u8> {
    [&[134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0][..], options].concat()
}

#[test]
fn a_guarded_user_sends_from_the_users_own_addresses_alone() {
    let mut rig = Rig::empty(16);
    let mut request = inventory();
    request.users[0].guard = true;
    request.users[0].addresses.push(TARO6.to_string());
    rig.configure(&request);
    let arp_of = |spa| arp(1, TARO, spa, Mac([0; 6]), [10, 1, 0, 77]);
    let made = TARO.link_local();
    let none = Ipv6Addr::UNSPECIFIED;
    let told = |of| icmpv6(TARO6, ALL_NODES, 255, &advertisement(0x20, of, &link_option(2, TARO)));
    for (ethertype, payload, good) in [
        (IPV4, ipv4(TARO_IP, 17, [4000, 9]), true),
        (IPV4, ipv4(HANAKO_IP, 17, [4000, 9]), false),
        (IPV4, ipv4([0; 4], 17, [68, 67]), true),
        (IPV4, ipv4([0; 4], 17, [68, 68]), false),
        (IPV4, ipv4([0; 4], 6, [68, 67]), false),
        (ARP, arp_of(TARO_IP), true),
        (ARP, arp_of([0; 4]), true),
        (ARP, arp_of(HANAKO_IP), false),
        (IPV6, ipv6(TARO6, OTHER6, 17, 64, &DATA), true),
        (IPV6, ipv6(made, OTHER6, 17, 64, &DATA), true),
        (IPV6, ipv6(OTHER6, TARO6, 17, 64, &DATA), false),
        (IPV6, ipv6(none, ALL_NODES, 17, 64, &DATA), false),
        (IPV6, icmpv6(none, ALL_NODES, 255, &solicitation(TARO6, &[])), true),
        (IPV6, told(TARO6), true),
        (IPV6, told(OTHER6), false),
    ] {
        let came = tagged(OTHER, TARO, &[], ethertype, &payload);
        let ran = rig.access(&came);
        if good {
            let out = tagged(OTHER, TARO, &[(C, 1)], ethertype, &payload);
            forwarded(&ran, Outcome::AccessForwarded, &out);
        } else {
            as_it_came(&ran, Outcome::AccessGuarded, DROP, &came);
        }
    }
    // hanako is not guarded
    let ran = rig.access(&tagged(OTHER, HANAKO, &[], IPV4, &ipv4(TARO_IP, 17, [4000, 9])));
    let out = tagged(OTHER, HANAKO, &[(C, 2)], IPV4, &ipv4(TARO_IP, 17, [4000, 9]));
    forwarded(&ran, Outcome::AccessForwarded, &out);
}

#[test]
fn nothing_goes_from_one_networks_users_to_anothers() {
    let mut rig = rig();
    // taro (net1) to hanako (net2): into net1, and nowhere else
    let ran = rig.access(&tagged(HANAKO, TARO, &[], IPV4, &DATA));
    forwarded(&ran, Outcome::AccessForwarded, &tagged(HANAKO, TARO, &[(C, 1)], IPV4, &DATA));
    // what comes back out of net1 for hanako is not let in, whatever it is
    let of_taro = |dst| arp(1, TARO, TARO_IP, dst, HANAKO_IP);
    let asked6 = icmpv6(TARO6, ALL_NODES, 255, &solicitation(HANAKO6, &link_option(1, TARO)));
    for (dst, ethertype, payload) in [
        (HANAKO, IPV4, DATA.to_vec()),
        (HANAKO, IPV6, ipv6(TARO6, HANAKO6, 17, 64, &DATA)),
        (BROADCAST, ARP, of_taro(Mac([0; 6]))),
        (HANAKO, ARP, arp(2, TARO, TARO_IP, HANAKO, HANAKO_IP)),
        (Mac([0x33, 0x33, 0, 0, 0, 1]), IPV6, asked6),
        (HANAKO, IPV6, icmpv6(TARO6, HANAKO6, 255, &advertisement(0x60, TARO6, &link_option(2, TARO)))),
    ] {
        let frame = tagged(dst, TARO, &[(C, 1)], ethertype, &payload);
        as_it_came(&rig.wan(&frame), Outcome::WanStaleNetwork, DROP, &frame);
        // the same from net2 reaches hanako
        let frame = tagged(dst, TARO, &[(C, 2)], ethertype, &payload);
        let ran = rig.wan(&frame);
        assert_eq!(ran.verdict, REDIRECT, "{:?}", ran.outcome);
        assert_eq!(ran.frame, tagged(HANAKO, TARO, &[], ethertype, &payload));
    }
    // and broadcast is the daemon's to give to whom it is for
    let all = tagged(BROADCAST, TARO, &[(C, 1)], IPV4, &DATA);
    as_it_came(&rig.wan(&all), Outcome::WanGroup, PASS, &all);
}

#[test]
fn a_solicitation_for_the_router_is_answered_with_the_virtual_mac() {
    let mut rig = rig();
    let group = Mac([0x33, 0x33, 0xff, 0, 0, 1]);
    let to_group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 1);
    let answer =
        |dst, flags| icmpv6(ROUTER6, dst, 255, &advertisement(flags, ROUTER6, &link_option(2, VIRTUAL)));
    for (asker, options, dst, flags) in [
        (TARO6, link_option(1, TARO), TARO6, 0xe0),
        (TARO6, vec![], TARO6, 0xe0),
        // a nonce beside it (RFC 3971)
        (TARO6, [link_option(1, TARO), vec![14, 1, 1, 2, 3, 4, 5, 6]].concat(), TARO6, 0xe0),
        // a test whether it is taken
        (Ipv6Addr::UNSPECIFIED, vec![], ALL_NODES, 0xa0),
    ] {
        let asked = icmpv6(asker, to_group, 255, &solicitation(ROUTER6, &options));
        for tags in [&[][..], &[(C, 7 << 13)]] {
            let ran = rig.access(&tagged(group, TARO, tags, IPV6, &asked));
            let out = tagged(TARO, VIRTUAL, tags, IPV6, &answer(dst, flags));
            forwarded(&ran, Outcome::AccessNdAnswered, &out);
        }
    }
    // another's is the network's to answer, as it is
    let asked = icmpv6(TARO6, to_group, 255, &solicitation(OTHER6, &link_option(1, TARO)));
    let ran = rig.access(&tagged(group, TARO, &[], IPV6, &asked));
    forwarded(&ran, Outcome::AccessForwarded, &tagged(group, TARO, &[(C, 1)], IPV6, &asked));
    // what no host may accept
    let good = solicitation(ROUTER6, &link_option(1, TARO));
    let mut code = good.clone();
    code[1] = 1;
    let mut unit = good.clone();
    unit[25] = 0;
    for (hops, message) in [(254, &good), (255, &code)] {
        let frame = tagged(group, TARO, &[], IPV6, &icmpv6(TARO6, to_group, hops, message));
        as_it_came(&rig.access(&frame), Outcome::AccessNdMalformed, DROP, &frame);
    }
    let endless = solicitation(OTHER6, &unit[24..]);
    let frame = tagged(group, TARO, &[], IPV6, &icmpv6(TARO6, to_group, 255, &endless));
    as_it_came(&rig.access(&frame), Outcome::AccessNdMalformed, DROP, &frame);
}

#[test]
fn routers_advertise_and_users_do_not() {
    let mut rig = rig();
    let prefix = [&[3, 4, 64, 0xc0, 0, 0, 0, 9, 0, 0, 0, 9, 0, 0, 0, 0][..], &TARO6.octets()].concat();
    let says = |mac| {
        icmpv6(ROUTER6, TARO6, 255, &router_advertisement(&[link_option(1, mac), prefix.clone()].concat()))
    };
    // to one user (an answer to a solicitation): the MAC in it is the virtual one
    let ran = rig.wan(&tagged(TARO, ROUTER1, &[(C, 1)], IPV6, &says(ROUTER1)));
    forwarded(&ran, Outcome::WanForwarded, &tagged(TARO, VIRTUAL, &[], IPV6, &says(VIRTUAL)));
    // to all: the daemon's
    let all = icmpv6(ROUTER6, ALL_NODES, 255, &router_advertisement(&link_option(1, ROUTER1)));
    let frame = tagged(Mac([0x33, 0x33, 0, 0, 0, 1]), ROUTER1, &[(C, 1)], IPV6, &all);
    as_it_came(&rig.wan(&frame), Outcome::WanGroup, PASS, &frame);
    // of somebody else, of another network's router, of a user
    for (mac, vid) in [(OTHER, 1), (ROUTER2, 1), (ROUTER1, 2), (HANAKO, 1)] {
        let frame = tagged(TARO, mac, &[(C, vid)], IPV6, &says(mac));
        as_it_came(&rig.wan(&frame), Outcome::WanNdRogue, DROP, &frame);
    }
    let frame = tagged(VIRTUAL, TARO, &[], IPV6, &says(TARO));
    as_it_came(&rig.access(&frame), Outcome::AccessNdRouter, DROP, &frame);
    let redirect = [&[137, 0, 0, 0, 0, 0, 0, 0][..], &OTHER6.octets(), &OTHER6.octets()].concat();
    let frame = tagged(VIRTUAL, TARO, &[], IPV6, &icmpv6(TARO6, HANAKO6, 255, &redirect));
    as_it_came(&rig.access(&frame), Outcome::AccessNdRouter, DROP, &frame);
    // a redirect of the router's names routers by the virtual MAC
    let with = |mac| icmpv6(ROUTER6, TARO6, 255, &[redirect.clone(), link_option(2, mac)].concat());
    let ran = rig.wan(&tagged(TARO, ROUTER1, &[(C, 1)], IPV6, &with(ROUTER1)));
    forwarded(&ran, Outcome::WanForwarded, &tagged(TARO, VIRTUAL, &[], IPV6, &with(VIRTUAL)));

    // the router asks for a user: to that user alone, from the virtual MAC, inside, too
    let asks = |mac| icmpv6(ROUTER6, ALL_NODES, 255, &solicitation(TARO6, &link_option(1, mac)));
    let ran = rig.wan(&tagged(Mac([0x33, 0x33, 0xff, 0, 1, 0]), ROUTER1, &[(C, 1)], IPV6, &asks(ROUTER1)));
    forwarded(&ran, Outcome::WanNdForwarded, &tagged(TARO, VIRTUAL, &[], IPV6, &asks(VIRTUAL)));
    // and what it says of its own address is the daemon's
    let says = icmpv6(ROUTER6, ALL_NODES, 255, &advertisement(0xa0, ROUTER6, &link_option(2, ROUTER1)));
    let frame = tagged(TARO, ROUTER1, &[(C, 1)], IPV6, &says);
    as_it_came(&rig.wan(&frame), Outcome::WanRouterNd, PASS, &frame);
    // a user's answer to the router names the router as the router knows itself
    let told = |mac| icmpv6(TARO6, ROUTER6, 255, &advertisement(0x60, TARO6, &link_option(2, mac)));
    let ran = rig.access(&tagged(VIRTUAL, TARO, &[], IPV6, &told(TARO)));
    forwarded(&ran, Outcome::AccessForwarded, &tagged(ROUTER1, TARO, &[(C, 1)], IPV6, &told(TARO)));
}
