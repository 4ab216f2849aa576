//! Memory that follows the copy, where that is allowed; and what happens when it no longer can.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use handover_lab::{
    scenario::Play,
    topology::{LargePipes, Site, Topology},
};

const POLICY: &str = "[memory]\nmode = \"post-copy\"\nallow_post_copy = true\n";

#[test]
fn memory_follows_the_copy_and_nothing_is_left_behind() {
    let topology = Topology::new().unwrap();
    let _pipes = LargePipes::raise().unwrap(); // while no other lab can be
    topology.configure_migrators(POLICY).unwrap();
    let mut play = Play::start_load(topology, 64, 20).unwrap();
    let before = play.residues().unwrap();
    for to in [Site::Backup, Site::Main, Site::Backup, Site::Main] {
        let moved = play.migrate(to, |_| {}).unwrap();
        let session = moved.check(to).unwrap_or_else(|e| panic!("{e:#}\n{}", play.topology.logs()));
        // pages in the images would be megabytes
        assert!(session.steps.iter().any(|s| s.name == "restore: pages"), "{session:?}");
        assert_eq!(play.topology.sites_of_v().unwrap(), [to]);
    }
    // the server reads all of its memory over and over: what did not come whole would have ended it
    let left = play.left_since(&before).unwrap();
    assert!(left.is_empty(), "{}", left.join("\n"));
    let last = play.client.finish().unwrap();
    assert!(last.unharmed(), "{last:?}");
}

#[test]
fn a_copy_whose_memory_can_no_longer_follow_is_killed_and_said_to_be() {
    let topology = Topology::new().unwrap();
    let _pipes = LargePipes::raise().unwrap(); // while no other lab can be
    topology.configure_migrators(POLICY).unwrap();
    let play = Play::start_load(topology, 2048, 2).unwrap();
    let (main, backup) =
        (play.topology.server(Site::Main).unwrap(), play.topology.server(Site::Backup).unwrap());
    let migration = play.topology.start_migration(play.service.app, Site::Backup, true).unwrap();
    // the way of the pages is cut as soon as the copy runs
    play.topology
        .daemon("backup-server")
        .unwrap()
        .wait_for("step=\"announce\"", Duration::from_secs(60))
        .unwrap();
    main.ip("link set mig0 down").unwrap();
    play.topology
        .daemon("backup-server")
        .unwrap()
        .wait_for("the copy was killed", Duration::from_secs(60))
        .unwrap_or_else(|e| panic!("{e:#}\n{}", play.topology.logs()));
    let deadline = Instant::now() + Duration::from_secs(10);
    while play.topology.sites_of(&play.service).unwrap().contains(&Site::Backup) {
        assert!(Instant::now() < deadline, "a copy with holes in its memory runs on");
        std::thread::sleep(Duration::from_millis(5)); // until its killed threads are gone
    }
    assert!(!backup.run(["ip", "-o", "addr"]).unwrap().is_empty());
    let ending = migration.wait().unwrap();
    assert!(!ending.said.is_empty(), "{ending:?}");
}

/// What the operator is told of the first session.
fn findings(play: &Play) -> String {
    play.topology.handover(["sessions", "show", "load-1"]).unwrap().stdout
}

#[test]
fn post_copy_is_refused_unless_it_is_allowed() {
    let topology = Topology::new().unwrap();
    topology.configure_migrators("[memory]\nmode = \"post-copy\"\n").unwrap();
    let mut play = Play::start_load(topology, 16, 2).unwrap();
    let ending = play.topology.start_migration(play.service.app, Site::Backup, true).unwrap().wait().unwrap();
    assert!(!ending.ended.success(), "{ending:?}");
    let told = findings(&play);
    assert!(told.contains("allow_post_copy"), "{told}");
    assert_eq!(play.topology.sites_of(&play.service).unwrap(), [Site::Main]);
    assert!(play.client.report().unwrap().unharmed());
}

#[test]
fn pre_copy_is_refused_where_the_kernel_does_not_track_writes() {
    let topology = Topology::new().unwrap();
    topology.configure_migrators("[memory]\nmode = \"pre-copy\"\n").unwrap();
    let play = Play::start_load(topology, 16, 2).unwrap();
    let ending = play.topology.start_migration(play.service.app, Site::Backup, true).unwrap().wait().unwrap();
    assert!(!ending.ended.success(), "{ending:?}");
    let told = findings(&play);
    let words = ["soft-dirty tracking", "pre-copy is not built into this version"];
    assert!(words.iter().any(|w| told.contains(w)), "{told}");
}
