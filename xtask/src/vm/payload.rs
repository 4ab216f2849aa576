//! What is run in the guests: programs and tests as they were built here, on a disk that the guest mounts where they were
//! built, because tests know the paths of programs and files.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};
use serde::Deserialize;

use super::parts::disk;
use crate::{
    command::{cargo, command, run, stdout, workspace},
    verbs,
};

/// The tests of the matrix: what depends on the kernel. (The rest is the same everywhere, and is run by `cargo xtask test`.)
const TESTS: [(&str, &[&str]); 3] = [
    ("handover-gateway", &["programs", "live"]),
    ("handover-migrator", &["migration"]),
    ("handover-lab", &["hosts", "topology", "migration"]),
];

/// MiB for what the lab's hosts write: files to be served, images.
const ROOM: u64 = 4096;

/// A line of `--message-format=json`.
#[derive(Deserialize)]
struct Message {
    reason: String,
    /// E.g. "path+file:///w/migrator#handover-migrator@0.1.0"
    #[serde(default)]
    package_id: String,
    #[serde(default)]
    manifest_path: PathBuf,
    #[serde(default)]
    target: Target,
    #[serde(default)]
    profile: Profile,
    executable: Option<PathBuf>,
}

impl Message {
    fn is_test(&self, package: &str, target: &str) -> bool {
        let of = self.package_id.rsplit('#').next().and_then(|p| p.split('@').next());
        self.profile.test && of == Some(package) && self.target.name == target
    }
}

#[derive(Default, Deserialize)]
struct Target {
    name: String,
}

#[derive(Default, Deserialize)]
struct Profile {
    test: bool,
}

/// One test program.
#[derive(Debug)]
struct Test {
    /// "package target"
    name: String,
    manifest_dir: PathBuf,
    executable: PathBuf,
}

/// Builds all, and makes the disk.
pub fn make(target: &Path, filter: Option<&str>) -> anyhow::Result<PathBuf> {
    let mut programs = BTreeSet::new();
    let mut tests = Vec::new();
    // the same selections as `cargo xtask test`, so that nothing is built twice
    let builds = [
        built(cargo().args(["build", "--bins"]))?,
        built(cargo().args(["test", "--no-run"]).args(verbs::all_but_lab()))?,
        built(cargo().args(["test", "--no-run", "--package", "handover-lab"]))?,
    ];
    for (package, targets) in TESTS {
        for target in targets {
            let found = builds.iter().flatten().find(|m| m.is_test(package, target));
            let found = found.with_context(|| format!("{package} has no test `{target}`"))?;
            tests.push(Test {
                name: format!("{package} {target}"),
                manifest_dir: found.manifest_path.parent().unwrap_or(Path::new("/")).to_owned(),
                executable: found.executable.clone().context("a test without a program")?,
            });
        }
    }
    for message in builds.iter().flatten().filter(|m| !m.profile.test) {
        programs.extend(message.executable.clone());
    }
    let staging = target.join("vm/payload");
    if staging.exists() {
        fs::remove_dir_all(&staging).with_context(|| staging.display().to_string())?;
    }
    stage(&staging, target, programs.iter().chain(tests.iter().map(|t| &t.executable)))?;
    fs::write(staging.join("run.sh"), script(&tests, filter)?).context("run.sh")?;
    let to = target.join("vm/payload.img");
    disk(&staging, &to, ROOM)?;
    Ok(to)
}

fn built(cargo: &mut Command) -> anyhow::Result<Vec<Message>> {
    let said = stdout(cargo.args(["--quiet", "--message-format=json"]))?;
    let messages = said.lines().map(serde_json::from_str).collect::<Result<Vec<Message>, _>>();
    let messages = messages.context("reading what cargo has built")?;
    Ok(messages.into_iter().filter(|m| m.reason == "compiler-artifact" && m.executable.is_some()).collect())
}

fn stage<'a>(to: &Path, target: &Path, executables: impl Iterator<Item = &'a PathBuf>) -> anyhow::Result<()> {
    let here = workspace().canonicalize().context("the workspace")?;
    let target = target.canonicalize().context("the target folder")?;
    let (sources, built) = (to.join("sources"), to.join("target"));
    fs::create_dir_all(&sources)?;
    fs::create_dir_all(&built)?;
    // tests read examples and fixtures
    let files = stdout(command("git", &["ls-files", "-z"]).current_dir(&here))?;
    let files: Vec<&str> = files.split('\0').filter(|f| !f.is_empty()).collect();
    run(command("cp", &["--parents", "-t"]).arg(&sources).arg("--").args(&files).current_dir(&here))?;
    fs::create_dir_all(sources.join(".tools"))?;
    for part in ["bin", "criu-root"] {
        let from = here.join(".tools").join(part);
        if from.exists() {
            run(command("cp", &["-a", "-t"]).arg(sources.join(".tools")).arg("--").arg(from))?;
        }
    }
    for executable in executables {
        let within = executable.strip_prefix(&target);
        let within =
            within.with_context(|| format!("{} is not in {}", executable.display(), target.display()))?;
        let to = built.join(within);
        fs::create_dir_all(to.parent().unwrap_or(&built))?;
        // most of it is for debuggers
        run(command("objcopy", &["--strip-debug"]).arg(executable).arg(&to))?;
    }
    // what is mounted last needs its place in what is mounted first
    if let Ok(within) = target.strip_prefix(&here) {
        fs::create_dir_all(sources.join(within))?;
    }
    let places = format!("sources {}\ntarget {}\n", plain(&here)?, plain(&target)?);
    fs::write(to.join("places"), places).context("places")
}

/// A path that a shell script can hold as it is.
fn plain(path: &Path) -> anyhow::Result<&str> {
    let text = path.to_str().filter(|t| t.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+".contains(c)));
    match text {
        Some(text) => Ok(text),
        None => bail!("{}: a path with such characters cannot be used in a guest", path.display()),
    }
}

fn script(tests: &[Test], filter: Option<&str>) -> anyhow::Result<String> {
    if let Some(filter) = filter
        && !filter.chars().all(|c| c.is_ascii_alphanumeric() || "_:".contains(c))
    {
        bail!("`{filter}` is no part of a test's name (letters, digits, `_` and `::`)");
    }
    let mut script = "failed=0\n".to_owned();
    for Test { name, manifest_dir, executable } in tests {
        script.push_str(&format!(
            "echo 'handover-vm runs {name}'\ncd {}\n{} --test-threads=1 {} || failed=1\n",
            plain(manifest_dir)?,
            plain(executable)?,
            filter.unwrap_or_default()
        ));
    }
    script.push_str("exit $failed\n");
    Ok(script)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_the_shell_that_it_would_read() {
        let test =
            || Test { name: "p t".into(), manifest_dir: "/w/p".into(), executable: "/t/deps/t-1".into() };
        let said = script(&[test()], Some("a::b")).unwrap();
        assert!(said.contains("\n/t/deps/t-1 --test-threads=1 a::b || failed=1\n"), "{said}");
        for bad in ["a b", "a;b", "$(a)", "a'b", "a\nb"] {
            assert!(script(&[test()], Some(bad)).is_err(), "{bad}");
            let odd = Test { executable: format!("/t/{bad}").into(), ..test() };
            assert!(script(&[odd], None).is_err(), "{bad}");
        }
    }
}
