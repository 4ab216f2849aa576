//! TCP and UDP sockets by sock_diag: whose they are, and making an end of leftovers.
//!
//! Everything here is one or two netlink dumps; the cost grows with the number of sockets on the host, so nothing of it
//! is called per connection.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsRawFd as _, OwnedFd},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP, SockDiagDestroy, SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use nix::sys::socket::{GetSockOpt as _, SetSockOpt as _, sockopt};

use crate::{
    error::{Error, Errors, Result},
    process,
};

/// TCP_REPAIR's "off, and send no window probe" (include/uapi/linux/tcp.h); a probe would tell the peer of an original
/// that may be about to be ended.
const TCP_REPAIR_OFF_NO_WP: libc::c_int = -1;
/// TCP_REPAIR's "on" and "off, and send a window probe".
const TCP_REPAIR_ON: libc::c_int = 1;
const TCP_REPAIR_OFF: libc::c_int = 0;

/// One TCP or UDP socket.
#[derive(Debug, Clone)]
pub struct Socket {
    family: u8,
    id: SocketId,
    /// TCP state (include/net/tcp_states.h).
    pub state: u8,
    /// For a listener: connections waiting to be accepted; else bytes waiting to be read.
    pub recv_queue: u32,
    /// For a connection: bytes sent and not acknowledged, or waiting to be sent.
    pub send_queue: u32,
    /// 0: no process owns it any more (or not yet).
    pub inode: u32,
    /// Its address here, an IPv4 one also where it belongs to an IPv6 socket.
    pub local: (IpAddr, u16),
    /// The other end.
    pub peer: (IpAddr, u16),
}

impl Socket {
    /// A listening TCP socket.
    pub fn listens(&self) -> bool {
        self.state == netlink_packet_sock_diag::TCP_LISTEN
    }

    /// A connection that data can flow on in at least one direction, and that a process owns.
    pub fn connected(&self) -> bool {
        use netlink_packet_sock_diag::{TCP_CLOSE, TCP_LISTEN, TCP_SYN_RECV, TCP_TIME_WAIT};
        !matches!(self.state, TCP_LISTEN | TCP_TIME_WAIT | TCP_CLOSE | TCP_SYN_RECV | NEW_SYN_RECV)
    }

    /// A handshake under way, or a connection that no process owns any more but that still has something to say.
    pub fn in_transit(&self) -> bool {
        use netlink_packet_sock_diag::{TCP_CLOSE, TCP_FIN_WAIT2, TCP_LISTEN, TCP_SYN_RECV, TCP_TIME_WAIT};
        match self.state {
            TCP_SYN_RECV | NEW_SYN_RECV => true,
            TCP_LISTEN | TCP_TIME_WAIT | TCP_CLOSE | TCP_FIN_WAIT2 => false,
            _ => self.inode == 0,
        }
    }
}

/// TCP_NEW_SYN_RECV: a request socket (include/net/tcp_states.h).
const NEW_SYN_RECV: u8 = 12;

/// All TCP sockets of this network namespace.
///
/// # Errors
/// sock_diag is missing or refused.
pub fn tcp() -> Result<Vec<Socket>> {
    dump(IPPROTO_TCP, StateFlags::all())
}

/// All TCP sockets of this network namespace but those of established connections: few, however many users there are.
///
/// # Errors
/// sock_diag is missing or refused.
pub fn tcp_unsettled() -> Result<Vec<Socket>> {
    dump(IPPROTO_TCP, StateFlags::all() - StateFlags::ESTABLISHED)
}

/// All UDP sockets of this network namespace.
///
/// # Errors
/// sock_diag is missing or refused.
pub fn udp() -> Result<Vec<Socket>> {
    dump(IPPROTO_UDP, StateFlags::all())
}

fn dump(protocol: u8, states: StateFlags) -> Result<Vec<Socket>> {
    let netlink = Netlink::open()?;
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let request = InetRequest {
            family,
            protocol,
            extensions: ExtensionFlags::empty(),
            states: states.clone(),
            socket_id: if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() },
        };
        let message = NetlinkMessage::new(header(NLM_F_DUMP), SockDiagMessage::InetRequest(request).into());
        netlink.ask(message, |payload| {
            if let NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(r)) = payload {
                let (h, id) = (r.header, |a: IpAddr| a.to_canonical());
                found.push(Socket {
                    family: h.family,
                    state: h.state,
                    recv_queue: h.recv_queue,
                    send_queue: h.send_queue,
                    inode: h.inode,
                    local: (id(h.socket_id.source_address), h.socket_id.source_port),
                    peer: (id(h.socket_id.destination_address), h.socket_id.destination_port),
                    id: h.socket_id,
                });
            }
        })?;
    }
    Ok(found)
}

/// Destroys every TCP socket whose own address is `address`, listeners and TIME_WAIT included. What they would send goes
/// into the fence, which has to stand. Returns how many there were.
///
/// # Errors
/// All that went wrong; a socket that has gone by itself is no error.
pub fn destroy(address: Ipv4Addr) -> Result<usize> {
    let netlink = Netlink::open()?;
    let mut errors = Errors::default();
    let mut destroyed = 0;
    for socket in tcp()?.into_iter().filter(|s| s.local.0 == IpAddr::V4(address)) {
        let request = InetRequest {
            family: socket.family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::all(),
            socket_id: socket.id,
        };
        let destroy = SockDiagDestroy::new(SockDiagMessage::InetRequest(request));
        let message = NetlinkMessage::new(header(NLM_F_ACK), NetlinkPayload::InnerMessage(destroy));
        match netlink.ask(message, |_| {}) {
            Err(Error::Io { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => {}
            other => destroyed += usize::from(errors.keep(other).is_some()),
        }
    }
    errors.finish("destroying leftover sockets").map(|()| destroyed)
}

/// Takes every TCP socket of `tree` out of repair mode, where a CRIU that died left it. Leaving it resets SO_REUSEADDR
/// (kernel: tcp_repair off), so a connection gets back what its listener has.
///
/// # Errors
/// All that went wrong.
pub fn leave_repair(tree: &[u32]) -> Result<usize> {
    let mut errors = Errors::default();
    let mut left = 0;
    let all = tcp()?;
    let ports: HashMap<u64, u16> = all.iter().map(|s| (u64::from(s.inode), s.local.1)).collect();
    let listening: HashSet<u16> = all.iter().filter(|s| s.listens()).map(|s| s.local.1).collect();
    for_each_socket(tree, &mut errors, |inode, socket| {
        if repair_mode(socket.as_raw_fd()) != Some(1) {
            return Ok(());
        }
        set_tcp_repair(socket.as_raw_fd(), TCP_REPAIR_OFF_NO_WP)?;
        left += 1;
        if ports.get(&inode).is_some_and(|port| listening.contains(port)) {
            reuse_address(socket, true)?;
        }
        Ok(())
    });
    errors.finish("leaving repair mode").map(|()| left)
}

/// Sends a window probe on every connection of `tree` that has bytes not acknowledged, by turning repair mode on and off
/// (tcp_send_window_probe in net/ipv4/tcp_output.c). Acknowledgements that came while the fence stood are lost, and a
/// restored connection knows no round trip: it would wait a whole initial timeout (RFC 6298: 1 s) before it sends again.
/// The peer answers a probe with what it has.
///
/// The processes must not run: what they sent in between would count as sent.
///
/// # Errors
/// All that went wrong.
pub fn probe(tree: &[u32]) -> Result<usize> {
    let mut errors = Errors::default();
    let mut probed = 0;
    let waiting: HashSet<u64> =
        tcp()?.iter().filter(|s| s.connected() && s.send_queue > 0).map(|s| u64::from(s.inode)).collect();
    if waiting.is_empty() {
        return Ok(0);
    }
    for_each_socket(tree, &mut errors, |inode, socket| {
        if !waiting.contains(&inode) {
            return Ok(());
        }
        let reuse =
            sockopt::ReuseAddr.get(socket).map_err(Error::errno("reading SO_REUSEADDR of socket", inode))?;
        set_tcp_repair(socket.as_raw_fd(), TCP_REPAIR_ON)?;
        set_tcp_repair(socket.as_raw_fd(), TCP_REPAIR_OFF)?;
        probed += 1;
        reuse_address(socket, reuse)
    });
    errors.finish("probing connections").map(|()| probed)
}

/// Hands every socket of `tree` to `act`, once, with its inode.
fn for_each_socket(tree: &[u32], errors: &mut Errors, mut act: impl FnMut(u64, &OwnedFd) -> Result<()>) {
    // processes of a tree share sockets
    let mut seen = HashSet::new();
    for &pid in tree {
        let Ok(pidfd) = process::pidfd(pid) else { continue };
        let path = format!("/proc/{pid}/fd");
        let Some(entries) = errors.keep(std::fs::read_dir(&path).map_err(Error::io("listing", &path))) else {
            continue;
        };
        for entry in entries.flatten() {
            let Some(number) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
            let inode = std::fs::read_link(entry.path())
                .ok()
                .and_then(|l| l.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok());
            let Some(inode) = inode.filter(|i| seen.insert(*i)) else { continue };
            if let Some(socket) = errors.keep(process::borrow_fd(&pidfd, number)) {
                errors.keep(act(inode, &socket));
            }
        }
    }
}

fn reuse_address(socket: &OwnedFd, on: bool) -> Result<()> {
    sockopt::ReuseAddr
        .set(socket, &on)
        .map_err(Error::errno("setting SO_REUSEADDR of descriptor", socket.as_raw_fd()))
}

/// TCP_REPAIR of a socket; `None` if it has none.
fn repair_mode(fd: i32) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`, which has that size
    let r = unsafe {
        libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, (&raw mut value).cast(), &raw mut len)
    };
    (r == 0).then_some(value)
}

fn set_tcp_repair(fd: i32, value: libc::c_int) -> Result<()> {
    // SAFETY: the kernel reads the given size from `value`
    let r = unsafe {
        libc::setsockopt(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if r == 0 {
        Ok(())
    } else {
        Err(Error::io("setting TCP_REPAIR of", "a socket")(io::Error::last_os_error()))
    }
}

fn header(flags: u16) -> NetlinkHeader {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header
}

/// A sock_diag socket. Blocking: the kernel answers from the system call.
struct Netlink(mnl::Socket);

impl Netlink {
    fn open() -> Result<Self> {
        let failed = |e| Error::io("opening", "a sock_diag socket")(e);
        let socket = mnl::Socket::new(mnl::Bus::SockDiag).map_err(failed)?;
        crate::fence::close_on_exec(&socket).map_err(failed)?;
        Ok(Self(socket))
    }

    /// Sends `message` and hands every answer to `each` until the last.
    fn ask<I: NetlinkSerializable>(
        &self,
        mut message: NetlinkMessage<I>,
        mut each: impl FnMut(NetlinkPayload<SockDiagMessage>),
    ) -> Result<()> {
        let failed = |e| Error::io("asking", "sock_diag")(e);
        message.finalize();
        let mut request = vec![0; message.buffer_len()];
        message.serialize(&mut request);
        self.0.send(&request).map_err(failed)?;
        // a dump comes in pieces of up to 32 KiB
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let n = self.0.recv_raw(&mut buffer).map_err(failed)?;
            let mut rest = &buffer[..n];
            while !rest.is_empty() {
                let answer = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
                    .map_err(|e| Error::other(format!("sock_diag's answer cannot be understood: {e}")))?;
                let length = (answer.header.length as usize).next_multiple_of(4).clamp(16, rest.len());
                rest = &rest[length..];
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(e) => {
                        return e.code.map_or(Ok(()), |_| Err(failed(e.to_io())));
                    }
                    payload => each(payload),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn connections_and_accept_queues_are_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = listener.local_addr().unwrap();
        let client = TcpStream::connect(here).unwrap();
        let all = tcp().unwrap();
        let waiting = all.iter().find(|s| s.listens() && s.local.1 == here.port()).unwrap();
        assert_eq!(waiting.recv_queue, 1);
        let port = client.local_addr().unwrap().port();
        let ours = all.iter().find(|s| s.local.1 == port).unwrap();
        assert!(ours.connected());
        assert_eq!(ours.peer, (here.ip(), here.port()));
    }

    /// TcpExt's TCPWinProbe of this network namespace.
    fn probes_sent() -> u64 {
        let text = std::fs::read_to_string("/proc/net/netstat").unwrap();
        let mut lines = text.lines().filter_map(|l| l.strip_prefix("TcpExt: "));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let at = names.split(' ').position(|n| n == "TCPWinProbe").unwrap();
        values.split(' ').nth(at).unwrap().parse().unwrap()
    }

    #[test]
    fn connections_with_unacknowledged_bytes_are_probed_and_keep_their_options() {
        use std::io::Write as _;
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: turning repair mode on needs root");
            return;
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut full = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _idle = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        sockopt::ReuseAddr.set(&full, &true).unwrap();
        // nobody reads: the send queue fills until the peer's window is closed
        full.set_nonblocking(true).unwrap();
        while full.write(&[0; 65_536]).is_ok() {}

        let before = probes_sent();
        // of all sockets of this process only those with bytes under way are touched
        let probed = probe(&[std::process::id()]).unwrap();
        assert!(probed >= 1, "{probed}");
        assert!(probes_sent() - before >= 1);
        assert!(sockopt::ReuseAddr.get(&full).unwrap(), "SO_REUSEADDR is as it was");
        assert_eq!(repair_mode(full.as_raw_fd()), Some(0));
    }

    #[test]
    fn an_ipv6_socket_shows_its_ipv4_address() {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let _client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (_accepted, _) = listener.accept().unwrap();
        let all = tcp().unwrap();
        assert!(all.iter().any(|s| s.local == (IpAddr::V4(Ipv4Addr::LOCALHOST), port) && s.connected()));
    }
}
