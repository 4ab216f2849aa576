//! Where the benchmarks run: a network namespace of the process's own, which ends with it; threads on CPUs of their own;
//! children that end with us; a directory that is removed.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::{ffi::OsStrExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, bail};
use nix::{
    sched::{CloneFlags, CpuSet, sched_setaffinity, unshare},
    sys::{
        prctl::set_pdeathsig,
        signal::{Signal, kill},
    },
    unistd::Pid,
};

/// The loopback interface, on which test runs seem to arrive.
pub const LOOPBACK: u32 = 1;

/// Takes the process into a network namespace of its own. Before any thread is begun.
pub fn enter() -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)
        .context("a network namespace of its own: the benchmark has to be run as root")?;
    ip("link set lo up")
}

/// Keeps this thread on one CPU.
pub fn pin(cpu: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .with_context(|| format!("CPU {cpu}"))
}

/// Runs `ip`.
pub fn ip(line: &str) -> anyhow::Result<()> {
    run(Command::new("ip").args(line.split_whitespace())).map(drop)
}

/// Two interfaces that are the ends of one cable, without addresses of their own.
pub fn cable(a: &str, b: &str) -> anyhow::Result<()> {
    ip(&format!("link add {a} type veth peer name {b}"))?;
    for end in [a, b] {
        // or the kernel itself would say something on it
        fs::write(format!("/proc/sys/net/ipv6/conf/{end}/disable_ipv6"), "1")
            .with_context(|| end.to_owned())?;
        ip(&format!("link set {end} up"))?;
    }
    Ok(())
}

/// Index of an interface.
pub fn index(name: &str) -> anyhow::Result<u32> {
    nix::net::if_::if_nametoindex(name).with_context(|| format!("interface {name}"))
}

/// Runs a program to its end and returns what it printed.
pub fn run(command: &mut Command) -> anyhow::Result<String> {
    let shown = || format!("{} {:?}", command_name(command), command.get_args().collect::<Vec<_>>());
    let shown = shown();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting {shown}"))?;
    if !output.status.success() {
        bail!("{shown}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn command_name(command: &Command) -> String {
    Path::new(command.get_program()).display().to_string()
}

/// Has the kernel end the child when the thread that starts it ends, at the latest with us.
pub fn ends_with_us(command: &mut Command) {
    // SAFETY: one system call, which is all the child does before it is replaced.
    unsafe {
        command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
    }
}

/// A child that is ended when dropped, and by the kernel if we end first.
pub struct Running(Child);

impl Running {
    pub fn start(command: &mut Command) -> anyhow::Result<Self> {
        let name = command_name(command);
        ends_with_us(command);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok(Self(child.with_context(|| format!("starting {name}"))?))
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> io::Result<bool> {
        Ok(self.0.try_wait()?.is_some())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // one that has ended by itself is no error
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// The kernel's thread with this name.
pub fn thread_named(name: &str) -> anyhow::Result<u32> {
    for entry in fs::read_dir("/proc")? {
        let pid = entry?.file_name().to_string_lossy().parse::<u32>();
        let Ok(pid) = pid else { continue };
        // one that has ended meanwhile is not meant
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if comm.trim_end() == name {
            return Ok(pid);
        }
    }
    bail!("there is no thread {name}")
}

/// Nanoseconds that all threads of a process have had a CPU (Documentation/scheduler/sched-stats.rst).
pub fn cpu_time_of(pid: u32) -> anyhow::Result<i64> {
    let mut sum = 0;
    let tasks = format!("/proc/{pid}/task");
    for task in fs::read_dir(&tasks).with_context(|| tasks.clone())? {
        let path = task?.path().join("schedstat");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let first = text.split_whitespace().next().unwrap_or_default();
        sum += first.parse::<i64>().with_context(|| format!("{}: `{text}`", path.display()))?;
    }
    Ok(sum)
}

/// A directory for what the programs beside us need; removed when dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> anyhow::Result<Self> {
        let template = std::env::temp_dir().join("handover-bench-XXXXXX");
        let dir = nix::unistd::mkdtemp(&template).with_context(|| template.display().to_string())?;
        Ok(Self(dir))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.0.join(OsStr::from_bytes(name.as_ref().as_bytes()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{} could not be removed: {error}", self.0.display());
        }
    }
}
