//! The 64-bit words of the maps, and the rule that makes a network of them.

use crate::frame::Ip6Words;

/// Bit where the generation starts, in a user's word and in a switch's: the words agree if all above it is equal.
const GENERATION_SHIFT: u32 = 44;
/// Bit where the phase of a switch starts.
const PHASE_SHIFT: u32 = 1;
/// Largest switch index that fits a user's word.
const SWITCH_MASK: u64 = 0xfff;

/// Key of `USER_INDEX`: who sent a frame. A user is known by its MAC on an access interface, by the interface alone,
/// or by a tag on it (with or without MAC).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UserKey {
    /// Source MAC ([`crate::frame::mac_word`]), or [`UserKey::ANY_MAC`].
    pub mac: u64,
    /// Access interface it came in on.
    pub ifindex: u32,
    /// VID of the access side's own tag; 0: none.
    pub tag: u32,
}

impl UserKey {
    /// Whatever the source MAC is; no frame has it.
    pub const ANY_MAC: u64 = 1 << 48;
}

/// Value of `USER`. Zero: no user.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// [`UserWord`].
    pub word: u64,
    /// The user's MAC (lower 48 bits; 0: not known by one) and the port it is behind. Compared with the frame after the
    /// look-up: the kernel reuses elements of hash maps at once, so an index may be another user's.
    pub identity: u64,
    /// [`Access`].
    pub access: u64,
    /// Keeps an element within one cache line.
    pub spare: u64,
}

impl User {
    /// The identity of a user.
    pub const fn identity(mac: u64, port: u16) -> u64 {
        mac | (port as u64) << 48
    }

    /// The MAC in an identity.
    #[inline(always)]
    pub const fn mac_of(identity: u64) -> u64 {
        identity & 0xffff_ffff_ffff
    }

    /// The port in an identity.
    #[inline(always)]
    pub const fn port_of(identity: u64) -> u32 {
        (identity >> 48) as u32
    }
}

/// How a user comes in: interface index (bits 0..32), VID of the access side's tag (32..44; 0: none), known by a MAC (44);
/// then what there is to do for the user's frames beside: source addresses are guarded (63).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access(pub u64);

impl Access {
    const BY_MAC: u64 = 1 << 44;
    /// All bits by which a user is told from others.
    const WHO: u64 = Self::BY_MAC | ((1 << 44) - 1);

    /// Through interface `ifindex`, tagged with `tag` unless that is 0.
    pub const fn new(ifindex: u32, tag: u16, guard: bool) -> Self {
        Self(ifindex as u64 | (tag as u64 & 0xfff) << 32 | (guard as u64) << 63)
    }

    /// The same of a user who is known by a MAC.
    #[inline(always)]
    #[must_use]
    pub const fn by_mac(self) -> Self {
        Self(self.0 | Self::BY_MAC)
    }

    /// Whether the user is known by a MAC.
    #[inline(always)]
    pub const fn is_by_mac(self) -> bool {
        self.0 & Self::BY_MAC != 0
    }

    /// Whether the user is known by a MAC, untagged, and there is nothing to be done for what is sent to the user.
    #[inline(always)]
    pub const fn is_plain(self) -> bool {
        self.0 & !(u32::MAX as u64 | 1 << 63) == Self::BY_MAC
    }

    /// Whether both come in the same way; what is to do beside does not count.
    #[inline(always)]
    pub const fn same_way(self, other: Self) -> bool {
        (self.0 ^ other.0) & Self::WHO == 0
    }

    /// The interface.
    #[inline(always)]
    pub const fn ifindex(self) -> u32 {
        self.0 as u32
    }

    /// VID of the access side's tag; 0: none.
    #[inline(always)]
    pub const fn tag(self) -> u16 {
        (self.0 >> 32) as u16 & 0xfff
    }

    /// Whether the user may send from its own addresses only.
    #[inline(always)]
    pub const fn guard(self) -> bool {
        self.0 >> 63 == 1
    }
}

/// A user's networks: `a` (bits 0..16), `b` (16..32), switch (32..44), generation (44..64).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserWord(pub u64);

impl UserWord {
    /// A user in no switch.
    pub const fn resting(network: u16) -> Self {
        Self::staged(network, network, 0, 0)
    }

    /// A user in switch `switch`: on `a` or on `b`, as `SWITCH[switch]` says. Of the generation the lower 20 bits count.
    pub const fn staged(a: u16, b: u16, switch: u16, generation: u64) -> Self {
        Self(
            a as u64
                | (b as u64) << 16
                | (switch as u64 & SWITCH_MASK) << 32
                | generation << GENERATION_SHIFT,
        )
    }

    /// The network while the selector is [`Selector::A`].
    #[inline(always)]
    pub const fn a(self) -> u16 {
        self.0 as u16
    }

    /// The network while the selector is [`Selector::B`].
    #[inline(always)]
    pub const fn b(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// Index into `SWITCH`; 0: in none.
    #[inline(always)]
    pub const fn switch(self) -> u32 {
        (self.0 >> 32 & SWITCH_MASK) as u32
    }

    /// The user's networks under `switch`. `None` if the two words are of different generations.
    #[inline(always)]
    pub const fn select(self, switch: SwitchWord) -> Option<Selection> {
        if (self.0 ^ switch.0) >> GENERATION_SHIFT != 0 {
            return None;
        }
        let network = match switch.selector() {
            Selector::A => self.a(),
            Selector::B => self.b(),
        };
        Some(Selection { network, also: self.a(), phase: switch.phase() })
    }
}

/// Which of a user's two networks is the user's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selector {
    /// The old one.
    A = 0,
    /// The new one.
    B = 1,
}

/// What becomes of the frames for the service, of a switch's users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// They go to the selected network.
    Forward = 0,
    /// They are kept.
    Hold = 1,
    /// What was kept is being sent on: the frames of a user of whom something is still kept line up behind it.
    Drain = 2,
}

/// A switch: selector (bit 0), phase (bits 1..3), generation (44..64).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SwitchWord(pub u64);

impl SwitchWord {
    /// `SWITCH[0]`, for ever.
    pub const REST: Self = Self(0);

    /// A switch in `phase`. Of the generation the lower 20 bits count.
    pub const fn new(selector: Selector, phase: Phase, generation: u64) -> Self {
        Self(selector as u64 | (phase as u64) << PHASE_SHIFT | generation << GENERATION_SHIFT)
    }

    /// Frames flow to the selected network.
    pub const fn forward(selector: Selector, generation: u64) -> Self {
        Self::new(selector, Phase::Forward, generation)
    }

    /// Whether both are of one generation, as far as words tell.
    pub const fn same_generation(self, other: Self) -> bool {
        (self.0 ^ other.0) >> GENERATION_SHIFT == 0
    }

    /// Which network.
    #[inline(always)]
    pub const fn selector(self) -> Selector {
        if self.0 & 1 == 0 { Selector::A } else { Selector::B }
    }

    /// Its phase.
    #[inline(always)]
    pub const fn phase(self) -> Phase {
        match self.0 >> PHASE_SHIFT & 3 {
            0 => Phase::Forward,
            1 => Phase::Hold,
            _ => Phase::Drain,
        }
    }
}

/// What a user's word and its switch make together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection {
    /// Where the user's frames go.
    pub network: u16,
    /// A second network whose frames for the user are still good: the old one between switch and finish. The same as
    /// `network` otherwise.
    pub also: u16,
    /// What becomes of the user's frames for the service.
    pub phase: Phase,
}

impl Selection {
    /// Whether a frame from `network` may reach the user.
    #[inline(always)]
    pub const fn accepts(self, network: u16) -> bool {
        network == self.network || network == self.also
    }
}

/// Value of `NETWORK`. Zero: none.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// [`Router`].
    pub router: u64,
    /// [`Link`].
    pub link: u64,
    /// The router's address r ([`crate::frame::ip_word`]); 0: none.
    pub address: u64,
    /// Interface its frames come in on.
    pub ifindex: u64,
    /// The router's IPv6 address ([`crate::frame::ip6_words`]); zero: none.
    pub address6: Ip6Words,
    /// Keeps an element on one cache line.
    pub spare: [u64; 2],
}

/// The router's MAC in a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Router(pub u64);

impl Router {
    /// Not known: nothing can be sent to it.
    pub const UNKNOWN: Self = Self(0);

    /// Known.
    pub const fn at(mac: u64) -> Self {
        Self(mac | 1 << 63)
    }

    /// Its MAC, if known.
    #[inline(always)]
    pub const fn mac(self) -> Option<u64> {
        if self.0 >> 63 == 1 { Some(self.0 & 0xffff_ffff_ffff) } else { None }
    }
}

/// How to reach a network: VID (bits 0..12; 0: untagged), PCP (12..15), PCP is set (15), port (16..32), the tag is a service
/// tag (32), in use (63).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link(pub u64);

impl Link {
    /// No such network.
    pub const NONE: Self = Self(0);

    /// Behind `port`, tagged with `vid` unless that is 0.
    pub const fn new(vid: u16, port: u16) -> Self {
        Self(vid as u64 & 0xfff | (port as u64) << 16 | 1 << 63)
    }

    /// Its tag is an 802.1ad service tag.
    #[must_use]
    pub const fn service(self) -> Self {
        Self(self.0 | 1 << 32)
    }

    /// Its frames are sent with this PCP.
    #[must_use]
    pub const fn with_pcp(self, pcp: u8) -> Self {
        Self(self.0 | 1 << 15 | (pcp as u64 & 7) << 12)
    }

    /// Whether there is a network.
    #[inline(always)]
    pub const fn in_use(self) -> bool {
        self.0 >> 63 == 1
    }

    /// Its VID; 0: untagged.
    #[inline(always)]
    pub const fn vid(self) -> u16 {
        self.0 as u16 & 0xfff
    }

    /// Whether there is a network, and it has a customer's tag.
    #[inline(always)]
    pub const fn is_customers(self) -> bool {
        self.0 & (1 << 63 | 1 << 32) == 1 << 63 && self.vid() != 0
    }

    /// Whether its tag is an 802.1ad service tag.
    #[inline(always)]
    pub const fn is_service(self) -> bool {
        self.0 >> 32 & 1 == 1
    }

    /// The TCI of a frame that had `tci` (0: none): PCP and DEI are kept, unless the network sets the PCP.
    #[inline(always)]
    pub const fn tci(self, tci: u16) -> u16 {
        let kept = if self.0 as u16 & 0x8000 == 0 {
            tci & 0xf000
        } else {
            tci & 0x1000 | (self.0 as u16 & 0x7000) << 1
        };
        kept | self.vid()
    }

    /// Its port.
    #[inline(always)]
    pub const fn port(self) -> u32 {
        (self.0 >> 16) as u16 as u32
    }
}

/// Index into `NETWORK_BY_VID`.
#[inline(always)]
pub const fn vid_index(service: bool, vid: u16) -> u32 {
    (service as u32) << 12 | vid as u32
}

/// Value of `RUN`: one CPU's run epoch, alone on its cache line. Odd while a program run that met a user in a switch is
/// under way on that CPU, so that the daemon can tell, without a system call, when no run is left that may have read the
/// selector before a store. Untouched while the frame's user is in no switch.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// Counts beginnings and ends.
    pub epoch: u64,
    _line: [u64; 7],
}

#[cfg(feature = "user")]
mod pod {
    use super::{Network, Run, User, UserKey};

    // SAFETY: repr(C), integers only, no padding (sizes are checked below), so every bit pattern is a value.
    unsafe impl aya::Pod for UserKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for User {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Network {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Run {}

    const _: () = assert!(size_of::<UserKey>() == 16);
    const _: () = assert!(size_of::<User>() == 32);
    const _: () = assert!(size_of::<Network>() == 64);
    const _: () = assert!(size_of::<Run>() == 64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_word_keeps_its_parts_apart() {
        let word = UserWord::staged(0xffff, 1, 0xfff, 0xfffff);
        assert_eq!((word.a(), word.b(), word.switch()), (0xffff, 1, 0xfff));
        let word = UserWord::staged(1, 0xffff, 1, 0);
        assert_eq!((word.a(), word.b(), word.switch()), (1, 0xffff, 1));
        assert_eq!(UserWord::resting(7), UserWord::staged(7, 7, 0, 0));
    }

    #[test]
    fn the_switch_decides_for_all_its_users() {
        let word = UserWord::staged(1, 2, 9, 5);
        let old = word.select(SwitchWord::forward(Selector::A, 5)).unwrap();
        assert_eq!(old.network, 1);
        assert!(old.accepts(1) && !old.accepts(2), "nothing changes by staging");
        let new = word.select(SwitchWord::forward(Selector::B, 5)).unwrap();
        assert_eq!(new.network, 2);
        assert!(new.accepts(1) && new.accepts(2) && !new.accepts(3), "both until finished");
    }

    #[test]
    fn the_phase_leaves_selector_and_generation_alone() {
        for selector in [Selector::A, Selector::B] {
            for phase in [Phase::Forward, Phase::Hold, Phase::Drain] {
                let word = SwitchWord::new(selector, phase, 0xfffff);
                assert_eq!((word.selector(), word.phase()), (selector, phase));
                assert!(word.same_generation(SwitchWord::forward(Selector::A, 0xfffff)));
                let selection = UserWord::staged(1, 2, 9, 0xfffff).select(word).unwrap();
                assert_eq!((selection.network, selection.phase), (1 + selector as u16, phase));
            }
        }
        assert_eq!(SwitchWord::REST.phase(), Phase::Forward);
    }

    #[test]
    fn another_generation_selects_nothing() {
        let word = UserWord::staged(1, 2, 9, 5);
        assert_eq!(word.select(SwitchWord::forward(Selector::B, 6)), None);
        assert_eq!(word.select(SwitchWord::REST), None);
        // the 20 bits that count
        assert!(word.select(SwitchWord::forward(Selector::A, 5 + (1 << 20))).is_some());
    }

    #[test]
    fn a_user_in_no_switch_is_on_a() {
        let word = UserWord::resting(3);
        assert_eq!(
            word.select(SwitchWord::REST),
            Some(Selection { network: 3, also: 3, phase: Phase::Forward })
        );
        assert_eq!(UserWord(0).select(SwitchWord::REST).unwrap().network, 0, "no user: no network");
    }

    #[test]
    fn networks_and_identities_keep_their_parts_apart() {
        let link = Link::new(4094, 63);
        assert_eq!((link.vid(), link.port(), link.in_use()), (4094, 63, true));
        assert!(Link::new(0, 0).in_use() && !Link::NONE.in_use());
        assert!(link.service().is_service() && !link.is_service());
        assert!(link.is_customers() && link.with_pcp(7).is_customers());
        for other in [link.service(), Link::new(0, 63), Link::NONE, Link(link.0 & !(1 << 63))] {
            assert!(!other.is_customers(), "{other:?}");
        }
        for tci in 0..=u16::MAX {
            assert_eq!(link.tci(tci), tci & 0xf000 | 4094, "kept");
            assert_eq!(link.service().with_pcp(5).tci(tci), tci & 0x1000 | 5 << 13 | 4094, "set");
        }
        let link = link.with_pcp(7).service();
        assert_eq!((link.vid(), link.port(), link.in_use()), (4094, 63, true));
        let access = Access::new(u32::MAX, 0xfff, false);
        assert_eq!((access.ifindex(), access.tag(), access.guard()), (u32::MAX, 0xfff, false));
        let access = Access::new(1, 0, true);
        assert_eq!((access.ifindex(), access.tag(), access.guard()), (1, 0, true));
        let by_mac = Access::new(u32::MAX, 0xfff, false).by_mac();
        assert_eq!((by_mac.ifindex(), by_mac.tag(), by_mac.guard()), (u32::MAX, 0xfff, false));
        assert!(by_mac.is_by_mac() && !access.is_by_mac());
        assert!(access.by_mac().is_plain() && Access::new(u32::MAX, 0, false).by_mac().is_plain());
        for other in
            [access, by_mac, Access(access.by_mac().0 | 1 << 62), Access(access.by_mac().0 | 1 << 45)]
        {
            assert!(!other.is_plain(), "{other:?}");
        }
        assert!(access.by_mac().same_way(Access::new(1, 0, false).by_mac()), "guarded or not");
        for other in [access, Access::new(2, 0, true).by_mac(), Access::new(1, 1, true).by_mac()] {
            assert!(!access.by_mac().same_way(other), "{other:?}");
        }
        assert_eq!(Router::at(0xffff_ffff_ffff).mac(), Some(0xffff_ffff_ffff));
        assert_eq!(Router::UNKNOWN.mac(), None);
        let identity = User::identity(0x0102_0304_0506, 9);
        assert_eq!((User::mac_of(identity), User::port_of(identity)), (0x0102_0304_0506, 9));
    }
}
