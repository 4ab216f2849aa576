//! This server: its configuration, what it can do, and the migrations it takes part in.

use std::{
    collections::BTreeMap,
    future::Future,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use handover_api::{
    tls::Tls,
    v1::{Finding, ProcessFacts, ServiceSpec, finding::Severity, migrator_peer_client::MigratorPeerClient},
};
use tokio::sync::{MutexGuard, watch};
use tonic::{Code, Status, transport::Channel};

use crate::{
    address::Addresses,
    config::Config,
    criu::{self, Swrk},
    error::{Error, Result, chain},
    fence,
    freezer::Hierarchy,
    marker::Markers,
    record::{self, Record, Store, TOMBSTONES, Timing},
    sockets, transfer,
};

/// Logs of failed migrations that are kept.
const LOGS: usize = 16;

/// A call that did not do what it was asked, as the caller gets it.
#[derive(Debug)]
pub struct Failure {
    /// gRPC status code.
    pub code: Code,
    /// The step and the reason.
    pub message: String,
}

impl Failure {
    /// With this code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The state of things forbids it.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, message)
    }

    /// The request makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// In this step.
    pub fn at(step: &str, error: &Error) -> Self {
        Self::new(Code::Aborted, format!("{step}: {}", chain(error)))
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self::new(Code::Internal, chain(&e))
    }
}

impl From<Failure> for Status {
    fn from(f: Failure) -> Self {
        Self::new(f.code, f.message)
    }
}

/// Answer of a call.
pub type Answer<T> = std::result::Result<T, Failure>;

/// A service as a request names it, checked.
#[derive(Debug, Clone)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// The virtual IP v.
    pub address: Ipv4Addr,
    /// How to find its process.
    pub target: Option<handover_api::v1::Target>,
}

impl Service {
    /// Of a request.
    ///
    /// # Errors
    /// INVALID_ARGUMENT names what is missing or wrong.
    pub fn parse(spec: Option<ServiceSpec>) -> Answer<Self> {
        let spec = spec.ok_or_else(|| Failure::invalid("the request names no service"))?;
        if spec.name.is_empty() {
            return Err(Failure::invalid("the service has no name"));
        }
        let address =
            spec.address.parse::<Ipv4Addr>().ok().filter(|a| !a.is_unspecified() && !a.is_loopback());
        let address = address.ok_or_else(|| {
            Failure::invalid(format!(
                "service {}: address {:?} is no IPv4 address that could move; write e.g. 203.0.113.10",
                spec.name, spec.address
            ))
        })?;
        Ok(Self { name: spec.name, address, target: spec.target })
    }
}

/// Measures the steps of one call.
pub struct Clock {
    received: Instant,
    steps: Vec<Timing>,
}

impl Clock {
    /// Starts with the receipt of a call.
    pub fn start() -> Self {
        Self { received: Instant::now(), steps: Vec::new() }
    }

    /// Runs a step and notes it, also if it fails.
    pub async fn step<T>(&mut self, name: &str, work: impl Future<Output = T>) -> T {
        let started = Instant::now();
        let result = work.await;
        self.note(name, started);
        result
    }

    /// Notes a step that began at `started` and ends now.
    pub fn note(&mut self, name: &str, started: Instant) {
        let us = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        let timing = Timing {
            name: name.into(),
            started_us: us(started.duration_since(self.received)),
            took_us: us(started.elapsed()),
        };
        tracing::info!(step = name, took_us = timing.took_us, "done");
        self.steps.push(timing);
    }

    /// All steps.
    pub fn finish(self) -> Vec<Timing> {
        self.steps
    }
}

/// One migration on this server.
pub struct Migration {
    /// Its id.
    pub id: String,
    /// True: whoever works on it gives up at the next safe point.
    cancel: watch::Sender<bool>,
    live: tokio::sync::Mutex<Live>,
    /// What `live.record` says, for those that must not wait for the lock.
    view: Mutex<Option<Record>>,
}

/// What belongs to a migration while the daemon lives.
#[derive(Default)]
pub struct Live {
    /// As last made durable; none before the first step.
    pub record: Option<Record>,
    /// CRIU, from *prepare* or *reserve* on.
    pub swrk: Option<Swrk>,
    /// CRIU waits for the answer to `post-dump`.
    pub held: bool,
    /// CRIU died at work: it may have left sockets in repair mode.
    pub broken: bool,
    /// The destination.
    pub peer: Option<MigratorPeerClient<Channel>>,
    /// Where gateways' markers arrive, if they are to send any.
    pub markers: Option<Markers>,
    /// What was found at *prepare*.
    pub facts: Option<ProcessFacts>,
    /// What CRIU has to be told of the tree.
    pub needs: criu::Needs,
    /// What has been received.
    pub received: Option<transfer::Volume>,
}

impl Migration {
    fn new(id: &str, record: Option<Record>) -> Arc<Self> {
        Arc::new(Self {
            id: id.into(),
            cancel: watch::Sender::new(false),
            view: Mutex::new(record.clone()),
            live: tokio::sync::Mutex::new(Live { record, ..Live::default() }),
        })
    }

    /// Exclusive use of the migration.
    pub async fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().await
    }

    /// Asks whoever has the lock to give up, and waits for the lock.
    pub async fn interrupt(&self) -> MutexGuard<'_, Live> {
        self.cancel.send_replace(true);
        let live = self.live.lock().await;
        self.cancel.send_replace(false);
        live
    }

    /// Completes when somebody asks to give up.
    pub async fn cancelled(&self) {
        let mut cancel = self.cancel.subscribe();
        // the sender lives as long as `self`
        let _ = cancel.wait_for(|c| *c).await;
    }

    /// The record as last made durable.
    pub fn view(&self) -> Option<Record> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// This server.
pub struct Node {
    /// As read at the start.
    pub config: Config,
    /// For calls to other migrators.
    pub tls: Tls,
    /// Interface addresses and routes.
    pub addresses: Addresses,
    /// What was found of CRIU.
    pub criu: criu::Probe,
    /// What this server lacks: (code, message, remedy).
    pub problems: Vec<(&'static str, String, String)>,
    hierarchy: Option<Hierarchy>,
    store: Store,
    migrations: Mutex<BTreeMap<String, Arc<Migration>>>,
}

impl Node {
    /// Finds out what this server can do, and reads the records.
    ///
    /// # Errors
    /// A record or a directory is unusable. That the kernel or CRIU lacks something is no error: preflight tells.
    pub async fn open(config: Config, tls: Tls) -> Result<Arc<Self>> {
        record::make_private_dir(&config.image_dir)?;
        let (store, records) = Store::open(&config.records_dir())?;
        let addresses = Addresses::open()?;
        addresses.check_interface(&config.interface).await?;

        let mut problems = Vec::new();
        let hierarchy = match Hierarchy::find(config.cgroup.as_deref()).and_then(|h| h.probe().map(|()| h)) {
            Ok(hierarchy) => Some(hierarchy),
            Err(e) => {
                problems.push((
                    "cgroup",
                    chain(&e),
                    "use a kernel with cgroup v2 (5.14 or later)".to_owned(),
                ));
                None
            }
        };
        if let Err(e) = probe_fence() {
            problems.push((
                "nftables",
                chain(&e),
                "use a kernel with nftables (CONFIG_NF_TABLES_INET, CONFIG_NF_TABLES_ARP)".to_owned(),
            ));
        }
        if let Err(e) = sockets::tcp() {
            problems.push(("sock-diag", chain(&e), "use a kernel with CONFIG_INET_DIAG".to_owned()));
        }
        let criu = criu::probe(&config.criu).await;
        problems.extend(criu.problem.clone());
        for (code, message, remedy) in &problems {
            tracing::warn!(code, remedy, "{message}");
        }
        let migrations = records
            .into_iter()
            .map(|r| (r.migration.clone(), Migration::new(&r.migration.clone(), Some(r))))
            .collect();
        Ok(Arc::new(Self {
            config,
            tls,
            addresses,
            criu,
            problems,
            hierarchy,
            store,
            migrations: Mutex::new(migrations),
        }))
    }

    /// The cgroup hierarchy.
    ///
    /// # Errors
    /// This server has none.
    pub fn hierarchy(&self) -> Result<&Hierarchy> {
        self.hierarchy.as_ref().ok_or_else(|| Error::other("this server has no usable cgroup v2 hierarchy"))
    }

    fn table(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Migration>>> {
        self.migrations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The migration `id`, known or new.
    ///
    /// # Errors
    /// `id` cannot be one.
    pub fn entry(&self, id: &str) -> Answer<Arc<Migration>> {
        record::check_id(id).map_err(|e| Failure::invalid(e.to_string()))?;
        Ok(self.table().entry(id.into()).or_insert_with(|| Migration::new(id, None)).clone())
    }

    /// The migration `id`, if it is known.
    pub fn get(&self, id: &str) -> Option<Arc<Migration>> {
        self.table().get(id).cloned()
    }

    /// All migrations.
    pub fn all(&self) -> Vec<Arc<Migration>> {
        self.table().values().cloned().collect()
    }

    /// Forgets a migration that has not become anything.
    pub fn forget(&self, id: &str) {
        self.table().retain(|key, m| key != id || m.view().is_some());
    }

    /// A migration under way, other than `except`, that moves `address`.
    pub fn busy_with(&self, address: Ipv4Addr, except: &str) -> Option<Record> {
        self.all().iter().filter_map(|m| m.view()).find(|r| {
            r.address == address && r.migration != except && r.recovery() != crate::machine::Recovery::Nothing
        })
    }

    /// Makes the changed record durable; only then is it `live`'s.
    ///
    /// # Errors
    /// Of the file system; what stood before still stands.
    pub fn commit(&self, migration: &Migration, live: &mut Live, mut record: Record) -> Result<()> {
        self.store.write(&mut record)?;
        tracing::info!(
            migration = migration.id,
            role = record.role_name(),
            state = record.state_name(),
            "state"
        );
        *migration.view.lock().unwrap_or_else(PoisonError::into_inner) = Some(record.clone());
        live.record = Some(record);
        Ok(())
    }

    /// Drops the oldest finished migrations beyond [`TOMBSTONES`].
    pub fn prune(&self) {
        let mut finished: Vec<(u64, String)> = self
            .all()
            .iter()
            .filter_map(|m| m.view())
            .filter(|r| r.recovery() == crate::machine::Recovery::Nothing)
            .map(|r| (r.updated_ms, r.migration))
            .collect();
        finished.sort();
        let surplus = finished.len().saturating_sub(TOMBSTONES);
        for (_, id) in finished.into_iter().take(surplus) {
            match self.store.remove(&id) {
                Ok(()) => {
                    self.table().remove(&id);
                }
                Err(e) => tracing::warn!(migration = id, error = chain(&e), "old record"),
            }
        }
    }

    /// Where the images of `migration` are.
    pub fn images(&self, migration: &str) -> PathBuf {
        self.config.image_dir.join(migration)
    }

    /// Removes the images of `migration`. Succeeds when there are none.
    ///
    /// # Errors
    /// Of the file system.
    pub fn drop_images(&self, migration: &str) -> Result<()> {
        let dir = self.images(migration);
        match std::fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("removing", dir.display())(e))
            }
            _ => Ok(()),
        }
    }

    /// Keeps CRIU's log of a failure, and says why CRIU failed.
    pub fn criu_failure(&self, migration: &str, log: &'static str) -> String {
        let images = self.images(migration);
        if let Err(e) = criu::keep_log(&images, log, &self.config.logs_dir(), migration, LOGS) {
            tracing::warn!(migration, error = chain(&e), "keeping CRIU's log");
        }
        criu::reason(&images, log)
    }

    /// A finding of this server.
    pub fn finding(
        &self,
        severity: Severity,
        code: &str,
        message: impl Into<String>,
        remedy: &str,
    ) -> Finding {
        Finding {
            severity: severity.into(),
            code: code.into(),
            reporter: format!("migrator {}", self.config.name),
            message: message.into(),
            remedy: remedy.into(),
        }
    }
}

/// Whether a fence can be set: for a moment, around an address reserved for documentation (RFC 5737).
fn probe_fence() -> Result<()> {
    let name = format!("probe-{}", std::process::id());
    fence::set(&name, Ipv4Addr::new(192, 0, 2, 1), fence::Strength::All)?;
    fence::lift(&name)
}

/// A new, empty, private directory.
///
/// # Errors
/// Of the file system.
pub fn fresh_dir(dir: &Path) -> Result<()> {
    if dir.exists() {
        std::fs::remove_dir_all(dir).map_err(Error::io("removing", dir.display()))?;
    }
    record::make_private_dir(dir)
}
