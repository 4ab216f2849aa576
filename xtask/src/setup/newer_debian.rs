//! Packages of newer Debian (or Ubuntu) releases, unpacked and not installed: private package lists, an empty status file,
//! the machine's own mirror. The system's apt is not touched.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, bail};
use tempfile::TempDir;

use super::say;
use crate::command::{command, run, stdout};

/// A private apt with the lists of newer releases.
pub struct NewerDebian {
    dir: TempDir,
}

impl NewerDebian {
    /// Fetches the lists.
    ///
    /// # Errors
    /// If the machine's apt knows no mirror, or none of the newer releases can be reached there.
    pub fn new() -> anyhow::Result<Self> {
        let (mirror, origin) = mirror()?;
        let releases: &[&str] = match origin {
            Origin::Debian => &["sid", "forky", "trixie-backports"],
            Origin::Ubuntu => &["devel"],
        };
        Self::at(&mirror, releases)
    }

    /// The same for these of Debian's releases.
    ///
    /// # Errors
    /// If the machine's apt knows no mirror of Debian, or one of the releases cannot be reached there.
    pub fn of(releases: &[&str]) -> anyhow::Result<Self> {
        match mirror()? {
            (mirror, Origin::Debian) => Self::at(&mirror, releases),
            (mirror, Origin::Ubuntu) => bail!(
                "{} is needed of Debian, and apt on this machine knows Ubuntu's mirror alone ({mirror}): run this on Debian",
                releases.join(", ")
            ),
        }
    }

    fn at(mirror: &str, releases: &[&str]) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir().context("temporary folder")?;
        for sub in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(dir.path().join(sub)).context("private apt folders")?;
        }
        fs::write(dir.path().join("status"), "").context("private apt status")?;
        let lines: String = releases.iter().map(|r| format!("deb {mirror} {r} main\n")).collect();
        fs::write(dir.path().join("sources.list"), lines).context("private apt sources")?;
        let apt = Self { dir };
        say("newer releases", &format!("package lists of {}", releases.join(", ")));
        run(apt.apt("apt-get").args(["update", "-qq"]))?;
        Ok(apt)
    }

    fn apt(&self, program: &str) -> Command {
        let at = |name: &str| self.dir.path().join(name).display().to_string();
        let mut apt = command(program, &[]);
        for (option, value) in [
            ("Dir::Etc::sourcelist", at("sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".into()),
            ("Dir::State::lists", at("lists")),
            ("Dir::State::status", at("status")),
            ("Dir::Cache::archives", at("archives")),
            ("Dir::Cache::pkgcache", String::new()),
            ("Dir::Cache::srcpkgcache", String::new()),
            // the folder is ours alone, which the unprivileged download user cannot enter
            ("APT::Sandbox::User", "root".into()),
        ] {
            apt.args(["-o", &format!("{option}={value}")]);
        }
        apt.current_dir(self.dir.path().join("archives"));
        apt
    }

    /// The versions of `package` on offer, newest first.
    pub fn versions(&self, package: &str) -> anyhow::Result<Vec<String>> {
        let table = stdout(self.apt("apt-cache").args(["madison", package]))?;
        // " rust-src | 1.95.0+dfsg1-2~bpo13+1 | http://... trixie-backports/main amd64 Packages"
        Ok(table.lines().filter_map(|l| l.split('|').nth(1)).map(|v| v.trim().to_owned()).collect())
    }

    /// The names of all packages that begin so.
    pub fn names(&self, prefix: &str) -> anyhow::Result<Vec<String>> {
        Ok(stdout(self.apt("apt-cache").args(["pkgnames", prefix]))?.lines().map(str::to_owned).collect())
    }

    /// `packages` and everything they need, down to the C library.
    pub fn closure(&self, packages: &[&str]) -> anyhow::Result<Vec<String>> {
        let mut plan = self.apt("apt-get");
        plan.args(["-s", "install", "--no-install-recommends"]).args(packages);
        let plan = stdout(&mut plan)?;
        let names: Vec<String> = plan
            .lines()
            .filter_map(|l| l.strip_prefix("Inst ")?.split_whitespace().next().map(str::to_owned))
            .collect();
        if names.is_empty() {
            bail!("the releases offer no {}", packages.join(", "));
        }
        Ok(names)
    }

    /// Downloads `packages` (`name` or `name=version`) and unpacks them into one folder.
    pub fn unpack(&self, packages: &[String]) -> anyhow::Result<TempDir> {
        let root = tempfile::tempdir().context("temporary folder")?;
        self.unpack_into(packages, root.path())?;
        Ok(root)
    }

    /// The same into `root`, which is made.
    pub fn unpack_into(&self, packages: &[String], root: &Path) -> anyhow::Result<()> {
        run(self.apt("apt-get").args(["download", "-qq"]).args(packages))?;
        fs::create_dir_all(root).with_context(|| root.display().to_string())?;
        let archives = self.dir.path().join("archives");
        for entry in fs::read_dir(&archives).context("downloaded packages")? {
            let path = entry.context("downloaded packages")?.path();
            if path.extension().is_some_and(|e| e == "deb") {
                run(command("dpkg", &["-x"]).arg(&path).arg(root))?;
                fs::remove_file(&path).with_context(|| path.display().to_string())?;
            }
        }
        Ok(())
    }
}

/// Whose mirror it is.
enum Origin {
    Debian,
    Ubuntu,
}

/// The machine's own mirror of its distribution.
fn mirror() -> anyhow::Result<(String, Origin)> {
    let targets = stdout(&mut command(
        "apt-get",
        &[
            "indextargets",
            "--format",
            "$(ORIGIN) $(CODENAME) $(COMPONENT) $(REPO_URI)",
            "Created-By: Packages",
        ],
    ))?;
    let release = release_codename(Path::new("/etc/os-release"))?;
    for line in targets.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let &[origin, codename, "main", uri] = words.as_slice() else { continue };
        if codename != release {
            continue; // security and third-party archives carry other names
        }
        match origin {
            "Debian" => return Ok((uri.into(), Origin::Debian)),
            "Ubuntu" => return Ok((uri.into(), Origin::Ubuntu)),
            _ => {}
        }
    }
    bail!("apt knows no mirror of `{release}`: run `apt-get update`, and see that /etc/apt names one")
}

/// The name of the release that runs here.
pub fn release_codename(os_release: &Path) -> anyhow::Result<String> {
    let text = fs::read_to_string(os_release).with_context(|| os_release.display().to_string())?;
    text.lines()
        .find_map(|l| l.strip_prefix("VERSION_CODENAME="))
        .map(|v| v.trim_matches('"').to_owned())
        .with_context(|| format!("{} names no VERSION_CODENAME", os_release.display()))
}
