//! The fault table: each component killed, and cut off, at each step of a migration, with the real daemons and real CRIU.
//!
//! A migration is led to a step by stopping (SIGSTOP, which to everybody else is a daemon that is slow) whoever the *next*
//! step needs, and letting go whoever this one needs: the session then stands at the step for as long as it takes to do the
//! harm. What has been reached is read from the daemons' logs; nothing is timed.
//!
//! ```text
//! stands at   because is stopped             reached when
//! preflight   source                         controller: requested
//! stage       gateway                        controller: staging          (its preflight was answered before)
//! prepare     source                         controller: staging
//! fence       CRIU at the source             source: fence done           (CRIU has not begun)
//! dump        CRIU at the source, later      source: fence done
//! copy        destination                    source: dump done            (more than fits into the windows is to be sent)
//! restore     CRIU at the destination        destination: restoring
//! address     nobody                         destination: restored        (harm is done at once)
//! switch      gateway                        controller: frozen
//! yield       source                         controller: switched
//! decision    destination                    source: yielded              (harm is done at once)
//! resume      destination                    controller: decided
//! end         source                         controller: resumed
//! finish      gateway                        controller: ended
//! ```
//!
//! After the harm everybody is let go; who was killed is started again at once, as systemd would; a link that was cut
//! stays so until the controller has taken notice or the session is over. Then everything has to agree.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail, ensure};
use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::{
    Host, Lines,
    residue::Residue,
    scenario::{Migration, Play, Session},
    topology::{App, Layout, Site, Topology},
};

/// A step is reached, an end noticed, everything settled within this, or the case has failed.
const SOON: Duration = Duration::from_secs(30);
/// Payload that shows that the stream goes on.
const FLOW: u64 = 20_000;
/// More than fits into the windows of the migration connection, so that a destination that does not read holds the copy.
const MEMORY_MIB: u16 = 48;

/// Where a migration stands; see the table above.
#[allow(missing_docs, reason = "the names of the sequence")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum At {
    Preflight,
    Stage,
    Prepare,
    Fence,
    Dump,
    Copy,
    Restore,
    Address,
    Switch,
    Yield,
    Decision,
    Resume,
    End,
    Finish,
}

impl At {
    /// In the order of the sequence.
    pub const ALL: [Self; 14] = [
        Self::Preflight,
        Self::Stage,
        Self::Prepare,
        Self::Fence,
        Self::Dump,
        Self::Copy,
        Self::Restore,
        Self::Address,
        Self::Switch,
        Self::Yield,
        Self::Decision,
        Self::Resume,
        Self::End,
        Self::Finish,
    ];
}

/// Who is harmed.
#[allow(missing_docs, reason = "the names of the components")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Who {
    Controller,
    Source,
    Destination,
    Gateway,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Harm {
    /// The daemon gets SIGKILL, and is started again.
    Kill(Who),
    /// The control network is cut there.
    Control(Who),
    /// The network between the servers is cut.
    Migration,
}

impl Harm {
    /// All kills.
    pub const KILLS: [Self; 4] = [
        Self::Kill(Who::Controller),
        Self::Kill(Who::Source),
        Self::Kill(Who::Destination),
        Self::Kill(Who::Gateway),
    ];
    /// All cuts.
    pub const CUTS: [Self; 5] = [
        Self::Control(Who::Controller),
        Self::Control(Who::Source),
        Self::Control(Who::Destination),
        Self::Control(Who::Gateway),
        Self::Migration,
    ];
}

impl fmt::Display for Harm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |who: &Who| format!("{who:?}").to_lowercase();
        match self {
            Self::Kill(who) => write!(f, "{} killed", name(who)),
            Self::Control(who) => write!(f, "{} cut off", name(who)),
            Self::Migration => f.write_str("migration network cut"),
        }
    }
}

/// What came of one case.
#[derive(Debug, Clone)]
pub struct Row {
    /// Where.
    pub at: At,
    /// What.
    pub harm: Harm,
    /// How the session ended.
    pub outcome: String,
    /// Of a failure: the step that failed.
    pub failed_step: String,
    /// The longest silence the viewer saw.
    pub gap: Duration,
    /// From the end of the harm (daemon started, link up) until all had confirmed and everything agreed.
    pub healed: Duration,
    /// From the source's notice of a failure until the original ran again, if the source undid a freeze by itself.
    pub undone: Option<Duration>,
    /// All of it, the migration afterwards included.
    pub took: Duration,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |d: Duration| d.as_millis();
        let at = format!("{:?}", self.at).to_lowercase();
        let failed =
            if self.failed_step.is_empty() { String::new() } else { format!(" ({})", self.failed_step) };
        let undone = self.undone.map_or_else(|| "-".into(), |d| format!("{} ms", ms(d)));
        write!(
            f,
            "{at:<9} {:<22} {:<24} gap {:>5} ms  agreed {:>5} ms  undone {undone:>6}  total {:>5} ms",
            self.harm.to_string(),
            format!("{}{failed}", self.outcome),
            ms(self.gap),
            ms(self.healed),
            ms(self.took)
        )
    }
}

/// A service, its user and all daemons, through one case after the other.
pub struct Faults {
    play: Play,
    at: Site,
    /// What is there when nothing is under way, by where the service is.
    clean: BTreeMap<Site, Vec<Residue>>,
    requests: u32,
}

/// One migration of the film on its way to a step.
pub struct Led<'a> {
    play: &'a Play,
    id: String,
    from: Site,
    migration: Migration,
    /// Lines of each log that are of before.
    marks: BTreeMap<&'static str, usize>,
    stopped: Vec<(&'static str, i32)>,
}

#[derive(Debug, Deserialize)]
struct Status {
    services: Vec<StatusService>,
    users: Vec<StatusUser>,
}

#[derive(Debug, Deserialize)]
struct StatusService {
    site: String,
}

#[derive(Debug, Deserialize)]
struct StatusUser {
    network: String,
}

const DAEMONS: [&str; 4] = ["control", "main-server", "backup-server", "gateway"];

impl Faults {
    /// Brings everything up, and learns what belongs there.
    ///
    /// # Errors
    /// With the daemons' logs.
    pub fn start() -> anyhow::Result<Self> {
        let topology = Topology::laid_out(Layout { pinned: true, ..Layout::default() })?;
        let play = Play::start_film_in(topology, MEMORY_MIB)?;
        let mut faults = Self { play, at: Site::Main, clean: BTreeMap::new(), requests: 0 };
        for _ in Site::ALL {
            faults.move_on()?;
            faults.clean.insert(faults.at, faults.play.residues()?);
        }
        Ok(faults)
    }

    /// Moves the service to the other site, with everything checked.
    fn move_on(&mut self) -> anyhow::Result<()> {
        let to = self.at.other();
        let moved = self.play.migrate(to, |_| {})?;
        self.requests += 1;
        moved.check(to).with_context(|| self.play.topology.logs())?;
        self.at = to;
        Ok(())
    }

    /// One case: the harm is done where it is to be done, everything agrees afterwards, and the next migration succeeds.
    ///
    /// # Errors
    /// What does not agree; with the daemons' logs.
    pub fn case(&mut self, at: At, harm: Harm) -> anyhow::Result<Row> {
        let began = Instant::now();
        let row = self.harmed(at, harm).and_then(|row| {
            self.move_on().context("the next migration")?;
            Ok(Row { took: began.elapsed(), ..row })
        });
        row.map_err(|e| anyhow!("{at:?}, {harm}: {e:#}\n{}", self.play.topology.logs()))
    }

    fn harmed(&mut self, at: At, harm: Harm) -> anyhow::Result<Row> {
        self.play.client.report()?; // its longest gap starts anew
        let watch = Watch::start(&self.play, self.at)?;
        self.requests += 1;
        let id = format!("film-{}", self.requests);
        let mut led = Led::start(&self.play, id.clone(), self.at, at, &[])?;
        led.lead(at)?;
        let (from, marks) = (self.at, led.marks.clone());
        let who = |w: Who| match w {
            Who::Controller => "control",
            Who::Source => from.server(),
            Who::Destination => from.other().server(),
            Who::Gateway => "gateway",
        };
        let noticed_from = self.play.topology.daemon("control")?.log.len();
        match harm {
            Harm::Kill(w) => {
                let daemon = &self.play.topology.daemon(who(w))?.process;
                daemon.signal(Signal::SIGKILL)?;
                daemon.wait_timeout(SOON)?;
            }
            Harm::Control(w) => self.control_link(who(w), "down")?,
            Harm::Migration => self.migration_link("down")?,
        }
        let migration = led.let_go()?;
        match harm {
            Harm::Kill(w) => {
                self.play.topology.start_daemon(who(w))?;
                self.play.topology.daemon(who(w))?.wait_for("ready", SOON)?;
            }
            Harm::Control(_) | Harm::Migration => {
                let log = &self.play.topology.daemon("control")?.log;
                let noticed = [
                    "event=\"failed\"",
                    "event=\"unconfirmed\"",
                    "\"completed\"",
                    "\"refused\"",
                    "\"rolled-back\"",
                ];
                log.wait_for(noticed_from, SOON, |l| {
                    (of_session(l, &id) && noticed.iter().any(|n| l.contains(n)))
                        // what the service waits for is retried for long before the session says so
                        || (at >= At::Resume && l.contains("reachable=false"))
                })
                .context("the controller takes no notice")?;
                match harm {
                    Harm::Control(w) => self.control_link(who(w), "up")?,
                    _ => self.migration_link("up")?,
                }
            }
        }
        let healed = Instant::now();
        let session = self.play.settled(&id)?;
        let place = match session.outcome.as_str() {
            "completed" => from.other(),
            "rolled-back" | "refused" => from,
            other => bail!("the session is {other}: {}", session.reason),
        };
        self.at = place;
        self.agree(place)?;
        let healed = healed.elapsed();
        watch.finish()?;
        let seen = self.play.client.more(FLOW)?;
        ensure!(seen.unharmed(), "the viewer was harmed: {seen:?}");
        self.ended(migration, &session, harm)?;
        let undone = marks
            .get(from.server())
            .and_then(|mark| undoing(&self.play.topology.daemon(from.server()).ok()?.log, *mark, &id));
        Ok(Row {
            at,
            harm,
            outcome: session.outcome,
            failed_step: session.failed_step,
            gap: Duration::from_micros(seen.longest_gap_us),
            healed,
            undone,
            took: Duration::ZERO,
        })
    }

    fn control_link(&self, host: &str, state: &str) -> anyhow::Result<()> {
        self.play.topology.control_switch.ip(&format!("link set {host} {state}"))
    }

    fn migration_link(&self, state: &str) -> anyhow::Result<()> {
        self.play.topology.server(Site::Backup)?.ip(&format!("link set mig0 {state}"))
    }

    /// Everybody is where the session says, one copy, and nothing is left over.
    fn agree(&mut self, place: Site) -> anyhow::Result<()> {
        let topology = &self.play.topology;
        let shown = topology.handover(["-o", "json", "status"])?;
        let status: Status = serde_json::from_str(&shown.stdout).with_context(|| shown.stderr.clone())?;
        let network = format!("net{}", place.vid());
        ensure!(
            status.services.iter().all(|s| s.site == place.name())
                && status.users.iter().all(|u| u.network == network),
            "`handover status` differs from {}: {status:?}",
            place.name()
        );
        let sites = topology.sites_of(&self.play.service)?;
        ensure!(sites == [place], "the process is at {sites:?}, not at {}", place.name());
        let of_v = topology.sites_of_v()?;
        ensure!(of_v == [place], "v is at {of_v:?}, not at {}", place.name());
        let capture = &self.play.capture;
        let tag = capture.tag_after(capture.frames(), SOON)?;
        ensure!(tag == Some(place.vid()), "the user's frames have tag {tag:?}, not that of {}", place.name());
        let clean = self.clean.get(&place).context("no clean state is known")?;
        let deadline = Instant::now() + SOON;
        loop {
            let left = self.play.left_since(clean)?;
            if left.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "left behind:\n{}", left.join("\n"));
            std::thread::sleep(Duration::from_millis(20)); // between two looks; a host tells of no end of clearing away
        }
    }

    /// The operator's command told the truth.
    fn ended(&self, migration: Migration, session: &Session, harm: Harm) -> anyhow::Result<()> {
        let ending = migration.wait()?;
        let told = match session.outcome.as_str() {
            "completed" => 0,
            "rolled-back" => 3,
            _ => 1,
        };
        // whose controller died before it answered knows nothing
        let lost = harm == Harm::Kill(Who::Controller) && ending.session.is_none();
        // it does not wait on where an operator is needed for a time
        let in_doubt = ending.session.as_ref().is_some_and(|s| s.outcome == "needs-operator");
        ensure!(
            lost || ending.ended.code == Some(if in_doubt { 6 } else { told }),
            "`handover migrate` ended with {}, the session is {}:\n{}",
            ending.ended,
            session.outcome,
            ending.said
        );
        Ok(())
    }

    /// Ends the viewer's stream, with everything checked.
    ///
    /// # Errors
    /// If it was harmed.
    pub fn finish(self) -> anyhow::Result<()> {
        let last = self.play.client.finish()?;
        ensure!(last.unharmed(), "the viewer was harmed: {last:?}");
        Ok(())
    }
}

impl Play {
    /// Waits until the session is over and all have confirmed; looks again whenever the controller says something of it.
    ///
    /// # Errors
    /// If it is not in time, with what is known of it.
    pub fn settled(&self, id: &str) -> anyhow::Result<Session> {
        let log = &self.topology.daemon("control")?.log;
        let deadline = Instant::now() + SOON;
        let mut last = None;
        loop {
            let from = log.len();
            let shown = self.topology.handover(["-o", "json", "sessions", "show", id])?;
            if shown.ended.success() {
                let session: Session = serde_json::from_str(&shown.stdout)?;
                if session.outcome != "running"
                    && session.outcome != "needs-operator"
                    && session.pending.is_empty()
                {
                    return Ok(session);
                }
                last = Some(session);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            log.wait_for(from, left, |l| l.contains(id))
                .with_context(|| format!("session {id} does not settle: {last:?}"))?;
        }
    }
}

impl<'a> Led<'a> {
    /// Asks for the migration, away from `from`; `id` is the name that its session will have.
    ///
    /// # Errors
    /// If it cannot be asked for.
    pub fn start(play: &'a Play, id: String, from: Site, at: At, more: &[&str]) -> anyhow::Result<Self> {
        let topology = &play.topology;
        let mut marks = BTreeMap::new();
        for host in DAEMONS {
            marks.insert(host, topology.daemon(host)?.log.len());
        }
        // every way begins with a preflight that waits for somebody
        let first = if at == At::Prepare { "gateway" } else { from.server() };
        let pid = topology.daemon(first)?.process.pid();
        topology.lab().host(first)?.signal(pid, Signal::SIGSTOP)?;
        let migration = topology
            .start_migration_with(App::Film, from.other(), &[&["--no-hold"], more].concat())
            .with_context(|| format!("on the way to {at:?}"))?;
        Ok(Self { play, id, from, migration, marks, stopped: vec![(first, pid)] })
    }

    fn source(&self) -> &'static str {
        self.from.server()
    }

    fn destination(&self) -> &'static str {
        self.from.other().server()
    }

    fn host(&self, name: &str) -> anyhow::Result<&Host> {
        self.play.topology.lab().host(name)
    }

    /// Waits for a line of the daemon on `host` about this session or migration (or about nobody's) with all `words`.
    fn reached(&self, host: &'static str, words: &[&str]) -> anyhow::Result<()> {
        let mark = self.marks.get(host).copied().unwrap_or_default();
        let log = &self.play.topology.daemon(host)?.log;
        log.wait_for(mark, SOON, |l| words.iter().all(|w| l.contains(w)))
            .map(drop)
            .with_context(|| format!("no line with {words:?} from {host}"))
    }

    fn session(&self, words: &str) -> anyhow::Result<()> {
        let mark = self.marks.get("control").copied().unwrap_or_default();
        let log = &self.play.topology.daemon("control")?.log;
        log.wait_for(mark, SOON, |l| of_session(l, &self.id) && l.contains(words))
            .map(drop)
            .with_context(|| format!("no line with `{words}` of session {}", self.id))
    }

    fn migrator(&self, host: &'static str, state: &str) -> anyhow::Result<()> {
        self.reached(host, &[&format!("\"{}\"", self.id), &format!("state=\"{state}\"")])
    }

    fn stop_pid(&mut self, host: &'static str, pid: i32) -> anyhow::Result<()> {
        self.host(host)?.signal(pid, Signal::SIGSTOP)?;
        self.stopped.push((host, pid));
        Ok(())
    }

    fn stop(&mut self, host: &'static str) -> anyhow::Result<()> {
        let pid = self.play.topology.daemon(host)?.process.pid();
        self.stop_pid(host, pid)
    }

    /// CRIU on a host, which is there from *prepare* on.
    fn criu(&self, host: &'static str) -> anyhow::Result<Vec<i32>> {
        let (host, deadline) = (self.host(host)?, Instant::now() + SOON);
        loop {
            let found = criu(host)?;
            if !found.is_empty() {
                return Ok(found);
            }
            ensure!(Instant::now() < deadline, "no CRIU on {}", host.name());
            std::thread::sleep(Duration::from_millis(1)); // it is there, but may just be changing its program
        }
    }

    fn stop_criu(&mut self, host: &'static str) -> anyhow::Result<Vec<i32>> {
        let found = self.criu(host)?;
        for pid in &found {
            self.stop_pid(host, *pid)?;
        }
        Ok(found)
    }

    fn go(&mut self, host: &'static str, pids: &[i32]) -> anyhow::Result<()> {
        for pid in pids {
            self.host(host)?.signal(*pid, Signal::SIGCONT)?;
        }
        self.stopped.retain(|(h, p)| *h != host || !pids.contains(p));
        Ok(())
    }

    fn go_on(&mut self, host: &'static str) -> anyhow::Result<()> {
        let pid = self.play.topology.daemon(host)?.process.pid();
        self.go(host, &[pid])
    }

    /// Leads it there; see the table at the top.
    ///
    /// # Errors
    /// If it does not get there.
    pub fn lead(&mut self, at: At) -> anyhow::Result<()> {
        let (source, destination) = (self.source(), self.destination());
        self.session("session requested")?;
        if at == At::Preflight {
            return Ok(());
        }
        if at == At::Prepare {
            self.session(&format!("by=\"migrator {destination}\""))?;
            self.stop(source)?;
            self.go_on("gateway")?;
            return self.session("state=\"staging\"");
        }
        self.session("by=\"gateway gw\"")?;
        self.stop("gateway")?;
        self.go_on(source)?;
        self.session("state=\"staging\"")?;
        if at == At::Stage {
            return Ok(());
        }
        self.session("event=\"prepared\"")?;
        if matches!(at, At::Fence | At::Dump | At::Copy) {
            let criu = self.stop_criu(source)?;
            if at == At::Copy {
                self.stop(destination)?;
            }
            self.go_on("gateway")?;
            self.migrator(source, "freezing")?;
            match at {
                At::Fence => self.reached(source, &["step=\"fence\""])?,
                At::Dump => {
                    self.go(source, &criu)?;
                    self.reached(source, &["step=\"fence\""])?;
                    for pid in criu {
                        self.stop_pid(source, pid)?;
                    }
                }
                _ => {
                    self.go(source, &criu)?;
                    self.reached(source, &["step=\"dump\""])?;
                }
            }
            return Ok(());
        }
        let criu = self.stop_criu(destination)?;
        self.go_on("gateway")?;
        self.migrator(destination, "restoring")?;
        if at == At::Restore {
            return Ok(());
        }
        self.stop("gateway")?;
        self.go(destination, &criu)?;
        if at == At::Address {
            return self.migrator(destination, "restored");
        }
        self.session("event=\"frozen\"")?;
        if at == At::Switch {
            return Ok(());
        }
        self.stop(source)?;
        self.go_on("gateway")?;
        self.session("event=\"switched\"")?;
        if at == At::Yield {
            return Ok(());
        }
        self.stop(destination)?;
        self.go_on(source)?;
        self.migrator(source, "yielded")?;
        if at == At::Decision {
            return Ok(());
        }
        self.session("event=\"decided\"")?;
        match at {
            At::Resume => Ok(()),
            At::End => {
                self.stop(source)?;
                self.go_on(destination)?;
                self.session("event=\"resumed\"")
            }
            _ => {
                self.stop("gateway")?;
                self.go_on(destination)?;
                self.session("event=\"ended\"")
            }
        }
    }

    /// Lets everybody go who is still there.
    ///
    /// # Errors
    /// Never, in a whole topology.
    pub fn let_go(self) -> anyhow::Result<Migration> {
        for (host, pid) in &self.stopped {
            // one that was killed has gone
            let _ = self.host(host)?.signal(*pid, Signal::SIGCONT);
        }
        Ok(self.migration)
    }
}

/// Whether the controller's line is about this session.
fn of_session(line: &str, id: &str) -> bool {
    let named = line.split_whitespace().find_map(|w| w.strip_prefix("session="));
    named.is_some_and(|n| n.trim_matches('"') == id)
}

/// Microseconds of the day in a log line's time, which all daemons write in UTC.
fn time_of(line: &str) -> Option<u64> {
    let clock = line.split_whitespace().next()?.split_once('T')?.1.strip_suffix('Z')?;
    let (hms, fraction) = clock.split_once('.')?;
    let mut parts = hms.split(':').map(|p| p.parse::<u64>().ok());
    let (h, m, s) = (parts.next()??, parts.next()??, parts.next()??);
    Some(((h * 60 + m) * 60 + s) * 1_000_000 + fraction.parse::<u64>().ok()?)
}

/// How long the source took from its notice of a failure until it had undone everything.
fn undoing(log: &Lines, mark: usize, id: &str) -> Option<Duration> {
    let text = log.text();
    let named = format!("\"{id}\"");
    let mut lines = text.lines().skip(mark).filter(|l| l.contains(&named));
    let noticed = lines
        .find(|l| l.contains(" undoing ") || l.contains("the service goes on here"))
        .and_then(time_of)?;
    let done = lines.find(|l| l.contains("state=\"aborted\"")).and_then(time_of)?;
    Some(Duration::from_micros(done.saturating_sub(noticed)))
}

/// Looks all the time whether two copies of the service run.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<anyhow::Result<u64>>,
}

impl Watch {
    fn start(play: &Play, from: Site) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (source, destination) =
            (play.topology.server(from)?.clone(), play.topology.server(from.other())?.clone());
        let (over, pid) = (Arc::clone(&stop), play.service.process.pid());
        let thread = std::thread::spawn(move || {
            let mut looks = 0;
            while !over.load(Ordering::Relaxed) {
                // the second look: the original ran before and after the copy was seen to run
                if let (Some(first), Some(copy), Some(second)) =
                    (runs(&source, pid), runs(&destination, pid), runs(&source, pid))
                    // what CRIU is still putting together is no copy yet
                    && criu(&destination)?.is_empty()
                {
                    bail!(
                        "two copies of the service run: {first} and {second} at {}, {copy} at {}",
                        source.name(),
                        destination.name()
                    );
                }
                looks += 1;
                std::thread::sleep(Duration::from_millis(1)); // the machine has few processors
            }
            Ok(looks)
        });
        Ok(Self { stop, thread })
    }

    fn finish(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let looks = self.thread.join().map_err(|_| anyhow!("the watch panicked"))??;
        ensure!(looks > 0, "nobody watched");
        Ok(())
    }
}

/// The processes of CRIU on a host.
fn criu(host: &Host) -> anyhow::Result<Vec<i32>> {
    let of_criu = |line: &str| line.contains("/criu") || line.contains("criu: ");
    Ok(host.processes()?.into_iter().filter(|(_, line)| of_criu(line)).map(|p| p.0).collect())
}

/// The state of a process of a host if it can run: it is neither stopped, traced, ending nor in a frozen cgroup.
fn runs(host: &Host, pid: i32) -> Option<String> {
    // include/linux/sched.h
    const PF_EXITING: u64 = 0x4;
    const PF_SIGNALED: u64 = 0x400;

    let proc = host.path(format!("/proc/{pid}"));
    let read = |file: &str| std::fs::read_to_string(proc.join(file)).ok();
    let stat = read("stat")?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let (state, flags) = (fields.next()?, fields.nth(5)?.parse::<u64>().ok()?);
    let killed = read("status")?.lines().any(|l| {
        let pending = l.strip_prefix("SigPnd:").or_else(|| l.strip_prefix("ShdPnd:"));
        let set = pending.and_then(|p| u64::from_str_radix(p.trim(), 16).ok()).unwrap_or(0);
        set & 1 << (libc::SIGKILL - 1) != 0
    });
    if !matches!(state, "R" | "S" | "D") || flags & (PF_EXITING | PF_SIGNALED) != 0 || killed {
        return None;
    }
    let cgroups = read("cgroup")?;
    let group = cgroups.lines().find_map(|l| l.strip_prefix("0::/"))?;
    let events = crate::cgroup_root().ok()?.join(group).join("cgroup.events");
    let thawed = std::fs::read_to_string(events).is_ok_and(|e| e.contains("frozen 0"));
    thawed.then(|| format!("{state} (flags {flags:x})"))
}
