//! The driver against peers that fail at every step: what is undone, what is retried, what is remembered.

#![allow(clippy::unwrap_used)] // clippy knows tests by their attribute, not their helpers

mod support;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use handover_api::v1;
use handover_controller::{
    controller::{CancelError, Controller, MigrateError},
    queue::Limits,
    report,
    session::{Decision, Event, Outcome, Policy, Session, State},
    triggers::Request,
    world::RequestError,
};
use support::{Fault, Fixture};
use tokio::time::timeout;
use tonic::Code;

const PATIENCE: Duration = Duration::from_secs(40);

fn request(to: &str, policy: Policy) -> Request {
    Request {
        service: "film".into(),
        to_site: to.into(),
        users: Vec::new(),
        policy,
        allow_other_peers: false,
        hold: true,
        trigger: "operator".into(),
    }
}

async fn controller(f: &Fixture) -> Arc<Controller> {
    let controller = Controller::open(&f.path("state"), f.tls(), Limits::default()).unwrap();
    let (_, _, notes) = controller.apply(&f.inventory, false).await.unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    controller
}

/// The next controller: its journal is free once the last one has ended.
async fn reopened(f: &Fixture) -> Arc<Controller> {
    let open = async {
        loop {
            match Controller::open(&f.path("state"), f.tls(), Limits::default()) {
                Ok(c) => return c,
                Err(e) if e.to_string().contains("in use") => tokio::task::yield_now().await,
                Err(e) => panic!("{e}"),
            }
        }
    };
    timeout(PATIENCE, open).await.unwrap()
}

/// Waits for the session to be as `wanted`.
async fn until(c: &Controller, id: &str, wanted: impl Fn(&Session) -> bool) -> Session {
    let mut changes = c.changes();
    let wait = async {
        loop {
            let session = c.session(id).unwrap();
            if wanted(&session) {
                return session;
            }
            changes.changed().await.unwrap();
        }
    };
    match timeout(PATIENCE, wait).await {
        Ok(session) => session,
        Err(_) => panic!("session {id} stays {:?}", c.session(id).unwrap().state),
    }
}

async fn over(c: &Controller, id: &str) -> v1::Session {
    report::session(&until(c, id, |s| s.state.outcome() != Outcome::Running).await)
}

async fn settled(c: &Controller, id: &str) -> v1::Session {
    report::session(&until(c, id, |s| s.outstanding().is_empty()).await)
}

fn place(c: &Controller) -> (String, String) {
    let world = c.snapshot();
    (world.services["film"].site.clone(), world.users["taro"].clone())
}

fn here() -> (String, String) {
    ("main".into(), "net1".into())
}

fn there() -> (String, String) {
    ("backup".into(), "net2".into())
}

#[tokio::test(flavor = "multi_thread")]
async fn forth_and_back() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    assert_eq!(place(&c), here());
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    assert_eq!(id, "film-1");
    let s = settled(&c, &id).await;
    assert_eq!(s.outcome(), v1::Outcome::Completed, "{s:#?}");
    let mut calls = f.stage.calls();
    calls[..2].sort(); // in parallel
    calls[6..].sort();
    assert_eq!(
        calls,
        [
            "gw stage film-1",
            "main-server prepare film-1",
            "gw hold film-1",
            "main-server freeze film-1",
            "gw switch film-1",
            "main-server yield film-1",
            "backup-server resume film-1",
            "gw finish film-1",
            "main-server end film-1",
        ]
    );
    assert_eq!(place(&c), there());
    assert_eq!(f.gateway.network_of("taro"), "net2");
    assert_eq!(c.snapshot().services["film"].pid, 4711);

    let names: Vec<&str> = s.steps.iter().map(|s| s.name.as_str()).collect();
    for name in report::STEPS {
        assert!(names.contains(&name), "no step {name} in {names:?}");
    }
    assert!(s.steps.iter().all(|s| s.state == "done"), "{s:#?}");
    let step = |name: &str| s.steps.iter().find(|s| s.name == name).unwrap();
    assert_eq!(step("dump").started_us, step("freeze").started_us + 30);
    assert_eq!(step("restore").actor, "migrator backup-server");
    let resumed = step("resume").started_us + step("resume").took_us;
    assert_eq!(s.frozen_us, resumed - step("dump").started_us);
    assert_eq!((s.held_frames, s.held_dropped, s.held_late), (Some(12), Some(7), Some(5)));
    assert_eq!(
        step("finish").detail,
        "12 frames held, 3 over the bound, dropped, 4 lost with the daemon, 5 late"
    );
    assert_eq!((s.switch_window_ns, s.image_bytes, s.connections), (Some(2500), 5 << 20, 1));

    let id = c.migrate(&request("main", Policy::Late), false).await.unwrap();
    assert_eq!(id, "film-2");
    assert_eq!(settled(&c, &id).await.outcome(), v1::Outcome::Completed);
    assert_eq!(place(&c), here());
    assert_eq!(f.gateway.network_of("taro"), "net1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_at_any_step_before_the_decision_undoes_everything() {
    for (who, step, why, failed_step) in [
        ("gw", "stage", "no router answers in VLAN 2", "stage"),
        ("main-server", "prepare", "backup-server does not answer", "prepare"),
        ("gw", "hold", "no memory left to hold frames", "hold"),
        ("main-server", "freeze", "dump: socket of a kind CRIU cannot take", "dump"),
        ("main-server", "freeze", "restore: backup-server: pid 4711 is taken", "restore"),
        ("main-server", "freeze", "quiet: the service does not read what has arrived", "quiet"),
        ("main-server", "freeze", "drain: connections wait to be accepted", "drain"),
        ("gw", "switch", "not what was staged", "switch"),
        ("main-server", "yield", "it has gone back alone", "yield"),
    ] {
        let f = Fixture::start().await;
        let c = controller(&f).await;
        f.stage.fault(&format!("{who} {step}"), Fault::Refuse(Code::FailedPrecondition, why));
        let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
        let s = settled(&c, &id).await;
        assert_eq!(s.outcome(), v1::Outcome::RolledBack, "{step}: {s:#?}");
        // a part of the freeze is named as the step, and not again in the reason
        let reason = why.strip_prefix(&format!("{failed_step}: ")).unwrap_or(why);
        assert_eq!((s.failed_step.as_str(), s.reason.as_str()), (failed_step, reason));
        assert!(s.pending.is_empty(), "{step}: {:?}", s.pending);
        f.no_contradiction(&id);
        for undone in ["gw abort film-1", "main-server abort film-1", "backup-server abort film-1"] {
            assert_eq!(f.stage.count(undone), 1, "{step}: {:?}", f.stage.calls());
        }
        assert_eq!(place(&c), here());
        assert_eq!(f.gateway.network_of("taro"), "net1");
        // a refusal is not a lost answer: nobody was asked twice
        assert_eq!(f.stage.count(&format!("{who} {step} film-1")), 1);
        // and the next one succeeds
        let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
        assert_eq!(settled(&c, &id).await.outcome(), v1::Outcome::Completed, "after {step}");
    }
}

/// Frames sent on to a service that is still fenced would be lost.
#[tokio::test(flavor = "multi_thread")]
async fn after_an_abort_held_frames_go_when_the_source_runs_again() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    f.stage.fault("gw switch", Fault::Refuse(Code::FailedPrecondition, "not what was staged"));
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    let s = settled(&c, &id).await;
    assert_eq!(s.outcome(), v1::Outcome::RolledBack);
    let calls = f.stage.calls();
    let at = |call: &str| calls.iter().position(|c| c == call).unwrap();
    assert!(at("main-server abort film-1") < at("gw abort film-1"), "{calls:?}");
    assert_eq!((s.held_frames, s.held_dropped), (Some(12), Some(7)));

    // but they do not wait for a source that does not answer
    f.stage.forget_calls();
    f.stage.fault("gw switch", Fault::Refuse(Code::FailedPrecondition, "not what was staged"));
    f.stage.fault("main-server abort", Fault::Hang);
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    f.stage.until_called("gw abort film-2").await;
    assert_eq!(settled(&c, &id).await.outcome(), v1::Outcome::RolledBack);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_hold_no_gateway_is_asked_to() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    let id = c.migrate(&Request { hold: false, ..request("backup", Policy::Late) }, false).await.unwrap();
    let s = settled(&c, &id).await;
    assert_eq!((s.outcome(), s.held_frames), (v1::Outcome::Completed, None));
    assert_eq!(f.stage.count("gw hold film-1"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_is_asked_for_again() {
    for (who, step) in [
        ("gw", "stage"),
        ("main-server", "prepare"),
        ("main-server", "freeze"),
        ("gw", "switch"),
        ("main-server", "yield"),
        ("backup-server", "resume"),
        ("main-server", "end"),
        ("gw", "finish"),
    ] {
        let f = Fixture::start().await;
        let c = controller(&f).await;
        f.stage.fault(&format!("{who} {step}"), Fault::LoseAnswer);
        let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
        let s = settled(&c, &id).await;
        assert_eq!(s.outcome(), v1::Outcome::Completed, "{step}: {s:#?}");
        assert_eq!(f.stage.count(&format!("{who} {step} film-1")), 2, "{step}: {:?}", f.stage.calls());
        f.no_contradiction(&id);
        assert_eq!(place(&c), there());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_of_an_undo_is_asked_for_again() {
    for who in ["gw", "main-server", "backup-server"] {
        let f = Fixture::start().await;
        let c = controller(&f).await;
        f.stage.fault("main-server yield", Fault::Refuse(Code::Aborted, "it has gone back alone"));
        f.stage.fault(&format!("{who} abort"), Fault::LoseAnswer);
        let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
        let s = settled(&c, &id).await;
        assert_eq!(s.outcome(), v1::Outcome::RolledBack, "{who}: {s:#?}");
        assert_eq!(f.stage.count(&format!("{who} abort film-1")), 2);
        assert_eq!(f.gateway.network_of("taro"), "net1");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_does_not_answer_at_the_switch_is_not_waited_for() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    f.stage.fault("gw switch", Fault::Hang);
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    let s = settled(&c, &id).await;
    assert_eq!((s.outcome(), s.failed_step.as_str()), (v1::Outcome::RolledBack, "switch"));
    assert_eq!(s.reason, "no answer within 3 s");
    f.no_contradiction(&id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_lost_before_the_switch_stays_pending_until_it_is_back() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    f.stage.fault("main-server freeze", Fault::ThenDown("gw"));
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    let s = over(&c, &id).await;
    assert_eq!((s.outcome(), s.failed_step.as_str()), (v1::Outcome::RolledBack, "switch"));
    assert_eq!(s.pending.len(), 1, "{s:#?}");
    assert!(s.pending[0].starts_with("gateway gw: abort ("), "{:?}", s.pending);
    assert_eq!(place(&c), here());

    let err = c.migrate(&request("backup", Policy::Late), false).await.unwrap_err();
    let MigrateError::Request(e @ RequestError::Pending { .. }) = err else { panic!("{err}") };
    assert_eq!(
        e.to_string(),
        "session film-1 of service film still waits for gateway gw; bring it back, or remove it from the inventory if it is gone for good"
    );
    let err = c.apply(&f.inventory.replace("vid = 2", "vid = 3"), false).await;
    assert!(err.is_ok(), "a session that is over holds nothing back: {err:?}");

    f.stage.door("gw").up();
    let s = settled(&c, &id).await;
    assert!(s.pending.is_empty());
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    assert_eq!(settled(&c, &id).await.outcome(), v1::Outcome::Completed);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_decision_everything_is_retried_until_done() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    for _ in 0..3 {
        f.stage.fault("backup-server resume", Fault::Refuse(Code::Internal, "no"));
        f.stage.fault("gw finish", Fault::Refuse(Code::Internal, "no"));
        f.stage.fault("main-server end", Fault::Refuse(Code::FailedPrecondition, "no"));
    }
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    let s = settled(&c, &id).await;
    assert_eq!(s.outcome(), v1::Outcome::Completed);
    for call in ["backup-server resume film-1", "gw finish film-1", "main-server end film-1"] {
        assert_eq!(f.stage.count(call), 4, "{call}");
    }
    f.no_contradiction(&id);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_disaster_losing_the_source_after_its_vote_rolls_forward() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    f.stage.fault("gw switch", Fault::ThenDown("main-server"));
    let id = c.migrate(&request("backup", Policy::Disaster), false).await.unwrap();
    let s = over(&c, &id).await;
    assert_eq!(s.outcome(), v1::Outcome::Completed, "{s:#?}");
    assert!(s.pending[0].starts_with("migrator main-server: end ("), "{:?}", s.pending);
    assert_eq!(f.stage.count("main-server yield film-1"), 0);
    assert_eq!(place(&c), there());
    // the frozen original is ended as soon as its host is back
    f.stage.door("main-server").up();
    assert!(settled(&c, &id).await.pending.is_empty());
    assert_eq!(f.stage.count("main-server end film-1"), 1);
    f.no_contradiction(&id);
}

#[tokio::test(flavor = "multi_thread")]
async fn losing_the_source_before_its_yield_rolls_back() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    f.stage.fault("gw switch", Fault::ThenDown("main-server"));
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    // the users are put back at once; whether the service runs, the source alone can say
    let s = until(&c, &id, |s| s.state.open().is_some_and(|o| o.len() == 1)).await;
    assert_eq!(f.gateway.network_of("taro"), "net1");
    assert!(matches!(s.state, State::Aborting { frozen: true, .. }), "{:?}", s.state);
    let s = over(&c, &id).await;
    assert_eq!(s.outcome(), v1::Outcome::NeedsOperator);
    f.stage.door("main-server").up();
    let s = settled(&c, &id).await;
    assert_eq!((s.outcome(), s.failed_step.as_str()), (v1::Outcome::RolledBack, "yield"));
    f.no_contradiction(&id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_has_nothing_left_to_thaw_needs_an_operator() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    f.main.alive.store(false, Ordering::SeqCst);
    f.stage.fault("gw switch", Fault::Refuse(Code::Internal, "no"));
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    let s = over(&c, &id).await;
    assert_eq!((s.outcome(), s.state.as_str()), (v1::Outcome::NeedsOperator, "source-dead"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_found_by_preflight_refuses_and_touches_nothing() {
    for who in ["gw", "main-server", "backup-server"] {
        let f = Fixture::start().await;
        let c = controller(&f).await;
        let finding = v1::Finding {
            severity: v1::finding::Severity::Error.into(),
            code: "bad".into(),
            reporter: who.into(),
            message: "pid 4711 is taken".into(),
            remedy: "end it".into(),
        };
        f.stage.find(who, finding.clone());
        let (_, findings) = c.rehearse(&request("backup", Policy::Late)).await.unwrap();
        let found: Vec<_> = findings.iter().map(report::finding).collect();
        assert_eq!(found, std::slice::from_ref(&finding));
        assert!(c.snapshot().sessions.is_empty(), "a rehearsal leaves no session");
        let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
        let s = over(&c, &id).await;
        assert_eq!((s.outcome(), s.findings), (v1::Outcome::Refused, vec![finding]));
        assert!(f.stage.calls().is_empty(), "{:?}", f.stage.calls());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_cannot_be_reached_is_found_by_preflight() {
    for who in ["gw", "main-server", "backup-server"] {
        let f = Fixture::start().await;
        let c = controller(&f).await;
        f.stage.door(who).down();
        let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
        let s = over(&c, &id).await;
        assert_eq!(s.outcome(), v1::Outcome::Refused, "{who}");
        let role = if who == "gw" { "gateway" } else { "migrator" };
        let found = s.findings.iter().find(|f| f.code == "unreachable").unwrap();
        assert!(found.message.starts_with(&format!("{role} {who} cannot be reached: ")), "{}", found.message);
        assert!(f.stage.calls().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_session_at_a_time() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    f.stage.fault("main-server freeze", Fault::Hang);
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    f.stage.until_called("main-server freeze").await;
    let err = c.migrate(&request("backup", Policy::Late), false).await.unwrap_err();
    assert_eq!(
        err.to_string(),
        "service film is in session film-1 (freezing); wait for it (`handover sessions watch film-1`), or ask with --queue"
    );
    // what the session needs can be neither removed nor changed
    let inventory = f.inventory.replace("vid = 2", "vid = 3").replace("^film-server ", "^film ");
    let err = c.apply(&inventory, false).await.unwrap_err().to_string();
    assert!(err.contains("network net2 cannot be changed: session film-1 is under way (freezing)"), "{err}");
    assert!(err.contains("service film cannot be changed"), "{err}");
    let users = f.inventory.find("[[user]]").unwrap();
    let services = f.inventory.find("[[service]]").unwrap();
    let without = format!("{}{}", &f.inventory[..users], &f.inventory[services..]);
    let err = c.apply(&without, false).await.unwrap_err().to_string();
    assert!(err.contains("user taro cannot be removed: session film-1"), "{err}");
    // stopping aborts what is undecided
    c.stop(PATIENCE).await;
    let s = over(&c, &id).await;
    assert_eq!((s.outcome(), s.failed_step.as_str()), (v1::Outcome::RolledBack, "freeze"));
    assert_eq!(s.reason, "the controller was stopped before the decision");
    assert!(matches!(c.migrate(&request("backup", Policy::Late), false).await, Err(MigrateError::Stopping)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_started_again_is_told_where_its_users_are() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    settled(&c, &id).await;
    f.gateway.reboot();
    let told = async {
        while f.gateway.state.lock().unwrap().users.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(5), told).await.expect("configured within a few seconds");
    assert_eq!(f.gateway.network_of("taro"), "net2");
    let configured = f.gateway.state.lock().unwrap().configured;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(f.gateway.state.lock().unwrap().configured, configured, "and not again and again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_forgot_the_switch_is_switched_again() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    f.stage.fault("backup-server resume", Fault::Hang);
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    f.stage.until_called("backup-server resume").await;
    f.gateway.reboot();
    // a configuration of before the decision arrives late
    f.gateway.state.lock().unwrap().users.insert("taro".into(), "net1".into());
    let s = settled(&c, &id).await;
    assert_eq!(s.outcome(), v1::Outcome::Completed);
    assert_eq!(f.gateway.network_of("taro"), "net2");
    assert_eq!(f.stage.count("gw finish film-1-again"), 1, "{:?}", f.stage.calls());
}

#[tokio::test(flavor = "multi_thread")]
async fn switching_again_is_gone_on_with_when_it_was_cut_short() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    f.stage.fault("backup-server resume", Fault::Hang);
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    f.stage.until_called("backup-server resume").await;
    f.gateway.reboot();
    f.gateway.state.lock().unwrap().users.insert("taro".into(), "net1".into());
    // the users are on the right network after the switch, so that alone does not tell that it has to be finished
    f.stage.fault("gw switch", Fault::LoseAnswer);
    let s = settled(&c, &id).await;
    assert_eq!(s.outcome(), v1::Outcome::Completed);
    assert_eq!(f.gateway.network_of("taro"), "net2");
    assert_eq!(f.stage.count("gw finish film-1-again"), 1, "{:?}", f.stage.calls());
    assert!(f.gateway.state.lock().unwrap().staged.is_empty(), "nothing of it is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_journal_brings_everything_back() {
    let f = Fixture::start().await;
    let before = {
        let c = controller(&f).await;
        let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
        settled(&c, &id).await;
        f.stage.fault("gw stage", Fault::Refuse(Code::Internal, "no"));
        let id = c.migrate(&request("main", Policy::Late), false).await.unwrap();
        settled(&c, &id).await;
        c.snapshot()
    };
    // the first controller's tasks let go of the journal within a second
    let open = async {
        loop {
            if let Ok(c) = Controller::open(&f.path("state"), f.tls(), Limits::default()) {
                return c;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let c = timeout(Duration::from_secs(10), open).await.unwrap();
    assert_eq!(c.snapshot(), before);
    assert_eq!(place(&c), there());
    // applying the same again moves nothing and is no new revision
    let (revision, changes, _) = c.apply(&f.inventory, false).await.unwrap();
    assert_eq!((revision, changes.len()), (1, 0));
    assert_eq!(place(&c), there());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decision_that_cannot_be_written_is_none() {
    let f = Fixture::start().await;
    let database = || rusqlite::Connection::open(f.path("state/journal.db")).unwrap();
    drop(handover_controller::journal::Journal::open(&f.path("state")).unwrap());
    let full = "CREATE TRIGGER full BEFORE INSERT ON record WHEN NEW.body LIKE '%COMMIT%' \
                BEGIN SELECT RAISE(ABORT, 'disk full'); END";
    while database().execute_batch(full).is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let open = async || loop {
        match Controller::open(&f.path("state"), f.tls(), Limits::default()) {
            Ok(c) => return c,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let c = open().await;
    c.apply(&f.inventory, false).await.unwrap();
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    let fatal = timeout(PATIENCE, c.failed()).await.unwrap();
    assert!(fatal.to_string().starts_with("appending to the journal: disk full"), "{fatal}");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(f.stage.count("backup-server resume film-1"), 0);
    assert_eq!(place(&c), here());
    drop(c);
    // the next start finds no decision
    while database().execute_batch("DROP TRIGGER full").is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let c = open().await;
    let s = settled(&c, &id).await;
    assert_eq!(s.outcome(), v1::Outcome::RolledBack);
    assert_eq!(s.reason, "the controller was restarted before the decision");
    assert_eq!(place(&c), here());
    f.no_contradiction(&id);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_before_the_decision_everything_is_undone() {
    for (fault, called) in [
        ("gw stage", "gw stage"),
        ("main-server prepare", "main-server prepare"),
        ("main-server freeze", "main-server freeze"),
        ("gw switch", "gw switch"),
        ("main-server yield", "main-server yield"),
    ] {
        let f = Fixture::start().await;
        let c = controller(&f).await;
        f.stage.fault(fault, Fault::Hang);
        let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
        f.stage.until_called(called).await;
        c.cancel(&id, "operator").await.unwrap();
        let session = c.session(&id).unwrap();
        // what was answered is durable
        assert!(session.log.iter().any(|e| matches!(e.event, Event::Decided { decision: Decision::Abort })));
        let s = over(&c, &id).await;
        assert_eq!(s.outcome(), v1::Outcome::RolledBack, "{fault}");
        assert_eq!(s.reason, "cancelled by operator", "{fault}");
        assert_eq!(place(&c), here());
        for undone in ["gw abort film-1", "main-server abort film-1", "backup-server abort film-1"] {
            assert_eq!(f.stage.count(undone), 1, "{fault}: {undone}");
        }
        assert_eq!(f.stage.count("backup-server resume film-1"), 0);
        let again = c.cancel(&id, "operator").await.unwrap_err();
        assert!(again.to_string().ends_with("it was rolled back"), "{again}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_committed_cannot_be_cancelled() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    let unknown = c.cancel("film-9", "operator").await.unwrap_err();
    assert!(matches!(unknown, CancelError::Unknown(_)), "{unknown}");
    f.stage.fault("backup-server resume", Fault::Hang);
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    f.stage.until_called("backup-server resume").await;
    let late = c.cancel(&id, "operator").await.unwrap_err();
    assert!(matches!(late, CancelError::TooLate { .. }), "{late}");
    assert!(late.to_string().contains("COMMIT is durable"), "{late}");
    assert!(late.to_string().contains("`handover migrate film --to main` brings the service back"), "{late}");
    assert_eq!(settled(&c, &id).await.outcome(), v1::Outcome::Completed);
    let late = c.cancel(&id, "operator").await.unwrap_err();
    assert!(late.to_string().contains("it is completed"), "{late}");
    assert_eq!(place(&c), there());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_begins_when_it_can_also_after_a_restart() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    f.stage.fault("main-server freeze", Fault::Hang);
    let first = c.migrate(&request("backup", Policy::Late), true).await.unwrap();
    f.stage.until_called("main-server freeze").await;
    let ids = [
        c.migrate(&request("backup", Policy::Late), true).await.unwrap(),
        c.migrate(&request("main", Policy::Late), true).await.unwrap(),
        c.migrate(&request("backup", Policy::Late), true).await.unwrap(),
    ];
    assert_eq!(ids, ["film-2", "film-3", "film-4"]);
    assert_eq!(c.place_in_queue("film-3").unwrap().0, 2);
    c.cancel("film-3", "operator").await.unwrap();
    assert!(c.cancel("film-3", "operator").await.unwrap_err().to_string().contains("has left the queue"));
    assert_eq!(c.place_in_queue("film-4").unwrap().0, 2);
    // stopped: the first is aborted, nothing else begins
    c.stop(PATIENCE).await;
    assert_eq!(settled(&c, &first).await.outcome(), v1::Outcome::RolledBack);
    let waiting = c.snapshot().queue;
    drop(c);
    f.stage.no_faults();
    let c = reopened(&f).await;
    assert_eq!(waiting.iter().map(|w| w.id.as_str()).collect::<Vec<_>>(), ["film-2", "film-4"]);
    let mut changes = c.changes();
    let done = async {
        // the one after it finds the service there already
        while !c.snapshot().left.contains_key("film-4") {
            changes.changed().await.unwrap();
        }
    };
    timeout(PATIENCE, done).await.unwrap();
    assert_eq!(settled(&c, "film-2").await.outcome(), v1::Outcome::Completed);
    assert_eq!(place(&c), there());
    assert!(!c.snapshot().sessions.contains_key("film-3"));
}

/// A migration that is committed, with the destination gone: its copy cannot be resumed.
async fn in_doubt(f: &Fixture, c: &Arc<Controller>) -> String {
    f.stage.fault("main-server yield", Fault::ThenDown("backup-server"));
    let id = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    let s = until(c, &id, |s| s.state.outcome() == Outcome::NeedsOperator).await;
    assert!(matches!(s.state, State::Resuming { .. }), "{:?}", s.state);
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_takes_a_stuck_migration_back() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    let id = in_doubt(&f, &c).await;
    let account = c.account(&id, Decision::Abort).unwrap().join("\n");
    assert!(account.contains("risk:   if the copy has been resumed at backup-server"), "{account}");
    assert!(matches!(c.session(&id).unwrap().state, State::Resuming { .. }), "an account does nothing");
    // a gateway that was started again knows only the network of after COMMIT
    f.gateway.reboot();
    c.resolve(&id, Decision::Abort, "operator").await.unwrap();
    assert_eq!(place(&c), here());
    let s = until(&c, &id, |s| s.state.outcome() == Outcome::RolledBack).await;
    assert_eq!(f.stage.count("main-server abort film-1"), 1);
    assert_eq!(f.stage.count("main-server end film-1"), 0);
    assert_eq!(report::session(&s).pending.len(), 1, "the destination is told when it is back");
    let on = async {
        while f.gateway.state.lock().unwrap().users.get("taro").is_none_or(|n| n != "net1") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, on).await.expect("the user is back on the network of the source");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_finishes_a_stuck_migration() {
    let f = Fixture::start().await;
    let c = controller(&f).await;
    let id = in_doubt(&f, &c).await;
    c.resolve(&id, Decision::Commit, "operator").await.unwrap();
    let s = settled(&c, &id).await;
    assert_eq!(s.outcome(), v1::Outcome::Completed);
    assert_eq!(f.stage.count("main-server end film-1"), 1);
    assert_eq!(place(&c), there());
    // and only what needs an operator is resolved
    let err = c.resolve(&id, Decision::Abort, "operator").await.unwrap_err();
    assert!(err.to_string().contains("needs no operator"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn above_its_limit_the_journal_takes_nothing_new_but_what_is_under_way_ends() {
    let f = Fixture::start().await;
    let limits = Limits { journal_mib: 1, ..Limits::default() };
    let c = Controller::open(&f.path("state"), f.tls(), limits).unwrap();
    c.apply(&f.inventory, false).await.unwrap();
    f.stage.fault("main-server freeze", Fault::Hang);
    let first = c.migrate(&request("backup", Policy::Late), false).await.unwrap();
    f.stage.until_called("main-server freeze").await;
    // as if a great deal had been written
    let log = std::fs::OpenOptions::new().append(true).create(true).open(f.path("state/journal.db-wal"));
    log.unwrap().set_len(2 << 20).unwrap();
    let full = c.migrate(&request("backup", Policy::Late), true).await.unwrap_err();
    assert!(matches!(full, MigrateError::JournalFull { mib: 2, limit: 1 }), "{full}");
    let more =
        format!("{}\n[[network]]\nname = \"net9\"\nvid = 9\nrouter_address = \"10.9.0.1\"\n", f.inventory);
    let full = c.apply(&more, false).await.unwrap_err().to_string();
    assert!(full.contains("the journal has 2 MiB, and 1 is the most"), "{full}");
    c.cancel(&first, "operator").await.unwrap();
    assert_eq!(settled(&c, &first).await.outcome(), v1::Outcome::RolledBack);
}
