//! The promises, compared with the truth. Those about single transitions are judged where they happen.

use handover_controller::session::{Decision, Outcome};
use handover_migrator::machine::{DestinationState as Ds, Recovery, SourceState as Ss};

use crate::{
    server::{Held, Record},
    sim::{Node, Sim},
};

impl Sim {
    /// Whether a COMMIT of this migration is durable.
    pub(crate) fn committed(&self, id: &str) -> bool {
        self.decided.get(id) == Some(&Decision::Commit)
    }

    /// After every event.
    pub(crate) fn check(&mut self) {
        let running = self.servers.iter().filter(|s| s.host.copy == Some(Held::No)).count();
        if running > 1 {
            self.violated(|| "two copies of the service run".into());
        }
        for s in 0..self.servers.len() {
            if let Some(what) = self.host_trouble(s) {
                let who = Node::Server(s);
                self.violated(|| format!("{who}: {what}"));
            }
        }
        self.check_answers();
    }

    fn host_trouble(&self, s: usize) -> Option<&'static str> {
        let server = &self.servers[s];
        let host = &server.host;
        let (mut given_back, mut held) = (false, false);
        for record in server.records.values() {
            match record {
                Record::Source { state: Ss::Aborting, .. } | Record::Destination { state: Ds::Resuming } => {
                    given_back = true;
                }
                Record::Source { state: Ss::Voted | Ss::Yielded | Ss::Ending, .. }
                | Record::Destination { state: Ds::Restoring | Ds::Restored | Ds::Discarding } => held = true,
                _ => {}
            }
        }
        match host.copy {
            Some(Held::No) if held => Some("a copy runs that has to stand still"),
            Some(Held::No) if !host.v => Some("the service runs where its address is not"),
            Some(Held::No) => None,
            Some(_) if !host.fenced && !given_back => Some("a copy stands still without a fence"),
            None | Some(_) if host.v && !host.fenced && !given_back => {
                Some("the address is there without a fence, and nobody to answer")
            }
            None | Some(_) => None,
        }
    }

    /// What an operator was ever told stays true, and is true when it is told.
    fn check_answers(&mut self) {
        if !self.controller.up {
            return;
        }
        let mut news = Vec::new();
        for (id, told) in &self.seen {
            let now = self.controller.world.sessions.get(id).map(|s| s.state.outcome());
            if now != Some(*told) {
                news.push((id.clone(), *told, now));
            }
        }
        for (id, told, now) in news {
            let Some(now) = now else {
                self.violated(|| format!("session {id}, which an operator was told of, is forgotten"));
                return;
            };
            let last = matches!(told, Outcome::Completed | Outcome::RolledBack | Outcome::Refused);
            if last {
                self.violated(|| format!("session {id} was {told:?} and is {now:?}"));
                return;
            }
            self.seen.insert(id.clone(), now);
            let to = usize::from(
                self.controller.world.sessions.get(&id).is_some_and(|s| s.plan.to.site == "backup"),
            );
            let runs = |sim: &Self, s: usize| sim.servers[s].host.copy == Some(Held::No);
            match now {
                Outcome::Completed => {
                    self.figures.completed += 1;
                    if self.given_up.contains(&id) {
                        self.violated(|| format!("session {id} was cancelled, and is completed"));
                    }
                    if !runs(self, to) || !self.committed(&id) {
                        self.violated(|| format!("session {id} is completed, but the service is not there"));
                    }
                }
                Outcome::RolledBack => {
                    self.figures.rolled_back += 1;
                    if !runs(self, 1 - to) || self.committed(&id) {
                        self.violated(|| {
                            format!("session {id} is rolled back, but the service is not there")
                        });
                    }
                }
                Outcome::Refused => self.figures.refused += 1,
                Outcome::NeedsOperator => self.figures.in_doubt += 1,
                Outcome::Running => {}
            }
        }
    }

    /// Why service, address and users do not agree, if they do not.
    pub(crate) fn disagreement(&self) -> Option<String> {
        let running: Vec<usize> = (0..2)
            .filter(|s| self.servers[*s].host.copy == Some(Held::No) && !self.servers[*s].host.fenced)
            .collect();
        let [at] = running[..] else { return Some(format!("the service runs at {} servers", running.len())) };
        if !self.servers[at].host.v || self.servers[1 - at].host.v {
            return Some("the address is not where the service runs, or not there alone".into());
        }
        let network = if at == 0 { "net1" } else { "net2" };
        for (g, gateway) in self.gateways.iter().enumerate() {
            for user in self.controller.users_of(g) {
                let found = gateway.network_of(&user);
                if found != Some(network) {
                    return Some(format!("{user} is on {found:?}, the service on {network}"));
                }
            }
        }
        None
    }

    /// What is not at rest, in words.
    pub(crate) fn unrest(&self) -> String {
        let sessions: Vec<String> = self
            .controller
            .world
            .sessions
            .values()
            .filter(|s| !s.outstanding().is_empty())
            .map(|s| format!("{} {:?}", s.plan.id, s.state))
            .collect();
        format!("sessions {sessions:?}")
    }

    /// After healing, when nothing is under way any more.
    pub(crate) fn check_rest(&mut self) {
        if let Some(what) = self.disagreement() {
            self.violated(|| format!("after healing {what}"));
        }
        let mut left = Vec::new();
        for (s, server) in self.servers.iter().enumerate() {
            let who = Node::Server(s);
            if server.host.fenced || server.host.blackhole {
                left.push(format!("a fence or a blackhole route at {who}"));
            }
            if server.host.copy.is_some_and(|held| held != Held::No) {
                left.push(format!("a copy that stands still at {who}"));
            }
            let open = server.records.iter().filter(|(_, r)| r.recovery() != Recovery::Nothing);
            left.extend(open.map(|(id, r)| format!("{id} at {who}: {r:?}")));
        }
        for (g, gateway) in self.gateways.iter().enumerate() {
            left.extend(gateway.table.switches().map(|s| format!("gw{g}: {} {}", s.migration, s.state)));
        }
        for session in self.controller.world.sessions.values() {
            if matches!(session.state.outcome(), Outcome::Running | Outcome::NeedsOperator) {
                left.push(format!("session {} {:?}", session.plan.id, session.state));
            }
        }
        let world = &self.controller.world;
        if let Some(place) = world.services.get("film") {
            let at = usize::from(place.site == "backup");
            if self.servers[at].host.copy != Some(Held::No) {
                left.push(format!("the journal says site {}, where the service does not run", place.site));
            }
        }
        if !left.is_empty() {
            self.violated(|| format!("left after healing: {}", left.join("; ")));
        }
    }
}
