//! The lab's wide-area Ethernet: a strict 802.1Q provider between one trunk and one access port per VLAN.
//!
//! tc programs at ingress. The kernel has taken the outermost tag out of the frame by then (`skb->vlan_tci`) and taps have
//! seen the frame, so that what is captured on the trunk is what came over the wire.
//!
//! Invariants: a frame from the trunk reaches the access port of its tag's VLAN and no other; without exactly one 802.1Q
//! tag of a VLAN that has a port it reaches nobody. A frame from an access port reaches the trunk only, with exactly the
//! tag of its port. Every frame is counted.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the program macros do not keep the comments of what they wrap")]

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT},
    helpers::{bpf_redirect, bpf_skb_vlan_pop, bpf_skb_vlan_push},
    macros::{classifier, map},
    maps::{Array, HashMap, PerCpuArray},
    programs::TcContext,
};
use lab_provider_ebpf::{Outcome, VLANS};

const TPID_8021Q: u16 = 0x8100;
const TPID_8021AD: u16 = 0x88a8;
const VID: u32 = 0x0fff;

/// Frames by [`Outcome`].
#[map]
static OUTCOMES: PerCpuArray<u64> = PerCpuArray::with_max_entries(Outcome::ALL.len() as u32, 0);

/// VID -> interface index of the VLAN's access port; 0: no port.
#[map]
static ACCESS_PORT: Array<u32> = Array::with_max_entries(VLANS, 0);

/// Interface index of an access port -> its VID.
#[map]
static PORT_VID: HashMap<u32, u32> = HashMap::with_max_entries(64, 0);

/// Interface index of the trunk.
#[map]
static TRUNK: Array<u32> = Array::with_max_entries(1, 0);

/// Frames from the trunk.
#[classifier]
pub fn from_trunk(ctx: TcContext) -> i32 {
    deliver(to_access(ctx.skb.skb))
}

/// Frames from an access port.
#[classifier]
pub fn from_access(ctx: TcContext) -> i32 {
    deliver(to_trunk(ctx.skb.skb))
}

fn to_access(skb: *mut __sk_buff) -> Result<(Outcome, u32), Outcome> {
    // SAFETY: the kernel passes a valid context.
    let (present, tci, tpid, protocol) =
        unsafe { ((*skb).vlan_present, (*skb).vlan_tci, (*skb).vlan_proto, (*skb).protocol) };
    if present == 0 {
        return Err(Outcome::Untagged);
    }
    if tpid as u16 != TPID_8021Q.to_be() {
        return Err(Outcome::WrongTpid);
    }
    let inner = u16::from_be(protocol as u16);
    if inner == TPID_8021Q || inner == TPID_8021AD {
        return Err(Outcome::DoubleTagged);
    }
    let port = ACCESS_PORT.get(tci & VID).copied().filter(|port| *port != 0).ok_or(Outcome::WrongVlan)?;
    // SAFETY: the kernel passes a valid context.
    if unsafe { bpf_skb_vlan_pop(skb) } != 0 {
        return Err(Outcome::Failed);
    }
    Ok((Outcome::ToAccess, port))
}

fn to_trunk(skb: *mut __sk_buff) -> Result<(Outcome, u32), Outcome> {
    // SAFETY: the kernel passes a valid context.
    let (present, from) = unsafe { ((*skb).vlan_present, (*skb).ifindex) };
    if present != 0 {
        return Err(Outcome::TaggedAccess);
    }
    // SAFETY: entries are written before frames flow and never removed.
    let vid = unsafe { PORT_VID.get(from) }.copied().ok_or(Outcome::WrongVlan)?;
    let trunk = TRUNK.get(0).copied().ok_or(Outcome::Failed)?;
    // SAFETY: the kernel passes a valid context.
    if unsafe { bpf_skb_vlan_push(skb, TPID_8021Q.to_be(), vid as u16) } != 0 {
        return Err(Outcome::Failed);
    }
    Ok((Outcome::ToTrunk, trunk))
}

/// Counts, then sends the frame out of the port it is for.
fn deliver(result: Result<(Outcome, u32), Outcome>) -> i32 {
    let (outcome, port) = match result {
        Ok((outcome, port)) => (outcome, Some(port)),
        Err(outcome) => (outcome, None),
    };
    if let Some(count) = OUTCOMES.get_ptr_mut(outcome as u32) {
        // SAFETY: the entry is this CPU's own and the program is not preempted by itself.
        unsafe { *count += 1 };
    }
    match port {
        // SAFETY: touches nothing of ours.
        Some(port) => unsafe { bpf_redirect(port, 0) as i32 },
        None => TC_ACT_SHOT,
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// The kernel lets only GPL-compatible programs call some helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
