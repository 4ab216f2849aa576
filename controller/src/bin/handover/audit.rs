//! `handover audit`: who asked what.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comfy_table::Cell;
use handover_api::v1;

use crate::{
    connect::Where,
    failure::{Exit, Refused},
    output::{self, Format, ago, table, verdict},
};

/// Shows who asked the controller for what, and what came of it: everything that acts, and what was refused for who asked.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// So many of the last ones.
    #[arg(short = 'n', long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    last: u32,
}

/// # Errors
/// The controller cannot be asked.
pub async fn run(args: Args, to: &Where, format: Format) -> anyhow::Result<Exit> {
    let request = v1::ListAuditRequest { last: args.last };
    let answer = to.connect().await?.list_audit(request).await.map_err(Refused::from)?.into_inner();
    if answer.damaged > 0 {
        eprintln!("{} lines of the audit log are not as they were written", answer.damaged);
    }
    if format == Format::Json {
        output::print_json(&serde_json::to_value(&answer.entries)?)?;
        return Ok(Exit::Done);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let rows = answer.entries.iter().map(|e| {
        vec![
            Cell::new(e.seq),
            Cell::new(format!("{} ago", ago(now.saturating_sub(Duration::from_millis(e.at_ms))))),
            Cell::new(&e.peer),
            Cell::new(&e.call),
            Cell::new(&e.subject),
            verdict(&e.outcome),
            Cell::new(&e.reason),
        ]
    });
    let header = ["NUMBER", "WHEN", "WHO", "CALL", "SUBJECT", "OUTCOME", "REASON"];
    output::print(&table(&header, &[0], rows.collect()))?;
    Ok(Exit::Done)
}
