//! What an operator declares: networks, sites, servers, gateways, users, services; TOML, parsed and validated without
//! I/O. Where services and users *are* is state and not in here (see [`crate::world`]).
//!
//! Invariants of an [`Inventory`]: every reference leads somewhere; no two users share what they are known by, or an
//! address; every VID is 1 to 4094 and used once for each kind of tag; every service has a server at its home. All problems of a file are reported at once, each
//! with its line, the thing, the value and the way out.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};
use toml::Spanned;

/// A network of users: one VLAN of the provider.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// VLAN identifier; `None`: untagged.
    pub vid: Option<u16>,
    /// The kind of its tag.
    #[serde(default)]
    pub tpid: Tpid,
    /// Priority of frames into it; `None`: as they came.
    #[serde(default)]
    pub pcp: Option<u8>,
    /// The site router's address r.
    pub router_address: Ipv4Addr,
    /// The site router's link-local IPv6 address; `None`: IPv4 only.
    #[serde(default)]
    pub router_address6: Option<Ipv6Addr>,
    /// The site router's MAC; `None`: learned.
    pub router_mac: Option<String>,
    /// The gateways' interface to it; empty: the one there is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub wan: String,
}

/// The kind of a network's tag (IEEE 802.1Q, table 9-1).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Tpid {
    /// 0x8100.
    #[default]
    #[serde(rename = "802.1q")]
    Customer,
    /// 0x88a8: a user's own tag is kept behind it.
    #[serde(rename = "802.1ad")]
    Service,
}

/// A site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// The network of its users.
    pub network: String,
}

/// A server with a migrator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// Where it stands.
    pub site: String,
    /// The migrator's host:port on the control network.
    pub control: String,
    /// The migrator's host:port on the migration network.
    pub migration: String,
}

/// A gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gateway {
    /// host:port on the control network.
    pub control: String,
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// The gateway it is connected through.
    pub gateway: String,
    /// Its MAC, lower case; empty: it is all that comes in under its tag, or on the interface.
    pub mac: String,
    /// VID of the tag under which the access side delivers it.
    #[serde(default)]
    pub tag: Option<u16>,
    /// The gateway's access interface it is behind; empty: the one there is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub interface: String,
    /// Frames from other addresses than its own are dropped.
    #[serde(default)]
    pub guard: bool,
    /// Its IPv4 addresses.
    pub addresses: Vec<Ipv4Addr>,
    /// Its IPv6 addresses; the link-local one that hosts make of a MAC need not be given.
    #[serde(default)]
    pub addresses6: Vec<Ipv6Addr>,
    /// The site whose network it is on at first.
    pub home: String,
}

/// How the service's process is found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// Root of the process tree.
    Pid(u32),
    /// A file that holds the pid.
    Pidfile(String),
    /// Regular expression over the command line.
    Command(String),
}

/// Whose connections a service has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Users {
    /// All users.
    All,
    /// These.
    Named(BTreeSet<String>),
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// The virtual IP v.
    pub address: Ipv4Addr,
    /// The site where it is at first.
    pub home: String,
    /// Its server at each site.
    pub servers: BTreeMap<String, String>,
    /// Its users.
    pub users: Users,
    /// Its process.
    pub target: Target,
    /// UDP port on v where a gateway's marker tells the source that no frame of a held user is under way; 0: none is sent.
    #[serde(default = "default_marker_port")]
    pub marker_port: u16,
}

/// Not assigned by IANA, and outside the range that Linux takes ephemeral ports from.
fn default_marker_port() -> u16 {
    7446
}

/// Everything declared, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Networks.
    pub networks: BTreeMap<String, Network>,
    /// Sites.
    pub sites: BTreeMap<String, Site>,
    /// Servers.
    pub servers: BTreeMap<String, Server>,
    /// Gateways.
    pub gateways: BTreeMap<String, Gateway>,
    /// Users.
    pub users: BTreeMap<String, User>,
    /// Services.
    pub services: BTreeMap<String, Service>,
}

/// Something wrong in an inventory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1; 0: the file as a whole.
    pub line: usize,
    /// The thing, the value and the way out.
    pub message: String,
}

/// An inventory that cannot be used, with everything that is wrong in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct InventoryError {
    /// At least one.
    pub problems: Vec<Problem>,
}

impl fmt::Display for InventoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, p) in self.problems.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            if p.line > 0 {
                write!(f, "line {}: ", p.line)?;
            }
            f.write_str(&p.message)?;
        }
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default)]
    network: Vec<RawNetwork>,
    #[serde(default)]
    site: Vec<RawSite>,
    #[serde(default)]
    server: Vec<RawServer>,
    #[serde(default)]
    gateway: Vec<RawGateway>,
    #[serde(default)]
    user: Vec<RawUser>,
    #[serde(default)]
    service: Vec<RawService>,
}

type Text = Spanned<String>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNetwork {
    name: Text,
    vid: Option<Spanned<toml::Value>>,
    tpid: Option<Text>,
    pcp: Option<Spanned<i64>>,
    router_address: Text,
    router_address6: Option<Text>,
    router_mac: Option<Text>,
    wan: Option<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSite {
    name: Text,
    network: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawServer {
    name: Text,
    site: Text,
    control: Text,
    migration: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGateway {
    name: Text,
    control: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawUser {
    name: Text,
    gateway: Text,
    mac: Option<Text>,
    tag: Option<Spanned<toml::Value>>,
    interface: Option<Text>,
    #[serde(default)]
    guard: bool,
    addresses: Spanned<Vec<Text>>,
    #[serde(default)]
    addresses6: Vec<Text>,
    home: Text,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawService {
    name: Text,
    address: Text,
    home: Text,
    servers: BTreeMap<String, Text>,
    users: Spanned<toml::Value>,
    target: Spanned<RawTarget>,
    #[serde(default = "default_marker_port")]
    marker_port: u16,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTarget {
    pid: Option<i64>,
    pidfile: Option<String>,
    command: Option<String>,
}

/// Collects problems while going through the file.
struct Checker<'a> {
    text: &'a str,
    problems: Vec<Problem>,
}

impl Checker<'_> {
    fn line(&self, offset: usize) -> usize {
        self.text.as_bytes()[..offset.min(self.text.len())].iter().filter(|b| **b == b'\n').count() + 1
    }

    fn problem<T>(&mut self, at: &Spanned<T>, message: String) {
        let line = self.line(at.span().start);
        self.problems.push(Problem { line, message });
    }

    /// Inserts under a checked name; a second thing of the same name is a problem.
    fn insert<T>(&mut self, kind: &str, name: &Text, value: T, into: &mut BTreeMap<String, T>) {
        let n = name.get_ref();
        if !name_ok(n) {
            self.problem(
                name,
                format!("{kind} `{n}`: not a name; use 1 to 63 of a-z, 0-9 and `-`, not starting or ending with `-`"),
            );
        } else if into.insert(n.clone(), value).is_some() {
            self.problem(name, format!("{kind} {n} is declared twice; rename one or remove it"));
        }
    }

    fn reference<T>(&mut self, whose: &str, key: &str, kind: &str, to: &Text, among: &BTreeMap<String, T>) {
        let n = to.get_ref();
        if !among.contains_key(n) {
            self.problem(
                to,
                format!("{whose}: {key} = \"{n}\": there is no {kind} {n}; {}", known(kind, among.keys())),
            );
        }
    }

    fn address(&mut self, whose: &str, key: &str, at: &Text) -> Ipv4Addr {
        let n = at.get_ref();
        match n.parse::<Ipv4Addr>() {
            Ok(a) if !a.is_unspecified() && !a.is_broadcast() && !a.is_multicast() && !a.is_loopback() => a,
            Ok(_) => {
                self.problem(
                    at,
                    format!("{whose}: {key} = \"{n}\" is no address of a host; give a unicast IPv4 address"),
                );
                Ipv4Addr::UNSPECIFIED
            }
            Err(_) => {
                self.problem(
                    at,
                    format!("{whose}: {key} = \"{n}\" is no IPv4 address; write it like 203.0.113.10, without a prefix length"),
                );
                Ipv4Addr::UNSPECIFIED
            }
        }
    }

    fn mac(&mut self, whose: &str, key: &str, at: &Text) -> String {
        let n = at.get_ref();
        match parse_mac(n) {
            Some(bytes) if bytes[0] & 1 == 1 => {
                self.problem(
                    at,
                    format!("{whose}: {key} = \"{n}\" is a group address; give the MAC of one interface"),
                );
            }
            Some([0, 0, 0, 0, 0, 0]) => {
                self.problem(
                    at,
                    format!("{whose}: {key} = \"{n}\" is all zeros; give the MAC of an interface"),
                );
            }
            Some(_) => {}
            None => self
                .problem(at, format!("{whose}: {key} = \"{n}\" is no MAC; write it like 02:00:00:00:01:01")),
        }
        n.to_ascii_lowercase()
    }

    fn endpoint(&mut self, whose: &str, key: &str, at: &Text, seen: &mut BTreeMap<String, String>) -> String {
        let n = at.get_ref();
        // what a channel can be opened to, and nothing more than that
        let ok = format!("https://{n}").parse::<tonic::transport::Uri>().is_ok_and(|uri| {
            uri.authority().is_some_and(|a| {
                a.as_str() == n
                    && !n.contains('@')
                    && !a.host().is_empty()
                    && a.port_u16().is_some_and(|p| p > 0)
            })
        });
        if !ok {
            self.problem(
                at,
                format!("{whose}: {key} = \"{n}\" is no host:port; write it like 10.255.0.5:7443, with a port from 1 to 65535"),
            );
        } else if let Some(other) = seen.insert(n.clone(), format!("{whose} ({key})")) {
            self.problem(at, format!("{whose}: {key} = \"{n}\" is also that of {other}; give each its own"));
        }
        n.clone()
    }

    fn address6(&mut self, whose: &str, key: &str, at: &Text, link_local: bool) -> Option<Ipv6Addr> {
        let n = at.get_ref();
        let wanted = |a: &Ipv6Addr| {
            let unicast = !a.is_unspecified() && !a.is_multicast() && !a.is_loopback();
            unicast && (!link_local || a.is_unicast_link_local())
        };
        let address = n.parse().ok().filter(wanted);
        if address.is_none() {
            let what = if link_local {
                "link-local IPv6 address; write it like fe80::1"
            } else {
                "unicast IPv6 address; write it like 2001:db8::7"
            };
            self.problem(at, format!("{whose}: {key} = \"{n}\" is no {what}, without a prefix length"));
        }
        address
    }

    /// The tag of a network or, as `key`, of a user's access; `without` says what leaving it out means.
    fn vid(&mut self, whose: &str, key: &str, without: &str, at: &Spanned<toml::Value>) -> Option<u16> {
        let way_out = format!("use 1 to 4094, or leave {key} out for {without}");
        match at.get_ref() {
            toml::Value::Integer(n @ 1..=4094) => u16::try_from(*n).ok(),
            toml::Value::Integer(n @ (0 | 4095)) => {
                self.problem(at, format!("{whose}: {key} = {n} is reserved by 802.1Q; {way_out}"));
                None
            }
            toml::Value::Integer(n) => {
                self.problem(at, format!("{whose}: {key} = {n} is no VLAN identifier; {way_out}"));
                None
            }
            other => {
                self.problem(at, format!("{whose}: {key} = {other} is not a number; {way_out}"));
                None
            }
        }
    }
}

impl Checker<'_> {
    fn tpid(&mut self, whose: &str, at: &Text, tagged: bool) -> Tpid {
        let n = at.get_ref();
        if !tagged {
            self.problem(
                at,
                format!(
                    "{whose}: tpid = \"{n}\", but the network has no tag; give it a vid or leave tpid out"
                ),
            );
        }
        match n.as_str() {
            "802.1q" => Tpid::Customer,
            "802.1ad" => Tpid::Service,
            _ => {
                self.problem(
                    at,
                    format!("{whose}: tpid = \"{n}\" is no kind of tag; use \"802.1q\" or \"802.1ad\""),
                );
                Tpid::Customer
            }
        }
    }

    /// Name of a network interface of a gateway.
    fn interface(&mut self, whose: &str, key: &str, at: Option<&Text>) -> String {
        let Some(at) = at else { return String::new() };
        let n = at.get_ref();
        // Linux: IFNAMSIZ, dev_valid_name
        let good =
            (1..=15).contains(&n.len()) && !n.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
        if !good {
            self.problem(
                at,
                format!(
                    "{whose}: {key} = \"{n}\" is no name of a network interface; give one of the gateway's, as in its \
                     configuration, or leave it out where the gateway has one"
                ),
            );
        }
        n.clone()
    }

    fn pcp(&mut self, whose: &str, at: &Spanned<i64>, tagged: bool) -> Option<u8> {
        let n = *at.get_ref();
        if !tagged {
            self.problem(at, format!("{whose}: pcp = {n}, but the network has no tag to carry it; give it a vid or leave pcp out"));
        }
        let pcp = u8::try_from(n).ok().filter(|n| *n <= 7);
        if pcp.is_none() {
            self.problem(at, format!("{whose}: pcp = {n} is no priority; use 0 to 7, or leave pcp out to keep that of each frame"));
        }
        pcp
    }
}

fn known<'a>(kind: &str, names: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<&str> = names.map(String::as_str).collect();
    if names.is_empty() {
        format!("declare it with [[{kind}]]")
    } else {
        format!("known: {}", names.join(", "))
    }
}

/// Whether `name` can be a name: as in certificates.
pub fn name_ok(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(bytes)
}

/// Parses and validates an inventory.
///
/// # Errors
/// [`InventoryError`] with everything that is wrong.
pub fn parse(text: &str) -> Result<Inventory, InventoryError> {
    let mut c = Checker { text, problems: Vec::new() };
    let raw: Raw = toml::from_str(text).map_err(|e| {
        let line = e.span().map_or(0, |s| c.line(s.start));
        InventoryError { problems: vec![Problem { line, message: e.message().trim_end().to_owned() }] }
    })?;
    let mut inv = Inventory::default();
    let mut endpoints = BTreeMap::new();

    let mut vids: BTreeMap<Option<(Tpid, u16)>, String> = BTreeMap::new();
    for n in &raw.network {
        let whose = format!("network {}", n.name.get_ref());
        let before = c.problems.len();
        let vid = n.vid.as_ref().and_then(|v| c.vid(&whose, "vid", "an untagged network", v));
        let tpid = n.tpid.as_ref().map_or(Tpid::Customer, |t| c.tpid(&whose, t, n.vid.is_some()));
        if c.problems.len() == before
            && let Some(other) = vids.insert(vid.map(|vid| (tpid, vid)), n.name.get_ref().clone())
        {
            let what = vid.map_or("is untagged".to_owned(), |v| format!("has vid = {v}"));
            c.problem(&n.name, format!("{whose} {what}, and so has network {other}; give each its own VID"));
        }
        let network = Network {
            vid,
            tpid,
            pcp: n.pcp.as_ref().and_then(|p| c.pcp(&whose, p, n.vid.is_some())),
            router_address6: n
                .router_address6
                .as_ref()
                .and_then(|a| c.address6(&whose, "router_address6", a, true)),
            router_address: c.address(&whose, "router_address", &n.router_address),
            router_mac: n.router_mac.as_ref().map(|m| c.mac(&whose, "router_mac", m)),
            wan: c.interface(&whose, "wan", n.wan.as_ref()),
        };
        c.insert("network", &n.name, network, &mut inv.networks);
    }
    for s in &raw.site {
        let whose = format!("site {}", s.name.get_ref());
        c.reference(&whose, "network", "network", &s.network, &inv.networks);
        c.insert("site", &s.name, Site { network: s.network.get_ref().clone() }, &mut inv.sites);
    }
    for s in &raw.server {
        let whose = format!("server {}", s.name.get_ref());
        c.reference(&whose, "site", "site", &s.site, &inv.sites);
        let server = Server {
            site: s.site.get_ref().clone(),
            control: c.endpoint(&whose, "control", &s.control, &mut endpoints),
            migration: c.endpoint(&whose, "migration", &s.migration, &mut endpoints),
        };
        c.insert("server", &s.name, server, &mut inv.servers);
    }
    for g in &raw.gateway {
        let whose = format!("gateway {}", g.name.get_ref());
        let gateway = Gateway { control: c.endpoint(&whose, "control", &g.control, &mut endpoints) };
        c.insert("gateway", &g.name, gateway, &mut inv.gateways);
    }
    users(&mut c, &raw.user, &mut inv);
    services(&mut c, &raw.service, &mut inv);

    if c.problems.is_empty() {
        Ok(inv)
    } else {
        c.problems.sort_by_key(|p| p.line);
        Err(InventoryError { problems: c.problems })
    }
}

fn users(c: &mut Checker<'_>, raw: &[RawUser], inv: &mut Inventory) {
    let mut macs: BTreeMap<String, String> = BTreeMap::new();
    // those without a MAC: gateway, interface and tag
    let mut whole: BTreeMap<(String, String, Option<u16>), String> = BTreeMap::new();
    let mut addresses: BTreeMap<Ipv4Addr, String> = BTreeMap::new();
    let mut addresses6: BTreeMap<Ipv6Addr, String> = BTreeMap::new();
    for u in raw {
        let name = u.name.get_ref();
        let whose = format!("user {name}");
        c.reference(&whose, "gateway", "gateway", &u.gateway, &inv.gateways);
        c.reference(&whose, "home", "site", &u.home, &inv.sites);
        let tag = u.tag.as_ref().and_then(|t| c.vid(&whose, "tag", "an untagged user", t));
        let interface = c.interface(&whose, "interface", u.interface.as_ref());
        let mac = u.mac.as_ref().map(|m| c.mac(&whose, "mac", m)).unwrap_or_default();
        if let Some(at) = &u.mac {
            if let Some(other) = macs.insert(mac.clone(), name.clone()) {
                c.problem(
                    at,
                    format!(
                        "{whose}: mac = \"{mac}\" is also that of user {other}; a MAC stands for one user"
                    ),
                );
            }
        } else if let Some(other) =
            whole.insert((u.gateway.get_ref().clone(), interface.clone(), tag), name.clone())
        {
            let tagged = tag.map_or("without tag".to_owned(), |t| format!("under tag {t}"));
            let what = if interface.is_empty() { tagged } else { format!("on {interface} {tagged}") };
            c.problem(
                &u.name,
                format!("{whose} is all that comes in at gateway {} {what}, and so is user {other}; give one of them a mac or another tag", u.gateway.get_ref()),
            );
        }
        if u.addresses.get_ref().is_empty() {
            c.problem(
                &u.addresses,
                format!("{whose}: addresses = [] is empty; give at least one IPv4 address"),
            );
        }
        let mut own = Vec::new();
        for a in u.addresses.get_ref() {
            let before = c.problems.len();
            let address = c.address(&whose, "addresses", a);
            if c.problems.len() > before {
                continue;
            }
            if let Some(other) = addresses.insert(address, name.clone()) {
                c.problem(
                    a,
                    format!("{whose}: address {address} is also that of user {other}; an address stands for one user"),
                );
            }
            if let Some((net, _)) = inv.networks.iter().find(|(_, n)| n.router_address == address) {
                c.problem(
                    a,
                    format!(
                        "{whose}: address {address} is the router's of network {net}; give the user's own"
                    ),
                );
            }
            own.push(address);
        }
        let mut own6 = Vec::new();
        for a in &u.addresses6 {
            let Some(address) = c.address6(&whose, "addresses6", a, false) else { continue };
            if let Some(other) = addresses6.insert(address, name.clone()) {
                c.problem(
                    a,
                    format!("{whose}: address {address} is also that of user {other}; an address stands for one user"),
                );
            }
            own6.push(address);
        }
        let user = User {
            gateway: u.gateway.get_ref().clone(),
            mac,
            tag,
            interface,
            guard: u.guard,
            addresses: own,
            addresses6: own6,
            home: u.home.get_ref().clone(),
        };
        c.insert("user", &u.name, user, &mut inv.users);
    }
}

fn services(c: &mut Checker<'_>, raw: &[RawService], inv: &mut Inventory) {
    let mut addresses: BTreeMap<Ipv4Addr, String> = BTreeMap::new();
    for s in raw {
        let name = s.name.get_ref();
        let whose = format!("service {name}");
        let before = c.problems.len();
        let address = c.address(&whose, "address", &s.address);
        if c.problems.len() == before {
            if let Some(other) = addresses.insert(address, name.clone()) {
                c.problem(
                    &s.address,
                    format!("{whose}: address {address} is also that of service {other}; give each its own"),
                );
            }
            if let Some((user, _)) = inv.users.iter().find(|(_, u)| u.addresses.contains(&address)) {
                c.problem(
                    &s.address,
                    format!(
                        "{whose}: address {address} is also that of user {user}; give the service its own"
                    ),
                );
            }
            if let Some((net, _)) = inv.networks.iter().find(|(_, n)| n.router_address == address) {
                c.problem(&s.address, format!("{whose}: address {address} is the router's of network {net}; give the service its own"));
            }
        }
        c.reference(&whose, "home", "site", &s.home, &inv.sites);
        servers(c, &whose, s, inv);
        let service = Service {
            address,
            home: s.home.get_ref().clone(),
            servers: s.servers.iter().map(|(k, v)| (k.clone(), v.get_ref().clone())).collect(),
            users: service_users(c, &whose, &s.users, inv),
            target: target(c, &whose, &s.target),
            marker_port: s.marker_port,
        };
        c.insert("service", &s.name, service, &mut inv.services);
    }
}

fn servers(c: &mut Checker<'_>, whose: &str, s: &RawService, inv: &Inventory) {
    let home = s.home.get_ref();
    if inv.sites.contains_key(home) && !s.servers.contains_key(home) {
        c.problem(
            &s.home,
            format!("{whose}: home = \"{home}\", but servers names none for site {home}; add {home} = \"SERVER\" to servers"),
        );
    }
    let mut router: Option<(&String, Ipv4Addr)> = None;
    for (site, server) in &s.servers {
        let n = server.get_ref();
        let Some(place) = inv.sites.get(site) else {
            c.problem(
                server,
                format!("{whose}: servers: there is no site {site}; {}", known("site", inv.sites.keys())),
            );
            continue;
        };
        match inv.servers.get(n) {
            None => c.problem(
                server,
                format!("{whose}: servers: {site} = \"{n}\": there is no server {n}; {}", known("server", inv.servers.keys())),
            ),
            Some(at) if at.site != *site => c.problem(
                server,
                format!("{whose}: servers: {site} = \"{n}\", but server {n} stands at site {}; name one at {site}", at.site),
            ),
            Some(_) => {}
        }
        // users keep their router's address through a migration
        let Some(r) = inv.networks.get(&place.network).map(|n| n.router_address) else { continue };
        match router {
            None => router = Some((site, r)),
            Some((other, o)) if o != r => c.problem(
                server,
                format!("{whose}: the router of site {site} is {r}, that of site {other} is {o}; users need the same router_address at every site of a service"),
            ),
            Some(_) => {}
        }
    }
}

fn service_users(c: &mut Checker<'_>, whose: &str, at: &Spanned<toml::Value>, inv: &Inventory) -> Users {
    let way_out = "write users = \"all\" or a list of names";
    match at.get_ref() {
        toml::Value::String(s) if s == "all" => return Users::All,
        toml::Value::Array(list) => {
            let mut names = BTreeSet::new();
            for value in list {
                let toml::Value::String(name) = value else {
                    c.problem(at, format!("{whose}: users: {value} is no name; {way_out}"));
                    continue;
                };
                if !inv.users.contains_key(name) {
                    c.problem(
                        at,
                        format!(
                            "{whose}: users: there is no user {name}; {}",
                            known("user", inv.users.keys())
                        ),
                    );
                }
                if !names.insert(name.clone()) {
                    c.problem(at, format!("{whose}: users: {name} is named twice; remove one"));
                }
            }
            return Users::Named(names);
        }
        other => c.problem(at, format!("{whose}: users = {other}; {way_out}")),
    }
    Users::All
}

fn target(c: &mut Checker<'_>, whose: &str, at: &Spanned<RawTarget>) -> Target {
    let way_out = "give one of command = \"PATTERN\", pid = NUMBER, pidfile = \"/PATH\"";
    match at.get_ref() {
        RawTarget { command: Some(command), pid: None, pidfile: None } if !command.is_empty() => {
            return Target::Command(command.clone());
        }
        RawTarget { pidfile: Some(path), pid: None, command: None } if path.starts_with('/') => {
            return Target::Pidfile(path.clone());
        }
        RawTarget { pid: Some(pid), pidfile: None, command: None } => match u32::try_from(*pid) {
            // pid 1 is the host's own init
            Ok(pid) if (2..=1 << 22).contains(&pid) => return Target::Pid(pid),
            _ => c.problem(at, format!("{whose}: target: pid = {pid} is no service's; {way_out}")),
        },
        RawTarget { command: Some(_), pid: None, pidfile: None } => {
            c.problem(at, format!("{whose}: target: command = \"\" would match every process; {way_out}"));
        }
        RawTarget { pidfile: Some(path), pid: None, command: None } => {
            c.problem(at, format!("{whose}: target: pidfile = \"{path}\" is not absolute; {way_out}"));
        }
        RawTarget { command: None, pid: None, pidfile: None } => {
            c.problem(at, format!("{whose}: target is empty; {way_out}"));
        }
        _ => c.problem(at, format!("{whose}: target names more than one way; {way_out}")),
    }
    Target::Pid(0)
}

impl Inventory {
    /// The users of a service, by name.
    pub fn users_of(&self, service: &Service) -> Vec<String> {
        match &service.users {
            Users::All => self.users.keys().cloned().collect(),
            Users::Named(names) => names.iter().cloned().collect(),
        }
    }

    /// Every thing, as "kind name" -> its fields.
    fn things(&self) -> BTreeMap<(&'static str, &str), serde_json::Value> {
        fn all<'a, T: Serialize>(
            kind: &'static str,
            things: &'a BTreeMap<String, T>,
        ) -> impl Iterator<Item = ((&'static str, &'a str), serde_json::Value)> {
            things.iter().map(move |(n, t)| ((kind, n.as_str()), serde_json::to_value(t).unwrap_or_default()))
        }
        all("network", &self.networks)
            .chain(all("site", &self.sites))
            .chain(all("server", &self.servers))
            .chain(all("gateway", &self.gateways))
            .chain(all("user", &self.users))
            .chain(all("service", &self.services))
            .collect()
    }
}

/// One difference between two inventories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// "network", "site", "server", "gateway", "user" or "service".
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// What about it.
    pub what: What,
}

/// What has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// Its fields, as "vid 2 -> 3".
    Changed(Vec<String>),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, name, what } = self;
        match what {
            What::Added => write!(f, "+ {kind} {name}"),
            What::Removed => write!(f, "- {kind} {name}"),
            What::Changed(fields) => write!(f, "~ {kind} {name}: {}", fields.join(", ")),
        }
    }
}

/// What applying `new` over `old` changes.
pub fn diff(old: &Inventory, new: &Inventory) -> Vec<Change> {
    let (before, after) = (old.things(), new.things());
    let keys: BTreeSet<_> = before.keys().chain(after.keys()).copied().collect();
    let mut changes: Vec<Change> = keys
        .into_iter()
        .filter_map(|(kind, name)| {
            let key = (kind, name);
            let what = match (before.get(&key), after.get(&key)) {
                (None, _) => What::Added,
                (_, None) => What::Removed,
                (Some(a), Some(b)) if a == b => return None,
                (Some(a), Some(b)) => What::Changed(fields(a, b)),
            };
            Some(Change { kind, name: name.to_owned(), what })
        })
        .collect();
    let order = ["network", "site", "server", "gateway", "user", "service"];
    changes.sort_by_key(|c| order.iter().position(|k| *k == c.kind));
    changes
}

fn fields(a: &serde_json::Value, b: &serde_json::Value) -> Vec<String> {
    let show = |v: Option<&serde_json::Value>| match v {
        None | Some(serde_json::Value::Null) => "none".to_owned(),
        Some(serde_json::Value::String(s)) => s.clone(),
        Some(other) => other.to_string(),
    };
    let keys = a.as_object().into_iter().chain(b.as_object()).flat_map(|o| o.keys()).collect::<BTreeSet<_>>();
    keys.into_iter()
        .filter(|k| a.get(k) != b.get(k))
        .map(|k| format!("{k} {} -> {}", show(a.get(k)), show(b.get(k))))
        .collect()
}

#[cfg(test)]
pub(crate) mod tests;
