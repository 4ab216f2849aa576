//! The daemon as it is run, between a user and a router in network namespaces of the test's own.
//!
//! ```text
//!   taro --eth0====access0-- gateway --wan0====up0-- router
//! ```
//!
//! The router's kernel answers on the untagged network `flat`; in VLAN 2 (`net2`) the test itself plays the router, because
//! the kernels this has to run on may lack 802.1Q devices; in VLAN 3 (`net3`) nobody answers.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    mem,
    net::{Ipv4Addr, UdpSocket},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use aya::maps::MapData;
use handover_api::{
    tls::{Role, Tls, init_authority, issue},
    users,
    v1::{self, gateway_client::GatewayClient},
};
use handover_gateway::mac::Mac;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        signal::{Signal, kill},
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send, setsockopt, socket,
            sockopt::{RcvBufForce, ReceiveTimeout},
        },
        statfs::{BPF_FS_MAGIC, statfs},
        time::{TimeVal, TimeValLike as _},
    },
    unistd::Pid,
};
use tonic::transport::Channel;

use super::{TARO, VIRTUAL, arp, bare, network, user};

pub const R: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
pub const TARO_IP: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 100);
pub const ROUTER2: Mac = Mac([0x02, 0, 0, 0, 0x0b, 2]);
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A network namespace; it ends with the last of its descriptors, processes and threads.
pub struct Ns(pub fs::File);

impl Ns {
    pub fn new() -> Self {
        let file = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("this test needs root");
            fs::File::open("/proc/thread-self/ns/net").unwrap()
        });
        let ns = Self(file.join().unwrap());
        ns.sh("ip link set lo up");
        ns
    }

    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let ns = self.0.try_clone().unwrap();
        let mut command = Command::new(program);
        // SAFETY: setns is one system call, which is all the child does before it is replaced.
        unsafe {
            command.pre_exec(move || Ok(setns(ns.as_fd(), CloneFlags::CLONE_NEWNET)?));
        }
        command
    }

    pub fn sh(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        let output = self.command(words.next().unwrap()).args(words).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Where other processes find it.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs `work` inside, on a thread of its own.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// A mount namespace with a BPF file system of its own: whatever is pinned there ends with it.
pub struct Mounts(pub fs::File);

impl Mounts {
    pub fn new() -> Self {
        let file = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).expect("this test needs root");
            let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            // the machine's own, which all tests would share: each daemon mounts one for itself
            let is_bpffs = || statfs(BPFFS).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC);
            while is_bpffs() {
                umount2(BPFFS, MntFlags::MNT_DETACH).unwrap();
            }
            fs::File::open("/proc/thread-self/ns/mnt").unwrap()
        });
        Self(file.join().unwrap())
    }

    /// Runs `work` inside, on a thread of its own.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    unshare(CloneFlags::CLONE_FS).unwrap();
                    setns(self.0.as_fd(), CloneFlags::CLONE_NEWNS).unwrap();
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

const BPFFS: &str = "/sys/fs/bpf";

/// Where the labs' daemons pin; in the lab's own mount namespace, in which the daemon has to mount it first.
pub const PIN_DIR: &str = "/sys/fs/bpf/handover/gw";

pub struct Lab {
    pub mounts: Option<Mounts>,
    pub taro: Ns,
    pub gateway: Ns,
    pub router: Ns,
    pub dir: tempfile::TempDir,
}

impl Lab {
    pub fn new() -> Self {
        let (taro, gateway, router) = (Ns::new(), Ns::new(), Ns::new());
        gateway.sh(&format!("ip link add access0 type veth peer name eth0 netns {}", taro.path()));
        gateway.sh(&format!("ip link add wan0 type veth peer name up0 netns {}", router.path()));
        for (ns, interface) in [(&taro, "eth0"), (&router, "up0")] {
            // a redirect into a veth delivers only if its peer polls; checksums have to be in the frames
            ns.sh(&format!("ethtool -K {interface} gro on tx off txvlan off"));
        }
        taro.sh(&format!("ip link set eth0 address {TARO} up"));
        taro.sh(&format!("ip address add {TARO_IP}/24 dev eth0"));
        router.sh("ip link set up0 up");
        router.sh(&format!("ip address add {R}/24 dev up0"));
        gateway.sh("ip link set access0 up");
        gateway.sh("ip link set wan0 up");

        let dir = tempfile::tempdir().unwrap();
        init_authority(dir.path()).unwrap();
        issue(dir.path(), dir.path(), Role::Gateway, "gw").unwrap();
        issue(dir.path(), dir.path(), Role::Controller, "c").unwrap();
        let lab = Self { mounts: None, taro, gateway, router, dir };
        lab.write_config("gw.toml", "access0", "wan0", 7443);
        lab
    }

    /// One whose data path outlives the daemon.
    pub fn pinned() -> Self {
        let mut lab = Self::new();
        lab.mounts = Some(Mounts::new());
        let file = lab.config();
        let text = fs::read_to_string(&file).unwrap();
        let state = lab.dir.path().join("state");
        let keys = format!("pin_dir = \"{PIN_DIR}\"\nstate_dir = \"{}\"\n[tls]", state.display());
        fs::write(&file, text.replace("[tls]", &keys)).unwrap();
        lab
    }

    pub fn config(&self) -> PathBuf {
        self.dir.path().join("gw.toml")
    }

    /// Runs `work` where the pins are to be seen.
    pub fn at_pins<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.mounts.as_ref().unwrap().run(work)
    }

    /// A pinned array of words.
    pub fn pinned_array(file: &str) -> aya::maps::Array<MapData, u64> {
        let data = MapData::from_pin(Path::new(PIN_DIR).join(file)).unwrap();
        aya::maps::Map::from_map_data(data).unwrap().try_into().unwrap()
    }

    pub fn detach(&self) -> (i32, String) {
        let mut detach = self.daemon(&self.config());
        detach.arg("detach");
        self.refused(detach)
    }

    pub fn write_config(&self, file: &str, access: &str, wan: &str, port: u16) -> PathBuf {
        let dir = self.dir.path().display();
        let text = format!(
            "name = \"gw\"\nlisten = \"127.0.0.1:{port}\"\naccess = \"{access}\"\nwan = \"{wan}\"\n\
             virtual_router_mac = \"{VIRTUAL}\"\n[tls]\nca = \"{dir}/ca.pem\"\n\
             cert = \"{dir}/gateway-gw.pem\"\nkey = \"{dir}/gateway-gw.key\"\n"
        );
        let path = self.dir.path().join(file);
        fs::write(&path, text).unwrap();
        path
    }

    pub fn daemon(&self, config: &Path) -> Command {
        let mut command = self.gateway.command(env!("CARGO_BIN_EXE_handover-gateway"));
        command.arg("--config").arg(config).env("RUST_LOG", "info").env("NO_COLOR", "1");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(mounts) = &self.mounts {
            let mounts = mounts.0.try_clone().unwrap();
            // SAFETY: setns is one system call.
            unsafe {
                command.pre_exec(move || Ok(setns(mounts.as_fd(), CloneFlags::CLONE_NEWNS)?));
            }
        }
        command
    }

    /// Exit code and standard error of a daemon that cannot start.
    pub fn refused(&self, mut daemon: Command) -> (i32, String) {
        let output = daemon.output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    pub fn start(&self) -> Daemon {
        let mut child = self.daemon(&self.dir.path().join("gw.toml")).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut seen = String::new();
        while !seen.contains("ready") {
            let before = seen.len();
            log.read_line(&mut seen).unwrap();
            assert!(seen.len() > before, "the daemon ended: {seen}");
        }
        Daemon { child, log: Some(log), began: seen }
    }

    /// Calls the daemon as the controller.
    pub fn call<T: Send>(&self, work: impl AsyncFnOnce(GatewayClient<Channel>) -> T + Send) -> T {
        let file = |name: &str| self.dir.path().join(name);
        let files = handover_api::tls::TlsFiles {
            ca: file("ca.pem"),
            cert: file("controller-c.pem"),
            key: file("controller-c.key"),
        };
        self.gateway.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let tls = Tls::load(&files).unwrap();
                let channel = tls.connect(Role::Gateway, "gw", "127.0.0.1:7443").await.unwrap();
                work(GatewayClient::new(channel)).await
            })
        })
    }

    pub fn status(&self) -> v1::GatewayStatus {
        self.call(async |mut gateway| {
            gateway.status(v1::GatewayStatusRequest::default()).await.unwrap().into_inner()
        })
    }

    /// Has `work` done until the gateway has counted a frame under `outcome`.
    pub fn counts(&self, outcome: &str, work: impl Fn()) {
        let frames = || {
            let counters = self.status().counters;
            counters.iter().find(|c| c.name == outcome).unwrap().frames
        };
        let (before, begun) = (frames(), Instant::now());
        while frames() == before {
            assert!(begun.elapsed() < PATIENCE, "nothing is counted as {outcome}");
            work();
        }
    }

    /// Whether taro gets an answer from the router's kernel, over the gateway.
    pub fn echo(&self) -> bool {
        let answered = Arc::new(AtomicBool::new(false));
        let server = self.router.run(|| UdpSocket::bind((R, 7)).unwrap());
        server.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let client = self.taro.run(|| UdpSocket::bind((TARO_IP, 0)).unwrap());
        client.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let begun = Instant::now();
        while !answered.load(Ordering::Relaxed) && begun.elapsed() < Duration::from_secs(3) {
            client.send_to(b"are you there?", (R, 7)).unwrap();
            let mut buffer = [0; 64];
            if let Ok((len, from)) = server.recv_from(&mut buffer) {
                assert_eq!(from.ip(), TARO_IP);
                server.send_to(&buffer[..len], from).unwrap();
            }
            answered.store(client.recv(&mut buffer).is_ok(), Ordering::Relaxed);
        }
        answered.load(Ordering::Relaxed)
    }
}

pub struct Daemon {
    pub child: Child,
    pub log: Option<BufReader<ChildStderr>>,
    /// What it said until it was ready.
    pub began: String,
}

impl Daemon {
    pub fn stop(mut self) -> (i32, String) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        let mut log = String::new();
        self.log.take().unwrap().read_to_string(&mut log).unwrap();
        (self.child.wait().unwrap().code().unwrap(), log)
    }
}

impl Daemon {
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.log.is_some() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Numbered frames from taro to the router on `flat`, without end; in the meantime somebody does things to the daemon.
pub struct Stream {
    sent: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    sender: thread::JoinHandle<()>,
    receiver: thread::JoinHandle<Vec<u64>>,
}

impl Stream {
    /// Between two frames.
    const PACE: Duration = Duration::from_micros(20);

    pub fn start(lab: &Lab) -> Self {
        let receiver = lab.router.run(|| UdpSocket::bind((R, 9)).unwrap());
        receiver.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        setsockopt(&receiver, RcvBufForce, &(64 << 20)).unwrap();
        let sender = lab.taro.run(|| UdpSocket::bind((TARO_IP, 0)).unwrap());
        let (sent, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (sending, stopping) = (Arc::clone(&sent), Arc::clone(&stop));
        let sender = thread::spawn(move || {
            let mut next = Instant::now();
            while !stopping.load(Ordering::Relaxed) {
                let number = sending.load(Ordering::Relaxed);
                sender.send_to(&number.to_be_bytes(), (R, 9)).unwrap();
                sending.store(number + 1, Ordering::Relaxed);
                next += Self::PACE;
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        let receiver = thread::spawn(move || {
            let (mut seen, mut buffer) = (Vec::new(), [0; 8]);
            // the last frame is followed by silence
            while let Ok((8, _)) = receiver.recv_from(&mut buffer) {
                seen.push(u64::from_be_bytes(buffer));
            }
            seen
        });
        let stream = Self { sent, stop, sender, receiver };
        stream.goes_on();
        stream
    }

    /// Returns when a few more frames have been sent.
    pub fn goes_on(&self) {
        let from = self.sent.load(Ordering::Relaxed);
        while self.sent.load(Ordering::Relaxed) < from + 5000 {
            thread::sleep(Self::PACE);
        }
    }

    /// Ends it; every frame has to have come, once, in order. Returns how many.
    pub fn ends_whole(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.sender.join().unwrap();
        let seen = self.receiver.join().unwrap();
        let sent = self.sent.load(Ordering::Relaxed);
        let odd: Vec<_> = seen.windows(2).filter(|w| w[1] != w[0] + 1).collect();
        assert_eq!((seen.len() as u64, &odd[..]), (sent, &[][..]), "sent {sent}");
        sent
    }
}

/// The router's end of the wire: every frame that comes out of it, as it is on the wire, and a router in VLAN 2.
pub struct Wire {
    pub frames: mpsc::Receiver<Vec<u8>>,
    pub stop: Arc<AtomicBool>,
    pub thread: Option<thread::JoinHandle<()>>,
}

impl Wire {
    pub fn new(ns: &Ns) -> Self {
        let socket = ns.run(|| packet_socket("up0"));
        let (sender, frames) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                let Some(frame) = receive(&socket) else { continue };
                // who-has r, in VLAN 2
                if frame[12..18] == [0x81, 0, 0, 2, 8, 6]
                    && frame[24..26] == [0, 1]
                    && frame[42..46] == R.octets()
                {
                    let asker = Mac(frame[26..32].try_into().unwrap());
                    let ip = frame[32..36].try_into().unwrap();
                    let answer =
                        bare(asker, ROUTER2, Some(2), 0x0806, &arp(2, ROUTER2, R.octets(), asker, ip));
                    send(socket.as_raw_fd(), &answer, MsgFlags::empty()).unwrap();
                }
                if sender.send(frame).is_err() {
                    break;
                }
            }
        });
        Self { frames, stop, thread: Some(thread) }
    }

    /// Frames seen until `until` is one of them.
    pub fn wait_for(&self, until: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let frame =
                self.frames.recv_timeout(left).unwrap_or_else(|_| panic!("not seen; but {seen:02x?}"));
            let found = until(&frame);
            seen.push(frame);
            if found {
                return seen;
            }
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn packet_socket(interface: &str) -> OwnedFd {
    let socket =
        socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll).unwrap();
    setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(20)).unwrap();
    let on: libc::c_int = 1;
    for option in [libc::PACKET_AUXDATA, libc::PACKET_IGNORE_OUTGOING] {
        // SAFETY: both options take an int.
        let result = unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, (&raw const on).cast(), 4)
        };
        assert_eq!(result, 0);
    }
    // SAFETY: integers only.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = nix::net::if_::if_nametoindex(interface).unwrap() as i32;
    // SAFETY: the address and its length.
    let result = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
    };
    assert_eq!(result, 0);
    socket
}

/// A frame as it was on the wire: a tag that the kernel moved out is put back.
pub fn receive(socket: &OwnedFd) -> Option<Vec<u8>> {
    let mut buffer = [0; 1 << 14];
    let mut control = nix::cmsg_space!(libc::tpacket_auxdata);
    let mut parts = [std::io::IoSliceMut::new(&mut buffer)];
    let message = nix::sys::socket::recvmsg::<()>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::empty(),
    )
    .ok()?;
    let mut tag = None;
    for part in message.cmsgs().ok()? {
        if let nix::sys::socket::ControlMessageOwned::Unknown(part) = part {
            let at = mem::offset_of!(libc::tpacket_auxdata, tp_vlan_tci);
            let status = u32::from_ne_bytes(part.data_bytes[..4].try_into().unwrap());
            if status & libc::TP_STATUS_VLAN_VALID != 0 {
                tag = Some(u16::from_ne_bytes(part.data_bytes[at..at + 2].try_into().unwrap()));
            }
        }
    }
    let len = message.bytes;
    let mut frame = buffer[..len].to_vec();
    if let Some(tci) = tag {
        let [a, b] = tci.to_be_bytes();
        frame.splice(12..12, [0x81, 0, a, b]);
    }
    (frame.len() >= 46).then_some(frame)
}

pub fn configuration() -> v1::ConfigureRequest {
    v1::ConfigureRequest {
        revision: 1,
        networks: vec![
            network("flat", None, None),
            network("net2", Some(2), None),
            network("net3", Some(3), None),
        ],
        users: vec![user("taro", TARO, "10.1.0.100", "flat")],
    }
}

pub fn stage(migration: &str, to: &str) -> v1::StageRequest {
    v1::StageRequest {
        migration: migration.into(),
        users: vec!["taro".into()],
        from_network: "flat".into(),
        to_network: to.into(),
    }
}

pub fn switch_of(staged: &v1::StageResponse, migration: &str) -> v1::SwitchRequest {
    v1::SwitchRequest {
        migration: migration.into(),
        switch: staged.switch,
        generation: staged.generation,
        users: Vec::new(),
        to_network: "net2".into(),
        users_digest: users::digest(&["taro"]).into(),
    }
}
