//! The controller: its world, journal and peers in one place, and the drivers of its sessions.
//!
//! Invariants:
//! - the world changes by records only, and by each record after it is in the journal (or, for the votes, on its way
//!   there together with the decision: [`crate::session::Event::forced`]);
//! - requests and inventories are checked and recorded one at a time, so a check holds until its record is in;
//! - after a failed append the controller stops ([`Fatal`]): what is durable is found out by the next start.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use handover_api::{
    tls::{Tls, TlsError},
    v1,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tonic::Request;

use crate::{
    calls,
    driver::{self, Order, Wish},
    inventory::{self, Change, InventoryError},
    journal::{Journal, JournalError},
    patience,
    peers::{self, Kind, Peer, Peers, Seen},
    queue::{Leaving, Limits, Turn},
    report,
    session::{Decision, Entry, Event, Finding, Plan, Session, State},
    triggers,
    world::{Record, RequestError, World, WorldError},
};

/// How often a peer is asked whether it is there.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// The controller cannot go on and has to be started again.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Fatal(String);

/// Why a controller could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal contradicts itself.
    #[error(
        "journal record {seq} contradicts those before it; restore the journal from a backup, it is not used as it is"
    )]
    History {
        /// Which record.
        seq: usize,
        /// How.
        #[source]
        source: WorldError,
    },
    /// The certificates cannot be used.
    #[error("certificates")]
    Tls(#[from] TlsError),
}

/// Why an inventory was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// It is wrong in itself.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// It contradicts what is going on.
    #[error("{}", .0.join("\n"))]
    Against(Vec<String>),
    /// There is no room for more.
    #[error(
        "the journal has {mib} MiB, and {limit} is the most (`[limits] journal_mib` in the controller's configuration): raise it, or begin with a new state_dir once all sessions are over"
    )]
    JournalFull {
        /// Its size.
        mib: u64,
        /// At most.
        limit: u64,
    },
    /// The certificates cannot be used.
    #[error("certificates")]
    Tls(#[from] TlsError),
    /// The controller has to stop.
    #[error(transparent)]
    Fatal(#[from] Fatal),
}

/// Why a request did not become a session.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// It cannot.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// Not now.
    #[error("the controller is stopping; ask again when it is back")]
    Stopping,
    /// There is no room for more.
    #[error(
        "the journal has {mib} MiB, and {limit} is the most (`[limits] journal_mib` in the controller's configuration): raise it, or begin with a new state_dir once all sessions are over"
    )]
    JournalFull {
        /// Its size.
        mib: u64,
        /// At most.
        limit: u64,
    },
    /// The controller has to stop.
    #[error(transparent)]
    Fatal(#[from] Fatal),
}

/// Why a session was not given up.
#[derive(Debug, thiserror::Error)]
pub enum CancelError {
    /// No such session.
    #[error("there is no session `{0}`")]
    Unknown(String),
    /// It is decided, or over.
    #[error("session {session} cannot be cancelled any more: {why}")]
    TooLate {
        /// Which.
        session: String,
        /// In words, with what can be done instead.
        why: String,
    },
    /// The controller ends; what became of it is in its journal.
    #[error(
        "the controller is stopping; `handover sessions show {0}` tells what became of it when it is back"
    )]
    Stopping(String),
}

/// Why a session was not resolved.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// No such session.
    #[error("there is no session `{0}`")]
    Unknown(String),
    /// It is in no doubt, or cannot go that way.
    #[error("{0}")]
    Refused(String),
    /// The controller ends; what became of it is in its journal.
    #[error(
        "the controller is stopping; `handover sessions show {0}` tells what became of it when it is back"
    )]
    Stopping(String),
}

/// Why there is nothing left to cancel.
fn too_late(session: &Session) -> String {
    let plan = &session.plan;
    let back = format!("`handover migrate {} --to {}`", plan.service, plan.from.site);
    match &session.state {
        State::Resuming { .. } | State::Ending { .. } => format!(
            "COMMIT is durable and it is being finished; when it is completed, {back} brings the service back"
        ),
        State::Completed { .. } => format!("it is completed; {back} brings the service back"),
        State::Aborting { .. } | State::SourceDead { .. } => "it is being undone already".into(),
        State::RolledBack { .. } => "it was rolled back".into(),
        State::Refused => "it was refused, nothing was touched".into(),
        _ => "it is being decided".into(),
    }
}

/// The controller.
#[derive(Debug)]
pub struct Controller {
    world: Mutex<World>,
    journal: Journal,
    limits: Limits,
    pub(crate) peers: Peers,
    /// Held from the check of a request or inventory until its record is in.
    accepting: tokio::sync::Mutex<()>,
    /// Where each driver takes operators' orders.
    orders: Mutex<BTreeMap<String, mpsc::UnboundedSender<Order>>>,
    /// Counts changes of the world, for those who watch.
    changes: watch::Sender<u64>,
    stopping: watch::Sender<bool>,
    fatal: watch::Sender<Option<Fatal>>,
}

impl Controller {
    /// Opens the journal in `state_dir` and goes on where it ends: sessions without a decision are aborted, those with
    /// one are brought to their end, requests that waited wait on.
    ///
    /// # Errors
    /// [`OpenError`]; nothing was touched.
    pub fn open(state_dir: &Path, tls: Tls, limits: Limits) -> Result<Arc<Self>, OpenError> {
        let (journal, records) = Journal::open(state_dir)?;
        let mut world = World::default();
        for (i, record) in records.iter().enumerate() {
            world.apply(record).map_err(|source| OpenError::History { seq: i + 1, source })?;
        }
        let (inventory, unfinished) = (Arc::clone(&world.inventory), world.unfinished());
        tracing::info!(
            records = records.len(),
            revision = world.revision,
            sessions = world.order.len(),
            unfinished = unfinished.len(),
            waiting = world.queue.len(),
            "journal read"
        );
        let controller = Arc::new(Self {
            world: Mutex::new(world),
            journal,
            limits,
            peers: Peers::new(tls),
            accepting: tokio::sync::Mutex::default(),
            orders: Mutex::default(),
            changes: watch::Sender::new(0),
            stopping: watch::Sender::new(false),
            fatal: watch::Sender::new(None),
        });
        controller.watch_new_peers(controller.peers.take(&inventory)?);
        for id in unfinished {
            let orders = controller.take_orders(&id);
            controller.spawn_driver(id, None, orders);
        }
        tokio::spawn(keep_queue(Arc::downgrade(&controller)));
        Ok(controller)
    }

    fn world(&self) -> MutexGuard<'_, World> {
        // a panic while the lock was held cannot leave half a record behind: apply changes nothing on error
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The world as it is now.
    pub fn snapshot(&self) -> World {
        self.world().clone()
    }

    /// A session as it is now.
    pub fn session(&self, id: &str) -> Option<Session> {
        self.world().sessions.get(id).cloned()
    }

    /// Changes whenever the world does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// True once the controller is stopping.
    pub fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// Resolves when the controller cannot go on.
    pub async fn failed(&self) -> Fatal {
        let mut fatal = self.fatal.subscribe();
        let found = fatal.wait_for(Option::is_some).await.ok().and_then(|f| f.clone());
        found.unwrap_or_else(|| Fatal("the controller has ended".into()))
    }

    /// Ends in order: no new sessions, those undecided are aborted; waits until nothing is running, at most `patience`.
    pub async fn stop(&self, patience: Duration) {
        self.stopping.send_replace(true);
        let mut changes = self.changes();
        let quiet = async {
            while self.world().running() > 0 {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        if timeout(patience, quiet).await.is_err() {
            tracing::warn!("sessions are still under way; the next start goes on with them");
        }
    }

    /// Makes records durable.
    pub(crate) async fn append(&self, records: Vec<Record>) -> Result<(), Fatal> {
        self.journal.append(records).await.map_err(|e| self.give_up(&e))
    }

    fn give_up(&self, error: &dyn std::error::Error) -> Fatal {
        let mut words = error.to_string();
        let mut next = error.source();
        while let Some(source) = next {
            words = format!("{words}: {source}");
            next = source.source();
        }
        let fatal = Fatal(words);
        tracing::error!(%fatal, "the controller stops: the next start finds out what is durable");
        self.fatal.send_replace(Some(fatal.clone()));
        fatal
    }

    /// Lets the world take a record of a session; returns the session.
    pub(crate) fn take(&self, record: &Record) -> Result<Session, Fatal> {
        self.let_be(record)?;
        let Record::Session { id, .. } = record else { return Err(Fatal("a record of no session".into())) };
        self.session(id).ok_or_else(|| Fatal("a record of no session".into()))
    }

    /// Lets the world take a record that is durable.
    fn let_be(&self, record: &Record) -> Result<(), Fatal> {
        self.world().apply(record).map_err(|e| self.give_up(&e))?;
        self.changes.send_modify(|n| *n += 1);
        Ok(())
    }

    fn orders(&self) -> MutexGuard<'_, BTreeMap<String, mpsc::UnboundedSender<Order>>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the driver of a session: what operators want of it from now on.
    fn take_orders(&self, id: &str) -> mpsc::UnboundedReceiver<Order> {
        let (sender, orders) = mpsc::unbounded_channel();
        self.orders().insert(id.to_owned(), sender);
        orders
    }

    pub(crate) fn no_more_orders(&self, id: &str) {
        self.orders().remove(id);
    }

    /// Gives the session up, if its decision is not being written yet, or takes the request out of the queue. Returns once
    /// that is durable.
    ///
    /// # Errors
    /// [`CancelError`]; the session goes on as if nobody had asked.
    pub async fn cancel(&self, id: &str, by: &str) -> Result<(), CancelError> {
        if self.cancel_waiting(id, by).await? {
            return Ok(());
        }
        if self.session(id).is_none() {
            return Err(CancelError::Unknown(id.into()));
        }
        let done = self.order(id, Wish::Cancel, by).await;
        let session = self.session(id).ok_or_else(|| CancelError::Unknown(id.into()))?;
        match done {
            Some(true) => Ok(()),
            None if session.state.undecided().is_some() => Err(CancelError::Stopping(id.into())),
            Some(false) | None => Err(CancelError::TooLate { session: id.into(), why: too_late(&session) }),
        }
    }

    /// Takes a request out of the queue; whether it was in it.
    async fn cancel_waiting(&self, id: &str, by: &str) -> Result<bool, CancelError> {
        let _accepting = self.accepting.lock().await;
        {
            let world = self.world();
            if world.left.contains_key(id) {
                return Err(CancelError::TooLate {
                    session: id.into(),
                    why: "it has left the queue already, nothing was touched".into(),
                });
            }
            if !world.queue.iter().any(|w| w.id == id) {
                return Ok(false);
            }
        }
        let record = Record::Left { id: id.into(), why: Leaving::Cancelled { by: by.into() } };
        let stopping = |_| CancelError::Stopping(id.into());
        self.append(vec![record.clone()]).await.map_err(stopping)?;
        self.let_be(&record).map_err(stopping)?;
        tracing::info!(session = id, by, "taken out of the queue");
        Ok(true)
    }

    /// What an operator has to know before resolving; nothing is done.
    ///
    /// # Errors
    /// [`ResolveError`].
    pub fn account(&self, id: &str, decision: Decision) -> Result<Vec<String>, ResolveError> {
        let session = self.session(id).ok_or_else(|| ResolveError::Unknown(id.into()))?;
        report::account(&session, decision).map_err(ResolveError::Refused)
    }

    /// Ends the doubt of a session by an operator's word. Returns it once that is durable.
    ///
    /// # Errors
    /// [`ResolveError`]; the session goes on as if nobody had asked.
    pub async fn resolve(&self, id: &str, decision: Decision, by: &str) -> Result<Session, ResolveError> {
        self.account(id, decision)?;
        let done = self.order(id, Wish::Resolve(decision), by).await;
        let session = self.session(id).ok_or_else(|| ResolveError::Unknown(id.into()))?;
        match done {
            Some(true) => Ok(session),
            Some(false) => Err(ResolveError::Refused(format!(
                "session {id} has gone on meanwhile and is {}",
                session.state.name()
            ))),
            None => Err(ResolveError::Stopping(id.into())),
        }
    }

    /// Hands an order to the session's driver; whether it was done, `None` if there is no driver any more.
    async fn order(&self, id: &str, what: Wish, by: &str) -> Option<bool> {
        let driver = self.orders().get(id).cloned()?;
        let (done, answer) = oneshot::channel();
        driver.send(Order { what, by: by.into(), done }).ok()?;
        answer.await.ok()
    }

    fn spawn_driver(
        self: &Arc<Self>,
        id: String,
        clock: Option<driver::Clock>,
        orders: mpsc::UnboundedReceiver<Order>,
    ) {
        // a journal that failed has been reported by `append`
        tokio::spawn(driver::drive(Arc::clone(self), id, clock, orders));
    }

    /// Applies an inventory. Returns its revision, what it changes, and which gateways could not be told yet.
    ///
    /// # Errors
    /// [`ApplyError`]; nothing was changed.
    pub async fn apply(
        self: &Arc<Self>,
        text: &str,
        dry_run: bool,
    ) -> Result<(u64, Vec<Change>, Vec<String>), ApplyError> {
        let new = inventory::parse(text)?;
        let accepting = self.accepting.lock().await;
        let (changes, revision) = {
            let world = self.world();
            (world.check_apply(&new).map_err(ApplyError::Against)?, world.revision)
        };
        if dry_run || changes.is_empty() {
            return Ok((revision, changes, Vec::new()));
        }
        if let Err((mib, limit)) = self.room_in_journal() {
            return Err(ApplyError::JournalFull { mib, limit });
        }
        let inventory = Arc::new(new);
        let record = Record::Applied { revision: revision + 1, inventory: Arc::clone(&inventory) };
        self.append(vec![record.clone()]).await?;
        self.world().apply(&record).map_err(|e| self.give_up(&e))?;
        self.changes.send_modify(|n| *n += 1);
        tracing::info!(revision = revision + 1, changes = changes.len(), "inventory applied");
        self.watch_new_peers(self.peers.take(&inventory)?);
        drop(accepting);
        Ok((revision + 1, changes, self.configure_all().await))
    }

    /// Tells every gateway; returns those that could not be told, in words.
    async fn configure_all(self: &Arc<Self>) -> Vec<String> {
        let mut tasks = tokio::task::JoinSet::new();
        for peer in self.peers.all().into_iter().filter(|p| p.kind == Kind::Gateway) {
            let controller = Arc::clone(self);
            tasks.spawn(async move {
                let result = controller.configure(&peer.name).await;
                peer.ask.notify_one();
                result.err().map(|why| format!("gateway {} is not configured yet: {why}", peer.name))
            });
        }
        let mut notes: Vec<String> = tasks.join_all().await.into_iter().flatten().collect();
        notes.sort();
        notes
    }

    /// Turns a request into a session and starts it; or, if it cannot begin at once and is to wait, queues it.
    ///
    /// # Errors
    /// [`MigrateError`]; there is no session.
    pub async fn migrate(
        self: &Arc<Self>,
        request: &triggers::Request,
        may_wait: bool,
    ) -> Result<String, MigrateError> {
        let accepting = self.accepting.lock().await;
        if *self.stopping.borrow() {
            return Err(MigrateError::Stopping);
        }
        if let Err((mib, limit)) = self.room_in_journal() {
            return Err(MigrateError::JournalFull { mib, limit });
        }
        // those who have waited go first
        self.advance().await?;
        let now_ms = driver::unix_ms();
        let admitted = self.world().admit_now(request, self.limits, now_ms);
        let passes = match admitted {
            Ok(plan) => return Ok(self.begin(Arc::new(plan)).await?),
            Err(e) if may_wait && e.passes() => e,
            Err(e) => return Err(e.into()),
        };
        let waiting = self.world().enqueue(request, self.limits, now_ms)?;
        let id = waiting.id;
        let record = Record::Queued { id: id.clone(), request: request.clone(), at_ms: now_ms };
        self.append(vec![record.clone()]).await?;
        self.let_be(&record)?;
        drop(accepting);
        tracing::info!(session = %id, to = request.to_site, why = %passes, "request queued");
        Ok(id)
    }

    /// Whether anything new may be begun: what is under way has to have room to end. Else the journal's size and its limit.
    fn room_in_journal(&self) -> Result<(), (u64, u64)> {
        let (mib, limit) = (self.journal.octets() >> 20, self.limits.journal_mib);
        if mib < limit { Ok(()) } else { Err((mib, limit)) }
    }

    /// Starts a session. Under `accepting`.
    async fn begin(self: &Arc<Self>, plan: Arc<Plan>) -> Result<String, Fatal> {
        let id = plan.id.clone();
        let clock = driver::Clock::start();
        let (to, trigger) = (plan.to.site.clone(), plan.trigger.clone());
        let entry = Entry { at_us: 0, event: Event::Requested { plan } };
        let record = Record::Session { id: id.clone(), entry };
        self.append(vec![record.clone()]).await?;
        // before anybody can see it
        let orders = self.take_orders(&id);
        self.take(&record)?;
        tracing::info!(session = %id, to, trigger, "session requested");
        self.spawn_driver(id.clone(), Some(clock), orders);
        Ok(id)
    }

    /// Lets those begin whose turn it is. Under `accepting`.
    async fn advance(self: &Arc<Self>) -> Result<(), Fatal> {
        while !*self.stopping.borrow() {
            let turn = self.world().turn(self.limits, driver::unix_ms());
            match turn {
                None => break,
                Some(Turn::Begin(plan)) => {
                    self.begin(plan).await?;
                }
                Some(Turn::Refuse { id, reason }) => {
                    tracing::warn!(session = %id, reason, "a request that waited cannot be any more");
                    let record = Record::Left { id, why: Leaving::Refused { reason } };
                    self.append(vec![record.clone()]).await?;
                    self.let_be(&record)?;
                }
            }
        }
        Ok(())
    }

    /// Place in the queue, from 1, and why it waits.
    pub fn place_in_queue(&self, id: &str) -> Option<(usize, String)> {
        self.world().place_in_queue(id, self.limits)
    }

    /// What a request would come to: its plan, and what preflight finds. Touches nothing.
    ///
    /// # Errors
    /// [`RequestError`] if it could not even become a session.
    pub async fn rehearse(
        self: &Arc<Self>,
        request: &triggers::Request,
    ) -> Result<(Plan, Vec<Finding>), RequestError> {
        let plan = self.world().plan(request, driver::unix_ms())?;
        let name = format!("{}-dry-run", plan.service);
        let (found, _) = calls::preflight(self, &plan, &name).await;
        let findings = plan.findings.iter().cloned().chain(found).collect();
        Ok((plan, findings))
    }

    /// Every peer and what was last seen of it.
    pub fn peers(&self) -> Vec<Arc<Peer>> {
        self.peers.all()
    }

    fn watch_new_peers(self: &Arc<Self>, new: Vec<Arc<Peer>>) {
        for peer in new {
            tokio::spawn(watch_peer(Arc::downgrade(self), peer));
        }
    }

    /// Sees that a gateway has the inventory of now: one that was started again, or is behind, is configured with the
    /// networks its users are on.
    ///
    /// # Errors
    /// In words: why it has not.
    pub(crate) async fn configure(&self, gateway: &str) -> Result<(), String> {
        let peer = self.peers.get(Kind::Gateway, gateway).map_err(|s| peers::words(&s))?;
        self.configure_peer(&peer).await.map(|_| ())
    }

    async fn configure_peer(&self, peer: &Peer) -> Result<v1::GatewayStatus, String> {
        let mut configured = peer.configured.lock().await;
        let mut client = peer.gateway();
        let (revision, users) = {
            let world = self.world();
            (world.revision, world.users_of(&peer.name))
        };
        let patience = patience::ask(users);
        let request = v1::GatewayStatusRequest { without_users: true };
        let status = answer(patience, client.status(with_deadline(patience, request))).await?;
        if status.revision == revision && *configured == Some((status.boot_id.clone(), revision)) {
            return Ok(status);
        }
        if status.revision > revision {
            return Err(format!(
                "it has inventory revision {}, newer than this controller's {revision}: it is another controller's, or this one's journal is an old copy",
                status.revision
            ));
        }
        let request = self.world().configuration(&peer.name);
        // what it is told may be newer than what it was asked for
        let revision = request.revision;
        answer(patience, client.configure(with_deadline(patience, request))).await?;
        tracing::info!(gateway = peer.name, revision, boot = status.boot_id, "configured");
        *configured = Some((status.boot_id.clone(), revision));
        Ok(v1::GatewayStatus { revision, ..status })
    }

    /// Asks a peer whether it is there.
    async fn look(&self, peer: &Peer) -> Seen {
        let detail = match peer.kind {
            Kind::Gateway => match self.configure_peer(peer).await {
                Ok(s) => {
                    let interfaces = s.interfaces.iter().map(|i| format!("{} {}", i.name, i.attach_mode));
                    Ok(std::iter::once(format!("revision {}", s.revision))
                        .chain(interfaces)
                        .collect::<Vec<_>>()
                        .join(", "))
                }
                Err(why) => Err(why),
            },
            Kind::Migrator => {
                let mut client = peer.migrator();
                let patience = patience::ask(0);
                answer(patience, client.status(with_deadline(patience, v1::MigratorStatusRequest {})))
                    .await
                    .map(|s| format!("CRIU {}, kernel {}", s.criu_version, s.kernel))
            }
        };
        match detail {
            Ok(detail) => Seen { reachable: true, detail },
            Err(detail) => Seen { reachable: false, detail },
        }
    }
}

fn with_deadline<T>(patience: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(patience);
    request
}

async fn answer<T>(
    patience: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, String> {
    match timeout(patience, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(peers::words(&status)),
        Err(_) => Err(format!("no answer within {} s", patience.as_secs())),
    }
}

/// Lets requests that wait begin when something has changed, for as long as there is a controller.
async fn keep_queue(controller: Weak<Controller>) {
    let Some(mut changes) = controller.upgrade().map(|c| c.changes()) else { return };
    loop {
        let Some(c) = controller.upgrade() else { return };
        changes.mark_unchanged();
        if !c.world().queue.is_empty() {
            let _accepting = c.accepting.lock().await;
            if c.advance().await.is_err() {
                return; // `append` has said why the controller stops
            }
        }
        drop(c);
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Asks about a peer for as long as it is in the inventory.
async fn watch_peer(controller: Weak<Controller>, peer: Arc<Peer>) {
    let mut gone = peer.gone.subscribe();
    loop {
        let Some(c) = controller.upgrade() else { return };
        let seen = c.look(&peer).await;
        let was = peer.seen();
        if peer.see(seen.clone()) && was.reachable != seen.reachable {
            tracing::info!(%peer, reachable = seen.reachable, detail = seen.detail, "peer");
        }
        drop(c);
        tokio::select! {
            _ = gone.wait_for(|g| *g) => return,
            () = peer.ask.notified() => {}
            () = tokio::time::sleep(ASK_EVERY) => {}
        }
    }
}
