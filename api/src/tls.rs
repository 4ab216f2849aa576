//! Mutually authenticated channels, and who may call what.
//!
//! Every daemon and every remote operator holds a certificate of one private authority. A certificate names one
//! *role* and one *name*, both as a URI (`handover://migrator/main-server`, what servers check of their callers) and as
//! a DNS name (`main-server.migrator.handover`, what callers check of the server whatever address it was reached at).
//!
//! Invariants:
//! - a server has no method without a role check ([`require_role`]);
//! - a caller never trusts an address: [`connect`] demands the certificate of the daemon it means;
//! - private keys are written with mode 0600 and never logged.

use std::{
    fmt, fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, RwLock},
    time::Duration,
};

use tonic::{
    Extensions, Request, Status,
    transport::{
        Channel, Endpoint,
        server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo},
    },
};

use crate::live::{self, Loaded};

/// How long one attempt to connect may take.
pub(crate) const CONNECT: Duration = Duration::from_millis(750);

/// What a holder of a certificate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// `handover-controller`.
    Controller,
    /// `handover-gateway`.
    Gateway,
    /// `handover-migrator`.
    Migrator,
    /// A person or program that may ask the controller for anything.
    Operator,
    /// A person or program that may only look.
    Viewer,
}

impl Role {
    const ALL: [Self; 5] = [Self::Controller, Self::Gateway, Self::Migrator, Self::Operator, Self::Viewer];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Gateway => "gateway",
            Self::Migrator => "migrator",
            Self::Operator => "operator",
            Self::Viewer => "viewer",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|r| r.as_str() == s)
            .ok_or_else(|| format!("role `{s}` is none of controller, gateway, migrator, operator, viewer"))
    }
}

/// The caller of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// Came over TLS with a certificate of the authority.
    Remote {
        /// What it is.
        role: Role,
        /// Who it is.
        name: String,
    },
    /// Came over the local socket, which its file permissions guard.
    Local {
        /// Effective user id of the calling process.
        uid: u32,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Remote { role, name } => write!(f, "{role} {name}"),
            Self::Local { uid } => write!(f, "local user {uid}"),
        }
    }
}

/// Errors of certificates and channels.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read or written.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not what it has to be.
    #[error("{}: {why}", path.display())]
    Unfit {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A name that cannot stand in a certificate.
    #[error("`{0}` cannot be a name: use 1 to 63 of a-z, 0-9 and `-`, not starting or ending with `-`")]
    Name(String),
    /// Making a certificate failed.
    #[error("certificate for {subject}")]
    Issue {
        /// For whom.
        subject: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// A channel could not be set up.
    #[error("connecting to {role} {name} at {endpoint}")]
    Connect {
        /// What was called.
        role: Role,
        /// Who was called.
        name: String,
        /// host:port.
        endpoint: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
}

/// Where a daemon's certificate, key and the authority's certificate are (PEM files).
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// This daemon's certificate.
    pub cert: PathBuf,
    /// This daemon's private key.
    pub key: PathBuf,
}

/// Certificate, key and authority, as they were loaded last ([`crate::live`]). Clones share them.
#[derive(Clone)]
pub struct Tls {
    pub(crate) files: TlsFiles,
    pub(crate) loaded: Arc<RwLock<Arc<Loaded>>>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls { .. }") // what is loaded holds a private key
    }
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::File { path: path.into(), source })
}

impl Tls {
    /// Loads the three files.
    ///
    /// # Errors
    /// [`TlsError`] names the file that cannot be used.
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let loaded = Arc::new(RwLock::new(Arc::new(Loaded::read(files)?)));
        Ok(Self { files: files.clone(), loaded })
    }

    /// An endpoint at `endpoint` (host:port). Keep-alive finds a dead peer within about two seconds, so a call never hangs on a
    /// host that has gone away. An attempt to connect is given up before the kernel would repeat its SYN: the next one finds a
    /// network that has healed at once.
    fn endpoint(role: Role, name: &str, endpoint: &str) -> Result<Endpoint, TlsError> {
        Ok(live::plain(endpoint)
            .map_err(|source| TlsError::Connect {
                role,
                name: name.into(),
                endpoint: endpoint.into(),
                source,
            })?
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(Duration::from_millis(500))
            .keep_alive_timeout(Duration::from_millis(1500))
            .keep_alive_while_idle(true))
    }

    /// A channel to `role` `name` at `endpoint` (host:port) that connects when it is used, and again whenever the connection
    /// is lost, each time with the certificates of the moment.
    ///
    /// # Errors
    /// [`TlsError::Connect`] if `endpoint` is no host:port.
    pub fn connect_lazy(&self, role: Role, name: &str, endpoint: &str) -> Result<Channel, TlsError> {
        let target = Self::endpoint(role, name, endpoint)?;
        Ok(target.connect_with_connector_lazy(self.dialer(role, name, None)))
    }

    /// As [`Self::connect`], for calls that a frozen service waits for: the connection breaks once something sent has not
    /// been acknowledged for `stall`. It is the kernel that looks (TCP_USER_TIMEOUT), so a slow link, whose
    /// acknowledgements come late but come, is not taken for a dead one; pings see to it that there is something to
    /// acknowledge.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_watched(
        &self,
        role: Role,
        name: &str,
        endpoint: &str,
        stall: Duration,
    ) -> Result<Channel, TlsError> {
        let target = Self::endpoint(role, name, endpoint)?.http2_keep_alive_interval(stall / 2);
        target.connect_with_connector(self.dialer(role, name, Some(stall))).await.map_err(|source| {
            TlsError::Connect { role, name: name.into(), endpoint: endpoint.into(), source }
        })
    }

    /// Connects to `role` `name` at `endpoint` (host:port).
    ///
    /// # Errors
    /// [`TlsError::Connect`] if nobody answers there or it is not who it should be.
    pub async fn connect(&self, role: Role, name: &str, endpoint: &str) -> Result<Channel, TlsError> {
        let target = Self::endpoint(role, name, endpoint)?;
        target.connect_with_connector(self.dialer(role, name, None)).await.map_err(|source| {
            TlsError::Connect { role, name: name.into(), endpoint: endpoint.into(), source }
        })
    }
}

/// Who calls.
///
/// # Errors
/// `UNAUTHENTICATED` without a certificate that names a role, over anything but the local socket.
pub fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    peer_of(request.extensions())
}

/// [`peer`], of a request that is not decoded yet.
pub(crate) fn peer_of(extensions: &Extensions) -> Result<Peer, Status> {
    if let Some(uds) = extensions.get::<UdsConnectInfo>() {
        let uid =
            uds.peer_cred.map(|c| c.uid()).ok_or_else(|| Status::unauthenticated("unknown local user"))?;
        return Ok(Peer::Local { uid });
    }
    let none = || Status::unauthenticated("no client certificate was presented");
    let certs = extensions.get::<TlsConnectInfo<TcpConnectInfo>>().and_then(TlsConnectInfo::peer_certs);
    let certs = certs.ok_or_else(none)?;
    let leaf = certs.first().ok_or_else(none)?;
    parse_identity(leaf).ok_or_else(|| {
        Status::unauthenticated(
            "the client certificate names no Handover role; issue one with `handover pki issue`",
        )
    })
}

/// Who calls, if it is one of `roles`; the local socket counts as [`Role::Operator`].
///
/// # Errors
/// `UNAUTHENTICATED` as [`peer`], `PERMISSION_DENIED` for another role.
pub fn require_role<T>(request: &Request<T>, roles: &[Role]) -> Result<Peer, Status> {
    let peer = peer(request)?;
    let role = match &peer {
        Peer::Remote { role, .. } => *role,
        Peer::Local { .. } => Role::Operator,
    };
    if roles.contains(&role) {
        Ok(peer)
    } else {
        let allowed = roles.iter().map(Role::to_string).collect::<Vec<_>>().join(" or ");
        Err(Status::permission_denied(format!("{peer} may not call this: it is for the {allowed}")))
    }
}

pub(crate) fn parse_identity(der: &[u8]) -> Option<Peer> {
    use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    let names = cert.subject_alternative_name().ok()??;
    names.value.general_names.iter().find_map(|n| {
        let GeneralName::URI(uri) = n else { return None };
        let (role, name) = uri.strip_prefix("handover://")?.split_once('/')?;
        Some(Peer::Remote { role: role.parse().ok()?, name: name.to_owned() })
    })
}

pub(crate) fn dns_name(role: Role, name: &str) -> String {
    format!("{name}.{role}.handover")
}

fn check_name(name: &str) -> Result<(), TlsError> {
    let ok = (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if ok { Ok(()) } else { Err(TlsError::Name(name.into())) }
}

/// Makes a new authority: `ca.pem` and `ca.key` in `dir`.
///
/// # Errors
/// [`TlsError::File`] also if there is one already: replacing an authority would lock every daemon out.
pub fn init_authority(dir: &Path) -> Result<(), TlsError> {
    let issue = |source| TlsError::Issue { subject: "the authority".into(), source };
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(rcgen::DnType::CommonName, "Handover authority");
    let key = rcgen::KeyPair::generate().map_err(issue)?;
    let cert = params.self_signed(&key).map_err(issue)?;
    write_new(&dir.join("ca.key"), key.serialize_pem().as_bytes(), 0o600)?;
    write_new(&dir.join("ca.pem"), cert.pem().as_bytes(), 0o644)
}

/// Issues a certificate for `role` `name`: `ROLE-NAME.pem` and `ROLE-NAME.key` in `out`, signed by the authority in
/// `authority`. Returns the files, ready for [`Tls::load`].
///
/// # Errors
/// [`TlsError::Name`] for a name that cannot stand in a certificate, [`TlsError::File`] if a file cannot be read or
/// exists already.
pub fn issue(authority: &Path, out: &Path, role: Role, name: &str) -> Result<TlsFiles, TlsError> {
    check_name(name)?;
    let failed = |source| TlsError::Issue { subject: format!("{role} {name}"), source };
    let pem = |path: PathBuf| {
        read(&path).and_then(|b| {
            String::from_utf8(b).map_err(|e| TlsError::File {
                path: path.clone(),
                source: io::Error::new(io::ErrorKind::InvalidData, e),
            })
        })
    };
    let ca_path = authority.join("ca.pem");
    let ca_key = rcgen::KeyPair::from_pem(&pem(authority.join("ca.key"))?).map_err(failed)?;
    let issuer = rcgen::Issuer::from_ca_cert_pem(&pem(ca_path.clone())?, ca_key).map_err(failed)?;

    let mut params = rcgen::CertificateParams::new(vec![dns_name(role, name)]).map_err(failed)?;
    let uri = format!("handover://{role}/{name}");
    params.subject_alt_names.push(rcgen::SanType::URI(uri.as_str().try_into().map_err(failed)?));
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("{role} {name}"));
    params.extended_key_usages =
        vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let key = rcgen::KeyPair::generate().map_err(failed)?;
    let cert = params.signed_by(&key, &issuer).map_err(failed)?;

    let files = TlsFiles {
        ca: ca_path,
        cert: out.join(format!("{role}-{name}.pem")),
        key: out.join(format!("{role}-{name}.key")),
    };
    write_new(&files.key, key.serialize_pem().as_bytes(), 0o600)?;
    write_new(&files.cert, cert.pem().as_bytes(), 0o644)?;
    Ok(files)
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), TlsError> {
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut f| f.write_all(bytes))
        .map_err(|source| TlsError::File { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::v1::{
        GatewayStatus, GatewayStatusRequest, gateway_client::GatewayClient, gateway_server,
        gateway_server::GatewayServer,
    };

    fn authority() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        init_authority(dir.path()).unwrap();
        dir
    }

    #[test]
    fn a_second_authority_never_replaces_the_first() {
        let dir = authority();
        let before = fs::read(dir.path().join("ca.key")).unwrap();
        assert!(matches!(init_authority(dir.path()), Err(TlsError::File { .. })));
        assert_eq!(fs::read(dir.path().join("ca.key")).unwrap(), before);
    }

    #[test]
    fn keys_are_private() {
        let dir = authority();
        let files = issue(dir.path(), dir.path(), Role::Gateway, "gw").unwrap();
        for key in [files.key, dir.path().join("ca.key")] {
            assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn names_that_could_mean_something_else_are_refused() {
        let dir = authority();
        for name in ["", "a/b", "a.b", "A", "-a", "a-", "../x", &"x".repeat(64)] {
            let err = issue(dir.path(), dir.path(), Role::Gateway, name).unwrap_err();
            assert!(matches!(err, TlsError::Name(_)), "{name:?}: {err}");
        }
    }

    #[derive(Default)]
    struct OnlyForControllers;

    #[tonic::async_trait]
    impl gateway_server::Gateway for OnlyForControllers {
        async fn status(
            &self,
            request: Request<GatewayStatusRequest>,
        ) -> Result<tonic::Response<GatewayStatus>, Status> {
            let peer = require_role(&request, &[Role::Controller])?;
            Ok(tonic::Response::new(GatewayStatus { name: peer.to_string(), ..Default::default() }))
        }
        async fn configure(
            &self,
            _: Request<crate::v1::ConfigureRequest>,
        ) -> Result<tonic::Response<crate::v1::ConfigureResponse>, Status> {
            Err(Status::unimplemented("not in this test"))
        }
        async fn check_switch(
            &self,
            _: Request<crate::v1::StageRequest>,
        ) -> Result<tonic::Response<crate::v1::CheckResponse>, Status> {
            Err(Status::unimplemented("not in this test"))
        }
        async fn stage(
            &self,
            _: Request<crate::v1::StageRequest>,
        ) -> Result<tonic::Response<crate::v1::StageResponse>, Status> {
            Err(Status::unimplemented("not in this test"))
        }
        async fn switch(
            &self,
            _: Request<crate::v1::SwitchRequest>,
        ) -> Result<tonic::Response<crate::v1::SwitchResponse>, Status> {
            Err(Status::unimplemented("not in this test"))
        }
        async fn hold(
            &self,
            _: Request<crate::v1::HoldRequest>,
        ) -> Result<tonic::Response<crate::v1::HoldResponse>, Status> {
            Err(Status::unimplemented("not in this test"))
        }
        async fn abort(
            &self,
            _: Request<crate::v1::AbortSwitchRequest>,
        ) -> Result<tonic::Response<crate::v1::AbortSwitchResponse>, Status> {
            Err(Status::unimplemented("not in this test"))
        }
        async fn finish(
            &self,
            _: Request<crate::v1::FinishSwitchRequest>,
        ) -> Result<tonic::Response<crate::v1::FinishSwitchResponse>, Status> {
            Err(Status::unimplemented("not in this test"))
        }
    }

    /// Serves as gateway `gw` on loopback; returns its endpoint.
    async fn serve(ca: &Path) -> String {
        let tls = Tls::load(&issue(ca, ca, Role::Gateway, "gw").unwrap()).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let server = tonic::transport::Server::builder()
            .add_service(GatewayServer::new(OnlyForControllers))
            .serve_with_incoming(tls.incoming(listener));
        tokio::spawn(server);
        endpoint
    }

    fn client(ca: &Path, role: Role, name: &str) -> Tls {
        Tls::load(&issue(ca, ca, role, name).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn the_role_in_the_certificate_decides() {
        let ca = authority();
        let endpoint = serve(ca.path()).await;

        let controller = client(ca.path(), Role::Controller, "c1");
        let channel = controller.connect(Role::Gateway, "gw", &endpoint).await.unwrap();
        let status = GatewayClient::new(channel).status(GatewayStatusRequest::default()).await.unwrap();
        assert_eq!(status.into_inner().name, "controller c1");

        let migrator = client(ca.path(), Role::Migrator, "m1");
        let channel = migrator.connect(Role::Gateway, "gw", &endpoint).await.unwrap();
        let err = GatewayClient::new(channel).status(GatewayStatusRequest::default()).await.unwrap_err();
        assert_eq!(err.code(), tonic::Code::PermissionDenied);
    }

    #[tokio::test]
    async fn a_server_with_another_name_or_role_is_not_trusted() {
        let ca = authority();
        let endpoint = serve(ca.path()).await;
        let controller = client(ca.path(), Role::Controller, "c1");
        assert!(controller.connect(Role::Gateway, "gw2", &endpoint).await.is_err());
        assert!(controller.connect(Role::Migrator, "gw", &endpoint).await.is_err());
    }

    #[tokio::test]
    async fn a_certificate_of_another_authority_is_not_accepted() {
        let (ca, other) = (authority(), authority());
        let endpoint = serve(ca.path()).await;
        let files = issue(other.path(), other.path(), Role::Controller, "c1").unwrap();
        let stranger = Tls::load(&TlsFiles { ca: ca.path().join("ca.pem"), ..files }).unwrap();
        // TLS 1.3 reports the refusal of a client certificate on the first use of the channel at the latest
        let refused = match stranger.connect(Role::Gateway, "gw", &endpoint).await {
            Err(_) => true,
            Ok(channel) => GatewayClient::new(channel).status(GatewayStatusRequest::default()).await.is_err(),
        };
        assert!(refused);
    }
}
