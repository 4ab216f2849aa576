//! `handover-lab run`: one scenario for a person (or, with `--json`, for a program).
//!
//! Progress goes to stderr. The result, a table or one JSON object, goes to stdout. The exit code is 0 only if nothing was
//! lost, repeated or reopened and the process and the user's frames really moved.

use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use anyhow::Context as _;
use clap::Args;
use comfy_table::{Cell, CellAlignment, Table, presets};
use nix::sys::signal::{SigSet, Signal};
use serde::Serialize;

use crate::{
    Host,
    apps::Report,
    scenario::{Moved, Play, Step},
    topology::{App, Site, Topology},
};

/// Payload that flows before the migration begins.
const BEFORE: u64 = 100_000;

/// What to play.
#[derive(Debug, Clone, Copy, Args)]
pub struct Options {
    /// The service that is moved: the lab's film server, redis under a writer, or nginx in the middle of a download.
    #[arg(long, value_enum, default_value = "film")]
    app: App,
    /// Do not hold the user's frames at the gateway while the service stands still: shows what holding them buys.
    #[arg(long)]
    no_hold: bool,
    /// Move it back again afterwards.
    #[arg(long)]
    back: bool,
    /// Print one JSON object alone on stdout.
    #[arg(long)]
    json: bool,
}

/// One migration, for a program.
#[derive(Debug, Clone, Default, Serialize)]
struct Outcome {
    steps: Vec<Step>,
    frozen_ms: f64,
    stream_gap_ms: f64,
    switch_window_us: Option<f64>,
    held_frames: Option<u64>,
    held_dropped: Option<u64>,
    vlan_before: Option<u16>,
    vlan_after: Option<u16>,
    process_site_before: String,
    process_site_after: String,
}

/// The whole play, for a program.
#[derive(Debug, Serialize)]
struct Played {
    /// "ok" or "failed".
    result: &'static str,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    app: &'static str,
    bytes: u64,
    bytes_lost: u64,
    bytes_duplicated: u64,
    reconnects: u64,
    reordered: u64,
    /// The first migration.
    #[serde(flatten)]
    first: Outcome,
    /// All of them, with `--back`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    migrations: Vec<Outcome>,
}

/// Plays it.
///
/// # Errors
/// If the lab cannot be built or the result cannot be printed.
pub fn run(options: Options) -> anyhow::Result<ExitCode> {
    let interrupted = Interruption::watch()?;
    let mut outcomes = Vec::new();
    let mut client = Report::default();
    let played = play(options, &interrupted, &mut outcomes, &mut client);
    let played = played.and_then(|()| interrupted.check());
    if options.json {
        let (result, error) = match &played {
            Ok(()) => ("ok", None),
            Err(e) => ("failed", Some(format!("{e:#}"))),
        };
        let object = Played {
            result,
            error,
            app: options.app.name(),
            bytes: client.bytes,
            bytes_lost: client.bytes_lost,
            bytes_duplicated: client.bytes_duplicated,
            reconnects: client.reconnects,
            reordered: client.reordered,
            first: outcomes.first().cloned().unwrap_or_default(),
            migrations: if options.back { outcomes } else { Vec::new() },
        };
        let mut line = serde_json::to_string_pretty(&object)?;
        line.push('\n');
        std::io::stdout().write_all(line.as_bytes()).context("printing the result")?;
    } else if !outcomes.is_empty() {
        print(&outcomes, &client, options.app)?;
    }
    match played {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(e) => {
            eprintln!("error: {e:#}");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn play(
    options: Options,
    interrupted: &Interruption,
    outcomes: &mut Vec<Outcome>,
    client_saw: &mut Report,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    let say = |what: &str| eprintln!("{:7.1} s  {what}", begun.elapsed().as_secs_f64());
    say("lab: taro, gateway, provider, two sites with router and server, control");
    let topology = Topology::new()?;
    interrupted.ends(topology.lab().hosts());
    let app = options.app;
    let mut play = Play::start_in(topology, app, say)?;
    play.client.more(BEFORE)?;

    let ways: &[Site] = if options.back { &[Site::Backup, Site::Main] } else { &[Site::Backup] };
    let mut checked = Ok(());
    for to in ways {
        say(&format!("handover migrate {} --to {} --wait", app.name(), to.name()));
        let moved = play.migrate_with(*to, !options.no_hold, |line| eprintln!("           | {line}"))?;
        outcomes.push(outcome(&moved));
        *client_saw = moved.client.clone();
        checked = moved.check(*to).map(drop);
        if checked.is_err() {
            eprintln!("{}", play.topology.logs());
            break;
        }
    }
    if checked.is_ok() {
        say(match app {
            App::Film => "the film goes on",
            App::Redis => "reading back every acknowledged write",
            App::Nginx => "the rest of the download, and its SHA-256",
            App::Pulse => "the rest of the pulse, and the server's account of it",
        });
        *client_saw = play.client.finish()?;
        let done = client_saw.finished || app == App::Film;
        anyhow::ensure!(client_saw.unharmed() && done, "the client was harmed: {client_saw:?}");
        say("the lab goes");
    }
    checked
}

#[expect(clippy::cast_precision_loss, reason = "durations far below 2^52 units")]
fn outcome(moved: &Moved) -> Outcome {
    let session = moved.ending.session.as_ref();
    let sites = |sites: &[Site]| sites.iter().map(|s| s.name()).collect::<Vec<_>>().join(" and ");
    let mut steps = session.map(|s| s.steps.clone()).unwrap_or_default();
    steps.sort_by_key(|s| s.started_us);
    Outcome {
        steps,
        frozen_ms: session.map_or(0.0, |s| s.frozen_us as f64 / 1e3),
        stream_gap_ms: moved.client.longest_gap_us as f64 / 1e3,
        switch_window_us: session.and_then(|s| s.switch_window_ns).map(|ns| ns as f64 / 1e3),
        held_frames: session.and_then(|s| s.held_frames),
        held_dropped: session.and_then(|s| s.held_dropped),
        vlan_before: moved.vlan.before,
        vlan_after: moved.vlan.after,
        process_site_before: sites(&moved.process.before),
        process_site_after: sites(&moved.process.after),
    }
}

fn print(outcomes: &[Outcome], client: &Report, app: App) -> anyhow::Result<()> {
    let mut text = String::new();
    for outcome in outcomes {
        let mut steps = Table::new();
        steps.load_style(if std::io::stdout().is_terminal() {
            presets::UTF8_FULL_CONDENSED
        } else {
            presets::NOTHING
        });
        steps.set_header(["STEP", "BY", "START (ms)", "TOOK (ms)", ""]);
        let ms = |us: u64| {
            Cell::new(format!("{}.{:03}", us / 1000, us % 1000)).set_alignment(CellAlignment::Right)
        };
        for s in &outcome.steps {
            let state = if s.state == "done" { "" } else { &s.state };
            steps.add_row([
                Cell::new(&s.name),
                Cell::new(&s.actor),
                ms(s.started_us),
                ms(s.took_us),
                Cell::new(state),
            ]);
        }
        let tag = |vid: Option<u16>| vid.map_or("none".into(), |v| v.to_string());
        text += &format!("\n{steps}\n\n");
        for (what, value) in [
            (
                "process",
                format!(
                    "{} -> {} (where it was found)",
                    outcome.process_site_before, outcome.process_site_after
                ),
            ),
            (
                "VLAN",
                format!(
                    "{} -> {} (captured on the trunk)",
                    tag(outcome.vlan_before),
                    tag(outcome.vlan_after)
                ),
            ),
            ("frozen", format!("{:.1} ms at most", outcome.frozen_ms)),
            ("longest gap", format!("{:.1} ms at the user", outcome.stream_gap_ms)),
            (
                "held frames",
                match (outcome.held_frames, outcome.held_dropped) {
                    (Some(held), Some(dropped)) => format!("{held} sent on in order, {dropped} dropped"),
                    _ => "none: --no-hold".into(),
                },
            ),
            (
                "switch window",
                outcome.switch_window_us.map_or("not switched".into(), |us| format!("{us:.1} us")),
            ),
        ] {
            text += &format!("{what:<14} {value}\n");
        }
    }
    text += &format!(
        "\n{}: {} bytes, {} lost, {} duplicated, {} reconnects\n",
        app.name(),
        client.bytes,
        client.bytes_lost,
        client.bytes_duplicated,
        client.reconnects
    );
    std::io::stdout().write_all(text.as_bytes()).context("printing the result")
}

/// Ctrl-C ends the hosts, so that whatever waits for one fails and the lab is taken down in order.
struct Interruption(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    hosts: Vec<Host>,
    by: Option<Signal>,
}

impl Interruption {
    /// Has to be called before any thread is started: the signals are blocked in all of them.
    fn watch() -> anyhow::Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        signals.thread_block().context("blocking signals")?;
        let state = Arc::new(Mutex::new(State::default()));
        let told = Arc::clone(&state);
        std::thread::spawn(move || {
            if let Ok(signal) = signals.wait() {
                let mut state = told.lock().unwrap_or_else(PoisonError::into_inner);
                state.by = Some(signal);
                state.hosts.iter().for_each(Host::end);
            }
        });
        Ok(Self(state))
    }

    /// These hosts end on a signal, or now if one has come.
    fn ends<'a>(&self, hosts: impl Iterator<Item = &'a Host>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.hosts = hosts.cloned().collect();
        if state.by.is_some() {
            state.hosts.iter().for_each(Host::end);
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).by {
            Some(signal) => anyhow::bail!("ended by {signal}"),
            None => Ok(()),
        }
    }
}
