//! Who is on which network, and which switches are under way: the state machine of connection control. Pure: it decides,
//! and answers with the [`Write`]s that make the maps say so; it does no I/O and reads no clock.
//!
//! ```text
//!             stage                written, all runs see it      switch (the store)
//!   (none) ----------> Staging ------------------------> Staged -----------------> Switched --finish--> past: finished
//!                         |                                 |                          |
//!                         +------------- abort -------------+---------- abort ---------+------------> past: aborted
//! ```
//!
//! What a call of the controller gets, by the state of its migration (`=`: the answer it got before, nothing is done):
//!
//! |            | none        | Staging  | Staged   | Switched | past: aborted | past: finished |
//! |------------|-------------|----------|----------|----------|---------------|----------------|
//! | stage      | go on       | go on    | =        | =        | refused       | refused        |
//! | switch     | refused     | refused  | store    | =        | refused       | =              |
//! | abort      | ok, noted   | unstaged | unstaged | put back | =             | refused        |
//! | finish     | ok          | refused  | refused  | finished | refused       | =              |
//!
//! Stage and switch are compared with what was staged (users, networks, switch, generation) and refused if they differ. An
//! abort is noted even if nothing was staged, so that a stage that arrives after it, late, is refused. What is past is
//! kept for the last [`PAST_MAX`] migrations.
//!
//! Between stage and the end of a switch its users' frames may be held: [`hold`].
//!
//! Invariants:
//! - a user is in at most one switch; a switch holds users of one network only;
//! - what is given as a [`Snapshot`] and restored from it answers every call as before; only what was being staged is not
//!   in it, as if staging had not begun;
//! - slots, switches and network indices that words in the maps may still name are handed to the caller as [`Retired`] and
//!   used again only after it gives them back, which it does after a grace period;
//! - `Configure` neither removes nor changes a user or network of a switch, and never moves a user.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use gateway_ebpf::{
    Link, NETWORKS, Router, SWITCHES, SwitchWord, User, UserWord,
    frame::{ip_word, ip6_words},
    home::{GROUP, groups_for},
    words::{Phase, Selector},
};

use handover_api::users::{self, DIGEST_LEN};

pub use crate::desired::{ACCESS_PORT, WAN_PORT};
use crate::{
    desired::{Desired, NetworkSpec, UserSpec},
    groups::{Hearer, Hearers, HearersByNetwork},
    introduce::{Asker, Place},
    mac::Mac,
};

/// How many ended migrations are remembered.
pub const PAST_MAX: usize = 4096;

/// One change of a map. Lists of them are carried out in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the map's")]
pub enum Write {
    /// `USER[slot].word`
    UserWord { slot: u32, word: UserWord },
    /// `USER[slot].identity`
    UserIdentity { slot: u32, identity: u64 },
    /// `USER[slot].access`
    UserAccess { slot: u32, known_by: KnownBy, guard: bool },
    /// `USER_INDEX`, and `USER_BY_MAC` if the user is known by a MAC
    AddUser { known_by: KnownBy, slot: u32 },
    /// The inverse.
    RemoveUser { known_by: KnownBy },
    /// `USER_BY_IP` or `USER_BY_IP6`
    AddAddress { address: IpAddr, slot: u32 },
    /// The inverse.
    RemoveAddress { address: IpAddr },
    /// `SWITCH[index]`
    Switch { index: u16, word: SwitchWord },
    /// `NETWORK[index].router`
    NetworkRouter { index: u16, router: Router },
    /// `NETWORK[index].link`
    NetworkLink { index: u16, link: Link },
    /// `NETWORK[index].address`, `address6` and `ifindex`
    NetworkAddress { index: u16, address: Option<Ipv4Addr>, address6: Option<Ipv6Addr>, port: u16 },
    /// `NETWORK_BY_VID[tag]`
    Vid { tag: u16, index: u16 },
}

/// What a user's frames are known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownBy {
    /// The source MAC; `None`: any.
    pub mac: Option<Mac>,
    /// The port of the access interface.
    pub port: u16,
    /// VID of the access side's tag; 0: none.
    pub tag: u16,
}

/// Indices that words in the maps may still name.
#[derive(Debug, Default, PartialEq, Eq)]
#[must_use = "indices that are not given back are lost"]
pub struct Retired {
    slots: Vec<u32>,
    networks: Vec<u32>,
    switches: Vec<u32>,
}

impl Retired {
    /// Whether there is nothing to wait for.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.networks.is_empty() && self.switches.is_empty()
    }
}

/// Why the table refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the message names")]
pub enum Refusal {
    /// An old state of the inventory.
    #[error("revision {revision} is older than revision {accepted}, which this gateway already has")]
    OldRevision { revision: u64, accepted: u64 },
    /// A user or network that a switch needs.
    #[error("{what} `{name}` {would}, but migration `{migration}` has it staged: finish or abort that first")]
    InUse { what: &'static str, name: String, would: &'static str, migration: String },
    /// More users than configured for.
    #[error("{wanted} users, but this gateway is configured for {limit}: raise `max_users` and restart it")]
    Users { wanted: usize, limit: u32 },
    /// No index left.
    #[error("no room for another {0}: finish or abort what is under way, or try again")]
    Room(&'static str),
    /// Nobody in particular.
    #[error("migration `{0}` names no user to switch")]
    NoUsers(String),
    /// Named twice in one request.
    #[error("user `{0}` is named twice")]
    UserTwice(String),
    /// Not in the inventory.
    #[error("there is no user `{0}` at this gateway: apply the inventory first")]
    UnknownUser(String),
    /// Not in the inventory.
    #[error("there is no network `{0}` at this gateway: apply the inventory first")]
    UnknownNetwork(String),
    /// From here to here.
    #[error("from and to are both network `{0}`")]
    SameNetwork(String),
    /// Somewhere else.
    #[error("user `{user}` is on network `{on}`, not on `{from}`")]
    Elsewhere { user: String, on: String, from: String },
    /// In another switch.
    #[error("user `{user}` is staged by migration `{by}`: finish or abort that first")]
    StagedByOther { user: String, by: String },
    /// The users would lose their router.
    #[error(
        "the router is {from_address} in network `{from}`, but {to_address} in `{to}`: a user's router must have one address"
    )]
    OtherRouter { from: String, from_address: String, to: String, to_address: String },
    /// The same migration, but other users or networks.
    #[error("migration `{migration}` is staged here with other {what}: abort it first")]
    Differs { migration: String, what: &'static str },
    /// Never staged, or the gateway was restarted since.
    #[error("migration `{0}` has nothing staged here")]
    NotStaged(String),
    /// Staging is not over.
    #[error("migration `{0}` is still being staged")]
    StillStaging(String),
    /// Not switched.
    #[error("migration `{0}` is staged, but not switched: switch or abort it")]
    NotSwitched(String),
    /// Too late to hold.
    #[error("migration `{0}` is switched: its users' frames can only be held before that")]
    Switched(String),
    /// On the way out already.
    #[error(
        "migration `{0}` is being ended here the other way, what was held is being released: ask for that again"
    )]
    Releasing(String),
    /// Frames are held.
    #[error("migration `{0}` holds frames that are not released yet")]
    NotReleased(String),
    /// Was aborted.
    #[error("migration `{0}` was aborted here")]
    Aborted(String),
    /// Was finished.
    #[error("migration `{0}` is finished here: its users are on the new network for good")]
    Finished(String),
}

/// What a stage was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageAnswer {
    /// The switch.
    pub switch: u16,
    /// Its generation.
    pub generation: u64,
    /// Index of the new network.
    pub to: u16,
}

/// What a switch was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchAnswer {
    /// Store -> last frame under the old network.
    pub window_ns: u64,
    /// Call -> store.
    pub store_latency_ns: u64,
}

/// How staging goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StageStep {
    /// Introduce these users in the new network, then [`Table::stage_write`].
    Introduce {
        /// The new network.
        network: Asked,
        /// As whom to ask.
        users: Vec<Asker>,
    },
    /// Was staged before.
    Done(StageAnswer),
}

/// A network as the introduction needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Name.
    pub name: Arc<str>,
    /// Index.
    pub index: u16,
    /// What is known of it.
    pub spec: NetworkSpec,
    /// The router's MAC as learned before.
    pub learned: Option<Mac>,
}

/// How a switch goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SwitchStep {
    /// Make the store, then [`Table::switched`].
    Store {
        /// Index into `SWITCH`.
        index: u16,
        /// What to store.
        word: SwitchWord,
    },
    /// Was switched before.
    Done(SwitchAnswer),
}

/// How an abort goes on.
#[derive(Debug, PartialEq, Eq)]
pub struct AbortStep {
    /// To carry out; the first is the store back.
    pub writes: Vec<Write>,
    /// To give back after a grace period.
    pub retired: Retired,
    /// The users were on the new network.
    pub was_switched: bool,
}

/// A switch as `Status` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwitchView<'a> {
    /// Index into `SWITCH`.
    pub index: u16,
    /// The migration.
    pub migration: &'a str,
    /// Its generation.
    pub generation: u64,
    /// "staging", "staged" or "switched".
    pub state: &'static str,
    /// The old network.
    pub from: &'a str,
    /// The new one.
    pub to: &'a str,
    /// How many users.
    pub users: usize,
    /// The window of its store, if that was made.
    pub window_ns: Option<u64>,
    /// "forward", "hold" or "drain".
    pub phase: &'static str,
}

/// What a router's word brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Learned {
    /// The router's MAC before.
    pub before: Option<Mac>,
    /// To carry out, if it is another now.
    pub write: Option<Write>,
}

/// A network as `Status` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetworkView<'a> {
    /// Name.
    pub name: &'a str,
    /// What is declared of it.
    pub spec: &'a NetworkSpec,
    /// The router's MAC, declared or learned.
    pub router: Option<Mac>,
    /// How often the router turned out to have another MAC than before.
    pub changes: u64,
}

/// A user as `Status` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserView<'a> {
    /// Name.
    pub name: &'a str,
    /// What is known of the user.
    pub spec: &'a UserSpec,
    /// The network the user's frames go to now.
    pub network: &'a str,
    /// The migration the user is staged by.
    pub staged_by: Option<&'a str>,
}

/// Numbers from 1 up, some given back.
#[derive(Debug, Clone)]
struct Indices {
    next: u32,
    end: u32,
    free: Vec<u32>,
}

impl Indices {
    const fn new(end: u32) -> Self {
        Self { next: 1, end, free: Vec::new() }
    }

    fn take(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            (self.next < self.end).then(|| {
                self.next += 1;
                self.next - 1
            })
        })
    }
}

#[derive(Debug, Clone)]
struct NetworkState {
    index: u16,
    spec: NetworkSpec,
    learned: Option<Mac>,
    /// How often the router turned out to have another MAC than before.
    changes: u64,
}

impl NetworkState {
    /// Everything about it, in an order that is safe while frames flow.
    fn writes(&self) -> [Write; 4] {
        let (index, spec) = (self.index, &self.spec);
        [
            Write::NetworkRouter { index, router: self.router_word() },
            Write::NetworkAddress { index, address: spec.address, address6: spec.address6, port: spec.port },
            Write::NetworkLink { index, link: spec.link() },
            Write::Vid { tag: spec.tag(), index },
        ]
    }

    fn router(&self) -> Option<Mac> {
        self.spec.router_mac.or(self.learned)
    }

    fn router_word(&self) -> Router {
        self.router().map_or(Router::UNKNOWN, |mac| Router::at(mac.word()))
    }
}

#[derive(Debug, Clone)]
struct UserState {
    slot: u32,
    spec: UserSpec,
    network: Arc<str>,
    staged_by: Option<Arc<str>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Staging,
    Staged,
    Switched(SwitchAnswer),
}

#[derive(Debug, Clone)]
struct Switch {
    index: u16,
    generation: u64,
    from: Arc<str>,
    to: Arc<str>,
    /// Sorted.
    users: Vec<Arc<str>>,
    /// Of their names.
    digest: [u8; DIGEST_LEN],
    state: State,
    hold: Option<HoldState>,
}

/// How a switch names its users again.
#[derive(Debug, Clone, Copy)]
pub enum Named<'a> {
    /// All of them, in any order.
    Users(&'a [String]),
    /// By [`handover_api::users::digest`].
    Digest(&'a [u8]),
}

impl<'a> From<&'a Vec<String>> for Named<'a> {
    fn from(users: &'a Vec<String>) -> Self {
        Self::Users(users)
    }
}

#[derive(Debug, Clone, Copy)]
enum Ended {
    Aborted { was_switched: bool, held: Option<HoldFigures> },
    Finished { index: u16, generation: u64, answer: SwitchAnswer, held: Option<HoldFigures> },
}

/// The state.
#[derive(Debug, Clone)]
pub struct Table {
    max_users: u32,
    revision: u64,
    generation: u64,
    /// Counts changes of who hears which network.
    hearing: u64,
    networks: BTreeMap<Arc<str>, NetworkState>,
    users: BTreeMap<Arc<str>, UserState>,
    switches: BTreeMap<Arc<str>, Switch>,
    past: HashMap<Arc<str>, Ended>,
    past_order: VecDeque<Arc<str>>,
    slots: Slots,
    network_indices: Indices,
    switch_indices: Indices,
}

/// Slots of `USER` that `max_users` users need. Slot 0 is no user's.
pub const fn slots_for(max_users: u32) -> u32 {
    groups_for(max_users) * GROUP
}

impl Table {
    /// Knows nothing yet.
    pub fn new(max_users: u32) -> Self {
        Self {
            max_users,
            revision: 0,
            generation: 0,
            hearing: 0,
            networks: BTreeMap::new(),
            users: BTreeMap::new(),
            switches: BTreeMap::new(),
            past: HashMap::new(),
            past_order: VecDeque::new(),
            slots: Slots::new(max_users),
            network_indices: Indices::new(NETWORKS),
            switch_indices: Indices::new(SWITCHES),
        }
    }

    /// Last accepted revision; 0: never configured.
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// Takes over what the controller wants. The caller carries the writes out on the maps, or, if that fails, drops the
    /// new table and tries again.
    ///
    /// # Errors
    /// [`Refusal`]; nothing is changed then.
    pub fn configured(&self, desired: &Desired) -> Result<(Self, Vec<Write>, Retired), Refusal> {
        if desired.revision < self.revision {
            return Err(Refusal::OldRevision { revision: desired.revision, accepted: self.revision });
        }
        if desired.users.len() > self.max_users as usize {
            return Err(Refusal::Users { wanted: desired.users.len(), limit: self.max_users });
        }
        self.keep_what_is_staged(desired)?;

        let mut next = self.clone();
        next.revision = desired.revision;
        next.hearing += 1;
        let mut retired = Retired::default();
        // first everything that takes something away, so that nothing is given twice on the way
        let mut removals = Vec::new();
        let mut additions = Vec::new();

        next.networks.retain(|name, network| {
            let keep = desired.networks.contains_key(name);
            if !keep {
                removals.push(Write::Vid { tag: network.spec.tag(), index: 0 });
                removals.push(Write::NetworkLink { index: network.index, link: Link::NONE });
                retired.networks.push(network.index.into());
            }
            keep
        });
        for (name, spec) in &desired.networks {
            match next.networks.get_mut(name) {
                Some(network) if network.spec == *spec => continue,
                Some(network) => {
                    let was = &network.spec;
                    removals.push(Write::Vid { tag: was.tag(), index: 0 });
                    if (was.tag(), was.port, was.address, was.address6)
                        != (spec.tag(), spec.port, spec.address, spec.address6)
                    {
                        network.learned = None;
                    }
                    network.spec = spec.clone();
                }
                None => {
                    let index = next.network_indices.take().ok_or(Refusal::Room("network"))? as u16;
                    let state = NetworkState { index, spec: spec.clone(), learned: None, changes: 0 };
                    next.networks.insert(Arc::clone(name), state);
                }
            }
            additions.extend(next.networks[name].writes());
        }

        next.users.retain(|name, user| {
            let keep = desired.users.contains_key(name);
            if !keep {
                removals.extend(user.removal());
                retired.slots.push(user.slot);
            }
            keep
        });
        for (name, (spec, network)) in &desired.users {
            match next.users.get_mut(name) {
                Some(user) => {
                    if !next.networks.contains_key(&user.network) {
                        // the network the user was on is gone: the one declared, then
                        user.network = Arc::clone(network);
                        let word = UserWord::resting(next.networks[network].index);
                        additions.push(Write::UserWord { slot: user.slot, word });
                    }
                    if user.spec == *spec {
                        continue;
                    }
                    if user.spec.known_by() == spec.known_by() {
                        // found all the time
                        removals.extend(user.addresses_removal());
                        user.spec = spec.clone();
                        additions.push(user.access_write());
                        additions.extend(user.addresses_writes());
                        continue;
                    }
                    // found by something else from now on: somewhere else, so that no entry is ever half another's
                    removals.extend(user.removal());
                    retired.slots.push(user.slot);
                    user.slot = next.slots.take(spec.mac).ok_or(Refusal::Room("user"))?;
                    user.spec = spec.clone();
                    let word = UserWord::resting(next.networks[&user.network].index);
                    additions.push(Write::UserWord { slot: user.slot, word });
                }
                None => {
                    let slot = next.slots.take(spec.mac).ok_or(Refusal::Room("user"))?;
                    let state =
                        UserState { slot, spec: spec.clone(), network: Arc::clone(network), staged_by: None };
                    next.users.insert(Arc::clone(name), state);
                    let word = UserWord::resting(next.networks[network].index);
                    additions.push(Write::UserWord { slot, word });
                }
            }
            additions.extend(next.users[name].writes());
        }

        removals.extend(additions);
        Ok((next, removals, retired))
    }

    fn keep_what_is_staged(&self, desired: &Desired) -> Result<(), Refusal> {
        for (migration, switch) in &self.switches {
            let refuse = |what, name: &str, gone| {
                let would = if gone { "would be removed" } else { "would be changed" };
                Err(Refusal::InUse { what, name: name.into(), would, migration: migration.to_string() })
            };
            for name in [&switch.from, &switch.to] {
                match desired.networks.get(name) {
                    Some(spec) if *spec == self.networks[name].spec => {}
                    changed => return refuse("network", name, changed.is_none()),
                }
            }
            for name in &switch.users {
                match desired.users.get(name) {
                    Some((spec, _)) if *spec == self.users[name].spec => {}
                    changed => return refuse("user", name, changed.is_none()),
                }
            }
        }
        Ok(())
    }

    /// Gives indices back, after a grace period.
    pub fn reuse(&mut self, retired: Retired) {
        self.slots.give_back(retired.slots);
        self.network_indices.free.extend(retired.networks);
        self.switch_indices.free.extend(retired.switches);
    }

    /// Everything that speaks against staging this.
    pub fn check(&self, migration: &str, users: &[String], from: &str, to: &str) -> Vec<Refusal> {
        let mut found = Vec::new();
        match self.past.get(migration) {
            Some(Ended::Aborted { .. }) => found.push(Refusal::Aborted(migration.into())),
            Some(Ended::Finished { .. }) => found.push(Refusal::Finished(migration.into())),
            None => {}
        }
        if users.is_empty() {
            found.push(Refusal::NoUsers(migration.into()));
        }
        for name in [from, to] {
            if !self.networks.contains_key(name) {
                found.push(Refusal::UnknownNetwork(name.into()));
            }
        }
        if from == to {
            found.push(Refusal::SameNetwork(to.into()));
        }
        if let (Some(a), Some(b)) = (self.networks.get(from), self.networks.get(to))
            && (a.spec.address, a.spec.address6) != (b.spec.address, b.spec.address6)
        {
            found.push(Refusal::OtherRouter {
                from: from.into(),
                from_address: a.spec.addresses_text(),
                to: to.into(),
                to_address: b.spec.addresses_text(),
            });
        }
        let mut sorted: Vec<&str> = users.iter().map(String::as_str).collect();
        sorted.sort_unstable();
        for pair in sorted.windows(2) {
            if pair[0] == pair[1] {
                found.push(Refusal::UserTwice(pair[0].into()));
            }
        }
        sorted.dedup();
        for name in sorted {
            match self.users.get(name) {
                None => found.push(Refusal::UnknownUser(name.into())),
                Some(user) => match &user.staged_by {
                    Some(by) if **by != *migration => {
                        found.push(Refusal::StagedByOther { user: name.into(), by: by.to_string() });
                    }
                    Some(_) => {}
                    None if *user.network != *from => found.push(Refusal::Elsewhere {
                        user: name.into(),
                        on: user.network.to_string(),
                        from: from.into(),
                    }),
                    None => {}
                },
            }
        }
        found
    }

    /// Begins staging: reserves the users and a switch. Nothing of it is in the maps yet.
    ///
    /// # Errors
    /// The first [`Refusal`] of [`Table::check`]; nothing is changed then.
    pub fn stage_begin(
        &mut self,
        migration: &str,
        users: &[String],
        from: &str,
        to: &str,
    ) -> Result<StageStep, Refusal> {
        if let Some(switch) = self.switches.get(migration) {
            let differs = |what| Err(Refusal::Differs { migration: migration.into(), what });
            if (&*switch.from, &*switch.to) != (from, to) {
                return differs("networks");
            }
            if !same_users(&switch.users, users) {
                return differs("users");
            }
            return Ok(match switch.state {
                State::Staging => self.introduction(switch),
                State::Staged | State::Switched(_) => StageStep::Done(self.stage_answer(switch)),
            });
        }
        if let Some(refusal) = self.check(migration, users, from, to).into_iter().next() {
            return Err(refusal);
        }
        let key = |name: &str| {
            let (key, _) = self.networks.get_key_value(name)?;
            Some(Arc::clone(key))
        };
        let from = key(from).ok_or_else(|| Refusal::UnknownNetwork(from.into()))?;
        let to = key(to).ok_or_else(|| Refusal::UnknownNetwork(to.into()))?;
        let index = self.switch_indices.take().ok_or(Refusal::Room("switch"))? as u16;
        let migration: Arc<str> = migration.into();
        let mut staged = Vec::with_capacity(users.len());
        for name in users {
            if let Some(user) = self.users.get_mut(name.as_str()) {
                user.staged_by = Some(Arc::clone(&migration));
            }
            if let Some((name, _)) = self.users.get_key_value(name.as_str()) {
                staged.push(Arc::clone(name));
            }
        }
        staged.sort_unstable();
        self.generation += 1;
        let digest = users::digest(&staged);
        let switch = Switch {
            index,
            generation: self.generation,
            from,
            to,
            users: staged,
            digest,
            state: State::Staging,
            hold: None,
        };
        let step = self.introduction(&switch);
        self.switches.insert(migration, switch);
        Ok(step)
    }

    fn introduction(&self, switch: &Switch) -> StageStep {
        let users = switch.users.iter().map(|name| self.users[name].ask()).collect();
        StageStep::Introduce { network: self.asked(&switch.to), users }
    }

    fn asked(&self, name: &Arc<str>) -> Asked {
        let network = &self.networks[name];
        Asked {
            name: Arc::clone(name),
            index: network.index,
            spec: network.spec.clone(),
            learned: network.learned,
        }
    }

    fn stage_answer(&self, switch: &Switch) -> StageAnswer {
        StageAnswer {
            switch: switch.index,
            generation: switch.generation,
            to: self.networks[&switch.to].index,
        }
    }

    /// Staging succeeded: what to write, and, after a grace period, to answer.
    ///
    /// # Errors
    /// [`Refusal`] if it was given up meanwhile.
    pub fn stage_write(&mut self, migration: &str) -> Result<(Vec<Write>, StageAnswer), Refusal> {
        let switch = self.switches.get(migration).ok_or_else(|| self.gone(migration))?;
        let answer = self.stage_answer(switch);
        let mut writes = Vec::new();
        if switch.state == State::Staging {
            let (index, generation) = (switch.index, switch.generation);
            // the switch first: who finds it in a user's word finds it set
            writes.push(Write::Switch { index, word: SwitchWord::forward(Selector::A, generation) });
            let word = UserWord::staged(
                self.networks[&switch.from].index,
                self.networks[&switch.to].index,
                index,
                generation,
            );
            writes.extend(
                switch.users.iter().map(|name| Write::UserWord { slot: self.users[name].slot, word }),
            );
        }
        if let Some(switch) = self.switches.get_mut(migration)
            && switch.state == State::Staging
        {
            switch.state = State::Staged;
        }
        Ok((writes, answer))
    }

    /// Staging failed before anything was written: as if it had never begun.
    pub fn stage_failed(&mut self, migration: &str) {
        if self.switches.get(migration).is_some_and(|s| s.state == State::Staging)
            && let Some(switch) = self.switches.remove(migration)
        {
            self.set_free(&switch);
            // no word has named it
            self.switch_indices.free.push(switch.index.into());
        }
    }

    /// Decides on the store.
    ///
    /// # Errors
    /// [`Refusal`] if this is not what was staged.
    pub fn switch<'a>(
        &self,
        migration: &str,
        index: u32,
        generation: u64,
        users: impl Into<Named<'a>>,
        to: &str,
    ) -> Result<SwitchStep, Refusal> {
        let differs = |what| Err(Refusal::Differs { migration: migration.into(), what });
        let Some(switch) = self.switches.get(migration) else {
            return match self.past.get(migration) {
                Some(Ended::Finished { index: i, generation: g, answer, .. }) => {
                    if (u32::from(*i), *g) == (index, generation) {
                        Ok(SwitchStep::Done(*answer))
                    } else {
                        differs("switch or generation")
                    }
                }
                _ => Err(self.gone(migration)),
            };
        };
        if (u32::from(switch.index), switch.generation) != (index, generation) {
            return differs("switch or generation");
        }
        if *switch.to != *to {
            return differs("networks");
        }
        let same = match users.into() {
            Named::Users(users) => same_users(&switch.users, users),
            Named::Digest(digest) => switch.digest == digest,
        };
        if !same {
            return differs("users");
        }
        match switch.state {
            _ if switch.hold.is_some_and(|hold| hold.release == Some(Selector::A)) => {
                Err(Refusal::Aborted(migration.into()))
            }
            State::Staging => Err(Refusal::StillStaging(migration.into())),
            State::Staged => {
                // the phase stays what it is
                let word = SwitchWord::new(Selector::B, switch.word().phase(), generation);
                Ok(SwitchStep::Store { index: switch.index, word })
            }
            State::Switched(answer) => Ok(SwitchStep::Done(answer)),
        }
    }

    /// The store was made.
    pub fn switched(&mut self, migration: &str, answer: SwitchAnswer) {
        if let Some(switch) = self.switches.get_mut(migration) {
            switch.state = State::Switched(answer);
            self.hearing += 1;
        }
    }

    /// Puts everything back.
    ///
    /// # Errors
    /// [`Refusal::Finished`]: there is no way back; [`Refusal::NotReleased`] while frames are held.
    pub fn abort(&mut self, migration: &str) -> Result<AbortStep, Refusal> {
        let nothing =
            |was_switched| AbortStep { writes: Vec::new(), retired: Retired::default(), was_switched };
        let held = match self.switches.get(migration) {
            Some(switch) => switch.may_end(migration)?,
            None => None,
        };
        let Some(switch) = self.switches.remove(migration) else {
            return match self.past.get(migration) {
                Some(Ended::Finished { .. }) => Err(Refusal::Finished(migration.into())),
                Some(Ended::Aborted { was_switched, .. }) => Ok(nothing(*was_switched)),
                None => {
                    self.remember(migration, Ended::Aborted { was_switched: false, held: None });
                    Ok(nothing(false))
                }
            };
        };
        self.set_free(&switch);
        let was_switched = matches!(switch.state, State::Switched(_));
        self.remember(migration, Ended::Aborted { was_switched, held });
        if switch.state == State::Staging {
            self.switch_indices.free.push(switch.index.into());
            return Ok(nothing(false));
        }
        let mut writes = vec![Write::Switch {
            index: switch.index,
            word: SwitchWord::forward(Selector::A, switch.generation),
        }];
        writes.extend(self.rest(&switch.users, &switch.from));
        let retired = Retired { switches: vec![switch.index.into()], ..Retired::default() };
        Ok(AbortStep { writes, retired, was_switched })
    }

    /// Makes the new network the users' only one.
    ///
    /// # Errors
    /// [`Refusal`] unless the migration is switched and holds no frames, or is unknown here.
    pub fn finish(&mut self, migration: &str) -> Result<(Vec<Write>, Retired), Refusal> {
        let Some(switch) = self.switches.get(migration) else {
            return match self.past.get(migration) {
                Some(Ended::Aborted { .. }) => Err(Refusal::Aborted(migration.into())),
                Some(Ended::Finished { .. }) | None => Ok((Vec::new(), Retired::default())),
            };
        };
        let answer = match switch.state {
            State::Switched(answer) => answer,
            State::Staging => return Err(Refusal::StillStaging(migration.into())),
            State::Staged => return Err(Refusal::NotSwitched(migration.into())),
        };
        let held = switch.may_end(migration)?;
        let switch = switch.clone();
        self.switches.remove(migration);
        self.set_free(&switch);
        for name in &switch.users {
            if let Some(user) = self.users.get_mut(name) {
                user.network = Arc::clone(&switch.to);
            }
        }
        self.remember(
            migration,
            Ended::Finished { index: switch.index, generation: switch.generation, answer, held },
        );
        let writes = self.rest(&switch.users, &switch.to).collect();
        Ok((writes, Retired { switches: vec![switch.index.into()], ..Retired::default() }))
    }

    fn rest<'a>(&'a self, users: &'a [Arc<str>], network: &str) -> impl Iterator<Item = Write> + 'a {
        let word = UserWord::resting(self.networks[network].index);
        users.iter().map(move |name| Write::UserWord { slot: self.users[name].slot, word })
    }

    fn set_free(&mut self, switch: &Switch) {
        self.hearing += 1;
        for name in &switch.users {
            if let Some(user) = self.users.get_mut(name) {
                user.staged_by = None;
            }
        }
    }

    fn remember(&mut self, migration: &str, ended: Ended) {
        let key: Arc<str> = migration.into();
        if self.past.insert(Arc::clone(&key), ended).is_none() {
            self.past_order.push_back(key);
        }
        while self.past_order.len() > PAST_MAX {
            if let Some(oldest) = self.past_order.pop_front() {
                self.past.remove(&oldest);
            }
        }
    }

    fn gone(&self, migration: &str) -> Refusal {
        match self.past.get(migration) {
            Some(Ended::Aborted { .. }) => Refusal::Aborted(migration.into()),
            Some(Ended::Finished { .. }) => Refusal::Finished(migration.into()),
            None => Refusal::NotStaged(migration.into()),
        }
    }

    /// The router with address `address` was heard at `mac` on `port` in the network with `tag` ([`NetworkSpec::tag`]).
    /// Answers with the network's index, the MAC it had before, and what to write if that is news.
    pub fn heard(&mut self, (port, tag): (u16, u16), address: IpAddr, mac: Mac) -> Option<Learned> {
        let network = self.networks.values_mut().find(|n| {
            let own = [n.spec.address.map(IpAddr::from), n.spec.address6.map(IpAddr::from)];
            (n.spec.port, n.spec.tag()) == (port, tag) && own.contains(&Some(address))
        })?;
        let before = network.router();
        let news = network.spec.router_mac.is_none() && before != Some(mac);
        if news {
            network.changes += u64::from(before.is_some());
            network.learned = Some(mac);
            self.hearing += 1;
        }
        let (index, router) = (network.index, network.router_word());
        Some(Learned { before, write: news.then_some(Write::NetworkRouter { index, router }) })
    }

    /// A user's MAC: `None` for nobody, and within for a user who is known otherwise.
    pub fn mac_of(&self, user: &str) -> Option<Option<Mac>> {
        self.users.get(user).map(|user| user.spec.mac)
    }

    /// The ports that these users and networks are behind, as far as they are known.
    pub fn ports_of(&self, users: &[String], networks: [&str; 2]) -> BTreeSet<u16> {
        let users = users.iter().filter_map(|name| Some(self.users.get(name.as_str())?.spec.port));
        users.chain(networks.iter().filter_map(|name| Some(self.networks.get(*name)?.spec.port))).collect()
    }

    /// What a watcher is told of a switch that is under way: old and new network, how many users, and the first few of them.
    pub fn told_of(&self, migration: &str, few: usize) -> Option<(&str, &str, usize, Vec<String>)> {
        let switch = self.switches.get(migration)?;
        let names = switch.users.iter().take(few).map(ToString::to_string).collect();
        Some((&switch.from, &switch.to, switch.users.len(), names))
    }

    /// A network by name, as the introduction needs it.
    pub fn network(&self, name: &str) -> Option<Asked> {
        self.networks.get_key_value(name).map(|(name, _)| self.asked(name))
    }

    /// Networks with users whose router's MAC was learned, or is not known yet, each with one user to ask as.
    pub fn routers(&self, learned: bool) -> Vec<(Asked, Asker)> {
        self.networks
            .iter()
            .filter(|(_, n)| n.spec.router_mac.is_none() && n.learned.is_some() == learned)
            .filter_map(|(name, _)| {
                let user = self.users.values().find(|u| u.network == *name)?;
                Some((self.asked(name), user.ask()))
            })
            .collect()
    }

    /// The networks.
    pub fn networks(&self) -> impl Iterator<Item = NetworkView<'_>> {
        self.networks.iter().map(|(name, n)| NetworkView {
            name,
            spec: &n.spec,
            router: n.router(),
            changes: n.changes,
        })
    }

    /// Changes whenever [`Table::hearers`] may.
    pub const fn hearing(&self) -> u64 {
        self.hearing
    }

    /// Who hears which network, as the `wan` program has it: the users who are on it, and those who have been switched away
    /// from it and are not finished.
    pub fn hearers(&self) -> HearersByNetwork {
        let mut all = HearersByNetwork::new();
        for n in self.networks.values() {
            let hearers = Hearers { router: n.router(), address6: n.spec.address6, users: Vec::new() };
            all.insert((n.spec.port, n.spec.tag()), hearers);
        }
        let mut hears = |network: &str, user: &UserState| {
            let key = self.networks.get(network).map(|n| (n.spec.port, n.spec.tag()));
            if let Some(hearers) = key.and_then(|key| all.get_mut(&key)) {
                let UserSpec { mac, port, tag, .. } = user.spec;
                hearers.users.push(Hearer { mac, port, tag });
            }
        };
        for user in self.users.values() {
            hears(&user.network, user);
            if let Some(Switch { state: State::Switched(_), to, .. }) =
                user.staged_by.as_ref().and_then(|by| self.switches.get(by))
            {
                hears(to, user);
            }
        }
        all
    }

    /// The users.
    pub fn users(&self) -> impl Iterator<Item = UserView<'_>> {
        self.users.iter().map(|(name, user)| {
            let switched = user.staged_by.as_ref().and_then(|by| self.switches.get(by));
            let network = match switched {
                Some(Switch { state: State::Switched(_), to, .. }) => to,
                _ => &user.network,
            };
            UserView { name, spec: &user.spec, network, staged_by: user.staged_by.as_deref() }
        })
    }

    /// The switches under way.
    pub fn switches(&self) -> impl Iterator<Item = SwitchView<'_>> {
        self.switches.iter().map(|(migration, s)| SwitchView {
            index: s.index,
            migration,
            generation: s.generation,
            state: match s.state {
                State::Staging => "staging",
                State::Staged => "staged",
                State::Switched(_) => "switched",
            },
            from: &s.from,
            to: &s.to,
            users: s.users.len(),
            window_ns: match s.state {
                State::Switched(answer) => Some(answer.window_ns),
                State::Staging | State::Staged => None,
            },
            phase: match s.word().phase() {
                Phase::Forward => "forward",
                Phase::Hold => "hold",
                Phase::Drain => "drain",
            },
        })
    }
}

impl UserState {
    fn ask(&self) -> Asker {
        Asker { mac: self.spec.mac, v4: self.spec.v4(), v6: self.spec.v6() }
    }

    /// Everything about the user, in an order that is safe while frames flow: first nobody finds the entry any more.
    fn removal(&self) -> impl Iterator<Item = Write> + '_ {
        let (slot, known_by) = (self.slot, self.spec.known_by());
        let of_user = [
            Write::UserIdentity { slot, identity: 0 },
            Write::UserWord { slot, word: UserWord::resting(0) },
            Write::RemoveUser { known_by },
        ];
        of_user.into_iter().chain(self.addresses_removal())
    }

    fn addresses_removal(&self) -> impl Iterator<Item = Write> + '_ {
        self.spec.all_addresses().map(|address| Write::RemoveAddress { address })
    }

    /// All but where the user is, in an order that is safe while frames flow: the entry is complete when it is found.
    fn writes(&self) -> impl Iterator<Item = Write> + '_ {
        let (slot, known_by) = (self.slot, self.spec.known_by());
        let mac = self.spec.mac.map_or(0, Mac::word);
        let of_user = [
            self.access_write(),
            Write::UserIdentity { slot, identity: User::identity(mac, known_by.port) },
            Write::AddUser { known_by, slot },
        ];
        of_user.into_iter().chain(self.addresses_writes())
    }

    fn access_write(&self) -> Write {
        Write::UserAccess { slot: self.slot, known_by: self.spec.known_by(), guard: self.spec.guard }
    }

    fn addresses_writes(&self) -> impl Iterator<Item = Write> + '_ {
        self.spec.all_addresses().map(|address| Write::AddAddress { address, slot: self.slot })
    }
}

impl UserSpec {
    fn known_by(&self) -> KnownBy {
        KnownBy { mac: self.mac, port: self.port, tag: self.tag.unwrap_or(0) }
    }
}

impl NetworkSpec {
    /// How it is reached.
    pub fn link(&self) -> Link {
        let link = Link::new(self.vid.unwrap_or(0), self.port);
        let link = if self.service { link.service() } else { link };
        self.pcp.map_or(link, |pcp| link.with_pcp(pcp))
    }
}

impl Asked {
    /// Where the introduction asks.
    pub fn place(&self) -> Place {
        let NetworkSpec { port, address, address6, .. } = self.spec;
        Place { port, tag: self.spec.tag(), address, address6 }
    }
}

impl Write {
    /// An IPv4 address as the maps have it.
    pub const fn address_word(address: Ipv4Addr) -> u32 {
        ip_word(address.octets())
    }

    /// An IPv6 address as the maps have it.
    pub const fn address6_words(address: Ipv6Addr) -> [u64; 2] {
        ip6_words(address.octets())
    }
}

/// Whether `named`, in any order, are exactly the `staged` (which are sorted).
fn same_users(staged: &[Arc<str>], named: &[String]) -> bool {
    if staged.len() != named.len() {
        return false;
    }
    let mut named: Vec<&str> = named.iter().map(String::as_str).collect();
    named.sort_unstable();
    staged.iter().zip(named).all(|(a, b)| **a == *b)
}

mod hold;
use hold::HoldState;
pub use hold::{HoldFigures, HoldStep, Release};

mod slots;
use slots::Slots;

mod snapshot;
pub use snapshot::{Snapshot, SnapshotError};

#[cfg(test)]
mod tests;
