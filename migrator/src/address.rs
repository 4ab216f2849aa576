//! v on this server: the /32 on the service's interface, the blackhole route that stands in for it, and the
//! gratuitous ARP that tells the neighbours.
//!
//! The blackhole is there before v goes and goes after everything else, so that what still arrives for v is neither
//! forwarded nor answered. All calls succeed when the state asked for is there already.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use netlink_packet_route::{
    address::{AddressAttribute, AddressMessage},
    link::LinkAttribute,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
};
use rtnetlink::{Handle, RouteMessageBuilder};
use tokio_stream::StreamExt as _;

use crate::error::{Error, Result};

/// v as it stands on an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Present {
    /// Name of the interface.
    pub interface: String,
    /// Length of the prefix; 32 is what can be moved.
    pub prefix: u8,
}

/// Addresses and routes of this network namespace.
#[derive(Clone)]
pub struct Addresses {
    /// For changes and questions about one thing.
    handle: Handle,
}

/// A routing socket for one dump: the kernel lets a socket have one under way (EBUSY, netlink_dump_start in
/// net/netlink/af_netlink.c), and one that was given up stays under way until it has been read.
fn socket() -> Result<Handle> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(Error::io("opening", "a routing socket"))?;
    tokio::spawn(connection);
    Ok(handle)
}

impl Addresses {
    /// Opens a routing socket. Has to be called within a tokio runtime.
    ///
    /// # Errors
    /// Of the socket.
    pub fn open() -> Result<Self> {
        Ok(Self { handle: socket()? })
    }

    async fn link(&self, interface: &str) -> Result<(u32, Option<[u8; 6]>)> {
        let mut links = self.handle.link().get().match_name(interface.to_owned()).execute();
        let link = links
            .next()
            .await
            .ok_or_else(|| Error::other(format!("there is no interface {interface}")))?
            .map_err(Error::netlink("looking for interface", interface))?;
        let mac = link.attributes.iter().find_map(|a| match a {
            LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok(),
            _ => None,
        });
        Ok((link.header.index, mac))
    }

    /// That `interface` exists.
    ///
    /// # Errors
    /// It does not.
    pub async fn check_interface(&self, interface: &str) -> Result<()> {
        self.link(interface).await.map(|_| ())
    }

    async fn messages(&self, address: Ipv4Addr) -> Result<Vec<AddressMessage>> {
        let socket = socket()?; // lives as long as the answer is read
        let mut all = socket.address().get().set_address_filter(IpAddr::V4(address)).execute();
        let mut found = Vec::new();
        while let Some(message) = all.next().await {
            found.push(message.map_err(Error::netlink("looking for address", address))?);
        }
        Ok(found)
    }

    /// Where `address` stands on this server.
    ///
    /// # Errors
    /// Of netlink.
    pub async fn find(&self, address: Ipv4Addr) -> Result<Option<Present>> {
        let Some(message) = self.messages(address).await?.into_iter().next() else { return Ok(None) };
        let index = message.header.index;
        let mut links = self.handle.link().get().match_index(index).execute();
        let name = links.next().await.and_then(std::result::Result::ok).and_then(|l| {
            l.attributes.into_iter().find_map(|a| match a {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            })
        });
        let interface = name.unwrap_or_else(|| format!("interface {index}"));
        Ok(Some(Present { interface, prefix: message.header.prefix_len }))
    }

    /// Adds `address`/32 to `interface`.
    ///
    /// # Errors
    /// No such interface, or not allowed.
    pub async fn add(&self, interface: &str, address: Ipv4Addr) -> Result<()> {
        let (index, _) = self.link(interface).await?;
        let added = self.handle.address().add(index, IpAddr::V4(address), 32).execute().await;
        unless(libc::EEXIST, added)
            .map_err(Error::netlink("adding address", format_args!("{address} to {interface}")))
    }

    /// Removes `address` wherever it stands.
    ///
    /// # Errors
    /// Not allowed.
    pub async fn remove(&self, address: Ipv4Addr) -> Result<()> {
        for message in self.messages(address).await? {
            if message.attributes.contains(&AddressAttribute::Local(IpAddr::V4(address))) {
                let removed = self.handle.address().del(message).execute().await;
                unless(libc::EADDRNOTAVAIL, removed).map_err(Error::netlink("removing address", address))?;
            }
        }
        Ok(())
    }

    /// Sets the blackhole route for `address`.
    ///
    /// # Errors
    /// Not allowed.
    pub async fn blackhole(&self, address: Ipv4Addr) -> Result<()> {
        let added = self.handle.route().add(blackhole(address)).execute().await;
        unless(libc::EEXIST, added).map_err(Error::netlink("adding blackhole route", address))
    }

    /// Removes the blackhole route for `address`.
    ///
    /// # Errors
    /// Not allowed.
    pub async fn remove_blackhole(&self, address: Ipv4Addr) -> Result<()> {
        let removed = self.handle.route().del(blackhole(address)).execute().await;
        unless(libc::ESRCH, removed).map_err(Error::netlink("removing blackhole route", address))
    }

    /// Whether there is a blackhole route for `address`.
    ///
    /// # Errors
    /// Of netlink.
    pub async fn has_blackhole(&self, address: Ipv4Addr) -> Result<bool> {
        let socket = socket()?;
        let mut routes = socket.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        while let Some(route) = routes.next().await {
            let route = route.map_err(Error::netlink("looking for blackhole route", address))?;
            let destination = RouteAttribute::Destination(RouteAddress::Inet(address));
            if route.header.kind == RouteType::BlackHole && route.attributes.contains(&destination) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Announces `address` on `interface`: a gratuitous ARP request and reply (some neighbours heed only one of them).
    ///
    /// # Errors
    /// The interface has no MAC address, or the frames cannot be sent.
    pub async fn announce(&self, interface: &str, address: Ipv4Addr) -> Result<()> {
        let (index, mac) = self.link(interface).await?;
        let mac = mac.ok_or_else(|| Error::other(format!("interface {interface} has no MAC address")))?;
        let failed = |e| Error::io("announcing", format_args!("{address} on {interface}"))(e);
        let socket = packet_socket().map_err(failed)?;
        for operation in [ARP_REQUEST, ARP_REPLY] {
            send_frame(&socket, index, &gratuitous_arp(mac, address, operation)).map_err(failed)?;
        }
        crate::fence::close_aside(socket);
        Ok(())
    }
}

fn blackhole(address: Ipv4Addr) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(address, 32)
        .kind(RouteType::BlackHole)
        .protocol(RouteProtocol::Static)
        .scope(RouteScope::Universe)
        .build()
}

/// An error with this errno means that what was asked for is so already.
fn unless(
    errno: i32,
    result: std::result::Result<(), rtnetlink::Error>,
) -> std::result::Result<(), rtnetlink::Error> {
    match result {
        Err(rtnetlink::Error::NetlinkError(e)) if e.to_io().raw_os_error() == Some(errno) => Ok(()),
        other => other,
    }
}

const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const ETH_P_ARP: u16 = 0x0806;

/// An Ethernet frame with an ARP announcement (RFC 5227, section 1.1): sender and target address are `address`.
fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr, operation: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend(ETH_P_ARP.to_be_bytes());
    frame.extend(1u16.to_be_bytes()); // Ethernet
    frame.extend(0x0800u16.to_be_bytes()); // IPv4
    frame.extend([6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend(if operation == ARP_REQUEST { [0; 6] } else { mac });
    frame.extend(address.octets());
    frame
}

fn packet_socket() -> io::Result<OwnedFd> {
    // protocol 0: it only sends
    // SAFETY: socket(2) takes three integers and returns a new descriptor or -1
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor, nobody else owns it
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn send_frame(socket: &OwnedFd, interface: u32, frame: &[u8]) -> io::Result<()> {
    // SAFETY: all zeroes is a valid sockaddr_ll
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = ETH_P_ARP.to_be();
    to.sll_ifindex = interface.cast_signed();
    to.sll_halen = 6;
    to.sll_addr[..6].copy_from_slice(&[0xff; 6]);
    // SAFETY: frame and address are valid for the lengths given
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel lets one socket have one dump under way (EBUSY, netlink_dump_start).
    #[tokio::test]
    async fn looks_do_not_get_in_each_others_way() {
        let addresses = Addresses::open().unwrap();
        let v = Ipv4Addr::new(203, 0, 113, 10);
        let looks: Vec<_> = (0..64)
            .map(|_| {
                let addresses = addresses.clone();
                tokio::spawn(async move {
                    let here = addresses.find(Ipv4Addr::LOCALHOST).await;
                    (addresses.has_blackhole(v).await, here)
                })
            })
            .collect();
        for look in looks {
            let (blackhole, here) = look.await.unwrap();
            let lo = Present { interface: "lo".into(), prefix: 8 };
            assert_eq!((blackhole.unwrap(), here.unwrap()), (false, Some(lo)));
        }
    }

    #[test]
    fn an_announcement_says_that_v_is_at_this_mac() {
        let mac = [2, 0, 0, 0, 0, 9];
        let v = Ipv4Addr::new(203, 0, 113, 10);
        let request = gratuitous_arp(mac, v, ARP_REQUEST);
        assert_eq!(request.len(), 42);
        assert_eq!(request[..14], [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 9, 8, 6]);
        assert_eq!(request[20..22], [0, 1]);
        assert_eq!((&request[22..28], &request[28..32]), (&mac[..], &v.octets()[..]));
        assert_eq!((&request[32..38], &request[38..42]), (&[0u8; 6][..], &v.octets()[..]));
        assert_eq!(gratuitous_arp(mac, v, ARP_REPLY)[32..38], mac);
    }
}
