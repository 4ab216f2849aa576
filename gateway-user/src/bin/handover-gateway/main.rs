//! `handover-gateway`: the daemon of connection control.
//!
//! Exit code 0 after SIGTERM or SIGINT, 1 if it cannot start or go on, 2 for bad usage or a bad configuration. When it ends
//! the programs are detached, and the gateway forwards nothing; with `pin_dir` in the configuration it forwards on, until
//! `handover-gateway detach`.

mod ask;
mod debug;
mod watch;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use handover_api::{
    audit::Audit,
    gate::{Gate, Rules},
    tls::Tls,
};
use handover_gateway::{
    config::Config,
    pins,
    service::Gateway,
    socket::Socket,
    state::{StateError, Store},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tracing::info;
use tracing_subscriber::EnvFilter;

/// How long calls under way may take after a signal to end.
const LAST_CALLS: Duration = Duration::from_secs(2);

/// Connection control of Handover: forwards users' frames into their networks, and switches them between two.
#[derive(Parser)]
#[command(name = "handover-gateway", version)]
struct Arguments {
    /// The configuration file (TOML)
    #[arg(long, global = true, value_name = "FILE", default_value = "/etc/handover/gateway.toml")]
    config: PathBuf,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// Check the configuration and the certificates; touch nothing
    Check,
    /// Take down the data path that outlived the daemon: programs, maps, and what was changed at the interfaces
    Detach,
    /// What the gateway is, what it is attached to, and what became of the frames
    Status(Format),
    /// Who is on which network
    Users(Format),
    /// The networks and their routers
    Networks(Format),
    /// The switches under way, and how long the users' frames went on in the old network at those that were made
    Switches(Format),
    /// What becomes of each frame from and for one user, as it happens. While it lasts, programs that tell are attached in the
    /// place of the usual ones, which know nothing of it
    Debug {
        /// The user, who has to be known by a MAC
        user: String,
        /// How long: 30s, 5m
        #[arg(long = "for", value_name = "TIME", default_value = "30s", value_parser = seconds)]
        time: u32,
        #[command(flatten)]
        format: Format,
    },
    /// What happens, as it happens: changes of who is on which network, what becomes of the frames, what is held. Ends with
    /// Ctrl-C, when nobody reads its output any more, or after --count events
    Watch {
        #[command(flatten)]
        format: Format,
        /// After so many events
        #[arg(long, value_name = "N")]
        count: Option<u64>,
        /// How often to tell of the frames
        #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(100..=60_000))]
        interval: u32,
    },
}

/// "30s", "5m" or a number of seconds.
fn seconds(text: &str) -> Result<u32, String> {
    let (number, unit) = match (text.strip_suffix('s'), text.strip_suffix('m')) {
        (Some(number), _) => (number, 1),
        (_, Some(number)) => (number, 60),
        _ => (text, 1),
    };
    let seconds = number.parse().ok().and_then(|n: u32| n.checked_mul(unit));
    seconds.filter(|s| (1..=3600).contains(s)).ok_or_else(|| "use 1s to 3600s, or 1m to 60m".into())
}

#[derive(clap::Args)]
struct Format {
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = ask::Output::Table)]
    output: ask::Output,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .init();
    match act(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, error)) => {
            eprintln!("error: {error:#}");
            ExitCode::from(code)
        }
    }
}

/// Exit codes of failures.
const FAILED: u8 = 1;
/// See [`FAILED`].
const BAD_CONFIGURATION: u8 = 2;

fn act(arguments: &Arguments) -> Result<(), (u8, anyhow::Error)> {
    let bad = |error: anyhow::Error| (BAD_CONFIGURATION, error);
    let failed = |error: anyhow::Error| (FAILED, error);
    let config = Config::load(&arguments.config).map_err(|e| bad(e.into()))?;
    if let Some(Verb::Detach) = arguments.verb {
        return detach(&config).map_err(failed);
    }
    let tls = Tls::load(&config.tls)
        .with_context(|| format!("certificates of configuration {}", arguments.config.display()))
        .map_err(bad)?;
    let (what, output) = match &arguments.verb {
        Some(Verb::Check) => {
            println!("{}: good", arguments.config.display());
            return Ok(());
        }
        None | Some(Verb::Detach) => return run(&config, &tls).map_err(failed),
        Some(Verb::Status(format)) => (ask::What::Status, format.output),
        Some(Verb::Users(format)) => (ask::What::Users, format.output),
        Some(Verb::Networks(format)) => (ask::What::Networks, format.output),
        Some(Verb::Switches(format)) => (ask::What::Switches, format.output),
        Some(Verb::Debug { user, time, format }) => {
            return debug::debug(&config, &tls, user, *time, format.output).map_err(failed);
        }
        Some(Verb::Watch { format, count, interval }) => {
            return watch::watch(&config, &tls, format.output, *count, *interval).map_err(failed);
        }
    };
    ask::ask(&config, &tls, what, output).map_err(failed)
}

fn detach(config: &Config) -> anyhow::Result<()> {
    let Some(dir) = &config.pin_dir else {
        println!("nothing to detach: without `pin_dir` the data path ends with the daemon");
        return Ok(());
    };
    let state_dir = config.state_dir();
    // a running daemon has this locked
    let _store = match Store::open(&state_dir) {
        Err(error @ StateError::Locked(_)) => return Err(error.into()),
        other => other.ok(),
    };
    if pins::remove(dir)? {
        println!(
            "detached, nothing is left in {}; who is on which network is kept in {}",
            dir.display(),
            state_dir.display()
        );
    } else {
        println!("nothing to detach in {}", dir.display());
    }
    Ok(())
}

#[tokio::main]
async fn run(config: &Config, tls: &Tls) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let listener =
        TcpListener::bind(config.listen).await.with_context(|| format!("listening on {}", config.listen))?;
    // a gateway that leaves nothing behind when it ends has its log alone
    let audit = config.pin_dir.as_ref().map(|_| config.state_dir());
    let audit = audit
        .map(|dir| Audit::open(&dir).with_context(|| format!("opening the audit log in {}", dir.display())));
    let gate = Gate::new(Rules::DAEMON, audit.transpose()?);
    let server = || tonic::transport::Server::builder().layer(gate.clone());
    let local = config.socket.as_deref().map(Socket::bind).transpose()?;
    let gateway = Gateway::start(config)?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let stopped = || {
        let mut stopped = stopped.clone();
        async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        }
    };
    let serving = server()
        .add_service(gateway.service())
        .add_service(gateway.events())
        .serve_with_incoming_shutdown(tls.incoming(listener), stopped());
    let serving_locally = async {
        match local {
            None => Ok(()),
            Some(socket) => {
                let (incoming, _remove) = socket.incoming();
                server()
                    .add_service(gateway.service())
                    .add_service(gateway.events())
                    .serve_with_incoming_shutdown(incoming, stopped())
                    .await
            }
        }
    };
    let serving = async { tokio::try_join!(serving, serving_locally).map(|_| ()) };
    tokio::pin!(serving);
    info!(name = config.name, listen = %config.listen, "ready");
    tokio::select! {
        ended = &mut serving => return ended.context("serving"),
        followed = tls.clone().follow() => return followed.context("listening for SIGHUP"),
        _ = terminate.recv() => info!("SIGTERM"),
        _ = interrupt.recv() => info!("SIGINT"),
    }
    // programs that are not pinned go with the process; calls under way get their answers first
    let _ = stop.send(true);
    gateway.end_watches();
    match tokio::time::timeout(LAST_CALLS, serving).await {
        Ok(ended) => ended.context("serving"),
        Err(_) => Ok(()),
    }
}
