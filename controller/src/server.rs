//! Where the controller can be asked: a local socket (mode 0660) and, if configured, mutual TLS.
//!
//! A socket file that nobody listens on any more (left by a crash) is replaced; one that somebody does is not.

use std::{
    fs, io,
    os::unix::{fs::FileTypeExt as _, net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
    sync::Arc,
};

use handover_api::{
    audit::Audit,
    gate::{Gate, Rules},
    tls::Tls,
    v1::controller_server::ControllerServer,
};
use nix::sys::stat::{Mode, umask};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::{config::Config, controller::Controller, service::Service};

/// Calls at a time on one connection.
const CALLS: usize = 64;

/// Errors of the listeners.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket cannot be made.
    #[error("socket {}", path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody listens there.
    #[error("socket {}: a handover-controller listens there already", path.display())]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// The address cannot be listened on.
    #[error("listening on {address}")]
    Listen {
        /// Which.
        address: std::net::SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Serving failed.
    #[error("serving")]
    Serve(#[from] tonic::transport::Error),
}

/// The listeners, bound: from here on connections are accepted.
#[derive(Debug)]
pub struct Listeners {
    path: PathBuf,
    unix: UnixListener,
    tcp: Option<TcpListener>,
}

impl Listeners {
    /// Binds what the configuration names.
    ///
    /// # Errors
    /// [`ServerError`] names the socket or address.
    pub async fn bind(config: &Config) -> Result<Self, ServerError> {
        let unix = bind_socket(&config.socket)?;
        let tcp = match config.listen {
            None => None,
            Some(address) => {
                let listener = TcpListener::bind(address).await;
                Some(listener.map_err(|source| ServerError::Listen { address, source })?)
            }
        };
        Ok(Self { path: config.socket.clone(), unix, tcp })
    }

    /// Serves until dropped.
    ///
    /// # Errors
    /// [`ServerError`] if serving fails.
    pub async fn serve(
        self,
        controller: Arc<Controller>,
        tls: &Tls,
        audit: Audit,
    ) -> Result<(), ServerError> {
        let _remove = RemoveOnDrop(self.path);
        let gate = Gate::new(Rules::CONTROLLER, Some(audit.clone()));
        let service = ControllerServer::new(Service::new(controller, audit));
        let builder = || Server::builder().concurrency_limit_per_connection(CALLS).layer(gate.clone());
        let local =
            builder().add_service(service.clone()).serve_with_incoming(UnixListenerStream::new(self.unix));
        match self.tcp {
            None => local.await?,
            Some(tcp) => {
                let remote = builder().add_service(service).serve_with_incoming(tls.incoming(tcp));
                tokio::try_join!(local, remote)?;
            }
        }
        Ok(())
    }
}

struct RemoveOnDrop(PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        // if it is gone already, all the better
        let _ = fs::remove_file(&self.0);
    }
}

fn bind_socket(path: &Path) -> Result<UnixListener, ServerError> {
    let failed = |source| ServerError::Socket { path: path.into(), source };
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(failed)?;
    }
    if let Ok(meta) = fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            let what =
                io::Error::new(io::ErrorKind::AlreadyExists, "exists and is no socket; name another one");
            return Err(failed(what));
        }
        if StdUnixStream::connect(path).is_ok() {
            return Err(ServerError::InUse { path: path.into() });
        }
        fs::remove_file(path).map_err(failed)?;
    }
    // nobody else may ever connect, not even between bind and chmod
    let before = umask(Mode::from_bits_truncate(0o117));
    let listener = UnixListener::bind(path);
    umask(before);
    listener.map_err(failed)
}
