//! IPv6 through hosts' own stacks: two routers with one link-local address, router advertisements, and a TCP connection across a
//! switch, of which the user's neighbour cache shows nothing.
//!
//! ```text
//!   taro --eth0====access0-- gateway --wan0====up0-- provider --p1====w0-- router 1 --s1====e1-- server
//!                                                    (VLAN 2) --p2====w0-- router 2 --s2====e2----'
//! ```
//! The provider is the test's own threads: kernels that this has to run on may lack 802.1Q devices.

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::{
    fs,
    io::{Read, Write},
    mem,
    net::{Ipv6Addr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::{TARO, VIRTUAL, lab::*};
use handover_api::v1;
use handover_gateway::mac::Mac;
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send, socket},
};

const ROUTER: &str = "fe80::1";
const ROUTERS: [Mac; 2] = [Mac([2, 0, 0, 0, 0x0c, 1]), Mac([2, 0, 0, 0, 0x0c, 2])];
/// What taro makes of the prefix and its MAC.
const TARO_IP6: &str = "2001:db8:1::ff:fe00:101";
const SERVICE: &str = "2001:db8:53::1";

fn sysctl(ns: &Ns, name: &str, value: &str) {
    ns.run(|| fs::write(format!("/proc/sys/net/ipv6/conf/{name}"), value).unwrap());
}

/// Threads that carry frames between the trunk and two access ports.
struct Provider {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Provider {
    fn new(ns: &Ns) -> Self {
        const TAG: [u8; 4] = [0x81, 0, 0, 2];
        let stop = Arc::new(AtomicBool::new(false));
        let carry = |from: &'static str, onward: fn(Vec<u8>) -> (&'static str, Vec<u8>)| {
            let input = ns.run(|| packet_socket(from));
            let outputs = ns.run(|| ["up0", "p1", "p2"].map(|name| (name, packet_socket(name))));
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let Some(frame) = receive(&input) else { continue };
                    let (to, frame) = onward(frame);
                    let (_, output) = outputs.iter().find(|(name, _)| *name == to).unwrap();
                    // what is lost on the way is sent again
                    let _ = send(output.as_raw_fd(), &frame, MsgFlags::empty());
                }
            })
        };
        let threads = vec![
            carry("up0", |frame| match frame[12..16] == TAG {
                true => ("p2", [&frame[..12], &frame[16..]].concat()),
                false => ("p1", frame),
            }),
            carry("p1", |frame| ("up0", frame)),
            carry("p2", |frame| ("up0", [&frame[..12], &TAG[..], &frame[12..]].concat())),
        ];
        Self { stop, threads }
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A router's advertisement of itself and a prefix (RFC 4861, section 4.2), to all nodes.
fn advertise(router: &Ns, mac: Mac, prefix: Ipv6Addr) {
    let mut packet = vec![134, 0, 0, 0, 64, 0];
    packet.extend(1800_u16.to_be_bytes());
    packet.extend([0; 8]);
    // source link-layer address
    packet.extend([1, 1]);
    packet.extend(mac.0);
    // prefix information: on-link, autonomous
    packet.extend([3, 4, 64, 0xc0]);
    packet.extend(86_400_u32.to_be_bytes());
    packet.extend(86_400_u32.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend(prefix.octets());
    router.run(|| {
        // the kernel puts in the checksum (RFC 3542)
        let socket =
            socket(AddressFamily::Inet6, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::IcmpV6)
                .unwrap();
        let hops: libc::c_int = 255;
        let index = nix::net::if_::if_nametoindex("w0").unwrap();
        // SAFETY: integers only.
        let mut to: libc::sockaddr_in6 = unsafe { mem::zeroed() };
        to.sin6_family = libc::AF_INET6 as u16;
        to.sin6_addr.s6_addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets();
        to.sin6_scope_id = index;
        // SAFETY: the option takes an int; the address and the packet outlive the call.
        let sent = unsafe {
            let set = libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_IPV6,
                libc::IPV6_MULTICAST_HOPS,
                (&raw const hops).cast(),
                size_of_val(&hops) as libc::socklen_t,
            );
            assert_eq!(set, 0);
            libc::sendto(
                socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const to).cast(),
                size_of_val(&to) as libc::socklen_t,
            )
        };
        assert_eq!(Errno::result(sent).unwrap(), packet.len() as isize);
    });
}

/// Has `work` done until `seen` says so.
fn until(what: &str, work: impl Fn(), seen: impl Fn() -> bool) {
    let begun = Instant::now();
    loop {
        work();
        if seen() {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Questions and answers over one connection.
struct PingPong {
    client: TcpStream,
    server: TcpStream,
    number: u64,
}

impl PingPong {
    fn rounds(&mut self, rounds: u64) {
        for _ in 0..rounds {
            let question: Vec<u8> = (0..125).flat_map(|at| (self.number * 125 + at).to_be_bytes()).collect();
            self.client.write_all(&question).unwrap();
            let mut got = vec![0; question.len()];
            self.server.read_exact(&mut got).unwrap();
            assert!(got == question, "question {}", self.number);
            self.server.write_all(&got).unwrap();
            self.client.read_exact(&mut got).unwrap();
            assert!(got == question, "answer {}", self.number);
            self.number += 1;
        }
    }
}

#[test]
fn a_connection_crosses_a_switch_between_two_routers_with_one_address() {
    let lab = Lab::new();
    let (routers, server) = ([Ns::new(), Ns::new()], Ns::new());
    // the lab's router is the provider here
    let provider = &lab.router;
    sysctl(provider, "all/disable_ipv6", "1");
    for (number, (router, mac)) in (1..).zip(routers.iter().zip(ROUTERS)) {
        provider.sh(&format!("ip link add p{number} type veth peer name w0 netns {}", router.path()));
        provider.sh(&format!("ip link set p{number} up"));
        router.sh("ethtool -K w0 tx off txvlan off");
        router.sh(&format!("ip link set w0 address {mac} addrgenmode none up"));
        sysctl(router, "all/forwarding", "1");
        router.sh(&format!("ip -6 address add {ROUTER}/64 dev w0 nodad"));
        router.sh("ip -6 route add 2001:db8:1::/64 dev w0");
        router.sh(&format!("ip link add s0 type veth peer name e{number} netns {}", server.path()));
        router.sh("ip link set s0 up");
        server.sh(&format!("ip link set e{number} up"));
        router.sh(&format!("ip -6 address add 2001:db8:f{number}::1/64 dev s0 nodad"));
        server.sh(&format!("ip -6 address add 2001:db8:f{number}::2/64 dev e{number} nodad"));
        router.sh(&format!("ip -6 route add {SERVICE} via 2001:db8:f{number}::2"));
    }
    server.sh(&format!("ip -6 address add {SERVICE}/128 dev lo nodad"));
    let back_by = |number| {
        server.sh(&format!("ip -6 route replace 2001:db8:1::/64 via 2001:db8:f{number}::1"));
    };
    back_by(1);
    let _carrying = Provider::new(provider);

    let _daemon = lab.start();
    let mut request = configuration();
    request.networks.truncate(2);
    for network in &mut request.networks {
        network.router_address = String::new();
        network.router_address6 = ROUTER.into();
    }
    request.users[0].addresses = vec![TARO_IP6.into()];
    lab.call(async |mut gateway| gateway.configure(request).await.unwrap());
    let learned = || lab.status().networks.into_iter().map(|n| n.router_mac).collect::<Vec<_>>();
    until("router 1 is learned", || {}, || learned()[0] == ROUTERS[0].to_string());

    // what the router of taro's network advertises, and that one's alone, makes taro's address and route
    let prefix = |number| Ipv6Addr::new(0x2001, 0xdb8, number, 0, 0, 0, 0, 0);
    sysctl(&lab.taro, "eth0/accept_dad", "0");
    let has = |text: &str| lab.taro.sh("ip -6 address show dev eth0").contains(text);
    advertise(&routers[1], ROUTERS[1], prefix(2));
    until(
        "taro has an address of the prefix",
        || advertise(&routers[0], ROUTERS[0], prefix(1)),
        || has(TARO_IP6),
    );
    assert!(!has("2001:db8:2:"), "router 2 is on another network");
    let route = lab.taro.sh("ip -6 route show default");
    assert!(route.contains("via fe80::1"), "{route}");
    // the router as taro knows it, whatever state the entry is in
    let neighbour = || {
        let shown = lab.taro.sh("ip -6 neigh show dev eth0 fe80::1");
        shown.split_whitespace().skip_while(|w| *w != "lladdr").nth(1).map(str::to_owned)
    };
    assert_eq!(neighbour(), Some(VIRTUAL.to_string()), "by the advertisement");

    let listener = server.run(|| TcpListener::bind((SERVICE, 7)).unwrap());
    let to = (SERVICE.parse::<Ipv6Addr>().unwrap(), 7).into();
    let client = lab.taro.run(|| TcpStream::connect_timeout(&to, PATIENCE).unwrap());
    let (answering, from) = listener.accept().unwrap();
    assert_eq!(from.ip().to_string(), TARO_IP6);
    for socket in [&client, &answering] {
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    let mut talk = PingPong { client, server: answering, number: 0 };
    talk.rounds(100);

    let staged = lab.call(async |mut gateway| gateway.stage(stage("m", "net2")).await.unwrap().into_inner());
    assert_eq!(staged.router_mac, ROUTERS[1].to_string());
    let introduced = routers[1].sh(&format!("ip -6 neigh show dev w0 {TARO_IP6}"));
    assert!(introduced.contains(&TARO.to_string()), "router 2 knows taro already: {introduced:?}");
    talk.rounds(100);
    let before = lab.taro.sh("ip -6 neigh show dev eth0 fe80::1");
    lab.call(async |mut gateway| gateway.switch(switch_of(&staged, "m")).await.unwrap());
    back_by(2);
    talk.rounds(100);
    let finish = v1::FinishSwitchRequest { migration: "m".into() };
    lab.call(async |mut gateway| gateway.finish(finish).await.unwrap());
    talk.rounds(100);
    println!("before {before:?}, after {:?}", lab.taro.sh("ip -6 neigh show dev eth0 fe80::1"));
    assert_eq!(neighbour(), Some(VIRTUAL.to_string()), "nothing has changed for taro");
    // taro asks anew, and is answered the same
    lab.taro.sh("ip -6 neigh flush dev eth0");
    talk.rounds(100);
    assert_eq!(neighbour(), Some(VIRTUAL.to_string()));
    // from now on it is the other router's advertisements that count
    until(
        "an address of the other prefix",
        || advertise(&routers[1], ROUTERS[1], prefix(2)),
        || has("2001:db8:2::ff:fe00:101"),
    );
    assert_eq!(neighbour(), Some(VIRTUAL.to_string()));
    let stale = |name: &str| lab.status().counters.iter().find(|c| c.name == name).unwrap().frames;
    let before = stale("wan_stale_network");
    routers[0].sh(&format!("ip -6 neigh replace {TARO_IP6} lladdr {TARO} dev w0"));
    until(
        "the old router's frames are stale",
        || {
            let old = routers[0].run(|| std::net::UdpSocket::bind("[::]:0").unwrap());
            let _ = old.send_to(b"x", (TARO_IP6, 9));
        },
        || stale("wan_stale_network") > before,
    );
}
