//! One migration, seen from all sides: what the operator's command said, what the user's client saw, what went over the
//! trunk, and where the process really is.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    Ended, Io, Lines,
    apps::Report,
    capture::Capture,
    residue::{self, Residue},
    topology::{App, Client, Service, Site, Topology},
};

/// A frame of the user is due within this.
const FRAME: Duration = Duration::from_secs(10);
/// A migration is over within this, whatever becomes of it.
const OVER: Duration = Duration::from_secs(120);
/// Payload that shows that a stream flows: some records, writes or a moment of a download.
const FLOW: u64 = 20_000;

/// A step of a session, by the controller's clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// Who worked.
    pub actor: String,
    /// Microseconds since the request.
    pub started_us: u64,
    /// Microseconds.
    pub took_us: u64,
    /// "done", "failed", "undone".
    pub state: String,
}

/// A session as `handover -o json` prints it, as far as the scenarios need it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Session {
    /// Its name.
    pub id: String,
    /// "completed", "rolled-back" ...
    pub outcome: String,
    /// Of a failure: the step.
    pub failed_step: String,
    /// Of a failure: why.
    pub reason: String,
    /// What was done.
    pub steps: Vec<Step>,
    /// How long the process stood still at most.
    pub frozen_us: u64,
    /// Frames held, and those that were not or were lost; absent where nothing was held.
    pub held_frames: Option<u64>,
    /// See above.
    pub held_dropped: Option<u64>,
    /// The gateway's measured window, if it switched.
    pub switch_window_ns: Option<u64>,
    /// What is still to be confirmed.
    pub pending: Vec<String>,
    /// Data and sockets that could not be taken along.
    pub losses: Vec<String>,
}

/// A migration under way.
pub struct Migration {
    process: crate::Process,
    stdout: Lines,
    /// What the command says to the operator.
    pub progress: Lines,
}

/// How the operator's command ended.
#[derive(Debug)]
pub struct Ending {
    /// Exit code.
    pub ended: Ended,
    /// What it said to the operator.
    pub said: String,
    /// The session, if one was begun.
    pub session: Option<Session>,
}

impl Migration {
    /// Waits for the operator's command to end.
    ///
    /// # Errors
    /// If it does not, or prints no JSON.
    pub fn wait(self) -> anyhow::Result<Ending> {
        let ended = self.process.wait_timeout(OVER)?;
        let (stdout, said) = (self.stdout.finish(), self.progress.finish());
        let session = if stdout.trim().is_empty() {
            None
        } else {
            Some(serde_json::from_str(&stdout).with_context(|| format!("`handover` printed {stdout}"))?)
        };
        Ok(Ending { ended, said, session })
    }
}

/// A site or a VLAN before and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change<T> {
    /// Before.
    pub before: T,
    /// After.
    pub after: T,
}

/// A migration that is over.
#[derive(Debug)]
pub struct Moved {
    /// What the operator's command said.
    pub ending: Ending,
    /// The 802.1Q tag of the user's frames to v on the trunk.
    pub vlan: Change<Option<u16>>,
    /// Where the process is.
    pub process: Change<Vec<Site>>,
    /// What the client saw; its longest gap is that of this migration.
    pub client: Report,
}

/// A topology at work: daemons, a service at the main site, a client that watches over it, a capture on the trunk.
pub struct Play {
    /// What the client's frames to v carry on the trunk.
    pub capture: Capture,
    /// On taro.
    pub client: Client,
    /// At first at the main site.
    pub service: Service,
    /// Where it all stands.
    pub topology: Topology,
}

impl Play {
    /// Brings it up; returns when the client is being served.
    ///
    /// # Errors
    /// With the daemons' logs.
    pub fn start(app: App) -> anyhow::Result<Self> {
        Self::start_in(Topology::new()?, app, |_| {})
    }

    /// As [`Self::start`], with a film server of `memory_mib` MiB.
    ///
    /// # Errors
    /// With the daemons' logs.
    pub fn start_film(memory_mib: u16) -> anyhow::Result<Self> {
        Self::start_with(Topology::new()?, App::Film, memory_mib, 1, |_| {})
    }

    /// As [`Self::start`], with a load of `memory_mib` MiB under `connections` connections, in a topology without daemons.
    ///
    /// # Errors
    /// With the daemons' logs.
    pub fn start_load(topology: Topology, memory_mib: u16, connections: usize) -> anyhow::Result<Self> {
        Self::start_with(topology, App::Load, memory_mib, connections, |_| {})
    }

    /// As [`Self::start_film`], in a topology that has no daemons yet.
    ///
    /// # Errors
    /// With the daemons' logs.
    pub fn start_film_in(topology: Topology, memory_mib: u16) -> anyhow::Result<Self> {
        Self::start_with(topology, App::Film, memory_mib, 1, |_| {})
    }

    /// Brings it up in a topology that has no daemons yet; `progress` is told what comes next.
    ///
    /// # Errors
    /// With the daemons' logs.
    pub fn start_in(topology: Topology, app: App, progress: impl Fn(&str)) -> anyhow::Result<Self> {
        Self::start_with(topology, app, 8, 1, progress)
    }

    fn start_with(
        mut topology: Topology,
        app: App,
        memory_mib: u16,
        connections: usize,
        progress: impl Fn(&str),
    ) -> anyhow::Result<Self> {
        progress("daemons: handover-gateway, two handover-migrator, handover-controller");
        topology.start_daemons()?;
        progress(&format!("service: {} at the main site", app.name()));
        let served = || {
            let service = topology.start_service_of(app, memory_mib)?;
            topology.apply(&Topology::inventory(app))?;
            let capture = topology.capture()?;
            progress("user: taro connects, one connection to the end");
            Ok((topology.start_client_of(&service, connections)?, capture, service))
        };
        let served: anyhow::Result<_> = served();
        let (client, capture, service) = served.with_context(|| topology.logs())?;
        Ok(Self { capture, client, service, topology })
    }

    /// Migrates the service and looks at it from all sides.
    ///
    /// # Errors
    /// If something cannot be looked at; with the daemons' logs. A migration that fails is no error here.
    pub fn migrate(&mut self, to: Site, progress: impl Fn(&str)) -> anyhow::Result<Moved> {
        self.migrate_with(to, true, progress)
    }

    /// As [`Self::migrate`]; `hold`: the user's frames are held at the gateway while the service stands still.
    ///
    /// # Errors
    /// As above.
    pub fn migrate_with(&mut self, to: Site, hold: bool, progress: impl Fn(&str)) -> anyhow::Result<Moved> {
        let Self { capture, client, service, topology } = self;
        topology.migrate(service, client, capture, to, hold, progress).with_context(|| topology.logs())
    }
}

/// Hosts that a migration touches.
const TOUCHED: [&str; 7] =
    ["main-server", "backup-server", "main-router", "backup-router", "gateway", "control", "taro"];

impl Play {
    /// What is on each host that a migration touches.
    ///
    /// # Errors
    /// If something cannot be looked at.
    pub fn residues(&self) -> anyhow::Result<Vec<Residue>> {
        TOUCHED.iter().map(|name| residue::of(self.topology.lab().host(name)?)).collect()
    }

    /// What is on a host now and was not before, or the other way round. Meant to stay, and left out here, are the
    /// migrators' records of finished migrations and logs of failures (bounded in number), and one cgroup, which holds the
    /// service.
    ///
    /// # Errors
    /// If something cannot be looked at.
    pub fn left_since(&self, before: &[Residue]) -> anyhow::Result<Vec<String>> {
        let service = format!("handover/{}.", self.service.app.name());
        let mut left = Vec::new();
        for ((name, before), after) in TOUCHED.iter().zip(before).zip(self.residues()?) {
            let [before, after] = [before.clone(), after].map(|mut residue| {
                for (kind, things) in &mut residue {
                    match *kind {
                        "files" => things.retain(|f| !f.starts_with("migrations") && !f.starts_with("logs")),
                        "cgroups" => {
                            if things.iter().filter(|c| c.starts_with(&service)).count() == 1 {
                                things.retain(|c| !c.starts_with(&service));
                            }
                            things.retain(|c| c != "handover");
                        }
                        _ => {}
                    }
                }
                residue
            });
            left.extend(
                residue::difference(&before, &after).into_iter().map(|line| format!("{name}: {line}")),
            );
        }
        Ok(left)
    }
}

impl Topology {
    /// Starts `handover migrate --wait`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_migration(&self, app: App, to: Site, hold: bool) -> anyhow::Result<Migration> {
        self.start_migration_with(app, to, if hold { &[] } else { &["--no-hold"] })
    }

    /// As [`Self::start_migration`], with more options.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_migration_with(&self, app: App, to: Site, more: &[&str]) -> anyhow::Result<Migration> {
        let program = self
            .handover_program()?
            .args(["-o", "json", "migrate", app.name(), "--to", to.name(), "--wait"])
            .args(more)
            .stdio(Io::Null, Io::Pipe, Io::Pipe);
        let mut process = self.control.spawn(&program)?;
        let lines = |pipe: Option<std::fs::File>| pipe.map(Lines::collect).unwrap_or_default();
        let (stdout, progress) = (lines(process.stdout.take()), lines(process.stderr.take()));
        Ok(Migration { process, stdout, progress })
    }

    /// Migrates a service and looks at it from all sides; `progress` gets what the command says, line by line.
    ///
    /// # Errors
    /// If something cannot be looked at. A migration that fails is no error here.
    pub fn migrate(
        &self,
        service: &Service,
        client: &mut Client,
        capture: &Capture,
        to: Site,
        hold: bool,
        progress: impl Fn(&str),
    ) -> anyhow::Result<Moved> {
        let process_before = self.sites_of(service)?;
        let vlan_before = capture.tag_after(capture.frames(), FRAME).context("before the migration")?;
        client.report()?; // its longest gap starts anew
        let migration = self.start_migration(service.app, to, hold)?;
        let mut shown = 0;
        while let Ok(line) = migration.progress.wait_for(shown, OVER, |_| true) {
            progress(&line);
            shown += 1;
        }
        let ending = migration.wait()?;
        let client = client.more(FLOW).context("after the migration")?;
        let vlan_after = capture
            .tag_after(capture.frames(), FRAME)
            .with_context(|| format!("after the migration; {ending:?}, {client:?}"))?;
        Ok(Moved {
            ending,
            vlan: Change { before: vlan_before, after: vlan_after },
            process: Change { before: process_before, after: self.sites_of(service)? },
            client,
        })
    }
}

impl Moved {
    /// Demands that service, address, user and connections are at `to`, and nothing was lost.
    ///
    /// # Errors
    /// Says what is not as it should be.
    pub fn check(&self, to: Site) -> anyhow::Result<&Session> {
        let session = self.check_arrival(to)?;
        ensure!(session.losses.is_empty(), "not taken along: {}", session.losses.join("; "));
        Ok(session)
    }

    /// As [`check`](Self::check), but what came over UDP and had not been read may be lost, as it is without hold.
    ///
    /// # Errors
    /// Says what is not as it should be.
    pub fn check_arrival(&self, to: Site) -> anyhow::Result<&Session> {
        let Ending { ended, said, session } = &self.ending;
        ensure!(ended.success(), "`handover migrate` ended with {ended}:\n{said}");
        let session = session.as_ref().context("`handover migrate` printed no session")?;
        ensure!(session.outcome == "completed", "the session is {}", session.outcome);
        let other = session.losses.iter().find(|l| !(l.starts_with("UDP port") && l.ends_with("not read")));
        ensure!(other.is_none(), "not taken along: {other:?}");
        let from = to.other();
        ensure!(
            self.process == Change { before: vec![from], after: vec![to] },
            "the process did not move from {} to {}: {:?}",
            from.name(),
            to.name(),
            self.process
        );
        ensure!(
            self.vlan == Change { before: Some(from.vid()), after: Some(to.vid()) },
            "the user's tag did not change from {} to {}: {:?}",
            from.vid(),
            to.vid(),
            self.vlan
        );
        ensure!(self.client.unharmed(), "the client was harmed: {:?}", self.client);
        Ok(session)
    }
}
