//! Carries one session to its end: the thin executor under the pure machine of [`crate::session`].
//!
//! It journals each event, lets the machine take it, cancels the calls that are no longer outstanding and starts those
//! that are now. An answer of a cancelled call is dropped. It ends when nothing is outstanding any more, which for a
//! participant that stays unreachable may be long after the outcome.
//!
//! Between freeze and resume nothing is waited for but the daemons' answers and the one fsync of the decision.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{AbortHandle, JoinSet},
};

use crate::{
    calls::Call,
    controller::{Controller, Fatal},
    session::{Command, Decision, Entry, Event, Participant, Session, State},
    world::Record,
};

/// Unix time in milliseconds.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
    u64::try_from(since).unwrap_or(u64::MAX)
}

/// A session's clock: microseconds since its request, monotonic within one life of the controller.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    zero: Instant,
    offset_us: u64,
}

impl Clock {
    /// From now.
    pub(crate) fn start() -> Self {
        Self { zero: Instant::now(), offset_us: 0 }
    }

    /// Goes on after a restart, by the wall clock, and never before the last event.
    fn resume(session: &Session) -> Self {
        let last = session.log.last().map_or(0, |e| e.at_us);
        let wall = unix_ms().saturating_sub(session.plan.requested_at_ms).saturating_mul(1000);
        Self { zero: Instant::now(), offset_us: wall.max(last) }
    }

    pub(crate) fn now_us(&self) -> u64 {
        self.offset_us.saturating_add(u64::try_from(self.zero.elapsed().as_micros()).unwrap_or(u64::MAX))
    }
}

/// What an operator wants of a session under way.
#[derive(Debug)]
pub(crate) struct Order {
    /// What.
    pub what: Wish,
    /// Who.
    pub by: String,
    /// Whether it was done: answered when what follows from it is durable.
    pub done: oneshot::Sender<bool>,
}

/// See [`Order`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Give it up, before the decision.
    Cancel,
    /// End the doubt.
    Resolve(Decision),
}

/// Runs a session that has just been requested, or goes on with one after a restart (`clock: None`).
///
/// # Errors
/// [`Fatal`]: the journal has failed, and the controller has to stop.
pub(crate) async fn drive(
    controller: Arc<Controller>,
    id: String,
    clock: Option<Clock>,
    mut orders: mpsc::UnboundedReceiver<Order>,
) -> Result<(), Fatal> {
    let Some(session) = controller.session(&id) else { return Ok(()) };
    let (events, mut answers) = mpsc::unbounded_channel();
    let mut driver = Driver {
        clock: clock.unwrap_or_else(|| Clock::resume(&session)),
        id,
        session,
        events,
        tasks: JoinSet::new(),
        calls: BTreeMap::new(),
        unwritten: Vec::new(),
        source_undone: watch::Sender::new(false),
        controller,
    };
    let mut stopping = driver.controller.stopping();
    let result = driver.run(clock.is_none(), &mut answers, &mut orders, &mut stopping).await;
    driver.controller.no_more_orders(&driver.id);
    result
}

async fn stopped(stopping: &mut tokio::sync::watch::Receiver<bool>) {
    if stopping.wait_for(|s| *s).await.is_err() {
        std::future::pending::<()>().await;
    }
}

struct Driver {
    controller: Arc<Controller>,
    id: String,
    session: Session,
    clock: Clock,
    events: mpsc::UnboundedSender<(Command, Event)>,
    tasks: JoinSet<()>,
    calls: BTreeMap<Command, AbortHandle>,
    /// Events that are written with the next one that has to be durable.
    unwritten: Vec<Record>,
    /// The source has undone its part.
    source_undone: watch::Sender<bool>,
}

impl Driver {
    async fn run(
        &mut self,
        restarted: bool,
        answers: &mut mpsc::UnboundedReceiver<(Command, Event)>,
        orders: &mut mpsc::UnboundedReceiver<Order>,
        stopping: &mut tokio::sync::watch::Receiver<bool>,
    ) -> Result<(), Fatal> {
        if restarted
            && let Some(event) = self.session.recovery("the controller was restarted before the decision")
        {
            self.happen(event).await?;
        }
        self.settle().await?;
        while !self.calls.is_empty() {
            tokio::select! {
                biased;
                Some((command, event)) = answers.recv() => {
                    if self.session.outstanding().contains(&command) {
                        self.happen(event).await?;
                    }
                    self.settle().await?;
                }
                Some(order) = orders.recv() => self.obey(order).await?,
                () = stopped(stopping), if self.session.state.undecided().is_some() => {
                    if let Some(event) = self.session.recovery("the controller was stopped before the decision") {
                        self.happen(event).await?;
                    }
                    self.settle().await?;
                }
            }
        }
        Ok(())
    }

    /// Does what an operator wants, if it can be done now; the answer is given when it is durable.
    async fn obey(&mut self, order: Order) -> Result<(), Fatal> {
        let event = match order.what {
            Wish::Cancel => self.session.cancellation(&order.by),
            Wish::Resolve(decision) => Some(Event::Resolved { decision, by: order.by.clone() }),
        };
        let can = event.as_ref().is_some_and(|e| self.session.check(e).is_ok());
        if let Some(event) = event.filter(|_| can) {
            self.happen(event).await?;
            self.settle().await?;
        }
        // whoever asked may have gone
        let _ = order.done.send(can);
        Ok(())
    }

    /// Something happened: journal it (at once, or with the decision that follows), let the machine take it.
    async fn happen(&mut self, event: Event) -> Result<(), Fatal> {
        if let Err(illegal) = self.session.check(&event) {
            tracing::error!(%illegal, "dropped");
            return Ok(());
        }
        let last = self.session.log.last().map_or(0, |e| e.at_us);
        let forced = event.forced();
        let entry = Entry { at_us: self.clock.now_us().max(last), event };
        let record = Record::Session { id: self.id.clone(), entry: entry.clone() };
        self.unwritten.push(record.clone());
        if forced {
            self.controller.append(std::mem::take(&mut self.unwritten)).await?;
        }
        self.session = self.controller.take(&record)?;
        if matches!(entry.event, Event::Undone { participant: Participant::Source, .. }) {
            self.source_undone.send_replace(true);
        }
        tracing::info!(session = %self.id, event = entry.event.name(), state = self.session.state.name(), "session");
        Ok(())
    }

    /// Brings what is under way in line with what is outstanding; decides where that is what is outstanding.
    async fn settle(&mut self) -> Result<(), Fatal> {
        loop {
            let outstanding = self.session.outstanding();
            let decision = if outstanding.contains(&Command::DecideCommit) {
                Decision::Commit
            } else if outstanding.contains(&Command::DecideAbort) {
                Decision::Abort
            } else {
                self.calls.retain(|command, call| {
                    let stays = outstanding.contains(command);
                    if !stays {
                        call.abort();
                    }
                    stays
                });
                for command in outstanding {
                    if !self.calls.contains_key(&command) {
                        self.start(command);
                    }
                }
                while self.tasks.try_join_next().is_some() {}
                return Ok(());
            };
            self.happen(Event::Decided { decision }).await?;
        }
    }

    fn start(&mut self, command: Command) {
        let memory_bytes = self.session.log.iter().find_map(|e| match e.event {
            Event::Checked { memory_bytes, .. } => Some(memory_bytes),
            _ => None,
        });
        let releases = matches!(command, Command::Undo(Participant::Gateway(_)))
            && self.session.plan.hold.is_some()
            && matches!(self.session.state, State::Aborting { frozen: true, .. });
        let call = Call {
            after_source: releases.then(|| self.source_undone.subscribe()),
            controller: Arc::clone(&self.controller),
            plan: Arc::clone(&self.session.plan),
            command: command.clone(),
            clock: self.clock,
            memory_bytes: memory_bytes.unwrap_or(0),
            resolved: self.session.log.iter().any(|e| matches!(e.event, Event::Resolved { .. })),
            events: self.events.clone(),
        };
        self.calls.insert(command, self.tasks.spawn(call.run()));
    }
}
