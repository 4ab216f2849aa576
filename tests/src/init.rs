//! A host's pid 1: `handover-lab host`, started by the lab in new network, pid and mount namespaces.
//!
//! It makes the host's file system its own, then starts programs, sends signals and reaps on request, in one thread that
//! never blocks on anything but its socket and SIGCHLD.
//!
//! Invariants:
//! - it ends when the socket to the lab closes, however the lab ended, and the kernel then ends everything in the host.
//!   (Not by `PR_SET_PDEATHSIG`, which would follow the *thread* that made the host.)
//! - a program it starts holds no file that was opened outside the host (CRIU could not find its mount), unless the lab
//!   passed one on purpose; it has its own session, default signal handling and a working directory opened here;
//! - every orphan is reaped at once, so no zombie keeps a pid.

use std::{
    fs,
    io::{IoSlice, IoSliceMut, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    mount::{MsFlags, mount},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        socket::{ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
        stat::Mode,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, getpid},
};

use crate::proto::{Io, MAX_MESSAGE, Numbered, Reply, Request, Setup, Spawn};

/// The descriptor the lab hands the socket over as.
pub(crate) const CONTROL_FD: RawFd = 3;

/// Runs as pid 1 of a host until the lab is gone.
///
/// # Errors
/// If it was not started by the lab, or the socket fails.
pub fn run() -> anyhow::Result<()> {
    ensure!(
        getpid() == Pid::from_raw(1),
        "`handover-lab host` is started by the lab only, as pid 1 of a new host"
    );
    // SAFETY: the lab put the socket there before it executed this program, and nothing else here has it.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    close_on_exec_from(CONTROL_FD)?;
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block()?;
    let children = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    loop {
        let mut fds = [
            PollFd::new(control.as_fd(), PollFlags::POLLIN),
            PollFd::new(children.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let [asked, ended] = fds.map(|f| f.any().unwrap_or(false));
        if ended {
            while children.read_signal()?.is_some() {}
            reap(&control)?;
        }
        if asked && !serve(&control)? {
            return Ok(());
        }
    }
}

/// One request; false when the lab is gone.
fn serve(control: &OwnedFd) -> anyhow::Result<bool> {
    let mut buffer = vec![0_u8; MAX_MESSAGE];
    let (length, files) = match receive(control, &mut buffer) {
        Err(Errno::ECONNRESET) | Ok((0, _)) => return Ok(false),
        other => other?,
    };
    let request: Numbered<Request> = serde_json::from_slice(&buffer[..length])?;
    let done = match request.body {
        Request::Setup(s) => setup(&s).map(|()| Reply::Done),
        Request::Spawn(s) => spawn(&s, files).map(|pid| Reply::Started { pid }),
        Request::Signal { pid, signal } => send_signal(pid, signal).map(|()| Reply::Done),
    };
    let body = done.unwrap_or_else(|e| Reply::Failed { error: format!("{e:#}") });
    send(control, request.number, body)?;
    Ok(true)
}

fn receive(control: &OwnedFd, buffer: &mut [u8]) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; 3]);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<()>(control.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut files = Vec::new();
    for c in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = c {
            // SAFETY: the kernel has just made these descriptors for this message; they have no other owner.
            files.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, files))
}

fn send(control: &OwnedFd, number: u64, body: Reply) -> anyhow::Result<()> {
    let bytes = serde_json::to_vec(&Numbered { number, body })?;
    match sendmsg::<()>(control.as_raw_fd(), &[IoSlice::new(&bytes)], &[], MsgFlags::MSG_NOSIGNAL, None) {
        // the lab is gone: the next read says so too
        Err(Errno::EPIPE | Errno::ECONNRESET) => Ok(()),
        other => Ok(other.map(|_| ())?),
    }
}

fn reap(control: &OwnedFd) -> anyhow::Result<()> {
    loop {
        let (pid, code, signal) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, Some(code), None),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, None, Some(signal as i32)),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(e) => return Err(e).context("waiting for processes"),
        };
        send(control, 0, Reply::Exited { pid: pid.as_raw(), code, signal })?;
    }
}

fn send_signal(pid: i32, signal: i32) -> anyhow::Result<()> {
    ensure!(pid > 1, "pid {pid} is no process of the host that could be signalled");
    let signal = Signal::try_from(signal).with_context(|| format!("signal {signal}"))?;
    nix::sys::signal::kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to pid {pid}"))
}

/// Makes the mount namespace the host's own.
fn setup(s: &Setup) -> anyhow::Result<()> {
    const NONE: Option<&str> = None;
    fs::write(s.cgroup.join("cgroup.procs"), "0")
        .with_context(|| format!("entering the cgroup {}", s.cgroup.display()))?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .context("making all mounts private")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), NONE).context("mounting /proc")?;

    // /sys shows the network namespace of whoever mounted it; cgroups are kept, pinned BPF objects are the host's own
    let hold = |path: &Path| {
        open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
            .with_context(|| format!("opening {}", path.display()))
    };
    let bind = |from: BorrowedFd<'_>, to: &Path| {
        let from = PathBuf::from(format!("/proc/self/fd/{}", from.as_raw_fd()));
        mount(Some(&from), to, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
            .with_context(|| format!("keeping {}", to.display()))
    };
    let cgroups = hold(Path::new("/sys/fs/cgroup"))?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), NONE).context("mounting /sys")?;
    bind(cgroups.as_fd(), Path::new("/sys/fs/cgroup"))?;
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), NONE).context("mounting /sys/fs/bpf")?;

    let hidden = |path: &&PathBuf| s.private.iter().any(|p| path.starts_with(p));
    let kept = s
        .keep
        .iter()
        .filter(hidden)
        .map(|p| hold(p).map(|fd| (fd, p)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for dir in &s.private {
        let mode = if dir == Path::new("/tmp") { "mode=1777" } else { "mode=755" };
        mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(mode))
            .with_context(|| format!("mounting a tmpfs on {}", dir.display()))?;
    }
    for (fd, path) in kept {
        fs::create_dir_all(path).with_context(|| format!("creating {}", path.display()))?;
        bind(fd.as_fd(), path)?;
    }
    Ok(())
}

fn spawn(s: &Spawn, files: Vec<OwnedFd>) -> anyhow::Result<i32> {
    let Some((program, args)) = s.argv.split_first() else { bail!("a program without a name") };
    let mut files = files.into_iter();
    let mut stdio = |io: &Io, output: bool| -> anyhow::Result<Stdio> {
        let open = |path: &Path| {
            fs::OpenOptions::new()
                .read(!output)
                .append(output)
                .create(output && path != Path::new("/dev/null"))
                .open(path)
                .with_context(|| format!("opening {} for {program}", path.display()))
        };
        Ok(match io {
            Io::Null => open(Path::new("/dev/null"))?.into(),
            Io::File(path) => open(path)?.into(),
            Io::Pipe => files.next().with_context(|| format!("no file was passed for {program}"))?.into(),
        })
    };
    let mut command = Command::new(program);
    command.args(args).env_clear().envs(s.env.iter().map(|(k, v)| (k, v))).current_dir(&s.cwd);
    command
        .stdin(stdio(&s.stdio[0], false)?)
        .stdout(stdio(&s.stdio[1], true)?)
        .stderr(stdio(&s.stdio[2], true)?);
    let mut procs = match &s.cgroup {
        Some(dir) => {
            let path = dir.join("cgroup.procs");
            Some(fs::OpenOptions::new().write(true).open(&path).with_context(|| path.display().to_string())?)
        }
        None => None,
    };
    // SAFETY: only system calls that are async-signal-safe, on descriptors opened before the fork.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            if let Some(procs) = &mut procs {
                procs.write_all(b"0")?;
            }
            Ok(close_on_exec_from(3)?)
        });
    }
    if let Some(min) = s.min_pid {
        // the next process gets the first free pid above this
        const LAST: &str = "/proc/sys/kernel/ns_last_pid";
        let last: i32 = fs::read_to_string(LAST).context(LAST)?.trim().parse().context(LAST)?;
        if last < min - 1 {
            fs::write(LAST, (min - 1).to_string()).context(LAST)?;
        }
    }
    let child = command.spawn().with_context(|| format!("starting {program}"))?;
    Ok(i32::try_from(child.id())?)
}

fn close_on_exec_from(first: RawFd) -> nix::Result<()> {
    let first = libc::c_uint::try_from(first).map_err(|_| Errno::EBADF)?;
    // SAFETY: touches descriptor flags only.
    let result =
        unsafe { libc::close_range(first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    Errno::result(result).map(drop)
}
