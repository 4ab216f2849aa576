//! `handover-gateway-bench forward`: what a frame from a user costs, with many users beside, each frame a random user's, so
//! that memory is as cold as it would be. In one run, round by round, so that whatever else the machine does meets all ways:
//!
//! - *dry* (BPF_PROG_TEST_RUN): the program alone, what it redirects goes nowhere. Making the frame is part of every figure
//!   and the same for all; for those that push a tag, so is taking it off again for the next frame. *Tag from one line* is the
//!   least that any program can do that knows each user: one load of a random cache line of a table as large as the gateway's.
//! - *live*: frames that come in on one veth and are counted at the far end of another, everything on one CPU:
//!
//! ```text
//!   CPU 0   BPF_PROG_TEST_RUN, live frames: source --redirect--> user0 == acc0 [way] wan0 == up0 [count]
//! ```
//!
//! Times are those that the work had a CPU for, so that what else the machine does counts only by what it does to the caches.
//! For Open vSwitch, which works on the other CPU, it is what its daemon had; making the frames is not counted there.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use gateway_bench_ebpf::Next;
use handover_gateway::plane::Side;
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::{
    ovs::{self, Ovs},
    place::{self, LOOPBACK},
    rig::{self, Kind, Programs, VIDS, VIRTUAL_ROUTER, mac},
    stats::{Machine, table},
};

/// Frames of one measurement: over before the scheduler gives the CPU to another.
const FRAMES: u32 = 1 << 13;
/// How many speak where not all do: what is looked up for them stays in the caches.
const FEW: u32 = 1_024;
/// Measurements of each way; the median counts.
const ROUNDS: usize = 301;
/// Most users for Open vSwitch, whose flow cache has room for 200,000 at most (its `flow-limit`).
const OVS_USERS: u32 = 65_536;
/// Frames for each user before a way that learns is measured.
const WARM_UP: u32 = 3;
/// Frames of one measurement across veths: the kernel makes and takes down what it sends from each time, and waits for it.
const LIVE_FRAMES: u32 = 1 << 20;
/// Measurements of each way across veths.
const LIVE_ROUNDS: usize = 11;
/// When nothing has arrived for so long, nothing more will.
const SILENCE: Duration = Duration::from_millis(10);

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Both.
    All,
    /// Programs alone.
    Dry,
    /// Across veths.
    Live,
}

#[derive(Serialize)]
struct Report {
    bench: &'static str,
    machine: Machine,
    rows: Vec<Row>,
}

/// With so many users.
#[derive(Serialize)]
struct Row {
    users: u32,
    /// Of whom so many send.
    speaking: u32,
    dry: Vec<Dry>,
    live: Vec<Live>,
}

/// A program alone.
#[derive(Serialize)]
struct Dry {
    way: &'static str,
    runs: usize,
    /// Per frame, median.
    ns: f64,
    /// Per frame, least.
    least_ns: f64,
    /// Over the bare redirect of the same kind.
    above_redirect_ns: Option<f64>,
}

/// Across two veths.
#[derive(Serialize)]
struct Live {
    way: &'static str,
    runs: usize,
    /// Delivered, millions for each second of a CPU, median.
    mpps: f64,
    /// Sent and not delivered, of all measurements.
    not_delivered: f64,
    /// Of what the bare redirect does.
    of_redirect: Option<f64>,
    skipped: Option<String>,
}

/// Measures and prints.
pub fn run(json: bool, users: &[u32], part: Part) -> anyhow::Result<()> {
    place::enter()?;
    let mut machine = Machine::now()?;
    place::pin(0)?;
    let rows = users
        .iter()
        .flat_map(|&users| {
            let few = (FEW < users).then_some((users, FEW));
            few.into_iter().chain([(users, users)])
        })
        .map(|(users, speaking)| {
            let mut row = Row { users, speaking, dry: Vec::new(), live: Vec::new() };
            if part != Part::Live {
                eprintln!("{users} users, of whom {speaking} speak: programs alone ...");
                row.dry = dry(users, speaking).with_context(|| format!("programs alone, {users} users"))?;
            }
            if part != Part::Dry {
                eprintln!("{users} users, of whom {speaking} speak: across veths ...");
                row.live = live(users, speaking).with_context(|| format!("across veths, {users} users"))?;
            }
            Ok(row)
        })
        .collect::<anyhow::Result<_>>()?;
    machine.ended()?;
    let report = Report { bench: "forward", machine, rows };
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(())
}

/// Least and median.
fn spread(mut samples: Vec<f64>) -> Option<(f64, f64)> {
    samples.sort_by(f64::total_cmp);
    Some((*samples.first()?, *samples.get(samples.len() / 2)?))
}

fn dry(users: u32, speaking: u32) -> anyhow::Result<Vec<Dry>> {
    let (_table, plane) = rig::gateway(users, LOOPBACK, LOOPBACK)?;
    let ways = [
        ("XDP_PASS", Some(Next::Pass)),
        ("bare redirect", Some(Next::Redirect)),
        ("redirect, one tag for all", Some(Next::RedirectTagged)),
        ("redirect, tag from one line", Some(Next::OneLine)),
        ("handover", Some(Next::Handover)),
        ("one hash map, user -> tag", Some(Next::HashMap)),
        ("tc, bare redirect", None),
        ("tc, vlan_push and redirect", None),
    ];
    let loaded: Vec<(&'static str, Option<Next>, Programs)> = ways
        .into_iter()
        .map(|(way, next)| {
            let mut programs = Programs::load(users, next.unwrap_or(Next::Pass), LOOPBACK)?;
            programs.send_to(LOOPBACK)?;
            programs.speak(speaking);
            match next {
                Some(Next::Handover) => programs.hand_on_to_gateway(&plane)?,
                Some(Next::HashMap) => everybody(&programs, users)?,
                None if way.contains("vlan_push") => {
                    everybody(&programs, users)?;
                    programs.tc_hand_on_to("tc_forward")?;
                }
                None => programs.tc_hand_on_to("tc_redirect")?,
                _ => {}
            }
            Ok((way, next, programs))
        })
        .collect::<anyhow::Result<_>>()?;
    let mut samples = vec![Vec::with_capacity(ROUNDS); loaded.len()];
    // the first round warms up
    for round in 0..=ROUNDS {
        for ((_, next, programs), samples) in loaded.iter().zip(&mut samples) {
            let begun = cpu_time()?;
            match next {
                Some(_) => programs.source("source", Kind::Dry, FRAMES)?,
                None => programs.tc_source(FRAMES)?,
            };
            if round > 0 {
                samples.push((cpu_time()? - begun) as f64 / f64::from(FRAMES));
            }
        }
    }
    let found: Vec<_> = samples.into_iter().filter_map(spread).collect();
    let at = |way| ways.iter().position(|(w, _)| *w == way).and_then(|i| found.get(i)).map(|(_, ns)| *ns);
    let (xdp, tc) = (at("bare redirect"), at("tc, bare redirect"));
    Ok(ways
        .into_iter()
        .zip(&found)
        .map(|((way, next), (least_ns, ns))| {
            let redirect = if next.is_some() { xdp } else { tc };
            let above = redirect.map(|redirect| ns - redirect).filter(|_| !way.contains("PASS"));
            Dry { way, runs: ROUNDS, ns: *ns, least_ns: *least_ns, above_redirect_ns: above }
        })
        .collect())
}

/// Nanoseconds that this thread has had a CPU: what others had meanwhile is not counted.
fn cpu_time() -> anyhow::Result<i64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// Every user's tag into the one hash map.
fn everybody(programs: &Programs, users: u32) -> anyhow::Result<()> {
    let keys: Vec<u64> = (1..=users).map(|n| mac(n).word()).collect();
    programs.update_batch(&keys, &vec![u32::from(VIDS[0]); keys.len()])
}

/// A way while it is measured.
struct Held {
    /// Taken down when dropped.
    _way: Box<dyn std::any::Any>,
    /// Nanoseconds of a CPU it has had so far.
    cpu_time: Box<dyn Fn() -> anyhow::Result<i64>>,
}

/// Sets a way up for so many users, or says why it cannot be.
type SetUp = fn(u32) -> anyhow::Result<Result<Held, String>>;

/// A way that works where the frames are made: on this thread's CPU, or in the thread that takes over from it.
fn here(way: impl std::any::Any) -> anyhow::Result<Result<Held, String>> {
    let softirq = place::thread_named("ksoftirqd/0")?;
    let cpu_time = move || Ok(cpu_time()? + place::cpu_time_of(softirq)?);
    Ok(Ok(Held { _way: Box::new(way), cpu_time: Box::new(cpu_time) }))
}

fn live(users: u32, speaking: u32) -> anyhow::Result<Vec<Live>> {
    let ways: [(&'static str, bool, SetUp); 6] = [
        ("bare redirect", true, bare),
        ("handover", true, handover),
        ("tc, bare redirect", false, tc_bare),
        ("tc, vlan_push and redirect", false, tc_push),
        ("Linux bridge, no tags", false, bridge),
        ("Open vSwitch, userspace", false, open_vswitch),
    ];
    let mut rows = Vec::with_capacity(ways.len());
    for (way, xdp, set_up) in ways {
        rows.push(live_row(users, speaking, way, xdp, set_up).context(way)?);
    }
    let redirect = rows.first().map(|row| row.mpps);
    for row in &mut rows {
        row.of_redirect = redirect.filter(|_| row.skipped.is_none()).map(|redirect| row.mpps / redirect);
    }
    Ok(rows)
}

fn live_row(users: u32, speaking: u32, way: &'static str, xdp: bool, set_up: SetUp) -> anyhow::Result<Live> {
    place::cable("user0", "acc0")?;
    place::cable("wan0", "up0")?;
    for end in ["acc0", "wan0"] {
        // polls, so that redirected frames are delivered where there is no XDP program
        place::run(Command::new("ethtool").args(["-K", end, "gro", "on"]))?;
    }
    let mut source = Programs::load(users, Next::Redirect, 0)?;
    source.send_to(place::index("user0")?)?;
    source.speak(speaking);
    let mut sink = Programs::load(1, Next::Drop, 0)?;
    if xdp {
        sink.attach("count", "up0")?;
    } else {
        sink.attach_tc("tc_count", "up0")?;
    }
    let mut live = Live { way, runs: 0, mpps: 0.0, not_delivered: 0.0, of_redirect: None, skipped: None };
    match set_up(users)? {
        Err(why) => live.skipped = Some(why),
        Ok(held) => {
            let mut sent = 0;
            while sent < u64::from(speaking) * u64::from(WARM_UP) {
                source.source("source", Kind::Live, LIVE_FRAMES)?;
                sent += u64::from(LIVE_FRAMES);
            }
            let mut rates = Vec::with_capacity(LIVE_ROUNDS);
            let (mut offered, mut delivered) = (0, 0);
            for _ in 0..LIVE_ROUNDS {
                let before = settled(&sink)?;
                let begun = (held.cpu_time)()?;
                source.source("source", Kind::Live, LIVE_FRAMES)?;
                let arrived = settled(&sink)? - before;
                let took = (held.cpu_time)()? - begun;
                offered += u64::from(LIVE_FRAMES);
                delivered += arrived;
                rates.push(arrived as f64 * 1e3 / took as f64);
            }
            live.runs = LIVE_ROUNDS;
            live.mpps = spread(rates).context("no rounds")?.1;
            live.not_delivered = 1.0 - delivered.min(offered) as f64 / offered as f64;
            drop(held);
        }
    }
    drop((source, sink));
    place::ip("link del user0")?;
    place::ip("link del wan0")?;
    Ok(live)
}

/// The sink's count once nothing more arrives of the round before.
fn settled(sink: &Programs) -> anyhow::Result<u64> {
    let mut last = (sink.counted()?, Instant::now());
    while last.1.elapsed() < SILENCE {
        let now = sink.counted()?;
        if now != last.0 {
            last = (now, Instant::now());
        }
    }
    Ok(last.0)
}

fn bare(_users: u32) -> anyhow::Result<Result<Held, String>> {
    let mut programs = Programs::load(1, Next::Drop, 0)?;
    programs.send_to(place::index("wan0")?)?;
    programs.attach("redirect", "acc0")?;
    here(programs)
}

fn handover(users: u32) -> anyhow::Result<Result<Held, String>> {
    let access = place::index("acc0")?;
    let (_table, mut plane) = rig::gateway(users, access, place::index("wan0")?)?;
    plane.attach(Side::Access, "acc0", access)?;
    here(plane)
}

fn tc_bare(_users: u32) -> anyhow::Result<Result<Held, String>> {
    let mut programs = Programs::load(1, Next::Drop, place::index("wan0")?)?;
    programs.attach_tc("tc_redirect", "acc0")?;
    here(programs)
}

fn tc_push(users: u32) -> anyhow::Result<Result<Held, String>> {
    let mut programs = Programs::load(users, Next::Drop, place::index("wan0")?)?;
    everybody(&programs, users)?;
    programs.attach_tc("tc_forward", "acc0")?;
    here(programs)
}

/// Removes the bridge when dropped.
struct Bridge;

impl Drop for Bridge {
    fn drop(&mut self) {
        if let Err(error) = place::ip("link del bridge0") {
            eprintln!("{error:#}");
        }
    }
}

fn bridge(_users: u32) -> anyhow::Result<Result<Held, String>> {
    place::ip("link add bridge0 type bridge mcast_snooping 0")?;
    let held = Bridge;
    for port in ["acc0", "wan0"] {
        place::ip(&format!("link set {port} master bridge0"))?;
    }
    place::ip("link set bridge0 up")?;
    // what netfilter does with bridged IPv4 is not the bridge's
    std::fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0").context("bridge-nf-call-iptables")?;
    let router = VIRTUAL_ROUTER.to_string();
    place::run(Command::new("bridge").args(["fdb", "add", &router, "dev", "wan0", "master", "static"]))?;
    here(held)
}

fn open_vswitch(users: u32) -> anyhow::Result<Result<Held, String>> {
    if let Some(why) = ovs::missing() {
        return Ok(Err(why));
    }
    if users > OVS_USERS {
        return Ok(Err(format!("its flow cache has room for 200,000, and {OVS_USERS} show what it does")));
    }
    let ovs = Ovs::start("acc0", "wan0", 1)?;
    let flows = ovs.flows(users, VIDS[0])?;
    ovs.replace(&flows)?;
    let switch = ovs.pid();
    let cpu_time = move || place::cpu_time_of(switch);
    Ok(Ok(Held { _way: Box::new(ovs), cpu_time: Box::new(cpu_time) }))
}

impl Report {
    fn print(&self) {
        self.machine.print();
        for row in &self.rows {
            row.print_dry();
            row.print_live();
        }
    }
}

impl Row {
    fn print_dry(&self) {
        if self.dry.is_empty() {
            return;
        }
        println!();
        println!(
            "{} users, of whom {} speak: programs alone, per frame (making the frame included):",
            self.users, self.speaking
        );
        let mut dry = table(1, &["way", "median", "least", "above redirect"]);
        for d in &self.dry {
            let above = d.above_redirect_ns.map(|ns| format!("{ns:+.1} ns")).unwrap_or_default();
            dry.add_row([d.way.into(), format!("{:.1} ns", d.ns), format!("{:.1} ns", d.least_ns), above]);
        }
        println!("{dry}");
    }

    fn print_live(&self) {
        if self.live.is_empty() {
            return;
        }
        println!();
        println!("{} users, of whom {} speak: across two veths on one CPU:", self.users, self.speaking);
        let mut live = table(1, &["way", "delivered", "lost on the way", "of bare redirect"]);
        for l in &self.live {
            if let Some(why) = &l.skipped {
                live.add_row([l.way.to_owned(), format!("skipped: {why}")]);
                continue;
            }
            live.add_row([
                l.way.into(),
                format!("{:.3} Mpps/CPU", l.mpps),
                format!("{:.1} %", l.not_delivered * 100.0),
                l.of_redirect.map(|of| format!("{of:.2}")).unwrap_or_default(),
            ]);
        }
        println!("{live}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_least_and_median() {
        assert_eq!(spread(vec![3.0, 1.0, 2.0]), Some((1.0, 2.0)));
        assert_eq!(spread(Vec::new()), None);
    }
}
