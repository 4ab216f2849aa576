//! The benchmarks' programs and their maps, and the gateway's data plane with as many users as are asked for.

use std::{
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context as _, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{ArrayOfMaps, DevMap, HashMap, Map, MapData, PerCpuArray, ProgramArray},
    programs::{Program, SchedClassifier, TestRun as _, TestRunAttrs, TestRunOptions, Xdp, XdpMode},
};
use gateway_bench_ebpf::{
    FRAME_LEN, IP, IP_AT, JOURNAL, LINES_LEN, Next, OUT, SOURCE_AT, USER_NET, USER_OUI, checksum,
};
use gateway_ebpf::home::groups_for;
use handover_api::v1;
use handover_gateway::{
    desired::{Desired, Wiring},
    hold::Bounds,
    mac::Mac,
    mapping::Mapping,
    plane::{Options, Plane, Side, grace_period},
    table::{StageAnswer, StageStep, SwitchStep, Table},
};

/// The MAC the users know the router by.
pub const VIRTUAL_ROUTER: Mac = Mac([0x02, 0x48, 0x4f, 0, 0, 1]);
/// VIDs of the old network and of the new one.
pub const VIDS: [u16; 2] = [1, 2];
/// Their routers.
pub const ROUTERS: [Mac; 2] = [Mac([2, 0, 0, 0, 0x0a, 1]), Mac([2, 0, 0, 0, 0x0a, 2])];
/// Longest frame of an interface with the usual MTU, tags not counted.
const LARGEST: u64 = 1514;
/// Frames of a live run that the kernel makes before it sends them.
const LIVE_BATCH: u32 = 64;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/gateway-bench"));

/// A number of frames to be run through a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The program alone: what it redirects goes nowhere.
    Dry,
    /// Frames that are sent.
    Live,
}

/// The benchmarks' programs, loaded.
pub struct Programs {
    ebpf: Ebpf,
    state: Mapping,
    clock: Mapping,
    before: Mapping,
    after: Mapping,
    received: Mapping,
    pub by_mac: HashMap<MapData, u64, u32>,
    by_mac_fd: OwnedFd,
    pub outer: ArrayOfMaps<MapData, HashMap<MapData, u64, u32>>,
    device: DevMap<MapData>,
    next: ProgramArray<MapData>,
    tc_next: ProgramArray<MapData>,
    count: PerCpuArray<MapData, u64>,
}

impl Programs {
    /// Loads them. `source` hands its frames on to `next`, `tc_forward` sends to the interface `tc_out`.
    pub fn load(users: u32, next: Next, tc_out: u32) -> anyhow::Result<Self> {
        // as many octets as the gateway's table of so many users
        let lines = groups_for(users);
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("BY_MAC", users)
            .map_max_entries("LINES", lines)
            .override_global("LINES_COUNT", &lines, true)
            .override_global("HAND_ON_TO", &(next as u32), true)
            .override_global("TC_OUT", &tc_out, true)
            .override_global("ROUTER_MAC", &ROUTERS[1].word(), true)
            .load(OBJECT)
            .context("loading the benchmarks' programs")?;
        // before the maps are taken: a program is loaded with their descriptors
        for (name, program) in ebpf.programs_mut() {
            let loaded = match program {
                Program::Xdp(program) => program.load(),
                Program::SchedClassifier(program) => program.load(),
                _ => anyhow::bail!("{name} is of a kind that is not expected"),
            };
            loaded.with_context(|| format!("loading {name}"))?;
        }
        let mut programs = Self {
            state: words(&mut ebpf, "STATE", 1, 4)?,
            clock: words(&mut ebpf, "CLOCK", 1, 2)?,
            before: words(&mut ebpf, "BEFORE", JOURNAL, 1)?,
            after: words(&mut ebpf, "AFTER", JOURNAL, 1)?,
            received: words(&mut ebpf, "RECEIVED", JOURNAL, 1)?,
            by_mac_fd: descriptor(&ebpf, "BY_MAC")?,
            by_mac: take(&mut ebpf, "BY_MAC")?,
            outer: take(&mut ebpf, "OUTER")?,
            device: take(&mut ebpf, "DEVICE")?,
            next: take(&mut ebpf, "NEXT")?,
            tc_next: take(&mut ebpf, "TC_NEXT")?,
            count: take(&mut ebpf, "COUNT")?,
            ebpf,
        };
        let targets = [
            (Next::Pass, "pass"),
            (Next::Redirect, "redirect"),
            (Next::RedirectTagged, "redirect_tagged"),
            (Next::HashMap, "by_hash_map"),
            (Next::MapInMap, "by_map_in_map"),
            (Next::Drop, "drop"),
            (Next::OneLine, "one_line"),
        ];
        for (next, name) in targets {
            let program = xdp(&mut programs.ebpf, name)?;
            programs
                .next
                .set(next as u32, program.fd()?, 0)
                .with_context(|| format!("handing on to {name}"))?;
        }
        let words = LINES_LEN / size_of::<u64>();
        let table = self::words(&mut programs.ebpf, "LINES", lines, words)?;
        for element in 0..table.len() {
            for word in [0, words / 2] {
                table.word(element, word).store(VIDS[0].into(), Ordering::Relaxed);
            }
        }
        programs.state.word(0, 1).store(users.into(), Ordering::Release);
        programs.state.word(0, 2).store(0x9e37_79b9_7f4a_7c15, Ordering::Release);
        programs.state.word(0, 3).store(VIRTUAL_ROUTER.word(), Ordering::Release);
        Ok(programs)
    }

    /// Only users 1 to `users` send from now on.
    pub fn speak(&self, users: u32) {
        self.state.word(0, 1).store(users.into(), Ordering::Release);
    }

    /// What `source` hands on to with [`Next::Handover`].
    pub fn hand_on_to_gateway(&mut self, plane: &Plane) -> anyhow::Result<()> {
        let program = plane.program(Side::Access)?;
        Ok(self.next.set(Next::Handover as u32, program.fd()?, 0)?)
    }

    /// What `tc_source` hands on to.
    pub fn tc_hand_on_to(&mut self, name: &str) -> anyhow::Result<()> {
        let program = tc(&mut self.ebpf, name)?.fd()?.try_clone()?;
        Ok(self.tc_next.set(0, &program, 0)?)
    }

    /// Where redirects of our own programs go.
    pub fn send_to(&mut self, interface: u32) -> anyhow::Result<()> {
        Ok(self.device.set(OUT, interface, None, 0)?)
    }

    /// Attaches a program to an interface for as long as self lives.
    pub fn attach(&mut self, name: &str, interface: &str) -> anyhow::Result<()> {
        xdp(&mut self.ebpf, name)?
            .attach(interface, XdpMode::Driver)
            .with_context(|| format!("attaching {name} to {interface}"))?;
        Ok(())
    }

    /// The same for tc, at ingress.
    pub fn attach_tc(&mut self, name: &str, interface: &str) -> anyhow::Result<()> {
        match aya::programs::tc::qdisc_add_clsact(interface) {
            Err(aya::programs::tc::TcError::AlreadyAttached) | Ok(()) => {}
            Err(error) => return Err(error).with_context(|| format!("clsact on {interface}")),
        }
        tc(&mut self.ebpf, name)?
            .attach(interface, aya::programs::TcAttachType::Ingress)
            .with_context(|| format!("attaching {name} to {interface}"))?;
        Ok(())
    }

    /// Runs `frames` frames through a source, one after the other, on this thread's CPU. Nanoseconds per frame as the kernel
    /// measured them, where it does (dry runs).
    pub fn source(&self, name: &str, kind: Kind, frames: u32) -> anyhow::Result<u64> {
        let program: &Xdp =
            self.ebpf.program(name).with_context(|| format!("no program {name}"))?.try_into()?;
        let attrs = match kind {
            Kind::Dry => TestRunAttrs::new(),
            Kind::Live => TestRunAttrs::new().xdp_live_frames(LIVE_BATCH),
        };
        let frame = frame();
        let options = TestRunOptions { data_in: Some(&frame), repeat: frames, attrs, ..Default::default() };
        let result =
            program.test_run(options).with_context(|| format!("running {name} on {frames} frames"))?;
        Ok(result.duration.as_nanos() as u64)
    }

    /// The same for `tc_source`, dry.
    pub fn tc_source(&self, frames: u32) -> anyhow::Result<u64> {
        let program: &SchedClassifier = self.ebpf.program("tc_source").context("no tc_source")?.try_into()?;
        let frame = frame();
        let options = TestRunOptions { data_in: Some(&frame), repeat: frames, ..Default::default() };
        let result = program.test_run(options).context("running tc_source")?;
        Ok(result.duration.as_nanos() as u64)
    }

    /// Runs one frame of user `n` through a program; the VID it left with.
    pub fn vid_of(&self, name: &str, n: u32) -> anyhow::Result<u16> {
        let program: &Xdp =
            self.ebpf.program(name).with_context(|| format!("no program {name}"))?.try_into()?;
        vid_of(program, n)
    }

    /// Frames that `sink`, `count` or `tc_count` have seen.
    pub fn counted(&self) -> anyhow::Result<u64> {
        Ok(self.count.get(&0, 0)?.iter().sum())
    }

    /// The number of the next frame.
    pub fn number(&self) -> u64 {
        self.state.word(0, 0).load(Ordering::Acquire)
    }

    /// [`gateway_bench_ebpf::Clock`].
    pub fn clock(&self) -> (&AtomicU64, &AtomicU64) {
        (self.clock.word(0, 0), self.clock.word(0, 1))
    }

    /// The journal's entry of a frame: before, after, received.
    pub fn entry(&self, number: u64) -> [&AtomicU64; 3] {
        let entry = (number % u64::from(JOURNAL)) as usize;
        [self.before.word(entry, 0), self.after.word(entry, 0), self.received.word(entry, 0)]
    }

    /// BPF_MAP_UPDATE_BATCH on `BY_MAC`.
    pub fn update_batch(&self, keys: &[u64], values: &[u32]) -> anyhow::Result<()> {
        /// Of `union bpf_attr`, what BPF_MAP_*_BATCH take (linux/bpf.h).
        #[repr(C, align(8))]
        struct Batch {
            in_batch: u64,
            out_batch: u64,
            keys: u64,
            values: u64,
            count: u32,
            map_fd: u32,
            elem_flags: u64,
            flags: u64,
        }
        /// linux/bpf.h
        const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
        ensure!(keys.len() == values.len(), "a value for each key");
        let mut attr = Batch {
            in_batch: 0,
            out_batch: 0,
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count: keys.len() as u32,
            // a descriptor is never negative
            map_fd: self.by_mac_fd.as_raw_fd().unsigned_abs(),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel reads `count` keys and values, which outlive the call, and writes `count`.
        let done =
            unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_UPDATE_BATCH, &raw mut attr, size_of::<Batch>()) };
        nix::errno::Errno::result(done).context("BPF_MAP_UPDATE_BATCH (needs kernel 5.6)")?;
        ensure!(attr.count as usize == keys.len(), "{} of {} updated", attr.count, keys.len());
        Ok(())
    }
}

/// An array of 64-bit words, in memory.
fn words(ebpf: &mut Ebpf, name: &str, entries: u32, words: usize) -> anyhow::Result<Mapping> {
    let map = ebpf.take_map(name).with_context(|| format!("no map {name}"))?;
    let Map::Array(data) = map else { anyhow::bail!("{name} is no array") };
    Mapping::new(data.fd().as_fd(), entries as usize, words).with_context(|| format!("mapping {name}"))
}

fn take<T>(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<T>
where
    T: TryFrom<Map, Error = aya::maps::MapError>,
{
    let map = ebpf.take_map(name).with_context(|| format!("no map {name}"))?;
    T::try_from(map).with_context(|| format!("map {name}"))
}

/// Another descriptor of a hash map.
fn descriptor(ebpf: &Ebpf, name: &str) -> anyhow::Result<OwnedFd> {
    match ebpf.map(name) {
        Some(Map::HashMap(data)) => Ok(data.fd().as_fd().try_clone_to_owned()?),
        _ => anyhow::bail!("{name} is no hash map"),
    }
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut Xdp> {
    Ok(ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?)
}

fn tc<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut SchedClassifier> {
    Ok(ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?)
}

/// Runs one frame of user `n` through `program`; the VID it left with.
pub fn vid_of(program: &Xdp, n: u32) -> anyhow::Result<u16> {
    let mut frame = frame();
    frame[..6].copy_from_slice(&VIRTUAL_ROUTER.0);
    frame[6..12].copy_from_slice(&mac(n).0);
    frame[SOURCE_AT - 2..SOURCE_AT].copy_from_slice(&checksum(address(n)).to_be_bytes());
    frame[SOURCE_AT..SOURCE_AT + 4].copy_from_slice(&address(n));
    let mut out = [0; FRAME_LEN + 16];
    program
        .test_run(TestRunOptions { data_in: Some(&frame), data_out: Some(&mut out), ..Default::default() })
        .context("running the program on a frame")?;
    ensure!(out[12..14] == [0x81, 0], "a frame of user {n} left without a tag: {:02x?}", &out[..18]);
    Ok(u16::from_be_bytes([out[14], out[15]]))
}

/// IPv4 and UDP for nobody in particular, which the source makes a user's.
fn frame() -> [u8; FRAME_LEN] {
    let mut frame = [0; FRAME_LEN];
    frame[12..14].copy_from_slice(&[0x08, 0]);
    frame[IP_AT..IP_AT + IP.len()].copy_from_slice(&IP);
    frame[34..42].copy_from_slice(&[0x13, 0x88, 0x13, 0x88, 0, (FRAME_LEN - IP_AT - IP.len()) as u8, 0, 0]);
    frame
}

/// MAC of user `n`, from 1 up.
pub fn mac(n: u32) -> Mac {
    let [_, b, c, d] = n.to_be_bytes();
    Mac([USER_OUI[0], USER_OUI[1], USER_OUI[2], b, c, d])
}

/// Address of user `n`.
pub fn address(n: u32) -> [u8; 4] {
    let [_, b, c, d] = n.to_be_bytes();
    [USER_NET, b, c, d]
}

/// Name of user `n`.
pub fn name(n: u32) -> String {
    format!("user{n}")
}

/// Two networks, and `users` users on the old one.
pub fn inventory(users: u32) -> v1::ConfigureRequest {
    let network = |name: &str, side: usize| v1::Network {
        name: name.into(),
        vid: Some(VIDS[side].into()),
        router_address: "10.255.255.1".into(),
        router_mac: Some(ROUTERS[side].to_string()),
        ..Default::default()
    };
    let user = |n: u32| v1::User {
        name: name(n),
        mac: mac(n).to_string(),
        addresses: vec![std::net::Ipv4Addr::from(address(n)).to_string()],
        network: "old".into(),
        ..Default::default()
    };
    v1::ConfigureRequest {
        revision: 1,
        networks: vec![network("old", 0), network("new", 1)],
        users: (1..=users).map(user).collect(),
        ..Default::default()
    }
}

/// The gateway's table and plane with `users` users on the old network, between two interfaces; attached to neither.
pub fn gateway(users: u32, access: u32, wan: u32) -> anyhow::Result<(Table, Plane)> {
    let options = Options { max_users: users, virtual_router_mac: VIRTUAL_ROUTER, hold: Bounds::default() };
    let mut plane = Plane::load(&options).context("the benchmark loads the real programs")?;
    plane.set_port(Side::Access.port(), access, LARGEST)?;
    plane.set_port(Side::Wan.port(), wan, LARGEST)?;
    let desired = Desired::new(&inventory(users), &Wiring::single(VIRTUAL_ROUTER))?;
    let (table, writes, _) = Table::new(users).configured(&desired)?;
    plane.apply(&writes)?;
    Ok((table, plane))
}

/// All `users` staged from the old network to the new one, ready for the store.
pub fn stage(table: &mut Table, plane: &mut Plane, users: u32) -> anyhow::Result<StageAnswer> {
    let names: Vec<String> = (1..=users).map(name).collect();
    let step = table.stage_begin("bench", &names, "old", "new")?;
    ensure!(matches!(step, StageStep::Introduce { .. }), "staged before");
    let (writes, staged) = table.stage_write("bench")?;
    plane.apply(&writes)?;
    let step = table.switch("bench", staged.switch.into(), staged.generation, &names, "new")?;
    ensure!(matches!(step, SwitchStep::Store { .. }), "not ready for the store");
    grace_period()?;
    Ok(staged)
}
