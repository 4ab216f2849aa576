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
            "is damaged: record 7 cannot be read",
        ),
        (
            "version",
            |f| damage(f.parent().unwrap(), "PRAGMA user_version = 2"),
            "has schema version 2, this handover-controller knows 1",
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
