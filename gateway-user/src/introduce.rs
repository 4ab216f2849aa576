//! Asks "who has r" as users, and hears the routers.
//!
//! The router of the new network and the provider's MAC tables have never seen the user there. An ARP request with the
//! user's addresses, tagged for that network, fills both; the answer teaches the router's MAC. The `wan` program hands
//! everything a router says in ARP about its own address to this host (and to no user), where a packet socket finds it.
//!
//! Failures: a silent router is an answer ([`Introduced::router`] is `None`) after [`PATIENCE`]; an interface that is down
//! is an error of the socket.

use std::{
    collections::HashSet,
    io::{self, IoSliceMut},
    mem,
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use gateway_ebpf::frame::{
    ARP_LEN, ARP_REPLY, ARP_REQUEST, ETH_LEN, ETHERTYPE_ARP, TAG_LEN, TPID_8021Q, vid as vid_of,
};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg,
        send, socket,
    },
};
use tokio::{
    io::unix::AsyncFd,
    sync::mpsc,
    time::{Instant, interval, timeout_at},
};

use crate::{link::Link, mac::Mac};

/// How long to wait for answers after each round of questions; those who got none are asked for again.
const ROUNDS: [Duration; 3] =
    [Duration::from_millis(150), Duration::from_millis(300), Duration::from_millis(550)];
/// How long a router may be silent in all.
pub const PATIENCE: Duration = Duration::from_millis(1000);
/// Questions at once, each [`PACE`]: about 32,000 a second.
const BURST: usize = 64;
/// See [`BURST`].
const PACE: Duration = Duration::from_millis(2);
/// Shortest Ethernet frame without its checksum (IEEE 802.3).
const SHORTEST: usize = 60;

/// What a router said about its own address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// VID of the network; 0: untagged.
    pub vid: u16,
    /// The router's address.
    pub address: Ipv4Addr,
    /// The router's MAC.
    pub router: Mac,
    /// To whom it said it.
    pub to: Mac,
}

/// What came of an introduction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Introduced {
    /// The router's MAC, if it answered at all.
    pub router: Option<Mac>,
    /// For how many it did not answer.
    pub unanswered: usize,
}

struct Waiter {
    id: u64,
    vid: u16,
    address: Ipv4Addr,
    heard: mpsc::UnboundedSender<Heard>,
}

#[derive(Default)]
struct Waiters {
    next: u64,
    all: Vec<Waiter>,
}

/// The packet socket on the WAN interface.
pub struct Introducer {
    socket: AsyncFd<OwnedFd>,
    waiters: Mutex<Waiters>,
}

/// Removes its waiter when dropped, however the introduction ends.
struct Waiting<'a> {
    introducer: &'a Introducer,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.introducer.waiters().all.retain(|w| w.id != self.id);
    }
}

impl Introducer {
    /// Opens the socket.
    ///
    /// # Errors
    /// The kernel's; EPERM without CAP_NET_RAW.
    pub fn open(wan: &Link) -> io::Result<Self> {
        let socket = listening_socket(wan, Hears::Arp)?;
        Ok(Self { socket, waiters: Mutex::default() })
    }

    fn waiters(&self) -> std::sync::MutexGuard<'_, Waiters> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears routers for ever; `learn` is told first, then who waits for an answer.
    ///
    /// # Errors
    /// The socket's: the interface is gone.
    pub async fn listen(&self, mut learn: impl FnMut(Heard)) -> io::Result<()> {
        loop {
            let mut ready = self.socket.readable().await?;
            match ready.try_io(|socket| receive(socket.get_ref())) {
                Ok(Ok(Some(heard))) => {
                    learn(heard);
                    for waiter in &self.waiters().all {
                        if (waiter.vid, waiter.address) == (heard.vid, heard.address) {
                            // a waiter that has just given up is no error
                            let _ = waiter.heard.send(heard);
                        }
                    }
                }
                Ok(Ok(None)) | Err(_) => {}
                // the interface went down; it may come up again
                Ok(Err(e)) if e.raw_os_error() == Some(libc::ENETDOWN) => {
                    tracing::warn!("the WAN interface is down");
                }
                Ok(Err(e)) => return Err(e),
            }
        }
    }

    /// Asks for the router at `address` in the network with `vid` (0: untagged), as each of `users`. Returns when it has
    /// answered all of them, or after [`PATIENCE`].
    ///
    /// # Errors
    /// The socket's.
    pub async fn introduce(
        &self,
        vid: u16,
        address: Ipv4Addr,
        users: &[(Mac, Ipv4Addr)],
    ) -> io::Result<Introduced> {
        let (sender, mut answers) = mpsc::unbounded_channel();
        let waiting = {
            let mut waiters = self.waiters();
            let id = waiters.next;
            waiters.next += 1;
            waiters.all.push(Waiter { id, vid, address, heard: sender });
            Waiting { introducer: self, id }
        };
        let mut router = None;
        let mut unanswered: HashSet<Mac> = users.iter().map(|(mac, _)| *mac).collect();
        for patience in ROUNDS {
            let mut pace = interval(PACE);
            for chunk in users.chunks(BURST) {
                pace.tick().await;
                for (mac, ip) in chunk.iter().filter(|(mac, _)| unanswered.contains(mac)) {
                    self.send(&who_has(*mac, *ip, address, vid)).await?;
                }
            }
            let until = Instant::now() + patience;
            while !unanswered.is_empty() {
                let Ok(Some(heard)) = timeout_at(until, answers.recv()).await else { break };
                router = Some(heard.router);
                unanswered.remove(&heard.to);
            }
            if unanswered.is_empty() {
                break;
            }
        }
        drop(waiting);
        Ok(Introduced { router, unanswered: unanswered.len() })
    }

    async fn send(&self, frame: &[u8]) -> io::Result<()> {
        loop {
            let mut ready = self.socket.writable().await?;
            match ready.try_io(|socket| Ok(send(socket.get_ref().as_raw_fd(), frame, MsgFlags::empty())?)) {
                Ok(result) => return result.map(|_| ()),
                Err(_would_block) => {}
            }
        }
    }
}

/// What a packet socket is given; the kernel tells, so that a flood of one does not displace the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hears {
    /// ARP.
    Arp,
    /// All else.
    Others,
}

/// A socket that hears what `link` gives to this host, tags included.
pub(crate) fn listening_socket(link: &Link, hears: Hears) -> io::Result<AsyncFd<OwnedFd>> {
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        // nothing before it is bound to the one interface
        None::<SockProtocol>,
    )?;
    let on: libc::c_int = 1;
    for option in [libc::PACKET_AUXDATA, libc::PACKET_IGNORE_OUTGOING] {
        // SAFETY: both options take an int, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                option,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        Errno::result(result)?;
    }
    let (arp, others) = if hears == Hears::Arp { (u32::MAX, 0) } else { (0, u32::MAX) };
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let mut filter = [
        step(load, 0, 0, (ETH_LEN - 2) as u32),
        step(equal, 3, 0, ETHERTYPE_ARP.into()),
        step(equal, 0, 3, TPID_8021Q.into()),
        step(load, 0, 0, (ETH_LEN + TAG_LEN - 2) as u32),
        step(equal, 0, 1, ETHERTYPE_ARP.into()),
        step(answer, 0, 0, arp),
        step(answer, 0, 0, others),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the option takes a sock_fprog, which outlives the call, as does what it points to.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    Errno::result(result)?;
    // all protocols: a tagged frame is given to no socket that asks for one
    bind_to(&socket, link, libc::ETH_P_ALL as u16)?;
    // SAFETY: the OwnedFd moves into the AsyncFd, which keeps it open, the same, until it is dropped.
    let socket = unsafe { AsyncFd::register(socket) }?;
    Ok(socket)
}

/// Binds a packet socket to `link`; it is given frames of `protocol` (0: none).
pub(crate) fn bind_to(socket: &OwnedFd, link: &Link, protocol: u16) -> io::Result<()> {
    // SAFETY: integers only; all zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = link.index as i32;
    // SAFETY: the address outlives the call and its length is given.
    let result = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
    };
    Errno::result(result)?;
    Ok(())
}

/// One frame from the socket, if it is a router speaking of itself.
fn receive(socket: &OwnedFd) -> io::Result<Option<Heard>> {
    let mut frame = [0; 128];
    let (len, stripped) = receive_frame(socket, &mut frame)?;
    Ok(parse(&frame[..len], stripped))
}

/// One frame from the socket, at most as much as fits, and the TCI of a tag that is no longer in it.
pub(crate) fn receive_frame(socket: &OwnedFd, frame: &mut [u8]) -> io::Result<(usize, Option<u16>)> {
    let room = frame.len();
    let mut control = nix::cmsg_space!(libc::tpacket_auxdata);
    let mut parts = [IoSliceMut::new(frame)];
    let message = recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
    let mut stripped = None;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::Unknown(part) = part
            && (part.cmsg_header.cmsg_level, part.cmsg_header.cmsg_type)
                == (libc::SOL_PACKET, libc::PACKET_AUXDATA)
        {
            stripped = stripped_tag(&part.data_bytes);
        }
    }
    Ok((message.bytes.min(room), stripped))
}

/// The TCI of the 802.1Q tag that the kernel has moved out of the frame (packet(7), PACKET_AUXDATA).
fn stripped_tag(auxdata: &[u8]) -> Option<u16> {
    const STATUS: usize = mem::offset_of!(libc::tpacket_auxdata, tp_status);
    const TCI: usize = mem::offset_of!(libc::tpacket_auxdata, tp_vlan_tci);
    let status = u32::from_ne_bytes(auxdata.get(STATUS..STATUS + 4)?.try_into().ok()?);
    let tci = u16::from_ne_bytes(auxdata.get(TCI..TCI + 2)?.try_into().ok()?);
    (status & libc::TP_STATUS_VLAN_VALID != 0).then_some(tci)
}

/// An ARP request for `router` by `mac` with `ip` (unspecified: by nobody, RFC 5227), in the network with `vid`.
pub fn who_has(mac: Mac, ip: Ipv4Addr, router: Ipv4Addr, vid: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(SHORTEST + TAG_LEN);
    frame.extend([0xff; 6]);
    frame.extend(mac.0);
    if vid != 0 {
        frame.extend(TPID_8021Q.to_be_bytes());
        frame.extend(vid.to_be_bytes());
    }
    frame.extend(ETHERTYPE_ARP.to_be_bytes());
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(ARP_REQUEST.to_be_bytes());
    frame.extend(mac.0);
    frame.extend(ip.octets());
    frame.extend([0; 6]);
    frame.extend(router.octets());
    let shortest = if vid == 0 { SHORTEST } else { SHORTEST + TAG_LEN };
    frame.resize(frame.len().max(shortest), 0);
    frame
}

/// A router speaking of its own address: an answer, or an announcement. `stripped`: the TCI of a tag that is no longer in
/// the frame.
fn parse(frame: &[u8], stripped: Option<u16>) -> Option<Heard> {
    let be16 = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    let (vid, ethertype) = match (stripped, be16(ETH_LEN - 2)?) {
        (None, TPID_8021Q) => (vid_of(be16(ETH_LEN)?), ETH_LEN + 2),
        (stripped, _) => (stripped.map_or(0, vid_of), ETH_LEN - 2),
    };
    if be16(ethertype)? != ETHERTYPE_ARP {
        return None;
    }
    let arp = frame.get(ethertype + 2..ethertype + 2 + ARP_LEN)?;
    let mac = |at: usize| Some(Mac(arp.get(at..at + 6)?.try_into().ok()?));
    let ip = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(arp.get(at..at + 4)?).ok()?));
    if arp.get(..6)? != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    let op = u16::from_be_bytes([arp[6], arp[7]]);
    let (router, address, target) = (mac(8)?.unicast().ok()?, ip(14)?, ip(24)?);
    let about_itself = op == ARP_REPLY || op == ARP_REQUEST && address == target;
    about_itself.then_some(Heard { vid, address, router, to: mac(18)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARO: Mac = Mac([2, 0, 0, 0, 1, 1]);
    const ROUTER: Mac = Mac([2, 0, 0, 0, 0x0a, 1]);
    const R: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
    const TARO_IP: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 100);

    /// The router's answer to `who_has`, which swaps the roles in it.
    fn answer(vid: u16) -> Vec<u8> {
        let mut frame = who_has(ROUTER, R, TARO_IP, vid);
        let arp = frame.len() - 60 + ETH_LEN;
        frame[arp + 7] = 2;
        frame[arp + 18..arp + 24].copy_from_slice(&TARO.0);
        frame
    }

    const HEARD: Heard = Heard { vid: 2, address: R, router: ROUTER, to: TARO };

    #[test]
    fn a_question_is_a_whole_frame() {
        let tagged = who_has(TARO, TARO_IP, R, 2);
        assert_eq!(tagged.len(), 64);
        assert_eq!(tagged[12..18], [0x81, 0, 0, 2, 8, 6]);
        let untagged = who_has(TARO, TARO_IP, R, 0);
        assert_eq!(untagged.len(), 60);
        assert_eq!(untagged[12..14], [8, 6]);
        assert_eq!(tagged[16..], untagged[12..]);
        assert_eq!(untagged[28..32], TARO_IP.octets());
        assert_eq!(untagged[38..42], R.octets());
    }

    #[test]
    fn an_answer_is_heard_wherever_its_tag_is() {
        assert_eq!(parse(&answer(2), None), Some(HEARD));
        assert_eq!(parse(&answer(0), Some(0xe002)), Some(HEARD), "PCP and DEI do not matter");
        assert_eq!(parse(&answer(0), None), Some(Heard { vid: 0, ..HEARD }));
    }

    #[test]
    fn an_announcement_is_heard_and_a_question_is_not() {
        let question = who_has(ROUTER, R, TARO_IP, 2);
        assert_eq!(parse(&question, None), None);
        let announcement = who_has(ROUTER, R, R, 2);
        assert_eq!(parse(&announcement, None).map(|h| h.router), Some(ROUTER));
    }

    #[test]
    fn other_bytes_are_nothing() {
        let whole = answer(2);
        for len in 0..ETH_LEN + TAG_LEN + ARP_LEN {
            assert_eq!(parse(&whole[..len], None), None, "{len}");
        }
        for (at, byte) in [(16, 0x86), (18, 9), (20, 0x86), (22, 8), (26, 0x01)] {
            let mut other = whole.clone();
            other[at] = byte;
            assert_eq!(parse(&other, None), None, "{at}");
        }
    }

    #[test]
    fn the_kernels_word_on_the_tag_is_read() {
        let mut auxdata = [0_u8; size_of::<libc::tpacket_auxdata>()];
        assert_eq!(stripped_tag(&auxdata), None);
        auxdata[..4].copy_from_slice(&libc::TP_STATUS_VLAN_VALID.to_ne_bytes());
        auxdata[16..18].copy_from_slice(&7_u16.to_ne_bytes());
        assert_eq!(stripped_tag(&auxdata), Some(7));
        assert_eq!(stripped_tag(&auxdata[..10]), None);
    }
}
