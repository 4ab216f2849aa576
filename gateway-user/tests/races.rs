//! Words and switches under change while both CPUs run frames: users are staged, switched, put back, finished, and staged
//! again, with switches reused at once. Every frame has to go into a network that was its user's at some time of the frame's
//! own program run.
//!
//! ```text
//!   controller's part:   history[k][user] = network   begun = k   store k   done = k      (a store, or a store back)
//!   a frame of `user`:        before = done   [ program run ]   after = begun
//!                             allowed: history[before..=after][user]
//! ```
//!
//! What is written besides the stores (staging, finishing) alters no user's network, so it has no place in the history.

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::{
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
    thread,
};

use common::{ROUTER1, ROUTER2, Rig, VIRTUAL, frame, network, user};
use gateway_ebpf::Outcome;
use handover_api::v1;
use handover_gateway::{
    fuzz::{Draw as _, Random},
    mac::Mac,
    plane::{Side, grace_period},
    table::{SwitchAnswer, SwitchStep, Table},
};
use nix::{
    errno::Errno,
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

const USERS: usize = 8;
/// Networks by index; VIDs 1 and 2.
const NETWORKS: [&str; 2] = ["net1", "net2"];
/// Lives of a switch.
const CYCLES: usize = 4_000;
/// The same, where each waits for a grace period.
const PATIENT_CYCLES: usize = 50;
/// Frames on each CPU that have to meet a store.
const RACES: u64 = 10;
/// Lives after which there should have been so many.
const CYCLES_MAX: usize = 400_000;
const XDP_DROP: u32 = 1;
const XDP_REDIRECT: u32 = 4;

fn mac(user: usize) -> Mac {
    Mac([2, 0, 0, 0, 9, user as u8])
}

fn name(user: usize) -> String {
    format!("user{user}")
}

fn everybody() -> v1::ConfigureRequest {
    v1::ConfigureRequest {
        revision: 1,
        networks: vec![network("net1", Some(1), Some(ROUTER1)), network("net2", Some(2), Some(ROUTER2))],
        users: (0..USERS)
            .map(|n| user(&name(n), mac(n), &format!("10.1.0.{}", 100 + n), NETWORKS[0]))
            .collect(),
    }
}

/// Which network each user was on, after each store.
struct History {
    begun: AtomicU64,
    done: AtomicU64,
    networks: Vec<[AtomicU16; USERS]>,
}

impl History {
    fn new(stores: usize) -> Self {
        let networks = (0..=stores).map(|_| Default::default()).collect();
        Self { begun: AtomicU64::new(0), done: AtomicU64::new(0), networks }
    }

    fn now(&self) -> [u16; USERS] {
        self.networks[self.begun.load(Ordering::SeqCst) as usize].each_ref().map(|n| n.load(Ordering::SeqCst))
    }

    /// Makes `store`, which turns users, and enters it.
    fn turn<T>(&self, users: &[usize], network: u16, store: impl FnOnce() -> T) -> T {
        let next = self.begun.load(Ordering::SeqCst) as usize + 1;
        for (user, was) in self.now().into_iter().enumerate() {
            let is = if users.contains(&user) { network } else { was };
            self.networks[next][user].store(is, Ordering::SeqCst);
        }
        self.begun.store(next as u64, Ordering::SeqCst);
        let value = store();
        self.done.store(next as u64, Ordering::SeqCst);
        value
    }
}

/// Of `union bpf_attr`, what BPF_PROG_TEST_RUN takes (linux/bpf.h), up to what is used here.
#[repr(C, align(8))]
#[derive(Default)]
struct TestRun {
    program: u32,
    retval: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
}

/// Runs a frame through a program that another thread's plane owns.
fn run(program: BorrowedFd<'_>, frame: &[u8], out: &mut [u8]) -> u32 {
    const BPF_PROG_TEST_RUN: libc::c_long = 10;
    let mut attr = TestRun {
        program: program.as_raw_fd() as u32,
        size_in: frame.len() as u32,
        size_out: out.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat: 1,
        ..Default::default()
    };
    // SAFETY: both buffers are as long as said and outlive the call.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attr, size_of::<TestRun>()) };
    Errno::result(done).unwrap();
    attr.retval
}

/// What one CPU saw.
#[derive(Debug, Default)]
struct Seen {
    frames: u64,
    dropped: u64,
    /// Frames during whose run a store was made.
    raced: u64,
}

fn run_frames(
    cpu: usize,
    program: BorrowedFd<'_>,
    history: &History,
    raced: &AtomicU64,
    stop: &AtomicBool,
) -> Seen {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
    let frames: Vec<_> = (0..USERS).map(|n| frame(VIRTUAL, mac(n), None, common::IPV4, b"payload")).collect();
    let mut seen = Seen::default();
    let mut out = [0; 128];
    while !stop.load(Ordering::Acquire) {
        for (user, frame) in frames.iter().enumerate() {
            let before = history.done.load(Ordering::SeqCst) as usize;
            let verdict = run(program, frame, &mut out);
            let after = history.begun.load(Ordering::SeqCst) as usize;
            seen.frames += 1;
            seen.raced += u64::from(after > before);
            raced.store(seen.raced, Ordering::Relaxed);
            if verdict == XDP_DROP {
                seen.dropped += 1;
                continue;
            }
            assert_eq!((verdict, &out[12..14]), (XDP_REDIRECT, &[0x81, 0][..]));
            let vid = u16::from_be_bytes([out[14], out[15]]);
            let allowed: Vec<_> =
                history.networks[before..=after].iter().map(|n| 1 + n[user].load(Ordering::SeqCst)).collect();
            assert!(
                allowed.contains(&vid),
                "CPU {cpu}: a frame of user {user} left in VLAN {vid}; stores {before} to {after} allow {allowed:?}"
            );
        }
    }
    seen
}

/// One life of a switch: some users of one network are staged, mostly switched, and put back or finished.
fn live(rig: &mut Rig, history: &History, random: &mut Random, cycle: usize, patient: bool) {
    let from = random.below(2) as u16;
    let (from_name, to_name) = (NETWORKS[usize::from(from)], NETWORKS[usize::from(1 - from)]);
    let on = history.now();
    let users: Vec<usize> = (0..USERS).filter(|n| on[*n] == from && random.below(2) == 0).collect();
    if users.is_empty() {
        return;
    }
    let names: Vec<String> = users.iter().map(|n| name(*n)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let migration = format!("m{cycle}");
    let staged = rig.stage(&migration, &names, from_name, to_name);
    let switched = random.below(4) != 0;
    if switched {
        let step = rig
            .table
            .switch(&migration, staged.switch.into(), staged.generation, &common::names(&names), to_name)
            .unwrap();
        let SwitchStep::Store { index, word } = step else { panic!("{step:?}") };
        let committed = history.turn(&users, 1 - from, || rig.plane.commit(index, word));
        let window_ns = rig.plane.window(index, committed);
        rig.table.switched(&migration, SwitchAnswer { window_ns, store_latency_ns: 0 });
    }
    let retired = if switched && random.below(2) == 0 {
        let (writes, retired) = rig.table.finish(&migration).unwrap();
        rig.apply(&writes);
        retired
    } else {
        let step = rig.table.abort(&migration).unwrap();
        assert_eq!(step.was_switched, switched);
        if switched {
            // the store back and all words: no frame of a word that was read before finds another network than the old one
            history.turn(&users, from, || rig.plane.apply(&step.writes)).unwrap();
        } else {
            rig.apply(&step.writes);
        }
        step.retired
    };
    if patient {
        grace_period().unwrap();
    }
    // otherwise at once: the generation alone has to keep the words of two lives apart
    rig.table.reuse(retired);
}

fn on_both_cpus(cycles: usize, patient: bool) {
    let mut rig = Rig::empty(USERS as u32);
    rig.configure(&everybody());
    let program = rig.plane.program(Side::Access).unwrap().fd().unwrap().try_clone().unwrap();
    let history = History::new(2 * CYCLES_MAX);
    let stop = AtomicBool::new(false);
    let before = rig.plane.counters().unwrap();

    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let cpus = thread::available_parallelism().unwrap().get().min(2);
    let raced: Vec<_> = (0..cpus).map(|_| AtomicU64::new(0)).collect();
    let enough = || raced.iter().all(|raced| raced.load(Ordering::Relaxed) >= RACES);
    let seen = thread::scope(|scope| {
        let running: Vec<_> = raced
            .iter()
            .enumerate()
            .map(|(cpu, raced)| {
                let (program, history, stop) = (program.as_fd(), &history, &stop);
                scope.spawn(move || run_frames(cpu, program, history, raced, stop))
            })
            .collect();
        {
            // also if an assertion below fails: the others would never end
            let _stop = Stop(&stop);
            let mut random = Random(7);
            let mut cycle = 0;
            while cycle < cycles || !enough() && cycle < CYCLES_MAX {
                live(&mut rig, &history, &mut random, cycle, patient);
                cycle += 1;
            }
        }
        running.into_iter().map(|r| r.join().unwrap()).collect::<Vec<_>>()
    });
    println!("{} stores; {seen:?}", history.done.load(Ordering::SeqCst));

    // what was dropped was dropped for one reason alone, and counted
    let sum = |outcome: Outcome, counters: &[(Outcome, u64)]| {
        counters.iter().find(|(o, _)| *o == outcome).unwrap().1
    };
    let after = rig.plane.counters().unwrap();
    let counted = |outcome| sum(outcome, &after) - sum(outcome, &before);
    let frames: u64 = seen.iter().map(|s| s.frames).sum();
    let dropped: u64 = seen.iter().map(|s| s.dropped).sum();
    assert_eq!(counted(Outcome::AccessGeneration), dropped);
    assert_eq!(counted(Outcome::AccessForwarded), frames - dropped);
    assert!(enough(), "too few frames met a store: {seen:?}");
    if patient {
        assert_eq!(dropped, 0, "a switch that is used again after its grace period costs no frame");
    }

    // nobody is stuck
    for (user, network) in history.now().into_iter().enumerate() {
        assert_eq!(rig.vid_of(mac(user)), Some(1 + network), "user {user}");
        let shown = rig.table.users().find(|u| u.name == name(user)).map(|u| u.network.to_owned());
        assert_eq!(shown.as_deref(), Some(NETWORKS[usize::from(network)]));
    }
    assert_eq!(Table::switches(&rig.table).count(), 0);
}

#[test]
fn switches_that_are_used_again_at_once_never_send_a_frame_astray() {
    on_both_cpus(CYCLES, false);
}

#[test]
fn switches_that_are_used_again_after_a_grace_period_cost_no_frame() {
    on_both_cpus(PATIENT_CYCLES, true);
}
