//! Broadcast and multicast from the provider, given to exactly the users who are on that network.
//!
//! The access side is one segment with users of several networks, so a group frame cannot be let through as it is. The `wan`
//! program hands it to this host; here each user of the network gets a copy of its own, addressed to the user's MAC, in which
//! the router's MAC is the virtual one. (DHCP answers by broadcast, router and service announcements: a few a second. ARP is
//! none of it: the program has its own rules for that.)
//!
//! Bounded: [`COPIES_PER_SECOND`], with bursts of [`BURST`]; what is beyond that is counted and dropped. While no daemon runs,
//! group frames are not delivered; unicast is.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Instant,
};

use gateway_ebpf::frame::{ETH_LEN, TAG_LEN, TPID_8021Q, vid as vid_of};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send, socket};
use tokio::io::unix::AsyncFd;

use crate::{
    introduce::{Hears, bind_to, listening_socket, receive_frame},
    link::Link,
    mac::Mac,
};

/// Copies at most, on average.
pub const COPIES_PER_SECOND: u32 = 20_000;
/// Copies at most, at once.
pub const BURST: u32 = 4096;
/// Room for the longest frame there can be.
const LONGEST: usize = 1 << 16;

/// A group frame without its tag.
#[derive(Debug, PartialEq, Eq)]
pub struct Group<'a> {
    /// VID of the network it came from; 0: untagged.
    pub vid: u16,
    /// The frame.
    pub frame: &'a mut [u8],
}

/// Who is to get group frames of a network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hearers {
    /// The router's MAC, if known.
    pub router: Option<Mac>,
    /// The users'.
    pub users: Vec<Mac>,
}

/// By VID (0: untagged).
pub type HearersByVid = HashMap<u16, Hearers>;

/// A socket that hears group frames on the WAN side, and one that sends on the access side.
pub struct Groups {
    wan: AsyncFd<OwnedFd>,
    access: OwnedFd,
}

impl Groups {
    /// Opens the sockets.
    ///
    /// # Errors
    /// The kernel's; EPERM without CAP_NET_RAW.
    pub fn open(access: &Link, wan: &Link) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let out = socket(AddressFamily::Packet, SockType::Raw, flags, None::<SockProtocol>)?;
        bind_to(&out, access, 0)?;
        Ok(Self { wan: listening_socket(wan, Hears::Others)?, access: out })
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

    /// Sends to the users, without waiting.
    ///
    /// # Errors
    /// The kernel's: no room, or too long for the interface.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        send(self.access.as_raw_fd(), frame, MsgFlags::empty())?;
        Ok(())
    }
}

/// A group frame, its tag taken out if it is still in it.
fn parse(frame: &mut [u8], stripped: Option<u16>) -> Option<Group<'_>> {
    let be16 = |frame: &[u8], at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    let outer = be16(frame, ETH_LEN - 2)?;
    // never forwarded, see `frame::is_link_local`
    let link_local = frame[..5] == [0x01, 0x80, 0xc2, 0, 0] && frame[5] < 16;
    if frame[0] & 1 == 0 || link_local {
        return None;
    }
    if stripped.is_none() && outer == TPID_8021Q {
        let tci = be16(frame, ETH_LEN)?;
        frame.get(ETH_LEN + TAG_LEN - 1)?;
        frame.copy_within(..ETH_LEN - 2, TAG_LEN);
        return Some(Group { vid: vid_of(tci), frame: &mut frame[TAG_LEN..] });
    }
    Some(Group { vid: stripped.map_or(0, vid_of), frame })
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
        for (mut frame, stripped, vid) in
            [(tagged, None, 2), (plain.clone(), Some(0xa002), 2), (plain.clone(), None, 0)]
        {
            let group = parse(&mut frame, stripped).unwrap();
            assert_eq!((group.vid, &*group.frame), (vid, &plain[..]));
        }
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
