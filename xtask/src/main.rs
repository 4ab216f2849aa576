//! Set-up, run, test and bench of Handover: the project's only build script.
//!
//! Every verb brings the machine to readiness first ([`setup`]), so that a fresh clone needs no other command. The work
//! itself is done by the project's own programs: this one installs, builds and starts them, and depends on none of them,
//! because it has to build where what they need is not yet installed.

mod command;
mod setup;
mod verbs;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set up, run, test and measure Handover.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Bring this Debian or Ubuntu machine to readiness: checks first, installs only what is missing.
    Setup,
    /// Play a whole migration on this machine: hosts as namespaces, real CRIU, real XDP (root).
    ///
    /// Everything after `run` goes to the lab: `--app film|redis|nginx`, `--back`, `--json`; see `cargo xtask run --help`.
    #[command(disable_help_flag = true)]
    Run {
        /// Arguments of the lab.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Formatting, lints, unit tests, XDP tests and the lab's scenarios (root).
    Test {
        /// Run only tests whose name contains this.
        filter: Option<String>,
        /// Also the slow ones: every link cut at every step of a migration (minutes).
        #[arg(long)]
        all: bool,
    },
    /// Simulate the transaction under faults: crashes, partitions, lost, late and doubled calls. A failing seed prints its
    /// trace and replays exactly.
    Simulate {
        /// How many runs.
        #[arg(long, default_value_t = 100_000)]
        seeds: u64,
        /// The first seed; with `--seeds 1` its trace is printed.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Plant a bug, to see it found; a wrong name lists them.
        #[arg(long)]
        mutation: Option<String>,
    },
    /// Give every decoder of octets from outside damaged and invented ones, then run generated frames through the XDP programs
    /// and compare with an oracle in plain Rust (root).
    Fuzz {
        /// How many cases for each decoder (API, inventory, journal, records, CRIU, images, configurations).
        #[arg(long, default_value_t = 20_000)]
        cases: u32,
        /// How many frames; 0: decoders alone.
        #[arg(long, default_value_t = 100_000_000)]
        frames: u64,
        /// Where the random numbers begin; the same seed makes the same frames.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Print one JSON object alone on stdout.
        #[arg(long)]
        json: bool,
    },
    /// The tests that depend on the kernel, on the kernels operators run: virtual machines under QEMU (root; Debian).
    ///
    /// Fetches QEMU and Debian's cloud kernels through the machine's own apt into `.tools/vm` the first time. Guests are
    /// emulated and slow; their logs are kept in the target folder under `vm`.
    Vm {
        /// Which: 6.1, 6.12, 6.18, 7.3 or all.
        #[arg(long, default_value = "all", value_parser = series)]
        kernel: Kernels,
        /// How many guests at a time.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
        jobs: u8,
        /// Run only tests whose name contains this.
        #[arg(last = true)]
        filter: Option<String>,
    },
    /// Measure: two things in one run, printed as a ratio (root).
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
}

/// Kernels of the matrix.
#[derive(Clone)]
struct Kernels(Vec<vm::Series>);

fn series(text: &str) -> Result<Kernels, String> {
    if text == "all" { Ok(Kernels(vm::ALL.to_vec())) } else { text.parse().map(|s| Kernels(vec![s])) }
}

#[derive(Subcommand)]
enum Bench {
    /// The single-store switch, every frame accounted for, beside map updates, a map-in-map swap and Open vSwitch, for 1 to
    /// 1,000,000 users.
    Switch {
        /// Print one JSON object alone on stdout.
        #[arg(long)]
        json: bool,
    },
    /// How long services of different sizes stand still, beside the same move done by hand.
    ///
    /// Everything after `migrate` goes to the lab: `--quick`, `--json`, `--memory`, `--connections`, `--modes`, `--runs`; see
    /// `cargo xtask bench migrate --help`.
    #[command(disable_help_flag = true)]
    Migrate {
        /// Arguments of the lab.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// What a frame costs: the gateway's program beside a bare redirect, tc, Open vSwitch and the Linux bridge, for 65,536 and
    /// 1,000,000 users.
    Forward {
        /// Print one JSON object alone on stdout.
        #[arg(long)]
        json: bool,
    },
}

/// A command line of the gateway's bench.
fn words(what: &str, numbers: &[(&str, u64)], json: bool) -> Vec<String> {
    let numbers = numbers.iter().flat_map(|(option, n)| [(*option).to_owned(), n.to_string()]);
    std::iter::once(what.to_owned()).chain(numbers).chain(json.then(|| "--json".into())).collect()
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Setup => setup::run().map(|()| ExitCode::SUCCESS),
        Verb::Run { args } => verbs::run(&args),
        Verb::Test { filter, all } => verbs::test(filter.as_deref(), all),
        Verb::Vm { kernel, jobs, filter } => {
            vm::run(&kernel.0, usize::from(jobs), filter.as_deref(), &verbs::target_dir())
        }
        Verb::Simulate { seeds, seed, mutation } => verbs::simulate(seeds, seed, mutation),
        Verb::Bench { what: Bench::Switch { json } } => verbs::gateway_bench(&words("switch", &[], json)),
        Verb::Bench { what: Bench::Migrate { args } } => verbs::bench_migrate(&args),
        Verb::Bench { what: Bench::Forward { json } } => verbs::gateway_bench(&words("forward", &[], json)),
        Verb::Fuzz { cases, frames, seed, json } => verbs::fuzz_decoders(cases).and_then(|decoders| {
            if frames == 0 || decoders != ExitCode::SUCCESS {
                return Ok(decoders);
            }
            verbs::gateway_bench(&words("fuzz", &[("--frames", frames), ("--seed", seed)], json))
        }),
    };
    done.unwrap_or_else(|e| {
        eprintln!("error: {e:#}");
        ExitCode::FAILURE
    })
}
