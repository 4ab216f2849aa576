//! Where the entry of a user who is known by a MAC stands in `USER`, so that a program finds it by the MAC alone, with no other
//! map between: on most days with one load of one cache line, for either direction.
//!
//! ```text
//!   MAC --mix--> first home:  group, line        USER:  | group 0           | group 1           | ...
//!            \-> second home: group, line               | line 0  | line 1  | line 0  | line 1  |
//!                                                       | e0 | e1 | e2 | e3 | e4 | e5 | e6 | e7 |   e = one slot, 32 octets
//! ```
//!
//! A group is two cache lines that lie next to each other (which processors fetch together), a line two entries. The daemon
//! gives a user the first slot that is free in this order: the line of the first home, the other line of its group, the same of
//! the second home, any other. A program looks in the same order, and after both homes asks the hash maps, which know everybody.
//! Nobody ever moves: an entry is found where it was, or in the maps, or is not there.
//!
//! With two slots for each user, as there are at least, 89 % of all stand in the first line, 96 % in the first group, and some
//! 0.3 % in neither group (the test counts). Users who choose their MACs so that they collide are found by the hash maps, as
//! everybody would be without this.

/// Slots of a group.
pub const GROUP: u32 = 4;
/// Slots of a line.
const LINE: u32 = 2;

/// Slots that belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Home {
    /// Which group.
    pub group: u32,
    /// Its line that is looked at first: 0 or 1.
    pub line: u32,
}

impl Home {
    /// Its slots, in the order they are looked at.
    pub const fn slots(self) -> [u32; GROUP as usize] {
        let (first, near, far) = (self.group * GROUP, self.line * LINE, (self.line ^ 1) * LINE);
        [first + near, first + near + 1, first + far, first + far + 1]
    }
}

/// Groups that `max_users` users need: two slots each, as replaced users keep theirs through a grace period, and slot 0, which
/// is nobody's.
pub const fn groups_for(max_users: u32) -> u32 {
    max_users / 2 + 1
}

/// The homes of `mac` ([`crate::frame::mac_word`]) among `groups` groups, first and second.
#[inline(always)]
pub const fn homes(mac: u64, groups: u32) -> [Home; 2] {
    // two rounds of multiply and fold: MACs of one vendor differ in few bits
    let mixed = mac.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let (high, low) = (mixed >> 32, mixed & 0xffff_ffff);
    let groups = groups as u64;
    // the group comes of the upper bits of each half, the line of a lower one
    [
        Home { group: ((high * groups) >> 32) as u32, line: (mixed >> 32) as u32 & 1 },
        Home { group: ((low * groups) >> 32) as u32, line: (mixed >> 33) as u32 & 1 },
    ]
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::{collections::BTreeSet, vec::Vec};

    use super::*;
    use crate::frame::mac_word;

    #[test]
    fn a_home_has_the_slots_of_its_group_its_own_line_first() {
        assert_eq!(Home { group: 0, line: 0 }.slots(), [0, 1, 2, 3]);
        assert_eq!(Home { group: 5, line: 1 }.slots(), [22, 23, 20, 21]);
    }

    #[test]
    fn homes_are_among_the_groups_also_if_there_is_but_one() {
        for groups in [1, 2, 3, groups_for(1), groups_for(1 << 20)] {
            for n in 0..1000_u32 {
                let [_, b, c, d] = n.to_be_bytes();
                for mac in [mac_word([2, 0, 1, b, c, d]), u64::from(n), !u64::from(n) & 0xffff_ffff_ffff] {
                    for home in homes(mac, groups) {
                        assert!(home.group < groups && home.line < 2, "{mac:x} {home:?} of {groups}");
                    }
                }
            }
        }
    }

    /// Where all users of a full table stand: (first line, first group, second group, elsewhere), in per mille.
    fn spread(users: u32, mac: impl Fn(u32) -> [u8; 6]) -> [u32; 4] {
        let groups = groups_for(users);
        let mut taken: Vec<bool> = std::vec![false; (groups * GROUP) as usize];
        taken[0] = true;
        let mut found = [0_u32; 4];
        for n in 0..users {
            let [first, second] = homes(mac_word(mac(n)), groups);
            let slots = first.slots().into_iter().chain(second.slots());
            let at = slots.into_iter().position(|slot| !core::mem::replace(&mut taken[slot as usize], true));
            // `position` takes the first that was free
            found[match at {
                Some(0..2) => 0,
                Some(2..4) => 1,
                Some(_) => 2,
                None => 3,
            }] += 1;
        }
        found.map(|n| (u64::from(n) * 1000 / u64::from(users)) as u32)
    }

    #[test]
    fn of_a_full_table_nearly_all_are_at_home() {
        let by_number = |n: u32| {
            let [a, b, c, d] = n.to_be_bytes();
            [2, a, 1, b, c, d]
        };
        // vendors whose addresses differ in the first octets, and every other address of one
        let by_vendor = |n: u32| {
            let [a, b, c, d] = (2 * n).to_le_bytes();
            [a, b, c, d, 0x11, 0x22]
        };
        let every_sixteenth = |n: u32| by_number(n << 4);
        for users in [1000, 65_536, 1 << 20] {
            for spread in [spread(users, by_number), spread(users, by_vendor), spread(users, every_sixteenth)]
            {
                let [line, group, second, elsewhere] = spread;
                assert!(line > 850, "{users}: {spread:?}");
                assert!(line + group > 935 && second < 65, "{users}: {spread:?}");
                assert!(elsewhere < 10, "{users}: {spread:?}");
            }
        }
    }

    #[test]
    fn the_second_home_is_another_than_the_first() {
        let groups = groups_for(1 << 16);
        let pairs: BTreeSet<_> = (0..1000_u32)
            .map(|n| {
                let [_, b, c, d] = n.to_be_bytes();
                homes(mac_word([2, 0, 1, b, c, d]), groups).map(|home| home.group)
            })
            .collect();
        assert!(pairs.iter().filter(|[first, second]| first == second).count() < 5);
        assert_eq!(pairs.len(), 1000);
    }
}
