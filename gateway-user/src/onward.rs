//! A held frame as it goes on, and the marker: octets in, octets out. **Pure.**
//!
//! What the `access` program does to a frame that it forwards, for the frames it keeps: IPv4 alone, so there is no
//! translation in the payload. Tests compare the two.

use std::net::Ipv4Addr;

use gateway_ebpf::{
    Network,
    frame::{ETH_LEN, ETHERTYPE_IPV4, TAG_LEN, TPID_8021AD, TPID_8021Q, vid},
    words::{Link, Router},
};

use crate::mac::Mac;

/// Shortest Ethernet frame without its checksum (IEEE 802.3), and with a tag.
const SHORTEST: usize = 60;
const UDP: u8 = 17;

/// `frame`, as a user sent it (under the access side's tag `access_tag`, unless that is 0), on its way into `network`. `None`
/// if there is no such network, or it takes no frame with so many tags, or its router is not known and the frame is for it.
pub fn onward(frame: &[u8], virtual_mac: Mac, network: Network, access_tag: u16) -> Option<Vec<u8>> {
    let link = Link(network.link);
    if !link.in_use() || frame.len() < ETH_LEN {
        return None;
    }
    let tagged = |at: usize| frame.get(at..at + 2) == Some(&TPID_8021Q.to_be_bytes());
    let (tci, mut rest) = if tagged(12) {
        (u16::from_be_bytes(frame.get(14..16)?.try_into().ok()?), frame.get(16..)?)
    } else {
        (0, &frame[12..])
    };
    let own = tagged(12) && vid(tci) != 0 && vid(tci) != access_tag && link.is_service();
    if own {
        // behind the service tag
        rest = &frame[12..];
    }
    if tagged(12) && tagged(16) && (own || !link.is_service()) {
        return None;
    }
    let mut out = Vec::with_capacity(frame.len() + TAG_LEN);
    if frame[..6] == virtual_mac.0 {
        out.extend(Mac::from_word(Router(network.router).mac()?).0);
    } else {
        out.extend(&frame[..6]);
    }
    out.extend(&frame[6..12]);
    push_tag(&mut out, tci, link);
    out.extend(rest);
    Some(out)
}

/// After the addresses: the tag of a network, of a frame that had `tci` (0: none).
fn push_tag(frame: &mut Vec<u8>, tci: u16, link: Link) {
    if link.vid() != 0 {
        let tpid = if link.is_service() { TPID_8021AD } else { TPID_8021Q };
        frame.extend(tpid.to_be_bytes());
        frame.extend(link.tci(tci).to_be_bytes());
    }
}

/// A UDP datagram from a user to the service, to be seen there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marker {
    /// The user's MAC and address.
    pub from: (Mac, Ipv4Addr),
    /// The router's MAC in the user's network.
    pub router: Mac,
    /// How that network is reached.
    pub link: Link,
    /// The service's address and the port there, which is the source port as well.
    pub to: (Ipv4Addr, u16),
    /// Its payload.
    pub nonce: u64,
}

impl Marker {
    /// The frame.
    pub fn frame(&self) -> Vec<u8> {
        let (mac, source) = self.from;
        let (address, port) = self.to;
        let payload = self.nonce.to_be_bytes();
        let udp_len = (8 + payload.len()) as u16;
        let mut udp = [port.to_be_bytes(), port.to_be_bytes(), udp_len.to_be_bytes(), [0; 2]].concat();
        udp.extend(payload);
        let pseudo =
            [&source.octets()[..], &address.octets(), &[0, UDP], &udp_len.to_be_bytes(), &udp].concat();
        // 0 would say that there is none (RFC 768)
        let sum = match checksum(&pseudo) {
            0 => 0xffff,
            sum => sum,
        };
        udp[6..8].copy_from_slice(&sum.to_be_bytes());

        // version and header length, DSCP, total length; identification; don't fragment; TTL, protocol, checksum
        let mut ip = vec![0x45, 0];
        ip.extend((20 + udp_len).to_be_bytes());
        ip.extend([0, 0, 0x40, 0, 64, UDP, 0, 0]);
        ip.extend(source.octets());
        ip.extend(address.octets());
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());

        let mut frame = [self.router.0, mac.0].concat();
        push_tag(&mut frame, 0, self.link);
        frame.extend(ETHERTYPE_IPV4.to_be_bytes());
        frame.extend(ip);
        frame.extend(udp);
        let shortest = if self.link.vid() == 0 { SHORTEST } else { SHORTEST + TAG_LEN };
        frame.resize(frame.len().max(shortest), 0);
        frame
    }
}

/// The Internet checksum (RFC 1071) of an even number of octets.
fn checksum(octets: &[u8]) -> u16 {
    let mut sum: u32 =
        octets.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends there")]

    use super::*;

    const VIRTUAL: Mac = Mac([0x02, 0x48, 0x4f, 0, 0, 1]);
    const TARO: Mac = Mac([2, 0, 0, 0, 1, 1]);
    const ROUTER: Mac = Mac([2, 0, 0, 0, 0x0a, 1]);

    fn behind(router: Router, link: Link) -> Network {
        let (address6, spare) = ([0; 2], [0; 2]);
        Network { router: router.0, link: link.0, address: 0, ifindex: 0, address6, spare }
    }

    fn network(vid: u16, router: Router) -> Network {
        behind(router, Link::new(vid, 0))
    }

    fn frame(dst: Mac, tci: Option<u16>) -> Vec<u8> {
        let mut frame = [dst.0, TARO.0].concat();
        if let Some(tci) = tci {
            frame.extend([0x81, 0]);
            frame.extend(tci.to_be_bytes());
        }
        frame.extend([8, 0, 0x45, 1, 2, 3]);
        frame
    }

    #[test]
    fn a_held_frame_gets_the_networks_tag_and_router() {
        let known = Router::at(ROUTER.word());
        for (tci, vid, expected) in [
            (None, 2, Some(2)),
            (Some(0xe000), 2, Some(0xe002)),
            (Some(0xb001), 2, Some(0xb002)),
            (Some(0xb001), 0, None),
            (None, 0, None),
        ] {
            let out = onward(&frame(VIRTUAL, tci), VIRTUAL, network(vid, known), 0).unwrap();
            assert_eq!(out, frame(ROUTER, expected), "{tci:?} {vid}");
        }
        let elsewhere = Mac([2, 9, 9, 9, 9, 9]);
        let out = onward(&frame(elsewhere, None), VIRTUAL, network(2, Router::UNKNOWN), 0).unwrap();
        assert_eq!(out, frame(elsewhere, Some(2)), "what is not for the router needs none");
        assert_eq!(onward(&frame(VIRTUAL, None), VIRTUAL, network(2, Router::UNKNOWN), 0), None);
        let none = behind(known, Link::NONE);
        assert_eq!(onward(&frame(VIRTUAL, None), VIRTUAL, none, 0), None);
        for len in 0..ETH_LEN {
            assert_eq!(onward(&frame(VIRTUAL, Some(1))[..len], VIRTUAL, network(2, known), 0), None);
        }
    }

    #[test]
    fn a_held_frame_keeps_its_own_tag_behind_a_service_tag() {
        let service = |tci: u16| [&[0x88, 0xa8], &tci.to_be_bytes()[..]].concat();
        let link = Link::new(2, 0).service();
        let known = Router::at(ROUTER.word());
        let out = |frame: &[u8], link, access| onward(frame, VIRTUAL, behind(known, link), access);
        let own = frame(VIRTUAL, Some(0xe009));
        let inside = |outer: Vec<u8>, rest: &[u8]| [&ROUTER.0[..], &TARO.0, &outer, rest].concat();
        assert_eq!(out(&own, link, 0), Some(inside(service(0xe002), &own[12..])));
        assert_eq!(out(&own, link.with_pcp(1), 0), Some(inside(service(0x2002), &own[12..])));
        assert_eq!(out(&own, link, 9), Some(inside(service(0xe002), &own[16..])), "the access side's");
        let both = [&own[..12], &[0x81, 0, 0, 9], &own[12..]].concat();
        assert_eq!(out(&both, link, 9), Some(inside(service(2), &own[12..])));
        assert_eq!(out(&both, link, 0), None, "two of its own");
        assert_eq!(out(&both, Link::new(2, 0), 9), None);
    }

    /// The sum over everything, checksum included, is all ones.
    fn is_whole(octets: &[u8]) -> bool {
        checksum(octets) == 0
    }

    #[test]
    fn the_marker_is_a_datagram_with_good_checksums() {
        for nonce in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef, 0xffff_0000_ffff_0001] {
            let marker = Marker {
                from: (TARO, Ipv4Addr::new(10, 1, 0, 100)),
                router: ROUTER,
                link: Link::new(1, 0),
                to: (Ipv4Addr::new(203, 0, 113, 10), 47_000),
                nonce,
            };
            let tagged = marker.frame();
            assert_eq!(tagged.len(), 64);
            assert_eq!(tagged[..18], [&ROUTER.0[..], &TARO.0, &[0x81, 0, 0, 1, 8, 0]].concat());
            let ip = &tagged[18..];
            assert_eq!((ip[0], ip[9], &ip[12..20]), (0x45, 17, &[10, 1, 0, 100, 203, 0, 113, 10][..]));
            assert!(is_whole(&ip[..20]));
            let udp = &ip[20..36];
            assert_eq!((&udp[2..6], &udp[8..]), (&[0xb7, 0x98, 0, 16][..], &nonce.to_be_bytes()[..]));
            assert!(is_whole(&[&ip[12..20], &[0, 17, 0, 16], udp].concat()));
            assert_ne!(udp[6..8], [0, 0], "there is a checksum");
            let untagged = Marker { link: Link::new(0, 0), ..marker }.frame();
            assert_eq!(untagged.len(), 60);
            assert_eq!((&untagged[..12], &untagged[12..50]), (&tagged[..12], &tagged[16..54]));
        }
    }
}
