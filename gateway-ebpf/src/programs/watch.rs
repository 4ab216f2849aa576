//! What the daemon measures a switch by: which runs are under way, and when the last frame went under the old network.

use core::ptr::write_volatile;

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use gateway_ebpf::SWITCHES;

use super::maps::{LAST_OLD, RUN};

/// A program run that the daemon can wait for; see [`Run`].
pub struct Watched(*mut u64);

impl Watched {
    #[inline(always)]
    pub fn begin(cpu: u32) -> Option<Self> {
        let epoch = RUN.get_ptr_mut(cpu)?.cast::<u64>();
        Self::bump(epoch);
        Some(Self(epoch))
    }

    #[inline(always)]
    pub fn end(self) {
        Self::bump(self.0);
    }

    /// Fetch-and-add is a full barrier in BPF's memory model (plain atomic add is not): either the daemon, which stores
    /// the selector and then reads the epoch, sees this run, or this run sees the selector.
    #[inline(always)]
    fn bump(epoch: *mut u64) {
        #[cfg(target_arch = "bpf")]
        // SAFETY: `epoch` is the first word of an element of RUN, aligned to 64.
        unsafe {
            core::arch::asm!(
                "{one} = atomic_fetch_add((u64 *)({epoch} + 0), {one})",
                one = inout(reg) 1_u64 => _,
                epoch = in(reg) epoch,
            );
        }
        #[cfg(not(target_arch = "bpf"))]
        let _ = epoch;
    }
}

/// Notes that this CPU has just sent a frame under the old network of `switch`.
#[inline(always)]
pub fn stamp(cpu: u32, switch: u32) {
    if let Some(last) = LAST_OLD.get_ptr_mut(cpu * SWITCHES + switch) {
        // SAFETY: this CPU's own element; the daemon only reads it.
        unsafe { write_volatile(last, bpf_ktime_get_ns()) };
    }
}
