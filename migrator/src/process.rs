//! Processes as /proc shows them: finding the service's tree, and what it consists of.
//!
//! A pid alone is no identity (it is reused), so whoever keeps one keeps the start time with it ([`Identity`]).

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, Instant},
};

use handover_api::v1::{FileFact, Target, target::By};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout},
    sys::signal::Signal,
    unistd::Pid,
};

use crate::error::{Error, Result};

/// A line of /proc/PID/stat, as far as needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Process id.
    pub pid: u32,
    /// R, S, D, T (stopped), t (traced), Z (zombie) ...
    pub state: char,
    /// Parent.
    pub parent: u32,
    /// Process group.
    pub group: u32,
    /// Session.
    pub session: u32,
    /// Clock ticks from boot to start.
    pub start_time: u64,
}

/// A process that cannot be mistaken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// Clock ticks from boot to start.
    pub start_time: u64,
}

impl Identity {
    /// Whether it lives (a zombie does not).
    pub fn alive(self) -> bool {
        stat(self.pid).is_ok_and(|s| s.start_time == self.start_time && !matches!(s.state, 'Z' | 'X'))
    }
}

/// Why a target is not exactly one process tree.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// No way to find it was given.
    #[error("the service has no target: give a pid, a pidfile or a command")]
    Missing,
    /// A pid that is gone.
    #[error("no process with pid {0} runs here")]
    Gone(u32),
    /// The file that holds the pid is unusable.
    #[error("pidfile {path}: {why}")]
    Pidfile {
        /// Its path.
        path: String,
        /// Why.
        why: String,
    },
    /// The expression is none.
    #[error("command `{0}` is no regular expression")]
    Regex(String, #[source] Box<regex::Error>),
    /// Nothing matches.
    #[error("no process's command line matches `{0}`")]
    NoMatch(String),
    /// Several process trees match.
    #[error("`{pattern}` matches {} processes: {}", .matches.len(), list(.matches))]
    Several {
        /// The expression.
        pattern: String,
        /// Pid and command line of each root.
        matches: Vec<(u32, String)>,
    },
    /// /proc cannot be read.
    #[error("looking for the process")]
    Proc(#[from] Error),
}

fn list(matches: &[(u32, String)]) -> String {
    let shown = matches.iter().take(8).map(|(pid, command)| format!("{pid} ({command})"));
    let mut words = shown.collect::<Vec<_>>().join(", ");
    if matches.len() > 8 {
        words.push_str(", ...");
    }
    words
}

/// Parses /proc/PID/stat. The command's name stands in parentheses and may itself hold spaces and parentheses.
fn parse_stat(text: &str) -> Option<Stat> {
    let (pid, rest) = text.split_once(" (")?;
    let (_, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Some(Stat {
        pid: pid.parse().ok()?,
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
    })
}

/// /proc/PID/stat of `pid`.
///
/// # Errors
/// It is gone.
pub fn stat(pid: u32) -> Result<Stat> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).map_err(Error::io("reading", &path))?;
    parse_stat(&text).ok_or_else(|| Error::other(format!("{path} cannot be understood: {text}")))
}

/// Whether there is a process or zombie with this pid.
pub fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Every process here, zombies left out.
fn all() -> Result<BTreeMap<u32, Stat>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir("/proc").map_err(Error::io("listing", "/proc"))?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        // gone between listing and reading: not there
        if let Ok(stat) = stat(pid)
            && !matches!(stat.state, 'Z' | 'X')
        {
            found.insert(pid, stat);
        }
    }
    Ok(found)
}

/// `root` and all its descendants, zombies left out, in order of pid.
///
/// # Errors
/// /proc cannot be read.
pub fn tree(root: u32) -> Result<Vec<u32>> {
    let all = all()?;
    let below = |pid: u32| {
        let mut at = pid;
        // a process that is re-parented while we look cannot send us in circles longer than this
        for _ in 0..all.len() {
            if at == root {
                return true;
            }
            match all.get(&at) {
                Some(s) if s.parent != 0 => at = s.parent,
                _ => return false,
            }
        }
        false
    };
    Ok(all.keys().copied().filter(|&p| below(p)).collect())
}

/// Arguments joined by spaces; empty for a kernel thread.
fn command_line(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.trim_end_matches('\0').replace('\0', " ")
}

/// The root of the process tree that `target` means.
///
/// # Errors
/// [`TargetError`]: it is not exactly one.
pub fn resolve(target: Option<&Target>) -> std::result::Result<Identity, TargetError> {
    let by = target.and_then(|t| t.by.as_ref()).ok_or(TargetError::Missing)?;
    let pid = match by {
        By::Pid(pid) => *pid,
        By::Pidfile(path) => pid_of_file(path)?,
        By::Command(pattern) => pid_of_command(pattern)?,
    };
    match stat(pid) {
        Ok(s) if !matches!(s.state, 'Z' | 'X') => Ok(Identity { pid, start_time: s.start_time }),
        _ => Err(TargetError::Gone(pid)),
    }
}

fn pid_of_file(path: &str) -> std::result::Result<u32, TargetError> {
    let failed = |why: String| TargetError::Pidfile { path: path.into(), why };
    let text = fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
    text.trim().parse().map_err(|_| failed(format!("holds no pid but {:?}", text.trim())))
}

fn pid_of_command(pattern: &str) -> std::result::Result<u32, TargetError> {
    let regex = regex::Regex::new(pattern).map_err(|e| TargetError::Regex(pattern.into(), Box::new(e)))?;
    let me = std::process::id();
    let all = all()?;
    let matching: BTreeMap<u32, String> = all
        .keys()
        .filter(|&&pid| pid != me)
        .map(|&pid| (pid, command_line(pid)))
        .filter(|(_, command)| !command.is_empty() && regex.is_match(command))
        .collect();
    one_root(pattern, matching, |pid| all.get(&pid).map(|s| s.parent))
}

/// Of the matching processes, the one that has no matching ancestor.
fn one_root(
    pattern: &str,
    matching: BTreeMap<u32, String>,
    parent: impl Fn(u32) -> Option<u32>,
) -> std::result::Result<u32, TargetError> {
    let has_matching_ancestor = |pid: u32| {
        let mut seen = BTreeSet::new();
        let mut at = parent(pid);
        while let Some(p) = at {
            if matching.contains_key(&p) {
                return true;
            }
            if !seen.insert(p) {
                return false;
            }
            at = parent(p);
        }
        false
    };
    let mut roots: Vec<(u32, String)> = matching
        .iter()
        .filter(|(pid, _)| !has_matching_ancestor(**pid))
        .map(|(p, c)| (*p, c.clone()))
        .collect();
    match roots.len() {
        0 => Err(TargetError::NoMatch(pattern.into())),
        1 => Ok(roots.remove(0).0),
        _ => Err(TargetError::Several { pattern: pattern.into(), matches: roots }),
    }
}

/// What a process tree holds.
#[derive(Debug, Default, Clone)]
pub struct Holdings {
    /// Process and thread ids; all have to be free at the destination.
    pub ids: Vec<u32>,
    /// Inodes of its sockets.
    pub sockets: HashSet<u32>,
    /// Anonymous and shared memory, bytes: what the images will hold, about.
    pub memory_bytes: u64,
    /// Files mapped executable.
    pub files: Vec<FileFact>,
    /// An io_uring, which CRIU cannot take along.
    pub io_uring: bool,
    /// A terminal, which CRIU cannot take along.
    pub terminal: Option<String>,
    /// Unix sockets are among its sockets.
    pub unix_sockets: bool,
    /// It holds file locks.
    pub file_locks: bool,
}

/// Looks at every process of `tree`.
///
/// # Errors
/// One of them is gone or may not be looked at.
pub fn holdings(tree: &[u32]) -> Result<Holdings> {
    let mut found = Holdings::default();
    let mut files = BTreeMap::new();
    for &pid in tree {
        let tasks = format!("/proc/{pid}/task");
        for task in fs::read_dir(&tasks).map_err(Error::io("listing", &tasks))?.flatten() {
            found.ids.extend(task.file_name().to_str().and_then(|n| n.parse::<u32>().ok()));
        }
        let fds = format!("/proc/{pid}/fd");
        for fd in fs::read_dir(&fds).map_err(Error::io("listing", &fds))?.flatten() {
            let Ok(link) = fs::read_link(fd.path()) else { continue };
            let link = link.to_string_lossy();
            if let Some(inode) = link.strip_prefix("socket:[").and_then(|l| l.strip_suffix(']')) {
                found.sockets.extend(inode.parse::<u32>().ok());
            } else if link == "anon_inode:[io_uring]" {
                found.io_uring = true;
            } else if link.starts_with("/dev/pts/") || link.starts_with("/dev/tty") {
                found.terminal = Some(link.into_owned());
            }
        }
        let status_path = format!("/proc/{pid}/status");
        let status = fs::read_to_string(&status_path).map_err(Error::io("reading", &status_path))?;
        found.memory_bytes += memory_of(&status);
        mapped_files(pid, &mut files)?;
    }
    found.files = files.into_iter().map(|(path, size)| FileFact { path, size }).collect();
    found.unix_sockets = match tree.first() {
        Some(pid) if !found.sockets.is_empty() => {
            let path = format!("/proc/{pid}/net/unix");
            let text = fs::read_to_string(&path).map_err(Error::io("reading", &path))?;
            unix_inodes(&text).any(|inode| found.sockets.contains(&inode))
        }
        _ => false,
    };
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    found.file_locks = lock_holders(&locks).any(|pid| tree.contains(&pid));
    Ok(found)
}

/// The inodes of the sockets that the processes `tree` have open. One that ends meanwhile has none.
pub fn sockets(tree: &[u32]) -> HashSet<u32> {
    let descriptors =
        tree.iter().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).ok()).flatten().flatten();
    descriptors
        .filter_map(|fd| {
            let link = fs::read_link(fd.path()).ok()?;
            link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
        })
        .collect()
}

/// CAP_SYS_RESOURCE (linux/capability.h).
const CAP_SYS_RESOURCE: u32 = 24;

/// Whether this process has the capability of that number.
pub fn capable(number: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    effective.and_then(|v| u64::from_str_radix(v.trim(), 16).ok()).is_some_and(|set| set & (1 << number) != 0)
}

/// Bytes of the largest pipe that this process, and what it starts, may make.
pub fn pipe_size_limit() -> u64 {
    if capable(CAP_SYS_RESOURCE) {
        return u64::MAX;
    }
    let limit = fs::read_to_string("/proc/sys/fs/pipe-max-size").unwrap_or_default();
    limit.trim().parse().unwrap_or(0)
}

/// Bytes in RssAnon and RssShmem of /proc/PID/status.
fn memory_of(status: &str) -> u64 {
    status
        .lines()
        .filter_map(|l| l.strip_prefix("RssAnon:").or_else(|| l.strip_prefix("RssShmem:")))
        .filter_map(|v| v.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
        .sum::<u64>()
        * 1024
}

fn unix_inodes(text: &str) -> impl Iterator<Item = u32> {
    text.lines().skip(1).filter_map(|l| l.split_ascii_whitespace().nth(6)?.parse().ok())
}

fn lock_holders(text: &str) -> impl Iterator<Item = u32> {
    // "1: POSIX  ADVISORY  WRITE 1234 08:01:5678 0 EOF"
    text.lines().filter_map(|l| l.split_ascii_whitespace().nth(4)?.parse().ok())
}

fn mapped_files(pid: u32, files: &mut BTreeMap<String, u64>) -> Result<()> {
    let path = format!("/proc/{pid}/maps");
    let maps = fs::read_to_string(&path).map_err(Error::io("reading", &path))?;
    for line in maps.lines() {
        // address perms offset dev inode path
        let mut fields = line.splitn(6, ' ');
        let (Some(perms), Some(file)) = (fields.nth(1), fields.nth(3).map(str::trim_start)) else { continue };
        if perms.contains('x') && file.starts_with('/') && !files.contains_key(file) {
            // a file deleted since is a matter for CRIU, not for a comparison
            if let Ok(meta) = fs::metadata(file) {
                files.insert(file.into(), meta.size());
            }
        }
    }
    Ok(())
}

/// A handle on a process that stays valid whatever happens to its pid.
///
/// # Errors
/// It is gone.
pub fn pidfd(pid: u32) -> Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers and returns a new descriptor or -1
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    if fd < 0 {
        return Err(Error::io("opening pidfd of", pid)(io::Error::last_os_error()));
    }
    // SAFETY: the kernel just returned this descriptor, nobody else owns it; it fits an i32 as all descriptors do
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A duplicate of descriptor `fd` of the process behind `pidfd`.
///
/// # Errors
/// Closed meanwhile, or not allowed.
pub fn borrow_fd(pidfd: &OwnedFd, fd: i32) -> Result<OwnedFd> {
    // SAFETY: pidfd_getfd(2) takes three integers and returns a new descriptor or -1
    let got = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    if got < 0 {
        return Err(Error::io("borrowing descriptor", fd)(io::Error::last_os_error()));
    }
    // SAFETY: as in `pidfd`
    Ok(unsafe { OwnedFd::from_raw_fd(got as i32) })
}

/// Waits until all of `processes` are gone, first dead and then reaped by their parents, at most for `patience`.
/// Returns those that are not: a zombie keeps its pid, and with it a later return of the service from starting.
///
/// # Errors
/// Of poll.
pub async fn wait_gone(processes: Vec<(u32, OwnedFd)>, patience: Duration) -> Result<Vec<u32>> {
    let waited = tokio::task::spawn_blocking(move || {
        let deadline = Instant::now() + patience;
        let mut left = Vec::new();
        for (pid, fd) in processes {
            if !wait_one(pid, &fd, deadline)? {
                left.push(pid);
            }
        }
        Ok(left)
    });
    waited.await.map_err(|e| Error::other(format!("waiting for processes: {e}")))?
}

fn wait_one(pid: u32, fd: &OwnedFd, deadline: Instant) -> Result<bool> {
    // POLLIN: dead. POLLHUP: reaped (Linux 6.11; before, /proc tells).
    let mut dead = false;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // once dead the descriptor is always readable: only the hang-up is still waited for
        let flags = if dead { PollFlags::empty() } else { PollFlags::POLLIN };
        let slice = if dead { left.min(Duration::from_millis(50)) } else { left };
        let mut fds = [PollFd::new(fd.as_fd(), flags)];
        let timeout = PollTimeout::try_from(slice).unwrap_or(PollTimeout::MAX);
        nix::poll::poll(&mut fds, timeout).map_err(Error::errno("waiting for pid", pid))?;
        let events = fds[0].revents().unwrap_or(PollFlags::empty());
        dead |= events.contains(PollFlags::POLLIN);
        if events.contains(PollFlags::POLLHUP) || !exists(pid) {
            return Ok(true);
        }
        if left.is_zero() {
            return Ok(false);
        }
    }
}

/// Sends `signal`; a process that is gone is none to signal.
///
/// # Errors
/// Not allowed.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    match nix::sys::signal::kill(Pid::from_raw(pid.cast_signed()), signal) {
        Err(nix::errno::Errno::ESRCH) | Ok(()) => Ok(()),
        Err(e) => Err(Error::errno("signalling pid", pid)(e)),
    }
}

/// The instruction-set flags of the first processor.
pub fn cpu_flags() -> Vec<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|l| l.strip_prefix("flags").or_else(|| l.strip_prefix("Features")))
        .and_then(|l| l.split_once(':'))
        .map(|(_, flags)| flags.split_ascii_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(by: By) -> Target {
        Target { by: Some(by) }
    }

    #[test]
    fn a_command_name_may_hold_anything() {
        let line = format!("42 (a) b (c) S 1 40 41 0{} 777 0", " 0".repeat(14));
        let s = parse_stat(&line).unwrap();
        assert_eq!((s.pid, s.state, s.parent, s.group, s.session), (42, 'S', 1, 40, 41));
        assert_eq!(s.start_time, 777);
    }

    #[test]
    fn a_pid_that_is_gone_is_named() {
        let err = resolve(Some(&target(By::Pid(4_194_303)))).unwrap_err();
        assert_eq!(err.to_string(), "no process with pid 4194303 runs here");
    }

    #[test]
    fn a_pidfile_without_a_pid_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pid");
        fs::write(&path, "none\n").unwrap();
        let err = resolve(Some(&target(By::Pidfile(path.to_str().unwrap().into())))).unwrap_err();
        assert!(err.to_string().contains("holds no pid but \"none\""), "{err}");
    }

    #[test]
    fn a_pattern_has_to_match_one_tree() {
        let one = |pids: &[(u32, u32)]| {
            let matching = pids.iter().map(|(p, _)| (*p, format!("film-server {p}"))).collect();
            let parents: BTreeMap<u32, u32> = pids.iter().copied().collect();
            one_root("film", matching, |p| parents.get(&p).copied())
        };
        assert_eq!(one(&[(10, 1), (11, 10), (12, 11)]).unwrap(), 10);
        assert!(matches!(one(&[]), Err(TargetError::NoMatch(_))));
        let err = one(&[(10, 1), (20, 1)]).unwrap_err().to_string();
        assert_eq!(err, "`film` matches 2 processes: 10 (film-server 10), 20 (film-server 20)");
    }

    #[test]
    fn a_bad_pattern_is_named() {
        let err = resolve(Some(&target(By::Command("(".into())))).unwrap_err();
        assert_eq!(err.to_string(), "command `(` is no regular expression");
        assert!(matches!(resolve(None), Err(TargetError::Missing)));
    }

    #[test]
    fn own_holdings() {
        let me = std::process::id();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let found = holdings(&[me]).unwrap();
        let inode = u32::try_from(nix::sys::stat::fstat(&listener).unwrap().st_ino).unwrap();
        assert!(found.sockets.contains(&inode));
        assert!(found.ids.contains(&me));
        assert!(found.memory_bytes > 0);
        let exe = fs::canonicalize("/proc/self/exe").unwrap();
        assert!(found.files.iter().any(|f| Path::new(&f.path) == exe));
    }
}
