//! Would a migration succeed? Everything that can be known beforehand is looked at on both sides, and nothing is touched.
//! Each finding names the thing, its value and the way out.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use handover_api::{
    tls::Role,
    v1::{Finding, ProcessFacts, Server, finding::Severity},
};

use crate::{
    criu::Needs,
    error::{Result, chain},
    fence,
    node::{Node, Service},
    process::{self, Identity, TargetError},
    sockets, transfer,
};

/// Room for everything in the images that is not memory.
const IMAGE_SLACK: u64 = 16 << 20;

/// Flags of instruction sets and registers that a process may use; other flags of /proc/cpuinfo do not concern it.
const INSTRUCTION_SETS: [&str; 16] = [
    "sse", "ssse", "avx", "aes", "bmi", "fma", "f16c", "popcnt", "movbe", "rdrand", "rdseed", "adx",
    "sha_ni", "xsave", "amx", "pclmul",
];

/// What a source found.
#[derive(Default)]
pub struct SourceReport {
    /// What stands against it.
    pub findings: Vec<Finding>,
    /// The service's process, if it was found.
    pub process: Option<(Identity, ProcessFacts, Needs)>,
}

/// The errors among findings, in one line.
pub fn errors(findings: &[Finding]) -> Option<String> {
    let errors: Vec<String> = findings
        .iter()
        .filter(|f| f.severity == i32::from(Severity::Error))
        .map(|f| format!("{} ({}; {})", f.message, f.code, f.remedy))
        .collect();
    (!errors.is_empty()).then(|| errors.join("; "))
}

/// Collects findings of one server.
struct Finder<'a> {
    node: &'a Node,
    found: Vec<Finding>,
}

impl<'a> Finder<'a> {
    fn new(node: &'a Node) -> Self {
        let mut finder = Self { node, found: Vec::new() };
        for (code, message, remedy) in &node.problems {
            finder.error(code, message, remedy);
        }
        finder
    }

    fn error(&mut self, code: &str, message: impl Into<String>, remedy: &str) {
        self.found.push(self.node.finding(Severity::Error, code, message, remedy));
    }

    fn warn(&mut self, code: &str, message: impl Into<String>, remedy: &str) {
        self.found.push(self.node.finding(Severity::Warning, code, message, remedy));
    }

    /// A look that failed is itself a finding.
    fn keep<T>(&mut self, looked: Result<T>) -> Option<T> {
        looked
            .map_err(|e| {
                self.error("cannot-look", chain(&e), "run the daemon as root in the host's own namespaces")
            })
            .ok()
    }

    /// Migrations under way and leftovers of earlier ones that concern v.
    async fn other_migrations(&mut self, migration: &str, address: Ipv4Addr) {
        if let Some(other) = self.node.busy_with(address, migration) {
            self.error(
                "busy",
                format!(
                    "migration {} of {} ({address}) is {} here",
                    other.migration,
                    other.service,
                    other.state_name()
                ),
                "wait for it, or abort it",
            );
        }
        let known: BTreeSet<String> = self.node.all().iter().map(|m| m.id.clone()).collect();
        for id in self.keep(fence::list()).unwrap_or_default() {
            if id != migration && !known.contains(&id) && !id.starts_with("probe-") {
                self.error(
                    "leftover-fence",
                    format!("the fence of migration {id}, which this daemon does not know, stands here"),
                    &format!(
                        "`nft delete table inet handover-{id}` and `nft delete table arp handover-{id}`"
                    ),
                );
            }
        }
        if self.keep(self.node.addresses.has_blackhole(address).await) == Some(true)
            && self.node.busy_with(address, migration).is_none()
        {
            self.error(
                "leftover-route",
                format!("a blackhole route for {address} stands here"),
                &format!("`ip route del blackhole {address}`"),
            );
        }
    }

    /// Room for images of `memory` bytes.
    fn room(&mut self, memory: u64) {
        let dir = &self.node.config.image_dir;
        let Some((room, tmpfs)) = self.keep(transfer::room(dir)) else { return };
        let needed = memory + IMAGE_SLACK;
        if room < needed {
            self.error(
                "image-room",
                format!(
                    "image_dir {} has {} MiB free, the images need up to {} MiB",
                    dir.display(),
                    room >> 20,
                    needed >> 20
                ),
                "make room or name a larger image_dir",
            );
        }
        if !tmpfs {
            self.warn(
                "image-disk",
                format!(
                    "image_dir {} is no tmpfs: the service stands still while images are written",
                    dir.display()
                ),
                "name a directory in a tmpfs, e.g. below /run",
            );
        }
    }
}

/// On the server the service comes from.
pub async fn source(
    node: &Node,
    migration: &str,
    service: &Service,
    destination: Option<&Server>,
    users: &[String],
    allow_other_peers: bool,
) -> SourceReport {
    let mut finder = Finder::new(node);
    finder.other_migrations(migration, service.address).await;
    finder.source_address(service).await;
    if let Some(server) = destination {
        let connected = node.tls.connect(Role::Migrator, &server.name, &server.migration_endpoint).await;
        if let Err(e) = connected {
            finder.error(
                "destination-unreachable",
                chain(&e),
                "start handover-migrator there and check the migration network",
            );
        }
    }
    let process = match process::resolve(service.target.as_ref()) {
        Ok(identity) => finder.source_process(service, identity, users, allow_other_peers),
        Err(e) => {
            let (code, remedy) = match &e {
                TargetError::Missing | TargetError::Regex(..) => ("target", "correct the service's target"),
                TargetError::Gone(_) => ("pid-gone", "start the service, or correct the pid"),
                TargetError::Pidfile { .. } => ("pidfile", "correct the pidfile"),
                TargetError::NoMatch(_) => {
                    ("no-process", "start the service, or correct the command pattern")
                }
                TargetError::Several { .. } => {
                    ("several-processes", "make the command pattern match only one of them")
                }
                TargetError::Proc(_) => {
                    ("cannot-look", "run the daemon as root in the host's own namespaces")
                }
            };
            finder.error(code, format!("service {}: {}", service.name, chain(&e)), remedy);
            None
        }
    };
    SourceReport { findings: finder.found, process }
}

impl Finder<'_> {
    async fn source_address(&mut self, service: &Service) {
        let (v, interface) = (service.address, &self.node.config.interface);
        match self.keep(self.node.addresses.find(v).await) {
            Some(None) => self.error(
                "address-absent",
                format!("{v} of service {} is not on this server", service.name),
                &format!("`ip address add {v}/32 dev {interface}`, or correct where the service is"),
            ),
            Some(Some(p)) if p.interface != *interface || p.prefix != 32 => self.error(
                "address-elsewhere",
                format!(
                    "{v} stands as /{} on {}, to be moved it has to be /32 on {interface}",
                    p.prefix, p.interface
                ),
                &format!("`ip address add {v}/32 dev {interface}` instead"),
            ),
            _ => {}
        }
    }

    fn source_process(
        &mut self,
        service: &Service,
        identity: Identity,
        users: &[String],
        allow_other_peers: bool,
    ) -> Option<(Identity, ProcessFacts, Needs)> {
        let tree = self.keep(process::tree(identity.pid))?;
        let holdings = self.keep(process::holdings(&tree))?;
        let tcp = self.keep(sockets::tcp())?;
        let stat = self.keep(process::stat(identity.pid))?;

        for (what, id) in [("session", stat.session), ("process group", stat.group)] {
            if id != 0 && !tree.contains(&id) {
                self.error(
                    "foreign-session",
                    format!(
                        "pid {} is in {what} {id}, whose leader is not part of the service",
                        identity.pid
                    ),
                    "start the service in a session of its own (setsid, or as a service of the init system)",
                );
                break;
            }
        }
        if holdings.io_uring {
            self.error(
                "io-uring",
                format!("service {} uses io_uring, which CRIU cannot take along", service.name),
                "switch io_uring off in the service",
            );
        }
        if let Some(terminal) = &holdings.terminal {
            self.error(
                "terminal",
                format!("service {} has the terminal {terminal} open", service.name),
                "start the service with stdin, stdout and stderr on files or /dev/null",
            );
        }

        let ours = || tcp.iter().filter(|s| s.inode != 0 && holdings.sockets.contains(&s.inode));
        let ends: BTreeSet<_> = ours().filter(|s| s.connected()).map(|s| s.local).collect();
        let connected: Vec<_> = ours().filter(|s| s.connected()).collect();
        let foreign: BTreeSet<String> = connected
            .iter()
            .filter(|s| !ends.contains(&s.peer)) // both ends move
            .filter(|s| {
                s.local.0 != IpAddr::V4(service.address) || !users.iter().any(|u| *u == s.peer.0.to_string())
            })
            .map(|s| format!("{}:{} -> {}:{}", s.local.0, s.local.1, s.peer.0, s.peer.1))
            .collect();
        if !foreign.is_empty() {
            let shown = foreign.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
            let more =
                if foreign.len() > 5 { format!(" and {} more", foreign.len() - 5) } else { String::new() };
            let message = format!(
                "service {} has connections that are not of users about to be switched and would break: {shown}{more}",
                service.name
            );
            let remedy = "switch these users too, close the connections, or allow other peers";
            if allow_other_peers {
                self.warn("other-peers", message, remedy);
            } else {
                self.error("other-peers", message, remedy);
            }
        }
        self.room(holdings.memory_bytes);
        if let Err(refusal) = self.node.memory_mode(holdings.memory_bytes) {
            self.error(refusal.code, refusal.message, refusal.remedy);
        }

        let mut ports: Vec<u32> = ours().filter(|s| s.listens()).map(|s| u32::from(s.local.1)).collect();
        ports.sort_unstable();
        ports.dedup();
        let facts = ProcessFacts {
            pid: identity.pid,
            tree: holdings.ids,
            tcp_ports: ports,
            memory_bytes: holdings.memory_bytes,
            established: u32::try_from(connected.len()).unwrap_or(u32::MAX),
            files: holdings.files,
            criu_version: self.node.criu.version.clone(),
            cpu_flags: process::cpu_flags(),
        };
        // which mode it is, is decided at *prepare*
        let needs =
            Needs { post_copy: false, unix_sockets: holdings.unix_sockets, file_locks: holdings.file_locks };
        Some((identity, facts, needs))
    }
}

/// On the server the service goes to.
pub async fn destination(
    node: &Node,
    migration: &str,
    service: &Service,
    facts: &ProcessFacts,
) -> Vec<Finding> {
    let mut finder = Finder::new(node);
    let v = service.address;
    finder.other_migrations(migration, v).await;
    if let Some(Some(present)) = finder.keep(node.addresses.find(v).await) {
        finder.error(
            "address-present",
            format!("{v} of service {} is already on this server, on {}", service.name, present.interface),
            &format!(
                "`ip address del {v}/{} dev {}`, or correct where the service is",
                present.prefix, present.interface
            ),
        );
    }
    let taken: Vec<String> =
        facts.tree.iter().filter(|&&id| process::exists(id)).map(u32::to_string).collect();
    if !taken.is_empty() {
        finder.error(
            "pid-taken",
            format!("pid {} of service {} is taken on this server", taken.join(", "), service.name),
            "end that process, or restart the service at the source so that it gets other pids (its ns_last_pid)",
        );
    }
    finder.destination_sockets(service, facts);
    finder.destination_files(facts);
    finder.destination_criu(facts);
    finder.room(facts.memory_bytes);
    finder.found
}

impl Finder<'_> {
    fn destination_sockets(&mut self, service: &Service, facts: &ProcessFacts) {
        let v = IpAddr::V4(service.address);
        let Some(tcp) = self.keep(sockets::tcp()) else { return };
        let leftovers = tcp.iter().filter(|s| s.local.0 == v).count();
        if leftovers > 0 {
            self.error(
                "leftover-sockets",
                format!("{leftovers} sockets on {v} are left on this server"),
                &format!("`ss -K src {v}` destroys them"),
            );
        }
        for socket in tcp.iter().filter(|s| s.listens() && s.local.0 != v) {
            let (address, port) = socket.local;
            if !facts.tcp_ports.contains(&u32::from(port)) {
                continue;
            }
            if address.is_unspecified() {
                self.error(
                    "port-taken",
                    format!(
                        "port {port} of service {} is taken on this server by a listener on {address}",
                        service.name
                    ),
                    "end that process, or let it listen on an address of its own",
                );
            } else {
                self.warn(
                    "port-shared",
                    format!("{address}:{port} is listened on here; a listener on all addresses could not be restored"),
                    "let the service listen on its virtual IP only",
                );
            }
        }
    }

    fn destination_files(&mut self, facts: &ProcessFacts) {
        for file in &facts.files {
            match std::fs::metadata(Path::new(&file.path)) {
                Ok(meta) if meta.len() == file.size => {}
                Ok(meta) => self.error(
                    "file-different",
                    format!("{} has {} bytes here and {} at the source", file.path, meta.len(), file.size),
                    "install the same version of the service and its libraries on both servers",
                ),
                Err(e) => self.error(
                    "file-missing",
                    format!("{}: {e}", file.path),
                    "install the same version of the service and its libraries on both servers",
                ),
            }
        }
    }

    fn destination_criu(&mut self, facts: &ProcessFacts) {
        let here = &self.node.criu.version;
        if !here.is_empty() && *here != facts.criu_version {
            self.warn(
                "criu-version",
                format!("CRIU is {here} here and {} at the source", facts.criu_version),
                "install the same CRIU on both servers",
            );
        }
        let flags: BTreeSet<String> = process::cpu_flags().into_iter().collect();
        let missing = missing_flags(&facts.cpu_flags, &flags);
        if !missing.is_empty() {
            self.error(
                "cpu",
                format!("this server's processor lacks {} of the source's", missing.join(", ")),
                "use a server with the same or a newer processor",
            );
        }
    }
}

fn missing_flags(source: &[String], here: &BTreeSet<String>) -> Vec<String> {
    source
        .iter()
        .filter(|f| !here.contains(*f) && INSTRUCTION_SETS.iter().any(|set| f.starts_with(set)))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_instruction_sets_count() {
        let source = ["avx2", "ibpb", "sse4_2"].map(str::to_owned);
        let here = BTreeSet::from(["sse4_2".to_owned()]);
        assert_eq!(missing_flags(&source, &here), ["avx2"]);
    }
}
