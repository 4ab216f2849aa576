//! `handover-gateway watch`: what happens, a line for each thing; with `-o json` a JSON object on each line.

use std::io::{self, ErrorKind, Write as _};

use anyhow::anyhow;
use handover_api::{
    tls::Tls,
    v1::{self, gateway_events_client::GatewayEventsClient, watch_event::What},
};
use handover_gateway::config::Config;
use serde_json::{Value, json};

use crate::ask::{Output, connect, held_json, held_text, switch_json};

/// Looks on and prints.
#[tokio::main(flavor = "current_thread")]
pub async fn watch(
    config: &Config,
    tls: &Tls,
    output: Output,
    count: Option<u64>,
    interval_ms: u32,
) -> anyhow::Result<()> {
    let refused = |status: tonic::Status| anyhow!("gateway {}: {}", config.name, status.message());
    let mut client = GatewayEventsClient::new(connect(config, tls).await?);
    let mut events = client.watch(v1::WatchRequest { interval_ms }).await.map_err(refused)?.into_inner();
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let event = tokio::select! {
            event = events.message() => event.map_err(refused)?,
            _ = tokio::signal::ctrl_c() => return Ok(()),
        };
        let Some(event) = event else {
            return Err(anyhow!("gateway {}: the daemon has ended", config.name));
        };
        let text = match output {
            Output::Json => to_json(&event).to_string(),
            Output::Table => to_text(&event),
        };
        let mut out = io::stdout().lock();
        match writeln!(out, "{text}").and_then(|()| out.flush()) {
            // a reader that has gone away
            Err(e) if e.kind() == ErrorKind::BrokenPipe => return Ok(()),
            result => result?,
        }
        left -= 1;
    }
    Ok(())
}

fn to_json(event: &v1::WatchEvent) -> Value {
    let (what, more) = match &event.what {
        Some(What::Change(c)) => (
            c.what.as_str(),
            json!({
                "migration": c.migration, "from": c.from_network, "to": c.to_network, "users": c.users,
                "names": c.names, "window_ns": c.window_ns, "held": c.held.as_ref().map(held_json),
                "detail": c.detail,
            }),
        ),
        Some(What::Traffic(t)) => (
            "frames",
            json!({
                "elapsed_ms": t.elapsed_ms, "held_bytes": t.held_bytes,
                "frames": t.frames.iter().map(|c| (c.name.clone(), c.frames.into()))
                    .collect::<serde_json::Map<_, _>>(),
                "switches": t.switches.iter().map(switch_json).collect::<Value>(),
            }),
        ),
        Some(What::Missed(missed)) => ("missed", json!({ "changes": missed })),
        // of a newer daemon
        None => ("unknown", json!({})),
    };
    let mut all = json!({ "at_ms": event.at_ms, "event": what });
    if let (Value::Object(all), Value::Object(more)) = (&mut all, more) {
        all.extend(more);
    }
    all
}

fn to_text(event: &v1::WatchEvent) -> String {
    let (what, mut parts) = match &event.what {
        Some(What::Change(c)) => (c.what.as_str(), change_parts(c)),
        Some(What::Traffic(t)) => ("frames", traffic_parts(t)),
        Some(What::Missed(missed)) => ("missed", vec![format!("{missed} changes: this reader is too slow")]),
        None => ("unknown", vec!["an event of a newer daemon".into()]),
    };
    parts.retain(|part| !part.is_empty());
    format!("{}  {what:<10}  {}", time_of_day(event.at_ms), parts.join("  "))
}

fn change_parts(c: &v1::Change) -> Vec<String> {
    let networks = match (c.from_network.as_str(), c.to_network.as_str()) {
        ("", _) => String::new(),
        (from, to) => format!("{from} -> {to}"),
    };
    let users = match (c.users, c.names.len()) {
        (0, _) => String::new(),
        (users, 0) => format!("{users} users"),
        (users, named) => {
            let others = if users as usize > named { ", ..." } else { "" };
            format!("{users} users ({}{others})", c.names.join(", "))
        }
    };
    let window = c.window_ns.map(|ns| format!("window {ns} ns")).unwrap_or_default();
    let held = c.held.as_ref().map(|held| format!("held {}", held_text(held))).unwrap_or_default();
    vec![c.migration.clone(), networks, users, window, held, c.detail.clone()]
}

fn traffic_parts(t: &v1::Traffic) -> Vec<String> {
    let mut parts: Vec<String> = t.frames.iter().map(|c| format!("{} +{}", c.name, c.frames)).collect();
    if parts.is_empty() {
        parts.push("none".into());
    }
    for s in t.switches.iter().filter(|s| s.phase != "forward") {
        let held = s.held.as_ref().map(held_text).unwrap_or_default();
        parts.push(format!("{} {}: {held}", s.migration, s.phase));
    }
    if t.held_bytes > 0 {
        parts.push(format!("{} KiB held", t.held_bytes.div_ceil(1 << 10)));
    }
    parts
}

/// UTC, to the millisecond.
fn time_of_day(at_ms: u64) -> String {
    let (s, ms) = (at_ms / 1000 % 86_400, at_ms % 1000);
    format!("{:02}:{:02}:{:02}.{ms:03}", s / 3600, s / 60 % 60, s % 60)
}
