//! What a migration could leave behind on a host, listed so that two lists can be compared: nftables tables, addresses,
//! routes, sockets of v, processes, cgroups, BPF objects, files in the host's own directories.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
    },
};

use crate::{Host, topology::V};

/// What is there on a host: kind of thing -> the things, sorted.
pub type Residue = BTreeMap<&'static str, Vec<String>>;

/// Lists what is there on `host` now.
///
/// # Errors
/// If something cannot be looked at.
pub fn of(host: &Host) -> anyhow::Result<Residue> {
    let lines = |argv: &[&str]| -> anyhow::Result<Vec<String>> {
        // spaces and lifetimes are not the same from one listing to the next
        let text = host.run(argv)?;
        Ok(text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect())
    };
    let v = V.to_string();
    let mut sockets = lines(&["ss", "-tanH"])?;
    sockets.retain(|l| l.contains(&v));
    for line in &mut sockets {
        // the lengths of the queues change all the time
        let mut words: Vec<&str> = line.split(' ').collect();
        words.drain(1..3);
        *line = words.join(" ");
    }
    let mut found = Residue::from([
        ("nftables tables", host.enter(tables)?.context("listing nftables tables")?),
        ("addresses", lines(&["ip", "-o", "-4", "addr"])?),
        ("routes", lines(&["ip", "-4", "route", "show", "table", "all"])?),
        ("rules", lines(&["ip", "-4", "rule"])?),
        ("sockets of v", sockets),
        ("processes", host.processes()?.into_iter().map(|(_, line)| line).collect()),
        ("cgroups", below(host.cgroup(), &|path| path.is_dir())?),
    ]);
    let mut files = Vec::new();
    for dir in [
        "/run",
        "/tmp",
        "/var/lib/handover",
        "/var/lib/handover-controller",
        "/var/lib/handover-migrator",
        "/var/lib/handover-gateway",
        "/sys/fs/bpf", // what is pinned
    ] {
        files.extend(below(&host.path(dir), &|_| true)?);
    }
    found.insert("BPF objects", bpf_objects(host)?);
    found.insert("files", files);
    found.values_mut().for_each(|things| things.sort_unstable());
    Ok(found)
}

/// What is in `after` and was not `before`, or the other way round, one line each.
#[must_use]
pub fn difference(before: &Residue, after: &Residue) -> Vec<String> {
    let mut lines = Vec::new();
    for (kind, now) in after {
        let then = before.get(kind).map_or(&[][..], Vec::as_slice);
        let count = |things: &[String], thing: &String| things.iter().filter(|t| *t == thing).count();
        let mut all: Vec<&String> = then.iter().chain(now).collect();
        all.sort_unstable();
        all.dedup();
        for thing in all {
            let (was, is) = (count(then, thing), count(now, thing));
            if was != is {
                lines.push(format!("{kind}: {was} -> {is} {thing}"));
            }
        }
    }
    lines
}

/// The BPF maps, programs and links that processes hold open.
fn bpf_objects(host: &Host) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for (pid, command) in host.processes()? {
        // one that has ended meanwhile holds nothing
        let Ok(entries) = fs::read_dir(host.path(format!("/proc/{pid}/fd"))) else { continue };
        let held = entries.flatten().filter_map(|e| fs::read_link(e.path()).ok());
        let objects = held.map(|l| l.display().to_string()).filter(|l| l.starts_with("anon_inode:bpf"));
        found.extend(objects.map(|object| format!("{object} of {command}")));
    }
    Ok(found)
}

/// All that is `wanted` below a directory, relative to it.
fn below(dir: &Path, wanted: &dyn Fn(&Path) -> bool) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    let mut todo: Vec<PathBuf> = vec![dir.to_owned()];
    while let Some(at) = todo.pop() {
        let entries = match fs::read_dir(&at) {
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            other => other.with_context(|| at.display().to_string())?,
        };
        for entry in entries {
            let entry = entry.with_context(|| at.display().to_string())?;
            let path = entry.path();
            if wanted(&path) {
                found.push(path.strip_prefix(dir).unwrap_or(&path).display().to_string());
            }
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                todo.push(path);
            }
        }
    }
    Ok(found)
}

/// The nftables tables of this network namespace, by netlink: `nft` need not be installed.
fn tables() -> anyhow::Result<Vec<String>> {
    // include/uapi/linux/netfilter/nf_tables.h
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    const NFT_MSG_NEWTABLE: u16 = 0;
    const NFT_MSG_GETTABLE: u16 = 1;
    const NFTA_TABLE_NAME: u16 = 1;
    const HEADERS: usize = 16 + 4; // nlmsghdr, nfgenmsg

    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    let mut request = Vec::with_capacity(HEADERS);
    request.extend(u32::try_from(HEADERS)?.to_ne_bytes());
    request.extend((NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE).to_ne_bytes());
    request.extend(u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_DUMP)?.to_ne_bytes());
    request.extend([0; 12]); // sequence, port, family "all", version, resource
    sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;

    let u16_at = |b: &[u8], at: usize| b.get(at..at + 2).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    let mut names = Vec::new();
    let mut buffer = vec![0_u8; 1 << 16];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while rest.len() >= 16 {
            let size = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            let kind = u16_at(rest, 4).context("short netlink message")?;
            if size < 16 || size > rest.len() {
                bail!("a netlink message of {size} bytes in {}", rest.len());
            }
            let (message, next) = rest.split_at(size);
            match i32::from(kind) {
                libc::NLMSG_DONE => return Ok(names),
                libc::NLMSG_ERROR => {
                    let code =
                        message.get(16..20).map_or(0, |b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
                    return Err(Errno::from_raw(-code)).context("nf_tables");
                }
                _ if kind == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE => {
                    let mut attributes = message.get(HEADERS..).unwrap_or_default();
                    while let (Some(size), Some(kind)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
                        let value = attributes.get(4..usize::from(size)).unwrap_or_default();
                        if kind == NFTA_TABLE_NAME {
                            let name = value.strip_suffix(&[0]).unwrap_or(value);
                            names.push(String::from_utf8_lossy(name).into_owned());
                        }
                        attributes = attributes
                            .get(usize::from(size).max(4).next_multiple_of(4)..)
                            .unwrap_or_default();
                    }
                }
                _ => {}
            }
            rest = next;
        }
    }
}
