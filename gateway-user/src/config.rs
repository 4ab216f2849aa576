//! The configuration file of `handover-gateway`.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use handover_api::tls::TlsFiles;
use serde::Deserialize;

use crate::{
    desired::Wiring,
    hold::Bounds,
    mac::Mac,
    ports::{INTERFACES_MAX, Interfaces, Mode},
};

/// The file, read and checked.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this gateway, as in its certificate and the inventory.
    pub name: String,
    /// Where the controller reaches it, on the control network.
    pub listen: SocketAddr,
    /// Local socket for `handover-gateway status` and the like; for the owner and the group of the daemon.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// Interface to the users, or several.
    pub access: Interfaces,
    /// Interface to the wide-area provider, or several.
    pub wan: Interfaces,
    /// How the programs are attached to all of them.
    #[serde(default)]
    pub mode: Mode,
    /// The MAC the users know the router by, on every network.
    pub virtual_router_mac: Mac,
    /// How many users there may be.
    #[serde(default = "default_max_users")]
    pub max_users: u32,
    /// Directory on a BPF file system, such as /sys/fs/bpf/handover/NAME, where the data path outlives the daemon. Without
    /// it, the programs are detached when the daemon ends.
    #[serde(default)]
    pub pin_dir: Option<PathBuf>,
    /// Where it is kept who is on which network; used with `pin_dir`. By default /var/lib/handover-gateway/NAME.
    #[serde(default)]
    state_dir: Option<PathBuf>,
    /// Bounds on what is held for services while they move.
    #[serde(default)]
    pub hold: HoldLimits,
    /// Certificate files.
    pub tls: TlsFiles,
}

/// The `[hold]` section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HoldLimits {
    /// Memory for held frames, taken from the kernel when the daemon starts; a power of two.
    pub memory_mib: u32,
    /// How much of that one user may fill.
    pub per_user_kib: u32,
}

impl Default for HoldLimits {
    fn default() -> Self {
        let Bounds { memory, per_user } = Bounds::default();
        Self { memory_mib: memory >> 20, per_user_kib: (per_user >> 10) as u32 }
    }
}

impl HoldLimits {
    /// In octets.
    pub const fn bounds(self) -> Bounds {
        Bounds { memory: self.memory_mib << 20, per_user: (self.per_user_kib as u64) << 10 }
    }
}

/// Most memory for held frames, MiB.
const HOLD_MEMORY_MAX: u32 = 1024;

const fn default_max_users() -> u32 {
    65_536
}

/// Where state directories are by default.
const STATE: &str = "/var/lib/handover-gateway";

/// Most users one gateway can be configured for.
pub const MAX_USERS: u32 = 1 << 20;

/// Errors of the configuration file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It could not be read.
    #[error("configuration {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not what it should be.
    #[error("configuration {}", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: toml::de::Error,
    },
    /// A value that cannot be.
    #[error("configuration {}: {key} = {value}: {why}", path.display())]
    Value {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: &'static str,
        /// What it says.
        value: String,
        /// What is wrong, and what to write.
        why: &'static str,
    },
}

impl Config {
    /// Reads and checks `path`.
    ///
    /// # Errors
    /// [`ConfigError`], naming file, key and value.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self =
            toml::from_str(text).map_err(|source| ConfigError::Syntax { path: path.into(), source })?;
        let refuse = |key, value: &dyn std::fmt::Display, why| {
            Err(ConfigError::Value { path: path.into(), key, value: value.to_string(), why })
        };
        if config.name.is_empty() {
            return refuse("name", &"\"\"", "give the name in this gateway's certificate");
        }
        let mut seen: Vec<&String> = Vec::new();
        for (key, interfaces) in [("access", &config.access), ("wan", &config.wan)] {
            if !(1..=INTERFACES_MAX).contains(&interfaces.0.len()) {
                return refuse(key, &format!("{:?}", interfaces.0), "give 1 to 8 interfaces");
            }
            for interface in &interfaces.0 {
                if interface.is_empty() || interface.len() >= libc::IFNAMSIZ {
                    return refuse(key, interface, "an interface's name has 1 to 15 characters");
                }
                if seen.contains(&interface) {
                    return refuse(
                        key,
                        interface,
                        "is given twice: users and provider need an interface each, and each has one place",
                    );
                }
                seen.push(interface);
            }
        }
        if !(1..=MAX_USERS).contains(&config.max_users) {
            return refuse("max_users", &config.max_users, "use 1 to 1048576");
        }
        let HoldLimits { memory_mib, per_user_kib } = config.hold;
        if !memory_mib.is_power_of_two() || memory_mib > HOLD_MEMORY_MAX {
            return refuse("hold.memory_mib", &memory_mib, "use a power of two, 1 to 1024");
        }
        if per_user_kib == 0 || per_user_kib > memory_mib << 10 {
            return refuse(
                "hold.per_user_kib",
                &per_user_kib,
                "use 1 up to all of hold.memory_mib (which are 1024 each)",
            );
        }
        for (key, dir) in
            [("pin_dir", &config.pin_dir), ("state_dir", &config.state_dir), ("socket", &config.socket)]
        {
            if let Some(dir) = dir.as_ref().filter(|dir| !dir.is_absolute()) {
                return refuse(key, &dir.display(), "give an absolute path");
            }
        }
        if let (None, Some(dir)) = (&config.pin_dir, &config.state_dir) {
            return refuse(
                "state_dir",
                &dir.display(),
                "it is only kept for a data path that outlives the daemon: give `pin_dir` as well",
            );
        }
        if config.pin_dir.is_some() && config.state_dir.is_none() && config.name.contains('/') {
            return refuse("name", &config.name, "a name with a slash needs `state_dir`");
        }
        Ok(config)
    }

    /// What of it decides on what the controller can tell this gateway.
    pub fn wiring(&self) -> Wiring {
        Wiring {
            virtual_router_mac: self.virtual_router_mac,
            access: self.access.0.clone(),
            wan: self.wan.0.clone(),
        }
    }

    /// Where it is kept who is on which network.
    pub fn state_dir(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(|| Path::new(STATE).join(&self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        name = "gw"
        listen = "10.255.0.2:7443"
        access = "access0"
        wan = "wan0"
        virtual_router_mac = "02:48:4f:00:00:01"
        [tls]
        ca = "ca.pem"
        cert = "gateway-gw.pem"
        key = "gateway-gw.key"
    "#;

    fn error(text: &str) -> String {
        let error = Config::parse(text, Path::new("gw.toml")).unwrap_err();
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        format!("{error}: {source}")
    }

    #[test]
    fn a_good_file_is_read() {
        let config = Config::parse(GOOD, Path::new("gw.toml")).unwrap();
        assert_eq!((&config.wan.0[..], config.max_users), (&["wan0".to_string()][..], 65_536));
        assert_eq!(config.hold.bounds(), Bounds { memory: 64 << 20, per_user: 32 << 20 });
        assert_eq!(config.mode, Mode::Native, "the other one only when asked for");
        let several =
            GOOD.replace("\"wan0\"", "[\"wan0\", \"wan1\"]").replace("[tls]", "mode = \"generic\"\n[tls]");
        let several = Config::parse(&several, Path::new("gw.toml")).unwrap();
        assert_eq!((several.wiring().wan, several.mode), (vec!["wan0".into(), "wan1".into()], Mode::Generic));
        assert_eq!(config.pin_dir, None, "not pinned unless asked for");
        assert_eq!(config.state_dir(), Path::new("/var/lib/handover-gateway/gw"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, named) in [
            ("name =", "nmae =", "nmae"),
            ("02:48:4f:00:00:01", "03:48:4f:00:00:01", "group address"),
            ("02:48:4f:00:00:01", "x", "no MAC address"),
            ("\"wan0\"", "\"access0\"", "wan = access0"),
            ("\"wan0\"", "\"wan0wan0wan0wan0\"", "1 to 15"),
            ("\"wan0\"", "[\"wan0\", \"wan0\"]", "wan = wan0"),
            ("\"wan0\"", "[]", "1 to 8 interfaces"),
            ("\"wan0\"", "7", "a list of names"),
            ("[tls]", "mode = \"skb\"\n[tls]", "generic"),
            ("10.255.0.2:7443", "10.255.0.2", "listen"),
            ("[tls]", "max_users = 0\n[tls]", "max_users = 0"),
            ("key =", "keys =", "keys"),
            ("[tls]", "pin_dir = \"handover\"\n[tls]", "absolute"),
            ("[tls]", "[hold]\nmemory_mib = 48\n[tls]", "hold.memory_mib = 48"),
            ("[tls]", "[hold]\nper_user_kib = 65537\n[tls]", "hold.per_user_kib = 65537"),
            ("[tls]", "[hold]\nmemory = 1\n[tls]", "memory"),
            ("[tls]", "state_dir = \"/var/lib/x\"\n[tls]", "pin_dir"),
        ] {
            let text = GOOD.replacen(from, to, 1);
            assert!(error(&text).contains(named), "{to}: {}", error(&text));
        }
        assert!(error("").contains("gw.toml"));
    }
}
