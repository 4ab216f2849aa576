//! Accounts for every frame that was sent while a selector was turned: came out once, under the network that the store which
//! its program run read had selected. Pure.
//!
//! ```text
//!   daemon's CPU    begun = k   store k   done = k                     store k selects the old network if k is even,
//!   program's CPU       before = done   [ program run ]   after = begun            the new one if it is odd
//! ```
//!
//! When `before` was read, every store up to it was made; a store later than `after` was not begun when the run had ended. So
//! the run read the selector as store `before`, or one of those up to `after`, left it, and no other. And runs follow each other
//! on one CPU, which never reads a word older than it has read it before: a run read no store before the one that the run before
//! it read. What is left is tied to one store by the VID, which tells odd from even, as long as no more than two are left: the
//! stores are made so far apart that two do not fall into one run, unless the kernel takes the CPU away in the middle of it.
//! If none is left, the frame is on the wrong VLAN.

use gateway_bench_ebpf::ONCE;
use serde::Serialize;

/// What is known of one frame.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Stores made when its program run began.
    pub before: u64,
    /// Stores begun when its program run had ended.
    pub after: u64,
    /// How often it came out times [`ONCE`], and the VID it came out with last.
    pub received: u64,
}

/// What became of all frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    pub frames: u64,
    /// Did not come out.
    pub lost: u64,
    /// Came out more than once.
    pub duplicated: u64,
    /// Came out under a network that no store selected which the frame's run can have read.
    pub wrong: u64,
    /// Of those that came out right: under the old network.
    pub old: u64,
    /// The same: under the new one.
    pub new: u64,
    /// Of those: tied to the one store that their run read.
    pub tied: u64,
    /// Frames during whose run a store was made.
    pub raced: u64,
    /// Of those, under the network that the store left: it came too late for them.
    pub raced_old: u64,
    /// The store that the last frame's run read, or the first of those it may have.
    #[serde(skip)]
    pub read: u64,
}

impl Tally {
    /// Enters a frame; `vids` are those of the old network and of the new one.
    pub fn enter(&mut self, entry: Entry, vids: [u16; 2]) {
        let Entry { before, after, received } = entry;
        self.frames += 1;
        match received / ONCE {
            0 => {
                self.lost += 1;
                return;
            }
            1 => {}
            _ => self.duplicated += 1,
        }
        self.raced += u64::from(after > before);
        let vid = (received % ONCE) as u16;
        let earliest = before.max(self.read);
        // the first store that selects the frame's network, of those its run can have read
        let read = match vids.iter().position(|v| *v == vid) {
            Some(side) => earliest + ((earliest % 2) ^ side as u64),
            None => u64::MAX,
        };
        if read > after {
            self.wrong += 1;
            return;
        }
        self.read = read;
        self.tied += u64::from(read + 2 > after);
        self.raced_old += u64::from(after > before && read < after);
        if vid == vids[0] {
            self.old += 1;
        } else {
            self.new += 1;
        }
    }

    /// Nothing was lost, duplicated or sent astray.
    pub const fn is_flawless(&self) -> bool {
        self.lost == 0 && self.duplicated == 0 && self.wrong == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIDS: [u16; 2] = [1, 2];

    fn of(before: u64, after: u64, received: u64) -> Tally {
        let mut tally = Tally::default();
        tally.enter(Entry { before, after, received }, VIDS);
        tally
    }

    #[test]
    fn what_was_selected_is_right() {
        for (before, vid) in [(0, 1), (1, 2), (2, 1), (999_999, 2)] {
            let tally = of(before, before, ONCE + vid);
            assert!(tally.is_flawless(), "{tally:?}");
            assert_eq!((tally.old, tally.new, tally.raced), (u64::from(vid == 1), u64::from(vid == 2), 0));
        }
    }

    #[test]
    fn what_was_selected_just_before_or_just_after_is_wrong() {
        for (before, vid) in [(0, 2), (1, 1), (2, 2), (7, 1)] {
            assert_eq!(of(before, before, ONCE + vid).wrong, 1, "{before} {vid}");
        }
    }

    #[test]
    fn during_a_store_both_are_right_and_nothing_else_is() {
        for (before, after) in [(0, 1), (1, 2), (5, 8)] {
            for vid in [1, 2] {
                let tally = of(before, after, ONCE + vid);
                assert!(tally.is_flawless() && tally.raced == 1, "{tally:?}");
            }
            for vid in [0, 3, 0xfff] {
                assert_eq!(of(before, after, ONCE + vid).wrong, 1);
            }
        }
    }

    #[test]
    fn a_frame_in_a_race_is_tied_to_the_store_it_read() {
        let old = of(4, 5, ONCE + 1);
        assert_eq!((old.tied, old.raced_old, old.read), (1, 1, 4));
        let new = of(4, 5, ONCE + 2);
        assert_eq!((new.tied, new.raced_old, new.read), (1, 0, 5));
        // three stores are possible, of which two select the old network
        assert_eq!(of(4, 6, ONCE + 1).tied, 0);
        assert_eq!(of(4, 6, ONCE + 2).tied, 1);
    }

    #[test]
    fn nobody_goes_back_to_what_was_selected_before() {
        let mut tally = Tally::default();
        let mut enter = |before, after, vid| {
            tally.enter(Entry { before, after, received: ONCE + vid }, VIDS);
            tally
        };
        assert!(enter(0, 1, 1).is_flawless());
        assert!(enter(0, 1, 2).is_flawless(), "turned in the middle of both runs");
        // store 1 was read: the old network cannot be read again before store 2
        assert_eq!(enter(0, 1, 1).wrong, 1);
        // and one frame astray does not make the next one so
        assert_eq!(enter(1, 1, 2).wrong, 1);
        assert_eq!(enter(1, 2, 1).wrong, 1);
    }

    #[test]
    fn a_frame_that_came_out_twice_or_not_at_all_is_told() {
        assert_eq!(of(0, 0, 0).lost, 1);
        assert_eq!(of(0, 0, 2 * ONCE + 1).duplicated, 1);
        assert_eq!(of(0, 0, ONCE).wrong, 1, "without a tag");
    }
}
