//! However a lab ends, nothing of it goes on.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, ChildStderr, Command, Stdio},
};

use handover_lab::{Lab, cgroup_root};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A `handover-lab run` in the middle of its play, as far as the user's connection.
fn playing() -> (Child, BufReader<ChildStderr>) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_handover-lab"))
        .args(["run", "--app", "redis", "--json"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("user: taro connects") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "it ended early");
    }
    (child, said)
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
}

/// The cgroup of the lab, with all in it.
fn processes(pid: u32) -> Vec<String> {
    let root = cgroup_root().unwrap().join(format!("handover-lab-{pid}"));
    let mut found = Vec::new();
    let mut todo = vec![root];
    while let Some(dir) = todo.pop() {
        found.extend(
            fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines().map(str::to_owned),
        );
        let below = fs::read_dir(&dir).into_iter().flatten().flatten().map(|e| e.path());
        todo.extend(below.filter(|p| p.is_dir()));
    }
    found
}

#[test]
fn a_killed_lab_leaves_nothing_running_and_the_next_clears_the_rest() {
    let (mut child, mut said) = playing();
    assert!(processes(child.id()).len() > 10);
    signal(&child, Signal::SIGKILL);
    child.wait().unwrap();
    // the hosts have inherited the pipe: it ends only when the last of them does
    said.read_to_end(&mut Vec::new()).unwrap();
    let cgroup = cgroup_root().unwrap().join(format!("handover-lab-{}", child.id()));
    assert!(cgroup.exists());
    let _next = Lab::new().unwrap();
    assert!(!cgroup.exists());
}

#[test]
fn an_interrupted_lab_takes_itself_down() {
    let (mut child, mut said) = playing();
    signal(&child, Signal::SIGINT);
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{rest}");
    assert!(!cgroup_root().unwrap().join(format!("handover-lab-{}", child.id())).exists(), "{rest}");
}
