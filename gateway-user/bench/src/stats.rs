//! What the benchmarks have in common: times, ratios, and how they are printed.

use std::time::Instant;

use anyhow::Context as _;
use comfy_table::{CellAlignment, Table, presets::NOTHING};
use serde::Serialize;

/// Times of one way, in nanoseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Times {
    pub runs: usize,
    pub median_ns: u64,
    /// Of fewer than a hundred runs this is the largest.
    pub p99_ns: u64,
    pub max_ns: u64,
}

impl Times {
    /// `None` of no samples.
    pub fn of(mut samples: Vec<u64>) -> Option<Self> {
        samples.sort_unstable();
        let runs = samples.len();
        Some(Self {
            runs,
            median_ns: *samples.get(runs / 2)?,
            p99_ns: *samples.get(runs * 99 / 100)?,
            max_ns: *samples.last()?,
        })
    }
}

/// What `work` gives, and how long it took.
pub fn timed<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let begun = Instant::now();
    let value = work();
    (value, begun.elapsed().as_nanos() as u64)
}

/// `a / b`, to print.
pub fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b.max(1) as f64
}

/// A time in the unit that fits.
pub fn time(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{ns} ns"),
        10_000..10_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.1} s", ns as f64 / 1e9),
    }
}

/// A ratio with as many digits as mean something.
pub fn factor(ratio: f64) -> String {
    if ratio < 100.0 { format!("{ratio:.1}x") } else { format!("{ratio:.0}x") }
}

/// A table whose first columns are words and whose others are figures.
pub fn table(words: usize, head: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(head);
    for (index, column) in table.column_iter_mut().enumerate() {
        let align = if index < words { CellAlignment::Left } else { CellAlignment::Right };
        column.set_cell_alignment(align);
    }
    table
}

/// Where and under what load the figures were taken.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    /// Tasks that wanted a CPU, by /proc/loadavg, over the last minute, when the run began.
    pub load_before: f64,
    /// The same when it ended.
    pub load_after: f64,
}

impl Machine {
    pub fn now() -> anyhow::Result<Self> {
        let uname = nix::sys::utsname::uname().context("asking for the kernel's version")?;
        let info = std::fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
        let model = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": "));
        Ok(Self {
            kernel: uname.release().to_string_lossy().into_owned(),
            cpu: model.map_or("unknown", |(_, name)| name).into(),
            cpus: std::thread::available_parallelism().map_or(0, Into::into),
            load_before: load()?,
            load_after: 0.0,
        })
    }

    pub fn ended(&mut self) -> anyhow::Result<()> {
        self.load_after = load()?;
        Ok(())
    }

    pub fn print(&self) {
        println!(
            "{} x {}, kernel {}; load {} when it began, {} when it ended",
            self.cpus, self.cpu, self.kernel, self.load_before, self.load_after
        );
    }
}

fn load() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").context("reading /proc/loadavg")?;
    let first = text.split_whitespace().next().unwrap_or_default();
    first.parse().with_context(|| format!("/proc/loadavg begins with `{first}`"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends there")]

    use super::*;

    #[test]
    fn the_99th_percentile_is_the_largest_of_a_few_and_not_of_many() {
        let times = Times::of((1..=1000).rev().collect()).unwrap();
        assert_eq!((times.runs, times.median_ns, times.p99_ns, times.max_ns), (1000, 501, 991, 1000));
        let few = Times::of(vec![3, 1, 2]).unwrap();
        assert_eq!((few.median_ns, few.p99_ns, few.max_ns), (2, 3, 3));
        assert!(Times::of(Vec::new()).is_none());
    }
}
