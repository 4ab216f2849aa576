//! `redis-writer`: writes to a redis on one never-reopened connection, checks every acknowledgement, and at the end reads
//! everything back. A counter shows writes done twice.

use std::{
    io::{BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use handover_lab::apps::{
    Account,
    resp::{Reply, reply, request},
    watch_over,
};

/// Writes keys until it is told `stop` by SIGUSR1, then reads all of them back. A line on stdin asks for a report.
#[derive(Parser)]
struct Args {
    /// The redis server.
    server: SocketAddr,
    /// Microseconds between two writes.
    #[arg(long, default_value_t = 500)]
    pause_us: u64,
}

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_: libc::c_int) {
    STOP.store(true, Ordering::Relaxed);
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    // SAFETY: the handler only stores to an atomic.
    unsafe {
        use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
        let action = SigAction::new(SigHandler::Handler(stop), SaFlags::SA_RESTART, SigSet::empty());
        sigaction(Signal::SIGUSR1, &action).context("SIGUSR1")?;
    }
    let unharmed = watch_over(move |account| {
        let mut redis = Redis::connect(args.server)?;
        let written = redis.write(account, Duration::from_micros(args.pause_us))?;
        redis.read_back(account, written)?;
        account.update(|r| r.finished = true);
        Ok(())
    })?;
    Ok(if unharmed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Redis {
    out: TcpStream,
    input: BufReader<TcpStream>,
}

fn value(n: u64) -> String {
    format!("value-{n}-{:016x}", handover_lab::apps::content::next(n + 1))
}

impl Redis {
    fn connect(server: SocketAddr) -> anyhow::Result<Self> {
        let out = TcpStream::connect_timeout(&server, Duration::from_secs(5))
            .with_context(|| format!("connecting to {server}"))?;
        out.set_nodelay(true).context("TCP_NODELAY")?;
        let input = BufReader::new(out.try_clone().context("connection")?);
        Ok(Self { out, input })
    }

    /// Writes until stopped; returns how many writes were acknowledged.
    fn write(&mut self, account: &Account, pause: Duration) -> anyhow::Result<u64> {
        let mut n = 0;
        while !STOP.load(Ordering::Relaxed) {
            let value = value(n);
            let mut both = Vec::new();
            request(&mut both, &["SET", &format!("key:{n}"), &value]).context("request")?;
            request(&mut both, &["INCR", "writes"]).context("request")?;
            self.out.write_all(&both).with_context(|| format!("write {n}"))?;
            let set = reply(&mut self.input).with_context(|| format!("acknowledgement of write {n}"))?;
            let count = reply(&mut self.input).with_context(|| format!("count of write {n}"))?;
            account.arrived(Instant::now());
            n += 1;
            ensure!(set == Reply::Simple("OK".into()), "write {n} answered {set:?}");
            let Reply::Integer(count) = count else { bail!("count of write {n} answered {count:?}") };
            let done = u64::try_from(count).context("count")?;
            let size = value.len() as u64;
            account.update(|r| {
                r.operations = n;
                r.bytes += size;
                r.bytes_duplicated = done.saturating_sub(n) * size;
                r.bytes_lost = n.saturating_sub(done) * size;
            });
            // a rate, not a wait for anything: a writer at full speed would only grow the database
            thread::sleep(pause);
        }
        Ok(n)
    }

    /// Reads every acknowledged write back.
    fn read_back(&mut self, account: &Account, written: u64) -> anyhow::Result<()> {
        for n in 0..written {
            let mut get = Vec::new();
            request(&mut get, &["GET", &format!("key:{n}")]).context("request")?;
            self.out.write_all(&get).with_context(|| format!("reading key {n} back"))?;
            let found = reply(&mut self.input).with_context(|| format!("reading key {n} back"))?;
            account.arrived(Instant::now());
            let wanted = value(n);
            if found != Reply::Bulk(Some(wanted.clone().into_bytes())) {
                account.update(|r| r.bytes_lost += wanted.len() as u64);
                account.fail(&anyhow::anyhow!("key:{n} was acknowledged as {wanted} and is {found:?}"));
            }
        }
        Ok(())
    }
}
