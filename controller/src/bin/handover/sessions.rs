//! `handover sessions`: migrations so far and under way.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comfy_table::Cell;
use handover_api::v1;

use crate::{
    connect::Where,
    failure::{Exit, Refused},
    migrate,
    output::{self, Format, ago, ms, table, verdict},
};

/// Migrations so far and under way.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:\n  \
    handover sessions list\n  \
    handover sessions show film-1\n  \
    handover sessions watch film-1   wait for its outcome; the exit code is that of `migrate --wait`\n  \
    handover sessions cancel film-1  give it up, or take it out of the queue; refused once it is decided")]
pub enum Verb {
    /// All of them, the oldest first.
    List,
    /// One of them: every step, its start and duration, who worked.
    Show {
        /// Its name, e.g. film-1.
        id: String,
    },
    /// Gives one up, as long as it is not decided: everything is undone, the service goes on where it was. One that waits
    /// is taken out of the queue.
    ///
    /// Ends with 0 once that is certain, and does not wait until all is undone; `--wait` does, with the exit code of
    /// `sessions watch` (3: rolled back, alive at the source). After the decision it is refused: a committed migration is
    /// finished, never undone.
    Cancel {
        /// Its name, e.g. film-1.
        id: String,
        /// Wait until everything is undone.
        #[arg(long)]
        wait: bool,
    },
    /// Ends the doubt of one that needs an operator (exit code 6), by your word.
    ///
    /// Says what is known, what will be done and what is risked; does it only with `--yes`. Ends with 1 without `--yes`.
    #[command(group = clap::ArgGroup::new("way").required(true).args(["commit", "abort"]))]
    Resolve {
        /// Its name, e.g. film-1.
        id: String,
        /// The service is at the destination.
        #[arg(long)]
        commit: bool,
        /// The service is, or goes back, at the source.
        #[arg(long)]
        abort: bool,
        /// The account was read, and what is to be done first has been done.
        #[arg(long)]
        yes: bool,
    },
    /// Follows one to its outcome.
    Watch {
        /// Its name, e.g. film-1.
        id: String,
    },
}

/// # Errors
/// The controller cannot be asked, or there is no such session.
pub async fn run(verb: Verb, to: &Where, format: Format) -> anyhow::Result<Exit> {
    let mut client = to.connect().await?;
    match verb {
        Verb::List => {
            let answer = client.list_sessions(v1::ListSessionsRequest {}).await.map_err(Refused::from)?;
            list(&answer.into_inner().sessions, format)?;
        }
        Verb::Show { id } => {
            let answer =
                client.get_session(v1::GetSessionRequest { session: id }).await.map_err(Refused::from)?;
            let session = answer.into_inner();
            match format {
                Format::Json => output::print_json(&output::session_json(&session)?)?,
                Format::Table => output::print(&output::session_text(&session))?,
            }
        }
        Verb::Cancel { id, wait } => {
            let request = v1::CancelSessionRequest { session: id.clone() };
            let session = client.cancel_session(request).await.map_err(Refused::from)?.into_inner();
            if wait {
                return migrate::watch(client, to, &id, None, format).await;
            }
            match format {
                Format::Table if session.failed_step == "queue" => {
                    eprintln!("{id} is taken out of the queue; nothing was touched");
                }
                Format::Json => output::print_json(&output::session_json(&session)?)?,
                Format::Table => eprintln!(
                    "session {id} is cancelled ({}): the service goes on at {}; `handover sessions watch {id}` waits until \
                     all is undone",
                    session.state, session.from_site
                ),
            }
        }
        Verb::Resolve { id, commit, abort: _, yes } => {
            use v1::resolve_session_request::Resolution;
            let resolution = if commit { Resolution::Commit } else { Resolution::Abort };
            let request = v1::ResolveSessionRequest {
                session: id.clone(),
                resolution: resolution.into(),
                confirmed: yes,
            };
            let answer = client.resolve_session(request).await.map_err(Refused::from)?.into_inner();
            for line in &answer.account {
                eprintln!("{line}");
            }
            if !yes {
                eprintln!("nothing was done; with --yes it is");
                return Ok(Exit::Error);
            }
            let session = answer.session.unwrap_or_default();
            match format {
                Format::Json => output::print_json(&output::session_json(&session)?)?,
                Format::Table => eprintln!("session {id} is resolved: {}", session.state),
            }
        }
        Verb::Watch { id } => return migrate::watch(client, to, &id, None, format).await,
    }
    Ok(Exit::Done)
}

/// Shows the requests that wait, in their order, and why each waits.
#[derive(Debug, clap::Args)]
pub struct QueueArgs {}

/// # Errors
/// The controller cannot be asked.
pub async fn queue(_: QueueArgs, to: &Where, format: Format) -> anyhow::Result<Exit> {
    let answer =
        to.connect().await?.list_sessions(v1::ListSessionsRequest {}).await.map_err(Refused::from)?;
    let mut waiting = answer.into_inner().sessions;
    waiting.retain(|s| s.queue_position > 0);
    waiting.sort_by_key(|s| s.queue_position);
    if format == Format::Json {
        let all = waiting.iter().map(output::session_json).collect::<anyhow::Result<Vec<_>>>()?;
        output::print_json(&all.into())?;
        return Ok(Exit::Done);
    }
    if waiting.is_empty() {
        eprintln!("nothing waits");
        return Ok(Exit::Done);
    }
    let rows = waiting.iter().map(|s| {
        vec![
            Cell::new(s.queue_position),
            Cell::new(&s.id),
            Cell::new(&s.service),
            Cell::new(&s.to_site),
            Cell::new(since(s.requested_at_ms)),
            Cell::new(&s.waits_for),
        ]
    });
    let header = ["NUMBER", "SESSION", "SERVICE", "TO", "ASKED", "WAITS FOR"];
    output::print(&table(&header, &[0], rows.collect()))?;
    Ok(Exit::Done)
}

fn since(at_ms: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{} ago", ago(now.saturating_sub(Duration::from_millis(at_ms))))
}

fn list(sessions: &[v1::Session], format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        let all = sessions.iter().map(output::session_json).collect::<anyhow::Result<Vec<_>>>()?;
        return output::print_json(&all.into());
    }
    if sessions.is_empty() {
        eprintln!("no sessions yet: `handover migrate SERVICE --to SITE`");
        return Ok(());
    }
    let rows = sessions.iter().map(|s| {
        vec![
            Cell::new(&s.id),
            Cell::new(&s.service),
            Cell::new(&s.from_site),
            Cell::new(&s.to_site),
            Cell::new(s.users.len()),
            verdict(output::outcome(s)),
            Cell::new(if s.frozen_us == 0 { "-".into() } else { ms(s.frozen_us) }),
            Cell::new(since(s.requested_at_ms)),
            Cell::new(if s.queue_position > 0 {
                format!("number {} in the queue: {}", s.queue_position, s.waits_for)
            } else if s.failed_step.is_empty() {
                s.pending.join("; ")
            } else {
                format!("{}: {}", s.failed_step, s.reason)
            }),
        ]
    });
    let header = ["SESSION", "SERVICE", "FROM", "TO", "USERS", "OUTCOME", "FROZEN (ms)", "REQUESTED", "NOTE"];
    output::print(&table(&header, &[4, 6], rows.collect()))
}
