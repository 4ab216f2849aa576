use std::fmt::Write as _;

use proptest::prelude::*;

use super::*;
use crate::{
    inventory::{parse, tests::LAB},
    session::{Command, Decision, Entry, Event, Finding, Policy, Severity, Ticket, Vote},
    world::{Record, WorldError},
};

const SERVICES: usize = 5;

/// Five services at the main site; neighbours share a user.
fn inventory() -> Record {
    let mut text = LAB.split("[[service]]").next().unwrap().to_owned();
    for i in 0..SERVICES {
        write!(
            text,
            "[[user]]\nname = \"u{i}\"\ngateway = \"gw\"\nmac = \"02:00:00:00:02:0{i}\"\naddresses = [\"10.1.0.2{i}\"]\n\
             home = \"main\"\n\
             [[service]]\nname = \"s{i}\"\naddress = \"203.0.113.2{i}\"\nhome = \"main\"\n\
             servers = {{ main = \"main-server\", backup = \"backup-server\" }}\nusers = [\"u{i}\", \"u{}\"]\n\
             target = {{ pid = {} }}\n",
            (i + 1) % SERVICES,
            100 + i
        )
        .unwrap();
    }
    Record::Applied { revision: 1, inventory: Arc::new(parse(&text).unwrap()) }
}

fn request(service: &str, to: &str, users: &[&str]) -> Request {
    Request {
        service: service.into(),
        to_site: to.into(),
        users: users.iter().map(|u| (*u).to_owned()).collect(),
        policy: Policy::Late,
        allow_other_peers: false,
        hold: false,
        trigger: "operator".into(),
    }
}

/// A world and the records it is made of.
struct Desk {
    world: World,
    records: Vec<Record>,
    limits: Limits,
    now_ms: u64,
}

impl Desk {
    fn new(at_once: usize, length: usize) -> Self {
        let mut desk = Self {
            world: World::default(),
            records: Vec::new(),
            limits: Limits { at_once, waiting: length, ..Limits::default() },
            now_ms: 0,
        };
        desk.put(inventory());
        desk
    }

    fn put(&mut self, record: Record) {
        self.world.apply(&record).unwrap();
        self.records.push(record);
    }

    fn happen(&mut self, id: &str, event: Event) {
        let at_us = self.world.sessions.get(id).and_then(|s| s.log.last()).map_or(0, |e| e.at_us + 1);
        self.put(Record::Session { id: id.into(), entry: Entry { at_us, event } });
    }

    /// As the controller does; the names of those that began.
    fn turns(&mut self) -> Vec<String> {
        let mut begun = Vec::new();
        while let Some(turn) = self.world.turn(self.limits, self.now_ms) {
            match turn {
                Turn::Begin(plan) => {
                    begun.push(plan.id.clone());
                    self.happen(&plan.id.clone(), Event::Requested { plan });
                }
                Turn::Refuse { id, reason } => {
                    self.put(Record::Left { id, why: Leaving::Refused { reason } });
                }
            }
        }
        begun
    }

    /// As the controller does with `queue`.
    fn ask(&mut self, request: &Request) -> Result<String, RequestError> {
        self.now_ms += 1;
        match self.world.admit_now(request, self.limits, self.now_ms) {
            Ok(plan) => {
                let plan = Arc::new(plan);
                let id = plan.id.clone();
                self.happen(&id, Event::Requested { plan });
                Ok(id)
            }
            Err(e) if e.passes() => {
                let Waiting { id, request, at_ms } = self.world.enqueue(request, self.limits, self.now_ms)?;
                self.put(Record::Queued { id: id.clone(), request, at_ms });
                Ok(id)
            }
            Err(e) => Err(e),
        }
    }

    /// Answers one call of a session.
    fn answer(&mut self, id: &str, refuse: bool) {
        let Some(command) = self.world.sessions[id].outstanding().into_iter().next() else { return };
        let event = match command {
            Command::Check => {
                let finding = Finding {
                    severity: Severity::Error,
                    code: "no".into(),
                    reporter: "gw".into(),
                    message: String::new(),
                    remedy: String::new(),
                };
                let findings = if refuse { vec![finding] } else { Vec::new() };
                Event::Checked { findings, pid: 41, memory_bytes: 0, sent_us: 0 }
            }
            Command::Stage(gateway) => {
                Event::Staged { gateway, ticket: Ticket { switch: 1, generation: 1 }, sent_us: 0 }
            }
            Command::Prepare => Event::Prepared { sent_us: 0 },
            Command::Freeze(_) => Event::Frozen { vote: Vote::default(), sent_us: 0 },
            Command::Switch(gateway, ..) => {
                Event::Switched { gateway, window_ns: 0, store_latency_ns: 0, sent_us: 0 }
            }
            Command::Yield => Event::Yielded { sent_us: 0 },
            Command::DecideCommit => Event::Decided { decision: Decision::Commit },
            Command::Resume => Event::Resumed { pid: 42, sent_us: 0 },
            Command::End => Event::Ended { sent_us: 0 },
            Command::Finish(gateway) => Event::Finished { gateway, held: None, sent_us: 0 },
            other => panic!("{other:?} in a session that goes well"),
        };
        self.happen(id, event);
    }

    fn finish(&mut self, id: &str) {
        while !self.world.sessions[id].outstanding().is_empty() {
            self.answer(id, false);
        }
    }

    fn under_way(&self) -> Vec<String> {
        let on = |id: &&String| self.world.sessions.get(*id).is_some_and(|s| !s.outstanding().is_empty());
        self.world.order.iter().filter(on).cloned().collect()
    }

    fn waiting(&self) -> Vec<&str> {
        self.world.queue.iter().map(|w| w.id.as_str()).collect()
    }
}

#[test]
fn one_at_a_time_per_service_in_the_order_asked() {
    let mut d = Desk::new(4, 10);
    let first = d.ask(&request("s0", "backup", &[])).unwrap();
    let second = d.ask(&request("s0", "main", &[])).unwrap();
    let third = d.ask(&request("s0", "backup", &[])).unwrap();
    assert_eq!([&first, &second, &third], ["s0-1", "s0-2", "s0-3"]);
    assert_eq!(d.waiting(), ["s0-2", "s0-3"]);
    assert_eq!(
        d.world.place_in_queue("s0-2", d.limits).unwrap(),
        (1, "session s0-1 (preflight) has the service".into())
    );
    assert_eq!(d.turns(), [""; 0]);
    d.finish("s0-1");
    // where the service is when its turn comes is what counts
    assert_eq!(d.turns(), ["s0-2"]);
    d.finish("s0-2");
    assert_eq!(d.turns(), ["s0-3"]);
    assert_eq!(d.world.sessions["s0-3"].plan.to.site, "backup");
}

#[test]
fn at_most_so_many_over_all_services_and_not_the_same_user_twice() {
    let mut d = Desk::new(2, 2);
    let users = |n: usize| request(&format!("s{n}"), "backup", &[&format!("u{n}")]);
    d.ask(&users(0)).unwrap();
    d.ask(&users(2)).unwrap();
    let refused = d.world.admit_now(&users(4), d.limits, 9).unwrap_err();
    assert!(refused.passes() && refused.to_string().contains("2 migrations are under way"), "{refused}");
    d.ask(&users(4)).unwrap();
    assert_eq!(
        d.world.place_in_queue("s4-1", d.limits).unwrap(),
        (1, "2 of at most 2 migrations are under way".into())
    );
    // s1 has user u1 and shares u2 with session s2-1
    d.ask(&request("s1", "backup", &[])).unwrap();
    let full = d.ask(&users(3)).unwrap_err();
    assert!(full.to_string().starts_with("2 requests wait in the queue, which is the most"), "{full}");
    d.finish("s0-1");
    // s1 came before nobody it shares with; s4 goes, s1 waits for the user
    assert_eq!(d.turns(), ["s4-1"]);
    assert_eq!(d.world.place_in_queue("s1-1", d.limits).unwrap().1, "session s2-1 (preflight) has user u2");
    // who would overtake it for one of its users waits behind it
    let behind = d.world.admit_now(&request("s0", "main", &["u1"]), d.limits, 9).unwrap_err();
    assert_eq!(behind, RequestError::Behind { service: "s0".into(), waiting: "s1-1".into() });
    d.finish("s2-1");
    assert_eq!(d.turns(), ["s1-1"]);
}

#[test]
fn what_cannot_be_any_more_leaves_and_is_remembered() {
    let mut d = Desk::new(4, 10);
    d.ask(&request("s0", "backup", &[])).unwrap();
    d.ask(&request("s0", "backup", &[])).unwrap();
    d.finish("s0-1");
    assert_eq!(d.turns(), [""; 0]);
    assert!(d.waiting().is_empty());
    let Leaving::Refused { reason } = &d.world.left["s0-2"].why else { panic!() };
    assert!(reason.contains("service s0 is at site backup already"), "{reason}");
    // its name is not given again
    assert_eq!(d.ask(&request("s0", "main", &[])).unwrap(), "s0-3");
    // a request that never can be is not queued
    assert!(matches!(d.ask(&request("s9", "main", &[])), Err(RequestError::UnknownService { .. })));
}

#[test]
fn who_is_behind_is_not_judged_by_where_the_service_is_now() {
    let mut d = Desk::new(1, 10);
    d.ask(&request("s2", "backup", &[])).unwrap();
    d.ask(&request("s0", "backup", &[])).unwrap();
    // s0 is at main still, but will not be
    d.ask(&request("s0", "main", &[])).unwrap();
    assert!(matches!(d.ask(&request("s0", "nowhere", &[])), Err(RequestError::UnknownSite { .. })));
    assert_eq!(d.turns(), [""; 0]);
    assert_eq!(d.waiting(), ["s0-1", "s0-2"]);
    d.finish("s2-1");
    assert_eq!(d.turns(), ["s0-1"]);
    d.finish("s0-1");
    assert_eq!(d.turns(), ["s0-2"]);
}

#[test]
fn records_that_contradict_the_queue_are_refused() {
    let mut d = Desk::new(4, 10);
    d.ask(&request("s0", "backup", &[])).unwrap();
    let queued = Record::Queued { id: "s0-1".into(), request: request("s0", "backup", &[]), at_ms: 0 };
    assert_eq!(d.world.apply(&queued), Err(WorldError::Taken { id: "s0-1".into() }));
    let left = Record::Left { id: "s0-1".into(), why: Leaving::Cancelled { by: "me".into() } };
    assert_eq!(d.world.apply(&left), Err(WorldError::NotQueued { id: "s0-1".into() }));
}

proptest! {
    /// Whatever is asked, cancelled, finished and refused in whatever order, the rules hold after each step, a restart finds
    /// the same, and in the end nobody waits.
    #[test]
    fn the_rules_hold(
        at_once in 1_usize..4,
        steps in proptest::collection::vec((0_u8..5, any::<u8>(), any::<u8>()), 1..60),
    ) {
        let mut d = Desk::new(at_once, 8);
        for (kind, a, b) in steps {
            match kind {
                0 | 1 => {
                    let n = usize::from(a) % SERVICES;
                    let to = if b & 1 == 0 { "backup" } else { "main" };
                    let users = if b & 2 == 0 { vec![] } else { vec![format!("u{n}")] };
                    let users: Vec<&str> = users.iter().map(String::as_str).collect();
                    // refusals are part of it
                    let _ = d.ask(&request(&format!("s{n}"), to, &users));
                }
                2 | 3 => {
                    let running = d.under_way();
                    if !running.is_empty() {
                        let id = running[usize::from(a) % running.len()].clone();
                        if b & 3 == 0 { d.finish(&id) } else { d.answer(&id, b & 12 == 0) }
                    }
                }
                _ if !d.world.queue.is_empty() => {
                    let id = d.world.queue[usize::from(a) % d.world.queue.len()].id.clone();
                    d.put(Record::Left { id, why: Leaving::Cancelled { by: "me".into() } });
                }
                _ => {}
            }
            let before = d.world.queue.clone();
            for id in d.turns() {
                let i = before.iter().position(|w| w.id == id).unwrap();
                let mine = &d.world.sessions[&id].plan;
                for earlier in before[..i].iter().filter(|w| d.waiting().contains(&w.id.as_str())) {
                    prop_assert_ne!(&earlier.request.service, &mine.service);
                    let theirs = d.world.users_wanted(&earlier.request);
                    prop_assert!(mine.users().all(|u| !theirs.contains(u)), "{} overtook {}", id, earlier.id);
                }
            }
            prop_assert!(d.world.running() <= at_once);
            prop_assert!(d.world.queue.len() <= 8);
            let running = d.under_way();
            let mut services: Vec<&str> =
                running.iter().map(|id| d.world.sessions[id].plan.service.as_str()).collect();
            services.sort_unstable();
            prop_assert!(services.windows(2).all(|w| w[0] != w[1]), "{:?}", services);
            let mut users: Vec<&str> =
                running.iter().flat_map(|id| d.world.sessions[id].plan.users()).collect();
            users.sort_unstable();
            prop_assert!(users.windows(2).all(|w| w[0] != w[1]), "{:?}", users);
            let mut again = World::default();
            for record in &d.records {
                let text = serde_json::to_string(record).unwrap();
                again.apply(&serde_json::from_str(&text).unwrap()).unwrap();
            }
            prop_assert_eq!(&again, &d.world);
        }
        while let Some(id) = d.under_way().first().cloned() {
            d.finish(&id);
            d.turns();
        }
        prop_assert!(d.world.queue.is_empty(), "{:?}", d.waiting());
    }
}
