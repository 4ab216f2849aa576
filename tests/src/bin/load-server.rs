//! `load-server`: a service of chosen size, to measure migrations with.

use std::net::SocketAddr;

use clap::Parser;

/// Streams records, echoes, and watches over its own memory.
#[derive(Parser)]
struct Args {
    /// Address and port to serve on.
    #[arg(long)]
    listen: SocketAddr,
    /// MiB of memory to hold.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(0..=8192))]
    memory_mib: u16,
    /// Pages to write every millisecond.
    #[arg(long, default_value_t = 0)]
    dirty_pages: usize,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    handover_lab::apps::load::serve(args.listen, usize::from(args.memory_mib) << 20, args.dirty_pages)
}
