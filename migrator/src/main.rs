//! `handover-migrator`: see the library.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use handover_api::tls::{Tls, TlsError};
use handover_migrator::{
    config::{Config, ConfigError},
    error::{Error, chain},
    keeper,
    local::{self, Way},
    node::Node,
    server,
};
use tokio::signal::unix::{SignalKind, signal};

/// Moves running services between servers: the daemon on each of them.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Only checks the configuration and the certificates it names.
    Check {
        /// Configuration file (TOML).
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Started by the daemon beside a copy whose memory follows.
    #[command(hide = true)]
    KeepPages(keeper::Options),
    /// The migrations this server knows: over the daemon's local socket, or from its records when it is down.
    Status {
        /// Configuration file (TOML).
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Ends the doubt about a migration on the spot, when the controller is gone.
    ///
    /// Says what is known, what will be done and what is risked; does it only with `--yes`. Ends with 1 without `--yes`.
    #[command(group = clap::ArgGroup::new("way").required(true).args(["commit", "abort"]))]
    Resolve {
        /// The migration, e.g. film-1.
        id: String,
        /// The service is at the destination.
        #[arg(long)]
        commit: bool,
        /// The service is at the source.
        #[arg(long)]
        abort: bool,
        /// The account was read, and what is to be done first has been done.
        #[arg(long)]
        yes: bool,
        /// Configuration file (TOML).
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::builder()
                .with_default_directive(tracing_subscriber::filter::LevelFilter::INFO.into())
                .from_env_lossy(),
        )
        .init();
    let outcome = match (cli.command, cli.config) {
        (Some(Command::Check { config }), _) => check(&config),
        (Some(Command::KeepPages(options)), _) => keep_pages(&options),
        (Some(Command::Status { config }), _) => status(&config),
        (Some(Command::Resolve { id, commit, abort: _, yes, config }), _) => {
            resolve(&config, &id, if commit { Way::Commit } else { Way::Abort }, yes)
        }
        (None, Some(config)) => run(&config),
        (None, None) => Ok(()), // clap demands one of them
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(if e.is::<ConfigError>() || e.is::<TlsError>() { 2 } else { 1 })
        }
    }
}

fn keep_pages(options: &keeper::Options) -> anyhow::Result<()> {
    anyhow::ensure!(keeper::run(options)?, "not all pages of the copy have come; it was killed");
    Ok(())
}

fn check(path: &std::path::Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    Tls::load(&config.tls).with_context(|| format!("certificates of configuration {}", path.display()))?;
    println!("{}: valid", path.display());
    Ok(())
}

fn on_the_spot<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.context("starting the runtime")?.block_on(work))
}

fn status(path: &std::path::Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    let (running, migrations) = on_the_spot(local::status(&config))??;
    eprintln!("migrator {}: {}", config.name, if running { "runs" } else { "is down; from its records" });
    println!("{:<24} {:<12} {:<11} {:>8} SERVICE", "MIGRATION", "ROLE", "STATE", "PID");
    for m in migrations {
        println!("{:<24} {:<12} {:<11} {:>8} {}", m.migration, m.role, m.state, m.pid, m.service);
    }
    Ok(())
}

fn resolve(path: &std::path::Path, id: &str, way: Way, yes: bool) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    let tls = || Tls::load(&config.tls).map_err(|e| Error::other(chain(&e)));
    let told = on_the_spot(local::resolve(&config, tls, id, way, yes))??;
    for line in told {
        eprintln!("{line}");
    }
    anyhow::ensure!(yes, "nothing was done; with --yes it is");
    eprintln!("migration {id} is resolved here");
    Ok(())
}

fn run(path: &std::path::Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    let tls = Tls::load(&config.tls)
        .with_context(|| format!("certificates of configuration {}", path.display()))?;
    check_privileges()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // a lone processor must not let a blocking netlink call hold up everything else
        .worker_threads(std::thread::available_parallelism().map_or(2, std::num::NonZero::get).max(2))
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let outcome = runtime.block_on(async {
        let node = Node::open(config, tls).await?;
        let (tell, stop) = tokio::sync::watch::channel(false);
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::spawn(async move {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            tracing::info!("ending");
            // nobody to tell: it is ending already
            let _ = tell.send(true);
        });
        server::serve(node, stop).await?;
        anyhow::Ok(())
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

/// Capabilities without which nothing here works (bits of linux/capability.h).
const CAPABILITIES: [(u32, &str); 8] = [
    (1, "CAP_DAC_OVERRIDE"),
    (5, "CAP_KILL"),
    (12, "CAP_NET_ADMIN"),
    (13, "CAP_NET_RAW"),
    (18, "CAP_SYS_CHROOT"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
    (40, "CAP_CHECKPOINT_RESTORE"),
];

fn check_privileges() -> anyhow::Result<()> {
    let status = std::fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
        .context("/proc/self/status tells no capabilities")?;
    let missing: Vec<&str> =
        CAPABILITIES.iter().filter(|(bit, _)| effective & (1 << bit) == 0).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        anyhow::bail!("missing privileges: {}; run the daemon as root", missing.join(", "));
    }
    Ok(())
}
