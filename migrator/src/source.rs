//! The server a service comes from.
//!
//! ```text
//! prepare: preflight, Reserve at the destination, a cgroup of its own, criu swrk, which asks `pre-dump` and waits
//! freeze:  markers, queues read -> SYN fence, drain -> fence -> dump, images on their way meanwhile -> freezer -> rest of the
//!          images -> Restore at the destination -> v leaves -> VOTE
//! yield:   the right to go back alone is given up
//! end:     original ended, sockets destroyed -> fence off -> blackhole off        (COMMIT)
//! undo:    v back -> CRIU lets go -> fence off -> thawed -> own cgroup again      (ABORT, lease, failure, restart)
//! ```
//!
//! Invariants:
//! - between `post-dump` and the decision the tasks are held by the freezer, not by CRIU, which fails open;
//! - v and the blackhole route change only under the fence; the fence is never lifted while v is here and the tasks
//!   cannot answer, except to let them go on;
//! - after *yield* this side does nothing by itself, also not after a restart;
//! - undo and end do every step even if one before it failed, tell all errors, and go on where they were when repeated.
//!
//! Post-copy ([`postcopy`]): `post-dump` is answered at once, under the freezer; CRIU then serves pages until the copy has them
//! all, which *end* waits for.
//!
//! Undo lifts the fence before the tasks run, so they never see a send refused by it.

use std::{
    collections::HashSet,
    future::Future,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use handover_api::{
    tls::Role as TlsRole,
    v1::{
        Descriptor, DiscardRequest, FreezeRequest, FreezeResponse, PrepareRequest, PrepareResponse,
        ReceiveResponse, ReserveRequest, RestoreRequest, Server, ServiceSpec,
        migrator_peer_client::MigratorPeerClient,
    },
};
use nix::sys::signal::Signal;
use tokio::task::{JoinHandle, JoinSet};
use tonic::Code;

use crate::{
    criu::Needs,
    criu::{self, Event, Swrk},
    error::{Error, Errors, Result, chain},
    fence::{self, Strength},
    freezer,
    machine::{Next, SourceEvent, SourceState},
    marker::{Markers, Quiet},
    memory::Mode,
    node::{Answer, Clock, Failure, Live, Migration, Node, Service, fresh_dir},
    postcopy, preflight,
    process::{self, Identity},
    record::{Record, Role, Source, Vote},
    sockets, timers,
    transfer::{self, Volume},
};

/// Longest wait for handshakes, accept queues and closing connections to drain under the SYN fence. A handshake takes a
/// round trip; what is not done by then is reported, or fails the dump.
const DRAIN: Duration = Duration::from_millis(250);

/// CRIU's question before it touches the tasks (include/action-scripts.h in CRIU).
const PRE_DUMP: &str = "pre-dump";

/// How often the queues are looked at meanwhile: the kernel offers no event for "accepted".
const DRAIN_LOOK: Duration = Duration::from_millis(2);

/// Longest wait for CRIU to end or let go of the tasks.
const CRIU_PATIENCE: Duration = Duration::from_secs(20);

/// Longest wait for a parent to reap what has been ended.
const REAP_PATIENCE: Duration = Duration::from_secs(3);

/// How long the destination is tried to be told of an abort (the controller tells it too).
const DISCARD_TRIES: u32 = 5;

fn part(live: &Live) -> Option<(&Record, &Source)> {
    match &live.record {
        Some(record @ Record { role: Role::Source(source), .. }) => Some((record, source)),
        _ => None,
    }
}

fn unknown(id: &str) -> Failure {
    Failure::new(Code::NotFound, format!("migration {id} has no source here"))
}

/// Makes a change of this side's part durable.
fn change(node: &Node, migration: &Migration, live: &mut Live, edit: impl FnOnce(&mut Source)) -> Result<()> {
    let mut record = live.record.clone().ok_or_else(|| Error::other("there is no record to change"))?;
    let Role::Source(source) = &mut record.role else {
        return Err(Error::other(format!("migration {} has no source here", migration.id)));
    };
    edit(source);
    node.commit(migration, live, record)
}

/// Asks the machine, and makes the next state durable.
fn advance(
    node: &Node,
    migration: &Migration,
    live: &mut Live,
    event: SourceEvent,
) -> Answer<Next<SourceState>> {
    advance_with(node, migration, live, event, |_| {})
}

/// The same, with another change in the same write.
fn advance_with(
    node: &Node,
    migration: &Migration,
    live: &mut Live,
    event: SourceEvent,
    edit: impl FnOnce(&mut Source),
) -> Answer<Next<SourceState>> {
    let (_, source) = part(live).ok_or_else(|| unknown(&migration.id))?;
    let next = source.state.on(event);
    match next {
        Next::Go(state) => change(node, migration, live, |s| {
            s.state = state;
            edit(s);
        })?,
        Next::Already => {}
        Next::Refuse(why) => {
            let words = format!("migration {} is {}: {why}", migration.id, source.state.name());
            return Err(Failure::refused(words));
        }
    }
    Ok(next)
}

/// Step 4.
///
/// # Errors
/// Findings of preflight here or at the destination (FAILED_PRECONDITION); everything is undone.
pub async fn prepare(node: &Arc<Node>, request: PrepareRequest) -> Answer<PrepareResponse> {
    let service = Service::parse(request.service.clone(), &node.config)?;
    let server =
        request.destination.clone().ok_or_else(|| Failure::invalid("the request names no destination"))?;
    let marker_port = u16::try_from(request.marker_port).map_err(|_| {
        Failure::invalid(format!(
            "marker_port {} is no UDP port; name one from 1 to 65535, or 0 for none",
            request.marker_port
        ))
    })?;
    let migration = node.entry(&request.migration)?;
    let mut live = migration.lock().await;
    if let Some(record) = &live.record {
        return match (part(&live).map(|(_, s)| s.state), &live.facts) {
            (Some(SourceState::Prepared), Some(facts)) => Ok(PrepareResponse { facts: Some(facts.clone()) }),
            _ => Err(Failure::refused(format!(
                "migration {} is {} ({}) here already",
                migration.id,
                record.state_name(),
                record.role_name()
            ))),
        };
    }
    let report = preflight::source(
        node,
        &migration.id,
        &service,
        None,
        &request.user_addresses,
        request.allow_other_peers,
    )
    .await;
    let found = match (preflight::errors(&report.findings), report.process) {
        (None, Some(process)) => process,
        (errors, _) => {
            drop(live);
            node.forget(&request.migration);
            return Err(Failure::refused(format!("prepare: {}", errors.unwrap_or_default())));
        }
    };
    let (identity, facts, needs) = found;
    let mode = match node.memory_mode(facts.memory_bytes) {
        Ok(mode) => mode,
        Err(refusal) => {
            drop(live);
            node.forget(&request.migration);
            let words = format!("prepare: {} ({}; {})", refusal.message, refusal.code, refusal.remedy);
            return Err(Failure::refused(words));
        }
    };
    tracing::info!(migration = migration.id, mode = mode.name(), mib = facts.memory_bytes >> 20, "memory");
    let needs = Needs { post_copy: mode == Mode::PostCopy, ..needs };
    let source = Source {
        state: SourceState::Prepared,
        pid: identity.pid,
        start_time: identity.start_time,
        touched: false,
        placement: None,
        peer: server.name.clone(),
        peer_endpoint: server.migration_endpoint.clone(),
        vote: None,
        post_copy: mode == Mode::PostCopy,
    };
    let record = Record::new(
        &migration.id,
        &service.name,
        service.address,
        &node.config.interface,
        Role::Source(source),
    );
    node.commit(&migration, &mut live, record)?;
    live.facts = Some(facts.clone());
    live.needs = needs;
    match make_ready(node, &migration, &mut live, request.service, &server, marker_port).await {
        Ok(()) => Ok(PrepareResponse { facts: Some(facts) }),
        Err(failure) => Err(undo_after(node, &migration, &mut live, failure).await),
    }
}

async fn make_ready(
    node: &Arc<Node>,
    migration: &Arc<Migration>,
    live: &mut Live,
    service: Option<ServiceSpec>,
    server: &Server,
    marker_port: u16,
) -> Answer<()> {
    let mut peer = connect(node, &server.name, &server.migration_endpoint).await?;
    let facts = live.facts.clone();
    let post_copy = live.needs.post_copy;
    let reserve = ReserveRequest { migration: migration.id.clone(), service, facts, post_copy };
    peer.reserve(reserve).await.map_err(|s| at_peer("prepare", &server.name, &s))?;
    let mut pages = None;
    if post_copy {
        let opened = postcopy::Source::open(&mut peer, &migration.id).await;
        let (source, theirs) = opened.map_err(|s| at_peer("prepare", &server.name, &s))?;
        live.pages = Some(source);
        pages = Some(theirs);
    }
    live.peer = Some(peer);

    let failed = |e: Error| Failure::at("prepare", &e);
    let hierarchy = node.hierarchy().map_err(failed)?;
    let (_, source) = part(live).ok_or_else(|| unknown(&migration.id))?;
    let pid = source.pid;
    let placement = hierarchy.plan(pid, &migration.id).map_err(failed)?;
    change(node, migration, live, |s| s.placement = Some(placement.clone()))?;
    hierarchy.settle(pid, &placement).map_err(failed)?;
    if marker_port != 0 {
        let v = live.record.as_ref().map(|r| r.address).ok_or_else(|| unknown(&migration.id))?;
        live.markers = Some(Markers::listen(v, marker_port).await.map_err(failed)?);
    }
    fence::prepare(&migration.id).map_err(failed)?;

    let images = node.images(&migration.id);
    fresh_dir(&images).map_err(failed)?;
    let cgroup = hierarchy.criu_dir(&migration.id);
    freezer::make(&cgroup).map_err(failed)?;
    if let Some(pages) = &pages {
        criu::write_pages_config(&images, pages.as_raw_fd()).map_err(failed)?;
    }
    let swrk = Swrk::spawn_with(&node.config.criu, &cgroup, &images.join(criu::STDERR), pages).await;
    let swrk = live.swrk.insert(swrk.map_err(failed)?);
    // all that CRIU does before it touches the tasks is done now, so that nobody waits for it later
    let begun = tokio::time::timeout(CRIU_PATIENCE, begin_dump(swrk, pid, &images, live.needs)).await;
    let late = || Error::other(format!("CRIU was not ready to dump in {} s", CRIU_PATIENCE.as_secs()));
    begun.unwrap_or_else(|_| Err(late())).map_err(|e| {
        let reason = node.criu_failure(&migration.id, criu::DUMP_LOG);
        Failure::new(Code::Aborted, format!("prepare: {}: {reason}", chain(&e)))
    })
}

/// Has CRIU begin to dump, up to the question `pre-dump`, which waits for its answer. Unanswered it touches nothing, and ends
/// when its socket is closed.
async fn begin_dump(swrk: &mut Swrk, pid: u32, images: &Path, needs: Needs) -> Result<()> {
    swrk.dump(pid, images, needs).await?;
    loop {
        match swrk.event().await? {
            Event::Notify(point) if point == PRE_DUMP => return Ok(()),
            Event::Notify(_) => swrk.answer(true).await?,
            Event::Final { .. } => return Err(Error::other("CRIU does not dump")),
        }
    }
}

type Peer = MigratorPeerClient<tonic::transport::Channel>;

async fn connect(node: &Node, name: &str, endpoint: &str) -> Answer<Peer> {
    let stall = node.config.stall_limit();
    let channel = node.tls.connect_watched(TlsRole::Migrator, name, endpoint, stall).await;
    channel
        .map(MigratorPeerClient::new)
        .map_err(|e| Failure::new(Code::Unavailable, format!("prepare: {}", chain(&e))))
}

/// What the destination said, or what happened on the way to it.
fn words(status: &tonic::Status) -> String {
    let mut words = status.message().to_owned();
    let mut next = std::error::Error::source(status);
    while let Some(source) = next {
        let text = source.to_string();
        // most layers repeat their source
        if !words.contains(&text) {
            words.push_str(": ");
            words.push_str(&text);
        }
        next = source.source();
    }
    words
}

/// A call to the destination failed: there (its words), or on the way.
fn at_peer(step: &str, peer: &str, status: &tonic::Status) -> Failure {
    let code = match status.code() {
        Code::FailedPrecondition => Code::FailedPrecondition,
        Code::Unavailable | Code::Unknown | Code::DeadlineExceeded | Code::Cancelled => Code::Unavailable,
        _ => Code::Aborted,
    };
    let unreachable = if code == Code::Unavailable { " cannot be reached" } else { "" };
    Failure::new(code, format!("{step}: migrator {peer}{unreachable}: {}", words(status)))
}

/// Steps 6 to 8 and the vote.
///
/// # Errors
/// The step and the reason; everything is undone and the service runs on here.
pub async fn freeze(node: &Arc<Node>, request: &FreezeRequest) -> Answer<FreezeResponse> {
    let FreezeRequest { migration: id, yield_with_vote, .. } = request;
    let mut clock = Clock::start();
    let migration = node.get(id).ok_or_else(|| unknown(id))?;
    let mut live = migration.lock().await;
    let begun = advance_with(node, &migration, &mut live, SourceEvent::Freeze, |s| s.touched = true)?;
    if begun == Next::Already {
        return answer(&live);
    }
    let quiet = quiet(node, &migration, &mut live, &mut clock, request).await;
    let worked = match quiet {
        Ok(quiet) => freeze_steps(node, &migration, &mut live, &mut clock).await.map(|done| (quiet, done)),
        Err(failure) => Err(failure),
    };
    let voted = worked.and_then(|(quiet, (image_bytes, fenced))| {
        let Fenced { connections, mut losses } = fenced;
        losses.extend(quiet.losses);
        let vote = Vote { steps: clock.finish(), image_bytes, connections, losses, markers_seen: quiet.seen };
        let event = if *yield_with_vote { SourceEvent::VoteYielded } else { SourceEvent::Vote };
        advance_with(node, &migration, &mut live, event, |s| s.vote = Some(vote))
    });
    if let Err(failure) = voted {
        return Err(undo_after(node, &migration, &mut live, failure).await);
    }
    if !*yield_with_vote {
        tokio::spawn(lease(node.clone(), migration.clone(), given_up(&live)));
    }
    answer(&live)
}

fn answer(live: &Live) -> Answer<FreezeResponse> {
    let vote = part(live).and_then(|(_, s)| Some((s.pid, s.vote.clone()?)));
    let (pid, vote) = vote.ok_or_else(|| Failure::new(Code::Internal, "a vote without its record"))?;
    Ok(FreezeResponse {
        markers_seen: vote.markers_seen,
        steps: vote.steps.into_iter().map(Into::into).collect(),
        pid,
        image_bytes: vote.image_bytes,
        connections: vote.connections,
        losses: vote.losses,
    })
}

/// Waits until nothing that held users have sent is under way or unread; see [`marker`].
async fn quiet(
    node: &Node,
    migration: &Migration,
    live: &mut Live,
    clock: &mut Clock,
    request: &FreezeRequest,
) -> Answer<Quiet> {
    // the port is free again before the process that may want it at the destination is restored
    let Some(markers) = live.markers.take() else { return Ok(Quiet::default()) };
    let (_, source) = part(live).ok_or_else(|| unknown(&migration.id))?;
    let placement =
        source.placement.clone().ok_or_else(|| Failure::refused("quiet: the process has no cgroup"))?;
    let patience = Duration::from_millis(request.marker_wait_ms).min(node.config.freeze_limit());
    let work = async {
        let owned = process::sockets(&freezer::procs(&placement.dir)?);
        markers.quiet(&request.markers, &owned, patience).await
    };
    tokio::select! {
        quiet = clock.step("quiet", work) => quiet.map_err(|e| Failure::at("quiet", &e)),
        () = migration.cancelled() => Err(Failure::new(Code::Aborted, "freeze: the controller aborted")),
    }
}

/// A source that has voted goes back alone when it hears nothing, or when CRIU dies (which leaves the sockets in repair
/// mode: better undone at once than found later).
async fn lease(
    node: Arc<Node>,
    migration: Arc<Migration>,
    given_up: impl Future<Output = &'static str> + Send + 'static,
) {
    let why = tokio::select! {
        () = tokio::time::sleep(node.config.vote_lease()) =>
            format!("no yield within {} s of the vote", node.config.vote_lease_seconds),
        why = given_up => why.to_owned(),
    };
    let mut live = migration.lock().await;
    if part(&live).is_some_and(|(_, s)| s.state == SourceState::Voted) {
        tracing::warn!(migration = migration.id, "{why}: the service goes on here");
        if let Err(e) = undo(&node, &migration, &mut live, SourceEvent::AbortAlone).await {
            tracing::error!(migration = migration.id, error = e.message, "undoing");
        }
    }
}

/// Completes when what the frozen process needs is gone: CRIU, or in post-copy the way of its pages (CRIU itself ends when
/// all have been fetched).
fn given_up(live: &Live) -> impl Future<Output = &'static str> + Send + 'static {
    let exited = live.swrk.as_ref().map(Swrk::exited);
    let pages = live.pages.as_ref().map(postcopy::Source::fetched);
    async move {
        match (exited, pages) {
            (_, Some(fetched)) => {
                if postcopy::over(fetched).await {
                    std::future::pending::<()>().await;
                }
                "memory can no longer follow the copy"
            }
            (Some(mut exited), None) => {
                // an error means that nobody watches it any more, which is as good as dead
                let _ = exited.wait_for(|gone| *gone).await;
                "criu swrk died while it kept the process"
            }
            (None, None) => std::future::pending().await,
        }
    }
}

async fn freeze_steps(
    node: &Arc<Node>,
    migration: &Arc<Migration>,
    live: &mut Live,
    clock: &mut Clock,
) -> Answer<(u64, Fenced)> {
    let copying = Copying::start(node, migration, live)?;
    let mut fenced = dump(node, migration, live, clock).await?;
    let limit = node.config.freeze_limit();
    let given_up = given_up(live);
    let work = move_over(node, migration, live, copying, clock);
    // none of the steps after the dump leaves anything half done that undo would not find
    let (bytes, connections) = tokio::select! {
        done = work => done?,
        () = migration.cancelled() => return Err(Failure::new(Code::Aborted, "freeze: the controller aborted")),
        why = given_up => return Err(Failure::new(Code::Aborted, format!("freeze: {why}"))),
        () = tokio::time::sleep(limit) => {
            let words = format!("freeze: not done within freeze_limit_seconds = {}", limit.as_secs());
            return Err(Failure::new(Code::Aborted, words));
        }
    };
    fenced.connections = connections;
    Ok((bytes, fenced))
}

/// Images on their way to the destination while they are written. Dropped, it ends the stream, and the destination
/// discards what it has.
struct Copying {
    call: JoinSet<std::result::Result<tonic::Response<ReceiveResponse>, tonic::Status>>,
    reading: JoinHandle<Result<Volume>>,
}

impl Copying {
    /// Opens the stream; the destination makes ready for the copy meanwhile.
    fn start(node: &Node, migration: &Migration, live: &Live) -> Answer<Self> {
        let peer = live.peer.clone();
        let mut peer =
            peer.ok_or_else(|| Failure::refused("copy: there is no connection to the destination"))?;
        let (chunks, reading) = transfer::follow(migration.id.clone(), &node.images(&migration.id))
            .map_err(|e| Failure::at("copy", &e))?;
        let mut call = JoinSet::new();
        call.spawn(async move { peer.receive(tokio_stream::wrappers::ReceiverStream::new(chunks)).await });
        Ok(Self { call, reading })
    }

    /// Waits until all is at the destination. CRIU has written the last.
    async fn finish(mut self, peer_name: &str) -> Answer<Volume> {
        let lost = |e| Failure::new(Code::Internal, format!("copy: {e}"));
        let received = self.call.join_next().await.transpose().map_err(lost)?;
        let received = received.ok_or_else(|| Failure::new(Code::Internal, "copy: nothing was under way"))?;
        let received = received.map_err(|s| at_peer("copy", peer_name, &s))?.into_inner();
        let sent = self.reading.await.map_err(lost)?.map_err(|e| Failure::at("copy", &e))?;
        if (received.bytes, received.files) != (sent.bytes, sent.files) {
            let words = format!(
                "copy: {} bytes in {} files were sent, {} in {} arrived",
                sent.bytes, sent.files, received.bytes, received.files
            );
            return Err(Failure::new(Code::Aborted, words));
        }
        Ok(sent)
    }
}

/// Fence and dump. Ends with the tasks held by the freezer and CRIU waiting at `post-dump`. Is never interrupted: CRIU
/// killed with its parasite inside a task would ruin the task.
async fn dump(node: &Arc<Node>, migration: &Migration, live: &mut Live, clock: &mut Clock) -> Answer<Fenced> {
    let (record, source) = part(live).ok_or_else(|| unknown(&migration.id))?;
    let (v, pid) = (record.address, source.pid);
    let identity = Identity { pid, start_time: source.start_time };
    let placement =
        source.placement.clone().ok_or_else(|| Failure::refused("dump: the process has no cgroup"))?;
    if !identity.alive() {
        return Err(Failure::new(Code::Aborted, format!("dump: pid {pid} has ended")));
    }
    let (images, needs) = (node.images(&migration.id), live.needs);
    let failed = |e: Error| Failure::at("dump", &e);
    let died = |e: Error| {
        let reason = node.criu_failure(&migration.id, criu::DUMP_LOG);
        Failure::new(Code::Aborted, format!("dump: {}: {reason}", chain(&e)))
    };
    let swrk = live.swrk.as_mut().ok_or_else(|| Failure::refused("dump: criu swrk is not running"))?;
    // looked at before anything stands still: it takes the longer the more connections there are
    let owned = process::sockets(&freezer::procs(&placement.dir).map_err(failed)?);
    // failed, CRIU has not touched the tasks yet, and will not once its socket is closed
    let fence = fence_off(&migration.id, v, &owned, clock).await.map_err(|e| Failure::at("fence", &e))?;
    let dump_started = Instant::now();
    // until its final response it may have the sockets in repair mode
    live.broken = true;
    swrk.answer(true).await.map_err(died)?;
    loop {
        match swrk.event().await.map_err(died)? {
            Event::Notify(point) if point == "post-dump" => {
                live.held = true;
                clock.note("dump", dump_started);
                clock.step("freezer", freezer::freeze(&placement.dir)).await.map_err(failed)?;
                transfer::dumped(&images).map_err(failed)?;
                if !needs.post_copy {
                    return Ok(fence);
                }
                // from here on the freezer alone holds the tasks; CRIU says when it serves
                live.depended = Some(postcopy::Depended::new(node));
                live.held = false;
                swrk.answer(true).await.map_err(failed)?;
            }
            Event::Notify(point) if point == "status-ready" => {
                swrk.answer(true).await.map_err(failed)?;
                return Ok(fence);
            }
            Event::Notify(_) => swrk.answer(true).await.map_err(failed)?,
            Event::Final { .. } => {
                live.broken = false;
                let reason = node.criu_failure(&migration.id, criu::DUMP_LOG);
                return Err(Failure::new(Code::Aborted, format!("dump: CRIU: {reason}")));
            }
        }
    }
}

/// What was found when the fence closed.
#[derive(Debug, Default)]
struct Fenced {
    /// TCP connections that are taken along.
    connections: u32,
    /// What is not, in words.
    losses: Vec<String>,
}

/// New connections out, then a bounded wait for what is under way, then everything out. Nothing of it depends on the
/// number of established connections.
async fn fence_off(migration: &str, v: Ipv4Addr, owned: &HashSet<u32>, clock: &mut Clock) -> Result<Fenced> {
    let draining = Instant::now();
    fence::set(migration, v, Strength::NewConnections)?;
    let deadline = Instant::now() + DRAIN;
    let left = loop {
        let left = in_transit(v, owned)?;
        if left.is_empty() || Instant::now() >= deadline {
            break left;
        }
        tokio::time::sleep(DRAIN_LOOK).await;
    };
    clock.note("drain", draining);
    clock.step("fence", async { fence::set(migration, v, Strength::All) }).await?;
    if let Some((port, waiting)) = left.queues.first() {
        return Err(Error::other(format!(
            "{waiting} connections to port {port} wait to be accepted and the service does not accept them within {} \
             ms; CRIU cannot take them along",
            DRAIN.as_millis()
        )));
    }
    let mut losses = left.closing;
    for socket in sockets::udp()?.iter().filter(|s| owned.contains(&s.inode) && s.recv_queue > 0) {
        losses
            .push(format!("UDP port {}: {} bytes received but not read", socket.local.1, socket.recv_queue));
    }
    Ok(Fenced { connections: 0, losses })
}

/// What drains under the SYN fence, and what stays.
struct InTransit {
    /// Listening port, connections waiting to be accepted.
    queues: Vec<(u16, u32)>,
    /// Handshakes and closing connections on v, in words.
    closing: Vec<String>,
}

impl InTransit {
    fn is_empty(&self) -> bool {
        self.queues.is_empty() && self.closing.is_empty()
    }
}

fn in_transit(v: Ipv4Addr, owned: &HashSet<u32>) -> Result<InTransit> {
    let tcp = sockets::tcp_unsettled()?;
    let queues = tcp.iter().filter(|s| s.listens() && owned.contains(&s.inode) && s.recv_queue > 0);
    let closing = tcp.iter().filter(|s| s.local.0 == IpAddr::V4(v) && s.in_transit());
    Ok(InTransit {
        queues: queues.map(|s| (s.local.1, s.recv_queue)).collect(),
        closing: closing
            .map(|s| {
                format!("connection {}:{} was opening or closing and is not taken along", s.peer.0, s.peer.1)
            })
            .collect(),
    })
}

/// How many connections the frozen processes in `tree_dir` own.
fn connections(tree_dir: &Path) -> Result<u32> {
    let owned = process::sockets(&freezer::procs(tree_dir)?);
    let count = sockets::tcp()?.iter().filter(|s| s.connected() && owned.contains(&s.inode)).count();
    Ok(u32::try_from(count).unwrap_or(u32::MAX))
}

/// Images, restore at the destination, v. Everything under the fence. Gives bytes sent and connections taken along.
async fn move_over(
    node: &Node,
    migration: &Migration,
    live: &mut Live,
    copying: Copying,
    clock: &mut Clock,
) -> Answer<(u64, u32)> {
    let (record, source) = part(live).ok_or_else(|| unknown(&migration.id))?;
    let (v, peer_name) = (record.address, source.peer.clone());
    let tree_dir = source.placement.as_ref().map(|p| p.dir.clone()).unwrap_or_default();
    // beside the work: it takes the longer the more there are
    let timing = tokio::task::spawn_blocking({
        let tree_dir = tree_dir.clone();
        move || timers::living(&freezer::procs(&tree_dir)?)
    });
    let counting = tokio::task::spawn_blocking(move || connections(&tree_dir));
    let volume = clock.step("copy", copying.finish(&peer_name)).await?;
    let peer = live
        .peer
        .as_mut()
        .ok_or_else(|| Failure::refused("restore: there is no connection to the destination"))?;
    let living = timing.await.map_err(|e| Failure::new(Code::Internal, format!("copy: {e}")))?;
    let living = living.map_err(|e| Failure::at("copy", &e))?;
    let restore = RestoreRequest {
        migration: migration.id.clone(),
        image_bytes: volume.bytes,
        image_files: volume.files,
        timers: living.into_iter().map(|(pid, fd)| Descriptor { pid, fd }).collect(),
    };
    clock
        .part("restore", async {
            let answer = peer.restore(restore).await.map_err(|s| at_peer("restore", &peer_name, &s))?;
            Ok::<_, Failure>(answer.into_inner().steps.into_iter().map(Into::into).collect())
        })
        .await?;
    clock
        .step("address", async {
            node.addresses.blackhole(v).await?;
            node.addresses.remove(v).await
        })
        .await
        .map_err(|e| Failure::at("address", &e))?;
    let counted = counting.await.map_err(|e| Failure::new(Code::Internal, format!("copy: {e}")))?;
    Ok((volume.bytes, counted.map_err(|e| Failure::at("copy", &e))?))
}

/// Step 12.
///
/// # Errors
/// FAILED_PRECONDITION if this side has gone back, or not voted.
pub async fn yield_right(node: &Node, id: &str) -> Answer<()> {
    let migration = node.get(id).ok_or_else(|| unknown(id))?;
    let mut live = migration.lock().await;
    advance(node, &migration, &mut live, SourceEvent::Yield).map(|_| ())
}

/// Step 15. COMMIT: ends the original and everything of it here.
///
/// # Errors
/// FAILED_PRECONDITION before *yield*; INTERNAL tells what could not be done, and a repeated call goes on.
pub async fn end(node: &Node, id: &str) -> Answer<Vec<crate::record::Timing>> {
    let mut clock = Clock::start();
    let migration = node.get(id).ok_or_else(|| unknown(id))?;
    let mut live = migration.lock().await;
    if advance(node, &migration, &mut live, SourceEvent::End)? == Next::Already {
        return Ok(clock.finish());
    }
    let (record, source) = part(&live).ok_or_else(|| unknown(id))?;
    let (v, placement, pid) = (record.address, source.placement.clone(), source.pid);
    let mut errors = Errors::default();
    let mut complete = true;
    if let Some(pages) = live.pages.as_ref().map(postcopy::Source::fetched) {
        complete = clock.step("pages", postcopy::over(pages)).await;
    }
    clock
        .step("end", async {
            let dir = placement.as_ref().map(|p| &p.dir);
            let mut processes = Vec::new();
            if let Some(dir) = dir {
                for pid in errors.keep(freezer::procs(dir)).unwrap_or_default() {
                    // one that cannot be opened has gone
                    processes.extend(process::pidfd(pid).ok().map(|fd| (pid, fd)));
                }
            }
            if let Some(mut swrk) = live.swrk.take() {
                let ended = async {
                    if live.held {
                        swrk.answer(true).await?;
                    }
                    // of a page server this closes the socket
                    let serving = live.pages.take().is_some();
                    if live.held || serving {
                        swrk.finish(true, CRIU_PATIENCE).await?;
                    }
                    Ok::<_, Error>(())
                };
                if let Err(e) = ended.await {
                    tracing::warn!(migration = id, error = chain(&e), "CRIU did not end the process; the cgroup does");
                }
                live.held = false;
                swrk.wait_exit(CRIU_PATIENCE).await;
            }
            if let Some(dir) = dir {
                // with CRIU's "ok" nobody is left; without CRIU the sockets are in repair mode or fenced: silent too
                errors.keep(freezer::kill(dir).await);
            }
            let left = errors.keep(process::wait_gone(processes, REAP_PATIENCE).await).unwrap_or_default();
            if !left.is_empty() {
                tracing::warn!(migration = id, pids = ?left, "ended, but not reaped by their parent: the pids stay taken");
            }
            errors.keep(sockets::destroy(v));
        })
        .await;
    clock
        .step("unfence", async {
            errors.keep(fence::lift(id));
            errors.keep(node.addresses.remove_blackhole(v).await);
        })
        .await;
    if let Some(placement) = &placement {
        errors.keep(freezer::thaw(&placement.dir).await);
        if placement.own {
            errors.keep(freezer::remove(&placement.dir));
        }
    }
    errors.keep(tidy(node, id).await);
    errors.finish(&format!("ending pid {pid}"))?;
    advance(node, &migration, &mut live, SourceEvent::Done)?;
    *live = Live { record: live.record.take(), ..Live::default() };
    drop(live);
    node.prune();
    if !complete {
        let words = format!(
            "end: not all of the memory of pid {pid} followed the copy, which was killed therefore: the service has to be \
             started again at the destination"
        );
        tracing::error!(migration = id, words);
        return Err(Failure::new(Code::DataLoss, words));
    }
    Ok(clock.finish())
}

/// What every end of a migration leaves behind at the source: CRIU's cgroup, the images.
async fn tidy(node: &Node, id: &str) -> Result<()> {
    let mut errors = Errors::default();
    if let Some(hierarchy) = errors.keep(node.hierarchy()) {
        let criu = hierarchy.criu_dir(id);
        errors.keep(freezer::kill(&criu).await);
        errors.keep(freezer::remove(&criu));
        hierarchy.tidy();
    }
    errors.keep(node.drop_images(id));
    errors.finish("clearing away")
}

/// ABORT by the controller. Says whether the original runs.
///
/// # Errors
/// FAILED_PRECONDITION after COMMIT; INTERNAL tells what could not be undone, and a repeated call goes on.
pub async fn abort(node: &Arc<Node>, migration: &Arc<Migration>) -> Answer<bool> {
    let mut live = migration.interrupt().await;
    undo(node, migration, &mut live, SourceEvent::Abort).await
}

/// Undoes after `failure`, and gives it back with what could not be undone.
async fn undo_after(
    node: &Arc<Node>,
    migration: &Arc<Migration>,
    live: &mut Live,
    failure: Failure,
) -> Failure {
    tracing::warn!(migration = migration.id, reason = failure.message, "undoing");
    match undo(node, migration, live, SourceEvent::AbortAlone).await {
        Ok(_) => failure,
        Err(e) => Failure::new(failure.code, format!("{}; and {}", failure.message, e.message)),
    }
}

/// Everything back as it was. Also what a restarted daemon does with a source that has not yielded.
pub async fn undo(
    node: &Arc<Node>,
    migration: &Arc<Migration>,
    live: &mut Live,
    event: SourceEvent,
) -> Answer<bool> {
    let next = advance(node, migration, live, event)?;
    let (record, source) = part(live).ok_or_else(|| unknown(&migration.id))?;
    let (record, source) = (record.clone(), source.clone());
    let identity = Identity { pid: source.pid, start_time: source.start_time };
    if next == Next::Already {
        return Ok(identity.alive());
    }
    let mut errors = Errors::default();
    if source.touched {
        errors.keep(node.addresses.add(&record.interface, record.address).await);
        errors.keep(node.addresses.remove_blackhole(record.address).await);
    }
    let clean = let_go(node, &migration.id, live).await;
    if let Some(placement) = &source.placement {
        let tree = errors.keep(freezer::procs(&placement.dir)).unwrap_or_default();
        if source.touched {
            if !clean && let Some(sockets) = errors.keep(sockets::leave_repair(&tree)) {
                tracing::info!(migration = migration.id, sockets, "taken out of repair mode");
            }
            errors.keep(fence::open(&migration.id));
            errors.keep(sockets::probe(&tree));
            if source.post_copy {
                // CRIU left them stopped, or is about to have: the freezer still holds back what its signals do
                for &pid in &tree {
                    errors.keep(process::signal(pid, Signal::SIGCONT));
                }
            }
            errors.keep(freezer::thaw(&placement.dir).await);
            if !clean {
                for pid in tree {
                    if process::stat(pid).is_ok_and(|s| s.state == 'T') {
                        errors.keep(process::signal(pid, Signal::SIGCONT));
                    }
                }
            }
        }
        if let Some(hierarchy) = errors.keep(node.hierarchy()) {
            errors.keep(hierarchy.put_back(placement));
        }
    }
    errors.keep(fence::lift(&migration.id));
    errors.keep(tidy(node, &migration.id).await);
    // the original is alive; now, and without keeping anybody waiting, the destination
    tokio::spawn(discard(node.clone(), migration.id.clone(), live.peer.take(), source));
    errors.finish("undoing")?;
    advance(node, migration, live, SourceEvent::Done)?;
    *live = Live { record: live.record.take(), ..Live::default() };
    node.prune();
    Ok(identity.alive())
}

/// Makes CRIU let go of the tasks. Says whether it did so itself, leaving nothing in repair mode.
async fn let_go(node: &Node, id: &str, live: &mut Live) -> bool {
    let held = std::mem::take(&mut live.held);
    let serving = live.pages.take().is_some();
    if let Some(mut swrk) = live.swrk.take() {
        let mut clean = !live.broken;
        if held {
            let thawed = async {
                swrk.answer(false).await?;
                swrk.finish(false, CRIU_PATIENCE).await
            };
            // the final response reports the failure that we asked for
            match thawed.await {
                Ok(_) => clean = true,
                Err(e) => tracing::warn!(migration = id, error = chain(&e), "CRIU did not let go by itself"),
            }
        }
        if serving && live.broken {
            // the page server found its socket closed: it leaves the tasks stopped, with their sockets in repair mode
            if let Err(e) = swrk.finish(true, CRIU_PATIENCE).await {
                tracing::warn!(migration = id, error = chain(&e), "CRIU's page server");
            }
            clean = false;
        }
        // dropping the socket ends one that has not been asked anything
        let mut exited = swrk.exited();
        drop(swrk);
        let gone = tokio::time::timeout(CRIU_PATIENCE, exited.wait_for(|gone| *gone)).await.is_ok();
        return clean && gone;
    }
    // of an earlier life of this daemon: it found its socket closed, and lets go now or has done so
    if let Ok(hierarchy) = node.hierarchy()
        && let Err(e) = freezer::wait_empty(&hierarchy.criu_dir(id), CRIU_PATIENCE).await
    {
        tracing::warn!(migration = id, error = chain(&e), "criu swrk of an earlier life does not end");
    }
    false
}

async fn discard(node: Arc<Node>, id: String, peer: Option<Peer>, source: Source) {
    let mut peer = peer;
    for attempt in 1..=DISCARD_TRIES {
        let client = match peer.take() {
            Some(client) => Ok(client),
            None => connect(&node, &source.peer, &source.peer_endpoint).await,
        };
        let told = match client {
            Ok(mut client) => client
                .discard(DiscardRequest { migration: id.clone() })
                .await
                .map_err(|s| s.message().to_owned()),
            Err(e) => Err(e.message),
        };
        match told {
            Ok(_) => return,
            Err(error) => {
                tracing::warn!(migration = id, peer = source.peer, attempt, error, "telling the destination")
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
