//! `film-viewer`: watches the film on one connection and reports; see `handover_lab::apps`.

use std::{net::SocketAddr, process::ExitCode};

use clap::Parser;
use handover_lab::apps::{film, watch_over};

/// Watches the film and checks every byte. A line on stdin asks for a report; the end of stdin ends it.
#[derive(Parser)]
struct Args {
    /// The film server.
    server: SocketAddr,
}

fn main() -> anyhow::Result<ExitCode> {
    let server = Args::parse().server;
    let unharmed = watch_over(move |account| film::watch(server, account))?;
    Ok(if unharmed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
