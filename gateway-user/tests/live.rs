//! The daemon as it is run, between a user and a router in network namespaces of the test's own.

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::{
    collections::HashSet,
    fs,
    net::UdpSocket,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::{fs::PermissionsExt as _, process::CommandExt as _},
    },
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use common::{BROADCAST, HANAKO, IPV4, TARO, VIRTUAL, bare, lab::*, user};
use gateway_ebpf::{SwitchWord, words::Selector};
use handover_api::{
    tls::{Role, Tls, issue},
    users,
    v1::{self, gateway_client::GatewayClient},
};
use handover_gateway::mac::Mac;
use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{MsgFlags, send},
};
use tonic::Code;

#[test]
fn a_user_is_switched_between_a_real_router_and_a_tagged_network() {
    let lab = Lab::new();
    let daemon = lab.start();
    assert!(lab.gateway.sh("ip -d link show wan0").contains("prog/xdp"), "attached");
    assert!(!lab.gateway.sh("ip -d link show wan0").contains("xdpgeneric"), "natively");
    let wire = Wire::new(&lab.router);

    let taro = lab.taro.run(|| UdpSocket::bind((TARO_IP, 0)).unwrap());
    let router = lab.router.run(|| UdpSocket::bind((R, 0)).unwrap());

    // unknown until configured
    lab.counts("access_unknown_user", || drop(taro.send_to(b"", (R, 7))));
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    let status = lab.status();
    assert_eq!(status.revision, 1);
    assert!(status.interfaces.iter().all(|i| i.attach_mode == "native"), "{:?}", status.interfaces);
    let up0 = lab.router.sh("ip -o link show up0");
    let up0 = up0.split_whitespace().skip_while(|w| *w != "link/ether").nth(1).unwrap();
    let learned = |status: &v1::GatewayStatus, name: &str| {
        status.networks.iter().find(|n| n.name == name).unwrap().router_mac.clone()
    };
    assert_eq!(learned(&status, "flat"), up0, "learned from the kernel's ARP answer");

    // there and back through the programs, both sides' neighbour caches filled over them
    assert!(lab.echo());
    let neighbour = lab.taro.sh("ip neigh show dev eth0 10.1.0.1");
    assert!(neighbour.contains(&VIRTUAL.to_string()), "{neighbour}");
    let neighbour = lab.router.sh("ip neigh show dev up0 10.1.0.100");
    assert!(neighbour.contains(&TARO.to_string()), "{neighbour}");

    // a network without a router
    let findings = lab.call(async |mut gateway| {
        gateway.check_switch(stage("m3", "net3")).await.unwrap().into_inner().findings
    });
    let codes: Vec<_> = findings.iter().map(|f| f.code.as_str()).collect();
    assert_eq!(codes, ["router-silent"], "{findings:?}");
    let refused = lab.call(async |mut gateway| gateway.stage(stage("m3", "net3")).await.unwrap_err());
    assert_eq!(refused.code(), Code::FailedPrecondition);
    for named in ["10.1.0.1", "net3", "VID 3", "router_mac"] {
        assert!(refused.message().contains(named), "{named}: {}", refused.message());
    }
    assert_eq!(lab.status().switches, []);

    // one with a router, of which preflight introduces nobody
    let findings = lab.call(async |mut gateway| {
        gateway.check_switch(stage("m2", "net2")).await.unwrap().into_inner().findings
    });
    assert_eq!(findings, []);
    let question = |frame: &[u8]| frame[12..18] == [0x81, 0, 0, 2, 8, 6];
    let asked = wire.wait_for(question);
    assert_ne!(asked.last().unwrap()[6..12], TARO.0, "the gateway asks as itself");
    let staged = lab.call(async |mut gateway| gateway.stage(stage("m2", "net2")).await.unwrap().into_inner());
    assert_eq!(staged.router_mac, ROUTER2.to_string());
    wire.wait_for(|frame| question(frame) && frame[6..12] == TARO.0 && frame[32..36] == TARO_IP.octets());
    assert!(lab.echo(), "staged, not switched: nothing has changed");

    let switch = |users: &[&str]| v1::SwitchRequest {
        migration: "m2".into(),
        switch: staged.switch,
        generation: staged.generation,
        users: users.iter().map(ToString::to_string).collect(),
        to_network: "net2".into(),
        users_digest: Vec::new(),
    };
    let other = switch(&["taro", "hanako"]);
    let refused = lab.call(async |mut gateway| gateway.switch(other).await.unwrap_err());
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let request = switch(&["taro"]);
    let switched = lab.call(async |mut gateway| gateway.switch(request).await.unwrap().into_inner());
    let request = switch(&["taro"]);
    let again = lab.call(async |mut gateway| gateway.switch(request).await.unwrap().into_inner());
    assert_eq!(switched, again, "the answer it gave before");
    println!("window {} ns, store latency {} ns", switched.window_ns, switched.store_latency_ns);
    taro.send_to(b"to the new network", (R, 7)).unwrap();
    let seen = wire.wait_for(|frame| frame.ends_with(b"to the new network"));
    let sent = seen.last().unwrap();
    assert_eq!(sent[..18], [&ROUTER2.0[..], &TARO.0, &[0x81, 0, 0, 2, 8, 0]].concat(), "{sent:02x?}");
    let status = lab.status();
    assert_eq!((status.users[0].network.as_str(), status.users[0].staged_by.as_str()), ("net2", "m2"));

    // back
    let abort = || v1::AbortSwitchRequest { migration: "m2".into() };
    let aborted = lab.call(async |mut gateway| gateway.abort(abort()).await.unwrap().into_inner());
    assert!(aborted.was_switched);
    assert!(lab.echo());
    let late = lab.call(async |mut gateway| gateway.stage(stage("m2", "net2")).await.unwrap_err());
    assert!(late.message().contains("aborted"), "{}", late.message());

    // for good
    let staged = lab.call(async |mut gateway| gateway.stage(stage("m4", "net2")).await.unwrap().into_inner());
    let request = switch_of(&staged, "m4");
    let both = v1::SwitchRequest { users: vec!["taro".into()], ..request.clone() };
    let other = v1::SwitchRequest { users_digest: users::digest(&["hanako"]).into(), ..request.clone() };
    for (wrong, code) in [(both, Code::InvalidArgument), (other, Code::FailedPrecondition)] {
        let refused = lab.call(async |mut gateway| gateway.switch(wrong).await.unwrap_err());
        assert_eq!(refused.code(), code, "{refused}");
    }
    lab.call(async |mut gateway| gateway.switch(request).await.unwrap());
    let finish = || v1::FinishSwitchRequest { migration: "m4".into() };
    lab.call(async |mut gateway| gateway.finish(finish()).await.unwrap());
    lab.call(async |mut gateway| gateway.finish(finish()).await.unwrap());
    let abort = v1::AbortSwitchRequest { migration: "m4".into() };
    let refused = lab.call(async |mut gateway| gateway.abort(abort).await.unwrap_err());
    assert_eq!(refused.code(), Code::FailedPrecondition);
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    assert_eq!(lab.status().users[0].network, "net2", "configuring again moves nobody");
    lab.counts("wan_stale_network", || drop(router.send_to(b"", (TARO_IP, 7))));

    let (code, log) = daemon.stop();
    assert_eq!(code, 0, "{log}");
    assert!(!lab.gateway.sh("ip -d link show wan0").contains("prog/xdp"), "detached");
}

#[test]
fn bad_requests_are_refused_naming_thing_and_value() {
    let lab = Lab::new();
    let _daemon = lab.start();
    let refused = |spoil: fn(&mut v1::ConfigureRequest)| {
        let mut request = configuration();
        spoil(&mut request);
        let status = lab.call(async |mut gateway| gateway.configure(request).await.unwrap_err());
        assert_eq!(status.code(), Code::InvalidArgument);
        status.message().to_string()
    };
    assert!(refused(|r| r.networks[1].vid = Some(0)).contains("VID 0"));
    assert!(refused(|r| r.networks[1].vid = Some(4095)).contains("VID 4095"));
    let twin = refused(|r| r.users.push(user("hanako", TARO, "10.1.0.101", "flat")));
    for named in ["taro", "hanako", &TARO.to_string()] {
        assert!(twin.contains(named), "{twin}");
    }
    assert_eq!(lab.status().revision, 0, "nothing was taken over");
    let unknown = lab.call(async |mut gateway| gateway.stage(stage("m", "net2")).await.unwrap_err());
    assert_eq!(unknown.code(), Code::NotFound);
}

#[test]
fn a_daemon_that_cannot_start_says_why_and_touches_nothing() {
    let lab = Lab::new();
    let dir = lab.dir.path();

    // a bad configuration
    let bad = dir.join("bad.toml");
    fs::write(&bad, fs::read_to_string(dir.join("gw.toml")).unwrap().replace("wan =", "wann =")).unwrap();
    let (code, error) = lab.refused(lab.daemon(&bad));
    assert_eq!(code, 2, "{error}");
    assert!(error.contains("bad.toml") && error.contains("wann"), "{error}");
    let mut check = lab.daemon(&dir.join("gw.toml"));
    check.arg("check");
    assert_eq!(lab.refused(check).0, 0);
    let mut check = lab.daemon(&bad);
    check.arg("check");
    assert_eq!(lab.refused(check).0, 2);

    // no such interface; one without XDP
    let missing = lab.write_config("missing.toml", "access9", "wan0", 7444);
    let (code, error) = lab.refused(lab.daemon(&missing));
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("`access9`"), "{error}");
    lab.gateway.sh("ip link add bridge0 type bridge");
    let bridge = lab.write_config("bridge.toml", "access0", "bridge0", 7444);
    let (code, error) = lab.refused(lab.daemon(&bridge));
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("native") && error.contains("`bridge0`"), "{error}");

    // no privileges
    for file in fs::read_dir(dir).unwrap() {
        std::os::unix::fs::chown(file.unwrap().path(), Some(65534), None).unwrap();
    }
    std::os::unix::fs::chown(dir, Some(65534), None).unwrap();
    let mut nobody = Command::new(env!("CARGO_BIN_EXE_handover-gateway"));
    let ns = lab.gateway.0.try_clone().unwrap();
    // SAFETY: two system calls before the child is replaced.
    unsafe {
        nobody.pre_exec(move || {
            setns(ns.as_fd(), CloneFlags::CLONE_NEWNET)?;
            nix::unistd::setuid(65534.into())?;
            Ok(())
        });
    }
    nobody.arg("--config").arg(dir.join("gw.toml")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let (code, error) = lab.refused(nobody);
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("CAP_BPF"), "{error}");

    // interfaces that are taken
    let _daemon = lab.start();
    let taken = lab.write_config("taken.toml", "access0", "wan0", 7445);
    let (code, error) = lab.refused(lab.daemon(&taken));
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("`wan0`") && error.contains("another XDP program"), "{error}");
    // an address that is taken
    let port = lab.write_config("port.toml", "access0", "wan0", 7443);
    let (code, error) = lab.refused(lab.daemon(&port));
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("127.0.0.1:7443"), "{error}");
}

#[test]
fn the_data_path_outlives_the_daemon_and_no_frame_is_lost() {
    let lab = Lab::pinned();
    let wire = Wire::new(&lab.router);
    let daemon = lab.start();
    assert!(daemon.began.contains("New"), "{}", daemon.began);
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    assert!(lab.echo());
    let staged = lab.call(async |mut gateway| gateway.stage(stage("m1", "net2")).await.unwrap().into_inner());

    let stream = Stream::start(&lab);
    daemon.kill();
    stream.goes_on();
    assert!(lab.gateway.sh("ip -d link show wan0").contains("prog/xdp"), "attached without the daemon");
    let daemon = lab.start();
    assert!(daemon.began.contains("Kept") && !daemon.began.contains("Replaced"), "{}", daemon.began);
    stream.goes_on();
    let status = lab.status();
    assert_eq!(status.revision, 1, "known before it was configured again");
    assert_eq!(status.switches.len(), 1, "still staged");
    assert_eq!((status.users[0].network.as_str(), status.users[0].staged_by.as_str()), ("flat", "m1"));
    let (code, log) = daemon.stop();
    assert_eq!(code, 0, "{log}");
    stream.goes_on();
    // an upgrade: other programs are attached, as far as the new daemon can tell
    lab.at_pins(|| Lab::pinned_array("meta").set(3, 0, 0).unwrap());
    let daemon = lab.start();
    assert!(daemon.began.contains("Replaced") && !daemon.began.contains("Kept"), "{}", daemon.began);
    stream.goes_on();
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    println!("{} frames, all there", stream.ends_whole());

    // staged before the crash, switched after it, once
    let request = switch_of(&staged, "m1");
    let first = lab.call(async |mut gateway| gateway.switch(request).await.unwrap().into_inner());
    let taro = lab.taro.run(|| UdpSocket::bind((TARO_IP, 0)).unwrap());
    taro.send_to(b"to the new network", (R, 7)).unwrap();
    let sent = wire.wait_for(|frame| frame.ends_with(b"to the new network"));
    assert_eq!(sent.last().unwrap()[12..16], [0x81, 0, 0, 2]);
    daemon.kill();
    taro.send_to(b"still to the new one", (R, 7)).unwrap();
    let sent = wire.wait_for(|frame| frame.ends_with(b"still to the new one"));
    assert_eq!(sent.last().unwrap()[12..16], [0x81, 0, 0, 2]);
    let daemon = lab.start();
    assert_eq!(lab.status().users[0].network, "net2");
    let request = switch_of(&staged, "m1");
    let again = lab.call(async |mut gateway| gateway.switch(request).await.unwrap().into_inner());
    assert_eq!(again.window_ns, first.window_ns, "the answer it gave before");
    let finish = || v1::FinishSwitchRequest { migration: "m1".into() };
    lab.call(async |mut gateway| gateway.finish(finish()).await.unwrap());
    daemon.kill();
    let _daemon = lab.start();
    lab.call(async |mut gateway| gateway.finish(finish()).await.unwrap());
    let late = lab.call(async |mut gateway| gateway.stage(stage("m1", "net2")).await.unwrap_err());
    assert!(late.message().contains("finished"), "{}", late.message());
    let status = lab.status();
    assert_eq!((status.users[0].network.as_str(), status.switches.len()), ("net2", 0));
}

#[test]
fn a_store_the_last_daemon_had_no_time_to_write_down_is_found_in_the_maps() {
    let lab = Lab::pinned();
    let _wire = Wire::new(&lab.router);
    let daemon = lab.start();
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    let staged = lab.call(async |mut gateway| gateway.stage(stage("m1", "net2")).await.unwrap().into_inner());
    daemon.kill();
    let store = |generation| {
        let word = SwitchWord::forward(Selector::B, generation);
        lab.at_pins(|| Lab::pinned_array("map-SWITCH").set(staged.switch, word.0, 0).unwrap());
    };

    // of another generation it says nothing about this migration
    store(staged.generation + 1);
    let daemon = lab.start();
    assert_eq!(lab.status().switches[0].state, "staged");
    assert!(lab.echo(), "taro is on the old network");
    daemon.kill();

    store(staged.generation);
    let daemon = lab.start();
    assert_eq!(lab.status().switches[0].state, "switched");
    let request = switch_of(&staged, "m1");
    lab.call(async |mut gateway| gateway.switch(request).await.unwrap());
    let abort = || v1::AbortSwitchRequest { migration: "m1".into() };
    let aborted = lab.call(async |mut gateway| gateway.abort(abort()).await.unwrap().into_inner());
    assert!(aborted.was_switched);
    assert!(lab.echo(), "and back");
    daemon.kill();
    let _daemon = lab.start();
    let late = lab.call(async |mut gateway| gateway.stage(stage("m1", "net2")).await.unwrap_err());
    assert!(late.message().contains("aborted"), "{}", late.message());
}

#[test]
fn what_cannot_be_taken_over_is_refused_and_detach_takes_everything_down() {
    let lab = Lab::pinned();
    let before = lab.gateway.sh("ip -o link show wan0");
    let daemon = lab.start();
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    assert!(lab.echo());
    assert!(lab.gateway.sh("ip -o link show wan0").contains("PROMISC"));

    // while a daemon is there
    let (code, error) = lab.detach();
    assert!(code == 1 && error.contains("running"), "{code}: {error}");
    daemon.kill();

    // another state: refused, and forwarding goes on
    let refused = |named: &str| {
        let (code, error) = lab.refused(lab.daemon(&lab.config()));
        assert_eq!(code, 1, "{error}");
        assert!(error.contains(named) && error.contains("detach"), "{error}");
        assert!(lab.echo(), "it goes on without the daemon");
    };
    let config = fs::read_to_string(lab.config()).unwrap();
    let (state, aside) = (lab.dir.path().join("state/table.json"), lab.dir.path().join("aside"));
    fs::rename(&state, &aside).unwrap();
    refused("does not go with the state");
    fs::write(&state, "{}").unwrap();
    refused("damaged");
    fs::rename(&aside, &state).unwrap();

    // nothing left
    let (code, error) = lab.detach();
    assert_eq!(code, 0, "{error}");
    assert!(!lab.at_pins(|| Path::new(PIN_DIR).exists()));
    assert_eq!(lab.gateway.sh("ip -o link show wan0"), before);
    assert!(!lab.gateway.sh("ip -d link show access0").contains("prog/xdp"));
    assert_eq!(lab.detach().0, 0, "again is no error");

    // and up again, with everybody where they were
    let daemon = lab.start();
    assert!(daemon.began.contains("New"), "{}", daemon.began);
    assert_eq!(lab.status().users[0].network, "flat");
    assert!(lab.echo());
    drop(daemon);

    // an interface that is not there any more, as after the provider's end was built anew
    lab.gateway.sh("ip link del wan0");
    lab.gateway.sh(&format!("ip link add wan0 type veth peer name up0 netns {}", lab.router.path()));
    lab.router.sh("ethtool -K up0 gro on tx off txvlan off");
    lab.router.sh("ip link set up0 up");
    lab.router.sh(&format!("ip address add {R}/24 dev up0"));
    lab.gateway.sh("ip link set wan0 up");
    let daemon = lab.start();
    assert!(daemon.began.contains("New") && daemon.began.contains("Kept"), "{}", daemon.began);
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    lab.taro.sh("ip neigh flush all");
    assert!(lab.echo());
    drop(daemon);

    // nowhere to pin to
    fs::write(lab.config(), config.replace(PIN_DIR, &lab.dir.path().join("pins").display().to_string()))
        .unwrap();
    let (code, error) = lab.refused(lab.daemon(&lab.config()));
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("no BPF file system"), "{error}");
    fs::write(lab.config(), &config).unwrap();
    assert_eq!(lab.detach().0, 0);
}

#[test]
fn the_gateway_says_what_it_is_doing() {
    let lab = Lab::new();
    let config = fs::read_to_string(lab.config()).unwrap();
    let socket = lab.dir.path().join("run/gateway.sock");
    let local = config.replace("[tls]", &format!("socket = \"{}\"\n[tls]", socket.display()));
    let ask = |verb: &[&str]| {
        let output = lab.daemon(&lab.config()).args(verb).output().unwrap();
        let (out, error) = (output.stdout, String::from_utf8(output.stderr).unwrap());
        (output.status.code().unwrap(), String::from_utf8(out).unwrap(), error)
    };
    let json = |what| -> serde_json::Value {
        let (code, out, error) = ask(&[what, "-o", "json"]);
        assert_eq!(code, 0, "{error}");
        serde_json::from_str(&out).unwrap()
    };

    // nobody there, both ways
    let (code, _, error) = ask(&["status"]);
    assert!(code == 1 && error.contains("start the daemon"), "{code}: {error}");
    fs::write(lab.config(), &local).unwrap();
    let (code, _, error) = ask(&["status"]);
    assert!(code == 1 && error.contains("gateway.sock") && error.contains("start the daemon"), "{error}");

    let _wire = Wire::new(&lab.router);
    let daemon = lab.start();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
    assert!(ask(&["status"]).1.contains("never configured"));
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    assert!(lab.echo());
    // over the socket, then over TLS with the gateway's own certificate
    for config in [&local, &config] {
        fs::write(lab.config(), config).unwrap();
        let status = json("status");
        assert_eq!((&status["name"], &status["revision"]), (&"gw".into(), &1.into()), "{status}");
        assert_eq!(status["interfaces"][0]["attach_mode"], "native");
        assert_eq!(status["pin_dir"], serde_json::Value::Null);
        let hold = serde_json::json!({
            "memory_bytes": 64 << 20, "per_user_bytes": 32 << 20, "held_bytes": 0
        });
        assert_eq!(status["hold"], hold);
        assert!(status["counters"]["wan_forwarded"].as_u64().unwrap() > 0, "{status}");
        assert_eq!(
            json("users"),
            serde_json::json!([{"name": "taro", "mac": TARO.to_string(), "addresses": ["10.1.0.100"],
                "interface": "access0", "tag": null, "guard": false, "network": "flat", "staged_by": null}])
        );
        let networks = json("networks");
        assert_eq!((&networks[1]["name"], &networks[1]["vid"]), (&"net2".into(), &2.into()), "{networks}");
        assert_eq!((&networks[0]["vid"], &networks[0]["router_address"]), (&().into(), &"10.1.0.1".into()));
        assert_eq!(json("switches"), serde_json::json!([]));
    }
    let staged = lab.call(async |mut gateway| gateway.stage(stage("m1", "net2")).await.unwrap().into_inner());
    assert_eq!(
        (&json("switches")[0]["state"], &json("switches")[0]["window_ns"]),
        (&"staged".into(), &().into())
    );
    let request = switch_of(&staged, "m1");
    lab.call(async |mut gateway| gateway.switch(request).await.unwrap());
    assert!(json("switches")[0]["window_ns"].is_u64());
    assert_eq!(
        (&json("switches")[0]["phase"], &json("switches")[0]["held"]),
        (&"forward".into(), &().into())
    );
    assert_eq!(
        (&json("users")[0]["network"], &json("users")[0]["staged_by"]),
        (&"net2".into(), &"m1".into())
    );
    for (verb, shown) in [
        ("status", "wan_forwarded"),
        ("users", "10.1.0.100"),
        ("networks", "untagged"),
        ("switches", "switched"),
    ] {
        let (code, table, _) = ask(&[verb]);
        assert!(code == 0 && table.contains(shown), "{table}");
        println!("{table}\n");
    }
    // whoever may look may do nothing else, and another gateway may not even look
    fs::write(lab.config(), &local).unwrap();
    let answers = lab.gateway.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            issue(lab.dir.path(), lab.dir.path(), Role::Gateway, "other").unwrap();
            issue(lab.dir.path(), lab.dir.path(), Role::Viewer, "v").unwrap();
            let mut answers = Vec::new();
            for holder in ["gateway-other", "gateway-gw", "viewer-v"] {
                let file = |kind: &str| lab.dir.path().join(format!("{holder}.{kind}"));
                let ca = lab.dir.path().join("ca.pem");
                let files = handover_api::tls::TlsFiles { ca, cert: file("pem"), key: file("key") };
                let tls = Tls::load(&files).unwrap();
                let channel = tls.connect(Role::Gateway, "gw", "127.0.0.1:7443").await.unwrap();
                let mut client = GatewayClient::new(channel);
                let looked = client.status(v1::GatewayStatusRequest::default()).await.map(|_| ());
                let abort = v1::AbortSwitchRequest { migration: "m1".into() };
                let did = client.abort(abort).await.map(|_| ());
                answers.push((looked.err().map(|s| s.code()), did.err().map(|s| s.code())));
            }
            answers
        })
    });
    let denied = Some(Code::PermissionDenied);
    assert_eq!(answers, [(denied, denied), (None, denied), (None, denied)]);

    let (code, log) = daemon.stop();
    assert_eq!(code, 0, "{log}");
    assert!(!socket.exists());
}

#[test]
fn broadcast_reaches_exactly_the_users_of_the_network() {
    let lab = Lab::new();
    let _daemon = lab.start();
    let _wire = Wire::new(&lab.router);
    let mut request = configuration();
    request.networks[1].router_mac = Some(ROUTER2.to_string());
    request.users.push(user("hanako", HANAKO, "10.1.0.101", "net2"));
    lab.call(async |mut gateway| gateway.configure(request).await.unwrap());

    let users = lab.taro.run(|| packet_socket("eth0"));
    let flat = lab.router.run(|| UdpSocket::bind((R, 0)).unwrap());
    flat.set_broadcast(true).unwrap();
    let net2 = lab.router.run(|| packet_socket("up0"));
    let on_flat = |text: &str| {
        flat.send_to(text.as_bytes(), "10.1.0.255:9").unwrap();
    };
    let on_net2 = |text: &str| {
        let payload = [&[0; 60], text.as_bytes()].concat();
        let sent = bare(BROADCAST, ROUTER2, Some(2), IPV4, &payload);
        send(net2.as_raw_fd(), &sent, MsgFlags::empty()).unwrap();
    };
    // who got what, until somebody got `last` in `copies` copies
    let got = |last: &str, copies: usize| {
        let (begun, mut got) = (Instant::now(), Vec::new());
        let of = |got: &[(String, Mac, Mac)], text: &str| got.iter().filter(|(t, ..)| *t == text).count();
        while of(&got, last) < copies {
            assert!(begun.elapsed() < PATIENCE, "{last:?} came not {copies} times: {got:?}");
            let Some(frame) = receive(&users) else { continue };
            let mac = |at: usize| Mac(frame[at..at + 6].try_into().unwrap());
            if let Some(at) = frame.windows(4).position(|w| w == b"text") {
                let text = frame[at..].split(|b| *b == 0).next().unwrap();
                got.push((String::from_utf8(text.to_vec()).unwrap(), mac(0), mac(6)));
            }
        }
        got.sort();
        got
    };
    let is = |text: &str, to| (text.to_string(), to, VIRTUAL);

    on_flat("text 1");
    on_net2("text 2");
    assert_eq!(got("text 2", 1), [is("text 1", TARO), is("text 2", HANAKO)]);

    let staged = lab.call(async |mut gateway| gateway.stage(stage("m", "net2")).await.unwrap().into_inner());
    on_flat("text 3");
    on_net2("text 4");
    assert_eq!(got("text 4", 1), [is("text 3", TARO), is("text 4", HANAKO)], "staging changes nothing");
    let request = switch_of(&staged, "m");
    lab.call(async |mut gateway| gateway.switch(request).await.unwrap());
    on_flat("text 5");
    on_net2("text 6");
    assert_eq!(
        got("text 6", 2),
        [is("text 5", TARO), is("text 6", TARO), is("text 6", HANAKO)],
        "what the old network sent last is still good"
    );
    let finish = v1::FinishSwitchRequest { migration: "m".into() };
    lab.call(async |mut gateway| gateway.finish(finish).await.unwrap());
    on_flat("text 7");
    on_net2("text 8");
    assert_eq!(got("text 8", 2), [is("text 8", TARO), is("text 8", HANAKO)]);

    let counter = |name: &str| {
        let counters = lab.status().counters;
        counters.iter().find(|c| c.name == name).unwrap().frames
    };
    // and what the router's kernel says to all by itself
    assert!(counter("group_copied") >= 9 && counter("wan_group") >= 8);
    assert_eq!(counter("group_not_copied"), 0);
}

#[test]
fn thousands_of_users_are_all_introduced_before_they_are_switched_at_once() {
    const USERS: u16 = 4096;
    let lab = Lab::new();
    let daemon = lab.start();
    let wire = Wire::new(&lab.router);
    let mac = |n: u16| Mac([2, 0, 0, 7, n.to_be_bytes()[0], n.to_be_bytes()[1]]);
    let names: Vec<String> = (0..USERS).map(|n| format!("user{n}")).collect();
    let mut request = configuration();
    request.users = (0..USERS)
        .map(|n| {
            user(&names[usize::from(n)], mac(n), &format!("10.1.{}.{}", 16 + (n >> 8), n & 0xff), "flat")
        })
        .collect();
    lab.call(async |mut gateway| gateway.configure(request).await.unwrap());
    let request = v1::StageRequest { users: names.clone(), ..stage("m", "net2") };
    let staged = lab.call(async |mut gateway| gateway.stage(request).await.unwrap().into_inner());
    // it has answered, so all have been asked as; the wire's own thread may be behind
    let mut left: HashSet<Mac> = (0..USERS).map(mac).collect();
    while !left.is_empty() {
        let frame = wire.frames.recv_timeout(PATIENCE);
        let frame = frame.unwrap_or_else(|_| panic!("{} users are not introduced", left.len()));
        if frame[12..18] == [0x81, 0, 0, 2, 8, 6] {
            left.remove(&Mac(frame[6..12].try_into().unwrap()));
        }
    }

    let request = v1::SwitchRequest { users_digest: users::digest(&names).into(), ..switch_of(&staged, "m") };
    lab.call(async |mut gateway| gateway.switch(request).await.unwrap());
    let status = lab.status();
    assert_eq!(status.users.len(), usize::from(USERS));
    assert_eq!(status.users.iter().find(|u| u.network != "net2"), None);
    let request = v1::GatewayStatusRequest { without_users: true };
    let brief = lab.call(async |mut gateway| gateway.status(request).await.unwrap().into_inner());
    assert!(brief.users.is_empty() && brief.networks.len() == status.networks.len(), "{brief:?}");
    let frame = bare(VIRTUAL, mac(USERS - 1), None, IPV4, &[7; 46]);
    let socket = lab.taro.run(|| packet_socket("eth0"));
    send(socket.as_raw_fd(), &frame, MsgFlags::empty()).unwrap();
    let seen = wire.wait_for(|frame| frame.ends_with(&[7; 46]));
    assert_eq!(seen.last().unwrap()[..16], [&ROUTER2.0[..], &mac(USERS - 1).0, &[0x81, 0, 0, 2]].concat());

    lab.call(async |mut gateway| {
        gateway.finish(v1::FinishSwitchRequest { migration: "m".into() }).await.unwrap()
    });
    assert_eq!(daemon.stop().0, 0);
}
