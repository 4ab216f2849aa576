//! The specification of the session: every state against every event, and what no history may contain.

use proptest::prelude::*;

use super::*;

fn side(site: &str, network: &str) -> Side {
    Side {
        site: site.into(),
        network: network.into(),
        server: format!("{site}-server"),
        migration: "10.254.0.5:7444".into(),
    }
}

fn plan(gateways: &[&str], policy: Policy) -> Arc<Plan> {
    Arc::new(Plan {
        id: "film-1".into(),
        service: "film".into(),
        address: "203.0.113.10".into(),
        target: Target::Pid(7),
        from: side("main", "net1"),
        to: side("backup", "net2"),
        gateways: gateways
            .iter()
            .map(|g| {
                let member = Member { name: format!("user-of-{g}"), addresses: vec!["10.1.0.100".into()] };
                ((*g).to_owned(), vec![member])
            })
            .collect(),
        policy,
        allow_other_peers: false,
        hold: Some(Hold { marker_port: 7446 }),
        trigger: "operator".into(),
        requested_at_ms: 1,
        findings: Vec::new(),
    })
}

fn finding(severity: Severity) -> Finding {
    Finding {
        severity,
        code: "pid-taken".into(),
        reporter: "migrator backup-server".into(),
        message: "pid 7 is taken".into(),
        remedy: "end it".into(),
    }
}

const TICKET: Ticket = Ticket { switch: 1, generation: 9 };

fn gateway(name: &str) -> Participant {
    Participant::Gateway(name.into())
}

fn tickets(of: &[&str]) -> BTreeMap<String, Ticket> {
    of.iter().map(|g| ((*g).to_owned(), TICKET)).collect()
}

/// Letters: S source, D destination, G gateway gw; small: retried in the background.
fn open(of: &str) -> Open {
    of.chars()
        .map(|c| {
            let participant = match c.to_ascii_uppercase() {
                'S' => Participant::Source,
                'D' => Participant::Destination,
                _ => gateway("gw"),
            };
            (participant, c.is_lowercase().then(|| "no answer".to_owned()))
        })
        .collect()
}

fn checked(severity: Severity) -> Event {
    Event::Checked { findings: vec![finding(severity)], pid: 7, memory_bytes: 1, sent_us: 0 }
}

fn failed(step: Step) -> Event {
    Event::Failed { step, part: None, actor: "x".into(), reason: "y".into(), sent_us: 0 }
}

fn undone(participant: Participant, alive: bool) -> Event {
    Event::Undone { participant, alive, held: None, sent_us: 0 }
}

fn unconfirmed(participant: Participant) -> Event {
    Event::Unconfirmed { participant, reason: "no answer".into() }
}

/// Every event of a session with one gateway, named as in the table's head.
fn events(plan: &Arc<Plan>) -> Vec<(&'static str, Event)> {
    let gw = || "gw".to_owned();
    vec![
        ("req", Event::Requested { plan: Arc::clone(plan) }),
        ("chk-ok", checked(Severity::Warning)),
        ("chk-err", checked(Severity::Error)),
        ("staged", Event::Staged { gateway: gw(), ticket: TICKET, sent_us: 0 }),
        ("prep", Event::Prepared { sent_us: 0 }),
        ("held", Event::Held { gateway: gw(), marker_sent: true, sent_us: 0 }),
        ("frozen", Event::Frozen { vote: Vote::default(), sent_us: 0 }),
        ("switched", Event::Switched { gateway: gw(), window_ns: 0, store_latency_ns: 0, sent_us: 0 }),
        ("yielded", Event::Yielded { sent_us: 0 }),
        ("failed", failed(Step::Stage)),
        ("cancel", Event::Cancelled { step: Step::Stage, by: "operator".into() }),
        ("COMMIT", Event::Decided { decision: Decision::Commit }),
        ("ABORT", Event::Decided { decision: Decision::Abort }),
        ("res-C", Event::Resolved { decision: Decision::Commit, by: "operator".into() }),
        ("res-A", Event::Resolved { decision: Decision::Abort, by: "operator".into() }),
        ("resumed", Event::Resumed { pid: 7, sent_us: 0 }),
        ("ended", Event::Ended { sent_us: 0 }),
        ("finished", Event::Finished { gateway: gw(), held: None, sent_us: 0 }),
        ("un-S", undone(Participant::Source, true)),
        ("un-Sdead", undone(Participant::Source, false)),
        ("un-D", undone(Participant::Destination, false)),
        ("un-G", undone(gateway("gw"), false)),
        ("late-S", unconfirmed(Participant::Source)),
        ("late-D", unconfirmed(Participant::Destination)),
        ("late-G", unconfirmed(gateway("gw"))),
    ]
}

/// The states, as the table names them.
fn states() -> Vec<(&'static str, State)> {
    let deciding = |decision, reach| State::Deciding { decision, reach };
    vec![
        ("New", State::New),
        ("Preflight", State::Preflight),
        ("Staging", State::Staging { tickets: tickets(&[]), prepared: false }),
        ("Staging+G", State::Staging { tickets: tickets(&["gw"]), prepared: false }),
        ("Staging+P", State::Staging { tickets: tickets(&[]), prepared: true }),
        ("Holding", State::Holding { tickets: tickets(&["gw"]), held: BTreeMap::new() }),
        ("Freezing", State::Freezing { tickets: tickets(&["gw"]), markers: ["gw".to_owned()].into() }),
        ("Switching", State::Switching { tickets: tickets(&["gw"]), switched: BTreeSet::new() }),
        ("Yielding", State::Yielding),
        ("Commit?", deciding(Decision::Commit, Reach::Frozen)),
        ("Abort?0", deciding(Decision::Abort, Reach::Nothing)),
        ("Abort?1", deciding(Decision::Abort, Reach::Staged)),
        ("Abort?2", deciding(Decision::Abort, Reach::Frozen)),
        ("Resuming", State::Resuming { stuck: None }),
        ("Resuming!", State::Resuming { stuck: Some("no answer".into()) }),
        ("Ending(SG)", State::Ending { open: open("SG") }),
        ("Ending(Sg)", State::Ending { open: open("Sg") }),
        ("Completed(sg)", State::Completed { open: open("sg") }),
        ("Completed(s)", State::Completed { open: open("s") }),
        ("Completed(g)", State::Completed { open: open("g") }),
        ("Completed()", State::Completed { open: open("") }),
        ("Ending(G)", State::Ending { open: open("G") }),
        ("Ending(S)", State::Ending { open: open("S") }),
        ("Ending(sG)", State::Ending { open: open("sG") }),
        ("Aborting1(SDG)", State::Aborting { frozen: false, open: open("SDG") }),
        ("Aborting2(SDG)", State::Aborting { frozen: true, open: open("SDG") }),
        ("Aborting2(Sdg)", State::Aborting { frozen: true, open: open("Sdg") }),
        ("Aborting2(sdg)", State::Aborting { frozen: true, open: open("sdg") }),
        ("Aborting2(sDG)", State::Aborting { frozen: true, open: open("sDG") }),
        ("Aborting2(DG)", State::Aborting { frozen: true, open: open("DG") }),
        ("RolledBack(dg)", State::RolledBack { open: open("dg") }),
        ("RolledBack()", State::RolledBack { open: open("") }),
        ("SourceDead(DG)", State::SourceDead { open: open("DG") }),
        ("Refused", State::Refused),
    ]
}

/// One line per state; `event -> state` for each event that can happen. Everything else is refused.
const TABLE: &str = "
    New             req -> Preflight
    Preflight       chk-ok -> Staging, chk-err -> Refused, failed -> Abort?0, cancel -> Abort?0
    Staging         staged -> Staging+G, prep -> Staging+P, failed -> Abort?1, cancel -> Abort?1
    Staging+G       prep -> Holding, failed -> Abort?1, cancel -> Abort?1
    Staging+P       staged -> Holding, failed -> Abort?1, cancel -> Abort?1
    Holding         held -> Freezing, failed -> Abort?1, cancel -> Abort?1
    Freezing        frozen -> Switching, failed -> Abort?2, cancel -> Abort?2
    Switching       switched -> Yielding, failed -> Abort?2, cancel -> Abort?2
    Yielding        yielded -> Commit?, failed -> Abort?2, cancel -> Abort?2
    Commit?         COMMIT -> Resuming, failed -> Abort?2
    Abort?0         ABORT -> RolledBack()
    Abort?1         ABORT -> Aborting1(SDG)
    Abort?2         ABORT -> Aborting2(SDG)
    Resuming        resumed -> Ending(SG), late-D -> Resuming!
    Resuming!       resumed -> Ending(SG), late-D -> Resuming!, res-C -> Ending(SG), res-A -> Aborting2(SDG)
    Ending(SG)      ended -> Ending(G), finished -> Ending(S), late-S -> Ending(sG), late-G -> Ending(Sg)
    Ending(Sg)      ended -> Completed(g), finished -> Ending(S), late-S -> Completed(sg), late-G -> Ending(Sg)
    Ending(sG)      ended -> Ending(G), finished -> Completed(s), late-S -> Ending(sG), late-G -> Completed(sg)
    Ending(G)       finished -> Completed(), late-G -> Completed(g)
    Ending(S)       ended -> Completed(), late-S -> Completed(s)
    Completed(sg)   ended -> Completed(g), finished -> Completed(s), late-S -> Completed(sg), late-G -> Completed(sg)
    Completed(s)    ended -> Completed(), late-S -> Completed(s)
    Completed(g)    finished -> Completed(), late-G -> Completed(g)
    Completed()
    Aborting1(SDG)  un-S -> Aborting1(DG), un-Sdead -> Aborting1(DG), un-D -> Aborting1(SG), un-G -> Aborting1(SD), \
                    late-S -> Aborting1(sDG), late-D -> Aborting1(SdG), late-G -> Aborting1(SDg)
    Aborting2(SDG)  un-S -> Aborting2(DG), un-Sdead -> SourceDead(DG), un-D -> Aborting2(SG), un-G -> Aborting2(SD), \
                    late-S -> Aborting2(sDG), late-D -> Aborting2(SdG), late-G -> Aborting2(SDg)
    Aborting2(Sdg)  un-S -> RolledBack(dg), un-Sdead -> SourceDead(dg), un-D -> Aborting2(Sg), un-G -> Aborting2(Sd), \
                    late-S -> Aborting2(sdg), late-D -> Aborting2(Sdg), late-G -> Aborting2(Sdg)
    Aborting2(sdg)  un-S -> RolledBack(dg), un-Sdead -> SourceDead(dg), un-D -> Aborting2(sg), un-G -> Aborting2(sd), \
                    late-S -> Aborting2(sdg), late-D -> Aborting2(sdg), late-G -> Aborting2(sdg), res-A -> RolledBack(dg)
    Aborting2(sDG)  un-S -> Aborting2(DG), un-Sdead -> SourceDead(DG), un-D -> Aborting2(sG), un-G -> Aborting2(sD), \
                    late-S -> Aborting2(sDG), late-D -> Aborting2(sdG), late-G -> Aborting2(sDg), res-A -> Aborting2(DG)
    Aborting2(DG)   un-D -> Aborting2(G), un-G -> Aborting2(D), late-D -> Aborting2(dG), late-G -> Aborting2(Dg)
    RolledBack(dg)  un-D -> RolledBack(g), un-G -> RolledBack(d), late-D -> RolledBack(dg), late-G -> RolledBack(dg)
    RolledBack()
    SourceDead(DG)  un-D -> SourceDead(G), un-G -> SourceDead(D), late-D -> SourceDead(dG), late-G -> SourceDead(Dg), \
                    res-A -> RolledBack(DG)
    Refused
";

/// A state as the table names it.
fn label(state: &State) -> String {
    let letters = |open: &Open| {
        let letter = |p: &Participant| match p {
            Participant::Source => 'S',
            Participant::Destination => 'D',
            Participant::Gateway(_) => 'G',
        };
        open.iter()
            .map(|(p, why)| if why.is_some() { letter(p).to_ascii_lowercase() } else { letter(p) })
            .collect::<String>()
    };
    match state {
        State::New => "New".into(),
        State::Preflight => "Preflight".into(),
        State::Staging { tickets, prepared } => {
            let g = if tickets.is_empty() { "" } else { "+G" };
            format!("Staging{g}{}", if *prepared { "+P" } else { "" })
        }
        State::Holding { .. } => "Holding".into(),
        State::Freezing { .. } => "Freezing".into(),
        State::Switching { .. } => "Switching".into(),
        State::Yielding => "Yielding".into(),
        State::Deciding { decision: Decision::Commit, .. } => "Commit?".into(),
        State::Deciding { decision: Decision::Abort, reach } => format!("Abort?{}", *reach as u8),
        State::Resuming { stuck } => format!("Resuming{}", if stuck.is_some() { "!" } else { "" }),
        State::Ending { open } => format!("Ending({})", letters(open)),
        State::Completed { open } => format!("Completed({})", letters(open)),
        State::Aborting { frozen, open } => {
            format!("Aborting{}({})", if *frozen { 2 } else { 1 }, letters(open))
        }
        State::RolledBack { open } => format!("RolledBack({})", letters(open)),
        State::SourceDead { open } => format!("SourceDead({})", letters(open)),
        State::Refused => "Refused".into(),
    }
}

#[test]
fn every_state_against_every_event() {
    let plan = plan(&["gw"], Policy::Late);
    let rows: BTreeMap<&str, BTreeMap<&str, &str>> = TABLE
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .map(|line| {
            let (state, cells) = line.split_once(' ').unwrap_or((line, ""));
            let cells = cells
                .split(',')
                .filter(|c| !c.trim().is_empty())
                .map(|c| c.split_once("->").expect("event -> state"))
                .map(|(e, s)| (e.trim(), s.trim()))
                .collect();
            (state, cells)
        })
        .collect();
    let (states, events) = (states(), events(&plan));
    assert_eq!(rows.len(), states.len(), "the table has every state, once");
    let mut pairs = 0;
    for (name, state) in &states {
        let row = &rows[name];
        for cell in row.keys() {
            assert!(events.iter().any(|(e, _)| e == cell), "{name}: no event {cell}");
        }
        for (event_name, event) in &events {
            let got = next(&plan, state, event).map(|s| label(&s)).ok();
            // letters stand in the table in the order S, D, G
            let want = row.get(event_name).map(|s| (*s).to_owned());
            assert_eq!(got, want, "{name} x {event_name}");
            pairs += 1;
        }
    }
    assert_eq!(pairs, states.len() * events.len());
}

#[test]
fn a_refused_event_changes_nothing_and_says_what_it_is() {
    let plan = plan(&["gw"], Policy::Late);
    let entry = Entry { at_us: 0, event: Event::Requested { plan } };
    let (mut session, commands) = Session::begin("film-1", entry).unwrap();
    assert_eq!(commands, [Command::Check].into());
    let before = session.clone();
    let err = session.apply(Entry { at_us: 1, event: Event::Resumed { pid: 1, sent_us: 0 } }).unwrap_err();
    assert_eq!(err.to_string(), "session film-1: `resumed` cannot happen in state `preflight`");
    assert_eq!(session, before);
    let err = Session::begin("film-1", Entry { at_us: 0, event: Event::Yielded { sent_us: 0 } }).unwrap_err();
    assert_eq!(err.to_string(), "session film-1: `yielded` cannot happen in state `new`");
}

#[test]
fn time_does_not_run_backwards() {
    let plan = plan(&[], Policy::Late);
    let entry = Entry { at_us: 5, event: Event::Requested { plan } };
    let (mut session, _) = Session::begin("film-1", entry).unwrap();
    let err = session.apply(Entry { at_us: 4, event: checked(Severity::Warning) }).unwrap_err();
    assert!(err.to_string().contains("before the last event at 5 us"), "{err}");
}

/// Applies events at 10, 20, 30 ... us; returns the commands each one started.
fn play(plan: &Arc<Plan>, events: Vec<Event>) -> (Session, Vec<BTreeSet<Command>>) {
    let entry = Entry { at_us: 0, event: Event::Requested { plan: Arc::clone(plan) } };
    let (mut session, first) = Session::begin("film-1", entry).unwrap();
    let mut commands = vec![first];
    for (i, event) in events.into_iter().enumerate() {
        commands.push(session.apply(Entry { at_us: 10 * (i as u64 + 1), event }).unwrap());
    }
    (session, commands)
}

#[test]
fn the_whole_sequence_with_two_gateways() {
    let plan = plan(&["a", "b"], Policy::Late);
    let g = |g: &str| g.to_owned();
    let (session, commands) = play(
        &plan,
        vec![
            checked(Severity::Warning),
            Event::Staged { gateway: g("b"), ticket: TICKET, sent_us: 0 },
            Event::Prepared { sent_us: 0 },
            Event::Staged { gateway: g("a"), ticket: TICKET, sent_us: 0 },
            Event::Held { gateway: g("b"), marker_sent: true, sent_us: 0 },
            Event::Held { gateway: g("a"), marker_sent: false, sent_us: 0 },
            Event::Frozen { vote: Vote::default(), sent_us: 0 },
            Event::Switched { gateway: g("a"), window_ns: 0, store_latency_ns: 0, sent_us: 0 },
            Event::Switched { gateway: g("b"), window_ns: 0, store_latency_ns: 0, sent_us: 0 },
            Event::Yielded { sent_us: 0 },
            Event::Decided { decision: Decision::Commit },
            Event::Resumed { pid: 7, sent_us: 0 },
            Event::Finished { gateway: g("b"), held: None, sent_us: 0 },
            Event::Ended { sent_us: 0 },
            Event::Finished { gateway: g("a"), held: None, sent_us: 0 },
        ],
    );
    let hold = |g: &str| Command::Hold(g.into(), TICKET.switch, TICKET.generation);
    let switch = |g: &str| Command::Switch(g.into(), TICKET.switch, TICKET.generation);
    let want: Vec<BTreeSet<Command>> = vec![
        [Command::Check].into(),
        [Command::Stage(g("a")), Command::Stage(g("b")), Command::Prepare].into(),
        [].into(),
        [].into(),
        [hold("a"), hold("b")].into(),
        [].into(),
        // the source waits for the marker that is under way only
        [Command::Freeze([g("b")].into())].into(),
        [switch("a"), switch("b")].into(),
        [].into(),
        [Command::Yield].into(),
        [Command::DecideCommit].into(),
        [Command::Resume].into(),
        [Command::End, Command::Finish(g("a")), Command::Finish(g("b"))].into(),
        [].into(),
        [].into(),
        [].into(),
    ];
    assert_eq!(commands, want);
    assert_eq!(session.state, State::Completed { open: Open::new() });
    assert_eq!(session.state.outcome(), Outcome::Completed);
}

#[test]
fn in_a_disaster_the_vote_is_the_yield() {
    let plan = plan(&["gw"], Policy::Disaster);
    let switching = State::Switching { tickets: tickets(&["gw"]), switched: BTreeSet::new() };
    let switched = Event::Switched { gateway: "gw".into(), window_ns: 0, store_latency_ns: 0, sent_us: 0 };
    let state = next(&plan, &switching, &switched).unwrap();
    assert_eq!(outstanding(&plan, &state), [Command::DecideCommit].into());
}

#[test]
fn without_users_to_switch_no_gateway_is_asked() {
    for (policy, then) in [(Policy::Late, Command::Yield), (Policy::Disaster, Command::DecideCommit)] {
        let (session, commands) = play(
            &plan(&[], policy),
            vec![
                checked(Severity::Warning),
                Event::Prepared { sent_us: 0 },
                Event::Frozen { vote: Vote::default(), sent_us: 0 },
            ],
        );
        assert_eq!(commands[1], [Command::Prepare].into());
        assert_eq!(session.outstanding(), [then].into());
    }
}

#[test]
fn nothing_is_held_where_nobody_wants_it() {
    let mut plan = Arc::unwrap_or_clone(plan(&["gw"], Policy::Late));
    plan.hold = None;
    let state = State::Staging { tickets: tickets(&["gw"]), prepared: false };
    let state = next(&plan, &state, &Event::Prepared { sent_us: 0 }).unwrap();
    assert_eq!(outstanding(&plan, &state), [Command::Freeze(BTreeSet::new())].into());
}

#[test]
fn a_plan_written_before_there_was_hold_is_read() {
    let plan = plan(&["gw"], Policy::Late);
    let mut old = serde_json::to_value(&*plan).unwrap();
    old.as_object_mut().unwrap().remove("hold");
    assert_eq!(
        serde_json::from_value::<Plan>(old).unwrap(),
        Plan { hold: None, ..Arc::unwrap_or_clone(plan) }
    );
}

#[test]
fn findings_of_the_plan_count_too() {
    let mut plan = Arc::unwrap_or_clone(plan(&["gw"], Policy::Late));
    plan.findings = vec![finding(Severity::Error)];
    assert_eq!(next(&plan, &State::Preflight, &checked(Severity::Warning)).unwrap(), State::Refused);
}

#[test]
fn a_service_that_is_neither_here_nor_there_needs_an_operator() {
    let aborting = State::Aborting { frozen: true, open: open("sDG") };
    assert_eq!(aborting.outcome(), Outcome::NeedsOperator);
    assert_eq!(State::Resuming { stuck: Some(String::new()) }.outcome(), Outcome::NeedsOperator);
    assert_eq!(State::SourceDead { open: open("") }.outcome(), Outcome::NeedsOperator);
    // it is not given up: the same commands stay outstanding, and their answers still count
    let plan = plan(&["gw"], Policy::Late);
    assert!(outstanding(&plan, &aborting).contains(&Command::Undo(Participant::Source)));
    let back =
        next(&plan, &State::Aborting { frozen: true, open: open("sdg") }, &undone(Participant::Source, true));
    assert_eq!(back.unwrap(), State::RolledBack { open: open("dg") });
}

/// A history of legal events chosen by `choices`.
fn history(plan: &Arc<Plan>, choices: &[u8]) -> (Vec<Entry>, Vec<BTreeSet<Command>>) {
    let entry = Entry { at_us: 0, event: Event::Requested { plan: Arc::clone(plan) } };
    let (mut session, first) = Session::begin("film-1", entry).unwrap();
    let mut commands = vec![first];
    let mut menu: Vec<Event> = events(plan).into_iter().map(|(_, e)| e).collect();
    // more chances to go on than to fail, so that every depth is reached
    menu.extend(events(plan).into_iter().filter(|(n, _)| *n != "failed" && *n != "chk-err").map(|(_, e)| e));
    for g in plan.gateways.keys().filter(|g| *g != "gw") {
        let g = || g.clone();
        menu.extend([
            Event::Staged { gateway: g(), ticket: TICKET, sent_us: 0 },
            Event::Switched { gateway: g(), window_ns: 0, store_latency_ns: 0, sent_us: 0 },
            Event::Held { gateway: g(), marker_sent: true, sent_us: 0 },
            Event::Finished { gateway: g(), held: None, sent_us: 0 },
            undone(Participant::Gateway(g()), false),
            unconfirmed(Participant::Gateway(g())),
        ]);
    }
    for (i, choice) in choices.iter().enumerate() {
        let legal: Vec<&Event> = menu.iter().filter(|e| session.check(e).is_ok()).collect();
        let Some(event) = legal.get(*choice as usize % legal.len().max(1)) else { break };
        let entry = Entry { at_us: i as u64 + 1, event: (*event).clone() };
        commands.push(session.apply(entry).unwrap());
    }
    (session.log, commands)
}

fn replay(log: &[Entry]) -> Session {
    let (mut session, _) = Session::begin("film-1", log[0].clone()).unwrap();
    for entry in &log[1..] {
        session.apply(entry.clone()).unwrap();
    }
    session
}

fn undoes(c: &Command) -> bool {
    matches!(c, Command::Undo(_) | Command::DecideAbort)
}

fn goes_on(c: &Command) -> bool {
    matches!(c, Command::Resume | Command::End | Command::Finish(_) | Command::DecideCommit)
}

proptest! {
    #[test]
    fn no_history_contradicts_its_decision(
        choices in proptest::collection::vec(any::<u8>(), 0..60),
        gateways in prop_oneof![Just(vec![]), Just(vec!["gw"]), Just(vec!["gw", "gw2", "gw3"])],
        disaster in any::<bool>(),
    ) {
        let plan = plan(&gateways, if disaster { Policy::Disaster } else { Policy::Late });
        let (log, commands) = history(&plan, &choices);
        let mut decision = None;
        for (entry, commands) in log.iter().zip(&commands) {
            if let Event::Decided { decision: d } = entry.event {
                prop_assert!(decision.is_none(), "decided twice");
                decision = Some(d);
            }
            if let Event::Resolved { decision: d, .. } = entry.event {
                // the one way to turn: an operator's word, and from COMMIT to ABORT only
                prop_assert!(decision == Some(d) || (decision, d) == (Some(Decision::Commit), Decision::Abort));
                decision = Some(d);
            }
            match decision {
                Some(Decision::Commit) => prop_assert!(!commands.iter().any(undoes), "{commands:?}"),
                Some(Decision::Abort) => prop_assert!(!commands.iter().any(goes_on), "{commands:?}"),
                None => prop_assert!(
                    !commands.iter().any(|c| c.confirmed_by().is_some()),
                    "nothing is resumed, ended, finished or undone without a decision: {commands:?}"
                ),
            }
        }
    }

    #[test]
    fn every_prefix_of_a_history_can_be_recovered(
        choices in proptest::collection::vec(any::<u8>(), 0..60),
        cut in any::<prop::sample::Index>(),
        disaster in any::<bool>(),
    ) {
        let plan = plan(&["gw"], if disaster { Policy::Disaster } else { Policy::Late });
        let (log, _) = history(&plan, &choices);
        let log = &log[..=cut.index(log.len())];
        let mut session = replay(log);
        let decided = log.iter().rev().find_map(|e| match e.event {
            Event::Decided { decision } | Event::Resolved { decision, .. } => Some(decision),
            _ => None,
        });
        let now = session.log.last().map_or(0, |e| e.at_us);
        if let Some(event) = session.recovery("the controller was restarted") {
            prop_assert_eq!(decided, None);
            session.apply(Entry { at_us: now, event }).unwrap();
        }
        // from here on the answers of reachable daemons alone bring it to an end
        let mut rounds = 0;
        while let Some(command) = session.outstanding().into_iter().next() {
            let event = match command {
                Command::DecideAbort => Event::Decided { decision: Decision::Abort },
                Command::Resume => Event::Resumed { pid: 7, sent_us: 0 },
                Command::End => Event::Ended { sent_us: 0 },
                Command::Finish(gateway) => Event::Finished { gateway, held: None, sent_us: 0 },
                Command::Undo(participant) => Event::Undone { participant, alive: true, held: None, sent_us: 0 },
                other => return Err(TestCaseError::fail(format!("recovery asks for {other:?}"))),
            };
            session.apply(Entry { at_us: now, event }).unwrap();
            rounds += 1;
            prop_assert!(rounds < 10);
        }
        let outcome = session.state.outcome();
        match decided {
            Some(Decision::Commit) => prop_assert_eq!(outcome, Outcome::Completed),
            Some(Decision::Abort) | None => prop_assert!(
                matches!(outcome, Outcome::RolledBack | Outcome::Refused | Outcome::NeedsOperator)
            ),
        }
        if decided.is_none() && !matches!(session.state, State::Refused) {
            prop_assert_eq!(outcome, Outcome::RolledBack);
        }
    }

    #[test]
    fn events_survive_the_journal(choices in proptest::collection::vec(any::<u8>(), 0..40)) {
        let (log, _) = history(&plan(&["gw"], Policy::Late), &choices);
        for entry in log {
            let text = serde_json::to_string(&entry).unwrap();
            prop_assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), entry);
        }
    }
}
