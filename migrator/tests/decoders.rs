//! Every decoder of octets from outside that a migrator has, given damaged and invented octets: no panic, no more memory or files
//! than the rules allow, and what is taken is what was sent. `cargo xtask fuzz` runs it with many more cases
//! (`HANDOVER_FUZZ_CASES`).
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, sync::LazyLock};

use handover_api::v1;
use handover_migrator::{config::Config, criu::Event, record::Store, transfer::Receiver};
use proptest::{prelude::*, sample::Index};
use prost::Message as _;
use protobuf::Message as _;

fn cases() -> ProptestConfig {
    let cases = std::env::var("HANDOVER_FUZZ_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64);
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 200, ..ProptestConfig::default() }
}

fn octets(good: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
    let damage = prop::collection::vec((any::<Index>(), any::<u8>(), 0_u8..4), 0..8);
    let damaged = damage.prop_map(move |harms| {
        let mut bytes = good.to_vec();
        for (at, value, how) in harms {
            let i = at.index(bytes.len() + 1);
            match how {
                0 if i < bytes.len() => bytes[i] ^= value,
                1 => bytes.truncate(i),
                2 => bytes.insert(i, value),
                _ if i < bytes.len() => drop(bytes.remove(i)),
                _ => {}
            }
        }
        bytes
    });
    prop_oneof![8 => damaged, 1 => prop::collection::vec(any::<u8>(), 0..1024)]
}

static NOTIFICATION: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut notify = rust_criu::rust_criu_protobuf::rpc::Criu_notify::new();
    notify.set_script("post-dump".into());
    notify.set_pid(4711);
    let mut response = rust_criu::rust_criu_protobuf::rpc::Criu_resp::new();
    response.set_type(rust_criu::rust_criu_protobuf::rpc::Criu_req_type::NOTIFY);
    response.set_success(true);
    response.notify = protobuf::MessageField::some(notify);
    response.write_to_bytes().unwrap()
});

static PREPARE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    v1::PrepareRequest {
        migration: "film-1".into(),
        service: Some(v1::ServiceSpec {
            name: "film".into(),
            address: "203.0.113.10".into(),
            target: Some(v1::Target { by: Some(v1::target::By::Command("film-server".into())) }),
        }),
        user_addresses: vec!["10.1.0.100".into()],
        ..Default::default()
    }
    .encode_to_vec()
});

static CONFIG: &str = include_str!("../../packaging/examples/migrator.toml");

/// A name an attacker might try, or one of an image.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("core-1.img".to_owned()),
        Just("pages-1.img".to_owned()),
        Just(String::new()),
        Just("../x.img".to_owned()),
        Just("/etc/x.img".to_owned()),
        Just("stats-dump".to_owned()),
        Just(".img".to_owned()),
        "[a-z./-]{0,12}\\.img",
        any::<String>(),
    ]
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn what_criu_says(bytes in octets(&NOTIFICATION)) {
        let _ = Event::decode(&bytes);
    }

    #[test]
    fn what_the_controller_asks(bytes in octets(&PREPARE)) {
        if let Ok(request) = v1::PrepareRequest::decode(&*bytes) {
            let _ = handover_migrator::record::check_id(&request.migration);
            if let Some(v1::Target { by: Some(_) }) = request.service.as_ref().and_then(|s| s.target.as_ref()) {
                // looks for a process, and touches none
                let _ = handover_migrator::process::resolve(request.service.and_then(|s| s.target).as_ref());
            }
        }
        let _ = v1::FreezeRequest::decode(&*bytes);
        let _ = v1::ReserveRequest::decode(&*bytes);
        let _ = v1::ImageChunk::decode(&*bytes);
        let _ = v1::PageBytes::decode(&*bytes);
    }

    #[test]
    fn configurations(bytes in octets(CONFIG.as_bytes())) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("migrator.toml");
        fs::write(&path, bytes).unwrap();
        let _ = Config::load(&path);
    }

    #[test]
    fn records(bytes in octets(b"{\"version\":1,\"migration\":\"film-1\",\"state\":\"voted\"}\ncrc32 00000000\n")) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("film-1.json"), bytes).unwrap();
        let _ = Store::open(dir.path());
    }

    /// Whatever comes as images: nothing outside the directory, nothing beyond the room, and a file that is taken as whole is
    /// what its checksum says.
    #[test]
    fn images(chunks in prop::collection::vec(
        (name(), prop::collection::vec(any::<u8>(), 0..300), prop::option::of(any::<bool>())), 0..12,
    )) {
        const ROOM: u64 = 1000;
        let above = tempfile::tempdir().unwrap();
        let dir = above.path().join("images");
        fs::create_dir(&dir).unwrap();
        let mut receiver = Receiver::new(&dir, ROOM);
        let mut sent = crc32fast::Hasher::new();
        for (file, data, last) in chunks {
            if !file.is_empty() {
                sent = crc32fast::Hasher::new();
            }
            sent.update(&data);
            let right = sent.clone().finalize();
            let last = last.map(|honest| if honest { right } else { !right });
            let lied = last.is_some_and(|l| l != right);
            let chunk = v1::ImageChunk { migration: String::new(), file, data: data.into(), last };
            let taken = receiver.take(&chunk);
            prop_assert!(!(lied && taken.is_ok()));
            if taken.is_err() {
                break;
            }
        }
        let _ = receiver.finish();
        prop_assert_eq!(fs::read_dir(above.path()).unwrap().count(), 1);
        let written: u64 = fs::read_dir(&dir).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
        prop_assert!(written <= ROOM);
    }
}
