//! Open vSwitch with its userspace datapath, as a switch to compare with: a database server and a switch daemon of our own,
//! in the benchmark's network namespace, with their files in a directory of their own. No system service is touched.

use std::{
    fs::{self, File},
    io::{BufWriter, Write as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use crate::{
    place::{Running, Scratch, pin, run},
    rig::mac,
};

/// Debian's place of the database's schema.
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
/// How long the two may take to be there.
const START: Duration = Duration::from_secs(20);
/// The one bridge.
const BRIDGE: &str = "br0";

/// The switch; ended when dropped.
pub struct Ovs {
    switch: Running,
    _database: Running,
    dir: Scratch,
    pub version: String,
}

/// Why there is no Open vSwitch to compare with, if so.
pub fn missing() -> Option<String> {
    let version = Command::new("ovs-vswitchd").arg("--version").stdout(Stdio::null()).status();
    match version {
        Ok(_) if !Path::new(SCHEMA).exists() => Some(format!("there is no {SCHEMA}")),
        Ok(_) if !Path::new("/dev/net/tun").exists() => Some("there is no /dev/net/tun".into()),
        Ok(_) => None,
        Err(_) => Some("openvswitch-switch is not installed: `cargo xtask setup` does it".into()),
    }
}

impl Ovs {
    /// Starts it on CPU `cpu`, with a bridge between two interfaces, ports 1 and 2.
    pub fn start(from: &str, to: &str, cpu: usize) -> anyhow::Result<Self> {
        let dir = Scratch::new()?;
        let database = dir.file("conf.db");
        let socket = dir.file("db.sock");
        run(Command::new("ovsdb-tool").arg("create").arg(&database).arg(SCHEMA))?;
        let log = |name| File::create(dir.file(name)).context("log file");
        let mut command = Self::command(&dir, "ovsdb-server");
        command.arg(&database).arg(format!("--remote=punix:{}", socket.display()));
        command.arg(format!("--unixctl={}", dir.file("db.ctl").display())).stderr(log("db.log")?);
        let mut database = Running::start(&mut command)?;
        let until = Instant::now() + START;
        while !socket.exists() {
            ensure!(!database.has_ended()?, "ovsdb-server ended: {}", tail(&dir.file("db.log")));
            ensure!(Instant::now() < until, "ovsdb-server did not listen within {START:?}");
            thread::yield_now();
        }
        let version = run(Command::new("ovs-vswitchd").arg("--version"))?;
        let mut ovs = {
            let mut command = Self::command(&dir, "ovs-vswitchd");
            command.arg(format!("unix:{}", socket.display())).arg("--disable-system");
            command.arg(format!("--unixctl={}", dir.file("switch.ctl").display())).stderr(log("switch.log")?);
            // SAFETY: one system call.
            unsafe {
                command.pre_exec(move || pin(cpu).map_err(std::io::Error::other));
            }
            let switch = Running::start(&mut command)?;
            Self {
                switch,
                _database: database,
                version: version.split_whitespace().nth(3).unwrap_or("unknown").into(),
                dir,
            }
        };
        ovs.vsctl(&["init"])?;
        ovs.vsctl(&[
            "add-br",
            BRIDGE,
            "--",
            "set",
            "bridge",
            BRIDGE,
            "datapath_type=netdev",
            "fail_mode=secure",
        ])?;
        for (number, port) in [(1, from), (2, to)] {
            let request = format!("ofport_request={number}");
            ovs.vsctl(&["add-port", BRIDGE, port, "--", "set", "interface", port, &request])?;
        }
        if ovs.switch.has_ended()? {
            bail!("ovs-vswitchd ended: {}", tail(&ovs.dir.file("switch.log")));
        }
        Ok(ovs)
    }

    /// Of the switch daemon.
    pub fn pid(&self) -> u32 {
        self.switch.pid()
    }

    fn command(dir: &Scratch, program: &str) -> Command {
        let mut command = Command::new(program);
        for variable in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR"] {
            command.env(variable, dir.path());
        }
        command
    }

    fn vsctl(&self, args: &[&str]) -> anyhow::Result<String> {
        let mut command = Self::command(&self.dir, "ovs-vsctl");
        command.arg(format!("--db=unix:{}", self.dir.file("db.sock").display()));
        run(command.args(["--timeout=20"]).args(args))
    }

    fn ofctl(&self, args: &[&str]) -> anyhow::Result<String> {
        run(Self::command(&self.dir, "ovs-ofctl").args(["-O", "OpenFlow14"]).args(args))
    }

    /// A file of flows that tag each user's frames with `vid`.
    pub fn flows(&self, users: u32, vid: u16) -> anyhow::Result<String> {
        let file = self.dir.file(format!("flows-{vid}"));
        let mut text = BufWriter::new(File::create(&file)?);
        for n in 1..=users {
            writeln!(
                text,
                "priority=10,in_port=1,dl_src={},actions=push_vlan:0x8100,set_field:{}->vlan_vid,output:2",
                mac(n),
                0x1000 | vid
            )?;
        }
        text.flush()?;
        Ok(file.display().to_string())
    }

    /// Replaces all flows by those of a file, in one bundle: all at once or none.
    pub fn replace(&self, flows: &str) -> anyhow::Result<()> {
        self.ofctl(&["--bundle", "replace-flows", BRIDGE, flows]).map(drop)
    }

    /// The VID that user `n`'s frames get.
    pub fn vid_of(&self, n: u32) -> anyhow::Result<u16> {
        let flow = self.ofctl(&["dump-flows", BRIDGE, &format!("in_port=1,dl_src={}", mac(n))])?;
        let text = flow.split_once("set_field:").and_then(|(_, rest)| rest.split_once("->vlan_vid"));
        let vid = text.and_then(|(vid, _)| vid.parse::<u16>().ok());
        vid.map(|vid| vid & 0xfff).with_context(|| format!("user {n} has no flow: {flow}"))
    }
}

fn tail(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().rev().take(3).collect::<Vec<_>>().join(" / ")
}
