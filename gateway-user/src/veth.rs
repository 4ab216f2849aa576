//! A veth's other end: what it leaves to a driver that has none.
//!
//! Frames that a host sends into a veth come out of the other end as the host's stack left them. With checksum offload that is
//! without a checksum, with txvlan without their tag; a stack at the other end is told so, beside the frame, but an XDP program
//! sees the frame alone, and what it redirects goes on without what was told. So the other end has to do both itself. And a
//! frame redirected into a veth is delivered only if the other end polls: with GRO, or with an XDP program of its own.
//!
//! An end in this network namespace is told so (and told otherwise when the data path is taken down); one in another cannot be
//! reached from here, and what has to be said there is shown.

use std::{io, os::fd::AsRawFd as _};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// Room for what the kernel says of one interface.
const ANSWER_MAX: usize = 1 << 15;

/// The other end of a veth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// In this network namespace: its interface index.
    Here(u32),
    /// In another: its interface index there.
    Elsewhere(u32),
}

/// The other end of the interface with this index, if that is a veth.
///
/// # Errors
/// The kernel's.
pub fn peer_of(ifindex: u32) -> io::Result<Option<Peer>> {
    let bad = |e: &dyn std::fmt::Display| io::Error::new(io::ErrorKind::InvalidData, e.to_string());
    let netlink =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    let mut wanted = LinkMessage::default();
    wanted.header.index = ifindex;
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(wanted));
    request.header.flags = NLM_F_REQUEST;
    request.finalize();
    let mut octets = vec![0; request.buffer_len()];
    request.serialize(&mut octets);
    send(netlink.as_raw_fd(), &octets, MsgFlags::empty())?;
    let mut octets = vec![0; ANSWER_MAX];
    let len = recv(netlink.as_raw_fd(), &mut octets, MsgFlags::empty())?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&octets[..len]).map_err(|e| bad(&e))?;
    let attributes = match answer.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => link.attributes,
        NetlinkPayload::Error(error) => return Err(error.to_io()),
        _ => return Err(bad(&"an answer to another question")),
    };
    let (mut is_veth, mut peer, mut elsewhere) = (false, None, false);
    for attribute in attributes {
        match attribute {
            LinkAttribute::LinkInfo(infos) => {
                is_veth |= infos.contains(&LinkInfo::Kind(InfoKind::Veth));
            }
            LinkAttribute::Link(index) => peer = Some(index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            _ => {}
        }
    }
    Ok(peer
        .filter(|_| is_veth)
        .map(|index| if elsewhere { Peer::Elsewhere(index) } else { Peer::Here(index) }))
}
