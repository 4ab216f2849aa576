//! Trouble before the decision: the service goes on at the main site on the same connection, the user stays on the old
//! VLAN, v stays, nothing is left behind, and `handover` exits 3 naming step and reason.
//!
//! What goes wrong does so while the image is on its way to the other server, which is when the process is frozen; the
//! image's frames on the migration network tell when that is.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{net::Ipv4Addr, time::Duration};

use handover_lab::{
    Host, Program,
    capture::Capture,
    residue::Residue,
    scenario::{Ending, Migration, Play},
    topology::{App, Site},
};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(30);
/// So large that the copy takes most of a second.
const MEMORY_MIB: u16 = 128;
/// Frames that only an image sends.
const IMAGE: u64 = 300;

struct Trouble {
    play: Play,
    before: Vec<Residue>,
    image: Capture,
}

impl Trouble {
    fn new() -> Self {
        let play = Play::start_film(MEMORY_MIB).unwrap();
        let [main, backup] = Site::ALL.map(|s| play.topology.server(s).unwrap());
        let mac = main.run(["cat", "/sys/class/net/mig0/address"]).unwrap();
        let mac: Vec<u8> = mac.trim().split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
        let image =
            Capture::start(backup, "mig0", mac.try_into().unwrap(), Ipv4Addr::new(10, 254, 0, 6)).unwrap();
        let before = play.residues().unwrap();
        Self { play, before, image }
    }

    fn host(&self, name: &str) -> &Host {
        self.play.topology.lab().host(name).unwrap()
    }

    /// Starts the migration; returns when the process is frozen and its image on its way.
    fn migrate_until_frozen(&mut self) -> Migration {
        self.play.client.report().unwrap(); // its longest gap starts anew
        let migration = self.play.topology.start_migration(App::Film, Site::Backup, true).unwrap();
        let sent = self.image.frames();
        if let Err(e) = self.image.tag_after(sent + IMAGE, SOON) {
            panic!("{e:#}\n{}\n{}", migration.progress.text(), self.play.topology.logs());
        }
        migration
    }

    /// The same; returns when the freezer holds the process, CRIU has dumped it, and the copy is still to be restored.
    fn migrate_until_dumped(&mut self) -> Migration {
        let migration = self.migrate_until_frozen();
        let daemon = self.play.topology.daemon("main-server").unwrap();
        daemon.wait_for("step=\"freezer\"", SOON).unwrap();
        migration
    }

    /// Demands exit code 3, the step and the reason, and that nothing else has changed.
    fn rolled_back(&mut self, migration: Migration, step: &str, reasons: &[&str]) {
        let ending = migration.wait().unwrap();
        let logs = self.play.topology.logs();
        let Ending { ended, said, session } = &ending;
        assert_eq!(ended.code, Some(3), "{said}\n{logs}");
        let session = session.as_ref().unwrap();
        assert_eq!(session.outcome, "rolled-back");
        assert_eq!(session.failed_step, step, "{said}");
        let known = reasons.iter().any(|r| session.reason.contains(r));
        assert!(known, "none of {reasons:?} is in `{}`\n{logs}", session.reason);
        let actor = session.steps.iter().find(|s| s.state == "failed").map(|s| s.actor.as_str()).unwrap();
        assert!([step, actor, &session.reason].iter().all(|word| said.contains(word)), "{said}");

        let play = &mut self.play;
        let seen = play.client.more(20_000).unwrap();
        assert!(seen.unharmed(), "{seen:?}\n{said}\n{logs}");
        let tag = play.capture.tag_after(play.capture.frames(), SOON).unwrap();
        assert_eq!(tag, Some(1), "the user's VLAN\n{said}\n{logs}");
        assert_eq!(play.topology.sites_of(&play.service).unwrap(), [Site::Main], "{said}\n{logs}");
        assert_eq!(play.topology.sites_of_v().unwrap(), [Site::Main], "{said}\n{logs}");
    }

    /// Demands that nothing is left anywhere, and that the next migration, the cause being gone, succeeds.
    fn nothing_is_left(mut self) {
        let left = self.play.left_since(&self.before).unwrap();
        assert!(left.is_empty(), "{}\n{}", left.join("\n"), self.play.topology.logs());
        let moved = self.play.migrate(Site::Backup, |_| {}).unwrap();
        if let Err(e) = moved.check(Site::Backup) {
            let shown = self.play.topology.handover(["sessions", "show", "film-2"]).unwrap();
            panic!("{e:#}\n{}\n{:?}\n{}", shown.stdout, moved.ending, self.play.topology.logs());
        }
        assert!(self.play.client.finish().unwrap().unharmed());
    }
}

#[test]
fn the_restore_fails_because_the_pid_was_taken_after_preflight() {
    let mut trouble = Trouble::new();
    let migration = trouble.migrate_until_frozen();
    let pid = trouble.play.service.process.pid();
    let backup = trouble.host("backup-server");
    let squatter = backup.spawn(&Program::argv(["sleep", "1000"]).min_pid(pid)).unwrap();
    assert_eq!(squatter.pid(), pid);
    trouble.rolled_back(migration, "restore", &[&pid.to_string()]);
    squatter.stop(SOON).unwrap();
    trouble.nothing_is_left();
}

#[test]
fn the_migration_network_is_cut_while_the_image_is_copied() {
    let mut trouble = Trouble::new();
    let migration = trouble.migrate_until_frozen();
    trouble.host("backup-server").ip("link set mig0 down").unwrap();
    trouble.rolled_back(migration, "copy", &["backup-server"]);
    trouble.host("backup-server").ip("link set mig0 up").unwrap();
    // the source asked for its neighbour while the link was down, and remembers for a while that there was no answer
    trouble.host("main-server").ip("neigh flush dev mig0").unwrap();
    trouble.nothing_is_left();
}

#[test]
fn the_gateway_cannot_be_reached_at_the_switch() {
    let mut trouble = Trouble::new();
    let migration = trouble.migrate_until_frozen();
    trouble.host("control-switch").ip("link set gateway down").unwrap();
    trouble.rolled_back(migration, "switch", &["no answer", "deadline"]);
    trouble.host("control-switch").ip("link set gateway up").unwrap();
    trouble.confirmed();
    trouble.nothing_is_left();
}

#[test]
fn criu_is_killed_while_the_process_is_frozen() {
    let mut trouble = Trouble::new();
    let migration = trouble.migrate_until_dumped();
    let main = trouble.host("main-server");
    let swrk: Vec<i32> = main
        .processes()
        .unwrap()
        .into_iter()
        .filter(|(_, line)| line.starts_with("criu: ") || line.contains(" criu: "))
        .map(|p| p.0)
        .collect();
    assert!(!swrk.is_empty(), "{:?}", main.processes().unwrap());
    for pid in swrk {
        main.signal(pid, Signal::SIGKILL).unwrap();
    }
    trouble.rolled_back(migration, "freeze", &["criu swrk died"]);
    trouble.nothing_is_left();
}

#[test]
fn the_migrator_is_killed_while_the_process_is_frozen() {
    let mut trouble = Trouble::new();
    let migration = trouble.migrate_until_dumped();
    let daemon = trouble.play.topology.daemon("main-server").unwrap();
    daemon.process.signal(Signal::SIGKILL).unwrap();
    daemon.process.wait_timeout(SOON).unwrap();
    trouble.play.topology.start_daemon("main-server").unwrap();
    trouble.rolled_back(migration, "freeze", &["aborted"]);
    trouble.confirmed();
    trouble.nothing_is_left();
}

impl Trouble {
    /// Waits until every participant has confirmed the undoing.
    fn confirmed(&self) {
        let deadline = std::time::Instant::now() + SOON;
        loop {
            let shown = self.play.topology.handover(["-o", "json", "sessions", "show", "film-1"]).unwrap();
            let session: handover_lab::scenario::Session = serde_json::from_str(&shown.stdout).unwrap();
            if session.pending.is_empty() {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "still pending: {:?}", session.pending);
            std::thread::sleep(Duration::from_millis(50)); // between two looks
        }
    }
}
