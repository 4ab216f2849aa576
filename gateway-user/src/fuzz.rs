//! Generated worlds and frames, run through the loaded programs (`BPF_PROG_TEST_RUN`) and compared with the
//! [oracle](crate::oracle).
//!
//! A world or a frame is made of a row of small choices ([`Draw`]): of random numbers (`handover-gateway-bench fuzz`), or of
//! numbers that proptest chose and shrinks (tests). 0 is always the plainest choice. Choices are weighted towards where the
//! rules' edges are: MACs, VIDs and addresses that occur in the world, lengths at the ends of headers and at the limits of the
//! interfaces.
//!
//! What a test run cannot reach: frames shorter than an Ethernet header (the kernel refuses them), a driver without headroom,
//! a port without an interface.

use std::{
    collections::HashSet,
    net::{Ipv4Addr, Ipv6Addr},
    sync::{Arc, atomic::Ordering},
};

use aya::programs::{TestRun as _, TestRunOptions};
use gateway_ebpf::{Load, Outcome, UserWord, hold::HoldWord, outcome::Action, words::Selector};
use handover_api::v1;

use crate::{
    desired::{ACCESS_PORT, Desired, PORT_STEP, WAN_PORT, Wiring},
    hold::Bounds,
    mac::Mac,
    neighbour,
    oracle::{Hold, Ip6, Network, Octets, Place, Prediction, User, World},
    plane::{Options, Plane, PlaneError, Side},
    table::{StageAnswer, SwitchAnswer, SwitchStep, Table, Write},
};

/// Users there can be in a world.
pub const USERS_MAX: u32 = 8;
/// The loopback interface, on which test runs seem to arrive.
const LOOPBACK: u32 = 1;
/// The longest frame that is generated; a test run gives the first 3,500 octets or so in one buffer, the rest in others.
const LONGEST: usize = 9_100;
/// The shortest frame a test run takes.
const SHORTEST: usize = 14;

const VIRTUAL: Octets = [0x02, 0x48, 0x4f, 0, 0, 1];
const ROUTERS: [Octets; 3] = [[2, 0, 0, 0, 0x0a, 1], [2, 0, 0, 0, 0x0a, 2], [2, 0, 0, 0, 0x0a, 3]];
/// VIDs, and whether in a service tag.
const TAGS: [(Option<u16>, bool); 8] = [
    (Some(1), false),
    (Some(2), false),
    (None, false),
    (Some(1), true),
    (Some(4094), false),
    (Some(77), true),
    (Some(77), false),
    (Some(4094), true),
];
/// Tags of the access side.
const ACCESS_TAGS: [u16; 3] = [7, 77, 4094];
const R: [[u8; 4]; 2] = [[10, 1, 0, 1], [10, 9, 0, 1]];
const R6: [Ip6; 2] = [
    [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
];
const V: [u8; 4] = [203, 0, 113, 10];
const DOT1Q: u16 = 0x8100;
const DOT1AD: u16 = 0x88a8;
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

/// Bounds on what is held.
const HELD: Bounds = Bounds { memory: 1 << 20, per_user: 1 << 18 };

/// Choices.
pub trait Draw {
    /// A number below `end`, which is not 0.
    fn below(&mut self, end: u32) -> u32;

    /// One of `all`, which are not none.
    fn one<T: Copy>(&mut self, all: &[T]) -> T
    where
        Self: Sized,
    {
        all[self.below(all.len() as u32) as usize]
    }

    /// True once in `times`.
    fn once_in(&mut self, times: u32) -> bool {
        self.below(times) == times - 1
    }
}

/// Random choices (SplitMix64: good enough, and the same everywhere for a seed).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Draw for Random {
    fn below(&mut self, end: u32) -> u32 {
        (((self.next() >> 32) * u64::from(end)) >> 32) as u32
    }
}

/// Given choices; 0 when there are no more.
#[derive(Debug, Clone)]
pub struct Given<'a> {
    numbers: &'a [u64],
    at: usize,
}

impl<'a> Given<'a> {
    /// Four choices of each number.
    pub const fn new(numbers: &'a [u64]) -> Self {
        Self { numbers, at: 0 }
    }
}

impl Draw for Given<'_> {
    fn below(&mut self, end: u32) -> u32 {
        let quarter = self.numbers.get(self.at / 4).map_or(0, |n| n >> (self.at % 4 * 16)) as u16;
        self.at += 1;
        (u32::from(quarter) * end) >> 16
    }
}

/// Draws a world.
pub fn world(draw: &mut impl Draw) -> World {
    let count = 1 + draw.below(4) as usize;
    let first = draw.below(TAGS.len() as u32) as usize;
    let networks: Vec<_> = (0..count)
        .map(|i| {
            let (vid, service) = TAGS[(first + i) % TAGS.len()];
            let address = (!draw.once_in(8)).then(|| if draw.once_in(6) { R[1] } else { R[0] });
            let address6 = draw.once_in(2).then(|| if draw.once_in(6) { R6[1] } else { R6[0] });
            Network {
                vid,
                service,
                pcp: vid.and_then(|_| draw.once_in(4).then(|| draw.below(8) as u8)),
                elsewhere: draw.once_in(8),
                router: (!draw.once_in(5)).then(|| draw.one(&ROUTERS)),
                address: address.or(if address6.is_none() { Some(R[0]) } else { None }),
                address6,
            }
        })
        .collect();
    let mut whole = HashSet::new();
    let users = (0..draw.below(USERS_MAX + 1) as u8)
        .map(|n| {
            let on = draw.below(count as u32) as usize;
            let to = draw.below(count as u32) as usize;
            let same_router = networks[on].address == networks[to].address
                && networks[on].address6 == networks[to].address6;
            let two = on != to && same_router;
            let place = match draw.below(8) {
                2 | 3 if two => Place::Staged(on, to),
                4 | 5 if two => Place::Switched(on, to),
                6 => Place::Nowhere,
                7 => Place::Torn,
                _ => Place::On(on),
            };
            let mut addresses = vec![[10, 1, 0, 100 + n]];
            if draw.once_in(3) {
                addresses.push([10, 9, 0, 100 + n]);
            }
            let mut addresses6 = Vec::new();
            if draw.once_in(3) {
                addresses6.push([0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, n]);
                if draw.once_in(3) {
                    addresses.clear();
                }
            }
            let elsewhere = draw.once_in(10);
            let tag = draw.once_in(4).then(|| draw.one(&ACCESS_TAGS));
            let anonymous = draw.once_in(4) && whole.insert((elsewhere, tag));
            let mac = (!anonymous).then_some([2, 0, 0, 0, 1, n]);
            let in_switch = matches!(place, Place::Staged(..) | Place::Switched(..));
            let hold = match draw.below(8) {
                _ if !in_switch => Hold::No,
                2 | 3 => Hold::Holding,
                4 => Hold::Draining,
                5 => Hold::Drained,
                6 => Hold::Full,
                7 => Hold::Expired,
                _ => Hold::No,
            };
            User { mac, tag, elsewhere, guard: draw.once_in(6), addresses, addresses6, place, hold }
        })
        .collect();
    let largest = [1514, 1514, 60, 114, 1518, 3000, 9014];
    World {
        virtual_mac: VIRTUAL,
        networks,
        users,
        service: V,
        memory_full: draw.once_in(4),
        access_largest: draw.one(&largest),
        wan_largest: draw.one(&largest),
    }
}

fn mac(draw: &mut impl Draw, world: &World) -> Octets {
    match draw.below(16) {
        0..=4 if !world.users.is_empty() => {
            let user = &world.users[draw.below(world.users.len() as u32) as usize];
            user.mac.unwrap_or([2, 0, 0, 0, 3, 1])
        }
        5..=7 => VIRTUAL,
        8..=10 => draw.one(&ROUTERS),
        11 => [0xff; 6],
        12 => [0x01, 0x00, 0x5e, 0, 0, draw.below(256) as u8],
        13 => [0x01, 0x80, 0xc2, 0, draw.below(8) as u8 / 7, draw.below(32) as u8],
        14 => [0; 6],
        // one bit away from somebody
        _ => {
            let mut mac = if draw.once_in(2) { VIRTUAL } else { [2, 0, 0, 0, 1, 0] };
            mac[draw.below(6) as usize] ^= 1 << draw.below(8);
            mac
        }
    }
}

fn address(draw: &mut impl Draw, world: &World) -> [u8; 4] {
    match draw.below(8) {
        0..=2 => world.networks[draw.below(world.networks.len() as u32) as usize].address.unwrap_or([0; 4]),
        3..=5 if !world.users.is_empty() => {
            let user = &world.users[draw.below(world.users.len() as u32) as usize];
            if user.addresses.is_empty() { [0; 4] } else { draw.one(&user.addresses) }
        }
        6 => draw.one(&R),
        _ => [10, draw.below(10) as u8, 0, draw.below(256) as u8],
    }
}

fn address6(draw: &mut impl Draw, world: &World) -> Ip6 {
    match draw.below(8) {
        0..=2 => world.networks[draw.below(world.networks.len() as u32) as usize].address6.unwrap_or([0; 16]),
        3..=5 if !world.users.is_empty() => {
            let user = &world.users[draw.below(world.users.len() as u32) as usize];
            let made = user.mac.map_or([0; 16], |mac| Mac(mac).link_local().octets());
            if user.addresses6.is_empty() || draw.once_in(2) { made } else { draw.one(&user.addresses6) }
        }
        6 => draw.one(&R6),
        _ => {
            // one bit away from somebody
            let mut address = draw.one(&R6);
            address[draw.below(16) as usize] ^= 1 << draw.below(8);
            address
        }
    }
}

/// An IPv4 packet: of a user what the guard looks at, and to the service, mostly.
fn ipv4(draw: &mut impl Draw, world: &World, side: Side) -> Vec<u8> {
    let mut packet = vec![draw.one(&[0x45, 0x45, 0x45, 0x46]), 0, 0, 28, 0, 0, 0, 0, 64];
    packet.push(draw.one(&[17, 17, 6, 1]));
    packet.extend([0, 0]);
    packet.extend(if draw.once_in(8) { [0; 4] } else { address(draw, world) });
    if side == Side::Access && !draw.once_in(4) {
        let mut to = world.service;
        if draw.once_in(8) {
            to[draw.below(4) as usize] ^= 1 << draw.below(8);
        }
        packet.extend(to);
    } else {
        packet.extend(address(draw, world));
    }
    let ports: [u16; 2] = [draw.one(&[68, 68, 67]), draw.one(&[67, 67, 68])];
    packet.extend(ports.map(u16::to_be_bytes).concat());
    packet
}

/// An IPv6 packet: neighbour discovery, mostly.
fn ipv6(draw: &mut impl Draw, world: &World) -> Vec<u8> {
    let kind = if draw.once_in(8) { draw.one(&[128, 132, 138, 143]) } else { 133 + draw.below(5) as u8 };
    let code = u8::from(draw.once_in(16));
    let mut message = vec![kind, code, draw.below(256) as u8, draw.below(256) as u8, 0, 0, 0, 0];
    match kind {
        134 => message.extend([0; 8]),
        135 | 136 => message.extend(address6(draw, world)),
        137 => message.extend([address6(draw, world), address6(draw, world)].concat()),
        _ => {}
    }
    for _ in 0..draw.one(&[1, 1, 0, 2, 3, 17]) {
        let (option, units) = (draw.one(&[1, 1, 2, 2, 3, 14]), draw.one(&[1, 1, 1, 1, 1, 2, 4, 0, 31]));
        message.extend([option, units]);
        message.extend(mac(draw, world));
        message.extend(vec![1; (usize::from(units) * 8).saturating_sub(8)]);
    }
    let len = match draw.below(8) {
        0..=5 => message.len(),
        6 => (message.len() + draw.below(24) as usize).saturating_sub(12),
        _ if draw.once_in(4) => draw.below(1 << 16) as usize,
        _ => draw.below(1500) as usize,
    };
    let next = if draw.once_in(8) { draw.one(&[17, 0, 44]) } else { 58 };
    let hops = if draw.once_in(16) { draw.below(256) as u8 } else { 255 };
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((len as u16).to_be_bytes());
    packet.extend([next, hops]);
    packet.extend(if draw.once_in(8) { [0; 16] } else { address6(draw, world) });
    packet.extend(address6(draw, world));
    packet.extend(message);
    if draw.once_in(2) && len == packet.len() - 40 {
        neighbour::set_checksum(&mut packet);
    }
    packet
}

/// Draws a frame for `side` of `world`.
pub fn frame(draw: &mut impl Draw, world: &World, side: Side) -> Vec<u8> {
    let (src_dst, tagged) = ([mac(draw, world), mac(draw, world)], side == Side::Wan);
    let mut frame = src_dst.concat();
    // as good frames have it, mostly
    let tags = match draw.below(8) {
        0..=4 => usize::from(tagged),
        5 => usize::from(!tagged),
        6 => 2,
        _ => draw.below(5) as usize,
    };
    for place in 0..tags {
        let network = &world.networks[draw.below(world.networks.len() as u32) as usize];
        let good = if network.service && place == 0 && side == Side::Wan { DOT1AD } else { DOT1Q };
        let tpid = if draw.once_in(8) { draw.one(&[DOT1AD, DOT1Q, 0x9100, 0x8101]) } else { good };
        let vid = match (side, draw.below(8)) {
            (Side::Access, 0..=2) => draw.one(&ACCESS_TAGS),
            (_, 0..=4) => network.vid.unwrap_or(0),
            (_, 5) => draw.one(&[0, 4095, 4094]),
            _ => draw.below(4096) as u16,
        };
        let tci = (draw.below(16) as u16) << 12 | vid;
        frame.extend([tpid.to_be_bytes(), tci.to_be_bytes()].concat());
    }
    let ethertype = match draw.below(8) {
        0..=1 => ARP,
        2 | 3 => IPV4,
        4..=5 => IPV6,
        6 => draw.one(&[DOT1Q, DOT1AD, 0x88cc, 38, 0x9000]),
        _ => draw.below(1 << 16) as u16,
    };
    frame.extend(ethertype.to_be_bytes());
    match ethertype {
        IPV4 => frame.extend(ipv4(draw, world, side)),
        IPV6 => frame.extend(ipv6(draw, world)),
        _ => {}
    }
    if ethertype == ARP {
        let mut arp = vec![0, 1, 8, 0, 6, 4];
        if draw.once_in(16) {
            arp[draw.below(6) as usize] ^= 1 << draw.below(8);
        }
        let op = draw.one(&[1_u16, 1, 1, 2, 2, 3, 0x100]);
        arp.extend(op.to_be_bytes());
        arp.extend(mac(draw, world));
        arp.extend(address(draw, world));
        arp.extend(mac(draw, world));
        arp.extend(address(draw, world));
        frame.extend(arp);
    }
    let headers = frame.len();
    let limit = if side == Side::Access { world.wan_largest } else { world.access_largest };
    let len = match draw.below(16) {
        0..=5 => headers.max(60),
        6 => headers,
        // about the ends of headers
        7 | 8 => SHORTEST + draw.below(100) as usize,
        // about the limit, with and without tags
        9..=11 => (limit + draw.below(12) as usize).saturating_sub(3),
        12 => draw.one(&[64, 1514, 1518, 1522, 9018, 2048, 3504]),
        13 | 14 => headers + draw.below(200) as usize,
        _ => draw.below(LONGEST as u32) as usize,
    };
    let len = len.clamp(SHORTEST, LONGEST);
    frame.truncate(len);
    frame.extend((frame.len()..len).map(|i| i as u8));
    frame
}

/// A frame of which program and oracle think differently.
#[derive(Debug)]
#[allow(missing_docs, reason = "as it says")]
pub struct Difference {
    pub side: Side,
    pub frame: Vec<u8>,
    pub predicted: Prediction,
    pub verdict: u32,
    pub out: Vec<u8>,
    pub world: World,
}

/// Where a program and the oracle differ, or the run itself failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are what the message names")]
pub enum Failure {
    #[error(
        "{} program: frame {} has to be {}, but came out as verdict {}, {}\nin {:#?}",
        .0.side.name(), hex(&.0.frame), show(&.0.predicted), .0.verdict, hex(&.0.out), .0.world
    )]
    Differs(Box<Difference>),
    #[error("{} program: frames were counted as {counted:?}, not as {predicted:?}; {hint}", side.name())]
    Counted { side: Side, predicted: Vec<(Outcome, u64)>, counted: Vec<(Outcome, u64)>, hint: String },
    #[error("frame {} was to be kept as it came, but what was kept is {}", hex(frame), hex(kept))]
    Kept { frame: Vec<u8>, kept: Vec<u8> },
    #[error("world {world:?} cannot be made: {why}")]
    World { world: Box<World>, why: String },
    #[error(
        "a second interface beside lo is needed, for users and networks that are behind another: `ip link add type veth`"
    )]
    Interface,
    #[error(transparent)]
    Plane(#[from] PlaneError),
    #[error("running the program")]
    Run(#[source] Box<aya::programs::ProgramError>),
}

fn hex(frame: &[u8]) -> String {
    let shown: Vec<_> = frame.iter().take(80).map(|octet| format!("{octet:02x}")).collect();
    let more = if frame.len() > 80 { format!(" ... ({} octets)", frame.len()) } else { String::new() };
    format!("[{}{more}]", shown.join(" "))
}

fn show(prediction: &Prediction) -> String {
    let frame = prediction.frame.as_deref().map_or_else(|| "dropped".into(), hex);
    format!("{} {frame}", prediction.outcome.name())
}

/// How many frames came out how.
pub type Tally = [u64; Outcome::ALL.len()];

/// The loaded programs, attached nowhere.
pub struct Harness {
    plane: Plane,
    counted: Tally,
    out: Vec<u8>,
    /// An interface other than the one test runs arrive on.
    elsewhere: u32,
}

impl Harness {
    /// Loads the programs.
    ///
    /// # Errors
    /// [`Failure::Plane`]; needs root. [`Failure::Interface`] where there is none but the loopback interface.
    pub fn new() -> Result<Self, Failure> {
        let interfaces = nix::net::if_::if_nameindex().map_err(|_| Failure::Interface)?;
        let elsewhere = interfaces.iter().map(|i| i.index()).find(|index| *index != LOOPBACK);
        let elsewhere = elsewhere.ok_or(Failure::Interface)?;
        let plane =
            Plane::load(&Options { max_users: USERS_MAX, virtual_router_mac: Mac(VIRTUAL), hold: HELD })?;
        let mut harness = Self { plane, counted: [0; _], out: vec![0; LONGEST + 64], elsewhere };
        harness.counted = harness.counters()?;
        Ok(harness)
    }

    fn counters(&self) -> Result<Tally, Failure> {
        let mut tally = [0; _];
        for (outcome, frames) in self.plane.counters()? {
            tally[outcome as usize] = frames;
        }
        Ok(tally)
    }

    /// Puts a world into the maps, by way of table and plane as the daemon does.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn enter(&mut self, world: &World) -> Result<(), Failure> {
        let cannot = |why: String| Failure::World { world: Box::new(world.clone()), why };
        for (first, largest) in [(ACCESS_PORT, world.access_largest), (WAN_PORT, world.wan_largest)] {
            self.plane.set_port(first, LOOPBACK, largest as u64)?;
            self.plane.set_port(first + PORT_STEP, self.elsewhere, largest as u64)?;
        }
        let wiring = Wiring {
            virtual_router_mac: Mac(VIRTUAL),
            access: vec!["a0".into(), "a1".into()],
            wan: vec!["w0".into(), "w1".into()],
        };
        let name = |network: usize| format!("net{network}");
        let home = |place| match place {
            Place::On(network) | Place::Staged(network, _) | Place::Switched(network, _) => network,
            Place::Nowhere | Place::Torn => 0,
        };
        let request = v1::ConfigureRequest {
            revision: 1,
            networks: (0..)
                .zip(&world.networks)
                .map(|(i, n)| v1::Network {
                    name: name(i),
                    vid: n.vid.map(Into::into),
                    tpid: n.vid.map(|_| if n.service { DOT1AD } else { DOT1Q }.into()),
                    pcp: n.pcp.map(Into::into),
                    wan: if n.elsewhere { "w1" } else { "w0" }.into(),
                    router_address: n.address.map(|a| Ipv4Addr::from(a).to_string()).unwrap_or_default(),
                    router_address6: n.address6.map(|a| Ipv6Addr::from(a).to_string()).unwrap_or_default(),
                    router_mac: n.router.map(|mac| Mac(mac).to_string()),
                })
                .collect(),
            users: (0..)
                .zip(&world.users)
                .map(|(i, u): (usize, _)| v1::User {
                    name: format!("user{i}"),
                    mac: u.mac.map(|mac| Mac(mac).to_string()).unwrap_or_default(),
                    interface: if u.elsewhere { "a1" } else { "a0" }.into(),
                    tag: u.tag.map(Into::into),
                    guard: u.guard,
                    addresses: u
                        .addresses
                        .iter()
                        .map(|a| Ipv4Addr::from(*a).to_string())
                        .chain(u.addresses6.iter().map(|a| Ipv6Addr::from(*a).to_string()))
                        .collect(),
                    network: name(home(u.place)),
                })
                .collect(),
        };
        let desired = Desired::new(&request, &wiring).map_err(|e| cannot(e.to_string()))?;
        let (mut table, ..) =
            Table::new(USERS_MAX).configured(&desired).map_err(|e| cannot(e.to_string()))?;
        let holds = Arc::clone(self.plane.holds());
        for (i, user) in world.users.iter().enumerate() {
            if let Place::Staged(from, to) | Place::Switched(from, to) = user.place {
                let (migration, users) = (format!("m{i}"), vec![format!("user{i}")]);
                let refused = |e: crate::table::Refusal| cannot(e.to_string());
                table.stage_begin(&migration, &users, &name(from), &name(to)).map_err(refused)?;
                let (_, staged) = table.stage_write(&migration).map_err(refused)?;
                let service = world.service.into();
                if user.hold != Hold::No {
                    let StageAnswer { switch, generation, .. } = staged;
                    table.hold(&migration, switch.into(), generation, service).map_err(refused)?;
                    holds.begin(switch, service, if user.hold == Hold::Expired { 0 } else { u64::MAX });
                    if user.hold == Hold::Full {
                        holds.word(switch, HoldWord::Bound).store(0, Ordering::Release);
                    }
                }
                if matches!(user.place, Place::Switched(..)) {
                    let step = table
                        .switch(&migration, staged.switch.into(), staged.generation, &users, &name(to))
                        .map_err(refused)?;
                    if !matches!(step, SwitchStep::Store { .. }) {
                        return Err(cannot(format!("{step:?}")));
                    }
                    table.switched(&migration, SwitchAnswer::default());
                }
                if matches!(user.hold, Hold::Draining | Hold::Drained) {
                    let to =
                        if matches!(user.place, Place::Switched(..)) { Selector::B } else { Selector::A };
                    table.release(&migration, to).map_err(refused)?;
                }
            }
        }
        let all = if world.memory_full { 0 } else { HELD.memory.into() };
        holds.word(0, HoldWord::Bound).store(all, Ordering::Release);
        let contents = table.contents();
        self.plane.reconcile(&contents)?;
        // what the table never writes, but a program can come upon between two writes
        let slot_of = |user: &User| {
            contents.iter().find_map(|write| match *write {
                Write::AddUser { known_by, slot } => {
                    let port = ACCESS_PORT + if user.elsewhere { PORT_STEP } else { 0 };
                    let wanted = (user.mac.map(Mac), port, user.tag.unwrap_or(0));
                    ((known_by.mac, known_by.port, known_by.tag) == wanted).then_some(slot)
                }
                _ => None,
            })
        };
        for user in &world.users {
            if let Some(slot) = slot_of(user) {
                let (held, _) = holds.counts(slot);
                let kept = if user.hold == Hold::Draining { Load::frame(60).0 } else { 0 };
                holds.held.word(slot as usize, 1).store(held.wrapping_sub(kept), Ordering::Release);
            }
            let word = match user.place {
                Place::Nowhere => UserWord::resting(0),
                // no switch has had this generation
                Place::Torn => UserWord::staged(1, 1, 1, 0xfffff),
                _ => continue,
            };
            let slot = slot_of(user).ok_or_else(|| cannot("a user has no slot".into()))?;
            self.plane.apply(&[Write::UserWord { slot, word }])?;
        }
        Ok(())
    }

    /// Runs `frames` through the program of `side` in `world`, which was entered, and compares each verdict and each frame
    /// that goes on, and what was counted in all. Adds to `tally`.
    ///
    /// # Errors
    /// [`Failure`], the first.
    pub fn compare(
        &mut self,
        world: &World,
        side: Side,
        frames: &[Vec<u8>],
        tally: &mut Tally,
    ) -> Result<(), Failure> {
        // what was kept against the oracle's word
        while let Some((record, kept)) = self.plane.holds().take() {
            self.plane.holds().sent(record.slot(), Load::frame(kept.len() as u64));
        }
        let mut expected = [0; Outcome::ALL.len()];
        let program = self.plane.program(side)?;
        for frame in frames {
            let predicted = match side {
                Side::Access => world.access(frame),
                Side::Wan => world.wan(frame),
            };
            expected[predicted.outcome as usize] += 1;
            let result = program
                .test_run(TestRunOptions {
                    data_in: Some(frame),
                    data_out: Some(&mut self.out),
                    ..Default::default()
                })
                .map_err(|e| Failure::Run(Box::new(e)))?;
            let out = &self.out[..result.data_size_out as usize];
            // linux/bpf.h: enum xdp_action
            let verdict = match predicted.outcome.action() {
                Action::Drop | Action::Keep => 1,
                Action::Host => 2,
                Action::Forward => 4,
            };
            if result.return_value != verdict || predicted.frame.as_ref().is_some_and(|f| f != out) {
                let difference = Difference {
                    side,
                    frame: frame.clone(),
                    predicted,
                    verdict: result.return_value,
                    out: out.to_vec(),
                    world: world.clone(),
                };
                self.counted = self.counters()?;
                return Err(Failure::Differs(Box::new(difference)));
            }
            if predicted.outcome == Outcome::AccessHeld {
                let holds = self.plane.holds();
                let kept = holds.take().map(|(record, kept)| {
                    holds.sent(record.slot(), Load::frame(kept.len() as u64));
                    kept
                });
                if kept.as_ref() != Some(frame) {
                    let kept = kept.unwrap_or_default();
                    self.counted = self.counters()?;
                    return Err(Failure::Kept { frame: frame.clone(), kept });
                }
            }
        }
        let now = self.counters()?;
        let counted: Vec<u64> = now.iter().zip(self.counted).map(|(now, before)| now - before).collect();
        self.counted = now;
        if counted != expected {
            let of = |tally: &[u64]| -> Vec<_> {
                Outcome::ALL.iter().copied().zip(tally.iter().copied()).filter(|(_, n)| *n > 0).collect()
            };
            let hint = match frames {
                [only] => format!("the frame is {} in {world:#?}", hex(only)),
                _ => format!("run each of the {} frames alone to find it", frames.len()),
            };
            return Err(Failure::Counted { side, predicted: of(&expected), counted: of(&counted), hint });
        }
        for (sum, frames) in tally.iter_mut().zip(expected) {
            *sum += frames;
        }
        Ok(())
    }

    /// As [`Harness::compare`]; if the frames were counted otherwise, tells which.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn compare_and_find(
        &mut self,
        world: &World,
        side: Side,
        frames: &[Vec<u8>],
        tally: &mut Tally,
    ) -> Result<(), Failure> {
        match self.compare(world, side, frames, tally) {
            Err(error @ Failure::Counted { .. }) => {
                for frame in frames {
                    self.compare(world, side, std::slice::from_ref(frame), tally)?;
                }
                Err(error)
            }
            other => other,
        }
    }
}
