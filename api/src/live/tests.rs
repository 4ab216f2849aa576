//! Real connections over loopback, before and after the files have changed.

use std::path::Path;

use tonic::{Code, transport::Channel};

use super::*;
use crate::{
    audit::{Audit, Entry},
    gate::{Gate, Rate, Rules},
    tls::{init_authority, issue},
    v1::{
        self, GetSessionRequest, ListSessionsRequest, StatusRequest, controller_client::ControllerClient,
        controller_server::ControllerServer,
    },
};

/// Answers with who asks; acts for operators alone.
#[derive(Default)]
struct Who;

#[tonic::async_trait]
impl v1::controller_server::Controller for Who {
    async fn status(
        &self,
        request: tonic::Request<StatusRequest>,
    ) -> Result<tonic::Response<v1::StatusResponse>, tonic::Status> {
        let peer = crate::tls::peer(&request)?;
        Ok(tonic::Response::new(v1::StatusResponse { version: peer.to_string(), ..Default::default() }))
    }
    async fn migrate(
        &self,
        request: tonic::Request<v1::MigrateRequest>,
    ) -> Result<tonic::Response<v1::MigrateResponse>, tonic::Status> {
        crate::tls::require_role(&request, &[Role::Operator])?;
        crate::gate::subject(&request, &request.get_ref().service);
        Ok(tonic::Response::new(v1::MigrateResponse::default()))
    }
    async fn apply(
        &self,
        _: tonic::Request<v1::ApplyRequest>,
    ) -> Result<tonic::Response<v1::ApplyResponse>, tonic::Status> {
        Err(tonic::Status::invalid_argument("no inventory at all"))
    }
    async fn list_sessions(
        &self,
        _: tonic::Request<ListSessionsRequest>,
    ) -> Result<tonic::Response<v1::ListSessionsResponse>, tonic::Status> {
        Err(tonic::Status::internal("not in this test"))
    }
    async fn get_session(
        &self,
        _: tonic::Request<GetSessionRequest>,
    ) -> Result<tonic::Response<v1::Session>, tonic::Status> {
        Err(tonic::Status::internal("not in this test"))
    }
    type WatchSessionStream = tokio_stream::Empty<Result<v1::Session, tonic::Status>>;
    async fn watch_session(
        &self,
        _: tonic::Request<GetSessionRequest>,
    ) -> Result<tonic::Response<Self::WatchSessionStream>, tonic::Status> {
        Err(tonic::Status::internal("not in this test"))
    }
    async fn cancel_session(
        &self,
        _: tonic::Request<v1::CancelSessionRequest>,
    ) -> Result<tonic::Response<v1::Session>, tonic::Status> {
        std::future::pending().await
    }
    async fn resolve_session(
        &self,
        _: tonic::Request<v1::ResolveSessionRequest>,
    ) -> Result<tonic::Response<v1::ResolveSessionResponse>, tonic::Status> {
        Err(tonic::Status::internal("not in this test"))
    }
    async fn list_audit(
        &self,
        _: tonic::Request<v1::ListAuditRequest>,
    ) -> Result<tonic::Response<v1::ListAuditResponse>, tonic::Status> {
        Err(tonic::Status::internal("not in this test"))
    }
}

fn authority() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    init_authority(dir.path()).unwrap();
    dir
}

/// Files of `role` `name` by `ca`, in a directory of their own.
fn files(ca: &Path, role: Role, name: &str) -> (tempfile::TempDir, TlsFiles) {
    let dir = tempfile::tempdir().unwrap();
    let issued = issue(ca, dir.path(), role, name).unwrap();
    let files = TlsFiles { ca: dir.path().join("ca.pem"), ..issued };
    fs::copy(ca.join("ca.pem"), &files.ca).unwrap();
    (dir, files)
}

/// Replaces files by those of `role` `name` by `ca`.
fn replace(old: &TlsFiles, ca: &Path, role: Role, name: &str) {
    let (_dir, new) = files(ca, role, name);
    for (from, to) in [(&new.ca, &old.ca), (&new.cert, &old.cert), (&new.key, &old.key)] {
        // as it should be done: a new file in the place of the old one
        let aside = to.with_extension("new");
        fs::copy(from, &aside).unwrap();
        fs::rename(aside, to).unwrap();
    }
}

/// A certificate of `ca` that was valid until yesterday.
fn expired(ca: &Path, of: &TlsFiles, role: Role, name: &str) {
    let key = rcgen::KeyPair::from_pem(&fs::read_to_string(&of.key).unwrap()).unwrap();
    let ca_key = rcgen::KeyPair::from_pem(&fs::read_to_string(ca.join("ca.key")).unwrap()).unwrap();
    let issuer =
        rcgen::Issuer::from_ca_cert_pem(&fs::read_to_string(ca.join("ca.pem")).unwrap(), ca_key).unwrap();
    let mut params = rcgen::CertificateParams::new(vec![dns_name(role, name)]).unwrap();
    let uri = format!("handover://{role}/{name}");
    params.subject_alt_names.push(rcgen::SanType::URI(uri.as_str().try_into().unwrap()));
    params.extended_key_usages =
        vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    fs::write(&of.cert, params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
}

async fn serve(tls: &Tls, gate: Gate) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    let server = tonic::transport::Server::builder()
        .layer(gate)
        .add_service(ControllerServer::new(Who))
        .serve_with_incoming(tls.incoming(listener));
    tokio::spawn(server);
    endpoint
}

fn open_gate() -> Gate {
    Gate::new(Rules::DAEMON, None)
}

async fn ask(channel: Channel) -> Result<String, tonic::Status> {
    Ok(ControllerClient::new(channel).status(StatusRequest {}).await?.into_inner().version)
}

async fn connect(tls: &Tls, endpoint: &str) -> Result<String, String> {
    let channel = tls.connect(Role::Controller, "c", endpoint).await.map_err(|e| e.to_string())?;
    ask(channel).await.map_err(|e| e.to_string())
}

#[tokio::test]
async fn new_connections_use_new_certificates_and_those_that_stand_go_on() {
    let (old, new) = (authority(), authority());
    let (_s, server_files) = files(old.path(), Role::Controller, "c");
    let (_c, client_files) = files(old.path(), Role::Operator, "max");
    let (server, client) = (Tls::load(&server_files).unwrap(), Tls::load(&client_files).unwrap());
    let endpoint = serve(&server, open_gate()).await;
    let standing = client.connect(Role::Controller, "c", &endpoint).await.unwrap();
    assert_eq!(ask(standing.clone()).await.unwrap(), "operator max");

    // everything by another authority: the server first
    replace(&server_files, new.path(), Role::Controller, "c");
    server.reload().unwrap();
    assert!(connect(&client, &endpoint).await.is_err(), "the old authority is no longer taken");
    assert_eq!(ask(standing.clone()).await.unwrap(), "operator max");
    replace(&client_files, new.path(), Role::Operator, "max");
    client.reload().unwrap();
    assert_eq!(connect(&client, &endpoint).await.unwrap(), "operator max");
    let stranger = Tls::load(&files(old.path(), Role::Operator, "max").1).unwrap();
    assert!(connect(&stranger, &endpoint).await.is_err());
}

#[tokio::test]
async fn a_lazy_channel_reconnects_with_the_certificates_of_the_moment() {
    let (old, new) = (authority(), authority());
    let (_s, server_files) = files(old.path(), Role::Controller, "c");
    let (_c, client_files) = files(old.path(), Role::Operator, "max");
    let (server, client) = (Tls::load(&server_files).unwrap(), Tls::load(&client_files).unwrap());
    let endpoint = serve(&server, open_gate()).await;
    let channel = client.connect_lazy(Role::Controller, "c", &endpoint).unwrap();
    replace(&server_files, new.path(), Role::Controller, "c");
    server.reload().unwrap();
    ask(channel.clone()).await.unwrap_err();
    replace(&client_files, new.path(), Role::Operator, "max");
    client.reload().unwrap();
    // the same channel
    assert_eq!(ask(channel).await.unwrap(), "operator max");
}

#[tokio::test]
async fn files_that_cannot_be_used_leave_the_old_ones_in_use_and_are_named() {
    let (ca, other) = (authority(), authority());
    let (_s, server_files) = files(ca.path(), Role::Controller, "c");
    let (_c, client_files) = files(ca.path(), Role::Operator, "max");
    let (server, client) = (Tls::load(&server_files).unwrap(), Tls::load(&client_files).unwrap());
    let endpoint = serve(&server, open_gate()).await;
    let good: Vec<_> = [&server_files.ca, &server_files.cert, &server_files.key]
        .map(|p| (p.clone(), fs::read(p).unwrap()))
        .into();
    let (_o, others) = files(other.path(), Role::Controller, "c");
    type Spoil<'a> = Box<dyn Fn() + 'a>;
    let cases: [(&str, Spoil<'_>); 8] = [
        ("no PEM certificate in it", Box::new(|| fs::write(&server_files.cert, "").unwrap())),
        ("no PEM private key", Box::new(|| fs::write(&server_files.key, "nonsense").unwrap())),
        ("no PEM certificate in it", Box::new(|| fs::write(&server_files.ca, "nonsense").unwrap())),
        ("No such file", Box::new(|| fs::remove_file(&server_files.key).unwrap())),
        ("is not the key of", Box::new(|| assert!(fs::copy(&others.key, &server_files.key).unwrap() > 0))),
        (
            "no peer would take it",
            Box::new(|| {
                fs::copy(&others.key, &server_files.key).unwrap();
                fs::copy(&others.cert, &server_files.cert).unwrap();
            }),
        ),
        ("expired", Box::new(|| expired(ca.path(), &server_files, Role::Controller, "c"))),
        (
            "it is for controller d, not for controller c",
            Box::new(|| replace(&server_files, ca.path(), Role::Controller, "d")),
        ),
    ];
    for (want, spoil) in cases {
        spoil();
        let e = server.reload().unwrap_err();
        let source = std::error::Error::source(&e).map(ToString::to_string).unwrap_or_default();
        let words = format!("{e}: {source}").to_lowercase();
        assert!(words.contains(&want.to_lowercase()), "{want}: {words}");
        assert_eq!(connect(&client, &endpoint).await.unwrap(), "operator max", "{want}");
        for (path, bytes) in &good {
            fs::write(path, bytes).unwrap();
        }
        server.reload().unwrap();
    }
}

#[tokio::test]
async fn an_expired_certificate_is_not_taken_from_a_caller() {
    let ca = authority();
    let (_s, server_files) = files(ca.path(), Role::Controller, "c");
    let (_c, client_files) = files(ca.path(), Role::Operator, "max");
    expired(ca.path(), &client_files, Role::Operator, "max");
    let (server, client) = (Tls::load(&server_files).unwrap(), Tls::load(&client_files).unwrap());
    assert!(client.unfit().unwrap().contains("xpired"));
    assert_eq!(server.unfit(), None);
    let endpoint = serve(&server, open_gate()).await;
    assert!(connect(&client, &endpoint).await.is_err());
}

#[tokio::test]
async fn files_that_change_are_followed() {
    let (old, new) = (authority(), authority());
    let (_s, server_files) = files(old.path(), Role::Controller, "c");
    let (_c, client_files) = files(new.path(), Role::Operator, "max");
    let server = Tls::load(&server_files).unwrap();
    let endpoint = serve(&server, open_gate()).await;
    let following = tokio::spawn(server.clone().follow());
    let client = Tls::load(&client_files).unwrap();
    assert!(connect(&client, &endpoint).await.is_err());
    replace(&server_files, new.path(), Role::Controller, "c");
    let followed = async {
        while connect(&client, &endpoint).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(60), followed).await.unwrap();
    following.abort();
}

#[tokio::test]
async fn a_caller_that_says_nothing_holds_up_nobody() {
    let ca = authority();
    let (_s, server_files) = files(ca.path(), Role::Controller, "c");
    let (_c, client_files) = files(ca.path(), Role::Operator, "max");
    let (server, client) = (Tls::load(&server_files).unwrap(), Tls::load(&client_files).unwrap());
    let endpoint = serve(&server, open_gate()).await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(&endpoint).await.unwrap());
    }
    assert_eq!(connect(&client, &endpoint).await.unwrap(), "operator max");
}

const FEW: Rules =
    Rules { acts: &["Migrate", "CancelSession"], acting: Rate::new(1, 3), looking: Rate::new(1, 2) };

fn seen(audit: &Audit) -> Vec<(String, String, String, String)> {
    let all = audit.last(1000).unwrap();
    assert_eq!(all.damaged, 0);
    all.entries
        .into_iter()
        .map(|Entry { peer, call, subject, outcome, .. }| (peer, call, subject, outcome))
        .collect()
}

#[tokio::test]
async fn each_peer_has_its_own_rate_and_what_acts_is_written_down() {
    let (ca, dir) = (authority(), tempfile::tempdir().unwrap());
    let audit = Audit::open(dir.path()).unwrap();
    let (_s, server_files) = files(ca.path(), Role::Controller, "c");
    let endpoint = serve(&Tls::load(&server_files).unwrap(), Gate::new(FEW, Some(audit.clone()))).await;
    let operator = async |name: &str| {
        let (_dir, files) = files(ca.path(), Role::Operator, name);
        let channel = Tls::load(&files).unwrap().connect(Role::Controller, "c", &endpoint).await.unwrap();
        ControllerClient::new(channel)
    };
    let (mut max, mut mia) = (operator("max").await, operator("mia").await);
    let migrate = || v1::MigrateRequest { service: "film".into(), ..Default::default() };
    let mut above = 0;
    for _ in 0..30 {
        if let Err(e) = max.migrate(migrate()).await {
            assert_eq!(e.code(), Code::ResourceExhausted);
            assert!(
                e.message().contains("operator max asks too often: 1 calls of this kind per second"),
                "{e}"
            );
            assert!(e.message().contains("ask again in "), "{e}");
            above += 1;
        }
    }
    assert!(above > 0);
    // nobody else pays for it, and looking is counted apart
    mia.migrate(migrate()).await.unwrap();
    max.status(StatusRequest {}).await.unwrap();
    let seen = seen(&audit);
    let of = |who: &str, outcome: &str| {
        seen.iter().filter(|(p, c, _, o)| p == who && c == "Controller/Migrate" && o == outcome).count()
    };
    assert_eq!(of("operator max", "done"), 30 - above);
    assert_eq!(of("operator mia", "done"), 1);
    // one line for a row of calls above the rate
    assert!((1..above.max(2)).contains(&of("operator max", "ResourceExhausted")), "{seen:?}");
    assert!(seen.iter().all(|(_, _, s, o)| o != "done" || s == "film"), "{seen:?}");
}

#[tokio::test]
async fn who_may_not_and_asks_on_is_not_served_and_cannot_fill_the_log() {
    let (ca, dir) = (authority(), tempfile::tempdir().unwrap());
    let audit = Audit::open(dir.path()).unwrap();
    let (_s, server_files) = files(ca.path(), Role::Controller, "c");
    let endpoint =
        serve(&Tls::load(&server_files).unwrap(), Gate::new(Rules::DAEMON, Some(audit.clone()))).await;
    let (_c, client_files) = files(ca.path(), Role::Viewer, "eve");
    let channel = Tls::load(&client_files).unwrap().connect(Role::Controller, "c", &endpoint).await.unwrap();
    let mut eve = ControllerClient::new(channel);
    let mut last = None;
    for _ in 0..500 {
        last = Some(eve.migrate(v1::MigrateRequest::default()).await.unwrap_err());
    }
    let last = last.unwrap();
    assert_eq!(last.code(), Code::ResourceExhausted, "{last}");
    assert!(last.message().contains("too many calls of viewer eve were refused for its role"), "{last}");
    let seen = seen(&audit);
    assert!(seen.len() < 100, "{}", seen.len());
    assert_eq!(
        seen[0],
        ("viewer eve".into(), "Controller/Migrate".into(), String::new(), "PermissionDenied".into())
    );
}

#[tokio::test]
async fn a_call_whose_caller_goes_away_is_written_down() {
    let (ca, dir) = (authority(), tempfile::tempdir().unwrap());
    let audit = Audit::open(dir.path()).unwrap();
    let (_s, server_files) = files(ca.path(), Role::Controller, "c");
    let endpoint = serve(&Tls::load(&server_files).unwrap(), Gate::new(FEW, Some(audit.clone()))).await;
    let (_c, client_files) = files(ca.path(), Role::Operator, "max");
    let channel = Tls::load(&client_files).unwrap().connect(Role::Controller, "c", &endpoint).await.unwrap();
    let mut max = ControllerClient::new(channel);
    let call = max.cancel_session(v1::CancelSessionRequest { session: "film-1".into() });
    timeout(Duration::from_millis(200), call).await.unwrap_err();
    let written = async {
        while seen(&audit).is_empty() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), written).await.unwrap();
    assert_eq!(seen(&audit)[0].3, "Cancelled");
}
