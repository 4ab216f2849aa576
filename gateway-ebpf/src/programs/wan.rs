//! The rules for frames from the provider.

use core::ptr::read_volatile;

use aya_ebpf::programs::XdpContext;
use gateway_ebpf::{
    Outcome, User,
    frame::{
        ARP_REQUEST, Arp, ETHERTYPE_ARP, ETHERTYPE_IPV6, Eth, TPID_8021Q, WireMac, is_group,
        is_ipv4_over_ethernet, is_link_local, wire_ip_word, wire_mac_word, with_vid, word_wire_mac,
    },
    words::vid_index,
};

use super::{
    identity::{UNKNOWN, receiver},
    maps::{FoundNetwork, FoundUser, NETWORK_BY_VID, USER_BY_IP, USER_BY_MAC, virtual_router_mac},
    neighbour::{BY_ROUTER, GOES_ON, TO_GROUP, neighbour_of_network},
    tags::{BadTags, Headers, Outer, at, fits, redirect, retag},
};

#[inline(always)]
pub fn to_user(ctx: &XdpContext) -> Result<Outcome, Outcome> {
    let eth = at::<Eth>(ctx, 0).ok_or(Outcome::WanTruncated)?;
    // SAFETY: checked by `at`.
    let Eth { dst, src, .. } = unsafe { *eth };
    if is_link_local(dst) {
        return Ok(Outcome::WanLinkLocal);
    }
    let headers = Headers::read::<false>(ctx, eth).map_err(|bad| match bad {
        BadTags::Truncated => Outcome::WanTruncated,
        BadTags::Service | BadTags::Stacked => Outcome::WanStackedTags,
        BadTags::ReservedVid => Outcome::WanUnknownNetwork,
    })?;

    let tag = vid_index(headers.service, headers.vid());
    let by_vid = NETWORK_BY_VID.get_ptr(tag).ok_or(Outcome::Internal)?;
    // SAFETY: an element of the map, read as the one word that the daemon writes.
    let index = unsafe { read_volatile(by_vid) } as u16;
    let network = FoundNetwork::at(index).ok_or(Outcome::Internal)?;
    if !network.link().in_use() || network.ifindex() != ctx.ingress_ifindex() as u32 {
        return Err(Outcome::WanUnknownNetwork);
    }
    let virtual_mac = virtual_router_mac();
    let router = network.router().mac();

    let mut outcome = Outcome::WanForwarded;
    let user = if headers.ethertype == ETHERTYPE_ARP.to_be() {
        let arp = at::<Arp>(ctx, headers.l3).ok_or(Outcome::WanTruncated)?;
        // SAFETY: checked by `at`, here and below; the frame is not moved before the last use.
        let Arp { op, sha, spa, tpa, .. } = unsafe { *arp };
        // SAFETY: as above.
        if !is_ipv4_over_ethernet(unsafe { &*arp }) {
            return Err(Outcome::WanArpMalformed);
        }
        let (sender, target) = (wire_ip_word(spa), wire_ip_word(tpa));
        let by_router = sender == network.address() && sender != 0;
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
            by_destination(ctx, dst, &headers)?
        }
    } else if headers.ethertype == ETHERTYPE_IPV6.to_be() {
        let by_router = if router == Some(wire_mac_word(src)) { BY_ROUTER } else { 0 };
        let to_group = if is_group(dst) { TO_GROUP } else { 0 };
        let told = neighbour_of_network(ctx.ctx, headers.l3, index.into(), by_router | to_group);
        match told as u32 {
            GOES_ON if to_group != 0 => return Ok(Outcome::WanGroup),
            GOES_ON => by_destination(ctx, dst, &headers)?,
            told_of => match Outcome::from_index(told_of).unwrap_or(Outcome::Internal) {
                Outcome::WanNdForwarded => {
                    outcome = Outcome::WanNdForwarded;
                    FoundUser::in_slot((told >> 32) as u32).ok_or(Outcome::Internal)?
                }
                other => return Ok(other),
            },
        }
    } else if is_group(dst) {
        return Ok(Outcome::WanGroup);
    } else {
        by_destination(ctx, dst, &headers)?
    };

    let selection = user.select(user.word()).ok_or(Outcome::WanGeneration)?;
    if !selection.accepts(index) {
        return Err(Outcome::WanStaleNetwork);
    }

    let eth = at::<Eth>(ctx, 0).ok_or(Outcome::Internal)?;
    // SAFETY: checked by `at`.
    unsafe {
        if router == Some(wire_mac_word(src)) {
            (*eth).src = word_wire_mac(virtual_mac);
        }
        let mac = User::mac_of(user.identity);
        if mac != 0 {
            (*eth).dst = word_wire_mac(mac);
        }
    }
    let port = User::port_of(user.identity);
    let tagged = headers.tci.is_some();
    if !fits(ctx, port, tagged) {
        return Err(Outcome::WanTooLong);
    }
    let tag = user.access().tag();
    let outer = (tag != 0).then(|| Outer { tpid: TPID_8021Q, tci: with_vid(headers.tci.unwrap_or(0), tag) });
    retag(ctx, tagged, outer).ok_or(Outcome::WanNoHeadroom)?;
    redirect(port, outcome, Outcome::WanNoPort)
}

/// The user a frame from the WAN is addressed to: by MAC, or, if that is nobody's, by IP address the user who is not known by
/// a MAC.
#[inline(always)]
fn by_destination(ctx: &XdpContext, dst: WireMac, headers: &Headers) -> Result<FoundUser, Outcome> {
    let mac = wire_mac_word(dst);
    if let Some((_, user, _)) = FoundUser::at_home(mac, |access| access.is_by_mac()) {
        return Ok(user);
    }
    // SAFETY: the value is copied; `by_mac` finds out if it was replaced meanwhile.
    if let Some(slot) = unsafe { USER_BY_MAC.get(mac) } {
        return FoundUser::by_mac(*slot, mac).ok_or(Outcome::WanUnknownUser);
    }
    match receiver(ctx.ctx, headers.l3, headers.ethertype) {
        UNKNOWN => Err(Outcome::WanUnknownUser),
        slot => FoundUser::by_mac(slot as u32, 0).ok_or(Outcome::WanUnknownUser),
    }
}
