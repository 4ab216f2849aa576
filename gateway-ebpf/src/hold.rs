//! Hold and release, as far as programs and daemon share it: what is kept of a user's frames, and how both sides count it.
//!
//! ```text
//!  program (any CPU)                                     daemon (one thread)
//!  phase hold:   held += load, frame -> FRAMES           -
//!  phase drain:  sent == held? on its way                FRAMES -> WAN; transmitted: sent += load
//!                else held += load, frame -> FRAMES
//! ```
//!
//! Invariants:
//! - `held` is written by the programs alone (atomically), `sent` by the daemon alone, and only once the frames have left the
//!   interface. The program reads `sent`, then `held`: equal means that at the time of the first read nothing was kept, so
//!   the frame at hand may overtake nothing. It counts before it keeps, so a kept frame is never missed by another CPU.
//! - Both are sums of [`Load`]s, so they are compared and subtracted as whole words.
//! - Every load in `held` is a record in `FRAMES`, in the daemon's hands, or, if a daemon ended with it, lost; there is
//!   no fourth.

/// How much a frame weighs: octets (bits 24..64) and frames (0..24). Sums wrap, differences of sums are exact as long as
/// they fit, which the bounds on what is kept see to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load(pub u64);

impl Load {
    const OCTETS_SHIFT: u32 = 24;

    /// One frame of `octets`.
    #[inline(always)]
    pub const fn frame(octets: u64) -> Self {
        Self(octets << Self::OCTETS_SHIFT | 1)
    }

    /// What is counted in `held` and not in `sent`.
    #[inline(always)]
    pub const fn between(sent: u64, held: u64) -> Self {
        Self(held.wrapping_sub(sent))
    }

    /// Its frames.
    #[inline(always)]
    pub const fn frames(self) -> u64 {
        self.0 & ((1 << Self::OCTETS_SHIFT) - 1)
    }

    /// Its octets.
    #[inline(always)]
    pub const fn octets(self) -> u64 {
        self.0 >> Self::OCTETS_SHIFT
    }
}

/// Value of `HELD`: a user's frames, by slot. Counts on for ever.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Sum of the loads that were kept.
    pub held: u64,
    /// Sum of the loads that left again.
    pub sent: u64,
}

/// Value of `HOLD`: the hold of a switch, its terms and its sums. Entry 0 has the sums of all (`held`, `sent`) and the bound
/// on them (`bound`).
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    /// The service's address v ([`crate::frame::ip_word`]): what is for it is held.
    pub address: u64,
    /// From then on (CLOCK_MONOTONIC, ns) the program forwards.
    pub deadline: u64,
    /// Octets kept of one user at most (of all users, in entry 0), but for a frame per CPU that was on its way.
    pub bound: u64,
    /// Frames kept.
    pub frames: u64,
    /// Octets kept.
    pub octets: u64,
    /// Frames not kept: the user's bound was reached.
    pub dropped_user: u64,
    /// Frames not kept: the bound on all was reached.
    pub dropped_memory: u64,
    /// Frames forwarded because the deadline had passed.
    pub expired: u64,
    /// Entry 0: sum of the loads kept.
    pub held: u64,
    /// Entry 0: sum of the loads that left again. The daemon's, as all that follows.
    pub sent: u64,
    /// Frames sent on.
    pub sent_frames: u64,
    /// Octets sent on.
    pub sent_octets: u64,
    /// Frames kept by a daemon that ended with them, or refused by the interface.
    pub lost: u64,
    /// Frames sent on after the deadline.
    pub late: u64,
    /// When the release began.
    pub release_began: u64,
    /// When it ended; 0: not yet.
    pub release_ended: u64,
}

/// Words of [`Hold`], by place, for who has the map in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "as the fields of Hold")]
pub enum HoldWord {
    Address = 0,
    Deadline,
    Bound,
    Frames,
    Octets,
    DroppedUser,
    DroppedMemory,
    Expired,
    Held,
    Sent,
    SentFrames,
    SentOctets,
    Lost,
    Late,
    ReleaseBegan,
    ReleaseEnded,
}

/// Head of a record in `FRAMES`, before the frame as it came: slot (bits 0..32), switch (32..44), generation (44..64).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record(pub u64);

impl Record {
    /// For a frame of the user in `slot` with `word`.
    #[inline(always)]
    pub const fn new(slot: u32, word: crate::UserWord) -> Self {
        Self(slot as u64 | word.0 & 0xffff_ffff_0000_0000)
    }

    /// The user's slot.
    pub const fn slot(self) -> u32 {
        self.0 as u32
    }

    /// The switch that held it.
    pub const fn switch(self) -> u16 {
        (self.0 >> 32 & 0xfff) as u16
    }

    /// Whether it was kept under `word`, as far as generations tell.
    pub const fn same_generation(self, word: crate::SwitchWord) -> bool {
        crate::SwitchWord(self.0).same_generation(word)
    }
}

/// Octets of a [`Record`].
pub const RECORD_LEN: usize = 8;
/// Octets of the longest frame that is kept.
pub const LONGEST: usize = 16 << 10;

/// Value of `SCRATCH`: a record on its way into `FRAMES`.
#[repr(C)]
pub struct Scratch {
    /// [`Record`].
    pub record: u64,
    /// The frame.
    pub frame: [u8; LONGEST],
}

#[cfg(feature = "user")]
mod pod {
    use super::{Held, Hold};

    // SAFETY: repr(C), integers only, no padding (sizes are checked below), so every bit pattern is a value.
    unsafe impl aya::Pod for Held {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Hold {}

    const _: () = assert!(size_of::<Held>() == 16);
    const _: () = assert!(size_of::<Hold>() == 8 * (super::HoldWord::ReleaseEnded as usize + 1));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        SwitchWord, UserWord,
        words::{Phase, Selector},
    };

    #[test]
    fn loads_add_up_and_come_apart_also_when_the_sums_wrap() {
        for start in [0, u64::MAX - 5, (1 << 24) - 2, u64::MAX << 24] {
            let sent: u64 = start;
            let mut held = sent;
            let (mut frames, mut octets) = (0, 0);
            for len in [60, 1514, 9018, 64, 60] {
                held = held.wrapping_add(Load::frame(len).0);
                (frames, octets) = (frames + 1, octets + len);
            }
            let load = Load::between(sent, held);
            assert_eq!((load.frames(), load.octets()), (frames, octets), "{start:x}");
        }
        assert_eq!(Load::between(7, 7), Load::default());
    }

    #[test]
    fn a_record_keeps_its_parts_apart() {
        let record = Record::new(u32::MAX, UserWord::staged(0, 0, 0, 0));
        assert_eq!((record.slot(), record.switch()), (u32::MAX, 0));
        let record = Record::new(7, UserWord::staged(0xffff, 0xffff, 0xfff, 5));
        assert_eq!((record.slot(), record.switch()), (7, 0xfff));
        assert!(record.same_generation(SwitchWord::new(Selector::B, Phase::Drain, 5)));
        assert!(!record.same_generation(SwitchWord::new(Selector::B, Phase::Drain, 6)));
    }

    #[test]
    fn the_words_are_where_the_fields_are() {
        assert_eq!(core::mem::offset_of!(Hold, expired), HoldWord::Expired as usize * 8);
        assert_eq!(core::mem::offset_of!(Hold, sent), HoldWord::Sent as usize * 8);
        assert_eq!(core::mem::offset_of!(Hold, release_ended), HoldWord::ReleaseEnded as usize * 8);
        assert_eq!(core::mem::offset_of!(Scratch, frame), RECORD_LEN);
    }
}
