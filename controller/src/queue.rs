//! Requests that wait for their turn, and whose turn it is. Pure: a function of the [`World`] and of the [`Limits`].
//!
//! Rules:
//! - one migration at a time per service and per user, a bounded number at a time over all ([`Limits::at_once`]);
//! - the oldest that can begin does; one that cannot holds up nobody but those with whom it shares the service or a user,
//!   so nothing is overtaken for ever;
//! - what a request comes to is found out when its turn comes: where the service is then counts. One that cannot be any more
//!   (the service is there already, the inventory knows it no longer) leaves, and why is remembered;
//! - a session that waits for an operator or for a participant that is away takes no place among those under way, but its
//!   service and users stay taken.
//!
//! Entering and leaving are records of the journal, so a restart finds the queue as it was.

use std::{collections::BTreeSet, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    session::Plan,
    triggers::Request,
    world::{RequestError, World},
};

/// How much there may be at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Migrations under way over all services.
    pub at_once: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// MiB of the journal above which no new request or inventory is taken; what is under way goes on.
    pub journal_mib: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { at_once: 4, waiting: 100, journal_mib: 1024 }
    }
}

/// A request that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// The name its session will have.
    pub id: String,
    /// As asked.
    pub request: Request,
    /// Unix time in milliseconds when it was asked.
    pub at_ms: u64,
}

/// Why a request never became a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "kebab-case")]
pub enum Leaving {
    /// Somebody took it out.
    Cancelled {
        /// Who.
        by: String,
    },
    /// When its turn came it could not be.
    Refused {
        /// In words.
        reason: String,
    },
}

/// A request that has left the queue without becoming a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    /// What it was.
    pub waiting: Waiting,
    /// Why.
    pub why: Leaving,
}

/// What the queue is to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    /// This one begins.
    Begin(Arc<Plan>),
    /// This one cannot be any more.
    Refuse {
        /// Which.
        id: String,
        /// In words.
        reason: String,
    },
}

impl World {
    /// Whose turn it is now; to be asked again after each answer was recorded.
    pub fn turn(&self, limits: Limits, now_ms: u64) -> Option<Turn> {
        self.queue.iter().enumerate().find_map(|(i, waiting)| {
            match self.admit(&waiting.request, &self.queue[..i], limits, waiting.id.clone(), now_ms) {
                Ok(plan) => Some(Turn::Begin(Arc::new(plan))),
                Err(e) if e.passes() => None,
                Err(e) => Some(Turn::Refuse { id: waiting.id.clone(), reason: e.to_string() }),
            }
        })
    }

    /// What a new request comes to if it is to begin at once.
    ///
    /// # Errors
    /// [`RequestError`]; where it [`RequestError::passes`] the request could wait.
    pub fn admit_now(&self, request: &Request, limits: Limits, now_ms: u64) -> Result<Plan, RequestError> {
        self.admit(request, &self.queue, limits, self.next_id(&request.service), now_ms)
    }

    /// The entry of a request that is to wait if it cannot begin at once.
    ///
    /// # Errors
    /// [`RequestError`]: it could never begin, or too many wait.
    pub fn enqueue(&self, request: &Request, limits: Limits, now_ms: u64) -> Result<Waiting, RequestError> {
        let now = self.admit_now(request, limits, now_ms);
        let alone = self.plan_as(request, String::new(), now_ms);
        match (now, alone) {
            (Err(e), _) if !e.passes() => return Err(e),
            (_, Err(e)) if e.is_permanent() => return Err(e),
            _ => {}
        }
        if self.queue.len() >= limits.waiting {
            return Err(RequestError::QueueFull { length: self.queue.len() });
        }
        Ok(Waiting { id: self.next_id(&request.service), request: request.clone(), at_ms: now_ms })
    }

    fn admit(
        &self,
        request: &Request,
        before: &[Waiting],
        limits: Limits,
        id: String,
        now_ms: u64,
    ) -> Result<Plan, RequestError> {
        let mine = self.users_wanted(request);
        // first: they may move the service, too
        for earlier in before {
            let theirs = self.users_wanted(&earlier.request);
            if earlier.request.service == request.service || !mine.is_disjoint(&theirs) {
                return Err(RequestError::Behind {
                    service: request.service.clone(),
                    waiting: earlier.id.clone(),
                });
            }
        }
        let plan = self.plan_as(request, id, now_ms)?;
        let running = self.running();
        if running >= limits.at_once {
            return Err(RequestError::AllUnderWay { running, limit: limits.at_once });
        }
        Ok(plan)
    }

    /// Place in the queue, from 1, and why it waits.
    pub fn place_in_queue(&self, id: &str, limits: Limits) -> Option<(usize, String)> {
        let i = self.queue.iter().position(|w| w.id == id)?;
        let waiting = &self.queue[i];
        let why = match self.admit(&waiting.request, &self.queue[..i], limits, waiting.id.clone(), 0) {
            Ok(_) => "it begins now".to_owned(),
            Err(e) => e.holds_up().unwrap_or_else(|| e.to_string()),
        };
        Some((i + 1, why))
    }

    /// The users a request may switch: those it names, or all of the service.
    fn users_wanted(&self, request: &Request) -> BTreeSet<String> {
        match self.inventory.services.get(&request.service) {
            Some(service) if request.users.is_empty() => {
                self.inventory.users_of(service).iter().cloned().collect()
            }
            _ => request.users.iter().cloned().collect(),
        }
    }

    /// The next session of a service is named so.
    pub(crate) fn next_id(&self, service: &str) -> String {
        let sessions = self.sessions.values().filter(|s| s.plan.service == service).count();
        let waiting = self.queue.iter().filter(|w| w.request.service == service).count();
        let left = self.left.values().filter(|l| l.waiting.request.service == service).count();
        format!("{service}-{}", sessions + waiting + left + 1)
    }
}

impl RequestError {
    /// Whether it names what there is not, wherever the service will be when its turn comes.
    fn is_permanent(&self) -> bool {
        matches!(
            self,
            Self::UnknownService { .. }
                | Self::UnknownSite { .. }
                | Self::UnknownUser { .. }
                | Self::NotAUser { .. }
                | Self::NoServer { .. }
        )
    }

    /// Whether what stands in the way goes away by itself.
    pub fn passes(&self) -> bool {
        self.holds_up().is_some()
    }

    /// What a request waits for; `None` if waiting would not help.
    pub fn holds_up(&self) -> Option<String> {
        match self {
            Self::Busy { session, state, .. } => Some(format!("session {session} ({state}) has the service")),
            Self::Pending { session, what, .. } => Some(format!("session {session} still waits for {what}")),
            Self::UserBusy { user, session, state, .. } => {
                Some(format!("session {session} ({state}) has user {user}"))
            }
            Self::Behind { waiting, .. } => {
                Some(format!("{waiting} is before it, for the same service or user"))
            }
            Self::AllUnderWay { running, limit } => {
                Some(format!("{running} of at most {limit} migrations are under way"))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
