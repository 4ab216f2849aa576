//! The table as it is kept on disk, and how it comes back from there: validated, because a file may be anybody's, and
//! reconciled with what the maps say, because they are what frames were decided by while no daemon was there.

use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use gateway_ebpf::{NETWORKS, Network, Router, SWITCHES, SwitchWord, UserWord, words::Selector};
use handover_api::users;
use serde::{Deserialize, Serialize};

use super::{
    ACCESS_PORT, Ended, HoldFigures, Indices, NetworkSpec, NetworkState, State, Switch, SwitchAnswer, Table,
    UserSpec, UserState, Write,
};
use crate::mac::Mac;

/// A field that is not written when it says nothing; files of earlier daemons have none of those.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

const fn access_port() -> u16 {
    ACCESS_PORT
}

/// Everything that outlives the daemon. Indices that are free are not in it: those that are not used are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    revision: u64,
    generation: u64,
    networks: BTreeMap<String, NetworkRecord>,
    users: BTreeMap<String, UserRecord>,
    switches: BTreeMap<String, SwitchRecord>,
    /// Oldest first.
    past: Vec<PastRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkRecord {
    index: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vid: Option<u16>,
    #[serde(default, skip_serializing_if = "is_default")]
    service: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pcp: Option<u8>,
    #[serde(default, skip_serializing_if = "is_default")]
    port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    address: Option<Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    address6: Option<Ipv6Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    router_mac: Option<Mac>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    learned: Option<Mac>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UserRecord {
    slot: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mac: Option<Mac>,
    #[serde(default = "access_port")]
    port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tag: Option<u16>,
    #[serde(default, skip_serializing_if = "is_default")]
    guard: bool,
    addresses: Vec<IpAddr>,
    network: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SwitchRecord {
    index: u16,
    generation: u64,
    from: String,
    to: String,
    users: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    switched: Option<SwitchAnswer>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PastRecord {
    migration: String,
    ended: EndedRecord,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
enum EndedRecord {
    Aborted {
        was_switched: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        held: Option<HoldFigures>,
    },
    Finished {
        index: u16,
        generation: u64,
        answer: SwitchAnswer,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        held: Option<HoldFigures>,
    },
}

impl Snapshot {
    /// The migrations whose switches are staged or made, and not ended.
    pub fn under_way(&self) -> Vec<String> {
        self.switches.keys().map(|migration| format!("`{migration}`")).collect()
    }

    /// Says where users and networks are, for interfaces with other numbers.
    pub fn move_ports(&mut self, port_now: impl Fn(u16) -> u16) {
        for port in self.users.values_mut().map(|u| &mut u.port) {
            *port = port_now(*port);
        }
        for port in self.networks.values_mut().map(|n| &mut n.port) {
            *port = port_now(*port);
        }
    }
}

/// Why a snapshot cannot be the state of a table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the message names")]
pub enum SnapshotError {
    /// More users than configured for.
    #[error("it has {users} users, but max_users = {limit}: raise `max_users`")]
    Users { users: usize, limit: u32 },
    /// An index out of range or of two owners.
    #[error("{what} `{name}`: index {index} is out of range or another one's")]
    Index { what: &'static str, name: String, index: u32 },
    /// Something that is not in it.
    #[error("{what} `{name}` names {of} `{missing}`, which is not in it")]
    Missing { what: &'static str, name: String, of: &'static str, missing: String },
    /// A value of two owners.
    #[error("{what} {value} belongs to two, one of them `{name}`")]
    Twice { what: &'static str, value: String, name: String },
    /// A switch whose user is elsewhere or in another.
    #[error(
        "migration `{migration}`: user `{user}` is on another network than it turns away from, or in two switches"
    )]
    Staged { migration: String, user: String },
    /// A user without an address.
    #[error("user `{0}` has no address")]
    NoAddress(String),
}

/// Takes each index at most once.
struct Used {
    what: &'static str,
    end: u32,
    seen: HashSet<u32>,
}

impl Used {
    fn new(what: &'static str, end: u32) -> Self {
        Self { what, end, seen: HashSet::new() }
    }

    fn take(&mut self, index: u32, name: &str) -> Result<(), SnapshotError> {
        if (1..self.end).contains(&index) && self.seen.insert(index) {
            return Ok(());
        }
        Err(SnapshotError::Index { what: self.what, name: name.into(), index })
    }

    /// Those that are not used are free: between two daemons there is a grace period.
    fn indices(self) -> Indices {
        let next = self.seen.iter().max().map_or(1, |last| last + 1);
        let free = (1..next).rev().filter(|index| !self.seen.contains(index)).collect();
        Indices { next, end: self.end, free }
    }
}

impl Table {
    /// Everything that outlives the daemon. A migration that is being staged is not in it: nothing of it is in the maps.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            revision: self.revision,
            generation: self.generation,
            networks: self
                .networks
                .iter()
                .map(|(name, n)| {
                    let record = NetworkRecord {
                        index: n.index,
                        vid: n.spec.vid,
                        service: n.spec.service,
                        pcp: n.spec.pcp,
                        port: n.spec.port,
                        address: n.spec.address,
                        address6: n.spec.address6,
                        router_mac: n.spec.router_mac,
                        learned: n.learned,
                    };
                    (name.to_string(), record)
                })
                .collect(),
            users: self
                .users
                .iter()
                .map(|(name, u)| {
                    let record = UserRecord {
                        slot: u.slot,
                        mac: u.spec.mac,
                        port: u.spec.port,
                        tag: u.spec.tag,
                        guard: u.spec.guard,
                        addresses: u.spec.addresses.clone(),
                        network: u.network.to_string(),
                    };
                    (name.to_string(), record)
                })
                .collect(),
            switches: self
                .switches
                .iter()
                .filter_map(|(migration, s)| {
                    let switched = match s.state {
                        State::Staging => return None,
                        State::Staged => None,
                        State::Switched(answer) => Some(answer),
                    };
                    let record = SwitchRecord {
                        index: s.index,
                        generation: s.generation,
                        from: s.from.to_string(),
                        to: s.to.to_string(),
                        users: s.users.iter().map(ToString::to_string).collect(),
                        switched,
                    };
                    Some((migration.to_string(), record))
                })
                .collect(),
            past: self
                .past_order
                .iter()
                .filter_map(|migration| {
                    let ended = match *self.past.get(migration)? {
                        Ended::Aborted { was_switched, held } => EndedRecord::Aborted { was_switched, held },
                        Ended::Finished { index, generation, answer, held } => {
                            EndedRecord::Finished { index, generation, answer, held }
                        }
                    };
                    Some(PastRecord { migration: migration.to_string(), ended })
                })
                .collect(),
        }
    }

    /// The table that gave `snapshot`. With `renumber` (maps that are empty) the users' slots are given anew, so that it
    /// fits another number of users.
    ///
    /// # Errors
    /// [`SnapshotError`]; then the file was not made by this daemon, or was changed since.
    pub fn restore(snapshot: &Snapshot, max_users: u32, renumber: bool) -> Result<Self, SnapshotError> {
        if snapshot.users.len() > max_users as usize {
            return Err(SnapshotError::Users { users: snapshot.users.len(), limit: max_users });
        }
        let mut table = Self::new(max_users);
        table.revision = snapshot.revision;
        table.generation = snapshot.generation;

        let mut used = Used::new("network", NETWORKS);
        let mut vids = HashSet::new();
        for (name, n) in &snapshot.networks {
            used.take(n.index.into(), name)?;
            let spec = NetworkSpec {
                vid: n.vid,
                service: n.service,
                pcp: n.pcp,
                port: n.port,
                address: n.address,
                address6: n.address6,
                router_mac: n.router_mac,
            };
            if !vids.insert(spec.tag()) {
                return Err(SnapshotError::Twice { what: "VID", value: spec.tag_text(), name: name.clone() });
            }
            let state = NetworkState { index: n.index, spec, learned: n.learned, changes: 0 };
            table.networks.insert(name.as_str().into(), state);
        }
        table.network_indices = used.indices();

        let (mut keys, mut addresses) = (HashSet::new(), HashSet::new());
        for (name, u) in &snapshot.users {
            let slot = if renumber {
                table.slots.take(u.mac)
            } else {
                Some(u.slot).filter(|s| table.slots.claim(*s))
            };
            let slot =
                slot.ok_or_else(|| SnapshotError::Index { what: "user", name: name.clone(), index: u.slot })?;
            let twice = |what, value| SnapshotError::Twice { what, value, name: name.clone() };
            let spec = UserSpec {
                mac: u.mac,
                port: u.port,
                tag: u.tag,
                guard: u.guard,
                addresses: u.addresses.clone(),
            };
            if !keys.insert(match u.mac {
                Some(mac) => (Some(mac), 0, None),
                None => (None, u.port, u.tag),
            }) {
                let value = u.mac.map_or_else(|| "of a tag or an interface".into(), |mac| mac.to_string());
                return Err(twice("MAC address", value));
            }
            if let Some(address) = spec.all_addresses().find(|a| !addresses.insert(*a)) {
                return Err(twice("address", address.to_string()));
            }
            if u.addresses.is_empty() {
                return Err(SnapshotError::NoAddress(name.clone()));
            }
            let network = table.known_network("user", name, &u.network)?;
            table.users.insert(name.as_str().into(), UserState { slot, spec, network, staged_by: None });
        }

        let mut used = Used::new("migration", SWITCHES);
        for (migration, s) in &snapshot.switches {
            used.take(s.index.into(), migration)?;
            let from = table.known_network("migration", migration, &s.from)?;
            let to = table.known_network("migration", migration, &s.to)?;
            let migration: Arc<str> = migration.as_str().into();
            let mut users = Vec::with_capacity(s.users.len());
            for name in &s.users {
                let Some((name, _)) = table.users.get_key_value(name.as_str()) else {
                    return Err(SnapshotError::Missing {
                        what: "migration",
                        name: migration.to_string(),
                        of: "user",
                        missing: name.clone(),
                    });
                };
                let name = Arc::clone(name);
                match table.users.get_mut(&name) {
                    Some(user) if user.staged_by.is_none() && user.network == from => {
                        user.staged_by = Some(Arc::clone(&migration));
                    }
                    _ => {
                        let (migration, user) = (migration.to_string(), name.to_string());
                        return Err(SnapshotError::Staged { migration, user });
                    }
                }
                users.push(name);
            }
            users.sort_unstable();
            let state = s.switched.map_or(State::Staged, State::Switched);
            let digest = users::digest(&users);
            let (index, generation) = (s.index, s.generation);
            // what is held is known to the maps: they tell (`adopt`), or it is gone with them
            let switch = Switch { index, generation, from, to, users, digest, state, hold: None };
            table.generation = table.generation.max(s.generation);
            table.switches.insert(migration, switch);
        }
        table.switch_indices = used.indices();

        for past in &snapshot.past {
            let ended = match past.ended {
                EndedRecord::Aborted { was_switched, held } => Ended::Aborted { was_switched, held },
                EndedRecord::Finished { index, generation, answer, held } => {
                    Ended::Finished { index, generation, answer, held }
                }
            };
            table.remember(&past.migration, ended);
        }
        Ok(table)
    }

    fn known_network(
        &self,
        what: &'static str,
        name: &str,
        network: &str,
    ) -> Result<Arc<str>, SnapshotError> {
        match self.networks.get_key_value(network) {
            Some((network, _)) => Ok(Arc::clone(network)),
            None => Err(SnapshotError::Missing {
                what,
                name: name.into(),
                of: "network",
                missing: network.into(),
            }),
        }
    }

    /// Takes over from the maps what happened after the last snapshot: stores of switches, told by their generation, holds
    /// (with the address that `switch` tells third), and routers that were heard. Answers with the migrations that turn out to be switched.
    pub fn adopt(
        &mut self,
        switch: impl Fn(u16) -> (SwitchWord, SwitchAnswer, Ipv4Addr),
        network: impl Fn(u16) -> Network,
    ) -> Vec<Arc<str>> {
        let mut found = Vec::new();
        for (migration, s) in &mut self.switches {
            let (word, answer, held) = switch(s.index);
            let made = word.selector() == Selector::B
                && word.same_generation(SwitchWord::forward(Selector::B, s.generation));
            if made && s.state == State::Staged {
                s.state = State::Switched(answer);
                found.push(Arc::clone(migration));
            }
            s.adopt_hold(word, held);
        }
        for n in self.networks.values_mut() {
            let words = network(n.index);
            let same = words.link == n.spec.link().0
                && words.address == n.spec.address.map_or(0, |a| Write::address_word(a).into())
                && words.address6 == n.spec.address6.map_or([0, 0], Write::address6_words);
            if same
                && n.spec.router_mac.is_none()
                && let Some(mac) = Router(words.router).mac()
            {
                n.learned = Some(Mac::from_word(mac));
            }
        }
        found
    }

    /// All that the maps have to hold, in an order that is safe while frames flow.
    pub fn contents(&self) -> Vec<Write> {
        let mut writes = Vec::new();
        for n in self.networks.values() {
            writes.extend(n.writes());
        }
        for s in self.switches.values() {
            if s.state != State::Staging {
                writes.push(Write::Switch { index: s.index, word: s.word() });
            }
        }
        for u in self.users.values() {
            let slot = u.slot;
            let staged = u.staged_by.as_ref().and_then(|by| self.switches.get(by));
            let word = match staged {
                Some(s) if s.state != State::Staging => UserWord::staged(
                    self.networks[&s.from].index,
                    self.networks[&s.to].index,
                    s.index,
                    s.generation,
                ),
                _ => UserWord::resting(self.networks[&u.network].index),
            };
            writes.push(Write::UserWord { slot, word });
            writes.extend(u.writes());
        }
        writes
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends there")]

    use super::*;

    #[test]
    fn what_the_first_format_said_still_means_the_same() {
        let text = r#"{"revision": 3, "generation": 1,
            "networks": {"net1": {"index": 1, "vid": 7, "address": "10.1.0.1", "learned": "02:00:00:00:0a:01"}},
            "users": {"taro": {"slot": 2, "mac": "02:00:00:00:01:01", "addresses": ["10.1.0.100"], "network": "net1"}},
            "switches": {}, "past": []}"#;
        let table = Table::restore(&serde_json::from_str(text).unwrap(), 4, false).unwrap();
        let network = table.networks().next().unwrap();
        assert_eq!(
            (network.spec.tag(), network.spec.port, network.spec.address6),
            (7, super::super::WAN_PORT, None)
        );
        let user = table.users().next().unwrap().spec.clone();
        assert_eq!((user.mac, user.port, user.tag), (Some(Mac([2, 0, 0, 0, 1, 1])), ACCESS_PORT, None));
        // and a file of this daemon says no more than it has to
        let again: serde_json::Value = serde_json::to_value(table.snapshot()).unwrap();
        assert_eq!(again["networks"]["net1"].get("service"), None);
    }
}
