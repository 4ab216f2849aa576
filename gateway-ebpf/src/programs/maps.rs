//! The maps of the programs, and what is read from them: each word with one volatile load, as the daemon stores it.

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, DevMap, HashMap, PerCpuArray},
};
use gateway_ebpf::{
    Access, Link, NETWORKS, Network, Outcome, PORTS, Router, Run, SWITCHES, Selection, SwitchWord, User,
    UserKey, UserWord, VIDS,
    frame::Ip6Words,
    home::{GROUP, homes},
};

/// How often a user's word is read when it and its switch are of different generations.
const READS: u32 = 4;

// Sizes marked "set at load" are placeholders for what the daemon's configuration and the machine ask for. Users have few
// of the addresses there is room for, so those take memory when they are there.
#[map]
pub static USER: Array<[User; GROUP as usize]> = Array::with_max_entries(1024, BPF_F_MMAPABLE); // set at load
#[map]
pub static USER_INDEX: HashMap<UserKey, u32> = HashMap::with_max_entries(1024, 0); // set at load
#[map]
pub static USER_BY_MAC: HashMap<u64, u32> = HashMap::with_max_entries(1024, 0); // set at load
#[map]
pub static USER_BY_IP: HashMap<u32, u32> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC); // set at load
#[map]
pub static USER_BY_IP6: HashMap<Ip6Words, u32> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC); // set at load
#[map]
pub static SWITCH: Array<u64> = Array::with_max_entries(SWITCHES, BPF_F_MMAPABLE);
#[map]
pub static NETWORK: Array<Network> = Array::with_max_entries(NETWORKS, BPF_F_MMAPABLE);
#[map]
pub static NETWORK_BY_VID: Array<u64> = Array::with_max_entries(VIDS, BPF_F_MMAPABLE);
#[map]
pub static PORT: Array<u64> = Array::with_max_entries(PORTS, BPF_F_MMAPABLE);
#[map]
pub static DEVICE: DevMap = DevMap::with_max_entries(PORTS, 0);
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Outcome::ALL.len() as u32, 0);
#[map]
pub static RUN: Array<Run> = Array::with_max_entries(1, BPF_F_MMAPABLE); // set at load
#[map]
pub static LAST_OLD: Array<u64> = Array::with_max_entries(SWITCHES, BPF_F_MMAPABLE); // set at load

#[unsafe(no_mangle)]
static VIRTUAL_ROUTER_MAC: u64 = 0; // set at load

#[unsafe(no_mangle)]
static USER_GROUPS: u32 = 0; // set at load

pub fn user_groups() -> u32 {
    // SAFETY: a constant of this program; volatile because its value is put there at load.
    unsafe { read_volatile(&raw const USER_GROUPS) }
}

pub fn virtual_router_mac() -> u64 {
    // SAFETY: a constant of this program; volatile because its value is put there at load.
    unsafe { read_volatile(&raw const VIRTUAL_ROUTER_MAC) }
}

/// A user, found by a frame.
pub struct FoundUser {
    user: *const User,
    pub identity: u64,
}

impl FoundUser {
    /// The user in `slot`, if it still is the one with `mac`.
    #[inline(always)]
    pub fn by_mac(slot: u32, mac: u64) -> Option<Self> {
        let found = Self::in_slot(slot)?;
        (User::mac_of(found.identity) == mac).then_some(found)
    }

    #[inline(always)]
    pub fn in_slot(slot: u32) -> Option<Self> {
        let group = USER.get_ptr(slot / GROUP)?.cast::<User>();
        // SAFETY: one of the group's entries.
        Some(Self::at(unsafe { group.add((slot % GROUP) as usize) }))
    }

    /// The user with `mac` whose way in `is_right`, if the user is at home; and the slot. See [`gateway_ebpf::home`].
    #[inline(always)]
    pub fn at_home(mac: u64, is_right: impl Fn(Access) -> bool) -> Option<(u32, Self, Access)> {
        for home in homes(mac, user_groups()) {
            let entries = USER.get_ptr(home.group)?.cast::<User>();
            for slot in home.slots() {
                // SAFETY: one of the group's entries.
                let found = Self::at(unsafe { entries.add((slot % GROUP) as usize) });
                if User::mac_of(found.identity) == mac {
                    let access = found.access();
                    if is_right(access) {
                        return Some((slot, found, access));
                    }
                }
            }
        }
        None
    }

    #[inline(always)]
    fn at(user: *const User) -> Self {
        // SAFETY: an element of the map, read as the one word that the daemon writes.
        Self { user, identity: unsafe { read_volatile(&raw const (*user).identity) } }
    }

    #[inline(always)]
    pub fn access(&self) -> Access {
        // SAFETY: an element of the map, read as the one word that the daemon writes.
        Access(unsafe { read_volatile(&raw const (*self.user).access) })
    }

    #[inline(always)]
    pub fn word(&self) -> UserWord {
        // SAFETY: an element of the map, read as the one word that the daemon writes.
        UserWord(unsafe { read_volatile(&raw const (*self.user).word) })
    }

    /// The user's networks now. `None` if word and switch do not agree.
    #[inline(always)]
    pub fn select(&self, word: UserWord) -> Option<Selection> {
        let mut word = word;
        for _ in 0..READS {
            let switch = SWITCH.get_ptr(word.switch())?;
            // SAFETY: an element of the map, read as the one word that the daemon writes.
            let switch = SwitchWord(unsafe { read_volatile(switch) });
            if let Some(selection) = word.select(switch) {
                return Some(selection);
            }
            word = self.word();
        }
        None
    }
}

/// The words of a network.
#[derive(Clone, Copy)]
pub struct FoundNetwork(*const Network);

impl FoundNetwork {
    #[inline(always)]
    pub fn at(index: u16) -> Option<Self> {
        NETWORK.get_ptr(index.into()).map(Self)
    }

    #[inline(always)]
    pub fn router(&self) -> Router {
        // SAFETY: an element of the map, read as the one word that the daemon writes.
        Router(unsafe { read_volatile(&raw const (*self.0).router) })
    }

    #[inline(always)]
    pub fn link(&self) -> Link {
        // SAFETY: as above.
        Link(unsafe { read_volatile(&raw const (*self.0).link) })
    }

    /// The router's address r; 0: none.
    #[inline(always)]
    pub fn address(&self) -> u32 {
        // SAFETY: as above.
        unsafe { read_volatile(&raw const (*self.0).address) as u32 }
    }

    /// Whether `address` is the router's IPv6 address.
    #[inline(always)]
    pub fn has_address6(&self, address: Ip6Words) -> bool {
        // SAFETY: as above; half a change is the address of nobody.
        let own = unsafe { read_volatile(&raw const (*self.0).address6) };
        own == address && own != [0, 0]
    }

    /// The interface its frames come in on.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { read_volatile(&raw const (*self.0).ifindex) as u32 }
    }
}
