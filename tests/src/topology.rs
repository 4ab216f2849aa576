//! The network of the scenarios, its daemons, services and users.
//!
//! ```text
//! taro --(access)-- gateway --(802.1Q trunk)-- provider --VLAN 1-- main-router ---10.2.0.0/24-- main-server
//!      eth0  access0       wan0         trunk0          --VLAN 2-- backup-router -10.3.0.0/24-- backup-server
//!
//! control 10.255.0.0/24: control .1, gateway .2, main-server .5, backup-server .6 (a bridge on control-switch)
//! migration 10.254.0.0/24: main-server .5 -- backup-server .6
//! ```
//! Both routers have the address r = 10.1.0.1 towards the users, with MACs of their own, and a route to v. The daemons are
//! configured and started as on real machines, the operator's commands run on `control`.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use handover_api::tls::{Role, init_authority, issue};
use nix::sys::signal::Signal;

use crate::{
    Daemon, Ended, Host, Io, Lab, Lines, Output, Process, Program,
    apps::{Report, content},
    capture::Capture,
    ethtool, program,
    provider::{Provider, make_router},
};

/// The services' virtual IP v.
pub const V: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The user's MAC address.
pub const TARO_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
/// The user's address.
pub const TARO: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 100);
/// Where the operator's commands find the controller.
pub const SOCKET: &str = "/run/handover/controller.sock";

/// Pids of services start here: the daemons of the other server are far below.
const SERVICE_PID: i32 = 20_000;
/// A daemon has to serve within this.
const START: Duration = Duration::from_secs(20);
/// A client has to answer within this.
const CLIENT: Duration = Duration::from_secs(60);
/// Length of the file that nginx serves, bytes.
const DOWNLOAD: usize = 512 << 20;

/// Connections that the load's client opens unless told otherwise.
const CROWD: usize = 100;
/// What the migrators of the scenarios need of `fs.pipe-max-size` for post-copy (root here lacks CAP_SYS_RESOURCE).
const PIPE_SIZE: u64 = 4 << 20;
const PIPE_MAX_SIZE: &str = "/proc/sys/fs/pipe-max-size";

/// `fs.pipe-max-size` raised, and put back when dropped. The kernel knows it for the whole machine only.
#[derive(Debug)]
pub struct LargePipes(Option<u64>);

impl LargePipes {
    /// Raises it where it is too small.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn raise() -> anyhow::Result<Self> {
        let now: u64 = fs::read_to_string(PIPE_MAX_SIZE).context(PIPE_MAX_SIZE)?.trim().parse()?;
        if now >= PIPE_SIZE {
            return Ok(Self(None));
        }
        fs::write(PIPE_MAX_SIZE, PIPE_SIZE.to_string()).context(PIPE_MAX_SIZE)?;
        Ok(Self(Some(now)))
    }
}

impl Drop for LargePipes {
    fn drop(&mut self) {
        if let Some(before) = self.0
            && let Err(e) = fs::write(PIPE_MAX_SIZE, before.to_string())
        {
            eprintln!("handover-lab: {PIPE_MAX_SIZE}: {e}");
        }
    }
}

/// A site with a server that the service can be at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Site {
    /// Network 1.
    Main,
    /// Network 2.
    Backup,
}

impl Site {
    /// Its name in the inventory.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Backup => "backup",
        }
    }

    /// The host with its migrator.
    #[must_use]
    pub fn server(self) -> &'static str {
        match self {
            Self::Main => "main-server",
            Self::Backup => "backup-server",
        }
    }

    /// The VLAN of its network.
    #[must_use]
    pub fn vid(self) -> u16 {
        match self {
            Self::Main => 1,
            Self::Backup => 2,
        }
    }

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Main => Self::Backup,
            Self::Backup => Self::Main,
        }
    }

    /// Both.
    pub const ALL: [Self; 2] = [Self::Main, Self::Backup];
}

/// A service that can be moved, with the client that watches over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum App {
    /// The lab's film server and a viewer.
    Film,
    /// redis and a writer.
    Redis,
    /// nginx and a download of half a gigabyte.
    Nginx,
    /// The lab's load: memory and connections as many as wanted.
    Load,
    /// The lab's pulse: 50,000 numbered datagrams a second, and pings that do not wait for their answers.
    Pulse,
}

impl App {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Film, Self::Redis, Self::Nginx, Self::Pulse, Self::Load];

    /// Its name in the inventory.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Film => "film",
            Self::Redis => "redis",
            Self::Nginx => "nginx",
            Self::Load => "load",
            Self::Pulse => "pulse",
        }
    }

    /// Its TCP port.
    #[must_use]
    pub fn port(self) -> u16 {
        match self {
            Self::Film => 8000,
            Self::Redis => 6379,
            Self::Nginx => 80,
            Self::Load => 8100,
            Self::Pulse => 9000,
        }
    }

    /// What its command line matches (regular expression), and that of no other process.
    #[must_use]
    pub fn pattern(self) -> &'static str {
        match self {
            Self::Film => "film-server --listen",
            Self::Redis => "redis-server",
            Self::Nginx => "nginx: master",
            Self::Load => "load-server --listen",
            Self::Pulse => "pulse-server --listen",
        }
    }
}

/// What the unit of daemon `name` in packaging/ leaves it, in setpriv's words; `None`: everything.
fn capabilities(name: &str) -> anyhow::Result<Option<String>> {
    let unit = format!("{}/../packaging/systemd/handover-{name}.service", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&unit).with_context(|| unit.clone())?;
    let set = text.lines().find_map(|l| l.strip_prefix("CapabilityBoundingSet="));
    let word = |c: &str| format!(",+{}", c.trim_start_matches("CAP_").to_lowercase());
    Ok(set.map(|set| std::iter::once("-all".to_owned()).chain(set.split_whitespace().map(word)).collect()))
}

/// What is otherwise than in the plain topology.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Layout {
    /// The gateways' data path outlives their daemons (`pin_dir`).
    pub pinned: bool,
    /// A second gateway, gateway2 (10.255.0.3), with the user jiro; both gateways' trunks meet in trunk-switch.
    pub second_gateway: bool,
}

/// The second user's MAC address.
pub const JIRO_MAC: [u8; 6] = [2, 0, 0, 0, 1, 2];
/// The second user's address.
pub const JIRO: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 101);

/// The network with everything that runs in it.
pub struct Topology {
    /// Where the user is.
    pub taro: Host,
    /// The gateway.
    pub gateway: Host,
    /// The wide-area provider.
    pub provider_host: Host,
    /// Where the operator and the controller are.
    pub control: Host,
    /// The bridge of the control network; its ports are named after the hosts.
    pub control_switch: Host,
    /// The provider's programs.
    pub provider: Provider,
    layout: Layout,
    daemons: BTreeMap<String, Daemon>,
    // last: everything above stands in it
    lab: Lab,
}

impl Topology {
    /// Builds the network; nothing runs in it yet.
    ///
    /// # Errors
    /// If the machine does not let it.
    pub fn new() -> anyhow::Result<Self> {
        Self::laid_out(Layout::default())
    }

    /// As [`Self::new`], with what `layout` says.
    ///
    /// # Errors
    /// If the machine does not let it.
    pub fn laid_out(layout: Layout) -> anyhow::Result<Self> {
        let mut lab = Lab::new()?;
        let mut host = |name: &str| lab.add_host(name);
        let (taro, gateway, provider_host) = (host("taro")?, host("gateway")?, host("provider")?);
        let (control, control_switch) = (host("control")?, host("control-switch")?);
        let sites = [
            (Site::Main, host("main-router")?, host("main-server")?, "10.2.0", 5),
            (Site::Backup, host("backup-router")?, host("backup-server")?, "10.3.0", 6),
        ];

        let second = if layout.second_gateway {
            Some((host("jiro")?, host("gateway2")?, host("trunk-switch")?))
        } else {
            None
        };

        let user = |user: &Host, gateway: &Host, mac: [u8; 6], address: Ipv4Addr| -> anyhow::Result<()> {
            lab.link((user, "eth0"), (gateway, "access0"))?;
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            user.ip(&format!(
                "link set eth0 address {mac}\naddr add {address}/24 dev eth0\nroute add default via 10.1.0.1"
            ))?;
            ethtool::as_on_the_wire(user, "eth0")?;
            ethtool::as_on_the_wire(gateway, "access0")?;
            ethtool::as_on_the_wire(gateway, "wan0")
        };
        if let Some((jiro, gateway2, trunk_switch)) = &second {
            // it looks at no tags: what is tagged passes as it is
            trunk_switch.ip("link add br0 type bridge\nlink set br0 up")?;
            for (host, interface, port) in [
                (&gateway, "wan0", "gateway"),
                (gateway2, "wan0", "gateway2"),
                (&provider_host, "trunk0", "provider"),
            ] {
                lab.link((host, interface), (trunk_switch, port))?;
                trunk_switch.ip(&format!("link set {port} master br0"))?;
                ethtool::as_on_the_wire(trunk_switch, port)?;
            }
            user(jiro, gateway2, JIRO_MAC, JIRO)?;
        } else {
            lab.link((&gateway, "wan0"), (&provider_host, "trunk0"))?;
        }
        user(&taro, &gateway, TARO_MAC, TARO)?;

        control_switch.ip("link add br0 type bridge\nlink set br0 up")?;
        let join = |host: &Host, last: u8| -> anyhow::Result<()> {
            let port = host.name();
            lab.link((host, "ctl0"), (&control_switch, port))?;
            control_switch.ip(&format!("link set {port} master br0"))?;
            host.ip(&format!("addr add 10.255.0.{last}/24 dev ctl0"))
        };
        join(&control, 1)?;
        join(&gateway, 2)?;
        if let Some((_, gateway2, _)) = &second {
            join(gateway2, 3)?;
        }
        for (site, router, server, net, last) in &sites {
            join(server, *last)?;
            let port = format!("vlan{}", site.vid());
            lab.link((&provider_host, &port), (router, "user0"))?;
            lab.link((router, "service0"), (server, "service0"))?;
            ethtool::as_on_the_wire(router, "user0")?;
            ethtool::in_order(router, server, "service0")?;
            router.ip(&format!(
                "addr add 10.1.0.1/24 dev user0\naddr add {net}.1/24 dev service0\nroute add {V}/32 via {net}.2"
            ))?;
            make_router(router)?;
            server.ip(&format!("addr add {net}.2/24 dev service0\nroute add default via {net}.1"))?;
        }
        let [(_, _, main, ..), (_, _, backup, ..)] = &sites;
        lab.link((main, "mig0"), (backup, "mig0"))?;
        for (_, _, server, _, last) in &sites {
            server.ip(&format!("addr add 10.254.0.{last}/24 dev mig0"))?;
        }
        let provider = Provider::start(&provider_host, "trunk0", &[(1, "vlan1"), (2, "vlan2")])?;
        let topology = Self {
            taro,
            gateway,
            provider_host,
            control,
            control_switch,
            provider,
            layout,
            daemons: BTreeMap::new(),
            lab,
        };
        topology.configure()?;
        Ok(topology)
    }

    /// Certificates and configuration files of the daemons, as an operator would put them on each machine.
    fn configure(&self) -> anyhow::Result<()> {
        let authority = self.lab.work().join("authority");
        fs::create_dir(&authority).with_context(|| authority.display().to_string())?;
        init_authority(&authority)?;
        let criu = workspace().join(".tools/bin/criu");
        ensure!(criu.is_file(), "no CRIU at {}: run `cargo xtask setup`", criu.display());
        let services: String = App::ALL
            .iter()
            .map(|app| {
                format!(
                    "[[service]]\nname = \"{}\"\naddress = \"{V}\"\ntarget = {{ command = \"{}\" }}\n",
                    app.name(),
                    app.pattern()
                )
            })
            .collect();
        let migrator = |site: Site, last: u8| -> anyhow::Result<_> {
            let (host, name) = (self.server(site)?, site.server());
            let config = format!(
                "listen = \"10.255.0.{last}:7443\"\nmigration_listen = \"10.254.0.{last}:7444\"\n\
                 interface = \"service0\"\nstate_dir = \"/var/lib/handover-migrator\"\n\
                 image_dir = \"/run/handover-migrator\"\ncriu = \"{}\"\ncgroup = \"{}\"\n\
                 socket = \"/run/handover/migrator.sock\"\n{services}",
                criu.display(),
                host.cgroup().join("handover").display()
            );
            Ok((host, Role::Migrator, name, "migrator", config))
        };
        let gateway = |name: &str, last: u8| {
            let pinned = if self.layout.pinned {
                format!("pin_dir = \"/sys/fs/bpf/handover/{name}\"\n")
            } else {
                String::new()
            };
            format!(
                "listen = \"10.255.0.{last}:7443\"\naccess = \"access0\"\nwan = \"wan0\"\n\
                 virtual_router_mac = \"02:48:4f:00:00:0{}\"\n{pinned}",
                last - 1
            )
        };
        let controller = format!(
            "listen = \"10.255.0.1:7440\"\nsocket = \"{SOCKET}\"\nstate_dir = \"/var/lib/handover-controller\"\n"
        );
        let mut daemons = vec![
            (&self.gateway, Role::Gateway, "gw", "gateway", gateway("gw", 2)),
            (&self.control, Role::Controller, "controller", "controller", controller),
            migrator(Site::Main, 5)?,
            migrator(Site::Backup, 6)?,
        ];
        if self.layout.second_gateway {
            daemons.push((self.lab.host("gateway2")?, Role::Gateway, "gw2", "gateway", gateway("gw2", 3)));
        }
        for (host, role, name, daemon, config) in daemons {
            let files = issue(&authority, &authority, role, name)?;
            let mut tls = String::from("[tls]\n");
            for (key, file) in [("ca", &files.ca), ("cert", &files.cert), ("key", &files.key)] {
                let there = format!("/run/lab/tls/{key}.pem");
                host.write(&there, fs::read(file).with_context(|| file.display().to_string())?)?;
                tls += &format!("{key} = \"{there}\"\n");
            }
            host.write(format!("/run/lab/{daemon}.toml"), format!("name = \"{name}\"\n{config}\n{tls}"))?;
        }
        Ok(())
    }

    /// Adds to the configuration of both migrators; before they are started.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn configure_migrators(&self, more: &str) -> anyhow::Result<()> {
        for site in Site::ALL {
            let server = self.server(site)?;
            let config = server.read("/run/lab/migrator.toml")?;
            server.write("/run/lab/migrator.toml", format!("{config}\n{more}\n"))?;
        }
        Ok(())
    }

    /// The server of a site.
    ///
    /// # Errors
    /// Never, in a whole topology.
    pub fn server(&self, site: Site) -> anyhow::Result<&Host> {
        self.lab.host(site.server())
    }

    /// The lab.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Starts all daemons and waits until they serve.
    ///
    /// # Errors
    /// With the log of the one that does not.
    pub fn start_daemons(&mut self) -> anyhow::Result<()> {
        let second = self.layout.second_gateway.then_some("gateway2");
        let hosts = ["gateway", "main-server", "backup-server", "control"].into_iter().chain(second);
        for host in hosts.clone() {
            self.start_daemon(host)?;
        }
        for host in hosts {
            self.daemon(host)?.wait_for("ready", START)?;
        }
        Ok(())
    }

    /// Starts the daemon of a host (again); does not wait.
    ///
    /// # Errors
    /// If it is not built.
    pub fn start_daemon(&mut self, host: &str) -> anyhow::Result<()> {
        let name = match host {
            "gateway" | "gateway2" => "gateway",
            "control" => "controller",
            "main-server" | "backup-server" => "migrator",
            other => bail!("host {other} has no daemon"),
        };
        let levels = std::env::var("RUST_LOG").unwrap_or_else(|_| "info".into());
        let built = program(&format!("handover-{name}"))?;
        // with the capabilities of its systemd unit and no others: so all of the lab shows that they are enough
        let daemon = match capabilities(name)? {
            Some(set) => Program::new("/usr/bin/setpriv")
                .args([format!("--bounding-set={set}").as_str(), &built.to_string_lossy()]),
            None => Program::new(built),
        };
        let daemon = daemon
            .args(["--config", &format!("/run/lab/{name}.toml")])
            .env("RUST_LOG", &levels)
            .env("NO_COLOR", "1");
        let started = self.lab.host(host)?.start_daemon(daemon)?;
        self.daemons.insert(host.into(), started);
        Ok(())
    }

    /// The daemon of a host.
    ///
    /// # Errors
    /// If it was not started.
    pub fn daemon(&self, host: &str) -> anyhow::Result<&Daemon> {
        self.daemons.get(host).with_context(|| format!("no daemon was started on {host}"))
    }

    /// What all daemons logged.
    #[must_use]
    pub fn logs(&self) -> String {
        self.daemons.iter().map(|(host, d)| format!("--- {host}\n{}\n", d.log.text())).collect()
    }

    /// The inventory, with one service.
    #[must_use]
    pub fn inventory(app: App) -> String {
        format!(
            r#"
[[network]]
name = "net1"
vid = 1
router_address = "10.1.0.1"

[[network]]
name = "net2"
vid = 2
router_address = "10.1.0.1"

[[site]]
name = "main"
network = "net1"

[[site]]
name = "backup"
network = "net2"

[[server]]
name = "main-server"
site = "main"
control = "10.255.0.5:7443"
migration = "10.254.0.5:7444"

[[server]]
name = "backup-server"
site = "backup"
control = "10.255.0.6:7443"
migration = "10.254.0.6:7444"

[[gateway]]
name = "gw"
control = "10.255.0.2:7443"

[[user]]
name = "taro"
gateway = "gw"
mac = "02:00:00:00:01:01"
addresses = ["{TARO}"]
home = "main"

[[service]]
name = "{}"
address = "{V}"
home = "main"
servers = {{ main = "main-server", backup = "backup-server" }}
users = "all"
target = {{ command = "{}" }}
"#,
            app.name(),
            app.pattern()
        )
    }

    /// Runs `handover` on `control`, whatever its exit code.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn handover<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> anyhow::Result<Output> {
        self.control.output(self.handover_program()?.args(args))
    }

    /// `handover` as the operator's shell on `control` would start it.
    ///
    /// # Errors
    /// If it is not built.
    pub fn handover_program(&self) -> anyhow::Result<Program> {
        Ok(Program::new(program("handover")?).args(["--socket", SOCKET]).env("NO_COLOR", "1"))
    }

    /// `handover apply`.
    ///
    /// # Errors
    /// With what it said, unless it was accepted.
    pub fn apply(&self, inventory: &str) -> anyhow::Result<()> {
        self.control.write("/run/lab/inventory.toml", inventory)?;
        let output = self.handover(["apply", "-f", "/run/lab/inventory.toml"])?;
        ensure!(
            output.ended.success(),
            "handover apply: {}: {}{}",
            output.ended,
            output.stdout,
            output.stderr
        );
        Ok(())
    }

    /// Gives main-server v and starts a service on it; returns when it listens.
    ///
    /// # Errors
    /// If it does not listen in time.
    pub fn start_service(&self, app: App) -> anyhow::Result<Service> {
        self.start_service_of(app, 8)
    }

    /// As [`Self::start_service`]; the film server holds `memory_mib` MiB, so that copying it takes its time.
    ///
    /// # Errors
    /// If it does not listen in time.
    pub fn start_service_of(&self, app: App, memory_mib: u16) -> anyhow::Result<Service> {
        let server = self.server(Site::Main)?;
        server.ip(&format!("addr add {V}/32 dev service0"))?;
        let mut file = None;
        let program = match app {
            App::Film => Program::new(program("film-server")?).args([
                "--listen",
                &format!("{V}:{}", app.port()),
                "--memory-mib",
                &memory_mib.to_string(),
            ]),
            App::Pulse => {
                Program::new(program("pulse-server")?).args(["--listen", &format!("{V}:{}", app.port())])
            }
            App::Redis => Program::new("redis-server").args([
                "--bind",
                &V.to_string(),
                "--port",
                &app.port().to_string(),
                "--protected-mode",
                "no",
                "--save",
                "",
                "--appendonly",
                "no",
            ]),
            App::Load => Program::new(program("load-server")?).args([
                "--listen",
                &format!("{V}:{}", app.port()),
                "--memory-mib",
                &memory_mib.to_string(),
            ]),
            App::Nginx => {
                let path = self.lab.work().join("film.bin");
                let sha256 = content::write(&path, DOWNLOAD)?;
                file = Some(Download { bytes: DOWNLOAD, sha256 });
                server.write("/run/lab/nginx.conf", nginx_conf(self.lab.work(), app.port()))?;
                Program::new("nginx").args(["-e", "/dev/null", "-c", "/run/lab/nginx.conf"])
            }
        };
        let process = server.spawn(&program.min_pid(SERVICE_PID))?;
        let deadline = Instant::now() + START;
        while !listens(server, app.port())? {
            if let Some(ended) = process.ended() {
                bail!("{} on main-server ended: {ended}", app.name());
            }
            ensure!(Instant::now() < deadline, "{} does not listen on {V}:{}", app.name(), app.port());
            std::thread::sleep(Duration::from_millis(5)); // between two looks; the kernel tells of no listen
        }
        let running = server.processes()?.into_iter().find(|(pid, _)| *pid == process.pid());
        let (_, line) = running.with_context(|| format!("{} is gone", app.name()))?;
        Ok(Service { app, process, line, file })
    }

    /// Starts the client of a service on taro; returns when it is being served.
    ///
    /// # Errors
    /// If it is not served.
    pub fn start_client(&self, service: &Service) -> anyhow::Result<Client> {
        self.start_client_on(&self.taro, service, CROWD)
    }

    /// As [`Self::start_client`]; that of the load opens `connections`.
    ///
    /// # Errors
    /// If it is not served.
    pub fn start_client_of(&self, service: &Service, connections: usize) -> anyhow::Result<Client> {
        self.start_client_on(&self.taro, service, connections)
    }

    /// As [`Self::start_client_of`], on another user's host.
    ///
    /// # Errors
    /// If it is not served.
    pub fn start_client_on(
        &self,
        user: &Host,
        service: &Service,
        connections: usize,
    ) -> anyhow::Result<Client> {
        let server = format!("{V}:{}", service.app.port());
        let program = match (service.app, &service.file) {
            (App::Film, _) => Program::new(program("film-viewer")?).args([server]),
            (App::Pulse, _) => Program::new(program("pulse-client")?).args([server]),
            (App::Redis, _) => Program::new(program("redis-writer")?).args([server]),
            (App::Load, _) => Program::new(program("load-client")?).args([
                server.as_str(),
                "--connections",
                &connections.to_string(),
            ]),
            (App::Nginx, Some(file)) => Program::new(program("downloader")?).args([
                server.as_str(),
                "/film.bin",
                "--bytes",
                &file.bytes.to_string(),
                "--sha256",
                &file.sha256,
            ]),
            (App::Nginx, None) => bail!("nginx has no file to serve"),
        };
        let mut process = user.spawn(&program.stdio(Io::Pipe, Io::Pipe, Io::Null))?;
        let lines = process.stdout.take().map(Lines::collect).unwrap_or_default();
        let mut client = Client { app: service.app, process, lines, read: 0, last: None };
        let first = client.more(1)?;
        ensure!(first.unharmed(), "{first:?}");
        Ok(client)
    }

    /// Starts to take the user's frames to v on the trunk.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn capture(&self) -> anyhow::Result<Capture> {
        Capture::start(&self.provider_host, "trunk0", TARO_MAC, V)
    }

    /// The sites where the service's process really is: whose host has it, stopped and frozen ones included.
    ///
    /// # Errors
    /// If a host's processes cannot be seen.
    pub fn sites_of(&self, service: &Service) -> anyhow::Result<Vec<Site>> {
        let mut found = Vec::new();
        for site in Site::ALL {
            let is = |(pid, line): &(i32, String)| *pid == service.process.pid() && *line == service.line;
            if self.server(site)?.processes()?.iter().any(is) {
                found.push(site);
            }
        }
        Ok(found)
    }

    /// The sites whose server has v.
    ///
    /// # Errors
    /// If a host's addresses cannot be seen.
    pub fn sites_of_v(&self) -> anyhow::Result<Vec<Site>> {
        let mut found = Vec::new();
        for site in Site::ALL {
            let addresses = self.server(site)?.run(["ip", "-o", "-4", "addr"])?;
            if addresses.contains(&format!(" {V}/32 ")) {
                found.push(site);
            }
        }
        Ok(found)
    }
}

/// The checkout, for what is neither built nor installed.
#[must_use]
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// A server without logs or other files, sending slowly enough that a download outlasts two migrations.
fn nginx_conf(root: &Path, port: u16) -> String {
    format!(
        "user root;\nworker_processes 1;\ndaemon off;\npid /run/lab/nginx.pid;\nerror_log /dev/null;\n\
         events {{}}\n\
         http {{\n  access_log off;\n  sendfile on;\n  limit_rate 32m;\n\
         server {{\n    listen {V}:{port};\n    root {};\n  }}\n}}\n",
        root.display()
    )
}

/// Whether somebody in the host listens on a TCP port.
fn listens(host: &Host, port: u16) -> anyhow::Result<bool> {
    // `thread-self`: `/proc/net` would be that of the lab's main thread
    let sockets = host.enter(|| fs::read_to_string("/proc/thread-self/net/tcp"))??;
    let local = format!(":{port:04X}");
    Ok(sockets.lines().any(|l| {
        let mut fields = l.split_whitespace().skip(1);
        let here = fields.next().is_some_and(|a| a.ends_with(&local));
        here && fields.nth(1) == Some("0A")
    }))
}

/// A service that was started.
#[derive(Debug)]
pub struct Service {
    /// Which.
    pub app: App,
    /// Its process as it was started.
    pub process: Process,
    /// Its command line when it listened.
    line: String,
    file: Option<Download>,
}

#[derive(Debug)]
struct Download {
    bytes: usize,
    sha256: String,
}

/// The client on taro that watches over a service.
#[derive(Debug)]
pub struct Client {
    app: App,
    process: Process,
    lines: Lines,
    read: usize,
    last: Option<Report>,
}

impl Client {
    /// What it has seen so far; its longest gap starts anew.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn report(&mut self) -> anyhow::Result<Report> {
        self.ask("report")
    }

    /// What it has seen once `bytes` more bytes have come (or something went wrong).
    ///
    /// # Errors
    /// If they do not come in time.
    pub fn more(&mut self, bytes: u64) -> anyhow::Result<Report> {
        self.ask(&format!("more {bytes}"))
    }

    fn ask(&mut self, question: &str) -> anyhow::Result<Report> {
        // a client whose work ended has said its last report unasked
        if let Some(stdin) = self.process.stdin.as_mut()
            && writeln!(stdin, "{question}").is_err()
        {
            self.process.stdin = None;
        }
        match self.next_report() {
            Err(e) if self.process.stdin.is_none() => self.last.clone().ok_or(e),
            report => report,
        }
    }

    fn next_report(&mut self) -> anyhow::Result<Report> {
        let client = || format!("the {} client on taro", self.app.name());
        let line = self.lines.wait_for(self.read, CLIENT, |_| true).with_context(client)?;
        self.read += 1;
        let report: Report = serde_json::from_str(&line).with_context(client)?;
        self.last = Some(report.clone());
        Ok(report)
    }

    /// Has it end its work and check everything; its last report.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn finish(mut self) -> anyhow::Result<Report> {
        let client = format!("the {} client on taro", self.app.name());
        match self.app {
            App::Film | App::Load => drop(self.process.stdin.take()),
            App::Redis | App::Pulse if self.process.ended().is_none() => {
                self.process.signal(Signal::SIGUSR1)?
            }
            App::Redis | App::Pulse | App::Nginx => {} // the download ends by itself
        }
        let ended: Ended = self.process.wait_timeout(CLIENT).with_context(|| client.clone())?;
        while self.next_report().is_ok() {}
        self.last.with_context(|| format!("{client} ended without a report: {ended}"))
    }
}
