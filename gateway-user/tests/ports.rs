//! Several interfaces on each side, the daemon as it is run, live frames.
//!
//! ```text
//!   taro   --eth0====access0-- gateway --wan0====up0-- router   (untagged network `flat`)
//!   hanako --eth0====access1-/         \-wan1====up0-- carrier  (VLAN 2, `net2`)
//! ```

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::{fs, net::UdpSocket, os::fd::AsRawFd as _};

use common::{BROADCAST, HANAKO, IPV4, TARO, VIRTUAL, bare, lab::*, user};
use handover_api::v1;
use handover_gateway::mac::Mac;
use nix::sys::{
    signal::Signal,
    socket::{MsgFlags, send},
};

const HANAKO_IP: &str = "10.1.0.101";

/// A second user and a second way out.
struct Second {
    hanako: Ns,
    carrier: Ns,
}

impl Second {
    fn new(lab: &Lab) -> Self {
        let (hanako, carrier) = (Ns::new(), Ns::new());
        lab.gateway.sh(&format!("ip link add access1 type veth peer name eth0 netns {}", hanako.path()));
        lab.gateway.sh(&format!("ip link add wan1 type veth peer name up0 netns {}", carrier.path()));
        for (ns, interface) in [(&hanako, "eth0"), (&carrier, "up0")] {
            ns.sh(&format!("ethtool -K {interface} gro on tx off txvlan off"));
        }
        hanako.sh(&format!("ip link set eth0 address {HANAKO} up"));
        hanako.sh(&format!("ip address add {HANAKO_IP}/24 dev eth0"));
        carrier.sh("ip link set up0 up");
        lab.gateway.sh("ip link set access1 up");
        lab.gateway.sh("ip link set wan1 up");
        configure_interfaces(lab, &["access0", "access1"], &["wan0", "wan1"]);
        Self { hanako, carrier }
    }
}

fn configure_interfaces(lab: &Lab, access: &[&str], wan: &[&str]) {
    let text = fs::read_to_string(lab.config()).unwrap();
    let others = text.lines().filter(|line| !line.starts_with("access =") && !line.starts_with("wan ="));
    let text = others.collect::<Vec<_>>().join("\n");
    fs::write(lab.config(), format!("access = {access:?}\nwan = {wan:?}\n{text}\n")).unwrap();
}

/// taro behind access0 on `flat` (wan0), hanako behind access1 on `net2` (wan1).
fn both() -> v1::ConfigureRequest {
    let mut request = configuration();
    request.networks[0].wan = "wan0".into();
    request.networks[1].wan = "wan1".into();
    request.networks[2].wan = "wan1".into();
    request.users.push(user("hanako", HANAKO, HANAKO_IP, "net2"));
    request.users[0].interface = "access0".into();
    request.users[1].interface = "access1".into();
    request
}

fn counter(lab: &Lab, name: &str) -> u64 {
    let counters = lab.status().counters;
    counters.iter().find(|c| c.name == name).unwrap().frames
}

fn promiscuous(lab: &Lab) -> Vec<bool> {
    let one = |interface| lab.gateway.sh(&format!("ip -d link show {interface}")).contains("promiscuity 1");
    ["access0", "access1", "wan0", "wan1"].map(one).to_vec()
}

/// Sends a frame as it is.
fn put(ns: &Ns, interface: &str, frame: &[u8]) {
    let socket = ns.run(|| packet_socket(interface));
    send(socket.as_raw_fd(), frame, MsgFlags::empty()).unwrap();
}

/// A frame with a text that tells it, long enough for any interface.
fn text(dst: Mac, src: Mac, vid: Option<u16>, text: &str) -> Vec<u8> {
    bare(dst, src, vid, IPV4, &[&[0; 60], text.as_bytes()].concat())
}

#[test]
fn two_access_and_two_wan_interfaces() {
    for pinned in [false, true] {
        between_four(&if pinned { Lab::pinned() } else { Lab::new() });
    }
}

fn between_four(lab: &Lab) {
    let Second { hanako, carrier } = Second::new(lab);
    let daemon = lab.start();
    assert_eq!(promiscuous(lab), [true; 4]);
    let (wire0, wire1) = (Wire::new(&lab.router), Wire::new(&carrier));

    // each side has several: which one has to be said
    let refused = lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap_err());
    assert!(refused.message().contains("wan0, wan1"), "{}", refused.message());
    lab.call(async |mut gateway| gateway.configure(both()).await.unwrap());
    let status = lab.status();
    let interfaces: Vec<_> = status.interfaces.iter().map(|i| (i.role.as_str(), i.name.as_str())).collect();
    let (access, wan) = ("access", "wan");
    assert_eq!(interfaces, [(access, "access0"), (access, "access1"), (wan, "wan0"), (wan, "wan1")]);
    assert!(status.interfaces.iter().all(|i| i.attach_mode == "native"));
    let wans: Vec<_> = status.networks.iter().map(|n| (n.name.as_str(), n.wan.as_str())).collect();
    assert_eq!(wans, [("flat", "wan0"), ("net2", "wan1"), ("net3", "wan1")]);
    let net2 = status.networks.iter().find(|n| n.name == "net2").unwrap();
    assert_eq!(net2.router_mac, ROUTER2.to_string(), "learned over wan1");

    // each user to its own network, out of that network's interface
    assert!(lab.echo());
    let from_hanako = hanako.run(|| UdpSocket::bind((HANAKO_IP, 0)).unwrap());
    from_hanako.send_to(b"from hanako", (R, 7)).unwrap();
    let seen = wire1.wait_for(|frame| frame.ends_with(b"from hanako"));
    let sent = seen.last().unwrap();
    assert_eq!(sent[..18], [&ROUTER2.0[..], &HANAKO.0, &[0x81, 0, 0, 2, 8, 0]].concat());
    let neighbour = hanako.sh("ip neigh show dev eth0 10.1.0.1");
    assert!(neighbour.contains(&VIRTUAL.to_string()), "{neighbour}");

    // and back: the same frame on the other WAN interface is of no network
    let at_hanako = hanako.run(|| packet_socket("eth0"));
    let down = text(HANAKO, ROUTER2, Some(2), "to hanako");
    lab.counts("wan_unknown_network", || put(&lab.router, "up0", &down));
    put(&carrier, "up0", &down);
    let frame = loop {
        let Some(frame) = receive(&at_hanako) else { continue };
        if frame.ends_with(b"to hanako") {
            break frame;
        }
    };
    assert_eq!(frame[..14], [&HANAKO.0[..], &VIRTUAL.0, &[8, 0]].concat(), "the tag is off: {frame:02x?}");

    // a known user's MAC on the wrong access interface
    let spoofed = text(VIRTUAL, TARO, None, "spoofed");
    lab.counts("access_spoofed", || put(&hanako, "eth0", &spoofed));
    let spoofed = text(VIRTUAL, HANAKO, None, "spoofed");
    lab.counts("access_spoofed", || put(&lab.taro, "eth0", &spoofed));
    // one user to the other, directly: it goes where the sender's network is, never across
    put(&lab.taro, "eth0", &text(HANAKO, TARO, None, "to the neighbour"));
    let seen = wire0.wait_for(|frame| frame.ends_with(b"to the neighbour"));
    assert!(!seen.iter().any(|frame| frame.ends_with(b"spoofed")));

    // broadcast reaches the users of the network of that interface, on theirs
    let at_taro = lab.taro.run(|| packet_socket("eth0"));
    put(&carrier, "up0", &text(BROADCAST, ROUTER2, Some(2), "to all of net2"));
    let router0 = lab.status().networks.iter().find(|n| n.name == "flat").unwrap().router_mac.clone();
    put(&lab.router, "up0", &text(BROADCAST, router0.parse().unwrap(), None, "to all of flat"));
    let hears = |socket, last: &[u8]| {
        let mut heard = Vec::new();
        while !heard.iter().any(|frame: &Vec<u8>| frame.ends_with(last)) {
            heard.extend(receive(socket));
        }
        heard
    };
    let heard = hears(&at_hanako, b"to all of net2");
    assert!(!heard.iter().any(|f| f.ends_with(b"to all of flat") || f.ends_with(b"to the neighbour")));
    let heard = hears(&at_taro, b"to all of flat");
    assert!(!heard.iter().any(|frame| frame.ends_with(b"to all of net2")));

    // a switch to a network behind the other interface, held: everything comes out there, once, in order
    let staged = lab.call(async |mut gateway| gateway.stage(stage("m", "net2")).await.unwrap().into_inner());
    let hold = v1::HoldRequest {
        migration: "m".into(),
        switch: staged.switch,
        generation: staged.generation,
        address: R.to_string(),
        deadline_ms: 30_000,
        marker: Some(v1::Marker { port: 7070, nonce: 1 }),
    };
    let held = lab.call(async |mut gateway| gateway.hold(hold).await.unwrap().into_inner());
    assert!(held.marker_sent);
    wire0.wait_for(|frame| {
        frame.len() > 44 && frame[..12] != BROADCAST.0 && frame[36..38] == 7070_u16.to_be_bytes()
    });
    let taro = lab.taro.run(|| UdpSocket::bind((TARO_IP, 0)).unwrap());
    for number in 0..100_u64 {
        taro.send_to(&[b"number".as_slice(), &number.to_be_bytes()].concat(), (R, 9)).unwrap();
    }
    lab.call(async |mut gateway| gateway.switch(switch_of(&staged, "m")).await.unwrap());
    taro.send_to(&[b"number".as_slice(), &100_u64.to_be_bytes()].concat(), (R, 9)).unwrap();
    let finish = v1::FinishSwitchRequest { migration: "m".into() };
    let figures =
        lab.call(async |mut gateway| gateway.finish(finish).await.unwrap().into_inner().held.unwrap());
    assert_eq!((figures.frames, figures.lost, figures.late), (101, 0, 0), "{figures:?}");
    taro.send_to(&[b"number".as_slice(), &101_u64.to_be_bytes()].concat(), (R, 9)).unwrap();
    let number = |frame: &Vec<u8>| {
        let at = frame.windows(6).position(|w| w == b"number")?;
        Some(u64::from_be_bytes(frame[at + 6..at + 14].try_into().unwrap()))
    };
    let seen = wire1.wait_for(|frame| number(&frame.to_vec()) == Some(101));
    assert_eq!(seen.iter().filter_map(number).collect::<Vec<_>>(), (0..=101).collect::<Vec<_>>());
    assert_eq!(counter(lab, "access_no_port"), 0);

    if lab.mounts.is_none() {
        let (code, log) = daemon.stop();
        assert_eq!(code, 0, "{log}");
        assert_eq!(promiscuous(lab), [false; 4], "restored");
        return;
    }
    // the next daemon finds the interfaces in other places: who was behind one still is
    daemon.signal(Signal::SIGKILL);
    drop(daemon);
    configure_interfaces(lab, &["access1", "access0"], &["wan0", "wan1"]);
    let daemon = lab.start();
    assert!(daemon.began.contains("another interface") && daemon.began.contains("Kept"), "{}", daemon.began);
    assert_eq!(promiscuous(lab), [true; 4]);
    let users: Vec<_> = lab.status().users.into_iter().map(|u| (u.name, u.interface, u.network)).collect();
    let is = |name: &str, interface: &str| (name.to_string(), interface.to_string(), "net2".to_string());
    assert_eq!(users, [is("hanako", "access1"), is("taro", "access0")]);
    from_hanako.send_to(b"hanako again", (R, 7)).unwrap();
    taro.send_to(b"taro again", (R, 7)).unwrap();
    let seen = wire1.wait_for(|frame| frame.ends_with(b"taro again"));
    assert!(seen.iter().any(|frame| frame.ends_with(b"hanako again")));
    // one interface less: it is left as it was found
    drop(daemon.stop());
    configure_interfaces(lab, &["access0"], &["wan0", "wan1"]);
    let daemon = lab.start();
    assert_eq!(promiscuous(lab), [true, false, true, true], "{}", daemon.began);
    assert!(!lab.gateway.sh("ip -d link show access1").contains("prog/xdp"));
    taro.send_to(b"taro once more", (R, 7)).unwrap();
    wire1.wait_for(|frame| frame.ends_with(b"taro once more"));
    drop(daemon.stop());
    let (code, error) = lab.detach();
    assert_eq!(code, 0, "{error}");
    assert_eq!(promiscuous(lab), [false; 4], "restored");
    assert!(!lab.gateway.sh("ip -d link").contains("prog/xdp"));
}

#[test]
fn generic_mode_when_configured_and_not_otherwise() {
    let lab = Lab::pinned();
    // a driver without XDP
    lab.gateway.sh("ip link add bridge0 type bridge");
    lab.gateway.sh("ip link set wan0 master bridge0");
    lab.gateway.sh("ip link set bridge0 up");
    configure_interfaces(&lab, &["access0"], &["bridge0"]);
    let (code, error) = lab.refused(lab.daemon(&lab.config()));
    assert_eq!(code, 1, "{error}");
    for named in ["native", "`bridge0`", "mode = \"generic\""] {
        assert!(error.contains(named), "{named}: {error}");
    }
    assert!(!lab.gateway.sh("ip -d link").contains("prog/xdp"), "nothing is left attached");

    let text = fs::read_to_string(lab.config()).unwrap();
    fs::write(lab.config(), format!("mode = \"generic\"\n{text}")).unwrap();
    let daemon = lab.start();
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    assert!(lab.status().interfaces.iter().all(|i| i.attach_mode == "generic"));
    for interface in ["access0", "bridge0"] {
        let shown = lab.gateway.sh(&format!("ip -d link show {interface}"));
        assert!(shown.contains("xdpgeneric"), "{shown}");
    }
    assert!(lab.echo(), "there and back");
    // tagged frames, too
    let wire = Wire::new(&lab.router);
    let staged = lab.call(async |mut gateway| gateway.stage(stage("m", "net2")).await.unwrap().into_inner());
    lab.call(async |mut gateway| gateway.switch(switch_of(&staged, "m")).await.unwrap());
    let taro = lab.taro.run(|| UdpSocket::bind((TARO_IP, 0)).unwrap());
    taro.send_to(b"tagged", (R, 7)).unwrap();
    let seen = wire.wait_for(|frame| frame.ends_with(b"tagged"));
    assert_eq!(seen.last().unwrap()[..18], [&ROUTER2.0[..], &TARO.0, &[0x81, 0, 0, 2, 8, 0]].concat());
    drop(daemon.stop());

    // back to the driver's own, on interfaces that have it
    lab.gateway.sh("ip link set wan0 nomaster");
    configure_interfaces(&lab, &["access0"], &["wan0"]);
    let text = fs::read_to_string(lab.config()).unwrap().replace("mode = \"generic\"\n", "");
    fs::write(lab.config(), text).unwrap();
    let daemon = lab.start();
    assert!(daemon.began.contains("another mode"), "{}", daemon.began);
    assert!(lab.status().interfaces.iter().all(|i| i.attach_mode == "native"));
    assert!(!lab.gateway.sh("ip -d link").contains("xdpgeneric"));
    taro.send_to(b"natively", (R, 7)).unwrap();
    wire.wait_for(|frame| frame.ends_with(b"natively"));
    drop(daemon.stop());
    assert_eq!(lab.detach().0, 0);
    assert!(!lab.gateway.sh("ip -d link show bridge0").contains("promiscuity 1"));
}
