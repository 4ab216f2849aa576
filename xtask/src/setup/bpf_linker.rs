//! bpf-linker, pinned: this release links with rustc's own LLVM, later ones want a system LLVM.

use super::say;
use crate::command::{cargo, command, output, run};

const VERSION: &str = "0.9.15";

/// Installs the pinned release if another one or none is on the path.
pub fn ensure() -> anyhow::Result<()> {
    let found = output(&mut command("bpf-linker", &["--version"]))
        .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
        .unwrap_or_default();
    if found.split_whitespace().nth(1) == Some(VERSION) {
        say("bpf-linker", VERSION);
        return Ok(());
    }
    say("bpf-linker", "building it with cargo install, about a minute");
    let mut install = cargo();
    install.args(["install", "bpf-linker", "--version", VERSION, "--locked", "--force", "--quiet"]);
    run(&mut install)
}
