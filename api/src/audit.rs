//! Who asked what, and what came of it: an append-only file of JSON lines, each on stable storage before the caller has the
//! answer. No message of a call is written, only its name, its subject and a refusal's words: no secrets.
//!
//! - Lines are numbered; a number that is missing is a line that is missing. A line torn by a crash stays as it is, alone, and is
//!   counted when the file is read.
//! - Bounded: at [`LARGEST`] octets the file becomes `audit.log.1` and so on; [`KEPT`] of these are kept. What peers can make it
//!   write is bounded by [`crate::gate`].
//! - If it cannot be written (disk full), the call is served all the same and the log says so: a migration away from a failing
//!   site must not hang on its audit.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

/// Octets after which a file is put aside.
pub const LARGEST: u64 = 8 << 20;
/// Files put aside that are kept.
pub const KEPT: usize = 4;
/// File name in the state directory.
pub const FILE: &str = "audit.log";
/// Longest text taken from a caller, octets.
const LONGEST: usize = 256;

/// One call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Counts lines, from 1.
    pub seq: u64,
    /// Unix time in milliseconds.
    pub at_ms: u64,
    /// Role and name of its certificate, or the local user.
    pub peer: String,
    /// The call, e.g. "Controller/Migrate".
    pub call: String,
    /// What it was about, e.g. "film --to backup".
    pub subject: String,
    /// "done", or gRPC's name of the refusal.
    pub outcome: String,
    /// Of a refusal: why.
    pub reason: String,
}

struct Open {
    file: File,
    size: u64,
    seq: u64,
}

/// The file. Clones share it.
#[derive(Clone)]
pub struct Audit {
    dir: PathBuf,
    largest: u64,
    open: Arc<Mutex<Open>>,
}

impl std::fmt::Debug for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Audit").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// What was read, and what could not be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Read {
    /// The last ones, oldest first.
    pub entries: Vec<Entry>,
    /// Lines that are not as they were written.
    pub damaged: u64,
}

impl Audit {
    /// Opens the file in `dir`, or makes it; goes on after its last line.
    ///
    /// # Errors
    /// It cannot be opened, read or written.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Self::open_bounded(dir, LARGEST)
    }

    fn open_bounded(dir: &Path, largest: u64) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let seq = last(dir, 1)?.entries.last().map_or(0, |e| e.seq);
        let open = Arc::new(Mutex::new(Open { seq, ..open(dir)? }));
        Ok(Self { dir: dir.into(), largest, open })
    }

    /// Writes one line; returns once it is on stable storage.
    pub async fn write(&self, entry: Entry) {
        let this = self.clone();
        let written = tokio::task::spawn_blocking(move || this.write_now(entry)).await;
        match written {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the audit log could not be written"),
            Err(error) => tracing::error!(%error, "writing the audit log failed inside"),
        }
    }

    fn write_now(&self, mut entry: Entry) -> io::Result<()> {
        for text in [&mut entry.peer, &mut entry.call, &mut entry.subject, &mut entry.reason] {
            shorten(text);
        }
        entry.at_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
        let mut now = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if now.size >= self.largest {
            put_aside(&self.dir)?;
            *now = Open { seq: now.seq, ..open(&self.dir)? };
        }
        entry.seq = now.seq + 1;
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        // one write: a line is whole, or torn by a crash
        let written = now.file.write_all(&line).and_then(|()| now.file.sync_data());
        now.seq = entry.seq;
        now.size += line.len() as u64;
        if written.is_err() {
            // what is there of it stands alone
            let _ = now.file.write_all(b"\n");
        }
        written
    }

    /// The last `count` entries.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn last(&self, count: usize) -> io::Result<Read> {
        last(&self.dir, count)
    }
}

fn shorten(text: &mut String) {
    if text.len() > LONGEST {
        let end = text.floor_char_boundary(LONGEST);
        text.truncate(end);
        text.push_str("...");
    }
}

fn aside(dir: &Path, n: usize) -> PathBuf {
    dir.join(if n == 0 { FILE.to_owned() } else { format!("{FILE}.{n}") })
}

fn open(dir: &Path) -> io::Result<Open> {
    let path = aside(dir, 0);
    let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path)?;
    let mut size = file.metadata()?.len();
    if size > 0 {
        let mut end = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut end)?;
        if end != *b"\n" {
            file.write_all(b"\n")?;
            size += 1;
        }
    }
    File::open(dir)?.sync_all()?;
    Ok(Open { file, size, seq: 0 })
}

fn put_aside(dir: &Path) -> io::Result<()> {
    for n in (0..KEPT).rev() {
        match fs::rename(aside(dir, n), aside(dir, n + 1)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

fn last(dir: &Path, count: usize) -> io::Result<Read> {
    let mut read = Read::default();
    let mut files = Vec::new();
    for n in 0..=KEPT {
        let file = match File::open(aside(dir, n)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => break,
            Err(e) => return Err(e),
        };
        let mut entries: Vec<Entry> = Vec::new();
        for line in BufReader::new(file).split(b'\n') {
            match serde_json::from_slice(&line?) {
                Ok(entry) => entries.push(entry),
                Err(_) => read.damaged += 1,
            }
        }
        files.push(entries);
        if files.iter().map(Vec::len).sum::<usize>() >= count {
            break;
        }
    }
    let all = files.into_iter().rev().flatten();
    read.entries = all.collect();
    let over = read.entries.len().saturating_sub(count);
    read.entries.drain(..over);
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(n: usize) -> Entry {
        Entry {
            peer: "operator max".into(),
            call: "Controller/Migrate".into(),
            subject: format!("film-{n}"),
            ..Entry::default()
        }
    }

    #[test]
    fn lines_are_numbered_over_restarts_and_the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..3 {
            let audit = Audit::open_bounded(dir.path(), 4096).unwrap();
            for n in 0..100 {
                audit.write_now(entry(round * 100 + n)).unwrap();
            }
        }
        let read = last(dir.path(), 10).unwrap();
        assert_eq!(read.damaged, 0);
        let seqs: Vec<u64> = read.entries.iter().map(|e| e.seq).collect();
        assert_eq!(seqs, (291..=300).collect::<Vec<_>>());
        assert_eq!(read.entries[9].subject, "film-299");
        let files = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files, KEPT + 1);
        for n in 0..=KEPT {
            assert!(fs::metadata(aside(dir.path(), n)).unwrap().len() < 4096 + 1024);
        }
    }

    #[test]
    fn a_torn_line_stands_alone_and_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path()).unwrap();
        audit.write_now(entry(1)).unwrap();
        audit.write_now(entry(2)).unwrap();
        drop(audit);
        let path = dir.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 20]).unwrap();
        let audit = Audit::open(dir.path()).unwrap();
        audit.write_now(entry(3)).unwrap();
        let read = audit.last(10).unwrap();
        assert_eq!(read.damaged, 1);
        let subjects: Vec<&str> = read.entries.iter().map(|e| e.subject.as_str()).collect();
        assert_eq!(subjects, ["film-1", "film-3"]);
    }

    #[test]
    fn what_a_caller_writes_is_short() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path()).unwrap();
        audit.write_now(Entry { subject: "\u{e4}\n".repeat(10_000), ..entry(1) }).unwrap();
        assert!(fs::metadata(dir.path().join(FILE)).unwrap().len() < 1024);
        assert_eq!(audit.last(9).unwrap().entries.len(), 1);
    }
}
