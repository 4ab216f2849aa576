//! `handover-gateway-bench switch`: what one store is worth. In one run, on the loaded programs and their real maps, it
//! turns the same users between two networks in two ways:
//!
//! - *commit*: the staged switch, turned by the one store ([`Plane::commit`]), whatever the number of users;
//! - *user map*: one update of the user map (`USER_INDEX`, a hash map) by system call per user, which points the user at a
//!   second slot on the other network. Only the direction user -> WAN is turned by it; a whole switch would need a second
//!   update per user. So the comparison favours it.
//!
//! Before and after each way, a sample of users is sent through the program (`BPF_PROG_TEST_RUN`), and the tag of each frame
//! compared: both ways turn all of them, there and back. Nothing is attached to an interface. Figures are of this run on this
//! machine; each includes reading the clock twice (`timer`).
//!
//! `handover-gateway-bench fuzz`: generated frames in generated worlds, program and oracle compared until they differ or
//! `--frames` are through.

use std::{
    collections::BTreeMap,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use aya::programs::{TestRun as _, TestRunOptions};
use clap::{Parser, Subcommand};
use gateway_ebpf::{
    Outcome, SwitchWord, User, UserWord,
    frame::{ETH_LEN, TPID_8021Q},
    words::Selector,
};
use handover_api::v1;
use handover_gateway::{
    desired::{Desired, Wiring},
    fuzz::{self, Harness, Random},
    hold::Bounds,
    mac::Mac,
    plane::{Options, Plane, Side, grace_period},
    table::{ACCESS_PORT, KnownBy, StageAnswer, StageStep, SwitchStep, Table, Write},
};
use serde::Serialize;

const VIRTUAL_ROUTER: Mac = Mac([0x02, 0x48, 0x4f, 0, 0, 1]);
/// Users to compare for.
const USERS: [u32; 3] = [1, 1_000, 65_536];
/// Stores per row.
const COMMITS: usize = 20_000;
/// System calls per row; at least [`FEWEST`] runs, so that a 99th percentile means something.
const UPDATES: usize = 4_000_000;
/// See [`UPDATES`].
const FEWEST: usize = 200;
/// Users whose frames are looked at.
const SAMPLE: usize = 64;
/// The loopback interface, on which test runs seem to arrive.
const LOOPBACK: u32 = 1;
/// The networks' VIDs.
const VIDS: [u16; 2] = [1, 2];

/// Benchmarks of the gateway.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// The single-store commit of a switch beside updating the user map by system call
    Switch {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Generated frames through the programs, each compared with what the oracle predicts
    Fuzz {
        /// How many
        #[arg(long, default_value_t = 100_000_000, value_parser = clap::value_parser!(u64).range(1..))]
        frames: u64,
        /// Where the random numbers begin; the same seed makes the same frames
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// Times of one way, in nanoseconds.
#[derive(Debug, Clone, Copy, Serialize)]
struct Times {
    runs: usize,
    median_ns: u64,
    p99_ns: u64,
}

impl Times {
    fn of(mut samples: Vec<u64>) -> Self {
        samples.sort_unstable();
        let runs = samples.len();
        Self { runs, median_ns: samples[runs / 2], p99_ns: samples[runs * 99 / 100] }
    }
}

#[derive(Serialize)]
struct Row {
    users: u32,
    /// The store.
    commit: Times,
    /// The store, and finding out that no program run is left that read the selector before it.
    commit_and_window: Times,
    /// One system call per user.
    user_map: Times,
    /// user_map / commit.
    ratio_median: f64,
    /// user_map / commit.
    ratio_p99: f64,
    /// Users of whom frames were looked at, before and after each way.
    verified_users: usize,
}

#[derive(Serialize)]
struct Report {
    bench: &'static str,
    kernel: String,
    cpus: usize,
    /// Reading the clock twice, part of every figure.
    timer: Times,
    rows: Vec<Row>,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().what {
        What::Switch { json } => bench().and_then(|report| {
            if json {
                println!("{}", serde_json::to_string(&report)?);
            } else {
                print(&report);
            }
            Ok(())
        }),
        What::Fuzz { frames, seed, json } => fuzz(frames, seed, json),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Frames of one side in one world, after which the counters are compared.
const BATCH: u64 = 512;

/// What became of the generated frames.
#[derive(Serialize)]
struct Fuzzed {
    bench: &'static str,
    seed: u64,
    frames: u64,
    worlds: u64,
    frames_per_second: u64,
    /// All as predicted.
    outcomes: BTreeMap<&'static str, u64>,
}

fn fuzz(frames: u64, seed: u64, json: bool) -> anyhow::Result<()> {
    let mut harness = Harness::new().context("fuzzing loads the real programs")?;
    let mut random = Random(seed);
    let mut tally = [0; Outcome::ALL.len()];
    let (mut done, mut worlds, begun) = (0, 0, Instant::now());
    let mut said = begun;
    while done < frames {
        let world = fuzz::world(&mut random);
        harness.enter(&world)?;
        worlds += 1;
        for side in [Side::Access, Side::Wan] {
            let batch: Vec<_> =
                (0..BATCH.min(frames - done)).map(|_| fuzz::frame(&mut random, &world, side)).collect();
            harness
                .compare_and_find(&world, side, &batch, &mut tally)
                .with_context(|| format!("after {done} frames of seed {seed}"))?;
            done += batch.len() as u64;
        }
        if said.elapsed() > Duration::from_secs(10) {
            said = Instant::now();
            eprintln!("{done} of {frames} frames, all as predicted");
        }
    }
    let report = Fuzzed {
        bench: "fuzz",
        seed,
        frames: done,
        worlds,
        frames_per_second: (done as f64 / begun.elapsed().as_secs_f64()) as u64,
        outcomes: Outcome::ALL.iter().map(|o| (o.name(), tally[*o as usize])).collect(),
    };
    if json {
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    println!(
        "{done} frames in {worlds} worlds, all as the oracle predicts ({} frames/s, seed {seed}); by outcome:",
        report.frames_per_second
    );
    for (outcome, frames) in &report.outcomes {
        println!("{frames:>12}  {outcome}");
    }
    Ok(())
}

fn bench() -> anyhow::Result<Report> {
    let timer = Times::of((0..COMMITS).map(|_| timed(|| {}).1).collect());
    let rows = USERS
        .into_iter()
        .map(|users| {
            eprintln!("{users} users ...");
            row(users).with_context(|| format!("with {users} users"))
        })
        .collect::<anyhow::Result<_>>()?;
    let uname = nix::sys::utsname::uname().context("asking for the kernel's version")?;
    Ok(Report {
        bench: "switch",
        kernel: uname.release().to_string_lossy().into_owned(),
        cpus: std::thread::available_parallelism().map_or(0, Into::into),
        timer,
        rows,
    })
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let begun = Instant::now();
    let value = work();
    (value, begun.elapsed().as_nanos() as u64)
}

fn row(users: u32) -> anyhow::Result<Row> {
    let mut bench = Bench::new(users)?;
    bench.expect(VIDS[0], "staged, not switched")?;

    // one way: the store
    bench.store(Selector::B);
    bench.expect(VIDS[1], "after the store")?;
    bench.store(Selector::A);
    bench.expect(VIDS[0], "after the store back")?;
    let mut commits = Vec::with_capacity(COMMITS);
    let mut windows = Vec::with_capacity(COMMITS);
    for run in 0..COMMITS {
        let word = bench.word(if run % 2 == 0 { Selector::B } else { Selector::A });
        let (committed, took) = timed(|| bench.plane.commit(bench.staged.switch, word));
        commits.push(took);
        let (_, took) = timed(|| bench.plane.window(bench.staged.switch, committed));
        windows.push(commits[run] + took);
    }
    bench.expect(VIDS[0], "after all stores")?;

    // the other way: the user map, by system call
    bench.update_user_map(Selector::B)?;
    bench.expect(VIDS[1], "after updating the user map")?;
    bench.update_user_map(Selector::A)?;
    bench.expect(VIDS[0], "after updating it back")?;
    let runs = (UPDATES / users as usize).clamp(FEWEST, COMMITS) / 2 * 2;
    let mut updates = Vec::with_capacity(runs);
    for run in 0..runs {
        let to = if run % 2 == 0 { Selector::B } else { Selector::A };
        let (result, took) = timed(|| bench.update_user_map(to));
        result?;
        updates.push(took);
    }
    bench.expect(VIDS[0], "after all updates")?;

    let (commit, user_map) = (Times::of(commits), Times::of(updates));
    let ratio = |a: u64, b: u64| (a as f64 / b.max(1) as f64 * 10.0).round() / 10.0;
    Ok(Row {
        users,
        commit,
        commit_and_window: Times::of(windows),
        user_map,
        ratio_median: ratio(user_map.median_ns, commit.median_ns),
        ratio_p99: ratio(user_map.p99_ns, commit.p99_ns),
        verified_users: SAMPLE.min(users as usize),
    })
}

/// The data plane with all users staged from one network to another, and a second slot for each user on the new one.
struct Bench {
    plane: Plane,
    staged: StageAnswer,
    /// MAC, slot on the old network and in the switch, slot on the new one.
    users: Vec<(Mac, u32, u32)>,
}

impl Bench {
    fn new(users: u32) -> anyhow::Result<Self> {
        let mut plane = Plane::load(&Options {
            max_users: users,
            virtual_router_mac: VIRTUAL_ROUTER,
            hold: Bounds::default(),
        })
        .context("the benchmark loads the real programs")?;
        for side in [Side::Access, Side::Wan] {
            plane.set_port(side.port(), LOOPBACK, 1514)?;
        }
        let request = inventory(users);
        let names: Vec<String> = request.users.iter().map(|u| u.name.clone()).collect();
        let desired = Desired::new(&request, &Wiring::single(VIRTUAL_ROUTER))?;
        let (mut table, writes, _) = Table::new(users).configured(&desired)?;
        plane.apply(&writes)?;
        let mut slots = Vec::with_capacity(users as usize);
        for write in &writes {
            if let Write::AddUser { known_by: KnownBy { mac: Some(mac), .. }, slot } = *write {
                slots.push((mac, slot));
            }
        }
        // slots the table has given to nobody: it has twice as many as users
        let free = slots.iter().map(|(_, slot)| *slot).max().unwrap_or(0) + 1;
        let users: Vec<_> =
            slots.iter().zip(free..).map(|((mac, slot), second)| (*mac, *slot, second)).collect();

        let step = table.stage_begin("bench", &names, "old", "new")?;
        ensure!(matches!(step, StageStep::Introduce { .. }), "not staged before");
        let (writes, staged) = table.stage_write("bench")?;
        plane.apply(&writes)?;
        let step = table.switch("bench", staged.switch.into(), staged.generation, &names, "new")?;
        ensure!(matches!(step, SwitchStep::Store { .. }), "ready for the store");
        let second: Vec<_> = users
            .iter()
            .flat_map(|(mac, _, slot)| {
                let identity = User::identity(mac.word(), ACCESS_PORT);
                [
                    Write::UserIdentity { slot: *slot, identity },
                    Write::UserWord { slot: *slot, word: UserWord::resting(staged.to) },
                ]
            })
            .collect();
        plane.apply(&second)?;
        grace_period()?;
        Ok(Self { plane, staged, users })
    }

    const fn word(&self, selector: Selector) -> SwitchWord {
        SwitchWord::forward(selector, self.staged.generation)
    }

    fn store(&self, selector: Selector) {
        let committed = self.plane.commit(self.staged.switch, self.word(selector));
        self.plane.window(self.staged.switch, committed);
    }

    fn update_user_map(&mut self, to: Selector) -> anyhow::Result<()> {
        for (mac, old, new) in &self.users {
            let slot = if to == Selector::A { *old } else { *new };
            let known_by = KnownBy { mac: Some(*mac), port: ACCESS_PORT, tag: 0 };
            self.plane.index_user(known_by, slot)?;
        }
        Ok(())
    }

    /// Sends a frame of each of a sample of users through the program: all have to leave with `vid`.
    fn expect(&self, vid: u16, when: &str) -> anyhow::Result<()> {
        let program = self.plane.program(Side::Access)?;
        let step = self.users.len().div_ceil(SAMPLE);
        for (mac, ..) in self.users.iter().step_by(step) {
            let frame = [&VIRTUAL_ROUTER.0[..], &mac.0, &[8, 0], &[0; 46]].concat();
            let mut out = [0; 64];
            program
                .test_run(TestRunOptions {
                    data_in: Some(&frame),
                    data_out: Some(&mut out),
                    ..Default::default()
                })
                .context("running the program")?;
            let tag = [TPID_8021Q.to_be_bytes(), vid.to_be_bytes()].concat();
            ensure!(
                out[ETH_LEN - 2..ETH_LEN + 2] == tag,
                "{when}: a frame of {mac} left with {:02x?}, not in VLAN {vid}",
                &out[ETH_LEN - 2..ETH_LEN + 2]
            );
        }
        Ok(())
    }
}

fn inventory(users: u32) -> v1::ConfigureRequest {
    let network = |name: &str, vid: u16, last: u8| v1::Network {
        name: name.into(),
        vid: Some(vid.into()),
        router_address: "10.255.255.1".into(),
        router_mac: Some(Mac([2, 0, 0, 0, 0x0a, last]).to_string()),
        ..v1::Network::default()
    };
    let user = |n: u32| {
        let [_, b, c, d] = n.to_be_bytes();
        v1::User {
            name: format!("user{n}"),
            mac: Mac([0x02, 0, 1, b, c, d]).to_string(),
            addresses: vec![format!("10.{b}.{c}.{d}")],
            network: "old".into(),
            ..v1::User::default()
        }
    };
    v1::ConfigureRequest {
        revision: 1,
        networks: vec![network("old", VIDS[0], 1), network("new", VIDS[1], 2)],
        users: (1..=users).map(user).collect(),
    }
}

fn print(report: &Report) {
    println!(
        "Switching users, kernel {}, {} CPUs, one run; reading the clock costs {} ns of each figure",
        report.kernel, report.cpus, report.timer.median_ns
    );
    println!();
    println!(
        "             single-store commit      + window measured        user map by system call     ratio"
    );
    println!(
        "    users      median        p99      median        p99         median          p99      median      p99"
    );
    for row in &report.rows {
        println!(
            "{:>9} {:>11} {:>10} {:>11} {:>10} {:>14} {:>12} {:>11} {:>8}",
            row.users,
            time(row.commit.median_ns),
            time(row.commit.p99_ns),
            time(row.commit_and_window.median_ns),
            time(row.commit_and_window.p99_ns),
            time(row.user_map.median_ns),
            time(row.user_map.p99_ns),
            factor(row.ratio_median),
            factor(row.ratio_p99),
        );
    }
    println!();
    println!("Both ways turned the same users, as frames of a sample of them showed before and after.");
}

fn factor(ratio: f64) -> String {
    if ratio < 100.0 { format!("{ratio:.1}x") } else { format!("{ratio:.0}x") }
}

fn time(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{ns} ns"),
        10_000..10_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        _ => format!("{:.1} ms", ns as f64 / 1e6),
    }
}
