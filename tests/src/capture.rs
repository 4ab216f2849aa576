//! What went over a wire: frames taken by a packet socket, with the 802.1Q tag as it came.
//!
//! The kernel takes the outermost tag out of a frame before taps see it and hands it over beside it (`PACKET_AUXDATA`).

use std::{
    io::IoSliceMut,
    net::Ipv4Addr,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::Host;

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];

/// Frames of one sender to one address, by tag, in the order they came.
#[derive(Debug)]
pub struct Capture {
    seen: Arc<(Mutex<Seen>, Condvar)>,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

/// A run of frames with the same tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The 802.1Q VID; none: untagged.
    pub vid: Option<u16>,
    /// How many frames in a row.
    pub frames: u64,
}

#[derive(Debug, Default)]
struct Seen {
    runs: Vec<Run>,
    frames: u64,
}

impl Capture {
    /// Starts to take the frames that `interface` of `host` receives from MAC address `from` to IPv4 address `to`.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn start(host: &Host, interface: &str, from: [u8; 6], to: Ipv4Addr) -> anyhow::Result<Self> {
        let socket = host
            .enter(|| open(interface))?
            .with_context(|| format!("capturing on {interface} of {}", host.name()))?;
        let (watched, stop) = std::io::pipe()?;
        let seen = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
        let into = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            loop {
                let mut fds = [
                    PollFd::new(socket.as_fd(), PollFlags::POLLIN),
                    PollFd::new(watched.as_fd(), PollFlags::POLLIN),
                ];
                match poll(&mut fds, PollTimeout::NONE) {
                    Err(Errno::EINTR) => continue,
                    Err(_) => return,
                    Ok(_) => {}
                }
                let [frame, stopped] = fds.map(|f| f.any().unwrap_or(true));
                if stopped {
                    return;
                }
                if frame {
                    take(&socket, from, to, &into);
                }
            }
        });
        Ok(Self { seen, stop: stop.into(), thread: Some(thread) })
    }

    /// The tags so far, runs of the same one taken together.
    #[must_use]
    pub fn runs(&self) -> Vec<Run> {
        self.seen.0.lock().unwrap_or_else(PoisonError::into_inner).runs.clone()
    }

    /// How many frames so far.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.seen.0.lock().unwrap_or_else(PoisonError::into_inner).frames
    }

    /// Waits until there are more than `frames` frames; the tag of the last.
    ///
    /// # Errors
    /// If there are not within `limit`.
    pub fn tag_after(&self, frames: u64, limit: Duration) -> anyhow::Result<Option<u16>> {
        let deadline = Instant::now() + limit;
        let mut seen = self.seen.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if seen.frames > frames
                && let Some(run) = seen.runs.last()
            {
                return Ok(run.vid);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no frame of the user to the service within {limit:?}");
            seen = self.seen.1.wait_timeout(seen, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = nix::unistd::write(&self.stop, b"x");
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A packet socket for everything `interface` receives, tags told apart.
fn open(interface: &str) -> anyhow::Result<OwnedFd> {
    let index = if_nametoindex(interface).with_context(|| format!("interface {interface}"))?;
    // SAFETY: makes a descriptor; its owner is taken at once.
    let socket = unsafe {
        // protocol 0: nothing comes in before the bind below says where from
        let fd = Errno::result(libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        ))?;
        OwnedFd::from_raw_fd(fd)
    };
    let on: libc::c_int = 1;
    let large: libc::c_int = 8 << 20;
    for (level, option, value) in [
        (libc::SOL_PACKET, libc::PACKET_AUXDATA, on),
        (libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, on),
        (libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, large),
    ] {
        // SAFETY: the option's value is an int that outlives the call.
        Errno::result(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                u32::try_from(size_of_val(&value))?,
            )
        })?;
    }
    // SAFETY: an all-zero sockaddr_ll is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET)?;
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL)?.to_be();
    address.sll_ifindex = i32::try_from(index)?;
    // SAFETY: the address is a sockaddr_ll of the length given.
    Errno::result(unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), u32::try_from(size_of_val(&address))?)
    })?;
    Ok(socket)
}

/// Takes in what has come.
fn take(socket: &OwnedFd, from: [u8; 6], to: Ipv4Addr, seen: &(Mutex<Seen>, Condvar)) {
    // headers are enough: Ethernet 14, IPv4 20
    let mut frame = [0_u8; 34];
    while let Ok((length, vid)) = receive(socket, &mut frame) {
        let wanted = length == frame.len()
            && frame[6..12] == from
            && frame[12..14] == ETHERTYPE_IPV4
            && frame[30..34] == to.octets();
        if !wanted {
            continue;
        }
        let mut state = seen.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.frames += 1;
        match state.runs.last_mut() {
            Some(run) if run.vid == vid => run.frames += 1,
            _ => state.runs.push(Run { vid, frames: 1 }),
        }
        seen.1.notify_all();
    }
}

/// One frame's beginning, and its tag's VID.
fn receive(socket: &OwnedFd, frame: &mut [u8]) -> nix::Result<(usize, Option<u16>)> {
    let mut part = IoSliceMut::new(frame);
    let mut control = [0_u64; 16];
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = (&raw mut part).cast(); // IoSliceMut is an iovec, by its documentation
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the message points to buffers that outlive the call, with their lengths.
    let length = Errno::result(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) })?;
    let mut vid = None;
    // SAFETY: the kernel has filled the control buffer, which the CMSG functions walk within its length; the packet
    // socket's auxiliary data is a tpacket_auxdata, read unaligned.
    unsafe {
        let mut c = libc::CMSG_FIRSTHDR(&raw const message);
        while !c.is_null() {
            if (*c).cmsg_level == libc::SOL_PACKET && (*c).cmsg_type == libc::PACKET_AUXDATA {
                let data: libc::tpacket_auxdata =
                    libc::CMSG_DATA(c).cast::<libc::tpacket_auxdata>().read_unaligned();
                if data.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                    vid = Some(data.tp_vlan_tci & 0x0fff);
                }
            }
            c = libc::CMSG_NXTHDR(&raw const message, c);
        }
    }
    Ok((length.cast_unsigned(), vid))
}
