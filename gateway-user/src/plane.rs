//! The data plane: the XDP programs and their maps, as the daemon holds them.
//!
//! The commit of a switch is [`Plane::commit`]: one atomic 64-bit store. What follows it, [`Plane::window`], finds out how
//! long frames went on under the old network, without waiting for a timer:
//!
//! ```text
//!   daemon                                   program run, on each CPU, for a user in a switch
//!   store selector (full barrier)            epoch += 1 (full barrier)      odd: inside
//!   for each CPU: epoch odd? wait until      load selector, send the frame
//!     it moves on                            old network: LAST_OLD[cpu][switch] = now
//!   window = max(LAST_OLD) - store time      epoch += 1 (full barrier)      even: outside
//! ```
//!
//! A run that the daemon does not see inside has either ended, and its stamp is visible, or loads the selector after the
//! store. So when the loop is through, no frame will be sent under the old network any more, and the largest stamp is the
//! last such frame. The stamp is the program's verdict; the driver's transmit queue comes after it. The store time is taken
//! before the store, so the window is never too small.
//!
//! With [`Pins`] programs, links and maps are files and outlive the daemon: [`Plane::load_pinned`] takes maps over that are
//! there, [`Plane::reconcile`] makes them hold what the table says, touching only what differs, and [`Plane::attach_pinned`]
//! replaces an attached program that differs by one link update, so that every frame meets the old or the new one.
//!
//! Failures: [`PlaneError`] names what was done to what, and for the usual reasons what to do.

mod debug;

use std::{
    collections::{HashMap as Known, HashSet},
    fs, io,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsFd as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader, Pod,
    maps::{DevMap, HashMap, Map, MapData, MapError, PerCpuArray, xdp::XdpMapError},
    programs::{
        ProgramError, Xdp,
        links::{FdLink, PinnedLink},
        xdp::{XdpLink, XdpLinkId},
    },
};
use gateway_ebpf::{
    Access, Held, Hold, NETWORKS, Network, Outcome, PORTS, Run, SWITCHES, SwitchWord, User, UserKey, VIDS,
    hold::{HoldWord, Scratch},
    home::{GROUP, groups_for},
    maps,
};
use nix::{
    errno::Errno,
    time::{ClockId, clock_gettime},
};

use crate::{
    desired::ADDRESSES_MAX,
    hold::{Bounds, Holds, run_ended},
    link::Link,
    mac::Mac,
    mapping::Mapping,
    pins::{PinError, Pins, Shape},
    ports::Mode,
    ring::Ring,
    table::{ACCESS_PORT, KnownBy, SwitchAnswer, WAN_PORT, Write, slots_for},
};

/// A program of the gateway, and the interface it belongs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Towards the users.
    Access,
    /// Towards the provider.
    Wan,
}

impl Side {
    /// Name of program and role.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Access => "access",
            Self::Wan => "wan",
        }
    }

    /// Index into `PORT` and `DEVICE`.
    pub const fn port(self) -> u16 {
        match self {
            Self::Access => ACCESS_PORT,
            Self::Wan => WAN_PORT,
        }
    }
}

/// Errors of the data plane.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    /// The kernel or the privileges do not do.
    #[error("loading the XDP programs{}", because(.hint))]
    Load {
        /// What to do.
        hint: &'static str,
        /// Why.
        #[source]
        source: Box<EbpfError>,
    },
    /// A program could not be loaded or attached.
    #[error("{what} XDP program `{program}`{}{}", of(.interface), because(.hint))]
    Program {
        /// "loading", "attaching in native mode".
        what: &'static str,
        /// Which.
        program: &'static str,
        /// To which interface.
        interface: String,
        /// What to do.
        hint: &'static str,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
    /// The object does not have what the daemon expects.
    #[error("the XDP object has no {0}: daemon and programs are of different versions")]
    Object(&'static str),
    /// A map could not be used.
    #[error("map {map}: {what}")]
    Map {
        /// Which.
        map: &'static str,
        /// What was done.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Files of the data path.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A pinned link.
    #[error("{what} the {side} program's link {}", path.display())]
    PinnedLink {
        /// What was done.
        what: &'static str,
        /// Which.
        side: &'static str,
        /// Its file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Something about the kernel.
    #[error("{what}")]
    Kernel {
        /// What, and what to do.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn because(hint: &str) -> String {
    if hint.is_empty() { String::new() } else { format!(" ({hint})") }
}

fn of(interface: &str) -> String {
    if interface.is_empty() { String::new() } else { format!(" to interface `{interface}`") }
}

/// Capacity and constants of the programs.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How many users there may be.
    pub max_users: u32,
    /// The MAC the users know the router by.
    pub virtual_router_mac: Mac,
    /// How much may be held.
    pub hold: Bounds,
}

/// The store of a switch.
#[derive(Debug, Clone, Copy)]
pub struct Committed {
    /// Just before the store; nanoseconds of CLOCK_MONOTONIC, as the programs' stamps.
    pub at_ns: u64,
}

/// How a pinned program came to be attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attachment {
    /// It was attached, and is the same.
    Kept,
    /// Another one was attached, and has been replaced by one update of its link.
    Replaced,
    /// Nothing of ours was attached to this interface.
    New,
}

/// The programs and their maps. Dropping it detaches the programs, unless they are pinned.
pub struct Plane {
    ebpf: Ebpf,
    user: Arc<Mapping>,
    switch: Arc<Mapping>,
    network: Arc<Mapping>,
    by_vid: Mapping,
    port: Mapping,
    run: Arc<Mapping>,
    last_old: Mapping,
    holds: Arc<Holds>,
    user_index: HashMap<MapData, UserKey, u32>,
    by_mac: HashMap<MapData, u64, u32>,
    by_ip: HashMap<MapData, u32, u32>,
    by_ip6: HashMap<MapData, [u64; 2], u32>,
    device: DevMap<MapData>,
    counters: PerCpuArray<MapData, u64>,
    /// By port; 0: none.
    ifindex: [u32; PORTS as usize],
    /// What can be debugged.
    attached: Vec<debug::Attached>,
    trace: Option<debug::Trace>,
}

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/gateway"));

impl Plane {
    /// Loads programs and maps into the kernel; attaches nothing.
    ///
    /// # Errors
    /// [`PlaneError`], with a hint for missing privileges.
    pub fn load(options: &Options) -> Result<Self, PlaneError> {
        Self::load_with(options, None)
    }

    /// As [`Plane::load`], with maps that are files: those of `pins` that are there are taken over as they are, the others
    /// made.
    ///
    /// # Errors
    /// [`PlaneError`]; [`PinError::Shape`] if a map is not what the programs expect.
    pub fn load_pinned(options: &Options, pins: &Pins) -> Result<Self, PlaneError> {
        Self::load_with(options, Some(pins))
    }

    fn load_with(options: &Options, pins: Option<&Pins>) -> Result<Self, PlaneError> {
        grace_is_possible()?;
        let cpus = possible_cpus()?;
        let slots = slots_for(options.max_users);
        let virtual_router_mac = options.virtual_router_mac.word();
        let mut memory = options.hold.memory;
        if let Some(pins) = pins
            && let Some(pinned) = pins.max_entries(maps::FRAMES)?
            && pinned != memory
        {
            let mib = pinned >> 20;
            tracing::warn!(
                mib,
                "held frames have the memory they were pinned with; `handover-gateway detach` first to change it"
            );
            memory = pinned;
        }
        let shapes = shapes(options.max_users, cpus, memory);
        let mut loader = EbpfLoader::new();
        for (name, shape) in shapes {
            if let Some(pins) = pins {
                pins.check_shape(name, shape)?;
                loader.map_pin_path(name, pins.map(name));
            }
            loader.map_max_entries(name, shape.max_entries);
        }
        let groups = groups_for(options.max_users);
        let mut ebpf = loader
            .override_global(maps::VIRTUAL_ROUTER_MAC, &virtual_router_mac, true)
            .override_global(maps::USER_GROUPS, &groups, true)
            .load(OBJECT)
            .map_err(|source| PlaneError::Load { hint: load_hint(&source), source: source.into() })?;

        for side in [Side::Access, Side::Wan] {
            xdp(&mut ebpf, side)?.load().map_err(|source| PlaneError::Program {
                what: "loading",
                program: side.name(),
                interface: String::new(),
                hint: "",
                source: source.into(),
            })?;
        }
        let user = Arc::new(mapping(&ebpf, maps::USER, slots, 4)?);
        let switch = Arc::new(mapping(&ebpf, maps::SWITCH, SWITCHES, 1)?);
        let network = Arc::new(mapping(&ebpf, maps::NETWORK, NETWORKS, 8)?);
        let run = Arc::new(mapping(&ebpf, maps::RUN, cpus, 8)?);
        let holds = Holds {
            user: Arc::clone(&user),
            switch: Arc::clone(&switch),
            network: Arc::clone(&network),
            run: Arc::clone(&run),
            hold: mapping(&ebpf, maps::HOLD, SWITCHES, HoldWord::ReleaseEnded as usize + 1)?,
            held: mapping(&ebpf, maps::HELD, slots, 2)?,
            ring: Mutex::new(ring(&ebpf, memory)?),
            bounds: Bounds { memory, ..options.hold },
        };
        holds.enforce();
        Ok(Self {
            user,
            switch,
            network,
            run,
            holds: Arc::new(holds),
            by_vid: mapping(&ebpf, maps::NETWORK_BY_VID, VIDS, 1)?,
            port: mapping(&ebpf, maps::PORT, PORTS, 1)?,
            last_old: mapping(&ebpf, maps::LAST_OLD, (cpus + 1) * SWITCHES, 1)?,
            user_index: typed(&mut ebpf, maps::USER_INDEX)?,
            by_mac: typed(&mut ebpf, maps::USER_BY_MAC)?,
            by_ip: typed(&mut ebpf, maps::USER_BY_IP)?,
            by_ip6: typed(&mut ebpf, maps::USER_BY_IP6)?,
            device: typed(&mut ebpf, maps::DEVICE)?,
            counters: typed(&mut ebpf, maps::COUNTERS)?,
            ebpf,
            ifindex: [0; _],
            attached: Vec::new(),
            trace: None,
        })
    }

    /// Tells the programs which interface a port is, and the longest frame it takes (the outer tag not counted).
    ///
    /// # Errors
    /// [`PlaneError::Map`] if there is no such interface.
    pub fn set_port(&mut self, port: u16, ifindex: u32, largest_frame: u64) -> Result<(), PlaneError> {
        let known =
            self.ifindex.get_mut(usize::from(port)).ok_or(PlaneError::Object("port of that number"))?;
        if *known != ifindex {
            self.device
                .set(port.into(), ifindex, None, 0)
                .map_err(|source: XdpMapError| map_error(maps::DEVICE, "naming an interface", source))?;
            *known = ifindex;
        }
        self.port.word(port.into(), 0).store(largest_frame, Ordering::Release);
        Ok(())
    }

    /// Attaches a program to an interface, in native mode or not at all.
    ///
    /// # Errors
    /// [`PlaneError::Program`] with the usual reason for the kernel's answer.
    pub fn attach(&mut self, side: Side, name: &str, ifindex: u32) -> Result<XdpLinkId, PlaneError> {
        self.attach_in(side, name, ifindex, Mode::Native)
    }

    /// Attaches a program to an interface in this mode, or not at all.
    ///
    /// # Errors
    /// [`PlaneError::Program`] with the usual reason for the kernel's answer.
    pub fn attach_in(
        &mut self,
        side: Side,
        name: &str,
        ifindex: u32,
        mode: Mode,
    ) -> Result<XdpLinkId, PlaneError> {
        xdp(&mut self.ebpf, side)?.attach_to_if_index(ifindex, mode.xdp()).map_err(|source| {
            PlaneError::Program {
                what: match mode {
                    Mode::Native => "attaching in native mode",
                    Mode::Generic => "attaching in generic mode",
                },
                program: side.name(),
                interface: name.into(),
                hint: attach_hint(&source),
                source: source.into(),
            }
        })
    }

    /// Attaches the program of `side` and pins its link, or takes over the one that is pinned: replaced by one update if it
    /// differs (or its constants or maps do), left alone if not.
    ///
    /// # Errors
    /// [`PlaneError`].
    pub fn attach_pinned(
        &mut self,
        (side, port): (Side, u16),
        interface: &Link,
        mode: Mode,
        same_constants: bool,
        pins: &Pins,
    ) -> Result<Attachment, PlaneError> {
        let path = pins.link(port);
        self.attached.push(debug::Attached::Pinned(side, path.clone()));
        let of_link =
            |what, source| PlaneError::PinnedLink { what, side: side.name(), path: path.clone(), source };
        let of_program = |what, hint, source| PlaneError::Program {
            what,
            program: side.name(),
            interface: interface.name.clone(),
            hint,
            source: Box::new(source),
        };
        let program = xdp(&mut self.ebpf, side)?;
        let tag = program.info().map_err(|e| of_program("asking about", "", e))?.tag();
        let attachment = match pins.attached(port)? {
            Some(old) if old.ifindex == interface.index => {
                if old.program_tag == tag && same_constants {
                    return Ok(Attachment::Kept);
                }
                let link = PinnedLink::from_pin(&path).map_err(|e| of_link("opening", e.into()))?;
                let link = XdpLink::try_from(FdLink::from(link)).map_err(|e| of_link("opening", e.into()))?;
                program.attach_to_link(link).map_err(|e| of_program("replacing", attach_hint(&e), e))?;
                Attachment::Replaced
            }
            old => {
                if old.is_some() {
                    pins.remove_link(port)?;
                }
                let id = self.attach_in(side, &interface.name, interface.index, mode)?;
                let link =
                    xdp(&mut self.ebpf, side)?.take_link(id).map_err(|e| of_program("attaching", "", e))?;
                let link = FdLink::try_from(link).map_err(|e| {
                    of_link("pinning (needs kernel 5.9, which has links of XDP programs)", e.into())
                })?;
                link.pin(&path).map_err(|e| of_link("pinning", e.into()))?;
                Attachment::New
            }
        };
        // the link holds the program; this file is for people and tools
        let file = pins.program(side);
        pins.unlink(&file)?;
        xdp(&mut self.ebpf, side)?.pin(&file).map_err(|e| of_link("pinning the program beside", e.into()))?;
        Ok(attachment)
    }

    /// Makes the maps hold `contents` and nothing else, while frames flow: only what differs is touched. Returns how many
    /// things did.
    ///
    /// # Errors
    /// [`PlaneError::Map`]. Repeating it is harmless.
    pub fn reconcile(&mut self, contents: &[Write]) -> Result<usize, PlaneError> {
        let (mut index, mut by_mac) = (Known::new(), Known::new());
        let (mut by_ip, mut by_ip6) = (Known::new(), Known::new());
        let (mut slots, mut networks, mut vids) = (HashSet::new(), HashSet::new(), HashSet::new());
        for write in contents {
            match *write {
                Write::AddUser { known_by, slot } => {
                    index.insert(self.key(known_by), slot);
                    if let Some(mac) = known_by.mac {
                        by_mac.insert(mac.word(), slot);
                    }
                }
                Write::AddAddress { address: IpAddr::V4(address), slot } => {
                    by_ip.insert(Write::address_word(address), slot);
                }
                Write::AddAddress { address: IpAddr::V6(address), slot } => {
                    by_ip6.insert(Write::address6_words(address), slot);
                }
                Write::UserWord { slot, .. } => {
                    slots.insert(slot as usize);
                }
                Write::NetworkLink { index, .. } => {
                    networks.insert(usize::from(index));
                }
                Write::Vid { tag, .. } => {
                    vids.insert(usize::from(tag));
                }
                _ => {}
            }
        }
        let mut changes = forget_others(&mut self.user_index, maps::USER_INDEX, &index)?;
        changes += forget_others(&mut self.by_mac, maps::USER_BY_MAC, &by_mac)?;
        changes += forget_others(&mut self.by_ip, maps::USER_BY_IP, &by_ip)?;
        changes += forget_others(&mut self.by_ip6, maps::USER_BY_IP6, &by_ip6)?;
        for write in contents {
            if !self.has(write) {
                self.apply(std::slice::from_ref(write))?;
                changes += 1;
            }
        }
        let mut clear = |mapping: &Mapping, keep: &HashSet<usize>, words: &[usize]| {
            for entry in (0..mapping.len()).filter(|entry| !keep.contains(entry)) {
                for word in words {
                    if mapping.word(entry, *word).swap(0, Ordering::AcqRel) != 0 {
                        changes += 1;
                    }
                }
            }
        };
        clear(&self.user, &slots, &[1, 0, 2]);
        clear(&self.by_vid, &vids, &[0]);
        clear(&self.network, &networks, &[1, 0, 2, 3, 4, 5]);
        Ok(changes)
    }

    /// Whether the maps hold this already.
    fn has(&self, write: &Write) -> bool {
        let is = |mapping: &Mapping, entry: usize, word, value: u64| {
            mapping.word(entry, word).load(Ordering::Acquire) == value
        };
        match *write {
            Write::UserWord { slot, word } => is(&self.user, slot as usize, 0, word.0),
            Write::UserIdentity { slot, identity } => is(&self.user, slot as usize, 1, identity),
            Write::UserAccess { slot, known_by, guard } => {
                is(&self.user, slot as usize, 2, self.access(known_by, guard))
            }
            Write::AddUser { known_by, slot } => {
                self.user_index.get(&self.key(known_by), 0).is_ok_and(|s| s == slot)
                    && known_by.mac.is_none_or(|mac| self.by_mac.get(&mac.word(), 0).is_ok_and(|s| s == slot))
            }
            Write::AddAddress { address: IpAddr::V4(address), slot } => {
                self.by_ip.get(&Write::address_word(address), 0).is_ok_and(|s| s == slot)
            }
            Write::AddAddress { address: IpAddr::V6(address), slot } => {
                self.by_ip6.get(&Write::address6_words(address), 0).is_ok_and(|s| s == slot)
            }
            Write::Switch { index, word } => is(&self.switch, index.into(), 0, word.0),
            Write::NetworkRouter { index, router } => is(&self.network, index.into(), 0, router.0),
            Write::NetworkLink { index, link } => is(&self.network, index.into(), 1, link.0),
            Write::NetworkAddress { index, .. } => {
                let words = (2..).zip(self.network_addresses(write));
                words.into_iter().all(|(word, value)| is(&self.network, index.into(), word, value))
            }
            Write::Vid { tag, index } => is(&self.by_vid, tag.into(), 0, index.into()),
            Write::RemoveUser { .. } | Write::RemoveAddress { .. } => false,
        }
    }

    /// What a switch says now; what its store, if it was made, was answered with: the window by the programs' stamps and the
    /// store's own; and the address it holds, if it does.
    pub fn switch_word(&self, index: u16) -> (SwitchWord, SwitchAnswer, Ipv4Addr) {
        let word = SwitchWord(self.switch.word(index.into(), 0).load(Ordering::SeqCst));
        let at_ns = self.stored_at(index).load(Ordering::Acquire);
        let last = (0..self.run.len()).map(|cpu| self.stamp(cpu, index).load(Ordering::Acquire)).max();
        let window_ns = last.unwrap_or(0).saturating_sub(at_ns);
        (word, SwitchAnswer { window_ns, store_latency_ns: 0 }, self.holds.address(index))
    }

    /// What a network says now.
    pub fn network_words(&self, index: u16) -> Network {
        let word = |word| self.network.word(index.into(), word).load(Ordering::Acquire);
        Network {
            router: word(0),
            link: word(1),
            address: word(2),
            ifindex: word(3),
            address6: [word(4), word(5)],
            spare: [word(6), word(7)],
        }
    }

    /// The words of `NETWORK` from `address` on, as a [`Write::NetworkAddress`] wants them.
    fn network_addresses(&self, write: &Write) -> [u64; 4] {
        let Write::NetworkAddress { address, address6, port, .. } = *write else { return [0; 4] };
        let address = address.map_or(0, |a| Write::address_word(a).into());
        let [high, low] = address6.map_or([0, 0], Write::address6_words);
        [address, self.ifindex[usize::from(port)].into(), high, low]
    }

    /// The word of `USER` for how a user comes in.
    fn access(&self, known_by: KnownBy, guard: bool) -> u64 {
        let access = Access::new(self.ifindex[usize::from(known_by.port)], known_by.tag, guard);
        if known_by.mac.is_some() { access.by_mac().0 } else { access.0 }
    }

    fn stamp(&self, cpu: usize, index: u16) -> &AtomicU64 {
        self.last_old.word(cpu * SWITCHES as usize + usize::from(index), 0)
    }

    /// When the daemon made the store: the row after the last CPU's.
    fn stored_at(&self, index: u16) -> &AtomicU64 {
        self.stamp(self.run.len(), index)
    }

    /// Carries out what the table decided, in order.
    ///
    /// # Errors
    /// [`PlaneError::Map`] with the first that failed; the ones before it are done. Repeating the list is harmless.
    pub fn apply(&mut self, writes: &[Write]) -> Result<(), PlaneError> {
        for write in writes {
            match *write {
                Write::UserWord { slot, word } => {
                    self.user.word(slot as usize, 0).store(word.0, Ordering::Release);
                }
                Write::UserIdentity { slot, identity } => {
                    self.user.word(slot as usize, 1).store(identity, Ordering::Release);
                }
                Write::UserAccess { slot, known_by, guard } => {
                    let access = self.access(known_by, guard);
                    self.user.word(slot as usize, 2).store(access, Ordering::Release);
                }
                Write::AddUser { known_by, slot } => {
                    self.index_user(known_by, slot)?;
                    if let Some(mac) = known_by.mac {
                        insert(&mut self.by_mac, maps::USER_BY_MAC, mac.word(), slot)?;
                    }
                }
                Write::RemoveUser { known_by } => {
                    let key = self.key(known_by);
                    remove(&mut self.user_index, maps::USER_INDEX, key)?;
                    if let Some(mac) = known_by.mac {
                        remove(&mut self.by_mac, maps::USER_BY_MAC, mac.word())?;
                    }
                }
                Write::AddAddress { address: IpAddr::V4(address), slot } => {
                    insert(&mut self.by_ip, maps::USER_BY_IP, Write::address_word(address), slot)?;
                }
                Write::AddAddress { address: IpAddr::V6(address), slot } => {
                    insert(&mut self.by_ip6, maps::USER_BY_IP6, Write::address6_words(address), slot)?;
                }
                Write::RemoveAddress { address: IpAddr::V4(address) } => {
                    remove(&mut self.by_ip, maps::USER_BY_IP, Write::address_word(address))?;
                }
                Write::RemoveAddress { address: IpAddr::V6(address) } => {
                    remove(&mut self.by_ip6, maps::USER_BY_IP6, Write::address6_words(address))?;
                }
                Write::Switch { index, word } => {
                    self.switch.word(index.into(), 0).store(word.0, Ordering::SeqCst);
                }
                Write::NetworkRouter { index, router } => {
                    self.network.word(index.into(), 0).store(router.0, Ordering::Release);
                }
                Write::NetworkLink { index, link } => {
                    self.network.word(index.into(), 1).store(link.0, Ordering::Release);
                }
                Write::NetworkAddress { index, .. } => {
                    for (word, value) in (2..).zip(self.network_addresses(write)) {
                        self.network.word(index.into(), word).store(value, Ordering::Release);
                    }
                }
                Write::Vid { tag, index } => {
                    self.by_vid.word(tag.into(), 0).store(index.into(), Ordering::Release);
                }
            }
        }
        Ok(())
    }

    fn key(&self, known_by: KnownBy) -> UserKey {
        UserKey {
            mac: known_by.mac.map_or(UserKey::ANY_MAC, Mac::word),
            ifindex: self.ifindex[usize::from(known_by.port)],
            tag: known_by.tag.into(),
        }
    }

    /// Says which slot a user has: one hash-map update by system call.
    ///
    /// # Errors
    /// [`PlaneError::Map`].
    pub fn index_user(&mut self, known_by: KnownBy, slot: u32) -> Result<(), PlaneError> {
        let key = self.key(known_by);
        insert(&mut self.user_index, maps::USER_INDEX, key, slot)
    }

    /// The commit: from this store on all users of the switch are on the network it selects. No system call.
    pub fn commit(&self, index: u16, word: SwitchWord) -> Committed {
        let at_ns = monotonic_ns();
        self.stored_at(index).store(at_ns, Ordering::Release);
        self.switch.word(index.into(), 0).store(word.0, Ordering::SeqCst);
        Committed { at_ns }
    }

    /// Store -> last frame sent under the old network, on any CPU; 0 if none was. Returns once no program run is left that
    /// can have read the selector before the store (microseconds).
    pub fn window(&self, index: u16, committed: Committed) -> u64 {
        let begun = Instant::now();
        let mut last = 0;
        for cpu in 0..self.run.len() {
            if !run_ended(&self.run, cpu, begun) {
                tracing::warn!(cpu, "a program run did not end; the switch window is a lower bound");
                last = last.max(monotonic_ns());
            }
            last = last.max(self.stamp(cpu, index).load(Ordering::Acquire));
        }
        last.saturating_sub(committed.at_ns)
    }

    /// Hold and release.
    pub fn holds(&self) -> &Arc<Holds> {
        &self.holds
    }

    /// Frames by outcome, summed over the CPUs.
    ///
    /// # Errors
    /// [`PlaneError::Map`].
    pub fn counters(&self) -> Result<Vec<(Outcome, u64)>, PlaneError> {
        Outcome::ALL
            .iter()
            .map(|&outcome| {
                let frames = self
                    .counters
                    .get(&(outcome as u32), 0)
                    .map_err(|source| map_error(maps::COUNTERS, "reading", source))?;
                Ok((outcome, frames.iter().sum()))
            })
            .collect()
    }

    /// A program, for running it on a frame (`BPF_PROG_TEST_RUN`).
    ///
    /// # Errors
    /// [`PlaneError::Object`].
    pub fn program(&self, side: Side) -> Result<&Xdp, PlaneError> {
        self.ebpf
            .program(side.name())
            .and_then(|program| program.try_into().ok())
            .ok_or(PlaneError::Object(side.name()))
    }
}

fn xdp(ebpf: &mut Ebpf, side: Side) -> Result<&mut Xdp, PlaneError> {
    xdp_named(ebpf, side.name())
}

fn xdp_named<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Xdp, PlaneError> {
    ebpf.program_mut(name).and_then(|program| program.try_into().ok()).ok_or(PlaneError::Object(name))
}

fn map_error(
    map: &'static str,
    what: &'static str,
    source: impl std::error::Error + Send + Sync + 'static,
) -> PlaneError {
    PlaneError::Map { map, what, source: Box::new(source) }
}

fn typed<T>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, PlaneError>
where
    T: TryFrom<Map, Error = MapError>,
{
    let map = ebpf.take_map(name).ok_or(PlaneError::Object(name))?;
    T::try_from(map).map_err(|source| map_error(name, "opening", source))
}

/// Every map of the programs with its sizes.
fn shapes(max_users: u32, cpus: u32, memory: u32) -> [(&'static str, Shape); 17] {
    const INDEX: u32 = size_of::<u32>() as u32;
    const WORD: u32 = size_of::<u64>() as u32;
    let shape = |key_size, value_size: usize, max_entries| Shape {
        key_size,
        value_size: value_size as u32,
        max_entries,
    };
    let word = size_of::<u64>();
    let addresses = max_users.saturating_mul(ADDRESSES_MAX as u32);
    [
        (maps::USER, shape(INDEX, GROUP as usize * size_of::<User>(), groups_for(max_users))),
        (maps::USER_INDEX, shape(size_of::<UserKey>() as u32, size_of::<u32>(), max_users)),
        (maps::USER_BY_MAC, shape(WORD, size_of::<u32>(), max_users)),
        (maps::USER_BY_IP, shape(INDEX, size_of::<u32>(), addresses)),
        // and the one made of the MAC
        (maps::USER_BY_IP6, shape(2 * WORD, size_of::<u32>(), addresses.saturating_add(max_users))),
        (maps::SWITCH, shape(INDEX, word, SWITCHES)),
        (maps::NETWORK, shape(INDEX, size_of::<Network>(), NETWORKS)),
        (maps::NETWORK_BY_VID, shape(INDEX, word, VIDS)),
        (maps::PORT, shape(INDEX, word, PORTS)),
        (maps::DEVICE, shape(INDEX, size_of::<[u32; 2]>(), PORTS)),
        (maps::COUNTERS, shape(INDEX, word, Outcome::ALL.len() as u32)),
        (maps::RUN, shape(INDEX, size_of::<Run>(), cpus)),
        (maps::LAST_OLD, shape(INDEX, word, (cpus + 1) * SWITCHES)),
        (maps::HOLD, shape(INDEX, size_of::<Hold>(), SWITCHES)),
        (maps::HELD, shape(INDEX, size_of::<Held>(), slots_for(max_users))),
        (maps::FRAMES, shape(0, 0, memory)),
        (maps::SCRATCH, shape(INDEX, size_of::<Scratch>(), 1)),
    ]
}

/// Removes the keys that are not among `known`. Returns how many.
fn forget_others<K: Pod + Eq + std::hash::Hash>(
    map: &mut HashMap<MapData, K, u32>,
    name: &'static str,
    known: &Known<K, u32>,
) -> Result<usize, PlaneError> {
    let keys: Vec<K> =
        map.keys().collect::<Result<_, _>>().map_err(|source| map_error(name, "listing", source))?;
    let mut forgotten = 0;
    for key in keys.into_iter().filter(|key| !known.contains_key(key)) {
        remove(map, name, key)?;
        forgotten += 1;
    }
    Ok(forgotten)
}

/// Maps an array of `words` 64-bit words per element.
fn mapping(ebpf: &Ebpf, name: &'static str, entries: u32, words: usize) -> Result<Mapping, PlaneError> {
    // it stays open there: a program that is loaded later names it by its descriptor
    let map = ebpf.map(name).ok_or(PlaneError::Object(name))?;
    let map_in = |data: &MapData| {
        Mapping::new(data.fd().as_fd(), entries as usize, words)
            .map_err(|source| map_error(name, "mapping into memory (needs kernel 5.5)", source))
    };
    // the element's type is the program's; only its size matters here
    match map {
        Map::Array(data) => map_in(data),
        _ => Err(PlaneError::Object(name)),
    }
}

/// Maps the ring of held frames.
fn ring(ebpf: &Ebpf, size: u32) -> Result<Ring, PlaneError> {
    match ebpf.map(maps::FRAMES) {
        Some(Map::RingBuf(data)) => Ring::open(data.fd().as_fd(), size)
            .map_err(|source| map_error(maps::FRAMES, "mapping into memory (needs kernel 5.8)", source)),
        _ => Err(PlaneError::Object(maps::FRAMES)),
    }
}

fn insert<K: Pod, V: Pod>(
    map: &mut HashMap<MapData, K, V>,
    name: &'static str,
    key: K,
    value: V,
) -> Result<(), PlaneError> {
    map.insert(key, value, 0).map_err(|source| map_error(name, "inserting", source))
}

fn remove<K: Pod, V: Pod>(
    map: &mut HashMap<MapData, K, V>,
    name: &'static str,
    key: K,
) -> Result<(), PlaneError> {
    match map.remove(&key) {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Err(source) => Err(map_error(name, "removing", source)),
    }
}

/// The largest CPU number there can be, plus one.
fn possible_cpus() -> Result<u32, PlaneError> {
    const PATH: &str = "/sys/devices/system/cpu/possible";
    let kernel = |source| PlaneError::Kernel { what: "reading /sys/devices/system/cpu/possible", source };
    let text = fs::read_to_string(PATH).map_err(kernel)?;
    text.trim()
        .rsplit([',', '-'])
        .next()
        .and_then(|last| last.parse::<u32>().ok())
        .map(|last| last + 1)
        .ok_or_else(|| kernel(io::Error::new(io::ErrorKind::InvalidData, text.clone())))
}

/// Nanoseconds of the clock that `bpf_ktime_get_ns` reads.
pub fn monotonic_ns() -> u64 {
    // CLOCK_MONOTONIC is always there and never negative
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| t.tv_sec().unsigned_abs() * 1_000_000_000 + t.tv_nsec().unsigned_abs())
}

/// linux/membarrier.h
const MEMBARRIER_CMD_QUERY: libc::c_int = 0;
/// linux/membarrier.h
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

fn membarrier(command: libc::c_int) -> io::Result<libc::c_long> {
    // SAFETY: takes integers only.
    let answer = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    Ok(Errno::result(answer)?)
}

fn grace_is_possible() -> Result<(), PlaneError> {
    let what = "this kernel cannot wait for program runs to end (membarrier GLOBAL is missing: no CONFIG_MEMBARRIER, or CPUs \
                in nohz_full): the gateway needs it to reuse a switch safely";
    match membarrier(MEMBARRIER_CMD_QUERY) {
        Ok(commands) if commands & libc::c_long::from(MEMBARRIER_CMD_GLOBAL) != 0 => Ok(()),
        Ok(_) => Err(PlaneError::Kernel { what, source: Errno::ENOSYS.into() }),
        Err(source) => Err(PlaneError::Kernel { what, source }),
    }
}

/// Returns after every program run that was under way has ended (an RCU grace period; 10 to 20 ms).
///
/// # Errors
/// [`PlaneError::Kernel`].
pub fn grace_period() -> Result<(), PlaneError> {
    membarrier(MEMBARRIER_CMD_GLOBAL)
        .map(|_| ())
        .map_err(|source| PlaneError::Kernel { what: "waiting for program runs to end", source })
}

/// The kernel's error number at the root of `error`.
fn io_error(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut error = Some(error);
    while let Some(e) = error {
        if let Some(io) = e.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        error = e.source();
    }
    None
}

fn load_hint(error: &EbpfError) -> &'static str {
    match io_error(error) {
        Some(libc::EPERM | libc::EACCES) => {
            "needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON: run as root or under the packaged systemd unit"
        }
        Some(libc::ENOMEM | libc::E2BIG) => "not enough memory for the maps: lower `max_users`",
        Some(libc::ENOSYS) => "this kernel has no bpf(): CONFIG_BPF_SYSCALL is needed",
        _ => "",
    }
}

fn attach_hint(error: &ProgramError) -> &'static str {
    match io_error(error) {
        Some(libc::EBUSY | libc::EEXIST) => {
            "another XDP program is attached: `ip -d link show` names it, `ip link set dev IFACE xdp off` takes it off"
        }
        Some(libc::EOPNOTSUPP) => {
            "its driver has no native XDP: use a NIC whose driver has, or accept the kernel's slower way for all \
             interfaces with `mode = \"generic\"` in the gateway's configuration"
        }
        Some(libc::EINVAL | libc::ERANGE | libc::EMSGSIZE) => {
            "its MTU, or that of its veth peer, may be too large for XDP: try 1500"
        }
        Some(libc::EPERM | libc::EACCES) => "needs CAP_NET_ADMIN and CAP_BPF",
        Some(libc::ENODEV) => "the interface is gone",
        _ => "",
    }
}
