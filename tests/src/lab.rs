//! Making and ending hosts: one lab at a time on a machine, nothing left when it goes.
//!
//! Invariants:
//! - two labs never run at once, in whatever process (a file lock, which ends with its holder);
//! - a host ends with its lab: when the lab is dropped, and also when its process is killed (pid 1 sees its socket close);
//! - the lab's cgroups and directories go with it; what a killed lab left is removed by the next.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    os::{fd::AsFd as _, unix::fs::FileExt as _},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::{Host, proto::Setup};

const LOCK: &str = "/run/handover-lab.lock";

/// What each host has to itself, beside its network, its processes and /proc.
const PRIVATE: [&str; 6] = [
    "/run",
    "/tmp",
    "/var/lib/handover",
    "/var/lib/handover-controller",
    "/var/lib/handover-gateway",
    "/var/lib/handover-migrator",
];

/// The hosts and what they share. Ends them when dropped.
#[derive(Debug)]
pub struct Lab {
    hosts: BTreeMap<String, Host>,
    cgroup: PathBuf,
    work: PathBuf,
    next_index: AtomicU32,
    // last: released when everything is gone; holds the names of the directories made in the machine's file system
    lock: Flock<fs::File>,
}

/// Directory with the programs of the workspace: where this program is (a test is one below).
///
/// # Errors
/// If the running program cannot be found.
pub fn program_dir() -> anyhow::Result<PathBuf> {
    let exe = std::env::current_exe().context("finding the running program")?;
    let dir = exe.parent().context("the running program has no directory")?;
    let dir =
        if dir.ends_with("deps") || dir.ends_with("examples") { dir.parent().unwrap_or(dir) } else { dir };
    Ok(dir.to_owned())
}

/// A program of the workspace, built.
///
/// # Errors
/// If it is not built, with how to.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let path = program_dir()?.join(name);
    ensure!(
        path.is_file(),
        "program `{name}` is not built in {}: run `cargo build --bins` first",
        path.parent().unwrap_or(&path).display()
    );
    Ok(path)
}

/// Where cgroups (v2) are mounted.
///
/// # Errors
/// If they are not.
pub fn cgroup_root() -> anyhow::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    mounts
        .lines()
        .filter_map(|l| {
            let mut fields = l.split(' ');
            Some((fields.nth(1)?, fields.next()?))
        })
        .find(|(_, kind)| *kind == "cgroup2")
        .map(|(dir, _)| dir.into())
        .context("cgroup v2 is not mounted: `mount -t cgroup2 none DIR` somewhere")
}

impl Lab {
    /// Waits for its turn, clears what a killed lab left, and starts without hosts.
    ///
    /// # Errors
    /// Without root, cgroup v2 or the lab's own program.
    pub fn new() -> anyhow::Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the lab makes network, pid and mount namespaces, which takes root: run it as root (`sudo -E`)"
        );
        let lock = lock()?;
        remove_made(&lock)?;
        let root = cgroup_root()?;
        let programs = program_dir()?;
        remove_leftovers(&root)?;
        remove_leftovers(&programs)?;
        let name = format!("handover-lab-{}", process::id());
        let lab = Self {
            hosts: BTreeMap::new(),
            cgroup: root.join(&name),
            work: programs.join(&name),
            next_index: AtomicU32::new(10),
            lock,
        };
        for dir in [&lab.cgroup, &lab.work] {
            fs::create_dir(dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        for dir in PRIVATE {
            if !fs::exists(dir).with_context(|| dir.to_owned())? {
                writeln!(&*lab.lock, "{dir}").context(LOCK)?;
                fs::create_dir(dir).with_context(|| format!("creating {dir}"))?;
            }
        }
        Ok(lab)
    }

    /// Starts a host: network, pid and mount namespaces, `lo` up, nothing else.
    ///
    /// # Errors
    /// If it cannot be made; nothing of it is left then.
    pub fn add_host(&mut self, name: &str) -> anyhow::Result<Host> {
        ensure!(!self.hosts.contains_key(name), "there is a host {name} already");
        let cgroup = self.cgroup.join(name);
        fs::create_dir(&cgroup).with_context(|| format!("creating {}", cgroup.display()))?;
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
        let setup = Setup {
            private: PRIVATE.map(PathBuf::from).to_vec(),
            keep: vec![program_dir()?, workspace.into()],
            cgroup,
        };
        let host = Host::start(name, &program("handover-lab")?, setup)?;
        self.hosts.insert(name.into(), host.clone());
        Ok(host)
    }

    /// A host by its name.
    ///
    /// # Errors
    /// If there is none.
    pub fn host(&self, name: &str) -> anyhow::Result<&Host> {
        let known = || self.hosts.keys().cloned().collect::<Vec<_>>().join(", ");
        self.hosts.get(name).with_context(|| format!("no host {name} in the lab: there is {}", known()))
    }

    /// All hosts.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values()
    }

    /// A directory all hosts see, removed with the lab.
    #[must_use]
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// Joins two hosts by a veth pair; both ends are up. No two interfaces of the lab have the same index: where a veth's
    /// index equals its peer's, the kernel takes it for one end and lets its carrier wait for up to a second.
    ///
    /// # Errors
    /// With what `ip` says.
    pub fn link(&self, a: (&Host, &str), b: (&Host, &str)) -> anyhow::Result<()> {
        let index = self.next_index.fetch_add(2, Ordering::Relaxed);
        a.0.ip(&format!(
            "link add name {} index {index} type veth peer name {} index {} netns {}",
            a.1,
            b.1,
            index + 1,
            b.0.pid()
        ))?;
        a.0.ip(&format!("link set {} up", a.1))?;
        b.0.ip(&format!("link set {} up", b.1))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for host in self.hosts.values() {
            host.end();
        }
        // every step is tried; what cannot be removed is named and left to the next lab
        for result in [remove_cgroup(&self.cgroup), remove_dir(&self.work), remove_made(&self.lock)] {
            if let Err(e) = result {
                eprintln!("handover-lab: {e:#}");
            }
        }
    }
}

fn lock() -> anyhow::Result<Flock<fs::File>> {
    let file = fs::OpenOptions::new().create(true).append(true).open(LOCK).context(LOCK)?;
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((file, nix::errno::Errno::EWOULDBLOCK)) => file,
        Err((_, e)) => return Err(e).context(LOCK),
    };
    eprintln!("handover-lab: waiting for another lab on this machine to end");
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).context(LOCK)
}

/// Removes the directories a lab made, as named in the lock file.
fn remove_made(lock: &Flock<fs::File>) -> anyhow::Result<()> {
    for dir in fs::read_to_string(LOCK).context(LOCK)?.lines().filter(|l| PRIVATE.contains(l)) {
        let _ = fs::remove_dir(dir); // not empty: somebody else's by now
    }
    lock.set_len(0).context(LOCK)
}

/// Removes `handover-lab-PID` of labs that are gone. Called with the lock held, so no other lab runs.
fn remove_leftovers(parent: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(parent).with_context(|| parent.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let left = name.strip_prefix("handover-lab-").is_some_and(|pid| pid.parse::<u32>().is_ok());
        if left && path.is_dir() {
            if path.join("cgroup.procs").exists() { remove_cgroup(&path)? } else { remove_dir(&path)? }
        }
    }
    Ok(())
}

fn remove_dir(dir: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Removes a cgroup with all below it; its processes are ended first.
fn remove_cgroup(dir: &Path) -> anyhow::Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    end_all(dir).with_context(|| format!("ending the processes of cgroup {}", dir.display()))?;
    remove_empty(dir)
}

fn remove_empty(dir: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_empty(&entry.path())?;
        }
    }
    fs::remove_dir(dir).with_context(|| format!("removing cgroup {}", dir.display()))
}

/// Ends every process in and below a cgroup (those of a killed lab may be about to), and waits until they are gone.
fn end_all(dir: &Path) -> anyhow::Result<()> {
    let events = fs::File::open(dir.join("cgroup.events"))?;
    let populated = || -> io::Result<bool> {
        // through the same descriptor: reading is what tells poll which change was seen
        let mut text = [0; 256];
        let length = events.read_at(&mut text, 0)?;
        Ok(String::from_utf8_lossy(&text[..length]).contains("populated 1"))
    };
    if !populated()? {
        return Ok(());
    }
    fs::write(dir.join("cgroup.kill"), "1")?;
    while populated()? {
        // a change of the file is an exceptional condition
        let mut changed = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        match poll(&mut changed, PollTimeout::from(10_000_u16)) {
            Ok(0) => bail!("they are still there"),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
