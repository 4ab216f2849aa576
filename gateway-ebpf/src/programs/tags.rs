//! Frame memory: bounds, tags, and the way out of a port.

use core::ptr::read_volatile;

use aya_ebpf::{
    helpers::generated::{bpf_xdp_adjust_head, bpf_xdp_get_buff_len},
    programs::XdpContext,
};
use gateway_ebpf::{
    Outcome,
    frame::{ETH_LEN, Eth, TAG_LEN, TPID_8021AD, TPID_8021Q, Tag, VID_MAX, vid},
};

use super::maps::{DEVICE, PORT};

/// `T` at `offset` of the frame, if it ends before the frame does.
#[inline(always)]
pub fn at<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    let (start, end) = (ctx.data(), ctx.data_end());
    (start + offset + size_of::<T>() <= end).then_some((start + offset) as *mut T)
}

/// Octets of the frame, all its buffers together.
#[inline(always)]
pub fn len(ctx: &XdpContext) -> u64 {
    // SAFETY: the context of this run.
    unsafe { bpf_xdp_get_buff_len(ctx.ctx) }
}

/// Why a frame's tags are refused.
pub enum BadTags {
    Truncated,
    Service,
    Stacked,
    ReservedVid,
}

/// Tags and EtherType of a frame.
pub struct Headers {
    /// The outer tag's TCI, in host byte order.
    pub tci: Option<u16>,
    /// The outer tag is a service tag.
    pub service: bool,
    /// There is a customer's tag behind it.
    pub inner: bool,
    /// EtherType behind the tags, as in the frame.
    pub ethertype: u16,
    /// Where what the EtherType tells begins.
    pub l3: usize,
}

const fn is_tpid(ethertype: u16) -> bool {
    ethertype == TPID_8021Q.to_be() || ethertype == TPID_8021AD.to_be()
}

impl Headers {
    /// On the access side there is no service tag, and any tag may be behind the first, as far as the network takes it; on
    /// the WAN side a customer's tag is behind a service tag only.
    #[inline(always)]
    pub fn read<const ACCESS: bool>(ctx: &XdpContext, eth: *const Eth) -> Result<Self, BadTags> {
        // SAFETY: `eth` was checked by `at`, and the frame has not been moved since.
        let outer = unsafe { (*eth).ethertype };
        if !is_tpid(outer) {
            return Ok(Self { tci: None, service: false, inner: false, ethertype: outer, l3: ETH_LEN });
        }
        let service = outer == TPID_8021AD.to_be();
        if ACCESS && service {
            return Err(BadTags::Service);
        }
        let tag = at::<Tag>(ctx, ETH_LEN).ok_or(BadTags::Truncated)?;
        // SAFETY: checked by `at`.
        let Tag { tci, ethertype } = unsafe { *tag };
        let tci = u16::from_be(tci);
        if !is_tpid(ethertype) {
            if vid(tci) > VID_MAX {
                return Err(BadTags::ReservedVid);
            }
            return Ok(Self { tci: Some(tci), service, inner: false, ethertype, l3: ETH_LEN + TAG_LEN });
        }
        if ethertype != TPID_8021Q.to_be() || !(ACCESS || service) {
            return Err(BadTags::Stacked);
        }
        let inner = at::<Tag>(ctx, ETH_LEN + TAG_LEN).ok_or(BadTags::Truncated)?;
        // SAFETY: checked by `at`.
        let Tag { tci: inner, ethertype } = unsafe { *inner };
        if is_tpid(ethertype) {
            return Err(BadTags::Stacked);
        }
        if vid(tci) > VID_MAX || ACCESS && vid(u16::from_be(inner)) > VID_MAX {
            return Err(BadTags::ReservedVid);
        }
        Ok(Self { tci: Some(tci), service, inner: true, ethertype, l3: ETH_LEN + 2 * TAG_LEN })
    }

    /// The outer tag's VID; 0: untagged, or a priority tag, which is no tag as far as networks and users are concerned.
    #[inline(always)]
    pub fn vid(&self) -> u16 {
        vid(self.tci.unwrap_or(0))
    }
}

/// Whether `port` takes the frame, whose outer tag does not count if that goes (or gives way to another).
#[inline(always)]
pub fn fits(ctx: &XdpContext, port: u32, replace: bool) -> bool {
    let Some(largest) = PORT.get_ptr(port) else { return false };
    // SAFETY: an element of the map, read as the one word that the daemon writes.
    let largest = unsafe { read_volatile(largest) };
    // the tag is added on this side: the verifier lets nothing be added to the end of a packet
    len(ctx) <= largest + if replace { TAG_LEN as u64 } else { 0 }
}

#[inline(always)]
pub fn redirect(port: u32, sent: Outcome, missing: Outcome) -> Result<Outcome, Outcome> {
    DEVICE.redirect(port, 0).map(|_| sent).map_err(|_| missing)
}

/// The outer tag of a frame on its way out.
#[derive(Clone, Copy)]
pub struct Outer {
    /// TPID, in host byte order.
    pub tpid: u16,
    /// TCI, in host byte order.
    pub tci: u16,
}

/// Puts `outer` in the place of the outer tag (`replace`), or around the frame; takes the outer tag off if it is `None`.
/// Packet pointers are void afterwards.
#[inline(always)]
pub fn retag(ctx: &XdpContext, replace: bool, outer: Option<Outer>) -> Option<()> {
    match (replace, outer) {
        (false, None) => Some(()),
        (false, Some(outer)) => push_tag(ctx, outer),
        (true, None) => pop_tag(ctx),
        (true, Some(outer)) => {
            let tag = at::<[u16; 2]>(ctx, ETH_LEN - 2)?;
            // SAFETY: checked by `at`.
            unsafe { *tag = [outer.tpid.to_be(), outer.tci.to_be()] };
            Some(())
        }
    }
}

/// Both addresses of the Ethernet header, which a push or pop moves by four octets.
type Addresses = [u16; 6];

#[inline(always)]
fn push_tag(ctx: &XdpContext, outer: Outer) -> Option<()> {
    #[repr(C)]
    struct Tagged {
        addresses: Addresses,
        tpid: u16,
        tci: u16,
    }
    let addresses = at::<Addresses>(ctx, 0)?;
    // SAFETY: checked by `at`.
    let addresses = unsafe { *addresses };
    // SAFETY: the context of this run.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(TAG_LEN as i32)) } != 0 {
        return None;
    }
    let tagged = at::<Tagged>(ctx, 0)?;
    // SAFETY: checked by `at` after the move.
    unsafe { *tagged = Tagged { addresses, tpid: outer.tpid.to_be(), tci: outer.tci.to_be() } };
    Some(())
}

#[inline(always)]
fn pop_tag(ctx: &XdpContext) -> Option<()> {
    let addresses = at::<Addresses>(ctx, 0)?;
    // SAFETY: checked by `at`.
    let addresses = unsafe { *addresses };
    // SAFETY: the context of this run.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, TAG_LEN as i32) } != 0 {
        return None;
    }
    let moved = at::<Addresses>(ctx, 0)?;
    // SAFETY: checked by `at` after the move.
    unsafe { *moved = addresses };
    Some(())
}
