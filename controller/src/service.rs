//! The gRPC service `Controller`: who may ask, and what the controller's answers are on the wire.
//!
//! Operators may do everything; viewers may look. The local socket counts as an operator: its file mode guards it.

use std::{pin::Pin, sync::Arc};

use handover_api::{
    audit::Audit,
    gate,
    tls::{Peer, Role, require_role},
    v1,
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use crate::{
    controller::{ApplyError, CancelError, Controller, MigrateError, ResolveError},
    report,
    session::{Decision, State},
    triggers,
    world::{RequestError, World},
};

const ACT: &[Role] = &[Role::Operator];
/// Lines of the audit log in one answer.
const MOST_AUDIT: usize = 10_000;
const LOOK: &[Role] = &[Role::Operator, Role::Viewer];

/// The service over a [`Controller`].
#[derive(Debug, Clone)]
pub struct Service(Arc<Controller>, Audit);

impl Service {
    /// Serves `controller`, and shows `audit`.
    pub fn new(controller: Arc<Controller>, audit: Audit) -> Self {
        Self(controller, audit)
    }

    async fn apply_inventory(
        &self,
        request: &v1::ApplyRequest,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        match self.0.apply(&request.inventory, request.dry_run).await {
            Ok((revision, changes, notes)) => {
                let notes = notes.into_iter().map(|n| format!("! {n}"));
                let changes = changes.iter().map(ToString::to_string).chain(notes).collect();
                Ok(Response::new(v1::ApplyResponse { revision, changes }))
            }
            Err(e @ ApplyError::Inventory(_)) => Err(Status::invalid_argument(e.to_string())),
            Err(e @ ApplyError::JournalFull { .. }) => Err(Status::resource_exhausted(e.to_string())),
            Err(e @ ApplyError::Against(_)) => Err(Status::failed_precondition(e.to_string())),
            Err(e @ (ApplyError::Tls(_) | ApplyError::Fatal(_))) => Err(Status::internal(e.to_string())),
        }
    }

    /// Answers once preflight has accepted or refused the session (or the session has failed otherwise).
    async fn request_migration(
        &self,
        message: v1::MigrateRequest,
    ) -> Result<Response<v1::MigrateResponse>, Status> {
        let (dry_run, may_wait) = (message.dry_run, message.queue);
        let request = triggers::operator(message).map_err(Status::invalid_argument)?;
        if dry_run {
            let (plan, findings) = self.0.rehearse(&request).await.map_err(refused)?;
            return Ok(Response::new(v1::MigrateResponse {
                findings: findings.iter().map(report::finding).collect(),
                plan: report::plan_lines(&plan),
                ..Default::default()
            }));
        }
        let mut changes = self.0.changes();
        let session = self.0.migrate(&request, may_wait).await.map_err(|e| match e {
            MigrateError::Request(e) => refused(e),
            e @ MigrateError::Stopping => Status::unavailable(e.to_string()),
            e @ MigrateError::JournalFull { .. } => Status::resource_exhausted(e.to_string()),
            e @ MigrateError::Fatal(_) => Status::internal(e.to_string()),
        })?;
        loop {
            if let Some((position, waits_for)) = self.0.place_in_queue(&session) {
                let queue_position = u32::try_from(position).unwrap_or(u32::MAX);
                return Ok(Response::new(v1::MigrateResponse {
                    session,
                    queue_position,
                    waits_for,
                    ..Default::default()
                }));
            }
            let now = self.0.session(&session);
            if now.as_ref().is_none_or(|s| s.state != State::Preflight) {
                let findings = now.map(|s| report::session(&s).findings).unwrap_or_default();
                return Ok(Response::new(v1::MigrateResponse { session, findings, ..Default::default() }));
            }
            changes.changed().await.map_err(|_| Status::unavailable("the controller is stopping"))?;
        }
    }

    async fn resolve(
        &self,
        request: &v1::ResolveSessionRequest,
        by: &Peer,
    ) -> Result<Response<v1::ResolveSessionResponse>, Status> {
        use v1::resolve_session_request::Resolution;
        let (id, confirmed) = (&request.session, request.confirmed);
        let decision = match request.resolution() {
            Resolution::Commit => Decision::Commit,
            Resolution::Abort => Decision::Abort,
            Resolution::Unspecified => {
                return Err(Status::invalid_argument("resolution: say commit or abort"));
            }
        };
        let refused = |e: ResolveError| match e {
            ResolveError::Unknown(_) => match self.find(id) {
                Ok(_) => Status::unavailable("ask again"),
                Err(status) => status,
            },
            e @ ResolveError::Refused(_) => Status::failed_precondition(e.to_string()),
            e @ ResolveError::Stopping(_) => Status::unavailable(e.to_string()),
        };
        let account = self.0.account(id, decision).map_err(refused)?;
        let session = if confirmed {
            report::session(&self.0.resolve(id, decision, &by.to_string()).await.map_err(refused)?)
        } else {
            self.find(id)?
        };
        Ok(Response::new(v1::ResolveSessionResponse { account, session: Some(session) }))
    }

    /// A session, or a request that waits or has left the queue.
    fn view(&self, world: &World, id: &str) -> Option<v1::Session> {
        if let Some(session) = world.sessions.get(id) {
            return Some(report::session(session));
        }
        if let Some(left) = world.left.get(id) {
            return Some(report::left(left, world));
        }
        let waiting = world.queue.iter().find(|w| w.id == id)?;
        Some(report::waiting(waiting, self.0.place_in_queue(id), world))
    }

    fn find(&self, id: &str) -> Result<v1::Session, Status> {
        match self.view(&self.0.snapshot(), id) {
            Some(session) => Ok(session),
            None => Err(Status::not_found(format!(
                "there is no session `{id}`; {}",
                known_sessions(&self.0.snapshot())
            ))),
        }
    }
}

/// A request in the words of the command.
fn asked_for(m: &v1::MigrateRequest) -> String {
    let mut words = format!("{} --to {}", m.service, m.to_site);
    for (given, option) in [
        (m.dry_run, " --dry-run"),
        (m.queue, " --queue"),
        (m.allow_other_peers, " --allow-other-peers"),
        (m.no_hold, " --no-hold"),
        (m.policy() == v1::migrate_request::Policy::Disaster, " --policy disaster"),
    ] {
        if given {
            words.push_str(option);
        }
    }
    for user in m.users.iter().take(8) {
        words.push_str(" --user ");
        words.push_str(user);
    }
    words
}

/// A name that can be one of ours; others are not even looked for.
fn named(what: &str, name: &str) -> Result<(), Status> {
    triggers::possible(what, name).map_err(Status::invalid_argument)
}

fn known_sessions(world: &World) -> String {
    let last: Vec<&str> = world.order.iter().rev().take(5).map(String::as_str).collect();
    if last.is_empty() {
        "there has been none yet".into()
    } else {
        format!("the last ones: {}", last.join(", "))
    }
}

fn refused(error: RequestError) -> Status {
    let words = error.to_string();
    match error {
        RequestError::UnknownService { .. }
        | RequestError::UnknownSite { .. }
        | RequestError::UnknownUser { .. } => Status::not_found(words),
        RequestError::NotAUser { .. } => Status::invalid_argument(words),
        RequestError::NoServer { .. }
        | RequestError::AlreadyThere { .. }
        | RequestError::SameNetwork { .. }
        | RequestError::Busy { .. }
        | RequestError::Pending { .. }
        | RequestError::UserBusy { .. }
        | RequestError::Behind { .. }
        | RequestError::AllUnderWay { .. } => Status::failed_precondition(words),
        RequestError::QueueFull { .. } => Status::resource_exhausted(words),
    }
}

#[tonic::async_trait]
impl v1::controller_server::Controller for Service {
    async fn apply(&self, request: Request<v1::ApplyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        require_role(&request, ACT)?;
        let dry_run = if request.get_ref().dry_run { " --dry-run" } else { "" };
        gate::subject(&request, format!("{} octets{dry_run}", request.get_ref().inventory.len()));
        self.apply_inventory(request.get_ref()).await
    }

    async fn status(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        require_role(&request, LOOK)?;
        let world = self.0.snapshot();
        let services = world.inventory.services.iter().filter_map(|(name, service)| {
            let place = world.services.get(name)?;
            Some(v1::ServiceStatus {
                name: name.clone(),
                address: service.address.to_string(),
                site: place.site.clone(),
                server: service.servers.get(&place.site).cloned().unwrap_or_default(),
                pid: place.pid,
                session: world.session_of(name).map(|s| s.plan.id.clone()).unwrap_or_default(),
            })
        });
        let peers = self.0.peers().into_iter().map(|p| {
            let seen = p.seen();
            v1::PeerStatus {
                role: p.kind.to_string(),
                name: p.name.clone(),
                endpoint: p.endpoint.clone(),
                reachable: seen.reachable,
                detail: seen.detail,
            }
        });
        let users = world.inventory.users.iter().map(|(name, user)| v1::UserPlace {
            name: name.clone(),
            gateway: user.gateway.clone(),
            network: world.users.get(name).cloned().unwrap_or_default(),
        });
        Ok(Response::new(v1::StatusResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            revision: world.revision,
            services: services.collect(),
            peers: peers.collect(),
            users: users.collect(),
        }))
    }

    async fn migrate(
        &self,
        request: Request<v1::MigrateRequest>,
    ) -> Result<Response<v1::MigrateResponse>, Status> {
        require_role(&request, ACT)?;
        gate::subject(&request, asked_for(request.get_ref()));
        self.request_migration(request.into_inner()).await
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        require_role(&request, LOOK)?;
        let world = self.0.snapshot();
        let sessions = world.order.iter().filter_map(|id| self.view(&world, id)).collect();
        Ok(Response::new(v1::ListSessionsResponse { sessions }))
    }

    async fn get_session(
        &self,
        request: Request<v1::GetSessionRequest>,
    ) -> Result<Response<v1::Session>, Status> {
        require_role(&request, LOOK)?;
        let id = request.into_inner().session;
        named("session", &id)?;
        self.find(&id).map(Response::new)
    }

    async fn cancel_session(
        &self,
        request: Request<v1::CancelSessionRequest>,
    ) -> Result<Response<v1::Session>, Status> {
        let peer = require_role(&request, ACT)?;
        gate::subject(&request, &request.get_ref().session);
        let id = request.into_inner().session;
        named("session", &id)?;
        match self.0.cancel(&id, &peer.to_string()).await {
            Ok(()) | Err(CancelError::Unknown(_)) => self.find(&id).map(Response::new),
            Err(e @ CancelError::TooLate { .. }) => Err(Status::failed_precondition(e.to_string())),
            Err(e @ CancelError::Stopping(_)) => Err(Status::unavailable(e.to_string())),
        }
    }

    async fn resolve_session(
        &self,
        request: Request<v1::ResolveSessionRequest>,
    ) -> Result<Response<v1::ResolveSessionResponse>, Status> {
        let peer = require_role(&request, ACT)?;
        let asked = request.get_ref();
        let confirmed = if asked.confirmed { " --yes" } else { "" };
        let subject = format!("{} {}{confirmed}", asked.session, asked.resolution().as_str_name());
        gate::subject(&request, subject);
        named("session", &asked.session)?;
        self.resolve(&request.into_inner(), &peer).await
    }

    async fn list_audit(
        &self,
        request: Request<v1::ListAuditRequest>,
    ) -> Result<Response<v1::ListAuditResponse>, Status> {
        require_role(&request, ACT)?;
        let count = usize::try_from(request.into_inner().last).unwrap_or(usize::MAX).clamp(1, MOST_AUDIT);
        let audit = self.1.clone();
        let read = tokio::task::spawn_blocking(move || audit.last(count)).await;
        let read = read
            .map_err(|e| Status::internal(e.to_string()))?
            .map_err(|e| Status::internal(format!("the audit log cannot be read: {e}")))?;
        let entries = read.entries.into_iter().map(|e| v1::AuditEntry {
            seq: e.seq,
            at_ms: e.at_ms,
            peer: e.peer,
            call: e.call,
            subject: e.subject,
            outcome: e.outcome,
            reason: e.reason,
        });
        Ok(Response::new(v1::ListAuditResponse { entries: entries.collect(), damaged: read.damaged }))
    }

    type WatchSessionStream = Pin<Box<dyn Stream<Item = Result<v1::Session, Status>> + Send>>;

    async fn watch_session(
        &self,
        request: Request<v1::GetSessionRequest>,
    ) -> Result<Response<Self::WatchSessionStream>, Status> {
        require_role(&request, LOOK)?;
        let id = request.into_inner().session;
        named("session", &id)?;
        let mut changes = self.0.changes();
        let mut view = self.find(&id)?;
        let (sender, stream) = mpsc::channel(16);
        let service = self.clone();
        tokio::spawn(async move {
            loop {
                let over = view.outcome() != v1::Outcome::Running;
                if sender.send(Ok(view.clone())).await.is_err() || over {
                    return;
                }
                loop {
                    tokio::select! {
                        changed = changes.changed() => if changed.is_err() { return },
                        () = sender.closed() => return,
                    }
                    match service.find(&id) {
                        Ok(now) if now != view => {
                            view = now;
                            break;
                        }
                        Ok(_) => {}
                        Err(_) => return,
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}
