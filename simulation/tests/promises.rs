//! The promises under every fault, and that the checker bites: each planted bug has to be found.

#![allow(clippy::unwrap_used)] // clippy knows tests by their attribute, not their helpers

use std::sync::atomic::{AtomicU64, Ordering};

use clap::ValueEnum as _;
use handover_simulation::{Figures, Mutation, Violation, replay, simulate};

/// Seeds of every test run.
const SEEDS: u64 = 12_000;
/// Within so many seeds a planted bug has to be found.
const FOUND_WITHIN: u64 = 40_000;

/// The first violation there is in `seeds`, on all processors; else what the runs came to.
fn all(seeds: u64, mutation: Option<Mutation>) -> Result<Figures, Violation> {
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let work = || {
        let mut sum = Figures::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                return Ok(sum);
            }
            match simulate(seed, mutation) {
                Ok(figures) => sum.add(&figures),
                Err(violation) => {
                    next.store(seeds, Ordering::Relaxed);
                    return Err(violation);
                }
            }
        }
    };
    let mut sum = Figures::default();
    let done: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        running.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for result in done {
        sum.add(&result?);
    }
    Ok(sum)
}

#[test]
fn every_promise_is_kept_under_every_fault() {
    match all(SEEDS, None) {
        Ok(figures) => {
            eprintln!("{figures}");
            // it has to be weather in which things happen
            for (what, count) in [
                ("completed", figures.completed),
                ("rolled back", figures.rolled_back),
                ("cancelled", 10 * figures.cancelled),
                ("crashes", figures.crashes),
                ("partitions", figures.partitions),
                ("disturbed", figures.disturbed),
            ] {
                assert!(count > SEEDS / 4, "{what}: {count}");
            }
        }
        Err(violation) => {
            let (trace, _) = replay(violation.seed, None);
            panic!("{}\n{violation}", trace.join("\n"));
        }
    }
}

#[test]
fn a_seed_replays_exactly() {
    for seed in [0, 1, 77] {
        let (first, figures) = replay(seed, None);
        assert!(first.len() > 50);
        assert_eq!((first, figures.clone()), replay(seed, None));
        assert_eq!(figures, simulate(seed, None));
    }
    // and one that fails, with its trace up to the broken promise
    let mutation = Some(Mutation::ThawAfterYieldOnTimeout);
    let violation = all(FOUND_WITHIN, mutation).unwrap_err();
    let (trace, again) = replay(violation.seed, mutation);
    assert_eq!(again, Err(violation.clone()));
    assert!(trace.last().unwrap().contains(&violation.what), "{trace:?}");
}

#[test]
fn every_planted_bug_is_found() {
    let missed: Vec<_> = Mutation::value_variants()
        .iter()
        .filter(|mutation| match all(FOUND_WITHIN, Some(**mutation)) {
            Ok(_) => true,
            Err(violation) => {
                eprintln!("{mutation:?}: {violation}");
                false
            }
        })
        .collect();
    assert!(missed.is_empty(), "not found within {FOUND_WITHIN} seeds: {missed:?}");
}
