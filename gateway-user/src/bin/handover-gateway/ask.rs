//! `handover-gateway status|users|networks|switches`: asks the daemon of this configuration, over its local socket or, if it
//! has none, over TLS with the gateway's own certificate.

use std::{
    io::{self, ErrorKind, Write as _},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use clap::ValueEnum;
use comfy_table::{CellAlignment, Table, presets};
use handover_api::{
    tls::{Role, Tls},
    v1::{self, gateway_client::GatewayClient},
};
use handover_gateway::config::Config;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Table,
    /// For programs
    Json,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// What it is and what became of the frames.
    Status,
    /// Who is where.
    Users,
    /// The networks.
    Networks,
    /// The switches under way.
    Switches,
}

/// Asks and prints.
#[tokio::main(flavor = "current_thread")]
pub async fn ask(config: &Config, tls: &Tls, what: What, output: Output) -> anyhow::Result<()> {
    let channel = connect(config, tls).await?;
    // a full table of users is some 100 MB
    let mut client = GatewayClient::new(channel).max_decoding_message_size(256 << 20);
    let status = tokio::time::timeout(PATIENCE, client.status(v1::GatewayStatusRequest::default()))
        .await
        .map_err(|_| anyhow!("gateway {} did not answer within {} s", config.name, PATIENCE.as_secs()))?
        .map_err(|status| anyhow!("gateway {}: {}", config.name, status.message()))?
        .into_inner();
    let text = match output {
        Output::Json => serde_json::to_string_pretty(&to_json(what, &status))?,
        Output::Table => to_table(what, &status),
    };
    match writeln!(io::stdout(), "{text}") {
        // a reader that has gone away
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// The daemon of this configuration.
pub async fn connect(config: &Config, tls: &Tls) -> anyhow::Result<Channel> {
    match &config.socket {
        Some(path) => local(path).await,
        None => tls
            .connect(Role::Gateway, &config.name, &config.listen.to_string())
            .await
            .context("no gateway answers there: start the daemon of this configuration"),
    }
}

async fn local(path: &Path) -> anyhow::Result<Channel> {
    let shown = path.display();
    // connected here first: the reason why it fails is lost in the channel
    let stream = UnixStream::connect(path).await.map_err(|e| match e.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            anyhow!("nobody listens on the socket {shown}: start the daemon of this configuration")
        }
        ErrorKind::PermissionDenied => {
            anyhow!(
                "not allowed to use the socket {shown}: ask as a member of the group that owns it, or as root"
            )
        }
        _ => anyhow::Error::from(e).context(format!("socket {shown}")),
    })?;
    let mut stream = Some(stream);
    let path = path.to_owned();
    let connector = tower::service_fn(move |_| {
        let (first, path) = (stream.take(), path.clone());
        async move {
            match first {
                Some(stream) => Ok(TokioIo::new(stream)),
                None => UnixStream::connect(path).await.map(TokioIo::new),
            }
        }
    });
    Endpoint::from_static("http://gateway")
        .connect_with_connector(connector)
        .await
        .with_context(|| format!("socket {shown}"))
}

pub fn held_json(held: &v1::HoldFigures) -> Value {
    json!({
        "frames": held.frames, "bytes": held.bytes, "dropped_user_bound": held.dropped_user_bound,
        "dropped_memory": held.dropped_memory, "lost": held.lost, "late": held.late,
    })
}

pub fn held_text(held: &v1::HoldFigures) -> String {
    let mut text = format!("{} frames", held.frames);
    let others = [
        (held.dropped_user_bound + held.dropped_memory, "dropped"),
        (held.lost, "lost"),
        (held.late, "late"),
    ];
    for (frames, what) in others.into_iter().filter(|(frames, _)| *frames > 0) {
        text.push_str(&format!(", {frames} {what}"));
    }
    text
}

fn memory_text(hold: &v1::HoldMemory) -> String {
    format!(
        "{} KiB of {} MiB, {} KiB a user",
        hold.held_bytes.div_ceil(1 << 10),
        hold.memory_bytes >> 20,
        hold.per_user_bytes >> 10
    )
}

/// An empty text is nothing.
fn given(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

fn to_json(what: What, status: &v1::GatewayStatus) -> Value {
    match what {
        What::Status => json!({
            "name": status.name,
            "version": status.version,
            "boot_id": status.boot_id,
            "revision": status.revision,
            "pin_dir": given(&status.pin_dir),
            "interfaces": status.interfaces.iter().map(|i| json!({
                "role": i.role, "name": i.name, "attach_mode": i.attach_mode, "note": given(&i.note),
            })).collect::<Value>(),
            "networks": status.networks.len(),
            "users": status.users.len(),
            "hold": status.hold.as_ref().map(|h| json!({
                "memory_bytes": h.memory_bytes, "per_user_bytes": h.per_user_bytes, "held_bytes": h.held_bytes,
            })),
            "switches": status.switches.len(),
            "windows": windows_json(status),
            "counters": status.counters.iter().map(|c| (c.name.clone(), c.frames.into()))
                .collect::<serde_json::Map<_, _>>(),
        }),
        What::Users => status
            .users
            .iter()
            .map(|u| {
                json!({
                    "name": u.name, "mac": given(&u.mac), "interface": u.interface, "tag": u.tag,
                    "guard": u.guard, "addresses": u.addresses, "network": u.network,
                    "staged_by": given(&u.staged_by),
                })
            })
            .collect(),
        What::Networks => status
            .networks
            .iter()
            .map(|n| {
                json!({
                    "name": n.name, "vid": n.vid, "tpid": n.vid.map(|_| tpid_text(n.tpid)), "pcp": n.pcp,
                    "wan": n.wan, "router_address": given(&n.router_address),
                    "router_address6": given(&n.router_address6), "router_mac": given(&n.router_mac),
                    "router_changes": n.router_changes,
                })
            })
            .collect(),
        What::Switches => status.switches.iter().map(switch_json).collect(),
    }
}

/// A switch that is under way.
pub fn switch_json(s: &v1::SwitchStatus) -> Value {
    json!({
        "migration": s.migration, "state": s.state, "from": s.from_network, "to": s.to_network,
        "users": s.users, "switch": s.switch, "generation": s.generation,
        "window_ns": s.window_ns, "phase": s.phase, "held": s.held.as_ref().map(held_json),
    })
}

/// Switches by their window.
fn windows_json(status: &v1::GatewayStatus) -> Value {
    let windows = status.windows.clone().unwrap_or_default();
    json!({
        "max_ns": windows.max_ns,
        "buckets": windows.buckets.iter().map(|b| json!({ "up_to_ns": b.up_to_ns, "switches": b.switches }))
            .collect::<Value>(),
    })
}

fn windows_text(status: &v1::GatewayStatus) -> Option<String> {
    let windows = status.windows.as_ref().filter(|w| !w.buckets.is_empty())?;
    let rows = windows.buckets.iter().map(|b| vec![format!("{} ns", b.up_to_ns), b.switches.to_string()]);
    Some(format!(
        "{}\nlongest {} ns",
        lines(&["WINDOW UP TO", "SWITCHES"], &[0, 1], rows.collect()),
        windows.max_ns
    ))
}

fn to_table(what: What, status: &v1::GatewayStatus) -> String {
    match what {
        What::Status => {
            let pinned = given(&status.pin_dir).unwrap_or("no, the data path ends with the daemon");
            let revision = match status.revision {
                0 => "never configured".to_string(),
                revision => revision.to_string(),
            };
            let summary = lines(
                &[],
                &[],
                vec![
                    vec!["gateway".into(), format!("{}, version {}", status.name, status.version)],
                    vec!["revision".into(), revision],
                    vec!["pinned".into(), pinned.into()],
                    vec!["networks".into(), status.networks.len().to_string()],
                    vec!["users".into(), status.users.len().to_string()],
                    vec!["switches".into(), status.switches.len().to_string()],
                    vec!["held frames".into(), status.hold.as_ref().map_or_else(|| "-".into(), memory_text)],
                ],
            );
            let interfaces = status
                .interfaces
                .iter()
                .map(|i| vec![i.role.clone(), i.name.clone(), i.attach_mode.clone()])
                .collect();
            let counters: Vec<_> = status
                .counters
                .iter()
                .filter(|c| c.frames > 0)
                .map(|c| vec![c.name.clone(), c.frames.to_string()])
                .collect();
            let counters = if counters.is_empty() {
                "no frames yet".into()
            } else {
                lines(&["OUTCOME", "FRAMES"], &[1], counters)
            };
            let notes =
                status.interfaces.iter().filter_map(|i| Some(format!("\n{}: {}", i.name, given(&i.note)?)));
            format!(
                "{summary}\n\n{}{}\n\n{counters}",
                lines(&["SIDE", "INTERFACE", "ATTACHED"], &[], interfaces),
                notes.collect::<String>(),
            )
        }
        What::Users => {
            let row = |u: &v1::UserStatus| {
                let staged = given(&u.staged_by).unwrap_or("-").to_string();
                let mac = given(&u.mac).unwrap_or("any").to_string();
                let tag = u.tag.map_or_else(|| "-".into(), |tag| tag.to_string());
                let guard = if u.guard { "guarded" } else { "-" }.to_string();
                let (name, network, interface) = (u.name.clone(), u.network.clone(), u.interface.clone());
                vec![name, network, mac, interface, tag, u.addresses.join(" "), guard, staged]
            };
            lines(
                &["USER", "NETWORK", "MAC", "INTERFACE", "TAG", "ADDRESSES", "GUARD", "STAGED BY"],
                &[4],
                status.users.iter().map(row).collect(),
            )
        }
        What::Networks => {
            let row = |n: &v1::NetworkStatus| {
                let vid = n.vid.map_or_else(|| "untagged".into(), |vid| vid.to_string());
                let tpid = n.vid.map_or_else(|| "-".into(), |_| tpid_text(n.tpid));
                let pcp = n.pcp.map_or_else(|| "kept".into(), |pcp| pcp.to_string());
                let mac = given(&n.router_mac).unwrap_or("not known").to_string();
                let routers = [&n.router_address, &n.router_address6];
                let routers = routers.map(|a| given(a).map(str::to_owned)).into_iter().flatten();
                let routers = routers.collect::<Vec<_>>().join(" ");
                let changes = n.router_changes.to_string();
                vec![n.name.clone(), vid, tpid, pcp, n.wan.clone(), routers, mac, changes]
            };
            lines(
                &["NETWORK", "VID", "TPID", "PCP", "WAN", "ROUTER", "ROUTER MAC", "CHANGES"],
                &[1, 7],
                status.networks.iter().map(row).collect(),
            )
        }
        What::Switches => {
            let row = |s: &v1::SwitchStatus| {
                let window = s.window_ns.map_or_else(|| "-".into(), |ns| format!("{ns} ns"));
                vec![
                    s.migration.clone(),
                    s.state.clone(),
                    s.from_network.clone(),
                    s.to_network.clone(),
                    s.users.to_string(),
                    window,
                    s.phase.clone(),
                    s.held.as_ref().map_or_else(|| "-".into(), held_text),
                ]
            };
            let table = lines(
                &["MIGRATION", "STATE", "FROM", "TO", "USERS", "WINDOW", "PHASE", "HELD"],
                &[4, 5],
                status.switches.iter().map(row).collect(),
            );
            match windows_text(status) {
                None => table,
                Some(windows) => format!("{table}\n\n{windows}"),
            }
        }
    }
}

fn tpid_text(tpid: u32) -> String {
    format!("{tpid:#06x}")
}

/// Columns that line up; those in `right` to the right.
fn lines(header: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if !header.is_empty() {
        table.set_header(header);
    }
    table.add_rows(rows);
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&i) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}
