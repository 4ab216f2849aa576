//! The sources of `core`, which are compiled for the BPF target: the rustup component where it can be had, else Debian's
//! `rust-src` of exactly the compiler's version, copied into the toolchain's sysroot.

use std::path::Path;

use anyhow::{Context as _, bail};

use super::{is_root, newer_debian::NewerDebian, say};
use crate::command::{command, run, stdout, succeeds, workspace};

/// Makes `SYSROOT/lib/rustlib/src/rust/library` exist.
pub fn ensure() -> anyhow::Result<()> {
    let mut rustc = command("rustc", &["--print", "sysroot"]);
    let sysroot = stdout(rustc.current_dir(workspace()))?;
    let rust = Path::new(sysroot.trim()).join("lib/rustlib/src/rust");
    if rust.join("library/core/Cargo.toml").exists() {
        say("core sources", "there");
        return Ok(());
    }
    say("core sources", "rustup component add rust-src");
    let mut rustup = command("rustup", &["component", "add", "rust-src"]);
    if succeeds(rustup.current_dir(workspace())) && rust.join("library/core/Cargo.toml").exists() {
        return Ok(());
    }
    let mut rustc = command("rustc", &["--version"]);
    let version = stdout(rustc.current_dir(workspace()))?;
    let version = version.split_whitespace().nth(1).context("rustc --version names no version")?.to_owned();
    say("core sources", &format!("the component cannot be had; Debian's rust-src {version}"));
    if !is_root() {
        bail!(
            "run `cargo xtask setup` as root once, or `rustup component add rust-src` where the network allows it"
        );
    }

    let debian = NewerDebian::new()?;
    let candidates = debian.versions("rust-src")?;
    let wanted = format!("{version}+dfsg");
    let Some(found) = candidates.iter().find(|v| v.starts_with(&wanted)) else {
        bail!(
            "no rust-src {version} in Debian's newer releases (found: {}); `rustup component add rust-src`",
            candidates.join(", ")
        );
    };
    let unpacked = debian.unpack(&[format!("rust-src={found}")])?;
    let library = unpacked.path().join(format!("usr/src/rustc-{version}/library"));
    std::fs::create_dir_all(&rust).with_context(|| rust.display().to_string())?;
    // copied beside and renamed, so that an interrupted copy is never taken for the whole
    let partial = rust.join(format!(".partial-{}", std::process::id()));
    run(command("cp", &["-a", "--"]).arg(&library).arg(&partial))?;
    std::fs::rename(&partial, rust.join("library")).context("installing the sources of core")
}
