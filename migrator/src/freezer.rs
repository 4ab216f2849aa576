//! cgroup v2: where process trees are frozen, killed and accounted for.
//!
//! The freezer is what keeps the original frozen whatever happens to CRIU or to this daemon (CRIU itself fails open).
//! Everything made here lies under one subtree (`cgroup` in the configuration):
//!
//! ```text
//! <root>/<migration>.tree      the source's processes, moved here unless they are alone in their cgroup
//! <root>/<migration>.criu      the source's `criu swrk`, outside the daemon's own cgroup
//! <root>/<migration>.pages     at the destination, post-copy: what fetches the copy's memory
//! <root>/<service>.<migration> the copy at the destination (and, until it ends, the `criu swrk` that made it)
//! ```
//!
//! Waiting is by event: the kernel wakes pollers of `cgroup.events`.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read as _, Seek as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Errors, Result},
    process,
};

/// Longest wait for a freeze, a thaw or a kill. The kernel needs microseconds; a task in uninterruptible sleep longer.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// The cgroup v2 hierarchy and the subtree in it that belongs to this daemon.
#[derive(Debug, Clone)]
pub struct Hierarchy {
    mount: PathBuf,
    root: PathBuf,
}

/// Where a tree is frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The cgroup with exactly the tree in it.
    pub dir: PathBuf,
    /// The cgroup was made for this migration and is removed after it.
    pub own: bool,
    /// Where each process was before, to be put back.
    pub origins: Vec<(u32, PathBuf)>,
}

impl Hierarchy {
    /// Finds the cgroup v2 mount.
    ///
    /// # Errors
    /// There is none, or `configured` does not lie in it.
    pub fn find(configured: Option<&Path>) -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")
            .map_err(Error::io("reading", "/proc/self/mountinfo"))?;
        let mount = cgroup2_mount(&mounts).ok_or_else(|| {
            Error::other("no cgroup v2 hierarchy is mounted: mount one with `mount -t cgroup2 none /sys/fs/cgroup/unified`")
        })?;
        let root = configured.map_or_else(|| mount.join("handover"), Path::to_path_buf);
        if !root.starts_with(&mount) || root == mount {
            return Err(Error::other(format!(
                "cgroup = {} does not lie below the cgroup v2 mount {}",
                root.display(),
                mount.display()
            )));
        }
        Ok(Self { mount, root })
    }

    /// Whether this kernel can freeze and kill a cgroup (Linux 5.14), and this process may make one.
    ///
    /// # Errors
    /// Names what is missing.
    pub fn probe(&self) -> Result<()> {
        let dir = self.root.join(format!("probe.{}", std::process::id()));
        fs::create_dir_all(&dir).map_err(Error::io("making cgroup", dir.display()))?;
        let missing =
            ["cgroup.freeze", "cgroup.events", "cgroup.kill"].into_iter().find(|f| !dir.join(f).exists());
        fs::remove_dir(&dir).map_err(Error::io("removing cgroup", dir.display()))?;
        match missing {
            None => Ok(()),
            Some(file) => {
                Err(Error::other(format!("cgroup v2 here has no {file}: Linux 5.14 or later is needed")))
            }
        }
    }

    /// For the source's processes.
    pub fn tree_dir(&self, migration: &str) -> PathBuf {
        self.root.join(format!("{migration}.tree"))
    }

    /// For the source's `criu swrk`.
    pub fn criu_dir(&self, migration: &str) -> PathBuf {
        self.root.join(format!("{migration}.criu"))
    }

    /// For the keeper of the copy's pages (post-copy), which has to work while the copy is frozen.
    pub fn pages_dir(&self, migration: &str) -> PathBuf {
        self.root.join(format!("{migration}.pages"))
    }

    /// For the copy.
    pub fn copy_dir(&self, service: &str, migration: &str) -> PathBuf {
        self.root.join(format!("{}.{migration}", service.replace(['/', '.'], "_")))
    }

    /// Whether `dir` was made by this daemon.
    fn owns(&self, dir: &Path) -> bool {
        dir.starts_with(&self.root) && dir != self.root
    }

    fn of(&self, pid: u32) -> Result<PathBuf> {
        let path = format!("/proc/{pid}/cgroup");
        let text = fs::read_to_string(&path).map_err(Error::io("reading", &path))?;
        let relative = text
            .lines()
            .find_map(|l| l.strip_prefix("0::/"))
            .ok_or_else(|| Error::other(format!("pid {pid} is in no cgroup v2")))?;
        Ok(self.mount.join(relative))
    }

    /// Where the tree of `root` is to be frozen: in the cgroup it has, when it is alone there, else in
    /// `<migration>.tree`. Nothing is touched; the plan is to be made durable before [`settle`](Self::settle).
    ///
    /// # Errors
    /// A process is gone, or cannot be looked at.
    pub fn plan(&self, root: u32, migration: &str) -> Result<Placement> {
        let now = self.of(root)?;
        let tree: BTreeSet<u32> = process::tree(root)?.into_iter().collect();
        if now != self.mount && procs(&now)?.into_iter().collect::<BTreeSet<_>>() == tree {
            return Ok(Placement { own: self.owns(&now), dir: now, origins: Vec::new() });
        }
        let mut origins = vec![(root, now)];
        for pid in tree.into_iter().filter(|&p| p != root) {
            // one that ends meanwhile has no place to go back to
            if let Ok(dir) = self.of(pid) {
                origins.push((pid, dir));
            }
        }
        Ok(Placement { dir: self.tree_dir(migration), own: true, origins })
    }

    /// Moves the tree of `root` to where it was planned. The processes run on.
    ///
    /// # Errors
    /// A process cannot be moved; [`put_back`](Self::put_back) undoes what was done.
    pub fn settle(&self, root: u32, placement: &Placement) -> Result<()> {
        if placement.origins.is_empty() {
            return Ok(());
        }
        make(&placement.dir)?;
        // a fork while moving leaves a child behind: again until nobody is outside
        loop {
            let inside: BTreeSet<u32> = procs(&placement.dir)?.into_iter().collect();
            let outside: Vec<u32> =
                process::tree(root)?.into_iter().filter(|p| !inside.contains(p)).collect();
            if outside.is_empty() {
                return Ok(());
            }
            for pid in outside {
                if let Err(e) = enter(&placement.dir, pid)
                    && process::exists(pid)
                {
                    return Err(e);
                }
            }
        }
    }

    /// Puts every process of `placement` back where it came from (what it forked since where the root came from) and removes
    /// the cgroup if it was made for the migration. Succeeds when that was done before.
    ///
    /// # Errors
    /// All that went wrong; nothing is left out because of an error before it.
    pub fn put_back(&self, placement: &Placement) -> Result<()> {
        let Some((_, home)) = placement.origins.first() else { return Ok(()) };
        let mut errors = Errors::default();
        if placement.dir.exists() {
            for pid in procs(&placement.dir)? {
                let origin = placement.origins.iter().find(|(p, _)| *p == pid).map_or(home, |(_, dir)| dir);
                // the origin may be gone; the hierarchy's root takes everybody
                let back = if origin.exists() { origin } else { &self.mount };
                if let Err(e) = enter(back, pid)
                    && process::exists(pid)
                {
                    errors.keep::<()>(Err(e));
                }
            }
            errors.keep(remove(&placement.dir));
        }
        errors.finish("putting the process back into its cgroup")
    }

    /// Removes the subtree if nothing is left in it.
    pub fn tidy(&self) {
        if let Err(e) = fs::remove_dir(&self.root)
            && !matches!(e.raw_os_error(), Some(libc::EBUSY | libc::ENOENT | libc::ENOTEMPTY))
        {
            tracing::debug!(cgroup = %self.root.display(), error = %e, "not removed");
        }
    }
}

/// Of /proc/self/mountinfo: the first mount of type cgroup2.
fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        (right.split(' ').next() == Some("cgroup2")).then(|| left.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// Makes a cgroup; succeeds when it is there.
///
/// # Errors
/// Of the file system.
pub fn make(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::io("making cgroup", dir.display()))
}

/// Moves `pid` into `dir`.
///
/// # Errors
/// It is gone, or may not be moved.
pub fn enter(dir: &Path, pid: u32) -> Result<()> {
    fs::write(dir.join("cgroup.procs"), pid.to_string())
        .map_err(Error::io("moving a process into cgroup", format_args!("{} (pid {pid})", dir.display())))
}

/// All processes in `dir` and below; 0 stands for one of another pid namespace.
///
/// # Errors
/// It is no cgroup. One that is gone has no processes.
pub fn procs(dir: &Path) -> Result<Vec<u32>> {
    let file = dir.join("cgroup.procs");
    let text = match fs::read_to_string(&file) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => return Ok(Vec::new()),
        other => other.map_err(Error::io("reading", file.display()))?,
    };
    let mut all: Vec<u32> = text.lines().filter_map(|l| l.parse().ok()).collect();
    if let Ok(entries) = fs::read_dir(dir) {
        for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
            all.extend(procs(&entry.path())?);
        }
    }
    Ok(all)
}

/// Freezes everything in `dir` and waits until it stands still.
///
/// # Errors
/// Not frozen within [`PATIENCE`].
pub async fn freeze(dir: &Path) -> Result<()> {
    write(dir, "cgroup.freeze", "1")?;
    wait(dir, "frozen 1", PATIENCE).await
}

/// Lets everything in `dir` run. Succeeds when the cgroup is gone.
///
/// # Errors
/// Not thawed within [`PATIENCE`].
pub async fn thaw(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    write(dir, "cgroup.freeze", "0")?;
    wait(dir, "frozen 0", PATIENCE).await
}

/// Kills everything in `dir`, frozen or not, and waits until it is empty (zombies do not count). Succeeds when the
/// cgroup is gone.
///
/// # Errors
/// Not empty within [`PATIENCE`].
pub async fn kill(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    write(dir, "cgroup.kill", "1")?;
    wait_empty(dir, PATIENCE).await
}

/// Waits until nobody is left in `dir`.
///
/// # Errors
/// Somebody is after `patience`.
pub async fn wait_empty(dir: &Path, patience: Duration) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    wait(dir, "populated 0", patience).await
}

/// Whether `dir` is frozen now.
pub fn is_frozen(dir: &Path) -> bool {
    fs::read_to_string(dir.join("cgroup.events")).is_ok_and(|t| t.lines().any(|l| l == "frozen 1"))
}

/// Removes an empty cgroup. Succeeds when it is gone.
///
/// # Errors
/// It is not empty.
pub fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("removing cgroup", dir.display())(e)),
        _ => Ok(()),
    }
}

fn write(dir: &Path, file: &str, value: &str) -> Result<()> {
    let path = dir.join(file);
    fs::write(&path, value).map_err(Error::io("writing", path.display()))
}

/// Waits until `cgroup.events` of `dir` has the line `wanted`.
async fn wait(dir: &Path, wanted: &'static str, patience: Duration) -> Result<()> {
    let path = dir.join("cgroup.events");
    let waited = tokio::task::spawn_blocking(move || {
        let failed = |source| Error::io("reading", path.display())(source);
        let mut file = fs::File::open(&path).map_err(failed)?;
        let deadline = Instant::now() + patience;
        loop {
            // reading arms the next wake-up, so nothing that happens between read and poll is missed
            let mut text = String::new();
            file.rewind().and_then(|()| file.read_to_string(&mut text)).map_err(failed)?;
            if text.lines().any(|l| l == wanted) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::other(format!(
                    "{}: no `{wanted}` after {} ms",
                    path.display(),
                    patience.as_millis()
                )));
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            nix::poll::poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout)
                .map_err(Error::errno("waiting on", path.display()))?;
        }
    });
    waited.await.map_err(|e| Error::other(format!("waiting on a cgroup: {e}")))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_in_a_hybrid_hierarchy() {
        let text = "30 25 0:26 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw\n\
                    31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                    40 30 0:36 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mount(text), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroup2_mount("31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"), None);
    }
}
