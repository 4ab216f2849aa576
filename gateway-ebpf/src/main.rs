//! The gateway's two XDP programs: `access` for frames from the users, `wan` for frames from the provider.
//!
//! Each is a thin entry that counts an [`Outcome`] and turns it into the kernel's verdict; the rules are the functions
//! that return it, `Ok` for frames that go on, `Err` for those that are dropped. The order of the rules is the order of
//! the code; README and ARCHITECTURE.md state them for people.
//!
//! Translation: the users know the router by one virtual MAC. Towards the WAN it becomes the MAC of the router in the
//! user's network, towards the user that becomes the virtual one: in the Ethernet header, and in ARP payloads as the
//! hardware address of sender or target.
//!
//! Invariants:
//! - A frame of a user leaves with the tag of one network, chosen by one load of the user's word and one of the switch.
//! - All edits of a frame precede the change of its tag, after which packet pointers are void.
//! - While the user is in a switch the CPU's run epoch is odd from before the selector is read until the verdict.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the xdp macro makes an undocumented twin of each entry")]
#![cfg_attr(target_arch = "bpf", allow(unstable_features), feature(asm_experimental_arch))]

mod programs;

use aya_ebpf::{bindings::xdp_action, macros::xdp, programs::XdpContext};
use gateway_ebpf::{Outcome, outcome::Action};
use programs::{access::from_user, debug::traced, maps::COUNTERS, plain, wan::to_user};

/// Frames from the users.
#[xdp(frags)]
pub fn access(ctx: XdpContext) -> u32 {
    if let Some(result) = plain::from_user(&ctx) {
        return verdict(result);
    }
    verdict(from_user(&ctx))
}

/// Frames from the provider.
#[xdp(frags)]
pub fn wan(ctx: XdpContext) -> u32 {
    if let Some(result) = plain::to_user(&ctx) {
        return verdict(result);
    }
    verdict(to_user(&ctx))
}

/// As `access` (by the rules alone, without the short way), and tells of the frames of the user who is debugged.
#[xdp(frags)]
pub fn access_debug(ctx: XdpContext) -> u32 {
    verdict(traced(&ctx, true, from_user))
}

/// As `wan` (by the rules alone), and tells of the frames for the user who is debugged.
#[xdp(frags)]
pub fn wan_debug(ctx: XdpContext) -> u32 {
    verdict(traced(&ctx, false, to_user))
}

#[inline(always)]
fn verdict(result: Result<Outcome, Outcome>) -> u32 {
    let (Ok(outcome) | Err(outcome)) = result;
    if let Some(counter) = COUNTERS.get_ptr_mut(outcome as u32) {
        // SAFETY: this CPU's own element; a program run is not interrupted by another on its CPU.
        unsafe { *counter += 1 };
    }
    match outcome.action() {
        Action::Drop | Action::Keep => xdp_action::XDP_DROP,
        Action::Host => xdp_action::XDP_PASS,
        Action::Forward => xdp_action::XDP_REDIRECT,
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
