//! `pulse-server`: counts numbered datagrams and answers pings; see `handover_lab::apps::pulse`.

use std::net::SocketAddr;

use clap::Parser;

/// Counts numbered datagrams and answers pings.
#[derive(Parser)]
struct Args {
    /// Where to listen, on UDP and TCP.
    #[arg(long)]
    listen: SocketAddr,
}

fn main() -> anyhow::Result<()> {
    handover_lab::apps::pulse::serve(Args::parse().listen)
}
