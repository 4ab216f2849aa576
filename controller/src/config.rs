//! The daemon's configuration file (TOML). Unknown keys are refused: a misspelt one must not be a silent default.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use handover_api::tls::TlsFiles;
use serde::Deserialize;

use crate::{inventory::name_ok, queue::Limits};

/// Where the CLI looks for the controller unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/handover/controller.sock";

/// `handover-controller --config FILE`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The name in its certificate.
    pub name: String,
    /// For the CLI from elsewhere, over mutual TLS; none: local only.
    pub listen: Option<SocketAddr>,
    /// For the local CLI.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Where the journal is.
    pub state_dir: PathBuf,
    /// How many migrations at a time, how many requests may wait, how large the journal may be.
    #[serde(default)]
    pub limits: Limits,
    /// Certificates.
    pub tls: TlsFiles,
}

fn default_socket() -> PathBuf {
    DEFAULT_SOCKET.into()
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("configuration {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no TOML, or has a key or a value that is none of a controller's.
    #[error("configuration {}", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be used.
    #[error("configuration {}: {what}", path.display())]
    Value {
        /// Which.
        path: PathBuf,
        /// The key, the value and the way out.
        what: String,
    },
}

impl Config {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// [`ConfigError`] names the file, the line or key, and the value.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        let config: Self = toml::from_str(&text)
            .map_err(|e| ConfigError::Parse { path: path.into(), source: Box::new(e) })?;
        let value = |what: String| Err(ConfigError::Value { path: path.into(), what });
        if !name_ok(&config.name) {
            return value(format!(
                "name = \"{}\" is not a name; use 1 to 63 of a-z, 0-9 and `-`, as in the certificate",
                config.name
            ));
        }
        let paths = [
            ("socket", &config.socket),
            ("state_dir", &config.state_dir),
            ("tls.ca", &config.tls.ca),
            ("tls.cert", &config.tls.cert),
            ("tls.key", &config.tls.key),
        ];
        for (key, p) in paths {
            if !p.is_absolute() {
                return value(format!("{key} = \"{}\" is not absolute; give the whole path", p.display()));
            }
        }
        let limits = &config.limits;
        let wide = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        for (key, n, range) in [
            ("at_once", wide(limits.at_once), 1..=64),
            ("waiting", wide(limits.waiting), 0..=10_000),
            ("journal_mib", limits.journal_mib, 1..=1 << 20),
        ] {
            if !range.contains(&n) {
                return value(format!(
                    "limits.{key} = {n} is not within {} to {}",
                    range.start(),
                    range.end()
                ));
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "name = \"c\"\nsocket = \"/s\"\nstate_dir = \"/d\"\n[tls]\nca = \"/a\"\ncert = \"/c\"\nkey = \"/k\"\n";

    fn load(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("controller.toml");
        fs::write(&path, text).unwrap();
        Config::load(&path).map_err(|e| {
            let source = std::error::Error::source(&e).map_or(String::new(), |s| format!(": {s}"));
            format!("{e}{source}")
        })
    }

    #[test]
    fn what_can_be_left_out() {
        let config = load(&GOOD.replace("socket = \"/s\"\n", "")).unwrap();
        assert_eq!(config.socket, PathBuf::from(DEFAULT_SOCKET));
        assert_eq!(config.listen, None);
    }

    #[test]
    fn bad_values_are_named() {
        for (from, to, want) in [
            ("name = \"c\"", "name = \"C\"", "name = \"C\" is not a name"),
            ("socket = \"/s\"", "sokcet = \"/s\"", "unknown field `sokcet`"),
            ("socket = \"/s\"", "listen = \"here\"", "invalid socket address"),
            ("state_dir = \"/d\"", "state_dir = \"d\"", "state_dir = \"d\" is not absolute"),
            ("key = \"/k\"", "", "missing field `key`"),
            ("[tls]", "[limits]\nat_once = 0\n[tls]", "limits.at_once = 0 is not within 1 to 64"),
            ("[tls]", "[limits]\nat_most = 3\n[tls]", "unknown field `at_most`"),
        ] {
            let err = load(&GOOD.replace(from, to)).unwrap_err();
            assert!(err.contains("controller.toml") && err.contains(want), "{to}: {err}");
        }
        let err = Config::load(Path::new("/nowhere/c.toml")).unwrap_err();
        assert_eq!(err.to_string(), "configuration /nowhere/c.toml");
    }
}
