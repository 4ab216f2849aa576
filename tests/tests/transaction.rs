//! The transaction with the real daemons, where more is at stake than one fault: a lost site, an operator's word, several
//! gateways, and a gateway that has forgotten everything.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{net::UdpSocket, time::Duration};

use handover_lab::{
    Output, Program,
    capture::Capture,
    faults::{At, Led},
    program,
    scenario::{Play, Session},
    topology::{App, JIRO, JIRO_MAC, Layout, Site, Topology, V},
};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(30);
const MEMORY_MIB: u16 = 16;

fn pinned() -> Play {
    let topology = Topology::laid_out(Layout { pinned: true, ..Layout::default() }).unwrap();
    Play::start_film_in(topology, MEMORY_MIB).unwrap()
}

fn kill(play: &Play, host: &str) {
    let process = &play.topology.daemon(host).unwrap().process;
    process.signal(Signal::SIGKILL).unwrap();
    process.wait_timeout(SOON).unwrap();
}

fn start(play: &mut Play, host: &str) {
    play.topology.start_daemon(host).unwrap();
    play.topology.daemon(host).unwrap().wait_for("ready", SOON).unwrap();
}

/// Everybody is there, alone, and the viewer was not harmed.
fn agree(play: &mut Play, at: Site, session: &Session) {
    let logs = play.topology.logs();
    assert_eq!(play.topology.sites_of(&play.service).unwrap(), [at], "{session:?}\n{logs}");
    assert_eq!(play.topology.sites_of_v().unwrap(), [at], "{session:?}\n{logs}");
    let tag = play.capture.tag_after(play.capture.frames(), SOON).unwrap();
    assert_eq!(tag, Some(at.vid()), "{session:?}\n{logs}");
    let seen = play.client.more(20_000).unwrap();
    assert!(seen.unharmed(), "{seen:?}\n{logs}");
}

#[test]
fn in_a_disaster_losing_the_source_after_its_vote_rolls_forward() {
    let mut play = pinned();
    let mut led =
        Led::start(&play, "film-1".into(), Site::Main, At::Switch, &["--policy", "disaster"]).unwrap();
    led.lead(At::Switch).unwrap();
    // it has voted; nothing more is heard of it
    kill(&play, "main-server");
    play.topology.control_switch.ip("link set main-server down").unwrap();
    let migration = led.let_go().unwrap();
    let ending = migration.wait().unwrap();
    assert_eq!(ending.ended.code, Some(0), "{}\n{}", ending.said, play.topology.logs());
    let session = ending.session.unwrap();
    assert_eq!(session.outcome, "completed");
    assert!(session.pending.iter().any(|p| p.contains("main-server")), "{session:?}");
    assert_eq!(play.topology.sites_of_v().unwrap(), [Site::Backup]);
    assert!(play.client.more(20_000).unwrap().unharmed());

    // it comes back, still holding the original, and is told
    play.topology.control_switch.ip("link set main-server up").unwrap();
    start(&mut play, "main-server");
    let session = play.settled("film-1").unwrap();
    agree(&mut play, Site::Backup, &session);
}

#[test]
fn an_operator_cancels_until_the_decision_and_not_after_it() {
    let mut play = pinned();
    let cancel = |play: &Play, id: &str| play.topology.handover(["sessions", "cancel", id]).unwrap();
    let mut led = Led::start(&play, "film-1".into(), Site::Main, At::Restore, &[]).unwrap();
    led.lead(At::Restore).unwrap();
    let said = cancel(&play, "film-1");
    assert!(said.ended.success(), "{}", said.stderr);
    let ending = led.let_go().unwrap().wait().unwrap();
    assert_eq!(ending.ended.code, Some(3), "{}", ending.said);
    let session = play.settled("film-1").unwrap();
    assert!(session.reason.contains("cancelled"), "{session:?}");
    agree(&mut play, Site::Main, &session);

    let mut led = Led::start(&play, "film-2".into(), Site::Main, At::Resume, &[]).unwrap();
    led.lead(At::Resume).unwrap();
    let said = cancel(&play, "film-2");
    assert_eq!(said.ended.code, Some(1), "{}", said.stderr);
    assert!(said.stderr.contains("COMMIT is durable"), "{}", said.stderr);
    assert!(led.let_go().unwrap().wait().unwrap().ended.success());
    let session = play.settled("film-2").unwrap();
    agree(&mut play, Site::Backup, &session);
}

/// `handover-migrator VERB ... --config ...` on a server.
fn on_the_spot(play: &Play, site: Site, words: &[&str]) -> Output {
    let command = Program::new(program("handover-migrator").unwrap())
        .args(words.iter().copied())
        .args(["--config", "/run/lab/migrator.toml"])
        .env("RUST_LOG", "warn");
    play.topology.server(site).unwrap().output(command).unwrap()
}

#[test]
fn with_the_controller_gone_an_operator_ends_the_doubt_on_the_spot() {
    let mut play = pinned();
    let mut led = Led::start(&play, "film-1".into(), Site::Main, At::Resume, &[]).unwrap();
    led.lead(At::Resume).unwrap();
    kill(&play, "control");
    let _operator_gave_up = led.let_go().unwrap();
    // one daemon answers over its local socket, of the other only the records are left
    kill(&play, "main-server");
    for (site, state, how) in [(Site::Backup, "restored", "runs"), (Site::Main, "yielded", "is down")] {
        let shown = on_the_spot(&play, site, &["status"]);
        assert!(shown.ended.success(), "{}", shown.stderr);
        assert!(shown.stdout.contains("film-1") && shown.stdout.contains(state), "{}", shown.stdout);
        assert!(shown.stderr.contains(how), "{}", shown.stderr);
    }
    let unknown = on_the_spot(&play, Site::Main, &["resolve", "film-9", "--commit"]);
    assert!(unknown.stderr.contains("film-9") && unknown.stderr.contains("film-1"), "{}", unknown.stderr);

    // without --yes it is said what is risked, and nothing is done
    let asked = on_the_spot(&play, Site::Backup, &["resolve", "film-1", "--commit"]);
    assert_eq!(asked.ended.code, Some(1));
    assert!(asked.stderr.contains("two copies") && asked.stderr.contains("--yes"), "{}", asked.stderr);
    assert_eq!(play.topology.sites_of(&play.service).unwrap(), Site::ALL);

    for site in [Site::Backup, Site::Main] {
        let done = on_the_spot(&play, site, &["resolve", "film-1", "--commit", "--yes"]);
        assert!(done.ended.success(), "{}", done.stderr);
    }
    assert_eq!(play.topology.sites_of(&play.service).unwrap(), [Site::Backup]);
    assert!(play.client.more(20_000).unwrap().unharmed());
    // what was committed is not undone, here either
    let back = on_the_spot(&play, Site::Backup, &["resolve", "film-1", "--abort", "--yes"]);
    assert!(back.stderr.contains("never undone"), "{}", back.stderr);

    // the controller comes back and finds it so
    start(&mut play, "main-server");
    start(&mut play, "control");
    let session = play.settled("film-1").unwrap();
    assert_eq!(session.outcome, "completed");
    agree(&mut play, Site::Backup, &session);
}

#[test]
fn a_service_that_the_migrator_is_not_configured_for_is_refused_by_name() {
    let play = Play::start(App::Film).unwrap();
    let other = Topology::inventory(App::Film).replace("name = \"film\"", "name = \"bank\"");
    let other = other.replace(&V.to_string(), "203.0.113.11");
    let both = Topology::inventory(App::Film)
        + &other[other.find("[[service]]").unwrap()..].replace("film-server --listen", "sshd");
    play.topology.apply(&both).unwrap();
    let refused = play.topology.handover(["migrate", "bank", "--to", "backup", "--wait"]).unwrap();
    assert_eq!(refused.ended.code, Some(1), "{}", refused.stderr);
    let said = refused.stdout + &refused.stderr;
    assert!(said.contains("bank") && said.contains("not configured for it"), "{said}");
}

#[test]
fn a_cut_migration_network_is_noticed_by_what_is_not_acknowledged() {
    let mut play = pinned();
    let mut led = Led::start(&play, "film-1".into(), Site::Main, At::Restore, &[]).unwrap();
    led.lead(At::Restore).unwrap();
    play.topology.server(Site::Backup).unwrap().ip("link set mig0 down").unwrap();
    let ending = led.let_go().unwrap().wait().unwrap();
    assert_eq!(ending.ended.code, Some(3), "{}", ending.said);
    let session = ending.session.unwrap();
    // the images follow one another into the restore: either may be what the source waits for
    assert!(["copy", "restore"].contains(&session.failed_step.as_str()), "{}", session.failed_step);
    // it is the kernel that gave up on the connection (TCP_USER_TIMEOUT), long before the keep-alive would have told
    assert!(session.reason.contains("connection error: timed out"), "{}", session.reason);
    assert!(!session.reason.contains("keep-alive"), "{}", session.reason);
    play.topology.server(Site::Backup).unwrap().ip("link set mig0 up").unwrap();
    let session = play.settled("film-1").unwrap();
    agree(&mut play, Site::Main, &session);
}

#[test]
fn two_gateways_turn_in_one_switch_also_when_one_is_killed_in_its_middle() {
    let topology = Topology::laid_out(Layout { pinned: true, second_gateway: true }).unwrap();
    let mut play = Play::start_film_in(topology, MEMORY_MIB).unwrap();
    let more = format!(
        "\n[[gateway]]\nname = \"gw2\"\ncontrol = \"10.255.0.3:7443\"\n\n[[user]]\nname = \"jiro\"\ngateway = \"gw2\"\n\
         mac = \"02:00:00:00:01:02\"\naddresses = [\"{JIRO}\"]\nhome = \"main\"\n"
    );
    play.topology.apply(&(Topology::inventory(App::Film) + &more)).unwrap();
    let jiro = play.topology.lab().host("jiro").unwrap();
    let mut second = play.topology.start_client_on(jiro, &play.service, 1).unwrap();
    let seen_of_jiro = Capture::start(&play.topology.provider_host, "trunk0", JIRO_MAC, V).unwrap();
    let there = |play: &Play, second: &mut handover_lab::topology::Client, site: Site| {
        let report = second.more(20_000).unwrap();
        assert!(report.unharmed(), "{report:?}\n{}", play.topology.logs());
        let tag = seen_of_jiro.tag_after(seen_of_jiro.frames(), SOON).unwrap();
        assert_eq!(tag, Some(site.vid()), "jiro\n{}", play.topology.logs());
    };
    let moved = play.migrate(Site::Backup, |_| {}).unwrap();
    moved.check(Site::Backup).unwrap_or_else(|e| panic!("{e:#}\n{}", play.topology.logs()));
    there(&play, &mut second, Site::Backup);

    // gw stands still before its switch and is killed there, gw2 has switched already
    let mut led = Led::start(&play, "film-2".into(), Site::Backup, At::Switch, &[]).unwrap();
    led.lead(At::Switch).unwrap();
    kill(&play, "gateway");
    let migration = led.let_go().unwrap();
    start(&mut play, "gateway");
    let ending = migration.wait().unwrap();
    let session = play.settled("film-2").unwrap();
    let at = if session.outcome == "completed" { Site::Main } else { Site::Backup };
    assert!(matches!(ending.ended.code, Some(0 | 3)), "{}", ending.said);
    agree(&mut play, at, &session);
    there(&play, &mut second, at);
}

#[test]
fn a_rebooted_gateway_forwards_nothing_until_it_knows_the_users_network() {
    let mut play = Play::start(App::Film).unwrap();
    play.topology.control_switch.ip("link set gateway down").unwrap();
    kill(&play, "gateway");
    start(&mut play, "gateway");
    let before = play.capture.frames();
    let sent = play.topology.taro.enter(|| -> std::io::Result<()> {
        let socket = UdpSocket::bind(("0.0.0.0", 0))?;
        (0..20).try_for_each(|_| socket.send_to(b"anybody?", (V, 9)).map(drop))
    });
    sent.unwrap().unwrap();
    assert_eq!(play.capture.frames(), before, "it forwarded for a user whose network it does not know");

    play.topology.control_switch.ip("link set gateway up").unwrap();
    let seen = play.client.more(20_000).unwrap();
    assert!(seen.unharmed(), "{seen:?}\n{}", play.topology.logs());
    let tag = play.capture.tag_after(before, SOON).unwrap();
    assert_eq!(tag, Some(Site::Main.vid()));
}

#[test]
fn an_operator_ends_the_doubt_through_the_controller() {
    let mut play = pinned();
    // the decision is COMMIT, and the destination is gone before it has resumed
    let mut led = Led::start(&play, "film-1".into(), Site::Main, At::Resume, &[]).unwrap();
    led.lead(At::Resume).unwrap();
    kill(&play, "backup-server");
    let ending = led.let_go().unwrap().wait().unwrap();
    assert_eq!(ending.ended.code, Some(6), "{}\n{}", ending.said, play.topology.logs());
    let resolve = |play: &Play, words: &[&str]| {
        play.topology.handover([&["sessions", "resolve", "film-1"], words].concat()).unwrap()
    };
    // without --yes it is said what is risked, and nothing is done
    let asked = resolve(&play, &["--abort"]);
    assert_eq!(asked.ended.code, Some(1));
    assert!(asked.stderr.contains("two copies") && asked.stderr.contains("--yes"), "{}", asked.stderr);
    let done = resolve(&play, &["--abort", "--yes"]);
    assert!(done.ended.success(), "{}", done.stderr);
    assert!(play.client.more(20_000).unwrap().unharmed());

    // the destination comes back with a copy that was never resumed, and is told
    start(&mut play, "backup-server");
    let session = play.settled("film-1").unwrap();
    assert_eq!(session.outcome, "rolled-back", "{session:?}");
    agree(&mut play, Site::Main, &session);
    let audit = play.topology.handover(["audit"]).unwrap();
    assert!(audit.stdout.contains("RESOLUTION_ABORT --yes"), "{}", audit.stdout);
}

#[test]
fn who_is_queued_follows_also_when_the_controller_was_killed_meanwhile() {
    let mut play = pinned();
    let mut led = Led::start(&play, "film-1".into(), Site::Main, At::Switch, &[]).unwrap();
    led.lead(At::Switch).unwrap();
    let back = |play: &Play| play.topology.handover(["migrate", "film", "--to", "main", "--queue"]).unwrap();
    for id in ["film-2", "film-3"] {
        let queued = back(&play);
        assert!(queued.ended.success() && queued.stdout.trim() == id, "{}{}", queued.stdout, queued.stderr);
    }
    let shown = play.topology.handover(["queue"]).unwrap();
    assert!(shown.stdout.contains("film-2") && shown.stdout.contains("film-1"), "{}", shown.stdout);
    kill(&play, "control");
    let _aborted = led.let_go().unwrap();
    start(&mut play, "control");
    // the first was not decided: it is undone, and then there is nowhere to go for those who wait
    let session = play.settled("film-1").unwrap();
    assert_eq!(session.outcome, "rolled-back", "{session:?}");
    for id in ["film-2", "film-3"] {
        let over = play.topology.handover(["sessions", "watch", id]).unwrap();
        assert_eq!(over.ended.code, Some(1), "{}", over.stderr);
        assert!(over.stderr.contains("already"), "{}", over.stderr);
    }
    agree(&mut play, Site::Main, &session);
}
