//! Peers for the controller's tests: a gateway and two migrators that speak the real protocol over mutual TLS on
//! loopback, keep to its rules, and misbehave on request. They move nothing: the true daemons are tested in the lab.
#![allow(dead_code, missing_docs)] // each test file uses its part

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use handover_api::{
    tls::{self, Role, Tls, TlsFiles},
    v1::{
        self,
        gateway_server::{Gateway, GatewayServer},
        migrator_server::{Migrator, MigratorServer},
    },
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::AbortHandle,
};
use tonic::{Code, Request, Response, Status, transport::Server};

/// What a peer does instead of answering.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Refuses, and does nothing.
    Refuse(Code, &'static str),
    /// Does it, but the connection breaks before the answer.
    LoseAnswer,
    /// Never answers, and does nothing.
    Hang,
    /// Does it and answers, but this peer is gone from then on.
    ThenDown(&'static str),
}

/// A TCP proxy in front of a peer: connections can be cut, and the peer be away.
pub struct Door {
    pub endpoint: String,
    away: AtomicBool,
    open: Mutex<Vec<AbortHandle>>,
}

impl Door {
    async fn to(backend: String) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let door = Arc::new(Self {
            endpoint: listener.local_addr().unwrap().to_string(),
            away: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let this = Arc::clone(&door);
        tokio::spawn(async move {
            while let Ok((mut caller, _)) = listener.accept().await {
                if this.away.load(Ordering::SeqCst) {
                    continue; // closed at once
                }
                let backend = backend.clone();
                let task = tokio::spawn(async move {
                    if let Ok(mut server) = TcpStream::connect(backend).await {
                        let _ = caller.set_nodelay(true);
                        let _ = server.set_nodelay(true);
                        let _ = tokio::io::copy_bidirectional(&mut caller, &mut server).await;
                    }
                });
                this.open.lock().unwrap().push(task.abort_handle());
            }
        });
        door
    }

    pub fn cut(&self) {
        self.open.lock().unwrap().drain(..).for_each(|t| t.abort());
    }

    pub fn down(&self) {
        self.away.store(true, Ordering::SeqCst);
        self.cut();
    }

    pub fn up(&self) {
        self.away.store(false, Ordering::SeqCst);
    }
}

/// What the peers share: the calls they got, the faults they are to have.
#[derive(Default)]
pub struct Stage {
    calls: Mutex<Vec<String>>,
    faults: Mutex<BTreeMap<String, VecDeque<Fault>>>,
    doors: Mutex<BTreeMap<String, Arc<Door>>>,
    findings: Mutex<BTreeMap<String, v1::Finding>>,
    called: Notify,
}

impl Stage {
    /// Calls so far that change something, e.g. "gw stage film-1".
    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    pub fn count(&self, call: &str) -> usize {
        self.calls().iter().filter(|c| *c == call).count()
    }

    pub fn forget_calls(&self) {
        self.calls.lock().unwrap().clear();
    }

    /// The next call `what` ("gw stage") meets with `fault`.
    pub fn fault(&self, what: &str, fault: Fault) {
        self.faults.lock().unwrap().entry(what.into()).or_default().push_back(fault);
    }

    pub fn no_faults(&self) {
        self.faults.lock().unwrap().clear();
    }

    pub fn find(&self, who: &str, finding: v1::Finding) {
        self.findings.lock().unwrap().insert(who.into(), finding);
    }

    pub fn door(&self, who: &str) -> Arc<Door> {
        Arc::clone(&self.doors.lock().unwrap()[who])
    }

    /// Resolves when a call that starts with `prefix` has come.
    pub async fn until_called(&self, prefix: &str) {
        loop {
            let next = self.called.notified();
            if self.calls().iter().any(|c| c.starts_with(prefix)) {
                return;
            }
            next.await;
        }
    }

    fn findings_of(&self, who: &str) -> Vec<v1::Finding> {
        self.findings.lock().unwrap().get(who).cloned().into_iter().collect()
    }

    /// Around a call: notes it, meets it with its fault.
    async fn call<T>(
        &self,
        who: &str,
        what: &str,
        migration: &str,
        act: impl FnOnce() -> Result<T, Status>,
    ) -> Result<Response<T>, Status> {
        self.calls.lock().unwrap().push(format!("{who} {what} {migration}"));
        self.called.notify_waiters();
        let fault =
            self.faults.lock().unwrap().get_mut(&format!("{who} {what}")).and_then(VecDeque::pop_front);
        match fault {
            None => act().map(Response::new),
            Some(Fault::Refuse(code, why)) => Err(Status::new(code, why)),
            Some(Fault::LoseAnswer) => {
                let _ = act()?;
                self.door(who).cut();
                std::future::pending().await
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::ThenDown(whom)) => {
                self.door(whom).down();
                act().map(Response::new)
            }
        }
    }
}

/// A gateway that keeps to the protocol.
pub struct FakeGateway {
    name: String,
    stage: Arc<Stage>,
    pub state: Mutex<GatewayState>,
}

#[derive(Debug, Default, Clone)]
pub struct GatewayState {
    pub boot: u32,
    pub revision: u64,
    pub configured: u32,
    /// user -> network
    pub users: BTreeMap<String, String>,
    /// migration -> (from, to, users, switched)
    pub staged: BTreeMap<String, (String, String, Vec<String>, bool)>,
    /// migrations whose users' frames are held
    pub held: BTreeSet<String>,
}

impl FakeGateway {
    /// Loses everything it does not persist, as a new start of the daemon does.
    pub fn reboot(&self) {
        let mut s = self.state.lock().unwrap();
        *s = GatewayState { boot: s.boot + 1, configured: s.configured, ..GatewayState::default() };
    }

    pub fn network_of(&self, user: &str) -> String {
        self.state.lock().unwrap().users[user].clone()
    }
}

#[tonic::async_trait]
impl Gateway for FakeGateway {
    async fn configure(
        &self,
        request: Request<v1::ConfigureRequest>,
    ) -> Result<Response<v1::ConfigureResponse>, Status> {
        tls::require_role(&request, &[Role::Controller])?;
        let r = request.into_inner();
        let mut s = self.state.lock().unwrap();
        if r.revision < s.revision {
            return Err(Status::failed_precondition("an older revision"));
        }
        s.revision = r.revision;
        s.configured += 1;
        s.users = r
            .users
            .into_iter()
            .map(|u| (u.name.clone(), s.users.get(&u.name).cloned().unwrap_or(u.network)))
            .collect();
        Ok(Response::new(v1::ConfigureResponse {}))
    }

    async fn status(
        &self,
        request: Request<v1::GatewayStatusRequest>,
    ) -> Result<Response<v1::GatewayStatus>, Status> {
        tls::require_role(&request, &[Role::Controller])?;
        let s = self.state.lock().unwrap();
        let user = |(name, network): (&String, &String)| v1::UserStatus {
            name: name.clone(),
            network: network.clone(),
            ..Default::default()
        };
        Ok(Response::new(v1::GatewayStatus {
            name: self.name.clone(),
            boot_id: format!("boot-{}", s.boot),
            revision: s.revision,
            users: s.users.iter().map(user).collect(),
            switches: s
                .staged
                .iter()
                .map(|(migration, (_, _, _, switched))| v1::SwitchStatus {
                    migration: migration.clone(),
                    state: if *switched { "switched" } else { "staged" }.into(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }))
    }

    async fn check_switch(
        &self,
        _: Request<v1::StageRequest>,
    ) -> Result<Response<v1::CheckResponse>, Status> {
        Ok(Response::new(v1::CheckResponse { findings: self.stage.findings_of(&self.name) }))
    }

    async fn stage(&self, request: Request<v1::StageRequest>) -> Result<Response<v1::StageResponse>, Status> {
        let r = request.into_inner();
        self.stage
            .call(&self.name, "stage", &r.migration, || {
                let mut s = self.state.lock().unwrap();
                if let Some(user) = r.users.iter().find(|u| s.users.get(*u) != Some(&r.from_network)) {
                    return Err(Status::failed_precondition(format!(
                        "user {user} is not on {}",
                        r.from_network
                    )));
                }
                s.staged.insert(r.migration.clone(), (r.from_network, r.to_network, r.users, false));
                Ok(v1::StageResponse { switch: 1, generation: 7, router_mac: "02:00:00:00:00:01".into() })
            })
            .await
    }

    async fn switch(
        &self,
        request: Request<v1::SwitchRequest>,
    ) -> Result<Response<v1::SwitchResponse>, Status> {
        let r = request.into_inner();
        self.stage
            .call(&self.name, "switch", &r.migration, || {
                let mut s = self.state.lock().unwrap();
                let Some((_, to, users, switched)) = s.staged.get_mut(&r.migration) else {
                    return Err(Status::failed_precondition("not staged"));
                };
                if *to != r.to_network
                    || handover_api::users::digest(users)[..] != r.users_digest
                    || (r.switch, r.generation) != (1, 7)
                {
                    return Err(Status::failed_precondition("not what was staged"));
                }
                *switched = true;
                let (to, users) = (to.clone(), users.clone());
                s.users.extend(users.into_iter().map(|u| (u, to.clone())));
                Ok(v1::SwitchResponse { window_ns: 2500, store_latency_ns: 40 })
            })
            .await
    }

    async fn hold(&self, request: Request<v1::HoldRequest>) -> Result<Response<v1::HoldResponse>, Status> {
        let r = request.into_inner();
        self.stage
            .call(&self.name, "hold", &r.migration, || {
                let mut s = self.state.lock().unwrap();
                let Some((_, _, users, switched)) = s.staged.get_mut(&r.migration) else {
                    return Err(Status::failed_precondition("not staged"));
                };
                if *switched || (r.switch, r.generation) != (1, 7) {
                    return Err(Status::failed_precondition("not what was staged"));
                }
                let users = users.len() as u32;
                s.held.insert(r.migration.clone());
                Ok(v1::HoldResponse { users, marker_sent: r.marker.is_some(), took_us: 80 })
            })
            .await
    }

    async fn abort(
        &self,
        request: Request<v1::AbortSwitchRequest>,
    ) -> Result<Response<v1::AbortSwitchResponse>, Status> {
        let r = request.into_inner();
        self.stage
            .call(&self.name, "abort", &r.migration, || {
                let mut s = self.state.lock().unwrap();
                let Some((from, _, users, was_switched)) = s.staged.remove(&r.migration) else {
                    return Ok(v1::AbortSwitchResponse::default());
                };
                s.users.extend(users.into_iter().map(|u| (u, from.clone())));
                let held = s.held.remove(&r.migration).then(figures);
                Ok(v1::AbortSwitchResponse { was_switched, held })
            })
            .await
    }

    async fn finish(
        &self,
        request: Request<v1::FinishSwitchRequest>,
    ) -> Result<Response<v1::FinishSwitchResponse>, Status> {
        let r = request.into_inner();
        self.stage
            .call(&self.name, "finish", &r.migration, || {
                let mut s = self.state.lock().unwrap();
                s.staged.remove(&r.migration);
                Ok(v1::FinishSwitchResponse { held: s.held.remove(&r.migration).then(figures) })
            })
            .await
    }
}

/// Of every hold here.
fn figures() -> v1::HoldFigures {
    v1::HoldFigures {
        frames: 12,
        bytes: 1200,
        dropped_user_bound: 2,
        dropped_memory: 1,
        lost: 4,
        late: 5,
        release_us: 90,
    }
}

/// A migrator that keeps to the protocol.
pub struct FakeMigrator {
    name: String,
    stage: Arc<Stage>,
    /// migration -> state
    pub state: Mutex<BTreeMap<String, &'static str>>,
    /// What it answers to Abort.
    pub alive: AtomicBool,
    /// How long a freeze takes.
    pub freeze: Mutex<Duration>,
}

impl FakeMigrator {
    fn go(&self, migration: &str, from: &[&str], to: &'static str) -> Result<(), Status> {
        let mut state = self.state.lock().unwrap();
        let now = state.get(migration).copied().unwrap_or("");
        if now != to && !from.contains(&now) {
            return Err(Status::failed_precondition(format!(
                "migration {migration} is `{now}`, cannot become `{to}`"
            )));
        }
        state.insert(migration.into(), to);
        Ok(())
    }
}

fn facts() -> v1::ProcessFacts {
    v1::ProcessFacts {
        pid: 4711,
        tree: vec![4711],
        memory_bytes: 8 << 20,
        established: 1,
        ..Default::default()
    }
}

fn timing(name: &str, started_us: u64, took_us: u64) -> v1::StepTiming {
    v1::StepTiming { name: name.into(), started_us, took_us }
}

#[tonic::async_trait]
impl Migrator for FakeMigrator {
    async fn status(
        &self,
        request: Request<v1::MigratorStatusRequest>,
    ) -> Result<Response<v1::MigratorStatus>, Status> {
        tls::require_role(&request, &[Role::Controller])?;
        Ok(Response::new(v1::MigratorStatus {
            name: self.name.clone(),
            criu_version: "4.2.1".into(),
            kernel: "6.18".into(),
            ..Default::default()
        }))
    }

    async fn preflight(
        &self,
        request: Request<v1::PreflightRequest>,
    ) -> Result<Response<v1::PreflightResponse>, Status> {
        tls::require_role(&request, &[Role::Controller])?;
        let r = request.into_inner();
        if r.user_addresses != ["10.1.0.100"] {
            return Err(Status::invalid_argument(format!("user_addresses: {:?}", r.user_addresses)));
        }
        let source = r.role() == v1::preflight_request::Role::Source;
        if !source && r.facts.is_none() {
            return Err(Status::invalid_argument("no facts"));
        }
        Ok(Response::new(v1::PreflightResponse {
            findings: self.stage.findings_of(&self.name),
            facts: source.then(facts),
        }))
    }

    async fn prepare(
        &self,
        request: Request<v1::PrepareRequest>,
    ) -> Result<Response<v1::PrepareResponse>, Status> {
        let r = request.into_inner();
        self.stage
            .call(&self.name, "prepare", &r.migration, || {
                self.go(&r.migration, &[""], "prepared")?;
                Ok(v1::PrepareResponse { facts: Some(facts()) })
            })
            .await
    }

    async fn freeze(
        &self,
        request: Request<v1::FreezeRequest>,
    ) -> Result<Response<v1::FreezeResponse>, Status> {
        let r = request.into_inner();
        let takes = *self.freeze.lock().unwrap();
        tokio::time::sleep(takes).await;
        self.stage
            .call(&self.name, "freeze", &r.migration, || {
                let to = if r.yield_with_vote { "yielded" } else { "voted" };
                self.go(&r.migration, &["prepared"], to)?;
                Ok(v1::FreezeResponse {
                    markers_seen: r.markers.len() as u32,
                    steps: vec![
                        timing("quiet", 2, 8),
                        timing("fence", 10, 20),
                        timing("dump", 30, 100),
                        timing("copy", 60, 200),
                        timing("restore", 260, 100),
                        timing("address", 360, 10),
                    ],
                    pid: 4711,
                    image_bytes: 5 << 20,
                    connections: 1,
                    losses: Vec::new(),
                })
            })
            .await
    }

    async fn r#yield(
        &self,
        request: Request<v1::YieldRequest>,
    ) -> Result<Response<v1::YieldResponse>, Status> {
        let r = request.into_inner();
        self.stage
            .call(&self.name, "yield", &r.migration, || {
                self.go(&r.migration, &["voted"], "yielded")?;
                Ok(v1::YieldResponse {})
            })
            .await
    }

    async fn resume(
        &self,
        request: Request<v1::ResumeRequest>,
    ) -> Result<Response<v1::ResumeResponse>, Status> {
        let r = request.into_inner();
        self.stage
            .call(&self.name, "resume", &r.migration, || {
                self.go(&r.migration, &[""], "resumed")?;
                Ok(v1::ResumeResponse { pid: 4711, steps: Vec::new() })
            })
            .await
    }

    async fn end(&self, request: Request<v1::EndRequest>) -> Result<Response<v1::EndResponse>, Status> {
        let r = request.into_inner();
        self.stage
            .call(&self.name, "end", &r.migration, || {
                self.go(&r.migration, &["yielded"], "ended")?;
                Ok(v1::EndResponse::default())
            })
            .await
    }

    async fn abort(
        &self,
        request: Request<v1::AbortMigrationRequest>,
    ) -> Result<Response<v1::AbortMigrationResponse>, Status> {
        let r = request.into_inner();
        self.stage
            .call(&self.name, "abort", &r.migration, || {
                self.go(&r.migration, &["", "prepared", "voted", "yielded"], "aborted")?;
                Ok(v1::AbortMigrationResponse { alive: self.alive.load(Ordering::SeqCst) })
            })
            .await
    }
}

/// A gateway, two migrators, certificates, and a directory for a controller.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub stage: Arc<Stage>,
    pub gateway: Arc<FakeGateway>,
    pub main: Arc<FakeMigrator>,
    pub backup: Arc<FakeMigrator>,
    pub inventory: String,
}

pub fn issue(ca: &Path, role: Role, name: &str) -> TlsFiles {
    tls::issue(ca, ca, role, name).unwrap()
}

impl Fixture {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        tls::init_authority(dir.path()).unwrap();
        let stage = Arc::new(Stage::default());
        let gateway =
            Arc::new(FakeGateway { name: "gw".into(), stage: stage.clone(), state: Mutex::default() });
        let migrator = |name: &str| {
            Arc::new(FakeMigrator {
                name: name.into(),
                stage: stage.clone(),
                state: Mutex::default(),
                alive: AtomicBool::new(true),
                freeze: Mutex::default(),
            })
        };
        let (main, backup) = (migrator("main-server"), migrator("backup-server"));
        let ca = dir.path();
        let mut inventory = include_str!("inventory.toml").to_owned();
        for (name, role) in
            [("gw", Role::Gateway), ("main-server", Role::Migrator), ("backup-server", Role::Migrator)]
        {
            let tls = Tls::load(&issue(ca, role, name)).unwrap();
            let router = match name {
                "gw" => Server::builder().add_service(GatewayServer::from_arc(gateway.clone())),
                "main-server" => Server::builder().add_service(MigratorServer::from_arc(main.clone())),
                _ => Server::builder().add_service(MigratorServer::from_arc(backup.clone())),
            };
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let door = Door::to(listener.local_addr().unwrap().to_string()).await;
            inventory = inventory.replace(&format!("@{name}@"), &door.endpoint);
            stage.doors.lock().unwrap().insert(name.into(), door);
            tokio::spawn(router.serve_with_incoming(tls.incoming(listener)));
        }
        issue(ca, Role::Controller, "controller");
        Self { dir, stage, gateway, main, backup, inventory }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn tls(&self) -> Tls {
        Tls::load(&TlsFiles {
            ca: self.path("ca.pem"),
            cert: self.path("controller-controller.pem"),
            key: self.path("controller-controller.key"),
        })
        .unwrap()
    }

    /// A configuration file for the daemon; `listen` for callers from elsewhere.
    pub fn config(&self, listen: &str) -> PathBuf {
        let file = self.path("controller.toml");
        let d = self.dir.path().display();
        let text = format!(
            "name = \"controller\"\nlisten = \"{listen}\"\nsocket = \"{d}/controller.sock\"\nstate_dir = \"{d}/state\"\n\
             [tls]\nca = \"{d}/ca.pem\"\ncert = \"{d}/controller-controller.pem\"\nkey = \"{d}/controller-controller.key\"\n"
        );
        std::fs::write(&file, text).unwrap();
        file
    }

    /// What no history may contain, whatever went wrong.
    pub fn no_contradiction(&self, migration: &str) {
        let calls = self.stage.calls();
        let has = |what: &[&str]| {
            calls.iter().any(|c| {
                let mut words = c.split(' ').skip(1);
                what.contains(&words.next().unwrap()) && words.next() == Some(migration)
            })
        };
        assert!(!(has(&["abort"]) && has(&["resume", "end", "finish"])), "{calls:?}");
    }
}
