//! The provider: exactly one right tag gets a frame delivered, at that VLAN's port and nowhere else.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use handover_lab::{Host, Lab, capture::Capture, provider::Provider};
use nix::net::if_::if_nametoindex;

const FROM: [u8; 6] = [2, 0, 0, 0, 1, 1];
const TO: std::net::Ipv4Addr = std::net::Ipv4Addr::new(203, 0, 113, 10);
const SOON: Duration = Duration::from_secs(5);

/// An IPv4 frame of FROM to TO behind these tags (TPID, TCI).
fn frame(tags: &[(u16, u16)]) -> Vec<u8> {
    let mut f = vec![0xff; 6];
    f.extend(FROM);
    for (tpid, tci) in tags {
        f.extend(tpid.to_be_bytes());
        f.extend(tci.to_be_bytes());
    }
    f.extend([0x08, 0x00, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 10, 1, 0, 100]);
    f.extend(TO.octets());
    f.extend([0; 26]);
    f
}

fn send(host: &Host, interface: &str, frame: &[u8]) {
    host.enter(|| {
        let index = if_nametoindex(interface).unwrap();
        // SAFETY: plain socket calls; the address and the frame outlive them.
        unsafe {
            let socket =
                OwnedFd::from_raw_fd(libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0));
            let mut to: libc::sockaddr_ll = std::mem::zeroed();
            to.sll_family = libc::AF_PACKET as u16;
            to.sll_ifindex = index as i32;
            let sent = libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                size_of_val(&to) as u32,
            );
            assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
        }
    })
    .unwrap();
}

struct Net {
    _lab: Lab,
    trunk: Host,
    site1: Host,
    provider: Provider,
    at_trunk: Capture,
    at1: Capture,
    at2: Capture,
}

fn net() -> Net {
    let mut lab = Lab::new().unwrap();
    let [trunk, provider, site1, site2] =
        ["trunk", "provider", "site1", "site2"].map(|name| lab.add_host(name).unwrap());
    for host in [&trunk, &provider, &site1, &site2] {
        // frames are counted one by one: the kernel's own (MLD, router solicitations) would be counted too
        host.enter(|| std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")).unwrap().unwrap();
    }
    lab.link((&trunk, "wan0"), (&provider, "trunk0")).unwrap();
    lab.link((&provider, "vlan1"), (&site1, "user0")).unwrap();
    lab.link((&provider, "vlan2"), (&site2, "user0")).unwrap();
    let started = Provider::start(&provider, "trunk0", &[(1, "vlan1"), (2, "vlan2")]).unwrap();
    let [at_trunk, at1, at2] = [(&trunk, "wan0"), (&site1, "user0"), (&site2, "user0")]
        .map(|(host, interface)| Capture::start(host, interface, FROM, TO).unwrap());
    Net { trunk, site1, provider: started, at_trunk, at1, at2, _lab: lab }
}

#[test]
fn the_right_tag_is_delivered_and_taken_off() {
    let net = net();
    send(&net.trunk, "wan0", &frame(&[(0x8100, 1)]));
    assert_eq!(net.at1.tag_after(0, SOON).unwrap(), None);
    send(&net.trunk, "wan0", &frame(&[(0x8100, 0x6002)])); // PCP 3 does not matter
    assert_eq!(net.at2.tag_after(0, SOON).unwrap(), None);
    assert_eq!(net.at1.runs().len(), 1);
    assert_eq!(net.at1.runs()[0].frames, 1);
    send(&net.site1, "user0", &frame(&[]));
    assert_eq!(net.at_trunk.tag_after(0, SOON).unwrap(), Some(1));
    assert_eq!(net.at2.runs()[0].frames, 1, "VLANs are apart");
}

#[test]
fn any_other_tag_reaches_nobody_and_is_counted() {
    let net = net();
    for (i, (tags, outcome)) in (0..).zip([
        (&[][..], "Untagged"),
        (&[(0x8100, 3)], "WrongVlan"),
        (&[(0x8100, 0)], "WrongVlan"),
        (&[(0x8100, 4095)], "WrongVlan"),
        (&[(0x88a8, 1)], "WrongTpid"),
        (&[(0x8100, 1), (0x8100, 2)], "DoubleTagged"),
        (&[(0x8100, 1), (0x8100, 1)], "DoubleTagged"),
    ]) {
        let before = net.provider.outcomes().unwrap()[outcome];
        send(&net.trunk, "wan0", &frame(tags));
        // the pair delivers in order: once this one is through, the one before has been dealt with
        send(&net.trunk, "wan0", &frame(&[(0x8100, 1)]));
        net.at1.tag_after(i, SOON).unwrap();
        assert_eq!(net.provider.outcomes().unwrap()[outcome], before + 1, "{tags:x?}");
    }
    assert_eq!(net.at1.runs()[0].frames, 7, "only the right ones");
    assert_eq!(net.at2.runs(), []);
    send(&net.site1, "user0", &frame(&[(0x8100, 2)]));
    send(&net.site1, "user0", &frame(&[]));
    net.at_trunk.tag_after(0, SOON).unwrap();
    assert_eq!(net.provider.outcomes().unwrap()["TaggedAccess"], 1);
    assert_eq!(net.at_trunk.runs()[0].frames, 1);
}
