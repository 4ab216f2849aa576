//! The fault table; see [`handover_lab::faults`]. The whole of it is `cargo xtask test --all`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use handover_lab::faults::{At, Faults, Harm, Who};

/// Plays the cases, prints the table, and names every case that failed.
fn table(cases: impl IntoIterator<Item = (At, Harm)>) {
    let (mut faults, mut failed) = (None, Vec::new());
    for (at, harm) in cases {
        let mut now = faults.take().map_or_else(Faults::start, Ok).unwrap();
        match now.case(at, harm) {
            Ok(row) => {
                println!("{row}");
                faults = Some(now);
            }
            // what it left is of no use to the next case, which begins anew
            Err(e) => {
                eprintln!("{e:#}");
                failed.push(format!("{at:?}, {harm}"));
            }
        }
    }
    if let Some(faults) = faults {
        faults.finish().unwrap();
    }
    assert!(failed.is_empty(), "failed: {}", failed.join("; "));
}

#[test]
fn every_component_is_killed_where_it_hurts_most() {
    let steps = [At::Copy, At::Switch, At::Resume];
    table(steps.into_iter().flat_map(|at| Harm::KILLS.map(|harm| (at, harm))));
}

#[test]
#[ignore = "the slow rest: cargo xtask test --all"]
fn every_component_is_killed_at_every_step() {
    table(At::ALL.into_iter().flat_map(|at| Harm::KILLS.map(|harm| (at, harm))));
}

#[test]
fn the_network_is_cut_where_it_hurts_most() {
    use Harm::{Control, Migration};
    table([
        (At::Prepare, Migration),
        (At::Copy, Migration),
        (At::Restore, Migration),
        (At::Restore, Control(Who::Controller)),
        (At::Switch, Control(Who::Gateway)),
        (At::Yield, Control(Who::Source)),
        (At::Resume, Control(Who::Destination)),
        (At::End, Control(Who::Source)),
        (At::Finish, Control(Who::Gateway)),
    ]);
}

#[test]
#[ignore = "the slow rest: cargo xtask test --all"]
fn every_link_is_cut_at_every_step() {
    table(At::ALL.into_iter().flat_map(|at| Harm::CUTS.map(|harm| (at, harm))));
}
