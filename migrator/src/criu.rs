//! CRIU: an asynchronous client of `criu swrk` (protobuf messages over a SOCK_SEQPACKET pair), and the one place that
//! knows CRIU's options, versions and log.
//!
//! ```text
//! spawn --> request(DUMP) --> Notify pre-dump --answer--> Notify post-dump --answer(false)--> Final: tasks thawed
//!                                                             tasks frozen --answer(true)---> Final: tasks ended
//!       --> request(RESTORE) --> Notify ... --answer--> Final: tasks stopped
//! ```
//!
//! Failure: CRIU fails open. When this end of the socket is closed, an unanswered dump is undone and the tasks run; when
//! `swrk` itself dies, the tasks run with their sockets in repair mode. Whoever needs them to stand still holds them
//! with the freezer. `swrk` is started in a session and a cgroup of its own, so that what ends the daemon does not end it.
//!
//! The reason of a failure is the first relevant line of CRIU's log. `cr_errmsg` of the response is not used: it holds
//! the first error line of any kind, which for a dump is a harmless one about RLIMIT_NOFILE.

use std::{
    fs, io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair},
};
use protobuf::Message as _;
use rust_criu::rust_criu_protobuf::rpc;
use tokio::{io::unix::AsyncFd, sync::watch};

use crate::{
    error::{Error, Result},
    freezer,
};

/// Log of a dump, in the image directory.
pub const DUMP_LOG: &str = "dump.log";
/// Log of a restore, in the image directory.
pub const RESTORE_LOG: &str = "restore.log";
/// Log of what fetches pages, in the image directory.
pub const LAZY_LOG: &str = "lazy.log";
/// What `swrk` wrote before it had a log, in the image directory.
pub const STDERR: &str = "criu.stderr";

/// A message of CRIU is a few hundred bytes.
const MESSAGE_LIMIT: usize = 64 * 1024;

/// What CRIU says.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// It stands at this point and waits for an answer.
    Notify(String),
    /// It is done.
    Final {
        /// Whether it did what it was asked.
        success: bool,
        /// Of a restore: root of the tree.
        pid: Option<u32>,
    },
}

impl Event {
    /// One message of `criu swrk`.
    ///
    /// # Errors
    /// It is no message of CRIU's.
    pub fn decode(message: &[u8]) -> io::Result<Self> {
        let response = rpc::Criu_resp::parse_from_bytes(message).map_err(io::Error::other)?;
        if response.type_() == rpc::Criu_req_type::NOTIFY {
            return Ok(Self::Notify(response.notify.script().to_owned()));
        }
        let pid = response.restore.as_ref().and_then(|r| u32::try_from(r.pid()).ok());
        Ok(Self::Final { success: response.success(), pid })
    }
}

/// A running `criu swrk`.
pub struct Swrk {
    pid: u32,
    socket: AsyncFd<OwnedFd>,
    exited: watch::Receiver<bool>,
}

impl Swrk {
    /// Starts one in `cgroup`; it waits for its request.
    ///
    /// # Errors
    /// The program cannot be started, or `cgroup` not entered.
    pub async fn spawn(program: &Path, cgroup: &Path, stderr: &Path) -> Result<Self> {
        Self::spawn_with(program, cgroup, stderr, None).await
    }

    /// The same with one more descriptor, under the number that it has here.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub async fn spawn_with(
        program: &Path,
        cgroup: &Path,
        stderr: &Path,
        pages: Option<OwnedFd>,
    ) -> Result<Self> {
        let failed = |e: io::Error| Error::io("starting", program.display())(e);
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|e| failed(e.into()))?;
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| failed(e.into()))?;
        let stderr = fs::File::create(stderr).map_err(Error::io("creating", stderr.display()))?;

        let inherited = theirs.as_raw_fd();
        let also = pages.as_ref().map_or(inherited, OwnedFd::as_raw_fd);
        let mut command = tokio::process::Command::new(program);
        command.arg("swrk").arg(inherited.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).current_dir("/");
        // SAFETY: between fork and exec only async-signal-safe system calls are made, and nothing is allocated:
        // setsid(2), and fcntl(2) on descriptors that stay open in the parent until the spawn has returned
        unsafe {
            command.pre_exec(move || {
                if libc::setsid() < 0
                    || libc::fcntl(inherited, libc::F_SETFD, 0) < 0
                    || libc::fcntl(also, libc::F_SETFD, 0) < 0
                {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(failed)?;
        drop((theirs, pages));
        let pid = child.id().ok_or_else(|| failed(io::Error::other("it ended at once")))?;
        let (tell, exited) = watch::channel(false);
        tokio::spawn(async move {
            match child.wait().await {
                Ok(status) => tracing::debug!(pid, %status, "criu swrk ended"),
                Err(e) => tracing::warn!(pid, error = %e, "waiting for criu swrk"),
            }
            // nobody may be left to be told
            let _ = tell.send(true);
        });
        freezer::enter(cgroup, pid)?;
        // SAFETY: an OwnedFd always gives the same descriptor, which stays open until it is dropped with the AsyncFd
        let socket = unsafe { AsyncFd::register(ours) }.map_err(|e| failed(e.into()))?;
        Ok(Self { pid, socket, exited })
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it lives.
    pub fn alive(&self) -> bool {
        !*self.exited.borrow()
    }

    /// Turns true when it has ended.
    pub fn exited(&self) -> watch::Receiver<bool> {
        self.exited.clone()
    }

    /// Asks it to dump the tree of `pid` into `images`; the tasks stay frozen from `post-dump` until that is answered.
    ///
    /// # Errors
    /// It died.
    pub async fn dump(&mut self, pid: u32, images: &Path, needs: Needs) -> Result<()> {
        self.request(rpc::Criu_req_type::DUMP, dump_options(pid, images, needs)).await
    }

    /// Asks it to restore from `images`; the tasks are left stopped.
    ///
    /// # Errors
    /// It died.
    pub async fn restore(&mut self, images: &Path, post_copy: bool) -> Result<()> {
        self.request(rpc::Criu_req_type::RESTORE, restore_options(images, post_copy)).await
    }

    async fn request(&mut self, kind: rpc::Criu_req_type, opts: rpc::Criu_opts) -> Result<()> {
        let mut request = rpc::Criu_req::new();
        request.set_type(kind);
        request.opts = protobuf::MessageField::some(opts);
        self.send(&request).await
    }

    /// Answers a [`Event::Notify`].
    ///
    /// # Errors
    /// It died.
    pub async fn answer(&mut self, success: bool) -> Result<()> {
        let mut request = rpc::Criu_req::new();
        request.set_type(rpc::Criu_req_type::NOTIFY);
        request.set_notify_success(success);
        self.send(&request).await
    }

    async fn send(&mut self, request: &rpc::Criu_req) -> Result<()> {
        let failed = |e: io::Error| Error::io("sending to criu swrk, pid", self.pid)(e);
        let bytes = request.write_to_bytes().map_err(|e| failed(io::Error::other(e)))?;
        let sent = self.socket.async_io(tokio::io::Interest::WRITABLE, |socket| {
            Ok(send(socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)?)
        });
        sent.await.map(|_| ()).map_err(failed)
    }

    /// Waits for what it says next.
    ///
    /// # Errors
    /// It died.
    pub async fn event(&mut self) -> Result<Event> {
        let failed = |e: io::Error| Error::io("hearing from criu swrk, pid", self.pid)(e);
        let mut buffer = vec![0; MESSAGE_LIMIT];
        let received = self.socket.async_io(tokio::io::Interest::READABLE, |socket| {
            Ok(recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?)
        });
        let length = received.await.map_err(failed)?;
        if length == 0 {
            return Err(Error::other(format!("criu swrk (pid {}) died", self.pid)));
        }
        Event::decode(&buffer[..length]).map_err(failed)
    }

    /// Hears it out: answers every notification with `answer` until the final response, at most for `patience`.
    ///
    /// # Errors
    /// It died, or says nothing.
    pub async fn finish(&mut self, answer: bool, patience: Duration) -> Result<bool> {
        let pid = self.pid;
        let work = async {
            loop {
                match self.event().await? {
                    Event::Notify(_) => self.answer(answer).await?,
                    Event::Final { success, .. } => return Ok(success),
                }
            }
        };
        tokio::time::timeout(patience, work).await.unwrap_or_else(|_| {
            Err(Error::other(format!(
                "criu swrk (pid {pid}) gave no final response in {} s",
                patience.as_secs()
            )))
        })
    }

    /// Waits until it has ended by itself, at most for `patience`. Says whether it has.
    pub async fn wait_exit(&mut self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.exited.wait_for(|gone| *gone)).await.is_ok()
    }
}

/// What a process tree makes necessary beyond the usual.
#[derive(Debug, Default, Clone, Copy)]
pub struct Needs {
    /// Memory follows (post-copy).
    pub post_copy: bool,
    /// It has unix sockets; their other ends may be outside the tree (e.g. /dev/log).
    pub unix_sockets: bool,
    /// It holds file locks.
    pub file_locks: bool,
}

/// Post-copy at the source: has CRIU serve pages on a socket that it has inherited as descriptor `socket`, once `post-dump`
/// has been answered. CRIU takes that over RPC only when memory is *not* lazy (`ps.fd`), and would listen on a port; by a
/// configuration file it takes it always (seen with 4.2.1).
///
/// # Errors
/// Of the file system.
pub fn write_pages_config(images: &Path, socket: i32) -> Result<()> {
    let path = images.join(PAGES_CONFIG);
    fs::write(&path, format!("ps-socket {socket}\n")).map_err(Error::io("writing", path.display()))
}

const PAGES_CONFIG: &str = "pages.conf";

/// Post-copy at the destination: arguments of the process that fetches pages through descriptor `socket`. It writes a zero
/// byte to stdout when it listens.
pub fn lazy_pages(images: &Path, socket: i32) -> Vec<String> {
    let images = images.display().to_string();
    let socket = socket.to_string();
    let words = ["lazy-pages", "-D", &images, "--page-server", "--ps-socket", &socket, "--status-fd", "1"];
    words.into_iter().chain(["-v3", "-o", LAZY_LOG]).map(str::to_owned).collect()
}

fn options(images: &Path, log: &str) -> rpc::Criu_opts {
    let mut opts = rpc::Criu_opts::new();
    opts.set_images_dir_fd(-1);
    opts.set_images_dir(images.display().to_string());
    opts.set_log_file(log.into());
    // info: the log of a failure has to be enough to understand it
    opts.set_log_level(3);
    opts.set_tcp_established(true);
    // the fence of our own is the lock
    opts.set_network_lock(rpc::Criu_network_lock_method::SKIP);
    opts.set_notify_scripts(true);
    opts.set_manage_cgroups_mode(rpc::Criu_cg_mode::IGNORE);
    opts
}

fn dump_options(pid: u32, images: &Path, needs: Needs) -> rpc::Criu_opts {
    let mut opts = options(images, DUMP_LOG);
    opts.set_pid(pid.cast_signed());
    if needs.unix_sockets {
        opts.set_ext_unix_sk(true);
    }
    if needs.file_locks {
        opts.set_file_locks(true);
    }
    if needs.post_copy {
        opts.set_lazy_pages(true);
        opts.set_config_file(images.join(PAGES_CONFIG).display().to_string());
        // whatever becomes of the page server: the tasks stay as they are
        opts.set_leave_stopped(true);
    }
    opts
}

fn restore_options(images: &Path, post_copy: bool) -> rpc::Criu_opts {
    let mut opts = options(images, RESTORE_LOG);
    opts.set_lazy_pages(post_copy);
    opts.set_leave_stopped(true);
    // both only matter for images that hold such things
    opts.set_ext_unix_sk(true);
    opts.set_file_locks(true);
    opts
}

/// The first relevant line of CRIU's log, without time stamp, pid and source file.
pub fn reason_in(log: &str) -> Option<String> {
    log.lines().find_map(|line| {
        let (_, rest) = line.split_once("Error (")?;
        let (_, message) = rest.split_once("): ")?;
        let harmless = [
            "rlimit: Can't setup RLIMIT_NOFILE",
            // what we ourselves caused by our answer, or by closing the socket
            "RPC client reported script error",
            "Can't read request",
        ];
        (!harmless.iter().any(|h| message.starts_with(h))).then(|| message.trim().to_owned())
    })
}

/// Why CRIU failed, by its log in `images` (else by what it wrote to stderr).
pub fn reason(images: &Path, log: &str) -> String {
    let path = images.join(log);
    let told = fs::read(&path).ok().and_then(|bytes| reason_in(&String::from_utf8_lossy(&bytes)));
    let said = || {
        let bytes = fs::read(images.join(STDERR)).ok()?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        reason_in(&text).or_else(|| text.lines().find(|l| !l.trim().is_empty()).map(str::to_owned))
    };
    told.or_else(said).unwrap_or_else(|| "it left no reason in its log".into())
}

/// Keeps CRIU's log of a failed migration as `<logs>/<migration>.<log>`, and of all such the newest `keep`.
///
/// # Errors
/// Of the file system.
pub fn keep_log(images: &Path, log: &str, logs: &Path, migration: &str, keep: usize) -> Result<()> {
    let from = images.join(log);
    if !from.exists() {
        return Ok(());
    }
    crate::record::make_private_dir(logs)?;
    let to = logs.join(format!("{migration}.{log}"));
    fs::copy(&from, &to).map_err(Error::io("copying", from.display()))?;
    let mut kept: Vec<(std::time::SystemTime, PathBuf)> = fs::read_dir(logs)
        .map_err(Error::io("listing", logs.display()))?
        .flatten()
        .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
        .collect();
    kept.sort();
    let surplus = kept.len().saturating_sub(keep);
    for (_, path) in kept.into_iter().take(surplus) {
        fs::remove_file(&path).map_err(Error::io("removing", path.display()))?;
    }
    Ok(())
}

/// What is known about CRIU on this server; found once, at the start.
#[derive(Debug, Clone)]
pub struct Probe {
    /// E.g. "4.2.1"; empty when the program is missing.
    pub version: String,
    /// Why it cannot be used, as (code, message, remedy).
    pub problem: Option<(&'static str, String, String)>,
    /// The kernel tells CRIU which pages are written to.
    pub soft_dirty: bool,
    /// The kernel hands CRIU page faults, also those of children.
    pub userfault: bool,
}

impl Probe {
    fn unusable(version: String, problem: (&'static str, String, String)) -> Self {
        Self { version, problem: Some(problem), soft_dirty: false, userfault: false }
    }
}

/// Oldest CRIU with everything used here (`leave_stopped` and `network_lock: skip` over RPC).
const OLDEST: [u32; 2] = [4, 0];
/// CRIU before 4.2 cannot dump TCP connections on kernels from 6.16.
const OLDEST_ON_616: [u32; 2] = [4, 2];

async fn run(program: &Path, args: Vec<&'static str>) -> io::Result<std::process::Output> {
    let command = tokio::process::Command::new(program)
        .args(&args)
        .current_dir("/")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(Duration::from_secs(20), command).await {
        Ok(output) => output,
        Err(_) => Err(io::Error::other(format!("`criu {}` did not end in 20 s", args.join(" ")))),
    }
}

/// Finds `program`'s version, whether `criu check` passes, and what of the kernel the memory modes need.
pub async fn probe(program: &Path) -> Probe {
    let remedy = "install CRIU 4.2 or later and name it as `criu` in the configuration".to_owned();
    let run = |args: Vec<&'static str>| run(program, args);
    let version = match run(vec!["--version"]).await {
        Ok(output) => parse_version(&String::from_utf8_lossy(&output.stdout)),
        Err(e) => {
            let message = format!("{} cannot be run: {e}", program.display());
            return Probe::unusable(String::new(), ("criu-missing", message, remedy));
        }
    };
    let Some(version) = version else {
        let message = format!("{} tells no version: it is not CRIU", program.display());
        return Probe::unusable(String::new(), ("criu-missing", message, remedy));
    };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let needed = oldest(&kernel);
    if numbers(&version) < needed {
        let [major, minor] = needed;
        let message = format!(
            "{} is CRIU {version}; kernel {} needs {major}.{minor} or later",
            program.display(),
            kernel.trim()
        );
        return Probe::unusable(version, ("criu-too-old", message, remedy));
    }
    let problem = match run(vec!["check"]).await {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let why = reason_in(&said).or_else(|| said.lines().last().map(str::to_owned)).unwrap_or_default();
            Some(("criu-check", format!("`{} check` fails: {why}", program.display()), remedy))
        }
        Err(e) => Some(("criu-check", format!("`{} check` cannot be run: {e}", program.display()), remedy)),
    };
    let has = |feature: &'static str| async move {
        run(vec!["check", "--feature", feature]).await.is_ok_and(|output| output.status.success())
    };
    let (soft_dirty, userfault) = (has("mem_dirty_track").await, has("uffd-noncoop").await);
    Probe { version, problem, soft_dirty, userfault }
}

/// Of "Version: 4.2.1\n...".
fn parse_version(text: &str) -> Option<String> {
    let version = text.lines().find_map(|l| l.strip_prefix("Version:"))?.trim();
    version.starts_with(|c: char| c.is_ascii_digit()).then(|| version.to_owned())
}

/// Major and minor number.
fn numbers(version: &str) -> [u32; 2] {
    let mut parts = version.split(['.', '-']).map(|p| p.parse().unwrap_or(0));
    [parts.next().unwrap_or(0), parts.next().unwrap_or(0)]
}

fn oldest(kernel: &str) -> [u32; 2] {
    if numbers(kernel) >= [6, 16] { OLDEST_ON_616 } else { OLDEST }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_first_relevant_line() {
        let log = "(00.000001) Version: 4.2.1 (gitid 0)\n\
                   (00.000091) Error (criu/rlimit.c:20): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
                   (00.010000) Warn  (criu/kerndat.c:1): something\n\
                   (00.020000)  10001: Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option.\n\
                   (00.030000) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        assert_eq!(
            reason_in(log).unwrap(),
            "inet: Connected TCP socket, consider using --tcp-established option."
        );
    }

    #[test]
    fn what_we_answered_ourselves_is_no_reason() {
        let log = "(00.1) Error (criu/cr-service.c:225): RPC client reported script error\n";
        assert_eq!(reason_in(log), None);
        assert_eq!(reason_in("(00.1) all well\n"), None);
    }

    #[test]
    fn versions() {
        assert_eq!(parse_version("Version: 4.2.1\nGitID: x\n").as_deref(), Some("4.2.1"));
        assert_eq!(parse_version("usage: ..."), None);
        assert!(numbers("4.1.1") < oldest("6.18.44-fc"));
        assert!(numbers("4.2.1") >= oldest("6.18.44-fc"));
        assert!(numbers("4.1") >= oldest("6.1.0-13-amd64"));
        assert!(numbers("3.17.1") < oldest("6.1.0-13-amd64"));
    }

    #[test]
    fn only_the_newest_logs_are_kept() {
        let (images, logs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for n in 0..5 {
            fs::write(images.path().join(DUMP_LOG), format!("{n}")).unwrap();
            keep_log(images.path(), DUMP_LOG, logs.path(), &format!("m{n}"), 3).unwrap();
            // file times tell the order
            let stamp = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(n);
            let file =
                fs::File::options().write(true).open(logs.path().join(format!("m{n}.dump.log"))).unwrap();
            file.set_modified(stamp).unwrap();
        }
        let mut names: Vec<_> = fs::read_dir(logs.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["m2.dump.log", "m3.dump.log", "m4.dump.log"]);
        keep_log(images.path(), RESTORE_LOG, logs.path(), "none", 3).unwrap();
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let probe = probe(Path::new("/nonexistent/criu")).await;
        let (code, message, _) = probe.problem.unwrap();
        assert_eq!(code, "criu-missing");
        assert!(message.contains("/nonexistent/criu"), "{message}");
    }
}
