//! Offloads of an interface, by the ethtool ioctl.
//!
//! A frame that meets an XDP program has to be as it would be on the wire: its checksum in it (transmit checksums off at
//! the sender), its tag in it (transmit VLAN off at a veth's peer), no larger than the MTU (segmentation off). A veth
//! that frames are redirected into delivers them only if its peer receives through NAPI (GRO on).

use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::Host;

const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_STSO: u32 = 0x1f;
const ETHTOOL_SGSO: u32 = 0x24;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_SFLAGS: u32 = 0x26;
const ETHTOOL_SGRO: u32 = 0x2c;
const ETH_FLAG_TXVLAN: u32 = 1 << 7;

#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Makes what `interface` of `host` sends leave as it would on a wire, and what is redirected to it arrive.
///
/// # Errors
/// Names the interface and the offload.
pub fn as_on_the_wire(host: &Host, interface: &str) -> anyhow::Result<()> {
    let set = || -> anyhow::Result<()> {
        for (command, data, what) in [
            (ETHTOOL_STXCSUM, 0, "transmit checksum off"),
            (ETHTOOL_STSO, 0, "TCP segmentation off"),
            (ETHTOOL_SGSO, 0, "generic segmentation off"),
            (ETHTOOL_SGRO, 1, "generic receive on"),
        ] {
            call(interface, command, data).context(what)?;
        }
        let flags = call(interface, ETHTOOL_GFLAGS, 0).context("reading flags")?;
        call(interface, ETHTOOL_SFLAGS, flags & !ETH_FLAG_TXVLAN).context("transmit VLAN off")?;
        Ok(())
    };
    host.enter(set)?.with_context(|| format!("offloads of {interface} in {}", host.name()))
}

/// Makes what `from` sends over the veth `interface` arrive at `to` in its order, as on a wire. A veth whose peer receives
/// through NAPI has one queue; without (or for what may be segmented: veth_skb_is_eligible_for_gro, drivers/net/veth.c)
/// each CPU has a backlog of its own, and frames that cross CPUs overtake one another.
///
/// # Errors
/// Names the interface and the offload.
pub fn in_order(from: &Host, to: &Host, interface: &str) -> anyhow::Result<()> {
    let name = |host: &Host| format!("offloads of {interface} in {}", host.name());
    from.enter(|| call(interface, ETHTOOL_STSO, 0).context("TCP segmentation off"))?
        .with_context(|| name(from))?;
    to.enter(|| call(interface, ETHTOOL_SGRO, 1).context("generic receive on"))?.with_context(|| name(to))?;
    Ok(())
}

fn call(interface: &str, command: u32, data: u32) -> anyhow::Result<u32> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut value = Value { command, data };
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    ensure!(interface.len() < request.ifr_name.len(), "interface name `{interface}` is too long");
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request points to `value`, which outlives the call and has the layout of ethtool_value.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    nix::errno::Errno::result(result)?;
    Ok(value.data)
}
