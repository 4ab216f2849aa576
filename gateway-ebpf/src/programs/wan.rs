//! The rules for frames from the provider.

use core::ptr::read_volatile;

use aya_ebpf::programs::XdpContext;
use gateway_ebpf::{
    Outcome, User,
    frame::{
        ARP_REQUEST, Arp, ETHERTYPE_ARP, Eth, WireMac, is_group, is_ipv4_over_ethernet, is_link_local, vid,
        wire_ip_word, wire_mac_word, word_wire_mac,
    },
};

use super::{
    maps::{FoundNetwork, FoundUser, NETWORK_BY_VID, USER_BY_IP, USER_BY_MAC, virtual_router_mac},
    tags::{BadTags, Headers, at, fits, pop_tag, redirect},
};

#[inline(always)]
pub fn to_user(ctx: &XdpContext) -> Result<Outcome, Outcome> {
    let eth = at::<Eth>(ctx, 0).ok_or(Outcome::WanTruncated)?;
    // SAFETY: checked by `at`.
    let Eth { dst, src, .. } = unsafe { *eth };
    if is_link_local(dst) {
        return Ok(Outcome::WanLinkLocal);
    }
    let headers = Headers::read(ctx, eth).map_err(|bad| match bad {
        BadTags::Truncated => Outcome::WanTruncated,
        BadTags::Service => Outcome::WanServiceTag,
        BadTags::Stacked => Outcome::WanStackedTags,
        BadTags::ReservedVid => Outcome::WanUnknownNetwork,
    })?;

    // a priority tag (VID 0) is no tag as far as the network is concerned
    let by_vid = NETWORK_BY_VID.get_ptr(vid(headers.tci.unwrap_or(0)).into()).ok_or(Outcome::Internal)?;
    // SAFETY: an element of the map, read as the one word that the daemon writes.
    let index = unsafe { read_volatile(by_vid) } as u16;
    let network = FoundNetwork::at(index).ok_or(Outcome::Internal)?;
    if !network.link().in_use() {
        return Err(Outcome::WanUnknownNetwork);
    }
    let virtual_mac = virtual_router_mac();
    let router = network.router().mac();

    let mut outcome = Outcome::WanForwarded;
    let user = if headers.ethertype == ETHERTYPE_ARP.to_be() {
        let arp = headers.arp(ctx).ok_or(Outcome::WanTruncated)?;
        // SAFETY: checked by `at`, here and below; the frame is not moved before the last use.
        let Arp { op, sha, spa, tpa, .. } = unsafe { *arp };
        // SAFETY: as above.
        if !is_ipv4_over_ethernet(unsafe { &*arp }) {
            return Err(Outcome::WanArpMalformed);
        }
        let (sender, target) = (wire_ip_word(spa), wire_ip_word(tpa));
        let by_router = sender == network.address();
        let is_request = op == ARP_REQUEST.to_be();
        // The users' own requests for r never get here, so an answer from r is to the daemon's introduction; and what the
        // router announces of itself the users need not know: for them it has the one virtual MAC.
        if by_router && (!is_request || target == sender) {
            return Ok(Outcome::WanRouterArp);
        }
        if !is_request && is_group(dst) {
            return Ok(Outcome::WanGroup);
        }
        if by_router || router == Some(wire_mac_word(sha)) {
            // SAFETY: as above.
            unsafe { (*arp).sha = word_wire_mac(virtual_mac) };
        }
        if is_request {
            outcome = Outcome::WanArpForwarded;
            // SAFETY: the value is copied; a slot that was given to another since is settled by its network.
            let slot = *unsafe { USER_BY_IP.get(target) }.ok_or(Outcome::WanUnknownUser)?;
            FoundUser::in_slot(slot).ok_or(Outcome::Internal)?
        } else {
            by_destination(dst)?
        }
    } else if is_group(dst) {
        return Ok(Outcome::WanGroup);
    } else {
        by_destination(dst)?
    };

    let selection = user.select(user.word()).ok_or(Outcome::WanGeneration)?;
    if !selection.accepts(index) {
        return Err(Outcome::WanStaleNetwork);
    }

    // SAFETY: `eth` was checked by `at`, and the frame has not been moved since.
    unsafe {
        if router == Some(wire_mac_word(src)) {
            (*eth).src = word_wire_mac(virtual_mac);
        }
        (*eth).dst = word_wire_mac(User::mac_of(user.identity));
    }
    let port = User::port_of(user.identity);
    if headers.tci.is_some() {
        pop_tag(ctx).ok_or(Outcome::WanNoHeadroom)?;
    }
    if !fits(ctx, port, false) {
        return Err(Outcome::WanTooLong);
    }
    redirect(port, outcome, Outcome::WanNoPort)
}

/// The user a frame from the WAN is addressed to.
#[inline(always)]
fn by_destination(dst: WireMac) -> Result<FoundUser, Outcome> {
    let mac = wire_mac_word(dst);
    // SAFETY: the value is copied; `by_mac` finds out if it was replaced meanwhile.
    let slot = *unsafe { USER_BY_MAC.get(mac) }.ok_or(Outcome::WanUnknownUser)?;
    FoundUser::by_mac(slot, mac).ok_or(Outcome::WanUnknownUser)
}
