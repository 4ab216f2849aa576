//! What hosts and their drivers do to frames, with live traffic whose every byte is checked: offloads left on, long frames.
//!
//! ```text
//!   taro --eth0====tap0-[bridge]-accp====access0-- gateway --wan0====wanp-[bridge]-tap1====up0-- router
//! ```

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use common::{TARO, lab::*};

/// Octets of a bulk transfer, each way.
const BULK: usize = 16 << 20;

/// The octet at a place of the stream that one side sends.
fn octet(place: usize, side: u8) -> u8 {
    let word = (place as u64 / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(side) << 32;
    (word >> (place % 8 * 8)) as u8
}

/// Sends its own side's octets while it reads the other's, all of which have to be right.
fn transfer(stream: TcpStream, own: u8, other: u8) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let (mut out, mut back) = (stream.try_clone()?, stream);
    let sender = thread::spawn(move || -> io::Result<()> {
        let mut place = 0;
        while place < BULK {
            let chunk: Vec<u8> = (place..(place + 60_000).min(BULK)).map(|at| octet(at, own)).collect();
            out.write_all(&chunk)?;
            place += chunk.len();
        }
        Ok(())
    });
    let (mut place, mut buffer) = (0, vec![0; 1 << 16]);
    while place < BULK {
        let len = back.read(&mut buffer)?;
        assert!(len > 0, "the stream ended at {place}");
        for (at, got) in (place..).zip(&buffer[..len]) {
            assert_eq!(*got, octet(at, other), "octet {at}");
        }
        place += len;
    }
    sender.join().unwrap()
}

/// Taro connects to the router; both send, all that arrives is right.
fn tcp_both_ways(lab: &Lab) -> io::Result<()> {
    let listener = lab.router.run(|| TcpListener::bind((R, 9000)).unwrap());
    listener.set_nonblocking(true).unwrap();
    let stream = lab.taro.run(|| TcpStream::connect_timeout(&(R, 9000).into(), Duration::from_secs(2)))?;
    let (answered, _) = listener.accept()?;
    answered.set_nonblocking(false)?;
    let server = thread::spawn(move || transfer(answered, 2, 1));
    transfer(stream, 1, 2)?;
    server.join().unwrap()
}

fn feature(ns: &Ns, interface: &str, feature: &str) -> String {
    let shown = ns.sh(&format!("ethtool -k {interface}"));
    let line = shown.lines().find_map(|line| line.trim().strip_prefix(&format!("{feature}: ")));
    line.unwrap_or_else(|| panic!("{feature}: {shown}")).split(' ').next().unwrap().into()
}

const OFFLOADS: [&str; 4] = [
    "tx-checksumming",
    "tcp-segmentation-offload",
    "generic-receive-offload",
    "generic-segmentation-offload",
];

fn offloads(ns: &Ns, interface: &str) -> Vec<String> {
    OFFLOADS.iter().map(|name| feature(ns, interface, name)).collect()
}

/// Puts a bridge between the gateway and each neighbour, so that the hosts' own interfaces are not at the gateway's veths.
fn behind_bridges(lab: &Lab) {
    for (interface, tap, peer, bridge) in
        [("access0", "tap0", "accp", "users"), ("wan0", "tap1", "wanp", "prov")]
    {
        for line in [
            format!("ip link set {interface} down"),
            format!("ip link set {interface} name {tap}"),
            format!("ip link add {interface} type veth peer name {peer}"),
            format!("ip link add {bridge} type bridge"),
            format!("ip link set {tap} master {bridge}"),
            format!("ip link set {peer} master {bridge}"),
        ] {
            lab.gateway.sh(&line);
        }
        for up in [interface, tap, peer, bridge] {
            lab.gateway.sh(&format!("ip link set {up} up"));
        }
    }
    // as hosts are
    for (ns, interface) in [(&lab.taro, "eth0"), (&lab.router, "up0")] {
        ns.sh(&format!("ethtool -K {interface} tx on sg on tso on gso on gro on txvlan on"));
        assert_eq!(offloads(ns, interface), ["on"; 4]);
    }
}

#[test]
fn tcp_of_hosts_that_leave_everything_to_their_drivers() {
    for pinned in [false, true] {
        let lab = if pinned { Lab::pinned() } else { Lab::new() };
        behind_bridges(&lab);
        let ends = ["accp", "wanp"];
        let before =
            ends.map(|end| (feature(&lab.gateway, end, "tx-checksumming"), offloads(&lab.gateway, end)));
        assert_eq!(before[0].0, "on", "as a veth is");
        let daemon = lab.start();
        assert!(daemon.began.contains("changed"), "{}", daemon.began);
        lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
        for end in ends {
            assert_eq!(feature(&lab.gateway, end, "tx-checksumming"), "off");
            assert_eq!(feature(&lab.gateway, end, "tx-vlan-offload"), "off");
            assert_eq!(feature(&lab.gateway, end, "generic-receive-offload"), "on");
        }
        tcp_both_ways(&lab).unwrap();
        for (ns, interface) in [(&lab.taro, "eth0"), (&lab.router, "up0")] {
            assert_eq!(offloads(ns, interface), ["on"; 4], "it went with them on");
        }
        // what it is good for: with the checksums left to a driver that is none, nothing gets through
        lab.gateway.sh("ethtool -K accp tx on");
        let error = tcp_both_ways(&lab).unwrap_err();
        assert!([io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock].contains(&error.kind()), "{error}");
        lab.gateway.sh("ethtool -K accp tx off");
        tcp_both_ways(&lab).unwrap();

        let (code, log) = daemon.stop();
        assert_eq!(code, 0, "{log}");
        if pinned {
            assert_eq!(lab.detach().0, 0);
        }
        for (end, (checksums, _)) in ends.iter().zip(&before) {
            assert_eq!(feature(&lab.gateway, end, "tx-checksumming"), *checksums, "restored");
            assert_eq!(feature(&lab.gateway, end, "tx-vlan-offload"), "on", "restored");
        }
    }
}

#[test]
fn the_other_end_in_another_namespace_is_named_with_what_to_do_there() {
    let lab = Lab::new();
    let daemon = lab.start();
    let status = lab.status();
    for interface in &status.interfaces {
        assert!(interface.note.contains("ethtool -K IFACE tx off txvlan off gro on"), "{interface:?}");
    }
    assert!(daemon.began.contains("ethtool -K IFACE"), "{}", daemon.began);
}

#[test]
fn long_frames_pass_whole_and_too_long_ones_are_counted() {
    let lab = Lab::new();
    for (ns, interface) in
        [(&lab.taro, "eth0"), (&lab.gateway, "access0"), (&lab.gateway, "wan0"), (&lab.router, "up0")]
    {
        ns.sh(&format!("ip link set {interface} mtu 9000"));
    }
    let daemon = lab.start();
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    assert!(lab.echo());
    tcp_both_ways(&lab).unwrap();

    // datagrams that fill a frame to the last octet, both ways
    const FULL: usize = 9000 - 28;
    let datagram = |number: u8, len: usize| (0..len).map(|at| octet(at, number)).collect::<Vec<u8>>();
    let router = lab.router.run(|| UdpSocket::bind((R, 9)).unwrap());
    let taro = lab.taro.run(|| UdpSocket::bind((TARO_IP, 9)).unwrap());
    let mut buffer = vec![0; 1 << 16];
    for socket in [&router, &taro] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    for number in 0..50 {
        // around the sizes at which the kernel begins another buffer, too
        let len = if number % 2 == 0 { FULL } else { 3000 + 37 * usize::from(number) };
        taro.send_to(&datagram(number, len), (R, 9)).unwrap();
        let (got, from) = router.recv_from(&mut buffer).unwrap();
        assert!(buffer[..got] == datagram(number, len), "{got} octets of {len}");
        router.send_to(&datagram(number + 100, len), from).unwrap();
        let got = taro.recv(&mut buffer).unwrap();
        assert!(buffer[..got] == datagram(number + 100, len), "{got} octets of {len}");
    }

    // and with a tag on top of that
    let wire = Wire::new(&lab.router);
    let staged = lab.call(async |mut gateway| gateway.stage(stage("m", "net2")).await.unwrap().into_inner());
    lab.call(async |mut gateway| gateway.switch(switch_of(&staged, "m")).await.unwrap());
    taro.send_to(&datagram(7, FULL), (R, 9)).unwrap();
    let seen = wire.wait_for(|frame| frame.len() > 9000);
    let sent = seen.last().unwrap();
    assert_eq!(sent.len(), 14 + 4 + 9000);
    assert_eq!(sent[..18], [&ROUTER2.0[..], &TARO.0, &[0x81, 0, 0, 2, 8, 0]].concat());
    assert!(sent[18 + 28..] == datagram(7, FULL));

    // a provider that takes less than the users send: counted, and shown
    lab.gateway.sh("ip link set wan0 mtu 1500");
    let v1_again = v1_configuration(2);
    lab.call(async |mut gateway| gateway.configure(v1_again).await.unwrap());
    let counted = |name: &str| lab.status().counters.iter().find(|c| c.name == name).unwrap().frames;
    assert_eq!(counted("access_too_long"), 0);
    lab.counts("access_too_long", || drop(taro.send_to(&datagram(8, 1473), (R, 9))));
    let too_long = counted("access_too_long");
    taro.send_to(&datagram(9, 1472), (R, 9)).unwrap();
    wire.wait_for(|frame| frame.len() == 1518 && frame.ends_with(&datagram(9, 1472)[1000..]));
    assert_eq!(counted("access_too_long"), too_long, "just not too long");
    let mut status = lab.daemon(&lab.config());
    let shown = String::from_utf8(status.arg("status").output().unwrap().stdout).unwrap();
    assert!(shown.contains("access_too_long"), "{shown}");
    drop(daemon);
}

fn v1_configuration(revision: u64) -> handover_api::v1::ConfigureRequest {
    handover_api::v1::ConfigureRequest { revision, ..configuration() }
}
