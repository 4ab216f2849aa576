//! `handover-simulate`: any number of runs; `cargo xtask simulate` is the way to it.

use std::process::ExitCode;

use clap::Parser;
use handover_simulation::{Figures, Mutation, replay, simulate};

/// Simulates the transaction under faults, one run for each seed, and stops at the first that breaks a promise.
#[derive(Parser)]
struct Args {
    /// How many runs.
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first seed. With `--seeds 1` its trace is printed, whatever comes of it.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Plant this bug, to see it found.
    #[arg(long, value_enum)]
    mutation: Option<Mutation>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let began = std::time::Instant::now();
    if args.seeds == 1 {
        let (trace, outcome) = replay(args.seed, args.mutation);
        for line in trace {
            println!("{line}");
        }
        return match outcome {
            Ok(figures) => {
                eprintln!("seed {}: all promises kept; {figures}", args.seed);
                ExitCode::SUCCESS
            }
            Err(violation) => {
                eprintln!("error: {violation}");
                ExitCode::FAILURE
            }
        };
    }
    let failed = std::sync::atomic::AtomicBool::new(false);
    let results: Vec<_> = std::thread::scope(|scope| {
        let failed = &failed;
        let work = |first: u64| {
            move || {
                let mut sum = Figures::default();
                let mut seed = args.seed + first;
                while seed < args.seed + args.seeds && !failed.load(std::sync::atomic::Ordering::Relaxed) {
                    match simulate(seed, args.mutation) {
                        Ok(figures) => sum.add(&figures),
                        Err(violation) => {
                            failed.store(true, std::sync::atomic::Ordering::Relaxed);
                            return (sum, Some(violation));
                        }
                    }
                    seed += threads;
                }
                (sum, None)
            }
        };
        let running: Vec<_> = (0..threads).map(|first| scope.spawn(work(first))).collect();
        running.into_iter().filter_map(|t| t.join().ok()).collect()
    });
    let mut sum = Figures::default();
    let mut found = None;
    for (figures, violation) in results {
        sum.add(&figures);
        found = found.or(violation);
    }
    eprintln!("{sum}; {:.1} s", began.elapsed().as_secs_f64());
    if let Some(violation) = found {
        let (trace, _) = replay(violation.seed, args.mutation);
        for line in trace {
            println!("{line}");
        }
        eprintln!(
            "error: {violation}\nseen again by: cargo xtask simulate --seeds 1 --seed {}",
            violation.seed
        );
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
