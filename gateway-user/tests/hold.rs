//! Hold and release with the daemon as it is run: numbered frames from users to the service, through hold, switch and finish,
//! and everything that can go otherwise. What counts is what comes out of the WAN interface: every frame once, in order.

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::{
    mem,
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::{HANAKO, ROUTER1, TARO, VIRTUAL, lab::*, user};
use gateway_ebpf::{
    Load, SwitchWord,
    words::{Phase, Selector},
};
use handover_api::v1;
use handover_gateway::{
    desired::Desired,
    hold::Bounds,
    link::Link,
    onward::Marker,
    plane::{Options, Plane, Side, grace_period},
    release::Releaser,
    table::{Table, Write},
};
use nix::sys::{
    signal::Signal,
    socket::{setsockopt, sockopt::RcvBufForce},
};
use tonic::Code;

/// The service's address v.
const V: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// Port of the numbered frames at v.
const NUMBERS: u16 = 9;
/// Port of the marker at v.
const MARKER: u16 = 7070;
const NONCE: u64 = 0x1122_3344_5566_7788;
/// Between two frames: 50,000 a second.
const PACE: Duration = Duration::from_micros(20);
const DEADLINE_MS: u64 = 30_000;

/// Numbered frames of a user to the service, without end.
struct Numbers {
    sent: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    sender: thread::JoinHandle<()>,
}

impl Numbers {
    fn start(lab: &Lab, from: Ipv4Addr) -> Self {
        let socket = lab.taro.run(|| UdpSocket::bind((from, 0)).unwrap());
        let (sent, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (sending, stopping) = (Arc::clone(&sent), Arc::clone(&stop));
        let sender = thread::spawn(move || {
            let mut next = Instant::now();
            while !stopping.load(Ordering::Relaxed) {
                let number = sending.load(Ordering::Relaxed);
                socket.send_to(&number.to_be_bytes(), (V, NUMBERS)).unwrap();
                sending.store(number + 1, Ordering::Relaxed);
                next += PACE;
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        let stream = Self { sent, stop, sender };
        stream.goes_on(2000);
        stream
    }

    /// Returns when so many more have been sent.
    fn goes_on(&self, frames: u64) {
        let from = self.sent.load(Ordering::Relaxed);
        while self.sent.load(Ordering::Relaxed) < from + frames {
            thread::sleep(PACE);
        }
    }

    /// Ends it; how many were sent.
    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.sender.join().unwrap();
        self.sent.load(Ordering::Relaxed)
    }
}

/// A frame for the service, as it came out of the WAN interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Out {
    vid: u16,
    from: Ipv4Addr,
    /// Destination port at v.
    port: u16,
    number: u64,
}

/// Everything for the service that comes out of the WAN interface.
struct Capture {
    socket: OwnedFd,
    thread: thread::JoinHandle<Vec<Out>>,
    seen: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Capture {
    fn start(lab: &Lab) -> Self {
        let socket = lab.router.run(|| packet_socket("up0"));
        setsockopt(&socket, RcvBufForce, &(1 << 30)).unwrap();
        let reader = socket.try_clone().unwrap();
        let (seen, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counting, stopping) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut all = Vec::new();
            loop {
                match receive(&reader).and_then(|frame| parse(&frame)) {
                    Some(out) => {
                        all.push(out);
                        counting.store(all.len() as u64, Ordering::Relaxed);
                    }
                    None if stopping.load(Ordering::Relaxed) => return all,
                    None => {}
                }
            }
        });
        Self { socket, thread, seen, stop }
    }

    /// Ends when so many have come, or none comes any more. The capture itself must not have lost any.
    fn end(self, frames: u64) -> Vec<Out> {
        let mut quiet = (Instant::now(), 0);
        while self.seen.load(Ordering::Relaxed) < frames && quiet.0.elapsed() < Duration::from_secs(3) {
            thread::sleep(Duration::from_millis(5));
            let seen = self.seen.load(Ordering::Relaxed);
            if seen != quiet.1 {
                quiet = (Instant::now(), seen);
            }
        }
        self.stop.store(true, Ordering::Relaxed);
        let all = self.thread.join().unwrap();
        let mut statistics = [0_u32; 2];
        let mut len = mem::size_of_val(&statistics) as libc::socklen_t;
        // SAFETY: the option writes two unsigned ints (struct tpacket_stats).
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                statistics.as_mut_ptr().cast(),
                &mut len,
            )
        };
        assert_eq!((result, statistics[1]), (0, 0), "the capture lost frames");
        all
    }
}

/// UDP over IPv4 for v.
fn parse(frame: &[u8]) -> Option<Out> {
    let (vid, ip) = if frame[12..14] == [0x81, 0] {
        (u16::from_be_bytes([frame[14], frame[15]]) & 0xfff, &frame[16..])
    } else {
        (0, &frame[12..])
    };
    let (ethertype, ip) = ip.split_at(2);
    if ethertype != [8, 0] || ip[9] != 17 || ip[16..20] != V.octets() {
        return None;
    }
    Some(Out {
        vid,
        from: Ipv4Addr::new(ip[12], ip[13], ip[14], ip[15]),
        port: u16::from_be_bytes([ip[22], ip[23]]),
        number: u64::from_be_bytes(ip.get(28..36)?.try_into().unwrap()),
    })
}

/// The numbered frames of one user.
fn numbers(all: &[Out], from: Ipv4Addr) -> Vec<Out> {
    all.iter().copied().filter(|out| out.port == NUMBERS && out.from == from).collect()
}

/// Every number once, in order; how many, and where the VID changed.
#[track_caller]
fn assert_whole(all: &[Out], from: Ipv4Addr, sent: u64) -> Vec<(u64, u16)> {
    let own = numbers(all, from);
    let odd: Vec<_> = own.windows(2).filter(|w| w[1].number != w[0].number + 1).take(5).collect();
    assert_eq!((own.len() as u64, own.first().map(|o| o.number), &odd[..]), (sent, Some(0), &[][..]));
    let mut changes = vec![(0, own[0].vid)];
    for pair in own.windows(2) {
        if pair[0].vid != pair[1].vid {
            changes.push((pair[1].number, pair[1].vid));
        }
    }
    changes
}

/// A lab whose taro (and another user on the same interface) sends to the service by way of the router.
fn lab(pinned: bool) -> Lab {
    let lab = if pinned { Lab::pinned() } else { Lab::new() };
    lab.taro.sh(&format!("ip route add {V} via {R}"));
    lab
}

fn staged(lab: &Lab) -> v1::StageResponse {
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    let _wire = Wire::new(&lab.router);
    assert!(lab.echo());
    lab.call(async |mut gateway| gateway.stage(stage("m", "net2")).await.unwrap().into_inner())
}

/// A daemon with the switch `m` staged, taro's numbered frames, and what comes out.
fn flowing(lab: &Lab) -> (Daemon, v1::StageResponse, Capture, Numbers) {
    let daemon = lab.start();
    let staged = staged(lab);
    let capture = Capture::start(lab);
    (daemon, staged, capture, Numbers::start(lab, TARO_IP))
}

fn hold_of(staged: &v1::StageResponse, migration: &str) -> v1::HoldRequest {
    v1::HoldRequest {
        migration: migration.into(),
        switch: staged.switch,
        generation: staged.generation,
        address: V.to_string(),
        deadline_ms: DEADLINE_MS,
        marker: Some(v1::Marker { port: MARKER.into(), nonce: NONCE }),
    }
}

fn hold(lab: &Lab, request: v1::HoldRequest) -> v1::HoldResponse {
    lab.call(async |mut gateway| gateway.hold(request).await.unwrap().into_inner())
}

fn switch(lab: &Lab, staged: &v1::StageResponse, migration: &str) -> v1::SwitchResponse {
    let request = switch_of(staged, migration);
    lab.call(async |mut gateway| gateway.switch(request).await.unwrap().into_inner())
}

fn finish(lab: &Lab, migration: &str) -> v1::HoldFigures {
    let request = v1::FinishSwitchRequest { migration: migration.into() };
    lab.call(async |mut gateway| gateway.finish(request).await.unwrap().into_inner().held.unwrap())
}

fn abort(lab: &Lab, migration: &str) -> v1::AbortSwitchResponse {
    let request = v1::AbortSwitchRequest { migration: migration.into() };
    lab.call(async |mut gateway| gateway.abort(request).await.unwrap().into_inner())
}

/// Nothing dropped, lost or late.
#[track_caller]
fn assert_clean(figures: &v1::HoldFigures) {
    let v1::HoldFigures { frames, bytes, release_us, .. } = *figures;
    let clean = v1::HoldFigures { frames, bytes, release_us, ..Default::default() };
    assert!(*figures == clean && frames > 0 && bytes > frames && release_us > 0, "{figures:?}");
}

/// The two ways a frame from a socket takes into a veth's peer: the CPU's backlog, or, beside redirected frames, the queue of
/// the peer's NAPI (without segmentation offload there is something to gain by that, says the driver).
#[test]
fn a_stream_through_hold_switch_and_finish_is_whole() {
    for segmentation in ["on", "off"] {
        whole_stream(segmentation);
    }
}

fn whole_stream(segmentation: &str) {
    let lab = lab(false);
    lab.gateway.sh(&format!("ethtool -K wan0 tso {segmentation} gso {segmentation}"));
    let (_daemon, staged, capture, stream) = flowing(&lab);

    let answer = hold(&lab, hold_of(&staged, "m"));
    println!("held: {answer:?}");
    assert_eq!((answer.users, answer.marker_sent), (1, true));
    stream.goes_on(5000);
    let status = lab.status().switches.remove(0);
    assert_eq!((status.phase.as_str(), status.state.as_str()), ("hold", "staged"));
    assert!(status.held.unwrap().frames >= 5000, "{status:?}");
    // other frames go on
    assert!(lab.echo());
    let switched = switch(&lab, &staged, "m");
    assert_eq!(switched.window_ns, 0, "nothing goes under the old network while it is held");
    assert_eq!(lab.status().switches[0].phase, "hold", "the switch leaves it so");
    stream.goes_on(5000);
    let figures = finish(&lab, "m");
    println!("released: {figures:?}");
    assert_clean(&figures);
    assert!(figures.frames >= 10_000, "{figures:?}");
    stream.goes_on(5000);
    assert_eq!(finish(&lab, "m"), figures, "the same when asked again");

    let sent = stream.end();
    let all = capture.end(sent + 1);
    let changes = assert_whole(&all, TARO_IP, sent);
    assert_eq!(changes.iter().map(|c| c.1).collect::<Vec<_>>(), [0, 2], "{changes:?}");
    // the marker, in the old network, behind all that went there
    let marker = all.iter().position(|out| out.port == MARKER).unwrap();
    assert_eq!(all[marker], Out { vid: 0, from: TARO_IP, port: MARKER, number: NONCE });
    assert_eq!(all[marker - 1].number + 1, changes[1].0, "nothing under way past it");
    println!("{sent} frames, all there, once, in order");
}

#[test]
fn an_abort_releases_into_the_old_network() {
    for switched in [false, true] {
        let lab = lab(false);
        let (_daemon, staged, capture, stream) = flowing(&lab);
        hold(&lab, hold_of(&staged, "m"));
        stream.goes_on(5000);
        if switched {
            switch(&lab, &staged, "m");
        }
        let aborted = abort(&lab, "m");
        assert_eq!(aborted.was_switched, switched);
        assert_clean(&aborted.held.unwrap());
        stream.goes_on(5000);
        assert_eq!(abort(&lab, "m"), aborted, "the same when asked again");
        assert!(lab.status().switches.is_empty());
        let sent = stream.end();
        let all = capture.end(sent + 1);
        assert_eq!(assert_whole(&all, TARO_IP, sent), [(0, 0)], "it never left the old network");
    }
}

#[test]
fn what_a_killed_daemon_held_its_successor_releases() {
    let lab = lab(true);
    let (daemon, staged, capture, stream) = flowing(&lab);
    hold(&lab, hold_of(&staged, "m"));
    stream.goes_on(3000);
    daemon.kill();
    stream.goes_on(3000);
    let daemon = lab.start();
    let status = lab.status().switches.remove(0);
    assert_eq!((status.phase.as_str(), status.state.as_str()), ("hold", "staged"));
    assert!(status.held.unwrap().frames >= 6000, "{status:?}");
    // the answer may have been lost with it
    assert!(hold(&lab, hold_of(&staged, "m")).marker_sent);
    switch(&lab, &staged, "m");
    daemon.kill();
    stream.goes_on(3000);
    let _daemon = lab.start();
    assert_eq!(
        (lab.status().switches[0].phase.as_str(), lab.status().switches[0].state.as_str()),
        ("hold", "switched")
    );
    let figures = finish(&lab, "m");
    assert_clean(&figures);
    assert!(figures.frames >= 9000, "{figures:?}");
    stream.goes_on(3000);
    let sent = stream.end();
    let changes = assert_whole(&capture.end(sent + 2), TARO_IP, sent);
    assert_eq!(changes.iter().map(|c| c.1).collect::<Vec<_>>(), [0, 2]);
}

#[test]
fn what_was_in_the_hands_of_a_killed_daemon_is_counted_as_lost_and_holds_nobody_up() {
    let lab = lab(true);
    let (daemon, staged, capture, stream) = flowing(&lab);
    hold(&lab, hold_of(&staged, "m"));
    stream.goes_on(3000);
    daemon.kill();
    // as if it had taken them to send them
    let taken = lab.at_pins(|| {
        let data = aya::maps::MapData::from_pin(std::path::Path::new(PIN_DIR).join("map-FRAMES")).unwrap();
        let mut ring = aya::maps::RingBuf::try_from(aya::maps::Map::from_map_data(data).unwrap()).unwrap();
        (0..1000).filter(|_| ring.next().is_some()).count() as u64
    });
    assert_eq!(taken, 1000);
    let _daemon = lab.start();
    switch(&lab, &staged, "m");
    stream.goes_on(3000);
    let figures = finish(&lab, "m");
    assert_eq!((figures.lost, figures.late), (taken, 0), "{figures:?}");
    stream.goes_on(3000);
    let sent = stream.end();
    let own = numbers(&capture.end(sent - taken + 1), TARO_IP);
    let odd: Vec<_> = own.windows(2).filter(|w| w[1].number != w[0].number + 1).collect();
    let [gap] = odd[..] else { panic!("{odd:?}") };
    assert_eq!(gap[1].number - gap[0].number - 1, taken, "these and no others");
    assert_eq!(own.len() as u64, sent - taken);
}

#[test]
fn after_the_deadline_frames_flow_without_the_daemon() {
    let lab = lab(false);
    let (daemon, staged, capture, stream) = flowing(&lab);
    hold(&lab, v1::HoldRequest { deadline_ms: 300, ..hold_of(&staged, "m") });
    switch(&lab, &staged, "m");
    daemon.signal(Signal::SIGSTOP);
    let (begun, seen) = (Instant::now(), capture.seen.load(Ordering::Relaxed));
    while capture.seen.load(Ordering::Relaxed) < seen + 1000 {
        assert!(begun.elapsed() < PATIENCE, "nothing flows although the deadline has passed");
        stream.goes_on(10);
    }
    daemon.signal(Signal::SIGCONT);
    let figures = finish(&lab, "m");
    // what was kept comes after what was not, and is counted as that
    assert!(figures.frames > 0 && figures.late == figures.frames && figures.lost == 0, "{figures:?}");
    let counters = lab.status().counters;
    let expired = counters.iter().find(|c| c.name == "access_hold_expired").unwrap();
    assert!(expired.frames >= 1000, "{expired:?}");
    stream.goes_on(1000);
    let sent = stream.end();
    let mut own: Vec<u64> = numbers(&capture.end(sent + 1), TARO_IP).iter().map(|o| o.number).collect();
    own.sort_unstable();
    assert!(own.iter().copied().eq(0..sent), "nothing is lost or sent twice: {} of {sent}", own.len());
}

#[test]
fn two_switches_are_held_and_released_each_for_itself() {
    let lab = lab(false);
    let hanako_ip = Ipv4Addr::new(10, 1, 0, 101);
    lab.taro.sh("ip link add link eth0 name mac0 type macvlan mode bridge");
    let _daemon = lab.start();
    let mut request = configuration();
    request.users.push(user("hanako", HANAKO, "10.1.0.101", "flat"));
    lab.call(async |mut gateway| gateway.configure(request).await.unwrap());
    lab.taro.sh(&format!("ip link set mac0 address {HANAKO} up"));
    lab.taro.sh(&format!("ip address add {hanako_ip}/32 dev mac0"));
    lab.taro.sh(&format!("ip route add {R} dev mac0 src {hanako_ip} table 7"));
    lab.taro.sh(&format!("ip route add {V} via {R} dev mac0 src {hanako_ip} table 7"));
    lab.taro.sh(&format!("ip rule add from {hanako_ip} lookup 7"));
    let wire = Wire::new(&lab.router);
    assert!(lab.echo());
    let stage_of = |name: &str, migration: &str| {
        let request = v1::StageRequest { users: vec![name.into()], ..stage(migration, "net2") };
        lab.call(async |mut gateway| gateway.stage(request).await.unwrap().into_inner())
    };
    let (first, second) = (stage_of("taro", "m1"), stage_of("hanako", "m2"));
    drop(wire);
    let capture = Capture::start(&lab);
    let streams = [Numbers::start(&lab, TARO_IP), Numbers::start(&lab, hanako_ip)];
    let go_on = || streams.iter().for_each(|stream| stream.goes_on(2000));

    hold(&lab, hold_of(&first, "m1"));
    go_on();
    hold(&lab, v1::HoldRequest { marker: None, ..hold_of(&second, "m2") });
    go_on();
    // hanako's are between taro's, and are released while taro's are not
    let seen = capture.seen.load(Ordering::Relaxed);
    let aborted = abort(&lab, "m2").held.unwrap();
    assert_clean(&aborted);
    go_on();
    assert!(capture.seen.load(Ordering::Relaxed) > seen);
    assert_eq!(lab.status().switches[0].phase, "hold");
    switch(&lab, &first, "m1");
    go_on();
    assert_clean(&finish(&lab, "m1"));
    go_on();
    let [taro, hanako] = streams.map(Numbers::end);
    let all = capture.end(taro + hanako + 1);
    let changes = assert_whole(&all, TARO_IP, taro);
    assert_eq!(changes.iter().map(|c| c.1).collect::<Vec<_>>(), [0, 2]);
    assert_eq!(assert_whole(&all, hanako_ip, hanako), [(0, 0)]);
}

#[test]
fn bad_holds_are_refused_naming_thing_and_value_and_hold_nothing() {
    let lab = lab(false);
    let _daemon = lab.start();
    let staged = staged(&lab);
    let good = hold_of(&staged, "m");
    let refused = |request: v1::HoldRequest| {
        let status = lab.call(async |mut gateway| gateway.hold(request).await.unwrap_err());
        assert_eq!(lab.status().switches[0].phase, "forward");
        (status.code(), status.message().to_string())
    };
    let port = |port| Some(v1::Marker { port, nonce: 0 });
    for (request, code, named) in [
        (
            v1::HoldRequest { address: "2001:db8::1".into(), ..good.clone() },
            Code::InvalidArgument,
            "2001:db8::1",
        ),
        (v1::HoldRequest { address: String::new(), ..good.clone() }, Code::InvalidArgument, "IPv4"),
        (v1::HoldRequest { deadline_ms: 0, ..good.clone() }, Code::InvalidArgument, "deadline_ms = 0"),
        (v1::HoldRequest { deadline_ms: u64::MAX, ..good.clone() }, Code::InvalidArgument, "3600000"),
        (v1::HoldRequest { marker: port(0), ..good.clone() }, Code::InvalidArgument, "marker.port = 0"),
        (v1::HoldRequest { marker: port(65_536), ..good.clone() }, Code::InvalidArgument, "65536"),
        (v1::HoldRequest { migration: "other".into(), ..good.clone() }, Code::FailedPrecondition, "`other`"),
        (v1::HoldRequest { generation: 77, ..good.clone() }, Code::FailedPrecondition, "generation"),
    ] {
        let (is, message) = refused(request);
        assert!(is == code && message.contains(named), "{is:?} {message}");
    }
    switch(&lab, &staged, "m");
    let (code, message) = refused(good);
    assert!(code == Code::FailedPrecondition && message.contains("is switched"), "{message}");
    let request = v1::FinishSwitchRequest { migration: "m".into() };
    let finished = lab.call(async |mut gateway| gateway.finish(request).await.unwrap().into_inner());
    assert_eq!(finished.held, None, "nothing was held");
}

#[test]
fn a_daemon_killed_while_it_releases_sends_nothing_twice_and_its_successor_the_rest() {
    let lab = lab(true);
    let (daemon, staged, capture, stream) = flowing(&lab);
    hold(&lab, hold_of(&staged, "m"));
    stream.goes_on(30_000);
    switch(&lab, &staged, "m");
    let seen = capture.seen.load(Ordering::Relaxed);
    thread::scope(|scope| {
        scope.spawn(|| {
            let request = v1::FinishSwitchRequest { migration: "m".into() };
            // killed in the middle, it gives no answer
            lab.call(async |mut gateway| gateway.finish(request).await).map(|_| ()).unwrap_or_default();
        });
        while capture.seen.load(Ordering::Relaxed) < seen + 100 {
            std::hint::spin_loop();
        }
        daemon.kill();
    });
    let _daemon = lab.start();
    assert_eq!(lab.status().switches[0].phase, "drain");
    let figures = finish(&lab, "m");
    println!("{figures:?}");
    assert_eq!((figures.late, figures.dropped_memory, figures.dropped_user_bound), (0, 0, 0));
    stream.goes_on(2000);
    let sent = stream.end();
    let own = numbers(&capture.end(sent - figures.lost + 1), TARO_IP);
    assert!(own.windows(2).all(|w| w[0].number < w[1].number), "once and in order");
    // a batch may have left although nobody was there any more to count it
    let missing = sent - own.len() as u64;
    assert!(missing <= figures.lost && figures.lost <= 64, "{missing} missing, {figures:?}");
    assert!(figures.frames >= 20_000, "{figures:?}");
}

#[test]
fn no_frame_is_under_way_past_the_marker_however_often_and_fast() {
    const HOLDS: u64 = 1000;
    let lab = lab(false);
    lab.gateway.run(|| {
        // the daemon's parts without the daemon
        let options = Options { max_users: 16, virtual_router_mac: VIRTUAL, hold: Bounds::default() };
        let mut plane = Plane::load(&options).unwrap();
        let wan = Link::open("wan0").unwrap();
        for (side, link) in [(Side::Wan, &wan), (Side::Access, &Link::open("access0").unwrap())] {
            plane.set_port(side.port(), link.index, 1514).unwrap();
            plane.attach(side, &link.name, link.index).unwrap();
        }
        let ways = vec![(Side::Wan.port(), Releaser::way(&wan).unwrap())];
        let releaser = Releaser::open(Arc::clone(plane.holds()), VIRTUAL, ways);
        let mut request = configuration();
        request.networks[0].router_mac = Some(ROUTER1.to_string());
        let desired = Desired::new(&request, &handover_gateway::desired::Wiring::single(VIRTUAL)).unwrap();
        let (mut table, writes, _) = Table::new(16).configured(&desired).unwrap();
        plane.apply(&writes).unwrap();
        table.stage_begin("m", &["taro".to_string()], "flat", "net2").unwrap();
        let (writes, staged) = table.stage_write("m").unwrap();
        plane.apply(&writes).unwrap();
        grace_period().unwrap();

        let capture = Capture::start(&lab);
        let stream = Numbers::start(&lab, TARO_IP);
        let holds = Arc::clone(plane.holds());
        let mut phase = |phase| {
            let word = SwitchWord::new(Selector::A, phase, staged.generation);
            plane.apply(&[Write::Switch { index: staged.switch, word }]).unwrap();
        };
        let mut first_held = Vec::new();
        let mut held = 0;
        for number in 0..HOLDS {
            // in the middle of them, wherever that is
            let (before, turns) = (stream.sent.load(Ordering::Relaxed), number % 50 * 40);
            while stream.sent.load(Ordering::Relaxed) < before + 3 {
                std::hint::spin_loop();
            }
            (0..turns).for_each(|_| std::hint::spin_loop());
            holds.begin(staged.switch, V, u64::MAX);
            phase(Phase::Hold);
            holds.settle().unwrap();
            let marker = Marker {
                from: (TARO, TARO_IP),
                router: ROUTER1,
                link: gateway_ebpf::Link::new(0, 0),
                to: (V, MARKER),
                nonce: number,
            };
            releaser.send(Side::Wan.port(), &marker.frame()).unwrap();
            while holds.figures(staged.switch).frames < 3 {
                thread::yield_now();
            }
            phase(Phase::Forward);
            holds.settle().unwrap();
            let numbers: Vec<u64> = std::iter::from_fn(|| holds.take())
                .map(|(record, frame)| {
                    holds.sent(record.slot(), Load::frame(frame.len() as u64));
                    u64::from_be_bytes(frame[42..50].try_into().unwrap())
                })
                .collect();
            held += numbers.len() as u64;
            first_held.push(numbers[0]);
        }
        let sent = stream.end();
        let all = capture.end(sent - held + HOLDS);
        assert_eq!(all.len() as u64, sent - held + HOLDS, "every frame came out or was held");
        // going back: the lowest number so far has come after all markers so far
        let (mut lowest, mut late) = (u64::MAX, Vec::new());
        for out in all.iter().rev() {
            if out.port == NUMBERS {
                lowest = lowest.min(out.number);
            } else if lowest < first_held[out.number as usize] {
                late.push((out.number, lowest, first_held[out.number as usize]));
            }
        }
        assert_eq!(late, [], "(marker, a frame that came after it, the first that was held)");
        println!("{HOLDS} holds in a stream of {sent} frames, {held} of them held");
    });
}
