//! The gRPC service: what the controller may ask of the gateway.
//!
//! Every call checks the caller's role, asks the [`Table`], and carries its writes out on the [`Plane`], both behind one
//! lock that is held for microseconds and never across an await. So a switch is one lock, one comparison, one store.
//!
//! Whatever has to wait does so outside the lock: introductions for the routers' answers, grace periods for program runs.
//! A grace period is waited for by a task of its own, so that indices are given back even if the caller has gone.
//!
//! With `pin_dir`, the data path goes on without the daemon, and a change goes to disk before it goes to the maps (see
//! [`crate::state`]); the next daemon reads the table, takes over from the maps what they know better, and makes them hold
//! what the table says. An answer that was lost with the daemon is given again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use gateway_ebpf::{
    frame::{TPID_8021AD, TPID_8021Q},
    words::Selector,
};
use handover_api::{
    tls::{Peer, Role, require_role},
    v1::{self, finding::Severity, gateway_server},
};
use tokio::task::JoinSet;
use tonic::{Code, Request, Response, Status};
use tracing::{debug, info, warn};

use crate::{
    caller::Remembered,
    config::Config,
    desired::{self, Desired, Invalid, Wiring},
    groups::{Budget, Copies, Group, Groups, Hearers, HearersByNetwork},
    introduce::{Asker, Heard, Introduced, Introducer, PATIENCE},
    link::Promiscuous,
    mac::Mac,
    onward::Marker,
    plane::{Plane, PlaneError, Side, grace_period, monotonic_ns},
    ports::{Mode, Port, Ports},
    release::Releaser,
    start::{self, Started},
    state::Store,
    table::{
        Asked, HoldFigures, HoldStep, Learned, Named, Refusal, Release, Retired, Snapshot, StageAnswer,
        StageStep, SwitchAnswer, SwitchStep, Table, Write,
    },
    watch::Watchers,
    windows::Windows,
};

pub use crate::start::StartError;

/// Which users a watcher is told by name.
const FEW: usize = 16;

/// How often routers that have not answered are asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How often routers that are known are asked again: one that was replaced without announcing it is found.
const REFRESH: Duration = Duration::from_secs(30);

/// The gateway; clones are the same one.
#[derive(Clone)]
pub struct Gateway(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    name: String,
    boot_id: String,
    wiring: Wiring,
    pin_dir: Option<PathBuf>,
    mode: Mode,
    pub(crate) ports: Ports,
    /// Of a data path that ends with the daemon; the other kind is promiscuous by itself.
    _promiscuous: Vec<Promiscuous>,
    /// By port of a WAN interface.
    introducers: BTreeMap<u16, Introducer>,
    /// By port of a WAN interface.
    groups: BTreeMap<u16, Groups>,
    /// By port of an access interface.
    copiers: BTreeMap<u16, Copies>,
    releaser: Releaser,
    /// Group frames' copies: sent, and not sent.
    copies: [AtomicU64; 2],
    /// Switches by their window.
    windows: Mutex<Windows>,
    /// Who looks on.
    pub(crate) watchers: Watchers,
    /// One user at a time is debugged.
    pub(crate) debugging: Arc<tokio::sync::Mutex<()>>,
    core: Mutex<Core>,
    /// Who may switch.
    switches_for: Remembered,
    /// Held through a `Configure`, so that two do not wait for one another's grace periods inside.
    configuring: tokio::sync::Mutex<()>,
    /// Where it is kept who is where, if the data path outlives the daemon. Held from before a change goes to disk until it
    /// is in the maps, so that changes follow one another the same way in both.
    store: Option<Arc<tokio::sync::Mutex<Store>>>,
}

/// What is behind the lock.
pub(crate) struct Core {
    pub table: Table,
    pub plane: Plane,
}

impl Gateway {
    /// Loads the programs, attaches them, and starts to listen for the routers. Has to be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`StartError`]; what was attached is detached again.
    pub fn start(config: &Config) -> Result<Self, StartError> {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(StartError::BootId)?;
        let Started { core, ports, store, promiscuous } = start::start(config)?;
        let sockets = start::sockets(&core, config.virtual_router_mac, &ports)?;
        let gateway = Self(Arc::new(Inner {
            name: config.name.clone(),
            boot_id: boot_id.trim().into(),
            wiring: config.wiring(),
            pin_dir: config.pin_dir.clone(),
            mode: config.mode,
            ports,
            _promiscuous: promiscuous,
            introducers: sockets.introducers,
            groups: sockets.groups,
            copiers: sockets.copiers,
            releaser: sockets.releaser,
            copies: Default::default(),
            windows: Mutex::default(),
            watchers: Watchers::new(),
            debugging: Arc::default(),
            core: Mutex::new(core),
            switches_for: Remembered::default(),
            configuring: tokio::sync::Mutex::default(),
            store: store.map(|store| Arc::new(tokio::sync::Mutex::new(store))),
        }));
        for port in gateway.0.ports.of(Side::Wan).map(|port| port.number) {
            gateway.clone().spawn_listener(port);
            gateway.clone().spawn_groups(port);
        }
        gateway.clone().spawn_asker();
        Ok(gateway)
    }

    /// The service, for a server.
    pub fn service(&self) -> gateway_server::GatewayServer<Self> {
        // a full configuration of MAX_USERS users is some 100 MB
        gateway_server::GatewayServer::new(self.clone()).max_decoding_message_size(256 << 20)
    }

    /// Changes table and maps; on disk first, where that is kept. In a task of its own: once begun, it is done.
    async fn change<T, F>(&self, change: F) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Fn(&mut Table) -> Result<(T, Vec<Write>), Refusal> + Send + 'static,
    {
        let gateway = self.clone();
        let task = tokio::spawn(async move {
            let _kept = match &gateway.0.store {
                None => None,
                Some(store) => {
                    let store = Arc::clone(store).lock_owned().await;
                    let snapshot = long(|| {
                        let mut next = gateway.core().table.clone();
                        change(&mut next)?;
                        Ok::<_, Refusal>(next.snapshot())
                    })?;
                    Some(save(store, snapshot).await?)
                }
            };
            long(|| {
                let mut core = gateway.core();
                // the same again: meanwhile only a switch can have been made, of another migration or refused here
                let (answer, writes) = change(&mut core.table)?;
                core.plane.apply(&writes).map_err(|e| internal(&e))?;
                Ok(answer)
            })
        });
        task.await.map_err(|error| Status::internal(error.to_string()))?
    }

    /// Has the disk follow what the maps already say.
    fn save_soon(&self) {
        let Some(store) = self.0.store.clone() else { return };
        let gateway = self.clone();
        tokio::spawn(async move {
            let store = store.lock_owned().await;
            let snapshot = long(|| gateway.core().table.snapshot());
            if let Err(status) = save(store, snapshot).await {
                tracing::error!(
                    error = status.message(),
                    "what the maps say could not be saved; the next change tries again"
                );
            }
        });
    }

    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        match self.0.core.try_lock() {
            Ok(core) => core,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // somebody changes many users: see there
            Err(TryLockError::WouldBlock) => {
                long(|| self.0.core.lock().unwrap_or_else(PoisonError::into_inner))
            }
        }
    }

    /// Tells who looks on.
    fn tell(&self, what: &str, change: impl FnOnce(v1::Change) -> v1::Change) {
        self.0.watchers.tell(|| change(v1::Change { what: what.into(), ..Default::default() }));
    }

    /// Tells that a switch has ended that was under way.
    fn tell_end(&self, what: &str, told: v1::Change, held: Option<HoldFigures>) {
        if told.users > 0 {
            self.tell(what, |change| v1::Change { what: change.what, held: held.map(Into::into), ..told });
        }
    }

    /// What is told of a switch that is under way.
    fn told_of(&self, migration: &str) -> v1::Change {
        let core = self.core();
        let Some((from, to, users, names)) = core.table.told_of(migration, FEW) else {
            return v1::Change { migration: migration.into(), ..Default::default() };
        };
        v1::Change {
            migration: migration.into(),
            from_network: from.into(),
            to_network: to.into(),
            users: users as u32,
            names,
            ..Default::default()
        }
    }

    /// Every counter, the programs' and the daemon's own.
    pub(crate) fn counters(&self, core: &Core) -> Result<Vec<v1::Counter>, PlaneError> {
        let copies = self.0.copies.each_ref().map(|copies| copies.load(Ordering::Relaxed));
        let of_programs =
            core.plane.counters()?.into_iter().map(|(outcome, frames)| (outcome.name(), frames));
        let all = of_programs.chain(GROUP_COUNTERS.into_iter().zip(copies));
        Ok(all.map(|(name, frames)| v1::Counter { name: name.into(), frames }).collect())
    }

    /// The switches under way.
    pub(crate) fn switches(core: &Core) -> Vec<v1::SwitchStatus> {
        core.table
            .switches()
            .map(|s| v1::SwitchStatus {
                switch: s.index.into(),
                migration: s.migration.into(),
                generation: s.generation,
                state: s.state.into(),
                from_network: s.from.into(),
                to_network: s.to.into(),
                users: s.users as u32,
                window_ns: s.window_ns,
                phase: s.phase.into(),
                held: (s.phase != "forward").then(|| core.plane.holds().figures(s.index).into()),
            })
            .collect()
    }

    /// Whether `request` is from somebody who may see who is where.
    ///
    /// # Errors
    /// PERMISSION_DENIED.
    pub(crate) fn may_look<T>(&self, request: &Request<T>) -> Result<(), Status> {
        self.may(request, MAY_LOOK)
    }

    /// Whether `request` is from one of `roles`; if from a gateway, from this one.
    ///
    /// # Errors
    /// PERMISSION_DENIED.
    pub(crate) fn may<T>(&self, request: &Request<T>, roles: &[Role]) -> Result<(), Status> {
        match require_role(request, roles)? {
            caller @ Peer::Remote { role: Role::Gateway, .. } if !matches!(&caller, Peer::Remote { name, .. } if *name == self.0.name) => {
                Err(Status::permission_denied(format!(
                    "{caller} may not ask gateway {} about its users",
                    self.0.name
                )))
            }
            _ => Ok(()),
        }
    }

    /// Learns the routers' MACs from what they say on one WAN interface.
    fn spawn_listener(self, port: u16) {
        tokio::spawn(async move {
            let Some(introducer) = self.0.introducers.get(&port) else { return };
            if let Err(error) = introducer.listen(|heard| self.learn(port, heard)).await {
                let wan = self.0.wiring.name(port);
                tracing::error!(wan, %error, "the routers cannot be heard any more");
            }
        });
    }

    /// Gives broadcast and multicast to the users of the network it came from.
    fn spawn_groups(self, port: u16) {
        tokio::spawn(async move {
            let Some(groups) = self.0.groups.get(&port) else { return };
            let mut budget = Budget::new(Instant::now());
            let (mut known, mut hearers) = (None, HearersByNetwork::new());
            let ended = groups.listen(|group| {
                {
                    let table = &self.core().table;
                    if known != Some(table.hearing()) {
                        (known, hearers) = (Some(table.hearing()), table.hearers());
                    }
                }
                if let Some(hearers) = hearers.get(&(port, group.tag)) {
                    self.give(group, hearers, &mut budget);
                }
            });
            if let Err(error) = ended.await {
                let wan = self.0.wiring.name(port);
                tracing::error!(wan, %error, "broadcast and multicast cannot be heard any more");
            }
        });
    }

    fn give(&self, mut group: Group<'_>, hearers: &Hearers, budget: &mut Budget) {
        if !group.translate(hearers, self.0.wiring.virtual_router_mac) {
            return;
        }
        let granted = budget.take(hearers.users.len(), Instant::now());
        let mut sent = 0;
        let mut room = Vec::new();
        for user in &hearers.users[..granted] {
            let Some(copier) = self.0.copiers.get(&user.port) else { continue };
            match copier.send(user.copy(group.frame, &mut room)) {
                Ok(()) => sent += 1,
                Err(error) => debug!(?user, %error, "a copy of a group frame could not be sent"),
            }
        }
        let [copied, not_copied] = &self.0.copies;
        copied.fetch_add(sent, Ordering::Relaxed);
        not_copied.fetch_add(hearers.users.len() as u64 - sent, Ordering::Relaxed);
    }

    fn learn(&self, port: u16, heard: Heard) {
        if heard.router == self.0.wiring.virtual_router_mac {
            warn!(
                ?heard,
                "a router has the virtual router's MAC: give the gateway another virtual_router_mac"
            );
            return;
        }
        let mut core = self.core();
        let Some(Learned { before, write }) =
            core.table.heard((port, heard.tag), heard.address, heard.router)
        else {
            debug!(?heard, "no network's router");
            return;
        };
        if let Some(write) = write {
            match before {
                None => {
                    info!(tag = heard.tag, address = %heard.address, mac = %heard.router, "router learned")
                }
                Some(before) => {
                    warn!(tag = heard.tag, address = %heard.address, mac = %heard.router, %before, "the router has changed");
                }
            }
            if let Err(error) = core.plane.apply(&[write]) {
                tracing::error!(%error, "the router's MAC could not be written");
            }
            drop(core);
            self.tell("router", |change| v1::Change {
                detail: format!(
                    "{} on interface {} is at {}",
                    heard.address,
                    self.0.wiring.name(port),
                    heard.router
                ),
                ..change
            });
            self.save_soon();
        }
    }

    /// Asks for all routers once, as those that are known may have been replaced while no daemon was there; then again for
    /// those that have not answered, and from time to time for the others.
    fn spawn_asker(self) {
        tokio::spawn(async move {
            let mut again = tokio::time::interval(ASK_AGAIN);
            let mut refresh = tokio::time::interval(REFRESH);
            loop {
                tokio::select! {
                    _ = refresh.tick() => {
                        let learned = self.core().table.routers(true);
                        for network in self.ask_routers(learned).await {
                            warn!("{}; its MAC is kept", silent(&network));
                        }
                    }
                    _ = again.tick() => { self.ask_unknown_routers().await; }
                }
            }
        });
    }

    /// Asks for every router that is not known, all at once; returns when each has answered or been silent too long.
    async fn ask_unknown_routers(&self) -> Vec<Asked> {
        let unknown = self.core().table.routers(false);
        self.ask_routers(unknown).await
    }

    async fn ask_routers(&self, routers: Vec<(Asked, Asker)>) -> Vec<Asked> {
        let mut asking = JoinSet::new();
        for (network, user) in routers {
            let gateway = self.clone();
            asking.spawn(async move {
                let answer = gateway.introduce(&network, &[user]).await;
                (network, answer)
            });
        }
        let mut silent = Vec::new();
        while let Some(done) = asking.join_next().await {
            match done {
                Ok((_, Ok(Introduced { router: Some(_), .. }))) => {}
                Ok((network, Ok(_))) => silent.push(network),
                Ok((network, Err(error))) => {
                    debug!(network = &*network.name, %error, "asking for the router");
                    silent.push(network);
                }
                Err(error) => warn!(%error, "asking for routers"),
            }
        }
        silent
    }

    async fn introduce(&self, network: &Asked, users: &[Asker]) -> io::Result<Introduced> {
        let place = network.place();
        match self.0.introducers.get(&place.port) {
            Some(introducer) => introducer.introduce(place, users).await,
            None => {
                Err(io::Error::new(io::ErrorKind::NotFound, "its WAN interface is not configured any more"))
            }
        }
    }

    /// Sends on what `migration` holds, to the old network (A) or the new one (B), if it holds anything. Whoever asks meanwhile
    /// waits for the same.
    async fn release(&self, migration: &str, to: Selector) -> Result<(), Status> {
        let answer = {
            let mut core = self.core();
            match core.table.release(migration, to)? {
                Release::NotHeld | Release::Done => return Ok(()),
                Release::Drain { index, word, slots } => {
                    core.plane.holds().begin_release(index, word);
                    self.0.releaser.release(index, slots)
                }
            }
        };
        let figures = answer
            .await
            .map_err(|_| Status::internal("held frames are not released: see the gateway's log"))?;
        info!(migration, ?to, ?figures, "released");
        self.core().table.released(migration, figures);
        Ok(())
    }

    /// Sends the marker, if there is a router to send it by.
    fn mark(&self, step: &HoldStep, address: Ipv4Addr, marker: v1::Marker) -> Result<bool, Status> {
        let port = marker.port as u16;
        let Some(router) = step.from.spec.router_mac.or(step.from.learned) else {
            warn!(network = &*step.from.name, "no marker is sent: the router's MAC is not known");
            return Ok(false);
        };
        let Some(user) = step.user else {
            info!("no marker is sent: no held user has both a MAC and an IPv4 address");
            return Ok(false);
        };
        let frame = Marker {
            from: user,
            router,
            link: step.from.spec.link(),
            to: (address, port),
            nonce: marker.nonce,
        };
        let wan = step.from.spec.port;
        self.0.releaser.send(wan, &frame.frame()).map_err(|error| {
            let wan = self.0.wiring.name(wan);
            Status::unavailable(format!("sending the marker on interface {wan}: {error}"))
        })?;
        Ok(true)
    }

    /// Gives indices back once no program run can name them.
    async fn retire(&self, retired: Retired) -> Result<(), Status> {
        if retired.is_empty() {
            return Ok(());
        }
        let gateway = self.clone();
        let waiting = tokio::task::spawn_blocking(move || {
            grace_period()?;
            gateway.core().table.reuse(retired);
            Ok::<_, PlaneError>(())
        });
        ended(waiting.await)
    }

    fn finding(&self, severity: Severity, code: &str, message: String, remedy: String) -> v1::Finding {
        v1::Finding {
            severity: severity.into(),
            code: code.into(),
            reporter: format!("gateway {}", self.0.name),
            message,
            remedy,
        }
    }

    /// What speaks against the interfaces with these numbers.
    fn check_links(&self, numbers: &BTreeSet<u16>) -> Vec<v1::Finding> {
        let mut findings = Vec::new();
        for link in numbers.iter().filter_map(|number| Some(&self.0.ports.get(*number)?.link)) {
            let trouble = match link.is_running() {
                Ok(true) => continue,
                Ok(false) => format!("interface {} is down or has no carrier", link.name),
                Err(error) => chain(&error),
            };
            let remedy = format!("`ip link set {} up`, and see that the other end is up", link.name);
            findings.push(self.finding(Severity::Error, "interface-down", trouble, remedy));
        }
        findings
    }

    /// Asks for the router of `network` as the gateway itself, which introduces nobody.
    async fn check_router(&self, network: &Asked) -> Option<v1::Finding> {
        let wan = self.0.wiring.name(network.spec.port);
        let nobody = [Asker { mac: None, v4: None, v6: None }];
        let trouble = match self.introduce(network, &nobody).await {
            Ok(Introduced { router: Some(_), .. }) => return None,
            Ok(_) => silent(network),
            Err(error) => format!("asking for the router on interface {}: {error}", wan),
        };
        let known = network.spec.router_mac.is_some();
        let severity = if known { Severity::Warning } else { Severity::Error };
        let remedy = if known {
            "its MAC is configured, so the users can be switched; but see that it is alive".into()
        } else {
            format!(
                "see that the router is up and that the provider carries VLAN {} to interface {}; or give `router_mac`",
                vid_text(network),
                wan
            )
        };
        Some(self.finding(severity, "router-silent", trouble, remedy))
    }

    /// After an introduction: is there a router to send to?
    fn router_or_refuse(&self, network: &Asked, answer: io::Result<Introduced>) -> Result<Mac, Status> {
        let (name, wan) = (&network.name, self.0.wiring.name(network.spec.port));
        let introduced = answer.map_err(|error| {
            Status::failed_precondition(format!(
                "introducing the users in network `{name}` on interface {}: {error}",
                wan
            ))
        })?;
        if introduced.unanswered > 0 {
            warn!(
                network = &**name,
                users = introduced.unanswered,
                "the router did not answer for all users"
            );
        }
        match (network.spec.router_mac, introduced.router) {
            (Some(configured), heard) => {
                if let Some(heard) = heard.filter(|heard| *heard != configured) {
                    warn!(network = &**name, %configured, %heard, "the router answers with another MAC than configured");
                }
                Ok(configured)
            }
            (None, Some(learned)) => Ok(learned),
            (None, None) => Err(Status::failed_precondition(format!(
                "{}: see that the router is up, that the provider carries VLAN {} to interface {} of gateway {}, and that its \
                 tags are visible there; or configure `router_mac` of the network",
                silent(network),
                vid_text(network),
                wan,
                self.0.name,
            ))),
        }
    }
}

/// Work that takes long with many users (a million: seconds). This thread's other tasks go on elsewhere meanwhile, among them
/// the connection whose call it is, which would else be taken for dead.
pub(crate) fn long<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

type HeldStore = tokio::sync::OwnedMutexGuard<Store>;

/// Puts `snapshot` on disk, off the runtime's threads.
async fn save(store: HeldStore, snapshot: Snapshot) -> Result<HeldStore, Status> {
    let task = tokio::task::spawn_blocking(move || store.save(&snapshot).map(|()| store));
    match task.await {
        Ok(Ok(store)) => Ok(store),
        Ok(Err(error)) => {
            let text = chain(&error);
            tracing::error!(error = text, "state");
            Err(Status::internal(text))
        }
        Err(error) => Err(Status::internal(error.to_string())),
    }
}

fn vid_text(network: &Asked) -> String {
    if network.spec.vid.is_none() { "none (untagged)".into() } else { network.spec.tag_text() }
}

fn silent(network: &Asked) -> String {
    format!(
        "router {} of network `{}` (VID {}) did not answer {} within {} ms",
        network.spec.addresses_text(),
        network.name,
        vid_text(network),
        match (network.spec.address, network.spec.address6) {
            (Some(_), None) => "ARP",
            (None, _) => "neighbour discovery",
            (Some(_), Some(_)) => "ARP or neighbour discovery",
        },
        PATIENCE.as_millis()
    )
}

/// An error with its causes, as one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

pub(crate) fn internal(error: &PlaneError) -> Status {
    let text = chain(error);
    tracing::error!(error = text, "data plane");
    Status::internal(text)
}

fn ended(task: Result<Result<(), PlaneError>, tokio::task::JoinError>) -> Result<(), Status> {
    match task {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(internal(&error)),
        Err(error) => Err(Status::internal(error.to_string())),
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal {
            Refusal::NoUsers(_) | Refusal::UserTwice(_) | Refusal::SameNetwork(_) => Code::InvalidArgument,
            Refusal::UnknownUser(_) | Refusal::UnknownNetwork(_) => Code::NotFound,
            Refusal::Users { .. } | Refusal::Room(_) => Code::ResourceExhausted,
            _ => Code::FailedPrecondition,
        };
        Self::new(code, refusal.to_string())
    }
}

impl From<HoldFigures> for v1::HoldFigures {
    fn from(figures: HoldFigures) -> Self {
        let HoldFigures { frames, bytes, dropped_user_bound, dropped_memory, lost, late, release_us } =
            figures;
        Self { frames, bytes, dropped_user_bound, dropped_memory, lost, late, release_us }
    }
}

impl From<Invalid> for Status {
    fn from(invalid: Invalid) -> Self {
        Self::invalid_argument(invalid.to_string())
    }
}

impl Refusal {
    /// Stable identifier of a finding.
    const fn code(&self) -> &'static str {
        match self {
            Self::NoUsers(_) => "no-users",
            Self::UserTwice(_) => "user-twice",
            Self::UnknownUser(_) => "unknown-user",
            Self::UnknownNetwork(_) => "unknown-network",
            Self::SameNetwork(_) => "same-network",
            Self::Elsewhere { .. } => "user-elsewhere",
            Self::StagedByOther { .. } => "user-staged",
            Self::OtherRouter { .. } => "other-router",
            Self::Aborted(_) | Self::Finished(_) => "migration-ended",
            _ => "switch-refused",
        }
    }

    /// What to do about a finding.
    fn remedy(&self) -> String {
        match self {
            Self::UnknownUser(_) | Self::UnknownNetwork(_) => {
                "declare it in the inventory and `handover apply` that".into()
            }
            Self::Elsewhere { on, .. } => {
                format!("migrate from the site whose network is `{on}`, or leave the user out")
            }
            Self::StagedByOther { by, .. } => format!("wait for migration `{by}` to end, or abort it"),
            Self::OtherRouter { .. } => "give both site routers the same address towards the users".into(),
            Self::Aborted(_) | Self::Finished(_) => "ask for a new migration".into(),
            _ => "correct the request".into(),
        }
    }
}

/// The longest a hold may last: an hour, which nobody waits for.
const HOLD_DEADLINE_MAX_MS: u64 = 3_600_000;
const CONTROLLER: &[Role] = &[Role::Controller];
/// Names of what the daemon itself counts, beside the programs' outcomes.
const GROUP_COUNTERS: [&str; 2] = ["group_copied", "group_not_copied"];
/// Who may see the status; a gateway only its own.
const MAY_LOOK: &[Role] = &[Role::Controller, Role::Operator, Role::Viewer, Role::Gateway];

#[tonic::async_trait]
impl gateway_server::Gateway for Gateway {
    async fn configure(
        &self,
        request: Request<v1::ConfigureRequest>,
    ) -> Result<Response<v1::ConfigureResponse>, Status> {
        require_role(&request, CONTROLLER)?;
        let desired = long(|| Desired::new(request.get_ref(), &self.0.wiring))?;
        let _one_at_a_time = self.0.configuring.lock().await;
        {
            let mut core = self.core();
            // an interface's MTU may have been changed since
            for Port { number, link, .. } in self.0.ports.iter() {
                let largest = link.largest_frame().map_err(|e| Status::failed_precondition(chain(&e)))?;
                core.plane.set_port(*number, link.index, largest).map_err(|e| internal(&e))?;
            }
        }
        let _kept = match &self.0.store {
            None => None,
            Some(store) => {
                let store = Arc::clone(store).lock_owned().await;
                let snapshot = long(|| {
                    let (next, ..) = self.core().table.configured(&desired)?;
                    Ok::<_, Refusal>(next.snapshot())
                })?;
                Some(save(store, snapshot).await?)
            }
        };
        let retired = long(|| {
            let mut core = self.core();
            let (next, writes, retired) = core.table.configured(&desired)?;
            core.plane.apply(&writes).map_err(|e| internal(&e))?;
            core.table = next;
            info!(
                revision = desired.revision,
                networks = desired.networks.len(),
                users = desired.users.len(),
                writes = writes.len(),
                "configured"
            );
            Ok::<_, Status>(retired)
        })?;
        drop(_kept);
        self.tell("configured", |change| v1::Change {
            users: desired.users.len() as u32,
            detail: format!("revision {}, {} networks", desired.revision, desired.networks.len()),
            ..change
        });
        self.retire(retired).await?;
        for network in self.ask_unknown_routers().await {
            warn!("{}; asking on", silent(&network));
        }
        Ok(Response::new(v1::ConfigureResponse {}))
    }

    async fn status(
        &self,
        request: Request<v1::GatewayStatusRequest>,
    ) -> Result<Response<v1::GatewayStatus>, Status> {
        self.may_look(&request)?;
        let core = self.core();
        let interface = |port: &Port| v1::InterfaceStatus {
            role: port.side.name().into(),
            name: port.link.name.clone(),
            // nothing else is attached, see Plane::attach
            attach_mode: self.0.mode.name().into(),
            note: port.link.note().unwrap_or_else(|e| Some(chain(&e))).unwrap_or_default(),
        };
        let interfaces = [Side::Access, Side::Wan].into_iter().flat_map(|side| self.0.ports.of(side));
        let counters = self.counters(&core).map_err(|e| internal(&e))?;
        let (bounds, held_bytes) = core.plane.holds().usage();
        let windows = self.0.windows.lock().unwrap_or_else(PoisonError::into_inner).status();
        Ok(Response::new(v1::GatewayStatus {
            name: self.0.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            boot_id: self.0.boot_id.clone(),
            revision: core.table.revision(),
            interfaces: interfaces.map(interface).collect(),
            networks: core
                .table
                .networks()
                .map(|n| v1::NetworkStatus {
                    name: n.name.into(),
                    vid: n.spec.vid.map(Into::into),
                    router_mac: n.router.map(|mac| mac.to_string()).unwrap_or_default(),
                    router_address: n.spec.address.map(|a| a.to_string()).unwrap_or_default(),
                    router_address6: n.spec.address6.map(|a| a.to_string()).unwrap_or_default(),
                    tpid: if n.spec.service { TPID_8021AD } else { TPID_8021Q }.into(),
                    pcp: n.spec.pcp.map(Into::into),
                    wan: self.0.wiring.name(n.spec.port).into(),
                    router_changes: n.changes,
                })
                .collect(),
            users: core
                .table
                .users()
                .take(if request.get_ref().without_users { 0 } else { usize::MAX })
                .map(|user| v1::UserStatus {
                    name: user.name.into(),
                    mac: user.spec.mac.map(|mac| mac.to_string()).unwrap_or_default(),
                    network: user.network.into(),
                    staged_by: user.staged_by.unwrap_or_default().into(),
                    addresses: user.spec.addresses.iter().map(ToString::to_string).collect(),
                    interface: self.0.wiring.name(user.spec.port).into(),
                    tag: user.spec.tag.map(Into::into),
                    guard: user.spec.guard,
                })
                .collect(),
            switches: Self::switches(&core),
            counters,
            windows: Some(windows),
            hold: Some(v1::HoldMemory {
                memory_bytes: bounds.memory.into(),
                per_user_bytes: bounds.per_user,
                held_bytes,
            }),
            pin_dir: self.0.pin_dir.as_ref().map(|dir| dir.display().to_string()).unwrap_or_default(),
        }))
    }

    async fn check_switch(
        &self,
        request: Request<v1::StageRequest>,
    ) -> Result<Response<v1::CheckResponse>, Status> {
        require_role(&request, CONTROLLER)?;
        let request = request.into_inner();
        desired::name("migration", &request.migration)?;
        let (refusals, network, ports) = {
            let v1::StageRequest { migration, users, from_network, to_network } = &request;
            let table = &self.core().table;
            let refusals = table.check(migration, users, from_network, to_network);
            (refusals, table.network(to_network), table.ports_of(users, [from_network, to_network]))
        };
        let mut findings: Vec<_> = refusals
            .iter()
            .map(|r| self.finding(Severity::Error, r.code(), r.to_string(), r.remedy()))
            .collect();
        let down = self.check_links(&ports);
        if down.is_empty()
            && let Some(network) = network
        {
            findings.extend(self.check_router(&network).await);
        }
        findings.extend(down);
        Ok(Response::new(v1::CheckResponse { findings }))
    }

    async fn stage(&self, request: Request<v1::StageRequest>) -> Result<Response<v1::StageResponse>, Status> {
        require_role(&request, CONTROLLER)?;
        let v1::StageRequest { migration, users, from_network, to_network } = request.into_inner();
        desired::name("migration", &migration)?;
        let step = long(|| self.core().table.stage_begin(&migration, &users, &from_network, &to_network))?;
        let answer = match step {
            StageStep::Done(answer) => answer,
            StageStep::Introduce { network, users } => {
                let introduced = self.introduce(&network, &users).await;
                if let Err(status) = self.router_or_refuse(&network, introduced) {
                    self.core().table.stage_failed(&migration);
                    return Err(status);
                }
                let staging = migration.clone();
                let answer = self
                    .change(move |table| {
                        let (writes, answer) = table.stage_write(&staging)?;
                        Ok((answer, writes))
                    })
                    .await?;
                info!(
                    migration,
                    users = users.len(),
                    from = from_network,
                    to = to_network,
                    ?answer,
                    "staged"
                );
                self.tell("staged", |change| v1::Change { what: change.what, ..self.told_of(&migration) });
                answer
            }
        };
        // only after this does every program run find the users in the switch, and so count for its window
        ended(tokio::task::spawn_blocking(grace_period).await)?;
        let StageAnswer { switch, generation, .. } = answer;
        let router_mac = self
            .core()
            .table
            .networks()
            .find_map(|n| (*n.name == *to_network).then_some(n.router)?)
            .map(|mac| mac.to_string())
            .unwrap_or_default();
        Ok(Response::new(v1::StageResponse { switch: switch.into(), generation, router_mac }))
    }

    async fn switch(
        &self,
        request: Request<v1::SwitchRequest>,
    ) -> Result<Response<v1::SwitchResponse>, Status> {
        let received_ns = monotonic_ns();
        self.0.switches_for.require_role(&request, CONTROLLER)?;
        let v1::SwitchRequest { migration, switch, generation, users, to_network, users_digest } =
            request.into_inner();
        let named = match (users.is_empty(), users_digest.is_empty()) {
            (_, true) => Named::Users(&users),
            (true, false) => Named::Digest(&users_digest),
            (false, false) => {
                return Err(Status::invalid_argument(format!(
                    "switch of migration `{migration}`: users and users_digest are both given; give one of them"
                )));
            }
        };
        let answer = {
            let mut core = self.core();
            match core.table.switch(&migration, switch, generation, named, &to_network)? {
                SwitchStep::Done(answer) => answer,
                SwitchStep::Store { index, word } => {
                    let committed = core.plane.commit(index, word);
                    let answer = SwitchAnswer {
                        window_ns: core.plane.window(index, committed),
                        store_latency_ns: committed.at_ns.saturating_sub(received_ns),
                    };
                    core.table.switched(&migration, answer);
                    drop(core);
                    self.0.windows.lock().unwrap_or_else(PoisonError::into_inner).add(answer.window_ns);
                    self.tell("switched", |change| v1::Change {
                        what: change.what,
                        window_ns: Some(answer.window_ns),
                        ..self.told_of(&migration)
                    });
                    answer
                }
            }
        };
        self.save_soon();
        info!(migration, to = to_network, ?answer, "switched");
        Ok(Response::new(v1::SwitchResponse {
            window_ns: answer.window_ns,
            store_latency_ns: answer.store_latency_ns,
        }))
    }

    async fn hold(&self, request: Request<v1::HoldRequest>) -> Result<Response<v1::HoldResponse>, Status> {
        let received_ns = monotonic_ns();
        require_role(&request, CONTROLLER)?;
        let v1::HoldRequest { migration, switch, generation, address, deadline_ms, marker } =
            request.into_inner();
        let address: Ipv4Addr = address.parse().map_err(|_| {
            Status::invalid_argument(format!("address `{address}` is no IPv4 address: only those are held"))
        })?;
        if !(1..=HOLD_DEADLINE_MAX_MS).contains(&deadline_ms) {
            return Err(Status::invalid_argument(format!(
                "deadline_ms = {deadline_ms}: use 1 to {HOLD_DEADLINE_MAX_MS}"
            )));
        }
        if let Some(port) = marker.map(|m| m.port).filter(|port| !(1..=0xffff).contains(port)) {
            return Err(Status::invalid_argument(format!("marker.port = {port}: use 1 to 65535")));
        }
        let (step, holds) = {
            let mut core = self.core();
            let step = core.table.hold(&migration, switch, generation, address)?;
            if !step.again {
                let deadline_ns = received_ns + deadline_ms * 1_000_000;
                core.plane.holds().begin(step.index, address, deadline_ns);
                core.plane
                    .apply(&[Write::Switch { index: step.index, word: step.word }])
                    .map_err(|e| internal(&e))?;
            }
            (step, Arc::clone(core.plane.holds()))
        };
        ended(tokio::task::spawn_blocking(move || holds.settle()).await)?;
        let took_us = (monotonic_ns() - received_ns) / 1000;
        let marker_sent = match marker {
            Some(marker) => self.mark(&step, address, marker)?,
            None => false,
        };
        info!(migration, users = step.users, %address, deadline_ms, again = step.again, took_us, marker_sent, "held");
        if !step.again {
            self.tell("held", |change| v1::Change {
                what: change.what,
                detail: format!("frames for {address}"),
                ..self.told_of(&migration)
            });
        }
        Ok(Response::new(v1::HoldResponse { users: step.users as u32, marker_sent, took_us }))
    }

    async fn abort(
        &self,
        request: Request<v1::AbortSwitchRequest>,
    ) -> Result<Response<v1::AbortSwitchResponse>, Status> {
        require_role(&request, CONTROLLER)?;
        let migration = request.into_inner().migration;
        desired::name("migration", &migration)?;
        self.release(&migration, Selector::A).await?;
        let told = self.told_of(&migration);
        let ending = migration.clone();
        let (was_switched, held, retired) = self
            .change(move |table| {
                let step = table.abort(&ending)?;
                Ok(((step.was_switched, table.past_hold(&ending), step.retired), step.writes))
            })
            .await?;
        info!(migration, was_switched, "aborted");
        self.tell_end("aborted", told, held);
        self.retire(retired).await?;
        Ok(Response::new(v1::AbortSwitchResponse { was_switched, held: held.map(Into::into) }))
    }

    async fn finish(
        &self,
        request: Request<v1::FinishSwitchRequest>,
    ) -> Result<Response<v1::FinishSwitchResponse>, Status> {
        require_role(&request, CONTROLLER)?;
        let migration = request.into_inner().migration;
        desired::name("migration", &migration)?;
        self.release(&migration, Selector::B).await?;
        let told = self.told_of(&migration);
        let ending = migration.clone();
        let (held, retired) = self
            .change(move |table| {
                let (writes, retired) = table.finish(&ending)?;
                Ok(((table.past_hold(&ending), retired), writes))
            })
            .await?;
        info!(migration, "finished");
        self.tell_end("finished", told, held);
        self.retire(retired).await?;
        Ok(Response::new(v1::FinishSwitchResponse { held: held.map(Into::into) }))
    }
}
