//! `handover-lab`: plays a migration for a person, and is pid 1 of the lab's hosts.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use handover_lab::{bench, init, run};

/// The lab of Handover.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the lab, move a live service and its user to another site, and show what happened.
    Run(run::Options),
    /// Measure migrations, beside the same done by hand.
    BenchMigrate(bench::Options),
    /// Pid 1 of a host; started by the lab.
    #[command(hide = true)]
    Host {
        /// Shown in process lists.
        name: String,
    },
}

fn main() -> ExitCode {
    let done = match Args::parse().verb {
        Verb::Run(options) => run::run(options),
        Verb::BenchMigrate(options) => bench::run(&options),
        Verb::Host { name: _ } => init::run().map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|e| {
        eprintln!("error: {e:#}");
        ExitCode::FAILURE
    })
}
