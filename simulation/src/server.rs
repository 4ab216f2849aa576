//! A migrator: the real machines and their rules of recovery; the two sequences step by step, as `source.rs` and
//! `destination.rs` of the migrator do them, over a host of which only that is known which the promises are about.
//!
//! A crash ends the daemon between any two steps. Records survive it, CRIU does not: tasks that only CRIU holds run again.

use std::collections::{BTreeMap, VecDeque};

use handover_controller::session::Decision;
use handover_migrator::machine::{
    DestinationEvent as De, DestinationState as Ds, Next, Recovery, SourceEvent as Se, SourceState as Ss,
};

use crate::{
    mutation::Mutation,
    sim::{Answer, Ev, Failed, MS, Msg, Node, Reply, S, Sim, Waiter},
};

/// As configured by default.
const VOTE_LEASE: u64 = 10 * S;
const FREEZE_LIMIT: u64 = 60 * S;
const DISCARD_TRIES: u32 = 5;

/// A promise on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Record {
    Source { state: Ss, touched: bool },
    Destination { state: Ds },
}

impl Record {
    pub(crate) fn recovery(self) -> Recovery {
        match self {
            Self::Source { state, .. } => state.recovery(),
            Self::Destination { state } => state.recovery(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Source { state, .. } => state.name(),
            Self::Destination { state } => state.name(),
        }
    }
}

/// What keeps the service's process from running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    /// Nothing: it runs.
    No,
    /// CRIU, which fails open.
    Criu,
    /// The freezer.
    Freezer,
}

/// What is there, whatever any daemon thinks.
#[derive(Debug, Default)]
pub(crate) struct Host {
    pub(crate) copy: Option<Held>,
    pub(crate) v: bool,
    pub(crate) fenced: bool,
    pub(crate) blackhole: bool,
}

/// A call the source makes at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PeerCall {
    /// For the job that waits for it.
    Work,
    /// On its own.
    Discard(u32),
}

#[derive(Debug, Clone)]
enum Work {
    Prepare,
    Freeze { yields: bool },
    Yield,
    End,
    Undo { event: Se, failure: Option<String> },
    Reserve,
    Restore,
    Resume,
    Discard { failure: Option<String> },
}

#[derive(Debug, Clone)]
struct Job {
    work: Work,
    step: u8,
    /// Whom to answer.
    call: Option<u64>,
    /// Of a call to the destination.
    heard: Option<bool>,
    waiting: bool,
}

/// What a migration has while the daemon lives.
#[derive(Debug, Default)]
struct Live {
    jobs: VecDeque<Job>,
    /// Prepared in this life: the connection and CRIU stand ready.
    ready: bool,
}

pub(crate) struct Server {
    pub(crate) up: bool,
    pub(crate) boot: u32,
    pub(crate) host: Host,
    /// As the daemon has them.
    pub(crate) records: BTreeMap<String, Record>,
    disk: BTreeMap<String, Record>,
    live: BTreeMap<String, Live>,
}

impl Server {
    pub(crate) fn new(owner: bool) -> Self {
        let copy = owner.then_some(Held::No);
        Self {
            up: true,
            boot: 0,
            host: Host { copy, v: owner, fenced: false, blackhole: false },
            records: BTreeMap::new(),
            disk: BTreeMap::new(),
            live: BTreeMap::new(),
        }
    }

    pub(crate) fn idle(&self) -> bool {
        self.up && self.live.values().all(|l| l.jobs.is_empty())
    }

    /// Something other than `id` is going on.
    fn busy(&self, id: &str) -> bool {
        self.records.iter().any(|(other, r)| other != id && r.recovery() != Recovery::Nothing)
    }
}

enum Done {
    /// The next step, after so long.
    Go(u64),
    /// Until the destination answers.
    Wait,
    Over(Reply),
    /// Everything has to be undone first.
    Fail(String),
}

impl Sim {
    pub(crate) fn ask_server(&mut self, s: usize, call: u64, msg: Msg) {
        let (id, work) = match msg {
            Msg::Look { id, source } => {
                let errors = self.look(s, &id, source);
                self.answer(call, Ok(Answer::Looked { errors }));
                return;
            }
            Msg::Prepare { id } => (id, Work::Prepare),
            Msg::Freeze { id, yields } => (id, Work::Freeze { yields }),
            Msg::Yield { id } => (id, Work::Yield),
            Msg::Resume { id } => (id, Work::Resume),
            Msg::End { id } => (id, Work::End),
            Msg::Reserve { id } => (id, Work::Reserve),
            Msg::Restore { id } => (id, Work::Restore),
            Msg::Abort { id } => {
                let work = match self.servers[s].records.get(&id) {
                    Some(Record::Source { .. }) => Work::Undo { event: Se::Abort, failure: None },
                    Some(Record::Destination { .. }) => Work::Discard { failure: None },
                    None => {
                        self.note_unknown_abort(s, &id);
                        self.answer(call, Ok(Answer::Alive(false)));
                        return;
                    }
                };
                self.interrupt(s, &id);
                (id, work)
            }
            Msg::Discard { id } => {
                if !self.servers[s].records.contains_key(&id) {
                    self.note_unknown_abort(s, &id);
                    self.answer(call, Ok(Answer::Done));
                    return;
                }
                self.interrupt(s, &id);
                (id, Work::Discard { failure: None })
            }
            other => {
                let words = format!("{other:?} is nothing to ask a migrator");
                self.answer(call, Err(Failed::Refused(words)));
                return;
            }
        };
        self.enqueue(s, &id, work, Some(call));
    }

    /// What comes later of this migration has to be refused: it was aborted.
    fn note_unknown_abort(&mut self, s: usize, id: &str) {
        if !self.has(Mutation::MigratorForgetsUnknownAbort) {
            let record = Record::Destination { state: Ds::Discarded };
            self.servers[s].records.insert(id.into(), record);
            self.servers[s].disk.insert(id.into(), record);
        }
    }

    fn look(&self, s: usize, id: &str, source: bool) -> usize {
        let server = &self.servers[s];
        let copy = if source { server.host.copy != Some(Held::No) } else { server.host.copy.is_some() };
        usize::from(copy) + usize::from(server.host.v != source) + usize::from(server.busy(id))
    }

    fn enqueue(&mut self, s: usize, id: &str, work: Work, call: Option<u64>) {
        let live = self.servers[s].live.entry(id.into()).or_default();
        live.jobs.push_back(Job { work, step: 0, call, heard: None, waiting: false });
        if live.jobs.len() == 1 {
            self.go_on(s, id, 50);
        }
    }

    fn go_on(&mut self, s: usize, id: &str, wait: u64) {
        let boot = self.servers[s].boot;
        let wait = wait + self.rng.range(0, 300);
        self.after(wait, Ev::Step { server: s, boot, id: id.into() });
    }

    /// Asks whoever works on it to give up where that is safe: while it waits for the destination during a freeze.
    fn interrupt(&mut self, s: usize, id: &str) {
        let Some(job) = self.servers[s].live.get_mut(id).and_then(|l| l.jobs.front_mut()) else { return };
        if job.waiting && matches!(job.work, Work::Freeze { .. }) {
            job.waiting = false;
            job.heard = Some(false);
            self.give_up_peer(s, id);
            self.go_on(s, id, 0);
        }
    }

    fn give_up_peer(&mut self, s: usize, id: &str) {
        self.give_up(
            |w| matches!(w, Waiter::Peer { server, id: i, what: PeerCall::Work } if *server == s && i == id),
        );
    }

    pub(crate) fn peer_heard(&mut self, s: usize, id: &str, what: PeerCall, reply: Reply) {
        match what {
            PeerCall::Work => {
                let live = self.servers[s].live.get_mut(id);
                if let Some(job) = live.and_then(|l| l.jobs.front_mut())
                    && job.waiting
                {
                    job.waiting = false;
                    job.heard = Some(reply.is_ok());
                    self.go_on(s, id, 0);
                }
            }
            PeerCall::Discard(attempt) => {
                if reply.is_err() && attempt < DISCARD_TRIES {
                    let boot = self.servers[s].boot;
                    self.after(S, Ev::TellDiscard { server: s, boot, id: id.into(), attempt: attempt + 1 });
                }
            }
        }
    }

    pub(crate) fn tell_discard(&mut self, s: usize, id: String, attempt: u32) {
        let waiter = Waiter::Peer { server: s, id: id.clone(), what: PeerCall::Discard(attempt) };
        self.call(Node::Server(s), Node::Server(1 - s), Msg::Discard { id }, 5 * S, waiter);
    }

    fn ask_peer(&mut self, s: usize, id: &str, msg: Msg) -> Done {
        let waiter = Waiter::Peer { server: s, id: id.into(), what: PeerCall::Work };
        self.call(Node::Server(s), Node::Server(1 - s), msg, FREEZE_LIMIT, waiter);
        Done::Wait
    }

    pub(crate) fn lease_over(&mut self, s: usize, id: &str) {
        let event = match self.servers[s].records.get(id) {
            Some(Record::Source { state: Ss::Voted, .. }) => Se::AbortAlone,
            // what the machine would refuse to AbortAlone
            Some(Record::Source { state: Ss::Yielded, .. })
                if self.has(Mutation::ThawAfterYieldOnTimeout) =>
            {
                Se::Abort
            }
            _ => return,
        };
        self.note(|| format!("{}: the lease of {id} is over", Node::Server(s)));
        if event == Se::AbortAlone {
            self.enqueue(s, id, Work::Undo { event, failure: None }, None);
        } else {
            self.servers[s].host.copy = Some(Held::No);
        }
    }

    pub(crate) fn server_dies(&mut self, s: usize) {
        let server = &mut self.servers[s];
        server.up = false;
        server.boot += 1;
        server.live.clear();
        server.records = server.disk.clone();
        if server.host.copy == Some(Held::Criu) {
            server.host.copy = Some(Held::No);
        }
    }

    /// Recovery, as the migrator's `server::recover`.
    pub(crate) fn server_starts(&mut self, s: usize) {
        self.servers[s].up = true;
        let found: Vec<(String, Record)> =
            self.servers[s].records.iter().map(|(id, r)| (id.clone(), *r)).collect();
        for (id, record) in found {
            let work = match (record.recovery(), record) {
                (Recovery::Nothing | Recovery::Wait, _) => continue,
                (Recovery::Undo, Record::Source { .. }) => {
                    Work::Undo { event: Se::AbortAlone, failure: None }
                }
                (Recovery::Undo, Record::Destination { .. }) => Work::Discard { failure: None },
                (Recovery::Finish, Record::Source { .. }) => Work::End,
                (Recovery::Finish, Record::Destination { .. }) => Work::Resume,
            };
            self.enqueue(s, &id, work, None);
        }
    }

    fn put(&mut self, s: usize, id: &str, record: Record, durable: bool) {
        let who = Node::Server(s);
        self.note(|| format!("{who}: {id} is {}", record.name()));
        self.servers[s].records.insert(id.into(), record);
        if durable {
            self.servers[s].disk.insert(id.into(), record);
        }
    }

    fn source_on(&mut self, s: usize, id: &str, event: Se) -> Result<Next<Ss>, String> {
        let Some(Record::Source { state, touched }) = self.servers[s].records.get(id).copied() else {
            return Err(format!("migration {id} has no source here"));
        };
        let next = state.on(event);
        match next {
            Next::Go(new) => {
                self.judge_source(s, id, state, new, event);
                let promise = matches!(new, Ss::Voted | Ss::Yielded);
                let durable = !(promise && self.has(Mutation::ForgetSourcePromise));
                let touched = touched || new == Ss::Freezing;
                self.put(s, id, Record::Source { state: new, touched }, durable);
                Ok(next)
            }
            Next::Already => Ok(next),
            Next::Refuse(why) => Err(format!("migration {id} is {}: {why}", state.name())),
        }
    }

    fn judge_source(&mut self, s: usize, id: &str, old: Ss, new: Ss, event: Se) {
        let decided = self.decided.get(id).copied();
        let who = Node::Server(s);
        if new == Ss::Ending && decided != Some(Decision::Commit) {
            self.violated(|| format!("{who} ends the original of {id} without a durable COMMIT"));
        }
        if new == Ss::Aborting && decided == Some(Decision::Commit) {
            self.violated(|| format!("{who} undoes {id} after COMMIT"));
        }
        let told = event == Se::Abort && decided == Some(Decision::Abort);
        if old == Ss::Yielded && new == Ss::Aborting && !told {
            self.violated(|| format!("{who} has yielded {id} and goes back without a durable ABORT"));
        }
    }

    fn destination_on(&mut self, s: usize, id: &str, event: De) -> Result<Next<Ds>, String> {
        let Some(Record::Destination { state }) = self.servers[s].records.get(id).copied() else {
            return Err(format!("migration {id} has no destination here"));
        };
        let next = state.on(event);
        match next {
            Next::Go(new) => {
                let decided = self.decided.get(id).copied();
                let who = Node::Server(s);
                if new == Ds::Resuming && decided != Some(Decision::Commit) {
                    self.violated(|| format!("{who} resumes {id} without a durable COMMIT"));
                }
                if new == Ds::Discarding && decided == Some(Decision::Commit) {
                    self.violated(|| format!("{who} discards the copy of {id} after COMMIT"));
                }
                let durable = !(new == Ds::Restored && self.has(Mutation::ForgetDestinationVote));
                self.put(s, id, Record::Destination { state: new }, durable);
                Ok(next)
            }
            Next::Already => Ok(next),
            Next::Refuse(why) => Err(format!("migration {id} is {}: {why}", state.name())),
        }
    }

    /// One step of the job at the head of a migration's queue.
    pub(crate) fn step(&mut self, s: usize, id: &str) {
        let Some(job) = self.servers[s].live.get(id).and_then(|l| l.jobs.front()).cloned() else { return };
        if job.waiting {
            return;
        }
        let (step, heard) = (job.step, job.heard);
        let done = match &job.work {
            Work::Prepare => self.prepare(s, id, step, heard),
            Work::Freeze { yields } => self.freeze(s, id, *yields, step, heard),
            Work::Yield => match self.source_on(s, id, Se::Yield) {
                Ok(_) => Done::Over(Ok(Answer::Done)),
                Err(why) => Done::Over(Err(Failed::Refused(why))),
            },
            Work::End => self.end(s, id, step),
            Work::Undo { event, failure } => self.undo(s, id, *event, failure.clone(), step),
            Work::Reserve => self.reserve(s, id),
            Work::Restore => self.restore(s, id, step),
            Work::Resume => self.resume(s, id, step),
            Work::Discard { failure } => self.discard(s, id, failure.clone(), step),
        };
        let Some(live) = self.servers[s].live.get_mut(id) else { return };
        let Some(front) = live.jobs.front_mut() else { return };
        match done {
            Done::Go(wait) => {
                front.step += 1;
                front.heard = None;
                self.go_on(s, id, wait);
            }
            Done::Wait => {
                front.step += 1;
                front.waiting = true;
            }
            Done::Fail(why) => {
                let source = matches!(front.work, Work::Prepare | Work::Freeze { .. });
                front.work = if source {
                    Work::Undo { event: Se::AbortAlone, failure: Some(why) }
                } else {
                    Work::Discard { failure: Some(why) }
                };
                front.step = 0;
                front.heard = None;
                self.go_on(s, id, 0);
            }
            Done::Over(reply) => {
                live.jobs.pop_front();
                let more = !live.jobs.is_empty();
                if let Some(call) = job.call {
                    self.answer(call, reply);
                }
                if more {
                    self.go_on(s, id, 0);
                }
            }
        }
    }

    fn chance(&mut self) -> bool {
        self.healed.is_none() && self.rng.permille(15)
    }

    fn prepare(&mut self, s: usize, id: &str, step: u8, heard: Option<bool>) -> Done {
        let refuse = |why: String| Done::Over(Err(Failed::Refused(why)));
        match step {
            0 => {
                if let Some(record) = self.servers[s].records.get(id) {
                    let same = matches!(record, Record::Source { state: Ss::Prepared, .. });
                    let ready = self.servers[s].live.get(id).is_some_and(|l| l.ready);
                    return if same && ready {
                        Done::Over(Ok(Answer::Done))
                    } else {
                        refuse(format!("migration {id} is {} here already", record.name()))
                    };
                }
                if self.look(s, id, true) > 0 {
                    return refuse("prepare: preflight".into());
                }
                self.put(s, id, Record::Source { state: Ss::Prepared, touched: false }, true);
                self.ask_peer(s, id, Msg::Reserve { id: id.into() })
            }
            _ if heard == Some(true) => {
                if let Some(live) = self.servers[s].live.get_mut(id) {
                    live.ready = true;
                }
                Done::Over(Ok(Answer::Done))
            }
            _ => Done::Fail("prepare: the destination".into()),
        }
    }

    fn freeze(&mut self, s: usize, id: &str, yields: bool, step: u8, heard: Option<bool>) -> Done {
        match step {
            0 => match self.source_on(s, id, Se::Freeze) {
                Ok(Next::Go(_)) => Done::Go(300),
                Ok(_) => Done::Over(Ok(Answer::Done)),
                Err(why) => Done::Over(Err(Failed::Refused(why))),
            },
            1 => {
                if !self.has(Mutation::FreezeWithoutFence) {
                    self.servers[s].host.fenced = true;
                }
                if self.chance() { Done::Fail("fence".into()) } else { Done::Go(2 * MS) }
            }
            2 => {
                self.servers[s].host.copy = Some(Held::Criu);
                if self.chance() { Done::Fail("dump".into()) } else { Done::Go(5 * MS) }
            }
            3 => {
                if !self.has(Mutation::NoFreezer) {
                    self.servers[s].host.copy = Some(Held::Freezer);
                }
                Done::Go(500)
            }
            4 => self.ask_peer(s, id, Msg::Restore { id: id.into() }),
            5 if heard != Some(true) => Done::Fail("restore: the destination".into()),
            5 => {
                self.servers[s].host.blackhole = true;
                Done::Go(100)
            }
            6 => {
                self.servers[s].host.v = false;
                if self.chance() { Done::Fail("address".into()) } else { Done::Go(200) }
            }
            _ => {
                let event = if yields { Se::VoteYielded } else { Se::Vote };
                match self.source_on(s, id, event) {
                    Ok(_) => {
                        if !yields || self.has(Mutation::ThawAfterYieldOnTimeout) {
                            let boot = self.servers[s].boot;
                            self.after(VOTE_LEASE, Ev::Lease { server: s, boot, id: id.into() });
                        }
                        Done::Over(Ok(Answer::Done))
                    }
                    Err(why) => Done::Fail(why),
                }
            }
        }
    }

    fn end(&mut self, s: usize, id: &str, step: u8) -> Done {
        let early = self.has(Mutation::EndUnfencesFirst);
        match step {
            0 => match self.source_on(s, id, Se::End) {
                Ok(Next::Go(_)) => Done::Go(3 * MS),
                Ok(_) => Done::Over(Ok(Answer::Done)),
                Err(why) => Done::Over(Err(Failed::Refused(why))),
            },
            1 => {
                if early {
                    self.servers[s].host.fenced = false;
                } else {
                    self.servers[s].host.copy = None;
                }
                Done::Go(MS)
            }
            2 => {
                self.servers[s].host.copy = None;
                self.servers[s].host.fenced = false;
                Done::Go(100)
            }
            3 => {
                self.servers[s].host.blackhole = false;
                Done::Go(200)
            }
            _ => match self.source_on(s, id, Se::Done) {
                Ok(_) => Done::Over(Ok(Answer::Done)),
                Err(why) => Done::Over(Err(Failed::Refused(why))),
            },
        }
    }

    fn undo(&mut self, s: usize, id: &str, event: Se, failure: Option<String>, step: u8) -> Done {
        let reply = |sim: &Self| match &failure {
            Some(why) => Err(Failed::Refused(why.clone())),
            None => Ok(Answer::Alive(sim.servers[s].host.copy.is_some())),
        };
        let touched = matches!(self.servers[s].records.get(id), Some(Record::Source { touched: true, .. }));
        match step {
            0 => match self.source_on(s, id, event) {
                Ok(Next::Go(_)) => Done::Go(100),
                Ok(_) => Done::Over(reply(self)),
                Err(why) => Done::Over(Err(Failed::Refused(why))),
            },
            1 if touched => {
                if self.has(Mutation::UnfencedThaw) {
                    self.servers[s].host.copy = Some(Held::No);
                    self.servers[s].host.fenced = false;
                    return Done::Go(200);
                }
                self.servers[s].host.v = true;
                Done::Go(200)
            }
            2 if touched => {
                self.servers[s].host.v = true;
                self.servers[s].host.blackhole = false;
                Done::Go(200)
            }
            3 if touched => {
                if self.servers[s].host.copy == Some(Held::Criu) {
                    self.servers[s].host.copy = Some(Held::No);
                }
                Done::Go(2 * MS)
            }
            4 if touched => {
                self.servers[s].host.fenced = false;
                Done::Go(100)
            }
            5 if touched => {
                self.servers[s].host.copy = Some(Held::No);
                Done::Go(100)
            }
            1..=5 => Done::Go(0),
            6 => {
                self.tell_discard(s, id.into(), 1);
                Done::Go(100)
            }
            _ => match self.source_on(s, id, Se::Done) {
                Ok(_) => Done::Over(reply(self)),
                Err(why) => Done::Over(Err(Failed::Refused(why))),
            },
        }
    }

    fn reserve(&mut self, s: usize, id: &str) -> Done {
        if let Some(record) = self.servers[s].records.get(id) {
            return match record {
                Record::Destination { state: Ds::Reserved } => Done::Over(Ok(Answer::Done)),
                other => Done::Over(Err(Failed::Refused(format!("migration {id} is {} here", other.name())))),
            };
        }
        if self.look(s, id, false) > 0 {
            return Done::Over(Err(Failed::Refused("preflight".into())));
        }
        self.put(s, id, Record::Destination { state: Ds::Reserved }, true);
        if self.chance() { Done::Fail("reserve".into()) } else { Done::Over(Ok(Answer::Done)) }
    }

    fn restore(&mut self, s: usize, id: &str, step: u8) -> Done {
        match step {
            0 => match self.destination_on(s, id, De::Restore) {
                Ok(Next::Go(_)) => Done::Go(MS),
                Ok(_) => Done::Over(Ok(Answer::Done)),
                Err(why) => Done::Over(Err(Failed::Refused(why))),
            },
            1 => {
                if !self.has(Mutation::RestoreWithoutFence) {
                    self.servers[s].host.fenced = true;
                }
                Done::Go(200)
            }
            2 => {
                self.servers[s].host.v = true;
                Done::Go(10 * MS)
            }
            3 => {
                let held = if self.has(Mutation::RestoreRunning) { Held::No } else { Held::Freezer };
                self.servers[s].host.copy = Some(held);
                if self.chance() { Done::Fail("restore: CRIU".into()) } else { Done::Go(500) }
            }
            _ => match self.destination_on(s, id, De::Vote) {
                Ok(_) => Done::Over(Ok(Answer::Done)),
                Err(why) => Done::Fail(why),
            },
        }
    }

    fn resume(&mut self, s: usize, id: &str, step: u8) -> Done {
        match step {
            0 => match self.destination_on(s, id, De::Resume) {
                Ok(Next::Go(_)) if self.servers[s].host.copy.is_none() => {
                    Done::Over(Err(Failed::Refused("resume: the copy is gone".into())))
                }
                Ok(Next::Go(_)) => Done::Go(100),
                Ok(_) => Done::Over(Ok(Answer::Done)),
                Err(why) => Done::Over(Err(Failed::Refused(why))),
            },
            1 => {
                self.servers[s].host.fenced = false;
                Done::Go(100)
            }
            2 => {
                self.servers[s].host.copy = Some(Held::No);
                Done::Go(300)
            }
            _ => match self.destination_on(s, id, De::Done) {
                Ok(_) => Done::Over(Ok(Answer::Done)),
                Err(why) => Done::Over(Err(Failed::Refused(why))),
            },
        }
    }

    fn discard(&mut self, s: usize, id: &str, failure: Option<String>, step: u8) -> Done {
        let reply = || match &failure {
            Some(why) => Err(Failed::Refused(why.clone())),
            None => Ok(Answer::Alive(false)),
        };
        let restored = matches!(
            self.servers[s].records.get(id),
            Some(Record::Destination { state: Ds::Restoring | Ds::Restored | Ds::Discarding })
        );
        match step {
            0 => match self.destination_on(s, id, De::Abort) {
                Ok(Next::Go(_)) if restored => Done::Go(MS),
                // v and the fence were never touched: straight to the end
                Ok(Next::Go(_)) => match self.destination_on(s, id, De::Done) {
                    Ok(_) => Done::Over(reply()),
                    Err(why) => Done::Over(Err(Failed::Refused(why))),
                },
                Ok(_) => Done::Over(reply()),
                Err(why) => Done::Over(Err(Failed::Refused(why))),
            },
            1 => {
                self.servers[s].host.copy = None;
                Done::Go(300)
            }
            2 => {
                self.servers[s].host.v = false;
                Done::Go(100)
            }
            3 => {
                self.servers[s].host.fenced = false;
                Done::Go(100)
            }
            _ => match self.destination_on(s, id, De::Done) {
                Ok(_) => Done::Over(reply()),
                Err(why) => Done::Over(Err(Failed::Refused(why))),
            },
        }
    }
}
