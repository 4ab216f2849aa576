use super::*;
use crate::{
    inventory::{parse, tests::LAB},
    session::{Policy, Vote},
};

const MORE: &str = r#"[[user]]
name = "jiro"
gateway = "gw"
mac = "02:00:00:00:01:02"
addresses = ["10.1.0.101", "10.1.0.102"]
home = "main"
[[user]]
name = "saburo"
gateway = "gw"
mac = "02:00:00:00:01:03"
addresses = ["10.1.0.103"]
home = "backup"
[[service]]
name = "radio"
address = "203.0.113.11"
home = "main"
servers = { main = "main-server", backup = "backup-server" }
users = ["jiro"]
target = { pid = 99 }
[[service]]
name = "fixed"
address = "203.0.113.12"
home = "main"
servers = { main = "main-server" }
users = []
target = { pid = 98 }
"#;

fn inventory(text: &str) -> Arc<Inventory> {
    Arc::new(parse(text).unwrap())
}

fn world() -> World {
    let mut world = World::default();
    let inventory = inventory(&format!("{LAB}{MORE}"));
    world.apply(&Record::Applied { revision: 1, inventory }).unwrap();
    world
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

fn happen(world: &mut World, id: &str, event: Event) {
    let at_us = world.sessions.get(id).and_then(|s| s.log.last()).map_or(0, |e| e.at_us + 1);
    world.apply(&Record::Session { id: id.into(), entry: Entry { at_us, event } }).unwrap();
}

/// Requests and plays a session up to the given number of events.
fn play(world: &mut World, request: &Request, events: usize) -> String {
    let plan = Arc::new(world.plan(request, 5).unwrap());
    let id = plan.id.clone();
    let g = || "gw".to_owned();
    let ticket = crate::session::Ticket { switch: 1, generation: 1 };
    let script = [
        Event::Requested { plan },
        Event::Checked { findings: Vec::new(), pid: 41, memory_bytes: 0, sent_us: 0 },
        Event::Prepared { sent_us: 0 },
        Event::Staged { gateway: g(), ticket, sent_us: 0 },
        Event::Frozen { vote: Vote::default(), sent_us: 0 },
        Event::Switched { gateway: g(), window_ns: 0, store_latency_ns: 0, sent_us: 0 },
        Event::Yielded { sent_us: 0 },
        Event::Decided { decision: Decision::Commit },
        Event::Resumed { pid: 42, sent_us: 0 },
        Event::Ended { sent_us: 0 },
        Event::Finished { gateway: g(), held: None, sent_us: 0 },
    ];
    for event in script.into_iter().take(events) {
        happen(world, &id, event);
    }
    id
}

#[test]
fn requests_that_cannot_be_name_the_thing_and_the_way_out() {
    let mut w = world();
    let refuse = |w: &World, r: &Request| w.plan(r, 0).unwrap_err().to_string();
    assert_eq!(
        World::default().plan(&request("film", "backup", &[]), 0).unwrap_err().to_string(),
        "there is no service `film`; none is declared: `handover apply -f FILE`"
    );
    for (r, want) in [
        (request("flim", "backup", &[]), "there is no service `flim`; known: film, fixed, radio"),
        (request("film", "bakcup", &[]), "there is no site `bakcup`; known: backup, main"),
        (request("film", "backup", &["taor"]), "there is no user `taor`; known: jiro, saburo, taro"),
        (
            request("radio", "backup", &["taro"]),
            "user taro is none of the users of service radio (jiro); leave --user out to switch all of them",
        ),
        (
            request("fixed", "backup", &[]),
            "service fixed has no server at site backup, only at main; add one to `servers` of the service and apply",
        ),
        (
            request("film", "main", &[]),
            "service film is at site main already; `handover status` shows where everything is",
        ),
    ] {
        assert_eq!(refuse(&w, &r), want);
    }
    let id = play(&mut w, &request("film", "backup", &["taro"]), 3);
    assert_eq!(
        refuse(&w, &request("film", "backup", &[])),
        format!(
            "service film is in session {id} (staging); wait for it (`handover sessions watch {id}`), or ask with --queue"
        )
    );
    // another service at the same time is fine, the same user is not
    assert!(w.plan(&request("radio", "backup", &[]), 0).is_ok());
    play(&mut w, &request("radio", "backup", &[]), 1);
    assert_eq!(w.running(), 2);
    let mut w = world();
    play(&mut w, &request("film", "backup", &[]), 1);
    assert_eq!(
        refuse(&w, &request("radio", "backup", &[])),
        "user jiro is in session film-1 of service film (preflight); wait for it (`handover sessions watch film-1`), or ask with --queue"
    );
}

#[test]
fn only_users_on_the_sources_network_are_switched() {
    let w = world();
    let plan = w.plan(&request("film", "backup", &[]), 7).unwrap();
    assert_eq!((plan.id.as_str(), plan.requested_at_ms), ("film-1", 7));
    assert_eq!(plan.users_at("gw"), ["jiro", "taro"]);
    assert_eq!(plan.user_addresses(), ["10.1.0.101", "10.1.0.102", "10.1.0.100"]);
    assert_eq!((plan.from.network.as_str(), plan.to.network.as_str()), ("net1", "net2"));
    let codes: Vec<_> = plan.findings.iter().map(|f| (f.severity, f.code.as_str())).collect();
    assert_eq!(codes, [(Severity::Warning, "user-elsewhere")], "saburo is at the backup site already");
    assert!(plan.findings[0].message.contains("user saburo is on network net2 already"));

    let plan = w.plan(&request("film", "backup", &["taro"]), 0).unwrap();
    assert_eq!(plan.users().collect::<Vec<_>>(), ["taro"]);
    assert!(plan.findings.is_empty());
    let plan = w.plan(&request("film", "backup", &["saburo"]), 0).unwrap();
    assert!(plan.gateways.is_empty());
    assert_eq!(
        plan.findings.iter().map(|f| f.code.as_str()).collect::<Vec<_>>(),
        ["user-elsewhere", "no-users"]
    );
}

#[test]
fn a_named_user_on_a_third_network_is_an_error() {
    let third = "[[network]]\nname = \"net3\"\nvid = 3\nrouter_address = \"10.1.0.1\"\n[[site]]\nname = \"third\"\nnetwork = \"net3\"\n";
    let text = format!("{LAB}{MORE}{third}").replacen(
        "home = \"main\"\n[[service]]",
        "home = \"third\"\n[[service]]",
        1,
    );
    let mut w = World::default();
    w.apply(&Record::Applied { revision: 1, inventory: inventory(&text) }).unwrap();
    let plan = w.plan(&request("film", "backup", &["taro"]), 0).unwrap();
    assert_eq!(
        (plan.findings[0].severity, plan.findings[0].code.as_str()),
        (Severity::Error, "user-elsewhere")
    );
}

#[test]
fn a_service_and_its_users_move_by_the_decision_alone() {
    let mut w = world();
    let id = play(&mut w, &request("film", "backup", &["taro"]), 7);
    assert_eq!((w.services["film"].site.as_str(), w.users["taro"].as_str()), ("main", "net1"));
    happen(&mut w, &id, Event::Decided { decision: Decision::Commit });
    assert_eq!((w.services["film"].site.as_str(), w.users["taro"].as_str()), ("backup", "net2"));
    assert_eq!(w.users["jiro"], "net1");
    assert_eq!(w.services["film"].pid, 41);
    happen(&mut w, &id, Event::Resumed { pid: 42, sent_us: 0 });
    assert_eq!(w.services["film"].pid, 42);
    // applying an inventory that still says `home = "main"` moves nothing
    let text = format!("{LAB}{MORE}").replace("10.1.0.103", "10.1.0.104");
    w.apply(&Record::Applied { revision: 2, inventory: inventory(&text) }).unwrap();
    assert_eq!((w.services["film"].site.as_str(), w.users["taro"].as_str()), ("backup", "net2"));
}

#[test]
fn an_inventory_cannot_contradict_where_things_are() {
    let mut w = world();
    play(&mut w, &request("film", "backup", &[]), 11);
    assert_eq!(w.running(), 0);
    let check = |text: &str| w.check_apply(&parse(text).unwrap());
    let all = format!("{LAB}{MORE}");
    assert_eq!(check(&all).unwrap(), []);
    let against = check(&all.replacen(", backup = \"backup-server\"", "", 1)).unwrap_err();
    assert_eq!(
        against,
        [
            "service film runs at site backup on server backup-server: `servers` cannot say otherwise; migrate it to another site first"
        ]
    );
    let against = check(&all.replace("net2", "net4")).unwrap_err();
    assert!(
        against.contains(&"network net2 cannot be removed: user taro is on it; migrate the user's service to another site first".to_owned()),
        "{against:?}"
    );
    // removing what nobody needs is fine
    let radio = all.find("[[service]]\nname = \"radio\"").unwrap();
    let fixed = all.find("[[service]]\nname = \"fixed\"").unwrap();
    let changes = check(&format!("{}{}", &all[..radio], &all[fixed..])).unwrap();
    assert_eq!(changes.iter().map(ToString::to_string).collect::<Vec<_>>(), ["- service radio"]);
}

#[test]
fn a_record_out_of_order_is_refused_and_changes_nothing() {
    let mut w = world();
    let before = w.clone();
    let err = w.apply(&Record::Applied { revision: 3, inventory: Arc::default() }).unwrap_err();
    assert_eq!(err.to_string(), "inventory revision 3 follows revision 1");
    let entry = Entry { at_us: 0, event: Event::Yielded { sent_us: 0 } };
    let err = w.apply(&Record::Session { id: "film-1".into(), entry }).unwrap_err();
    assert_eq!(err.to_string(), "session film-1: `yielded` cannot happen in state `new`");
    let plan = Arc::new(w.plan(&request("film", "backup", &[]), 0).unwrap());
    let entry = Entry { at_us: 0, event: Event::Requested { plan } };
    let err = w.apply(&Record::Session { id: "other-1".into(), entry }).unwrap_err();
    assert_eq!(err.to_string(), "session other-1: its first event is a request of session film-1");
    assert_eq!(w, before);
}

#[test]
fn what_an_unreachable_gateway_owes_holds_the_service_back_while_it_is_declared() {
    let mut w = world();
    let id = play(&mut w, &request("film", "backup", &["taro"]), 4);
    let failed = Event::Failed {
        step: crate::session::Step::Freeze,
        part: None,
        actor: "migrator main-server".into(),
        reason: "no".into(),
        sent_us: 0,
    };
    happen(&mut w, &id, failed);
    happen(&mut w, &id, Event::Decided { decision: Decision::Abort });
    for participant in [Participant::Source, Participant::Destination] {
        happen(&mut w, &id, Event::Undone { participant, alive: true, held: None, sent_us: 0 });
    }
    let gw = Participant::Gateway("gw".into());
    happen(&mut w, &id, Event::Unconfirmed { participant: gw, reason: "no answer".into() });
    assert_eq!(w.unfinished(), [id.as_str()]);
    let err = w.plan(&request("film", "backup", &[]), 0).unwrap_err();
    assert!(matches!(err, RequestError::Pending { .. }), "{err}");
    let text = format!("{LAB}{MORE}").replace("\"gw\"", "\"gw2\"");
    assert!(w.check_apply(&parse(&text).unwrap()).is_ok(), "a session that is over holds no removal back");
    w.apply(&Record::Applied { revision: 2, inventory: inventory(&text) }).unwrap();
    assert_eq!(w.plan(&request("film", "backup", &[]), 0).unwrap().id, "film-2");
}
