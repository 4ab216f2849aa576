//! Upgrade and downgrade: a data path pinned with other maps than this daemon uses is replaced under load, with no frame lost,
//! or refused as it is.

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap};
use common::lab::*;
use gateway_ebpf::LAYOUT_VERSION;
use handover_api::v1;

/// Files in the directory of pins.
fn pinned(lab: &Lab) -> Vec<String> {
    lab.at_pins(|| {
        let entries = fs::read_dir(PIN_DIR).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    })
}

/// What another version could have left: users in larger elements, a map this one does not know, one of its own missing. The
/// programs that are attached go on with theirs, whatever the files are.
fn make_other_layout(lab: &Lab, layout: u64) {
    lab.at_pins(|| {
        let file = |name: &str| Path::new(PIN_DIR).join(name);
        fs::remove_file(file("map-USER")).unwrap();
        Array::<_, [u64; 16]>::create(77, 0).unwrap().pin(file("map-USER")).unwrap();
        HashMap::<_, u64, [u64; 3]>::create(9, 0).unwrap().pin(file("map-SHADOW")).unwrap();
        fs::remove_file(file("map-HELD")).unwrap();
        Lab::pinned_array("meta").set(1, layout, 0).unwrap();
    });
}

#[test]
fn maps_of_another_version_are_replaced_under_load_and_no_frame_is_lost() {
    let lab = Lab::pinned();
    let _wire = Wire::new(&lab.router);
    let daemon = lab.start();
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    assert!(lab.echo());
    let files = pinned(&lab);
    // what was learned goes to disk soon after, and only from there into other maps
    let (state, begun) = (lab.dir.path().join("state/table.json"), Instant::now());
    while !fs::read_to_string(&state).unwrap().contains("learned") {
        assert!(begun.elapsed() < PATIENCE, "the router's MAC is not saved");
        thread::sleep(Duration::from_millis(5));
    }
    daemon.kill();

    for other in [LAYOUT_VERSION - 1, LAYOUT_VERSION + 7] {
        make_other_layout(&lab, u64::from(other) << 32 | 0xdead_beef);
        let stream = Stream::start(&lab);
        let daemon = lab.start();
        assert!(daemon.began.contains(&format!("map layout {other} (deadbeef)")), "{}", daemon.began);
        assert!(daemon.began.contains("Replaced") && !daemon.began.contains("New"), "{}", daemon.began);
        stream.goes_on();
        let status = lab.status();
        assert_eq!((status.revision, status.users.len()), (1, 1), "known before it is configured");
        lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
        stream.goes_on();
        daemon.kill();
        println!("layout {other} -> {LAYOUT_VERSION}: {} frames, all there", stream.ends_whole());
        assert_eq!(pinned(&lab), files, "nothing more and nothing less than a daemon of this version has");
    }

    // room for more users, with the same programs
    let config = fs::read_to_string(lab.config()).unwrap();
    fs::write(lab.config(), config.replace("[tls]", "max_users = 70000\n[tls]")).unwrap();
    let stream = Stream::start(&lab);
    let daemon = lab.start();
    assert!(daemon.began.contains("for 65536 users"), "{}", daemon.began);
    stream.goes_on();
    daemon.kill();
    println!("other size: {} frames, all there", stream.ends_whole());
    // and what is there now is taken over as it is
    let daemon = lab.start();
    assert!(daemon.began.contains("Kept") && !daemon.began.contains("Replaced"), "{}", daemon.began);
    assert!(lab.echo());

    // in the middle of a switch only the maps know whether it was made
    let staged = lab.call(async |mut gateway| gateway.stage(stage("m", "net2")).await.unwrap().into_inner());
    daemon.kill();
    let layout = lab.at_pins(|| {
        let mut meta = Lab::pinned_array("meta");
        let layout = meta.get(&1, 0).unwrap();
        meta.set(1, layout + (1 << 32), 0).unwrap();
        layout
    });
    let before = pinned(&lab);
    let (code, error) = lab.refused(lab.daemon(&lab.config()));
    assert_eq!(code, 1, "{error}");
    let (found, own) = (LAYOUT_VERSION + 1, LAYOUT_VERSION);
    for named in [&format!("map layout {found} "), &format!("map layout {own} "), "migration `m`", "detach"] {
        assert!(error.contains(named), "{named}: {error}");
    }
    assert_eq!(pinned(&lab), before, "untouched");
    assert!(lab.echo(), "it goes on without the daemon");
    // the version that made it ends the switch, and then it can be replaced
    lab.at_pins(|| Lab::pinned_array("meta").set(1, layout, 0).unwrap());
    let daemon = lab.start();
    lab.call(async |mut gateway| gateway.switch(switch_of(&staged, "m")).await.unwrap());
    let finish = v1::FinishSwitchRequest { migration: "m".into() };
    lab.call(async |mut gateway| gateway.finish(finish).await.unwrap());
    daemon.kill();
    make_other_layout(&lab, layout + (1 << 32));
    let daemon = lab.start();
    assert_eq!(lab.status().users[0].network, "net2");
    drop(daemon.stop());
    let (code, error) = lab.detach();
    assert_eq!(code, 0, "{error}");
    assert!(!lab.at_pins(|| Path::new(PIN_DIR).exists()));
}
