//! Headers as they lie in a frame, and the arithmetic on their fields.
//!
//! All fields are 16-bit units in network byte order: an Ethernet header starts at an even address, tags are four bytes,
//! so no load is misaligned.

/// IEEE 802.1Q customer tag.
pub const TPID_8021Q: u16 = 0x8100;
/// IEEE 802.1ad service tag.
pub const TPID_8021AD: u16 = 0x88a8;
/// Address Resolution Protocol.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// Internet Protocol, version 4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// Internet Protocol, version 6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// ARP operation: who has.
pub const ARP_REQUEST: u16 = 1;
/// ARP operation: is at.
pub const ARP_REPLY: u16 = 2;
/// Largest VID that may stand in a frame (IEEE 802.1Q, table 9-2: 0xfff is reserved).
pub const VID_MAX: u16 = 0xffe;
/// Octets of an Ethernet header.
pub const ETH_LEN: usize = 14;
/// Octets of a tag.
pub const TAG_LEN: usize = 4;
/// Octets of an ARP packet for IPv4 over Ethernet.
pub const ARP_LEN: usize = 28;
/// Octets of an IPv6 header.
pub const IPV6_LEN: usize = 40;
/// Octets of a neighbour solicitation or advertisement without options.
pub const NEIGHBOUR_LEN: usize = 24;
/// Octets of a link-layer address option.
pub const LINK_OPTION_LEN: usize = 8;
/// IPv4 and IPv6: User Datagram Protocol.
pub const UDP: u8 = 17;
/// IPv6: Internet Control Message Protocol.
pub const ICMPV6: u8 = 58;
/// Hop limit of every neighbour discovery packet (RFC 4861): it has crossed no router.
pub const ND_HOP_LIMIT: u8 = 255;
/// ICMPv6 type: router solicitation, the first of neighbour discovery's.
pub const ND_ROUTER_SOLICITATION: u8 = 133;
/// ICMPv6 type: router advertisement.
pub const ND_ROUTER_ADVERTISEMENT: u8 = 134;
/// ICMPv6 type: neighbour solicitation.
pub const ND_SOLICITATION: u8 = 135;
/// ICMPv6 type: neighbour advertisement.
pub const ND_ADVERTISEMENT: u8 = 136;
/// ICMPv6 type: redirect, the last of neighbour discovery's.
pub const ND_REDIRECT: u8 = 137;
/// Neighbour discovery option: link-layer address of the sender.
pub const ND_SOURCE_LINK: u8 = 1;
/// Neighbour discovery option: link-layer address of the target.
pub const ND_TARGET_LINK: u8 = 2;
/// Longest ICMPv6 message of neighbour discovery: what fits a frame of 1500 octets, so that all of it is in the first
/// buffer of any driver. A longer one is refused.
pub const ND_LEN_MAX: usize = 1460;
/// Most options of one neighbour discovery packet that are looked at; with more it is refused.
pub const ND_OPTIONS_MAX: u32 = 16;

/// A MAC address in a frame.
pub type WireMac = [u16; 3];

/// Ethernet header.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Eth {
    /// Destination.
    pub dst: WireMac,
    /// Source.
    pub src: WireMac,
    /// EtherType, or the TPID of a tag.
    pub ethertype: u16,
}

/// What follows a TPID.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tag {
    /// PCP (3 bits), DEI (1), VID (12).
    pub tci: u16,
    /// EtherType of what is inside.
    pub ethertype: u16,
}

/// ARP for IPv4 over Ethernet (RFC 826).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Arp {
    /// Hardware type; 1.
    pub htype: u16,
    /// Protocol type; 0x0800.
    pub ptype: u16,
    /// Hardware and protocol address lengths; 6 and 4.
    pub lengths: u16,
    /// Operation.
    pub op: u16,
    /// Sender hardware address.
    pub sha: WireMac,
    /// Sender protocol address.
    pub spa: [u16; 2],
    /// Target hardware address.
    pub tha: WireMac,
    /// Target protocol address.
    pub tpa: [u16; 2],
}

/// An IPv6 address in a frame.
pub type WireIp6 = [u16; 8];

/// An IPv6 address as two numbers, for maps and comparisons: the frame's 16-bit units as they are in memory. Zero is the
/// unspecified address, and no address of anybody.
pub type Ip6Words = [u64; 2];

/// IPv6 header (RFC 8200).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv6 {
    /// Version, traffic class, flow label.
    pub flow: [u16; 2],
    /// Octets behind this header.
    pub payload: u16,
    /// What follows.
    pub next: u8,
    /// Hop limit.
    pub hops: u8,
    /// Source.
    pub src: WireIp6,
    /// Destination.
    pub dst: WireIp6,
}

/// What every ICMPv6 message begins with (RFC 4443).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Icmpv6 {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Over the message and a pseudo-header.
    pub checksum: u16,
}

/// A neighbour solicitation or advertisement (RFC 4861) without options.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Neighbour {
    /// Type, code, checksum.
    pub icmp: Icmpv6,
    /// Advertisement: from a router, solicited, override. Solicitation: reserved.
    pub flags: [u16; 2],
    /// Whose link-layer address is asked or told.
    pub target: WireIp6,
}

/// A link-layer address option for Ethernet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LinkOption {
    /// [`ND_SOURCE_LINK`] or [`ND_TARGET_LINK`].
    pub kind: u8,
    /// In units of 8 octets; 1.
    pub units: u8,
    /// The address.
    pub mac: WireMac,
}

/// The fixed part of an IPv4 header (RFC 791), as far as there is a rule for it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv4 {
    /// Version and header length.
    pub version_length: u8,
    /// DSCP and ECN.
    pub service: u8,
    /// Length, identification, fragment.
    pub fragment: [u16; 3],
    /// Time to live.
    pub ttl: u8,
    /// What follows.
    pub protocol: u8,
    /// Of the header.
    pub checksum: u16,
    /// Source address.
    pub src: [u16; 2],
    /// Destination address.
    pub dst: [u16; 2],
}

/// A MAC as one number, for maps and comparisons: the frame's three 16-bit units as they are in memory.
#[inline(always)]
pub const fn wire_mac_word(mac: WireMac) -> u64 {
    mac[0] as u64 | (mac[1] as u64) << 16 | (mac[2] as u64) << 32
}

/// The inverse of [`wire_mac_word`].
#[inline(always)]
pub const fn word_wire_mac(word: u64) -> WireMac {
    [word as u16, (word >> 16) as u16, (word >> 32) as u16]
}

/// As [`wire_mac_word`], from octets.
pub const fn mac_word(mac: [u8; 6]) -> u64 {
    wire_mac_word([
        u16::from_ne_bytes([mac[0], mac[1]]),
        u16::from_ne_bytes([mac[2], mac[3]]),
        u16::from_ne_bytes([mac[4], mac[5]]),
    ])
}

/// The octets of a MAC; other bits of `word` are ignored.
pub const fn mac_octets(word: u64) -> [u8; 6] {
    let [a, b, c] = word_wire_mac(word);
    let (a, b, c) = (a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes());
    [a[0], a[1], b[0], b[1], c[0], c[1]]
}

/// An IPv4 address as one number, for maps and comparisons.
#[inline(always)]
pub const fn wire_ip_word(ip: [u16; 2]) -> u32 {
    ip[0] as u32 | (ip[1] as u32) << 16
}

/// As [`wire_ip_word`], from octets.
pub const fn ip_word(ip: [u8; 4]) -> u32 {
    wire_ip_word([u16::from_ne_bytes([ip[0], ip[1]]), u16::from_ne_bytes([ip[2], ip[3]])])
}

/// The octets of an address made by [`ip_word`].
pub const fn ip_octets(word: u32) -> [u8; 4] {
    let (a, b) = ((word as u16).to_ne_bytes(), ((word >> 16) as u16).to_ne_bytes());
    [a[0], a[1], b[0], b[1]]
}

/// An IPv6 address of a frame as numbers.
#[inline(always)]
pub const fn wire_ip6_words(ip: WireIp6) -> Ip6Words {
    const fn word(a: u16, b: u16, c: u16, d: u16) -> u64 {
        a as u64 | (b as u64) << 16 | (c as u64) << 32 | (d as u64) << 48
    }
    [word(ip[0], ip[1], ip[2], ip[3]), word(ip[4], ip[5], ip[6], ip[7])]
}

/// As [`wire_ip6_words`], from octets.
pub const fn ip6_words(ip: [u8; 16]) -> Ip6Words {
    let mut wire = [0; 8];
    let mut i = 0;
    while i < 8 {
        wire[i] = u16::from_ne_bytes([ip[2 * i], ip[2 * i + 1]]);
        i += 1;
    }
    wire_ip6_words(wire)
}

/// Adds to a ones' complement sum (RFC 1071) that is not folded yet. Of 16-bit units as they are in memory: the sum does
/// not depend on their byte order.
#[inline(always)]
pub const fn sum_up<const N: usize>(mut sum: u32, units: [u16; N]) -> u32 {
    let mut i = 0;
    while i < N {
        sum += units[i] as u32;
        i += 1;
    }
    sum
}

/// The checksum of a sum that is not folded yet (of less than 2^16 units).
#[inline(always)]
pub const fn checksum(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// The checksum after a MAC that it covers was replaced (RFC 1624, equation 3): a wrong one stays wrong.
#[inline(always)]
pub const fn replaced(old: u16, from: WireMac, to: WireMac) -> u16 {
    checksum(sum_up(sum_up(!old as u32, [!from[0], !from[1], !from[2]]), to))
}

/// Puts `vid` into a TCI (host byte order), keeping PCP and DEI.
#[inline(always)]
pub const fn with_vid(tci: u16, vid: u16) -> u16 {
    (tci & 0xf000) | (vid & 0x0fff)
}

/// The VID of a TCI (host byte order).
#[inline(always)]
pub const fn vid(tci: u16) -> u16 {
    tci & 0x0fff
}

/// Whether the destination is of the range that bridges never forward, 01:80:c2:00:00:00 to 0f (IEEE 802.1Q, 8.6.3):
/// STP, LACP, LLDP, EAPOL, pause.
#[inline(always)]
pub const fn is_link_local(dst: WireMac) -> bool {
    dst[0] == u16::from_be(0x0180) && dst[1] == u16::from_be(0xc200) && dst[2] & u16::from_be(0xfff0) == 0
}

/// Whether the destination is a group address.
#[inline(always)]
pub const fn is_group(dst: WireMac) -> bool {
    dst[0] & u16::from_be(0x0100) != 0
}

/// Whether this is ARP for IPv4 over Ethernet, the only kind there is a rule for.
#[inline(always)]
pub const fn is_ipv4_over_ethernet(arp: &Arp) -> bool {
    arp.htype == u16::from_be(1) && arp.ptype == u16::from_be(0x0800) && arp.lengths == u16::from_be(0x0604)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x02, 0x48, 0x4f, 0x00, 0xff, 0x01];

    #[test]
    fn headers_have_the_size_of_the_standard() {
        assert_eq!(size_of::<Eth>(), ETH_LEN);
        assert_eq!(size_of::<Tag>(), TAG_LEN);
        assert_eq!(size_of::<Arp>(), ARP_LEN);
        assert_eq!(size_of::<Ipv6>(), IPV6_LEN);
        assert_eq!(size_of::<Neighbour>(), NEIGHBOUR_LEN);
        assert_eq!(size_of::<LinkOption>(), LINK_OPTION_LEN);
        assert_eq!(core::mem::offset_of!(Ipv4, dst), 16);
        assert_eq!(size_of::<Ipv4>(), 20);
        for align in [
            align_of::<Eth>(),
            align_of::<Tag>(),
            align_of::<Arp>(),
            align_of::<Ipv6>(),
            align_of::<Neighbour>(),
            align_of::<LinkOption>(),
        ] {
            assert_eq!(align, 2);
        }
    }

    #[test]
    fn a_checksum_stays_right_when_a_mac_in_it_is_replaced() {
        let wire = |mac: [u8; 6]| word_wire_mac(mac_word(mac));
        let rest = [0x1234_u16, 0xffff, 0x8700];
        for (from, to) in [(MAC, [0; 6]), ([0; 6], MAC), (MAC, [0xff; 6]), ([0xff; 6], [0; 6]), (MAC, MAC)] {
            let of = |mac| checksum(sum_up(sum_up(0, rest), wire(mac)));
            assert_eq!(replaced(of(from), wire(from), wire(to)), of(to));
        }
    }

    #[test]
    fn ipv6_addresses_are_told_apart_by_every_octet() {
        let address = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        for octet in 0..16 {
            let mut other = address;
            other[octet] ^= 1;
            assert_ne!(ip6_words(address), ip6_words(other));
        }
        assert_eq!(ip6_words([0; 16]), [0, 0]);
    }

    #[test]
    fn macs_and_addresses_survive_the_way_there_and_back() {
        assert_eq!(mac_octets(mac_word(MAC)), MAC);
        assert_eq!(
            word_wire_mac(mac_word(MAC)),
            [
                u16::from_ne_bytes([0x02, 0x48]),
                u16::from_ne_bytes([0x4f, 0x00]),
                u16::from_ne_bytes([0xff, 0x01])
            ]
        );
        assert_eq!(mac_word(MAC) >> 48, 0, "the upper bits are free for flags");
        assert_eq!(ip_octets(ip_word([203, 0, 113, 10])), [203, 0, 113, 10]);
    }

    #[test]
    fn a_new_vid_keeps_pcp_and_dei() {
        for tci in 0..=u16::MAX {
            assert_eq!(with_vid(tci, 2), (tci & 0xf000) | 2);
        }
    }

    #[test]
    fn link_local_is_exactly_the_sixteen_addresses() {
        let wire = |mac: [u8; 6]| word_wire_mac(mac_word(mac));
        for last in 0..=255 {
            assert_eq!(is_link_local(wire([1, 0x80, 0xc2, 0, 0, last])), last < 16, "{last}");
        }
        assert!(!is_link_local(wire([1, 0x80, 0xc2, 0, 1, 0])));
        assert!(!is_link_local(wire([1, 0x80, 0xc3, 0, 0, 0])));
        assert!(!is_link_local(wire([0, 0x80, 0xc2, 0, 0, 0])));
    }

    #[test]
    fn groups_have_the_lowest_bit_of_the_first_octet() {
        let wire = |mac: [u8; 6]| word_wire_mac(mac_word(mac));
        assert!(is_group(wire([0xff; 6])));
        assert!(is_group(wire([0x33, 0x33, 0, 0, 0, 1])));
        assert!(!is_group(wire([0x02, 0x01, 0x01, 0x01, 0x01, 0x01])));
    }
}
