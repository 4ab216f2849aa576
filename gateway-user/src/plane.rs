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
//! Failures: [`PlaneError`] names what was done to what, and for the usual reasons what to do.

use std::{
    fs, io,
    os::fd::AsFd as _,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader, Pod,
    maps::{DevMap, HashMap, Map, MapData, MapError, PerCpuArray, xdp::XdpMapError},
    programs::{ProgramError, Xdp, XdpMode, xdp::XdpLinkId},
};
use gateway_ebpf::{NETWORKS, Outcome, PORTS, SWITCHES, SwitchWord, UserKey, VIDS, maps};
use nix::{
    errno::Errno,
    time::{ClockId, clock_gettime},
};

use crate::{
    desired::ADDRESSES_MAX,
    mac::Mac,
    mapping::Mapping,
    table::{ACCESS_PORT, WAN_PORT, Write, slots_for},
};

/// How long a program run may take at most: an XDP run is a few hundred instructions, but a virtual CPU may be paused.
const RUN_LIMIT: Duration = Duration::from_millis(100);

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
}

/// The store of a switch.
#[derive(Debug, Clone, Copy)]
pub struct Committed {
    /// Just before the store; nanoseconds of CLOCK_MONOTONIC, as the programs' stamps.
    pub at_ns: u64,
}

/// The programs and their maps. Dropping it detaches the programs.
pub struct Plane {
    ebpf: Ebpf,
    user: Mapping,
    switch: Mapping,
    network: Mapping,
    by_vid: Mapping,
    port: Mapping,
    run: Mapping,
    last_old: Mapping,
    user_index: HashMap<MapData, UserKey, u32>,
    by_mac: HashMap<MapData, u64, u32>,
    by_ip: HashMap<MapData, u32, u32>,
    device: DevMap<MapData>,
    counters: PerCpuArray<MapData, u64>,
    ifindex: [u32; 2],
}

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/gateway"));

impl Plane {
    /// Loads programs and maps into the kernel; attaches nothing.
    ///
    /// # Errors
    /// [`PlaneError`], with a hint for missing privileges.
    pub fn load(options: &Options) -> Result<Self, PlaneError> {
        grace_is_possible()?;
        let cpus = possible_cpus()?;
        let slots = slots_for(options.max_users);
        let virtual_router_mac = options.virtual_router_mac.word();
        let mut ebpf = EbpfLoader::new()
            .map_max_entries(maps::USER, slots)
            .map_max_entries(maps::USER_INDEX, options.max_users)
            .map_max_entries(maps::USER_BY_MAC, options.max_users)
            .map_max_entries(maps::USER_BY_IP, options.max_users.saturating_mul(ADDRESSES_MAX as u32))
            .map_max_entries(maps::RUN, cpus)
            .map_max_entries(maps::LAST_OLD, cpus * SWITCHES)
            .override_global(maps::VIRTUAL_ROUTER_MAC, &virtual_router_mac, true)
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
        Ok(Self {
            user: mapping(&mut ebpf, maps::USER, slots, 2)?,
            switch: mapping(&mut ebpf, maps::SWITCH, SWITCHES, 1)?,
            network: mapping(&mut ebpf, maps::NETWORK, NETWORKS, 3)?,
            by_vid: mapping(&mut ebpf, maps::NETWORK_BY_VID, VIDS, 1)?,
            port: mapping(&mut ebpf, maps::PORT, PORTS, 1)?,
            run: mapping(&mut ebpf, maps::RUN, cpus, 8)?,
            last_old: mapping(&mut ebpf, maps::LAST_OLD, cpus * SWITCHES, 1)?,
            user_index: typed(&mut ebpf, maps::USER_INDEX)?,
            by_mac: typed(&mut ebpf, maps::USER_BY_MAC)?,
            by_ip: typed(&mut ebpf, maps::USER_BY_IP)?,
            device: typed(&mut ebpf, maps::DEVICE)?,
            counters: typed(&mut ebpf, maps::COUNTERS)?,
            ebpf,
            ifindex: [0; 2],
        })
    }

    /// Tells the programs which interface is on which side, and the longest frame it takes (tags not counted).
    ///
    /// # Errors
    /// [`PlaneError::Map`] if there is no such interface.
    pub fn set_port(&mut self, side: Side, ifindex: u32, largest_frame: u64) -> Result<(), PlaneError> {
        let port = side.port();
        if self.ifindex[usize::from(port)] != ifindex {
            self.device
                .set(port.into(), ifindex, None, 0)
                .map_err(|source: XdpMapError| map_error(maps::DEVICE, "naming an interface", source))?;
            self.ifindex[usize::from(port)] = ifindex;
        }
        self.port.word(port.into(), 0).store(largest_frame, Ordering::Release);
        Ok(())
    }

    /// Attaches a program to its interface, in native mode or not at all.
    ///
    /// # Errors
    /// [`PlaneError::Program`] with the usual reason for the kernel's answer.
    pub fn attach(&mut self, side: Side, name: &str, ifindex: u32) -> Result<XdpLinkId, PlaneError> {
        xdp(&mut self.ebpf, side)?.attach_to_if_index(ifindex, XdpMode::Driver).map_err(|source| {
            PlaneError::Program {
                what: "attaching in native mode",
                program: side.name(),
                interface: name.into(),
                hint: attach_hint(&source),
                source: source.into(),
            }
        })
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
                Write::AddMac { mac, port, slot } => {
                    self.index_user(mac, port, slot)?;
                    insert(&mut self.by_mac, maps::USER_BY_MAC, mac.word(), slot)?;
                }
                Write::RemoveMac { mac, port } => {
                    let key = self.key(mac, port);
                    remove(&mut self.user_index, maps::USER_INDEX, key)?;
                    remove(&mut self.by_mac, maps::USER_BY_MAC, mac.word())?;
                }
                Write::AddAddress { address, slot } => {
                    insert(&mut self.by_ip, maps::USER_BY_IP, Write::address_word(address), slot)?;
                }
                Write::RemoveAddress { address } => {
                    remove(&mut self.by_ip, maps::USER_BY_IP, Write::address_word(address))?;
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
                Write::NetworkAddress { index, address } => {
                    let word = Write::address_word(address).into();
                    self.network.word(index.into(), 2).store(word, Ordering::Release);
                }
                Write::Vid { vid, index } => {
                    self.by_vid.word(vid.into(), 0).store(index.into(), Ordering::Release);
                }
            }
        }
        Ok(())
    }

    fn key(&self, mac: Mac, port: u16) -> UserKey {
        UserKey { mac: mac.word(), ifindex: self.ifindex[usize::from(port)], tag: 0 }
    }

    /// Says which slot a source MAC on a port has: one hash-map update by system call.
    ///
    /// # Errors
    /// [`PlaneError::Map`].
    pub fn index_user(&mut self, mac: Mac, port: u16, slot: u32) -> Result<(), PlaneError> {
        let key = self.key(mac, port);
        insert(&mut self.user_index, maps::USER_INDEX, key, slot)
    }

    /// The commit: from this store on all users of the switch are on the network it selects. No system call.
    pub fn commit(&self, index: u16, word: SwitchWord) -> Committed {
        let at_ns = monotonic_ns();
        self.switch.word(index.into(), 0).store(word.0, Ordering::SeqCst);
        Committed { at_ns }
    }

    /// Store -> last frame sent under the old network, on any CPU; 0 if none was. Returns once no program run is left that
    /// can have read the selector before the store (microseconds).
    pub fn window(&self, index: u16, committed: Committed) -> u64 {
        let begun = Instant::now();
        let mut last = 0;
        for cpu in 0..self.run.len() {
            let epoch = self.run.word(cpu, 0);
            let inside = epoch.load(Ordering::SeqCst);
            let mut turns = 0_u32;
            while inside % 2 == 1 && epoch.load(Ordering::Acquire) == inside {
                std::hint::spin_loop();
                turns += 1;
                if turns.is_multiple_of(1024) {
                    thread::yield_now();
                    if begun.elapsed() > RUN_LIMIT {
                        tracing::warn!(cpu, "a program run did not end; the switch window is a lower bound");
                        last = last.max(monotonic_ns());
                        break;
                    }
                }
            }
            let stamp = self.last_old.word(cpu * SWITCHES as usize + usize::from(index), 0);
            last = last.max(stamp.load(Ordering::Acquire));
        }
        last.saturating_sub(committed.at_ns)
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
    ebpf.program_mut(side.name())
        .and_then(|program| program.try_into().ok())
        .ok_or(PlaneError::Object(side.name()))
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

/// Maps an array of `words` 64-bit words per element.
fn mapping(ebpf: &mut Ebpf, name: &'static str, entries: u32, words: usize) -> Result<Mapping, PlaneError> {
    let map = ebpf.take_map(name).ok_or(PlaneError::Object(name))?;
    let map_in = |data: &MapData| {
        Mapping::new(data.fd().as_fd(), entries as usize, words)
            .map_err(|source| map_error(name, "mapping into memory (needs kernel 5.5)", source))
    };
    // the element's type is the program's; only its size matters here
    match map {
        Map::Array(data) => map_in(&data),
        _ => Err(PlaneError::Object(name)),
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
        Some(libc::EOPNOTSUPP) => "its driver has no native XDP: use a NIC whose driver has",
        Some(libc::EINVAL | libc::ERANGE | libc::EMSGSIZE) => {
            "its MTU, or that of its veth peer, may be too large for XDP: try 1500"
        }
        Some(libc::EPERM | libc::EACCES) => "needs CAP_NET_ADMIN and CAP_BPF",
        Some(libc::ENODEV) => "the interface is gone",
        _ => "",
    }
}
