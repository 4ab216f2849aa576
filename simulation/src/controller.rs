//! The controller: the real world, sessions and patience, under a model of the driver ([`Sim::event`] and [`Sim::settle`]
//! are `driver.rs`, [`Sim::task_heard`] is `calls.rs`), of the journal, and of the operator.
//!
//! The journal is all that survives a crash. An append that was under way then is torn anywhere between its records, which
//! is worse than SQLite's transactions are.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use handover_controller::{
    inventory::{self, Inventory},
    patience::{Asking, Confirming, Load, PREFLIGHT, attempt},
    session::{
        Command, Decision, Entry, Event, Finding, Outcome, Participant, Policy, Session, Severity, Step,
        Ticket, Vote,
    },
    triggers::Request,
    world::{Record, World},
};
use handover_gateway::{
    desired::{Desired, Wiring},
    mac::Mac,
};

use crate::{
    gateway::Gateway,
    mutation::Mutation,
    sim::{Answer, Ev, Failed, GatewayView, Msg, Node, Reply, S, Sim, Waiter},
};

pub(crate) type TaskId = u64;

/// How often peers are asked, and for how long.
const ASK_EVERY: u64 = S / 2;
const ASK: u64 = 3 * S;
const VIRTUAL_ROUTER: Mac = Mac([2, 0x48, 0x4f, 0, 0, 1]);

/// Where a task is that asks more than one thing.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// The command's one call.
    Single,
    /// Preflight of the n-th gateway.
    GatewayStatus(usize),
    GatewayConfigure(usize, u32),
    GatewayCheck(usize),
    LookSource,
    LookDestination,
    /// After *finish*: are the users where the decision put them?
    Stray,
    StrayConfigure(u32),
    StrayLook,
    StrayFinish,
    AgainStage(String, Vec<String>),
    AgainSwitch(Vec<String>, u32, u64),
    AgainFinish,
}

#[derive(Debug)]
enum Patience {
    Check,
    Before(Asking),
    After(Confirming),
}

#[derive(Debug)]
struct Task {
    session: String,
    command: Command,
    began: u64,
    /// Of this attempt, after the decision.
    end: u64,
    phase: Phase,
    patience: Patience,
    errors: usize,
    switched_again: bool,
}

#[derive(Debug)]
struct Driver {
    calls: BTreeMap<Command, TaskId>,
    unwritten: Vec<Record>,
    writing: bool,
    answers: VecDeque<(Command, Event)>,
}

#[derive(Debug)]
struct Write {
    session: String,
    records: Vec<Record>,
    request: bool,
}

pub(crate) struct Controller {
    pub(crate) up: bool,
    pub(crate) boot: u32,
    pub(crate) world: World,
    /// Migrations any gateway was ever asked to switch.
    pub(crate) asked_to_switch: BTreeSet<String>,
    disk: Vec<Record>,
    drivers: BTreeMap<String, Driver>,
    tasks: BTreeMap<TaskId, Task>,
    writes: BTreeMap<u64, Write>,
    configured: Vec<Option<(u32, u64)>>,
    next: u64,
    last_answer: String,
    gateway_users: Vec<Vec<String>>,
}

fn inventory(gateways: usize) -> Arc<Inventory> {
    let mut text = String::from(
        r#"[[network]]
name = "net1"
vid = 1
router_address = "10.1.0.1"
router_mac = "02:00:00:00:aa:01"
[[network]]
name = "net2"
vid = 2
router_address = "10.1.0.1"
router_mac = "02:00:00:00:aa:02"
[[site]]
name = "main"
network = "net1"
[[site]]
name = "backup"
network = "net2"
[[server]]
name = "main-server"
site = "main"
control = "10.255.0.5:7443"
migration = "10.254.0.5:7444"
[[server]]
name = "backup-server"
site = "backup"
control = "10.255.0.6:7443"
migration = "10.254.0.6:7444"
[[service]]
name = "film"
address = "203.0.113.10"
home = "main"
servers = { main = "main-server", backup = "backup-server" }
users = "all"
target = { command = "film-server" }
"#,
    );
    for g in 0..gateways {
        text.push_str(&format!("[[gateway]]\nname = \"gw{g}\"\ncontrol = \"10.255.0.{}:7443\"\n", 100 + g));
        for u in 0..=g.min(1) {
            text.push_str(&format!(
                "[[user]]\nname = \"user{g}{u}\"\ngateway = \"gw{g}\"\nmac = \"02:00:00:00:0{g}:0{u}\"\n\
                 addresses = [\"10.1.{g}.1{u}\"]\nhome = \"main\"\n"
            ));
        }
    }
    match inventory::parse(&text) {
        Ok(inventory) => Arc::new(inventory),
        Err(e) => unreachable!("the simulation's inventory: {e}"),
    }
}

fn gateway(name: &str) -> usize {
    name.trim_start_matches("gw").parse().unwrap_or_default()
}

fn us(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

impl Controller {
    pub(crate) fn new(gateways: usize) -> Self {
        let inventory = inventory(gateways);
        let gateway_users = (0..gateways)
            .map(|g| {
                let at = format!("gw{g}");
                inventory.users.iter().filter(|(_, u)| u.gateway == at).map(|(n, _)| n.clone()).collect()
            })
            .collect();
        let record = Record::Applied { revision: 1, inventory };
        let mut world = World::default();
        if let Err(e) = world.apply(&record) {
            unreachable!("{e}");
        }
        Self {
            up: true,
            boot: 0,
            world,
            asked_to_switch: BTreeSet::new(),
            disk: vec![record],
            drivers: BTreeMap::new(),
            tasks: BTreeMap::new(),
            writes: BTreeMap::new(),
            configured: vec![None; gateways],
            next: 0,
            last_answer: String::new(),
            gateway_users,
        }
    }

    pub(crate) fn idle(&self) -> bool {
        self.up && self.drivers.is_empty() && self.writes.is_empty()
    }

    /// The gateway has what the controller wants it to have.
    pub(crate) fn knows(&self, g: usize, gateway: &Gateway) -> bool {
        gateway.up && self.configured[g] == Some((gateway.boot, self.world.revision))
    }

    pub(crate) fn users_of(&self, g: usize) -> Vec<String> {
        self.gateway_users[g].clone()
    }

    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn desired(&self, g: usize) -> Desired {
        let request = self.world.configuration(&format!("gw{g}"));
        match Desired::new(&request, &Wiring::single(VIRTUAL_ROUTER)) {
            Ok(desired) => desired,
            Err(e) => unreachable!("the simulation's inventory: {e}"),
        }
    }
}

impl Sim {
    pub(crate) fn last_answer(&self) -> String {
        self.controller.last_answer.clone()
    }

    // ---- the operator

    /// Asks for the service to move to where it is not.
    pub(crate) fn operator(&mut self) {
        if !self.controller.up {
            return;
        }
        let at_main = self.controller.world.services.get("film").is_some_and(|p| p.site == "main");
        let request = Request {
            service: "film".into(),
            to_site: if at_main { "backup" } else { "main" }.into(),
            users: Vec::new(),
            policy: if self.rng.permille(400) { Policy::Disaster } else { Policy::Late },
            allow_other_peers: false,
            hold: self.rng.permille(500),
            trigger: "operator".into(),
        };
        if self.controller.writes.values().any(|w| w.request) {
            return; // requests are accepted one at a time
        }
        match self.controller.world.plan(&request, self.now / 1000) {
            Ok(plan) => {
                let id = plan.id.clone();
                let entry = Entry { at_us: 0, event: Event::Requested { plan: Arc::new(plan) } };
                let record = Record::Session { id: id.clone(), entry };
                if self.has(Mutation::AnswerBeforeRequestIsDurable) {
                    self.seen.insert(id.clone(), Outcome::Running);
                    self.take(&record);
                }
                self.write(id, vec![record], true);
            }
            Err(e) => {
                self.controller.last_answer = e.to_string();
                self.note(|| format!("operator: {e}"));
            }
        }
    }

    /// Gives up a session that is under way: `Driver::obey`. Told once ABORT is durable, see [`Sim::synced`].
    pub(crate) fn cancel(&mut self) {
        if !self.controller.up {
            return;
        }
        let drivers = self.controller.drivers.iter();
        let Some(id) = drivers.filter(|(_, d)| !d.writing).map(|(id, _)| id.clone()).next_back() else {
            return;
        };
        let event = if self.has(Mutation::CancelAfterCommit) && self.committed(&id) {
            self.given_up.insert(id.clone());
            None
        } else {
            self.session(&id).and_then(|s| s.cancellation("operator"))
        };
        if let Some(event) = event {
            self.event(&id, event);
            self.settle(&id);
        }
    }

    // ---- the journal

    fn write(&mut self, session: String, records: Vec<Record>, request: bool) {
        let write = self.controller.id();
        self.controller.writes.insert(write, Write { session, records, request });
        let boot = self.controller.boot;
        let wait = self.sync_time();
        self.after(wait, Ev::Synced { boot, write });
    }

    fn on_disk(&mut self, record: Record) {
        if let Record::Session { id, entry: Entry { event: Event::Decided { decision }, .. } } = &record {
            let (id, decision) = (id.clone(), *decision);
            self.note(|| format!("the decision on {id} is durable: {decision:?}"));
            if let Some(before) = self.decided.insert(id.clone(), decision)
                && before != decision
            {
                self.violated(|| format!("{id} is decided twice: {before:?}, then {decision:?}"));
            }
        }
        if self.has(Mutation::ForgetDecision)
            && matches!(&record, Record::Session { entry, .. } if matches!(entry.event, Event::Decided { .. }))
        {
            return;
        }
        self.controller.disk.push(record);
    }

    pub(crate) fn synced(&mut self, write: u64) {
        let Some(Write { session, records, request }) = self.controller.writes.remove(&write) else { return };
        let last = records.last().cloned();
        for record in records {
            self.on_disk(record);
        }
        let Some(last) = last else { return };
        if request {
            if !self.has(Mutation::AnswerBeforeRequestIsDurable) {
                self.take(&last);
            }
            self.seen.entry(session.clone()).or_insert(Outcome::Running);
            self.drive(&session, None);
        } else {
            if let Some(driver) = self.controller.drivers.get_mut(&session) {
                driver.writing = false;
            }
            if !self.has(Mutation::ResumeBeforeDecisionIsDurable) {
                self.take(&last);
            }
            let aborted = matches!(&last, Record::Session { entry, .. }
                if entry.event == Event::Decided { decision: Decision::Abort });
            let asked = |s: &Session| s.log.iter().any(|e| matches!(e.event, Event::Cancelled { .. }));
            if aborted && self.session(&session).is_some_and(asked) && self.given_up.insert(session.clone()) {
                self.figures.cancelled += 1;
            }
            self.settle(&session);
        }
    }

    pub(crate) fn controller_dies(&mut self) {
        let writes = std::mem::take(&mut self.controller.writes);
        for write in writes.into_values() {
            let kept = self.rng.range(0, write.records.len() as u64 + 1) as usize;
            for record in write.records.into_iter().take(kept) {
                self.on_disk(record);
            }
        }
        let c = &mut self.controller;
        c.up = false;
        c.boot += 1;
        c.drivers.clear();
        c.tasks.clear();
        c.configured.fill(None);
    }

    pub(crate) fn controller_starts(&mut self) {
        let mut world = World::default();
        for record in &self.controller.disk {
            if let Err(e) = world.apply(record) {
                self.violated(|| format!("the journal contradicts itself: {e}"));
                return;
            }
        }
        // a request that was durable before anybody was told counts as told now
        for id in &world.order {
            self.seen.entry(id.clone()).or_insert(Outcome::Running);
        }
        let unfinished = world.unfinished();
        self.controller.world = world;
        self.controller.up = true;
        for g in 0..self.gateways.len() {
            let boot = self.controller.boot;
            self.after(0, Ev::Poll { boot, gateway: g });
        }
        for id in unfinished {
            self.drive(&id, Some("the controller was restarted before the decision"));
        }
    }

    fn take(&mut self, record: &Record) {
        if let Err(e) = self.controller.world.apply(record) {
            self.violated(|| format!("the controller stops: {e}"));
        }
    }

    // ---- the driver

    fn session(&self, id: &str) -> Option<&Session> {
        self.controller.world.sessions.get(id)
    }

    fn drive(&mut self, id: &str, restarted: Option<&str>) {
        let driver = Driver {
            calls: BTreeMap::new(),
            unwritten: Vec::new(),
            writing: false,
            answers: VecDeque::new(),
        };
        self.controller.drivers.insert(id.into(), driver);
        let recovery = restarted.and_then(|why| self.session(id)?.recovery(why));
        if let Some(event) = recovery {
            self.event(id, event);
        }
        self.settle(id);
    }

    /// `Driver::happen`.
    fn event(&mut self, id: &str, event: Event) {
        let Some(session) = self.session(id) else { return };
        if let Err(illegal) = session.check(&event) {
            self.note(|| format!("dropped: {illegal}"));
            return;
        }
        let last = session.log.last().map_or(0, |e| e.at_us);
        let zero = session.plan.requested_at_ms * 1000;
        let forced = event.forced();
        self.note(|| format!("session {id}: {}", event.name()));
        let at_us = self.now.saturating_sub(zero).max(last);
        let record = Record::Session { id: id.into(), entry: Entry { at_us, event } };
        let Some(driver) = self.controller.drivers.get_mut(id) else { return };
        driver.unwritten.push(record.clone());
        if forced {
            driver.writing = true;
            let records = std::mem::take(&mut driver.unwritten);
            if self.has(Mutation::ResumeBeforeDecisionIsDurable) {
                self.take(&record);
            }
            self.write(id.into(), records, false);
        } else {
            self.take(&record);
        }
    }

    /// `Driver::settle`, and the loop around it.
    fn settle(&mut self, id: &str) {
        loop {
            let early = self.has(Mutation::ResumeBeforeDecisionIsDurable);
            let Some(driver) = self.controller.drivers.get(id) else { return };
            if driver.writing && !early {
                return;
            }
            let Some(session) = self.session(id) else { return };
            let outstanding = session.outstanding();
            let decision = if outstanding.contains(&Command::DecideCommit) {
                Some(Decision::Commit)
            } else if outstanding.contains(&Command::DecideAbort) {
                Some(Decision::Abort)
            } else {
                None
            };
            if let Some(decision) = decision {
                self.event(id, Event::Decided { decision });
                continue;
            }
            let Some(driver) = self.controller.drivers.get_mut(id) else { return };
            let mut ended = Vec::new();
            driver.calls.retain(|command, task| {
                let stays = outstanding.contains(command);
                if !stays {
                    ended.push(*task);
                }
                stays
            });
            for task in ended {
                self.controller.tasks.remove(&task);
                self.give_up(|w| matches!(w, Waiter::Task(t) if *t == task));
            }
            let Some(driver) = self.controller.drivers.get(id) else { return };
            let new: Vec<Command> =
                outstanding.into_iter().filter(|c| !driver.calls.contains_key(c)).collect();
            for command in new {
                self.begin(id, command);
            }
            let Some(driver) = self.controller.drivers.get_mut(id) else { return };
            let Some((command, event)) = driver.answers.pop_front() else {
                if driver.calls.is_empty() && !driver.writing {
                    self.controller.drivers.remove(id);
                }
                return;
            };
            if self.session(id).is_some_and(|s| s.outstanding().contains(&command)) {
                self.event(id, event);
            }
        }
    }

    fn tell(&mut self, id: &str, command: Command, event: Event) {
        if let Some(driver) = self.controller.drivers.get_mut(id) {
            driver.answers.push_back((command, event));
            self.settle(id);
        }
    }

    // ---- what each command means

    fn begin(&mut self, id: &str, command: Command) {
        let Some(plan) = self.session(id).map(|s| Arc::clone(&s.plan)) else { return };
        let (task, limit) = (self.controller.id(), attempt(&command));
        let (phase, patience) = match &command {
            Command::Check if plan.gateways.is_empty() => (Phase::LookSource, Patience::Check),
            Command::Check => (Phase::GatewayStatus(0), Patience::Check),
            c if c.confirmed_by().is_some() => (Phase::Single, Patience::After(Confirming::new(c))),
            c => (Phase::Single, Patience::Before(Asking::new(c, Load::default()))),
        };
        if let Command::Switch(..) = &command {
            self.controller.asked_to_switch.insert(id.into());
        }
        if let Some(driver) = self.controller.drivers.get_mut(id) {
            driver.calls.insert(command.clone(), task);
        }
        self.controller.tasks.insert(
            task,
            Task {
                session: id.into(),
                command,
                began: self.now,
                end: self.now + us(limit),
                phase,
                patience,
                errors: 0,
                switched_again: false,
            },
        );
        self.ask(task);
    }

    pub(crate) fn ask_again(&mut self, task: TaskId) {
        if let Some(t) = self.controller.tasks.get_mut(&task) {
            t.end = self.now + us(attempt(&t.command));
            t.phase = Phase::Single;
            self.ask(task);
        }
    }

    fn ask(&mut self, task: TaskId) {
        let Some(t) = self.controller.tasks.get(&task) else { return };
        let id = t.session.clone();
        let Some(plan) = self.session(&id).map(|s| Arc::clone(&s.plan)) else { return };
        let side = |site: &str| Node::Server(usize::from(site == "backup"));
        let (source, destination) = (side(&plan.from.site), side(&plan.to.site));
        let (from, to) = (plan.from.network.clone(), plan.to.network.clone());
        let again = format!("{id}-again");
        let g = match &t.command {
            Command::Stage(g) | Command::Hold(g, ..) | Command::Switch(g, ..) | Command::Finish(g) => {
                gateway(g)
            }
            Command::Undo(Participant::Gateway(g)) => gateway(g),
            _ => 0,
        };
        let users = plan.users_at(&format!("gw{g}"));
        let (node, msg) = match &t.phase {
            Phase::Single => match &t.command {
                Command::Stage(_) => (Node::Gateway(g), Msg::Stage { id, users, from, to }),
                Command::Prepare => (source, Msg::Prepare { id }),
                Command::Hold(_, switch, generation) => {
                    (Node::Gateway(g), Msg::Hold { id, switch: *switch, generation: *generation })
                }
                Command::Freeze(_) => (source, Msg::Freeze { id, yields: plan.policy == Policy::Disaster }),
                Command::Switch(_, switch, generation) => {
                    let (switch, generation) = (*switch, *generation);
                    (Node::Gateway(g), Msg::Switch { id, switch, generation, users, to })
                }
                Command::Yield => (source, Msg::Yield { id }),
                Command::Resume => (destination, Msg::Resume { id }),
                Command::End => (source, Msg::End { id }),
                Command::Finish(_) => (Node::Gateway(g), Msg::Finish { id }),
                Command::Undo(Participant::Source) => (source, Msg::Abort { id }),
                Command::Undo(Participant::Destination) => (destination, Msg::Abort { id }),
                Command::Undo(Participant::Gateway(_)) => (Node::Gateway(g), Msg::Unstage { id }),
                Command::Check | Command::DecideCommit | Command::DecideAbort => return,
            },
            Phase::GatewayStatus(n) => (Node::Gateway(*n), Msg::Status),
            Phase::GatewayConfigure(n, _) => {
                (Node::Gateway(*n), Msg::Configure(Box::new(self.controller.desired(*n))))
            }
            Phase::GatewayCheck(n) => {
                let users = plan.users_at(&format!("gw{n}"));
                (Node::Gateway(*n), Msg::CheckSwitch { id, users, from, to })
            }
            Phase::LookSource => (source, Msg::Look { id, source: true }),
            Phase::LookDestination => (destination, Msg::Look { id, source: false }),
            Phase::Stray | Phase::StrayLook => (Node::Gateway(g), Msg::Status),
            Phase::StrayConfigure(_) => {
                (Node::Gateway(g), Msg::Configure(Box::new(self.controller.desired(g))))
            }
            Phase::StrayFinish | Phase::AgainFinish => (Node::Gateway(g), Msg::Finish { id: again }),
            Phase::AgainStage(from, users) => {
                let (from, users) = (from.clone(), users.clone());
                (Node::Gateway(g), Msg::Stage { id: again, users, from, to })
            }
            Phase::AgainSwitch(users, switch, generation) => {
                let (users, switch, generation) = (users.clone(), *switch, *generation);
                (Node::Gateway(g), Msg::Switch { id: again, switch, generation, users, to })
            }
        };
        let wait = match &t.patience {
            Patience::Check if matches!(t.phase, Phase::GatewayStatus(_) | Phase::GatewayConfigure(..)) => {
                ASK
            }
            Patience::Check => us(PREFLIGHT),
            Patience::Before(asking) => (t.began + us(asking.deadline)).saturating_sub(self.now),
            Patience::After(_) => t.end.saturating_sub(self.now),
        };
        if let Msg::Switch { id, .. } = &msg {
            self.controller.asked_to_switch.insert(id.clone());
        }
        self.call(Node::Controller, node, msg, wait, Waiter::Task(task));
    }

    fn next_phase(&mut self, task: TaskId, phase: Phase) {
        if let Some(t) = self.controller.tasks.get_mut(&task) {
            t.phase = phase;
            self.ask(task);
        }
    }

    pub(crate) fn task_heard(&mut self, task: TaskId, reply: Reply) {
        let Some(t) = self.controller.tasks.get(&task) else { return };
        match t.patience {
            Patience::Check => self.check_heard(task, reply),
            Patience::Before(_) => self.before_heard(task, reply),
            Patience::After(_) => self.after_heard(task, reply),
        }
    }

    /// Whether the gateway has to be configured, by its status.
    fn outdated(&self, g: usize, view: &GatewayView) -> bool {
        let revision = self.controller.world.revision;
        !(view.revision == revision && self.controller.configured[g] == Some((view.boot, revision)))
    }

    fn check_heard(&mut self, task: TaskId, reply: Reply) {
        let Some(t) = self.controller.tasks.get_mut(&task) else { return };
        let id = t.session.clone();
        let count = self.gateways.len();
        let phase = t.phase.clone();
        match (&phase, &reply) {
            (_, Ok(Answer::Looked { errors })) => t.errors += errors,
            (_, Err(_)) => t.errors += 1,
            _ => {}
        }
        let after = |n: usize| if n + 1 < count { Phase::GatewayStatus(n + 1) } else { Phase::LookSource };
        let next = match (phase, reply) {
            (Phase::GatewayStatus(n), Ok(Answer::Status(view))) if self.outdated(n, &view) => {
                Phase::GatewayConfigure(n, view.boot)
            }
            (Phase::GatewayStatus(n), Ok(_)) => Phase::GatewayCheck(n),
            (Phase::GatewayConfigure(n, boot), Ok(_)) => {
                self.controller.configured[n] = Some((boot, self.controller.world.revision));
                Phase::GatewayCheck(n)
            }
            (Phase::GatewayStatus(n) | Phase::GatewayConfigure(n, _) | Phase::GatewayCheck(n), _) => after(n),
            (Phase::LookSource, _) => Phase::LookDestination,
            (_, _) => {
                let Some(t) = self.controller.tasks.get(&task) else { return };
                let finding = |n: usize| Finding {
                    severity: Severity::Error,
                    code: "preflight-failed".into(),
                    reporter: "simulation".into(),
                    message: format!("finding {n}"),
                    remedy: String::new(),
                };
                let findings = (0..t.errors).map(finding).collect();
                let event = Event::Checked { findings, pid: 10_000, memory_bytes: 0, sent_us: 0 };
                self.tell(&id, Command::Check, event);
                return;
            }
        };
        self.next_phase(task, next);
    }

    fn before_heard(&mut self, task: TaskId, reply: Reply) {
        let now = self.now;
        let guess = self.has(Mutation::LostYieldTakenForGranted);
        let Some(t) = self.controller.tasks.get_mut(&task) else { return };
        let (id, command) = (t.session.clone(), t.command.clone());
        let sent_us = 0;
        let reason = match reply {
            Ok(answer) => {
                let event = match (&command, answer) {
                    (Command::Stage(g), Answer::Ticket { switch, generation }) => {
                        Event::Staged { gateway: g.clone(), ticket: Ticket { switch, generation }, sent_us }
                    }
                    (Command::Prepare, _) => Event::Prepared { sent_us },
                    (Command::Hold(g, ..), _) => {
                        Event::Held { gateway: g.clone(), marker_sent: true, sent_us }
                    }
                    (Command::Freeze(_), _) => Event::Frozen { vote: Vote::default(), sent_us },
                    (Command::Switch(g, ..), _) => {
                        Event::Switched { gateway: g.clone(), window_ns: 0, store_latency_ns: 0, sent_us }
                    }
                    (Command::Yield, _) => Event::Yielded { sent_us },
                    _ => return,
                };
                self.tell(&id, command, event);
                return;
            }
            Err(Failed::Lost | Failed::Deadline) if guess && command == Command::Yield => {
                self.tell(&id, command, Event::Yielded { sent_us });
                return;
            }
            Err(Failed::Lost) => {
                let elapsed = Duration::from_micros(now.saturating_sub(t.began));
                if let Patience::Before(asking) = &mut t.patience
                    && let Some(wait) = asking.lost(elapsed)
                {
                    let boot = self.controller.boot;
                    self.after(us(wait), Ev::Task { boot, task });
                    return;
                }
                "lost".to_owned()
            }
            Err(Failed::Deadline) => "no answer in time".to_owned(),
            Err(Failed::Refused(why)) => why,
        };
        let step = match &command {
            Command::Stage(_) => Step::Stage,
            Command::Prepare => Step::Prepare,
            Command::Hold(..) => Step::Hold,
            Command::Freeze(_) => Step::Freeze,
            Command::Switch(..) => Step::Switch,
            _ => Step::Yield,
        };
        let event = Event::Failed { step, part: None, actor: "simulation".into(), reason, sent_us };
        self.tell(&id, command, event);
    }

    fn after_heard(&mut self, task: TaskId, reply: Reply) {
        let Some(t) = self.controller.tasks.get(&task) else { return };
        let (id, command, phase) = (t.session.clone(), t.command.clone(), t.phase.clone());
        let sent_us = 0;
        let answer = match reply {
            Ok(answer) => answer,
            Err(failed) => return self.not_confirmed(task, &failed),
        };
        match (&command, &phase) {
            (Command::Finish(_), _) => self.finish_heard(task, answer),
            (Command::Resume, _) => self.tell(&id, command, Event::Resumed { pid: 10_000, sent_us }),
            (Command::End, _) => self.tell(&id, command, Event::Ended { sent_us }),
            (Command::Undo(p), _) => {
                let alive = matches!(answer, Answer::Alive(true));
                let event = Event::Undone { participant: p.clone(), alive, held: None, sent_us };
                self.tell(&id, command, event);
            }
            _ => {}
        }
    }

    /// `Call::finish` and `Call::strayed`.
    fn finish_heard(&mut self, task: TaskId, answer: Answer) {
        let Some(t) = self.controller.tasks.get(&task) else { return };
        let (id, command, phase) = (t.session.clone(), t.command.clone(), t.phase.clone());
        let switched_again = t.switched_again;
        let Command::Finish(name) = &command else { return };
        let g = gateway(name);
        let Some(plan) = self.session(&id).map(|s| Arc::clone(&s.plan)) else { return };
        let next = match (phase, answer) {
            (Phase::Single, _) => Phase::Stray,
            (Phase::Stray, Answer::Status(view)) => {
                if self.outdated(g, &view) {
                    Phase::StrayConfigure(view.boot)
                } else {
                    Phase::StrayLook
                }
            }
            (Phase::StrayConfigure(boot), _) => {
                self.controller.configured[g] = Some((boot, self.controller.world.revision));
                Phase::StrayLook
            }
            (Phase::StrayLook, Answer::Status(view)) => {
                let mine = plan.users_at(name);
                let stray: Vec<&(String, String)> = view
                    .users
                    .iter()
                    .filter(|(user, network)| mine.contains(user) && *network != plan.to.network)
                    .collect();
                let again = format!("{id}-again");
                if view.switched.contains(&again) && !self.has(Mutation::SwitchAgainNotFinished) {
                    Phase::StrayFinish
                } else if let Some((_, network)) = stray.first() {
                    if switched_again {
                        let why = Failed::Refused(format!("still on {network}"));
                        return self.not_confirmed(task, &why);
                    }
                    let users =
                        stray.iter().filter(|(_, n)| n == network).map(|(user, _)| user.clone()).collect();
                    Phase::AgainStage(network.clone(), users)
                } else {
                    let event = Event::Finished { gateway: name.clone(), held: None, sent_us: 0 };
                    return self.tell(&id, command, event);
                }
            }
            (Phase::StrayFinish, _) => Phase::Stray,
            (Phase::AgainStage(_, users), Answer::Ticket { switch, generation }) => {
                Phase::AgainSwitch(users, switch, generation)
            }
            (Phase::AgainSwitch(..), _) => Phase::AgainFinish,
            (Phase::AgainFinish, _) => {
                if let Some(t) = self.controller.tasks.get_mut(&task) {
                    t.switched_again = true;
                }
                Phase::Stray
            }
            _ => return,
        };
        self.next_phase(task, next);
    }

    fn not_confirmed(&mut self, task: TaskId, failed: &Failed) {
        let now = self.now;
        let Some(t) = self.controller.tasks.get_mut(&task) else { return };
        let elapsed = Duration::from_micros(now.saturating_sub(t.began));
        let Patience::After(confirming) = &mut t.patience else { return };
        let (tell, wait) = confirming.failed(elapsed);
        t.switched_again = false;
        let (id, command) = (t.session.clone(), t.command.clone());
        let boot = self.controller.boot;
        self.after(us(wait), Ev::Task { boot, task });
        if tell && let Some(participant) = command.confirmed_by() {
            let reason = format!("{failed:?}");
            if self.has(Mutation::UndoAfterCommit) && command == Command::Resume {
                self.note(|| "planted: undone after COMMIT".into());
                let source = usize::from(self.session(&id).is_some_and(|s| s.plan.from.site == "backup"));
                let waiter = Waiter::Poll(usize::MAX);
                self.call(Node::Controller, Node::Server(source), Msg::Abort { id: id.clone() }, S, waiter);
            }
            self.tell(&id, command, Event::Unconfirmed { participant, reason });
        }
    }

    // ---- watching the gateways

    pub(crate) fn poll(&mut self, g: usize) {
        let boot = self.controller.boot;
        self.after(ASK_EVERY, Ev::Poll { boot, gateway: g });
        self.call(Node::Controller, Node::Gateway(g), Msg::Status, ASK, Waiter::Poll(g));
    }

    pub(crate) fn poll_heard(&mut self, g: usize, reply: Reply) {
        match reply {
            Ok(Answer::Status(view)) if self.outdated(g, &view) => {
                let desired = Box::new(self.controller.desired(g));
                self.call(Node::Controller, Node::Gateway(g), Msg::Configure(desired), ASK, Waiter::Poll(g));
            }
            // of the configuration: seen as done once the gateway says so
            Ok(Answer::Done) if g < self.gateways.len() => {
                let gateway = &self.gateways[g];
                let revision = self.controller.world.revision;
                if gateway.table.revision() == revision {
                    self.controller.configured[g] = Some((gateway.boot, revision));
                }
            }
            _ => {}
        }
    }
}
