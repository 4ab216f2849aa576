//! Certificates as they are now: TLS connections are made with the files of the moment, so that certificates are replaced
//! without a restart of anything.
//!
//! - A connection, taken or made, uses what was loaded last; one that stands stays as it is.
//! - [`Tls::follow`] looks at the files every [`LOOK`] seconds, and at once on SIGHUP. New ones are taken only if they are whole: they
//!   can be read, the key belongs to the certificate, the certificate is valid now, comes from the authority beside it and names
//!   the role and name it named before. Else the old ones stay in use, and the log says why, once per change.
//! - A caller that does not finish its handshake within [`HANDSHAKE`] is dropped; there are at most [`CONNECTIONS`] at a time.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    pin::Pin,
    sync::{Arc, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tokio_rustls::{
    TlsAcceptor, TlsConnector, client,
    rustls::{
        self, ClientConfig, RootCertStore, ServerConfig,
        crypto::CryptoProvider,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
        server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    },
    server,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{
    Endpoint, Uri,
    server::{Connected, TcpConnectInfo, TlsConnectInfo},
};
use tower::Service as _;

use crate::tls::{CONNECT, Peer, Role, Tls, TlsError, TlsFiles, dns_name, parse_identity, read};

/// How often the files are looked at.
pub const LOOK: Duration = Duration::from_secs(2);
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Connections at a time, those in their handshake included.
const CONNECTIONS: usize = 1024;
/// What HTTP/2 is called in a handshake.
const HTTP2: &[u8] = b"h2";

/// What the files were when they were read: a change of any of them is a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stamp([Option<(i64, i64, u64, u64)>; 3]);

impl Stamp {
    fn of(files: &TlsFiles) -> Self {
        Self([&files.ca, &files.cert, &files.key].map(|path| {
            let m = fs::metadata(path).ok()?;
            Some((m.mtime(), m.mtime_nsec(), m.ino(), m.len()))
        }))
    }
}

/// One state of the three files, ready for use.
pub(crate) struct Loaded {
    stamp: Stamp,
    leaf: CertificateDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    callers: Arc<dyn ClientCertVerifier>,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

impl Loaded {
    /// Reads the files; the key has to be that of the certificate.
    pub(crate) fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        // before the files: what changes while they are read is a change
        let stamp = Stamp::of(files);
        let unfit = |path: &std::path::Path, why: String| TlsError::Unfit { path: path.into(), why };
        let certificates = |path: &std::path::Path| {
            let pem = read(path)?;
            let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
            match all {
                Ok(all) if !all.is_empty() => Ok(all),
                Ok(_) => Err(unfit(path, "there is no PEM certificate in it".into())),
                Err(e) => Err(unfit(path, format!("it is no PEM certificate: {e}"))),
            }
        };
        let mut roots = RootCertStore::empty();
        for root in certificates(&files.ca)? {
            roots
                .add(root)
                .map_err(|e| unfit(&files.ca, format!("it is no authority's certificate: {e}")))?;
        }
        let roots = Arc::new(roots);
        let mut chain = certificates(&files.cert)?;
        let key = || {
            PrivateKeyDer::from_pem_slice(&read(&files.key)?)
                .map_err(|e| unfit(&files.key, format!("it is no PEM private key: {e}")))
        };
        let callers = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .build()
            .map_err(|e| unfit(&files.ca, e.to_string()))?;
        let versions = |e: rustls::Error| unfit(&files.cert, e.to_string());
        let belongs = |e: rustls::Error| {
            unfit(&files.key, format!("it is not the key of certificate {}: {e}", files.cert.display()))
        };
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(versions)?
            .with_client_cert_verifier(Arc::clone(&callers))
            .with_single_cert(chain.clone(), key()?)
            .map_err(belongs)?;
        server.alpn_protocols = vec![HTTP2.to_vec()];
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(versions)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain.clone(), key()?)
            .map_err(belongs)?;
        client.alpn_protocols = vec![HTTP2.to_vec()];
        let leaf = chain.remove(0);
        Ok(Self { stamp, leaf, chain, callers, server: Arc::new(server), client: Arc::new(client) })
    }

    /// Whom the certificate names.
    fn identity(&self) -> Option<Peer> {
        parse_identity(&self.leaf)
    }

    /// Whether a peer with the same authority would take this certificate now.
    fn verify(&self) -> Result<(), String> {
        let verified = self.callers.verify_client_cert(&self.leaf, &self.chain, UnixTime::now());
        verified.map(drop).map_err(|e| e.to_string())
    }
}

impl Tls {
    fn now(&self) -> Arc<Loaded> {
        Arc::clone(&self.loaded.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Why these certificates would not be taken by a peer that has the same authority's; `None`: they would.
    pub fn unfit(&self) -> Option<String> {
        self.now().verify().err()
    }

    /// Takes the files as they are now, if they are whole and for the same role and name.
    ///
    /// # Errors
    /// Which file, and why; the certificates in use stay.
    pub fn reload(&self) -> Result<(), TlsError> {
        let new = Loaded::read(&self.files)?;
        let unfit = |why: String| TlsError::Unfit { path: self.files.cert.clone(), why };
        new.verify().map_err(|e| unfit(format!("no peer would take it: {e}")))?;
        let (was, is) = (self.now().identity(), new.identity());
        if was != is {
            let name = |p: Option<Peer>| p.map_or_else(|| "nobody".to_owned(), |p| p.to_string());
            return Err(unfit(format!("it is for {}, not for {}", name(is), name(was))));
        }
        *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        Ok(())
    }

    /// Takes new files whenever they change, and on SIGHUP, for ever.
    ///
    /// # Errors
    /// Signals cannot be listened for.
    pub async fn follow(self) -> io::Result<()> {
        let mut hangup = signal(SignalKind::hangup())?;
        let mut looked_at = self.now().stamp.clone();
        let cert = self.files.cert.display().to_string();
        loop {
            let asked = tokio::select! {
                _ = hangup.recv() => true,
                () = tokio::time::sleep(LOOK) => false,
            };
            let stamp = Stamp::of(&self.files);
            if !asked && stamp == looked_at {
                continue;
            }
            match self.reload() {
                Ok(()) => tracing::info!(cert, "new certificates are in use for new connections"),
                Err(e) => {
                    let why = std::error::Error::source(&e).map_or(String::new(), |s| format!(": {s}"));
                    tracing::error!(cert, "new certificates cannot be used, the old ones stay: {e}{why}");
                }
            }
            looked_at = stamp;
        }
    }

    /// The connections that come to `listener`, once their callers have shown a certificate of the authority.
    pub fn incoming(&self, listener: TcpListener) -> ReceiverStream<io::Result<Connection>> {
        let (ready, stream) = mpsc::channel(16);
        tokio::spawn(self.clone().accept(listener, ready));
        ReceiverStream::new(stream)
    }

    /// Until nobody takes connections any more.
    async fn accept(self, listener: TcpListener, ready: mpsc::Sender<io::Result<Connection>>) {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let next = async {
                // the semaphore is never closed
                let permit = Arc::clone(&room).acquire_owned().await.ok();
                (permit, listener.accept().await)
            };
            let (permit, accepted) = tokio::select! {
                next = next => next,
                () = ready.closed() => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // out of descriptors, or the caller has gone: others may do better
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Some(permit) = permit else { return };
            // a small answer would wait for the caller's delayed acknowledgement, 40 ms with the service standing still
            let _ = stream.set_nodelay(true);
            let (acceptor, ready) = (TlsAcceptor::from(Arc::clone(&self.now().server)), ready.clone());
            tokio::spawn(async move {
                match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    Ok(Ok(tls)) => {
                        // whoever took them may have ended
                        let _ = ready.send(Ok(Connection { tls, _permit: permit })).await;
                    }
                    Ok(Err(error)) => tracing::info!(%error, "a caller was refused in the handshake"),
                    Err(_) => tracing::info!("a caller did not finish the handshake"),
                }
            });
        }
    }

    /// How channels to `role` `name` at `endpoint` are made: with the certificates of the moment of each connection.
    pub(crate) fn dialer(
        &self,
        role: Role,
        name: &str,
        stall: Option<Duration>,
    ) -> impl tower::Service<
        Uri,
        Response = TokioIo<client::TlsStream<TcpStream>>,
        Error = io::Error,
        Future: Send + 'static,
    >
    + Send
    + 'static
    + use<> {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_tcp_user_timeout(stall);
        let (tls, name) = (self.clone(), dns_name(role, name));
        tower::service_fn(move |uri: Uri| {
            let (mut tcp, tls, name) = (tcp.clone(), tls.clone(), name.clone());
            async move {
                std::future::poll_fn(|cx| tcp.poll_ready(cx)).await.map_err(io::Error::other)?;
                let stream = tcp.call(uri).await.map_err(io::Error::other)?.into_inner();
                let name = ServerName::try_from(name).map_err(io::Error::other)?;
                let connector = TlsConnector::from(Arc::clone(&tls.now().client));
                Ok(TokioIo::new(connector.connect(name, stream).await?))
            }
        })
    }
}

/// The address of an endpoint without TLS of tonic's own: ours is made by [`Tls::dialer`].
pub(crate) fn plain(endpoint: &str) -> Result<Endpoint, tonic::transport::Error> {
    Endpoint::from_shared(format!("http://{endpoint}"))
}

/// A connection over TLS. Counted for as long as it lasts.
#[derive(Debug)]
pub struct Connection {
    tls: server::TlsStream<TcpStream>,
    _permit: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = TlsConnectInfo<TcpConnectInfo>;
    fn connect_info(&self) -> Self::ConnectInfo {
        self.tls.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }
}

#[cfg(test)]
mod tests;
