//! `handover-gateway debug`, with the daemon as it is run: what is told of a user's frames, and that no frame of anybody is lost
//! when the programs change.

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, ChildStdout},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use common::{TARO, VIRTUAL, lab::*};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// The tags of the attached programs.
fn programs(lab: &Lab) -> Vec<String> {
    let tag = |interface: &str| {
        let shown = lab.gateway.sh(&format!("ip -d link show {interface}"));
        shown.split_whitespace().skip_while(|w| *w != "tag").nth(1).unwrap().to_owned()
    };
    ["access0", "wan0"].map(tag).to_vec()
}

fn debug(lab: &Lab, arguments: &[&str]) -> Child {
    lab.daemon(&lab.config()).arg("debug").args(arguments).spawn().unwrap()
}

/// The next frame with this outcome that is told of.
fn told(child: &mut Child, out: &mut BufReader<ChildStdout>, outcome: &str) -> Value {
    let mut others = BTreeMap::<String, u64>::new();
    loop {
        let mut line = String::new();
        if out.read_line(&mut line).unwrap() == 0 {
            let mut error = String::new();
            child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
            panic!("it ended, and {outcome} was not told of, but {others:?}: {error}");
        }
        let frame: Value = serde_json::from_str(&line).unwrap();
        if frame["outcome"] == outcome {
            return frame;
        }
        *others.entry(frame["outcome"].as_str().unwrap().into()).or_default() += 1;
    }
}

fn ended(mut child: Child) -> (Option<i32>, String) {
    drop(child.stdout.take());
    let mut error = String::new();
    child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
    (child.wait().unwrap().code(), error)
}

#[test]
fn a_users_frames_are_told_of_and_nobody_loses_one() {
    for pinned in [false, true] {
        let lab = if pinned { Lab::pinned() } else { Lab::new() };
        let daemon = lab.start();
        let _wire = Wire::new(&lab.router);
        lab.call(async |mut gateway| gateway.configure(configuration()).await.unwrap());
        assert!(lab.echo());
        let usual = programs(&lab);
        let (code, error) = ended(debug(&lab, &["nobody"]));
        assert!(code == Some(1) && error.contains("no user `nobody`"), "{error}");
        let (code, error) = ended(debug(&lab, &["taro", "--for", "2h"]));
        assert!(code == Some(2) && error.contains("60m"), "{error}");
        assert_eq!(programs(&lab), usual, "a refusal changes nothing");

        let stream = Stream::start(&lab);
        let mut child = debug(&lab, &["taro", "--for", "1m", "-o", "json"]);
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let hex = |mac: handover_gateway::mac::Mac| mac.to_string().replace(':', "");
        let frame = told(&mut child, &mut out, "access_forwarded");
        assert_eq!((&frame["side"], &frame["interface"]), (&"access".into(), &"access0".into()));
        let (before, after) = (frame["before"].as_str().unwrap(), frame["after"].as_str().unwrap());
        assert_eq!(&before[..28], format!("{}{}0800", hex(VIRTUAL), hex(TARO)));
        assert_eq!(&after[12..28], format!("{}0800", hex(TARO)), "untagged in this network");
        assert!(programs(&lab).iter().zip(&usual).all(|(now, usual)| now != usual), "others are attached");
        // one at a time
        let (code, error) = ended(debug(&lab, &["taro"]));
        assert!(code == Some(1) && error.contains("already"), "{error}");

        // what comes for the user: again and again, as what comes too fast is not told of
        let sent = stream.ends_whole();
        let taro = lab.taro.run(|| std::net::UdpSocket::bind((TARO_IP, 0)).unwrap());
        let (sender, stop) = (taro.try_clone().unwrap(), Arc::new(AtomicBool::new(false)));
        let stopping = Arc::clone(&stop);
        let more = thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                // nobody listens there: the router's kernel says so, from time to time
                let _ = sender.send_to(b"more", (R, 7));
                thread::sleep(Duration::from_millis(2));
            }
        });
        let frame = told(&mut child, &mut out, "wan_forwarded");
        assert_eq!(&frame["after"].as_str().unwrap()[..24], format!("{}{}", hex(TARO), hex(VIRTUAL)));
        let staged =
            lab.call(async |mut gateway| gateway.stage(stage("m", "net2")).await.unwrap().into_inner());
        lab.call(async |mut gateway| gateway.switch(switch_of(&staged, "m")).await.unwrap());
        let tagged = loop {
            let frame = told(&mut child, &mut out, "access_forwarded");
            let after = frame["after"].as_str().unwrap().to_owned();
            if after.starts_with(&hex(ROUTER2)) {
                break after;
            }
        };
        assert_eq!(&tagged[12..36], format!("{}810000020800", hex(TARO)));

        stop.store(true, Ordering::Relaxed);
        more.join().unwrap();
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
        assert_eq!(ended(child), (Some(0), String::new()));
        let stream_ended = std::time::Instant::now();
        while programs(&lab) != usual {
            assert!(stream_ended.elapsed() < PATIENCE, "the usual programs are not back");
        }
        println!("{sent} frames while the programs were exchanged, all there");
        // a while is over by itself
        let mut child = debug(&lab, &["taro", "--for", "1s"]);
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(ended(child), (Some(0), String::new()));
        assert_eq!(programs(&lab), usual);

        // a daemon that is killed meanwhile leaves a data path that forwards, and the next puts it right
        if pinned {
            let finish = handover_api::v1::FinishSwitchRequest { migration: "m".into() };
            lab.call(async |mut gateway| gateway.finish(finish).await.unwrap());
            let mut child = debug(&lab, &["taro", "-o", "json"]);
            let mut out = BufReader::new(child.stdout.take().unwrap());
            taro.send_to(b"again", (R, 7)).unwrap();
            out.read_line(&mut String::new()).unwrap();
            daemon.kill();
            drop(ended(child));
            assert_ne!(programs(&lab), usual);
            let daemon = lab.start();
            assert!(daemon.began.contains("Replaced"), "{}", daemon.began);
            assert_eq!(programs(&lab), usual);
            drop(daemon.stop());
            assert_eq!(lab.detach().0, 0);
        }
    }
}
