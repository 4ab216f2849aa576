//! The daemon's configuration file (TOML). Unknown keys are refused, so a mistyped one is never silently ignored.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use handover_api::tls::TlsFiles;

use crate::memory;
use crate::record::check_id;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no TOML, or a key is unknown, missing or of another type.
    #[error("{}", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be.
    #[error("{}: {key} = {value}: {why}", path.display())]
    Value {
        /// Which file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong, and what to write instead.
        why: String,
    },
}

/// What `handover-migrator --config FILE` reads.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This server's name, as in its certificate and the inventory.
    pub name: String,
    /// Control network: where the controller calls.
    pub listen: SocketAddr,
    /// Migration network: where the other migrators call.
    pub migration_listen: SocketAddr,
    /// Interface that carries the services' virtual IPs.
    pub interface: String,
    /// Durable promises; has to survive a reboot.
    pub state_dir: PathBuf,
    /// Process images in transit; should be a tmpfs.
    pub image_dir: PathBuf,
    /// The CRIU program.
    pub criu: PathBuf,
    /// Subtree of the cgroup v2 hierarchy that the daemon may use; `<cgroup2 mount>/handover` when absent.
    pub cgroup: Option<PathBuf>,
    /// How long a source that has voted waits for *yield* before it goes on alone.
    #[serde(default = "vote_lease")]
    pub vote_lease_seconds: u64,
    /// What was sent on the migration network while the service stands still has to be acknowledged within this; else the
    /// migration is given up.
    #[serde(default = "stall_limit")]
    pub stall_limit_ms: u64,
    /// Longest time from *freeze* to the vote; after it the source is thawed.
    #[serde(default = "freeze_limit")]
    pub freeze_limit_seconds: u64,
    /// How memory gets to the destination when a service leaves this server.
    #[serde(default)]
    pub memory: memory::Policy,
    /// Local socket for `handover-migrator status` and `resolve`; for the owner and the group of the daemon.
    pub socket: Option<PathBuf>,
    /// The services that may be frozen here, or taken in.
    #[serde(default, rename = "service")]
    pub services: Vec<Allowed>,
    /// Certificate, key, authority.
    pub tls: TlsFiles,
}

/// A service that this server takes part in migrations of, whatever the controller asks for.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Allowed {
    /// As in the inventory.
    pub name: String,
    /// Its virtual IP v.
    pub address: Ipv4Addr,
    /// How its process is found; when given, the inventory has to say the same.
    pub target: Option<AllowedTarget>,
}

/// See [`Allowed::target`].
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AllowedTarget {
    /// Root of the process tree.
    Pid(u32),
    /// A file that holds the pid.
    Pidfile(String),
    /// Regular expression over the command line.
    Command(String),
}

/// The service stands still for so long when the controller is lost between vote and yield; what lies between the two is
/// the gateways' store, and the controller gives that up by itself after three seconds.
const fn vote_lease() -> u64 {
    3
}

const fn stall_limit() -> u64 {
    500
}

const fn freeze_limit() -> u64 {
    60
}

impl Config {
    /// Reads and checks `path`.
    ///
    /// # Errors
    /// [`ConfigError`] names file, key, value and the way out.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)
            .map_err(|e| ConfigError::Syntax { path: path.into(), source: Box::new(e) })?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let refuse = |key, value: String, why: &str| {
            Err(ConfigError::Value { path: path.into(), key, value, why: why.into() })
        };
        if self.name.is_empty() {
            return refuse("name", "\"\"".into(), "give the server's name as in its certificate");
        }
        // IFNAMSIZ includes the terminating zero
        if self.interface.is_empty() || self.interface.len() > 15 || self.interface.contains(['/', ' ']) {
            return refuse(
                "interface",
                format!("{:?}", self.interface),
                "an interface name has 1 to 15 characters",
            );
        }
        let paths = [
            ("state_dir", Some(&self.state_dir)),
            ("image_dir", Some(&self.image_dir)),
            ("criu", Some(&self.criu)),
            ("cgroup", self.cgroup.as_ref()),
            ("socket", self.socket.as_ref()),
        ];
        for (key, value) in paths {
            if let Some(value) = value
                && !value.is_absolute()
            {
                return refuse(key, value.display().to_string(), "write an absolute path");
            }
        }
        for (key, value) in [
            ("vote_lease_seconds", self.vote_lease_seconds),
            ("freeze_limit_seconds", self.freeze_limit_seconds),
        ] {
            if !(1..=3600).contains(&value) {
                return refuse(key, value.to_string(), "write 1 to 3600");
            }
        }
        if !(100..=60_000).contains(&self.stall_limit_ms) {
            return refuse("stall_limit_ms", self.stall_limit_ms.to_string(), "write 100 to 60000");
        }
        for (i, service) in self.services.iter().enumerate() {
            if check_id(&service.name).is_err() {
                let why = "write 1 to 64 of a-z, A-Z, 0-9, `_` and `-`, not starting with `-`";
                return refuse("service.name", format!("{:?}", service.name), why);
            }
            if self.services[..i].iter().any(|s| s.name == service.name) {
                return refuse("service.name", service.name.clone(), "it is there twice; write one of them");
            }
        }
        Ok(())
    }

    /// See [`Config::vote_lease_seconds`].
    pub fn vote_lease(&self) -> Duration {
        Duration::from_secs(self.vote_lease_seconds)
    }

    /// See [`Config::stall_limit_ms`].
    pub fn stall_limit(&self) -> Duration {
        Duration::from_millis(self.stall_limit_ms)
    }

    /// See [`Config::freeze_limit_seconds`].
    pub fn freeze_limit(&self) -> Duration {
        Duration::from_secs(self.freeze_limit_seconds)
    }

    /// Where the records are.
    pub fn records_dir(&self) -> PathBuf {
        self.state_dir.join("migrations")
    }

    /// Where CRIU's logs of failed migrations are kept.
    pub fn logs_dir(&self) -> PathBuf {
        self.state_dir.join("logs")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        name = "main-server"
        listen = "10.255.0.5:7443"
        migration_listen = "10.254.0.5:7444"
        interface = "service0"
        state_dir = "/var/lib/handover-migrator"
        image_dir = "/run/handover-migrator"
        criu = "/usr/sbin/criu"
        [tls]
        ca = "/ca.pem"
        cert = "/cert.pem"
        key = "/key.pem"
    "#;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("m.toml"), text).map_err(|e| crate::error::chain(&e))
    }

    #[test]
    fn the_example_is_accepted() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.vote_lease_seconds, 3);
        assert_eq!(config.cgroup, None);
        assert!(!config.memory.allow_post_copy, "post-copy is off unless allowed");
    }

    #[test]
    fn bad_values_name_the_key_the_value_and_the_way_out() {
        for (from, to, told) in [
            ("name =", "nam =", "nam"),
            ("interface = \"service0\"", "interface = \"\"", "interface = \"\": an interface name"),
            ("\"/run/handover-migrator\"", "\"run\"", "image_dir = run: write an absolute path"),
            ("10.255.0.5:7443", "10.255.0.5", "listen"),
            ("[tls]", "vote_lease_seconds = 0\n[tls]", "vote_lease_seconds = 0: write 1 to 3600"),
            ("[tls]", "[memory]\nmode = \"fast\"\n[tls]", "unknown variant `fast`"),
            ("[tls]", "[memory]\npost_copy = true\n[tls]", "unknown field `post_copy`"),
            ("[tls]", "stall_limit_ms = 99\n[tls]", "stall_limit_ms = 99: write 100 to 60000"),
            ("[tls]", "socket = \"run/x\"\n[tls]", "socket = run/x: write an absolute path"),
            (
                "[tls]",
                "[[service]]\nname = \"../x\"\naddress = \"10.0.0.1\"\n[tls]",
                "service.name = \"../x\"",
            ),
            ("[tls]", "[[service]]\nname = \"x\"\n[tls]", "address"),
        ] {
            let err = parse(&GOOD.replacen(from, to, 1)).unwrap_err();
            assert!(err.contains(told), "{told:?} not in {err:?}");
        }
    }
}
