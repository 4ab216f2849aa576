//! `cargo xtask vm`: the tests that depend on the kernel, on the kernels operators run.
//!
//! ```text
//! .tools/vm: QEMU, kernels, root (apt)   +   payload: programs and tests as built here
//!                      \                       /
//!            one guest per kernel (TCG, no network) --serial line--> log, results, exit status
//! ```
//!
//! What a guest writes to its disks does not last. Guests are emulated, about six times slower than the machine and
//! unsteady: nothing is measured in them.

mod kernel;
mod parts;
mod payload;

use std::{
    collections::VecDeque,
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

pub use kernel::{ALL, Series};
use parts::{Kernel, Qemu};

use crate::setup::{self, say};

/// A guest is ended after this.
const LIMIT: Duration = Duration::from_secs(30 * 60);
/// Memory of a guest, MiB.
const MEMORY: u32 = 3072;

/// What a guest told.
struct Outcome {
    kernel: String,
    passed: u32,
    failed: Vec<String>,
    /// None: it ended without.
    status: Option<i32>,
    took: Duration,
    log: PathBuf,
}

impl Outcome {
    fn good(&self) -> bool {
        self.status == Some(0) && self.failed.is_empty() && self.passed > 0
    }
}

/// Runs the tests whose names contain `filter` on each of `series`, `jobs` at a time.
pub fn run(series: &[Series], jobs: usize, filter: Option<&str>, target: &Path) -> anyhow::Result<ExitCode> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the kernel matrix is for x86_64; this machine is {}", std::env::consts::ARCH);
    }
    setup::run()?;
    let begun = Instant::now();
    let qemu = Qemu::ensure()?;
    let kernels = parts::kernels(series)?;
    let root = parts::root()?;
    say("payload", "programs and tests as they are built here");
    let payload = payload::make(target, filter)?;

    let queue: Mutex<VecDeque<&Kernel>> = Mutex::new(kernels.iter().collect());
    let outcomes = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, kernels.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(kernel) = next else { break };
                    let outcome = guest(&qemu, kernel, &root, &payload, target);
                    outcomes.lock().unwrap_or_else(PoisonError::into_inner).push(outcome);
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    let outcomes = outcomes.into_iter().collect::<anyhow::Result<Vec<Outcome>>>()?;
    let order = |o: &Outcome| kernels.iter().position(|k| k.release == o.kernel);
    let mut sorted = outcomes;
    sorted.sort_by_key(order);
    println!("{:<34} {:>7} {:>7} {:>8}  log", "kernel", "passed", "failed", "seconds");
    for o in &sorted {
        let failed = if o.status.is_none() { "died".to_owned() } else { o.failed.len().to_string() };
        println!(
            "{:<34} {:>7} {failed:>7} {:>8.0}  {}",
            o.kernel,
            o.passed,
            o.took.as_secs_f64(),
            o.log.display()
        );
        for name in &o.failed {
            println!("  {name}");
        }
    }
    eprintln!("vm: {} kernels in {:.0} s", sorted.len(), begun.elapsed().as_secs_f64());
    Ok(if sorted.iter().all(Outcome::good) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn guest(
    qemu: &Qemu,
    kernel: &Kernel,
    root: &Path,
    payload: &Path,
    target: &Path,
) -> anyhow::Result<Outcome> {
    let begun = Instant::now();
    let release = &kernel.release;
    let log = target.join(format!("vm/{release}.log"));
    let disk = |path: &Path, more: &str| format!("file={},format=raw,if=virtio,{more}", path.display());
    let mut command = qemu.command();
    command.args([
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
    ]);
    command.args(["-smp", "2", "-m", &MEMORY.to_string(), "-serial", "stdio"]);
    for firmware in qemu.firmware() {
        command.arg("-L").arg(firmware);
    }
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&kernel.initramfs);
    command.args(["-append", "console=ttyS0 quiet panic=-1 loglevel=4"]);
    command.args(["-drive", &disk(root, "snapshot=on")]);
    // the lab keeps its files beside its programs
    command.args(["-drive", &disk(payload, "snapshot=on")]);
    command.args(["-drive", &disk(&kernel.modules, "readonly=on")]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut child = command.spawn().context("starting QEMU")?;
    let lines = BufReader::new(child.stdout.take().context("QEMU has no stdout")?);
    let mut kept = File::create(&log).with_context(|| log.display().to_string())?;

    let (over, ended) = std::sync::mpsc::channel::<()>();
    let child = Mutex::new(child);
    let mut outcome = Outcome {
        kernel: release.clone(),
        passed: 0,
        failed: Vec::new(),
        status: None,
        took: Duration::ZERO,
        log,
    };
    let limited = &child;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // told by the sender going away
            if ended.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("vm: {release}: not done in {} min, ended", LIMIT.as_secs() / 60);
                let _ = limited.lock().unwrap_or_else(PoisonError::into_inner).kill();
            }
        });
        let read = follow(lines, &mut kept, &mut outcome, begun);
        drop(over);
        read
    })?;
    child.into_inner().unwrap_or_else(PoisonError::into_inner).wait().context("QEMU")?;
    outcome.took = begun.elapsed();
    Ok(outcome)
}

/// Keeps what the guest says, and understands it.
fn follow(
    mut lines: impl std::io::BufRead,
    log: &mut impl std::io::Write,
    outcome: &mut Outcome,
    begun: Instant,
) -> anyhow::Result<()> {
    let mut line = Vec::new();
    let mut running = String::new();
    loop {
        line.clear();
        if lines.read_until(b'\n', &mut line).context("reading the serial line")? == 0 {
            return Ok(());
        }
        log.write_all(&line).context("writing the log")?;
        let text = String::from_utf8_lossy(&line);
        let say = |what: &str| {
            eprintln!("vm: {:>5.0} s  {:<32} {what}", begun.elapsed().as_secs_f64(), outcome.kernel)
        };
        match read(text.trim()) {
            Said::Runs(what) => {
                say(what);
                running = what.to_owned();
            }
            Said::Passed => outcome.passed += 1,
            Said::Failed(test) => {
                say(&format!("FAILED {running}: {test}"));
                let failed = format!("{running}: {test}");
                outcome.failed.push(failed);
            }
            Said::Exit(status) => outcome.status = Some(status),
            Said::Other => {}
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Said<'a> {
    Runs(&'a str),
    Passed,
    Failed(&'a str),
    Exit(i32),
    Other,
}

fn read(line: &str) -> Said<'_> {
    if let Some(what) = line.strip_prefix("handover-vm runs ") {
        Said::Runs(what)
    } else if let Some(status) = line.strip_prefix("handover-vm exit ").and_then(|s| s.parse().ok()) {
        Said::Exit(status)
    } else if let Some((name, how)) = line.strip_prefix("test ").and_then(|l| l.split_once(" ... ")) {
        // the kernel may speak in between
        match how {
            _ if how.ends_with("FAILED") => Said::Failed(name),
            _ if how.ends_with("ok") => Said::Passed,
            _ => Said::Other,
        }
    } else {
        Said::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_is_understood() {
        assert_eq!(read("handover-vm runs handover-lab migration"), Said::Runs("handover-lab migration"));
        assert_eq!(read("test a::b ... ok"), Said::Passed);
        assert_eq!(read("test a::b ... FAILED"), Said::Failed("a::b"));
        assert_eq!(read("test a::b ... ignored, slow"), Said::Other);
        assert_eq!(read("test result: ok. 5 passed; 0 failed"), Said::Other);
        assert_eq!(read("handover-vm exit 1"), Said::Exit(1));
        assert_eq!(read("[    1.0] random: crng init done"), Said::Other);
    }

    #[test]
    fn a_guest_that_dies_or_ran_nothing_is_no_success() {
        let said = |lines: &str| {
            let mut o = Outcome {
                kernel: "k".into(),
                passed: 0,
                failed: Vec::new(),
                status: None,
                took: Duration::ZERO,
                log: PathBuf::new(),
            };
            follow(lines.as_bytes(), &mut Vec::new(), &mut o, Instant::now()).unwrap();
            o
        };
        assert!(said("handover-vm runs x\ntest a ... ok\nhandover-vm exit 0\n").good());
        assert!(!said("handover-vm runs x\ntest a ... ok\n").good());
        assert!(!said("handover-vm exit 0\n").good());
        let failed = said("handover-vm runs x\ntest a ... FAILED\nhandover-vm exit 1\n");
        assert!(!failed.good() && failed.failed == ["x: a"]);
    }
}
