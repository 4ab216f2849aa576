//! `handover migrate`: moves a service, its address and its users; and watching a session to its end.

use std::{
    collections::BTreeSet,
    io::{self, IsTerminal as _},
    time::Duration,
};

use clap::ValueEnum;
use handover_api::v1;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Status};

use crate::{
    connect::{Client, Where},
    failure::{Exit, Refused},
    output::{self, Format, ms},
};

/// For how long a controller that went away is looked for.
const COME_BACK: Duration = Duration::from_secs(30);

/// When the source gives up the right to go back alone.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Policy {
    /// As late as possible: trouble leaves the service where it is (maintenance, load).
    Late,
    /// With its vote: losing the source afterwards rolls forward.
    Disaster,
}

/// Moves a service, its address and its users to another site, connections alive.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    handover migrate film --to backup --dry-run           check and show the plan, touch nothing\n  \
    handover migrate film --to backup --wait              wait, show each step\n  \
    handover migrate film --to backup --user taro --wait  switch this user only\n  \
    handover migrate film --to main --wait --timeout 60   back again; exit 5 if it takes longer\n  \
    handover migrate film --to main --queue               wait for its turn if it cannot begin at once\n\n\
    With --wait the exit code is the outcome's: 0 completed, 1 refused, 3 rolled back and alive at the source,\n\
    5 still running, 6 needs an operator. Without, 0 says that it has begun.")]
pub struct Args {
    /// The service.
    service: String,
    /// The site it goes to.
    #[arg(long, value_name = "SITE")]
    to: String,
    /// Switch this user only; can be given more than once. Without: all users of the service.
    #[arg(long = "user", value_name = "USER")]
    users: Vec<String>,
    /// Wait for the outcome and show progress.
    #[arg(long)]
    wait: bool,
    /// Wait so long at most, seconds; the migration goes on.
    #[arg(long, value_name = "S", requires = "wait", value_parser = clap::value_parser!(u32).range(1..))]
    timeout: Option<u32>,
    /// If it cannot begin at once, because its service or a user is in another migration or as many as may be are under
    /// way, let it wait for its turn (`handover queue`). Without: refused then.
    #[arg(long)]
    queue: bool,
    /// Check everything and show the plan; touch nothing.
    #[arg(long, conflicts_with_all = ["wait", "queue"])]
    dry_run: bool,
    /// What trouble after the vote leads to.
    #[arg(long, value_enum, default_value_t = Policy::Late)]
    policy: Policy,
    /// Migrate though the service has connections of others than the users to switch; those break.
    #[arg(long)]
    allow_other_peers: bool,
    /// Do not keep the users' frames for the service at the gateways while it stands still: they are lost, and TCP sends
    /// them again when its timer says so.
    #[arg(long)]
    no_hold: bool,
}

/// # Errors
/// The controller cannot be asked or refuses the request.
pub async fn run(args: Args, to: &Where, format: Format) -> anyhow::Result<Exit> {
    let end = args.timeout.map(|s| Instant::now() + Duration::from_secs(s.into()));
    let policy = match args.policy {
        Policy::Late => v1::migrate_request::Policy::LateYield,
        Policy::Disaster => v1::migrate_request::Policy::Disaster,
    };
    let request = v1::MigrateRequest {
        service: args.service.clone(),
        to_site: args.to,
        users: args.users,
        dry_run: args.dry_run,
        policy: policy.into(),
        allow_other_peers: args.allow_other_peers,
        no_hold: args.no_hold,
        queue: args.queue,
        trigger: "operator".into(),
    };
    let mut client = to.connect().await?;
    let Ok(answer) = until(end, client.migrate(request)).await else {
        eprintln!(
            "timed out while service {} was still being checked; `handover sessions list` shows it",
            args.service
        );
        return Ok(Exit::TimedOut);
    };
    let answer = answer.map_err(Refused::from)?.into_inner();
    if args.dry_run {
        return dry_run(&answer, format);
    }
    let id = answer.session;
    if args.wait {
        return watch(client, to, &id, end, format).await;
    }
    if answer.queue_position > 0 {
        match format {
            Format::Json => output::print_json(&json!({
                "session": id, "queue_position": answer.queue_position, "waits_for": answer.waits_for,
            }))?,
            Format::Table => {
                output::print(&id)?;
                eprintln!(
                    "waits for its turn, number {} in the queue: {}; `handover queue` shows the order, `handover sessions \
                     cancel {id}` takes it out",
                    answer.queue_position, answer.waits_for
                );
            }
        }
        return Ok(Exit::Done);
    }
    if output::has_error(&answer.findings) {
        let session =
            client.get_session(v1::GetSessionRequest { session: id }).await.map_err(Refused::from)?;
        return finished(&session.into_inner(), format);
    }
    if !answer.findings.is_empty() {
        eprintln!("{}", output::findings_text(&answer.findings));
    }
    match format {
        Format::Json => output::print_json(&json!({
            "session": id, "findings": output::findings_json(&answer.findings),
        }))?,
        Format::Table => {
            output::print(&id)?;
            eprintln!("under way; `handover sessions watch {id}` waits for its outcome");
        }
    }
    Ok(Exit::Done)
}

fn dry_run(answer: &v1::MigrateResponse, format: Format) -> anyhow::Result<Exit> {
    let refused = output::has_error(&answer.findings);
    match format {
        Format::Json => output::print_json(&json!({
            "would_migrate": !refused, "findings": output::findings_json(&answer.findings), "plan": answer.plan,
        }))?,
        Format::Table => {
            if !answer.findings.is_empty() {
                output::print(&output::findings_text(&answer.findings))?;
                output::print("")?;
            }
            output::print(&answer.plan.join("\n"))?;
            eprintln!("dry run: nothing was touched{}", if refused { "; it would be refused" } else { "" });
        }
    }
    Ok(if refused { Exit::Error } else { Exit::Done })
}

/// The future's result, or `Err` when the time is up.
async fn until<T>(
    end: Option<Instant>,
    future: impl Future<Output = T>,
) -> Result<T, tokio::time::error::Elapsed> {
    match end {
        Some(end) => timeout_at(end, future).await,
        None => Ok(future.await),
    }
}

/// Follows a session to its outcome, showing progress; prints it. A controller that is restarted meanwhile is found again.
pub async fn watch(
    mut client: Client,
    to: &Where,
    id: &str,
    end: Option<Instant>,
    format: Format,
) -> anyhow::Result<Exit> {
    let mut progress = Progress::new();
    let mut last = None;
    let mut lost: Option<Instant> = None;
    loop {
        let Ok(followed) = until(end, follow(&mut client, id, &mut progress, &mut last)).await else {
            progress.end();
            let state = last.as_ref().map_or("unknown", |s: &v1::Session| s.state.as_str());
            eprintln!(
                "timed out: session {id} is still running ({state}); `handover sessions watch {id}` waits on"
            );
            if let (Some(session), Format::Json) = (&last, format) {
                output::print_json(&output::session_json(session)?)?;
            }
            return Ok(Exit::TimedOut);
        };
        match followed {
            Ok(Some(session)) => {
                progress.end();
                return finished(&session, format);
            }
            Err(status) if status.code() == Code::NotFound || status.code() == Code::PermissionDenied => {
                progress.end();
                return Err(Refused::from(status).into());
            }
            // the stream ended early: the controller has gone
            Ok(None) | Err(_) => {}
        }
        let since = *lost.get_or_insert_with(|| {
            progress.say("the controller does not answer; looking for it");
            Instant::now()
        });
        loop {
            if since.elapsed() > COME_BACK {
                progress.end();
                anyhow::bail!(
                    "the controller has not come back within {} s; session {id} goes on when it does: `handover sessions show {id}`",
                    COME_BACK.as_secs()
                );
            }
            if end.is_some_and(|e| Instant::now() >= e) {
                break; // the timeout is reported above
            }
            sleep(Duration::from_millis(500)).await;
            if let Ok(found) = to.connect().await {
                client = found;
                break;
            }
        }
    }
}

/// One stream: `Some` with the outcome, `None` if it ended before.
async fn follow(
    client: &mut Client,
    id: &str,
    progress: &mut Progress,
    last: &mut Option<v1::Session>,
) -> Result<Option<v1::Session>, Status> {
    let mut stream = client.watch_session(v1::GetSessionRequest { session: id.into() }).await?.into_inner();
    while let Some(session) = stream.message().await? {
        progress.show(&session);
        let over = session.outcome() != v1::Outcome::Running;
        *last = Some(session.clone());
        if over {
            return Ok(Some(session));
        }
    }
    Ok(None)
}

/// Prints a session that is over, says what it means, and gives the exit code.
fn finished(session: &v1::Session, format: Format) -> anyhow::Result<Exit> {
    match format {
        Format::Json => output::print_json(&output::session_json(session)?)?,
        Format::Table if session.outcome() == v1::Outcome::Refused && !session.findings.is_empty() => {
            output::print(&output::findings_text(&session.findings))?;
        }
        Format::Table => output::print(&output::session_text(session))?,
    }
    let v1::Session { id, service, from_site, from_server, to_site, to_server, .. } = session;
    for p in &session.pending {
        eprintln!("still to be confirmed, and retried: {p}");
    }
    Ok(match session.outcome() {
        v1::Outcome::Completed => {
            eprintln!("completed: {service} runs at {to_site} ({to_server})");
            Exit::Done
        }
        v1::Outcome::RolledBack => {
            eprintln!("rolled back: {service} runs at {from_site} ({from_server}) as before");
            eprintln!("step {} failed: {}", session.failed_step, session.reason);
            eprintln!("what to do: {}", advice(session));
            Exit::RolledBack
        }
        v1::Outcome::Refused if session.failed_step == "queue" => {
            eprintln!("{} before its turn, nothing was touched: {}", session.state, session.reason);
            Exit::Error
        }
        v1::Outcome::Refused => {
            eprintln!(
                "refused by preflight, nothing was touched: {service} runs at {from_site} ({from_server})"
            );
            Exit::Error
        }
        v1::Outcome::NeedsOperator => {
            eprintln!("session {id} needs an operator ({}): {}", session.state, session.reason);
            eprintln!("what to do: {}", advice(session));
            Exit::NeedsOperator
        }
        v1::Outcome::Running | v1::Outcome::Unspecified => Exit::TimedOut,
    })
}

fn advice(s: &v1::Session) -> String {
    let failed =
        s.steps.iter().find(|step| step.state == "failed").map_or("the daemon", |step| step.actor.as_str());
    let again = format!("`handover migrate {} --to {}`", s.service, s.to_site);
    match (s.outcome(), s.state.as_str(), s.failed_step.as_str()) {
        (v1::Outcome::NeedsOperator, "resuming", _) => {
            format!(
                "the decision is COMMIT: bring migrator {} back; it is asked until it resumes the service",
                s.to_server
            )
        }
        (v1::Outcome::NeedsOperator, "aborting", _) => {
            format!(
                "the decision is ABORT: bring migrator {} back; it is asked until the service runs there",
                s.from_server
            )
        }
        (v1::Outcome::NeedsOperator, ..) => {
            format!("see the log of migrator {}; if the service is gone, start it there", s.from_server)
        }
        (_, _, "stage" | "switch") => {
            format!("see that {failed} runs and can be reached (`handover status`), then {again}")
        }
        _ if failed == "controller" => again,
        _ => format!("see the log of {failed}; when the cause is gone, {again}"),
    }
}

/// Live progress on stderr: one line for each step that is over; on a terminal also what is under way.
struct Progress {
    shown: BTreeSet<(String, String)>,
    /// What was last said of its place in the queue.
    waits: String,
    spinner: Option<ProgressBar>,
}

impl Progress {
    fn new() -> Self {
        let spinner = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("  {spinner} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { shown: BTreeSet::new(), waits: String::new(), spinner }
    }

    fn say(&self, line: &str) {
        match &self.spinner {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    fn show(&mut self, session: &v1::Session) {
        if session.queue_position > 0 {
            let line = format!("number {} in the queue: {}", session.queue_position, session.waits_for);
            if self.waits != line {
                self.say(&format!("{} waits, {line}", session.id));
                self.waits = line;
            }
            return;
        }
        if self.shown.is_empty() && session.failed_step != "queue" {
            self.say(&format!(
                "session {}: {} from {} ({}) to {} ({})",
                session.id,
                session.service,
                session.from_site,
                session.from_server,
                session.to_site,
                session.to_server
            ));
        }
        for step in session.steps.iter().filter(|s| s.state != "running") {
            if self.shown.insert((step.name.clone(), step.actor.clone())) {
                let detail =
                    if step.detail.is_empty() { String::new() } else { format!("  {}", step.detail) };
                self.say(&format!(
                    "{:>10} ms  {:<10} {:<7} {}{detail}",
                    ms(step.started_us + step.took_us),
                    step.name,
                    step.state,
                    step.actor
                ));
            }
        }
        if let Some(bar) = &self.spinner {
            let running: Vec<String> = session
                .steps
                .iter()
                .filter(|s| s.state == "running")
                .map(|s| format!("{} ({})", s.name, s.actor))
                .collect();
            bar.set_message(running.join(", "));
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.spinner {
            bar.finish_and_clear();
        }
    }
}
