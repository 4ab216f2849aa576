//! What the gateway asks of a network interface: index, state, size of frames, and that it shows tags where the program
//! looks for them.
//!
//! A NIC with `rx-vlan-offload` takes the 802.1Q tag out of the frame before the program runs: every frame would look
//! untagged. The offload is switched off at attach, and restored when the daemon ends, or, for a data path that outlives it,
//! when that is taken down. The same goes for what a veth's other end leaves undone ([`crate::veth`]).

use std::{ffi::CString, io, mem, os::fd::AsRawFd as _, os::fd::OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::{
    mac::Mac,
    veth::{Peer, peer_of},
};

/// linux/ethtool.h
const ETHTOOL_GFLAGS: u32 = 0x25;
/// linux/ethtool.h
const ETHTOOL_SFLAGS: u32 = 0x26;
/// linux/ethtool.h: the offload that hides tags.
const ETH_FLAG_RXVLAN: u32 = 1 << 8;
/// linux/ethtool.h: tags are put in by the driver.
const ETH_FLAG_TXVLAN: u32 = 1 << 7;
/// linux/ethtool.h: checksums are left to the driver.
const ETHTOOL_GTXCSUM: u32 = 0x16;
/// linux/ethtool.h
const ETHTOOL_STXCSUM: u32 = 0x17;
/// linux/ethtool.h
const ETHTOOL_GGRO: u32 = 0x2b;
/// linux/ethtool.h
const ETHTOOL_SGRO: u32 = 0x2c;

/// Errors of an interface, by name.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// It does not exist in this network namespace.
    #[error("there is no network interface `{0}` here: `ip link` shows those there are")]
    Missing(String),
    /// It could not be asked or told.
    #[error("interface {name}: {what}")]
    Ioctl {
        /// Which.
        name: String,
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Not Ethernet.
    #[error("interface {0} is not Ethernet")]
    NotEthernet(String),
    /// The driver keeps taking tags out of frames.
    #[error(
        "interface {0} hides VLAN tags from the program (rx-vlan-offload) and its driver does not let it be switched off; \
         try `ethtool -K {0} rxvlan off` or another driver"
    )]
    HidesTags(String),
    /// The other end of a veth leaves undone what nobody does for it.
    #[error(
        "interface {name}: its other end {peer} sends frames without checksums or tags, or does not take what is sent to it \
         (a program sees the frame alone), and could not be told otherwise: `ethtool -K {peer} tx off txvlan off gro on`"
    )]
    Peer {
        /// Which.
        name: String,
        /// The other end.
        peer: String,
        /// Why not.
        #[source]
        source: Box<LinkError>,
    },
}

/// What was changed at an interface for the data path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Changes(u64);

impl Changes {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// rx-vlan-offload was switched off.
    pub const RXVLAN: Self = Self(1);
    /// Promiscuous mode was switched on.
    pub const PROMISCUOUS: Self = Self(2);
    /// The program is attached in generic mode; ends with the program.
    pub const GENERIC: Self = Self(4);
    /// The other end of the veth computes checksums itself.
    pub const PEER_CHECKSUMS: Self = Self(8);
    /// The other end of the veth puts tags in itself.
    pub const PEER_TAGS: Self = Self(16);
    /// The other end of the veth has GRO, and so polls.
    pub const PEER_GRO: Self = Self(32);

    /// Both.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are among them.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Those that are not among `others`.
    #[must_use]
    const fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    /// As a word.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// From a word.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// A network interface.
#[derive(Debug)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    control: OwnedFd,
    /// What is undone when this goes.
    restore: Changes,
}

impl Link {
    /// The interface called `name`.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn open(name: &str) -> Result<Self, LinkError> {
        let ioctl = |source| LinkError::Ioctl { name: name.into(), what: "opening a control socket", source };
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || CString::new(name).is_err() {
            return Err(LinkError::Missing(name.into()));
        }
        let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|e| ioctl(e.into()))?;
        let mut link = Self { name: name.into(), index: 0, control, restore: Changes::NONE };
        let request = link.ioctl(libc::SIOCGIFINDEX, "reading its index", link.request())?;
        // SAFETY: SIOCGIFINDEX fills this member.
        link.index = unsafe { request.ifr_ifru.ifru_ifindex } as u32;
        let request = link.ioctl(libc::SIOCGIFHWADDR, "reading its address", link.request())?;
        // SAFETY: SIOCGIFHWADDR fills this member.
        if unsafe { request.ifr_ifru.ifru_hwaddr.sa_family } != libc::ARPHRD_ETHER {
            return Err(LinkError::NotEthernet(name.into()));
        }
        Ok(link)
    }

    /// Its MAC.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn mac(&self) -> Result<Mac, LinkError> {
        let request = self.ioctl(libc::SIOCGIFHWADDR, "reading its address", self.request())?;
        // SAFETY: SIOCGIFHWADDR fills this member.
        let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
        Ok(Mac([0, 1, 2, 3, 4, 5].map(|i| data[i] as u8)))
    }

    /// Whether it is up and has a carrier.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn is_running(&self) -> Result<bool, LinkError> {
        let flags = self.flags()?;
        let wanted = libc::IFF_UP | libc::IFF_RUNNING;
        Ok(flags & wanted == wanted)
    }

    /// The longest frame it takes, in octets, tags and checksum not counted.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn largest_frame(&self) -> Result<u64, LinkError> {
        let request = self.ioctl(libc::SIOCGIFMTU, "reading its MTU", self.request())?;
        // SAFETY: SIOCGIFMTU fills this member.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        Ok(u64::try_from(mtu).unwrap_or(0) + gateway_ebpf::frame::ETH_LEN as u64)
    }

    /// What has to be changed so that the program sees every frame, with its tag, and as it is to arrive.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn changes_needed(&self) -> Result<Changes, LinkError> {
        let mut changes = self.offloads_needed()?;
        if self.flags()? & libc::IFF_PROMISC == 0 {
            changes = changes.union(Changes::PROMISCUOUS);
        }
        Ok(changes)
    }

    /// Those of them that are matters of drivers.
    fn offloads_needed(&self) -> Result<Changes, LinkError> {
        let mut changes = Changes::NONE;
        let mut needs = |change, needed| {
            if needed {
                changes = changes.union(change);
            }
        };
        needs(Changes::RXVLAN, self.offload(ETHTOOL_GFLAGS)? & ETH_FLAG_RXVLAN != 0);
        if let Some(peer) = self.peer_here()? {
            needs(Changes::PEER_CHECKSUMS, peer.offload(ETHTOOL_GTXCSUM)? != 0);
            needs(Changes::PEER_TAGS, peer.offload(ETHTOOL_GFLAGS)? & ETH_FLAG_TXVLAN != 0);
            needs(Changes::PEER_GRO, peer.offload(ETHTOOL_GGRO)? == 0);
        }
        Ok(changes)
    }

    /// The other end of a veth, if it is in this network namespace.
    fn peer_here(&self) -> Result<Option<Self>, LinkError> {
        match self.peer()? {
            Some(Peer::Here(index)) => match nix::net::if_::if_indextoname(index) {
                Ok(name) => Self::open(&name.to_string_lossy()).map(Some),
                Err(_) => Ok(None),
            },
            _ => Ok(None),
        }
    }

    fn peer(&self) -> Result<Option<Peer>, LinkError> {
        peer_of(self.index).map_err(|source| LinkError::Ioctl {
            name: self.name.clone(),
            what: "asking whether it is a veth",
            source,
        })
    }

    /// What has to be seen to at this interface and cannot be from here.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn note(&self) -> Result<Option<String>, LinkError> {
        Ok(match self.peer()? {
            Some(Peer::Elsewhere(index)) => Some(format!(
                "its other end, interface {index} of another network namespace, has to compute checksums and put in tags \
                 itself, and to take frames by polling: `ethtool -K IFACE tx off txvlan off gro on` there"
            )),
            _ => None,
        })
    }

    /// Has the drivers do what the program needs, until this goes. Returns what had to be changed.
    ///
    /// # Errors
    /// [`LinkError::HidesTags`] or [`LinkError::Peer`] if a driver does not let it.
    pub fn adapt(&mut self) -> Result<Changes, LinkError> {
        let needed = self.offloads_needed()?;
        self.restore = self.restore.union(needed);
        if needed.contains(Changes::RXVLAN) {
            self.show_tags()?;
        }
        let of_peer = needed.without(Changes::RXVLAN);
        if of_peer != Changes::NONE
            && let Some(peer) = self.peer_here()?
            && let Err(source) = peer.serve_a_program(of_peer, true)
        {
            return Err(LinkError::Peer {
                name: self.name.clone(),
                peer: peer.name.clone(),
                source: Box::new(source),
            });
        }
        Ok(needed)
    }

    /// As the other end of a veth: computes checksums, puts in tags and polls (`on`), or leaves what of that is among `changes`
    /// as it was.
    fn serve_a_program(&self, changes: Changes, on: bool) -> Result<(), LinkError> {
        if changes.contains(Changes::PEER_CHECKSUMS) {
            self.ethtool(ETHTOOL_STXCSUM, u32::from(!on))?;
        }
        if changes.contains(Changes::PEER_TAGS) {
            let others = self.ethtool(ETHTOOL_GFLAGS, 0)? & !ETH_FLAG_TXVLAN;
            self.ethtool(ETHTOOL_SFLAGS, others | if on { 0 } else { ETH_FLAG_TXVLAN })?;
        }
        if changes.contains(Changes::PEER_GRO) {
            self.ethtool(ETHTOOL_SGRO, u32::from(on))?;
        }
        Ok(())
    }

    /// What `adapt` did, and taking frames for any address, beyond the end of this process: [`Link::undo`] ends it.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn change_for_good(&mut self) -> Result<(), LinkError> {
        let adapted = self.adapt();
        self.restore = Changes::NONE;
        adapted?;
        self.set_promiscuous(true)
    }

    /// Undoes changes at the interface that has (or had) the index `ifindex`.
    ///
    /// # Errors
    /// [`LinkError`]; an interface that is gone needs nothing undone.
    pub fn undo(ifindex: u32, changes: Changes) -> Result<(), LinkError> {
        let Ok(name) = nix::net::if_::if_indextoname(ifindex) else { return Ok(()) };
        let link = Self::open(&name.to_string_lossy())?;
        if changes.contains(Changes::PROMISCUOUS) {
            link.set_promiscuous(false)?;
        }
        link.restore(changes)
    }

    /// Has the drivers do as before.
    fn restore(&self, changes: Changes) -> Result<(), LinkError> {
        if changes.contains(Changes::RXVLAN) {
            let flags = self.ethtool(ETHTOOL_GFLAGS, 0)?;
            self.ethtool(ETHTOOL_SFLAGS, flags | ETH_FLAG_RXVLAN)?;
        }
        match self.peer_here()? {
            Some(peer) => peer.serve_a_program(changes, false),
            None => Ok(()),
        }
    }

    fn flags(&self) -> Result<i32, LinkError> {
        let request = self.ioctl(libc::SIOCGIFFLAGS, "reading its state", self.request())?;
        // SAFETY: SIOCGIFFLAGS fills this member.
        Ok(i32::from(unsafe { request.ifr_ifru.ifru_flags }))
    }

    fn set_promiscuous(&self, on: bool) -> Result<(), LinkError> {
        let flags = self.flags()?;
        let wanted = if on { flags | libc::IFF_PROMISC } else { flags & !libc::IFF_PROMISC };
        if wanted == flags {
            return Ok(());
        }
        let mut request = self.request();
        request.ifr_ifru.ifru_flags = wanted as libc::c_short;
        self.ioctl(libc::SIOCSIFFLAGS, "switching promiscuous mode (needs CAP_NET_ADMIN)", request)?;
        Ok(())
    }

    /// Makes tags visible to the program.
    fn show_tags(&self) -> Result<(), LinkError> {
        let flags = self.ethtool(ETHTOOL_GFLAGS, 0)?;
        // what counts is what it does afterwards
        let told = self.ethtool(ETHTOOL_SFLAGS, flags & !ETH_FLAG_RXVLAN);
        if self.ethtool(ETHTOOL_GFLAGS, 0)? & ETH_FLAG_RXVLAN != 0 {
            return Err(match told {
                Err(e) => e,
                Ok(_) => LinkError::HidesTags(self.name.clone()),
            });
        }
        Ok(())
    }

    /// Asks about an offload; a driver that knows nothing of it does nothing of it.
    fn offload(&self, question: u32) -> Result<u32, LinkError> {
        match self.ethtool(question, 0) {
            Err(LinkError::Ioctl { source, .. }) if source.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(0),
            other => other,
        }
    }

    fn ethtool(&self, command: u32, data: u32) -> Result<u32, LinkError> {
        /// linux/ethtool.h: struct ethtool_value
        #[repr(C)]
        struct Value {
            command: u32,
            data: u32,
        }
        let mut value = Value { command, data };
        let mut request = self.request();
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        self.ioctl(libc::SIOCETHTOOL, "reading or changing its offloads (needs CAP_NET_ADMIN)", request)?;
        Ok(value.data)
    }

    fn request(&self) -> libc::ifreq {
        // SAFETY: integers and pointers only; all zero is a value.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.bytes()) {
            *to = from as libc::c_char;
        }
        request
    }

    fn ioctl(
        &self,
        number: libc::Ioctl,
        what: &'static str,
        mut request: libc::ifreq,
    ) -> Result<libc::ifreq, LinkError> {
        // SAFETY: these requests take a `struct ifreq`; where it points to data, the caller keeps that alive.
        if unsafe { libc::ioctl(self.control.as_raw_fd(), number, &raw mut request) } == 0 {
            return Ok(request);
        }
        let source = io::Error::last_os_error();
        Err(match source.raw_os_error() {
            Some(libc::ENODEV) => LinkError::Missing(self.name.clone()),
            _ => LinkError::Ioctl { name: self.name.clone(), what, source },
        })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.restore != Changes::NONE
            && let Err(error) = self.restore(self.restore)
        {
            tracing::warn!(interface = self.name, %error, "its offloads could not be restored");
        }
    }
}

/// An interface takes frames for any address while this lives: a NIC would drop frames for the virtual router (access) and
/// for the users (WAN). The kernel ends it with the socket, however the daemon ends.
#[derive(Debug)]
pub struct Promiscuous {
    _socket: OwnedFd,
}

impl Promiscuous {
    /// Switches it on for `link`.
    ///
    /// # Errors
    /// [`LinkError::Ioctl`]; EPERM without CAP_NET_RAW.
    pub fn on(link: &Link) -> Result<Self, LinkError> {
        let failed = |source| LinkError::Ioctl {
            name: link.name.clone(),
            what: "taking frames for any address (promiscuous; needs CAP_NET_RAW)",
            source,
        };
        // protocol 0: the socket is given no frames
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|e| failed(e.into()))?;
        let request = libc::packet_mreq {
            mr_ifindex: link.index as libc::c_int,
            mr_type: libc::PACKET_MR_PROMISC as libc::c_ushort,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        // SAFETY: the option takes a packet_mreq, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_ADD_MEMBERSHIP,
                (&raw const request).cast(),
                size_of_val(&request) as libc::socklen_t,
            )
        };
        if result != 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(Self { _socket: socket })
    }
}
