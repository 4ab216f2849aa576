//! Durable promises: one JSON file per migration in `state_dir/migrations`.
//!
//! A record is written to a temporary file, synced, renamed over the old one, and the directory synced: after a crash
//! there is the old record or the new one, never half of one. What is found at the start as a temporary file was never
//! promised to anybody and is removed. A record that cannot be read is damage from outside; the daemon refuses to start
//! on it, because it may be a promise to stay frozen.
//!
//! Records of finished migrations stay as tombstones, so that a repeated call gets the same answer; the oldest go when
//! there are more than [`TOMBSTONES`].

use std::{
    fs,
    io::{self, Write as _},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    freezer::Placement,
    machine::{DestinationState, Recovery, SourceState},
};

/// Finished migrations that are remembered.
pub const TOMBSTONES: usize = 64;

/// Version of the format.
const VERSION: u32 = 1;

/// A step's name, start and duration in microseconds since the call was received.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// E.g. "dump".
    pub name: String,
    /// Since the call was received.
    pub started_us: u64,
    /// How long.
    pub took_us: u64,
}

impl From<Timing> for handover_api::v1::StepTiming {
    fn from(t: Timing) -> Self {
        Self { name: t.name, started_us: t.started_us, took_us: t.took_us }
    }
}

impl From<handover_api::v1::StepTiming> for Timing {
    fn from(t: handover_api::v1::StepTiming) -> Self {
        Self { name: t.name, started_us: t.started_us, took_us: t.took_us }
    }
}

/// One migration on this server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Version of the format.
    pub version: u32,
    /// Its id, given by the controller; also the file's name.
    pub migration: String,
    /// The service's name.
    pub service: String,
    /// The virtual IP v.
    pub address: Ipv4Addr,
    /// Interface that carries v here.
    pub interface: String,
    /// Unix time of the last change, milliseconds.
    pub updated_ms: u64,
    /// What this server is in it.
    pub role: Role,
}

/// This server's part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "kebab-case")]
pub enum Role {
    /// The service comes from here.
    Source(Source),
    /// The service goes here.
    Destination(Destination),
}

/// The source's part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Where it stands.
    pub state: SourceState,
    /// Root of the process tree.
    pub pid: u32,
    /// Its start time (clock ticks since boot): tells it from a later process with the same pid.
    pub start_time: u64,
    /// A freeze was begun: v, the fence and the tasks may have been touched.
    pub touched: bool,
    /// Where the tree is frozen, and where it came from.
    pub placement: Option<Placement>,
    /// The destination's name.
    pub peer: String,
    /// The destination's address on the migration network.
    pub peer_endpoint: String,
    /// The answer to *freeze*, once voted.
    pub vote: Option<Vote>,
}

/// A source's vote, as answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vote {
    /// What took how long.
    pub steps: Vec<Timing>,
    /// Bytes sent.
    pub image_bytes: u64,
    /// TCP connections taken along.
    pub connections: u32,
    /// What could not be taken along.
    pub losses: Vec<String>,
    /// Gateways' markers that had arrived before the fence.
    #[serde(default)]
    pub markers_seen: u32,
}

/// The destination's part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destination {
    /// Where it stands.
    pub state: DestinationState,
    /// Root of the restored tree, which has the pid it had at the source.
    pub pid: u32,
    /// The copy's own cgroup.
    pub cgroup: PathBuf,
    /// v was not here before and was (or is just being) added.
    pub address_added: bool,
    /// The answer to *restore*, once voted.
    pub steps: Vec<Timing>,
}

impl Record {
    /// A new record, to be written.
    pub fn new(migration: &str, service: &str, address: Ipv4Addr, interface: &str, role: Role) -> Self {
        Self {
            version: VERSION,
            migration: migration.into(),
            service: service.into(),
            address,
            interface: interface.into(),
            updated_ms: 0,
            role,
        }
    }

    /// The record of a migration that was given up before it became anything here: a call for it that was held up on the
    /// way finds that it is over.
    pub fn never_begun(migration: &str) -> Self {
        let destination = Destination {
            state: DestinationState::Discarded,
            pid: 0,
            cgroup: PathBuf::new(),
            address_added: false,
            steps: Vec::new(),
        };
        Self::new(migration, "", Ipv4Addr::UNSPECIFIED, "", Role::Destination(destination))
    }

    /// What a restarted daemon does with it.
    pub fn recovery(&self) -> Recovery {
        match &self.role {
            Role::Source(s) => s.state.recovery(),
            Role::Destination(d) => d.state.recovery(),
        }
    }

    /// "source" or "destination".
    pub fn role_name(&self) -> &'static str {
        match self.role {
            Role::Source(_) => "source",
            Role::Destination(_) => "destination",
        }
    }

    /// The state's name on the wire.
    pub fn state_name(&self) -> &'static str {
        match &self.role {
            Role::Source(s) => s.state.name(),
            Role::Destination(d) => d.state.name(),
        }
    }

    /// Root of the process tree.
    pub fn pid(&self) -> u32 {
        match &self.role {
            Role::Source(s) => s.pid,
            Role::Destination(d) => d.pid,
        }
    }
}

/// Whether `id` can name a migration: it becomes a file, a cgroup and an nftables table.
///
/// # Errors
/// Says what is allowed.
pub fn check_id(id: &str) -> Result<()> {
    let ok = (1..=64).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        && !id.starts_with('-');
    if ok {
        Ok(())
    } else {
        Err(Error::other(format!(
            "`{id}` cannot be a migration's id: use 1 to 64 of a-z, A-Z, 0-9, `_` and `-`, not starting with `-`"
        )))
    }
}

/// The directory of records.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// Opens (and makes) `dir` and reads all records.
    ///
    /// # Errors
    /// A file that is no record of this version, naming it.
    pub fn open(dir: &Path) -> Result<(Self, Vec<Record>)> {
        make_private_dir(dir)?;
        let store = Self { dir: dir.into() };
        let mut records = Vec::new();
        for entry in fs::read_dir(dir).map_err(Error::io("listing", dir.display()))? {
            let path = entry.map_err(Error::io("listing", dir.display()))?.path();
            match path.extension().and_then(|e| e.to_str()) {
                Some("json") => records.push(read(&path)?),
                // was being written when the daemon died: nobody was told of it
                Some("new") => fs::remove_file(&path).map_err(Error::io("removing", path.display()))?,
                _ => {}
            }
        }
        records.sort_by_key(|r| r.updated_ms);
        Ok((store, records))
    }

    fn path(&self, migration: &str) -> PathBuf {
        self.dir.join(format!("{migration}.json"))
    }

    /// Makes `record` durable before it returns.
    ///
    /// # Errors
    /// Of the file system; the old record then still stands.
    pub fn write(&self, record: &mut Record) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        record.updated_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let path = self.path(&record.migration);
        let new = path.with_extension("new");
        let bytes = serde_json::to_vec_pretty(record).map_err(|e| Error::other(format!("encoding: {e}")))?;
        let write = || -> io::Result<()> {
            let mut file = fs::File::create(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            fs::File::open(&self.dir)?.sync_all()
        };
        write().map_err(Error::io("writing", path.display()))
    }

    /// Forgets a finished migration.
    ///
    /// # Errors
    /// Of the file system.
    pub fn remove(&self, migration: &str) -> Result<()> {
        let path = self.path(migration);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("removing", path.display())(e)),
            _ => Ok(()),
        }
    }
}

fn read(path: &Path) -> Result<Record> {
    let bytes = fs::read(path).map_err(Error::io("reading", path.display()))?;
    let damaged = |why: String| {
        Error::other(format!(
            "{} is not a record of a migration ({why}): it may be a promise to keep a service frozen; restore the \
             file or, when no migration is under way, move it away",
            path.display()
        ))
    };
    let record: Record = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
    if record.version != VERSION {
        return Err(damaged(format!("version {}, this program knows {VERSION}", record.version)));
    }
    Ok(record)
}

/// Makes `dir` with mode 0700, or gives it that mode.
///
/// # Errors
/// Of the file system.
pub fn make_private_dir(dir: &Path) -> Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(0o700)))
        .map_err(Error::io("making", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str, state: SourceState) -> Record {
        Record::new(
            id,
            "film",
            Ipv4Addr::new(203, 0, 113, 10),
            "service0",
            Role::Source(Source {
                state,
                pid: 10_000,
                start_time: 5,
                touched: true,
                placement: None,
                peer: "backup-server".into(),
                peer_endpoint: "10.254.0.6:7444".into(),
                vote: None,
            }),
        )
    }

    #[test]
    fn what_was_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let (store, none) = Store::open(dir.path()).unwrap();
        assert!(none.is_empty());
        let mut a = record("a", SourceState::Voted);
        store.write(&mut a).unwrap();
        let Role::Source(s) = &mut a.role else { unreachable!() };
        s.state = SourceState::Yielded;
        store.write(&mut a).unwrap();
        let (_, records) = Store::open(dir.path()).unwrap();
        assert_eq!(records, [a]);
    }

    #[test]
    fn a_torn_write_leaves_the_promise_that_stood_before() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        let mut a = record("a", SourceState::Yielded);
        store.write(&mut a).unwrap();
        let whole = fs::read(dir.path().join("a.json")).unwrap();
        for torn in [0, 1, whole.len() / 2, whole.len()] {
            fs::write(dir.path().join("a.new"), &whole[..torn]).unwrap();
            let (_, records) = Store::open(dir.path()).unwrap();
            assert_eq!(records, std::slice::from_ref(&a), "torn at {torn}");
            assert!(!dir.path().join("a.new").exists());
        }
    }

    #[test]
    fn a_damaged_record_is_not_ignored() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{}", "{\"version\":2}"] {
            fs::write(dir.path().join("a.json"), text).unwrap();
            let err = Store::open(dir.path()).unwrap_err().to_string();
            assert!(err.contains("a.json is not a record"), "{err}");
        }
    }

    #[test]
    fn ids_cannot_leave_the_directory() {
        for id in ["", "../a", "a/b", ".a", "-a", "a b", "ä", &"x".repeat(65)] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
        check_id("film-20261122T120000-3fa9").unwrap();
    }
}
