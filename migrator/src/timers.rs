//! Periodic timerfds, which CRIU may leave dead.
//!
//! A periodic timerfd whose expiry has not been read yet is armed again by the kernel only when it is read. Until then
//! it shows no time left, CRIU dumps and restores just that, and the kernel takes "no time left" for "disarm": the
//! process reads one expiry more and then waits for ever (CRIU issue 3162). Measured with a server that ticks, nothing
//! done about it: stalled 9 of 9 times when CRIU had recorded no time left, went on 7 of 7 times when it had recorded
//! some. The copy's own descriptors are put right while it stands stopped: armed with the interval that was kept, and
//! with the expiries that were still to be read.
//!
//! From outside, a timer that CRIU restored alive and that has expired since looks the same and is armed too. It goes on
//! ticking; its phase shifts by less than an interval, and expiries between its restore and this (milliseconds) count
//! as the ones already to be read. A timer that its owner disarmed has nothing to be read and is left alone. Not covered:
//! a timer dumped in the instant between running out and being counted (no time left, nothing to be read).

use std::{fs, io, os::fd::AsRawFd as _};

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

    /// Expired and not read: dead, or alive and waiting to be read.
    fn expired(self) -> bool {
        self.ticks > 0 && self.value == (0, 0) && self.interval != (0, 0)
    }
}

/// Arms the expired periodic timers of the stopped processes `tree`. Returns how many there were.
///
/// # Errors
/// All that went wrong.
pub fn rearm(tree: &[u32]) -> Result<usize> {
    let mut errors = Errors::default();
    let mut armed = 0;
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
            let path = format!("/proc/{pid}/fdinfo/{fd}");
            let Some(text) = errors.keep(fs::read_to_string(&path).map_err(Error::io("reading", &path)))
            else {
                continue;
            };
            match Timer::parse(&text) {
                Some(timer) if timer.expired() => {
                    armed += usize::from(errors.keep(arm(pid, fd, timer)).is_some())
                }
                Some(_) => {}
                None => {
                    errors.keep::<()>(Err(Error::other(format!("{path} cannot be understood: {text}"))));
                }
            }
        }
    }
    errors.finish("arming timers").map(|()| armed)
}

fn arm(pid: u32, fd: i32, timer: Timer) -> Result<()> {
    let failed = |op| move |e| Error::io(op, format_args!("timerfd {fd} of pid {pid}"))(e);
    let borrowed = process::borrow_fd(&process::pidfd(pid)?, fd)?;
    let interval = libc::timespec { tv_sec: timer.interval.0, tv_nsec: timer.interval.1 };
    let spec = libc::itimerspec { it_interval: interval, it_value: interval };
    // SAFETY: the descriptor is open and `spec` is valid for the call; the old value is not asked for
    if unsafe { libc::timerfd_settime(borrowed.as_raw_fd(), 0, &raw const spec, std::ptr::null_mut()) } < 0 {
        return Err(failed("arming")(io::Error::last_os_error()));
    }
    // arming forgot them
    // SAFETY: the descriptor is a timerfd and the kernel reads eight bytes from `ticks`
    if unsafe { libc::ioctl(borrowed.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const timer.ticks) } < 0 {
        return Err(failed("setting the expiries of")(io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nix::{
        poll::{PollFd, PollFlags, PollTimeout, poll},
        sys::{
            time::TimeSpec,
            timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
        },
    };
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn fdinfo() {
        let text = "pos:\t0\nflags:\t02004002\nclockid: 1\nticks: 2\nsettime flags: 01\nit_value: (0, 0)\n\
                    it_interval: (1, 5000000)\n";
        let timer = Timer::parse(text).unwrap();
        assert_eq!(timer, Timer { ticks: 2, value: (0, 0), interval: (1, 5_000_000) });
        assert!(timer.expired());
        assert!(!Timer { ticks: 0, ..timer }.expired(), "disarmed by its owner");
        assert!(!Timer { value: (0, 1), ..timer }.expired(), "runs");
        assert!(!Timer { interval: (0, 0), ..timer }.expired(), "one shot, over");
    }

    #[test]
    fn a_dead_timer_ticks_again() {
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).unwrap();
        let interval = libc::timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let spec = libc::itimerspec { it_interval: interval, it_value: zero };
        let ticks = 3u64;
        // as CRIU restores it
        // SAFETY: the descriptor is a timerfd; both structures live through the calls
        unsafe {
            assert_eq!(
                libc::timerfd_settime(timer.as_fd().as_raw_fd(), 0, &raw const spec, std::ptr::null_mut()),
                0
            );
            assert_eq!(libc::ioctl(timer.as_fd().as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks), 0);
        }
        assert_eq!(rearm(&[std::process::id()]).unwrap(), 1);
        let read = || {
            let mut fds = [PollFd::new(timer.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PollTimeout::try_from(Duration::from_secs(2)).unwrap()).unwrap();
            assert_eq!(ready, 1, "the timer is dead");
            timer.wait().unwrap();
        };
        read();
        read();
        read();
    }

    #[test]
    fn a_timer_that_runs_is_left_alone() {
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).unwrap();
        let hour = TimeSpec::from_duration(Duration::from_secs(3600));
        timer.set(Expiration::Interval(hour), TimerSetTimeFlags::empty()).unwrap();
        let path = format!("/proc/self/fdinfo/{}", timer.as_fd().as_raw_fd());
        assert!(!Timer::parse(&fs::read_to_string(path).unwrap()).unwrap().expired());
    }
}
