use std::{collections::BTreeMap, sync::Arc};

use super::*;
use crate::{
    inventory::Target,
    session::{Entry, Member, Policy, Side, SubStep, Ticket, Vote},
};

fn side(site: &str, network: &str) -> Side {
    Side {
        site: site.into(),
        network: network.into(),
        server: format!("{site}-server"),
        migration: "x:1".into(),
    }
}

fn play(events: Vec<(u64, Event)>) -> v1::Session {
    let member = Member { name: "taro".into(), addresses: vec!["10.1.0.100".into()] };
    let plan = Arc::new(Plan {
        id: "film-1".into(),
        service: "film".into(),
        address: "203.0.113.10".into(),
        target: Target::Pid(7),
        from: side("main", "net1"),
        to: side("backup", "net2"),
        gateways: BTreeMap::from([("gw".to_owned(), vec![member])]),
        policy: Policy::Late,
        allow_other_peers: false,
        hold: None,
        trigger: "operator".into(),
        requested_at_ms: 1,
        findings: Vec::new(),
    });
    let (mut s, _) = Session::begin("film-1", Entry { at_us: 0, event: Event::Requested { plan } }).unwrap();
    for (at_us, event) in events {
        s.apply(Entry { at_us, event }).unwrap();
    }
    session(&s)
}

fn until_vote() -> Vec<(u64, Event)> {
    let vote = Vote {
        steps: vec![
            SubStep { name: "fence".into(), started_us: 5, took_us: 10 },
            SubStep { name: "dump".into(), started_us: 20, took_us: 100 },
            SubStep { name: "restore".into(), started_us: 130, took_us: 50 },
        ],
        pid: 7,
        image_bytes: 1025,
        connections: 2,
        losses: vec!["a UDP queue".into()],
    };
    vec![
        (100, Event::Checked { findings: Vec::new(), pid: 7, memory_bytes: 0, sent_us: 1 }),
        (
            210,
            Event::Staged { gateway: "gw".into(), ticket: Ticket { switch: 1, generation: 1 }, sent_us: 110 },
        ),
        (250, Event::Prepared { sent_us: 111 }),
        (600, Event::Frozen { vote, sent_us: 260 }),
    ]
}

fn rows(s: &v1::Session) -> Vec<String> {
    s.steps
        .iter()
        .map(|s| format!("{} {} {}+{} {}", s.name, s.actor, s.started_us, s.took_us, s.state))
        .collect()
}

#[test]
fn a_migration_that_went_well() {
    let mut events = until_vote();
    events.extend([
        (650, Event::Switched { gateway: "gw".into(), window_ns: 1500, store_latency_ns: 9, sent_us: 610 }),
        (680, Event::Yielded { sent_us: 655 }),
        (681, Event::Decided { decision: Decision::Commit }),
        (900, Event::Resumed { pid: 7, sent_us: 800 }),
        (950, Event::Finished { gateway: "gw".into(), held: None, sent_us: 905 }),
        (990, Event::Ended { sent_us: 904 }),
    ]);
    let s = play(events);
    assert_eq!(
        rows(&s),
        [
            "request operator 0+0 done",
            "preflight controller 1+99 done",
            "stage gateway gw 110+100 done",
            "prepare migrator main-server 111+139 done",
            "freeze migrator main-server 260+340 done",
            "fence migrator main-server 265+10 done",
            "dump migrator main-server 280+100 done",
            "restore migrator backup-server 390+50 done",
            "switch gateway gw 610+40 done",
            "yield migrator main-server 655+25 done",
            "decision controller 681+119 done", // until the first call that it allows left
            "resume migrator backup-server 800+100 done",
            "finish gateway gw 905+45 done",
            "end migrator main-server 904+86 done",
            "completed controller 990+0 done",
        ]
    );
    assert_eq!(s.frozen_us, 900 - 280);
    assert_eq!((s.outcome(), s.switch_window_ns, s.pending.len()), (v1::Outcome::Completed, Some(1500), 0));
    assert_eq!(s.losses, ["a UDP queue"]);
    assert_eq!(s.steps[4].detail, "2 KiB, 2 connections");
}

#[test]
fn what_is_under_way_is_shown_as_running() {
    let s = play(until_vote());
    assert_eq!(rows(&s).last().unwrap(), "switch gateway gw 600+0 running");
    assert_eq!((s.state.as_str(), s.outcome()), ("switching", v1::Outcome::Running));
    assert_eq!(s.frozen_us, 0);
}

#[test]
fn a_failure_names_step_and_reason_and_what_was_undone() {
    let mut events = until_vote();
    let failed = Event::Failed {
        step: Step::Switch,
        part: None,
        actor: "gateway gw".into(),
        reason: "no answer within 3 s".into(),
        sent_us: 610,
    };
    let undone = |participant, alive| Event::Undone { participant, alive, held: None, sent_us: 720 };
    let gw = Participant::Gateway("gw".into());
    events.extend([
        (700, failed),
        (701, Event::Decided { decision: Decision::Abort }),
        (730, undone(Participant::Source, true)),
        (740, undone(Participant::Destination, false)),
    ]);
    let s = play(events.clone());
    assert_eq!(s.pending, ["gateway gw: abort"]);
    assert_eq!(s.outcome(), v1::Outcome::Running);
    events.push((900, Event::Unconfirmed { participant: gw.clone(), reason: "connection refused".into() }));
    let s = play(events.clone());
    assert_eq!(s.outcome(), v1::Outcome::RolledBack);
    assert_eq!(s.pending, ["gateway gw: abort (connection refused)"]);
    assert_eq!((s.failed_step.as_str(), s.reason.as_str()), ("switch", "no answer within 3 s"));
    assert_eq!(
        rows(&s)[2..],
        [
            "stage gateway gw 110+100 done",
            "prepare migrator main-server 111+139 undone",
            "freeze migrator main-server 260+340 undone",
            "fence migrator main-server 265+10 undone",
            "dump migrator main-server 280+100 undone",
            "restore migrator backup-server 390+50 undone",
            "switch gateway gw 610+90 failed",
            "decision controller 701+19 done",
            "abort migrator main-server 720+10 done",
            "abort migrator backup-server 720+20 done",
            "rolled-back controller 900+0 done",
            "abort gateway gw 900+0 running",
        ]
    );
    events.push((2000, undone(gw, false)));
    let s = play(events);
    assert!(s.pending.is_empty());
    assert_eq!(rows(&s)[2], "stage gateway gw 110+100 undone");
}

#[test]
fn a_part_of_the_freeze_is_named_as_the_failed_step() {
    let mut events = until_vote();
    events.pop();
    events.push((
        600,
        Event::Failed {
            step: Step::Freeze,
            part: Some("dump".into()),
            actor: "migrator main-server".into(),
            reason: "no".into(),
            sent_us: 260,
        },
    ));
    let s = play(events);
    assert_eq!(s.failed_step, "dump");
    assert!(rows(&s).contains(&"freeze migrator main-server 260+340 failed".to_owned()));
}
