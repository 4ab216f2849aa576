//! `run`, `simulate`, `test` and `bench`: build, then hand over to the project's own programs.

use std::{
    os::unix::process::ExitStatusExt as _,
    process::{Command, ExitCode, ExitStatus},
};

use anyhow::Context as _;

use crate::{
    command::{cargo, run as run_command, succeeds, workspace},
    setup,
};

/// The crates that only build for the BPF target.
const BPF_CRATES: [&str; 3] = ["gateway-bench-ebpf", "gateway-ebpf", "lab-provider-ebpf"];

/// `cargo xtask run`: the lab's own `run`.
pub fn run(args: &[String]) -> anyhow::Result<ExitCode> {
    setup::run()?;
    eprintln!("build: all programs");
    run_command(cargo().args(["build", "--quiet", "--bins"]))?;
    let lab = target_dir().join("debug/handover-lab");
    hand_over(Command::new(&lab).arg("run").args(args))
}

/// `cargo xtask bench` and `cargo xtask fuzz`: the gateway's own bench, with the daemon beside it.
pub fn gateway_bench(args: &[String]) -> anyhow::Result<ExitCode> {
    setup::run()?;
    let mut build = cargo();
    build.args(["build", "--quiet", "--release", "--bins"]);
    run_command(build.args(["--package", "handover-gateway", "--package", "handover-gateway-bench"]))?;
    hand_over(Command::new(target_dir().join("release/handover-gateway-bench")).args(args))
}

/// `cargo xtask bench migrate`: the lab's bench, everything built as it is shipped.
pub fn bench_migrate(args: &[String]) -> anyhow::Result<ExitCode> {
    setup::run()?;
    eprintln!("build: all programs, as they are shipped");
    run_command(cargo().args(["build", "--quiet", "--release", "--bins"]))?;
    let lab = target_dir().join("release/handover-lab");
    hand_over(Command::new(&lab).arg("bench-migrate").args(args))
}

/// `cargo xtask simulate`.
pub fn simulate(seeds: u64, seed: u64, mutation: Option<String>) -> anyhow::Result<ExitCode> {
    let mut args = vec!["--seeds".into(), seeds.to_string(), "--seed".into(), seed.to_string()];
    args.extend(mutation.into_iter().flat_map(|m| ["--mutation".into(), m]));
    release("handover-simulation", "handover-simulate", &args)
}

/// Runs one of the project's programs, built as it is shipped.
fn release(package: &str, program: &str, args: &[String]) -> anyhow::Result<ExitCode> {
    setup::run()?;
    let mut cargo = cargo();
    cargo.args(["run", "--quiet", "--release", "--package", package, "--bin", program, "--"]).args(args);
    hand_over(&mut cargo)
}

/// `cargo xtask test`: everything that has to hold before a change lands; with `all`, also what takes minutes more.
pub fn test(filter: Option<&str>, all: bool) -> anyhow::Result<ExitCode> {
    setup::run()?;
    let step = |what: &str| eprintln!("test: {what}");

    step("formatting");
    run_command(cargo().args(["fmt", "--all", "--check"]))?;

    step("lints, host crates");
    run_command(cargo().args(["clippy", "--quiet", "--all-targets", "--", "-D", "warnings"]))?;
    step("lints, BPF crates");
    for package in BPF_CRATES {
        // apart: unified features would build the host half for the BPF target
        let mut clippy = cargo();
        clippy.args(["clippy", "--quiet", "--release", "--target", "bpfel-unknown-none", "-Zbuild-std=core"]);
        clippy.args(["--package", package, "--target-dir"]).arg(target_dir().join("bpf-clippy"));
        clippy.args(["--", "-D", "warnings"]).env("RUSTC_BOOTSTRAP", "1");
        run_command(&mut clippy)?;
    }

    if succeeds(cargo().args(["deny", "--version"])) {
        step("licences and sources of dependencies");
        run_command(cargo().args(["deny", "check", "bans", "licenses", "sources"]))?;
    } else {
        step("licences and sources of dependencies: SKIPPED, cargo-deny is not installed");
    }

    step("build of all programs");
    run_command(cargo().args(["build", "--quiet", "--bins"]))?;

    // The lab takes the machine for itself (one at a time), so its scenarios run one after the other.
    step("unit and XDP tests");
    let mut tests = cargo();
    tests.args(["test", "--no-fail-fast"]).args(all_but_lab());
    // the host half of the program: packet rules and layouts
    let mut shared = cargo();
    shared.args(["test", "--package", "gateway-ebpf", "--lib"]);
    let mut lab = cargo();
    lab.args(["test", "--no-fail-fast", "--package", "handover-lab"]);
    for tests in [&mut tests, &mut shared] {
        tests.args(["--", "--test-threads=1"]).args(filter);
        run_command(tests)?;
    }
    step("the lab's scenarios");
    lab.args(["--", "--test-threads=1"]).args(all.then_some("--include-ignored"));
    run_command(lab.args(filter))?;
    Ok(ExitCode::SUCCESS)
}

/// Those of `cargo xtask fuzz`: the tests called `decoders` of the crates that have one, with `cases` cases each.
pub fn fuzz_decoders(cases: u32) -> anyhow::Result<ExitCode> {
    setup::run()?;
    eprintln!("fuzz: {cases} cases for each decoder");
    let mut tests = cargo();
    tests.args(["test", "--package", "handover-controller", "--package", "handover-migrator"]);
    tests.args(["--test", "decoders"]).env("HANDOVER_FUZZ_CASES", cases.to_string());
    hand_over(&mut tests)
}

/// All packages whose tests need no lab, as arguments for cargo.
pub fn all_but_lab() -> Vec<&'static str> {
    let excluded = BPF_CRATES.iter().copied().chain(["handover-lab"]);
    std::iter::once("--workspace").chain(excluded.flat_map(|c| ["--exclude", c])).collect()
}

/// Where cargo builds.
pub fn target_dir() -> std::path::PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), |d| workspace().join(d))
}

/// Runs `command` in our place: its streams are ours, and so is its exit code.
fn hand_over(command: &mut Command) -> anyhow::Result<ExitCode> {
    let status =
        command.status().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    Ok(exit_code(status))
}

fn exit_code(status: ExitStatus) -> ExitCode {
    // as a shell reports it: 128 + signal
    let code = status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
