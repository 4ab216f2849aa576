//! Live services move to the other site and back, with nothing lost on any connection and nothing left anywhere.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use handover_lab::{
    apps::Report,
    scenario::{Moved, Play},
    topology::{App, Site},
};

/// Migrates and demands that everything is as it should be.
fn migrate(play: &mut Play, to: Site) -> Moved {
    let moved = play.migrate(to, |_| {}).unwrap();
    if let Err(e) = moved.check(to) {
        panic!("{e:#}\n{:?}\n{}", moved.ending, play.topology.logs());
    }
    assert_eq!(play.topology.sites_of_v().unwrap(), [to]);
    moved
}

fn finish(play: Play) -> Report {
    let last = play.client.finish().unwrap();
    assert!(last.unharmed(), "{last:?}");
    last
}

/// Forth, and back, each time with everything checked.
fn forth_and_back(app: App) -> Report {
    let mut play = Play::start(app).unwrap();
    for to in [Site::Backup, Site::Main] {
        let moved = migrate(&mut play, to);
        let session = moved.ending.session.as_ref().unwrap();
        assert!(session.frozen_us > 0 && session.switch_window_ns.is_some(), "{session:?}");
        for name in [
            "preflight",
            "stage",
            "hold",
            "freeze",
            "restore",
            "switch",
            "yield",
            "decision",
            "resume",
            "end",
            "finish",
        ] {
            assert!(
                session.steps.iter().any(|s| s.name == name && s.state == "done"),
                "no step {name}: {session:?}"
            );
        }
    }
    finish(play)
}

#[test]
fn the_film_moves_and_comes_back() {
    forth_and_back(App::Film);
}

#[test]
fn redis_moves_and_comes_back_with_every_acknowledged_write() {
    let last = forth_and_back(App::Redis);
    assert!(last.finished && last.operations > 100, "{last:?}");
}

#[test]
fn nginx_moves_and_comes_back_in_the_middle_of_a_download() {
    let last = forth_and_back(App::Nginx);
    assert!(last.finished && last.bytes == 512 << 20, "{last:?}");
}

#[test]
fn twenty_migrations_leave_nothing_behind() {
    let mut play = Play::start(App::Film).unwrap();
    let before = play.residues().unwrap();
    assert!(before.iter().any(|host| !host["BPF objects"].is_empty()), "the gateway's programs are not seen");
    for _ in 0..10 {
        for to in [Site::Backup, Site::Main] {
            migrate(&mut play, to);
        }
    }
    let left = play.left_since(&before).unwrap();
    assert!(left.is_empty(), "{}", left.join("\n"));
    finish(play);
}

/// What the next two tests rest on: the lab itself loses and reorders nothing at this rate.
#[test]
fn without_a_migration_the_pulse_arrives_in_order() {
    let mut play = Play::start(App::Pulse).unwrap();
    assert!(play.client.more(150_000).unwrap().unharmed());
    let last = finish(play);
    assert!(last.finished && last.operations > 10_000, "{last:?}");
}

/// 50,000 numbered datagrams a second and pings that do not wait: everything sent while the service stands still is held
/// by the gateway and arrives once, in order.
#[test]
fn what_the_user_sends_meanwhile_is_held_and_arrives_in_order() {
    let mut play = Play::start(App::Pulse).unwrap();
    for to in [Site::Backup, Site::Main] {
        let moved = migrate(&mut play, to);
        let session = moved.ending.session.as_ref().unwrap();
        assert!(session.held_frames.is_some_and(|n| n > 0), "{session:?}");
        assert_eq!(session.held_dropped, Some(0), "{session:?}");
    }
    let last = finish(play);
    assert!(last.finished && last.operations > 10_000, "{last:?}");
}

/// The same without hold loses datagrams: the test above can fail, and this is what hold buys.
#[test]
fn without_hold_what_the_user_sends_meanwhile_is_lost() {
    let mut play = Play::start(App::Pulse).unwrap();
    let moved = play.migrate_with(Site::Backup, false, |_| {}).unwrap();
    let session = moved.check_arrival(Site::Backup).unwrap();
    assert_eq!((session.held_frames, session.held_dropped), (None, None));
    let last = play.client.finish().unwrap();
    assert!(last.bytes_lost > 0 && last.bytes_duplicated == 0, "{last:?}");
}
