//! Programs and oracle compared on generated frames: a million and more in worlds and frames that proptest chooses and, if
//! they ever differ, shrinks. `handover-gateway-bench fuzz` goes on from there.

#![allow(clippy::unwrap_used, reason = "a test ends there")]

use std::{cell::RefCell, time::Instant};

use gateway_ebpf::Outcome;
use handover_gateway::{
    fuzz::{self, Given, Harness, Random, Tally},
    oracle::{Hold, Network, Place, User, World},
    plane::Side,
};
use proptest::{collection::vec, prelude::*, test_runner::TestRunner};

/// Worlds.
const CASES: u32 = 12_000;
/// Frames of each side in each.
const FRAMES: usize = 64;

/// What no test run can come to.
const UNREACHABLE: [Outcome; 5] = [
    Outcome::AccessNoPort,
    Outcome::AccessNoHeadroom,
    Outcome::WanNoPort,
    Outcome::WanNoHeadroom,
    Outcome::Internal,
];

#[test]
fn a_million_generated_frames_do_what_the_oracle_says() {
    let harness = RefCell::new(Harness::new().expect("this test needs root"));
    let tally: RefCell<Tally> = RefCell::new([0; _]);
    let begun = Instant::now();
    let config = ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() };
    // world, and the choices of each frame
    let strategy = (vec(any::<u64>(), 48), vec(vec(any::<u64>(), 24), 2 * FRAMES));
    TestRunner::new(config)
        .run(&strategy, |(world, frames)| {
            let world = fuzz::world(&mut Given::new(&world));
            let mut harness = harness.borrow_mut();
            let failed = |e: fuzz::Failure| TestCaseError::fail(e.to_string());
            harness.enter(&world).map_err(failed)?;
            for (side, choices) in [Side::Access, Side::Wan].into_iter().zip(frames.chunks(FRAMES)) {
                let frames: Vec<_> =
                    choices.iter().map(|c| fuzz::frame(&mut Given::new(c), &world, side)).collect();
                harness.compare_and_find(&world, side, &frames, &mut tally.borrow_mut()).map_err(failed)?;
            }
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));

    let tally = tally.into_inner();
    let frames: u64 = tally.iter().sum();
    println!("{frames} frames in {:.1?}", begun.elapsed());
    assert!(frames >= 1_000_000, "{frames}");
    for outcome in Outcome::ALL {
        let frames = tally[*outcome as usize];
        println!("{frames:>10}  {}", outcome.name());
        let reachable = !UNREACHABLE.contains(outcome);
        assert!(!reachable || frames > 100, "{} came about {frames} times", outcome.name());
    }
}

#[test]
fn a_program_that_did_otherwise_would_be_noticed() {
    let mut harness = Harness::new().expect("this test needs root");
    let mut random = Random(7);
    // a world in which every rule matters
    let world = World {
        virtual_mac: [0x02, 0x48, 0x4f, 0, 0, 1],
        networks: vec![
            Network {
                vid: Some(1),
                service: true,
                pcp: Some(5),
                elsewhere: false,
                router: Some([2, 0, 0, 0, 0x0a, 1]),
                address: Some([10, 1, 0, 1]),
                address6: Some([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
            },
            Network {
                vid: None,
                service: false,
                pcp: None,
                elsewhere: false,
                router: Some([2, 0, 0, 0, 0x0a, 2]),
                address: Some([10, 1, 0, 1]),
                address6: Some([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
            },
        ],
        users: vec![
            User {
                mac: Some([2, 0, 0, 0, 1, 0]),
                tag: None,
                elsewhere: false,
                guard: false,
                addresses: vec![[10, 1, 0, 100]],
                addresses6: Vec::new(),
                place: Place::Switched(0, 1),
                hold: Hold::Holding,
            },
            User {
                mac: Some([2, 0, 0, 0, 1, 1]),
                tag: None,
                elsewhere: false,
                guard: true,
                addresses: vec![[10, 1, 0, 101]],
                addresses6: Vec::new(),
                place: Place::On(0),
                hold: Hold::No,
            },
            User {
                mac: None,
                tag: Some(7),
                elsewhere: false,
                guard: false,
                addresses: vec![[10, 1, 0, 102]],
                addresses6: vec![[0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]],
                place: Place::Staged(0, 1),
                hold: Hold::Draining,
            },
        ],
        service: [203, 0, 113, 10],
        memory_full: false,
        access_largest: 1514,
        wan_largest: 1514,
    };
    harness.enter(&world).unwrap();
    let mut frames =
        |side| -> Vec<_> { (0..20_000).map(|_| fuzz::frame(&mut random, &world, side)).collect() };
    let frames = [(Side::Access, frames(Side::Access)), (Side::Wan, frames(Side::Wan))];
    let mut agree = |world: &World| {
        frames.iter().all(|(side, frames)| harness.compare(world, *side, frames, &mut [0; _]).is_ok())
    };
    assert!(agree(&world));

    type Spoil = fn(&mut World);
    let spoils: [Spoil; 27] = [
        |w| w.virtual_mac[5] ^= 1,
        |w| w.networks[0].vid = Some(2),
        |w| w.networks[0].service = false,
        |w| w.networks[0].pcp = None,
        |w| w.networks[0].elsewhere = true,
        |w| w.networks[0].router = None,
        |w| w.networks[0].router = Some([2, 0, 0, 0, 0x0a, 3]),
        |w| w.networks[0].address = None,
        |w| w.networks[0].address6 = None,
        |w| w.networks[1].address = Some([10, 9, 0, 1]),
        |w| w.users[0].place = Place::Staged(0, 1),
        |w| w.users[0].place = Place::On(1),
        |w| w.users[0].guard = true,
        |w| w.users[1].addresses = vec![[10, 1, 0, 102]],
        |w| w.users[1].guard = false,
        |w| w.users[1].elsewhere = true,
        |w| w.users[1].tag = Some(7),
        |w| w.users[2].tag = Some(77),
        |w| w.users[2].addresses6.clear(),
        |w| w.access_largest -= 1,
        |w| w.wan_largest -= 1,
        |w| w.service[3] ^= 1,
        |w| w.memory_full = true,
        |w| w.users[0].hold = Hold::No,
        |w| w.users[0].hold = Hold::Full,
        |w| w.users[2].hold = Hold::Expired,
        |w| w.users[2].hold = Hold::Drained,
    ];
    for (i, spoil) in spoils.into_iter().enumerate() {
        let mut other = world.clone();
        spoil(&mut other);
        assert!(!agree(&other), "spoil {i} goes unnoticed");
        assert!(agree(&world), "and only that");
    }
}
