//! Timerfds, which CRIU may leave dead.
//!
//! A periodic timerfd whose expiry has not been read yet is armed again by the kernel only when it is read. Until then
//! it shows no time left, CRIU dumps and restores just that, and the kernel takes "no time left" for "disarm": the
//! process reads one expiry more and then waits for ever (CRIU issue 3162). Measured with a server that ticks, nothing
//! done about it: stalled 9 of 9 times when CRIU had recorded no time left, went on 7 of 7 times when it had recorded
//! some. The copy's own descriptors are put right while it stands stopped: armed with the interval that was kept, and
//! with the expiries that were still to be read.
//!
//! A timer that CRIU looks at between its running out and the interrupt that counts it (on a busy or virtual processor
//! that may take milliseconds) has no time left and nothing to be read: from the copy alone it is not to be told from one
//! that its owner disarmed. The original knows: under the freezer its timers run on, so a timer that lives has been
//! counted a moment later ([`living`]); the source tells the destination which do.
//!
//! From outside, a timer that CRIU restored alive and that has expired since looks like a dead one and is armed too. It
//! goes on ticking; its phase shifts by less than an interval, and expiries between its restore and this (milliseconds)
//! count as the ones already to be read. A timer that its owner disarmed is left alone.

use std::{
    collections::HashSet,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    error::{Error, Errors, Result},
    process,
};

/// TFD_IOC_SET_TICKS, `_IOW('T', 0, u64)` (include/uapi/linux/timerfd.h): CRIU's own way to set what is to be read.
const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;

/// What /proc/PID/fdinfo/FD says of a timerfd.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Timer {
    ticks: u64,
    value: (i64, i64),
    interval: (i64, i64),
}

impl Timer {
    fn parse(fdinfo: &str) -> Option<Self> {
        let field = |name: &str| fdinfo.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
        let pair = |text: &str| {
            let (s, ns) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
            Some((s.trim().parse().ok()?, ns.trim().parse().ok()?))
        };
        Some(Self {
            ticks: field("ticks:")?.parse().ok()?,
            value: pair(field("it_value:")?)?,
            interval: pair(field("it_interval:")?)?,
        })
    }

    /// Runs, or has run out and waits to be read: of the original, that it is to fire in the copy too.
    fn lives(self) -> bool {
        self.value != (0, 0) || self.ticks > 0
    }

    /// What the copy's timer has to be told, if anything. `lived`: the original's timer lives.
    fn mend(self, lived: bool) -> Mend {
        let stands = self.value == (0, 0);
        let to_read = if self.ticks == 0 && lived { 1 } else { self.ticks };
        match (stands && to_read > 0, self.interval != (0, 0)) {
            (true, true) => Mend::Arm(to_read),
            // a one-shot timer that was caught running out; one that is to be read already is well
            (true, false) if self.ticks == 0 => Mend::Expire(to_read),
            _ => Mend::Nothing,
        }
    }
}

/// What makes a restored timer one that lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mend {
    Nothing,
    /// Armed by its interval, with so many expiries to be read.
    Arm(u64),
    /// So many expiries to be read.
    Expire(u64),
}

/// A timerfd: the process that has it open, and its number there.
pub type Place = (u32, i32);

/// How long a timer with no time left and nothing to be read may take to be counted. One that its owner disarmed costs
/// this once a migration, beside the copying.
const COUNTED: Duration = Duration::from_millis(5);

/// Calls `with` for each timerfd of the processes `tree`.
fn each(tree: &[u32], errors: &mut Errors, mut with: impl FnMut(Place, Timer, &mut Errors)) {
    for &pid in tree {
        let fds = format!("/proc/{pid}/fd");
        let Some(entries) = errors.keep(fs::read_dir(&fds).map_err(Error::io("listing", &fds))) else {
            continue;
        };
        for entry in entries.flatten() {
            if !fs::read_link(entry.path()).is_ok_and(|l| l.as_os_str() == "anon_inode:[timerfd]") {
                continue;
            }
            let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            if let Some(timer) = errors.keep(look(pid, fd)) {
                with((pid, fd), timer, errors);
            }
        }
    }
}

fn look(pid: u32, fd: i32) -> Result<Timer> {
    let path = format!("/proc/{pid}/fdinfo/{fd}");
    let text = fs::read_to_string(&path).map_err(Error::io("reading", &path))?;
    Timer::parse(&text).ok_or_else(|| Error::other(format!("{path} cannot be understood: {text}")))
}

/// The timers of the frozen processes `tree` that live. Blocks for a few milliseconds where one seems to have run out just
/// now.
///
/// # Errors
/// All that went wrong.
pub fn living(tree: &[u32]) -> Result<Vec<Place>> {
    let mut errors = Errors::default();
    let (mut living, mut unclear) = (Vec::new(), Vec::new());
    each(tree, &mut errors, |place, timer, errors| {
        if timer.lives() {
            living.push(place);
        } else if let Some(fd) = errors.keep(open(place)) {
            unclear.push((place, fd));
        }
    });
    living.extend(errors.keep(counted(unclear)).unwrap_or_default());
    errors.finish("looking at timers").map(|()| living)
}

/// Those of `timers` that are counted within [`COUNTED`].
fn counted(mut timers: Vec<(Place, OwnedFd)>) -> Result<Vec<Place>> {
    let deadline = Instant::now() + COUNTED;
    let mut found = Vec::new();
    while !timers.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut polled: Vec<_> =
            timers.iter().map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut polled, timeout) {
            Ok(0) => break,
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(Error::io("waiting for", "timers")(e.into())),
        }
        let ready: Vec<bool> = polled.iter().map(|p| p.any().unwrap_or(false)).collect();
        let mut ready = ready.into_iter();
        timers.retain(|(place, _)| {
            let now = ready.next().unwrap_or(false);
            found.extend(now.then_some(*place));
            !now
        });
    }
    Ok(found)
}

/// Mends the timers of the stopped processes `tree` that CRIU left dead; `lived` are the original's timers that live.
/// Returns how many there were.
///
/// # Errors
/// All that went wrong.
pub fn rearm(tree: &[u32], lived: &HashSet<Place>) -> Result<usize> {
    let mut errors = Errors::default();
    let mut mended = 0;
    each(tree, &mut errors, |place, timer, errors| {
        let done = match timer.mend(lived.contains(&place)) {
            Mend::Nothing => return,
            Mend::Arm(ticks) => arm(place, timer.interval).and_then(|()| expire(place, ticks)),
            Mend::Expire(ticks) => expire(place, ticks),
        };
        mended += usize::from(errors.keep(done).is_some());
    });
    errors.finish("arming timers").map(|()| mended)
}

fn open((pid, fd): Place) -> Result<OwnedFd> {
    process::borrow_fd(&process::pidfd(pid)?, fd)
}

fn failed(op: &'static str, (pid, fd): Place) -> Error {
    Error::io(op, format_args!("timerfd {fd} of pid {pid}"))(io::Error::last_os_error())
}

/// Forgets expiries that are to be read.
fn arm(place: Place, interval: (i64, i64)) -> Result<()> {
    let fd = open(place)?;
    let interval = libc::timespec { tv_sec: interval.0, tv_nsec: interval.1 };
    let spec = libc::itimerspec { it_interval: interval, it_value: interval };
    // SAFETY: the descriptor is open and `spec` is valid for the call; the old value is not asked for
    if unsafe { libc::timerfd_settime(fd.as_raw_fd(), 0, &raw const spec, std::ptr::null_mut()) } < 0 {
        return Err(failed("arming", place));
    }
    Ok(())
}

fn expire(place: Place, ticks: u64) -> Result<()> {
    let fd = open(place)?;
    // SAFETY: the descriptor is a timerfd and the kernel reads eight bytes from `ticks`
    if unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) } < 0 {
        return Err(failed("setting the expiries of", place));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::sys::{
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    };

    use super::*;

    const NONE: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    const FIVE_MS: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 5_000_000 };

    fn timer() -> TimerFd {
        TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).unwrap()
    }

    fn place(timer: &TimerFd) -> Place {
        (std::process::id(), timer.as_fd().as_raw_fd())
    }

    /// A timer as CRIU restores one that it saw with no time left.
    fn restored(interval: libc::timespec, ticks: u64) -> TimerFd {
        let timer = timer();
        let spec = libc::itimerspec { it_interval: interval, it_value: NONE };
        // SAFETY: the descriptor is a timerfd and `spec` is valid for the call
        let set = unsafe {
            libc::timerfd_settime(timer.as_fd().as_raw_fd(), 0, &raw const spec, std::ptr::null_mut())
        };
        assert_eq!(set, 0);
        if ticks > 0 {
            expire(place(&timer), ticks).unwrap();
        }
        timer
    }

    fn readable(timer: &TimerFd, patience: Duration) -> bool {
        let mut fds = [PollFd::new(timer.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(patience).unwrap()).unwrap() == 1
    }

    fn ticks(timer: &TimerFd, times: u32) {
        for _ in 0..times {
            assert!(readable(timer, Duration::from_secs(2)), "the timer is dead");
            timer.wait().unwrap();
        }
    }

    /// The tests of a process share its descriptors.
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

    #[test]
    fn fdinfo_and_what_follows() {
        let text = "pos:\t0\nflags:\t02004002\nclockid: 1\nticks: 2\nsettime flags: 01\nit_value: (0, 0)\n\
                    it_interval: (1, 5000000)\n";
        let read = Timer::parse(text).unwrap();
        assert_eq!(read, Timer { ticks: 2, value: (0, 0), interval: (1, 5_000_000) });
        let unread = Timer { ticks: 0, ..read };
        let runs = Timer { value: (0, 1), ..unread };
        let one_shot = Timer { interval: (0, 0), ..unread };
        for (timer, lived, mend) in [
            (read, true, Mend::Arm(2)),
            (read, false, Mend::Arm(2)),
            (unread, true, Mend::Arm(1)),
            (unread, false, Mend::Nothing), // disarmed by its owner
            (runs, true, Mend::Nothing),
            (one_shot, true, Mend::Expire(1)),
            (one_shot, false, Mend::Nothing), // over
            (Timer { ticks: 1, ..one_shot }, true, Mend::Nothing),
        ] {
            assert_eq!(timer.mend(lived), mend, "{timer:?}, the original lived: {lived}");
        }
    }

    #[test]
    fn a_dead_timer_ticks_again() {
        let _one = ONE.lock().unwrap();
        let timer = restored(FIVE_MS, 3);
        assert_eq!(rearm(&[std::process::id()], &HashSet::new()).unwrap(), 1);
        ticks(&timer, 3);
    }

    #[test]
    fn a_timer_caught_running_out_ticks_again_where_the_original_lives() {
        let _one = ONE.lock().unwrap();
        let (periodic, once) = (restored(FIVE_MS, 0), restored(NONE, 0));
        let disarmed = restored(FIVE_MS, 0);
        let lived = HashSet::from([place(&periodic), place(&once)]);
        assert_eq!(rearm(&[std::process::id()], &lived).unwrap(), 2);
        ticks(&periodic, 3);
        ticks(&once, 1);
        assert!(!readable(&once, Duration::ZERO));
        assert!(!readable(&disarmed, Duration::from_millis(20)), "its owner disarmed it");
    }

    #[test]
    fn those_that_run_or_have_run_out_live() {
        let _one = ONE.lock().unwrap();
        let (running, expired) = (timer(), timer());
        let hour = TimeSpec::from_duration(Duration::from_secs(3600));
        running.set(Expiration::Interval(hour), TimerSetTimeFlags::empty()).unwrap();
        let at_once = TimeSpec::from_duration(Duration::from_nanos(1));
        expired.set(Expiration::OneShot(at_once), TimerSetTimeFlags::empty()).unwrap();
        assert!(readable(&expired, Duration::from_secs(2)));
        let never = timer();
        let found = living(&[std::process::id()]).unwrap();
        assert!(found.contains(&place(&running)) && found.contains(&place(&expired)), "{found:?}");
        assert!(!found.contains(&place(&never)), "{found:?}");
        assert!(readable(&expired, Duration::ZERO), "looking read it");
    }

    #[test]
    fn one_that_is_counted_a_moment_later_lives() {
        let _one = ONE.lock().unwrap();
        let (soon, never) = (timer(), timer());
        let wait = TimeSpec::from_duration(Duration::from_millis(1));
        soon.set(Expiration::OneShot(wait), TimerSetTimeFlags::empty()).unwrap();
        let unclear = [&soon, &never].map(|t| (place(t), open(place(t)).unwrap()));
        let found = counted(unclear.into()).unwrap();
        // on a processor that is late it may not be counted in time
        assert!(found == [place(&soon)] || (found.is_empty() && readable(&soon, Duration::from_secs(2))));
    }
}
