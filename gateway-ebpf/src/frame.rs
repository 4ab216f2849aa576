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
/// Internet Protocol version 4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
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

/// The fixed part of an IPv4 header (RFC 791), as far as there is a rule for it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv4 {
    /// Version to checksum, and the source address.
    pub before: [u16; 8],
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
        assert_eq!(core::mem::offset_of!(Ipv4, dst), 16);
        for align in [align_of::<Eth>(), align_of::<Tag>(), align_of::<Arp>()] {
            assert_eq!(align, 2);
        }
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
