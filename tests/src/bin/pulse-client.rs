//! `pulse-client`: sends numbered datagrams and pings without a pause; see `handover_lab::apps::pulse`.

use std::{
    net::SocketAddr,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use clap::Parser;
use handover_lab::apps::{
    pulse::{self, Rate},
    watch_over,
};

/// Sends until it is told `stop` by SIGUSR1, then compares accounts. A line on stdin asks for a report.
#[derive(Parser)]
struct Args {
    /// The pulse server.
    server: SocketAddr,
    /// Datagrams a second.
    #[arg(long, default_value_t = 50_000)]
    datagrams: u32,
    /// Microseconds between two pings.
    #[arg(long, default_value_t = 1000)]
    ping_us: u64,
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
    let rate = Rate { datagrams: args.datagrams, ping: Duration::from_micros(args.ping_us) };
    let unharmed = watch_over(move |account| pulse::send(args.server, rate, &STOP, account))?;
    Ok(if unharmed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
