//! The programs on byte buffers: a table and a plane as the daemon has them, on no interface. A frame is run through a
//! program by the kernel (`BPF_PROG_TEST_RUN`) and comes back with the verdict and the outcome that was counted.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod lab;

use aya::programs::{TestRun as _, TestRunOptions};
use gateway_ebpf::Outcome;
use handover_api::v1;
use handover_gateway::{
    desired::{Desired, Wiring},
    hold::Bounds,
    mac::Mac,
    plane::{Options, Plane, Side},
    table::{StageAnswer, SwitchAnswer, SwitchStep, Table, Write},
};

pub const VIRTUAL: Mac = Mac([0x02, 0x48, 0x4f, 0, 0, 1]);
pub const TARO: Mac = Mac([0x02, 0, 0, 0, 1, 1]);
pub const HANAKO: Mac = Mac([0x02, 0, 0, 0, 1, 2]);
pub const JIRO: Mac = Mac([0x02, 0, 0, 0, 1, 3]);
pub const ROUTER1: Mac = Mac([0x02, 0, 0, 0, 0x0a, 1]);
pub const ROUTER2: Mac = Mac([0x02, 0, 0, 0, 0x0a, 2]);
pub const ROUTER_FLAT: Mac = Mac([0x02, 0, 0, 0, 0x0a, 3]);
pub const OTHER: Mac = Mac([0x02, 0, 0, 0, 0xff, 9]);
pub const BROADCAST: Mac = Mac([0xff; 6]);
pub const R: [u8; 4] = [10, 1, 0, 1];
pub const TARO_IP: [u8; 4] = [10, 1, 0, 100];
pub const HANAKO_IP: [u8; 4] = [10, 1, 0, 101];
pub const IPV4: u16 = 0x0800;
pub const ARP: u16 = 0x0806;

/// Bounds on what is held.
pub const HELD: Bounds = Bounds { memory: 1 << 20, per_user: 1 << 18 };
/// Index of the loopback interface, on which test runs seem to arrive.
const LOOPBACK: u32 = 1;

pub struct Rig {
    pub table: Table,
    pub plane: Plane,
}

/// What became of a frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Ran {
    pub outcome: Outcome,
    /// XDP_DROP 1, XDP_PASS 2, XDP_REDIRECT 4
    pub verdict: u32,
    pub frame: Vec<u8>,
}

pub fn network(name: &str, vid: Option<u32>, router: Option<Mac>) -> v1::Network {
    v1::Network {
        name: name.into(),
        vid,
        router_address: "10.1.0.1".into(),
        router_mac: router.map(|m| m.to_string()),
        ..v1::Network::default()
    }
}

pub fn user(name: &str, mac: Mac, ip: &str, network: &str) -> v1::User {
    v1::User {
        name: name.into(),
        mac: mac.to_string(),
        addresses: vec![ip.into()],
        network: network.into(),
        ..v1::User::default()
    }
}

/// net1 (VID 1) with taro, net2 (VID 2) with hanako, flat (untagged) with jiro; net3 (VID 3) whose router is not known.
pub fn inventory() -> v1::ConfigureRequest {
    v1::ConfigureRequest {
        revision: 1,
        networks: vec![
            network("net1", Some(1), Some(ROUTER1)),
            network("net2", Some(2), Some(ROUTER2)),
            network("net3", Some(3), None),
            network("flat", None, Some(ROUTER_FLAT)),
        ],
        users: vec![
            user("taro", TARO, "10.1.0.100", "net1"),
            user("hanako", HANAKO, "10.1.0.101", "net2"),
            user("jiro", JIRO, "10.1.0.102", "flat"),
        ],
    }
}

impl Rig {
    pub fn empty(max_users: u32) -> Self {
        Self::bounded(max_users, HELD)
    }

    pub fn bounded(max_users: u32, hold: Bounds) -> Self {
        let mut plane = Plane::load(&Options { max_users, virtual_router_mac: VIRTUAL, hold })
            .expect("these tests need root");
        for side in [Side::Access, Side::Wan] {
            plane.set_port(side.port(), LOOPBACK, 1514).unwrap();
        }
        Self { table: Table::new(max_users), plane }
    }

    pub fn new() -> Self {
        let mut rig = Self::empty(16);
        rig.configure(&inventory());
        rig
    }

    pub fn configure(&mut self, request: &v1::ConfigureRequest) {
        let desired = Desired::new(request, &Wiring::single(VIRTUAL)).unwrap();
        let (table, writes, _retired) = self.table.configured(&desired).unwrap();
        self.plane.apply(&writes).unwrap();
        self.table = table;
    }

    pub fn apply(&mut self, writes: &[Write]) {
        self.plane.apply(writes).unwrap();
    }

    pub fn stage(&mut self, migration: &str, users: &[&str], from: &str, to: &str) -> StageAnswer {
        self.table.stage_begin(migration, &names(users), from, to).unwrap();
        let (writes, answer) = self.table.stage_write(migration).unwrap();
        self.apply(&writes);
        answer
    }

    /// Makes the store; returns the window.
    pub fn switch(&mut self, migration: &str, users: &[&str], to: &str, staged: StageAnswer) -> u64 {
        let step =
            self.table.switch(migration, staged.switch.into(), staged.generation, &names(users), to).unwrap();
        let SwitchStep::Store { index, word } = step else { panic!("{step:?}") };
        let committed = self.plane.commit(index, word);
        let window_ns = self.plane.window(index, committed);
        self.table.switched(migration, SwitchAnswer { window_ns, store_latency_ns: 0 });
        window_ns
    }

    pub fn abort(&mut self, migration: &str) -> bool {
        let step = self.table.abort(migration).unwrap();
        self.apply(&step.writes);
        step.was_switched
    }

    pub fn finish(&mut self, migration: &str) {
        let (writes, _retired) = self.table.finish(migration).unwrap();
        self.apply(&writes);
    }

    pub fn run(&mut self, side: Side, frame: &[u8]) -> Ran {
        let before = self.plane.counters().unwrap();
        let mut out = vec![0; frame.len() + 64];
        let result = self
            .plane
            .program(side)
            .unwrap()
            .test_run(TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..Default::default() })
            .unwrap();
        out.truncate(result.data_size_out as usize);
        let counted: Vec<_> = before
            .into_iter()
            .zip(self.plane.counters().unwrap())
            .filter(|((_, a), (_, b))| a != b)
            .collect();
        let [((outcome, a), (_, b))] = counted[..] else { panic!("counted {counted:?}") };
        assert_eq!(b, a + 1, "a frame is counted once");
        Ran { outcome, verdict: result.return_value, frame: out }
    }

    pub fn access(&mut self, frame: &[u8]) -> Ran {
        self.run(Side::Access, frame)
    }

    pub fn wan(&mut self, frame: &[u8]) -> Ran {
        self.run(Side::Wan, frame)
    }

    /// The VID under which a frame of `mac` leaves now; `None`: untagged.
    pub fn vid_of(&mut self, mac: Mac) -> Option<u16> {
        let ran = self.access(&frame(VIRTUAL, mac, None, IPV4, b"payload"));
        assert_eq!(ran.outcome, Outcome::AccessForwarded);
        tci(&ran.frame).map(|tci| tci & 0xfff)
    }
}

pub fn names(users: &[&str]) -> Vec<String> {
    users.iter().map(ToString::to_string).collect()
}

/// A frame of at least the shortest length.
pub fn frame(dst: Mac, src: Mac, tci: Option<u16>, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = bare(dst, src, tci, ethertype, payload);
    frame.resize(frame.len().max(60), 0);
    frame
}

/// A frame as long as its parts.
pub fn bare(dst: Mac, src: Mac, tci: Option<u16>, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [dst.0, src.0].concat();
    if let Some(tci) = tci {
        frame.extend([0x81, 0]);
        frame.extend(tci.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

pub fn arp(op: u16, sha: Mac, spa: [u8; 4], tha: Mac, tpa: [u8; 4]) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4];
    arp.extend(op.to_be_bytes());
    arp.extend(sha.0);
    arp.extend(spa);
    arp.extend(tha.0);
    arp.extend(tpa);
    arp
}

pub fn tci(frame: &[u8]) -> Option<u16> {
    (frame[12..14] == [0x81, 0]).then(|| u16::from_be_bytes([frame[14], frame[15]]))
}
