//! `load-client`: many connections to a `load-server`, every byte checked.

use std::{net::SocketAddr, process::ExitCode};

use clap::Parser;
use handover_lab::apps::{load, watch_over};

/// Opens connections, one of them a stream whose gaps are measured.
#[derive(Parser)]
struct Args {
    /// Address and port of the server.
    server: SocketAddr,
    /// How many connections.
    #[arg(long, default_value_t = 100)]
    connections: usize,
}

fn main() -> anyhow::Result<ExitCode> {
    let Args { server, connections } = Args::parse();
    let unharmed = watch_over(move |account| load::watch(server, connections, account))?;
    Ok(if unharmed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
