//! `handover`: the operator's command. One file per verb; what they share is in [`connect`] (reaching the controller),
//! [`output`] (tables, JSON) and [`failure`] (exit codes).
//!
//! Data goes to stdout, progress and everything said to a person to stderr.

mod apply;
mod audit;
mod connect;
mod failure;
mod migrate;
mod output;
mod pki;
mod sessions;
mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{connect::Where, output::Format};

/// Moves running services, their addresses and their users to another site, connections alive.
#[derive(Parser)]
#[command(name = "handover", version, after_help = AFTER_HELP)]
struct Args {
    #[command(flatten)]
    to: Where,
    /// How data is printed.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(subcommand)]
    verb: Verb,
}

const AFTER_HELP: &str = "Examples:
  handover apply -f inventory.toml            declare services, sites, networks, users, gateways
  handover status                             where every service and user is, who can be reached
  handover migrate film --to backup --dry-run what would be done, and what speaks against it
  handover migrate film --to backup --wait    do it, show each step
  handover queue                              which requests wait, in which order, for what
  handover sessions list                      migrations so far
  handover sessions show film-1 -o json       one of them, for a program
  handover audit                              who asked for what, and what came of it
  handover pki init /etc/handover/ca          a new authority for certificates

Exit codes:
  0  done
  1  error, or refused with nothing touched
  2  wrong usage
  3  rolled back: the service is alive at the source
  4  no such service, site, user or session
  5  timed out while still running
  6  needs an operator";

#[derive(Subcommand)]
enum Verb {
    Apply(apply::Args),
    Status(status::Args),
    Migrate(migrate::Args),
    Queue(sessions::QueueArgs),
    #[command(subcommand)]
    Sessions(sessions::Verb),
    Audit(audit::Args),
    #[command(subcommand)]
    Pki(pki::Verb),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Args { to, output, verb } = Args::parse();
    let result = match verb {
        Verb::Apply(args) => apply::run(args, &to, output).await,
        Verb::Status(args) => status::run(args, &to, output).await,
        Verb::Migrate(args) => migrate::run(args, &to, output).await,
        Verb::Queue(args) => sessions::queue(args, &to, output).await,
        Verb::Sessions(verb) => sessions::run(verb, &to, output).await,
        Verb::Audit(args) => audit::run(args, &to, output).await,
        Verb::Pki(verb) => pki::run(verb, output),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("error: {error:#}");
            failure::code(&error).into()
        }
    }
}
