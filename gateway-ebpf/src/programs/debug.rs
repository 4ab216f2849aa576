//! Programs of their own that do what `access` and `wan` do and tell of each frame of one user. They are loaded and attached
//! while somebody debugs, in the place of the others, which know nothing of this: so it costs nothing otherwise.

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::xdp_md,
    helpers::generated::bpf_ktime_get_ns,
    macros::map,
    maps::{Array, PerCpuArray, RingBuf},
    programs::XdpContext,
};
use gateway_ebpf::{
    Outcome,
    debug::{DebugWord, HEAD, Traced},
    frame::wire_mac_word,
};

use super::tags::{at, len};

type Head = [u16; HEAD / 2];

#[map]
static DEBUGGED: Array<u64> = Array::with_max_entries(2, 0);
#[map]
static DEBUG_FRAMES: RingBuf = RingBuf::with_byte_size(1 << 18, 0);

#[map]
static DEBUG_SCRATCH: PerCpuArray<Traced> = PerCpuArray::with_max_entries(1, 0);

/// The first octets of a frame; zero if it is shorter.
#[inline(always)]
fn head(ctx: &XdpContext) -> Head {
    match at::<Head>(ctx, 0) {
        // SAFETY: checked by `at`.
        Some(head) => unsafe { *head },
        None => [0; HEAD / 2],
    }
}

/// Notes a frame as it came. (These two are functions of their own, and what the one notes for the other is in a map, because
/// the rules need nearly all of the stack.)
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn trace_begin(ctx: *mut xdp_md, from_user: u32) -> u32 {
    let Some(traced) = DEBUG_SCRATCH.get_ptr_mut(0) else { return 0 };
    let ctx = &XdpContext::new(ctx);
    // SAFETY: this CPU's own element; a program run is not interrupted by another on its CPU.
    unsafe {
        (*traced).at_ns = bpf_ktime_get_ns();
        (*traced).ifindex = ctx.ingress_ifindex() as u32;
        (*traced).len = len(ctx) as u32;
        (*traced).from_user = from_user;
        (*traced).before = head(ctx);
    }
    0
}

/// Tells what became of it, if it was from or for the user.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn trace_end(ctx: *mut xdp_md, outcome: u32) -> u32 {
    let (Some(traced), Some(mac)) = (DEBUG_SCRATCH.get_ptr_mut(0), DEBUGGED.get_ptr(DebugWord::Mac as u32))
    else {
        return 0;
    };
    // SAFETY: this CPU's own element, and an element read as the one word that the daemon writes.
    let (traced, mac) = unsafe { (&mut *traced, read_volatile(mac)) };
    traced.outcome = outcome;
    traced.after = head(&XdpContext::new(ctx));
    let [before, after] = [&traced.before, &traced.after];
    let concerned = if traced.from_user == 1 {
        wire_mac_word([before[3], before[4], before[5]]) == mac
    } else {
        // a question of the router's for the user is addressed to the user only now
        wire_mac_word([before[0], before[1], before[2]]) == mac
            || wire_mac_word([after[0], after[1], after[2]]) == mac
    };
    if concerned
        && DEBUG_FRAMES.output::<Traced>(&*traced, 0).is_err()
        && let Some(lost) = DEBUGGED.get_ptr_mut(DebugWord::Lost as u32)
    {
        // SAFETY: an element of the map; two CPUs at once may count one for two.
        unsafe { *lost += 1 };
    }
    0
}

/// Does with a frame what `rules` say, and tells of it if it is from or for the user who is debugged.
#[inline(always)]
pub fn traced(
    ctx: &XdpContext,
    from_user: bool,
    rules: impl FnOnce(&XdpContext) -> Result<Outcome, Outcome>,
) -> Result<Outcome, Outcome> {
    trace_begin(ctx.ctx, from_user.into());
    let result = rules(ctx);
    let (Ok(outcome) | Err(outcome)) = result;
    trace_end(ctx.ctx, outcome as u32);
    result
}
