//! A CRIU that passes `criu check` on the running kernel.
//!
//! Debian 12's CRIU does not run on recent kernels. A newer one needs newer libraries; so it is unpacked with them into
//! `.tools/criu-root` and run through its own loader by the wrapper `.tools/bin/criu`. Nothing of the system changes.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use anyhow::{Context as _, bail};

use super::{is_root, newer_debian::NewerDebian, say};
use crate::command::{command, output, workspace};

/// The oldest CRIU that can dump TCP connections on kernels from about 6.16.
const OLDEST: (u32, u32) = (4, 2);

/// Finds or unpacks a CRIU that works here; `.tools/bin/criu` is it.
pub fn ensure() -> anyhow::Result<()> {
    let tools = workspace().join(".tools");
    let ours = tools.join("bin/criu");
    if let Ok(version) = works(&ours) {
        say("criu", &format!("{version}, passes `criu check`"));
        return Ok(());
    }
    if !is_root() {
        bail!("`criu check` needs root: run `cargo xtask setup` as root");
    }
    fs::create_dir_all(tools.join("bin")).context("creating .tools/bin")?;
    match works(Path::new("/usr/sbin/criu")) {
        Ok(version) => {
            say("criu", &format!("{version} of the distribution, passes `criu check`"));
            return wrapper(&ours, "exec /usr/sbin/criu \"$@\"\n");
        }
        Err(why) => say("criu", &format!("the distribution's cannot be used ({why:#}); a newer Debian's")),
    }

    let debian = NewerDebian::new()?;
    let packages = debian.closure(&["criu"])?;
    let unpacked = debian.unpack(&packages)?;
    let root = tools.join("criu-root");
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| root.display().to_string())?;
    }
    let mut copy = command("cp", &["-a", "--"]);
    crate::command::run(copy.arg(unpacked.path()).arg(&root))?;
    let arch = std::env::consts::ARCH;
    let loader = match arch {
        "x86_64" => "ld-linux-x86-64.so.2",
        "aarch64" => "ld-linux-aarch64.so.1",
        other => bail!("no CRIU for {other}: install one that passes `criu check` at {}", ours.display()),
    };
    wrapper(
        &ours,
        &format!(
            "root=\"$(dirname \"$(readlink -f \"$0\")\")/../criu-root\"\nlib=\"$root/usr/lib/{arch}-linux-gnu\"\n\
             exec \"$lib/{loader}\" --library-path \"$lib\" \"$root/usr/sbin/criu\" \"$@\"\n"
        ),
    )?;
    let version = works(&ours).context("the newer Debian's CRIU does not work on this kernel either")?;
    say("criu", &format!("{version}, passes `criu check`"));
    Ok(())
}

fn wrapper(path: &Path, body: &str) -> anyhow::Result<()> {
    fs::write(path, format!("#!/bin/sh\n{body}")).with_context(|| path.display().to_string())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).with_context(|| path.display().to_string())
}

/// The version of the CRIU at `path`, if it is recent enough and passes `criu check`.
fn works(path: &Path) -> anyhow::Result<String> {
    if !path.exists() {
        bail!("not installed");
    }
    let said = output(Command::new(path).arg("--version"))?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let version = said
        .lines()
        .find_map(|l| l.strip_prefix("Version: "))
        .with_context(|| format!("`{} --version` names no version", path.display()))?
        .trim()
        .to_owned();
    let mut numbers = version.split('.').map_while(|n| n.parse::<u32>().ok());
    let number = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if number < OLDEST {
        bail!("{version} is older than {}.{}", OLDEST.0, OLDEST.1);
    }
    let check = output(Command::new(path).arg("check"))?;
    if !check.status.success() {
        let said = String::from_utf8_lossy(&check.stderr);
        bail!(
            "{version} fails `criu check`: {}",
            said.lines().find(|l| l.contains("Error")).unwrap_or("no reason given")
        );
    }
    Ok(version)
}
