//! Who is where, on disk: one JSON file, written whole and put in place by a rename, each time fsynced (the file, then the
//! directory), so that after a crash it is the old one or the new one.
//!
//! It is written before the maps are changed, with one exception: a switch, which is one store in the maps and must not wait
//! for a disk. The maps outlive the daemon, so the next one finds the store there (`Table::adopt`); the file follows at once.
//! Only a machine that loses power in between comes back with that switch staged and not made, and with empty maps.
//!
//! The file and the pinned maps carry the same `id`. A lock keeps a second daemon, or a `detach`, out while one is running.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use gateway_ebpf::PORTS;

use crate::{
    desired::{PORT_STEP, Wiring},
    table::Snapshot,
};

/// Version of the file.
const FORMAT: u32 = 4;
/// From this version on the file has a checksum.
const CHECKED: u32 = 4;
/// Oldest version that is read: of the first, every field means what it did.
const OLDEST: u32 = 1;

/// Errors of the state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file.
    #[error("{what} {}", path.display())]
    File {
        /// What was done.
        what: &'static str,
        /// To which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody has it.
    #[error(
        "{} is locked: a handover-gateway of this name is running; stop it first, or give another `state_dir`",
        .0.display()
    )]
    Locked(PathBuf),
    /// Not what it should be.
    #[error(
        "state file {} is damaged; put a backup in its place, or remove it and `handover-gateway detach`: the controller \
         then tells anew who is where", path.display()
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// Another version's.
    #[error("state file {} has format {found}, this daemon reads {OLDEST} to {FORMAT}: start the version that wrote it", path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved<T> {
    format: u32,
    /// CRC-32 of the file with eight zeros in this place, for JSON with a flipped bit may still be JSON; none in older formats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crc: Option<String>,
    id: String,
    /// The interfaces that the table's ports were; none of them where there was one on each side.
    #[serde(default = "BTreeMap::new", skip_serializing_if = "BTreeMap::is_empty")]
    interfaces: BTreeMap<u16, String>,
    table: T,
}

/// The format alone, of a file of any version.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
}

/// Where the checksum's digits stand: its key is the second of the file, as written by [`Store::save`].
fn crc_place(text: &[u8]) -> Option<std::ops::Range<usize>> {
    const KEY: &[u8] = b",\"crc\":\"";
    let head = &text[..text.len().min(64)];
    let start = head.windows(KEY.len()).position(|w| w == KEY)? + KEY.len();
    (start + 8 <= text.len()).then_some(start..start + 8)
}

/// CRC-32 of the file with zeros in the checksum's place.
fn checksum(text: &[u8]) -> String {
    let place = crc_place(text).unwrap_or(0..0);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&text[..place.start]);
    crc.update(&b"00000000"[..place.len()]);
    crc.update(&text[place.end..]);
    format!("{:08x}", crc.finalize())
}

/// The state directory, locked.
#[derive(Debug)]
pub struct Store {
    file: PathBuf,
    dir: PathBuf,
    id: u64,
    /// The interfaces by port, where there are several on a side.
    interfaces: BTreeMap<u16, String>,
    _lock: Flock<File>,
}

impl Store {
    /// Locks `dir`, which is made if it is not there, and reads what was saved.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(dir: &Path) -> Result<(Self, Option<Snapshot>), StateError> {
        let failed = |what, path: &Path, source| StateError::File { what, path: path.into(), source };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| failed("making state directory", dir, e))?;
        let lock = dir.join("lock");
        let opened = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock)
            .map_err(|e| failed("opening", &lock, e))?;
        let held = Flock::lock(opened, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
            nix::errno::Errno::EWOULDBLOCK => StateError::Locked(lock.clone()),
            e => failed("locking", &lock, e.into()),
        })?;

        let mut store = Self {
            file: dir.join("table.json"),
            dir: dir.into(),
            id: 0,
            interfaces: BTreeMap::new(),
            _lock: held,
        };
        let text = match fs::read(&store.file) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((store, None)),
            Err(e) => return Err(failed("reading", &store.file, e)),
        };
        let damaged = |source| StateError::Damaged { path: store.file.clone(), source };
        let AnyFormat { format } = serde_json::from_slice(&text).map_err(damaged)?;
        if !(OLDEST..=FORMAT).contains(&format) {
            return Err(StateError::Format { path: store.file, found: format });
        }
        let saved: Saved<Snapshot> = serde_json::from_slice(&text).map_err(damaged)?;
        if saved.crc.is_some() != (format >= CHECKED) || saved.crc.is_some_and(|crc| crc != checksum(&text)) {
            return Err(damaged(serde::de::Error::custom("it is not what was written (checksum)")));
        }
        let id = u64::from_str_radix(&saved.id, 16)
            .map_err(|e| damaged(serde::de::Error::custom(format!("id `{}`: {e}", saved.id))))?;
        store.id = id;
        store.interfaces = saved.interfaces;
        Ok((store, Some(saved.table)))
    }

    /// What the file has in common with its maps; 0: nothing saved yet.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// What was saved, for interfaces that may have other places now: who was on one that has moved is behind its new port; a
    /// place whose interface is another one now keeps its users, as after the change of a card, unless that other one had
    /// users before; and whose interface is gone is behind none. From now on these interfaces are saved with the table.
    pub fn rewire(&mut self, wiring: &Wiring, mut saved: Snapshot) -> Snapshot {
        let now = wiring.by_port();
        let before = std::mem::take(&mut self.interfaces);
        let port_now = |port: u16| {
            let same_side = |other: &u16| other % PORT_STEP == port % PORT_STEP;
            let Some(name) = before.get(&port) else { return port };
            let moved = now.iter().find(|(other, interface)| same_side(other) && *interface == name);
            if let Some((port, _)) = moved {
                return *port;
            }
            if now.get(&port).is_some_and(|other| !before.values().any(|known| known == other)) {
                return port;
            }
            let unused = |other: &u16| same_side(other) && !now.contains_key(other);
            (0..PORTS as u16).rev().find(unused).unwrap_or(port)
        };
        saved.move_ports(port_now);
        if wiring.access.len() > 1 || wiring.wan.len() > 1 {
            self.interfaces = now;
        }
        saved
    }

    /// From now on it goes with other maps.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub fn renew_id(&mut self) -> Result<(), StateError> {
        const PATH: &str = "/proc/sys/kernel/random/uuid";
        let failed = |source| StateError::File { what: "reading", path: PATH.into(), source };
        let uuid = fs::read_to_string(PATH).map_err(failed)?;
        let digits: String = uuid.chars().filter(char::is_ascii_hexdigit).take(16).collect();
        self.id = u64::from_str_radix(&digits, 16)
            .map_err(|e| failed(io::Error::new(io::ErrorKind::InvalidData, e)))?;
        Ok(())
    }

    /// Puts `snapshot` on disk; when this returns it is there.
    ///
    /// # Errors
    /// [`StateError::File`]; the old one is still there then.
    pub fn save(&self, snapshot: &Snapshot) -> Result<(), StateError> {
        let new = self.dir.join("table.json.new");
        let failed = |what, path: &Path| {
            let path = path.to_path_buf();
            move |source| StateError::File { what, path, source }
        };
        let (id, interfaces) = (format!("{:016x}", self.id), self.interfaces.clone());
        let saved = Saved { format: FORMAT, crc: Some("0".repeat(8)), id, interfaces, table: snapshot };
        let mut file = fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&new)
            .map_err(failed("opening", &new))?;
        let mut text = serde_json::to_vec(&saved).map_err(|e| failed("writing", &new)(e.into()))?;
        let crc = checksum(&text);
        if let Some(place) = crc_place(&text) {
            text[place].copy_from_slice(crc.as_bytes());
        }
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(failed("writing", &new))?;
        fs::rename(&new, &self.file).map_err(failed("renaming to", &self.file))?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(failed("syncing", &self.dir))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends there")]

    use super::*;

    #[test]
    fn what_was_saved_comes_back_and_one_at_a_time_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, found) = Store::open(dir.path()).unwrap();
        assert_eq!((found, store.id()), (None, 0));
        store.renew_id().unwrap();
        store.save(&Snapshot::default()).unwrap();
        assert!(matches!(Store::open(dir.path()), Err(StateError::Locked(_))));
        let id = store.id();
        drop(store);
        let (store, found) = Store::open(dir.path()).unwrap();
        assert_eq!((found, store.id()), (Some(Snapshot::default()), id));
    }

    #[test]
    fn who_is_behind_an_interface_stays_there_when_it_gets_another_place() {
        let mac = crate::mac::Mac([2; 6]);
        let wiring = |access: &[&str]| Wiring {
            virtual_router_mac: mac,
            access: access.iter().map(ToString::to_string).collect(),
            wan: vec!["w".into()],
        };
        let user = |port: u16| {
            format!(
                r#""u{port}": {{"slot": {}, "port": {port}, "addresses": ["10.1.0.{port}"], "network": "n"}}"#,
                port
            )
        };
        let users = [1, 3, 5].map(user).join(",");
        let text = format!(
            r#"{{"revision": 1, "generation": 1, "switches": {{}}, "past": [],
                "networks": {{"n": {{"index": 1}}}}, "users": {{{users}}}}}"#
        );
        let saved: Snapshot = serde_json::from_str(&text).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(dir.path()).unwrap();
        let same = store.rewire(&wiring(&["a", "b", "c"]), saved.clone());
        assert_eq!(same, saved);
        store.save(&saved).unwrap();
        drop(store);
        // (interfaces now, where those of a, b and c are then)
        for (now, ports) in [
            (&["c", "a", "b"][..], [3, 5, 1]),
            (&["a", "x", "c"], [1, 3, 5]),
            (&["b", "c"], [15, 1, 3]),
            (&["a", "b", "c", "d"], [1, 3, 5]),
        ] {
            let (mut store, found) = Store::open(dir.path()).unwrap();
            let moved = serde_json::to_value(store.rewire(&wiring(now), found.unwrap())).unwrap();
            // a first access port is not written
            let port = |name: &str| moved["users"][name]["port"].as_u64().unwrap();
            assert_eq!(["u1", "u3", "u5"].map(port), ports, "{now:?}");
        }
        let one = fs::read_to_string(dir.path().join("table.json")).unwrap();
        assert!(one.starts_with("{\"format\":4"), "{one}");
        let (mut store, _) = Store::open(dir.path()).unwrap();
        store.rewire(&wiring(&["a"]), Snapshot::default());
        store.save(&Snapshot::default()).unwrap();
        let one = fs::read_to_string(dir.path().join("table.json")).unwrap();
        assert!(one.starts_with("{\"format\":4") && !one.contains("interfaces"), "{one}");
    }

    #[test]
    fn a_half_written_new_file_changes_nothing_and_a_damaged_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        store.save(&Snapshot::default()).unwrap();
        drop(store);
        fs::write(dir.path().join("table.json.new"), "{\"form").unwrap();
        assert!(Store::open(dir.path()).unwrap().1.is_some());
        let file = dir.path().join("table.json");
        let good = fs::read_to_string(&file).unwrap();
        for bad in [&good[..good.len() / 2], "", "[]", &good.replace("revision", "revisoin")] {
            fs::write(&file, bad).unwrap();
            let error = Store::open(dir.path()).unwrap_err();
            assert!(matches!(error, StateError::Damaged { .. }), "{bad}: {error}");
        }
        fs::write(&file, "{\"format\": 5, \"rest\": []}").unwrap();
        assert!(matches!(Store::open(dir.path()), Err(StateError::Format { found: 5, .. })));
    }

    #[test]
    fn any_octet_that_changes_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(dir.path()).unwrap();
        store.renew_id().unwrap();
        store.save(&Snapshot::default()).unwrap();
        drop(store);
        let file = dir.path().join("table.json");
        let good = fs::read(&file).unwrap();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                fs::write(&file, &bad).unwrap();
                let error = Store::open(dir.path()).expect_err("a flipped bit");
                assert!(
                    matches!(error, StateError::Damaged { .. } | StateError::Format { .. }),
                    "octet {at}, bit {bit}: {error}"
                );
            }
            fs::write(&file, &good[..at]).unwrap();
            let error = Store::open(dir.path()).expect_err("cut off");
            assert!(matches!(error, StateError::Damaged { .. }), "cut at {at}: {error}");
        }
        fs::write(&file, &good).unwrap();
        assert!(Store::open(dir.path()).unwrap().1.is_some());
    }

    #[test]
    fn where_there_is_no_room_the_old_file_stands() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        store.save(&Snapshot::default()).unwrap();
        let good = fs::read(dir.path().join("table.json")).unwrap();
        // what a full disk and one that may not be written look like: /dev/full, and a directory in the file's place
        let new = dir.path().join("table.json.new");
        std::os::unix::fs::symlink("/dev/full", &new).unwrap();
        let error = store.save(&Snapshot::default()).unwrap_err();
        assert!(matches!(error, StateError::File { what: "writing", .. }), "{error}");
        fs::remove_file(&new).unwrap();
        fs::create_dir(&new).unwrap();
        let error = store.save(&Snapshot::default()).unwrap_err();
        assert!(matches!(error, StateError::File { what: "opening", .. }), "{error}");
        assert_eq!(fs::read(dir.path().join("table.json")).unwrap(), good);
        fs::remove_dir(&new).unwrap();
        store.save(&Snapshot::default()).unwrap();
    }
}
