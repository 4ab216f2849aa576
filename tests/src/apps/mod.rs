//! The lab's own service and the clients that watch over a service through a migration.
//!
//! Each client holds one TCP connection to *v*, checks everything that comes back and says what it found as one JSON object
//! a line on stdout ([`Report`]): one for every line it reads on stdin (the longest gap starts anew then), and a last one
//! when stdin ends, a SIGTERM comes or its work is done. The line `more N` is answered once N more bytes have come.

pub mod content;
pub mod film;
pub mod pulse;
pub mod resp;

use std::{
    io::{self, BufRead as _, Write as _},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};

/// What a client has seen so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Payload bytes that came and were right.
    pub bytes: u64,
    /// Bytes that never came, or came wrong.
    pub bytes_lost: u64,
    /// Bytes that came more than once.
    pub bytes_duplicated: u64,
    /// How often the connection had to be opened again.
    pub reconnects: u64,
    /// Records, acknowledged writes or downloads completed.
    pub operations: u64,
    /// Datagrams that came after a later one.
    #[serde(default)]
    pub reordered: u64,
    /// Segments that TCP sent again.
    #[serde(default)]
    pub retransmissions: u64,
    /// The shortest time from a question to its answer, microseconds.
    #[serde(default)]
    pub round_trip_us: u64,
    /// The longest time between two arrivals since the last report, microseconds.
    pub longest_gap_us: u64,
    /// The work is done and was checked to the end.
    pub finished: bool,
    /// What went wrong, first.
    pub error: Option<String>,
}

impl Report {
    /// Nothing was lost, repeated, reordered or reopened.
    #[must_use]
    pub fn unharmed(&self) -> bool {
        let Self { bytes_lost, bytes_duplicated, reconnects, reordered, error, .. } = self;
        [*bytes_lost, *bytes_duplicated, *reconnects, *reordered] == [0; 4] && error.is_none()
    }
}

/// The running account of a client, shared with the thread that reports it.
#[derive(Clone, Default)]
pub struct Account(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    report: Report,
    last_arrival: Option<Instant>,
}

impl Account {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something came in at `now`: the time since the arrival before counts as a gap.
    pub fn arrived(&self, now: Instant) {
        let mut state = self.lock();
        if let Some(last) = state.last_arrival.replace(now) {
            let gap = micros(now.saturating_duration_since(last));
            state.report.longest_gap_us = state.report.longest_gap_us.max(gap);
        }
    }

    /// Changes the account.
    pub fn update(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.lock().report);
        self.0.1.notify_all();
    }

    /// Keeps the first thing that went wrong.
    pub fn fail(&self, error: &anyhow::Error) {
        self.lock().report.error.get_or_insert_with(|| format!("{error:#}"));
        self.0.1.notify_all();
    }

    /// Waits until `bytes` more bytes have come, or something went wrong.
    fn more(&self, bytes: u64) {
        let state = self.lock();
        let enough = state.report.bytes.saturating_add(bytes);
        let short = |s: &mut State| s.report.bytes < enough && s.report.error.is_none();
        drop(self.0.1.wait_while(state, short).unwrap_or_else(PoisonError::into_inner));
    }

    /// The account up to `now`, and the longest gap starts anew. A silence under way counts as a gap.
    pub fn take(&self, now: Instant) -> Report {
        let mut state = self.lock();
        let mut report = state.report.clone();
        if let Some(last) = state.last_arrival {
            report.longest_gap_us = report.longest_gap_us.max(micros(now.saturating_duration_since(last)));
        }
        state.report.longest_gap_us = 0;
        report
    }
}

fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

/// Runs a client's `work` on a thread of its own and reports as told above. Returns whether nothing was harmed.
///
/// # Errors
/// If a report cannot be written.
pub fn watch_over(
    work: impl FnOnce(&Account) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<bool> {
    // blocked before the threads start, so that all inherit it and only the waiting one below takes it
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    term.thread_block().context("blocking SIGTERM")?;

    let account = Account::default();
    let (over, ended) = std::sync::mpsc::channel::<()>();

    let worker = account.clone();
    let done = over.clone();
    std::thread::spawn(move || {
        if let Err(e) = work(&worker) {
            worker.fail(&e);
        }
        let _ = done.send(());
    });
    let told = over.clone();
    std::thread::spawn(move || {
        let _ = term.wait();
        let _ = told.send(());
    });
    let asked = account.clone();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            if let Some(bytes) = line.strip_prefix("more ").and_then(|n| n.parse().ok()) {
                asked.more(bytes);
            }
            if print(&asked.take(Instant::now())).is_err() {
                break;
            }
        }
        let _ = over.send(());
    });

    ended.recv().context("all watchers are gone")?;
    let last = account.take(Instant::now());
    print(&last)?;
    Ok(last.unharmed())
}

fn print(report: &Report) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line).and_then(|()| out.flush()).context("writing the report")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_between_arrivals_and_start_anew_with_a_report() {
        let account = Account::default();
        let t = Instant::now();
        let at = |ms| t + Duration::from_millis(ms);
        account.arrived(at(0));
        account.arrived(at(5));
        account.arrived(at(205));
        account.arrived(at(210));
        assert_eq!(account.take(at(211)).longest_gap_us, 200_000);
        account.arrived(at(215));
        assert_eq!(account.take(at(216)).longest_gap_us, 5_000);
        assert_eq!(account.take(at(1_215)).longest_gap_us, 1_000_000, "a silence under way is a gap");
    }
}
