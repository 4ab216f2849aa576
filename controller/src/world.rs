//! Everything the controller knows, as the fold of its journal: the inventory, where services and users are, and the
//! sessions. Pure: [`World::apply`] is used alike when an event happens and when the journal is read again.
//!
//! Invariants:
//! - a service and a user move by a decision COMMIT only; applying an inventory never moves anything;
//! - one session per service at a time, and a user is in one session at most; who has to wait for that stands in the queue
//!   ([`crate::queue`]);
//! - what a running session needs can be neither removed nor changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    inventory::{self, Change, Inventory, Service, What},
    queue::{Leaving, Left, Waiting},
    session::{
        Command, Decision, Entry, Event, Finding, Hold, Illegal, Member, Outcome, Participant, Plan, Session,
        Severity, Side, State,
    },
    triggers::Request,
};

/// One record of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum Record {
    /// An inventory took effect.
    Applied {
        /// Counts changes, from 1.
        revision: u64,
        /// All of it.
        inventory: Arc<Inventory>,
    },
    /// Something happened in a session.
    Session {
        /// Which.
        id: String,
        /// What, and when.
        entry: Entry,
    },
    /// A request waits for its turn.
    Queued {
        /// The name its session will have.
        id: String,
        /// As asked.
        request: Request,
        /// Unix time in milliseconds.
        at_ms: u64,
    },
    /// A request that waited never becomes a session.
    Left {
        /// Which.
        id: String,
        /// Why.
        why: Leaving,
    },
}

/// Where a service is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePlace {
    /// The site.
    pub site: String,
    /// Root of its process tree, as last heard; 0: not known.
    pub pid: u32,
}

/// A record that contradicts those before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorldError {
    /// An event that cannot happen.
    #[error(transparent)]
    Illegal(#[from] Illegal),
    /// A revision out of order.
    #[error("inventory revision {found} follows revision {last}")]
    Revision {
        /// Of the record.
        found: u64,
        /// Of the last one.
        last: u64,
    },
    /// A session's first event names another session.
    #[error("session {id}: its first event is a request of session {named}")]
    Id {
        /// Of the record.
        id: String,
        /// Of the plan.
        named: String,
    },
    /// A name that is taken.
    #[error("request {id} is queued though there is a session or a request of that name")]
    Taken {
        /// Which.
        id: String,
    },
    /// It does not wait.
    #[error("request {id} leaves the queue, but is not in it")]
    NotQueued {
        /// Which.
        id: String,
    },
}

/// A request that cannot become a session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No such service.
    #[error("there is no service `{name}`; {known}")]
    UnknownService {
        /// As asked.
        name: String,
        /// "known: ...".
        known: String,
    },
    /// No such site.
    #[error("there is no site `{name}`; {known}")]
    UnknownSite {
        /// As asked.
        name: String,
        /// "known: ...".
        known: String,
    },
    /// No such user.
    #[error("there is no user `{name}`; {known}")]
    UnknownUser {
        /// As asked.
        name: String,
        /// "known: ...".
        known: String,
    },
    /// The user is not one of the service's.
    #[error(
        "user {user} is none of the users of service {service} ({users}); leave --user out to switch all of them"
    )]
    NotAUser {
        /// As asked.
        user: String,
        /// As asked.
        service: String,
        /// Those it has.
        users: String,
    },
    /// The service has no server there.
    #[error(
        "service {service} has no server at site {site}, only at {sites}; add one to `servers` of the service and apply"
    )]
    NoServer {
        /// As asked.
        service: String,
        /// As asked.
        site: String,
        /// Where it has.
        sites: String,
    },
    /// It is there.
    #[error("service {service} is at site {site} already; `handover status` shows where everything is")]
    AlreadyThere {
        /// As asked.
        service: String,
        /// As asked.
        site: String,
    },
    /// Both sites share a network.
    #[error(
        "sites {from} and {to} are both on network {network}: no switch could tell them apart; give each site its own network"
    )]
    SameNetwork {
        /// Where it is.
        from: String,
        /// As asked.
        to: String,
        /// Of both.
        network: String,
    },
    /// The service is being migrated.
    #[error(
        "service {service} is in session {session} ({state}); wait for it (`handover sessions watch {session}`), or ask with --queue"
    )]
    Busy {
        /// As asked.
        service: String,
        /// Which one.
        session: String,
        /// Its state.
        state: &'static str,
    },
    /// An earlier migration has left something to confirm.
    #[error(
        "session {session} of service {service} still waits for {what}; bring it back, or remove it from the inventory if it is gone for good"
    )]
    Pending {
        /// As asked.
        service: String,
        /// Which one.
        session: String,
        /// Who has to confirm what.
        what: String,
    },
    /// A user is being switched by another session.
    #[error(
        "user {user} is in session {session} of service {service} ({state}); wait for it (`handover sessions watch {session}`), or ask with --queue"
    )]
    UserBusy {
        /// Who.
        user: String,
        /// Which one.
        session: String,
        /// Whose.
        service: String,
        /// Its state.
        state: &'static str,
    },
    /// An earlier request for the same service or user waits.
    #[error(
        "{waiting} waits in the queue for service {service} or one of its users; with --queue this request waits behind it, `handover sessions cancel {waiting}` takes it out"
    )]
    Behind {
        /// As asked.
        service: String,
        /// Which one.
        waiting: String,
    },
    /// As many as may be are under way.
    #[error(
        "{running} migrations are under way, and {limit} at once is the most (`[limits] at_once` in the controller's configuration); with --queue the request waits for its turn"
    )]
    AllUnderWay {
        /// So many.
        running: usize,
        /// At most.
        limit: usize,
    },
    /// As many as may be wait.
    #[error(
        "{length} requests wait in the queue, which is the most (`[limits] waiting` in the controller's configuration); take some out (`handover queue`, `handover sessions cancel ID`) or ask again later"
    )]
    QueueFull {
        /// So many.
        length: usize,
    },
}

/// Everything known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct World {
    /// As last applied.
    pub inventory: Arc<Inventory>,
    /// Its revision; 0: never applied.
    pub revision: u64,
    /// Where services are.
    pub services: BTreeMap<String, ServicePlace>,
    /// The network each user is on.
    pub users: BTreeMap<String, String>,
    /// Sessions by name.
    pub sessions: BTreeMap<String, Session>,
    /// Requests that wait for their turn, oldest first.
    pub queue: Vec<Waiting>,
    /// Requests that waited and never became sessions, by name.
    pub left: BTreeMap<String, Left>,
    /// Names of sessions and requests, oldest first.
    pub order: Vec<String>,
}

fn known<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    let names: Vec<&str> = names.into_iter().map(String::as_str).collect();
    if names.is_empty() {
        "none is declared: `handover apply -f FILE`".into()
    } else {
        format!("known: {}", names.join(", "))
    }
}

fn over(session: &Session) -> bool {
    matches!(session.state, State::Completed { .. } | State::RolledBack { .. } | State::Refused)
}

impl World {
    /// Takes a record; returns what the session has to start now.
    ///
    /// # Errors
    /// [`WorldError`]; nothing is changed.
    pub fn apply(&mut self, record: &Record) -> Result<BTreeSet<Command>, WorldError> {
        match record {
            Record::Applied { revision, inventory } => {
                if *revision != self.revision + 1 {
                    return Err(WorldError::Revision { found: *revision, last: self.revision });
                }
                self.revision = *revision;
                self.place(inventory);
                self.inventory = Arc::clone(inventory);
                Ok(BTreeSet::new())
            }
            Record::Session { id, entry } => self.happen(id, entry),
            Record::Queued { id, request, at_ms } => {
                if self.order.contains(id) {
                    return Err(WorldError::Taken { id: id.clone() });
                }
                self.order.push(id.clone());
                self.queue.push(Waiting { id: id.clone(), request: request.clone(), at_ms: *at_ms });
                Ok(BTreeSet::new())
            }
            Record::Left { id, why } => {
                let waiting =
                    self.out_of_queue(id).ok_or_else(|| WorldError::NotQueued { id: id.clone() })?;
                self.left.insert(id.clone(), Left { waiting, why: why.clone() });
                Ok(BTreeSet::new())
            }
        }
    }

    fn out_of_queue(&mut self, id: &str) -> Option<Waiting> {
        let i = self.queue.iter().position(|w| w.id == id)?;
        Some(self.queue.remove(i))
    }

    /// New services and users are put at their homes; those known stay where they are.
    fn place(&mut self, new: &Inventory) {
        self.services.retain(|name, _| new.services.contains_key(name));
        for (name, service) in &new.services {
            self.services
                .entry(name.clone())
                .or_insert_with(|| ServicePlace { site: service.home.clone(), pid: 0 });
        }
        self.users.retain(|name, _| new.users.contains_key(name));
        for (name, user) in &new.users {
            if let Some(site) = new.sites.get(&user.home) {
                self.users.entry(name.clone()).or_insert_with(|| site.network.clone());
            }
        }
    }

    fn happen(&mut self, id: &str, entry: &Entry) -> Result<BTreeSet<Command>, WorldError> {
        let Some(session) = self.sessions.get_mut(id) else {
            let (session, commands) = Session::begin(id, entry.clone())?;
            if session.plan.id != id {
                return Err(WorldError::Id { id: id.into(), named: session.plan.id.clone() });
            }
            if self.out_of_queue(id).is_none() {
                if self.order.iter().any(|known| known == id) {
                    return Err(WorldError::Taken { id: id.into() });
                }
                self.order.push(id.to_owned());
            }
            self.sessions.insert(id.to_owned(), session);
            return Ok(commands);
        };
        let commands = session.apply(entry.clone())?;
        let place = self.services.get_mut(&session.plan.service);
        match &entry.event {
            Event::Checked { pid, .. } => {
                if let Some(place) = place {
                    place.pid = *pid;
                }
            }
            Event::Resumed { pid, .. } => {
                if let Some(place) = place {
                    place.pid = *pid;
                }
            }
            Event::Decided { decision: Decision::Commit } => {
                if let Some(place) = place {
                    place.site.clone_from(&session.plan.to.site);
                }
                for user in session.plan.users() {
                    if let Some(network) = self.users.get_mut(user) {
                        network.clone_from(&session.plan.to.network);
                    }
                }
            }
            // the word of an operator that what was committed goes back
            Event::Resolved { decision: Decision::Abort, .. } => {
                if let Some(place) = place {
                    place.site.clone_from(&session.plan.from.site);
                }
                for user in session.plan.users() {
                    if let Some(network) = self.users.get_mut(user) {
                        network.clone_from(&session.plan.from.network);
                    }
                }
            }
            _ => {}
        }
        Ok(commands)
    }

    /// The session a service is in.
    pub fn session_of(&self, service: &str) -> Option<&Session> {
        self.sessions.values().find(|s| s.plan.service == service && !over(s))
    }

    /// What applying `new` would change.
    ///
    /// # Errors
    /// Everything that speaks against it, one line each.
    pub fn check_apply(&self, new: &Inventory) -> Result<Vec<Change>, Vec<String>> {
        let changes = inventory::diff(&self.inventory, new);
        let mut against = Vec::new();
        for change in changes.iter().filter(|c| c.what != What::Added) {
            for session in self.sessions.values().filter(|s| !over(s) && needs(&s.plan, change)) {
                let id = &session.plan.id;
                let verb = if change.what == What::Removed { "removed" } else { "changed" };
                against.push(format!(
                    "{} {} cannot be {verb}: session {id} is under way ({}); wait for it: `handover sessions watch {id}`",
                    change.kind,
                    change.name,
                    session.state.name(),
                ));
            }
        }
        for (name, service) in &new.services {
            let (Some(place), Some(old)) = (self.services.get(name), self.inventory.services.get(name))
            else {
                continue;
            };
            let (was, is) = (old.servers.get(&place.site), service.servers.get(&place.site));
            if was != is {
                against.push(format!(
                    "service {name} runs at site {} on server {}: `servers` cannot say otherwise; migrate it to another site first",
                    place.site,
                    was.map_or("?", String::as_str),
                ));
            }
        }
        for (name, network) in &self.users {
            if new.users.contains_key(name) && !new.networks.contains_key(network) {
                against.push(format!(
                    "network {network} cannot be removed: user {name} is on it; migrate the user's service to another site first"
                ));
            }
        }
        if against.is_empty() { Ok(changes) } else { Err(against) }
    }

    /// What a request comes to. `now_ms` is the Unix time in milliseconds.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn plan(&self, request: &Request, now_ms: u64) -> Result<Plan, RequestError> {
        self.plan_as(request, self.next_id(&request.service), now_ms)
    }

    /// As [`World::plan`], for a session named `id`.
    pub(crate) fn plan_as(&self, request: &Request, id: String, now_ms: u64) -> Result<Plan, RequestError> {
        let inv = &*self.inventory;
        let name = &request.service;
        let unknown =
            || RequestError::UnknownService { name: name.clone(), known: known(inv.services.keys()) };
        let service = inv.services.get(name).ok_or_else(unknown)?;
        let place = self.services.get(name).ok_or_else(unknown)?;
        let to_site = &request.to_site;
        if !inv.sites.contains_key(to_site) {
            return Err(RequestError::UnknownSite { name: to_site.clone(), known: known(inv.sites.keys()) });
        }
        // first: where the service is may be about to change
        self.not_busy(name)?;
        if *to_site == place.site {
            return Err(RequestError::AlreadyThere { service: name.clone(), site: to_site.clone() });
        }
        let (from, to) = (self.side(name, service, &place.site)?, self.side(name, service, to_site)?);
        if from.network == to.network {
            return Err(RequestError::SameNetwork { from: from.site, to: to.site, network: to.network });
        }
        let (gateways, findings) = self.members(request, service, &from, &to)?;
        Ok(Plan {
            id,
            service: name.clone(),
            address: service.address.to_string(),
            target: service.target.clone(),
            from,
            to,
            gateways,
            policy: request.policy,
            allow_other_peers: request.allow_other_peers,
            hold: request.hold.then_some(Hold { marker_port: service.marker_port }),
            trigger: request.trigger.clone(),
            requested_at_ms: now_ms,
            findings,
        })
    }

    fn not_busy(&self, service: &str) -> Result<(), RequestError> {
        if let Some(session) = self.session_of(service) {
            return Err(RequestError::Busy {
                service: service.to_owned(),
                session: session.plan.id.clone(),
                state: session.state.name(),
            });
        }
        for session in self.sessions.values().filter(|s| s.plan.service == service) {
            let waiting = session.state.open().into_iter().flat_map(|o| o.keys());
            if let Some(p) = waiting.into_iter().find(|p| self.exists(&session.plan, p)) {
                return Err(RequestError::Pending {
                    service: service.to_owned(),
                    session: session.plan.id.clone(),
                    what: p.name(&session.plan),
                });
            }
        }
        Ok(())
    }

    /// Whether a participant is still in the inventory: one that was removed will never confirm anything.
    fn exists(&self, plan: &Plan, participant: &Participant) -> bool {
        match participant {
            Participant::Source => self.inventory.servers.contains_key(&plan.from.server),
            Participant::Destination => self.inventory.servers.contains_key(&plan.to.server),
            Participant::Gateway(g) => self.inventory.gateways.contains_key(g),
        }
    }

    fn side(&self, name: &str, service: &Service, site: &str) -> Result<Side, RequestError> {
        let inv = &*self.inventory;
        let missing = || RequestError::NoServer {
            service: name.to_owned(),
            site: site.to_owned(),
            sites: service.servers.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
        };
        let server = service.servers.get(site).ok_or_else(missing)?;
        let (at, place) = inv.servers.get(server).zip(inv.sites.get(site)).ok_or_else(missing)?;
        Ok(Side {
            site: site.to_owned(),
            network: place.network.clone(),
            server: server.clone(),
            migration: at.migration.clone(),
        })
    }

    /// The users to switch, by gateway, and what is to be known about the others.
    #[allow(clippy::type_complexity)] // a pair of two plain things
    fn members(
        &self,
        request: &Request,
        service: &Service,
        from: &Side,
        to: &Side,
    ) -> Result<(BTreeMap<String, Vec<Member>>, Vec<Finding>), RequestError> {
        let inv = &*self.inventory;
        let declared = inv.users_of(service);
        let asked: BTreeSet<String> = if request.users.is_empty() {
            declared.iter().cloned().collect()
        } else {
            for user in &request.users {
                if !inv.users.contains_key(user) {
                    return Err(RequestError::UnknownUser {
                        name: user.clone(),
                        known: known(inv.users.keys()),
                    });
                }
                if !declared.contains(user) {
                    return Err(RequestError::NotAUser {
                        user: user.clone(),
                        service: request.service.clone(),
                        users: declared.join(", "),
                    });
                }
            }
            request.users.iter().cloned().collect()
        };
        let mut gateways: BTreeMap<String, Vec<Member>> = BTreeMap::new();
        let mut findings = Vec::new();
        let mut finding = |severity, code: &str, message, remedy: &str| {
            findings.push(Finding {
                severity,
                code: code.into(),
                reporter: "controller".into(),
                message,
                remedy: remedy.into(),
            });
        };
        for name in asked {
            let (Some(user), Some(network)) = (inv.users.get(&name), self.users.get(&name)) else { continue };
            if *network != from.network {
                let there = if *network == to.network { " already" } else { "" };
                let named = !request.users.is_empty();
                finding(
                    if named && *network != to.network { Severity::Error } else { Severity::Warning },
                    "user-elsewhere",
                    format!(
                        "user {name} is on network {network}{there}, not on {} of site {}: it is not switched",
                        from.network, from.site
                    ),
                    "`handover status` shows where every user is; name those to switch with --user",
                );
                continue;
            }
            self.user_not_busy(&name)?;
            let addresses = user.addresses.iter().map(ToString::to_string).collect();
            gateways.entry(user.gateway.clone()).or_default().push(Member { name, addresses });
        }
        if gateways.is_empty() {
            finding(
                Severity::Warning,
                "no-users",
                format!(
                    "no user of service {} is on network {}: only the service moves",
                    request.service, from.network
                ),
                "declare the service's users and apply, if there should be some",
            );
        }
        Ok((gateways, findings))
    }

    fn user_not_busy(&self, user: &str) -> Result<(), RequestError> {
        for session in self.sessions.values() {
            let Some((gateway, _)) =
                session.plan.gateways.iter().find(|(_, members)| members.iter().any(|m| m.name == user))
            else {
                continue;
            };
            let gateway = Participant::Gateway(gateway.clone());
            let pending = session.state.open().is_some_and(|o| o.contains_key(&gateway));
            if !over(session) || (pending && self.exists(&session.plan, &gateway)) {
                return Err(RequestError::UserBusy {
                    user: user.to_owned(),
                    session: session.plan.id.clone(),
                    service: session.plan.service.clone(),
                    state: session.state.name(),
                });
            }
        }
        Ok(())
    }

    /// Sessions that have something to do: those a restart goes on with.
    pub fn unfinished(&self) -> Vec<String> {
        self.order
            .iter()
            .filter(|id| self.sessions.get(*id).is_some_and(|s| !s.outstanding().is_empty()))
            .cloned()
            .collect()
    }

    /// Sessions whose service is still on its way.
    pub fn running(&self) -> usize {
        self.sessions.values().filter(|s| s.state.outcome() == Outcome::Running).count()
    }
}

/// Whether a session under way depends on the thing of a change.
fn needs(plan: &Plan, change: &Change) -> bool {
    let n = &change.name;
    let either = |f: fn(&Side) -> &String| f(&plan.from) == n || f(&plan.to) == n;
    match change.kind {
        "service" => plan.service == *n,
        "site" => either(|s| &s.site),
        "network" => either(|s| &s.network),
        "server" => either(|s| &s.server),
        "gateway" => plan.gateways.contains_key(n),
        "user" => plan.users().any(|u| u == n),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
