//! Time, calls and faults; what happens next.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use handover_controller::session::{Decision, Outcome};
use handover_gateway::{desired::Desired, table::Retired};

use crate::{
    controller::{Controller, TaskId},
    gateway::Gateway,
    mutation::Mutation,
    rng::Rng,
    server::{PeerCall, Server},
};

/// Microseconds since the beginning of the run.
pub(crate) type Time = u64;
pub(crate) const MS: Time = 1000;
pub(crate) const S: Time = 1000 * MS;

/// No message is later than this.
const LATEST: Time = 12 * S;
/// By then everything has to have come to rest once the faults are over.
const REST: Time = 150 * S;
/// More events than any run that ends has.
const EVENTS_MAX: u64 = 200_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Node {
    Controller,
    Server(usize),
    Gateway(usize),
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Controller => f.write_str("controller"),
            Self::Server(0) => f.write_str("main-server"),
            Self::Server(_) => f.write_str("backup-server"),
            Self::Gateway(g) => write!(f, "gw{g}"),
        }
    }
}

/// What is asked.
#[derive(Debug, Clone)]
pub(crate) enum Msg {
    // a migrator, by the controller
    Look { id: String, source: bool },
    Prepare { id: String },
    Freeze { id: String, yields: bool },
    Yield { id: String },
    Resume { id: String },
    End { id: String },
    Abort { id: String },
    // a migrator, by the other
    Reserve { id: String },
    Restore { id: String },
    Discard { id: String },
    // a gateway
    Status,
    Configure(Box<Desired>),
    CheckSwitch { id: String, users: Vec<String>, from: String, to: String },
    Stage { id: String, users: Vec<String>, from: String, to: String },
    Hold { id: String, switch: u32, generation: u64 },
    Switch { id: String, switch: u32, generation: u64, users: Vec<String>, to: String },
    Unstage { id: String },
    Finish { id: String },
}

#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Done,
    Looked { errors: usize },
    Alive(bool),
    Ticket { switch: u32, generation: u64 },
    Status(GatewayView),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GatewayView {
    pub(crate) boot: u32,
    pub(crate) revision: u64,
    /// Name and network.
    pub(crate) users: Vec<(String, String)>,
    /// Migrations that are switched and not finished.
    pub(crate) switched: Vec<String>,
}

#[derive(Debug, Clone)]
pub(crate) enum Failed {
    /// Nobody knows whether it was done.
    Lost,
    /// The caller's deadline.
    Deadline,
    /// The daemon said no.
    Refused(String),
}

pub(crate) type Reply = Result<Answer, Failed>;

/// Who waits for an answer.
#[derive(Debug, Clone)]
pub(crate) enum Waiter {
    Task(TaskId),
    Poll(usize),
    Peer { server: usize, id: String, what: PeerCall },
}

#[derive(Debug)]
struct Call {
    from: Node,
    to: Node,
    waiter: Waiter,
}

#[derive(Debug)]
pub(crate) enum Ev {
    Deliver { call: u64, from: Node, to: Node, boot: u32, msg: Msg },
    Reply { call: u64, reply: Reply },
    Deadline { call: u64 },
    // of a daemon's life
    Step { server: usize, boot: u32, id: String },
    Lease { server: usize, boot: u32, id: String },
    TellDiscard { server: usize, boot: u32, id: String, attempt: u32 },
    Synced { boot: u32, write: u64 },
    Task { boot: u32, task: TaskId },
    Poll { boot: u32, gateway: usize },
    Introduced { gateway: usize, boot: u32, id: String, call: u64 },
    Reuse { gateway: usize, boot: u32, retired: Box<Retired> },
    // from outside
    Crash(Node),
    Start(Node),
    Partition(Node, Node),
    Join(Node, Node),
    Operator,
    Cancel,
    Heal,
}

/// A promise was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Of the run.
    pub seed: u64,
    /// When, in microseconds of the run.
    pub at_us: u64,
    /// Which, in words.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}, {:.6} s: {}", self.seed, self.at_us as f64 / 1e6, self.what)
    }
}

/// What runs came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Figures {
    /// Runs.
    pub runs: u64,
    /// Events.
    pub events: u64,
    /// Daemons crashed.
    pub crashes: u64,
    /// Partitions.
    pub partitions: u64,
    /// Calls lost, late or doubled.
    pub disturbed: u64,
    /// Migrations completed.
    pub completed: u64,
    /// Migrations rolled back.
    pub rolled_back: u64,
    /// Requests refused by preflight.
    pub refused: u64,
    /// Sessions that said they needed an operator for a time.
    pub in_doubt: u64,
    /// Sessions an operator cancelled.
    pub cancelled: u64,
    /// The longest from healing until the running copy, the address and the users agreed.
    pub agreed_us: u64,
    /// Runs in which that took more than a second.
    pub agreed_late: u64,
}

impl Figures {
    /// Adds those of other runs.
    pub fn add(&mut self, other: &Self) {
        self.runs += other.runs;
        self.events += other.events;
        self.crashes += other.crashes;
        self.partitions += other.partitions;
        self.disturbed += other.disturbed;
        self.completed += other.completed;
        self.rolled_back += other.rolled_back;
        self.refused += other.refused;
        self.in_doubt += other.in_doubt;
        self.cancelled += other.cancelled;
        self.agreed_us = self.agreed_us.max(other.agreed_us);
        self.agreed_late += other.agreed_late;
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} runs, {} events: {} migrations completed, {} rolled back ({} by an operator), {} refused, {} in doubt for a time; {} crashes, \
             {} partitions, {} calls lost, late or doubled; agreed at most {:.2} s after healing, in {} runs later than 1 s",
            self.runs,
            self.events,
            self.completed,
            self.rolled_back,
            self.cancelled,
            self.refused,
            self.in_doubt,
            self.crashes,
            self.partitions,
            self.disturbed,
            self.agreed_us as f64 / 1e6,
            self.agreed_late,
        )
    }
}

/// How bad a run is; each fault in so many of 1000 calls.
#[derive(Debug, Clone, Copy)]
struct Weather {
    lost: u64,
    late: u64,
    doubled: u64,
    /// Of 1000 steps of a daemon that matter: it crashes right after.
    crash: u64,
    /// Gateways like to be started again right after they have switched, and the journal is slow.
    forgetful: bool,
}

pub(crate) struct Sim {
    pub(crate) seed: u64,
    pub(crate) rng: Rng,
    pub(crate) now: Time,
    pub(crate) mutation: Option<Mutation>,
    pub(crate) figures: Figures,
    pub(crate) controller: Controller,
    pub(crate) servers: [Server; 2],
    pub(crate) gateways: Vec<Gateway>,
    /// Decisions that are durable.
    pub(crate) decided: BTreeMap<String, Decision>,
    /// What an operator could have seen of each session.
    pub(crate) seen: BTreeMap<String, Outcome>,
    /// Sessions an operator was told are given up.
    pub(crate) given_up: BTreeSet<String>,
    pub(crate) healed: Option<Time>,
    broken: Option<String>,
    trace: Option<Vec<String>>,
    weather: Weather,
    partitions: Vec<(Node, Node)>,
    queue: BTreeMap<(Time, u64), Ev>,
    sequence: u64,
    calls: BTreeMap<u64, Call>,
    /// Messages on their way.
    under_way: u64,
    agreed: bool,
}

impl Sim {
    fn new(seed: u64, mutation: Option<Mutation>, traced: bool) -> Self {
        let mut rng = Rng::new(seed);
        let count = rng.range(1, 4) as usize;
        let bad = |rng: &mut Rng| if rng.permille(300) { 0 } else { rng.range(0, 80) };
        let weather = Weather {
            lost: bad(&mut rng),
            late: bad(&mut rng),
            doubled: bad(&mut rng),
            crash: bad(&mut rng) / 2,
            forgetful: rng.permille(150),
        };
        let controller = Controller::new(count);
        let mut sim = Self {
            seed,
            rng,
            now: 0,
            mutation,
            figures: Figures { runs: 1, ..Figures::default() },
            controller,
            servers: [Server::new(true), Server::new(false)],
            gateways: (0..count).map(|_| Gateway::new()).collect(),
            decided: BTreeMap::new(),
            seen: BTreeMap::new(),
            given_up: BTreeSet::new(),
            healed: None,
            broken: None,
            trace: traced.then(Vec::new),
            weather,
            partitions: Vec::new(),
            queue: BTreeMap::new(),
            sequence: 0,
            calls: BTreeMap::new(),
            under_way: 0,
            agreed: false,
        };
        sim.plan_faults();
        sim
    }

    /// What goes wrong from outside, and what is asked for.
    fn plan_faults(&mut self) {
        let end = self.rng.range(8, 30) * S;
        for g in 0..self.gateways.len() {
            self.after(0, Ev::Poll { boot: 0, gateway: g });
        }
        let first = self.rng.range(200, 1200) * MS;
        self.after(first, Ev::Operator);
        for _ in 0..self.rng.range(0, 4) {
            let at = self.rng.range(first, end);
            self.after(at, Ev::Operator);
        }
        if self.rng.permille(250) {
            let at = if self.rng.permille(700) {
                first + self.rng.range(0, 100 * MS)
            } else {
                self.rng.range(first, end)
            };
            self.after(at, Ev::Cancel);
        }
        // most trouble close to the first request: that is where something is under way
        let when = |rng: &mut Rng| {
            if rng.permille(600) { first + rng.range(0, 400 * MS) } else { rng.range(first, end) }
        };
        for _ in 0..self.rng.range(0, 6) {
            let node = self.any_node();
            let at = when(&mut self.rng);
            let down =
                if self.rng.permille(600) { self.rng.range(1, 300) * MS } else { self.rng.range(1, 15) * S };
            self.after(at, Ev::Crash(node));
            self.after((at + down).min(end), Ev::Start(node));
        }
        for _ in 0..self.rng.range(0, 4) {
            let (a, b) = (self.any_node(), self.any_node());
            let at = when(&mut self.rng);
            let lasts =
                if self.rng.permille(500) { self.rng.range(1, 2000) * MS } else { self.rng.range(2, 20) * S };
            self.after(at, Ev::Partition(a, b));
            self.after((at + lasts).min(end), Ev::Join(a, b));
        }
        self.after(end, Ev::Heal);
    }

    fn any_node(&mut self) -> Node {
        match self.rng.range(0, 4 + self.gateways.len() as u64) {
            0 | 1 => Node::Controller,
            2 => Node::Server(0),
            3 => Node::Server(1),
            g => Node::Gateway(g as usize - 4),
        }
    }

    /// How long a write to stable storage takes.
    pub(crate) fn sync_time(&mut self) -> Time {
        if self.healed.is_none() && (self.weather.forgetful || self.rng.permille(50)) {
            self.rng.range(5 * MS, 900 * MS)
        } else {
            self.rng.range(100, 5 * MS)
        }
    }

    /// Whether the planted bug is `mutation`.
    pub(crate) fn has(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    /// Notes what happens; the words are made only for a trace.
    pub(crate) fn note(&mut self, words: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>12.6} {}", now as f64 / 1e6, words()));
        }
    }

    /// A promise is broken; the first one counts.
    pub(crate) fn violated(&mut self, what: impl FnOnce() -> String) {
        if self.broken.is_none() {
            let what = what();
            self.note(|| format!("BROKEN: {what}"));
            self.broken = Some(what);
        }
    }

    pub(crate) fn after(&mut self, wait: Time, event: Ev) {
        if matches!(event, Ev::Deliver { .. }) {
            self.under_way += 1;
        }
        self.sequence += 1;
        self.queue.insert((self.now + wait, self.sequence), event);
    }

    pub(crate) fn up(&self, node: Node) -> bool {
        match node {
            Node::Controller => self.controller.up,
            Node::Server(s) => self.servers[s].up,
            Node::Gateway(g) => self.gateways[g].up,
        }
    }

    pub(crate) fn boot(&self, node: Node) -> u32 {
        match node {
            Node::Controller => self.controller.boot,
            Node::Server(s) => self.servers[s].boot,
            Node::Gateway(g) => self.gateways[g].boot,
        }
    }

    fn apart(&self, a: Node, b: Node) -> bool {
        self.partitions.iter().any(|p| *p == (a, b) || *p == (b, a))
    }

    fn latency(&mut self) -> Time {
        self.rng.range(50, 800)
    }

    /// Asks `to`; whoever waits hears once at most.
    pub(crate) fn call(&mut self, from: Node, to: Node, msg: Msg, deadline: Time, waiter: Waiter) -> u64 {
        self.sequence += 1;
        let call = self.sequence;
        self.note(|| format!("{from} -> {to}: {msg:?} #{call}"));
        self.calls.insert(call, Call { from, to, waiter });
        self.after(deadline, Ev::Deadline { call });
        let mut delay = self.latency();
        if !self.up(to) {
            self.after(delay, Ev::Reply { call, reply: Err(Failed::Lost) });
            return call;
        }
        let boot = self.boot(to);
        if self.healed.is_none() {
            if self.rng.permille(self.weather.lost) {
                self.figures.disturbed += 1;
                // the connection breaks, before or after the request was through
                let wait = self.latency() + if self.rng.permille(300) { 3 * S } else { 0 };
                self.after(wait, Ev::Reply { call, reply: Err(Failed::Lost) });
                if self.rng.permille(500) {
                    return call;
                }
            }
            if self.rng.permille(self.weather.late) {
                self.figures.disturbed += 1;
                delay += if self.rng.permille(500) {
                    self.rng.range(0, 500 * MS)
                } else {
                    self.rng.range(0, LATEST)
                };
            }
            if self.rng.permille(self.weather.doubled) {
                self.figures.disturbed += 1;
                let longest = if self.rng.permille(500) { 50 * MS } else { LATEST };
                let again = delay + self.rng.range(0, longest);
                self.after(again, Ev::Deliver { call, from, to, boot, msg: msg.clone() });
            }
        }
        if self.apart(from, to) && self.rng.permille(400) {
            // keep-alive finds out
            self.after(3 * S, Ev::Reply { call, reply: Err(Failed::Lost) });
        }
        self.after(delay, Ev::Deliver { call, from, to, boot, msg });
        call
    }

    /// Answers a call, if anybody still waits.
    pub(crate) fn answer(&mut self, call: u64, reply: Reply) {
        let Some(c) = self.calls.get(&call) else { return };
        let (from, to) = (c.from, c.to);
        self.note(|| format!("{to} -> {from}: {reply:?} #{call}"));
        let mut delay = self.latency();
        let mut reply = reply;
        if self.healed.is_none() {
            if self.rng.permille(self.weather.lost) {
                self.figures.disturbed += 1;
                reply = Err(Failed::Lost);
            } else if self.rng.permille(self.weather.late) {
                self.figures.disturbed += 1;
                delay += self.rng.range(0, 5 * S);
            }
        }
        self.after(delay, Ev::Reply { call, reply });
    }

    /// Nobody waits for it any more.
    pub(crate) fn give_up(&mut self, waiting: impl Fn(&Waiter) -> bool) {
        self.calls.retain(|_, c| !waiting(&c.waiter));
    }

    fn happen(&mut self, event: Ev) {
        match event {
            Ev::Deliver { call, from, to, boot, msg } => {
                self.under_way -= 1;
                if self.apart(from, to) {
                    // sent again by the kernel until the other side is there
                    let wait = self.rng.range(100, 400) * MS;
                    self.after(wait, Ev::Deliver { call, from, to, boot, msg });
                } else if self.up(to) && self.boot(to) == boot {
                    let matters = !matches!(msg, Msg::Status);
                    let switched = matches!(msg, Msg::Switch { .. });
                    match to {
                        Node::Server(s) => self.ask_server(s, call, msg),
                        Node::Gateway(g) => self.ask_gateway(g, call, msg),
                        Node::Controller => {}
                    }
                    if switched && self.weather.forgetful && self.healed.is_none() && self.rng.permille(300) {
                        // the answer goes out first
                        self.after(2 * MS, Ev::Crash(to));
                        self.after(3 * MS, Ev::Start(to));
                    } else if matters {
                        self.may_crash(to);
                    }
                }
            }
            Ev::Reply { call, reply } => {
                let Some(c) = self.calls.get(&call) else { return };
                if self.apart(c.from, c.to) && !matches!(reply, Err(Failed::Lost)) {
                    let wait = self.rng.range(100, 400) * MS;
                    self.after(wait, Ev::Reply { call, reply });
                } else {
                    let (to, polled) = (c.from, matches!(c.waiter, Waiter::Poll(_)));
                    self.heard(call, reply);
                    if !polled {
                        self.may_crash(to);
                    }
                }
            }
            Ev::Deadline { call } => self.heard(call, Err(Failed::Deadline)),
            Ev::Step { server, boot, id } => {
                if self.servers[server].up && self.servers[server].boot == boot {
                    self.step(server, &id);
                    self.may_crash(Node::Server(server));
                }
            }
            Ev::Lease { server, boot, id } => {
                if self.servers[server].up && self.servers[server].boot == boot {
                    self.lease_over(server, &id);
                }
            }
            Ev::TellDiscard { server, boot, id, attempt } => {
                if self.servers[server].up && self.servers[server].boot == boot {
                    self.tell_discard(server, id, attempt);
                }
            }
            Ev::Synced { boot, write } => {
                if self.controller.up && self.controller.boot == boot {
                    self.synced(write);
                    self.may_crash(Node::Controller);
                }
            }
            Ev::Task { boot, task } => {
                if self.controller.up && self.controller.boot == boot {
                    self.ask_again(task);
                }
            }
            Ev::Poll { boot, gateway } => {
                if self.controller.up && self.controller.boot == boot {
                    self.poll(gateway);
                }
            }
            Ev::Introduced { gateway, boot, id, call } => {
                if self.gateways[gateway].up && self.gateways[gateway].boot == boot {
                    self.introduced(gateway, &id, call);
                }
            }
            Ev::Reuse { gateway, boot, retired } => {
                if self.gateways[gateway].boot == boot {
                    self.gateways[gateway].table.reuse(*retired);
                }
            }
            Ev::Crash(node) => self.crash(node),
            Ev::Start(node) => self.start(node),
            Ev::Partition(a, b) => {
                if a != b {
                    self.figures.partitions += 1;
                    self.note(|| format!("{a} and {b} cannot reach one another"));
                    self.partitions.push((a, b));
                }
            }
            Ev::Join(a, b) => self.partitions.retain(|p| *p != (a, b)),
            Ev::Operator => self.operator(),
            Ev::Cancel => self.cancel(),
            Ev::Heal => {
                self.note(|| "no more faults".into());
                self.partitions.clear();
                for node in self.nodes() {
                    self.start(node);
                }
                self.healed = Some(self.now);
            }
        }
    }

    /// A daemon may crash right after anything it did, and is started again.
    fn may_crash(&mut self, node: Node) {
        if self.healed.is_none() && self.rng.permille(self.weather.crash) {
            self.crash(node);
            let down =
                if self.rng.permille(700) { self.rng.range(1, 300) * MS } else { self.rng.range(1, 8) * S };
            self.after(down, Ev::Start(node));
        }
    }

    fn nodes(&self) -> Vec<Node> {
        let gateways = (0..self.gateways.len()).map(Node::Gateway);
        [Node::Controller, Node::Server(0), Node::Server(1)].into_iter().chain(gateways).collect()
    }

    fn heard(&mut self, call: u64, reply: Reply) {
        let Some(c) = self.calls.remove(&call) else { return };
        match c.waiter {
            Waiter::Task(task) => self.task_heard(task, reply),
            Waiter::Poll(gateway) => self.poll_heard(gateway, reply),
            Waiter::Peer { server, id, what } => self.peer_heard(server, &id, what, reply),
        }
    }

    fn crash(&mut self, node: Node) {
        if !self.up(node) || self.healed.is_some() {
            return;
        }
        self.figures.crashes += 1;
        self.note(|| format!("{node} crashes"));
        self.calls.retain(|_, c| c.from != node);
        let broken: Vec<u64> = self.calls.iter().filter(|(_, c)| c.to == node).map(|(id, _)| *id).collect();
        for call in broken {
            let wait = self.latency();
            self.after(wait, Ev::Reply { call, reply: Err(Failed::Lost) });
        }
        match node {
            Node::Controller => self.controller_dies(),
            Node::Server(s) => self.server_dies(s),
            Node::Gateway(g) => self.gateways[g].die(),
        }
    }

    fn start(&mut self, node: Node) {
        if self.up(node) {
            return;
        }
        self.note(|| format!("{node} starts"));
        match node {
            Node::Controller => self.controller_starts(),
            Node::Server(s) => self.server_starts(s),
            Node::Gateway(g) => self.gateways[g].up = true,
        }
    }

    fn at_rest(&self) -> bool {
        self.under_way == 0
            && self.controller.idle()
            && self.servers.iter().all(Server::idle)
            && self.calls.values().all(|c| matches!(c.waiter, Waiter::Poll(_)))
            && (0..self.gateways.len()).all(|g| self.controller.knows(g, &self.gateways[g]))
    }

    /// Lets things happen until everything rests.
    fn run_until_rest(&mut self, latest: Time) {
        while self.broken.is_none() {
            if self.healed.is_some() && self.at_rest() {
                return;
            }
            let Some(((at, _), event)) = self.queue.pop_first() else { return };
            self.now = at;
            self.figures.events += 1;
            self.happen(event);
            self.check();
            if !self.agreed
                && let Some(healed) = self.healed
                && self.disagreement().is_none()
            {
                self.agreed = true;
                self.figures.agreed_us = self.now - healed;
                self.figures.agreed_late = u64::from(self.now - healed > S);
            }
            if self.healed.is_some_and(|h| self.now > h + latest) || self.figures.events > EVENTS_MAX {
                let left = self.unrest();
                self.violated(|| format!("does not come to rest after healing: {left}"));
            }
        }
    }

    fn run(mut self) -> (Vec<String>, Result<Figures, Violation>) {
        self.run_until_rest(REST);
        if self.broken.is_none() {
            self.check_rest();
        }
        // nothing that was left may stand in the way of the next one
        if self.broken.is_none() {
            self.note(|| "one more, without faults".into());
            let before = self.figures.completed;
            self.healed = Some(self.now);
            self.operator();
            self.run_until_rest(REST);
            self.check_rest();
            if self.figures.completed == before {
                let why = self.last_answer();
                self.violated(|| format!("after healing a migration does not succeed: {why}"));
            }
        }
        let outcome = match self.broken {
            None => Ok(self.figures),
            Some(what) => Err(Violation { seed: self.seed, at_us: self.now, what }),
        };
        (self.trace.unwrap_or_default(), outcome)
    }
}

/// One run.
///
/// # Errors
/// [`Violation`]: the first promise that was broken.
pub fn simulate(seed: u64, mutation: Option<Mutation>) -> Result<Figures, Violation> {
    Sim::new(seed, mutation, false).run().1
}

/// The same run, with its trace.
pub fn replay(seed: u64, mutation: Option<Mutation>) -> (Vec<String>, Result<Figures, Violation>) {
    Sim::new(seed, mutation, true).run()
}
