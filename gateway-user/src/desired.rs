//! What the controller wants of this gateway: networks and users, validated. Pure.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use gateway_ebpf::{
    frame::{TPID_8021AD, TPID_8021Q, VID_MAX},
    words::vid_index,
};
use handover_api::v1;

use crate::mac::{Mac, MacError};

/// Longest name of a user, network or migration.
pub const NAME_MAX: usize = 128;
/// Most addresses of one user.
pub const ADDRESSES_MAX: usize = 16;

/// What of the gateway's own configuration decides on what it can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wiring {
    /// The MAC the users know the router by.
    pub virtual_router_mac: Mac,
    /// The interfaces to the users.
    pub access: Vec<String>,
    /// The interfaces to the provider.
    pub wan: Vec<String>,
}

impl Wiring {
    /// One interface on each side.
    pub fn single(virtual_router_mac: Mac) -> Self {
        Self { virtual_router_mac, access: vec!["access".into()], wan: vec!["wan".into()] }
    }

    /// The port of an interface of one side: by its place among them.
    fn port(
        names: &[String],
        name: &str,
        side: &'static str,
        first: u16,
        of: impl Fn() -> String,
    ) -> Result<u16, Invalid> {
        let place = match (name, names) {
            ("", [_]) => Some(0),
            ("", _) => None,
            _ => names.iter().position(|n| n == name),
        };
        match place {
            Some(place) => Ok(first + PORT_STEP * place as u16),
            None => Err(Invalid::Interface {
                of: of(),
                side,
                interface: name.chars().take(NAME_MAX).collect(),
                known: names.join(", "),
            }),
        }
    }

    /// The interfaces by port.
    pub fn by_port(&self) -> BTreeMap<u16, String> {
        let side = |first: u16, names: &[String]| {
            (first..).step_by(PORT_STEP.into()).zip(names.to_vec()).collect::<Vec<_>>()
        };
        side(WAN_PORT, &self.wan).into_iter().chain(side(ACCESS_PORT, &self.access)).collect()
    }

    /// The name of the interface of `port`.
    pub fn name(&self, port: u16) -> &str {
        let names = if port % PORT_STEP == WAN_PORT { &self.wan } else { &self.access };
        names.get(usize::from(port / PORT_STEP)).map_or("", String::as_str)
    }
}

/// The first WAN interface in `PORT` and `DEVICE`; the others follow at [`PORT_STEP`], so that one more renumbers none.
pub const WAN_PORT: u16 = 0;
/// The first access interface in `PORT` and `DEVICE`.
pub const ACCESS_PORT: u16 = 1;
/// From one interface of a side to the next.
pub const PORT_STEP: u16 = 2;

/// A network users can be on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkSpec {
    /// VID; `None`: untagged.
    pub vid: Option<u16>,
    /// Its tag is an 802.1ad service tag.
    pub service: bool,
    /// PCP of frames into it; `None`: as they came.
    pub pcp: Option<u8>,
    /// The port of its WAN interface.
    pub port: u16,
    /// The router's address r.
    pub address: Option<Ipv4Addr>,
    /// The router's IPv6 address.
    pub address6: Option<Ipv6Addr>,
    /// The router's MAC, if it is not to be learned.
    pub router_mac: Option<Mac>,
}

impl NetworkSpec {
    /// Its place in `NETWORK_BY_VID`: what tells its frames.
    pub const fn tag(&self) -> u16 {
        vid_index(
            self.service,
            match self.vid {
                Some(vid) => vid,
                None => 0,
            },
        ) as u16
    }

    /// Its tag as people say it.
    pub fn tag_text(&self) -> String {
        match (self.vid, self.service) {
            (None, _) => "untagged".into(),
            (Some(vid), false) => vid.to_string(),
            (Some(vid), true) => format!("{vid} (802.1ad)"),
        }
    }

    /// The router's addresses as people say them.
    pub fn addresses_text(&self) -> String {
        let all = [self.address.map(IpAddr::from), self.address6.map(IpAddr::from)];
        all.iter().flatten().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
    }
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserSpec {
    /// MAC; `None`: whatever comes in on the interface, under the tag.
    pub mac: Option<Mac>,
    /// The port of its access interface.
    pub port: u16,
    /// VID of the access side's tag.
    pub tag: Option<u16>,
    /// The user may send from its own addresses only.
    pub guard: bool,
    /// Addresses, at least one, sorted.
    pub addresses: Vec<IpAddr>,
}

impl UserSpec {
    /// Its addresses, and the link-local one that a host makes of its MAC.
    pub fn all_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let made = self.mac.map(|mac| IpAddr::from(mac.link_local()));
        let made = made.filter(|made| !self.addresses.contains(made));
        self.addresses.iter().copied().chain(made)
    }

    /// Its first IPv4 address.
    pub fn v4(&self) -> Option<Ipv4Addr> {
        self.addresses.iter().find_map(|a| match a {
            IpAddr::V4(a) => Some(*a),
            IpAddr::V6(_) => None,
        })
    }

    /// An IPv6 address it has: declared, or made of its MAC.
    pub fn v6(&self) -> Option<Ipv6Addr> {
        self.all_addresses().find_map(|a| match a {
            IpAddr::V6(a) => Some(a),
            IpAddr::V4(_) => None,
        })
    }
}

/// Everything the controller wants.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    /// Number of this state; increases.
    pub revision: u64,
    /// By name.
    pub networks: BTreeMap<Arc<str>, NetworkSpec>,
    /// By name; with the network for a user who is not known yet.
    pub users: BTreeMap<Arc<str>, (UserSpec, Arc<str>)>,
}

/// A request that cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Empty or too long.
    #[error("{what} name `{name}` is empty or longer than {NAME_MAX} characters")]
    Name {
        /// "user", "network", "migration".
        what: &'static str,
        /// Which, shortened.
        name: String,
    },
    /// A name given twice.
    #[error("{what} `{name}` is declared twice")]
    Twice {
        /// "user" or "network".
        what: &'static str,
        /// Which.
        name: String,
    },
    /// No such VID.
    #[error("network `{network}`: VID {vid} {why}; use 1 to 4094, or none for an untagged network")]
    Vid {
        /// Which.
        network: String,
        /// The value.
        vid: u32,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No such kind of tag, or none where there has to be one.
    #[error("network `{network}`: tpid {tpid:#06x} {why}")]
    Tpid {
        /// Which.
        network: String,
        /// The value.
        tpid: u32,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No such priority.
    #[error("network `{network}`: pcp {pcp} {why}")]
    Pcp {
        /// Which.
        network: String,
        /// The value.
        pcp: u32,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A network without a router.
    #[error("network `{0}` has no router: give `router_address` or `router_address6`")]
    NoRouter(String),
    /// No such interface, or one of several not named.
    #[error("{of}: {side} interface `{interface}` is none of this gateway's; name one of: {known}")]
    Interface {
        /// Whose.
        of: String,
        /// "access" or "wan".
        side: &'static str,
        /// The value; empty: none given.
        interface: String,
        /// Those there are.
        known: String,
    },
    /// No such access tag.
    #[error("user `{user}`: tag {tag} is no VLAN identifier; use 1 to 4094, or none")]
    Tag {
        /// Which.
        user: String,
        /// The value.
        tag: u32,
    },
    /// Nothing to know the user by.
    #[error(
        "user `{0}` has neither `mac` nor `interface` nor `tag`: give at least one to know the user's frames by"
    )]
    Unidentified(String),
    /// Two users that frames could not tell apart.
    #[error("users `{first}` and `{second}` are both {what}: give one a `mac` or another `tag`")]
    SameAccess {
        /// One.
        first: String,
        /// The other.
        second: String,
        /// "all of interface a0", "all of tag 7 on interface a0".
        what: String,
    },
    /// Two networks that frames could not tell apart.
    #[error("networks `{first}` and `{second}` {both}: give each its own VID")]
    SameTag {
        /// One.
        first: String,
        /// The other.
        second: String,
        /// "both have VID 1", "are both untagged".
        both: String,
    },
    /// Not an address of one host.
    #[error("{of}: `{address}` is no {kind} address of one host; write it as {example}")]
    Address {
        /// "IPv4", "IP".
        kind: &'static str,
        /// One that would do.
        example: &'static str,
        /// Whose.
        of: String,
        /// The value.
        address: String,
    },
    /// Not a MAC address of one interface.
    #[error("{of}: {source}")]
    Mac {
        /// Whose.
        of: String,
        /// Why.
        source: MacError,
    },
    /// A user without an address.
    #[error("user `{0}` has no address: give at least one")]
    NoAddress(String),
    /// A user with more addresses than there is room for.
    #[error("user `{0}` has more than {ADDRESSES_MAX} addresses")]
    ManyAddresses(String),
    /// An address or a MAC of two owners.
    #[error("{what} {value} belongs to both {first} and {second}: each needs its own")]
    Shared {
        /// "MAC address" or "address".
        what: &'static str,
        /// The value.
        value: String,
        /// One owner.
        first: String,
        /// The other.
        second: String,
    },
    /// A network nobody declared.
    #[error("user `{user}` is to be on network `{network}`, which is not declared; declared: {declared}")]
    UnknownNetwork {
        /// Which user.
        user: String,
        /// The value.
        network: String,
        /// Those there are.
        declared: String,
    },
}

/// Checks a name.
///
/// # Errors
/// [`Invalid::Name`].
pub fn name(what: &'static str, name: &str) -> Result<Arc<str>, Invalid> {
    if name.is_empty() || name.len() > NAME_MAX {
        return Err(Invalid::Name { what, name: name.chars().take(NAME_MAX).collect() });
    }
    Ok(name.into())
}

fn host_address(of: impl Fn() -> String, text: &str) -> Result<Ipv4Addr, Invalid> {
    text.parse()
        .ok()
        .filter(|a: &Ipv4Addr| {
            !a.is_unspecified() && !a.is_multicast() && !a.is_broadcast() && !a.is_loopback()
        })
        .ok_or_else(|| Invalid::Address {
            of: of(),
            kind: "IPv4",
            example: "192.0.2.1",
            address: text.chars().take(64).collect(),
        })
}

fn host_address6(of: impl Fn() -> String, text: &str) -> Result<Ipv6Addr, Invalid> {
    text.parse()
        .ok()
        .filter(|a: &Ipv6Addr| {
            !a.is_unspecified() && !a.is_multicast() && !a.is_loopback() && a.to_ipv4_mapped().is_none()
        })
        .ok_or_else(|| Invalid::Address {
            of: of(),
            kind: "IPv6",
            example: "fe80::1",
            address: text.chars().take(64).collect(),
        })
}

fn any_address(of: impl Fn() -> String, text: &str) -> Result<IpAddr, Invalid> {
    if text.contains(':') {
        host_address6(of, text).map(Into::into)
    } else {
        host_address(of, text).map(Into::into)
    }
}

fn mac(of: impl Fn() -> String, text: &str) -> Result<Mac, Invalid> {
    text.parse().map_err(|source| Invalid::Mac { of: of(), source })
}

/// Who has a value that only one may have.
struct Owners<K> {
    what: &'static str,
    owners: HashMap<K, String>,
}

impl<K: Eq + std::hash::Hash + ToString> Owners<K> {
    fn new(what: &'static str) -> Self {
        Self { what, owners: HashMap::new() }
    }

    fn claim(&mut self, value: K, owner: &str) -> Result<(), Invalid> {
        let text = value.to_string();
        match self.owners.insert(value, owner.into()) {
            Some(first) => Err(Invalid::Shared { what: self.what, value: text, first, second: owner.into() }),
            None => Ok(()),
        }
    }
}

impl Desired {
    /// Checks what the controller pushed, on its own; whether it fits what the gateway is doing, the table decides.
    ///
    /// # Errors
    /// The first [`Invalid`] thing.
    pub fn new(request: &v1::ConfigureRequest, wiring: &Wiring) -> Result<Self, Invalid> {
        let virtual_router_mac = wiring.virtual_router_mac;
        let mut macs = Owners::new("MAC address");
        macs.claim(
            virtual_router_mac,
            "the virtual router (virtual_router_mac of the gateway's configuration)",
        )?;

        let mut networks = BTreeMap::new();
        let mut tags: HashMap<u16, Arc<str>> = HashMap::new();
        for network in &request.networks {
            let key = name("network", &network.name)?;
            let spec = NetworkSpec::new(network, wiring)?;
            if let Some(mac) = spec.router_mac {
                // two networks may be routed by one device; a user may not have its MAC
                macs.owners.entry(mac).or_insert_with(|| format!("the router of network `{key}`"));
                if mac == virtual_router_mac {
                    macs.claim(mac, &format!("the router of network `{key}`"))?;
                }
            }
            if let Some(first) = tags.insert(spec.tag(), Arc::clone(&key)) {
                let both = match spec.vid {
                    Some(_) => format!("both have VID {}", spec.tag_text()),
                    None => "are both untagged".into(),
                };
                return Err(Invalid::SameTag { first: first.to_string(), second: key.to_string(), both });
            }
            if networks.insert(Arc::clone(&key), spec).is_some() {
                return Err(Invalid::Twice { what: "network", name: key.to_string() });
            }
        }

        let mut addresses = Owners::new("address");
        for (name, network) in &networks {
            // r is the same in every network
            let own = [network.address.map(IpAddr::from), network.address6.map(IpAddr::from)];
            for address in own.into_iter().flatten() {
                addresses.owners.entry(address).or_insert_with(|| format!("the router of network `{name}`"));
            }
        }

        let mut users = BTreeMap::new();
        let mut whole: HashMap<(u16, Option<u16>), Arc<str>> = HashMap::new();
        for user in &request.users {
            let key = name("user", &user.name)?;
            let owner = format!("user `{key}`");
            let spec = UserSpec::new(user, wiring)?;
            match spec.mac {
                Some(mac) => macs.claim(mac, &owner)?,
                None => {
                    if let Some(first) = whole.insert((spec.port, spec.tag), Arc::clone(&key)) {
                        let interface = wiring.name(spec.port);
                        let what = match spec.tag {
                            None => format!("all of interface {interface}"),
                            Some(tag) => format!("all of tag {tag} on interface {interface}"),
                        };
                        let (first, second) = (first.to_string(), key.to_string());
                        return Err(Invalid::SameAccess { first, second, what });
                    }
                }
            }
            for address in spec.all_addresses() {
                addresses.claim(address, &owner)?;
            }
            let Some((network, _)) = networks.get_key_value(user.network.as_str()) else {
                let declared: Vec<_> = networks.keys().map(AsRef::as_ref).collect();
                return Err(Invalid::UnknownNetwork {
                    user: user.name.clone(),
                    network: user.network.chars().take(NAME_MAX).collect(),
                    declared: if declared.is_empty() { "none".into() } else { declared.join(", ") },
                });
            };
            if users.insert(Arc::clone(&key), (spec, Arc::clone(network))).is_some() {
                return Err(Invalid::Twice { what: "user", name: key.to_string() });
            }
        }
        Ok(Self { revision: request.revision, networks, users })
    }
}

impl NetworkSpec {
    fn new(network: &v1::Network, wiring: &Wiring) -> Result<Self, Invalid> {
        let of = || format!("router of network `{}`", network.name);
        let vid = network
            .vid
            .map(|vid| {
                let refuse = |why| Err(Invalid::Vid { network: network.name.clone(), vid, why });
                match u16::try_from(vid) {
                    Ok(0) => refuse("means \"priority only\" (IEEE 802.1Q)"),
                    Ok(vid) if vid <= VID_MAX => Ok(vid),
                    Ok(0xfff) => refuse("is reserved (IEEE 802.1Q)"),
                    _ => refuse("does not fit into a tag"),
                }
            })
            .transpose()?;
        let untagged = "is of a tag, but the network has no vid: give it one, or leave this out";
        let refuse = |tpid, why| Err(Invalid::Tpid { network: network.name.clone(), tpid, why });
        let service = match (network.tpid, vid) {
            (None, _) => false,
            (Some(tpid), None) => return refuse(tpid, untagged),
            (Some(tpid), Some(_)) if tpid == u32::from(TPID_8021Q) => false,
            (Some(tpid), Some(_)) if tpid == u32::from(TPID_8021AD) => true,
            (Some(tpid), Some(_)) => {
                return refuse(tpid, "is unknown; use 0x8100 (802.1Q) or 0x88a8 (802.1ad)");
            }
        };
        let refuse = |pcp, why| Err(Invalid::Pcp { network: network.name.clone(), pcp, why });
        let pcp = match (network.pcp, vid) {
            (None, _) => None,
            (Some(pcp), None) => return refuse(pcp, untagged),
            (Some(pcp @ 0..=7), Some(_)) => Some(pcp as u8),
            (Some(pcp), Some(_)) => return refuse(pcp, "is no priority; use 0 to 7"),
        };
        let given = |text: &'_ str| (!text.is_empty()).then(|| text.to_owned());
        let address = given(&network.router_address).map(|text| host_address(of, &text)).transpose()?;
        let address6 = given(&network.router_address6).map(|text| host_address6(of, &text)).transpose()?;
        if address.is_none() && address6.is_none() {
            return Err(Invalid::NoRouter(network.name.clone()));
        }
        let router_mac = network.router_mac.as_deref().map(|text| mac(of, text)).transpose()?;
        let of = || format!("network `{}`", network.name);
        let port = Wiring::port(&wiring.wan, &network.wan, "wan", WAN_PORT, of)?;
        Ok(Self { vid, service, pcp, port, address, address6, router_mac })
    }
}

impl UserSpec {
    fn new(user: &v1::User, wiring: &Wiring) -> Result<Self, Invalid> {
        let of = || format!("user `{}`", user.name);
        if user.addresses.is_empty() {
            return Err(Invalid::NoAddress(user.name.clone()));
        }
        if user.addresses.len() > ADDRESSES_MAX {
            return Err(Invalid::ManyAddresses(user.name.clone()));
        }
        let mut addresses =
            user.addresses.iter().map(|text| any_address(of, text)).collect::<Result<Vec<_>, _>>()?;
        addresses.sort_unstable();
        addresses.dedup();
        let tag = match user.tag {
            None => None,
            Some(tag @ 1..=0xffe) => Some(tag as u16),
            Some(tag) => return Err(Invalid::Tag { user: user.name.clone(), tag }),
        };
        let mac = (!user.mac.is_empty()).then(|| mac(of, &user.mac)).transpose()?;
        if mac.is_none() && tag.is_none() && user.interface.is_empty() {
            return Err(Invalid::Unidentified(user.name.clone()));
        }
        let port = Wiring::port(&wiring.access, &user.interface, "access", ACCESS_PORT, of)?;
        Ok(Self { mac, port, tag, guard: user.guard, addresses })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIRTUAL: Mac = Mac([2, 0x48, 0x4f, 0, 0, 1]);

    fn wiring() -> Wiring {
        let names = |side: &str| (0..2).map(|n| format!("{side}{n}")).collect();
        Wiring { wan: vec!["wan0".into()], access: names("a"), virtual_router_mac: VIRTUAL }
    }

    fn request() -> v1::ConfigureRequest {
        let network = |name: &str, vid| v1::Network {
            name: name.into(),
            vid,
            router_address: "10.1.0.1".into(),
            ..v1::Network::default()
        };
        let user = |name: &str, n: u8| v1::User {
            name: name.into(),
            mac: format!("02:00:00:00:01:{n:02x}"),
            addresses: vec![format!("10.1.0.{n}")],
            interface: "a1".into(),
            network: "net1".into(),
            ..v1::User::default()
        };
        v1::ConfigureRequest {
            revision: 1,
            networks: vec![network("net1", Some(1)), network("net2", Some(4094)), network("flat", None)],
            users: vec![user("taro", 100), user("hanako", 101)],
        }
    }

    #[test]
    fn a_good_request_is_taken() {
        let desired = Desired::new(&request(), &wiring()).unwrap();
        assert_eq!(desired.networks["net2"].vid, Some(4094));
        assert_eq!(desired.users["taro"].0.addresses, [IpAddr::from([10, 1, 0, 100])]);
        assert_eq!(&*desired.users["taro"].1, "net1");
        assert_eq!(desired.users["taro"].0.port, 3, "the second access interface");

        let mut request = request();
        request.networks[1].tpid = Some(0x88a8);
        request.networks[1].vid = Some(1);
        request.networks[1].pcp = Some(7);
        request.networks[1].router_address6 = "fe80::1".into();
        request.users[0] = v1::User { mac: String::new(), tag: Some(4094), ..request.users[0].clone() };
        request.users[1] = v1::User { mac: String::new(), ..request.users[1].clone() };
        request.users[1].addresses.push("2001:db8::5".into());
        let desired = Desired::new(&request, &wiring()).unwrap();
        let net2 = &desired.networks["net2"];
        assert_eq!((net2.tag(), net2.pcp, net2.tag_text()), (4097, Some(7), "1 (802.1ad)".into()));
        assert_eq!((desired.users["taro"].0.tag, desired.users["hanako"].0.mac), (Some(4094), None));
    }

    #[test]
    fn a_bad_request_is_refused_naming_thing_and_value() {
        type Spoil = fn(&mut v1::ConfigureRequest);
        let cases: [(Spoil, &[&str]); 37] = [
            (|r| r.networks[1].vid = Some(0), &["net2", "VID 0", "1 to 4094"]),
            (|r| r.networks[1].vid = Some(4095), &["net2", "VID 4095", "reserved"]),
            (|r| r.networks[1].vid = Some(4096), &["net2", "VID 4096", "does not fit"]),
            (|r| r.networks[1].vid = Some(70_000), &["net2", "VID 70000"]),
            (|r| r.networks[1].vid = Some(1), &["net1", "net2", "both have VID 1"]),
            (|r| r.networks[1].vid = None, &["net2", "flat", "untagged"]),
            (|r| r.networks[1].name = "net1".into(), &["`net1` is declared twice"]),
            (|r| r.networks[1].name = String::new(), &["network name"]),
            (|r| r.networks[0].router_address = "10.1.0".into(), &["net1", "`10.1.0`"]),
            (|r| r.networks[0].router_mac = Some("ff:ff:ff:ff:ff:ff".into()), &["net1", "group address"]),
            (
                |r| r.networks[0].router_mac = Some(VIRTUAL.to_string()),
                &["02:48:4f:00:00:01", "virtual router"],
            ),
            (|r| r.users[1].mac = "02:00:00:00:01:64".into(), &["02:00:00:00:01:64", "`taro`", "`hanako`"]),
            (|r| r.users[1].mac = VIRTUAL.to_string(), &["hanako", "virtual router"]),
            (|r| r.users[1].mac = "taro".into(), &["hanako", "`taro` is no MAC"]),
            (|r| r.users[1].addresses = vec!["10.1.0.100".into()], &["10.1.0.100", "`taro`", "`hanako`"]),
            (
                |r| r.users[1].addresses = vec!["10.1.0.1".into()],
                &["10.1.0.1", "router of network", "`hanako`"],
            ),
            (|r| r.users[1].addresses.clear(), &["hanako", "no address"]),
            (|r| r.users[1].network = "net9".into(), &["hanako", "`net9`", "flat, net1, net2"]),
            (|r| r.users[1].name = "taro".into(), &["`taro`"]),
            (|r| r.networks[0].tpid = Some(0x9100), &["net1", "0x9100", "0x88a8"]),
            (|r| r.networks[2].tpid = Some(0x88a8), &["flat", "no vid"]),
            (|r| r.networks[0].pcp = Some(8), &["net1", "pcp 8", "0 to 7"]),
            (|r| r.networks[2].pcp = Some(1), &["flat", "no vid"]),
            (|r| r.networks[0].wan = "wan9".into(), &["net1", "`wan9`", "wan0"]),
            (|r| r.networks[0].router_address.clear(), &["net1", "router_address6"]),
            (|r| r.networks[0].router_address6 = "ff02::1".into(), &["net1", "`ff02::1`", "IPv6"]),
            (|r| r.networks[0].router_address6 = "10.1.0.1".into(), &["net1", "`10.1.0.1`", "IPv6"]),
            (|r| r.users[1].addresses[0] = "::".into(), &["hanako", "`::`"]),
            (|r| r.users[1].addresses[0] = "::ffff:10.1.0.9".into(), &["hanako", "::ffff:10.1.0.9"]),
            (
                |r| {
                    r.networks[0].router_address6 = "fe80::1".into();
                    r.users[1].addresses[0] = "fe80::1".into();
                },
                &["fe80::1", "router of network", "`hanako`"],
            ),
            // the one that taro's host makes of its MAC
            (
                |r| r.users[0].addresses[0] = "fe80::ff:fe00:165".into(),
                &["fe80::ff:fe00:165", "`taro`", "`hanako`"],
            ),
            (|r| r.users[1].interface.clear(), &["hanako", "access", "a0, a1"]),
            (|r| r.users[1].interface = "a2".into(), &["hanako", "`a2`", "a0, a1"]),
            (|r| r.users[1].tag = Some(4095), &["hanako", "4095", "1 to 4094"]),
            (|r| r.users[1].tag = Some(0), &["hanako", "tag 0"]),
            (
                |r| {
                    r.users[1].mac.clear();
                    r.users[1].interface.clear();
                },
                &["hanako", "mac", "interface", "tag"],
            ),
            (
                |r| {
                    for user in &mut r.users {
                        user.mac.clear();
                        user.tag = Some(7);
                    }
                },
                &["`taro`", "`hanako`", "tag 7 on interface a1"],
            ),
        ];
        for (spoil, named) in cases {
            let mut request = request();
            spoil(&mut request);
            let error = Desired::new(&request, &wiring()).unwrap_err().to_string();
            for part in named {
                assert!(error.contains(part), "{error:?} does not name {part:?}");
            }
        }
    }
}
