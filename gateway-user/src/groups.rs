//! Broadcast and multicast from the provider, given to exactly the users who are on that network.
//!
//! The access side is one segment with users of several networks, so a group frame cannot be let through as it is. The `wan`
//! program hands it to this host; here each user of the network gets a copy of its own, addressed to the user's MAC (or, where
//! the user has an interface or a tag to itself, to the group), in which the router's MAC is the virtual one, in the Ethernet
//! header and in the options of IPv6 neighbour discovery. (DHCP answers by broadcast, router advertisements, service
//! announcements: a few a second. ARP is none of it: the program has its own rules for that.)
//!
//! Bounded: [`COPIES_PER_SECOND`], with bursts of [`BURST`]; what is beyond that is counted and dropped. While no daemon runs,
//! group frames are not delivered; unicast is.

use std::{
    collections::HashMap,
    io,
    net::Ipv6Addr,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Instant,
};

use gateway_ebpf::frame::{ETH_LEN, ETHERTYPE_IPV6, TAG_LEN, TPID_8021AD, TPID_8021Q};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send, socket};
use tokio::io::unix::AsyncFd;

use crate::{
    introduce::{Hears, Stripped, bind_to, listening_socket, receive_frame, tag_of},
    link::Link,
    mac::Mac,
    neighbour,
};

/// Copies at most, on average.
pub const COPIES_PER_SECOND: u32 = 20_000;
/// Copies at most, at once.
pub const BURST: u32 = 4096;
/// Room for the longest frame there can be.
const LONGEST: usize = 1 << 16;

/// A group frame without its network's tag.
#[derive(Debug, PartialEq, Eq)]
pub struct Group<'a> {
    /// What tells the network it came from ([`gateway_ebpf::words::vid_index`]); 0: untagged.
    pub tag: u16,
    /// Where its EtherType is, behind a customer's tag if there is one.
    pub ethertype: usize,
    /// The frame.
    pub frame: &'a mut [u8],
}

impl Group<'_> {
    /// Puts the virtual MAC in the place of the router's. Answers whether the users are to have the frame: what a router
    /// says of its own IPv6 address they need not know.
    pub fn translate(&mut self, hearers: &Hearers, virtual_mac: Mac) -> bool {
        if self.frame[self.ethertype..self.ethertype + 2] == ETHERTYPE_IPV6.to_be_bytes() {
            let packet = &mut self.frame[self.ethertype + 2..];
            if hearers.address6.is_some() && neighbour::target(packet) == hearers.address6 {
                return false;
            }
            if let Some(router) = hearers.router {
                neighbour::translate(packet, router, virtual_mac);
            }
        }
        if hearers.router.is_some_and(|router| self.frame[6..12] == router.0) {
            self.frame[6..12].copy_from_slice(&virtual_mac.0);
        }
        true
    }
}

/// Who is to get group frames of a network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hearers {
    /// The router's MAC, if known.
    pub router: Option<Mac>,
    /// The router's IPv6 address, if it has one.
    pub address6: Option<Ipv6Addr>,
    /// The users.
    pub users: Vec<Hearer>,
}

/// A user who hears a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hearer {
    /// MAC; `None`: the user is all there is on the port, under the tag.
    pub mac: Option<Mac>,
    /// Port of the access interface.
    pub port: u16,
    /// VID of the access side's tag.
    pub tag: Option<u16>,
}

impl Hearer {
    /// The copy of `frame` for this user, in `room`.
    pub fn copy<'a>(&self, frame: &[u8], room: &'a mut Vec<u8>) -> &'a [u8] {
        room.clear();
        let mac = self.mac.map_or([0; 6], |mac| mac.0);
        room.extend(if self.mac.is_some() { &mac } else { &frame[..6] });
        room.extend(&frame[6..12]);
        if let Some(tag) = self.tag {
            room.extend(TPID_8021Q.to_be_bytes());
            room.extend(tag.to_be_bytes());
        }
        room.extend(&frame[12..]);
        room
    }
}

/// By port of the WAN interface and what tells the network's frames (0: untagged).
pub type HearersByNetwork = HashMap<(u16, u16), Hearers>;

/// A socket that hears group frames on a WAN interface.
pub struct Groups {
    wan: AsyncFd<OwnedFd>,
}

/// A socket that sends on an access interface.
pub struct Copies {
    access: OwnedFd,
}

impl Copies {
    /// Opens the socket.
    ///
    /// # Errors
    /// The kernel's; EPERM without CAP_NET_RAW.
    pub fn open(access: &Link) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let out = socket(AddressFamily::Packet, SockType::Raw, flags, None::<SockProtocol>)?;
        bind_to(&out, access, 0)?;
        Ok(Self { access: out })
    }

    /// Sends to a user, without waiting.
    ///
    /// # Errors
    /// The kernel's: no room, or too long for the interface.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        send(self.access.as_raw_fd(), frame, MsgFlags::empty())?;
        Ok(())
    }
}

impl Groups {
    /// Opens the socket.
    ///
    /// # Errors
    /// The kernel's; EPERM without CAP_NET_RAW.
    pub fn open(wan: &Link) -> io::Result<Self> {
        Ok(Self { wan: listening_socket(wan, Hears::Others)? })
    }

    /// Hears group frames for ever.
    ///
    /// # Errors
    /// The socket's: the interface is gone.
    pub async fn listen(&self, mut heard: impl FnMut(Group<'_>)) -> io::Result<()> {
        let mut frame = vec![0; LONGEST];
        loop {
            let mut ready = self.wan.readable().await?;
            match ready.try_io(|socket| receive_frame(socket.get_ref(), &mut frame)) {
                Ok(Ok((len, stripped))) => {
                    if let Some(group) = parse(&mut frame[..len], stripped) {
                        heard(group);
                    }
                }
                Err(_would_block) => {}
                // the interface went down; it may come up again
                Ok(Err(e)) if e.raw_os_error() == Some(libc::ENETDOWN) => {}
                Ok(Err(e)) => return Err(e),
            }
        }
    }
}

/// A group frame, its network's tag taken out if it is still in it.
fn parse(frame: &mut [u8], stripped: Option<Stripped>) -> Option<Group<'_>> {
    let (tag, mut ethertype) = tag_of(frame, stripped)?;
    frame.get(ethertype + 1)?;
    // never forwarded, see `frame::is_link_local`
    let link_local = frame[..5] == [0x01, 0x80, 0xc2, 0, 0] && frame[5] < 16;
    if frame[0] & 1 == 0 || link_local {
        return None;
    }
    let outer = [frame[ETH_LEN - 2], frame[ETH_LEN - 1]];
    let mut frame = frame;
    if stripped.is_none() && [TPID_8021Q.to_be_bytes(), TPID_8021AD.to_be_bytes()].contains(&outer) {
        frame.copy_within(..ETH_LEN - 2, TAG_LEN);
        frame = &mut frame[TAG_LEN..];
        ethertype -= TAG_LEN;
    }
    Some(Group { tag, ethertype, frame })
}

/// How many copies may still be sent.
#[derive(Debug)]
pub struct Budget {
    tokens: f64,
    at: Instant,
}

impl Budget {
    /// A full one.
    pub fn new(now: Instant) -> Self {
        Self { tokens: BURST.into(), at: now }
    }

    /// Takes up to `wanted`; answers with how many.
    pub fn take(&mut self, wanted: usize, now: Instant) -> usize {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * f64::from(COPIES_PER_SECOND);
        self.tokens = (self.tokens + earned).min(BURST.into());
        self.at = now;
        let granted = wanted.min(self.tokens as usize);
        self.tokens -= granted as f64;
        granted
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends there")]

    use std::time::Duration;

    use super::*;

    #[test]
    fn a_group_frame_is_heard_wherever_its_tag_is() {
        let plain = [&[0xff; 6][..], &[2, 0, 0, 0, 0x0a, 1], &[8, 0], b"payload"].concat();
        let mut tagged = plain.clone();
        tagged.splice(12..12, [0x81, 0, 0xa0, 2]);
        let mut service = plain.clone();
        service.splice(12..12, [0x88, 0xa8, 0xa0, 2]);
        let mut inner = plain.clone();
        inner.splice(12..12, [0x81, 0, 0, 9]);
        let mut both = inner.clone();
        both.splice(12..12, [0x88, 0xa8, 0xa0, 2]);
        let out = |service| Some(Stripped { service, tci: 0xa002 });
        for (mut frame, stripped, tag, ethertype, untagged) in [
            (tagged, None, 2, 12, &plain),
            (plain.clone(), out(false), 2, 12, &plain),
            (plain.clone(), None, 0, 12, &plain),
            (service, None, 4098, 12, &plain),
            (plain.clone(), out(true), 4098, 12, &plain),
            (both, None, 4098, 16, &inner),
            (inner.clone(), out(true), 4098, 16, &inner),
        ] {
            let group = parse(&mut frame, stripped).unwrap();
            assert_eq!((group.tag, group.ethertype, &*group.frame), (tag, ethertype, &untagged[..]));
        }
        let hearer = Hearer { mac: Some(Mac([2; 6])), port: 1, tag: Some(7) };
        let copy = hearer.copy(&plain, &mut Vec::new()).to_vec();
        assert_eq!(copy, [&[2; 6], &plain[6..12], &[0x81, 0, 0, 7], &plain[12..]].concat());
        let hearer = Hearer { mac: None, port: 1, tag: None };
        assert_eq!(hearer.copy(&plain, &mut Vec::new()), plain, "all of the interface is the user's");
        let mut unicast = plain.clone();
        unicast[0] = 2;
        assert_eq!(parse(&mut unicast, None), None);
        let mut lldp = plain;
        lldp[..6].copy_from_slice(&[1, 0x80, 0xc2, 0, 0, 0x0e]);
        assert_eq!(parse(&mut lldp, None), None);
        for len in 0..17 {
            let mut short = [0xff; 17];
            short[12..14].copy_from_slice(&[0x81, 0]);
            assert!(parse(&mut short[..len], None).is_none(), "{len}");
        }
    }

    #[test]
    fn copies_are_bounded() {
        let now = Instant::now();
        let mut budget = Budget::new(now);
        assert_eq!(budget.take(10, now), 10);
        assert_eq!(budget.take(1_000_000, now), BURST as usize - 10);
        assert_eq!(budget.take(1, now), 0);
        assert_eq!(budget.take(1_000, now + Duration::from_millis(10)), COPIES_PER_SECOND as usize / 100);
        assert_eq!(budget.take(1_000_000, now + Duration::from_secs(60)), BURST as usize);
    }
}
