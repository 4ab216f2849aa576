//! Frames on one CPU while the other turns the selector as fast as it can.
//!
//! ```text
//!   CPU 0   BPF_PROG_TEST_RUN, live frames: source_noted --tail call--> access --redirect--> wan0
//!                                           journal: before, after                            |
//!                                           journal: received <------------ sink <----------- up0
//!   CPU 1   store: new network; wait until no run is left that read the old selector; a frame or two; store: old network; ...
//! ```
//!
//! Between two stores two frames are begun at least, so that no run meets both, and then a random moment is chosen: a store
//! falls anywhere into a run or between two.
//!
//! After each batch every frame of it is accounted for ([`Tally`]). The check is checked in the same run: frames that all
//! get the old network's tag while the new one is selected have to be found wrong, and frames that are dropped to be found
//! lost.

use std::{
    hint,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use gateway_bench_ebpf::Next;
use gateway_ebpf::{SwitchWord, words::Selector};
use handover_gateway::{plane::Plane, table::StageAnswer};
use serde::Serialize;

use crate::{
    journal::{Entry, Tally},
    place::{self, LOOPBACK, pin},
    rig::{self, Kind, Programs, VIDS},
    stats::{Times, time},
};

/// Frames that are sent before they are looked at; well below the journal's size.
const BATCH: u32 = 1 << 14;
/// How long frames may take to the sink once all are sent.
const ARRIVAL: Duration = Duration::from_secs(1);
/// Users that send.
const USERS: u32 = 65_536;
/// Frames that are begun between two stores, at least: the run of one of them has both its ends there.
const FRAMES_BETWEEN: u64 = 2;
/// Spins until the next store, at most; longer than a run.
const MOMENT: u64 = 64;
/// Frames for the check of the check.
const PLANTED: u64 = 10 * BATCH as u64;

/// What was seen.
#[derive(Debug, Serialize)]
pub struct Live {
    /// Users in the switch.
    pub users: u32,
    /// Times they were switched, and put back.
    pub switches: u64,
    pub frames: Tally,
    /// Store -> last frame under the old network, of each switch; 0 where there was none.
    pub window: Times,
    /// Of how many it was not 0.
    pub windows_with_old_frames: u64,
    /// The same of those alone.
    pub window_if_any: Option<Times>,
    /// Frames with the old network's tag, sent while the new one was selected.
    pub planted_wrong: Tally,
    /// Frames that were dropped.
    pub planted_lost: Tally,
}

/// Sends, and turns `flips` times.
pub fn run(flips: u64) -> anyhow::Result<Live> {
    place::cable("wan0", "up0")?;
    let wan = place::index("wan0")?;
    let (mut table, mut plane) = rig::gateway(USERS, LOOPBACK, wan)?;
    let staged = rig::stage(&mut table, &mut plane, USERS)?;

    let load = |next| -> anyhow::Result<Programs> {
        let mut programs = Programs::load(USERS, next, 0)?;
        programs.hand_on_to_gateway(&plane)?;
        programs.send_to(wan)?;
        programs.attach("sink", "up0")?;
        Ok(programs)
    };
    let planted_wrong = send_on_new(&load(Next::RedirectTagged)?)?;
    ensure!(planted_wrong.wrong == planted_wrong.frames, "wrong frames are missed: {planted_wrong:?}");
    let planted_lost = send_on_new(&load(Next::Drop)?)?;
    ensure!(planted_lost.lost == planted_lost.frames, "lost frames are missed: {planted_lost:?}");
    let (frames, windows) = send_and_turn(&load(Next::Handover)?, &plane, staged, flips)?;

    let some: Vec<u64> = windows.iter().copied().filter(|w| *w > 0).collect();
    place::ip("link del wan0")?;
    Ok(Live {
        users: USERS,
        switches: flips,
        frames,
        window: Times::of(windows).context("no switch")?,
        windows_with_old_frames: some.len() as u64,
        window_if_any: Times::of(some),
        planted_wrong,
        planted_lost,
    })
}

/// Ends the other thread, however this one ends.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// [`PLANTED`] frames while, as far as the journal is told, the new network is selected and stays so.
fn send_on_new(programs: &Programs) -> anyhow::Result<Tally> {
    let (begun, done) = programs.clock();
    begun.store(1, Ordering::SeqCst);
    done.store(1, Ordering::SeqCst);
    send(programs, Some(PLANTED), &AtomicBool::new(false))
}

/// Until as many switches are made.
fn send_and_turn(
    programs: &Programs,
    plane: &Plane,
    staged: StageAnswer,
    flips: u64,
) -> anyhow::Result<(Tally, Vec<u64>)> {
    let (stop_sending, stop_turning) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let turning = scope.spawn(|| {
            let _stop = Stop(&stop_sending);
            pin(1)?;
            // not before frames flow
            let first = programs.number();
            while programs.number() == first && !stop_turning.load(Ordering::Acquire) {
                hint::spin_loop();
            }
            Ok::<_, anyhow::Error>(turn(programs, plane, staged, flips, &stop_turning))
        });
        let sending = scope.spawn(|| {
            let _stop = Stop(&stop_turning);
            pin(0)?;
            send(programs, None, &stop_sending)
        });
        let ended = |_| anyhow::anyhow!("a thread of the benchmark panicked");
        let tally = sending.join().map_err(ended)??;
        Ok((tally, turning.join().map_err(ended)??))
    })
}

fn turn(
    programs: &Programs,
    plane: &Plane,
    StageAnswer { switch, generation, .. }: StageAnswer,
    flips: u64,
    stop: &AtomicBool,
) -> Vec<u64> {
    let (begun, done) = programs.clock();
    let mut windows = Vec::with_capacity(flips as usize);
    let mut stores = 0;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    while !stop.load(Ordering::Acquire) && (windows.len() as u64) < flips {
        for selector in [Selector::B, Selector::A] {
            stores += 1;
            begun.store(stores, Ordering::SeqCst);
            let committed = plane.commit(switch, SwitchWord::forward(selector, generation));
            done.store(stores, Ordering::SeqCst);
            let window = plane.window(switch, committed);
            if selector == Selector::B {
                windows.push(window);
            }
            let seen = programs.number();
            while programs.number().wrapping_sub(seen) < FRAMES_BETWEEN && !stop.load(Ordering::Acquire) {
                hint::spin_loop();
            }
            for _ in 0..random.next_below(MOMENT) {
                hint::spin_loop();
            }
        }
    }
    windows
}

/// Numbers without a pattern (xorshift).
struct Random(u64);

impl Random {
    const fn next_below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 32) * end) >> 32
    }
}

fn send(programs: &Programs, frames: Option<u64>, stop: &AtomicBool) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    while !stop.load(Ordering::Acquire) && frames.is_none_or(|frames| tally.frames < frames) {
        let first = programs.number();
        programs.source("source_noted", Kind::Live, BATCH)?;
        let end = programs.number();
        // as the source does for all but the last
        let [_, after, _] = programs.entry(end.wrapping_sub(1));
        after.store(programs.clock().0.load(Ordering::SeqCst), Ordering::Release);

        let until = Instant::now() + ARRIVAL;
        let received = |n| programs.entry(n)[2].load(Ordering::Acquire);
        let mut arrived = first;
        while arrived < end && Instant::now() < until {
            while arrived < end && received(arrived) != 0 {
                arrived += 1;
            }
            thread::yield_now();
            if frames.is_some() && arrived == first {
                // planted: they are all dropped
                break;
            }
        }
        for number in first..end {
            let [before, after, received] = programs.entry(number);
            let entry = Entry {
                before: before.load(Ordering::Acquire),
                after: after.load(Ordering::Acquire),
                received: received.swap(0, Ordering::AcqRel),
            };
            tally.enter(entry, VIDS);
        }
    }
    Ok(tally)
}

impl Live {
    pub fn print(&self) {
        let Tally { frames, lost, duplicated, wrong, old, new, tied, raced, raced_old, .. } = self.frames;
        println!("{} users switched and put back {} times while frames flowed:", self.users, self.switches);
        println!(
            "  {frames} frames: {lost} lost, {duplicated} duplicated, {wrong} on the wrong VLAN ({old} old, {new} new)"
        );
        println!(
            "  {tied} of them ({:.3} %) tied to the one store their run read; during the run of {raced} a store was made, \
             for {raced_old} of those too late",
            tied as f64 * 100.0 / frames.max(1) as f64
        );
        println!("  store -> last frame under the old network:");
        let mut rows = vec![("all switches", Some(self.window))];
        rows.push(("with such a frame", self.window_if_any));
        for (what, times) in rows {
            if let Some(t) = times {
                println!(
                    "    {what:<18} {:>8}: median {}, p99 {}, max {}",
                    t.runs,
                    time(t.median_ns),
                    time(t.p99_ns),
                    time(t.max_ns)
                );
            }
        }
        println!(
            "  the check checked: the old tag for all: {} of {} found wrong; all dropped: {} of {} found lost",
            self.planted_wrong.wrong,
            self.planted_wrong.frames,
            self.planted_lost.lost,
            self.planted_lost.frames
        );
    }
}
