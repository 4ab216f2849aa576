//! The CLI as a user meets it, against the real daemon: exit codes, words, what goes where; and the daemon's own life.

#![allow(clippy::unwrap_used)] // clippy knows tests by their attribute, not their helpers

mod support;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use handover_api::{tls::Role, v1};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use support::{Fault, Fixture, issue};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};
use tonic::Code;

const PATIENCE: Duration = Duration::from_secs(40);

struct Daemon {
    child: Child,
}

impl Daemon {
    async fn start(f: &Fixture) -> Self {
        Self::listening(f, "127.0.0.1:0").await
    }

    async fn listening(f: &Fixture, listen: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_handover-controller"))
            .args(["--config".as_ref(), f.config(listen).as_os_str()])
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let ready = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                if line.contains("ready") {
                    return;
                }
            }
            panic!("the daemon has ended");
        };
        timeout(PATIENCE, ready).await.unwrap();
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self { child }
    }

    async fn signal(&mut self, signal: Signal) -> std::process::ExitStatus {
        let pid = i32::try_from(self.child.id().unwrap()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
        timeout(PATIENCE, self.child.wait()).await.unwrap().unwrap()
    }
}

/// `handover ARGS`, off a terminal.
async fn handover(f: &Fixture, args: &[&str]) -> (i32, String, String) {
    let run = Command::new(env!("CARGO_BIN_EXE_handover"))
        .env("HANDOVER_SOCKET", f.path("controller.sock"))
        .args(args)
        .stdin(Stdio::null())
        .output();
    let Output { status, stdout, stderr } = timeout(PATIENCE, run).await.expect("in time").unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// A daemon with the inventory applied.
async fn applied(f: &Fixture) -> Daemon {
    let daemon = Daemon::start(f).await;
    fs::write(f.path("inventory.toml"), &f.inventory).unwrap();
    let (code, out, err) = handover(f, &["apply", "-f", &inventory(f)]).await;
    assert_eq!((code, err.as_str()), (0, "applied: revision 1\n"), "{out}");
    daemon
}

fn inventory(f: &Fixture) -> String {
    f.path("inventory.toml").display().to_string()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_controller_it_says_what_to_start() {
    let f = Fixture::start().await;
    let socket = f.path("controller.sock").display().to_string();
    let (code, out, err) = handover(&f, &["status"]).await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(
        err,
        format!(
            "error: no controller here: there is no socket {socket}; start handover-controller, or name its socket with --socket, or one elsewhere with --server\n"
        )
    );
    // a socket that a dead daemon left
    drop(std::os::unix::net::UnixListener::bind(f.path("controller.sock")).unwrap());
    let (code, _, err) = handover(&f, &["sessions", "list"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("nobody listens on the socket"), "{err}");
    // which the next daemon replaces
    let _daemon = Daemon::start(&f).await;
    let (code, out, err) = handover(&f, &["status"]).await;
    assert_eq!((code, out.as_str(), err.as_str()), (0, "", "no inventory yet: `handover apply -f FILE`\n"));
    let mode = fs::metadata(f.path("controller.sock")).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o660, "{mode:o}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_usage_is_2_and_help_teaches() {
    let f = Fixture::start().await;
    for args in [
        &["migrate", "film"][..],
        &["migrate", "film", "--to", "backup", "--timeout", "5"],
        &["migrate", "film", "--to", "backup", "--wait", "--timeout", "0"],
        &["migrate", "film", "--to", "backup", "--wait", "--dry-run"],
        &["migrate", "film", "--to", "backup", "--policy", "maybe"],
        &["status", "-o", "yaml"],
        &["frobnicate"],
        &[],
        &["pki", "issue", "/x", "janitor", "joe"],
    ] {
        let (code, out, _) = handover(&f, args).await;
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}");
    }
    for (args, want) in [
        (&["--help"][..], "3  rolled back: the service is alive at the source"),
        (&["migrate", "--help"], "handover migrate film --to backup --wait"),
        (&["apply", "--help"], "--dry-run"),
        (&["sessions", "--help"], "handover sessions show film-1"),
        (&["pki", "--help"], "handover pki init /etc/handover/ca"),
    ] {
        let (code, out, _) = handover(&f, args).await;
        assert!(code == 0 && out.contains(want), "{args:?}: {out}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_inventory_is_named_by_file_line_and_value_and_changes_nothing() {
    let f = Fixture::start().await;
    let file = inventory(&f);
    let (code, _, err) = handover(&f, &["apply", "-f", &file]).await;
    assert_eq!(code, 1);
    assert!(err.contains(&file) && err.contains("No such file"), "{err}");
    fs::write(
        &file,
        f.inventory.replace("vid = 2", "vid = 4095").replace("home = \"main\"\n\n", "home = \"mian\"\n\n"),
    )
    .unwrap();
    // found without a controller
    let (code, out, err) = handover(&f, &["apply", "-f", &file]).await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(
        err,
        format!(
            "error: {file}:8: network net2: vid = 4095 is reserved by 802.1Q; use 1 to 4094, or leave vid out for an untagged network\n       \
             {file}:40: user taro: home = \"mian\": there is no site mian; known: backup, main\n"
        )
    );
    let _daemon = applied(&f).await;
    fs::write(&file, f.inventory.replace("vid = 2", "vid = 3")).unwrap();
    let (code, out, err) = handover(&f, &["apply", "-f", &file, "--dry-run"]).await;
    assert_eq!(
        (code, out.as_str(), err.as_str()),
        (0, "~ network net2: vid 2 -> 3\n", "dry run: nothing was changed\n")
    );
    fs::write(
        &file,
        f.inventory
            .replace(", backup = \"backup-server\"", "")
            .replace("main = \"main-server\"", "main = \"main-server\", backup = \"backup-server\""),
    )
    .unwrap();
    let (code, _, err) = handover(&f, &["apply", "-f", &file]).await;
    assert_eq!((code, err.as_str()), (0, "nothing to change: revision 1 stays\n"));
    fs::write(&file, f.inventory.replace("net1", "net7")).unwrap();
    let (code, _, err) = handover(&f, &["apply", "-f", &file, "-o", "json"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("network net1 cannot be removed: user taro is on it"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_things_are_4_and_the_known_ones_are_listed() {
    let f = Fixture::start().await;
    let _daemon = applied(&f).await;
    for (args, want) in [
        (&["migrate", "flim", "--to", "backup"][..], "error: there is no service `flim`; known: film\n"),
        (&["migrate", "film", "--to", "bakcup"], "error: there is no site `bakcup`; known: backup, main\n"),
        (
            &["migrate", "film", "--to", "backup", "--user", "jiro"],
            "error: there is no user `jiro`; known: taro\n",
        ),
        (
            &["migrate", "flim", "--to", "backup", "--dry-run"],
            "error: there is no service `flim`; known: film\n",
        ),
        (&["sessions", "show", "film-9"], "error: there is no session `film-9`; there has been none yet\n"),
        (&["sessions", "watch", "film-9"], "error: there is no session `film-9`; there has been none yet\n"),
    ] {
        let (code, out, err) = handover(&f, args).await;
        assert_eq!((code, out.as_str(), err.as_str()), (4, "", want), "{args:?}");
    }
    let (code, _, err) = handover(&f, &["migrate", "film", "--to", "main"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("service film is at site main already"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_completes() {
    let f = Fixture::start().await;
    let _daemon = applied(&f).await;
    let (code, out, err) = handover(&f, &["migrate", "film", "--to", "backup", "--dry-run"]).await;
    assert_eq!((code, err.as_str()), (0, "dry run: nothing was touched\n"), "{out}");
    assert!(out.starts_with("stage     gateway gw: taro from net1 to net2"), "{out}");
    assert!(f.stage.calls().is_empty());

    let (code, out, err) =
        handover(&f, &["migrate", "film", "--to", "backup", "--wait", "--timeout", "30"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(
        err.starts_with("session film-1: film from main (main-server) to backup (backup-server)\n"),
        "{err}"
    );
    assert!(err.ends_with("completed: film runs at backup (backup-server)\n"), "{err}");
    for step in
        ["preflight", "stage", "prepare", "freeze", "switch", "yield", "decision", "resume", "end", "finish"]
    {
        assert!(err.lines().any(|l| l.contains(&format!(" ms  {step}"))), "progress shows {step}: {err}");
    }
    assert!(!out.contains('\x1b') && !err.contains('\x1b'), "no colour off a terminal");
    let head = out.lines().find(|l| l.starts_with("STEP")).unwrap();
    let column = head.find("STATE").unwrap();
    let rows: Vec<&str> = out.lines().skip_while(|l| !l.starts_with("STEP")).skip(1).collect();
    assert_eq!(rows.len(), 19, "{out}");
    assert!(
        rows.iter().any(|r| r.starts_with("  quiet ")) && rows.iter().any(|r| r.starts_with("hold ")),
        "{out}"
    );
    assert!(out.contains("held       12 frames kept and sent on, 7 dropped, 5 late"), "{out}");
    for row in rows {
        assert_eq!(&row[column..column + 4], "done", "columns line up: {out}");
    }

    let (code, out, _) = handover(&f, &["status"]).await;
    assert_eq!(code, 0);
    assert!(out.contains("film     203.0.113.10  backup  backup-server  4711  -"), "{out}");
    assert!(out.lines().any(|l| l.split_whitespace().collect::<Vec<_>>() == ["taro", "net2", "gw"]), "{out}");
    let (_, out, _) = handover(&f, &["status", "-o", "json"]).await;
    let status = json(&out);
    assert_eq!(status["services"][0]["site"], "backup");
    assert_eq!(
        status["peers"].as_array().unwrap().iter().filter(|p| p["reachable"] == true).count(),
        3,
        "{out}"
    );

    let (code, out, err) = handover(&f, &["migrate", "film", "--to", "main", "--wait", "-o", "json"]).await;
    assert_eq!(code, 0, "{err}");
    let session = json(&out);
    assert_eq!((&session["id"], &session["outcome"]), (&"film-2".into(), &"completed".into()));
    assert_eq!(session["steps"].as_array().unwrap().len(), 19);
    assert!(session["frozen_us"].as_u64().unwrap() > 0);
    assert_eq!(session["switch_window_ns"], 2500);

    let (_, out, _) = handover(&f, &["sessions", "list"]).await;
    assert_eq!(out.lines().count(), 3, "{out}");
    let (code, shown, _) = handover(&f, &["sessions", "show", "film-2", "-o", "json"]).await;
    assert_eq!((code, json(&shown)), (0, session));
    let (code, _, _) = handover(&f, &["sessions", "watch", "film-1"]).await;
    assert_eq!(code, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_is_1_and_the_findings_are_printed() {
    let f = Fixture::start().await;
    let _daemon = applied(&f).await;
    f.stage.find(
        "backup-server",
        v1::Finding {
            severity: v1::finding::Severity::Error.into(),
            code: "pid-taken".into(),
            reporter: "migrator backup-server".into(),
            message: "pid 4711 is taken by sshd".into(),
            remedy: "end it".into(),
        },
    );
    let want = "error: pid 4711 is taken by sshd [pid-taken, by migrator backup-server]\n  way out: end it\n";
    for (args, end) in [
        (&["--dry-run"][..], "dry run: nothing was touched; it would be refused\n"),
        (&["--wait"], "refused by preflight, nothing was touched: film runs at main (main-server)\n"),
        (&[], "refused by preflight, nothing was touched: film runs at main (main-server)\n"),
    ] {
        let (code, out, err) = handover(&f, &[&["migrate", "film", "--to", "backup"], args].concat()).await;
        assert_eq!(code, 1, "{args:?}");
        assert!(out.starts_with(want), "{args:?}: {out}");
        assert!(err.ends_with(end), "{args:?}: {err}");
    }
    let (code, out, _) =
        handover(&f, &["migrate", "film", "--to", "backup", "--dry-run", "-o", "json"]).await;
    assert_eq!((code, &json(&out)["would_migrate"]), (1, &false.into()));
    assert!(f.stage.calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn rolled_back_is_3_and_says_which_step_failed_why_and_what_to_do() {
    let f = Fixture::start().await;
    let _daemon = applied(&f).await;
    f.stage.fault(
        "main-server freeze",
        Fault::Refuse(Code::Aborted, "restore: backup-server: CRIU: no such file"),
    );
    let (code, out, err) = handover(&f, &["migrate", "film", "--to", "backup", "--wait"]).await;
    assert_eq!(code, 3, "{err}");
    let end: Vec<&str> = err.lines().rev().take(3).collect();
    assert_eq!(
        end,
        [
            "what to do: see the log of migrator main-server; when the cause is gone, `handover migrate film --to backup`",
            "step restore failed: backup-server: CRIU: no such file",
            "rolled back: film runs at main (main-server) as before",
        ]
    );
    assert!(out.contains("outcome    rolled-back"), "{out}");
    assert!(out.lines().any(|l| l.starts_with("stage") && l.contains("undone")), "{out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn needs_an_operator_is_6() {
    let f = Fixture::start().await;
    let _daemon = applied(&f).await;
    f.main.alive.store(false, std::sync::atomic::Ordering::SeqCst);
    f.stage.fault("gw switch", Fault::Refuse(Code::Internal, "no"));
    let (code, _, err) = handover(&f, &["migrate", "film", "--to", "backup", "--wait"]).await;
    assert_eq!(code, 6, "{err}");
    assert!(
        err.contains(
            "what to do: see the log of migrator main-server; if the service is gone, start it there"
        ),
        "{err}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn timed_out_is_5_and_a_daemon_that_is_stopped_aborts_what_is_undecided() {
    let f = Fixture::start().await;
    let mut daemon = applied(&f).await;
    f.stage.fault("main-server freeze", Fault::Hang);
    let (code, out, err) =
        handover(&f, &["migrate", "film", "--to", "backup", "--wait", "--timeout", "1"]).await;
    assert_eq!((code, out.as_str()), (5, ""));
    assert!(err.ends_with("timed out: session film-1 is still running (freezing); `handover sessions watch film-1` waits on\n"), "{err}");
    let (code, _, err) = handover(&f, &["migrate", "film", "--to", "backup"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("service film is in session film-1 (freezing)"), "{err}");
    let status = daemon.signal(Signal::SIGTERM).await;
    assert_eq!(status.code(), Some(0));
    assert_eq!(f.stage.count("main-server abort film-1"), 1);
    assert!(!f.path("controller.sock").exists(), "the socket is removed");
    let _daemon = Daemon::start(&f).await;
    let (code, _, err) = handover(&f, &["sessions", "watch", "film-1"]).await;
    assert_eq!(code, 3, "{err}");
    assert!(err.contains("step freeze failed: the controller was stopped before the decision"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_killed_before_the_decision_aborts_when_it_is_back() {
    let f = Fixture::start().await;
    let mut daemon = applied(&f).await;
    f.stage.fault("main-server yield", Fault::Hang);
    let waiting = handover(&f, &["migrate", "film", "--to", "backup", "--wait"]);
    let restart = async {
        f.stage.until_called("main-server yield").await;
        daemon.signal(Signal::SIGKILL).await;
        Daemon::start(&f).await
    };
    // the CLI finds the controller again
    let ((code, _, err), _daemon) = tokio::join!(waiting, restart);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains("the controller was restarted before the decision"), "{err}");
    assert_eq!(f.gateway.network_of("taro"), "net1");
    f.no_contradiction("film-1");
    let (code, _, err) = handover(&f, &["migrate", "film", "--to", "backup", "--wait"]).await;
    assert_eq!(code, 0, "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_killed_after_the_decision_goes_on_when_it_is_back() {
    let f = Fixture::start().await;
    let mut daemon = applied(&f).await;
    f.stage.fault("backup-server resume", Fault::Hang);
    let (code, out, _) = handover(&f, &["migrate", "film", "--to", "backup"]).await;
    assert_eq!((code, out.as_str()), (0, "film-1\n"));
    f.stage.until_called("backup-server resume").await;
    daemon.signal(Signal::SIGKILL).await;
    let _daemon = Daemon::start(&f).await;
    let (code, _, err) = handover(&f, &["sessions", "watch", "film-1"]).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(f.gateway.network_of("taro"), "net2");
    f.no_contradiction("film-1");
}

#[tokio::test(flavor = "multi_thread")]
async fn from_elsewhere_the_role_decides() {
    let f = Fixture::start().await;
    let listen = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let _daemon = Daemon::listening(&f, &listen).await;
    fs::write(f.path("inventory.toml"), &f.inventory).unwrap();
    for (role, name) in [(Role::Operator, "alice"), (Role::Viewer, "bob"), (Role::Migrator, "m")] {
        issue(f.dir.path(), role, name);
    }
    let path = |name: &str| f.path(name).display().to_string();
    let ca = path("ca.pem");
    let as_whom = async |who: &str, args: &[&str]| {
        let (cert, key) = (path(&format!("{who}.pem")), path(&format!("{who}.key")));
        let mut all = vec!["--server", &listen, "--ca", &ca, "--cert", &cert, "--key", &key];
        all.extend(args);
        handover(&f, &all).await
    };
    let file = inventory(&f);
    let (code, _, err) = as_whom("viewer-bob", &["apply", "-f", &file]).await;
    assert_eq!((code, err.as_str()), (1, "error: viewer bob may not call this: it is for the operator\n"));
    assert_eq!(as_whom("operator-alice", &["apply", "-f", &file]).await.0, 0);
    assert_eq!(as_whom("viewer-bob", &["status"]).await.0, 0);
    assert_eq!(as_whom("viewer-bob", &["sessions", "list"]).await.0, 0);
    let (code, _, err) = as_whom("viewer-bob", &["migrate", "film", "--to", "backup"]).await;
    assert_eq!((code, err.as_str()), (1, "error: viewer bob may not call this: it is for the operator\n"));
    assert_eq!(as_whom("migrator-m", &["status"]).await.0, 1);
    assert_eq!(as_whom("operator-alice", &["migrate", "film", "--to", "backup", "--wait"]).await.0, 0);
    let (code, _, err) = handover(&f, &["--server", &listen, "status"]).await;
    assert_eq!(code, 1);
    assert!(err.contains(&format!("--server {listen} needs --ca too")), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_made_and_never_replaced() {
    let f = Fixture::start().await;
    let dir = f.path("pki").display().to_string();
    let (code, _, err) = handover(&f, &["pki", "issue", &dir, "gateway", "gw"]).await;
    assert_eq!((code, err.contains("handover pki init")), (1, true), "{err}");
    let (code, out, _) = handover(&f, &["pki", "init", &dir]).await;
    assert_eq!((code, out), (0, format!("ca    {dir}/ca.pem\nkey   {dir}/ca.key\n")));
    let (code, _, err) = handover(&f, &["pki", "init", &dir]).await;
    assert_eq!((code, err.contains("has an authority already")), (1, true), "{err}");
    let out_dir = format!("{dir}/out");
    let (code, out, _) =
        handover(&f, &["pki", "issue", &dir, "gateway", "gw", "--out", &out_dir, "-o", "json"]).await;
    assert_eq!((code, &json(&out)["cert"]), (0, &format!("{out_dir}/gateway-gw.pem").into()));
    assert!(Path::new(&out_dir).join("gateway-gw.key").exists());
    let (code, _, err) = handover(&f, &["pki", "issue", &dir, "gateway", "GW"]).await;
    assert_eq!((code, err.contains("`GW` cannot be a name")), (1, true), "{err}");
}

/// Runs the daemon to its end.
async fn daemon(args: &[&str]) -> (i32, String) {
    let run = Command::new(env!("CARGO_BIN_EXE_handover-controller")).args(args).output();
    let output = timeout(PATIENCE, run).await.unwrap().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_says_why_it_does_not_start() {
    let f = Fixture::start().await;
    let good = f.config("127.0.0.1:0").display().to_string();
    assert_eq!(daemon(&["check", "--config", &good]).await, (0, String::new()));
    assert!(!f.path("state").exists(), "check touches nothing");
    let bad = f.path("bad.toml");
    fs::write(&bad, fs::read_to_string(&good).unwrap().replace("socket", "sokcet")).unwrap();
    let bad = bad.display().to_string();
    for args in [&["--config", &bad][..], &["check", "--config", &bad]] {
        let (code, err) = daemon(args).await;
        assert_eq!(code, 2);
        assert!(
            err.starts_with(&format!("error: configuration {bad}: "))
                && err.contains("unknown field `sokcet`"),
            "{err}"
        );
    }
    assert_eq!(daemon(&["--confgi", &good]).await.0, 2);

    let _daemon = Daemon::start(&f).await;
    let (code, err) = daemon(&["--config", &good]).await;
    assert_eq!(code, 1);
    assert!(err.contains("is a handover-controller running already?"), "{err}");
    drop(_daemon);

    let f = Fixture::start().await;
    fs::create_dir(f.path("state")).unwrap();
    fs::write(f.path("state/journal.db"), "nonsense".repeat(1000)).unwrap();
    let config = f.config("127.0.0.1:0").display().to_string();
    let (code, err) = daemon(&["--config", &config]).await;
    assert_eq!(code, 1);
    assert!(err.contains("journal.db is not a journal of handover-controller"), "{err}");
    assert!(!f.path("controller.sock").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_given_up_until_it_is_decided() {
    let f = Fixture::start().await;
    let _daemon = applied(&f).await;
    let (code, _, err) = handover(&f, &["sessions", "cancel", "film-1"]).await;
    assert_eq!((code, err.as_str()), (4, "error: there is no session `film-1`; there has been none yet\n"));
    f.stage.fault("main-server freeze", Fault::Hang);
    assert_eq!(handover(&f, &["migrate", "film", "--to", "backup"]).await.0, 0);
    f.stage.until_called("main-server freeze").await;
    let (code, out, err) = handover(&f, &["sessions", "cancel", "film-1", "--wait"]).await;
    assert_eq!(code, 3, "{out}{err}");
    assert!(out.contains("cancelled by local user 0"), "{out}{err}");
    let (code, _, err) = handover(&f, &["sessions", "cancel", "film-1"]).await;
    assert_eq!(
        (code, err.as_str()),
        (1, "error: session film-1 cannot be cancelled any more: it was rolled back\n")
    );
    f.stage.fault("main-server freeze", Fault::Hang);
    assert_eq!(handover(&f, &["migrate", "film", "--to", "backup"]).await.0, 0);
    f.stage.until_called("main-server freeze film-2").await;
    let (code, out, err) = handover(&f, &["sessions", "cancel", "film-2"]).await;
    assert_eq!((code, out.as_str()), (0, ""), "{err}");
    assert!(err.starts_with("session film-2 is cancelled ("), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_shows_its_order_and_what_is_waited_for() {
    let f = Fixture::start().await;
    let _daemon = applied(&f).await;
    assert_eq!(handover(&f, &["queue"]).await, (0, String::new(), "nothing waits\n".into()));
    f.stage.fault("main-server freeze", Fault::Hang);
    assert_eq!(handover(&f, &["migrate", "film", "--to", "backup"]).await.0, 0);
    f.stage.until_called("main-server freeze").await;
    let (code, _, err) = handover(&f, &["migrate", "film", "--to", "main"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("service film is in session film-1 (freezing)") && err.contains("--queue"), "{err}");
    let (code, out, err) = handover(&f, &["migrate", "film", "--to", "main", "--queue"]).await;
    assert_eq!((code, out.as_str()), (0, "film-2\n"), "{err}");
    assert!(err.starts_with("waits for its turn, number 1 in the queue: session film-1 (freezing)"), "{err}");
    let (code, out, _) = handover(&f, &["migrate", "film", "--to", "backup", "--queue", "-o", "json"]).await;
    assert_eq!((code, &json(&out)["queue_position"]), (0, &2.into()), "{out}");
    let (code, out, _) = handover(&f, &["queue"]).await;
    assert_eq!((code, out.lines().count()), (0, 3), "{out}");
    assert!(out.lines().nth(1).unwrap().starts_with("     1  film-2   film     main"), "{out}");
    assert!(out.contains("film-2 is before it, for the same service or user"), "{out}");
    let (_, out, _) = handover(&f, &["sessions", "list"]).await;
    assert!(out.contains("waiting") && out.contains("number 1 in the queue: session film-1"), "{out}");
    let (code, _, err) = handover(&f, &["sessions", "cancel", "film-2"]).await;
    assert_eq!((code, err.as_str()), (0, "film-2 is taken out of the queue; nothing was touched\n"));
    let (code, out, err) = handover(&f, &["sessions", "watch", "film-2"]).await;
    assert_eq!(code, 1, "{err}");
    assert!(
        out.contains("outcome    cancelled") && err.starts_with("cancelled before its turn"),
        "{out}{err}"
    );
    // the first is given up, and the one that waits for the same goes
    assert_eq!(handover(&f, &["sessions", "cancel", "film-1"]).await.0, 0);
    let (code, _, err) = handover(&f, &["sessions", "watch", "film-3"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(err.ends_with("completed: film runs at backup (backup-server)\n"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_in_doubt_is_resolved_only_with_yes() {
    let f = Fixture::start().await;
    let _daemon = applied(&f).await;
    assert_eq!(handover(&f, &["sessions", "resolve", "film-1", "--yes"]).await.0, 2);
    assert_eq!(handover(&f, &["sessions", "resolve", "film-1", "--abort"]).await.0, 4);
    f.stage.fault("main-server yield", Fault::ThenDown("backup-server"));
    assert_eq!(handover(&f, &["migrate", "film", "--to", "backup", "--wait"]).await.0, 6);
    let (code, out, err) = handover(&f, &["sessions", "resolve", "film-1", "--abort"]).await;
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(err.contains("risk: ") && err.ends_with("nothing was done; with --yes it is\n"), "{err}");
    assert_eq!(handover(&f, &["sessions", "watch", "film-1"]).await.0, 6);
    let (code, _, err) = handover(&f, &["sessions", "resolve", "film-1", "--abort", "--yes"]).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(handover(&f, &["sessions", "watch", "film-1"]).await.0, 3);
    // all of it is in the audit log
    let (code, out, _) = handover(&f, &["audit", "-o", "json"]).await;
    let entries = json(&out);
    let asked: Vec<String> = entries
        .as_array()
        .unwrap()
        .iter()
        .map(|e| format!("{} {} {}", e["call"], e["subject"], e["outcome"]).replace('"', ""))
        .collect();
    assert_eq!(code, 0);
    assert!(asked[0].starts_with("Controller/Apply ") && asked[0].ends_with(" done"), "{asked:?}");
    assert_eq!(
        asked[1..],
        [
            "Controller/ResolveSession film-1 RESOLUTION_ABORT NotFound",
            "Controller/Migrate film --to backup done",
            "Controller/ResolveSession film-1 RESOLUTION_ABORT done",
            "Controller/ResolveSession film-1 RESOLUTION_ABORT --yes done",
        ]
    );
    assert!(entries[0]["peer"].as_str().unwrap().starts_with("local user "), "{out}");
    let (_, out, _) = handover(&f, &["audit", "-n", "2"]).await;
    assert_eq!(out.lines().count(), 3, "{out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_cannot_be_names_are_refused_before_they_are_looked_for() {
    let f = Fixture::start().await;
    let _daemon = applied(&f).await;
    let long = "x".repeat(5000);
    for args in [
        &["migrate", "film;reboot", "--to", "backup"][..],
        &["migrate", "film", "--to", "../backup"],
        &["migrate", "film", "--to", "backup", "--user", "a b"],
        &["sessions", "show", &long],
        &["sessions", "cancel", "film-1\n"],
        &["sessions", "resolve", "$(id)", "--abort"],
    ] {
        let (code, out, err) = handover(&f, args).await;
        assert_eq!((code, out.as_str()), (1, ""), "{args:?}");
        assert!(err.contains("cannot be the name of a") && err.len() < 300, "{err}");
    }
}
