//! The server a service goes to.
//!
//! ```text
//! reserve: preflight, a cgroup, criu swrk in it
//! receive: fence -> v; images, while the source dumps
//! restore: CRIU restores, stopped -> frozen -> VOTE
//! resume:  fence off -> SIGCONT, thawed -> v announced    (COMMIT)
//! discard: copy killed, its sockets destroyed -> v away -> fence off   (ABORT, failure, restart)
//! ```
//!
//! Invariants: the copy never runs before *resume*; v is here only under the fence until then; CRIU's *final* response
//! decides, not a notification (at `post-restore` it can still fail). A restarted daemon keeps a copy that was voted for,
//! and discards every other.

use std::{collections::HashSet, net::Ipv4Addr, path::Path, sync::Arc, time::Duration};

use handover_api::v1::{ImageChunk, PageBytes, ReserveRequest, RestoreRequest};
use nix::sys::signal::Signal;
use tonic::{Code, Streaming};

use crate::{
    criu::{self, Event, Swrk},
    error::{Error, Errors, Result, chain},
    fence::{self, Strength},
    freezer,
    machine::{DestinationEvent, DestinationState, Next},
    node::{Answer, Clock, Failure, Live, Migration, Node, Service, fresh_dir},
    postcopy::{self, Depended, Fetch},
    preflight, process,
    record::{Destination, Record, Role, Timing},
    sockets, timers,
    transfer::{self, Receiver, Volume},
};

/// Announcements of v after *resume* (RFC 5227: ANNOUNCE_NUM).
const ANNOUNCE_NUM: u32 = 2;
/// Time between them (RFC 5227: ANNOUNCE_INTERVAL).
const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(2);

/// Messages under way between wire and disk.
const DEPTH: usize = 8;

fn part(live: &Live) -> Option<(&Record, &Destination)> {
    match &live.record {
        Some(record @ Record { role: Role::Destination(destination), .. }) => Some((record, destination)),
        _ => None,
    }
}

fn unknown(id: &str) -> Failure {
    Failure::new(Code::NotFound, format!("migration {id} has no destination here"))
}

fn change(
    node: &Node,
    migration: &Migration,
    live: &mut Live,
    edit: impl FnOnce(&mut Destination),
) -> Result<()> {
    let mut record = live.record.clone().ok_or_else(|| Error::other("there is no record to change"))?;
    let Role::Destination(destination) = &mut record.role else {
        return Err(Error::other(format!("migration {} has no destination here", migration.id)));
    };
    edit(destination);
    node.commit(migration, live, record)
}

fn advance(
    node: &Node,
    migration: &Migration,
    live: &mut Live,
    event: DestinationEvent,
) -> Answer<Next<DestinationState>> {
    advance_with(node, migration, live, event, |_| {})
}

/// The same, with another change in the same write.
fn advance_with(
    node: &Node,
    migration: &Migration,
    live: &mut Live,
    event: DestinationEvent,
    edit: impl FnOnce(&mut Destination),
) -> Answer<Next<DestinationState>> {
    let (_, destination) = part(live).ok_or_else(|| unknown(&migration.id))?;
    let next = destination.state.on(event);
    match next {
        Next::Go(state) => change(node, migration, live, |d| {
            d.state = state;
            edit(d);
        })?,
        Next::Already => {}
        Next::Refuse(why) => {
            let words = format!("migration {} is {}: {why}", migration.id, destination.state.name());
            return Err(Failure::refused(words));
        }
    }
    Ok(next)
}

/// Step 4: keeps the place.
///
/// # Errors
/// FAILED_PRECONDITION with the findings.
pub async fn reserve(node: &Arc<Node>, request: ReserveRequest) -> Answer<()> {
    let service = Service::parse(request.service, &node.config)?;
    let facts = request.facts.ok_or_else(|| Failure::invalid("the request holds no facts of the process"))?;
    let migration = node.entry(&request.migration)?;
    let mut live = migration.lock().await;
    if let Some(record) = &live.record {
        return match part(&live).map(|(_, d)| d.state) {
            Some(DestinationState::Reserved) => Ok(()),
            _ => Err(Failure::refused(format!(
                "migration {} is {} ({}) here already",
                migration.id,
                record.state_name(),
                record.role_name()
            ))),
        };
    }
    let findings = preflight::destination(node, &migration.id, &service, &facts).await;
    let hierarchy = match (preflight::errors(&findings), node.hierarchy()) {
        (None, Ok(hierarchy)) => hierarchy,
        (errors, _) => {
            drop(live);
            node.forget(&request.migration);
            return Err(Failure::refused(errors.unwrap_or_default()));
        }
    };
    let destination = Destination {
        state: DestinationState::Reserved,
        pid: facts.pid,
        cgroup: hierarchy.copy_dir(&service.name, &migration.id),
        address_added: false,
        steps: Vec::new(),
    };
    let cgroup = destination.cgroup.clone();
    let record = Record::new(
        &migration.id,
        &service.name,
        service.address,
        &node.config.interface,
        Role::Destination(destination),
    );
    node.commit(&migration, &mut live, record)?;
    let images = node.images(&migration.id);
    let ready = async {
        fresh_dir(&images)?;
        freezer::make(&cgroup)?;
        fence::prepare(&migration.id)?;
        // started now, so that the service does not stand still for it
        live.swrk = Some(Swrk::spawn(&node.config.criu, &cgroup, &images.join(criu::STDERR)).await?);
        if request.post_copy {
            let dir = hierarchy.pages_dir(&migration.id);
            live.fetch = Some(Fetch::start(node, &migration.id, dir, &cgroup)?);
        }
        Ok::<_, Error>(())
    };
    match ready.await {
        Ok(()) => Ok(()),
        Err(e) => Err(discard_after(node, &migration, &mut live, Failure::at("reserve", &e)).await),
    }
}

/// Post-copy: joins the source's stream of pages with what fetches them here. Gives what is to be sent back.
///
/// # Errors
/// No such migration, or its pages have a way already.
pub async fn pages(
    node: &Arc<Node>,
    mut stream: Streaming<PageBytes>,
) -> Answer<tokio::sync::mpsc::Receiver<PageBytes>> {
    let broken = |s: tonic::Status| Failure::new(Code::Aborted, format!("the stream broke: {}", s.message()));
    let opening = stream
        .message()
        .await
        .map_err(broken)?
        .ok_or_else(|| Failure::invalid("the stream holds nothing"))?;
    let migration = node.get(&opening.migration).ok_or_else(|| unknown(&opening.migration))?;
    let mut live = migration.lock().await;
    let reserved = part(&live).is_some_and(|(_, d)| d.state == DestinationState::Reserved);
    let joined = live.fetch.as_mut().filter(|_| reserved).and_then(|f| f.join(&migration.id, stream));
    joined.ok_or_else(|| Failure::refused(format!("migration {} waits for no pages", migration.id)))
}

/// Step 7: fences v, adds it, and takes the images. Begins when the source begins to dump, so that all is ready when the
/// last image comes.
///
/// # Errors
/// The stream is not what [`transfer`] allows; everything is discarded.
pub async fn receive(node: &Arc<Node>, mut stream: Streaming<ImageChunk>) -> Answer<Volume> {
    let broken = |s: tonic::Status| Failure::new(Code::Aborted, format!("the stream broke: {}", s.message()));
    let opening = stream
        .message()
        .await
        .map_err(broken)?
        .ok_or_else(|| Failure::invalid("the stream holds nothing"))?;
    if !opening.file.is_empty() || !opening.data.is_empty() {
        return Err(Failure::invalid("the stream's first message holds more than the migration"));
    }
    let migration = node.get(&opening.migration).ok_or_else(|| unknown(&opening.migration))?;
    let mut live = migration.lock().await;
    let begun =
        advance_with(node, &migration, &mut live, DestinationEvent::Restore, |d| d.address_added = true)?;
    if begun == Next::Already {
        return Err(Failure::refused(format!("migration {} is restored already", migration.id)));
    }
    let (record, _) = part(&live).ok_or_else(|| unknown(&migration.id))?;
    let (v, interface) = (record.address, record.interface.clone());
    let fenced = async {
        fence::set(&migration.id, v, Strength::All)?;
        node.addresses.add(&interface, v).await
    };
    if let Err(e) = fenced.await {
        let failure = Failure::new(Code::Aborted, chain(&e));
        return Err(discard_after(node, &migration, &mut live, failure).await);
    }
    let dir = node.images(&migration.id);
    let received = async {
        let (room, _) = transfer::room(&dir)?;
        let mut receiver = Receiver::new(&dir, room);
        let (tx, mut rx) = tokio::sync::mpsc::channel::<ImageChunk>(DEPTH);
        let writing = tokio::task::spawn_blocking(move || {
            while let Some(chunk) = rx.blocking_recv() {
                receiver.take(&chunk)?;
            }
            receiver.finish()
        });
        let mut torn = None;
        loop {
            match stream.message().await {
                Ok(Some(chunk)) => {
                    if tx.send(chunk).await.is_err() {
                        break; // the writer tells why
                    }
                }
                Ok(None) => break,
                Err(s) => {
                    torn = Some(s.message().to_owned());
                    break;
                }
            }
        }
        drop(tx);
        let written = writing.await.map_err(|e| Error::other(format!("writing images: {e}")))?;
        match torn {
            Some(why) => Err(Error::other(format!("the stream broke: {why}"))),
            None => written,
        }
    };
    let received = tokio::select! {
        received = received => received.map_err(|e| Failure::new(Code::Aborted, chain(&e))),
        () = migration.cancelled() => Err(Failure::new(Code::Aborted, "aborted while images came")),
    };
    match received {
        Ok(volume) => {
            live.received = Some(volume);
            Ok(volume)
        }
        Err(failure) => Err(discard_after(node, &migration, &mut live, failure).await),
    }
}

/// Step 7: restores stopped under the fence, and votes.
///
/// # Errors
/// CRIU's reason; everything is discarded.
pub async fn restore(node: &Arc<Node>, request: RestoreRequest) -> Answer<(u32, Vec<Timing>)> {
    let mut clock = Clock::start();
    let migration = node.get(&request.migration).ok_or_else(|| unknown(&request.migration))?;
    let mut live = migration.lock().await;
    let (_, d) = part(&live).ok_or_else(|| unknown(&migration.id))?;
    match d.state {
        DestinationState::Restoring => {}
        DestinationState::Restored | DestinationState::Resuming | DestinationState::Resumed => {
            return Ok((d.pid, d.steps.clone()));
        }
        state => {
            let words = format!("migration {} is {}: no images have come", migration.id, state.name());
            return Err(Failure::refused(words));
        }
    }
    if live.received.take() != Some(Volume { bytes: request.image_bytes, files: request.image_files }) {
        let words = format!(
            "{} bytes in {} images were sent, other than arrived",
            request.image_bytes, request.image_files
        );
        return Err(discard_after(node, &migration, &mut live, Failure::new(Code::Aborted, words)).await);
    }
    let lived: HashSet<timers::Place> = request.timers.iter().map(|t| (t.pid, t.fd)).collect();
    let worked = tokio::select! {
        worked = restore_steps(node, &migration, &mut live, &mut clock, &lived) => worked,
        () = migration.cancelled() => Err(Failure::new(Code::Aborted, "aborted while it was being restored")),
    };
    let voted = worked.and_then(|()| {
        let steps = clock.finish();
        advance_with(node, &migration, &mut live, DestinationEvent::Vote, |d| d.steps = steps)
    });
    if let Err(failure) = voted {
        return Err(discard_after(node, &migration, &mut live, failure).await);
    }
    let (_, d) = part(&live).ok_or_else(|| unknown(&migration.id))?;
    Ok((d.pid, d.steps.clone()))
}

async fn restore_steps(
    node: &Node,
    migration: &Migration,
    live: &mut Live,
    clock: &mut Clock,
    lived: &HashSet<timers::Place>,
) -> Answer<()> {
    let (_, d) = part(live).ok_or_else(|| unknown(&migration.id))?;
    let (pid, cgroup) = (d.pid, d.cgroup.clone());
    let swrk = live.swrk.as_mut().ok_or_else(|| Failure::refused("criu swrk is not running"))?;
    let mut fetch = live.fetch.as_mut();
    let post_copy = fetch.is_some();
    if let Some(fetch) = &mut fetch
        && let Err(e) = clock.step("pages", fetch.begin()).await
    {
        let reason = node.criu_failure(&migration.id, criu::LAZY_LOG);
        return Err(Failure::new(Code::Aborted, format!("{}: {reason}", chain(&e))));
    }
    let restored = clock
        .step("criu", async {
            swrk.restore(&node.images(&migration.id), post_copy).await?;
            loop {
                match swrk.event().await? {
                    Event::Notify(_) => swrk.answer(true).await?,
                    Event::Final { success, pid } => return Ok::<_, Error>(success.then_some(pid).flatten()),
                }
            }
        })
        .await;
    match restored {
        Ok(Some(root)) if root == pid => {
            if let Some(fetch) = fetch {
                let kept = fetch.hold().await.map_err(|e| Failure::new(Code::Aborted, chain(&e)))?;
                tracing::info!(migration = migration.id, kept, "userfault descriptors");
            }
            let held = clock.step("freezer", hold(swrk, &cgroup, pid, lived)).await;
            let armed = held.map_err(|e| Failure::new(Code::Aborted, chain(&e)))?;
            if armed > 0 {
                tracing::info!(migration = migration.id, armed, "expired timers armed");
            }
            Ok(())
        }
        Ok(Some(root)) => {
            Err(Failure::new(Code::Aborted, format!("CRIU says it restored pid {root}, not {pid}")))
        }
        Ok(None) => {
            let reason = node.criu_failure(&migration.id, criu::RESTORE_LOG);
            Err(Failure::new(Code::Aborted, format!("CRIU: {reason}")))
        }
        Err(e) => {
            let reason = node.criu_failure(&migration.id, criu::RESTORE_LOG);
            Err(Failure::new(Code::Aborted, format!("{}: {reason}", chain(&e))))
        }
    }
}

/// CRIU's final response comes when it has sent the stop signals, not when they have taken effect: the freezer says when
/// all stands still, and keeps it so against a stray SIGCONT. Then what CRIU left undone is done.
async fn hold(swrk: &mut Swrk, cgroup: &Path, pid: u32, lived: &HashSet<timers::Place>) -> Result<usize> {
    if !swrk.wait_exit(freezer::PATIENCE).await {
        return Err(Error::other(format!("criu swrk (pid {}) does not end", swrk.pid())));
    }
    freezer::freeze(cgroup).await?;
    let tree = freezer::procs(cgroup)?;
    if !tree.contains(&pid) {
        return Err(Error::other(format!("the copy (pid {pid}) ended at once")));
    }
    timers::rearm(&tree, lived)
}

/// Step 14. COMMIT: the copy becomes the service.
///
/// # Errors
/// FAILED_PRECONDITION before the vote or after ABORT; INTERNAL tells what could not be done, and a repeated call goes on.
pub async fn resume(node: &Arc<Node>, id: &str) -> Answer<(u32, Vec<Timing>)> {
    let mut clock = Clock::start();
    let migration = node.get(id).ok_or_else(|| unknown(id))?;
    let mut live = migration.lock().await;
    let next = advance(node, &migration, &mut live, DestinationEvent::Resume)?;
    let (record, d) = part(&live).ok_or_else(|| unknown(id))?;
    let (v, interface, pid, cgroup) = (record.address, record.interface.clone(), d.pid, d.cgroup.clone());
    if next == Next::Already {
        return Ok((pid, clock.finish()));
    }
    let tree = freezer::procs(&cgroup)?;
    if !tree.contains(&pid) {
        // the fence stays: without the process the kernel would reset its connections
        return Err(Failure::new(Code::Internal, format!("resume: the copy (pid {pid}) is gone")));
    }
    clock.step("unfence", async { fence::open(id) }).await?;
    let probed = clock.step("probe", async { sockets::probe(&tree) }).await;
    if let Err(e) = probed {
        // they go on by their timers
        tracing::warn!(migration = id, error = chain(&e), "probing connections");
    }
    clock.step("continue", go_on(&cgroup, &tree)).await?;
    clock.step("announce", node.addresses.announce(&interface, v)).await?;
    tokio::spawn(announce_again(node.clone(), interface, v));
    // the service runs: nobody waits for what is left to be cleared away
    tokio::spawn(settle(node.clone(), migration.clone()));
    Ok((pid, clock.finish()))
}

/// After *resume*: makes it durable that the copy is the service, and clears away.
async fn settle(node: Arc<Node>, migration: Arc<Migration>) {
    let mut live = migration.lock().await;
    let id = &migration.id;
    let settled = async {
        if part(&live).is_none_or(|(_, d)| d.state != DestinationState::Resuming) {
            return Ok(()); // asked twice
        }
        advance(&node, &migration, &mut live, DestinationEvent::Done)?;
        let before = std::mem::take(&mut *live);
        live.record = before.record;
        if let Some(fetch) = before.fetch {
            tokio::spawn(follow(Depended::new(&node), id.clone(), fetch.fetched()));
        }
        // from here on a restarted daemon clears away what is left
        let mut errors = Errors::default();
        errors.keep(fence::lift(id));
        errors.keep(node.drop_images(id));
        errors.finish("clearing away").map_err(Failure::from)
    };
    if let Err(f) = settled.await {
        tracing::warn!(migration = id, error = f.message, "after resume");
    }
    drop(live);
    node.prune();
}

/// Post-copy: tells how it ends.
async fn follow(depended: Depended, id: String, fetched: postcopy::Fetched) {
    if postcopy::over(fetched).await {
        tracing::info!(migration = id, "all memory has followed");
    } else {
        tracing::error!(
            migration = id,
            "the source of the copy's memory was lost before all of it had followed; the copy was killed: start the service again"
        );
    }
    drop(depended);
}

/// Stop signals are taken back while the freezer still holds all, which then lets the whole tree go at one instant.
async fn go_on(cgroup: &Path, tree: &[u32]) -> Result<()> {
    let mut errors = Errors::default();
    for &pid in tree {
        errors.keep(process::signal(pid, Signal::SIGCONT));
    }
    errors.keep(freezer::thaw(cgroup).await);
    let stopped: Vec<u32> =
        tree.iter().copied().filter(|&p| process::stat(p).is_ok_and(|s| s.state == 'T')).collect();
    if !stopped.is_empty() {
        errors.keep::<()>(Err(Error::other(format!("still stopped: {stopped:?}"))));
    }
    errors.finish("continuing the copy")
}

async fn announce_again(node: Arc<Node>, interface: String, v: Ipv4Addr) {
    for _ in 1..ANNOUNCE_NUM {
        tokio::time::sleep(ANNOUNCE_INTERVAL).await;
        // it may have moved on meanwhile
        if matches!(node.addresses.find(v).await, Ok(Some(_)))
            && node.busy_with(v, "").is_none()
            && let Err(e) = node.addresses.announce(&interface, v).await
        {
            tracing::warn!(address = %v, error = chain(&e), "announcing again");
        }
    }
}

/// ABORT by the controller or the source.
///
/// # Errors
/// FAILED_PRECONDITION after COMMIT; INTERNAL tells what could not be undone, and a repeated call goes on.
pub async fn abort(node: &Arc<Node>, migration: &Arc<Migration>) -> Answer<()> {
    let mut live = migration.interrupt().await;
    discard(node, migration, &mut live).await
}

async fn discard_after(
    node: &Arc<Node>,
    migration: &Arc<Migration>,
    live: &mut Live,
    failure: Failure,
) -> Failure {
    tracing::warn!(migration = migration.id, reason = failure.message, "discarding");
    match discard(node, migration, live).await {
        Ok(()) => failure,
        Err(e) => Failure::new(failure.code, format!("{}; and {}", failure.message, e.message)),
    }
}

/// Nothing of it left here. Also what a restarted daemon does with a copy it has not voted for.
pub async fn discard(node: &Arc<Node>, migration: &Arc<Migration>, live: &mut Live) -> Answer<()> {
    if advance(node, migration, live, DestinationEvent::Abort)? == Next::Already {
        return Ok(());
    }
    let (record, d) = part(live).ok_or_else(|| unknown(&migration.id))?;
    let (v, cgroup, address_added) = (record.address, d.cgroup.clone(), d.address_added);
    let mut errors = Errors::default();
    // criu swrk is in there too
    errors.keep(freezer::kill(&cgroup).await);
    live.swrk = None;
    live.fetch = None;
    if let Some(hierarchy) = errors.keep(node.hierarchy()) {
        let pages = hierarchy.pages_dir(&migration.id);
        errors.keep(freezer::kill(&pages).await);
        errors.keep(freezer::remove(&pages));
    }
    if address_added {
        errors.keep(sockets::destroy(v));
        errors.keep(node.addresses.remove(v).await);
    }
    errors.keep(fence::lift(&migration.id));
    errors.keep(freezer::remove(&cgroup));
    if let Some(hierarchy) = errors.keep(node.hierarchy()) {
        hierarchy.tidy();
    }
    errors.keep(node.drop_images(&migration.id));
    errors.finish("discarding the copy")?;
    advance(node, migration, live, DestinationEvent::Done)?;
    *live = Live { record: live.record.take(), ..Live::default() };
    node.prune();
    Ok(())
}
