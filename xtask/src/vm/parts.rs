//! What a virtual machine is made of, fetched through the machine's own apt (which checks signatures) and kept in
//! `.tools/vm`: QEMU with its libraries, kernels with their modules, and the packages of the guest's root.
//!
//! Each part has a file `complete` that is written last and says what the part was made of; a part without it, or made of
//! something else, is made again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};

use super::kernel::Series;
use crate::{
    command::{command, output, run, stdout, workspace},
    setup::{
        newer_debian::{NewerDebian, release_codename},
        say,
    },
};

/// Debian 13's QEMU: Debian 12's corrupts guests of kernel 6.12 (measured).
const QEMU_RELEASE: &str = "trixie";
/// Where the kernels are.
const KERNEL_RELEASES: [&str; 5] = ["bookworm", "bookworm-backports", "trixie", "trixie-backports", "sid"];

/// What the guest's root holds; the release is that of this machine, whose C library the tests are built for.
const ROOT_PACKAGES: [&str; 22] = [
    "bash",
    "coreutils",
    "dash",
    "ethtool",
    "findutils",
    "grep",
    "iproute2",
    "kmod",
    "libgcc-s1",
    "libmnl0",
    "libnftnl11",
    "mount",
    "nftables",
    "nginx",
    "procps",
    "psmisc",
    "redis-server",
    "redis-tools",
    "sed",
    "tar",
    "tcpdump",
    "util-linux",
];
/// Modules that the initramfs loads, in this order: the disks. (The rest is loaded on the running root.)
const DISKS: [&str; 3] = ["virtio_pci", "virtio_blk", "ext4"];
/// Users that the servers want.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nwww-data:x:33:33::/var/www:/usr/sbin/nologin\n\
                      redis:x:101:101::/var/lib/redis:/usr/sbin/nologin\nnobody:x:65534:65534::/:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\nadm:x:4:\nwww-data:x:33:\nredis:x:101:\nnogroup:x:65534:\n";

/// A part's folder, and whether it is there already.
struct Part {
    dir: PathBuf,
    of: String,
}

impl Part {
    fn new(name: &str, of: &str) -> Self {
        Self { dir: folder().join(name), of: of.into() }
    }

    fn complete(&self) -> bool {
        fs::read_to_string(self.dir.join("complete")).is_ok_and(|of| of == self.of)
    }

    /// An empty folder.
    fn begin(&self) -> anyhow::Result<()> {
        remove(&self.dir)?;
        fs::create_dir_all(&self.dir).with_context(|| self.dir.display().to_string())
    }

    fn end(self) -> anyhow::Result<PathBuf> {
        write(&self.dir.join("complete"), self.of.as_bytes())?;
        Ok(self.dir)
    }
}

fn folder() -> PathBuf {
    workspace().join(".tools/vm")
}

fn remove(dir: &Path) -> anyhow::Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    fs::write(path, bytes).with_context(|| path.display().to_string())
}

/// QEMU, run through its own loader.
pub struct Qemu {
    root: PathBuf,
}

impl Qemu {
    /// Fetches it if it is not there.
    pub fn ensure() -> anyhow::Result<Self> {
        let part = Part::new("qemu", QEMU_RELEASE);
        let root = part.dir.join("root");
        if !part.complete() {
            part.begin()?;
            say("qemu", &format!("of Debian's {QEMU_RELEASE}, with its libraries"));
            let debian = NewerDebian::of(&[QEMU_RELEASE])?;
            debian.unpack_into(&debian.closure(&["qemu-system-x86", "seabios"])?, &root)?;
            let qemu = Self { root: root.clone() };
            say("qemu", stdout(qemu.command().arg("--version"))?.lines().next().unwrap_or_default());
            part.end()?;
        }
        Ok(Self { root })
    }

    /// The command, without arguments of its own.
    pub fn command(&self) -> Command {
        let lib = self.root.join("usr/lib/x86_64-linux-gnu");
        let mut qemu = Command::new(lib.join("ld-linux-x86-64.so.2"));
        qemu.arg("--library-path").arg(&lib).arg(self.root.join("usr/bin/qemu-system-x86_64"));
        qemu.env("QEMU_MODULE_DIR", lib.join("qemu"));
        qemu
    }

    /// Folders of firmware.
    pub fn firmware(&self) -> [PathBuf; 2] {
        ["usr/share/seabios", "usr/share/qemu"].map(|d| self.root.join(d))
    }
}

/// A kernel ready to boot.
pub struct Kernel {
    /// E.g. "6.12.107+deb13-cloud-amd64".
    pub release: String,
    pub image: PathBuf,
    pub initramfs: PathBuf,
    /// A disk with its modules, as `/lib/modules` is.
    pub modules: PathBuf,
}

/// Fetches those of `series` that are not there. The newest that was seen first stays, so that a run can be repeated:
/// removing `.tools/vm` fetches anew.
pub fn kernels(series: &[Series]) -> anyhow::Result<Vec<Kernel>> {
    let parts: Vec<Part> = series
        .iter()
        .map(|s| Part::new(&format!("kernel-{s}"), &format!("{s} {}", include_str!("initramfs.sh"))))
        .collect();
    if parts.iter().any(|p| !p.complete()) {
        let busybox = busybox()?;
        let debian = NewerDebian::of(&KERNEL_RELEASES)?;
        let names = debian.names("linux-")?;
        for (series, part) in series.iter().zip(&parts).filter(|(_, p)| !p.complete()) {
            let package = series.newest(names.iter().map(String::as_str));
            let package = package.with_context(|| format!("Debian has no cloud kernel {series} any more"))?;
            say("kernel", package);
            part.begin()?;
            // newer ones are in several packages
            let version = package.strip_prefix("linux-image-").unwrap_or(package);
            let parts = ["image", "binary", "modules"].map(|part| format!("linux-{part}-{version}"));
            let of_kernel: Vec<String> = parts.into_iter().filter(|p| names.contains(p)).collect();
            let unpacked = debian.unpack(&of_kernel)?;
            make_kernel(unpacked.path(), &part.dir, &busybox)
                .with_context(|| format!("making {package} bootable"))?;
        }
    }
    parts.into_iter().map(|part| read_kernel(part.end()?)).collect()
}

fn read_kernel(dir: PathBuf) -> anyhow::Result<Kernel> {
    let release = fs::read_to_string(dir.join("release")).with_context(|| dir.display().to_string())?;
    let at = |name: &str| dir.join(name);
    Ok(Kernel { release, image: at("vmlinuz"), initramfs: at("initramfs"), modules: at("modules.img") })
}

fn make_kernel(unpacked: &Path, dir: &Path, busybox: &Path) -> anyhow::Result<()> {
    // "/lib" in older releases
    let modules =
        ["usr/lib/modules", "lib/modules"].map(|d| unpacked.join(d)).into_iter().find(|d| d.exists());
    let modules = modules.context("the package holds no modules")?;
    let entry = fs::read_dir(&modules)?.next().context("the package holds no modules")??;
    let release = entry.file_name().to_string_lossy().into_owned();
    let image = [unpacked.join(format!("boot/vmlinuz-{release}")), modules.join(&release).join("vmlinuz")];
    let image = image.iter().find(|p| p.exists()).context("the package holds no kernel")?;
    fs::copy(image, dir.join("vmlinuz")).context("copying the kernel")?;

    // depmod wants <base>/lib/modules
    let base = tempfile::tempdir().context("temporary folder")?;
    fs::create_dir_all(base.path().join("lib"))?;
    std::os::unix::fs::symlink(&modules, base.path().join("lib/modules"))?;
    run(command("depmod", &["-b"]).arg(base.path()).arg(&release))?;
    initramfs(&modules.join(&release), &dir.join("initramfs"), busybox)?;
    disk(&modules, &dir.join("modules.img"), 64)?;
    write(&dir.join("release"), release.as_bytes())
}

/// A static busybox, for the initramfs and to make its archive.
fn busybox() -> anyhow::Result<PathBuf> {
    let release = release_codename(Path::new("/etc/os-release"))?;
    let part = Part::new("busybox", &release);
    if !part.complete() {
        part.begin()?;
        NewerDebian::of(&[&release])?.unpack_into(&["busybox-static".into()], &part.dir.join("root"))?;
    }
    let dir = part.end()?;
    let found = ["root/usr/bin/busybox", "root/bin/busybox"].map(|p| dir.join(p));
    found.into_iter().find(|p| p.exists()).context("busybox-static holds no busybox")
}

/// What `wanted` needs of the modules in `dir`, in the order of loading: `modules.dep` names for each module those it
/// needs, the last of them first to be loaded.
fn needed(dep: &str, wanted: &[&str]) -> Vec<String> {
    let stem = |path: &str| {
        let name = path.rsplit('/').next().unwrap_or(path);
        name.split_once(".ko").map_or(name, |(stem, _)| stem).replace('-', "_")
    };
    let lines: BTreeMap<String, (&str, Vec<&str>)> = dep
        .lines()
        .filter_map(|l| l.split_once(':'))
        .map(|(module, needs)| (stem(module), (module, needs.split_whitespace().collect())))
        .collect();
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in wanted {
        // what is not there is built in
        let Some((module, needs)) = lines.get(*name) else { continue };
        for path in needs.iter().rev().chain([module]) {
            if seen.insert(*path) {
                order.push((*path).to_owned());
            }
        }
    }
    order
}

fn initramfs(modules: &Path, to: &Path, busybox: &Path) -> anyhow::Result<()> {
    let root = tempfile::tempdir().context("temporary folder")?;
    let at = |p: &str| root.path().join(p);
    for dir in ["bin", "dev", "modules", "proc", "root", "sys"] {
        fs::create_dir(at(dir))?;
    }
    fs::copy(busybox, at("bin/busybox")).context("busybox")?;
    write(&at("init"), include_bytes!("initramfs.sh"))?;
    run(command("chmod", &["755"]).arg(at("init")))?;
    let dep = fs::read_to_string(modules.join("modules.dep")).context("modules.dep")?;
    let mut order = String::new();
    for path in needed(&dep, &DISKS) {
        let name = path.rsplit('/').next().unwrap_or(&path);
        let plain = name.strip_suffix(".xz").unwrap_or(name);
        let bytes = if plain == name {
            fs::read(modules.join(&path)).with_context(|| path.clone())?
        } else {
            let unpacked = output(command("xz", &["-dc"]).arg(modules.join(&path)))?;
            if !unpacked.status.success() {
                bail!("{path}: {}", String::from_utf8_lossy(&unpacked.stderr));
            }
            unpacked.stdout
        };
        write(&at("modules").join(plain), &bytes)?;
        order.push_str(plain);
        order.push('\n');
    }
    write(&at("modules/order"), order.as_bytes())?;

    let names = stdout(command("find", &["."]).current_dir(root.path()))?;
    let archive = fs::File::create(to).with_context(|| to.display().to_string())?;
    let mut child = Command::new(busybox)
        .args(["cpio", "-o", "-H", "newc"])
        .current_dir(root.path())
        .stdin(Stdio::piped())
        .stdout(archive)
        .stderr(Stdio::null())
        .spawn()
        .context("busybox cpio")?;
    child.stdin.take().context("busybox cpio")?.write_all(names.as_bytes())?;
    if !child.wait()?.success() {
        bail!("busybox cpio failed");
    }
    Ok(())
}

/// The guest's root as a disk; what a guest writes to it is thrown away.
pub fn root() -> anyhow::Result<PathBuf> {
    let release = release_codename(Path::new("/etc/os-release"))?;
    let part =
        Part::new("root", &format!("{release} {} {}", ROOT_PACKAGES.join(" "), include_str!("guest.sh")));
    if !part.complete() {
        part.begin()?;
        say(
            "root",
            &format!("of Debian's {release}, with {} packages and what they need", ROOT_PACKAGES.len()),
        );
        let debian = NewerDebian::of(&[&release])?;
        let root = tempfile::tempdir().context("temporary folder")?;
        debian.unpack_into(&debian.closure(&ROOT_PACKAGES)?, root.path())?;
        let at = |p: &str| root.path().join(p);
        for dir in [
            "dev",
            "etc",
            "handover",
            "lib/modules",
            "payload",
            "proc",
            "root",
            "run",
            "sys",
            "tmp",
            "var/lib/redis",
            "var/lib/nginx",
            "var/log/nginx",
            "var/log/redis",
            "var/www",
        ] {
            fs::create_dir_all(at(dir)).with_context(|| dir.to_owned())?;
        }
        write(&at("etc/passwd"), PASSWD.as_bytes())?;
        write(&at("etc/group"), GROUP.as_bytes())?;
        write(&at("handover/guest.sh"), include_bytes!("guest.sh"))?;
        run(command("chmod", &["755"]).arg(at("handover/guest.sh")))?;
        // what the package's own script would set up
        if !at("bin/sh").exists() {
            std::os::unix::fs::symlink("dash", at("bin/sh")).context("/bin/sh")?;
        }
        disk(root.path(), &part.dir.join("root.img"), 512)?;
    }
    Ok(part.end()?.join("root.img"))
}

/// Makes a disk (ext4) of what is in `dir`, with `spare` MiB to spare.
pub fn disk(dir: &Path, to: &Path, spare: u64) -> anyhow::Result<()> {
    let size = stdout(command("du", &["-sm", "--apparent-size", "--"]).arg(dir))?;
    let size: u64 = size.split_whitespace().next().unwrap_or_default().parse().context("du")?;
    if to.exists() {
        fs::remove_file(to).with_context(|| to.display().to_string())?;
    }
    // blocks and inodes take about an eighth besides
    let size = format!("{}m", size + size / 8 + spare);
    let mut make =
        command("mke2fs", &["-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-d"]);
    run(make.arg(dir).arg(to).arg(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need() {
        let dep = "kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/legacy.ko kernel/drivers/virtio/virtio.ko\n\
                   kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio.ko\n\
                   kernel/drivers/virtio/virtio.ko:\nkernel/other-name.ko.xz:\n";
        let order = needed(dep, &["virtio_pci", "virtio_blk", "ext4", "other_name"]);
        let names: Vec<&str> = order.iter().filter_map(|p| p.rsplit('/').next()).collect();
        assert_eq!(
            names,
            ["virtio.ko", "legacy.ko", "virtio_pci.ko", "virtio_blk.ko.xz", "other-name.ko.xz"]
        );
    }
}
