//! `cargo xtask setup`: from a bare Debian or Ubuntu machine with a Rust toolchain to one that builds and runs everything.
//!
//! Each part checks before it installs, so a second run changes nothing and takes a second. What is installed where:
//!
//! | what | where |
//! |---|---|
//! | libraries, iproute2, redis, nginx | the distribution's packages |
//! | bpf-linker | `cargo install` |
//! | sources of `core` for the BPF target | the toolchain's sysroot |
//! | CRIU, where the distribution's does not run on this kernel | `.tools/` of this checkout |

mod bpf_linker;
mod core_sources;
mod criu;
pub mod newer_debian;
mod packages;

use anyhow::bail;

/// Brings the machine to readiness.
///
/// # Errors
/// Says what is missing and what to do about it.
pub fn run() -> anyhow::Result<()> {
    if !cfg!(target_os = "linux") {
        bail!("Handover runs on Linux: XDP, CRIU and namespaces are the kernel's");
    }
    packages::ensure()?;
    bpf_linker::ensure()?;
    core_sources::ensure()?;
    criu::ensure()
}

/// One line of progress: what was checked or is being done.
pub fn say(subject: &str, state: &str) {
    eprintln!("setup: {subject:<14} {state}");
}

pub fn is_root() -> bool {
    // the owner of /proc/self is the effective user
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}
