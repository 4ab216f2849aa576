//! A session as people see it: its steps with times, its outcome, what is still to be confirmed. Derived from the
//! session's log alone, so it is the same after a restart.
//!
//! All times are microseconds since the request by the controller's clock. A daemon's own steps come as offsets from its
//! receipt of the call and are placed after the instant the call was sent, so they may stand too early by one way's
//! delay, never too late; `frozen_us` is therefore an upper bound.

use handover_api::v1;

use crate::{
    queue::{Leaving, Left, Waiting},
    session::{
        Command, Decision, Event, Finding, Held, Outcome, Participant, Plan, Session, Severity, State, Step,
        next,
    },
    world::World,
};

/// The names of the steps, in order, as in the table of the sequence.
pub const STEPS: [&str; 19] = [
    "request",
    "preflight",
    "stage",
    "prepare",
    "hold",
    "freeze",
    "quiet",
    "fence",
    "dump",
    "copy",
    "restore",
    "address",
    "switch",
    "yield",
    "decision",
    "resume",
    "end",
    "finish",
    "completed",
];

/// What would be done, one line per step.
pub fn plan_lines(plan: &Plan) -> Vec<String> {
    let users = |g: &str| plan.users_at(g).join(", ");
    let (a, b) = (&plan.from.server, &plan.to.server);
    let mut lines = Vec::new();
    for g in plan.gateways.keys() {
        lines.push(format!(
            "stage     gateway {g}: {} from {} to {}, invisible to traffic",
            users(g),
            plan.from.network,
            plan.to.network
        ));
    }
    lines.push(format!(
        "prepare   migrator {a}: find the process of {}, connect to {b}, reserve there",
        plan.service
    ));
    for g in plan.gateways.keys().filter(|_| plan.hold.is_some()) {
        lines.push(format!(
            "hold      gateway {g}: keeps what {} sends to {}, in order and bounded",
            users(g),
            plan.address
        ));
    }
    lines.push(format!(
        "freeze    migrator {a}: fence {}, dump, copy to {b}, restore there stopped; {} leaves {a}",
        plan.address, plan.address
    ));
    for g in plan.gateways.keys() {
        lines.push(format!("switch    gateway {g}: {} to {}, one store", users(g), plan.to.network));
    }
    lines.push(match plan.policy {
        crate::session::Policy::Late => {
            format!("yield     migrator {a}: gives up the right to go back alone")
        }
        crate::session::Policy::Disaster => {
            format!("yield     migrator {a}: already with its vote (policy disaster)")
        }
    });
    lines.push("decision  controller: COMMIT, durable; before it everything is undone on failure".into());
    lines.push(format!("resume    migrator {b}: fence off, the copy runs, {} is announced", plan.address));
    lines.push(format!("end       migrator {a}: the frozen original ends silently"));
    for g in plan.gateways.keys() {
        let sent_on = if plan.hold.is_some() { "what was held is sent on; " } else { "" };
        lines.push(format!(
            "finish    gateway {g}: {sent_on}{} is the only network of {}",
            plan.to.network,
            users(g)
        ));
    }
    lines
}

/// What an operator has to know before ending the doubt of a session: what is known, what will be done, what is risked.
///
/// # Errors
/// Why it cannot be resolved that way, in words.
pub fn account(session: &Session, decision: Decision) -> Result<Vec<String>, String> {
    let plan = &*session.plan;
    let (id, service) = (&plan.id, &plan.service);
    let (a, b) = (&plan.from.server, &plan.to.server);
    if session.state.outcome() != Outcome::NeedsOperator {
        return Err(format!(
            "session {id} is {}, which needs no operator; only a session whose outcome is `needs operator` is resolved by hand",
            session.state.name()
        ));
    }
    match (&session.state, decision) {
        (State::Resuming { stuck }, Decision::Commit) => Ok(vec![
            format!(
                "known:  COMMIT is durable. {b} has voted that it holds a restored copy of {service}; the users are switched to {}.",
                plan.to.network
            ),
            format!(
                "known:  {b} has not confirmed that the copy runs: {}.",
                stuck.as_deref().unwrap_or("no answer")
            ),
            format!("known:  the original stands frozen at {a}."),
            format!(
                "does:   takes your word that {service} runs at {b}; ends the original at {a}; finishes the switch."
            ),
            format!(
                "risk:   if {service} does not run at {b}, the original was the last copy, and its state is lost."
            ),
            format!(
                "first:  see with your own eyes that {service} answers at {} from {}.",
                plan.address, plan.to.site
            ),
        ]),
        (State::Resuming { stuck }, Decision::Abort) => Ok(vec![
            format!(
                "known:  COMMIT is durable, and nobody has undone anything. The original stands frozen at {a}."
            ),
            format!(
                "known:  {b} has not confirmed that the copy runs: {}. It may run all the same.",
                stuck.as_deref().unwrap_or("no answer")
            ),
            format!(
                "does:   turns back: the copy at {b} is discarded if it does not run yet, {service} goes on at {a}, the users go back to {}.",
                plan.from.network
            ),
            format!(
                "risk:   if the copy has been resumed at {b}, or {b} comes back and has, two copies of {service} run: data that both write is ruined."
            ),
            format!(
                "first:  switch {b} off, or cut it off from all networks, until its migrator has been resolved on the spot."
            ),
        ]),
        (State::SourceDead { .. }, Decision::Abort) => Ok(vec![
            format!(
                "known:  ABORT is durable. {a} says that the original of {service} does not run any more."
            ),
            format!(
                "does:   takes your word that {service} is taken care of at {a}; the session counts as rolled back."
            ),
            format!("risk:   as long as {service} is not started at {a}, nothing serves the users."),
            format!("first:  start {service} at {a} by hand."),
        ]),
        (State::Aborting { open, .. }, Decision::Abort) => Ok(vec![
            if session.log.iter().any(|e| matches!(e.event, Event::Decided { decision: Decision::Commit })) {
                format!("known:  an operator turned a COMMIT back; whether a copy runs at {b} is not known.")
            } else {
                "known:  ABORT is durable; the copy is not resumed anywhere.".to_owned()
            },
            format!(
                "known:  {a} has not confirmed that it has undone everything: {}.",
                open.get(&Participant::Source).and_then(Option::as_deref).unwrap_or("no answer")
            ),
            format!("does:   takes your word that {service} runs at {a}, and tells {a} nothing any more."),
            format!(
                "risk:   if {a} still holds {service} frozen, it stays so: nothing serves the users until its migrator is resolved on the spot."
            ),
            format!(
                "first:  see with your own eyes that {service} answers at {} from {}.",
                plan.address, plan.from.site
            ),
        ]),
        _ => Err(format!(
            "session {id} is decided ABORT: {b} may have discarded the copy already, so it cannot be committed any more; resolve it with --abort, or start {service} where you want it by hand"
        )),
    }
}

/// A request that waits, on the wire: place in the queue and why, and where the service is now.
pub fn waiting(w: &Waiting, place: Option<(usize, String)>, world: &World) -> v1::Session {
    let (position, waits_for) = place.unwrap_or_default();
    v1::Session {
        state: "waiting".into(),
        outcome: v1::Outcome::Running.into(),
        queue_position: u32::try_from(position).unwrap_or(u32::MAX),
        waits_for,
        ..requested(w, world)
    }
}

/// A request that left the queue without beginning, on the wire.
pub fn left(left: &Left, world: &World) -> v1::Session {
    let (state, reason) = match &left.why {
        Leaving::Cancelled { by } => ("cancelled", format!("{by} took it out of the queue")),
        Leaving::Refused { reason } => ("refused", reason.clone()),
    };
    v1::Session {
        state: state.into(),
        outcome: v1::Outcome::Refused.into(),
        failed_step: "queue".into(),
        reason,
        ..requested(&left.waiting, world)
    }
}

fn requested(w: &Waiting, world: &World) -> v1::Session {
    let servers = world.inventory.services.get(&w.request.service).map(|s| &s.servers);
    let server = |site: &String| servers.and_then(|s| s.get(site)).cloned().unwrap_or_default();
    let from = world.services.get(&w.request.service).map(|p| p.site.clone()).unwrap_or_default();
    v1::Session {
        id: w.id.clone(),
        service: w.request.service.clone(),
        from_server: server(&from),
        from_site: from,
        to_server: server(&w.request.to_site),
        to_site: w.request.to_site.clone(),
        users: w.request.users.clone(),
        trigger: w.request.trigger.clone(),
        requested_at_ms: w.at_ms,
        ..Default::default()
    }
}

/// A finding on the wire.
pub fn finding(f: &Finding) -> v1::Finding {
    let severity = match f.severity {
        Severity::Warning => v1::finding::Severity::Warning,
        Severity::Error => v1::finding::Severity::Error,
    };
    v1::Finding {
        severity: severity.into(),
        code: f.code.clone(),
        reporter: f.reporter.clone(),
        message: f.message.clone(),
        remedy: f.remedy.clone(),
    }
}

/// The session on the wire.
pub fn session(session: &Session) -> v1::Session {
    let plan = &*session.plan;
    let mut view = v1::Session {
        id: plan.id.clone(),
        service: plan.service.clone(),
        from_site: plan.from.site.clone(),
        to_site: plan.to.site.clone(),
        from_server: plan.from.server.clone(),
        to_server: plan.to.server.clone(),
        users: plan.users().map(str::to_owned).collect(),
        trigger: plan.trigger.clone(),
        state: session.state.name().into(),
        outcome: outcome(session.state.outcome()).into(),
        requested_at_ms: plan.requested_at_ms,
        findings: plan.findings.iter().map(finding).collect(),
        ..Default::default()
    };
    let mut at = State::New;
    let mut frozen_from = None;
    for entry in &session.log {
        let now = entry.at_us;
        let Ok(after) = next(plan, &at, &entry.event) else { break }; // never: the log was accepted
        take(&mut view, plan, &entry.event, now, &mut frozen_from);
        if after.outcome() != at.outcome() {
            let over = match after.outcome() {
                Outcome::Completed => Some("completed"),
                Outcome::RolledBack => Some("rolled-back"),
                Outcome::Running | Outcome::Refused | Outcome::NeedsOperator => None,
            };
            view.steps.extend(over.map(|name| step(name, "controller", now, now, "done", "")));
        }
        at = after;
    }
    running(&mut view, session);
    if view.reason.is_empty() {
        match &session.state {
            State::Resuming { stuck: Some(why) } => view.reason.clone_from(why),
            State::SourceDead { .. } => {
                view.reason =
                    format!("migrator {} says that the original does not run any more", plan.from.server);
            }
            State::Refused => view.reason = "preflight found what would make the migration fail".into(),
            _ => {}
        }
    }
    let undo =
        matches!(session.state, State::Aborting { .. } | State::RolledBack { .. } | State::SourceDead { .. });
    for (participant, why) in session.state.open().into_iter().flatten() {
        let what = match participant {
            _ if undo => "abort",
            Participant::Source => "end",
            Participant::Gateway(_) => "finish",
            Participant::Destination => "resume",
        };
        let why = why.as_ref().map_or(String::new(), |w| format!(" ({w})"));
        view.pending.push(format!("{}: {what}{why}", participant.name(plan)));
    }
    view
}

fn outcome(outcome: Outcome) -> v1::Outcome {
    match outcome {
        Outcome::Running => v1::Outcome::Running,
        Outcome::Completed => v1::Outcome::Completed,
        Outcome::RolledBack => v1::Outcome::RolledBack,
        Outcome::Refused => v1::Outcome::Refused,
        Outcome::NeedsOperator => v1::Outcome::NeedsOperator,
    }
}

fn step(name: &str, actor: &str, from: u64, to: u64, state: &str, detail: &str) -> v1::SessionStep {
    v1::SessionStep {
        name: name.into(),
        actor: actor.into(),
        started_us: from,
        took_us: to.saturating_sub(from),
        state: state.into(),
        detail: detail.into(),
    }
}

fn plural(n: u32, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// Adds what one event tells.
fn take(view: &mut v1::Session, plan: &Plan, event: &Event, now: u64, frozen_from: &mut Option<u64>) {
    let a = Participant::Source.name(plan);
    let b = Participant::Destination.name(plan);
    let gateway = |g: &str| format!("gateway {g}");
    let mut done = |name: &str, actor: &str, sent: u64, detail: &str| {
        view.steps.push(step(name, actor, sent, now, "done", detail));
    };
    match event {
        Event::Requested { .. } => done("request", &plan.trigger, now, ""),
        Event::Checked { findings, sent_us, .. } => {
            let errors =
                plan.findings.iter().chain(findings).filter(|f| f.severity == Severity::Error).count();
            let state = if errors > 0 { "failed" } else { "done" };
            let count = |n: usize, what| plural(u32::try_from(n).unwrap_or(u32::MAX), what);
            let detail = match (errors, view.findings.len() + findings.len()) {
                (0, 0) => String::new(),
                (0, warnings) => count(warnings, "warning"),
                (errors, _) => count(errors, "error"),
            };
            view.steps.push(step("preflight", "controller", *sent_us, now, state, &detail));
            view.findings.extend(findings.iter().map(finding));
            if errors > 0 {
                view.failed_step = "preflight".into();
            }
        }
        Event::Staged { gateway: g, sent_us, .. } => done("stage", &gateway(g), *sent_us, ""),
        Event::Prepared { sent_us } => done("prepare", &a, *sent_us, ""),
        Event::Held { gateway: g, sent_us, .. } => done("hold", &gateway(g), *sent_us, ""),
        Event::Frozen { vote, sent_us } => {
            done(
                "freeze",
                &a,
                *sent_us,
                &format!(
                    "{} KiB, {}",
                    vote.image_bytes.div_ceil(1024),
                    plural(vote.connections, "connection")
                ),
            );
            *frozen_from = Some(*sent_us);
            for s in &vote.steps {
                let from = sent_us + s.started_us;
                if s.name == "dump" {
                    *frozen_from = Some(from);
                }
                let actor = if s.name.starts_with("restore") { &b } else { &a };
                view.steps.push(step(&s.name, actor, from, from + s.took_us, "done", ""));
            }
            view.image_bytes = vote.image_bytes;
            view.connections = vote.connections;
            view.losses.clone_from(&vote.losses);
        }
        Event::Switched { gateway: g, window_ns, sent_us, .. } => {
            done("switch", &gateway(g), *sent_us, &format!("window {} us", window_ns.div_ceil(1000)));
            view.switch_window_ns = view.switch_window_ns.max(Some(*window_ns));
        }
        Event::Yielded { sent_us } => done("yield", &a, *sent_us, ""),
        Event::Failed { step: failed, part, actor, reason, sent_us } => {
            view.failed_step = part.clone().unwrap_or_else(|| failed.to_string());
            view.reason.clone_from(reason);
            let name = failed.to_string();
            // the decision to COMMIT that was not written is no step that ran
            if *failed != Step::Decision {
                let detail = part.as_ref().map_or_else(|| reason.clone(), |part| format!("{part}: {reason}"));
                view.steps.push(step(&name, actor, *sent_us, now, "failed", &detail));
            }
        }
        Event::Cancelled { step: under_way, by } => {
            view.failed_step = under_way.to_string();
            view.reason = format!("cancelled by {by}");
            view.steps.push(step("cancel", by, now, now, "done", ""));
        }
        Event::Decided { decision } => {
            let detail = match decision {
                Decision::Commit => "COMMIT",
                Decision::Abort => "ABORT",
            };
            view.steps.push(step("decision", "controller", now, now, "done", detail));
        }
        Event::Resolved { decision, by } => {
            let detail = match decision {
                Decision::Commit => "COMMIT, by an operator's word",
                Decision::Abort => "ABORT, by an operator's word",
            };
            view.steps.push(step("resolve", by, now, now, "done", detail));
        }
        Event::Resumed { sent_us, .. } => {
            durable(view, *sent_us);
            view.steps.push(step("resume", &b, *sent_us, now, "done", ""));
            view.frozen_us = frozen_from.map_or(0, |from| now.saturating_sub(from));
        }
        Event::Ended { sent_us } => done("end", &a, *sent_us, ""),
        Event::Finished { gateway: g, held, sent_us } => {
            done("finish", &gateway(g), *sent_us, &held.map_or(String::new(), |h| held_words(&h)));
            add_held(view, held.as_ref());
        }
        Event::Undone { participant, alive, held, sent_us } => {
            durable(view, *sent_us);
            let actor = participant.name(plan);
            for s in view
                .steps
                .iter_mut()
                .filter(|s| s.actor == actor && s.state == "done" && before_decision(&s.name))
            {
                s.state = "undone".into();
            }
            let detail = match held {
                Some(held) => held_words(held),
                None if *alive && *participant == Participant::Source => "the original runs".to_owned(),
                None => String::new(),
            };
            view.steps.push(step("abort", &actor, *sent_us, now, "done", &detail));
            add_held(view, held.as_ref());
        }
        Event::Unconfirmed { .. } => {}
    }
}

/// Whether a step of this name is undone by an abort.
fn before_decision(step: &str) -> bool {
    STEPS.iter().skip(2).take_while(|s| **s != "decision").any(|s| *s == step)
}

fn held_words(held: &Held) -> String {
    let mut words = vec![format!("{} held", plural(u32::try_from(held.frames).unwrap_or(u32::MAX), "frame"))];
    let not =
        [(held.dropped, "over the bound, dropped"), (held.lost, "lost with the daemon"), (held.late, "late")];
    words.extend(not.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")));
    words.join(", ")
}

fn add_held(view: &mut v1::Session, held: Option<&Held>) {
    let Some(held) = held else { return };
    let sum = |field: &mut Option<u64>, n: u64| *field = Some(field.unwrap_or(0) + n);
    sum(&mut view.held_frames, held.frames);
    sum(&mut view.held_dropped, held.dropped + held.lost);
    sum(&mut view.held_late, held.late);
}

/// The decision is journalled with the instant before it is written; it took until the first call that follows it left.
fn durable(view: &mut v1::Session, sent_us: u64) {
    if let Some(d) = view.steps.iter_mut().find(|s| s.name == "decision" && s.took_us == 0) {
        d.took_us = sent_us.saturating_sub(d.started_us);
    }
}

/// Adds the steps under way.
fn running(view: &mut v1::Session, session: &Session) {
    let plan = &*session.plan;
    let since = session.log.last().map_or(0, |e| e.at_us);
    for command in session.outstanding() {
        let (name, actor, why) = match &command {
            Command::Check => ("preflight", "controller".to_owned(), None),
            Command::Stage(g) => ("stage", format!("gateway {g}"), None),
            Command::Prepare => ("prepare", Participant::Source.name(plan), None),
            Command::Hold(g, ..) => ("hold", format!("gateway {g}"), None),
            Command::Freeze(_) => ("freeze", Participant::Source.name(plan), None),
            Command::Switch(g, ..) => ("switch", format!("gateway {g}"), None),
            Command::Yield => ("yield", Participant::Source.name(plan), None),
            Command::DecideCommit | Command::DecideAbort => ("decision", "controller".to_owned(), None),
            Command::Resume | Command::End | Command::Finish(_) | Command::Undo(_) => {
                let Some(participant) = command.confirmed_by() else { continue };
                let why = match &session.state {
                    State::Resuming { stuck } => stuck.clone(),
                    state => state.open().and_then(|o| o.get(&participant)).cloned().flatten(),
                };
                let name = match command {
                    Command::Resume => "resume",
                    Command::End => "end",
                    Command::Finish(_) => "finish",
                    _ => "abort",
                };
                (name, participant.name(plan), why)
            }
        };
        let mut running = step(name, &actor, since, since, "running", "");
        running.detail = why.map_or(String::new(), |w| format!("retried: {w}"));
        view.steps.push(running);
    }
}

#[cfg(test)]
mod tests;
