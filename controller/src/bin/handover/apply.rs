//! `handover apply`: declares the inventory.

use std::path::PathBuf;

use anyhow::{Context as _, anyhow};
use handover_api::v1;
use handover_controller::inventory::{self, InventoryError};
use serde_json::json;

use crate::{
    connect::Where,
    failure::{Exit, Refused},
    output::{self, Format},
};

/// Declares services, sites, servers, networks, users and gateways. Nothing that is running is moved by it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    handover apply -f inventory.toml --dry-run   show what would change\n  \
    handover apply -f inventory.toml\n\n\
    Prints one line per change: `+ user taro`, `- user jiro`, `~ network net2: vid 2 -> 3`.")]
pub struct Args {
    /// The inventory, TOML.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Only show what would change.
    #[arg(long)]
    dry_run: bool,
}

/// # Errors
/// The file cannot be used, or the controller refuses it.
pub async fn run(args: Args, to: &Where, format: Format) -> anyhow::Result<Exit> {
    let file = args.file.display().to_string();
    let text = std::fs::read_to_string(&args.file).with_context(|| format!("inventory {file}"))?;
    // checked here too: an error names the file, and is found without a controller
    inventory::parse(&text).map_err(|e| wrong(&file, &e))?;
    let request = v1::ApplyRequest { inventory: text, dry_run: args.dry_run };
    let answer = to.connect().await?.apply(request).await.map_err(Refused::from)?.into_inner();
    let (notes, changes): (Vec<_>, Vec<_>) = answer.changes.iter().partition(|c| c.starts_with("! "));
    for note in &notes {
        eprintln!("warning: {}", note.trim_start_matches("! "));
    }
    match format {
        Format::Json => {
            let notes: Vec<_> = notes.iter().map(|n| n.trim_start_matches("! ")).collect();
            output::print_json(&json!({
                "revision": answer.revision, "changes": changes, "warnings": notes, "dry_run": args.dry_run,
            }))?;
        }
        Format::Table => {
            for change in &changes {
                output::print(change)?;
            }
            match (changes.is_empty(), args.dry_run) {
                (true, _) => eprintln!("nothing to change: revision {} stays", answer.revision),
                (false, true) => eprintln!("dry run: nothing was changed"),
                (false, false) => eprintln!("applied: revision {}", answer.revision),
            }
        }
    }
    Ok(Exit::Done)
}

fn wrong(file: &str, error: &InventoryError) -> anyhow::Error {
    let lines: Vec<String> = error
        .problems
        .iter()
        .map(|p| {
            if p.line > 0 {
                format!("{file}:{}: {}", p.line, p.message)
            } else {
                format!("{file}: {}", p.message)
            }
        })
        .collect();
    anyhow!(lines.join("\n       "))
}
