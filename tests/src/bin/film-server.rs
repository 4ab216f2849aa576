//! `film-server`: the lab's motion-picture-like service. One thread, no files, no children.

use std::{net::SocketAddr, time::Duration};

use clap::Parser;

/// Streams numbered, checksummed records to every viewer at a steady rate.
#[derive(Parser)]
struct Args {
    /// Address and port to serve on.
    #[arg(long)]
    listen: SocketAddr,
    /// Milliseconds between two records of 1 KiB.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    interval_ms: u64,
    /// MiB of memory to hold.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(0..=4096))]
    memory_mib: u16,
    /// Periodic timers to keep besides, each read whenever it runs out.
    #[arg(long, default_value_t = 0)]
    timers: u32,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let ballast = usize::from(args.memory_mib) << 20;
    handover_lab::apps::film::serve(
        args.listen,
        Duration::from_millis(args.interval_ms),
        ballast,
        args.timers,
    )
}
