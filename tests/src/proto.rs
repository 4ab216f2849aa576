//! What the lab and its hosts say to each other: one JSON message per packet of a `SOCK_SEQPACKET` pair.
//!
//! The lab sends numbered requests; the host answers each with the same number, and tells of exits as they happen.
//! A program's passed files travel with its request (`SCM_RIGHTS`), in the order stdin, stdout, stderr.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Longest message; far below the socket's default buffer.
pub(crate) const MAX_MESSAGE: usize = 128 * 1024;

/// From the lab to a host.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// First message: what the host has to become before it is of use.
    Setup(Setup),
    /// Starts a program.
    Spawn(Spawn),
    /// Sends a signal to a process of the host.
    Signal { pid: i32, signal: i32 },
}

/// What a host has to itself.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    /// Directories that are empty tmpfs of the host's own.
    pub(crate) private: Vec<PathBuf>,
    /// Directories that stay visible even if they lie beneath a private one.
    pub(crate) keep: Vec<PathBuf>,
    /// The host's cgroup (v2), which everything in it starts in.
    pub(crate) cgroup: PathBuf,
}

/// A program to start.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Spawn {
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) cwd: PathBuf,
    pub(crate) stdio: [Io; 3],
    pub(crate) cgroup: Option<PathBuf>,
    pub(crate) min_pid: Option<i32>,
}

/// Where one of stdin, stdout, stderr goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Io {
    /// `/dev/null`, opened inside the host.
    #[default]
    Null,
    /// A file, opened inside the host (created and appended to for output).
    File(PathBuf),
    /// An end of a pipe to the lab. A program that is to be migrated cannot have one.
    Pipe,
}

/// From a host to the lab.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// The program was started.
    Started { pid: i32 },
    /// The request was done.
    Done,
    /// The request failed; nothing was started.
    Failed { error: String },
    /// A process whose parent was the host's pid 1 has ended (started by it, or orphaned).
    Exited { pid: i32, code: Option<i32>, signal: Option<i32> },
}

/// A message and the number that ties an answer to its request; 0: not an answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Numbered<T> {
    pub(crate) number: u64,
    pub(crate) body: T,
}
