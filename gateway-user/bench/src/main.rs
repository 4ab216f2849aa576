//! Benchmarks of the gateway: two or more ways of doing one thing, in one run, as a ratio. Figures are of this run on this
//! machine.
//!
//! - `switch` ([`switch`]): all users from one network to the other, by the gateway and otherwise; and every frame accounted
//!   for while that is done as fast as it goes.
//! - `forward` ([`forward`]): what a frame costs, by the gateway and otherwise.
//! - `fuzz` ([`fuzz`]): generated frames, the programs compared with an oracle.

#![allow(clippy::needless_update, reason = "messages may get fields that are of no interest here")]

mod forward;
mod fuzz;
mod journal;
mod ovs;
mod place;
mod rig;
mod stats;
mod switch;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Benchmarks of the gateway.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// The single-store switch beside map updates, a map-in-map swap and Open vSwitch; with every frame accounted for
    Switch {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        /// How often users are switched (and put back) while frames flow
        #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
        flips: u64,
        /// Numbers of users to compare for
        #[arg(long, value_delimiter = ',', default_value = "1,1000,65536,1000000",
              value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
        users: Vec<u32>,
    },
    /// What a frame costs: the gateway's program beside a bare redirect, tc, Open vSwitch and the Linux bridge
    Forward {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        /// Numbers of users to compare for
        #[arg(long, value_delimiter = ',', default_value = "1024,65536,1000000",
              value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
        users: Vec<u32>,
        /// What is measured
        #[arg(long, value_enum, default_value = "all")]
        part: forward::Part,
    },
    /// Generated frames through the programs, each compared with what the oracle predicts
    Fuzz {
        /// How many
        #[arg(long, default_value_t = 100_000_000, value_parser = clap::value_parser!(u64).range(1..))]
        frames: u64,
        /// Where the random numbers begin; the same seed makes the same frames
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().what {
        What::Switch { json, flips, users } => switch::run(json, flips, &users),
        What::Forward { json, users, part } => forward::run(json, &users, part),
        What::Fuzz { frames, seed, json } => fuzz::run(frames, seed, json),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
