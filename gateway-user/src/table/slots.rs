//! Which slots of `USER` are free, and which of them a user gets: the first free one of its homes ([`gateway_ebpf::home`]),
//! any other if there is none. Pure.

use gateway_ebpf::home::{GROUP, groups_for, homes};

use crate::mac::Mac;

/// The slots; 0 is nobody's.
#[derive(Debug, Clone)]
pub(super) struct Slots {
    groups: u32,
    /// A bit each.
    taken: Vec<u64>,
    /// Where the search for any free one goes on.
    next: u32,
}

impl Slots {
    pub(super) fn new(max_users: u32) -> Self {
        let groups = groups_for(max_users);
        let words = (groups * GROUP).div_ceil(u64::BITS) as usize;
        let mut slots = Self { groups, taken: vec![0; words], next: 1 };
        slots.claim(0);
        slots
    }

    const fn end(&self) -> u32 {
        self.groups * GROUP
    }

    /// Takes this one; whether it was free.
    pub(super) fn claim(&mut self, slot: u32) -> bool {
        let bit = 1 << (slot % u64::BITS);
        let Some(word) =
            self.taken.get_mut((slot / u64::BITS) as usize).filter(|_| slot < self.groups * GROUP)
        else {
            return false;
        };
        let was_free = *word & bit == 0;
        *word |= bit;
        was_free
    }

    /// A slot for a user, known by `mac` or by none.
    pub(super) fn take(&mut self, mac: Option<Mac>) -> Option<u32> {
        if let Some(mac) = mac {
            for slot in homes(mac.word(), self.groups).into_iter().flat_map(|home| home.slots()) {
                if self.claim(slot) {
                    return Some(slot);
                }
            }
        }
        for _ in 0..self.end() {
            let slot = self.next;
            self.next = (slot + 1) % self.end();
            if self.claim(slot) {
                return Some(slot);
            }
        }
        None
    }

    /// These are free again.
    pub(super) fn give_back(&mut self, slots: impl IntoIterator<Item = u32>) {
        for slot in slots {
            if let Some(word) = self.taken.get_mut((slot / u64::BITS) as usize) {
                *word &= !(1 << (slot % u64::BITS));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn mac(n: u32) -> Mac {
        let [_, b, c, d] = n.to_be_bytes();
        Mac([2, 0, 1, b, c, d])
    }

    #[test]
    fn every_slot_but_0_is_given_once_to_users_of_either_kind() {
        for max_users in [1, 2, 16, 1000] {
            let mut slots = Slots::new(max_users);
            let mut given = HashSet::new();
            let mut n = 0;
            while let Some(slot) = slots.take((n % 3 != 0).then(|| mac(n))) {
                assert!(slot != 0 && given.insert(slot), "{slot}");
                n += 1;
            }
            assert_eq!(given.len() as u32, groups_for(max_users) * GROUP - 1);
            assert!(given.len() as u32 >= 2 * max_users, "every user, and everyone it replaces");
            assert!(!slots.claim(1));
            slots.give_back([1]);
            assert_eq!(slots.take(None), Some(1));
        }
    }

    #[test]
    fn a_user_gets_the_first_free_slot_of_its_homes() {
        let mut slots = Slots::new(1000);
        let [first, second] = homes(mac(7).word(), groups_for(1000));
        for expected in first.slots().into_iter().chain(second.slots()) {
            assert_eq!(slots.take(Some(mac(7))), Some(expected));
        }
        let elsewhere = slots.take(Some(mac(7))).unwrap();
        assert!(!first.slots().contains(&elsewhere) && !second.slots().contains(&elsewhere));
        slots.give_back([second.slots()[1], first.slots()[3]]);
        assert_eq!(slots.take(Some(mac(7))), Some(first.slots()[3]));
    }

    #[test]
    fn a_slot_that_is_not_there_is_not_free() {
        let mut slots = Slots::new(16);
        for slot in [0, groups_for(16) * GROUP, u32::MAX] {
            assert!(!slots.claim(slot), "{slot}");
        }
    }
}
