//! One switch of N users, done in several ways, one after the other in one run:
//!
//! - the gateway's store, alone and with finding out that no program run is left that read the selector before it;
//! - a hash map of users, updated by one system call per user, and by one system call for all (BPF_MAP_UPDATE_BATCH);
//! - a map of maps, whose one element is replaced by a map that was filled beforehand (filling it is not counted);
//! - Open vSwitch, whose flows are replaced in one bundle (`ovs-ofctl --bundle replace-flows`; the program's start and its
//!   reading of the flows are part of that).
//!
//! Each way turns all users there and back, as frames of a sample of users (for Open vSwitch: their flows) show.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use aya::maps::HashMap;
use gateway_bench_ebpf::Next;
use gateway_ebpf::{SwitchWord, words::Selector};
use handover_gateway::plane::Side;
use serde::Serialize;

use crate::{
    ovs::{self, Ovs},
    place,
    rig::{self, Programs, VIDS, mac, vid_of},
    stats::{Times, factor, ratio, table, time, timed},
};

/// Stores per row.
const COMMITS: usize = 20_000;
/// Users turned by system calls per row; at least [`FEWEST`] runs, so that there is a distribution.
const UPDATES: usize = 4_000_000;
/// See [`UPDATES`].
const FEWEST: usize = 20;
/// Replacements of an element of a map of maps; each waits for an RCU grace period.
const SWAPS: usize = 100;
/// Bundles per row, at most, and for how long there may be another.
const BUNDLES: usize = 20;
/// See [`BUNDLES`].
const BUNDLES_FOR: Duration = Duration::from_secs(20);
/// Most users whose flows are replaced: the switch and `ovs-ofctl` hold each flow several times over (about 2 KB a flow and
/// side), and a bundle of a million is minutes of work, so that it would be the whole benchmark.
const OVS_USERS: u32 = 65_536;
/// Users whose frames are looked at.
const SAMPLE: u32 = 64;

/// Ways of switching N users.
#[derive(Debug, Serialize)]
pub struct Row {
    pub users: u32,
    /// The store.
    pub store: Times,
    /// The store, and knowing that nothing goes under the old network any more.
    pub store_and_window: Times,
    /// A system call for each user.
    pub map_updates: Times,
    /// One for all.
    pub map_batch: Times,
    /// A map instead of another.
    pub map_in_map: Times,
    pub ovs_bundle: Option<Times>,
    pub ovs_version: Option<String>,
    /// Why there is none.
    pub ovs_skipped: Option<String>,
    /// Medians, by that of `store_and_window`.
    pub ratios: Ratios,
    /// Users who were looked at, before and after each way.
    pub verified_users: u32,
}

/// How many times the gateway's way.
#[derive(Debug, Serialize)]
pub struct Ratios {
    pub map_updates: f64,
    pub map_batch: f64,
    pub map_in_map: f64,
    pub ovs_bundle: Option<f64>,
}

/// Compares for each number of users.
pub fn run(users: &[u32]) -> anyhow::Result<Vec<Row>> {
    users
        .iter()
        .map(|&users| {
            eprintln!("{users} users, switched in different ways ...");
            row(users).with_context(|| format!("with {users} users"))
        })
        .collect()
}

fn row(users: u32) -> anyhow::Result<Row> {
    let (store, store_and_window) = stores(users)?;
    let [map_updates, map_batch, map_in_map] = maps(users)?;
    let (ovs_bundle, ovs_skipped) = match ovs(users)? {
        Ok(measured) => (Some(measured), None),
        Err(why) => (None, Some(why)),
    };
    let (ovs_version, ovs_bundle) = ovs_bundle.unzip();
    let by = |times: Times| ratio(times.median_ns, store_and_window.median_ns);
    Ok(Row {
        users,
        store,
        store_and_window,
        map_updates,
        map_batch,
        map_in_map,
        ratios: Ratios {
            map_updates: by(map_updates),
            map_batch: by(map_batch),
            map_in_map: by(map_in_map),
            ovs_bundle: ovs_bundle.map(by),
        },
        ovs_bundle,
        ovs_version,
        ovs_skipped,
        verified_users: SAMPLE.min(users),
    })
}

/// Users of the sample.
fn sample(users: u32) -> impl Iterator<Item = u32> {
    (1..=users).step_by(users.div_ceil(SAMPLE) as usize)
}

fn expect(users: u32, vid: u16, when: &str, of: impl Fn(u32) -> anyhow::Result<u16>) -> anyhow::Result<()> {
    for n in sample(users) {
        let found = of(n)?;
        ensure!(found == vid, "{when}: user {n} is in VLAN {found}, not in {vid}");
    }
    Ok(())
}

fn stores(users: u32) -> anyhow::Result<(Times, Times)> {
    let (mut table, mut plane) = rig::gateway(users, place::LOOPBACK, place::LOOPBACK)?;
    let staged = rig::stage(&mut table, &mut plane, users)?;
    let word = |selector| SwitchWord::forward(selector, staged.generation);
    let is_on = |vid, when| expect(users, vid, when, |n| vid_of(plane.program(Side::Access)?, n));
    is_on(VIDS[0], "staged, not switched")?;
    let mut stores = Vec::with_capacity(COMMITS);
    let mut windows = Vec::with_capacity(COMMITS);
    for run in 0..COMMITS {
        let selector = if run % 2 == 0 { Selector::B } else { Selector::A };
        let (committed, took) = timed(|| plane.commit(staged.switch, word(selector)));
        stores.push(took);
        let (_, took) = timed(|| plane.window(staged.switch, committed));
        windows.push(stores[run] + took);
        if run < 2 {
            is_on(VIDS[1 - run % 2], "after a store")?;
        }
    }
    is_on(VIDS[0], "after all stores")?;
    Ok((times(stores)?, times(windows)?))
}

fn times(samples: Vec<u64>) -> anyhow::Result<Times> {
    Times::of(samples).context("no samples")
}

fn maps(users: u32) -> anyhow::Result<[Times; 3]> {
    let mut programs = Programs::load(users, Next::Pass, 0)?;
    programs.send_to(place::LOOPBACK)?;
    let keys: Vec<u64> = (1..=users).map(|n| mac(n).word()).collect();
    let values = VIDS.map(|vid| vec![u32::from(vid); keys.len()]);
    let runs = (UPDATES / keys.len()).clamp(FEWEST, COMMITS) / 2 * 2;

    programs.update_batch(&keys, &values[0])?;
    let mut single = Vec::with_capacity(runs);
    for run in 0..runs {
        let vid = VIDS[1 - run % 2];
        let (done, took) =
            timed(|| keys.iter().try_for_each(|key| programs.by_mac.insert(key, u32::from(vid), 0)));
        done?;
        single.push(took);
        if run < 2 {
            expect(users, vid, "after updating each user", |n| programs.vid_of("by_hash_map", n))?;
        }
    }
    let mut batch = Vec::with_capacity(runs);
    for run in 0..runs {
        let to = 1 - run % 2;
        let (done, took) = timed(|| programs.update_batch(&keys, &values[to]));
        done?;
        batch.push(took);
        if run < 2 {
            expect(users, VIDS[to], "after updating all users", |n| programs.vid_of("by_hash_map", n))?;
        }
    }

    let inner = VIDS.map(|vid| {
        let mut map: HashMap<_, u64, u32> = HashMap::create(users, 0)?;
        keys.iter().try_for_each(|key| map.insert(key, u32::from(vid), 0))?;
        Ok::<_, aya::maps::MapError>(map)
    });
    let [old, new] = inner;
    let inner = [old?, new?];
    programs.outer.set(0, &inner[0], 0)?;
    let mut swaps = Vec::with_capacity(SWAPS);
    for run in 0..SWAPS {
        let to = 1 - run % 2;
        let (done, took) = timed(|| programs.outer.set(0, &inner[to], 0));
        done?;
        swaps.push(took);
        if run < 2 {
            expect(users, VIDS[to], "after replacing the map", |n| programs.vid_of("by_map_in_map", n))?;
        }
    }
    Ok([times(single)?, times(batch)?, times(swaps)?])
}

fn ovs(users: u32) -> anyhow::Result<Result<(String, Times), String>> {
    if let Some(why) = ovs::missing() {
        return Ok(Err(why));
    }
    if users > OVS_USERS {
        return Ok(Err(format!("more than {OVS_USERS} flows in one bundle take minutes and gigabytes")));
    }
    place::cable("ovs0", "peer0")?;
    place::cable("ovs1", "peer1")?;
    let ovs = Ovs::start("ovs0", "ovs1", 0)?;
    let flows = [ovs.flows(users, VIDS[0])?, ovs.flows(users, VIDS[1])?];
    ovs.replace(&flows[0])?;
    let mut bundles = Vec::new();
    let begun = Instant::now();
    while bundles.len() < BUNDLES && (bundles.len() < 2 || begun.elapsed() < BUNDLES_FOR) {
        let to = 1 - bundles.len() % 2;
        let (done, took) = timed(|| ovs.replace(&flows[to]));
        done?;
        bundles.push(took);
        expect(users, VIDS[to], "after a bundle", |n| ovs.vid_of(n))?;
    }
    let version = ovs.version.clone();
    drop(ovs);
    place::ip("link del ovs0")?;
    place::ip("link del ovs1")?;
    times(bundles).map(|times| Ok((version, times)))
}

pub fn print(rows: &[Row]) {
    println!("The same switch in different ways: median, 99th percentile, and times the gateway's median");
    let mut table = table(2, &["users", "way", "runs", "median", "p99", "max", "ratio"]);
    for row in rows {
        let mut add = |way: &str, times: Times, ratio: Option<f64>| {
            table.add_row([
                row.users.to_string(),
                way.into(),
                times.runs.to_string(),
                time(times.median_ns),
                time(times.p99_ns),
                time(times.max_ns),
                ratio.map(factor).unwrap_or_default(),
            ]);
        };
        add("the store", row.store, None);
        add("the store, and no old frame left", row.store_and_window, Some(1.0));
        add("hash map, a call for each user", row.map_updates, Some(row.ratios.map_updates));
        add("hash map, BPF_MAP_UPDATE_BATCH", row.map_batch, Some(row.ratios.map_batch));
        add("map of maps, replaced", row.map_in_map, Some(row.ratios.map_in_map));
        if let Some(times) = row.ovs_bundle {
            let version = row.ovs_version.as_deref().unwrap_or_default();
            add(&format!("Open vSwitch {version}, one bundle"), times, row.ratios.ovs_bundle);
        }
        if let Some(why) = &row.ovs_skipped {
            table.add_row([row.users.to_string(), "Open vSwitch".into(), format!("skipped: {why}")]);
        }
    }
    println!("{table}");
}
