//! The rules for frames from the users.

use aya_ebpf::{helpers::generated::bpf_get_smp_processor_id, programs::XdpContext};
use gateway_ebpf::{
    Outcome, User, UserKey,
    frame::{
        ARP_REQUEST, ETH_LEN, ETHERTYPE_ARP, Eth, Tag, is_ipv4_over_ethernet, is_link_local, wire_ip_word,
        wire_mac_word, with_vid, word_wire_mac,
    },
};

use super::{
    keep::{Keep, keep},
    maps::{FoundNetwork, FoundUser, USER_INDEX, virtual_router_mac},
    neighbour::answer_for_router,
    tags::{BadTags, Headers, at, fits, pop_tag, push_tag, redirect},
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
    let headers = Headers::read(ctx, eth).map_err(|bad| match bad {
        BadTags::Truncated => Outcome::AccessTruncated,
        BadTags::Service => Outcome::AccessServiceTag,
        BadTags::Stacked => Outcome::AccessStackedTags,
        BadTags::ReservedVid => Outcome::AccessReservedVid,
    })?;

    let mac = wire_mac_word(src);
    let key = UserKey { mac, ifindex: ctx.ingress_ifindex() as u32, tag: 0 };
    // SAFETY: the value is copied; `by_mac` finds out if it was replaced meanwhile.
    let slot = *unsafe { USER_INDEX.get(key) }.ok_or(Outcome::AccessUnknownUser)?;
    let user = FoundUser::by_mac(slot, mac).ok_or(Outcome::AccessUnknownUser)?;

    let word = user.word();
    if word.switch() == 0 {
        return send(ctx, eth, &headers, &user, word.a());
    }

    // SAFETY: helpers without arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let run = Watched::begin(cpu).ok_or(Outcome::Internal)?;
    let result = match user.select(word) {
        None => Err(Outcome::AccessGeneration),
        Some(selection) => match keep(ctx, &headers, slot, word, selection.phase) {
            Keep::Kept(result) => result,
            kept => match send(ctx, eth, &headers, &user, selection.network) {
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

/// A user's frame into `network`.
#[inline(always)]
fn send(
    ctx: &XdpContext,
    eth: *mut Eth,
    headers: &Headers,
    user: &FoundUser,
    network: u16,
) -> Result<Outcome, Outcome> {
    let network = FoundNetwork::at(network).ok_or(Outcome::Internal)?;
    let link = network.link();
    if !link.in_use() {
        return Err(Outcome::AccessNoNetwork);
    }
    let virtual_mac = virtual_router_mac();
    let router = network.router().mac();

    if headers.ethertype == ETHERTYPE_ARP.to_be() {
        let arp = headers.arp(ctx).ok_or(Outcome::AccessTruncated)?;
        // SAFETY: checked by `at`, here and below; the frame is not moved before the last use.
        let (is_arp, op, target) =
            unsafe { (is_ipv4_over_ethernet(&*arp), (*arp).op, wire_ip_word((*arp).tpa)) };
        if !is_arp {
            return Err(Outcome::AccessArpMalformed);
        }
        if op == ARP_REQUEST.to_be() && target == network.address() {
            answer_for_router(eth, arp, word_wire_mac(virtual_mac));
            // not XDP_TX: a veth never wakes a peer without an XDP program for that (its
            // veth_xdp_flush; seen on Linux 6.18)
            return redirect(User::port_of(user.identity), Outcome::AccessArpAnswered, Outcome::AccessNoPort);
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

    if !fits(ctx, link.port(), headers.tci.is_some()) {
        return Err(Outcome::AccessTooLong);
    }
    match (headers.tci, link.vid()) {
        (None, 0) => {}
        (None, vid) => push_tag(ctx, vid).ok_or(Outcome::AccessNoHeadroom)?,
        (Some(_), 0) => pop_tag(ctx).ok_or(Outcome::AccessNoHeadroom)?,
        (Some(tci), vid) => {
            let tag = at::<Tag>(ctx, ETH_LEN).ok_or(Outcome::AccessTruncated)?;
            // SAFETY: checked by `at`.
            unsafe { (*tag).tci = with_vid(tci, vid).to_be() };
        }
    }
    redirect(link.port(), Outcome::AccessForwarded, Outcome::AccessNoPort)
}
