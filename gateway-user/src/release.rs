//! Sends on what was held: one thread, while there is something to release.
//!
//! ```text
//!   FRAMES (in the order they came) --> of a switch that is released --> batch --> WAN --transmitted--> `sent` += load
//!                                  \--> of a switch that is still held --> parked, until that is released
//! ```
//!
//! A user is back on the fast path when nothing of the user's is kept any more; the program sees that by itself
//! ([`gateway_ebpf::hold`]). A release is over when that is so of all its users and no program run is left that may have
//! thought otherwise.
//!
//! Invariants:
//! - Frames of a user leave in the order they were kept: the ring is read by one thread, what is parked goes before what is
//!   still in the ring, and a batch goes out of one transmit queue (the thread stays on its CPU).
//! - `sent` advances when the socket has nothing under way: the frames have left the interface, so what the program then
//!   forwards cannot overtake them.
//! - A frame is taken from the ring before it is sent: a daemon that is killed in between loses it, and none goes out twice.
//!   Its successor finds, when nothing of a user is anywhere any more, that `held` and `sent` still differ: that much was lost.
//! - What is parked and what is in the ring is within the bound on all, which the program enforces. It counts octets of
//!   frames; each that is parked takes some 60 more of this process's memory.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use gateway_ebpf::{Link, Load, Record, hold::HoldWord, words::Phase};
use nix::{
    errno::Errno,
    sched::{CpuSet, sched_getcpu, sched_setaffinity},
    sys::socket::{
        AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt::SndBufForce,
    },
    unistd::Pid,
};
use tokio::sync::oneshot;

use crate::{
    hold::Holds, introduce::bind_to, link, mac::Mac, onward::onward, plane::monotonic_ns, table::HoldFigures,
};

/// Frames sent before it is waited for their transmission: less than any interface queues.
const BATCH: usize = 64;
/// How long an interface may take to transmit a batch.
const TRANSMIT_LIMIT: Duration = Duration::from_secs(1);
/// How often a frame is offered to an interface that has no room.
const OFFERS: u32 = 10_000;
/// Room for frames under way in the socket, octets.
const SEND_BUFFER: usize = 8 << 20;

/// Releases what is held; clones are the same one.
#[derive(Clone)]
pub struct Releaser(Arc<Inner>);

struct Inner {
    holds: Arc<Holds>,
    virtual_mac: Mac,
    /// By port of a WAN interface.
    ways: Vec<(u16, OwnedFd)>,
    jobs: Mutex<Jobs>,
    /// Frames that stood before others in the ring and are not to be sent yet; the thread's, from one run to the next.
    parked: Mutex<Parked>,
}

/// By switch.
type Parked = HashMap<u16, VecDeque<Kept>>;

#[derive(Default)]
struct Jobs {
    new: Vec<Job>,
    running: bool,
}

/// A switch to release.
struct Job {
    switch: u16,
    slots: Vec<u32>,
    /// Those of `slots` that were not seen back on the fast path yet.
    pending: Vec<u32>,
    done: Vec<oneshot::Sender<HoldFigures>>,
}

/// A frame as it came.
struct Kept {
    record: Record,
    frame: Vec<u8>,
}

impl Kept {
    fn load(&self) -> Load {
        Load::frame(self.frame.len() as u64)
    }
}

impl Releaser {
    /// The way out of `wan`.
    ///
    /// # Errors
    /// The kernel's; EPERM without CAP_NET_RAW.
    pub fn way(wan: &link::Link) -> io::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let out = socket(AddressFamily::Packet, SockType::Raw, flags, None::<SockProtocol>)?;
        let on: libc::c_int = 1;
        // SAFETY: the option takes an int, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                out.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_QDISC_BYPASS,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        Errno::result(result)?;
        setsockopt(&out, SndBufForce, &SEND_BUFFER)?;
        bind_to(&out, wan, 0)?;
        Ok(out)
    }

    /// One that sends out of WAN interfaces, each by its port.
    pub fn open(holds: Arc<Holds>, virtual_mac: Mac, ways: Vec<(u16, OwnedFd)>) -> Self {
        let (jobs, parked) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Inner { holds, virtual_mac, ways, jobs, parked }))
    }

    /// Sends one frame out of a port, ahead of all that is held.
    ///
    /// # Errors
    /// The kernel's; NotFound for a port that is no WAN interface.
    pub fn send(&self, port: u16, frame: &[u8]) -> io::Result<()> {
        self.0.offer(port, &[frame]).into_iter().collect()
    }

    /// Releases `switch`, whose word says so already. The answer comes when all its users (in `slots`) are back on the fast
    /// path; if the thread cannot be started, never.
    pub fn release(&self, switch: u16, slots: Vec<u32>) -> oneshot::Receiver<HoldFigures> {
        let (done, answer) = oneshot::channel();
        let mut jobs = self.0.jobs();
        jobs.new.push(Job { switch, pending: slots.clone(), slots, done: vec![done] });
        if !jobs.running {
            let inner = Arc::clone(&self.0);
            match thread::Builder::new()
                .name("release".into())
                .spawn(move || Drain { inner, jobs: HashMap::new() }.run())
            {
                Ok(_) => jobs.running = true,
                Err(error) => {
                    jobs.new.clear();
                    tracing::error!(%error, "starting the thread that releases held frames");
                }
            }
        }
        answer
    }
}

impl Inner {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn parked(&self) -> MutexGuard<'_, Parked> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends frames out of one port, in order; returns once they are transmitted, with what became of each.
    fn offer(&self, port: u16, frames: &[impl AsRef<[u8]>]) -> Vec<io::Result<()>> {
        let Some((_, out)) = self.ways.iter().find(|(number, _)| *number == port) else {
            let gone = || io::Error::new(io::ErrorKind::NotFound, "no WAN interface has this port");
            return frames.iter().map(|_| Err(gone())).collect();
        };
        let mut parts: Vec<libc::iovec> = frames
            .iter()
            .map(|frame| {
                let frame = frame.as_ref();
                libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() }
            })
            .collect();
        let mut messages: Vec<libc::mmsghdr> = parts
            .iter_mut()
            .map(|part| {
                // SAFETY: integers and pointers only; all zero is a value.
                let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
                message.msg_hdr.msg_iov = part;
                message.msg_hdr.msg_iovlen = 1;
                message
            })
            .collect();
        let (mut results, mut refusals) = (Vec::with_capacity(frames.len()), 0);
        while results.len() < frames.len() {
            let rest = &mut messages[results.len()..];
            // SAFETY: `rest` and what it points to outlive the call, which does not write to the frames.
            let sent =
                unsafe { libc::sendmmsg(out.as_raw_fd(), rest.as_mut_ptr(), rest.len() as libc::c_uint, 0) };
            match Errno::result(sent) {
                Ok(sent) => {
                    results.extend((0..sent).map(|_| Ok(())));
                    refusals = 0;
                }
                Err(Errno::EINTR) => {}
                // not sent, for certain: there was no room
                Err(Errno::EAGAIN | Errno::ENOBUFS) if refusals < OFFERS => {
                    refusals += 1;
                    thread::yield_now();
                }
                Err(error) => {
                    results.push(Err(error.into()));
                    refusals = 0;
                }
            }
        }
        wait_until_transmitted(out);
        results
    }
}

/// Returns when the driver has given back every frame of the socket.
fn wait_until_transmitted(out: &OwnedFd) {
    let begun = Instant::now();
    let mut turns = 0_u32;
    loop {
        let mut octets: libc::c_int = 0;
        // SAFETY: the request writes an int.
        let result = unsafe { libc::ioctl(out.as_raw_fd(), libc::TIOCOUTQ, &raw mut octets) };
        if result != 0 || octets == 0 {
            return;
        }
        turns += 1;
        if turns.is_multiple_of(64) {
            thread::yield_now();
            if begun.elapsed() > TRANSMIT_LIMIT {
                tracing::warn!(
                    octets,
                    "the WAN interface does not transmit; later frames may overtake these"
                );
                return;
            }
        }
    }
}

/// The thread.
struct Drain {
    inner: Arc<Inner>,
    jobs: HashMap<u16, Job>,
}

/// What becomes of a record.
enum Fate {
    Send,
    Park,
    /// Its switch is over: nobody is left to say where it would go.
    Stale,
}

impl Drain {
    fn run(mut self) {
        stay_here();
        loop {
            {
                let mut jobs = self.inner.jobs();
                for job in jobs.new.drain(..) {
                    match self.jobs.get_mut(&job.switch) {
                        Some(known) => known.done.extend(job.done),
                        None => {
                            self.jobs.insert(job.switch, job);
                        }
                    }
                }
                if self.jobs.is_empty() {
                    jobs.running = false;
                    return;
                }
            }
            if !self.turn() {
                self.end_jobs();
                thread::yield_now();
            }
        }
    }

    /// Sends a batch. Returns whether there was anything to do.
    fn turn(&self) -> bool {
        let mut batch = Vec::with_capacity(BATCH);
        let mut parked = self.inner.parked();
        for (switch, kept) in parked.iter_mut() {
            if self.inner.holds.switch_word(*switch).phase() == Phase::Drain {
                let some = kept.len().min(BATCH - batch.len());
                batch.extend(kept.drain(..some));
            }
        }
        parked.retain(|_, kept| !kept.is_empty());
        let mut taken = false;
        while batch.len() < BATCH
            && let Some((record, frame)) = self.inner.holds.take()
        {
            taken = true;
            let kept = Kept { record, frame };
            match self.fate(kept.record) {
                Fate::Park => parked.entry(kept.record.switch()).or_default().push_back(kept),
                // behind what is parked of its switch
                Fate::Send if parked.contains_key(&kept.record.switch()) => {
                    parked.entry(kept.record.switch()).or_default().push_back(kept);
                }
                Fate::Send => batch.push(kept),
                Fate::Stale => {
                    tracing::warn!(record = ?kept.record, "a held frame of a switch that is over");
                    self.inner.holds.sent(kept.record.slot(), kept.load());
                }
            }
        }
        drop(parked);
        self.send(&batch);
        taken || !batch.is_empty()
    }

    fn fate(&self, record: Record) -> Fate {
        let word = self.inner.holds.switch_word(record.switch());
        match word.phase() {
            _ if !record.same_generation(word) => Fate::Stale,
            Phase::Hold => Fate::Park,
            Phase::Drain => Fate::Send,
            Phase::Forward => Fate::Stale,
        }
    }

    fn send(&self, batch: &[Kept]) {
        let holds = &self.inner.holds;
        let now = monotonic_ns();
        let onward = |kept: &Kept| {
            let network = holds.network_of(kept.record.slot())?;
            let access_tag = holds.access_of(kept.record.slot()).tag();
            let port = Link(network.link).port() as u16;
            Some((port, onward(&kept.frame, self.inner.virtual_mac, network, access_tag)?))
        };
        let (going, frames): (Vec<&Kept>, Vec<(u16, Vec<u8>)>) =
            batch.iter().filter_map(|kept| Some((kept, onward(kept)?))).unzip();
        // a user's frames all go to one network, and so out of one port
        let mut offered = Vec::with_capacity(frames.len());
        for of_port in frames.chunk_by(|one, next| one.0 == next.0) {
            let frames: Vec<&[u8]> = of_port.iter().map(|(_, frame)| &**frame).collect();
            offered.extend(self.inner.offer(of_port[0].0, &frames));
        }
        let mut results = going.iter().zip(offered).peekable();
        for kept in batch {
            let switch = kept.record.switch();
            let add = |word, value| {
                holds.word(switch, word).fetch_add(value, Ordering::AcqRel);
            };
            let result = results.next_if(|(of, _)| std::ptr::eq(**of, kept)).map(|(_, result)| result);
            if let Some(Ok(())) = result {
                add(HoldWord::SentFrames, 1);
                add(HoldWord::SentOctets, kept.frame.len() as u64);
                if now >= holds.word(switch, HoldWord::Deadline).load(Ordering::Acquire) {
                    add(HoldWord::Late, 1);
                }
            } else {
                tracing::debug!(?result, record = ?kept.record, "a held frame could not be sent on");
                add(HoldWord::Lost, 1);
            }
            holds.sent(kept.record.slot(), kept.load());
        }
    }

    /// Ends the releases that are over: nothing is kept of any user, and no program run is left that may have seen that
    /// otherwise.
    fn end_jobs(&mut self) {
        let holds = &self.inner.holds;
        let is_kept = |slot: &u32| {
            let (held, sent) = holds.counts(*slot);
            held != sent
        };
        let mut before: HashMap<u32, u64> = HashMap::new();
        for job in self.jobs.values_mut() {
            job.pending.retain(is_kept);
            before.extend(job.pending.iter().map(|slot| (*slot, holds.counts(*slot).0)));
        }
        holds.wait_for_runs();
        let nothing_anywhere = holds.is_empty();
        let parked = self.inner.parked();
        self.jobs.retain(|switch, job| {
            if nothing_anywhere && !parked.contains_key(switch) {
                for slot in &job.pending {
                    let (held, sent) = holds.counts(*slot);
                    if before.get(slot) == Some(&held) && held != sent {
                        // not in the ring, not here: it was in the hands of a daemon that ended
                        let load = Load::between(sent, held);
                        holds.word(*switch, HoldWord::Lost).fetch_add(load.frames(), Ordering::AcqRel);
                        holds.sent(*slot, load);
                    }
                }
            }
            if !job.pending.is_empty() {
                return true;
            }
            job.pending = job.slots.iter().copied().filter(is_kept).collect();
            if !job.pending.is_empty() {
                return true;
            }
            holds.word(*switch, HoldWord::ReleaseEnded).store(monotonic_ns(), Ordering::Release);
            let figures = holds.figures(*switch);
            for done in job.done.drain(..) {
                // a caller that has gone asks again
                let _ = done.send(figures);
            }
            false
        });
    }
}

/// Keeps this thread on the CPU it runs on: the kernel picks the transmit queue by it, and frames of one user must not be in
/// two.
fn stay_here() {
    let mut here = CpuSet::new();
    let stayed = sched_getcpu()
        .and_then(|cpu| here.set(cpu))
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &here));
    if let Err(error) = stayed {
        tracing::warn!(%error, "the thread that releases held frames may change its CPU, and so its transmit queue");
    }
}
