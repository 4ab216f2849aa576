//! `handover-lab`: plays a migration for a person, and is pid 1 of the lab's hosts.

use clap::{Parser, Subcommand};

/// The lab of Handover.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Pid 1 of a host; started by the lab.
    #[command(hide = true)]
    Host {
        /// Shown in process lists.
        name: String,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().verb {
        Verb::Host { name: _ } => handover_lab::init::run(),
    }
}
