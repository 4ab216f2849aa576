//! The same move by hand: what an operator without Handover would do, step after step, with the same CRIU.
//!
//! ```text
//! viewer --+
//! a -------+-- one segment (a bridge)         v on a, then on b
//! b -------+
//! ```
//! criu dump at a (which locks v's connections and ends the process), the images copied, v taken from a and given to b, criu
//! restore at b, a gratuitous ARP. It is shown at its best: nobody types, the copy goes from memory to memory in one machine
//! with nothing encrypted, and nothing is checked.

use std::{
    fs,
    io::Write as _,
    net::Ipv4Addr,
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send, socket};

use crate::{
    Host, Io, Lab, Lines, Process, Program,
    apps::Report,
    program,
    topology::{App, workspace},
};

const V: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 100);
/// Of a service that is to start or a client that is to answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where images are, in a tmpfs.
const IMAGES: &str = "/run/images";
/// Payload that flows before and after each move.
const FLOW: u64 = 20_000;

/// The segment with a service and its viewer.
pub struct ByHand {
    servers: [Host; 2],
    /// Which of them has the service.
    at: usize,
    pid: i32,
    client: Process,
    lines: Lines,
    read: usize,
    // last: everything above stands in it
    _lab: Lab,
}

impl ByHand {
    /// Brings it up.
    ///
    /// # Errors
    /// If the machine does not let it.
    pub fn start(memory_mib: u16, connections: usize) -> anyhow::Result<Self> {
        let mut lab = Lab::new()?;
        let (viewer, switch) = (lab.add_host("viewer")?, lab.add_host("switch")?);
        let servers = [lab.add_host("a")?, lab.add_host("b")?];
        switch.ip("link add br0 type bridge\nlink set br0 up")?;
        for (host, last) in [(&viewer, 1), (&servers[0], 5), (&servers[1], 6)] {
            let port = format!("p{last}");
            lab.link((host, "eth0"), (&switch, &port))?;
            switch.ip(&format!("link set {port} master br0"))?;
            host.ip(&format!("addr add 10.9.0.{last}/24 dev eth0"))?;
        }
        servers[0].ip(&format!("addr add {V}/32 dev eth0"))?;
        let address = format!("{V}:{}", App::Load.port());
        let memory = memory_mib.to_string();
        let load = Program::new(program("load-server")?);
        let load = load.args(["--listen", address.as_str(), "--memory-mib", &memory]).min_pid(20_000);
        let service = servers[0].spawn(&load)?;
        let listening = || servers[0].output(Program::argv(["ss", "-Hltn", "src", address.as_str()]));
        let deadline = Instant::now() + PATIENCE;
        while listening()?.stdout.is_empty() {
            ensure!(Instant::now() < deadline, "load-server does not listen");
            std::thread::sleep(Duration::from_millis(5)); // between two looks; the kernel tells of no listen
        }
        let client = Program::new(program("load-client")?);
        let client = client.args([address.as_str(), "--connections", &connections.to_string()]);
        let mut client = viewer.spawn(&client.stdio(Io::Pipe, Io::Pipe, Io::Null))?;
        let lines = client.stdout.take().map(Lines::collect).unwrap_or_default();
        let pid = service.pid();
        let mut hand = Self { servers, at: 0, pid, client, lines, read: 0, _lab: lab };
        hand.more()?;
        Ok(hand)
    }

    /// The client's report after some more payload.
    fn more(&mut self) -> anyhow::Result<Report> {
        let stdin = self.client.stdin.as_mut().context("the client's stdin")?;
        writeln!(stdin, "more {FLOW}").context("asking the client")?;
        let line = self.lines.wait_for(self.read, PATIENCE, |_| true).context("the client")?;
        self.read += 1;
        let report: Report = serde_json::from_str(&line)?;
        ensure!(report.unharmed(), "the client was harmed: {report:?}");
        Ok(report)
    }

    /// Moves the service to the other server. How long the viewer heard nothing.
    ///
    /// # Errors
    /// With what CRIU says.
    pub fn migrate(&mut self) -> anyhow::Result<Duration> {
        self.more()?; // its longest gap starts anew
        let (from, to) = (self.servers[self.at].clone(), self.servers[1 - self.at].clone());
        let criu = workspace().join(".tools/bin/criu");
        let tool = |host: &Host, args: &[&str]| -> anyhow::Result<()> {
            let output = host.output(Program::new(&criu).args(args))?;
            ensure!(output.ended.success(), "criu {}: {}{}", args[0], output.stdout, output.stderr);
            Ok(())
        };
        for host in [&from, &to] {
            let dir = host.path(IMAGES);
            if dir.exists() {
                fs::remove_dir_all(&dir)?;
            }
            fs::create_dir(&dir)?;
        }

        let pid = self.pid.to_string();
        tool(&from, &["dump", "-t", &pid, "-D", IMAGES, "--tcp-established", "--network-lock", "nftables"])?;
        for entry in fs::read_dir(from.path(IMAGES))? {
            let entry = entry?;
            fs::copy(entry.path(), to.path(IMAGES).join(entry.file_name()))?;
        }
        from.ip(&format!("addr del {V}/32 dev eth0"))?;
        to.ip(&format!("addr add {V}/32 dev eth0"))?;
        tool(&to, &["restore", "-D", IMAGES, "-d", "--tcp-established", "--network-lock", "nftables"])?;
        announce(&to)?;

        let gap = Duration::from_micros(self.more()?.longest_gap_us);
        self.at = 1 - self.at;
        // CRIU leaves its lock at the source
        for host in [&from, &to] {
            host.output(Program::argv(["nft", "flush", "ruleset"]))?;
        }
        Ok(gap)
    }
}

/// A gratuitous ARP for v.
fn announce(host: &Host) -> anyhow::Result<()> {
    host.enter(|| -> anyhow::Result<()> {
        let all = nix::ifaddrs::getifaddrs()?;
        let mac = all
            .filter(|i| i.interface_name == "eth0")
            .find_map(|i| i.address.and_then(|a| a.as_link_addr().and_then(|l| l.addr())))
            .context("eth0 has no MAC address")?;
        let mut frame = vec![0xff; 6];
        frame.extend(mac);
        frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
        frame.extend(mac);
        frame.extend(V.octets());
        frame.extend([0; 6]);
        frame.extend(V.octets());
        frame.resize(60, 0);
        let raw = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None::<SockProtocol>)?;
        let index = nix::net::if_::if_nametoindex("eth0")?;
        bind(&raw, index)?;
        send(raw.as_raw_fd(), &frame, MsgFlags::empty())?;
        Ok(())
    })?
}

/// Binds a packet socket to an interface.
fn bind(socket: &impl std::os::fd::AsRawFd, index: u32) -> anyhow::Result<()> {
    // SAFETY: all zeros is a valid sockaddr_ll
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET)?;
    address.sll_ifindex = i32::try_from(index)?;
    let length = libc::socklen_t::try_from(std::mem::size_of_val(&address))?;
    // SAFETY: the address is valid for the call and of the length that is told
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    ensure!(bound == 0, "binding a packet socket: {}", std::io::Error::last_os_error());
    Ok(())
}
