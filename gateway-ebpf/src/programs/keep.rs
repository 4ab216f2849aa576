//! The program's part of hold and release: is this frame kept? See [`gateway_ebpf::hold`] for how it is counted.
//!
//! Held are IPv4 frames for the service's address, of users whose switch is in phase hold or drain. Everything else of these
//! users goes on: ARP, other destinations, and frames too short to have a destination.

use core::{
    ptr::{read_volatile, write_volatile},
    slice,
};

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_RB_NO_WAKEUP},
    helpers::generated::{bpf_ktime_get_ns, bpf_xdp_get_buff_len, bpf_xdp_load_bytes},
    macros::map,
    maps::{Array, PerCpuArray, RingBuf},
    programs::XdpContext,
};
use gateway_ebpf::{
    Held, Hold, Load, Outcome, Record, SWITCHES, UserWord,
    frame::{ETHERTYPE_IPV4, Ipv4, wire_ip_word},
    hold::{LONGEST, RECORD_LEN, Scratch},
    words::Phase,
};

use super::tags::{Headers, at};

#[map]
static HOLD: Array<Hold> = Array::with_max_entries(SWITCHES, BPF_F_MMAPABLE);
#[map]
static HELD: Array<Held> = Array::with_max_entries(1024, BPF_F_MMAPABLE); // set at load
#[map]
static FRAMES: RingBuf = RingBuf::with_byte_size(1 << 20, 0); // set at load
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// What the hold says of a frame.
pub enum Keep {
    /// It goes on.
    No,
    /// It would be kept, but the deadline has passed: it goes on.
    Expired,
    /// It does not go on.
    Kept(Result<Outcome, Outcome>),
}

/// Keeps the frame, if it is to be kept.
#[inline(always)]
pub fn keep(ctx: &XdpContext, headers: &Headers, slot: u32, word: UserWord, phase: Phase) -> Keep {
    if phase == Phase::Forward || headers.ethertype != ETHERTYPE_IPV4.to_be() {
        return Keep::No;
    }
    let Some(ip) = at::<Ipv4>(ctx, headers.l3) else { return Keep::No };
    let Some(hold) = HOLD.get_ptr_mut(word.switch()) else { return Keep::Kept(Err(Outcome::Internal)) };
    // SAFETY: checked by `at`; an element of the map, read as the one word that the daemon writes.
    if unsafe { u64::from(wire_ip_word((*ip).dst)) != read_volatile(&raw const (*hold).address) } {
        return Keep::No;
    }
    let Some(user) = HELD.get_ptr_mut(slot) else { return Keep::Kept(Err(Outcome::Internal)) };
    // SAFETY: elements of the map, read as the one word that the daemon writes; helpers without conditions.
    let (sent, deadline, now) = unsafe {
        (
            read_volatile(&raw const (*user).sent),
            read_volatile(&raw const (*hold).deadline),
            bpf_ktime_get_ns(),
        )
    };
    // SAFETY: an element of the map. The addition of nothing is a read that stays behind that of `sent`.
    let held = add(unsafe { &raw mut (*user).held }, 0);
    if phase == Phase::Drain && sent == held {
        return Keep::No;
    }
    if now >= deadline {
        // SAFETY: an element of the map.
        add(unsafe { &raw mut (*hold).expired }, 1);
        return Keep::Expired;
    }
    Keep::Kept(store(ctx, hold, user, Load::between(sent, held), Record::new(slot, word)))
}

/// Puts the frame into `FRAMES`, if the bounds let it.
#[inline(always)]
fn store(
    ctx: &XdpContext,
    hold: *mut Hold,
    user: *mut Held,
    kept: Load,
    record: Record,
) -> Result<Outcome, Outcome> {
    let all = HOLD.get_ptr_mut(0).ok_or(Outcome::Internal)?;
    let scratch = SCRATCH.get_ptr_mut(0).ok_or(Outcome::Internal)?;
    // SAFETY: the context of this run.
    let len = unsafe { bpf_xdp_get_buff_len(ctx.ctx) };
    if len == 0 || len > LONGEST as u64 {
        return Err(Outcome::AccessTooLong);
    }
    let load = Load::frame(len);
    // SAFETY: elements of maps, here and below: single words, either read as the daemon writes them or changed atomically.
    let (bound, all_bound, all_sent) = unsafe {
        (
            read_volatile(&raw const (*hold).bound),
            read_volatile(&raw const (*all).bound),
            read_volatile(&raw const (*all).sent),
        )
    };
    if kept.octets() + len > bound {
        // SAFETY: as above.
        add(unsafe { &raw mut (*hold).dropped_user }, 1);
        return Err(Outcome::AccessHoldUserBound);
    }

    // SAFETY: this CPU's own element, and a program run is not interrupted by another on its CPU; the length is that of
    // the frame and no longer than the buffer.
    unsafe {
        write_volatile(&raw mut (*scratch).record, record.0);
        if bpf_xdp_load_bytes(ctx.ctx, 0, (&raw mut (*scratch).frame).cast(), len as u32) != 0 {
            return Err(Outcome::Internal);
        }
    }
    // counted first: who reads `held` after the record is there knows of it
    // SAFETY: as above.
    let (all_held, held) = unsafe { (&raw mut (*all).held, &raw mut (*user).held) };
    let before = add(all_held, load.0);
    add(held, load.0);
    // SAFETY: the first octets of this CPU's scratch, written above.
    let bytes = unsafe { slice::from_raw_parts(scratch.cast::<u8>(), RECORD_LEN + len as usize) };
    if Load::between(all_sent, before).octets() + len > all_bound
        || FRAMES.output::<[u8]>(bytes, BPF_RB_NO_WAKEUP.into()).is_err()
    {
        add(held, load.0.wrapping_neg());
        add(all_held, load.0.wrapping_neg());
        // SAFETY: as above.
        add(unsafe { &raw mut (*hold).dropped_memory }, 1);
        return Err(Outcome::AccessHoldMemory);
    }
    // SAFETY: as above.
    unsafe {
        add(&raw mut (*hold).frames, 1);
        add(&raw mut (*hold).octets, len);
    }
    Ok(Outcome::AccessHeld)
}

/// Adds to a word of a map that other CPUs change as well; returns what it was. A full barrier.
#[inline(always)]
fn add(word: *mut u64, value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let before: u64;
        // SAFETY: `word` is an aligned word of a map's element.
        unsafe {
            core::arch::asm!(
                "{value} = atomic_fetch_add((u64 *)({word} + 0), {value})",
                value = inout(reg) value => before,
                word = in(reg) word,
            );
        }
        before
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = (word, value);
        0
    }
}
