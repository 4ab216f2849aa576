//! The two services, who may call them, and what a started or ending daemon does with its migrations.
//!
//! A call that changes anything runs in a task of its own: a caller that goes away (gRPC then drops the handler) never
//! leaves a sequence half done.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use handover_api::{
    audit::Audit,
    gate::{Gate, Rules},
    tls::{self, Peer, Role},
    v1::{
        AbortMigrationRequest, AbortMigrationResponse, DiscardRequest, DiscardResponse, EndRequest,
        EndResponse, FreezeRequest, FreezeResponse, ImageChunk, MigrationStatus, MigratorStatus,
        MigratorStatusRequest, PageBytes, PreflightRequest, PreflightResponse, PrepareRequest,
        PrepareResponse, ReceiveResponse, ReserveRequest, ReserveResponse, RestoreRequest, RestoreResponse,
        ResumeRequest, ResumeResponse, YieldRequest, YieldResponse,
        migrator_peer_server::{MigratorPeer, MigratorPeerServer},
        migrator_server::{Migrator, MigratorServer},
        preflight_request,
    },
};
use tokio::{net::TcpListener, sync::watch};
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};

use crate::{
    destination,
    error::{Error, chain},
    fence, local,
    machine::{Recovery, SourceEvent, SourceState},
    node::{Answer, Failure, Migration, Node, Service},
    preflight,
    record::{Record, Role as Part},
    source,
};

/// Per stream and connection: images are streamed at memory speed, not at 64 KiB per round trip.
const WINDOW: u32 = 8 << 20;

/// How long an ending daemon waits for memory that still follows a copy (below systemd's 90 s).
const MEMORY_PATIENCE: Duration = Duration::from_secs(60);

/// Largest HTTP/2 frame taken: fewer of them cost less than the 16 KiB that are usual.
const FRAME: u32 = 1 << 20;

/// Runs `work` to its end whatever happens to the caller.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Answer<T>> + Send + 'static,
) -> Result<T, Status> {
    match tokio::spawn(work).await {
        Ok(answer) => answer.map_err(Status::from),
        Err(e) => Err(Status::internal(format!("the call failed inside: {e}"))),
    }
}

type Result<T, E = Error> = std::result::Result<T, E>;

/// What the controller calls.
struct Control(Arc<Node>);

/// The controller, or somebody on this server: the local socket is guarded by its file mode.
fn controller_or_local<T>(request: &Request<T>) -> Result<(), Status> {
    match tls::peer(request)? {
        who @ Peer::Local { .. } => {
            tracing::debug!(%who, "asked on the spot");
            Ok(())
        }
        Peer::Remote { .. } => tls::require_role(request, &[Role::Controller]).map(drop),
    }
}

/// What other migrators call.
struct PeerService(Arc<Node>);

#[tonic::async_trait]
impl Migrator for Control {
    async fn status(
        &self,
        request: Request<MigratorStatusRequest>,
    ) -> Result<Response<MigratorStatus>, Status> {
        controller_or_local(&request)?;
        let migrations = self.0.all().into_iter().filter_map(|m| m.view()).map(|r| MigrationStatus::from(&r));
        Ok(Response::new(MigratorStatus {
            name: self.0.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            criu_version: self.0.criu.version.clone(),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().into(),
            migrations: migrations.collect(),
        }))
    }

    async fn preflight(
        &self,
        request: Request<PreflightRequest>,
    ) -> Result<Response<PreflightResponse>, Status> {
        tls::require_role(&request, &[Role::Controller])?;
        let request = request.into_inner();
        let role = request.role();
        let node = &self.0;
        let service = Service::parse(request.service, &node.config)?;
        let response = match role {
            preflight_request::Role::Source => {
                let report = preflight::source(
                    node,
                    &request.migration,
                    &service,
                    request.destination.as_ref(),
                    &request.user_addresses,
                    request.allow_other_peers,
                )
                .await;
                PreflightResponse {
                    findings: report.findings,
                    facts: report.process.map(|(_, facts, _)| facts),
                }
            }
            preflight_request::Role::Destination => {
                let facts = request.facts.ok_or_else(|| {
                    Status::invalid_argument("a destination is asked with the facts from the source's answer")
                })?;
                let findings = preflight::destination(node, &request.migration, &service, &facts).await;
                PreflightResponse { findings, facts: None }
            }
            preflight_request::Role::Unspecified => {
                return Err(Status::invalid_argument(
                    "role: say whether this is the source or the destination",
                ));
            }
        };
        Ok(Response::new(response))
    }

    async fn prepare(&self, request: Request<PrepareRequest>) -> Result<Response<PrepareResponse>, Status> {
        tls::require_role(&request, &[Role::Controller])?;
        let (node, request) = (self.0.clone(), request.into_inner());
        detached(async move { source::prepare(&node, request).await }).await.map(Response::new)
    }

    async fn freeze(&self, request: Request<FreezeRequest>) -> Result<Response<FreezeResponse>, Status> {
        tls::require_role(&request, &[Role::Controller])?;
        let (node, request) = (self.0.clone(), request.into_inner());
        detached(async move { source::freeze(&node, &request).await }).await.map(Response::new)
    }

    async fn r#yield(&self, request: Request<YieldRequest>) -> Result<Response<YieldResponse>, Status> {
        tls::require_role(&request, &[Role::Controller])?;
        let (node, request) = (self.0.clone(), request.into_inner());
        detached(async move { source::yield_right(&node, &request.migration).await }).await?;
        Ok(Response::new(YieldResponse {}))
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Result<Response<ResumeResponse>, Status> {
        controller_or_local(&request)?;
        let (node, request) = (self.0.clone(), request.into_inner());
        let (pid, steps) =
            detached(async move { destination::resume(&node, &request.migration).await }).await?;
        Ok(Response::new(ResumeResponse { pid, steps: steps.into_iter().map(Into::into).collect() }))
    }

    async fn end(&self, request: Request<EndRequest>) -> Result<Response<EndResponse>, Status> {
        controller_or_local(&request)?;
        let (node, request) = (self.0.clone(), request.into_inner());
        let steps = detached(async move { source::end(&node, &request.migration).await }).await?;
        Ok(Response::new(EndResponse { steps: steps.into_iter().map(Into::into).collect() }))
    }

    async fn abort(
        &self,
        request: Request<AbortMigrationRequest>,
    ) -> Result<Response<AbortMigrationResponse>, Status> {
        controller_or_local(&request)?;
        let (node, id) = (self.0.clone(), request.into_inner().migration);
        let alive = detached(async move { abort(&node, &id).await }).await?;
        Ok(Response::new(AbortMigrationResponse { alive }))
    }
}

#[tonic::async_trait]
impl MigratorPeer for PeerService {
    async fn reserve(&self, request: Request<ReserveRequest>) -> Result<Response<ReserveResponse>, Status> {
        tls::require_role(&request, &[Role::Migrator])?;
        let (node, request) = (self.0.clone(), request.into_inner());
        detached(async move { destination::reserve(&node, request).await }).await?;
        Ok(Response::new(ReserveResponse { name: self.0.config.name.clone() }))
    }

    async fn receive(
        &self,
        request: Request<Streaming<ImageChunk>>,
    ) -> Result<Response<ReceiveResponse>, Status> {
        tls::require_role(&request, &[Role::Migrator])?;
        let (node, stream) = (self.0.clone(), request.into_inner());
        let volume = detached(async move { destination::receive(&node, stream).await }).await?;
        Ok(Response::new(ReceiveResponse { bytes: volume.bytes, files: volume.files }))
    }

    type PagesStream = Pin<Box<dyn Stream<Item = Result<PageBytes, Status>> + Send>>;

    async fn pages(
        &self,
        request: Request<Streaming<PageBytes>>,
    ) -> Result<Response<Self::PagesStream>, Status> {
        tls::require_role(&request, &[Role::Migrator])?;
        let (node, stream) = (self.0.clone(), request.into_inner());
        let back = detached(async move { destination::pages(&node, stream).await }).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(back).map(Ok))))
    }

    async fn restore(&self, request: Request<RestoreRequest>) -> Result<Response<RestoreResponse>, Status> {
        tls::require_role(&request, &[Role::Migrator])?;
        let (node, request) = (self.0.clone(), request.into_inner());
        let (pid, steps) = detached(async move { destination::restore(&node, request).await }).await?;
        Ok(Response::new(RestoreResponse { pid, steps: steps.into_iter().map(Into::into).collect() }))
    }

    async fn discard(&self, request: Request<DiscardRequest>) -> Result<Response<DiscardResponse>, Status> {
        tls::require_role(&request, &[Role::Migrator])?;
        let (node, id) = (self.0.clone(), request.into_inner().migration);
        detached(async move {
            let (migration, record) = begun_or_over(&node, &id).await?;
            match record.role {
                Part::Source(_) => Err(Failure::refused(format!("migration {id} has its source here"))),
                Part::Destination(_) => destination_abort(&node, &migration).await,
            }
        })
        .await?;
        Ok(Response::new(DiscardResponse {}))
    }
}

/// Waits for whoever makes the migration become something, then discards it.
async fn destination_abort(node: &Arc<Node>, migration: &Arc<Migration>) -> Answer<()> {
    match destination::abort(node, migration).await {
        // nothing was reserved after all
        Err(f) if f.code == Code::NotFound => Ok(()),
        other => other,
    }
}

/// ABORT on whichever side this is. Of a migration that is not known nothing is to be undone, and whether an original
/// runs is not known here: `false`.
pub async fn abort(node: &Arc<Node>, id: &str) -> Answer<bool> {
    let (migration, record) = begun_or_over(node, id).await?;
    match record.role {
        Part::Source(_) => source::abort(node, &migration).await,
        Part::Destination(_) => destination_abort(node, &migration).await.map(|()| false),
    }
}

/// The migration with its record. One that is not known yet is noted as over, durably, before anybody is told that
/// nothing is left of it: its *Prepare* or *Reserve* may still be on the way (a restarted controller calls over another
/// connection) and would keep the service's place for ever.
async fn begun_or_over(node: &Arc<Node>, id: &str) -> Answer<(Arc<Migration>, Record)> {
    loop {
        let migration = node.entry(id)?;
        if let Some(record) = migration.view() {
            return Ok((migration, record));
        }
        // waits for a call that is just making something of it
        let mut live = migration.lock().await;
        if live.record.is_none() && Arc::ptr_eq(&migration, &node.entry(id)?) {
            node.commit(&migration, &mut live, Record::never_begun(id))?;
            drop(live);
            node.prune();
        }
    }
}

/// What a started daemon does with the records it finds, before it serves. Source not yielded: undone at once. Yielded,
/// or a copy that was voted for: held until told. Decided: finished.
///
/// What could not be done is logged, stays in its record, and is gone on with when the controller calls.
pub async fn recover(node: &Arc<Node>) {
    // of a finished migration: the daemon died between noting its end and removing everything
    let fences = fence::list().unwrap_or_else(|e| {
        tracing::error!(error = chain(&e), "listing fences");
        Default::default()
    });
    for migration in node.all() {
        let Some(record) = migration.view() else { continue };
        let (state, role) = (record.state_name(), record.role_name());
        let outcome = match (record.recovery(), &record.role) {
            (Recovery::Nothing, _) => {
                let lifted = if fences.contains(&migration.id) { fence::lift(&migration.id) } else { Ok(()) };
                lifted.and_then(|()| node.drop_images(&migration.id)).map_err(Failure::from)
            }
            (Recovery::Wait, _) => {
                tracing::warn!(migration = migration.id, role, state, "held until the controller tells");
                Ok(())
            }
            (Recovery::Undo, Part::Source(_)) => {
                let mut live = migration.lock().await;
                source::undo(node, &migration, &mut live, SourceEvent::AbortAlone).await.map(|_| ())
            }
            (Recovery::Undo, Part::Destination(_)) => {
                let mut live = migration.lock().await;
                destination::discard(node, &migration, &mut live).await
            }
            (Recovery::Finish, Part::Source(_)) => source::end(node, &migration.id).await.map(|_| ()),
            (Recovery::Finish, Part::Destination(_)) => {
                destination::resume(node, &migration.id).await.map(|_| ())
            }
        };
        match outcome {
            Ok(()) if record.recovery() != Recovery::Nothing => {
                tracing::info!(migration = migration.id, role, found = state, "recovered");
            }
            Ok(()) => {}
            Err(f) => tracing::error!(
                migration = migration.id,
                role,
                found = state,
                error = f.message,
                "recovering"
            ),
        }
    }
}

/// Sources that have not yielded go back before the daemon ends: nobody would hear their lease end.
async fn wind_up(node: &Arc<Node>) {
    for migration in node.all() {
        let undone = match migration.view().map(|r| r.role) {
            Some(Part::Source(s))
                if s.state.recovery() == Recovery::Undo && s.state != SourceState::Aborting =>
            {
                let mut live = migration.interrupt().await;
                source::undo(node, &migration, &mut live, SourceEvent::AbortAlone).await.map(|_| ())
            }
            _ => Ok(()),
        };
        if let Err(f) = undone {
            tracing::warn!(migration = migration.id, error = f.message, "winding up");
        }
    }
    // post-copy: copies whose memory comes from here, or through here, would be killed
    let mut depended = node.depended.subscribe();
    if *depended.borrow() > 0 {
        tracing::warn!("memory still follows a copy: this takes until it is over");
        if tokio::time::timeout(MEMORY_PATIENCE, depended.wait_for(|n| *n == 0)).await.is_err() {
            tracing::error!("memory still follows a copy after {} s", MEMORY_PATIENCE.as_secs());
        }
    }
}

/// Serves until `stop` turns true, then winds up.
///
/// # Errors
/// A listening address cannot be had, or the TLS files are unusable.
pub async fn serve(node: Arc<Node>, mut stop: watch::Receiver<bool>) -> Result<()> {
    let listen = |address: std::net::SocketAddr| async move {
        TcpListener::bind(address).await.map_err(Error::io("listening on", address))
    };
    let control = listen(node.config.listen).await?;
    let peers = listen(node.config.migration_listen).await?;
    let audit = Audit::open(&node.config.state_dir)
        .map_err(|e| Error::io("opening the audit log in", node.config.state_dir.display())(e))?;
    let gate = Gate::new(Rules::DAEMON, Some(audit));
    let builder = || {
        Server::builder()
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .max_frame_size(Some(FRAME))
            .http2_keepalive_interval(Some(Duration::from_secs(1)))
            .http2_keepalive_timeout(Some(Duration::from_secs(3)))
            .layer(gate.clone())
    };
    let (control_service, peer_service) =
        (MigratorServer::new(Control(node.clone())), MigratorPeerServer::new(PeerService(node.clone())));
    let (local, _remove) = match &node.config.socket {
        Some(path) => {
            let (incoming, remove) = local::Socket::bind(path)?.incoming();
            let service = builder().add_service(control_service.clone()).serve_with_incoming(incoming);
            (Some(service), Some(remove))
        }
        None => (None, None),
    };
    let local = async {
        match local {
            Some(service) => service.await,
            None => std::future::pending().await,
        }
    };
    let control = builder().add_service(control_service).serve_with_incoming(node.tls.incoming(control));
    let peers = builder().add_service(peer_service).serve_with_incoming(node.tls.incoming(peers));
    recover(&node).await;
    tracing::info!(
        name = node.config.name,
        listen = %node.config.listen,
        migration_listen = %node.config.migration_listen,
        criu = node.criu.version,
        "ready"
    );
    tokio::select! {
        served = async { tokio::try_join!(control, peers, local) } =>
            served.map(|_| ()).map_err(|e| Error::other(format!("serving: {}", chain(&e))))?,
        followed = node.tls.clone().follow() => followed.map_err(Error::io("listening for", "SIGHUP"))?,
        _ = stop.wait_for(|s| *s) => {}
    }
    wind_up(&node).await;
    Ok(())
}
