//! `handover-controller`: the daemon. Exit codes: 0 ended by a signal, 1 cannot go on, 2 bad usage or configuration.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use handover_api::{audit::Audit, tls::Tls};
use handover_controller::{config::Config, controller::Controller, server::Listeners};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// How long sessions under way are waited for at the end.
const STOP: Duration = Duration::from_secs(10);

/// Runs the one ordered sequence that moves services and their users to another site.
#[derive(Parser)]
#[command(
    version,
    after_help = "Example configuration:\n  \
    name = \"controller\"\n  \
    listen = \"10.255.0.1:7440\"                  # optional: the CLI from elsewhere\n  \
    socket = \"/run/handover/controller.sock\"    # the local CLI; mode 0660\n  \
    state_dir = \"/var/lib/handover-controller\"  # the journal\n  \
    [limits]                                    # optional; these are the defaults\n  \
    at_once = 4                                 # migrations under way at a time, over all services\n  \
    waiting = 100                               # requests that may wait (`migrate --queue`)\n  \
    journal_mib = 1024                          # above this no new request or inventory is taken\n  \
    [tls]\n  \
    ca = \"/etc/handover/ca.pem\"\n  \
    cert = \"/etc/handover/controller-controller.pem\"\n  \
    key = \"/etc/handover/controller-controller.key\"\n\n\
    Certificates: `handover pki init DIR`, `handover pki issue DIR controller controller`. New files are taken within two\n\
    seconds, or at once on SIGHUP, for new connections; files that cannot be used leave the old ones in use."
)]
struct Args {
    /// The configuration file.
    #[arg(long, global = true, default_value = "/etc/handover/controller.toml")]
    config: PathBuf,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// Checks the configuration and the certificates, and ends.
    Check,
}

fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .with_writer(std::io::stderr)
        .init();
    let loaded = Config::load(&args.config)
        .map_err(anyhow::Error::from)
        .and_then(|config| Ok((Tls::load(&config.tls).context("certificates")?, config)));
    let (tls, config) = match loaded {
        Ok(loaded) => loaded,
        Err(e) => {
            eprintln!("error: {e:#}");
            return ExitCode::from(2);
        }
    };
    if matches!(args.verb, Some(Verb::Check)) {
        println!("{}: good", args.config.display());
        return ExitCode::SUCCESS;
    }
    match run(&config, tls) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(config: &Config, tls: Tls) -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("SIGINT")?;
    // the journal first: its lock tells two controllers apart before either touches the socket
    let controller = Controller::open(&config.state_dir, tls.clone(), config.limits)?;
    let audit = Audit::open(&config.state_dir).context("audit log in the state directory")?;
    let listeners = Listeners::bind(config).await?;
    if let Some(why) = tls.unfit() {
        tracing::warn!(why, cert = %config.tls.cert.display(), "no peer will take this certificate");
    }
    tracing::info!(name = config.name, socket = %config.socket.display(), listen = ?config.listen, "ready");
    tokio::select! {
        served = listeners.serve(controller.clone(), &tls, audit) => served?,
        followed = tls.clone().follow() => followed.context("SIGHUP")?,
        fatal = controller.failed() => return Err(fatal.into()),
        stopped = async {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            tracing::info!("stopping");
            controller.stop(STOP).await;
        } => stopped,
    }
    Ok(())
}
