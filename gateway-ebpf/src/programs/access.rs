//! The rules for frames from the users.

use aya_ebpf::{helpers::generated::bpf_get_smp_processor_id, programs::XdpContext};
use gateway_ebpf::{
    Access, Outcome, User,
    frame::{
        ARP_REQUEST, Arp, ETHERTYPE_ARP, ETHERTYPE_IPV6, Eth, TPID_8021AD, TPID_8021Q, is_ipv4_over_ethernet,
        is_link_local, wire_ip_word, wire_mac_word, word_wire_mac,
    },
};

use super::{
    identity::{ACCESS_TAG, SPOOFED, UNKNOWN, guarded, sender},
    keep::{Keep, keep},
    maps::{FoundNetwork, FoundUser, virtual_router_mac},
    neighbour::{GOES_ON, answer_for_router, neighbour_of_user},
    tags::{BadTags, Headers, Outer, at, fits, redirect, retag},
    watch::{Watched, stamp},
};

#[inline(always)]
pub fn from_user(ctx: &XdpContext) -> Result<Outcome, Outcome> {
    let eth = at::<Eth>(ctx, 0).ok_or(Outcome::AccessTruncated)?;
    // SAFETY: checked by `at`.
    let Eth { dst, src, .. } = unsafe { *eth };
    if is_link_local(dst) {
        return Ok(Outcome::AccessLinkLocal);
    }
    let headers = Headers::read::<true>(ctx, eth).map_err(|bad| match bad {
        BadTags::Truncated => Outcome::AccessTruncated,
        BadTags::Service => Outcome::AccessServiceTag,
        BadTags::Stacked => Outcome::AccessStackedTags,
        BadTags::ReservedVid => Outcome::AccessReservedVid,
    })?;
    let found = find(ctx, wire_mac_word(src), headers.vid())?;
    let user = &found.user;
    let mut eth = eth;
    if found.access.guard() {
        let refused = guarded(ctx.ctx, headers.l3, headers.ethertype, found.slot);
        if refused != GOES_ON {
            return Err(Outcome::from_index(refused).unwrap_or(Outcome::Internal));
        }
        eth = at::<Eth>(ctx, 0).ok_or(Outcome::Internal)?;
    }

    let word = user.word();
    if word.switch() == 0 {
        return send(ctx, eth, &headers, &found, word.a());
    }

    // SAFETY: helpers without arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let run = Watched::begin(cpu).ok_or(Outcome::Internal)?;
    let result = match user.select(word) {
        None => Err(Outcome::AccessGeneration),
        Some(selection) => match keep(ctx, &headers, found.slot, word, selection.phase) {
            Keep::Kept(result) => result,
            kept => match send(ctx, eth, &headers, &found, selection.network) {
                Ok(Outcome::AccessForwarded) => {
                    // `a` is what the switch turns away from
                    if selection.network == word.a() {
                        stamp(cpu, word.switch());
                    }
                    Ok(match kept {
                        Keep::Expired => Outcome::AccessHoldExpired,
                        _ => Outcome::AccessForwarded,
                    })
                }
                other => other,
            },
        },
    };
    run.end();
    result
}

/// The sender of a frame.
struct Found {
    slot: u32,
    user: FoundUser,
    access: Access,
    /// The outer tag is the access side's, not the user's own.
    access_tag: bool,
}

/// Who sent a frame from `mac` with the tag `vid` (0: none).
#[inline(always)]
fn find(ctx: &XdpContext, mac: u64, vid: u16) -> Result<Found, Outcome> {
    let ifindex = ctx.ingress_ifindex() as u32;
    let way = Access::new(ifindex, vid, false).by_mac();
    if let Some((slot, user, access)) = FoundUser::at_home(mac, |access| access.same_way(way)) {
        return Ok(Found { slot, user, access, access_tag: vid != 0 });
    }
    match sender(mac, ifindex, vid.into()) {
        UNKNOWN => Err(Outcome::AccessUnknownUser),
        SPOOFED => Err(Outcome::AccessSpoofed),
        sender => {
            let (slot, access_tag) = (sender as u32, sender & ACCESS_TAG != 0);
            let user = FoundUser::in_slot(slot).ok_or(Outcome::Internal)?;
            let access = user.access();
            Ok(Found { slot, user, access, access_tag })
        }
    }
}

/// A user's frame into `network`.
#[inline(always)]
fn send(
    ctx: &XdpContext,
    eth: *mut Eth,
    headers: &Headers,
    found: &Found,
    network: u16,
) -> Result<Outcome, Outcome> {
    let index = network;
    let network = FoundNetwork::at(index).ok_or(Outcome::Internal)?;
    let link = network.link();
    if !link.in_use() {
        return Err(Outcome::AccessNoNetwork);
    }
    let virtual_mac = virtual_router_mac();
    let router = network.router().mac();
    let identity = found.user.identity;
    let mut eth = eth;

    // SAFETY: `eth` was checked by `at`, and the frame has not been moved since.
    if User::mac_of(identity) == 0 && router == Some(wire_mac_word(unsafe { (*eth).src })) {
        return Err(Outcome::AccessSpoofed);
    }
    if headers.ethertype == ETHERTYPE_IPV6.to_be() {
        match neighbour_of_user(ctx.ctx, headers.l3, index.into()) {
            GOES_ON => {}
            told => match Outcome::from_index(told).unwrap_or(Outcome::Internal) {
                Outcome::AccessNdAnswered => {
                    return redirect(
                        User::port_of(identity),
                        Outcome::AccessNdAnswered,
                        Outcome::AccessNoPort,
                    );
                }
                refused => return Err(refused),
            },
        }
        eth = at::<Eth>(ctx, 0).ok_or(Outcome::Internal)?;
    }
    if headers.ethertype == ETHERTYPE_ARP.to_be() {
        let arp = at::<Arp>(ctx, headers.l3).ok_or(Outcome::AccessTruncated)?;
        // SAFETY: checked by `at`, here and below; the frame is not moved before the last use.
        let (is_arp, op, target) =
            unsafe { (is_ipv4_over_ethernet(&*arp), (*arp).op, wire_ip_word((*arp).tpa)) };
        if !is_arp {
            return Err(Outcome::AccessArpMalformed);
        }
        if op == ARP_REQUEST.to_be() && target == network.address() && target != 0 {
            answer_for_router(eth, arp, word_wire_mac(virtual_mac));
            // not XDP_TX: a veth never wakes a peer without an XDP program for that (its
            // veth_xdp_flush; seen on Linux 6.18)
            return redirect(User::port_of(identity), Outcome::AccessArpAnswered, Outcome::AccessNoPort);
        }
        // SAFETY: as above.
        unsafe {
            if wire_mac_word((*arp).tha) == virtual_mac {
                (*arp).tha = word_wire_mac(router.ok_or(Outcome::AccessRouterUnknown)?);
            }
        }
    }

    // SAFETY: `eth` was checked by `at`, and the frame has not been moved since.
    unsafe {
        if wire_mac_word((*eth).dst) == virtual_mac {
            (*eth).dst = word_wire_mac(router.ok_or(Outcome::AccessRouterUnknown)?);
        }
    }

    // A tag that is the user's own stays, behind a service tag; else the network's takes its place. A priority tag is none.
    let replace = headers.tci.is_some() && (found.access_tag || headers.vid() == 0 || !link.is_service());
    if headers.inner && !(replace && link.is_service()) {
        return Err(Outcome::AccessStackedTags);
    }
    if !fits(ctx, link.port(), replace) {
        return Err(Outcome::AccessTooLong);
    }
    let tpid = if link.is_service() { TPID_8021AD } else { TPID_8021Q };
    let outer = (link.vid() != 0).then(|| Outer { tpid, tci: link.tci(headers.tci.unwrap_or(0)) });
    retag(ctx, replace, outer).ok_or(Outcome::AccessNoHeadroom)?;
    redirect(link.port(), Outcome::AccessForwarded, Outcome::AccessNoPort)
}
