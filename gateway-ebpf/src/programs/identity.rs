//! Who sent a frame, where that is not told by an untagged frame's source MAC alone; and whom a frame is for that no MAC
//! tells; and whether a guarded user's frame is from one of the user's addresses. Apart from the plain frames' way.

use aya_ebpf::{bindings::xdp_md, programs::XdpContext};
use gateway_ebpf::{
    Outcome, User, UserKey,
    frame::{
        Arp, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ICMPV6, IPV6_LEN, Ipv4, Ipv6, ND_ADVERTISEMENT,
        Neighbour, UDP, wire_ip_word, wire_ip6_words,
    },
};

use super::{
    maps::{FoundUser, USER_BY_IP, USER_BY_IP6, USER_BY_MAC, USER_INDEX, virtual_router_mac},
    neighbour::GOES_ON,
    tags::at,
};

/// Nobody's slot.
pub const UNKNOWN: u64 = u64::MAX;
/// Nobody's slot, as the frame is from another's MAC.
pub const SPOOFED: u64 = u64::MAX - 1;
/// With a slot: the tag is the access side's, not the user's own.
pub const ACCESS_TAG: u64 = 1 << 32;

/// Bit of a MAC's word that makes it a group's.
const GROUP: u64 = 0x0100_u16.to_be() as u64;

/// Who sends from `mac` with the tag `vid` (0: none), when an untagged frame of a user with that MAC it is not.
/// Answers with the slot and [`ACCESS_TAG`], or with [`UNKNOWN`] or [`SPOOFED`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sender(mac: u64, ifindex: u32, vid: u32) -> u64 {
    if mac == 0 || mac & GROUP != 0 {
        return UNKNOWN;
    }
    if mac == virtual_router_mac() {
        return SPOOFED;
    }
    // SAFETY: the value is copied.
    let owner = unsafe { USER_BY_MAC.get(mac) }.copied();
    // a tag that tells the user goes before one that is the user's own
    let keys = [(mac, vid), (UserKey::ANY_MAC, vid), (mac, 0), (UserKey::ANY_MAC, 0)];
    for (mac, tag) in keys {
        // SAFETY: the value is copied; below it is found out if it was replaced meanwhile.
        let Some(slot) = (unsafe { USER_INDEX.get(UserKey { mac, ifindex, tag }) }) else { continue };
        let slot = *slot;
        let Some(user) = FoundUser::in_slot(slot) else { return UNKNOWN };
        let access = user.access();
        let known_by = if mac == UserKey::ANY_MAC { 0 } else { mac };
        if User::mac_of(user.identity) != known_by
            || access.ifindex() != ifindex
            || u32::from(access.tag()) != tag
        {
            return UNKNOWN;
        }
        if owner.is_some_and(|owner| owner != slot) {
            return SPOOFED;
        }
        return u64::from(slot) | if tag == 0 { 0 } else { ACCESS_TAG };
    }
    if owner.is_some() { SPOOFED } else { UNKNOWN }
}

/// The slot of the user that an IP packet at `l3` is for, by address; [`UNKNOWN`] for none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn receiver(ctx: *mut xdp_md, l3: usize, ethertype: u16) -> u64 {
    let ctx = &XdpContext::new(ctx);
    let l3 = l3 & 0x1f;
    let slot = if ethertype == ETHERTYPE_IPV4.to_be() {
        let Some(ip) = at::<Ipv4>(ctx, l3) else { return UNKNOWN };
        // SAFETY: checked by `at`; the value is copied, and who has it by now is the caller's matter.
        unsafe { USER_BY_IP.get(wire_ip_word((*ip).dst)) }
    } else if ethertype == ETHERTYPE_IPV6.to_be() {
        let Some(ip) = at::<Ipv6>(ctx, l3) else { return UNKNOWN };
        // SAFETY: as above.
        unsafe { USER_BY_IP6.get(wire_ip6_words((*ip).dst)) }
    } else {
        None
    };
    slot.map_or(UNKNOWN, |slot| u64::from(*slot))
}

/// Whether a frame is from one of the addresses of the user in `slot`, or from none where a host may have none yet: DHCP, ARP
/// probes (RFC 5227), and of IPv6 what a host sends before it has an address. [`GOES_ON`], or what becomes of it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn guarded(ctx: *mut xdp_md, l3: usize, ethertype: u16, slot: u32) -> u32 {
    guard(ctx, l3, ethertype, slot).map_or(GOES_ON, |outcome| outcome as u32)
}

#[inline(always)]
fn guard(ctx: *mut xdp_md, l3: usize, ethertype: u16, slot: u32) -> Option<Outcome> {
    /// The client's port, then the server's.
    const DHCP: [u16; 2] = [68_u16.to_be(), 67_u16.to_be()];
    /// Next header: hop-by-hop options, which multicast listener reports have.
    const HOP_BY_HOP: u8 = 0;
    let ctx = &XdpContext::new(ctx);
    let l3 = l3 & 0x1f;
    let own = |owner: Option<&u32>| match owner {
        Some(owner) if *owner == slot => None,
        _ => Some(Outcome::AccessGuarded),
    };
    if ethertype == ETHERTYPE_IPV4.to_be() {
        let Some(ip) = at::<Ipv4>(ctx, l3) else { return Some(Outcome::AccessTruncated) };
        // SAFETY: checked by `at`.
        let Ipv4 { version_length, protocol, src, .. } = unsafe { *ip };
        if wire_ip_word(src) == 0 {
            let ports = at::<[u16; 2]>(ctx, l3 + size_of::<Ipv4>());
            // SAFETY: checked by `at`.
            let dhcp = version_length == 0x45
                && protocol == UDP
                && ports.is_some_and(|ports| unsafe { *ports } == DHCP);
            return (!dhcp).then_some(Outcome::AccessGuarded);
        }
        // SAFETY: the value is compared only.
        return own(unsafe { USER_BY_IP.get(wire_ip_word(src)) });
    }
    if ethertype == ETHERTYPE_ARP.to_be() {
        let Some(arp) = at::<Arp>(ctx, l3) else { return Some(Outcome::AccessTruncated) };
        // SAFETY: checked by `at`.
        let sender = wire_ip_word(unsafe { (*arp).spa });
        // SAFETY: the value is compared only.
        return if sender == 0 { None } else { own(unsafe { USER_BY_IP.get(sender) }) };
    }
    if ethertype == ETHERTYPE_IPV6.to_be() {
        let Some(ip) = at::<Ipv6>(ctx, l3) else { return Some(Outcome::AccessTruncated) };
        // SAFETY: checked by `at`.
        let Ipv6 { next, src, .. } = unsafe { *ip };
        let src = wire_ip6_words(src);
        if src == [0, 0] {
            return (next != ICMPV6 && next != HOP_BY_HOP).then_some(Outcome::AccessGuarded);
        }
        // SAFETY: the value is compared only.
        if let refused @ Some(_) = own(unsafe { USER_BY_IP6.get(src) }) {
            return refused;
        }
        if next == ICMPV6
            && let Some(neighbour) = at::<Neighbour>(ctx, l3 + IPV6_LEN)
        {
            // SAFETY: checked by `at`.
            let Neighbour { icmp, target, .. } = unsafe { *neighbour };
            if icmp.kind == ND_ADVERTISEMENT {
                // SAFETY: the value is compared only.
                return own(unsafe { USER_BY_IP6.get(wire_ip6_words(target)) });
            }
        }
    }
    None
}
