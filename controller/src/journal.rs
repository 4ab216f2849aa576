//! The durable memory of the controller: an append-only table of [`Record`]s in SQLite (write-ahead log, every commit
//! synced). State is never stored, only derived again ([`crate::world::World::apply`]).
//!
//! Invariants:
//! - records are numbered from 1 without a gap and never changed or deleted; each has a checksum of its own, for SQLite
//!   has none for what lies in its file and JSON with a flipped bit may still be JSON;
//! - [`Journal::append`] returns once the records are on stable storage: one transaction, one sync, in order;
//! - one controller at a time has the file open.
//!
//! Failures: a file that is damaged, of another program or of another version is refused as it is, never repaired or
//! replaced. After a failed append nobody knows what is durable, so the controller has to stop ([`Journal::append`]).

use std::{
    fs,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rusqlite::{Connection, OpenFlags, params};
use tokio::sync::oneshot;

use crate::world::Record;

/// File name in the state directory.
pub const FILE: &str = "journal.db";

/// Without an append for so long, the write-ahead log is folded into the database; SQLite's own habit is to do that in
/// the middle of some commit, which might be the one a frozen service waits for.
const IDLE: Duration = Duration::from_secs(2);

/// "HOVR": tells the file from other programs' databases.
const APPLICATION_ID: i64 = 0x484f_5652;
/// Of the table and of the records in it.
const SCHEMA_VERSION: i64 = 2;

/// Errors of the journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The state directory cannot be used.
    #[error("state directory {}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file cannot be opened, created or read.
    #[error("journal {}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// Another process has it.
    #[error("journal {} is in use by another process; is a handover-controller running already?", path.display())]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// Not a journal of a controller.
    #[error("{} is not a journal of handover-controller ({what}); name another state_dir", path.display())]
    Foreign {
        /// Which.
        path: PathBuf,
        /// What it is.
        what: String,
    },
    /// Of another version.
    #[error("journal {} has schema version {found}, this handover-controller knows {SCHEMA_VERSION}; use the version that wrote it", path.display())]
    Version {
        /// Which.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// Damaged.
    #[error("journal {} is damaged: {what}; restore it from a backup, it is not used as it is", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How.
        what: String,
    },
    /// A record could not be made durable.
    #[error("appending to the journal")]
    Append(#[source] rusqlite::Error),
    /// A record could not be written as JSON.
    #[error("encoding a journal record")]
    Encode(#[source] serde_json::Error),
    /// The journal has failed before, or is closed.
    #[error("the journal is closed")]
    Closed,
}

struct Job {
    records: Vec<Record>,
    done: oneshot::Sender<Result<(), JournalError>>,
}

/// The open journal. Its thread ends with the last clone.
#[derive(Debug, Clone)]
pub struct Journal {
    path: PathBuf,
    jobs: mpsc::Sender<Job>,
}

impl Journal {
    /// Opens the journal in `dir`, which is created if there is none; returns the records in it, oldest first.
    ///
    /// # Errors
    /// [`JournalError`]; the file is left as it was.
    pub fn open(dir: &Path) -> Result<(Self, Vec<Record>), JournalError> {
        fs::create_dir_all(dir).map_err(|source| JournalError::Directory { path: dir.into(), source })?;
        let path = dir.join(FILE);
        match fs::metadata(&path) {
            Ok(m) if m.len() == 0 => {
                return Err(JournalError::Damaged { path, what: "it is empty".into() });
            }
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => create(dir, &path)?,
            Err(source) => return Err(JournalError::Directory { path, source }),
        }
        let db = connect(&path)?;
        let records = read(&path, &db)?;
        let mut seq = i64::try_from(records.len()).unwrap_or(i64::MAX);
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::Builder::new()
            .name("journal".into())
            .spawn(move || {
                let mut db = db;
                let mut idle = true;
                loop {
                    let job = if idle {
                        queue.recv().map_err(|_| RecvTimeoutError::Disconnected)
                    } else {
                        queue.recv_timeout(IDLE)
                    };
                    match job {
                        Ok(job) => {
                            idle = false;
                            let result = write(&mut db, &mut seq, &job.records);
                            let failed = result.is_err();
                            // the caller may have gone; what was written stays written
                            let _ = job.done.send(result);
                            if failed {
                                break; // nothing is written after a gap
                            }
                        }
                        Err(RecvTimeoutError::Timeout) => {
                            idle = true;
                            // what is in the log is durable there too: a failure is found by the next append
                            let _ = db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
                        }
                        Err(RecvTimeoutError::Disconnected) => break,
                    }
                }
            })
            .map_err(|source| JournalError::Directory { path: dir.into(), source })?;
        Ok((Self { path, jobs }, records))
    }

    /// Its size on disk, the write-ahead log included.
    pub fn octets(&self) -> u64 {
        let log = self.path.with_file_name(format!("{FILE}-wal"));
        [&self.path, &log].into_iter().filter_map(|p| fs::metadata(p).ok()).map(|m| m.len()).sum()
    }

    /// Appends records, in order, all or none; returns once they are on stable storage.
    ///
    /// # Errors
    /// [`JournalError`]: it is not known whether they are durable, and nothing can be appended any more.
    pub async fn append(&self, records: Vec<Record>) -> Result<(), JournalError> {
        let (done, result) = oneshot::channel();
        self.jobs.send(Job { records, done }).map_err(|_| JournalError::Closed)?;
        result.await.map_err(|_| JournalError::Closed)?
    }
}

/// Makes an empty journal under another name first, so that a crash never leaves half of one.
fn create(dir: &Path, path: &Path) -> Result<(), JournalError> {
    let new = dir.join(format!("{FILE}.new"));
    let io = |source| JournalError::Directory { path: dir.into(), source };
    let sql = |source| JournalError::Open { path: new.clone(), source };
    if new.exists() {
        fs::remove_file(&new).map_err(io)?;
    }
    let db = Connection::open(&new).map_err(sql)?;
    db.execute_batch(&format!(
        "PRAGMA application_id = {APPLICATION_ID};
         PRAGMA user_version = {SCHEMA_VERSION};
         PRAGMA synchronous = FULL;
         CREATE TABLE record (
             seq INTEGER PRIMARY KEY,
             at_ms INTEGER NOT NULL,
             body TEXT NOT NULL,
             crc INTEGER NOT NULL
         ) STRICT;
         CREATE TRIGGER record_never_changes BEFORE UPDATE ON record
             BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;
         CREATE TRIGGER record_never_goes BEFORE DELETE ON record
             BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END;"
    ))
    .map_err(sql)?;
    db.close().map_err(|(_, e)| sql(e))?;
    fs::rename(&new, path).map_err(io)?;
    fs::File::open(dir).and_then(|d| d.sync_all()).map_err(io)
}

fn connect(path: &Path) -> Result<Connection, JournalError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).map_err(|e| refused(path, e))?;
    let pragma = |name: &str| db.query_row(&format!("PRAGMA {name}"), [], |r| r.get::<_, i64>(0));
    // who has it has it for long: no use in waiting
    db.busy_timeout(Duration::ZERO).map_err(|e| refused(path, e))?;
    // exclusive: also keeps a second controller out for as long as this one lives
    db.execute_batch("PRAGMA locking_mode = EXCLUSIVE").map_err(|e| refused(path, e))?;
    let id = pragma("application_id").map_err(|e| refused(path, e))?;
    if id != APPLICATION_ID {
        let what = format!("application id {id:#x}, not {APPLICATION_ID:#x}");
        return Err(JournalError::Foreign { path: path.into(), what });
    }
    let found = pragma("user_version").map_err(|e| refused(path, e))?;
    if found != SCHEMA_VERSION {
        return Err(JournalError::Version { path: path.into(), found });
    }
    let mode: String =
        db.query_row("PRAGMA journal_mode = WAL", [], |r| r.get(0)).map_err(|e| refused(path, e))?;
    if !mode.eq_ignore_ascii_case("wal") {
        return Err(JournalError::Damaged {
            path: path.into(),
            what: format!("its journal mode is {mode}, not WAL"),
        });
    }
    db.execute_batch("PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0")
        .map_err(|e| refused(path, e))?;
    Ok(db)
}

fn read(path: &Path, db: &Connection) -> Result<Vec<Record>, JournalError> {
    let damaged = |what: String| JournalError::Damaged { path: path.into(), what };
    let verdict: String =
        db.query_row("PRAGMA quick_check(1)", [], |r| r.get(0)).map_err(|e| refused(path, e))?;
    if verdict != "ok" {
        return Err(damaged(verdict.replace('\n', " ")));
    }
    let mut query =
        db.prepare("SELECT seq, at_ms, body, crc FROM record ORDER BY seq").map_err(|e| refused(path, e))?;
    let mut rows = query.query([]).map_err(|e| refused(path, e))?;
    let mut records = Vec::new();
    while let Some(row) = rows.next().map_err(|e| refused(path, e))? {
        let seq: i64 = row.get(0).map_err(|e| refused(path, e))?;
        let at_ms: i64 = row.get(1).map_err(|e| refused(path, e))?;
        let body: String = row.get(2).map_err(|e| damaged(format!("record {seq} cannot be read: {e}")))?;
        let crc: i64 = row.get(3).map_err(|e| refused(path, e))?;
        let expected = i64::try_from(records.len()).unwrap_or(i64::MAX).saturating_add(1);
        if seq != expected {
            return Err(damaged(format!("record {seq} follows record {}", expected - 1)));
        }
        if crc != checksum(seq, at_ms, &body) {
            return Err(damaged(format!("record {seq} is not what was written (checksum)")));
        }
        records.push(
            serde_json::from_str(&body).map_err(|e| damaged(format!("record {seq} cannot be read: {e}")))?,
        );
    }
    Ok(records)
}

fn checksum(seq: i64, at_ms: i64, body: &str) -> i64 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&seq.to_be_bytes());
    crc.update(&at_ms.to_be_bytes());
    crc.update(body.as_bytes());
    crc.finalize().into()
}

fn write(db: &mut Connection, seq: &mut i64, records: &[Record]) -> Result<(), JournalError> {
    let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
    let at_ms = i64::try_from(at_ms).unwrap_or(i64::MAX);
    let transaction = db.transaction().map_err(JournalError::Append)?;
    let mut next = *seq;
    {
        let mut insert = transaction
            .prepare_cached("INSERT INTO record (seq, at_ms, body, crc) VALUES (?1, ?2, ?3, ?4)")
            .map_err(JournalError::Append)?;
        for record in records {
            next += 1;
            let body = serde_json::to_string(record).map_err(JournalError::Encode)?;
            let crc = checksum(next, at_ms, &body);
            insert.execute(params![next, at_ms, body, crc]).map_err(JournalError::Append)?;
        }
    }
    transaction.commit().map_err(JournalError::Append)?;
    *seq = next;
    Ok(())
}

/// What SQLite's refusal to read a journal means.
fn refused(path: &Path, source: rusqlite::Error) -> JournalError {
    use rusqlite::ErrorCode as C;
    match source.sqlite_error_code() {
        Some(C::DatabaseBusy | C::DatabaseLocked) => JournalError::InUse { path: path.into() },
        Some(C::NotADatabase) => {
            JournalError::Foreign { path: path.into(), what: "no SQLite database".into() }
        }
        Some(C::DatabaseCorrupt) => JournalError::Damaged { path: path.into(), what: source.to_string() },
        _ => JournalError::Open { path: path.into(), source },
    }
}

#[cfg(test)]
mod tests;
