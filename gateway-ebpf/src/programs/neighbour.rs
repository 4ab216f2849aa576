//! The neighbours' protocols, ARP and IPv6 neighbour discovery: what the gateway answers for the routers, and whose link-layer
//! addresses it translates in what goes on. Apart from the plain frames' way: all of it is rare.
//!
//! Of neighbour discovery (RFC 4861) only packets whose ICMPv6 message follows the IPv6 header at once are looked at; the
//! others are data (hosts accept no fragments of it, RFC 6980). What no host may accept is dropped here.

use core::ptr::write_unaligned;

use aya_ebpf::{bindings::xdp_md, helpers::generated::bpf_xdp_adjust_tail, programs::XdpContext};
use gateway_ebpf::{
    Outcome,
    frame::{
        ARP_REPLY, Arp, Eth, ICMPV6, IPV6_LEN, Icmpv6, Ipv6, LINK_OPTION_LEN, LinkOption, ND_ADVERTISEMENT,
        ND_HOP_LIMIT, ND_LEN_MAX, ND_OPTIONS_MAX, ND_REDIRECT, ND_ROUTER_ADVERTISEMENT,
        ND_ROUTER_SOLICITATION, ND_SOLICITATION, ND_SOURCE_LINK, ND_TARGET_LINK, NEIGHBOUR_LEN, Neighbour,
        WireIp6, WireMac, checksum, replaced, sum_up, wire_ip6_words, wire_mac_word, word_wire_mac,
    },
};

use super::{
    maps::{FoundNetwork, USER_BY_IP6, virtual_router_mac},
    tags::{at, len},
};

/// Makes a request for the router's address the answer to it.
#[inline(always)]
pub fn answer_for_router(eth: *mut Eth, arp: *mut Arp, virtual_mac: WireMac) {
    // SAFETY: both were checked by `at`, and the frame has not been moved since.
    unsafe {
        (*eth).dst = (*eth).src;
        (*eth).src = virtual_mac;
        (*arp).op = ARP_REPLY.to_be();
        let (asker, asker_ip) = ((*arp).sha, (*arp).spa);
        (*arp).sha = virtual_mac;
        (*arp).spa = (*arp).tpa;
        (*arp).tha = asker;
        (*arp).tpa = asker_ip;
    }
}

/// A MAC that no frame has.
const NO_MAC: u64 = u64::MAX;

/// Why a packet goes no further.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    Truncated,
    Malformed,
    RouterUnknown,
}

/// A neighbour discovery packet.
struct Discovery {
    kind: u8,
    src: WireIp6,
    /// Where its ICMPv6 message begins.
    icmp: usize,
    /// Where it ends.
    end: usize,
}

impl Discovery {
    /// The neighbour discovery in the IPv6 packet at `l3`, if it is any.
    #[inline(always)]
    fn read(ctx: &XdpContext, l3: usize) -> Result<Option<Self>, Fault> {
        let ip = at::<Ipv6>(ctx, l3).ok_or(Fault::Truncated)?;
        // SAFETY: checked by `at`.
        let ip = unsafe { &*ip };
        if ip.next != ICMPV6 {
            return Ok(None);
        }
        let icmp = at::<Icmpv6>(ctx, l3 + IPV6_LEN).ok_or(Fault::Truncated)?;
        // SAFETY: checked by `at`.
        let Icmpv6 { kind, code, .. } = unsafe { *icmp };
        if !(ND_ROUTER_SOLICITATION..=ND_REDIRECT).contains(&kind) {
            return Ok(None);
        }
        if ip.hops != ND_HOP_LIMIT || code != 0 {
            return Err(Fault::Malformed);
        }
        let icmp = l3 + IPV6_LEN;
        let end = icmp + usize::from(u16::from_be(ip.payload));
        Ok(Some(Self { kind, src: ip.src, icmp, end }))
    }

    /// Where its options begin.
    #[inline(always)]
    fn options(&self) -> Result<usize, Fault> {
        let first = self.icmp
            + match self.kind {
                ND_ROUTER_SOLICITATION => 8,
                ND_ROUTER_ADVERTISEMENT => 16,
                ND_REDIRECT => 40,
                _ => NEIGHBOUR_LEN,
            };
        let len = self.end - self.icmp;
        if first > self.end || len > ND_LEN_MAX { Err(Fault::Malformed) } else { Ok(first) }
    }

    /// Whom a solicitation or an advertisement is about.
    #[inline(always)]
    fn target(&self, ctx: &XdpContext) -> Result<Option<WireIp6>, Fault> {
        if self.kind != ND_SOLICITATION && self.kind != ND_ADVERTISEMENT {
            return Ok(None);
        }
        let neighbour = at::<Neighbour>(ctx, self.icmp).ok_or(Fault::Truncated)?;
        // SAFETY: checked by `at`.
        Ok(Some(unsafe { (*neighbour).target }))
    }
}

/// What is done to the options of a packet.
struct Translation {
    /// Where its ICMPv6 message begins.
    icmp: usize,
    /// Where its options begin.
    first: usize,
    /// Where they end.
    end: usize,
    /// This MAC gives way,
    from: u64,
    /// or any does,
    any: bool,
    /// to this one; [`NO_MAC`]: it is not known.
    to: u64,
}

/// Replaces MACs in link-layer address options, and mends the checksum.
#[inline(never)]
fn translate(ctx: *mut xdp_md, how: &Translation) -> Option<Fault> {
    let ctx = &XdpContext::new(ctx);
    let mut offset = how.first & 0xff;
    for _ in 0..ND_OPTIONS_MAX {
        if offset >= how.end {
            return None;
        }
        let Some(option) = at::<LinkOption>(ctx, offset) else { return Some(Fault::Truncated) };
        // SAFETY: checked by `at`.
        let LinkOption { kind, units, mac } = unsafe { *option };
        let next = offset + usize::from(units) * LINK_OPTION_LEN;
        if units == 0 || next > how.end {
            return Some(Fault::Malformed);
        }
        let is_link = units == 1 && (kind == ND_SOURCE_LINK || kind == ND_TARGET_LINK);
        if is_link && (how.any || wire_mac_word(mac) == how.from) {
            if how.to == NO_MAC {
                return Some(Fault::RouterUnknown);
            }
            let to = word_wire_mac(how.to);
            let Some(icmp) = at::<Icmpv6>(ctx, how.icmp & 0xff) else { return Some(Fault::Truncated) };
            // SAFETY: both were checked by `at`.
            unsafe {
                (*option).mac = to;
                (*icmp).checksum = replaced((*icmp).checksum, mac, to);
            }
        }
        offset = next;
    }
    (offset < how.end).then_some(Fault::Malformed)
}

/// What of the functions that are verified on their own (which is why they take and give numbers) goes on.
pub const GOES_ON: u32 = u32::MAX;

/// An IPv6 frame of a user, in the network at `index`: [`GOES_ON`] (with its options translated), or what becomes of it.
/// Packet pointers are void afterwards.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn neighbour_of_user(ctx: *mut xdp_md, l3: usize, index: u32) -> u32 {
    let Some(network) = FoundNetwork::at(index as u16) else { return Outcome::Internal as u32 };
    of_user(ctx, l3, network).map_or(GOES_ON, |outcome| outcome as u32)
}

#[inline(always)]
fn of_user(ctx: *mut xdp_md, l3: usize, network: FoundNetwork) -> Option<Outcome> {
    let outcome = |fault| {
        Some(match fault {
            Fault::Truncated => Outcome::AccessTruncated,
            Fault::Malformed => Outcome::AccessNdMalformed,
            Fault::RouterUnknown => Outcome::AccessRouterUnknown,
        })
    };
    let raw = ctx;
    let ctx = &XdpContext::new(raw);
    let l3 = l3 & 0x1f;
    let packet = match Discovery::read(ctx, l3) {
        Ok(Some(packet)) => packet,
        Ok(None) => return None,
        Err(fault) => return outcome(fault),
    };
    if packet.kind == ND_ROUTER_ADVERTISEMENT || packet.kind == ND_REDIRECT {
        return Some(Outcome::AccessNdRouter);
    }
    let first = match packet.options() {
        Ok(first) => first,
        Err(fault) => return outcome(fault),
    };
    match packet.target(ctx) {
        Ok(Some(target))
            if packet.kind == ND_SOLICITATION && network.has_address6(wire_ip6_words(target)) =>
        {
            return Some(match answer_solicitation(ctx, l3, packet.src, target) {
                Some(()) => Outcome::AccessNdAnswered,
                None => Outcome::AccessNoHeadroom,
            });
        }
        Ok(_) => {}
        Err(fault) => return outcome(fault),
    }
    let translation = Translation {
        icmp: packet.icmp,
        first,
        end: packet.end,
        from: virtual_router_mac(),
        any: false,
        to: network.router().mac().unwrap_or(NO_MAC),
    };
    translate(raw, &translation).and_then(outcome)
}

/// Makes a solicitation for the router's address the answer to it, whatever options it has. `None`: the driver cannot make
/// the frame as long as that.
#[inline(always)]
fn answer_solicitation(ctx: &XdpContext, l3: usize, asker: WireIp6, router: WireIp6) -> Option<()> {
    #[repr(C)]
    struct Advertisement {
        ip: Ipv6,
        neighbour: Neighbour,
        link: LinkOption,
    }
    const PAYLOAD: u16 = (NEIGHBOUR_LEN + LINK_OPTION_LEN) as u16;
    /// From a router, overriding what was known; and, unless nobody asked, solicited.
    const ROUTER_OVERRIDE: u16 = 0xa000;
    const SOLICITED: u16 = 0x4000;
    const ALL_NODES: WireIp6 = [0xff02_u16.to_be(), 0, 0, 0, 0, 0, 0, 1_u16.to_be()];

    let wanted = l3 + size_of::<Advertisement>();
    let change = wanted as i64 - len(ctx) as i64;
    // SAFETY: the context of this run.
    if change != 0 && unsafe { bpf_xdp_adjust_tail(ctx.ctx, change as i32) } != 0 {
        return None;
    }
    let eth = at::<Eth>(ctx, 0)?;
    let answer = at::<Advertisement>(ctx, l3)?;
    let mac = word_wire_mac(virtual_router_mac());
    // a host that tests whether the address is its own has none yet
    let (dst, flags) = match asker {
        [0, 0, 0, 0, 0, 0, 0, 0] => (ALL_NODES, ROUTER_OVERRIDE),
        asker => (asker, ROUTER_OVERRIDE | SOLICITED),
    };
    let mut advertisement = Advertisement {
        ip: Ipv6 {
            flow: [0x6000_u16.to_be(), 0],
            payload: PAYLOAD.to_be(),
            next: ICMPV6,
            hops: ND_HOP_LIMIT,
            src: router,
            dst,
        },
        neighbour: Neighbour {
            icmp: Icmpv6 { kind: ND_ADVERTISEMENT, code: 0, checksum: 0 },
            flags: [flags.to_be(), 0],
            target: router,
        },
        link: LinkOption { kind: ND_TARGET_LINK, units: 1, mac },
    };
    // the pseudo-header (RFC 8200, 8.1), then the message
    let mut sum = sum_up(0, router);
    sum = sum_up(sum, dst);
    sum = sum_up(sum, [PAYLOAD.to_be(), u16::from(ICMPV6).to_be()]);
    sum = sum_up(sum, [(u16::from(ND_ADVERTISEMENT) << 8).to_be(), flags.to_be()]);
    sum = sum_up(sum, router);
    sum = sum_up(sum, [(u16::from(ND_TARGET_LINK) << 8 | 1).to_be()]);
    advertisement.neighbour.icmp.checksum = checksum(sum_up(sum, mac));
    // SAFETY: both were checked by `at` after the change.
    unsafe {
        (*eth).dst = (*eth).src;
        (*eth).src = mac;
        write_unaligned(answer, advertisement);
    }
    Some(())
}

/// How an IPv6 frame came from the provider: its source MAC is the router's,
pub const BY_ROUTER: u32 = 1;
/// its destination MAC is a group's.
pub const TO_GROUP: u32 = 2;

/// An IPv6 frame from the network at `index`: [`GOES_ON`] as any other (with its options translated), or `WanNdForwarded` to
/// the user in the slot in the upper half, or what becomes of it. Packet pointers are void afterwards.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn neighbour_of_network(ctx: *mut xdp_md, l3: usize, index: u32, came: u32) -> u64 {
    let Some(network) = FoundNetwork::at(index as u16) else { return Outcome::Internal as u64 };
    let mut slot = 0;
    let outcome = of_network(ctx, l3, network, came, &mut slot).map_or(GOES_ON, |outcome| outcome as u32);
    u64::from(slot) << 32 | u64::from(outcome)
}

#[inline(always)]
fn of_network(
    ctx: *mut xdp_md,
    l3: usize,
    network: FoundNetwork,
    came: u32,
    slot: &mut u32,
) -> Option<Outcome> {
    let outcome = |fault| {
        Some(match fault {
            Fault::Truncated => Outcome::WanTruncated,
            // the virtual MAC is always known
            Fault::Malformed | Fault::RouterUnknown => Outcome::WanNdMalformed,
        })
    };
    let raw = ctx;
    let ctx = &XdpContext::new(raw);
    let l3 = l3 & 0x1f;
    let packet = match Discovery::read(ctx, l3) {
        Ok(Some(packet)) => packet,
        Ok(None) => return None,
        Err(fault) => return outcome(fault),
    };
    if (packet.kind == ND_ROUTER_ADVERTISEMENT || packet.kind == ND_REDIRECT) && came & BY_ROUTER == 0 {
        return Some(Outcome::WanNdRogue);
    }
    let first = match packet.options() {
        Ok(first) => first,
        Err(fault) => return outcome(fault),
    };
    let mut going_on = None;
    match packet.target(ctx) {
        Ok(Some(target)) => {
            let target = wire_ip6_words(target);
            // The users' own questions for it never get here: an answer is to the daemon's introduction.
            if network.has_address6(target) {
                return Some(Outcome::WanRouterNd);
            }
            if packet.kind == ND_SOLICITATION
                // SAFETY: the value is copied; a slot that was given to another since is settled by its network.
                && let Some(found) = unsafe { USER_BY_IP6.get(target) }
            {
                *slot = *found;
                going_on = Some(Outcome::WanNdForwarded);
            }
        }
        Ok(None) => {}
        Err(fault) => return outcome(fault),
    }
    if came & TO_GROUP != 0 && going_on.is_none() {
        return Some(Outcome::WanGroup);
    }
    let translation = Translation {
        icmp: packet.icmp,
        first,
        end: packet.end,
        from: network.router().mac().unwrap_or(NO_MAC),
        // whatever its MAC is by now
        any: network.has_address6(wire_ip6_words(packet.src)),
        to: virtual_router_mac(),
    };
    match translate(raw, &translation) {
        Some(fault) => outcome(fault),
        None => going_on,
    }
}
