//! `handover status`: where everything is.

use comfy_table::Cell;
use handover_api::v1;

use crate::{
    connect::Where,
    failure::{Exit, Refused},
    output::{self, Format, table, verdict},
};

/// Shows where services and users are, and whether gateways and migrators can be reached.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// # Errors
/// The controller cannot be asked.
pub async fn run(_: Args, to: &Where, format: Format) -> anyhow::Result<Exit> {
    let status = to.connect().await?.status(v1::StatusRequest {}).await.map_err(Refused::from)?.into_inner();
    if format == Format::Json {
        output::print_json(&serde_json::to_value(&status)?)?;
        return Ok(Exit::Done);
    }
    if status.revision == 0 {
        eprintln!("no inventory yet: `handover apply -f FILE`");
        return Ok(Exit::Done);
    }
    let or_dash = |s: &str| if s.is_empty() { "-".to_owned() } else { s.to_owned() };
    let services = status.services.iter().map(|s| {
        let pid = if s.pid == 0 { "-".to_owned() } else { s.pid.to_string() };
        [s.name.clone(), s.address.clone(), s.site.clone(), s.server.clone(), pid, or_dash(&s.session)]
            .map(Cell::new)
            .to_vec()
    });
    let users = status.users.iter().map(|u| [&u.name, &u.network, &u.gateway].map(Cell::new).to_vec());
    let peers = status.peers.iter().map(|p| {
        vec![
            Cell::new(&p.role),
            Cell::new(&p.name),
            Cell::new(&p.endpoint),
            verdict(if p.reachable { "yes" } else { "no" }),
            Cell::new(&p.detail),
        ]
    });
    let tables = [
        table(&["SERVICE", "ADDRESS", "SITE", "SERVER", "PID", "SESSION"], &[4], services.collect()),
        table(&["USER", "NETWORK", "GATEWAY"], &[], users.collect()),
        table(&["PEER", "NAME", "ENDPOINT", "REACHABLE", "DETAIL"], &[], peers.collect()),
    ];
    output::print(&tables.join("\n\n"))?;
    Ok(Exit::Done)
}
