//! Every decoder of octets from outside that the controller has, given damaged and invented octets: no panic, and what is taken
//! is taken the same way again. `cargo xtask fuzz` runs it with many more cases (`HANDOVER_FUZZ_CASES`).
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, sync::LazyLock};

use handover_api::v1;
use handover_controller::{config::Config, inventory, journal::Journal, triggers, world::Record};
use proptest::{prelude::*, sample::Index};
use prost::Message;

fn cases() -> ProptestConfig {
    let cases = std::env::var("HANDOVER_FUZZ_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64);
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 200, ..ProptestConfig::default() }
}

/// One way to damage octets.
#[derive(Debug, Clone)]
enum Harm {
    Flip(Index, u8),
    Cut(Index),
    Put(Index, Vec<u8>),
    Twice(Index, Index),
    Drop(Index, Index),
}

fn harm() -> impl Strategy<Value = Vec<Harm>> {
    let one = prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(i, b)| Harm::Flip(i, b)),
        any::<Index>().prop_map(Harm::Cut),
        (any::<Index>(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(i, b)| Harm::Put(i, b)),
        (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Harm::Twice(a, b)),
        (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Harm::Drop(a, b)),
    ];
    prop::collection::vec(one, 0..6)
}

fn damaged(good: &[u8], harms: &[Harm]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for harm in harms {
        let n = bytes.len() + 1;
        let range = |a: &Index, b: &Index| {
            let (a, b) = (a.index(n), b.index(n));
            a.min(b)..a.max(b)
        };
        match harm {
            Harm::Flip(i, b) if !bytes.is_empty() => {
                let i = i.index(bytes.len());
                bytes[i] ^= b;
            }
            Harm::Flip(..) => {}
            Harm::Cut(i) => bytes.truncate(i.index(n)),
            Harm::Put(i, put) => {
                let i = i.index(n);
                bytes.splice(i..i, put.iter().copied());
            }
            Harm::Twice(a, b) => {
                let range = range(a, b);
                let (at, part) = (range.start, bytes[range].to_vec());
                bytes.splice(at..at, part);
            }
            Harm::Drop(a, b) => drop(bytes.drain(range(a, b))),
        }
    }
    bytes
}

/// Damaged octets of a good one, or none of it at all.
fn octets(good: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => harm().prop_map(move |h| damaged(good, &h)),
        1 => prop::collection::vec(any::<u8>(), 0..2048),
    ]
}

static INVENTORY: LazyLock<String> = LazyLock::new(|| {
    include_str!("support/inventory.toml")
        .replace("@gw@", "127.0.0.1:1")
        .replace("@main-server@", "127.0.0.1:2")
        .replace("@backup-server@", "127.0.0.1:3")
});

static MIGRATE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    v1::MigrateRequest {
        service: "film".into(),
        to_site: "backup".into(),
        users: vec!["taro".into(), "jiro".into()],
        policy: 2,
        trigger: "operator".into(),
        queue: true,
        ..Default::default()
    }
    .encode_to_vec()
});

static SESSION: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let step = v1::SessionStep { name: "freeze".into(), took_us: 7, ..Default::default() };
    let finding = v1::Finding { code: "unreachable".into(), ..Default::default() };
    v1::ListSessionsResponse {
        sessions: vec![v1::Session {
            id: "film-1".into(),
            steps: vec![step; 3],
            findings: vec![finding],
            held_frames: Some(3),
            pending: vec!["gateway gw: abort".into()],
            ..Default::default()
        }],
    }
    .encode_to_vec()
});

static CONFIG: &str = "name = \"c\"\nlisten = \"10.0.0.1:7440\"\nstate_dir = \"/d\"\n[limits]\nat_once = 3\n\
                       [tls]\nca = \"/a\"\ncert = \"/c\"\nkey = \"/k\"\n";

static RECORD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let inventory = inventory::parse(&INVENTORY).unwrap().into();
    serde_json::to_vec(&Record::Applied { revision: 1, inventory }).unwrap()
});

static QUEUED: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let request =
        v1::MigrateRequest { service: "film".into(), to_site: "backup".into(), ..Default::default() };
    let request = triggers::operator(request).unwrap();
    serde_json::to_vec(&Record::Queued { id: "film-1".into(), request, at_ms: 7 }).unwrap()
});

/// A message that is taken is written as what is read again.
fn message<T: Message + Default + PartialEq + std::fmt::Debug>(bytes: &[u8]) -> Option<T> {
    let decoded = T::decode(bytes).ok()?;
    let again = T::decode(&*decoded.encode_to_vec()).unwrap();
    // NaN is not in these messages
    assert_eq!(decoded, again);
    Some(decoded)
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn requests_of_operators(bytes in octets(&MIGRATE)) {
        if let Some(m) = message::<v1::MigrateRequest>(&bytes)
            && let Ok(request) = triggers::operator(m)
        {
            // what is taken can be a name, and nothing else
            for name in request.users.iter().chain([&request.service, &request.to_site]) {
                prop_assert!(triggers::possible("name", name).is_ok());
            }
        }
        message::<v1::ApplyRequest>(&bytes);
        message::<v1::ResolveSessionRequest>(&bytes);
        message::<v1::ListAuditRequest>(&bytes);
    }

    #[test]
    fn answers_of_daemons(bytes in octets(&SESSION)) {
        message::<v1::ListSessionsResponse>(&bytes);
        message::<v1::GatewayStatus>(&bytes);
        message::<v1::StageResponse>(&bytes);
        message::<v1::FreezeResponse>(&bytes);
        message::<v1::PreflightResponse>(&bytes);
        message::<v1::MigratorStatus>(&bytes);
    }

    #[test]
    fn inventories(bytes in octets(INVENTORY.as_bytes())) {
        if let Ok(taken) = inventory::parse(&String::from_utf8_lossy(&bytes)) {
            let text = serde_json::to_string(&taken).unwrap();
            prop_assert_eq!(&serde_json::from_str::<inventory::Inventory>(&text).unwrap(), &taken);
        }
    }

    #[test]
    fn records(bytes in prop_oneof![octets(&RECORD), octets(&QUEUED)]) {
        if let Ok(taken) = serde_json::from_slice::<Record>(&bytes) {
            let text = serde_json::to_string(&taken).unwrap();
            prop_assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), taken.clone());
            // what can be read may contradict what is known: refused, never a panic
            let mut world = handover_controller::world::World::default();
            let _ = world.apply(&taken);
        }
    }

    #[test]
    fn configurations(bytes in octets(CONFIG.as_bytes())) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        fs::write(&path, bytes).unwrap();
        let _ = Config::load(&path);
    }
}

/// What was appended and is read back, whole.
fn journal(dir: &std::path::Path, count: u64) {
    let (journal, found) = Journal::open(dir).unwrap();
    assert!(found.is_empty());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for revision in 1..=count {
        let record = Record::Applied { revision, inventory: std::sync::Arc::default() };
        runtime.block_on(journal.append(vec![record])).unwrap();
    }
}

/// Opens it once its last owner has let go.
fn reopen(dir: &std::path::Path) -> Result<Vec<Record>, handover_controller::journal::JournalError> {
    loop {
        match Journal::open(dir) {
            Err(handover_controller::journal::JournalError::InUse { .. }) => std::thread::yield_now(),
            other => return other.map(|(_, records)| records),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases().cases.div_ceil(4), ..cases() })]

    /// Damage anywhere in the database or in its log: refused, or read as a beginning of what was written, each record as it was.
    #[test]
    fn damaged_journals(harms in harm(), log in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        journal(dir.path(), 6);
        let whole = reopen(dir.path()).unwrap();
        prop_assert_eq!(whole.len(), 6);
        let name = if log { "journal.db-wal" } else { "journal.db" };
        let path = dir.path().join(name);
        let Ok(good) = fs::read(&path) else { return Ok(()) };
        fs::write(&path, damaged(&good, &harms)).unwrap();
        if let Ok(records) = reopen(dir.path()) {
            prop_assert!(whole.starts_with(&records), "{:?}", records);
        }
    }
}
