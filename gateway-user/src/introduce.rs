//! Asks "who has r" as users, and hears the routers.
//!
//! The router of the new network and the provider's MAC tables have never seen the user there. An ARP request with the
//! user's addresses, tagged for that network, fills both; the answer teaches the router's MAC. Where the router has an IPv6
//! address, a neighbour solicitation does the same: as each user who has one, too, and alone where there is no IPv4. The `wan`
//! program hands everything a router says of its own addresses to this host (and to no user), where a packet socket finds it.
//!
//! A user who is not known by a MAC is not introduced: the first frame does that.
//!
//! Failures: a silent router is an answer ([`Introduced::router`] is `None`) after [`PATIENCE`]; an interface that is down
//! is an error of the socket.

use std::{
    collections::HashSet,
    io::{self, IoSliceMut},
    mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use gateway_ebpf::{
    frame::{
        ARP_LEN, ARP_REPLY, ARP_REQUEST, ETH_LEN, ETHERTYPE_ARP, ETHERTYPE_IPV6, ICMPV6, IPV6_LEN,
        ND_ADVERTISEMENT, ND_HOP_LIMIT, ND_SOLICITATION, ND_SOURCE_LINK, NEIGHBOUR_LEN, TAG_LEN, TPID_8021AD,
        TPID_8021Q, VID_MAX, vid as vid_of,
    },
    words::vid_index,
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

use crate::{link::Link, mac::Mac, neighbour};

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

/// Where to ask: a network, and its router's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Port of the WAN interface.
    pub port: u16,
    /// What tells its frames ([`vid_index`]); 0: untagged.
    pub tag: u16,
    /// The router's IPv4 address.
    pub address: Option<Ipv4Addr>,
    /// The router's IPv6 address.
    pub address6: Option<Ipv6Addr>,
}

/// As whom to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asker {
    /// MAC; `None`: not known, the gateway asks for itself.
    pub mac: Option<Mac>,
    /// IPv4 address; `None`: as nobody (RFC 5227).
    pub v4: Option<Ipv4Addr>,
    /// IPv6 address; `None`: the link-local one of the MAC.
    pub v6: Option<Ipv6Addr>,
}

/// What a router said about its own address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// What tells the network's frames ([`vid_index`]); 0: untagged.
    pub tag: u16,
    /// The router's address.
    pub address: IpAddr,
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
    place: Place,
    heard: mpsc::UnboundedSender<Heard>,
}

#[derive(Default)]
struct Waiters {
    next: u64,
    all: Vec<Waiter>,
}

/// The packet socket on a WAN interface.
pub struct Introducer {
    socket: AsyncFd<OwnedFd>,
    /// The interface's own MAC.
    mac: Mac,
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
    pub fn open(wan: &Link, mac: Mac) -> io::Result<Self> {
        let socket = listening_socket(wan, Hears::Routers)?;
        Ok(Self { socket, mac, waiters: Mutex::default() })
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
                        let own =
                            [waiter.place.address.map(IpAddr::from), waiter.place.address6.map(IpAddr::from)];
                        if waiter.place.tag == heard.tag && own.contains(&Some(heard.address)) {
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

    /// Asks for the router at `place`, as each of `users`. Returns when it has answered all of them, or after [`PATIENCE`].
    ///
    /// # Errors
    /// The socket's.
    pub async fn introduce(&self, place: Place, users: &[Asker]) -> io::Result<Introduced> {
        let (sender, mut answers) = mpsc::unbounded_channel();
        let waiting = {
            let mut waiters = self.waiters();
            let id = waiters.next;
            waiters.next += 1;
            waiters.all.push(Waiter { id, place, heard: sender });
            Waiting { introducer: self, id }
        };
        // those without a MAC are asked for once, by the gateway itself
        let mut askers: Vec<(Mac, Asker)> = users.iter().filter_map(|u| Some((u.mac?, *u))).collect();
        if askers.len() < users.len() {
            askers.push((self.mac, Asker { mac: Some(self.mac), v4: None, v6: None }));
        }
        let mut router = None;
        let mut unanswered: HashSet<Mac> = askers.iter().map(|(mac, _)| *mac).collect();
        for patience in ROUNDS {
            askers.retain(|(mac, _)| unanswered.contains(mac));
            let mut pace = interval(PACE);
            for chunk in askers.chunks(BURST) {
                pace.tick().await;
                for (mac, asker) in chunk {
                    for question in questions(place, *mac, *asker) {
                        self.send(&question).await?;
                    }
                }
                // of a million users, not a million answers at once
                while let Ok(heard) = answers.try_recv() {
                    router = Some(heard.router);
                    unanswered.remove(&heard.to);
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
    /// ARP, and advertisements of IPv6 neighbours: what routers say of themselves.
    Routers,
    /// All but ARP.
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
    let mut filter = filter(hears);
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

/// Classic BPF that takes what is to be heard. Of an untagged, singly or doubly tagged frame it finds the EtherType, and of
/// IPv6 next header and ICMPv6 type; the tag may be out of the frame, too.
fn filter(hears: Hears) -> Vec<libc::sock_filter> {
    const TAKE: u32 = u32::MAX;
    let step = |code: u32, jt: usize, jf: usize, k: u32| libc::sock_filter {
        code: code as u16,
        jt: jt as u8,
        jf: jf as u8,
        k,
    };
    let half = |at: usize| step(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, 0, at as u32);
    let octet = |at: usize| step(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, at as u32);
    let equal = |k: u32, jt, jf| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, jt, jf, k);
    let answer = |k| step(libc::BPF_RET | libc::BPF_K, 0, 0, k);
    let (arp, advertisement, other) = match hears {
        Hears::Routers => (TAKE, TAKE, 0),
        Hears::Others => (0, TAKE, TAKE),
    };
    let mut filter = Vec::new();
    for tags in 0..=2 {
        let ethertype = ETH_LEN - 2 + tags * TAG_LEN;
        let l3 = ethertype + 2;
        // with a tag here, on behind this block of twelve
        let further = if tags < 2 { 10 } else { 8 };
        filter.extend([
            half(ethertype),
            equal(TPID_8021Q.into(), further, 0),
            equal(TPID_8021AD.into(), further - 1, 0),
            equal(ETHERTYPE_ARP.into(), 5, 0),
            equal(ETHERTYPE_IPV6.into(), 0, 5),
            octet(l3 + 6),
            equal(ICMPV6.into(), 0, 3),
            octet(l3 + IPV6_LEN),
            equal(ND_ADVERTISEMENT.into(), 2, 1),
            answer(arp),
            answer(other),
            answer(advertisement),
        ]);
    }
    // a load beyond the end of the frame ends a filter with 0: such a frame is neither
    filter
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

/// One frame from the socket, at most as much as fits, and the tag that is no longer in it.
pub(crate) fn receive_frame(socket: &OwnedFd, frame: &mut [u8]) -> io::Result<(usize, Option<Stripped>)> {
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

/// The outer tag of a frame, out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stripped {
    /// An 802.1ad service tag.
    pub service: bool,
    /// Its TCI.
    pub tci: u16,
}

/// The tag that the kernel has moved out of the frame (packet(7), PACKET_AUXDATA).
fn stripped_tag(auxdata: &[u8]) -> Option<Stripped> {
    const STATUS: usize = mem::offset_of!(libc::tpacket_auxdata, tp_status);
    const TCI: usize = mem::offset_of!(libc::tpacket_auxdata, tp_vlan_tci);
    // libc calls it padding: tp_vlan_tpid of linux/if_packet.h
    const TPID: usize = TCI + 2;
    let half = |at: usize| Some(u16::from_ne_bytes(auxdata.get(at..at + 2)?.try_into().ok()?));
    let status = u32::from_ne_bytes(auxdata.get(STATUS..STATUS + 4)?.try_into().ok()?);
    let (tci, tpid) = (half(TCI)?, half(TPID)?);
    let known = status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
    (status & libc::TP_STATUS_VLAN_VALID != 0)
        .then_some(Stripped { service: known && tpid == TPID_8021AD, tci })
}

/// What to ask as `mac`.
fn questions(place: Place, mac: Mac, asker: Asker) -> impl Iterator<Item = Vec<u8>> {
    let arp = place
        .address
        .map(|router| who_has(mac, asker.v4.unwrap_or(Ipv4Addr::UNSPECIFIED), router, place.tag));
    let nd = place
        .address6
        .filter(|_| place.address.is_none() || asker.v6.is_some())
        .map(|router| solicitation(mac, asker.v6.unwrap_or(mac.link_local()), router, place.tag));
    arp.into_iter().chain(nd)
}

/// Destination, source, and the tag of a network.
fn header(to: [u8; 6], from: Mac, tag: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(128);
    frame.extend(to);
    frame.extend(from.0);
    if tag != 0 {
        let service = u32::from(tag) >= vid_index(true, 0);
        let tpid = if service { TPID_8021AD } else { TPID_8021Q };
        frame.extend(tpid.to_be_bytes());
        frame.extend(vid_of(tag).to_be_bytes());
    }
    frame
}

/// An ARP request for `router` by `mac` with `ip` (unspecified: by nobody, RFC 5227), in the network with `tag`.
pub fn who_has(mac: Mac, ip: Ipv4Addr, router: Ipv4Addr, tag: u16) -> Vec<u8> {
    let mut frame = header([0xff; 6], mac, tag);
    frame.extend(ETHERTYPE_ARP.to_be_bytes());
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(ARP_REQUEST.to_be_bytes());
    frame.extend(mac.0);
    frame.extend(ip.octets());
    frame.extend([0; 6]);
    frame.extend(router.octets());
    let shortest = if tag == 0 { SHORTEST } else { SHORTEST + TAG_LEN };
    frame.resize(frame.len().max(shortest), 0);
    frame
}

/// A neighbour solicitation for `router` by `mac` with `ip`, in the network with `tag` (RFC 4861, 4.3).
pub fn solicitation(mac: Mac, ip: Ipv6Addr, router: Ipv6Addr, tag: u16) -> Vec<u8> {
    let [.., x, y, z] = router.octets();
    let to = Ipv6Addr::from_octets([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, x, y, z]);
    let mut frame = header([0x33, 0x33, 0xff, x, y, z], mac, tag);
    let link = [[ND_SOURCE_LINK, 1].as_slice(), &mac.0].concat();
    let payload = (NEIGHBOUR_LEN + link.len()) as u16;
    frame.extend(ETHERTYPE_IPV6.to_be_bytes());
    let ip_at = frame.len();
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(payload.to_be_bytes());
    frame.extend([ICMPV6, ND_HOP_LIMIT]);
    frame.extend(ip.octets());
    frame.extend(to.octets());
    frame.extend([ND_SOLICITATION, 0, 0, 0, 0, 0, 0, 0]);
    frame.extend(router.octets());
    frame.extend(link);
    neighbour::set_checksum(&mut frame[ip_at..]);
    frame
}

/// A router speaking of its own address: an answer, or an announcement. `stripped`: the TCI of a tag that is no longer in
/// the frame.
fn parse(frame: &[u8], stripped: Option<Stripped>) -> Option<Heard> {
    let (tag, ethertype) = tag_of(frame, stripped)?;
    let payload = frame.get(ethertype + 2..)?;
    match be16(frame, ethertype)? {
        ETHERTYPE_ARP => parse_arp(payload, tag),
        ETHERTYPE_IPV6 => {
            let told = neighbour::advertisement(payload)?;
            let mac = |at: usize| Some(Mac(frame.get(at..at + 6)?.try_into().ok()?));
            let router = told.link.or_else(|| mac(6))?.unicast().ok()?;
            Some(Heard { tag, address: told.target.into(), router, to: mac(0)? })
        }
        _ => None,
    }
}

fn parse_arp(payload: &[u8], tag: u16) -> Option<Heard> {
    let arp = payload.get(..ARP_LEN)?;
    let mac = |at: usize| Some(Mac(arp.get(at..at + 6)?.try_into().ok()?));
    let ip = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(arp.get(at..at + 4)?).ok()?));
    if arp.get(..6)? != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    let op = u16::from_be_bytes([arp[6], arp[7]]);
    let (router, address, target) = (mac(8)?.unicast().ok()?, ip(14)?, ip(24)?);
    let about_itself = op == ARP_REPLY || op == ARP_REQUEST && address == target;
    about_itself.then_some(Heard { tag, address: address.into(), router, to: mac(18)? })
}

fn be16(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?))
}

/// What tells the network of a frame from the WAN ([`vid_index`]), and where the EtherType behind its tags is.
pub(crate) fn tag_of(frame: &[u8], stripped: Option<Stripped>) -> Option<(u16, usize)> {
    let mut ethertype = ETH_LEN - 2;
    let (service, tci) = match (stripped, be16(frame, ethertype)?) {
        (Some(Stripped { service, tci }), _) => (service, tci),
        (None, tpid @ (TPID_8021Q | TPID_8021AD)) => {
            ethertype += TAG_LEN;
            (tpid == TPID_8021AD, be16(frame, ethertype - 2)?)
        }
        (None, _) => return Some((0, ethertype)),
    };
    if vid_of(tci) > VID_MAX {
        return None;
    }
    if service && be16(frame, ethertype)? == TPID_8021Q {
        ethertype += TAG_LEN;
    }
    Some((vid_index(service, vid_of(tci)) as u16, ethertype))
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

    const HEARD: Heard = Heard { tag: 2, address: IpAddr::V4(R), router: ROUTER, to: TARO };

    const fn tag(tci: u16) -> Option<Stripped> {
        Some(Stripped { service: false, tci })
    }

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
        assert_eq!(parse(&answer(0), tag(0xe002)), Some(HEARD), "PCP and DEI do not matter");
        let service = Heard { tag: 4096 + 2, ..HEARD };
        assert_eq!(parse(&answer(4096 + 2), None), Some(service));
        assert_eq!(parse(&answer(0), Some(Stripped { service: true, tci: 2 })), Some(service));
        let mut inner = answer(4096 + 2);
        inner.splice(16..16, [0x81, 0, 0, 9]);
        assert_eq!(parse(&inner, None), Some(service), "behind a customer's tag");
        assert_eq!(parse(&answer(0), None), Some(Heard { tag: 0, ..HEARD }));
    }

    #[test]
    fn an_ipv6_router_is_asked_and_heard() {
        const R6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
        let asked = solicitation(TARO, TARO.link_local(), R6, 2);
        assert_eq!(asked[..6], [0x33, 0x33, 0xff, 0, 0, 1]);
        assert_eq!(asked[12..20], [0x81, 0, 0, 2, 0x86, 0xdd, 0x60, 0]);
        assert_eq!(asked.len(), 18 + 40 + 32);
        assert_eq!(parse(&asked, None), None, "a question");
        // the answer, of which only the type, the target and the link-layer address matter
        let mut told = asked;
        told[..12].copy_from_slice(&[TARO.0, ROUTER.0].concat());
        told[58] = 136;
        told[58 + 24] = 2;
        told[58 + 26..58 + 32].copy_from_slice(&ROUTER.0);
        let heard = Heard { address: R6.into(), ..HEARD };
        assert_eq!(parse(&told, None), Some(heard));
        told[58 + 25] = 0;
        assert_eq!(parse(&told, None), None, "an option without length");
    }

    #[test]
    fn who_is_asked_as_whom_depends_on_what_both_have() {
        let ask = |v4: bool, v6: bool, has4: bool, has6: bool| {
            let place = Place {
                port: 0,
                tag: 0,
                address: v4.then_some(R),
                address6: v6.then_some(Ipv6Addr::LOCALHOST),
            };
            let (v4, v6) = (has4.then_some(TARO_IP), has6.then_some(Ipv6Addr::LOCALHOST));
            let asked = questions(place, TARO, Asker { mac: Some(TARO), v4, v6 });
            asked.map(|frame| u16::from_be_bytes([frame[12], frame[13]])).collect::<Vec<_>>()
        };
        assert_eq!(ask(true, false, true, false), [0x0806]);
        assert_eq!(ask(true, true, true, false), [0x0806]);
        assert_eq!(ask(true, true, true, true), [0x0806, 0x86dd]);
        assert_eq!(ask(false, true, false, false), [0x86dd], "as its link-local address");
        assert_eq!(ask(true, false, false, true), [0x0806], "as nobody");
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
        assert_eq!(stripped_tag(&auxdata), tag(7));
        auxdata[..4]
            .copy_from_slice(&(libc::TP_STATUS_VLAN_VALID | libc::TP_STATUS_VLAN_TPID_VALID).to_ne_bytes());
        auxdata[18..20].copy_from_slice(&0x88a8_u16.to_ne_bytes());
        assert_eq!(stripped_tag(&auxdata), Some(Stripped { service: true, tci: 7 }));
        assert_eq!(stripped_tag(&auxdata[..10]), None);
    }
}
