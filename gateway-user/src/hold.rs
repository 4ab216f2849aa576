//! The maps of hold and release: beginning a hold, finding out when nothing is under way past it, figures.
//!
//! When is a frame that was forwarded before the hold out of the gateway? Its program run ends, and with it the frame sits in
//! a queue of its CPU, which the driver hands over at the end of its poll. Both are softirq context, in which nothing else
//! runs on that CPU. So [`Holds::settle`] first waits for the runs by their epochs, then lets a thread of its own run on
//! each CPU that had any: that it does run there means that the poll is over. Where that proves nothing (PREEMPT_RT) or is
//! not allowed (a cpuset), an RCU grace period does the same, in 10 to 20 ms instead of some 50 us.

use std::{
    io,
    net::Ipv4Addr,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use gateway_ebpf::{
    Access, Load, Network, Record, SwitchWord, UserWord,
    frame::{ip_octets, ip_word},
    hold::{HoldWord, RECORD_LEN},
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use crate::{
    mapping::Mapping,
    plane::{PlaneError, grace_period, monotonic_ns},
    ring::{At, Ring},
    table::HoldFigures,
};

/// How long a program run may take at most: an XDP run is a few hundred instructions, but a virtual CPU may be paused.
const RUN_LIMIT: Duration = Duration::from_millis(100);
/// How long a release may take before the programs forward by themselves.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);

/// Bounds on what is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Octets in all; a power of two. The kernel's memory for it is taken when the programs are loaded.
    pub memory: u32,
    /// Octets of one user.
    pub per_user: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        // a second of 50,000 small frames a second, several times over; or half a second of half a gigabit from one user
        Self { memory: 64 << 20, per_user: 32 << 20 }
    }
}

/// The maps.
pub struct Holds {
    pub(crate) user: Arc<Mapping>,
    pub(crate) switch: Arc<Mapping>,
    pub(crate) network: Arc<Mapping>,
    pub(crate) run: Arc<Mapping>,
    pub(crate) hold: Mapping,
    pub(crate) held: Mapping,
    /// For the one thread that releases.
    pub(crate) ring: Mutex<Ring>,
    pub(crate) bounds: Bounds,
}

impl Holds {
    /// Makes the bounds hold from now on.
    pub(crate) fn enforce(&self) {
        self.word(0, HoldWord::Bound).store(self.bounds.memory.into(), Ordering::Release);
    }

    pub(crate) fn word(&self, switch: u16, word: HoldWord) -> &AtomicU64 {
        self.hold.word(switch.into(), word as usize)
    }

    /// Puts down the terms of a hold, its sums at zero. The store of the switch's word comes after.
    pub fn begin(&self, switch: u16, address: Ipv4Addr, deadline_ns: u64) {
        for word in 0..=HoldWord::ReleaseEnded as usize {
            self.hold.word(switch.into(), word).store(0, Ordering::Relaxed);
        }
        self.word(switch, HoldWord::Address).store(ip_word(address.octets()).into(), Ordering::Relaxed);
        self.word(switch, HoldWord::Deadline).store(deadline_ns, Ordering::Relaxed);
        self.word(switch, HoldWord::Bound).store(self.bounds.per_user, Ordering::SeqCst);
    }

    /// Stores the word that begins the release of `switch`. The deadline moves to where a release that takes longer is given
    /// up, unless it may have passed: what has begun to be forwarded is not held again.
    pub fn begin_release(&self, switch: u16, word: SwitchWord) {
        let deadline = self.word(switch, HoldWord::Deadline);
        let (old, now) = (deadline.load(Ordering::Acquire), monotonic_ns());
        deadline.store(old.max(now + RELEASE_LIMIT.as_nanos() as u64), Ordering::SeqCst);
        if monotonic_ns() >= old {
            deadline.store(old, Ordering::SeqCst);
        }
        // a release that a killed daemon began goes on from there
        let began = self.word(switch, HoldWord::ReleaseBegan);
        let _ = began.compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire);
        self.switch.word(switch.into(), 0).store(word.0, Ordering::SeqCst);
    }

    /// The address that `switch` holds, or held last.
    pub fn address(&self, switch: u16) -> Ipv4Addr {
        ip_octets(self.word(switch, HoldWord::Address).load(Ordering::Acquire) as u32).into()
    }

    /// What became of the frames so far.
    pub fn figures(&self, switch: u16) -> HoldFigures {
        let of = |word| self.word(switch, word).load(Ordering::Acquire);
        let began = of(HoldWord::ReleaseBegan);
        let (frames, bytes) = if began == 0 {
            (of(HoldWord::Frames), of(HoldWord::Octets))
        } else {
            (of(HoldWord::SentFrames), of(HoldWord::SentOctets))
        };
        HoldFigures {
            frames,
            bytes,
            dropped_user_bound: of(HoldWord::DroppedUser),
            dropped_memory: of(HoldWord::DroppedMemory),
            lost: of(HoldWord::Lost),
            late: of(HoldWord::Late),
            release_us: of(HoldWord::ReleaseEnded).saturating_sub(began) / 1000,
        }
    }

    /// Bounds, and octets held now.
    pub fn usage(&self) -> (Bounds, u64) {
        let sent = self.word(0, HoldWord::Sent).load(Ordering::SeqCst);
        let held = self.word(0, HoldWord::Held).load(Ordering::SeqCst);
        (self.bounds, Load::between(sent, held).octets())
    }

    /// Frames kept of a user, and sent on.
    pub(crate) fn counts(&self, slot: u32) -> (u64, u64) {
        let of = |word| self.held.word(slot as usize, word).load(Ordering::SeqCst);
        let sent = of(1);
        (of(0), sent)
    }

    /// `load` of a user is out of the way.
    pub fn sent(&self, slot: u32, load: Load) {
        self.held.word(slot as usize, 1).fetch_add(load.0, Ordering::SeqCst);
        self.word(0, HoldWord::Sent).fetch_add(load.0, Ordering::SeqCst);
    }

    /// Takes the next frame out of the ring.
    pub fn take(&self) -> Option<(Record, Vec<u8>)> {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (kept, next) = match ring.at(ring.position()) {
                At::Nothing => return None,
                At::Gap(next) => (None, next),
                At::Record(bytes, next) => (bytes.split_first_chunk::<RECORD_LEN>(), next),
            };
            let kept = kept.map(|(head, frame)| (Record(u64::from_ne_bytes(*head)), frame.to_vec()));
            ring.take_until(next);
            if kept.is_some() {
                return kept;
            }
        }
    }

    /// Whether everything has been taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    pub(crate) fn switch_word(&self, switch: u16) -> SwitchWord {
        SwitchWord(self.switch.word(switch.into(), 0).load(Ordering::SeqCst))
    }

    /// The network that a user's frames go to now, as the programs find it.
    pub(crate) fn network_of(&self, slot: u32) -> Option<Network> {
        let word = UserWord(self.user.word(slot as usize, 0).load(Ordering::Acquire));
        let index = word.select(self.switch_word(word.switch() as u16))?.network;
        let of = |word| self.network.word(index.into(), word).load(Ordering::Acquire);
        Some(Network {
            router: of(0),
            link: of(1),
            address: of(2),
            ifindex: of(3),
            address6: [of(4), of(5)],
            spare: [of(6), of(7)],
        })
    }

    /// How a user comes in.
    pub(crate) fn access_of(&self, slot: u32) -> Access {
        Access(self.user.word(slot as usize, 2).load(Ordering::Acquire))
    }

    /// Returns when every program run that was under way has ended.
    pub(crate) fn wait_for_runs(&self) {
        let begun = Instant::now();
        for cpu in 0..self.run.len() {
            if !run_ended(&self.run, cpu, begun) {
                tracing::warn!(cpu, "a program run did not end");
            }
        }
    }

    /// Returns when every frame whose run was under way has been handed to its interface. Blocks its thread.
    ///
    /// # Errors
    /// [`PlaneError::Kernel`].
    pub fn settle(&self) -> Result<(), PlaneError> {
        self.wait_for_runs();
        // a user in a switch was met there; other frames do not matter
        let cpus = (0..self.run.len()).filter(|cpu| self.run.word(*cpu, 0).load(Ordering::Acquire) > 0);
        if Path::new("/sys/kernel/realtime").exists() || visit(cpus).is_err() {
            return grace_period();
        }
        Ok(())
    }
}

/// Waits until the program run that is under way on `cpu`, if any, has ended. `false` if it did not within [`RUN_LIMIT`]
/// from `begun` on.
pub(crate) fn run_ended(run: &Mapping, cpu: usize, begun: Instant) -> bool {
    let epoch = run.word(cpu, 0);
    let inside = epoch.load(Ordering::SeqCst);
    let mut turns = 0_u32;
    while inside % 2 == 1 && epoch.load(Ordering::Acquire) == inside {
        std::hint::spin_loop();
        turns += 1;
        if turns.is_multiple_of(1024) {
            std::thread::yield_now();
            if begun.elapsed() > RUN_LIMIT {
                return false;
            }
        }
    }
    true
}

/// This thread goes before others while this lives, where it may (CAP_SYS_NICE); where not, it waits for its turn.
struct Hurry;

impl Hurry {
    fn up() -> Self {
        Self::policy(libc::SCHED_FIFO, 1);
        Self
    }

    fn policy(policy: libc::c_int, priority: libc::c_int) {
        let parameters = libc::sched_param { sched_priority: priority };
        // SAFETY: the parameters outlive the call, which concerns this thread alone.
        let result = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
        if result != 0 {
            tracing::debug!(policy, error = %io::Error::last_os_error(), "scheduling");
        }
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        Self::policy(libc::SCHED_OTHER, 0);
    }
}

/// Runs this thread on each of `cpus`.
fn visit(cpus: impl Iterator<Item = usize>) -> io::Result<()> {
    let _hurry = Hurry::up();
    let myself = Pid::from_raw(0);
    let home = sched_getaffinity(myself)?;
    let mut visited = Ok(());
    for cpu in cpus {
        let mut one = CpuSet::new();
        // returns on that CPU
        visited = one.set(cpu).and_then(|()| sched_setaffinity(myself, &one));
        if visited.is_err() {
            break;
        }
    }
    sched_setaffinity(myself, &home)?;
    Ok(visited?)
}
