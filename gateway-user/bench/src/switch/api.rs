//! The controller's calls to the daemon as it is run, over mutual TLS on a connection that is warm: how long after the receipt
//! of a switch its store was made, by the daemon's clock, and how long the caller waited for the answer. (The local socket is
//! not for this call: it is the operators'.)
//!
//! ```text
//!   this process --mTLS--> handover-gateway --acc0== user0      up0: answers for the routers
//!                                           --wan0== up0
//! ```
//!
//! A run is stage, switch, abort, of all users.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use gateway_bench_ebpf::Next;
use handover_api::{
    tls::{Role, Tls, init_authority, issue},
    users, v1,
    v1::gateway_client::GatewayClient,
};
use serde::Serialize;
use tonic::transport::Channel;

use crate::{
    place::{self, Scratch},
    rig::{Programs, VIRTUAL_ROUTER, inventory, name},
    stats::{Times, table, time},
};

/// Runs, at most.
const RUNS: usize = 300;
/// At least so many, and as many as begin in this time.
const FEWEST: usize = 3;
/// See [`FEWEST`].
const RUNS_FOR: Duration = Duration::from_secs(30);
/// Longer than a stage of the most users, who are introduced at some 32,000 a second, three times if need be.
const PATIENCE: Duration = Duration::from_secs(300);

/// Calls for N users.
#[derive(Debug, Serialize)]
pub struct Row {
    pub users: u32,
    /// Receipt -> store, by the daemon.
    pub receipt_to_store: Times,
    /// Request -> answer, at the caller.
    pub round_trip: Times,
    /// Store -> last frame under the old network; nobody sends here.
    pub window: Times,
    /// The stage call, introductions and grace period included.
    pub stage: Times,
    /// The configure call that brought the users.
    pub configure_ns: u64,
    /// The daemon's largest resident memory so far.
    pub daemon_kib: u64,
}

/// Calls that did not get through.
#[derive(Debug, Serialize)]
pub struct Failed {
    pub users: u32,
    pub why: String,
}

/// Measures for each number of users.
pub fn run(users: &[u32]) -> anyhow::Result<Vec<Result<Row, Failed>>> {
    place::cable("acc0", "user0")?;
    place::cable("wan0", "up0")?;
    for end in ["user0", "up0"] {
        // else what its peer is given lacks its tags or checksums, and the daemon says so
        place::run(Command::new("ethtool").args(["-K", end, "gro", "on", "tx", "off", "txvlan", "off"]))?;
    }
    let mut router = Programs::load(1, Next::Drop, 0)?;
    router.attach("router", "up0")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let rows = users
        .iter()
        .map(|&users| {
            eprintln!("{users} users, switched by calls ...");
            runtime.block_on(row(users)).map_err(|error| Failed { users, why: format!("{error:#}") })
        })
        .collect();
    place::ip("link del acc0")?;
    place::ip("link del wan0")?;
    Ok(rows)
}

async fn row(count: u32) -> anyhow::Result<Row> {
    let daemon = Daemon::start(count)?;
    let mut gateway = daemon.client().await?;
    let begun = Instant::now();
    gateway.configure(patient(inventory(count))).await.context("configure")?;
    let configure_ns = begun.elapsed().as_nanos() as u64;

    let names: Vec<String> = (1..=count).map(name).collect();
    let users_digest = users::digest(&names).to_vec();
    let [mut stores, mut trips, mut windows, mut stages] = [const { Vec::new() }; 4];
    let begun = Instant::now();
    while stores.len() < RUNS && (stores.len() < FEWEST || begun.elapsed() < RUNS_FOR) {
        let migration = format!("bench{}", stores.len());
        let request = v1::StageRequest {
            migration: migration.clone(),
            users: names.clone(),
            from_network: "old".into(),
            to_network: "new".into(),
            ..Default::default()
        };
        let asked = Instant::now();
        let staged = gateway.stage(patient(request)).await.context("stage")?.into_inner();
        stages.push(asked.elapsed().as_nanos() as u64);

        let request = v1::SwitchRequest {
            migration: migration.clone(),
            switch: staged.switch,
            generation: staged.generation,
            to_network: "new".into(),
            users_digest: users_digest.clone(),
            ..Default::default()
        };
        let asked = Instant::now();
        let switched = gateway.switch(request).await.context("switch")?.into_inner();
        trips.push(asked.elapsed().as_nanos() as u64);
        stores.push(switched.store_latency_ns);
        windows.push(switched.window_ns);

        let request = v1::AbortSwitchRequest { migration, ..Default::default() };
        let aborted = gateway.abort(patient(request)).await.context("abort")?.into_inner();
        ensure!(aborted.was_switched, "the users were not on the new network");
    }
    let times = |samples| Times::of(samples).context("no samples");
    Ok(Row {
        users: count,
        receipt_to_store: times(stores)?,
        round_trip: times(trips)?,
        window: times(windows)?,
        stage: times(stages)?,
        configure_ns,
        daemon_kib: daemon.peak_kib()?,
    })
}

fn patient<T>(request: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(request);
    request.set_timeout(PATIENCE);
    request
}

/// The daemon that was built beside this program.
struct Daemon {
    child: Child,
    /// Drained by a thread of its own, so that the daemon never waits for a reader.
    endpoint: String,
    dir: Scratch,
}

impl Daemon {
    fn start(users: u32) -> anyhow::Result<Self> {
        let dir = Scratch::new()?;
        init_authority(dir.path())?;
        issue(dir.path(), dir.path(), Role::Gateway, "gw")?;
        issue(dir.path(), dir.path(), Role::Controller, "c")?;
        // a namespace of our own: nobody else has the port
        let endpoint = "127.0.0.1:7443";
        let files = dir.path().display();
        let config = format!(
            "name = \"gw\"\nlisten = \"{endpoint}\"\naccess = \"acc0\"\nwan = \"wan0\"\nmax_users = {users}\n\
             virtual_router_mac = \"{VIRTUAL_ROUTER}\"\n[tls]\nca = \"{files}/ca.pem\"\n\
             cert = \"{files}/gateway-gw.pem\"\nkey = \"{files}/gateway-gw.key\"\n"
        );
        let file = dir.file("gateway.toml");
        fs::write(&file, config)?;
        let program = std::env::current_exe()?.with_file_name("handover-gateway");
        ensure!(
            program.exists(),
            "there is no {}: build it first, as `cargo xtask bench` does",
            program.display()
        );
        let mut command = Command::new(program);
        command.arg("--config").arg(&file).env("NO_COLOR", "1").stdout(Stdio::null()).stderr(Stdio::piped());
        place::ends_with_us(&mut command);
        let mut child = command.spawn().context("starting handover-gateway")?;
        let log = child.stderr.take().context("the daemon's standard error")?;
        let daemon = Self { child, endpoint: endpoint.into(), dir };
        let mut lines = BufReader::new(log).lines();
        let mut seen = Vec::new();
        loop {
            let Some(line) = lines.next() else {
                anyhow::bail!("handover-gateway did not start: {}", seen.join(" / "));
            };
            seen.push(line?);
            if seen.last().is_some_and(|line| line.contains("ready")) {
                break;
            }
        }
        std::thread::spawn(move || lines.for_each(drop));
        Ok(daemon)
    }

    async fn client(&self) -> anyhow::Result<GatewayClient<Channel>> {
        let file = |name: &str| self.dir.path().join(name);
        let files = handover_api::tls::TlsFiles {
            ca: file("ca.pem"),
            cert: file("controller-c.pem"),
            key: file("controller-c.key"),
        };
        let channel = Tls::load(&files)?.connect(Role::Gateway, "gw", &self.endpoint).await?;
        Ok(GatewayClient::new(channel))
    }

    fn peak_kib(&self) -> anyhow::Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let text = fs::read_to_string(Path::new(&path)).context("the daemon's status")?;
        let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:")).context("no VmHWM")?;
        Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // one that has ended by itself is no error
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn print(rows: &[Result<Row, Failed>]) {
    println!("Calls of the controller over mutual TLS on a warm connection:");
    let mut table = table(
        1,
        &[
            "users",
            "runs",
            "receipt -> store",
            "p99",
            "max",
            "round trip",
            "p99",
            "stage",
            "configure",
            "daemon",
        ],
    );
    for row in rows {
        let row = match row {
            Ok(row) => row,
            Err(failed) => {
                println!("  {} users: FAILED: {}", failed.users, failed.why);
                continue;
            }
        };
        table.add_row([
            row.users.to_string(),
            row.round_trip.runs.to_string(),
            time(row.receipt_to_store.median_ns),
            time(row.receipt_to_store.p99_ns),
            time(row.receipt_to_store.max_ns),
            time(row.round_trip.median_ns),
            time(row.round_trip.p99_ns),
            time(row.stage.median_ns),
            time(row.configure_ns),
            format!("{} MiB", row.daemon_kib / 1024),
        ]);
    }
    println!("{table}");
}
