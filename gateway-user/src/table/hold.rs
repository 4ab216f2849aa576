//! Hold and release in the table: which switch keeps its users' frames, and to which side they are released.
//!
//! ```text
//!   forward --hold--> held --release(A: abort, B: finish)--> releasing --released(figures)--> released --abort, finish-->
//! ```
//!
//! A hold needs a switch that is staged and not yet made; the switch may then be made while it is held. What has begun to
//! be released to one side is not released to the other. A switch that is held is neither finished nor aborted before its
//! frames are out of the way.

use std::net::Ipv4Addr;

use gateway_ebpf::{
    SwitchWord,
    words::{Phase, Selector},
};

use super::{Asked, Ended, Refusal, State, Switch, Table};
use crate::{introduce::Asker, mac::Mac};

/// What became of the frames of a hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HoldFigures {
    /// Kept and sent on; before the release has begun, kept.
    pub frames: u64,
    /// Their octets.
    pub bytes: u64,
    /// Not kept: the user's bound.
    pub dropped_user_bound: u64,
    /// Not kept: the bound on all.
    pub dropped_memory: u64,
    /// Kept and not sent on.
    pub lost: u64,
    /// Sent on after the deadline.
    pub late: u64,
    /// Begin of the release -> the last user is back on the fast path.
    pub release_us: u64,
}

/// A switch's hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HoldState {
    pub(super) address: Ipv4Addr,
    pub(super) release: Option<Selector>,
    pub(super) figures: Option<HoldFigures>,
}

/// How a hold goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HoldStep {
    /// Index into `SWITCH` and `HOLD`.
    pub index: u16,
    /// What to store, unless it is held already.
    pub word: SwitchWord,
    /// It is held already.
    pub again: bool,
    /// How many users.
    pub users: usize,
    /// MAC and IPv4 address of one of them who has both, for the marker.
    pub user: Option<(Mac, Ipv4Addr)>,
    /// The network they are on.
    pub from: Asked,
}

/// How a release goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Release {
    /// Nothing is held.
    NotHeld,
    /// Store `word`, send on what is kept, then [`Table::released`].
    Drain {
        /// Index into `SWITCH` and `HOLD`.
        index: u16,
        /// What to store.
        word: SwitchWord,
        /// Slots of the users.
        slots: Vec<u32>,
    },
    /// It is over.
    Done,
}

impl Switch {
    /// What its word has to say.
    pub(super) fn word(&self) -> SwitchWord {
        let selected = match self.state {
            State::Switched(_) => Selector::B,
            State::Staging | State::Staged => Selector::A,
        };
        let (selector, phase) = match self.hold {
            None => (selected, Phase::Forward),
            Some(HoldState { release: None, .. }) => (selected, Phase::Hold),
            Some(HoldState { release: Some(to), .. }) => (to, Phase::Drain),
        };
        SwitchWord::new(selector, phase, self.generation)
    }

    /// Takes over what the maps say of it.
    pub(super) fn adopt_hold(&mut self, word: SwitchWord, address: Ipv4Addr) {
        if !word.same_generation(SwitchWord::forward(Selector::A, self.generation)) {
            return;
        }
        let release = match word.phase() {
            Phase::Forward => return,
            Phase::Hold => None,
            Phase::Drain => Some(word.selector()),
        };
        self.hold = Some(HoldState { address, release, figures: None });
    }

    /// Whether it may end.
    pub(super) fn may_end(&self, migration: &str) -> Result<Option<HoldFigures>, Refusal> {
        match self.hold {
            None => Ok(None),
            Some(HoldState { figures: Some(figures), .. }) => Ok(Some(figures)),
            Some(_) => Err(Refusal::NotReleased(migration.into())),
        }
    }
}

impl Table {
    /// Decides on a hold of what is for `address`.
    ///
    /// # Errors
    /// [`Refusal`] if this is not staged, or is switched or being released.
    pub fn hold(
        &mut self,
        migration: &str,
        index: u32,
        generation: u64,
        address: Ipv4Addr,
    ) -> Result<HoldStep, Refusal> {
        let switch = self.switches.get(migration).ok_or_else(|| self.gone(migration))?;
        let differs = |what| Err(Refusal::Differs { migration: migration.into(), what });
        if (u32::from(switch.index), switch.generation) != (index, generation) {
            return differs("switch or generation");
        }
        let again = match (switch.hold, switch.state) {
            (_, State::Staging) => return Err(Refusal::StillStaging(migration.into())),
            (Some(HoldState { release: Some(_), .. }), _) => {
                return Err(Refusal::Releasing(migration.into()));
            }
            (_, State::Switched(_)) => return Err(Refusal::Switched(migration.into())),
            (Some(hold), State::Staged) if hold.address != address => return differs("held address"),
            (hold, State::Staged) => hold.is_some(),
        };
        let user = switch.users.iter().filter_map(|name| self.users.get(name)).find_map(|user| {
            let Asker { mac, v4, .. } = user.ask();
            Some((mac?, v4?))
        });
        let (users, from) = (switch.users.len(), self.asked(&switch.from));
        let switch = self.switches.get_mut(migration).ok_or_else(|| Refusal::NotStaged(migration.into()))?;
        switch.hold.get_or_insert(HoldState { address, release: None, figures: None });
        Ok(HoldStep { index: switch.index, word: switch.word(), again, users, user, from })
    }

    /// Begins to release what is held to the old network (A: abort) or to the new one (B: finish).
    ///
    /// # Errors
    /// [`Refusal`] if it cannot be finished, or is being released to the other side.
    pub fn release(&mut self, migration: &str, to: Selector) -> Result<Release, Refusal> {
        let Some(switch) = self.switches.get_mut(migration) else { return Ok(Release::NotHeld) };
        let Some(hold) = &mut switch.hold else { return Ok(Release::NotHeld) };
        if to == Selector::B && switch.state == State::Staged {
            return Err(Refusal::NotSwitched(migration.into()));
        }
        match hold.release {
            Some(other) if other != to => return Err(Refusal::Releasing(migration.into())),
            _ => hold.release = Some(to),
        }
        if hold.figures.is_some() {
            return Ok(Release::Done);
        }
        let (index, word) = (switch.index, switch.word());
        let slots = self.switches[migration].users.iter().map(|name| self.users[name].slot).collect();
        Ok(Release::Drain { index, word, slots })
    }

    /// Everything that was held is out of the way.
    pub fn released(&mut self, migration: &str, figures: HoldFigures) {
        if let Some(hold) = self.switches.get_mut(migration).and_then(|s| s.hold.as_mut()) {
            hold.figures.get_or_insert(figures);
        }
    }

    /// What became of the frames that were held for a migration that has ended.
    pub fn past_hold(&self, migration: &str) -> Option<HoldFigures> {
        match self.past.get(migration)? {
            Ended::Aborted { held, .. } | Ended::Finished { held, .. } => *held,
        }
    }
}
