//! The table's specification: every call in every state, and what the maps say after it.

use std::collections::HashMap;

use handover_api::v1;

use super::*;
use crate::desired::Wiring;

const VIRTUAL: Mac = Mac([2, 0x48, 0x4f, 0, 0, 1]);

/// The maps, as far as they decide on a user's network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Maps {
    words: HashMap<u32, u64>,
    switches: HashMap<u16, u64>,
    macs: HashMap<Mac, u32>,
    addresses: HashMap<IpAddr, u32>,
    links: HashMap<u16, u64>,
    routers: HashMap<u16, u64>,
    vids: HashMap<u16, u16>,
}

impl Maps {
    fn apply(&mut self, writes: &[Write]) {
        for write in writes {
            match *write {
                Write::UserWord { slot, word } => {
                    self.words.insert(slot, word.0);
                }
                Write::UserIdentity { .. } | Write::UserAccess { .. } | Write::NetworkAddress { .. } => {}
                Write::AddUser { known_by, slot } => {
                    let mac = known_by.mac.unwrap();
                    assert_eq!(self.macs.insert(mac, slot), None, "{mac} is given twice on the way");
                }
                Write::RemoveUser { known_by } => {
                    self.macs.remove(&known_by.mac.unwrap());
                }
                Write::AddAddress { address, slot } => {
                    assert_eq!(
                        self.addresses.insert(address, slot),
                        None,
                        "{address} is given twice on the way"
                    );
                }
                Write::RemoveAddress { address } => {
                    self.addresses.remove(&address);
                }
                Write::Switch { index, word } => {
                    self.switches.insert(index, word.0);
                }
                Write::NetworkRouter { index, router } => {
                    self.routers.insert(index, router.0);
                }
                Write::NetworkLink { index, link } => {
                    self.links.insert(index, link.0);
                }
                Write::Vid { tag, index } => {
                    self.vids.insert(tag, index);
                }
            }
        }
    }

    /// The VID a frame of `mac` gets now.
    fn vid(&self, mac: Mac) -> u16 {
        let word = UserWord(self.words[&self.macs[&mac]]);
        let switch = self.switches.get(&(word.switch() as u16)).map_or(SwitchWord::REST, |w| SwitchWord(*w));
        let network = word.select(switch).expect("word and switch agree").network;
        Link(self.links[&network]).vid()
    }
}

#[derive(Clone)]
struct World {
    table: Table,
    maps: Maps,
}

const TARO: Mac = Mac([2, 0, 0, 0, 1, 1]);
const HANAKO: Mac = Mac([2, 0, 0, 0, 1, 2]);
const JIRO: Mac = Mac([2, 0, 0, 0, 1, 3]);

fn user(name: &str, n: u8, network: &str) -> v1::User {
    v1::User {
        name: name.into(),
        mac: Mac([2, 0, 0, 0, 1, n]).to_string(),
        addresses: vec![format!("10.1.0.{}", 100 + n)],
        network: network.into(),
        ..v1::User::default()
    }
}

fn inventory() -> v1::ConfigureRequest {
    let network = |name: &str, vid, router: &str| v1::Network {
        name: name.into(),
        vid: Some(vid),
        router_address: router.into(),
        ..v1::Network::default()
    };
    v1::ConfigureRequest {
        revision: 5,
        networks: vec![
            network("net1", 1, "10.1.0.1"),
            network("net2", 2, "10.1.0.1"),
            network("net3", 3, "10.1.0.1"),
            network("else", 4, "10.9.0.1"),
        ],
        users: vec![user("taro", 1, "net1"), user("hanako", 2, "net1"), user("jiro", 3, "net2")],
    }
}

fn names(users: &[&str]) -> Vec<String> {
    users.iter().map(ToString::to_string).collect()
}

const V: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

const BOTH: &[&str] = &["hanako", "taro"];

impl World {
    fn new() -> Self {
        let mut world = Self { table: Table::new(8), maps: Maps::default() };
        world.configure(&inventory()).unwrap();
        world
    }

    fn configure(&mut self, request: &v1::ConfigureRequest) -> Result<(), Refusal> {
        let (table, writes, retired) =
            self.table.configured(&Desired::new(request, &Wiring::single(VIRTUAL)).unwrap())?;
        self.maps.apply(&writes);
        self.table = table;
        self.table.reuse(retired);
        Ok(())
    }

    fn begin(&mut self, migration: &str, users: &[&str], from: &str, to: &str) -> Result<StageStep, Refusal> {
        self.table.stage_begin(migration, &names(users), from, to)
    }

    fn write(&mut self, migration: &str) -> Result<StageAnswer, Refusal> {
        let (writes, answer) = self.table.stage_write(migration)?;
        self.maps.apply(&writes);
        Ok(answer)
    }

    fn stage(
        &mut self,
        migration: &str,
        users: &[&str],
        from: &str,
        to: &str,
    ) -> Result<StageAnswer, Refusal> {
        match self.begin(migration, users, from, to)? {
            StageStep::Done(answer) => Ok(answer),
            StageStep::Introduce { .. } => self.write(migration),
        }
    }

    fn switch(
        &mut self,
        migration: &str,
        staged: StageAnswer,
        users: &[&str],
        to: &str,
    ) -> Result<SwitchAnswer, Refusal> {
        match self.table.switch(migration, staged.switch.into(), staged.generation, &names(users), to)? {
            SwitchStep::Done(answer) => Ok(answer),
            SwitchStep::Store { index, word } => {
                self.maps.apply(&[Write::Switch { index, word }]);
                let answer = SwitchAnswer { window_ns: 7, store_latency_ns: 8 };
                self.table.switched(migration, answer);
                Ok(answer)
            }
        }
    }

    fn abort(&mut self, migration: &str) -> Result<bool, Refusal> {
        let step = self.table.abort(migration)?;
        self.maps.apply(&step.writes);
        self.table.reuse(step.retired);
        Ok(step.was_switched)
    }

    fn finish(&mut self, migration: &str) -> Result<(), Refusal> {
        let (writes, retired) = self.table.finish(migration)?;
        self.maps.apply(&writes);
        self.table.reuse(retired);
        Ok(())
    }

    /// The world after the daemon was killed and started again: the table from what was on disk, `saved`, and from the
    /// maps, and the maps as the table then wants them.
    fn restarted(&self, saved: &Snapshot) -> Self {
        let text = serde_json::to_string(saved).unwrap();
        let mut table = Table::restore(&serde_json::from_str(&text).unwrap(), 8, false).unwrap();
        table.adopt(
            |index| {
                let word = SwitchWord(self.maps.switches.get(&index).copied().unwrap_or(0));
                (word, SwitchAnswer { window_ns: 7, store_latency_ns: 8 }, V)
            },
            |_| gateway_ebpf::Network {
                router: 0,
                link: 0,
                address: 0,
                ifindex: 0,
                address6: [0; 2],
                spare: [0; 2],
            },
        );
        let mut maps = Maps::default();
        maps.apply(&table.contents());
        Self { table, maps }
    }

    fn vids(&self) -> [u16; 3] {
        [TARO, HANAKO, JIRO].map(|mac| self.maps.vid(mac))
    }
}

/// The states of migration `m`, by how they come about.
const STATES: [&str; 6] = ["none", "staging", "staged", "switched", "aborted", "finished"];

fn in_state(state: &str) -> (World, StageAnswer) {
    let mut world = World::new();
    let mut staged = StageAnswer { switch: 1, generation: 1, to: 2 };
    if state == "none" {
        return (world, staged);
    }
    world.begin("m", BOTH, "net1", "net2").unwrap();
    if state != "staging" {
        staged = world.write("m").unwrap();
    }
    if matches!(state, "switched" | "aborted" | "finished") {
        world.switch("m", staged, BOTH, "net2").unwrap();
    }
    match state {
        "aborted" => assert!(world.abort("m").unwrap()),
        "finished" => world.finish("m").unwrap(),
        _ => {}
    }
    (world, staged)
}

const OLD: [u16; 3] = [1, 1, 2];
const NEW: [u16; 3] = [2, 2, 2];

#[test]
fn every_call_in_every_state() {
    type Call = fn(&mut World, StageAnswer) -> Result<String, Refusal>;
    let stage: Call =
        |w, _| w.stage("m", BOTH, "net1", "net2").map(|a| format!("{}/{}", a.switch, a.generation));
    let switch: Call = |w, s| w.switch("m", s, BOTH, "net2").map(|a| a.window_ns.to_string());
    let abort: Call = |w, _| w.abort("m").map(|was| was.to_string());
    let finish: Call = |w, _| w.finish("m").map(|()| "ok".into());

    let m = || "m".to_string();
    let (is, no) = (|text: &str| Ok(text.to_string()), Err);
    /// The answer, and where taro, hanako and jiro are after it.
    type After = (Result<String, Refusal>, [u16; 3]);
    #[rustfmt::skip]
    let table: [(&str, Call, [After; 6]); 4] = [
        // none, staging, staged, switched, aborted, finished
        ("stage", stage, [
            (is("1/1"), OLD), (is("1/1"), OLD), (is("1/1"), OLD), (is("1/1"), NEW),
            (no(Refusal::Aborted(m())), OLD), (no(Refusal::Finished(m())), NEW),
        ]),
        ("switch", switch, [
            (no(Refusal::NotStaged(m())), OLD), (no(Refusal::StillStaging(m())), OLD), (is("7"), NEW), (is("7"), NEW),
            (no(Refusal::Aborted(m())), OLD), (is("7"), NEW),
        ]),
        ("abort", abort, [
            (is("false"), OLD), (is("false"), OLD), (is("false"), OLD), (is("true"), OLD),
            (is("true"), OLD), (no(Refusal::Finished(m())), NEW),
        ]),
        ("finish", finish, [
            (is("ok"), OLD), (no(Refusal::StillStaging(m())), OLD), (no(Refusal::NotSwitched(m())), OLD), (is("ok"), NEW),
            (no(Refusal::Aborted(m())), OLD), (is("ok"), NEW),
        ]),
    ];
    for (name, call, answers) in table {
        for (state, (answer, vids)) in STATES.into_iter().zip(answers) {
            let (world, staged) = in_state(state);
            let restarted = world.restarted(&world.table.snapshot());
            let before = World::new().restarted(&World::new().table.snapshot());
            for (what, mut world) in [("", world), (", restarted,", restarted)] {
                if state == "staging" && !what.is_empty() {
                    assert_eq!(world.maps, before.maps, "what was not staged is gone");
                    continue;
                }
                assert_eq!(call(&mut world, staged), answer, "{name} when {state}{what}");
                assert_eq!(world.vids(), vids, "after {name} when {state}{what}");
                // and again: the same answer, nothing moves
                assert_eq!(call(&mut world, staged), answer, "{name} twice when {state}{what}");
                assert_eq!(world.vids(), vids, "after {name} twice when {state}{what}");
                if state == "staging" {
                    continue;
                }
                let mut world = world.restarted(&world.table.snapshot());
                assert_eq!(call(&mut world, staged), answer, "{name} when {state}, then restarted{what}");
                assert_eq!(world.vids(), vids, "after {name} when {state}, then restarted{what}");
            }
        }
    }
}

#[test]
fn a_store_that_is_not_on_disk_is_found_in_the_maps_by_its_generation() {
    let (world, staged) = in_state("staged");
    let saved = world.table.snapshot();
    let (mut switched, _) = in_state("switched");
    let mut restarted = switched.restarted(&saved);
    assert_eq!(restarted.vids(), NEW);
    assert_eq!(restarted.switch("m", staged, BOTH, "net2").unwrap().window_ns, 7, "is not made again");
    assert_eq!(restarted.abort("m"), Ok(true));
    assert_eq!(restarted.vids(), OLD);
    // a store of another generation, or of none, is not this one's
    for word in [SwitchWord::forward(Selector::B, staged.generation + 1), SwitchWord(0)] {
        switched.maps.switches.insert(staged.switch, word.0);
        assert_eq!(switched.restarted(&saved).vids(), OLD);
    }
}

#[test]
fn indices_that_are_in_use_are_not_given_again_after_a_restart() {
    let (world, staged) = in_state("staged");
    let mut world = world.restarted(&world.table.snapshot());
    let other = world.stage("other", &["jiro"], "net2", "net3").unwrap();
    assert_ne!(other.switch, staged.switch);
    assert!(other.generation > staged.generation);
    let mut request = inventory();
    request.users.push(user("saburo", 4, "net3"));
    request.networks.push(v1::Network {
        name: "net5".into(),
        vid: Some(5),
        router_address: "10.1.0.1".into(),
        ..v1::Network::default()
    });
    world.configure(&request).unwrap();
    let distinct = |mut all: Vec<u32>| {
        let len = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), len);
    };
    distinct(world.maps.macs.values().copied().collect());
    distinct(world.maps.vids.values().map(|i| u32::from(*i)).collect());
}

#[test]
fn a_state_that_cannot_be_is_refused_naming_what() {
    let (world, _) = in_state("staged");
    let good = serde_json::to_value(world.table.snapshot()).unwrap();
    let refused = |path: &str, value: serde_json::Value| {
        let mut bad = good.clone();
        *bad.pointer_mut(path).unwrap() = value;
        Table::restore(&serde_json::from_value(bad).unwrap(), 8, false).unwrap_err().to_string()
    };
    assert!(Table::restore(&serde_json::from_value(good.clone()).unwrap(), 8, false).is_ok());
    for (path, value, named) in [
        ("/users/taro/slot", 0.into(), ["`taro`", "index 0"]),
        ("/users/taro/slot", slots_for(8).into(), ["`taro`", "index 20"]),
        ("/users/taro/slot", good["users"]["hanako"]["slot"].clone(), ["`taro`", "another one's"]),
        ("/users/taro/mac", good["users"]["hanako"]["mac"].clone(), ["MAC address", "02:00:00:00:01:02"]),
        ("/users/taro/addresses", serde_json::json!([]), ["`taro`", "no address"]),
        ("/users/taro/network", "net9".into(), ["`taro`", "`net9`"]),
        ("/users/taro/network", "net3".into(), ["`m`", "`taro`"]),
        ("/networks/net1/vid", 2.into(), ["VID 2", "belongs to two"]),
        ("/networks/net1/index", 9000.into(), ["`net1`", "9000"]),
        ("/switches/m/index", 4096.into(), ["`m`", "4096"]),
        ("/switches/m/users/0", "kenji".into(), ["`m`", "`kenji`"]),
    ] {
        let error = refused(path, value);
        for part in named {
            assert!(error.contains(part), "{path}: {error:?} does not name {part:?}");
        }
    }
    let few = Table::restore(&serde_json::from_value(good.clone()).unwrap(), 2, true);
    assert_eq!(few.unwrap_err(), SnapshotError::Users { users: 3, limit: 2 });
    let renumbered = Table::restore(&serde_json::from_value(good.clone()).unwrap(), 3, true);
    assert!(renumbered.is_ok(), "slots are given anew where the maps are new");
}

#[test]
fn staging_moves_nobody_and_says_so() {
    let (world, _) = in_state("staged");
    let seen = |world: &World, nth: usize| {
        let user = world.table.users().nth(nth).unwrap();
        (
            user.name.to_string(),
            user.spec.mac.unwrap(),
            user.network.to_string(),
            user.staged_by.map(str::to_string),
        )
    };
    let is = |name: &str, mac, network: &str, by: Option<&str>| {
        (name.to_string(), mac, network.to_string(), by.map(str::to_string))
    };
    assert_eq!(seen(&world, 0), is("hanako", HANAKO, "net1", Some("m")));
    assert_eq!(seen(&world, 1), is("jiro", JIRO, "net2", None));
    let (world, _) = in_state("switched");
    assert_eq!(seen(&world, 2), is("taro", TARO, "net2", Some("m")));
    let view = world.table.switches().next().unwrap();
    assert_eq!((view.state, view.from, view.to, view.users), ("switched", "net1", "net2", 2));
    let (world, _) = in_state("finished");
    assert_eq!(seen(&world, 2), is("taro", TARO, "net2", None));
    assert_eq!(world.table.switches().count(), 0);
}

#[test]
fn a_stage_that_fails_leaves_nothing() {
    let (mut world, _) = in_state("staging");
    world.table.stage_failed("m");
    assert_eq!(world.table.users().find(|u| u.staged_by.is_some()), None);
    assert_eq!(world.write("m"), Err(Refusal::NotStaged("m".into())), "a second call of it finds it gone");
    world.stage("m", BOTH, "net1", "net3").unwrap();
    // one that is written is not undone by a late failure of another call
    world.table.stage_failed("m");
    assert_eq!(world.table.switches().count(), 1);
}

#[test]
fn an_abort_while_staging_wins() {
    let (mut world, _) = in_state("staging");
    world.abort("m").unwrap();
    assert_eq!(world.write("m"), Err(Refusal::Aborted("m".into())));
    assert_eq!(world.vids(), OLD);
}

#[test]
fn an_abort_that_overtakes_its_stage_wins() {
    let mut world = World::new();
    assert_eq!(world.abort("m"), Ok(false));
    assert_eq!(world.begin("m", BOTH, "net1", "net2"), Err(Refusal::Aborted("m".into())));
}

#[test]
fn what_cannot_be_staged_is_named() {
    let (mut world, _) = in_state("staged");
    #[rustfmt::skip]
    let cases: [(&[&str], &str, &str, Refusal); 9] = [
        (&[], "net1", "net2", Refusal::NoUsers("x".into())),
        (&["saburo"], "net1", "net2", Refusal::UnknownUser("saburo".into())),
        (&["jiro"], "net2", "net9", Refusal::UnknownNetwork("net9".into())),
        (&["jiro"], "net9", "net2", Refusal::UnknownNetwork("net9".into())),
        (&["jiro"], "net2", "net2", Refusal::SameNetwork("net2".into())),
        (&["jiro", "jiro"], "net2", "net1", Refusal::UserTwice("jiro".into())),
        (&["jiro"], "net1", "net3", Refusal::Elsewhere { user: "jiro".into(), on: "net2".into(), from: "net1".into() }),
        (&["taro"], "net1", "net3", Refusal::StagedByOther { user: "taro".into(), by: "m".into() }),
        (&["jiro"], "net2", "else", Refusal::OtherRouter {
            from: "net2".into(), from_address: "10.1.0.1".into(),
            to: "else".into(), to_address: "10.9.0.1".into(),
        }),
    ];
    for (users, from, to, refusal) in cases {
        let before = world.maps.clone();
        assert_eq!(world.stage("x", users, from, to), Err(refusal));
        assert_eq!(world.maps, before);
        assert_eq!(world.table.switches().count(), 1);
    }
    // all of it at once, for a preflight
    assert_eq!(world.table.check("x", &names(&["saburo", "taro"]), "net1", "net9").len(), 3);
}

#[test]
fn a_switch_has_to_name_what_was_staged() {
    let (mut world, staged) = in_state("staged");
    let differs = |what| Err(Refusal::Differs { migration: "m".into(), what });
    let other = StageAnswer { generation: staged.generation + 1, ..staged };
    assert_eq!(world.switch("m", other, BOTH, "net2"), differs("switch or generation"));
    let other = StageAnswer { switch: staged.switch + 1, ..staged };
    assert_eq!(world.switch("m", other, BOTH, "net2"), differs("switch or generation"));
    assert_eq!(world.switch("m", staged, BOTH, "net3"), differs("networks"));
    assert_eq!(world.switch("m", staged, &["taro"], "net2"), differs("users"));
    assert_eq!(world.switch("m", staged, &["taro", "taro"], "net2"), differs("users"));
    assert_eq!(world.switch("x", staged, BOTH, "net2"), Err(Refusal::NotStaged("x".into())));
    assert_eq!(world.vids(), OLD);
    assert_eq!(world.stage("m", &["taro"], "net1", "net2"), differs("users").map(|_| staged));
    assert_eq!(world.stage("m", BOTH, "net1", "net3"), differs("networks").map(|_| staged));
    // the order of users does not matter
    assert_eq!(world.stage("m", &["taro", "hanako"], "net1", "net2"), Ok(staged));
    world.switch("m", staged, &["taro", "hanako"], "net2").unwrap();
    assert_eq!(world.vids(), NEW);
}

#[test]
fn a_switch_used_again_has_another_generation() {
    let (mut world, first) = in_state("finished");
    let second = world.stage("n", BOTH, "net2", "net1").unwrap();
    assert_eq!(second.switch, first.switch);
    assert_ne!(second.generation, first.generation);
    assert_eq!(world.vids(), NEW, "the old selector is not the new switch's");
}

#[test]
fn indices_wait_for_their_grace_period() {
    let (mut world, first) = in_state("switched");
    let (writes, retired) = world.table.finish("m").unwrap();
    world.maps.apply(&writes);
    let second = world.stage("n", BOTH, "net2", "net1").unwrap();
    assert_ne!(second.switch, first.switch);
    world.table.reuse(retired);
    assert_eq!(world.stage("o", &["jiro"], "net2", "net1").unwrap().switch, first.switch);
}

#[test]
fn configure_keeps_users_where_they_are() {
    let (mut world, _) = in_state("finished");
    world.configure(&inventory()).unwrap();
    assert_eq!(world.vids(), NEW, "the same again: net1 in the request is only for a user not known yet");
    let mut request = inventory();
    request.revision = 4;
    assert_eq!(world.configure(&request), Err(Refusal::OldRevision { revision: 4, accepted: 5 }));
}

#[test]
fn configure_does_not_touch_what_is_staged() {
    type Spoil = fn(&mut v1::ConfigureRequest);
    let cases: [(Spoil, &str, &str, &str); 5] = [
        (|r| r.users.retain(|u| u.name != "taro"), "user", "taro", "would be removed"),
        (|r| r.users[0].mac = "02:00:00:00:09:09".into(), "user", "taro", "would be changed"),
        (|r| r.users[1].addresses.push("10.1.0.7".into()), "user", "hanako", "would be changed"),
        (|r| r.networks[1].vid = Some(9), "network", "net2", "would be changed"),
        (|r| drop(r.networks.remove(1)), "network", "net2", "would be removed"),
    ];
    for state in ["staging", "staged", "switched"] {
        for (spoil, what, name, would) in cases {
            let (mut world, _) = in_state(state);
            let mut request = inventory();
            request.users.retain(|u| u.name != "jiro");
            spoil(&mut request);
            let refusal = Refusal::InUse { what, name: name.into(), would, migration: "m".into() };
            assert_eq!(world.configure(&request), Err(refusal), "{state}");
        }
        // everything else may change
        let (mut world, _) = in_state(state);
        let mut request = inventory();
        request.users.retain(|u| u.name != "jiro");
        request.users.push(user("saburo", 4, "net3"));
        request.networks.remove(3);
        world.configure(&request).unwrap();
    }
}

#[test]
fn users_can_swap_addresses() {
    let mut world = World::new();
    let mut request = inventory();
    let (first, rest) = request.users.split_at_mut(1);
    std::mem::swap(&mut first[0].mac, &mut rest[1].mac);
    std::mem::swap(&mut first[0].addresses, &mut rest[0].addresses);
    world.configure(&request).unwrap();
    assert_eq!(world.vids(), [2, 1, 1], "taro and jiro have each other's MAC");
    assert_eq!(world.maps.addresses.len(), 6, "one each, and one each made of the MAC");
}

#[test]
fn a_user_with_another_mac_gets_another_slot_and_one_with_other_addresses_is_never_lost() {
    let world = World::new();
    let before = world.maps.macs.clone();
    let mut request = inventory();
    request.users[0].mac = Mac([2, 0, 0, 0, 9, 9]).to_string();
    request.users[1].addresses = vec!["10.1.0.77".into()];
    let desired = Desired::new(&request, &Wiring::single(VIRTUAL)).unwrap();
    let (_, writes, retired) = world.table.configured(&desired).unwrap();
    let old = before[&TARO];
    assert_eq!(retired.slots, [old]);
    let of_old: Vec<_> = writes
        .iter()
        .filter(|w| {
            matches!(w, Write::UserWord { slot, .. } | Write::UserIdentity { slot, .. } | Write::UserAccess { slot, .. }
                if *slot == old)
        })
        .collect();
    assert!(
        matches!(of_old[..], [Write::UserIdentity { identity: 0, .. }, Write::UserWord { .. }]),
        "first nobody finds it: {of_old:?}"
    );
    assert!(writes.iter().any(|w| matches!(w, Write::AddUser { slot, .. } if *slot != old)));
    let hanako = before[&HANAKO];
    let touched = |w: &&Write| {
        matches!(w, Write::UserWord { slot, .. } | Write::UserIdentity { slot, .. } | Write::AddUser { slot, .. }
            if *slot == hanako)
            || matches!(w, Write::RemoveUser { known_by } if known_by.mac == Some(HANAKO))
    };
    assert_eq!(writes.iter().find(touched), None);
}

#[test]
fn there_is_room_for_as_many_users_as_configured_even_if_all_are_replaced() {
    let mut world = World { table: Table::new(3), maps: Maps::default() };
    for round in 0..10_u8 {
        let mut request = inventory();
        for (i, user) in request.users.iter_mut().enumerate() {
            user.name = format!("{}-{round}", user.name);
            user.mac = Mac([2, 0, 0, 0, round + 1, i as u8]).to_string();
        }
        world.configure(&request).unwrap();
        assert_eq!(world.maps.macs.len(), 3);
    }
    let mut request = inventory();
    request.users.push(user("saburo", 4, "net1"));
    assert_eq!(world.configure(&request), Err(Refusal::Users { wanted: 4, limit: 3 }));
}

#[test]
fn routers_are_learned_unless_configured() {
    let mut world = World::new();
    let r = IpAddr::from([10, 1, 0, 1]);
    let router = Mac([2, 0, 0, 0, 0x0a, 1]);
    assert_eq!(world.table.routers(false).len(), 2, "of networks with users");
    let index = world.table.network("net1").unwrap().index;
    assert_eq!(world.table.heard((WAN_PORT, 9), r, router), None);
    assert_eq!(world.table.heard((WAN_PORT + 2, 1), r, router), None, "on another interface");
    assert_eq!(world.table.heard((WAN_PORT, 4096 + 1), r, router), None, "in a service tag");
    assert_eq!(world.table.heard((WAN_PORT, 1), IpAddr::from([10, 1, 0, 9]), router), None);
    let changes = |world: &World| world.table.networks().map(|n| n.changes).sum::<u64>();
    let learned = |router: Mac| Some(Write::NetworkRouter { index, router: Router::at(router.word()) });
    let news = world.table.heard((WAN_PORT, 1), r, router);
    assert_eq!(news, Some(Learned { before: None, write: learned(router) }));
    let no_news = Some(Learned { before: Some(router), write: None });
    assert_eq!(world.table.heard((WAN_PORT, 1), r, router), no_news);
    assert_eq!(changes(&world), 0, "it is the first");
    let other = Mac([2, 0, 0, 0, 0x0a, 7]);
    let changed = Some(Learned { before: Some(router), write: learned(other) });
    assert_eq!(world.table.heard((WAN_PORT, 1), r, other), changed);
    assert_eq!(changes(&world), 1);
    assert_eq!(world.table.routers(false).len(), 1);

    let configured = Mac([2, 0, 0, 0, 0x0a, 9]);
    let mut request = inventory();
    request.networks[0].router_mac = Some(configured.to_string());
    world.configure(&request).unwrap();
    assert_eq!(world.maps.routers[&index], Router::at(configured.word()).0);
    let kept = Some(Learned { before: Some(configured), write: None });
    assert_eq!(world.table.heard((WAN_PORT, 1), r, router), kept);

    // what was learned of a network is forgotten with its VID
    let mut request = inventory();
    request.networks[0].vid = Some(11);
    world.configure(&request).unwrap();
    assert_eq!(world.maps.routers[&index], Router::UNKNOWN.0);
}

// hold and release

const FIGURES: HoldFigures = HoldFigures {
    frames: 9,
    bytes: 900,
    dropped_user_bound: 1,
    dropped_memory: 2,
    lost: 3,
    late: 4,
    release_us: 5,
};

impl World {
    fn hold(&mut self, staged: StageAnswer, address: Ipv4Addr) -> Result<bool, Refusal> {
        let step = self.table.hold("m", staged.switch.into(), staged.generation, address)?;
        assert_eq!((step.index, step.users, step.user.unwrap().0), (staged.switch, 2, HANAKO));
        assert_eq!((step.word.selector(), step.word.phase()), (Selector::A, Phase::Hold));
        if !step.again {
            self.maps.apply(&[Write::Switch { index: step.index, word: step.word }]);
        }
        Ok(step.again)
    }

    /// What the release says, its word stored.
    fn release(&mut self, to: Selector) -> Result<String, Refusal> {
        Ok(match self.table.release("m", to)? {
            Release::NotHeld => "not held".into(),
            Release::Done => "done".into(),
            Release::Drain { index, word, slots } => {
                assert_eq!((word.selector(), word.phase(), slots.len()), (to, Phase::Drain, 2));
                self.maps.apply(&[Write::Switch { index, word }]);
                "drain".into()
            }
        })
    }

    fn phase(&self) -> &'static str {
        self.table.switches().next().map_or("none", |s| s.phase)
    }
}

/// The states of a held migration `m`, by how they come about.
const HELD: [&str; 6] = ["held", "switched", "aborting", "finishing", "released a", "released b"];

fn in_held_state(state: &str) -> (World, StageAnswer) {
    let (mut world, staged) = in_state("staged");
    assert_eq!(world.hold(staged, V), Ok(false));
    if matches!(state, "switched" | "finishing" | "released b") {
        world.switch("m", staged, BOTH, "net2").unwrap();
    }
    match state {
        "aborting" | "released a" => assert_eq!(world.release(Selector::A).unwrap(), "drain"),
        "finishing" | "released b" => assert_eq!(world.release(Selector::B).unwrap(), "drain"),
        _ => {}
    }
    if state.starts_with("released") {
        world.table.released("m", FIGURES);
    }
    (world, staged)
}

#[test]
fn every_call_in_every_state_of_a_hold() {
    type Call = fn(&mut World, StageAnswer) -> Result<String, Refusal>;
    let hold: Call = |w, s| w.hold(s, V).map(|again| again.to_string());
    let switch: Call = |w, s| w.switch("m", s, BOTH, "net2").map(|a| a.window_ns.to_string());
    let to_old: Call = |w, _| w.release(Selector::A);
    let to_new: Call = |w, _| w.release(Selector::B);
    let abort: Call = |w, _| w.abort("m").map(|was| was.to_string());
    let finish: Call = |w, _| w.finish("m").map(|()| "ok".into());

    let m = || "m".to_string();
    let (is, no) = (|text: &str| Ok(text.to_string()), Err);
    let (releasing, unreleased) = (|| no(Refusal::Releasing(m())), || no(Refusal::NotReleased(m())));
    type Answers = [Result<String, Refusal>; 6];
    #[rustfmt::skip]
    let table: [(&str, Call, Answers); 6] = [
        // held, switched, aborting, finishing, released a, released b
        ("hold", hold, [
            is("true"), no(Refusal::Switched(m())), releasing(), releasing(), releasing(), releasing(),
        ]),
        ("switch", switch, [
            is("7"), is("7"), no(Refusal::Aborted(m())), is("7"), no(Refusal::Aborted(m())), is("7"),
        ]),
        ("release to the old", to_old, [
            is("drain"), is("drain"), is("drain"), releasing(), is("done"), releasing(),
        ]),
        ("release to the new", to_new, [
            no(Refusal::NotSwitched(m())), is("drain"), no(Refusal::NotSwitched(m())), is("drain"),
            no(Refusal::NotSwitched(m())), is("done"),
        ]),
        ("abort", abort, [
            unreleased(), unreleased(), unreleased(), unreleased(), is("false"), is("true"),
        ]),
        ("finish", finish, [
            no(Refusal::NotSwitched(m())), unreleased(), no(Refusal::NotSwitched(m())), unreleased(),
            no(Refusal::NotSwitched(m())), is("ok"),
        ]),
    ];
    for (name, call, answers) in table {
        for (state, answer) in HELD.into_iter().zip(answers) {
            let (world, staged) = in_held_state(state);
            // figures are in the maps until the switch ends: a release that was over is asked for once more
            let restarts = !state.starts_with("released");
            let restarted = world.restarted(&world.table.snapshot());
            assert_eq!(restarted.maps.switches, world.maps.switches, "{state}: the words stay as they are");
            assert_eq!(restarted.phase(), world.phase(), "{state}");
            for (what, mut world) in [("", Some(world)), (", restarted,", restarts.then_some(restarted))]
                .into_iter()
                .filter_map(|(what, world)| Some((what, world?)))
            {
                assert_eq!(call(&mut world, staged), answer, "{name} when {state}{what}");
                assert_eq!(call(&mut world, staged), answer, "{name} twice when {state}{what}");
            }
        }
    }
}

#[test]
fn a_hold_ends_with_its_switch_and_its_figures_are_remembered_as_long() {
    for (state, vids) in [("released a", OLD), ("released b", NEW)] {
        let (mut world, _) = in_held_state(state);
        assert_eq!(world.phase(), "drain");
        assert_eq!(world.table.past_hold("m"), None);
        match state {
            "released a" => assert_eq!(world.abort("m"), Ok(false)),
            _ => world.finish("m").unwrap(),
        }
        assert_eq!(world.vids(), vids);
        for world in [&world, &world.restarted(&world.table.snapshot())] {
            assert_eq!(world.table.past_hold("m"), Some(FIGURES), "{state}");
        }
        // the switch is another one's, and holds nothing
        let next = world.stage("n", &["jiro"], "net2", "net3").unwrap();
        assert_eq!(world.phase(), "forward");
        world.switch("n", next, &["jiro"], "net3").unwrap();
        world.finish("n").unwrap();
        assert_eq!(world.table.past_hold("n"), None);
    }
}

#[test]
fn a_hold_that_is_not_what_was_staged_changes_nothing() {
    let (mut world, staged) = in_state("staging");
    assert_eq!(world.hold(staged, V), Err(Refusal::StillStaging("m".into())));
    let (mut world, staged) = in_state("staged");
    let before = world.maps.clone();
    let other = StageAnswer { generation: staged.generation + 1, ..staged };
    assert!(matches!(world.hold(other, V), Err(Refusal::Differs { .. })));
    assert_eq!((world.maps.clone(), world.phase()), (before, "forward"));
    assert_eq!(world.hold(staged, V), Ok(false));
    let elsewhere = Ipv4Addr::new(203, 0, 113, 11);
    let refused = world.hold(staged, elsewhere).unwrap_err();
    assert!(refused.to_string().contains("held address"), "{refused}");
    // unstaging needs the release as well
    assert_eq!(world.abort("m"), Err(Refusal::NotReleased("m".into())));
    let (mut world, staged) = in_state("finished");
    assert_eq!(world.hold(staged, V), Err(Refusal::Finished("m".into())));
}
