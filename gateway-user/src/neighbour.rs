//! IPv6 neighbour discovery (RFC 4861) as the daemon meets it: what a router advertises of itself, and the translation of
//! link-layer addresses in frames that go to many. Pure; packets are octets from the IPv6 header on.

use std::net::Ipv6Addr;

use gateway_ebpf::frame::{
    ICMPV6, IPV6_LEN, ND_ADVERTISEMENT, ND_HOP_LIMIT, ND_REDIRECT, ND_ROUTER_ADVERTISEMENT,
    ND_ROUTER_SOLICITATION, ND_SOLICITATION, ND_SOURCE_LINK, ND_TARGET_LINK, NEIGHBOUR_LEN, checksum,
};

use crate::mac::Mac;

/// What a neighbour advertisement says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Advertisement {
    /// Whose link-layer address it tells.
    pub target: Ipv6Addr,
    /// That address, if it is there.
    pub link: Option<Mac>,
}

/// Type and message of the neighbour discovery in `packet`, if it is any that a host may accept.
fn message(packet: &[u8]) -> Option<(u8, &[u8])> {
    let header = packet.get(..IPV6_LEN)?;
    let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let message = packet.get(IPV6_LEN..IPV6_LEN + len)?;
    let (kind, code) = (*message.first()?, *message.get(1)?);
    let good = header[6] == ICMPV6 && header[7] == ND_HOP_LIMIT && code == 0 && message.len() >= 8;
    (good && (ND_ROUTER_SOLICITATION..=ND_REDIRECT).contains(&kind)).then_some((kind, message))
}

/// Where the options of a message begin.
const fn options_of(kind: u8) -> usize {
    match kind {
        ND_ROUTER_SOLICITATION => 8,
        ND_ROUTER_ADVERTISEMENT => 16,
        ND_REDIRECT => 40,
        _ => NEIGHBOUR_LEN,
    }
}

/// Where the MACs of its link-layer address options are; `None` if one of the options cannot be.
fn links(kind: u8, message: &[u8]) -> Option<Vec<(u8, usize)>> {
    let mut found = Vec::new();
    let mut at = options_of(kind);
    while at < message.len() {
        let (option, units) = (message[at], usize::from(*message.get(at + 1)?));
        let end = at + 8 * units;
        if units == 0 || end > message.len() {
            return None;
        }
        if units == 1 && (option == ND_SOURCE_LINK || option == ND_TARGET_LINK) {
            found.push((option, at + 2));
        }
        at = end;
    }
    Some(found)
}

/// The neighbour advertisement in `packet`, if it is one.
pub fn advertisement(packet: &[u8]) -> Option<Advertisement> {
    let (kind, message) = message(packet)?;
    let target = <[u8; 16]>::try_from(message.get(8..NEIGHBOUR_LEN)?).ok()?;
    let links = links(kind, message)?;
    if kind != ND_ADVERTISEMENT {
        return None;
    }
    let link = links.iter().find(|(option, _)| *option == ND_TARGET_LINK);
    let link = link.and_then(|(_, at)| message[*at..at + 6].try_into().ok()).map(Mac);
    Some(Advertisement { target: target.into(), link })
}

/// Whom a neighbour solicitation or advertisement in `packet` is about.
pub fn target(packet: &[u8]) -> Option<Ipv6Addr> {
    let (kind, message) = message(packet)?;
    let target = <[u8; 16]>::try_from(message.get(8..NEIGHBOUR_LEN)?).ok()?;
    (kind == ND_SOLICITATION || kind == ND_ADVERTISEMENT).then_some(target.into())
}

/// Replaces `from` by `to` in the link-layer address options of neighbour discovery, and mends the checksum.
pub fn translate(packet: &mut [u8], from: Mac, to: Mac) {
    let Some((kind, message)) = message(packet) else { return };
    let Some(links) = links(kind, message) else { return };
    let places: Vec<usize> =
        links.into_iter().map(|(_, at)| IPV6_LEN + at).filter(|at| packet[*at..at + 6] == from.0).collect();
    for at in places {
        let word = |octets: &[u8], i: usize| u16::from_ne_bytes([octets[2 * i], octets[2 * i + 1]]);
        let wire = |mac: Mac| [0, 1, 2].map(|i| word(&mac.0, i));
        let sum = IPV6_LEN + 2;
        let old = u16::from_ne_bytes([packet[sum], packet[sum + 1]]);
        let new = gateway_ebpf::frame::replaced(old, wire(from), wire(to));
        packet[sum..sum + 2].copy_from_slice(&new.to_ne_bytes());
        packet[at..at + 6].copy_from_slice(&to.0);
    }
}

/// Sets the checksum of the ICMPv6 message in `packet`, which is as long as its header says.
pub fn set_checksum(packet: &mut [u8]) {
    packet[IPV6_LEN + 2..IPV6_LEN + 4].fill(0);
    // the pseudo-header (RFC 8200, 8.1): addresses, length, next header
    let len = packet.len() - IPV6_LEN;
    let pairs = packet[8..].chunks(2).map(|pair| match pair {
        [a, b] => u16::from_be_bytes([*a, *b]),
        rest => u16::from_be_bytes([rest[0], 0]),
    });
    let sum = pairs.fold(len as u32 + u32::from(ICMPV6), |sum, word| sum + u32::from(word));
    packet[IPV6_LEN + 2..IPV6_LEN + 4].copy_from_slice(&checksum(sum).to_be_bytes());
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends there")]

    use super::*;

    const ROUTER: Mac = Mac([2, 0, 0, 0, 0x0a, 1]);
    const VIRTUAL: Mac = Mac([2, 0x48, 0x4f, 0, 0, 1]);

    /// A router advertisement: lifetimes, then a prefix, then the router's MAC.
    fn router_advertisement() -> Vec<u8> {
        let mut message = vec![134, 0, 0, 0, 64, 0, 0x07, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        message.extend([3, 4, 64, 0xc0]);
        message.extend([0x20; 28]);
        message.extend([[ND_SOURCE_LINK, 1].as_slice(), &ROUTER.0].concat());
        let mut packet = vec![0x60, 0, 0, 0, 0, message.len() as u8, ICMPV6, 255];
        packet.extend(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).octets());
        packet.extend(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets());
        packet.extend(message);
        set_checksum(&mut packet);
        packet
    }

    #[test]
    fn a_router_advertisement_tells_the_virtual_mac_and_its_checksum_stays_right() {
        let mut packet = router_advertisement();
        let before = packet.clone();
        translate(&mut packet, ROUTER, VIRTUAL);
        let mac = packet.len() - 6;
        assert_eq!(packet[mac..], VIRTUAL.0);
        let checksum = packet[42..44].to_vec();
        set_checksum(&mut packet);
        assert_eq!(packet[42..44], checksum);
        translate(&mut packet, VIRTUAL, ROUTER);
        assert_eq!(packet, before);
        translate(&mut packet, VIRTUAL, ROUTER);
        assert_eq!(packet, before, "another's is not touched");
    }

    #[test]
    fn a_damaged_packet_is_left_as_it_is() {
        let whole = router_advertisement();
        for len in 0..whole.len() {
            let mut cut = whole[..len].to_vec();
            translate(&mut cut, ROUTER, VIRTUAL);
            assert_eq!(cut, whole[..len]);
        }
        // hop limit, code, an option without length, one too long
        for (at, octet) in [(7, 64), (41, 1), (57, 0), (57, 40)] {
            let mut bad = whole.clone();
            bad[at] = octet;
            let before = bad.clone();
            translate(&mut bad, ROUTER, VIRTUAL);
            assert_eq!(bad, before, "{at}");
        }
    }
}
