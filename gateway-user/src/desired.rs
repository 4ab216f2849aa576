//! What the controller wants of this gateway: networks and users, validated. Pure.

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    sync::Arc,
};

use gateway_ebpf::frame::VID_MAX;
use handover_api::v1;

use crate::mac::{Mac, MacError};

/// Longest name of a user, network or migration.
pub const NAME_MAX: usize = 128;
/// Most addresses of one user.
pub const ADDRESSES_MAX: usize = 16;

/// A network users can be on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkSpec {
    /// VID; `None`: untagged.
    pub vid: Option<u16>,
    /// The router's address r.
    pub address: Ipv4Addr,
    /// The router's MAC, if it is not to be learned.
    pub router_mac: Option<Mac>,
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserSpec {
    /// MAC on the access interface.
    pub mac: Mac,
    /// IPv4 addresses, at least one, sorted.
    pub addresses: Vec<Ipv4Addr>,
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
    /// Not an IPv4 address of one host.
    #[error("{of}: `{address}` is no IPv4 address of one host; write it as 192.0.2.1")]
    Address {
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
    #[error("user `{0}` has no IPv4 address: give at least one")]
    NoAddress(String),
    /// A user with more addresses than there is room for.
    #[error("user `{0}` has more than {ADDRESSES_MAX} IPv4 addresses")]
    ManyAddresses(String),
    /// An address or a MAC of two owners.
    #[error("{what} {value} belongs to both {first} and {second}: each needs its own")]
    Shared {
        /// "MAC address" or "IPv4 address".
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
        .ok_or_else(|| Invalid::Address { of: of(), address: text.chars().take(64).collect() })
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
    pub fn new(request: &v1::ConfigureRequest, virtual_router_mac: Mac) -> Result<Self, Invalid> {
        let mut macs = Owners::new("MAC address");
        macs.claim(
            virtual_router_mac,
            "the virtual router (virtual_router_mac of the gateway's configuration)",
        )?;

        let mut networks = BTreeMap::new();
        let mut tags: HashMap<Option<u16>, Arc<str>> = HashMap::new();
        for network in &request.networks {
            let key = name("network", &network.name)?;
            let spec = NetworkSpec::new(network)?;
            if let Some(mac) = spec.router_mac {
                // two networks may be routed by one device; a user may not have its MAC
                macs.owners.entry(mac).or_insert_with(|| format!("the router of network `{key}`"));
                if mac == virtual_router_mac {
                    macs.claim(mac, &format!("the router of network `{key}`"))?;
                }
            }
            if let Some(first) = tags.insert(spec.vid, Arc::clone(&key)) {
                let both = match spec.vid {
                    Some(vid) => format!("both have VID {vid}"),
                    None => "are both untagged".into(),
                };
                return Err(Invalid::SameTag { first: first.to_string(), second: key.to_string(), both });
            }
            if networks.insert(Arc::clone(&key), spec).is_some() {
                return Err(Invalid::Twice { what: "network", name: key.to_string() });
            }
        }

        let mut addresses = Owners::new("IPv4 address");
        for (name, network) in &networks {
            // r is the same in every network
            addresses
                .owners
                .entry(network.address)
                .or_insert_with(|| format!("the router of network `{name}`"));
        }

        let mut users = BTreeMap::new();
        for user in &request.users {
            let key = name("user", &user.name)?;
            let owner = format!("user `{key}`");
            let spec = UserSpec::new(user)?;
            macs.claim(spec.mac, &owner)?;
            for address in &spec.addresses {
                addresses.claim(*address, &owner)?;
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
    fn new(network: &v1::Network) -> Result<Self, Invalid> {
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
        let router_mac = network.router_mac.as_deref().map(|text| mac(of, text)).transpose()?;
        Ok(Self { vid, address: host_address(of, &network.router_address)?, router_mac })
    }
}

impl UserSpec {
    fn new(user: &v1::User) -> Result<Self, Invalid> {
        let of = || format!("user `{}`", user.name);
        if user.addresses.is_empty() {
            return Err(Invalid::NoAddress(user.name.clone()));
        }
        if user.addresses.len() > ADDRESSES_MAX {
            return Err(Invalid::ManyAddresses(user.name.clone()));
        }
        let mut addresses =
            user.addresses.iter().map(|text| host_address(of, text)).collect::<Result<Vec<_>, _>>()?;
        addresses.sort_unstable();
        addresses.dedup();
        Ok(Self { mac: mac(of, &user.mac)?, addresses })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIRTUAL: Mac = Mac([2, 0x48, 0x4f, 0, 0, 1]);

    fn request() -> v1::ConfigureRequest {
        let network = |name: &str, vid| v1::Network {
            name: name.into(),
            vid,
            router_address: "10.1.0.1".into(),
            router_mac: None,
        };
        let user = |name: &str, n: u8| v1::User {
            name: name.into(),
            mac: format!("02:00:00:00:01:{n:02x}"),
            addresses: vec![format!("10.1.0.{n}")],
            network: "net1".into(),
        };
        v1::ConfigureRequest {
            revision: 1,
            networks: vec![network("net1", Some(1)), network("net2", Some(4094)), network("flat", None)],
            users: vec![user("taro", 100), user("hanako", 101)],
        }
    }

    #[test]
    fn a_good_request_is_taken() {
        let desired = Desired::new(&request(), VIRTUAL).unwrap();
        assert_eq!(desired.networks["net2"].vid, Some(4094));
        assert_eq!(desired.users["taro"].0.addresses, [Ipv4Addr::new(10, 1, 0, 100)]);
        assert_eq!(&*desired.users["taro"].1, "net1");
    }

    #[test]
    fn a_bad_request_is_refused_naming_thing_and_value() {
        type Spoil = fn(&mut v1::ConfigureRequest);
        let cases: [(Spoil, &[&str]); 19] = [
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
            (|r| r.users[1].addresses.clear(), &["hanako", "no IPv4 address"]),
            (|r| r.users[1].network = "net9".into(), &["hanako", "`net9`", "flat, net1, net2"]),
            (|r| r.users[1].name = "taro".into(), &["`taro`"]),
        ];
        for (spoil, named) in cases {
            let mut request = request();
            spoil(&mut request);
            let error = Desired::new(&request, VIRTUAL).unwrap_err().to_string();
            for part in named {
                assert!(error.contains(part), "{error:?} does not name {part:?}");
            }
        }
    }
}
