//! `handover-lab bench-migrate`: how long a service stands still, and how long its users hear nothing, beside the same move
//! done by hand ([`crate::byhand`]) in the same run.
//!
//! Every migration is checked as in the scenarios: nothing lost, repeated or reopened on any connection, process, address and
//! user where they belong. One that is not ends the bench. Numbers of one machine are compared with each other only.

use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::{Args, ValueEnum};
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use crate::{
    byhand::ByHand,
    scenario::{Play, Step},
    topology::{LargePipes, Site, Topology},
};

/// How memory gets to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// All of it while the service stands still.
    StopAndCopy,
    /// After the copy runs.
    PostCopy,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::StopAndCopy => "stop-and-copy",
            Self::PostCopy => "post-copy",
        }
    }

    fn config(self) -> String {
        format!("[memory]\nmode = \"{}\"\nallow_post_copy = {}\n", self.name(), self == Self::PostCopy)
    }
}

/// What to measure.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// MiB of memory of the service.
    #[arg(long, value_delimiter = ',', default_values_t = [16, 256, 1024])]
    memory: Vec<u16>,
    /// Connections to it.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 1000, 10_000])]
    connections: Vec<usize>,
    /// Memory modes.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["stop-and-copy", "post-copy"])]
    modes: Vec<Mode>,
    /// Migrations of each kind; by hand a third of it.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// A few migrations with 16 and 256 MiB and 100 connections.
    #[arg(long)]
    quick: bool,
    /// Print one JSON object alone on stdout.
    #[arg(long)]
    json: bool,
}

/// Median and 99th percentile, milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Spread {
    median_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

impl Spread {
    /// Of measured times (nearest rank); nothing of none.
    fn of(mut times: Vec<Duration>) -> Option<Self> {
        times.sort_unstable();
        let ms = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
        let rank =
            |percent: usize| times.get((times.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        Some(Self { median_ms: ms(rank(50)?), p99_ms: ms(rank(99)?), max_ms: ms(*times.last()?) })
    }
}

/// One kind of migration.
#[derive(Debug, Serialize)]
struct Row {
    /// "stop-and-copy", "post-copy" or "by hand".
    how: &'static str,
    memory_mib: u16,
    connections: usize,
    migrations: u32,
    /// As the controller reports it; unknown by hand.
    frozen: Option<Spread>,
    /// Longest silence on the viewer's connection.
    gap: Spread,
    /// Between the fence's begin and its end, as the source reports it.
    fence: Option<Spread>,
    /// Median of each step between freeze and resume, milliseconds.
    steps: Vec<(String, f64)>,
}

/// Measures and prints.
///
/// # Errors
/// If a migration is not as it should be, or the result cannot be printed.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut options = options.clone();
    if options.quick {
        (options.memory, options.connections, options.runs) = (vec![16, 256], vec![100], 6);
    }
    let begun = Instant::now();
    let say = |what: &str| eprintln!("{:7.1} s  {what}", begun.elapsed().as_secs_f64());
    let mut rows = Vec::new();
    for &memory in &options.memory {
        for &connections in &options.connections {
            for &mode in &options.modes {
                say(&format!("{}, {memory} MiB, {connections} connections", mode.name()));
                let row = measure(mode, memory, connections, options.runs);
                rows.push(row.with_context(|| format!("{} {memory} MiB {connections}", mode.name()))?);
            }
            say(&format!("by hand, {memory} MiB, {connections} connections"));
            rows.push(by_hand(memory, connections, options.runs.div_ceil(3)).context("by hand")?);
        }
    }
    let text = if options.json {
        serde_json::to_string_pretty(&rows)? + "\n"
    } else {
        format!("{}\n", table(&rows))
    };
    std::io::stdout().write_all(text.as_bytes()).context("printing the result")?;
    Ok(ExitCode::SUCCESS)
}

/// Steps that lie between the fence and the resumed service.
const WINDOW: [&str; 14] = [
    "drain",
    "fence",
    "dump",
    "freezer",
    "copy",
    "restore",
    "restore: pages",
    "restore: criu",
    "restore: freezer",
    "address",
    "switch",
    "yield",
    "decision",
    "resume",
];

fn measure(mode: Mode, memory: u16, connections: usize, runs: u32) -> anyhow::Result<Row> {
    let _pipes = LargePipes::raise()?;
    let topology = Topology::new()?;
    topology.configure_migrators(&mode.config())?;
    let mut play = Play::start_load(topology, memory, connections)?;
    let (mut frozen, mut gap, mut fence) = (Vec::new(), Vec::new(), Vec::new());
    let mut steps: Vec<Step> = Vec::new();
    // one more: the first fills caches
    for run in 0..=runs {
        let to = if run % 2 == 0 { Site::Backup } else { Site::Main };
        let moved = play.migrate(to, |_| {})?;
        let session = moved.check(to).with_context(|| play.topology.logs())?;
        if run == 0 {
            continue;
        }
        frozen.push(Duration::from_micros(session.frozen_us));
        gap.push(Duration::from_micros(moved.client.longest_gap_us));
        let fenced = session.steps.iter().filter(|s| s.name == "fence").map(|s| s.took_us).sum();
        fence.push(Duration::from_micros(fenced));
        steps.extend(session.steps.clone());
    }
    let last = play.client.finish()?;
    ensure!(last.unharmed(), "the client was harmed: {last:?}");
    Ok(Row {
        how: mode.name(),
        memory_mib: memory,
        connections,
        migrations: runs,
        frozen: Spread::of(frozen),
        gap: Spread::of(gap).context("nothing was measured")?,
        fence: Spread::of(fence),
        steps: WINDOW
            .iter()
            .filter_map(|name| {
                let took = steps.iter().filter(|s| s.name == *name);
                let took = took.map(|s| Duration::from_micros(s.took_us)).collect();
                Some(((*name).to_owned(), Spread::of(took)?.median_ms))
            })
            .collect(),
    })
}

fn by_hand(memory: u16, connections: usize, runs: u32) -> anyhow::Result<Row> {
    let mut hand = ByHand::start(memory, connections)?;
    let gaps = (0..runs).map(|_| hand.migrate()).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(Row {
        how: "by hand",
        memory_mib: memory,
        connections,
        migrations: runs,
        frozen: None,
        gap: Spread::of(gaps).context("nothing was measured")?,
        fence: None,
        steps: Vec::new(),
    })
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(if std::io::stdout().is_terminal() {
        presets::UTF8_FULL_CONDENSED
    } else {
        presets::NOTHING
    });
    table.set_header([
        "HOW",
        "MiB",
        "CONN",
        "RUNS",
        "FROZEN med",
        "p99",
        "GAP med",
        "p99",
        "FENCE med",
        "BY HAND / THIS",
    ]);
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    let ms = |v: Option<f64>| right(v.map_or("-".into(), |v| format!("{v:.1} ms")));
    for row in rows {
        let hand = rows.iter().find(|r| {
            r.how == "by hand" && (r.memory_mib, r.connections) == (row.memory_mib, row.connections)
        });
        let ratio = hand.filter(|_| row.how != "by hand").map(|h| h.gap.median_ms / row.gap.median_ms);
        table.add_row([
            Cell::new(row.how),
            right(row.memory_mib.to_string()),
            right(row.connections.to_string()),
            right(row.migrations.to_string()),
            ms(row.frozen.map(|s| s.median_ms)),
            ms(row.frozen.map(|s| s.p99_ms)),
            ms(Some(row.gap.median_ms)),
            ms(Some(row.gap.p99_ms)),
            ms(row.fence.map(|s| s.median_ms)),
            right(ratio.map_or("-".into(), |r| format!("{r:.1} x"))),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_99th_percentile_are_of_the_nearest_rank() {
        let spread = Spread::of((1..=200).rev().map(Duration::from_millis).collect()).unwrap();
        assert_eq!(spread, Spread { median_ms: 100.0, p99_ms: 198.0, max_ms: 200.0 });
        let one = Spread::of(vec![Duration::from_micros(1500)]).unwrap();
        assert_eq!(one, Spread { median_ms: 1.5, p99_ms: 1.5, max_ms: 1.5 });
        assert_eq!(Spread::of(Vec::new()), None);
    }
}
