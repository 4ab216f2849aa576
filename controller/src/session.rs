//! One migration as a pure state machine: `(state, event, now) -> (state, commands)`. No I/O, no clock.
//!
//! ```text
//!  Requested                                              before the decision
//!     |                                                   everything can be undone
//!     v      error found
//!  Preflight ----------> Refused
//!     | Checked
//!     v
//!  Staging   (Staged by each gateway, Prepared by the source; in parallel)      \
//!     | all                                                                      |
//!     v                                                                          |
//!  Holding   (Held by each gateway; only if the users' frames are to be held)    |
//!     | all                                                                      |
//!     v                                                                          |  Failed,
//!  Freezing                                                                      |  Cancelled
//!     | Frozen (the vote)                                                        |
//!     v                                                                          |
//!  Switching (Switched by each gateway)                                          |
//!     | all                  \ policy disaster: the vote already was the yield   |
//!     v                       |                                                  |
//!  Yielding                   |                                                  |
//!     | Yielded               |                                                  v
//!     v                       v                                   Deciding{Abort}
//!  Deciding{Commit} <--------'                                         |
//! = = =|= = = = = = = = = = = = = = = = = = = = = = = = = = = = = = = =|= = = = the decision: one durable record
//!     | Decided                                                        | Decided
//!     v                                                                v
//!  Resuming                                                        Aborting (Undone by each participant)
//!     | Resumed                                          the source |      | the source is frozen
//!     v                                                   is alive  |      | no more and not alive
//!  Ending (Ended by the source, Finished by each gateway)           v      v
//!     | all confirmed, or are known to be retried             RolledBack  SourceDead
//!     v
//!  Completed
//! ```
//!
//! Invariants, kept by [`next`] and shown by the tests:
//! - after COMMIT no command undoes anything; after ABORT none resumes, ends or finishes;
//! - what is to be done is a function of the state alone ([`outstanding`]): a restart derives it again, and a call that
//!   is no longer outstanding is cancelled;
//! - an event that cannot happen is refused and changes nothing, live and on replay.
//!
//! A session whose service waits for somebody who does not answer (`Resuming`, `Aborting` with the source late) or whose
//! original is gone (`SourceDead`) needs an operator, who can end the doubt (`Resolved`): it goes on as if that side had
//! answered, or, before the destination has resumed, back. This alone may follow a COMMIT by an undo.
//!
//! Which events have to be durable before their effects: *Requested* (it names whom to undo) and *Decided*. Nothing else
//! announces an effect that a restart would have to know: without a decision it aborts (presumed abort), so the votes
//! between freeze and decision are written together with the decision, in one fsync ([`Event::forced`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::inventory::Target;

/// When the source gives up the right to thaw alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// As late as possible: trouble leaves the service where it is (maintenance, load).
    Late,
    /// Together with the vote: losing the source afterwards rolls forward.
    Disaster,
}

/// One end of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// The site.
    pub site: String,
    /// The network of the site's users.
    pub network: String,
    /// The server there.
    pub server: String,
    /// The server's host:port on the migration network.
    pub migration: String,
}

/// A user about to be switched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The user.
    pub name: String,
    /// The user's IPv4 addresses.
    pub addresses: Vec<String>,
}

/// How the users' frames for the service are kept at the gateways while it stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// UDP port on v where the gateways' markers arrive.
    pub marker_port: u16,
}

/// What a migration is to do: fixed when it is requested, whatever is applied later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The session's name, e.g. `film-1`.
    pub id: String,
    /// The service.
    pub service: String,
    /// Its virtual IP v.
    pub address: String,
    /// How the source finds the process.
    pub target: Target,
    /// Where it is.
    pub from: Side,
    /// Where it goes.
    pub to: Side,
    /// The users to switch, by gateway.
    pub gateways: BTreeMap<String, Vec<Member>>,
    /// When the source yields.
    pub policy: Policy,
    /// Established peers that are not users about to be switched are accepted (and lost).
    pub allow_other_peers: bool,
    /// The users' frames for the service are held at the gateways; `None`: not.
    #[serde(default)]
    pub hold: Option<Hold>,
    /// Who or what asked.
    pub trigger: String,
    /// Unix time of the request, milliseconds.
    pub requested_at_ms: u64,
    /// Found while planning.
    pub findings: Vec<Finding>,
}

impl Plan {
    /// Names of the users to switch.
    pub fn users(&self) -> impl Iterator<Item = &str> {
        self.gateways.values().flatten().map(|m| m.name.as_str())
    }

    /// The IPv4 addresses of the users to switch.
    pub fn user_addresses(&self) -> Vec<String> {
        self.gateways.values().flatten().flat_map(|m| m.addresses.iter().cloned()).collect()
    }

    /// Names of the users to switch at one gateway.
    pub fn users_at(&self, gateway: &str) -> Vec<String> {
        self.gateways.get(gateway).into_iter().flatten().map(|m| m.name.clone()).collect()
    }

    /// What the marker of a gateway carries: tells migrations and gateways apart. No secret: who forges it makes the
    /// source freeze while frames of users are still under way, no more.
    pub fn nonce(&self, gateway: &str) -> u64 {
        let index = self.gateways.keys().position(|g| g == gateway).unwrap_or(0) as u64;
        self.requested_at_ms << 12 | index & 0xfff
    }
}

/// What became of the frames a gateway held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Kept and sent on.
    pub frames: u64,
    /// Their octets.
    pub bytes: u64,
    /// Not kept: a bound was reached.
    pub dropped: u64,
    /// Kept by a daemon that ended before it sent them on.
    pub lost: u64,
    /// Sent on after the deadline, when later frames may have gone before them.
    pub late: u64,
    /// Begin of the release -> all users on the fast path.
    pub release_us: u64,
}

/// How bad a [`Finding`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Worth knowing.
    Warning,
    /// The migration would fail or lose something.
    Error,
}

/// What preflight found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// Stable identifier.
    pub code: String,
    /// Who found it.
    pub reporter: String,
    /// What is wrong, naming thing and value.
    pub message: String,
    /// The way out.
    pub remedy: String,
}

/// A gateway's answer to *stage*: what *switch* has to name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Slot of the switch.
    pub switch: u32,
    /// Its generation.
    pub generation: u64,
}

/// A part of a daemon's work inside one call; offsets from the receipt of the call, on the daemon's clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubStep {
    /// Its name, e.g. "dump".
    pub name: String,
    /// Start.
    pub started_us: u64,
    /// Duration.
    pub took_us: u64,
}

/// The source's answer to *freeze*: frozen, copied, restored stopped at the destination, and durable at both.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vote {
    /// fence, dump, copy, restore, address.
    pub steps: Vec<SubStep>,
    /// Root of the process tree.
    pub pid: u32,
    /// Size of the images.
    pub image_bytes: u64,
    /// TCP connections taken along.
    pub connections: u32,
    /// What could not be taken along, in words.
    pub losses: Vec<String>,
}

/// Who takes part besides the controller.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Participant {
    /// The migrator where the service is.
    Source,
    /// The migrator where it goes.
    Destination,
    /// A gateway, by name.
    Gateway(String),
}

impl Participant {
    /// As people know it: "gateway gw", "migrator main-server".
    pub fn name(&self, plan: &Plan) -> String {
        match self {
            Self::Source => format!("migrator {}", plan.from.server),
            Self::Destination => format!("migrator {}", plan.to.server),
            Self::Gateway(g) => format!("gateway {g}"),
        }
    }
}

/// The commit point's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Decision {
    /// The service goes on at the destination.
    Commit,
    /// The service goes on at the source.
    Abort,
}

/// Steps that can fail, by the names people see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Nothing has been touched.
    Preflight,
    /// Gateways.
    Stage,
    /// Source.
    Prepare,
    /// Gateways.
    Hold,
    /// Source.
    Freeze,
    /// Gateways.
    Switch,
    /// Source.
    Yield,
    /// Controller.
    Decision,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Preflight => "preflight",
            Self::Stage => "stage",
            Self::Prepare => "prepare",
            Self::Hold => "hold",
            Self::Freeze => "freeze",
            Self::Switch => "switch",
            Self::Yield => "yield",
            Self::Decision => "decision",
        })
    }
}

/// What happened. `sent_us` is when the call left the controller, on the session's clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A trigger asked for it and nothing spoke against it.
    Requested {
        /// What is to be done.
        plan: Arc<Plan>,
    },
    /// Everyone answered preflight.
    Checked {
        /// What they found.
        findings: Vec<Finding>,
        /// The process at the source; 0: not found.
        pid: u32,
        /// Its memory, from which the freeze's deadline follows.
        memory_bytes: u64,
        /// When the first call was sent.
        sent_us: u64,
    },
    /// A gateway has staged the switch.
    Staged {
        /// Which.
        gateway: String,
        /// What to name at the switch.
        ticket: Ticket,
        /// When asked.
        sent_us: u64,
    },
    /// The source is ready to freeze.
    Prepared {
        /// When asked.
        sent_us: u64,
    },
    /// A gateway keeps its users' frames for the service from now on.
    Held {
        /// Which.
        gateway: String,
        /// A marker is under way to the source.
        marker_sent: bool,
        /// When asked.
        sent_us: u64,
    },
    /// The source and the destination vote "completed".
    Frozen {
        /// The vote.
        vote: Vote,
        /// When asked.
        sent_us: u64,
    },
    /// A gateway has switched.
    Switched {
        /// Which.
        gateway: String,
        /// Store -> last frame under the old network; 0: none.
        window_ns: u64,
        /// Receipt of the call -> store.
        store_latency_ns: u64,
        /// When asked.
        sent_us: u64,
    },
    /// The source has given up the right to thaw alone.
    Yielded {
        /// When asked.
        sent_us: u64,
    },
    /// A call before the decision failed for good.
    Failed {
        /// Which step.
        step: Step,
        /// The part of the step, if the daemon named one ("dump").
        part: Option<String>,
        /// Who worked.
        actor: String,
        /// Why, in words.
        reason: String,
        /// When asked.
        sent_us: u64,
    },
    /// Somebody gave it up before the decision.
    Cancelled {
        /// The step that was under way.
        step: Step,
        /// Who.
        by: String,
    },
    /// The commit point.
    Decided {
        /// Which way.
        decision: Decision,
    },
    /// The copy runs at the destination.
    Resumed {
        /// Root of the process tree there.
        pid: u32,
        /// When asked.
        sent_us: u64,
    },
    /// The frozen original has been ended.
    Ended {
        /// When asked.
        sent_us: u64,
    },
    /// A gateway sent on what it held, and made the new network the users' only one.
    Finished {
        /// Which.
        gateway: String,
        /// What it had held.
        #[serde(default)]
        held: Option<Held>,
        /// When asked.
        sent_us: u64,
    },
    /// An operator ended the doubt: where the service is, by the operator's word.
    Resolved {
        /// COMMIT: at the destination. ABORT: at the source.
        decision: Decision,
        /// Who.
        by: String,
    },
    /// A participant has undone everything.
    Undone {
        /// Who.
        participant: Participant,
        /// Of the source: the original runs.
        alive: bool,
        /// Of a gateway: what it had held.
        #[serde(default)]
        held: Option<Held>,
        /// When asked.
        sent_us: u64,
    },
    /// After the decision: not confirmed yet, and retried.
    Unconfirmed {
        /// Who.
        participant: Participant,
        /// Why, in words.
        reason: String,
    },
}

impl Event {
    /// Its name, as journalled.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Requested { .. } => "requested",
            Self::Checked { .. } => "checked",
            Self::Staged { .. } => "staged",
            Self::Prepared { .. } => "prepared",
            Self::Held { .. } => "held",
            Self::Frozen { .. } => "frozen",
            Self::Switched { .. } => "switched",
            Self::Yielded { .. } => "yielded",
            Self::Failed { .. } => "failed",
            Self::Cancelled { .. } => "cancelled",
            Self::Decided { .. } => "decided",
            Self::Resumed { .. } => "resumed",
            Self::Ended { .. } => "ended",
            Self::Finished { .. } => "finished",
            Self::Resolved { .. } => "resolved",
            Self::Undone { .. } => "undone",
            Self::Unconfirmed { .. } => "unconfirmed",
        }
    }

    /// Whether it has to be durable before anything else is done. The others are written with the decision that follows
    /// them at once: each would cost a frozen service one more fsync, and a restart without the decision aborts anyway.
    pub fn forced(&self) -> bool {
        !matches!(
            self,
            Self::Held { .. }
                | Self::Frozen { .. }
                | Self::Switched { .. }
                | Self::Yielded { .. }
                | Self::Failed { .. }
                | Self::Cancelled { .. }
        )
    }
}

/// Participants that have not confirmed the decision yet; with the reason once a first attempt has failed.
pub type Open = BTreeMap<Participant, Option<String>>;

/// How far a migration had come when it was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Nothing had been touched.
    Nothing,
    /// Staged and prepared; the service ran.
    Staged,
    /// The source had been asked to freeze.
    Frozen,
}

/// Where a migration is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Not requested yet.
    New,
    /// Asking everyone whether it could succeed; nothing is touched.
    Preflight,
    /// Gateways stage, the source prepares.
    Staging {
        /// Answers of the gateways.
        tickets: BTreeMap<String, Ticket>,
        /// Answer of the source.
        prepared: bool,
    },
    /// The gateways keep their users' frames for the service.
    Holding {
        /// Their tickets.
        tickets: BTreeMap<String, Ticket>,
        /// Who does, and whether its marker is under way.
        held: BTreeMap<String, bool>,
    },
    /// The source fences, dumps, copies; the destination restores.
    Freezing {
        /// Answers of the gateways.
        tickets: BTreeMap<String, Ticket>,
        /// Gateways whose marker the source waits for.
        markers: BTreeSet<String>,
    },
    /// The gateways switch.
    Switching {
        /// Their tickets.
        tickets: BTreeMap<String, Ticket>,
        /// Who has.
        switched: BTreeSet<String>,
    },
    /// The source gives up the right to thaw alone.
    Yielding,
    /// The decision is being written.
    Deciding {
        /// Which way.
        decision: Decision,
        /// How far the migration had come.
        reach: Reach,
    },
    /// COMMIT: the destination resumes.
    Resuming {
        /// Why it has not yet, once an attempt has failed.
        stuck: Option<String>,
    },
    /// COMMIT: the service runs at the destination; the source ends, the gateways finish.
    Ending {
        /// Who has not.
        open: Open,
    },
    /// Over: the service runs at the destination.
    Completed {
        /// Who is still to confirm.
        open: Open,
    },
    /// ABORT: everyone undoes.
    Aborting {
        /// The source had been asked to freeze.
        frozen: bool,
        /// Who has not.
        open: Open,
    },
    /// Over: the service runs at the source.
    RolledBack {
        /// Who is still to confirm.
        open: Open,
    },
    /// ABORT, but the source says the original does not run.
    SourceDead {
        /// Who is still to confirm.
        open: Open,
    },
    /// Over: refused by preflight, nothing was touched.
    Refused,
}

impl State {
    /// As people see it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Preflight => "preflight",
            Self::Staging { .. } => "staging",
            Self::Holding { .. } => "holding",
            Self::Freezing { .. } => "freezing",
            Self::Switching { .. } => "switching",
            Self::Yielding => "yielding",
            Self::Deciding { .. } => "deciding",
            Self::Resuming { .. } => "resuming",
            Self::Ending { .. } => "ending",
            Self::Completed { .. } => "completed",
            Self::Aborting { .. } => "aborting",
            Self::RolledBack { .. } => "rolled-back",
            Self::SourceDead { .. } => "source-dead",
            Self::Refused => "refused",
        }
    }

    /// Who has not confirmed the decision yet.
    pub fn open(&self) -> Option<&Open> {
        match self {
            Self::Ending { open }
            | Self::Completed { open }
            | Self::Aborting { open, .. }
            | Self::RolledBack { open }
            | Self::SourceDead { open } => Some(open),
            _ => None,
        }
    }

    /// The outcome, as far as it is known.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Completed { .. } => Outcome::Completed,
            Self::RolledBack { .. } => Outcome::RolledBack,
            Self::Refused => Outcome::Refused,
            Self::SourceDead { .. } | Self::Resuming { stuck: Some(_) } => Outcome::NeedsOperator,
            Self::Aborting { open, .. } if matches!(open.get(&Participant::Source), Some(Some(_))) => {
                Outcome::NeedsOperator
            }
            _ => Outcome::Running,
        }
    }

    /// The step under way, if the decision has not been written yet.
    pub fn undecided(&self) -> Option<Step> {
        match self {
            Self::Preflight => Some(Step::Preflight),
            Self::Staging { prepared: false, .. } => Some(Step::Prepare),
            Self::Staging { .. } => Some(Step::Stage),
            Self::Holding { .. } => Some(Step::Hold),
            Self::Freezing { .. } => Some(Step::Freeze),
            Self::Switching { .. } => Some(Step::Switch),
            Self::Yielding => Some(Step::Yield),
            Self::Deciding { .. } => Some(Step::Decision),
            _ => None,
        }
    }
}

/// How a migration ended, or that it has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Under way.
    Running,
    /// The service runs at the destination.
    Completed,
    /// The service runs at the source.
    RolledBack,
    /// Nothing was touched.
    Refused,
    /// Cannot be brought to an end without an operator (retried all the same).
    NeedsOperator,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Command {
    /// Preflight at everyone.
    Check,
    /// Stage at a gateway.
    Stage(String),
    /// Prepare at the source.
    Prepare,
    /// Hold at a gateway.
    Hold(String, u32, u64),
    /// Freeze at the source, once the markers of these gateways have arrived.
    Freeze(BTreeSet<String>),
    /// Switch at a gateway.
    Switch(String, u32, u64),
    /// Yield at the source.
    Yield,
    /// Write COMMIT.
    DecideCommit,
    /// Write ABORT.
    DecideAbort,
    /// Resume at the destination.
    Resume,
    /// End at the source.
    End,
    /// Finish at a gateway.
    Finish(String),
    /// Abort at a participant.
    Undo(Participant),
}

impl Command {
    /// Who is to confirm it, for a command after the decision.
    pub fn confirmed_by(&self) -> Option<Participant> {
        match self {
            Self::Resume => Some(Participant::Destination),
            Self::End => Some(Participant::Source),
            Self::Finish(g) => Some(Participant::Gateway(g.clone())),
            Self::Undo(p) => Some(p.clone()),
            _ => None,
        }
    }
}

/// Everything that has to be under way in a state; a restart starts from here too.
pub fn outstanding(plan: &Plan, state: &State) -> BTreeSet<Command> {
    let undo = |open: &Open| open.keys().cloned().map(Command::Undo).collect::<BTreeSet<_>>();
    let confirm = |open: &Open| {
        open.keys()
            .filter_map(|p| match p {
                Participant::Source => Some(Command::End),
                Participant::Gateway(g) => Some(Command::Finish(g.clone())),
                Participant::Destination => None,
            })
            .collect::<BTreeSet<_>>()
    };
    match state {
        State::New | State::Refused => BTreeSet::new(),
        State::Preflight => [Command::Check].into(),
        State::Staging { tickets, prepared } => plan
            .gateways
            .keys()
            .filter(|g| !tickets.contains_key(*g))
            .map(|g| Command::Stage(g.clone()))
            .chain((!prepared).then_some(Command::Prepare))
            .collect(),
        State::Holding { tickets, held } => tickets
            .iter()
            .filter(|(g, _)| !held.contains_key(*g))
            .map(|(g, t)| Command::Hold(g.clone(), t.switch, t.generation))
            .collect(),
        State::Freezing { markers, .. } => [Command::Freeze(markers.clone())].into(),
        State::Switching { tickets, switched } => tickets
            .iter()
            .filter(|(g, _)| !switched.contains(*g))
            .map(|(g, t)| Command::Switch(g.clone(), t.switch, t.generation))
            .collect(),
        State::Yielding => [Command::Yield].into(),
        State::Deciding { decision: Decision::Commit, .. } => [Command::DecideCommit].into(),
        State::Deciding { decision: Decision::Abort, .. } => [Command::DecideAbort].into(),
        State::Resuming { .. } => [Command::Resume].into(),
        State::Ending { open } | State::Completed { open } => confirm(open),
        State::Aborting { open, .. } | State::RolledBack { open } | State::SourceDead { open } => undo(open),
    }
}

/// An event that cannot happen in a state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("session {session}: `{event}` cannot happen in state `{state}`{detail}")]
pub struct Illegal {
    /// The session.
    pub session: String,
    /// The state's name.
    pub state: &'static str,
    /// The event's name.
    pub event: &'static str,
    /// More, if the pair alone does not say it.
    pub detail: String,
}

/// The one transition function. `plan` is the session's (for [`Event::Requested`] in [`State::New`] the event's own).
///
/// # Errors
/// [`Illegal`] for an event that cannot happen in `state`.
pub fn next(plan: &Plan, state: &State, event: &Event) -> Result<State, Illegal> {
    use Event as E;
    use State as S;

    let illegal = |detail: String| Illegal {
        session: plan.id.clone(),
        state: state.name(),
        event: event.name(),
        detail: if detail.is_empty() { detail } else { format!(" ({detail})") },
    };
    let commit = || S::Deciding { decision: Decision::Commit, reach: Reach::Frozen };
    let voted = || match plan.policy {
        Policy::Late => S::Yielding,
        Policy::Disaster => commit(),
    };
    let give_up = |reach| S::Deciding { decision: Decision::Abort, reach };
    let staging = |tickets: BTreeMap<String, Ticket>, prepared| {
        if prepared && tickets.len() == plan.gateways.len() {
            match plan.hold {
                Some(_) if !tickets.is_empty() => S::Holding { tickets, held: BTreeMap::new() },
                _ => S::Freezing { tickets, markers: BTreeSet::new() },
            }
        } else {
            S::Staging { tickets, prepared }
        }
    };

    Ok(match (state, event) {
        (S::New, E::Requested { .. }) => S::Preflight,

        (S::Preflight, E::Checked { findings, .. }) => {
            if plan.findings.iter().chain(findings).any(|f| f.severity == Severity::Error) {
                S::Refused
            } else {
                S::Staging { tickets: BTreeMap::new(), prepared: false }
            }
        }

        (S::Staging { tickets, prepared }, E::Staged { gateway, ticket, .. }) => {
            if !plan.gateways.contains_key(gateway) || tickets.contains_key(gateway) {
                return Err(illegal(format!("gateway {gateway} was not asked")));
            }
            let mut tickets = tickets.clone();
            tickets.insert(gateway.clone(), *ticket);
            staging(tickets, *prepared)
        }
        (S::Staging { tickets, prepared: false }, E::Prepared { .. }) => staging(tickets.clone(), true),

        (S::Holding { tickets, held }, E::Held { gateway, marker_sent, .. }) => {
            if !tickets.contains_key(gateway) || held.contains_key(gateway) {
                return Err(illegal(format!("gateway {gateway} was not asked")));
            }
            let mut held = held.clone();
            held.insert(gateway.clone(), *marker_sent);
            if held.len() == tickets.len() {
                let markers = held.into_iter().filter(|(_, sent)| *sent).map(|(g, _)| g).collect();
                S::Freezing { tickets: tickets.clone(), markers }
            } else {
                S::Holding { tickets: tickets.clone(), held }
            }
        }
        (S::Freezing { tickets, .. }, E::Frozen { .. }) => {
            if tickets.is_empty() {
                voted()
            } else {
                S::Switching { tickets: tickets.clone(), switched: BTreeSet::new() }
            }
        }
        (S::Switching { tickets, switched }, E::Switched { gateway, .. }) => {
            if !tickets.contains_key(gateway) || switched.contains(gateway) {
                return Err(illegal(format!("gateway {gateway} was not asked")));
            }
            let mut switched = switched.clone();
            switched.insert(gateway.clone());
            if switched.len() == tickets.len() {
                voted()
            } else {
                S::Switching { tickets: tickets.clone(), switched }
            }
        }
        (S::Yielding, E::Yielded { .. }) => commit(),

        // A failure, the end of the controller itself, or an operator's word, before the decision.
        (S::Preflight, E::Failed { .. } | E::Cancelled { .. }) => give_up(Reach::Nothing),
        (S::Staging { .. } | S::Holding { .. }, E::Failed { .. } | E::Cancelled { .. }) => {
            give_up(Reach::Staged)
        }
        (S::Freezing { .. } | S::Switching { .. } | S::Yielding, E::Failed { .. } | E::Cancelled { .. }) => {
            give_up(Reach::Frozen)
        }
        (S::Deciding { decision: Decision::Commit, reach }, E::Failed { .. }) => give_up(*reach),

        (S::Deciding { decision: Decision::Commit, .. }, E::Decided { decision: Decision::Commit }) => {
            S::Resuming { stuck: None }
        }
        (S::Deciding { decision: Decision::Abort, reach }, E::Decided { decision: Decision::Abort }) => {
            if *reach == Reach::Nothing {
                S::RolledBack { open: Open::new() }
            } else {
                let mut open: Open =
                    plan.gateways.keys().map(|g| (Participant::Gateway(g.clone()), None)).collect();
                open.insert(Participant::Source, None);
                open.insert(Participant::Destination, None);
                S::Aborting { frozen: *reach == Reach::Frozen, open }
            }
        }

        (S::Resuming { .. }, E::Resumed { .. }) => {
            let mut open: Open =
                plan.gateways.keys().map(|g| (Participant::Gateway(g.clone()), None)).collect();
            open.insert(Participant::Source, None);
            S::Ending { open }
        }
        (S::Resuming { .. }, E::Unconfirmed { participant: Participant::Destination, reason }) => {
            S::Resuming { stuck: Some(reason.clone()) }
        }

        // An operator knows better than who does not answer. What was decided ABORT may have been carried out by the
        // destination already, so it cannot become COMMIT.
        (S::Resuming { stuck: Some(_) }, E::Resolved { decision: Decision::Commit, .. }) => {
            let mut open: Open =
                plan.gateways.keys().map(|g| (Participant::Gateway(g.clone()), None)).collect();
            open.insert(Participant::Source, None);
            S::Ending { open }
        }
        (S::Resuming { stuck: Some(_) }, E::Resolved { decision: Decision::Abort, .. }) => {
            let mut open: Open =
                plan.gateways.keys().map(|g| (Participant::Gateway(g.clone()), None)).collect();
            open.insert(Participant::Source, None);
            open.insert(Participant::Destination, None);
            S::Aborting { frozen: true, open }
        }
        (S::Aborting { frozen, open }, E::Resolved { decision: Decision::Abort, .. })
            if matches!(open.get(&Participant::Source), Some(Some(_))) =>
        {
            let mut open = open.clone();
            open.remove(&Participant::Source);
            undone(*frozen, open)
        }
        (S::SourceDead { open }, E::Resolved { decision: Decision::Abort, .. }) => {
            S::RolledBack { open: open.clone() }
        }

        (S::Ending { open }, E::Ended { .. } | E::Finished { .. }) => {
            ended(confirmed(open, event).map_err(illegal)?)
        }
        (S::Ending { open }, E::Unconfirmed { participant, reason }) => {
            ended(unconfirmed(open, participant, reason).map_err(illegal)?)
        }
        (S::Completed { open }, E::Ended { .. } | E::Finished { .. }) => {
            S::Completed { open: confirmed(open, event).map_err(illegal)? }
        }
        (S::Completed { open }, E::Unconfirmed { participant, reason }) => {
            S::Completed { open: unconfirmed(open, participant, reason).map_err(illegal)? }
        }

        (S::Aborting { frozen, open }, E::Undone { participant, alive, .. }) => {
            let dead = *frozen && *participant == Participant::Source && !alive;
            let open = confirmed(open, event).map_err(illegal)?;
            if dead { S::SourceDead { open } } else { undone(*frozen, open) }
        }
        (S::Aborting { frozen, open }, E::Unconfirmed { participant, reason }) => {
            undone(*frozen, unconfirmed(open, participant, reason).map_err(illegal)?)
        }
        (S::RolledBack { open }, E::Undone { .. }) => {
            S::RolledBack { open: confirmed(open, event).map_err(illegal)? }
        }
        (S::RolledBack { open }, E::Unconfirmed { participant, reason }) => {
            S::RolledBack { open: unconfirmed(open, participant, reason).map_err(illegal)? }
        }
        (S::SourceDead { open }, E::Undone { .. }) => {
            S::SourceDead { open: confirmed(open, event).map_err(illegal)? }
        }
        (S::SourceDead { open }, E::Unconfirmed { participant, reason }) => {
            S::SourceDead { open: unconfirmed(open, participant, reason).map_err(illegal)? }
        }

        _ => return Err(illegal(String::new())),
    })
}

/// Over once everyone has confirmed or is known to be retried: the service already runs at the destination.
fn ended(open: Open) -> State {
    if open.values().all(Option::is_some) { State::Completed { open } } else { State::Ending { open } }
}

/// Over once the source runs and everyone else has confirmed or is known to be retried.
fn undone(frozen: bool, open: Open) -> State {
    let over = !open.contains_key(&Participant::Source) && open.values().all(Option::is_some);
    if over { State::RolledBack { open } } else { State::Aborting { frozen, open } }
}

fn confirmed(open: &Open, event: &Event) -> Result<Open, String> {
    let participant = match event {
        Event::Ended { .. } => Participant::Source,
        Event::Finished { gateway, .. } => Participant::Gateway(gateway.clone()),
        Event::Undone { participant, .. } => participant.clone(),
        _ => return Err("not a confirmation".into()),
    };
    let mut open = open.clone();
    match open.remove(&participant) {
        Some(_) => Ok(open),
        None => Err(format!("{participant:?} has nothing left to confirm")),
    }
}

fn unconfirmed(open: &Open, participant: &Participant, reason: &str) -> Result<Open, String> {
    let mut open = open.clone();
    match open.get_mut(participant) {
        Some(why) => {
            *why = Some(reason.to_owned());
            Ok(open)
        }
        None => Err(format!("{participant:?} has nothing left to confirm")),
    }
}

/// An event and when it happened: microseconds since the request, by the controller's clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When.
    pub at_us: u64,
    /// What.
    pub event: Event,
}

/// One migration: its plan, where it is, and how it came there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// What is to be done.
    pub plan: Arc<Plan>,
    /// Where it is.
    pub state: State,
    /// What happened, oldest first.
    pub log: Vec<Entry>,
}

impl Session {
    /// A session from its first event.
    ///
    /// # Errors
    /// [`Illegal`] if the first event is another than [`Event::Requested`].
    pub fn begin(id: &str, entry: Entry) -> Result<(Self, BTreeSet<Command>), Illegal> {
        let Event::Requested { plan } = &entry.event else {
            return Err(Illegal {
                session: id.into(),
                state: State::New.name(),
                event: entry.event.name(),
                detail: String::new(),
            });
        };
        let plan = Arc::clone(plan);
        let mut session = Self { plan, state: State::New, log: Vec::new() };
        let commands = session.apply(entry)?;
        Ok((session, commands))
    }

    /// Whether `event` could happen now.
    ///
    /// # Errors
    /// [`Illegal`] if not.
    pub fn check(&self, event: &Event) -> Result<(), Illegal> {
        next(&self.plan, &self.state, event).map(|_| ())
    }

    /// Takes an event; returns what has to be started now that was not under way before.
    ///
    /// # Errors
    /// [`Illegal`]; the session is unchanged.
    pub fn apply(&mut self, entry: Entry) -> Result<BTreeSet<Command>, Illegal> {
        let last = self.log.last().map_or(0, |e| e.at_us);
        if entry.at_us < last {
            return Err(Illegal {
                session: self.plan.id.clone(),
                state: self.state.name(),
                event: entry.event.name(),
                detail: format!(" (at {} us, before the last event at {last} us)", entry.at_us),
            });
        }
        let state = next(&self.plan, &self.state, &entry.event)?;
        let before = outstanding(&self.plan, &self.state);
        let after = outstanding(&self.plan, &state);
        self.state = state;
        self.log.push(entry);
        Ok(after.difference(&before).cloned().collect())
    }

    /// What has to be under way.
    pub fn outstanding(&self) -> BTreeSet<Command> {
        outstanding(&self.plan, &self.state)
    }

    /// What gives it up, while that can be done: the decision is not being written.
    pub fn cancellation(&self, by: &str) -> Option<Event> {
        let step = self.state.undecided().filter(|s| *s != Step::Decision)?;
        Some(Event::Cancelled { step, by: by.into() })
    }

    /// How a restarted controller goes on. Before the decision: by failing (which leads to ABORT); the event that says
    /// so. After it: `None`, [`Self::outstanding`] is done again.
    pub fn recovery(&self, reason: &str) -> Option<Event> {
        let step = self.state.undecided()?;
        if matches!(self.state, State::Deciding { decision: Decision::Abort, .. }) {
            return None; // the failure is on record already
        }
        Some(Event::Failed {
            step,
            part: None,
            actor: "controller".into(),
            reason: reason.into(),
            sent_us: self.log.last().map_or(0, |e| e.at_us),
        })
    }
}

#[cfg(test)]
mod tests;
