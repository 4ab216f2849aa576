//! `handover-gateway-bench switch`.
//!
//! - [`live`]: frames flow while users are switched as fast as it goes; every one is accounted for.
//! - [`api`]: how long after a call of the controller the store is made.
//! - [`peers`]: the same switch done otherwise, in the same run.

mod api;
mod live;
mod peers;

use serde::Serialize;

use crate::{
    place,
    stats::{Machine, Times, timed},
};

#[derive(Serialize)]
struct Report {
    bench: &'static str,
    machine: Machine,
    /// Reading the clock twice, part of every time measured here.
    timer: Times,
    live: live::Live,
    api: Vec<Result<api::Row, api::Failed>>,
    peers: Vec<peers::Row>,
}

/// Measures and prints.
pub fn run(json: bool, flips: u64, users: &[u32]) -> anyhow::Result<()> {
    place::enter()?;
    let mut machine = Machine::now()?;
    let timer = Times::of((0..100_000).map(|_| timed(|| {}).1).collect());
    let timer = timer.ok_or_else(|| anyhow::anyhow!("no samples"))?;
    eprintln!("frames while users are switched {flips} times ...");
    let live = live::run(flips)?;
    let api = api::run(users)?;
    let peers = peers::run(users)?;
    machine.ended()?;
    let report = Report { bench: "switch", machine, timer, live, api, peers };
    if json {
        println!("{}", serde_json::to_string(&report)?);
        return report.verdict();
    }
    report.print();
    report.verdict()
}

impl Report {
    /// Not one frame may have been lost, duplicated or sent astray.
    fn verdict(&self) -> anyhow::Result<()> {
        let tally = self.live.frames;
        anyhow::ensure!(tally.is_flawless(), "frames were lost, duplicated or sent astray: {tally:?}");
        let failed: Vec<_> = self.api.iter().filter_map(|row| row.as_ref().err()).collect();
        anyhow::ensure!(failed.is_empty(), "calls failed: {failed:?}");
        Ok(())
    }

    fn print(&self) {
        self.machine.print();
        println!("Reading the clock costs {} ns of each time.", self.timer.median_ns);
        println!();
        self.live.print();
        println!();
        api::print(&self.api);
        println!();
        peers::print(&self.peers);
    }
}
