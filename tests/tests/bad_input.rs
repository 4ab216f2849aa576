//! What an operator can get wrong, against running daemons: the error names the thing, the value and the way out, the exit
//! code is the documented one, and nothing is touched.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use handover_lab::{
    Output, Program, program,
    scenario::Play,
    topology::{App, Site, Topology},
};

const SOON: Duration = Duration::from_secs(10);

fn demand(output: &Output, code: i32, words: &[&str]) {
    let all = format!("{}{}", output.stderr, output.stdout);
    assert_eq!(output.ended.code, Some(code), "{words:?}: {all}");
    for word in words {
        assert!(all.contains(word), "`{word}` is not in: {all}");
    }
    assert!(!all.contains("panicked"), "{all}");
}

#[test]
fn what_is_not_there_is_named_and_nothing_is_touched() {
    let mut play = Play::start(App::Film).unwrap();
    let before = play.residues().unwrap();
    let ask = |args: &[&str]| play.topology.handover(args).unwrap();
    demand(&ask(&["migrate", "flim", "--to", "backup", "--wait"]), 4, &["flim", "film"]);
    demand(&ask(&["migrate", "film", "--to", "moon", "--wait"]), 4, &["moon", "backup"]);
    demand(&ask(&["migrate", "film", "--to", "backup", "--user", "jiro", "--wait"]), 4, &["jiro", "taro"]);
    demand(&ask(&["migrate", "film", "--to", "main", "--wait"]), 1, &["film", "main"]);
    demand(&ask(&["sessions", "show", "film-99"]), 4, &["film-99"]);
    demand(&ask(&["migrate", "film"]), 2, &["--to"]);
    let elsewhere =
        Program::new(program("handover").unwrap()).args(["--socket", "/run/nowhere.sock", "status"]);
    demand(&play.topology.control.output(elsewhere).unwrap(), 1, &["/run/nowhere.sock"]);
    demand(&ask(&["apply", "-f", "/run/nowhere.toml"]), 1, &["/run/nowhere.toml"]);

    assert!(play.client.more(20_000).unwrap().unharmed());
    assert_eq!(play.topology.sites_of(&play.service).unwrap(), [Site::Main]);
    assert_eq!(play.left_since(&before).unwrap(), [""; 0]);

    // the process is gone
    play.service.process.stop(SOON).unwrap();
    let gone = play.topology.handover(["migrate", "film", "--to", "backup", "--wait"]).unwrap();
    demand(&gone, 1, &["film-server", "nothing was touched"]);
    assert_eq!(play.topology.sites_of_v().unwrap(), [Site::Main]);
}

#[test]
fn an_inventory_with_a_mistake_changes_nothing() {
    let mut topology = Topology::new().unwrap();
    topology.start_daemons().unwrap();
    let good = Topology::inventory(App::Film);
    topology.apply(&good).unwrap();
    let status = || {
        let shown = topology.handover(["-o", "json", "status"]).unwrap();
        let mut status: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
        status["peers"].take(); // who has been reached changes by itself
        status
    };
    let before = status();
    assert_eq!(before["revision"], 1);
    let second = "[[user]]\nname = \"jiro\"\ngateway = \"gw\"\nmac = \"02:00:00:00:01:01\"\naddresses = [\"10.1.0.101\"]\nhome = \"main\"\n";
    for (bad, words) in [
        (good.replace("vid = 1\n", "vid = 0\n"), &["net1", "0", "1 to 4094"][..]),
        (good.replace("vid = 1\n", "vid = 4095\n"), &["net1", "4095", "1 to 4094"]),
        (good.replace("vid = 1\n", "vid = \"one\"\n"), &["one"]),
        (good.replace("vid = 2\n", "vid = 1\n"), &["net1", "net2", "1"]),
        (format!("{good}{second}"), &["taro", "jiro", "02:00:00:00:01:01"]),
        (good.replace("home = \"main\"\nservers", "hom = \"main\"\nservers"), &["hom"]),
        (good.replace("site = \"backup\"", "site = \"moon\""), &["moon"]),
        (good.replace("address = \"203.0.113.10\"", "address = \"203.0.113.300\""), &["203.0.113.300"]),
        ("[[network".into(), &["bad.toml:1"]),
    ] {
        topology.control.write("/run/lab/bad.toml", &bad).unwrap();
        demand(&topology.handover(["apply", "-f", "/run/lab/bad.toml"]).unwrap(), 1, words);
    }
    assert_eq!(before, status());
}

#[test]
fn daemons_refuse_what_they_cannot_work_with() {
    let topology = Topology::new().unwrap();
    let main = topology.server(Site::Main).unwrap();
    let run = |host: &handover_lab::Host, daemon: &str, from: &str, to: &str| {
        let kind = daemon.strip_prefix("handover-").unwrap();
        let config = host.read(format!("/run/lab/{kind}.toml")).unwrap();
        assert!(config.contains(from), "{config}");
        host.write("/run/lab/bad.toml", config.replace(from, to)).unwrap();
        host.output(
            Program::new(program(daemon).unwrap())
                .args(["--config", "/run/lab/bad.toml"])
                .env("NO_COLOR", "1"),
        )
        .unwrap()
    };
    let (migrator, gateway, controller) = ("handover-migrator", "handover-gateway", "handover-controller");
    for (host, daemon) in [(main, migrator), (&topology.gateway, gateway), (&topology.control, controller)] {
        let unknown = run(host, daemon, "[tls]", "colour = \"red\"\n[tls]");
        demand(&unknown, 2, &["colour", "/run/lab/bad.toml"]);
        let no_key = run(host, daemon, "key = \"/run/lab/tls/key.pem\"", "key = \"/run/nokey.pem\"");
        demand(&no_key, 2, &["/run/nokey.pem"]);
        let missing = Program::new(program(daemon).unwrap()).args(["--config", "/run/none.toml"]);
        demand(&host.output(missing).unwrap(), 2, &["/run/none.toml"]);
    }
    demand(&run(&topology.gateway, gateway, "\"access0\"", "\"access9\""), 1, &["access9"]);
    demand(&run(main, migrator, "\"service0\"", "\"service9\""), 1, &["service9"]);
    let mac = run(&topology.gateway, gateway, "02:48:4f:00:00:01", "02:48:4f:00:00");
    demand(&mac, 2, &["02:48:4f:00:00"]);
}

#[test]
fn daemons_without_privileges_say_which() {
    let topology = Topology::new().unwrap();
    for (host, daemon, word) in [
        (&topology.gateway, "gateway", "CAP_BPF"),
        (topology.server(Site::Main).unwrap(), "migrator", "CAP_"),
    ] {
        let path = program(&format!("handover-{daemon}")).unwrap();
        let config = format!("/run/lab/{daemon}.toml");
        let bare = [
            "setpriv",
            "--bounding-set=-all",
            "--inh-caps=-all",
            path.to_str().unwrap(),
            "--config",
            &config,
        ];
        demand(&host.output(Program::argv(bare).env("NO_COLOR", "1")).unwrap(), 1, &[word]);
    }
}

#[test]
fn a_server_without_criu_is_refused_by_preflight() {
    let topology = Topology::new().unwrap();
    let backup = topology.server(Site::Backup).unwrap();
    let config = backup.read("/run/lab/migrator.toml").unwrap();
    backup.write("/run/lab/migrator.toml", config.replace("criu = \"", "criu = \"/nowhere")).unwrap();
    let mut play = Play::start_in(topology, App::Film, |_| {}).unwrap();
    let before = play.residues().unwrap();
    let refused = play.topology.handover(["migrate", "film", "--to", "backup", "--wait"]).unwrap();
    demand(
        &refused,
        1,
        &["criu-missing", "/nowhere", "install CRIU", "backup-server", "nothing was touched"],
    );
    assert_eq!(play.left_since(&before).unwrap(), [""; 0]);
    assert!(play.client.more(20_000).unwrap().unharmed());
}
