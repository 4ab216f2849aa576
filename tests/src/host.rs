//! A host of the lab, seen from the lab: starting programs in it, running code in its network, reading its files.
//!
//! The other half is [`crate::init`], the host's pid 1. A [`Host`] is a handle; the host itself ends with the
//! [`Lab`](crate::Lab) that made it. Ends of processes arrive as events from pid 1: nothing here polls.

use std::{
    collections::HashMap,
    ffi::CString,
    fmt, fs,
    io::{BufRead as _, BufReader, IoSlice, Read as _, Write as _},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail, ensure};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, fcntl},
    sched::{CloneFlags, clone, setns},
    sys::{
        signal::{Signal, kill},
        socket::{
            AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, shutdown, socketpair,
        },
        wait::waitpid,
    },
    unistd::Pid,
};

use crate::{
    init::CONTROL_FD,
    proto::{Io, MAX_MESSAGE, Numbered, Reply, Request, Setup, Spawn},
};

/// How long pid 1 may take for one request.
const ANSWER: Duration = Duration::from_secs(20);

/// How long a command may take that is run to its end.
const COMMAND: Duration = Duration::from_secs(60);

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code, if it ended by itself.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

impl Ended {
    /// Exit code 0.
    #[must_use]
    pub fn success(self) -> bool {
        self.code == Some(0)
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exit code {code}"),
            (None, Some(signal)) => match Signal::try_from(signal) {
                Ok(signal) => write!(f, "{signal}"),
                Err(_) => write!(f, "signal {signal}"),
            },
            (None, None) => f.write_str("ended with its host"),
        }
    }
}

/// A program to start in a host.
#[derive(Debug, Clone)]
pub struct Program(Spawn);

impl Program {
    /// `path` as found in PATH; stdin, stdout and stderr are `/dev/null`, the working directory `/`.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self(Spawn {
            argv: vec![path.as_ref().to_string_lossy().into_owned()],
            env: vec![("PATH".into(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into())],
            cwd: "/".into(),
            ..Spawn::default()
        })
    }

    /// The program and its arguments.
    ///
    /// # Panics
    /// Without a first element.
    pub fn argv<S: AsRef<str>>(argv: impl IntoIterator<Item = S>) -> Self {
        let mut argv = argv.into_iter();
        let program = argv.next().map(|p| p.as_ref().to_owned());
        assert!(program.is_some(), "a program needs a name");
        Self::new(program.unwrap_or_default()).args(argv)
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<str>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.0.argv.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Adds a variable to the environment, which else holds PATH only.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.0.env.push((name.into(), value.into()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn cwd(mut self, dir: impl Into<PathBuf>) -> Self {
        self.0.cwd = dir.into();
        self
    }

    /// Where stdin, stdout and stderr go.
    #[must_use]
    pub fn stdio(mut self, stdin: Io, stdout: Io, stderr: Io) -> Self {
        self.0.stdio = [stdin, stdout, stderr];
        self
    }

    /// The cgroup (v2 directory) to start in; it has to exist.
    #[must_use]
    pub fn cgroup(mut self, dir: impl Into<PathBuf>) -> Self {
        self.0.cgroup = Some(dir.into());
        self
    }

    /// Starts it with the first free pid from `pid` on, so that it is free on another host too.
    #[must_use]
    pub fn min_pid(mut self, pid: i32) -> Self {
        self.0.min_pid = Some(pid);
        self
    }

    fn name(&self) -> &str {
        self.0.argv.first().map_or("", |p| p.rsplit('/').next().unwrap_or(p))
    }
}

/// What a program that ran to its end left.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub ended: Ended,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

#[derive(Debug, Default)]
struct State {
    answers: HashMap<u64, Reply>,
    /// Started processes (`None`: runs) and any other child of pid 1 that ended.
    processes: HashMap<i32, Option<Ended>>,
    next: u64,
    gone: bool,
}

#[derive(Debug)]
struct Inner {
    name: String,
    pid: Pid,
    netns: OwnedFd,
    cgroup: PathBuf,
    control: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
    reader: Mutex<Option<JoinHandle<()>>>,
}

/// A handle to a host.
#[derive(Debug, Clone)]
pub struct Host(Arc<Inner>);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    /// Starts pid 1 (`program host NAME`) in new namespaces and has it set up.
    pub(crate) fn start(name: &str, program: &Path, setup: Setup) -> anyhow::Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let pid = clone_init(name, program, &theirs).with_context(|| format!("starting host {name}"))?;
        drop(theirs);
        let netns = fs::File::open(format!("/proc/{pid}/ns/net")).context("its network namespace")?.into();
        let cgroup = setup.cgroup.clone();
        let inner = Arc::new(Inner {
            name: name.into(),
            pid,
            netns,
            cgroup,
            control: ours,
            state: Mutex::default(),
            changed: Condvar::new(),
            reader: Mutex::default(),
        });
        let reads = inner.control.try_clone()?;
        let reader = Arc::clone(&inner);
        let handle =
            std::thread::Builder::new().name(format!("host {name}")).spawn(move || reader.read(&reads))?;
        *locked(&inner.reader) = Some(handle);
        let host = Self(inner);
        let ready = host.request(Request::Setup(setup), &[]).and_then(|_| host.ip("link set lo up"));
        if let Err(e) = ready {
            host.end();
            return Err(e.context(format!("setting up host {name}")));
        }
        Ok(host)
    }

    /// Ends the host and everything in it; returns when it is gone. The second call does nothing.
    pub(crate) fn end(&self) {
        let Some(reader) = locked(&self.0.reader).take() else { return };
        // SIGKILL to pid 1 of a pid namespace ends all of it, frozen and stopped processes too
        let _ = kill(self.0.pid, Signal::SIGKILL);
        let _ = waitpid(self.0.pid, None);
        let _ = shutdown(self.0.control.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        let _ = reader.join();
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its pid 1, as the lab sees it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.0.pid.as_raw()
    }

    /// Its cgroup (v2); programs start in it unless told otherwise.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.0.cgroup
    }

    /// Where the lab sees `path` of the host's own file system.
    #[must_use]
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        Path::new(&format!("/proc/{}/root", self.0.pid)).join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Writes a file in the host, with its directories.
    ///
    /// # Errors
    /// Names the file.
    pub fn write(&self, path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> anyhow::Result<()> {
        let seen = self.path(path.as_ref());
        let write = || {
            if let Some(dir) = seen.parent() {
                fs::create_dir_all(dir)?;
            }
            fs::write(&seen, content)
        };
        write().with_context(|| format!("writing {} in {}", path.as_ref().display(), self.0.name))
    }

    /// Reads a file of the host.
    ///
    /// # Errors
    /// Names the file.
    pub fn read(&self, path: impl AsRef<Path>) -> anyhow::Result<String> {
        fs::read_to_string(self.path(path.as_ref()))
            .with_context(|| format!("reading {} in {}", path.as_ref().display(), self.0.name))
    }

    /// Starts a program.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&self, program: &Program) -> anyhow::Result<Process> {
        let mut ours = [None, None, None];
        let mut theirs: Vec<OwnedFd> = Vec::new();
        for (i, io) in program.0.stdio.iter().enumerate() {
            if *io == Io::Pipe {
                let (read, write) = std::io::pipe()?;
                let (read, write) = (OwnedFd::from(read), OwnedFd::from(write));
                let (mine, passed) = if i == 0 { (write, read) } else { (read, write) };
                ours[i] = Some(fs::File::from(mine));
                theirs.push(passed);
            }
        }
        let fds: Vec<RawFd> = theirs.iter().map(|f| f.as_raw_fd()).collect();
        let pid = self.request(Request::Spawn(program.0.clone()), &fds)?;
        let [stdin, stdout, stderr] = ours;
        Ok(Process { host: self.clone(), pid, name: program.name().into(), stdin, stdout, stderr })
    }

    /// Runs a command in the host to its end and gives what it wrote, whatever its exit code.
    ///
    /// # Errors
    /// If it cannot be started, or has not ended after a minute (it is killed then).
    pub fn output(&self, program: Program) -> anyhow::Result<Output> {
        let stdin = program.0.stdio[0].clone();
        let mut process = self.spawn(&program.stdio(stdin, Io::Pipe, Io::Pipe))?;
        drop(process.stdin.take());
        let collect = |file: Option<fs::File>| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                file.map_or(Ok(0), |mut f| f.read_to_end(&mut bytes)).map(|_| bytes)
            })
        };
        let [stdout, stderr] = [process.stdout.take(), process.stderr.take()].map(collect);
        let text = |t: JoinHandle<std::io::Result<Vec<u8>>>| -> anyhow::Result<String> {
            let bytes = t.join().map_err(|_| anyhow!("a reader of {} died", process.name))??;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let ended = process.wait_timeout(COMMAND);
        if ended.is_err() {
            let _ = process.signal(Signal::SIGKILL);
        }
        let (stdout, stderr) = (text(stdout)?, text(stderr)?);
        let ended = ended.with_context(|| format!("it said: {stderr}{stdout}"))?;
        Ok(Output { ended, stdout, stderr })
    }

    /// Runs a command in the host; gives what it wrote to stdout.
    ///
    /// # Errors
    /// With what it wrote to stderr, unless its exit code is 0.
    pub fn run<S: AsRef<str>>(&self, argv: impl IntoIterator<Item = S>) -> anyhow::Result<String> {
        let program = Program::argv(argv);
        let words = program.0.argv.join(" ");
        let output = self.output(program)?;
        ensure!(
            output.ended.success(),
            "{}: `{words}`: {}: {}",
            self.0.name,
            output.ended,
            [output.stderr.trim(), output.stdout.trim()].join(" ").trim()
        );
        Ok(output.stdout)
    }

    /// Runs `ip` commands, one a line, in the host's network.
    ///
    /// # Errors
    /// With what `ip` says.
    pub fn ip(&self, lines: &str) -> anyhow::Result<()> {
        let (program, name) = (lines.to_owned(), &self.0.name);
        let run = move || -> anyhow::Result<()> {
            let mut child = Command::new("ip")
                .args(["-batch", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .context("starting `ip` (Debian: iproute2)")?;
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(program.as_bytes())?;
            }
            let output = child.wait_with_output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "{}", said.trim());
            Ok(())
        };
        self.enter(run)?.with_context(|| format!("in {name}: ip {}", lines.trim().replace('\n', "; ip ")))
    }

    /// Runs code on a thread of its own that stands in the host's network namespace (and in the lab's own file system
    /// and pid namespace). Sockets it makes stay in that network.
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    ///
    /// # Panics
    /// Passes a panic of the code on.
    pub fn enter<T: Send>(&self, code: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(self.0.netns.as_fd(), CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("entering the network of {}", self.0.name))?;
                Ok(code())
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Sends a signal to a process of the host, by the pid it has there.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn signal(&self, pid: i32, signal: Signal) -> anyhow::Result<()> {
        self.request(Request::Signal { pid, signal: signal as i32 }, &[]).map(drop)
    }

    /// The processes of the host: pid there and command line. Threads of the kernel and pid 1 are left out.
    ///
    /// # Errors
    /// If the host's /proc cannot be read.
    pub fn processes(&self) -> anyhow::Result<Vec<(i32, String)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.path("/proc")).with_context(|| format!("/proc of {}", self.0.name))? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            // it may end in between
            let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
            if pid != 1 {
                let line = String::from_utf8_lossy(&line);
                found.push((pid, line.trim_end_matches('\0').replace('\0', " ")));
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Waits for the end of a process that pid 1 is or has become the parent of (an orphan), `limit` at most. The end of
    /// a pid that was used before counts if no program was started under it since.
    ///
    /// # Errors
    /// If it still runs then, or the host ended.
    pub fn wait_for_end(&self, pid: i32, limit: Duration) -> anyhow::Result<Ended> {
        self.wait_until(pid, &format!("pid {pid}"), Some(limit))
    }

    fn wait_until(&self, pid: i32, name: &str, limit: Option<Duration>) -> anyhow::Result<Ended> {
        let deadline = limit.map(|l| Instant::now() + l);
        let mut state = locked(&self.0.state);
        loop {
            if let Some(Some(ended)) = state.processes.get(&pid) {
                return Ok(*ended);
            }
            ensure!(!state.gone, "host {} ended while {} ran in it", self.0.name, name);
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            ensure!(left != Some(Duration::ZERO), "{} on {} still runs", name, self.0.name);
            let changed = &self.0.changed;
            state = match left {
                Some(left) => changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
                None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn request(&self, request: Request, fds: &[RawFd]) -> anyhow::Result<i32> {
        let number = {
            let mut state = locked(&self.0.state);
            state.next += 1;
            state.next
        };
        let bytes = serde_json::to_vec(&Numbered { number, body: request })?;
        ensure!(bytes.len() <= MAX_MESSAGE, "a request of {} bytes is too long", bytes.len());
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(
            self.0.control.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .with_context(|| format!("host {} is gone", self.0.name))?;
        let state = locked(&self.0.state);
        let (mut state, waited) = self
            .0
            .changed
            .wait_timeout_while(state, ANSWER, |s| !s.gone && !s.answers.contains_key(&number))
            .unwrap_or_else(PoisonError::into_inner);
        match state.answers.remove(&number) {
            Some(Reply::Started { pid }) => Ok(pid),
            Some(Reply::Done) => Ok(0),
            Some(Reply::Failed { error }) => bail!("{}: {error}", self.0.name),
            _ if waited.timed_out() => bail!("host {} does not answer", self.0.name),
            _ => bail!("host {} is gone", self.0.name),
        }
    }
}

impl Inner {
    /// Takes in what pid 1 says, until it is gone.
    fn read(&self, control: &OwnedFd) {
        let mut buffer = vec![0_u8; MAX_MESSAGE];
        loop {
            let message = match recv(control.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                Ok(length) if length > 0 => serde_json::from_slice::<Numbered<Reply>>(&buffer[..length]).ok(),
                _ => None,
            };
            let mut state = locked(&self.state);
            match message {
                None => state.gone = true,
                Some(Numbered { body: Reply::Exited { pid, code, signal }, .. }) => {
                    state.processes.insert(pid, Some(Ended { code, signal }));
                }
                Some(Numbered { number, body }) => {
                    if let Reply::Started { pid } = body {
                        // a reused pid is another process; its end, if any, is told after this
                        state.processes.insert(pid, None);
                    }
                    state.answers.insert(number, body);
                }
            }
            self.changed.notify_all();
            if state.gone {
                return;
            }
        }
    }
}

/// Executes `program host NAME` as pid 1 of new namespaces, with `control` as its [`CONTROL_FD`].
fn clone_init(name: &str, program: &Path, control: &OwnedFd) -> anyhow::Result<Pid> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = CString::new(program.as_os_str().as_bytes())?;
    let words = [path.clone(), c"host".to_owned(), CString::new(name)?];
    let args = [words[0].as_ptr(), words[1].as_ptr(), words[2].as_ptr(), std::ptr::null()];
    let env = [std::ptr::null()];
    let fd = control.as_raw_fd();
    let run = || -> isize {
        // between fork and exec of a threaded process: system calls only
        let placed = if fd == CONTROL_FD {
            fcntl(control, FcntlArg::F_SETFD(FdFlag::empty())).map(drop)
        } else {
            // SAFETY: copies a descriptor within this process, which executes another program next.
            Errno::result(unsafe { libc::dup2(fd, CONTROL_FD) }).map(drop)
        };
        if placed.is_ok() && nix::unistd::setsid().is_ok() {
            // SAFETY: both arrays end with a null pointer; the strings live in the enclosing function.
            unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
        }
        127
    };
    let mut stack = vec![0_u8; 256 * 1024];
    let flags = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID;
    // SAFETY: the child has its own copy of the memory, stack included, and makes only system calls (no allocation: another
    // thread may hold the heap's lock) until it executes.
    unsafe { clone(Box::new(run), &mut stack, flags, Some(libc::SIGCHLD)) }
        .context("making namespaces (root is needed)")
}

/// A process started in a host. Dropping it leaves the process alone.
#[derive(Debug)]
pub struct Process {
    host: Host,
    pid: i32,
    name: String,
    /// Its standard input, if it is a pipe.
    pub stdin: Option<fs::File>,
    /// Its standard output, if it is a pipe.
    pub stdout: Option<fs::File>,
    /// Its standard error, if it is a pipe.
    pub stderr: Option<fs::File>,
}

impl Process {
    /// Its pid in its host.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If the host ended.
    pub fn wait(&self) -> anyhow::Result<Ended> {
        self.host.wait_until(self.pid, &self.name, None)
    }

    /// Waits for its end, `limit` at most.
    ///
    /// # Errors
    /// If it still runs then, or the host ended.
    pub fn wait_timeout(&self, limit: Duration) -> anyhow::Result<Ended> {
        self.host.wait_until(self.pid, &self.name, Some(limit))
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        locked(&self.host.0.state).processes.get(&self.pid).copied().flatten()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.host.signal(self.pid, signal)
    }

    /// Ends it: SIGTERM, and SIGKILL if it does not mind that within `limit`.
    ///
    /// # Errors
    /// If the host ended.
    pub fn stop(&self, limit: Duration) -> anyhow::Result<Ended> {
        if let Some(ended) = self.ended() {
            return Ok(ended);
        }
        self.signal(Signal::SIGTERM)?;
        if let Ok(ended) = self.wait_timeout(limit) {
            return Ok(ended);
        }
        self.signal(Signal::SIGKILL)?;
        self.wait_timeout(ANSWER)
    }
}

#[derive(Debug, Default)]
struct Text {
    lines: Vec<String>,
    closed: bool,
}

/// What a process writes to a pipe, line by line, kept for waiting and for reports.
#[derive(Debug, Clone, Default)]
pub struct Lines(Arc<(Mutex<Text>, Condvar)>);

impl Lines {
    /// Collects from `pipe` until its other end closes.
    #[must_use]
    pub fn collect(pipe: fs::File) -> Self {
        let lines = Self::default();
        let into = lines.clone();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(pipe);
            let mut bytes = Vec::new();
            loop {
                bytes.clear();
                let end = matches!(reader.read_until(b'\n', &mut bytes), Ok(0) | Err(_));
                let mut text = locked(&into.0.0);
                if end {
                    text.closed = true;
                } else {
                    text.lines.push(String::from_utf8_lossy(&bytes).trim_end().to_owned());
                }
                into.0.1.notify_all();
                if end {
                    return;
                }
            }
        });
        lines
    }

    /// How many lines there are now.
    #[must_use]
    pub fn len(&self) -> usize {
        locked(&self.0.0).lines.len()
    }

    /// No line yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All lines so far.
    #[must_use]
    pub fn text(&self) -> String {
        locked(&self.0.0).lines.join("\n")
    }

    /// Waits until the pipe closes; all lines.
    #[must_use]
    pub fn finish(&self) -> String {
        let text = locked(&self.0.0);
        let text = self.0.1.wait_while(text, |t| !t.closed).unwrap_or_else(PoisonError::into_inner);
        text.lines.join("\n")
    }

    /// Waits for the first line from number `from` on that `wanted` accepts.
    ///
    /// # Errors
    /// If the pipe closes or `limit` passes first; with the last lines.
    pub fn wait_for(
        &self,
        from: usize,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> anyhow::Result<String> {
        let deadline = Instant::now() + limit;
        let mut seen = from;
        let mut text = locked(&self.0.0);
        loop {
            if let Some(found) = text.lines.iter().skip(seen).find(|l| wanted(l)) {
                return Ok(found.clone());
            }
            seen = text.lines.len().max(from);
            let left = deadline.saturating_duration_since(Instant::now());
            if text.closed || left.is_zero() {
                let why = if text.closed { "it closed its output" } else { "it took too long" };
                let first = text.lines.len().saturating_sub(20);
                bail!("{why}; its last lines:\n{}", text.lines[first..].join("\n"));
            }
            text = self.0.1.wait_timeout(text, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A daemon: a process whose stderr the lab keeps.
#[derive(Debug)]
pub struct Daemon {
    /// The process.
    pub process: Process,
    /// What it logged.
    pub log: Lines,
}

impl Host {
    /// Starts a program whose stderr the lab keeps as its log.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_daemon(&self, program: Program) -> anyhow::Result<Daemon> {
        let [stdin, stdout, _] = program.0.stdio.clone();
        let mut process = self.spawn(&program.stdio(stdin, stdout, Io::Pipe))?;
        let log = process.stderr.take().map(Lines::collect).unwrap_or_default();
        Ok(Daemon { process, log })
    }
}

impl Daemon {
    /// Waits until it logs a line with `word`.
    ///
    /// # Errors
    /// If it ends or `limit` passes first; with its last lines.
    pub fn wait_for(&self, word: &str, limit: Duration) -> anyhow::Result<()> {
        self.log
            .wait_for(0, limit, |l| l.contains(word))
            .map(drop)
            .with_context(|| format!("{} on {}: no `{word}`", self.process.name, self.process.host.name()))
    }
}
