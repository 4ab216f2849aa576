//! `handover-gateway watch` and the histogram of windows, with the daemon as it is run.

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, ChildStdout},
};

use common::lab::*;
use handover_api::v1;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// `handover-gateway watch`, running.
struct Watch {
    child: Child,
    out: Option<BufReader<ChildStdout>>,
}

impl Watch {
    fn start(lab: &Lab, arguments: &[&str]) -> Self {
        let mut command = lab.daemon(&lab.config());
        let mut child = command.arg("watch").args(arguments).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out: Some(out) }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.as_mut().unwrap().read_line(&mut line).unwrap();
        line
    }

    /// Everything up to the first event of this kind.
    fn until(&mut self, event: &str) -> Vec<Value> {
        let mut seen: Vec<Value> = Vec::new();
        while seen.last().is_none_or(|last| last["event"] != event) {
            let line = self.line();
            seen.push(serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?} after {seen:?}")));
        }
        seen
    }

    fn end(mut self) -> (Option<i32>, String) {
        drop(self.out.take());
        let mut error = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        (self.child.wait().unwrap().code(), error)
    }
}

#[test]
fn a_watcher_is_told_of_every_change_and_of_the_frames() {
    let lab = Lab::new();
    let daemon = lab.start();
    let _wire = Wire::new(&lab.router);
    let mut watch = Watch::start(&lab, &["-o", "json", "--interval", "100"]);
    // it is there once it has told of the frames for the first time
    watch.until("frames");
    lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
    let seen = watch.until("configured");
    assert_eq!(seen.last().unwrap()["users"], 1, "{seen:?}");
    let seen = watch.until("router");
    assert!(
        seen.last().unwrap()["detail"].as_str().unwrap().contains("10.1.0.1 on interface wan0"),
        "{seen:?}"
    );

    assert!(lab.echo());
    let counted =
        |seen: &[Value], outcome: &str| seen.iter().any(|e| e["frames"][outcome].as_u64() > Some(0));
    let mut seen = Vec::new();
    while !(counted(&seen, "access_forwarded") && counted(&seen, "wan_forwarded")) {
        seen = watch.until("frames");
    }

    let staged = lab.call(async |mut gateway| gateway.stage(stage("m", "net2")).await.unwrap().into_inner());
    let hold = v1::HoldRequest {
        migration: "m".into(),
        switch: staged.switch,
        generation: staged.generation,
        address: "203.0.113.10".into(),
        deadline_ms: 30_000,
        marker: None,
    };
    lab.call(async |mut gateway| gateway.hold(hold).await.unwrap());
    lab.call(async |mut gateway| gateway.switch(switch_of(&staged, "m")).await.unwrap());
    let abort = || v1::AbortSwitchRequest { migration: "m".into() };
    lab.call(async |mut gateway| gateway.abort(abort()).await.unwrap());
    // there is nothing to abort any more: nothing is told
    lab.call(async |mut gateway| gateway.abort(abort()).await.unwrap());
    let staged = lab.call(async |mut gateway| gateway.stage(stage("m2", "net2")).await.unwrap().into_inner());
    lab.call(async |mut gateway| gateway.switch(switch_of(&staged, "m2")).await.unwrap());
    let finish = v1::FinishSwitchRequest { migration: "m2".into() };
    lab.call(async |mut gateway| gateway.finish(finish).await.unwrap());
    let mut seen = watch.until("finished");
    seen.retain(|event| event["event"] != "frames" && event["event"] != "router");
    let told: Vec<_> = seen
        .iter()
        .map(|e| (e["event"].as_str().unwrap(), e["migration"].as_str().unwrap(), e["to"].as_str().unwrap()))
        .collect();
    let (m, m2, net2) = ("m", "m2", "net2");
    assert_eq!(
        told,
        [
            ("staged", m, net2),
            ("held", m, net2),
            ("switched", m, net2),
            ("aborted", m, net2),
            ("staged", m2, net2),
            ("switched", m2, net2),
            ("finished", m2, net2)
        ]
    );
    assert!(seen.iter().all(|e| e["names"] == serde_json::json!(["taro"])), "{seen:?}");
    assert!(seen[2]["window_ns"].is_u64() && seen[0]["window_ns"].is_null());

    // Ctrl-C ends it, and it is no error
    kill(Pid::from_raw(watch.child.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(watch.end(), (Some(0), String::new()));

    // nobody reads any more
    let mut watch = Watch::start(&lab, &["--interval", "100"]);
    assert!(watch.line().contains("frames"));
    assert_eq!(watch.end(), (Some(0), String::new()));
    // so many and no more, for people
    let mut watch = Watch::start(&lab, &["--interval", "100", "--count", "2"]);
    assert!(watch.line().contains("frames") && watch.line().contains("frames"));
    assert_eq!(watch.line(), "");
    assert_eq!(watch.end(), (Some(0), String::new()));
    let watch = Watch::start(&lab, &["--interval", "5"]);
    let (code, error) = watch.end();
    assert!(code == Some(2) && error.contains("100..=60000"), "{error}");

    // both switches are in the histogram, wherever
    let windows = lab.status().windows.unwrap();
    assert_eq!(windows.buckets.iter().map(|b| b.switches).sum::<u64>(), 2, "{windows:?}");
    assert!(windows.buckets.last().unwrap().up_to_ns >= windows.max_ns);
    let mut status = lab.daemon(&lab.config());
    let shown = status.args(["status", "-o", "json"]).output().unwrap();
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["windows"]["max_ns"], windows.max_ns);
    let mut switches = lab.daemon(&lab.config());
    let shown = String::from_utf8(switches.arg("switches").output().unwrap().stdout).unwrap();
    assert!(shown.contains("WINDOW UP TO"), "{shown}");

    // the daemon does not wait for those who look on
    let mut watch = Watch::start(&lab, &["--interval", "100"]);
    watch.line();
    let (code, log) = daemon.stop();
    assert_eq!(code, 0, "{log}");
    let (code, error) = watch.end();
    assert!(code == Some(0) || code == Some(1) && error.contains("has ended"), "{code:?} {error}");
}
