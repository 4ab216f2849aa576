//! What is shipped as an example works: the daemons take the example configurations, the controller the inventory, and
//! `handover pki` makes the certificates they name.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path};

use handover_lab::{Program, program, topology::Topology};

#[test]
fn the_examples_are_taken() {
    let mut topology = Topology::new().unwrap();
    topology.start_daemons().unwrap();
    let control = &topology.control;
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/examples");

    let dir = "/run/example";
    let pki = |args: &[&str]| topology.handover([&["pki"][..], args].concat()).unwrap();
    control.run(["mkdir", "-p", dir]).unwrap();
    let made = pki(&["init", dir]);
    assert!(made.ended.success(), "{}", made.stderr);
    for (daemon, role, name) in [
        ("gateway", "gateway", "gw"),
        ("migrator", "migrator", "main-server"),
        ("controller", "controller", "controller"),
    ] {
        let issued = pki(&["issue", dir, role, name, "--out", dir]);
        assert!(issued.ended.success(), "{}", issued.stderr);
        let example = fs::read_to_string(examples.join(format!("{daemon}.toml"))).unwrap();
        let config = format!("{dir}/{daemon}.toml");
        control.write(&config, example.replace("/etc/handover/tls", dir)).unwrap();
        let check = Program::new(program(&format!("handover-{daemon}")).unwrap());
        let checked = control.output(check.args(["check", "--config", &config])).unwrap();
        assert!(checked.ended.success(), "{daemon}: {}", checked.stderr);
    }

    let inventory = examples.join("inventory.toml");
    let applied = topology.handover(["apply", "-f", inventory.to_str().unwrap(), "--dry-run"]).unwrap();
    assert!(applied.ended.success(), "{}", applied.stderr);
    assert!(applied.stdout.contains("film"), "{}", applied.stdout);
}
