//! `handover-migrator keep-pages`: a process beside the copy while its memory follows (post-copy).
//!
//! It starts `criu lazy-pages`, which fetches pages for the copy. Should that end before all pages are here, the kernel
//! would let go of what is missing, and the copy would read zeros where its memory was. So the keeper holds the copy's
//! userfault descriptors as well: what is missing stays missing, a task that needs it waits, and the keeper kills the copy.
//! A service that is lost is seen at once; one that goes on with holes in its memory is not.
//!
//! It is a process of its own so that this holds when the daemon dies.
//!
//! ```text
//! daemon -> fetch            (images are here)          keeper -> ready    (criu lazy-pages listens)
//! daemon -> hold             (the copy is restored)     keeper -> held N
//! criu lazy-pages ends       exit code 0: all pages are here; else: the copy's cgroup is killed
//! ```
//!
//! Not covered: a child that the copy forks while its memory follows has a descriptor that the keeper does not hold; it is
//! killed with the others, some milliseconds late.

use std::{
    fs,
    io::{self, BufRead as _, Read as _, Write as _},
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{
    criu,
    error::{Error, Result},
    process,
};

/// What the keeper is told on its command line.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The CRIU program.
    #[arg(long)]
    pub criu: PathBuf,
    /// Where the images are.
    #[arg(long)]
    pub images: PathBuf,
    /// The copy's cgroup.
    #[arg(long)]
    pub copy: PathBuf,
    /// Descriptor of the way to the page server.
    #[arg(long)]
    pub socket: RawFd,
}

/// See the file's header. Says whether all pages have come; if not, the copy has been killed.
///
/// # Errors
/// As if not all had come.
pub fn run(options: &Options) -> Result<bool> {
    let fetched = fetch(options);
    if !matches!(fetched, Ok(true)) {
        let kill = options.copy.join("cgroup.kill");
        fs::write(&kill, "1").map_err(Error::io("killing the copy through", kill.display()))?;
    }
    fetched
}

fn fetch(options: &Options) -> Result<bool> {
    // SAFETY: whoever started this process opened the descriptor for it, and nobody else here uses it
    let socket = unsafe { OwnedFd::from_raw_fd(options.socket) };
    let mut orders = io::stdin().lock().lines();
    let mut order = |wanted: &str| -> Result<bool> {
        let line = orders.next().transpose().map_err(Error::io("hearing from", "the daemon"))?;
        match line {
            Some(line) if line == wanted => Ok(true),
            Some(line) => Err(Error::other(format!("the daemon said `{line}` instead of `{wanted}`"))),
            None => Ok(false), // it has died, or given up
        }
    };
    if !order("fetch")? {
        return Ok(false);
    }
    let program = options.criu.display();
    let mut child = Command::new(&options.criu)
        .args(criu::lazy_pages(&options.images, options.socket))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()
        .map_err(Error::io("starting", &program))?;
    // its own is the last: what it leaves unread is lost when it ends
    drop(socket);
    let mut ready = [0];
    let status = child.stdout.as_mut().ok_or_else(|| Error::other("criu lazy-pages has no stdout"))?;
    status.read_exact(&mut ready).map_err(Error::io("waiting for", &program))?;
    say("ready")?;
    let mut held = Vec::new();
    if order("hold")? {
        held = userfaults(child.id())?;
        say(&format!("held {}", held.len()))?;
    }
    let ended = child.wait().map_err(Error::io("waiting for", &program))?;
    if ended.success() {
        drop(held);
        return Ok(true);
    }
    // killed while they are held
    let kill = options.copy.join("cgroup.kill");
    fs::write(&kill, "1").map_err(Error::io("killing the copy through", kill.display()))?;
    Ok(false)
}

fn say(word: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{word}").and_then(|()| out.flush()).map_err(Error::io("telling", "the daemon"))
}

/// Duplicates of the userfault descriptors of `pid`.
fn userfaults(pid: u32) -> Result<Vec<OwnedFd>> {
    let dir = format!("/proc/{pid}/fd");
    let pidfd = process::pidfd(pid)?;
    let mut found = Vec::new();
    for entry in fs::read_dir(Path::new(&dir)).map_err(Error::io("listing", &dir))?.flatten() {
        let userfault =
            fs::read_link(entry.path()).is_ok_and(|l| l.as_os_str() == "anon_inode:[userfaultfd]");
        if let (true, Some(fd)) = (userfault, entry.file_name().to_str().and_then(|n| n.parse().ok())) {
            found.push(process::borrow_fd(&pidfd, fd)?);
        }
    }
    Ok(found)
}
