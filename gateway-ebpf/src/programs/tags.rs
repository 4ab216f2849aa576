//! Frame memory: bounds, tags, and the way out of a port.

use core::ptr::read_volatile;

use aya_ebpf::{helpers::generated::bpf_xdp_adjust_head, programs::XdpContext};
use gateway_ebpf::{
    Outcome,
    frame::{Arp, ETH_LEN, Eth, TAG_LEN, TPID_8021AD, TPID_8021Q, Tag, VID_MAX, vid},
};

use super::maps::{DEVICE, PORT};

/// `T` at `offset` of the frame, if it ends before the frame does.
#[inline(always)]
pub fn at<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    let (start, end) = (ctx.data(), ctx.data_end());
    (start + offset + size_of::<T>() <= end).then_some((start + offset) as *mut T)
}

/// Octets of the frame.
#[inline(always)]
pub fn len(ctx: &XdpContext) -> usize {
    ctx.data_end() - ctx.data()
}

/// Why a frame's tags are refused.
pub enum BadTags {
    Truncated,
    Service,
    Stacked,
    ReservedVid,
}

/// Tag and EtherType of a frame.
pub struct Headers {
    /// The 802.1Q tag's TCI, in host byte order.
    pub tci: Option<u16>,
    /// EtherType behind the tag, as in the frame.
    pub ethertype: u16,
}

impl Headers {
    #[inline(always)]
    pub fn read(ctx: &XdpContext, eth: *const Eth) -> Result<Self, BadTags> {
        // SAFETY: `eth` was checked by `at`, and the frame has not been moved since.
        let outer = unsafe { (*eth).ethertype };
        if outer == TPID_8021AD.to_be() {
            return Err(BadTags::Service);
        }
        if outer != TPID_8021Q.to_be() {
            return Ok(Self { tci: None, ethertype: outer });
        }
        let tag = at::<Tag>(ctx, ETH_LEN).ok_or(BadTags::Truncated)?;
        // SAFETY: checked by `at`.
        let Tag { tci, ethertype } = unsafe { *tag };
        if ethertype == TPID_8021Q.to_be() || ethertype == TPID_8021AD.to_be() {
            return Err(BadTags::Stacked);
        }
        let tci = u16::from_be(tci);
        if vid(tci) > VID_MAX {
            return Err(BadTags::ReservedVid);
        }
        Ok(Self { tci: Some(tci), ethertype })
    }

    #[inline(always)]
    pub fn arp(&self, ctx: &XdpContext) -> Option<*mut Arp> {
        match self.tci {
            None => at(ctx, ETH_LEN),
            Some(_) => at(ctx, ETH_LEN + TAG_LEN),
        }
    }
}

/// Whether `port` takes the frame, whose tag, if it has one, does not count.
#[inline(always)]
pub fn fits(ctx: &XdpContext, port: u32, tagged: bool) -> bool {
    let Some(largest) = PORT.get_ptr(port) else { return false };
    // SAFETY: an element of the map, read as the one word that the daemon writes.
    let largest = unsafe { read_volatile(largest) };
    // the tag is added on this side: the verifier lets nothing be added to the end of a packet
    len(ctx) as u64 <= largest + if tagged { TAG_LEN as u64 } else { 0 }
}

#[inline(always)]
pub fn redirect(port: u32, sent: Outcome, missing: Outcome) -> Result<Outcome, Outcome> {
    DEVICE.redirect(port, 0).map(|_| sent).map_err(|_| missing)
}

/// Both addresses of the Ethernet header, which a push or pop moves by four octets.
type Addresses = [u16; 6];

#[inline(always)]
pub fn push_tag(ctx: &XdpContext, vid: u16) -> Option<()> {
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
    unsafe { *tagged = Tagged { addresses, tpid: TPID_8021Q.to_be(), tci: vid.to_be() } };
    Some(())
}

#[inline(always)]
pub fn pop_tag(ctx: &XdpContext) -> Option<()> {
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
