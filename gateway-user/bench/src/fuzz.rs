//! Generated frames in generated worlds, programs and oracle compared until they differ or enough are through.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use gateway_ebpf::Outcome;
use handover_gateway::{
    fuzz::{self, Harness, Random},
    plane::Side,
};
use serde::Serialize;

/// Frames of one side in one world, after which the counters are compared.
const BATCH: u64 = 512;

/// What became of the generated frames.
#[derive(Serialize)]
struct Fuzzed {
    bench: &'static str,
    seed: u64,
    frames: u64,
    worlds: u64,
    frames_per_second: u64,
    /// All as predicted.
    outcomes: BTreeMap<&'static str, u64>,
}

/// `handover-gateway-bench fuzz`.
pub fn run(frames: u64, seed: u64, json: bool) -> anyhow::Result<()> {
    let mut harness = Harness::new().context("fuzzing loads the real programs")?;
    let mut random = Random(seed);
    let mut tally = [0; Outcome::ALL.len()];
    let (mut done, mut worlds, begun) = (0, 0, Instant::now());
    let mut said = begun;
    while done < frames {
        let world = fuzz::world(&mut random);
        harness.enter(&world)?;
        worlds += 1;
        for side in [Side::Access, Side::Wan] {
            let batch: Vec<_> =
                (0..BATCH.min(frames - done)).map(|_| fuzz::frame(&mut random, &world, side)).collect();
            harness
                .compare_and_find(&world, side, &batch, &mut tally)
                .with_context(|| format!("after {done} frames of seed {seed}"))?;
            done += batch.len() as u64;
        }
        if said.elapsed() > Duration::from_secs(10) {
            said = Instant::now();
            eprintln!("{done} of {frames} frames, all as predicted");
        }
    }
    let report = Fuzzed {
        bench: "fuzz",
        seed,
        frames: done,
        worlds,
        frames_per_second: (done as f64 / begun.elapsed().as_secs_f64()) as u64,
        outcomes: Outcome::ALL.iter().map(|o| (o.name(), tally[*o as usize])).collect(),
    };
    if json {
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    println!(
        "{done} frames in {worlds} worlds, all as the oracle predicts ({} frames/s, seed {seed}); by outcome:",
        report.frames_per_second
    );
    for (outcome, frames) in &report.outcomes {
        println!("{frames:>12}  {outcome}");
    }
    Ok(())
}
