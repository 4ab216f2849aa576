//! What the gateway's XDP programs and its daemon share: map layouts, the rules that choose a user's network, and the
//! names of everything that can become of a frame.
//!
//! ```text
//!  MAC --home--> USER[slot] { identity, access, word }   (not at home, or not known by a MAC: hash maps -> slot)
//!                                                |
//!                        word: network a | network b | switch s | generation
//!                                                        |
//!                                     SWITCH[s]: selector, phase, generation      <- the one store of a commit
//!                                                        |
//!                                                a or b -+--NETWORK--> { router, link, addresses }
//! ```
//!
//! Invariants:
//! - Every field that changes while frames flow is one aligned 64-bit word: the daemon stores it atomically through its
//!   mapping (`BPF_F_MMAPABLE`), a program loads it once. No reader can see half a change.
//! - `SWITCH[0]` is zero for ever ("a, forward", generation 0), so a user who is in no switch needs no second look-up.
//! - Index 0 of `NETWORK` is no network: a zeroed user word sends nowhere.
//! - A user's entry stands where its MAC leads to ([`home`]), or where the hash maps say. It is complete before its identity
//!   is stored, which makes it be found, and is another user's only after a grace period.
//! - What a switch's phase keeps of its users' frames, and how that is counted: [`hold`].
//! - A slot, a switch and a network index are used again only after a grace period, in which every program run that may
//!   have read the old words has ended. The generation is the second line of defence.
#![no_std]

pub mod debug;
pub mod frame;
pub mod hold;
pub mod home;
pub mod outcome;
pub mod words;

pub use hold::{Held, Hold, Load, Record};
pub use outcome::Outcome;
pub use words::{Access, Link, Network, Router, Run, Selection, SwitchWord, User, UserKey, UserWord};

/// Slots of `SWITCH`; index 0 is the constant one.
pub const SWITCHES: u32 = 4096;
/// Slots of `NETWORK`; index 0 is no network. Twice the VIDs there are, so that a replaced network can wait for its grace
/// period.
pub const NETWORKS: u32 = 8192;
/// Slots of `NETWORK_BY_VID`: one for each VID of either kind of tag ([`words::vid_index`]), 0 for frames without one.
pub const VIDS: u32 = 8192;
/// Slots of `PORT` and `DEVICE`: the gateway's interfaces.
pub const PORTS: u32 = 16;

/// Version of everything pinned maps hold. To be raised when a word, a key or a rule that reads them changes its meaning.
pub const LAYOUT_VERSION: u32 = 4;

/// What a daemon compares before it takes over pinned maps: the version, and below it a digest of what must not differ
/// unnoticed: sizes, and the outcomes in their order.
pub const LAYOUT: u64 = (LAYOUT_VERSION as u64) << 32 | layout_digest() as u64;

/// FNV-1a over sizes and names.
const fn layout_digest() -> u32 {
    const fn mix(mut hash: u32, bytes: &[u8]) -> u32 {
        let mut i = 0;
        while i < bytes.len() {
            hash = (hash ^ bytes[i] as u32).wrapping_mul(0x0100_0193);
            i += 1;
        }
        // ends a name
        (hash ^ 0xff).wrapping_mul(0x0100_0193)
    }
    let mut hash = 0x811c_9dc5;
    let sizes = [
        SWITCHES,
        NETWORKS,
        VIDS,
        PORTS,
        size_of::<UserKey>() as u32,
        size_of::<User>() as u32,
        home::GROUP,
        size_of::<Network>() as u32,
        size_of::<Run>() as u32,
        size_of::<Hold>() as u32,
        size_of::<Held>() as u32,
        hold::LONGEST as u32,
    ];
    let mut i = 0;
    while i < sizes.len() {
        hash = mix(hash, &sizes[i].to_le_bytes());
        i += 1;
    }
    i = 0;
    while i < Outcome::ALL.len() {
        hash = mix(hash, Outcome::ALL[i].name().as_bytes());
        i += 1;
    }
    hash
}

/// Names of the maps, as the daemon asks for them.
pub mod maps {
    /// `Array<[User; GROUP]>` by group ([`crate::home`]), mmapable.
    pub const USER: &str = "USER";
    /// `HashMap<UserKey, u32>`: who sent this frame.
    pub const USER_INDEX: &str = "USER_INDEX";
    /// `HashMap<u64, u32>`: whom a frame from the WAN is for, by destination MAC.
    pub const USER_BY_MAC: &str = "USER_BY_MAC";
    /// `HashMap<u32, u32>`: whom an ARP request from the WAN is about, and who may send from it, by IPv4 address (as in
    /// the frame).
    pub const USER_BY_IP: &str = "USER_BY_IP";
    /// `HashMap<[u64; 2], u32>`: whom a neighbour solicitation from the WAN is about, by IPv6 address.
    pub const USER_BY_IP6: &str = "USER_BY_IP6";
    /// `Array<u64>` of [`crate::SwitchWord`], mmapable.
    pub const SWITCH: &str = "SWITCH";
    /// `Array<Network>`, mmapable.
    pub const NETWORK: &str = "NETWORK";
    /// `Array<u64>`, mmapable: kind of tag and VID -> index into `NETWORK`.
    pub const NETWORK_BY_VID: &str = "NETWORK_BY_VID";
    /// `Array<u64>`, mmapable: the largest frame (without tags) a port takes.
    pub const PORT: &str = "PORT";
    /// `DevMap`: port -> interface.
    pub const DEVICE: &str = "DEVICE";
    /// `PerCpuArray<u64>` by [`crate::Outcome`].
    pub const COUNTERS: &str = "COUNTERS";
    /// `Array<Run>`, mmapable: one cache line per CPU.
    pub const RUN: &str = "RUN";
    /// `Array<u64>`, mmapable: `cpu * SWITCHES + switch` -> when the last frame went out under the old network. One more
    /// row, after the last CPU's, is the daemon's: when it made the store, so that its successor knows.
    pub const LAST_OLD: &str = "LAST_OLD";
    /// `Array<Hold>`, mmapable, by switch; entry 0 is for all of them.
    pub const HOLD: &str = "HOLD";
    /// `Array<Held>`, mmapable, by slot.
    pub const HELD: &str = "HELD";
    /// `RingBuf` of [`crate::Record`]s with their frames, in the order they came.
    pub const FRAMES: &str = "FRAMES";
    /// `PerCpuArray<Scratch>` of one.
    pub const SCRATCH: &str = "SCRATCH";
    /// Read-only global: how many groups `USER` has.
    pub const USER_GROUPS: &str = "USER_GROUPS";
    /// Read-only global: the MAC the users know the router by, as [`crate::frame::mac_word`] makes it.
    pub const VIRTUAL_ROUTER_MAC: &str = "VIRTUAL_ROUTER_MAC";
}
