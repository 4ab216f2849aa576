//! The distribution's packages: libraries to build with, and the programs and real servers the lab uses.

use std::{fs, os::unix::fs::OpenOptionsExt as _, path::Path};

use anyhow::{Context as _, bail};

use super::{is_root, say};
use crate::command::{command, output, run};

/// A package and why it is needed.
const PACKAGES: [(&str, &str); 16] = [
    ("gcc", "builds the embedded SQLite and TLS primitives"),
    ("libc6-dev", "the same"),
    ("pkg-config", "finds the libraries below"),
    ("libmnl-dev", "netlink, for the fence"),
    ("libnftnl-dev", "nftables, for the fence"),
    ("iproute2", "the lab's links and addresses"),
    ("nftables", "the tests look at the fence with another program than made it"),
    ("ethtool", "sets in tests what the gateway has to find out about interfaces"),
    ("util-linux", "setpriv: the lab's daemons run with their units' capabilities"),
    ("systemd", "systemd-analyze checks the units; none of its services is started"),
    ("redis-server", "a real service to migrate"),
    ("nginx", "a real service to migrate"),
    ("openvswitch-switch", "what the benchmarks compare with"),
    ("kmod", "finds the modules that a guest of the kernel matrix begins with"),
    ("xz-utils", "unpacks them"),
    ("e2fsprogs", "makes the guests' disks"),
];

/// Where Debian's invoke-rc.d asks whether a service may be started; exit code 101 says no.
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Installs what is missing.
pub fn ensure() -> anyhow::Result<()> {
    if !Path::new("/usr/bin/dpkg-query").exists() {
        bail!(
            "this is no Debian or Ubuntu machine (no dpkg). Install what stands for these packages by hand: {}",
            PACKAGES.map(|(p, why)| format!("{p} ({why})")).join(", ")
        );
    }
    let missing: Vec<&str> = PACKAGES.iter().map(|(p, _)| *p).filter(|p| !installed(p)).collect();
    if missing.is_empty() {
        say("packages", "all there");
        return Ok(());
    }
    let install = format!("apt-get install {}", missing.join(" "));
    if !is_root() {
        bail!("packages are missing and this is not root. Run as root: {install}");
    }
    say("packages", &install);
    let _no_services = NoServices::new()?;
    let mut apt = command("apt-get", &["install", "-y", "-qq", "--no-install-recommends"]);
    apt.args(&missing).env("DEBIAN_FRONTEND", "noninteractive");
    if run(&mut apt).is_err() {
        // the machine's package lists may be missing or old
        run(&mut command("apt-get", &["update", "-qq"]))?;
        run(&mut apt)?;
    }
    Ok(())
}

fn installed(package: &str) -> bool {
    output(&mut command("dpkg-query", &["-W", "-f", "${db:Status-Status}", package]))
        .is_ok_and(|o| o.status.success() && o.stdout == b"installed")
}

/// While it lives, installing a server does not start it: the lab starts its own, in its own hosts.
struct NoServices {
    ours: bool,
}

impl NoServices {
    fn new() -> anyhow::Result<Self> {
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(POLICY);
        match file {
            Ok(mut file) => {
                use std::io::Write as _;
                file.write_all(b"#!/bin/sh\nexit 101\n").context(POLICY)?;
                Ok(Self { ours: true })
            }
            // the machine has a policy of its own, as containers do: it stays
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(Self { ours: false }),
            Err(e) => Err(e).context(POLICY),
        }
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(e) = fs::remove_file(POLICY)
        {
            eprintln!(
                "setup: could not remove {POLICY}: {e}; remove it, or services will not start on installation"
            );
        }
    }
}
