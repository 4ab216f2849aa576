//! What each [`Command`] means on the wire.
//!
//! How long each is waited for and when it is asked again is in [`crate::patience`]; every call is idempotent by migration.

use std::{collections::BTreeSet, future::Future, sync::Arc, time::Duration};

use handover_api::{users, v1};
use tokio::{
    sync::{mpsc::UnboundedSender, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};
use tonic::{Request, Response, Status};

use crate::{
    controller::Controller,
    driver::Clock,
    inventory::Target,
    patience::{self, Asking, Confirming, Load, MARKER, PREFLIGHT, RELEASE, attempt},
    peers::{self, Kind},
    session::{
        Command, Event, Finding, Held, Participant, Plan, Policy, Severity, Side, Step, SubStep, Ticket, Vote,
    },
};

/// A failed call, in words.
struct Failure {
    reason: String,
}

/// One command, carried out in a task of its own.
pub(crate) struct Call {
    pub controller: Arc<Controller>,
    pub plan: Arc<Plan>,
    pub command: Command,
    pub clock: Clock,
    pub memory_bytes: u64,
    /// An operator has ended its doubt.
    pub resolved: bool,
    /// Of the undo at a gateway that may hold frames: turns true when the source has undone its part.
    pub after_source: Option<watch::Receiver<bool>>,
    pub events: UnboundedSender<(Command, Event)>,
}

/// The parts of a freeze as its source and its destination name them, in what they answer and in what they refuse.
const FREEZE_PARTS: [&str; 9] =
    ["quiet", "fence", "drain", "dump", "copy", "criu", "freezer", "restore", "address"];

impl Call {
    /// Carries the command out and reports what comes of it.
    pub(crate) async fn run(self) {
        let sent_us = self.clock.now_us();
        let id = self.plan.id.clone();
        tracing::debug!(session = %id, command = ?self.command, "asked");
        let event = match self.command.clone() {
            Command::Check => {
                let (findings, facts) = preflight(&self.controller, &self.plan, &self.plan.id).await;
                Event::Checked { findings, pid: facts.pid, memory_bytes: facts.memory_bytes, sent_us }
            }
            Command::Stage(gateway) => {
                let request = stage_request(&self.plan, &gateway, &self.plan.id);
                let answer = self.before(|deadline| {
                    let (client, request) =
                        (self.gateway(&gateway), with_deadline(request.clone(), deadline));
                    async move { client?.stage(request).await }
                });
                match answer.await {
                    Ok(r) => Event::Staged {
                        gateway,
                        ticket: Ticket { switch: r.switch, generation: r.generation },
                        sent_us,
                    },
                    Err(f) => self.failed(Step::Stage, format!("gateway {gateway}"), f, sent_us),
                }
            }
            Command::Prepare => {
                let request = v1::PrepareRequest {
                    migration: id,
                    service: Some(service(&self.plan)),
                    destination: Some(server(&self.plan.to)),
                    user_addresses: self.plan.user_addresses(),
                    allow_other_peers: self.plan.allow_other_peers,
                    marker_port: self
                        .plan
                        .hold
                        .filter(|_| !self.plan.gateways.is_empty())
                        .map_or(0, |h| h.marker_port.into()),
                };
                let answer = self.before(|deadline| {
                    let (client, request) = (self.source(), with_deadline(request.clone(), deadline));
                    async move { client?.prepare(request).await }
                });
                match answer.await {
                    Ok(_) => Event::Prepared { sent_us },
                    Err(f) => self.failed(Step::Prepare, self.source_name(), f, sent_us),
                }
            }
            Command::Hold(gateway, switch, generation) => {
                self.hold(id, gateway, switch, generation, sent_us).await
            }
            Command::Freeze(markers) => self.freeze(id, &markers, sent_us).await,
            Command::Switch(gateway, switch, generation) => {
                let request = v1::SwitchRequest {
                    migration: id,
                    switch,
                    generation,
                    users: Vec::new(),
                    to_network: self.plan.to.network.clone(),
                    users_digest: users::digest(&self.plan.users_at(&gateway)).into(),
                };
                let answer = self.before(|deadline| {
                    let (client, request) =
                        (self.gateway(&gateway), with_deadline(request.clone(), deadline));
                    async move { client?.switch(request).await }
                });
                match answer.await {
                    Ok(r) => Event::Switched {
                        gateway,
                        window_ns: r.window_ns,
                        store_latency_ns: r.store_latency_ns,
                        sent_us,
                    },
                    Err(f) => self.failed(Step::Switch, format!("gateway {gateway}"), f, sent_us),
                }
            }
            Command::Yield => {
                let request = v1::YieldRequest { migration: id };
                let answer = self.before(|deadline| {
                    let (client, request) = (self.source(), with_deadline(request.clone(), deadline));
                    async move { client?.r#yield(request).await }
                });
                match answer.await {
                    Ok(_) => Event::Yielded { sent_us },
                    Err(f) => self.failed(Step::Yield, self.source_name(), f, sent_us),
                }
            }
            // the driver's own: there is nobody to ask
            Command::DecideCommit | Command::DecideAbort => return,
            Command::Resume | Command::End | Command::Finish(_) | Command::Undo(_) => self.confirm(id).await,
        };
        // the driver has gone only if the controller has
        let _ = self.events.send((self.command, event));
    }

    async fn hold(
        &self,
        migration: String,
        gateway: String,
        switch: u32,
        generation: u64,
        sent_us: u64,
    ) -> Event {
        let port = self.plan.hold.map_or(0, |h| h.marker_port);
        let deadline_ms = patience::hold_deadline(self.memory_bytes).as_millis();
        let request = v1::HoldRequest {
            migration,
            switch,
            generation,
            address: self.plan.address.clone(),
            deadline_ms: u64::try_from(deadline_ms).unwrap_or(u64::MAX),
            marker: (port != 0).then(|| v1::Marker { port: port.into(), nonce: self.plan.nonce(&gateway) }),
        };
        let answer = self.before(|deadline| {
            let (client, request) = (self.gateway(&gateway), with_deadline(request.clone(), deadline));
            async move { client?.hold(request).await }
        });
        match answer.await {
            Ok(r) => Event::Held { gateway, marker_sent: r.marker_sent, sent_us },
            Err(f) => self.failed(Step::Hold, format!("gateway {gateway}"), f, sent_us),
        }
    }

    async fn freeze(&self, migration: String, markers: &BTreeSet<String>, sent_us: u64) -> Event {
        let request = v1::FreezeRequest {
            migration,
            yield_with_vote: self.plan.policy == Policy::Disaster,
            markers: markers.iter().map(|g| self.plan.nonce(g)).collect(),
            marker_wait_ms: u64::try_from(MARKER.as_millis()).unwrap_or(u64::MAX),
        };
        let answer = self.before(|deadline| {
            let (client, request) = (self.source(), with_deadline(request.clone(), deadline));
            async move { client?.freeze(request).await }
        });
        match answer.await {
            Ok(r) => {
                let steps = r
                    .steps
                    .into_iter()
                    .map(|s| SubStep { name: s.name, started_us: s.started_us, took_us: s.took_us })
                    .collect();
                let vote = Vote {
                    steps,
                    pid: r.pid,
                    image_bytes: r.image_bytes,
                    connections: r.connections,
                    losses: r.losses,
                };
                Event::Frozen { vote, sent_us }
            }
            Err(f) => self.failed(Step::Freeze, self.source_name(), f, sent_us),
        }
    }

    /// After the decision: until it is confirmed.
    async fn confirm(&self, migration: String) -> Event {
        if let Some(mut undone) = self.after_source.clone() {
            // late or not, the frames have to go
            let _ = timeout(RELEASE, undone.wait_for(|undone| *undone)).await;
        }
        let mut confirming = Confirming::new(&self.command);
        let (began, limit) = (Instant::now(), self.limit());
        loop {
            let sent_us = self.clock.now_us();
            let answer = timeout(limit, self.confirm_once(&migration, sent_us)).await;
            let reason = match answer {
                Ok(Ok(event)) => return event,
                Ok(Err(status)) => peers::words(&status),
                Err(_) => format!("no answer within {} ms", limit.as_millis()),
            };
            let (tell, wait) = confirming.failed(began.elapsed());
            if tell {
                tracing::warn!(session = %migration, command = ?self.command, reason, "not confirmed yet, retried");
                if let Some(participant) = self.command.confirmed_by() {
                    let _ =
                        self.events.send((self.command.clone(), Event::Unconfirmed { participant, reason }));
                }
            }
            sleep(wait).await;
        }
    }

    fn limit(&self) -> Duration {
        attempt(&self.command)
    }

    async fn confirm_once(&self, migration: &str, sent_us: u64) -> Result<Event, Status> {
        let migration = migration.to_owned();
        Ok(match &self.command {
            Command::Resume => {
                let request = with_deadline(v1::ResumeRequest { migration }, self.limit());
                let r = self.migrator(&self.plan.to)?.resume(request).await?.into_inner();
                Event::Resumed { pid: r.pid, sent_us }
            }
            Command::End => {
                self.source()?.end(with_deadline(v1::EndRequest { migration }, self.limit())).await?;
                Event::Ended { sent_us }
            }
            Command::Finish(gateway) => {
                let held = self.finish(gateway).await?;
                Event::Finished { gateway: gateway.clone(), held, sent_us }
            }
            Command::Undo(participant) => {
                let mut held = None;
                let alive = match participant {
                    Participant::Gateway(g) => {
                        let request = v1::AbortSwitchRequest { migration };
                        let answer = self.gateway(g)?.abort(with_deadline(request, self.limit())).await?;
                        held = answer.into_inner().held.map(figures);
                        if self.resolved {
                            // one that was started again after COMMIT has been told the new network
                            let back = format!("{}-back", self.plan.id);
                            self.see_users_on(g, &self.plan.from.network, &back).await?;
                        }
                        false
                    }
                    Participant::Source | Participant::Destination => {
                        let side =
                            if *participant == Participant::Source { &self.plan.from } else { &self.plan.to };
                        let request = with_deadline(v1::AbortMigrationRequest { migration }, self.limit());
                        self.migrator(side)?.abort(request).await?.into_inner().alive
                    }
                };
                Event::Undone { participant: participant.clone(), alive, held, sent_us }
            }
            other => return Err(Status::internal(format!("{other:?} is not confirmed"))),
        })
    }

    /// Finish, and see that the users are where the decision put them: a gateway that was started again between switch
    /// and finish may know nothing of the switch, and confirm that there is nothing left to finish. Then it switches
    /// again, under a name of its own; an attempt at that which was cut short is gone on with.
    async fn finish(&self, gateway: &str) -> Result<Option<Held>, Status> {
        let plan = &self.plan;
        let again = format!("{}-again", plan.id);
        let request = v1::FinishSwitchRequest { migration: plan.id.clone() };
        let finish = with_deadline(request, self.limit());
        let answer = self.gateway(gateway)?.finish(finish).await?.into_inner();
        self.see_users_on(gateway, &plan.to.network, &again).await?;
        Ok(answer.held.map(figures))
    }

    /// Moves those users of the migration who are on another network than `network`, as migration `again`.
    async fn see_users_on(&self, gateway: &str, network: &str, again: &str) -> Result<(), Status> {
        let mut status = self.status(gateway).await?;
        if status.switches.iter().any(|s| s.migration == again && s.state == "switched") {
            self.finish_again(gateway, again).await?;
            status = self.status(gateway).await?;
        }
        let Some((from, users)) = self.strayed(gateway, network, &status) else { return Ok(()) };
        tracing::warn!(session = %self.plan.id, gateway, ?users, %from, %network, "users strayed: switched again");
        let mut client = self.gateway(gateway)?;
        let request = v1::StageRequest {
            migration: again.to_owned(),
            users: users.clone(),
            from_network: from,
            to_network: network.to_owned(),
        };
        let staged = client.stage(with_deadline(request, self.limit())).await?.into_inner();
        let request = v1::SwitchRequest {
            migration: again.to_owned(),
            switch: staged.switch,
            generation: staged.generation,
            users: Vec::new(),
            to_network: network.to_owned(),
            users_digest: users::digest(&users).into(),
        };
        client.switch(with_deadline(request, self.limit())).await?;
        self.finish_again(gateway, again).await?;
        match self.strayed(gateway, network, &self.status(gateway).await?) {
            None => Ok(()),
            Some((network, users)) => {
                Err(Status::failed_precondition(format!("{} still on network {network}", users.join(", "))))
            }
        }
    }

    async fn finish_again(&self, gateway: &str, again: &str) -> Result<(), Status> {
        let request = v1::FinishSwitchRequest { migration: again.to_owned() };
        self.gateway(gateway)?.finish(with_deadline(request, self.limit())).await.map(|_| ())
    }

    /// What a gateway that knows the inventory of now is doing.
    async fn status(&self, gateway: &str) -> Result<v1::GatewayStatus, Status> {
        self.controller.configure(gateway).await.map_err(Status::unavailable)?;
        let request = with_deadline(v1::GatewayStatusRequest::default(), self.limit());
        Ok(self.gateway(gateway)?.status(request).await?.into_inner())
    }

    /// Users of the migration that the gateway has on another network, and the network of the first of them.
    fn strayed(
        &self,
        gateway: &str,
        network: &str,
        status: &v1::GatewayStatus,
    ) -> Option<(String, Vec<String>)> {
        let mine = self.plan.users_at(gateway);
        let elsewhere = status.users.iter().filter(|u| mine.contains(&u.name) && u.network != network);
        let network = elsewhere.clone().map(|u| u.network.clone()).next()?;
        let users = elsewhere.filter(|u| u.network == network).map(|u| u.name.clone()).collect();
        Some((network, users))
    }

    /// Before the decision: until answered, refused, or lost for good.
    async fn before<T, F>(&self, call: impl Fn(Duration) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let users = match &self.command {
            Command::Stage(gateway) => self.plan.users_at(gateway).len(),
            _ => 0,
        };
        let mut asking = Asking::new(&self.command, Load { memory_bytes: self.memory_bytes, users });
        let began = Instant::now();
        loop {
            let status = match timeout_at(began + asking.deadline, call(asking.deadline)).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => {
                    return Err(Failure { reason: format!("no answer within {}", seconds(asking.deadline)) });
                }
            };
            let wait = if peers::lost(&status) { asking.lost(began.elapsed()) } else { None };
            let Some(wait) = wait else { return Err(Failure { reason: peers::words(&status) }) };
            tracing::warn!(session = %self.plan.id, command = ?self.command, reason = peers::words(&status),
                "the answer was lost; asked again");
            sleep(wait).await;
        }
    }

    fn failed(&self, step: Step, actor: String, failure: Failure, sent_us: u64) -> Event {
        tracing::warn!(session = %self.plan.id, %step, actor, reason = failure.reason, "failed");
        // the source says first which part of the freeze it was
        let named =
            failure.reason.split_once(": ").filter(|(p, _)| step == Step::Freeze && FREEZE_PARTS.contains(p));
        let (part, reason) = match named {
            Some((part, reason)) => (Some(part.to_owned()), reason.to_owned()),
            None => (None, failure.reason),
        };
        Event::Failed { step, part, actor, reason, sent_us }
    }

    fn source_name(&self) -> String {
        Participant::Source.name(&self.plan)
    }

    fn gateway(
        &self,
        name: &str,
    ) -> Result<v1::gateway_client::GatewayClient<tonic::transport::Channel>, Status> {
        Ok(self.controller.peers.get(Kind::Gateway, name)?.gateway())
    }

    fn migrator(
        &self,
        side: &Side,
    ) -> Result<v1::migrator_client::MigratorClient<tonic::transport::Channel>, Status> {
        Ok(self.controller.peers.get(Kind::Migrator, &side.server)?.migrator())
    }

    fn source(&self) -> Result<v1::migrator_client::MigratorClient<tonic::transport::Channel>, Status> {
        self.migrator(&self.plan.from)
    }
}

fn seconds(d: Duration) -> String {
    format!("{} s", d.as_secs_f32())
}

fn with_deadline<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

fn figures(f: v1::HoldFigures) -> Held {
    Held {
        frames: f.frames,
        bytes: f.bytes,
        dropped: f.dropped_user_bound + f.dropped_memory,
        lost: f.lost,
        late: f.late,
        release_us: f.release_us,
    }
}

fn service(plan: &Plan) -> v1::ServiceSpec {
    use v1::target::By;
    let by = match &plan.target {
        Target::Pid(pid) => By::Pid(*pid),
        Target::Pidfile(path) => By::Pidfile(path.clone()),
        Target::Command(pattern) => By::Command(pattern.clone()),
    };
    v1::ServiceSpec {
        name: plan.service.clone(),
        address: plan.address.clone(),
        target: Some(v1::Target { by: Some(by) }),
    }
}

fn server(side: &Side) -> v1::Server {
    v1::Server { name: side.server.clone(), migration_endpoint: side.migration.clone() }
}

fn stage_request(plan: &Plan, gateway: &str, migration: &str) -> v1::StageRequest {
    v1::StageRequest {
        migration: migration.to_owned(),
        users: plan.users_at(gateway),
        from_network: plan.from.network.clone(),
        to_network: plan.to.network.clone(),
    }
}

/// Asks everyone, touching nothing, whether the migration could succeed: gateways, and the source before the
/// destination, which needs the source's facts. A daemon that does not answer is a finding too.
pub(crate) async fn preflight(
    controller: &Arc<Controller>,
    plan: &Plan,
    migration: &str,
) -> (Vec<Finding>, v1::ProcessFacts) {
    let mut gateways = JoinSet::new();
    for gateway in plan.gateways.keys() {
        let (controller, gateway) = (Arc::clone(controller), gateway.clone());
        let request = stage_request(plan, &gateway, migration);
        let request_of = migration.to_owned();
        gateways.spawn(async move {
            let who = format!("gateway {gateway}");
            let check = async || {
                controller.configure(&gateway).await.map_err(Status::unavailable)?;
                let mut client = controller.peers.get(Kind::Gateway, &gateway)?.gateway();
                client.check_switch(with_deadline(request.clone(), PREFLIGHT)).await
            };
            match asked(&request_of, &who, check).await {
                Ok(r) => r.findings.into_iter().map(from_wire).collect(),
                Err(finding) => vec![finding],
            }
        });
    }
    let (mut findings, facts) = preflight_servers(controller, plan, migration).await;
    let mut of_gateways: Vec<Finding> = gateways.join_all().await.into_iter().flatten().collect();
    of_gateways.sort_by(|a, b| a.reporter.cmp(&b.reporter));
    findings.extend(of_gateways);
    (findings, facts.unwrap_or_default())
}

async fn preflight_servers(
    controller: &Controller,
    plan: &Plan,
    migration: &str,
) -> (Vec<Finding>, Option<v1::ProcessFacts>) {
    let request = v1::PreflightRequest {
        migration: migration.to_owned(),
        service: Some(service(plan)),
        role: v1::preflight_request::Role::Source.into(),
        destination: Some(server(&plan.to)),
        facts: None,
        user_addresses: plan.user_addresses(),
        allow_other_peers: plan.allow_other_peers,
    };
    let ask = |side: &Side, request: &v1::PreflightRequest| {
        let peer = controller.peers.get(Kind::Migrator, &side.server);
        let request = with_deadline(request.clone(), PREFLIGHT);
        async move { peer?.migrator().preflight(request).await }
    };
    let mut findings = Vec::new();
    let mut facts = None;
    match asked(migration, &Participant::Source.name(plan), || ask(&plan.from, &request)).await {
        Ok(r) => {
            findings.extend(r.findings.into_iter().map(from_wire));
            facts = r.facts;
        }
        Err(finding) => findings.push(finding),
    }
    let who = Participant::Destination.name(plan);
    if facts.is_some() {
        let role = v1::preflight_request::Role::Destination.into();
        let request = v1::PreflightRequest { role, facts: facts.clone(), ..request };
        match asked(migration, &who, || ask(&plan.to, &request)).await {
            Ok(r) => findings.extend(r.findings.into_iter().map(from_wire)),
            Err(finding) => findings.push(finding),
        }
    } else {
        // without the process's facts only this much can be known
        let status = || {
            let peer = controller.peers.get(Kind::Migrator, &plan.to.server);
            let request = with_deadline(v1::MigratorStatusRequest {}, PREFLIGHT);
            async move { peer?.migrator().status(request).await }
        };
        findings.extend(asked(migration, &who, status).await.err());
    }
    (findings, facts)
}

/// The answer of a preflight call, or the finding that there was none. Who cannot be reached is asked twice: the first
/// attempt may have waited on a connection begun while the way was cut.
async fn asked<T, F>(session: &str, who: &str, call: impl Fn() -> F) -> Result<T, Finding>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    let once = async || match timeout(PREFLIGHT, call()).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {}", seconds(PREFLIGHT)))),
    };
    let unreached = |s: &Status| peers::lost(s) || s.code() == tonic::Code::Unavailable;
    let answer = match once().await {
        Err(status) if unreached(&status) && status.code() != tonic::Code::DeadlineExceeded => once().await,
        answer => answer,
    };
    let status = match answer {
        Ok(response) => {
            tracing::info!(session, by = who, "preflight answered");
            return Ok(response.into_inner());
        }
        Err(status) => status,
    };
    let unreachable = unreached(&status);
    let (code, what, remedy) = if unreachable {
        (
            "unreachable",
            "cannot be reached",
            "`handover status` shows who can be; see that the daemon runs and that the control network carries",
        )
    } else {
        ("preflight-failed", "could not check", "see the daemon's log")
    };
    Err(Finding {
        severity: Severity::Error,
        code: code.into(),
        reporter: "controller".into(),
        message: format!("{who} {what}: {}", peers::words(&status)),
        remedy: remedy.into(),
    })
}

fn from_wire(f: v1::Finding) -> Finding {
    let severity = match f.severity() {
        v1::finding::Severity::Error => Severity::Error,
        v1::finding::Severity::Warning | v1::finding::Severity::Unspecified => Severity::Warning,
    };
    Finding { severity, code: f.code, reporter: f.reporter, message: f.message, remedy: f.remedy }
}
