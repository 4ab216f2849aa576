//! Reaching the controller: the local socket, or a TCP endpoint over mutual TLS.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use handover_api::{
    tls::{Role, Tls, TlsFiles},
    v1::controller_client::ControllerClient,
};
use handover_controller::config::DEFAULT_SOCKET;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// A client of the controller.
pub type Client = ControllerClient<Channel>;

/// Where the controller is.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Where the controller is")]
pub struct Where {
    /// Its local socket.
    #[arg(long, global = true, env = "HANDOVER_SOCKET", default_value = DEFAULT_SOCKET, value_name = "PATH")]
    socket: PathBuf,
    /// Its address, to ask from elsewhere; needs --ca, --cert and --key.
    #[arg(long, global = true, env = "HANDOVER_SERVER", value_name = "HOST:PORT")]
    server: Option<String>,
    /// Its name in its certificate.
    #[arg(
        long,
        global = true,
        env = "HANDOVER_SERVER_NAME",
        default_value = "controller",
        value_name = "NAME"
    )]
    server_name: String,
    /// The authority's certificate.
    #[arg(long, global = true, env = "HANDOVER_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// This operator's certificate.
    #[arg(long, global = true, env = "HANDOVER_CERT", value_name = "FILE")]
    cert: Option<PathBuf>,
    /// This operator's private key.
    #[arg(long, global = true, env = "HANDOVER_KEY", value_name = "FILE")]
    key: Option<PathBuf>,
}

impl Where {
    /// Connects.
    ///
    /// # Errors
    /// What stands in the way, and the way out.
    pub async fn connect(&self) -> anyhow::Result<Client> {
        match &self.server {
            Some(server) => self.remote(server).await,
            None => local(&self.socket).await,
        }
    }

    async fn remote(&self, server: &str) -> anyhow::Result<Client> {
        let need = |file: &Option<PathBuf>, option: &str| {
            file.clone().ok_or_else(|| {
                anyhow!(
                    "--server {server} needs --{option} too; `handover pki issue DIR operator NAME` makes the files"
                )
            })
        };
        let files = TlsFiles {
            ca: need(&self.ca, "ca")?,
            cert: need(&self.cert, "cert")?,
            key: need(&self.key, "key")?,
        };
        let tls = Tls::load(&files).context("certificates")?;
        let channel = tls.connect(Role::Controller, &self.server_name, server).await?;
        Ok(ControllerClient::new(channel))
    }
}

async fn local(socket: &Path) -> anyhow::Result<Client> {
    // connected here first: the reason why it fails is lost in the channel
    let stream = UnixStream::connect(socket).await.map_err(|e| {
        let path = socket.display();
        match e.kind() {
            ErrorKind::NotFound => anyhow!(
                "no controller here: there is no socket {path}; start handover-controller, or name its socket with --socket, or one elsewhere with --server"
            ),
            ErrorKind::ConnectionRefused => anyhow!(
                "no controller here: nobody listens on the socket {path}; start handover-controller, or name another socket with --socket"
            ),
            ErrorKind::PermissionDenied => anyhow!(
                "not allowed to use the socket {path}; ask as a member of the group that owns it, or as root"
            ),
            _ => anyhow::Error::from(e).context(format!("socket {path}")),
        }
    })?;
    let mut stream = Some(stream);
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let (first, path) = (stream.take(), path.clone());
        async move {
            match first {
                Some(stream) => Ok(TokioIo::new(stream)),
                None => UnixStream::connect(path).await.map(TokioIo::new),
            }
        }
    });
    let channel = Endpoint::from_static("http://controller")
        .connect_with_connector(connector)
        .await
        .with_context(|| format!("socket {}", socket.display()))?;
    Ok(ControllerClient::new(channel))
}
