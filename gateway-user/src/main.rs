//! `handover-gateway`: the daemon of connection control.
//!
//! Exit code 0 after SIGTERM or SIGINT, 1 if it cannot start or go on, 2 for bad usage or a bad configuration. When it ends
//! the programs are detached, and the gateway forwards nothing.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use handover_api::tls::Tls;
use handover_gateway::{config::Config, service::Gateway};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tonic::transport::server::TcpIncoming;
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
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .init();
    let (config, tls) = match configured(&arguments) {
        Ok(configured) => configured,
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::from(2);
        }
    };
    let result = match arguments.verb {
        Some(Verb::Check) => {
            println!("{}: good", arguments.config.display());
            Ok(())
        }
        None => run(&config, &tls),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn configured(arguments: &Arguments) -> anyhow::Result<(Config, Tls)> {
    let config = Config::load(&arguments.config)?;
    let tls = Tls::load(&config.tls)
        .with_context(|| format!("certificates of configuration {}", arguments.config.display()))?;
    Ok((config, tls))
}

#[tokio::main]
async fn run(config: &Config, tls: &Tls) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let listener =
        TcpListener::bind(config.listen).await.with_context(|| format!("listening on {}", config.listen))?;
    let mut server =
        tonic::transport::Server::builder().tls_config(tls.server()).context("using the certificates")?;
    let gateway = Gateway::start(config)?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = server.add_service(gateway.service()).serve_with_incoming_shutdown(
        TcpIncoming::from(listener).with_nodelay(Some(true)),
        async {
            let _ = stopped.await;
        },
    );
    tokio::pin!(serving);
    info!(name = config.name, listen = %config.listen, "ready");
    tokio::select! {
        ended = &mut serving => return ended.context("serving"),
        _ = terminate.recv() => info!("SIGTERM"),
        _ = interrupt.recv() => info!("SIGINT"),
    }
    // the programs go with the process; calls under way get their answers first
    let _ = stop.send(());
    match tokio::time::timeout(LAST_CALLS, serving).await {
        Ok(ended) => ended.context("serving"),
        Err(_) => Ok(()),
    }
}
