use std::{fs, sync::Arc};

use super::*;
use crate::{
    inventory::Inventory,
    session::{Entry, Event},
};

fn applied(revision: u64) -> Record {
    Record::Applied { revision, inventory: Arc::new(Inventory::default()) }
}

fn happened(at_us: u64) -> Record {
    Record::Session { id: "film-1".into(), entry: Entry { at_us, event: Event::Prepared { sent_us: 1 } } }
}

/// The journal's thread lets go of the file a moment after the last handle has gone.
fn reopen(dir: &Path) -> Result<(Journal, Vec<Record>), JournalError> {
    for _ in 0..500 {
        match Journal::open(dir) {
            Err(JournalError::InUse { .. }) => thread::sleep(Duration::from_millis(10)),
            result => return result,
        }
    }
    Journal::open(dir)
}

async fn with(records: Vec<Record>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (journal, before) = Journal::open(dir.path()).unwrap();
    assert!(before.is_empty());
    if !records.is_empty() {
        journal.append(records).await.unwrap();
    }
    drop(journal);
    drop(reopen(dir.path()).unwrap());
    dir
}

fn damage(dir: &Path, sql: &str) {
    for _ in 0..500 {
        let db = Connection::open(dir.join(FILE)).unwrap();
        match db.execute_batch(sql) {
            Err(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) => {
                thread::sleep(Duration::from_millis(10));
            }
            result => return result.unwrap(),
        }
    }
}

#[tokio::test]
async fn what_was_appended_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let mut all = Vec::new();
    for i in 1..=3 {
        let (journal, before) = reopen(&dir.path().join("made/for/it")).unwrap();
        assert_eq!(before, all);
        let new = vec![applied(i), happened(i)];
        journal.append(new.clone()).await.unwrap();
        all.extend(new);
    }
}

#[tokio::test]
async fn a_journal_survives_its_process() {
    // without any closing: what a crash leaves is the database and its write-ahead log as they are
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    journal.append(vec![applied(1), happened(2)]).await.unwrap();
    let copy = tempfile::tempdir().unwrap();
    for file in fs::read_dir(dir.path()).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    assert_eq!(Journal::open(copy.path()).unwrap().1, [applied(1), happened(2)]);
}

#[tokio::test]
async fn two_controllers_cannot_share_it() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    journal.append(vec![applied(1)]).await.unwrap();
    let err = Journal::open(dir.path()).unwrap_err();
    assert!(matches!(err, JournalError::InUse { .. }), "{err:?}");
    assert!(err.to_string().contains("is a handover-controller running already?"), "{err}");
}

#[tokio::test]
async fn records_are_never_changed_or_deleted() {
    let dir = with(vec![applied(1)]).await;
    for sql in ["UPDATE record SET body = '{}'", "DELETE FROM record"] {
        let err = Connection::open(dir.path().join(FILE)).unwrap().execute_batch(sql).unwrap_err();
        assert!(err.to_string().contains("append-only"), "{err}");
    }
}

#[tokio::test]
async fn a_damaged_journal_is_refused_and_left_as_it_is() {
    let fill: Vec<Record> = (1..=200).map(happened).collect();
    type Damage = fn(&Path);
    let cases: [(&str, Damage, &str); 7] = [
        ("empty", |f| fs::write(f, "").unwrap(), "is damaged: it is empty"),
        (
            "text",
            |f| fs::write(f, "this is no journal, ".repeat(500)).unwrap(),
            "is not a journal of handover-controller",
        ),
        (
            "cut",
            |f| {
                let bytes = fs::read(f).unwrap();
                fs::write(f, &bytes[..bytes.len() / 2]).unwrap();
            },
            "is damaged",
        ),
        (
            "overwritten",
            |f| {
                let mut bytes = fs::read(f).unwrap();
                let n = bytes.len();
                bytes[4096..n].fill(0x5a);
                fs::write(f, bytes).unwrap();
            },
            "is damaged",
        ),
        (
            "gap",
            |f| {
                damage(
                    f.parent().unwrap(),
                    "DROP TRIGGER record_never_goes; DELETE FROM record WHERE seq = 7",
                )
            },
            "is damaged: record 8 follows record 6",
        ),
        (
            "nonsense",
            |f| {
                damage(
                    f.parent().unwrap(),
                    "DROP TRIGGER record_never_changes; UPDATE record SET body = '{}' WHERE seq = 7",
                )
            },
            "is damaged: record 7 is not what was written",
        ),
        (
            "version",
            |f| damage(f.parent().unwrap(), "PRAGMA user_version = 3"),
            "has schema version 3, this handover-controller knows 2",
        ),
    ];
    for (name, damage, want) in cases {
        let dir = with(fill.clone()).await;
        let file = dir.path().join(FILE);
        damage(&file);
        let before = fs::read(&file).unwrap();
        let err = reopen(dir.path()).expect_err(name).to_string();
        assert!(err.contains(want) && err.contains("journal.db"), "{name}: {err}");
        assert_eq!(fs::read(&file).unwrap(), before, "{name}");
    }
}

#[tokio::test]
async fn another_programs_database_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    Connection::open(dir.path().join(FILE)).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
    let err = Journal::open(dir.path()).unwrap_err();
    assert!(matches!(err, JournalError::Foreign { .. }), "{err:?}");
}

#[tokio::test]
async fn a_journal_that_cannot_be_written_says_so_and_takes_no_more() {
    let dir = with(vec![applied(1)]).await;
    // stands for a full disk
    damage(
        dir.path(),
        "CREATE TRIGGER full BEFORE INSERT ON record WHEN NEW.seq = 4 BEGIN SELECT RAISE(ABORT, 'full'); END",
    );
    let (journal, _) = reopen(dir.path()).unwrap();
    journal.append(vec![happened(2)]).await.unwrap();
    let err = journal.append(vec![happened(3), happened(4), happened(5)]).await.unwrap_err();
    assert!(matches!(err, JournalError::Append(_)), "{err:?}");
    assert!(matches!(journal.append(vec![happened(3)]).await, Err(JournalError::Closed)));
    // all or none
    assert_eq!(reopen(dir.path()).unwrap().1, [applied(1), happened(2)]);
}

/// Wherever a bit flips, what is read is what was written, or nothing is.
#[tokio::test]
async fn a_flipped_bit_is_never_read_as_another_record() {
    let fill: Vec<Record> = (1..=40).map(happened).collect();
    let dir = with(fill.clone()).await;
    let whole = fs::read(dir.path().join(FILE)).unwrap();
    let mut refused = 0;
    for at in (0..whole.len()).step_by(61) {
        let other = tempfile::tempdir().unwrap();
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(other.path().join(FILE), &bytes).unwrap();
        match reopen(other.path()) {
            // in a free page, or in what SQLite does not need
            Ok((_, records)) => assert_eq!(records, fill, "byte {at}"),
            Err(e) => {
                assert!(e.to_string().contains("journal.db"), "byte {at}: {e}");
                refused += 1;
            }
        }
    }
    assert!(refused > 20, "{refused} of {} flips were noticed", whole.len() / 61);
}

/// A record that has reached the log, but not the database yet, outlives everything but the log's own loss; a log with a
/// torn end is read as far as it was ever acknowledged.
#[tokio::test]
async fn what_lies_in_the_log_is_read_up_to_a_torn_end() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    journal.append(vec![applied(1)]).await.unwrap();
    journal.append(vec![happened(1)]).await.unwrap();
    // as a crash finds them, with an append begun and never acknowledged
    let wal = format!("{FILE}-wal");
    let log = fs::read(dir.path().join(&wal)).unwrap();
    journal.append(vec![happened(2)]).await.unwrap();
    let longer = fs::read(dir.path().join(&wal)).unwrap();
    assert!(longer.len() > log.len(), "the log was folded in between");
    for cut in [log.len(), log.len() + 1, (log.len() + longer.len()) / 2, longer.len() - 1] {
        // each in a place of its own: a journal is closed by its thread, at a time of that thread's choice
        let copy = tempfile::tempdir().unwrap();
        fs::copy(dir.path().join(FILE), copy.path().join(FILE)).unwrap();
        fs::write(copy.path().join(&wal), &longer[..cut]).unwrap();
        assert_eq!(reopen(copy.path()).unwrap().1, [applied(1), happened(1)], "cut at {cut}");
    }
}

/// Runs `work` with a small file system of its own at a directory that nobody else sees.
fn on_a_small_disk(work: impl FnOnce(&Path) + Send + 'static) {
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: mounting a small file system takes root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_owned();
    // a thread of its own: the journal's thread is born in the same mount namespace
    let thread = thread::spawn(move || {
        const NONE: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
        mount(Some("small"), &at, Some("tmpfs"), MsFlags::empty(), Some("size=256k")).unwrap();
        work(&at);
    });
    thread.join().unwrap();
}

fn remount(dir: &Path, read_only: bool, size: &str) -> nix::Result<()> {
    use nix::mount::{MsFlags, mount};
    let read_only = if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    let options = format!("size={size}");
    mount(Some("small"), dir, Some("tmpfs"), MsFlags::MS_REMOUNT | read_only, Some(options.as_str()))
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[test]
fn a_full_disk_stops_the_journal_and_loses_nothing_that_was_acknowledged() {
    on_a_small_disk(|dir| {
        let (journal, _) = Journal::open(dir).unwrap();
        let mut acknowledged = Vec::new();
        let failed = loop {
            let record = happened(acknowledged.len() as u64);
            match wait(journal.append(vec![record.clone()])) {
                Ok(()) => acknowledged.push(record),
                Err(e) => break e,
            }
            assert!(acknowledged.len() < 10_000, "the disk does not fill");
        };
        assert!(matches!(failed, JournalError::Append(_)), "{failed:?}");
        assert!(matches!(wait(journal.append(vec![happened(0)])), Err(JournalError::Closed)));
        drop(journal);
        remount(dir, false, "8m").unwrap();
        let (journal, records) = reopen(dir).unwrap();
        assert_eq!(records, acknowledged);
        wait(journal.append(vec![happened(99_999)])).unwrap();
    });
}

#[test]
fn a_journal_on_a_read_only_file_system_is_refused_and_left_as_it_is() {
    on_a_small_disk(|dir| {
        let (journal, _) = Journal::open(dir).unwrap();
        wait(journal.append(vec![applied(1)])).unwrap();
        drop(journal);
        drop(reopen(dir).unwrap());
        let before = fs::read(dir.join(FILE)).unwrap();
        // the journal's thread has to have let go of the file
        let mut tries = 0;
        while let Err(e) = remount(dir, true, "256k") {
            tries += 1;
            assert!(tries < 500, "{e}");
            thread::sleep(Duration::from_millis(10));
        }
        let refused = reopen(dir).unwrap_err();
        assert!(refused.to_string().contains("journal.db"), "{refused}");
        assert_eq!(fs::read(dir.join(FILE)).unwrap(), before);
        remount(dir, false, "256k").unwrap();
        assert_eq!(reopen(dir).unwrap().1, [applied(1)]);
    });
}
