//! `handover-gateway debug USER`: what becomes of each of a user's frames, a line for each; with `-o json` an object.

use std::{
    fmt::Write as _,
    io::{self, ErrorKind, Write as _},
};

use anyhow::anyhow;
use handover_api::{
    tls::Tls,
    v1::{self, gateway_events_client::GatewayEventsClient},
};
use handover_gateway::config::Config;
use serde_json::{Value, json};

use crate::ask::{Output, connect};

/// Looks on and prints.
#[tokio::main(flavor = "current_thread")]
pub async fn debug(
    config: &Config,
    tls: &Tls,
    user: &str,
    seconds: u32,
    output: Output,
) -> anyhow::Result<()> {
    let refused = |status: tonic::Status| anyhow!("gateway {}: {}", config.name, status.message());
    let mut client = GatewayEventsClient::new(connect(config, tls).await?);
    let request = v1::DebugRequest { user: user.into(), seconds };
    let mut frames = client.debug(request).await.map_err(refused)?.into_inner();
    loop {
        let frame = tokio::select! {
            frame = frames.message() => frame.map_err(refused)?,
            _ = tokio::signal::ctrl_c() => return Ok(()),
        };
        let Some(frame) = frame else { return Ok(()) };
        let text = match output {
            Output::Json => to_json(&frame).to_string(),
            Output::Table => to_text(&frame),
        };
        let mut out = io::stdout().lock();
        match writeln!(out, "{text}").and_then(|()| out.flush()) {
            // a reader that has gone away
            Err(e) if e.kind() == ErrorKind::BrokenPipe => return Ok(()),
            result => result?,
        }
    }
}

fn to_json(f: &v1::DebugFrame) -> Value {
    json!({
        "at_ns": f.at_ns, "side": f.side, "interface": f.interface, "outcome": f.outcome, "meaning": f.meaning,
        "length": f.length, "before": hex(&f.before), "after": hex(&f.after), "lost": f.lost,
    })
}

fn to_text(f: &v1::DebugFrame) -> String {
    let at = format!("{}.{:06} s", f.at_ns / 1_000_000_000, f.at_ns / 1000 % 1_000_000);
    let changed = if f.before == f.after { String::new() } else { format!("  =>  {}", head(&f.after)) };
    let lost = if f.lost > 0 { format!("  ({} lost)", f.lost) } else { String::new() };
    format!("{at}  {:<9} {:<22} {:>5}  {}{changed}{lost}", f.interface, f.outcome, f.length, head(&f.before))
}

fn hex(octets: &[u8]) -> String {
    octets.iter().fold(String::new(), |mut text, octet| {
        // a String takes everything
        let _ = write!(text, "{octet:02x}");
        text
    })
}

/// Addresses, tags and EtherType, as far as they are there.
fn head(octets: &[u8]) -> String {
    let mac = |at: usize| {
        let six = octets.get(at..at + 6)?;
        Some(six.iter().map(|o| format!("{o:02x}")).collect::<Vec<_>>().join(":"))
    };
    let (Some(dst), Some(src)) = (mac(0), mac(6)) else { return hex(octets) };
    let half = |at: usize| Some(u16::from_be_bytes(octets.get(at..at + 2)?.try_into().ok()?));
    let mut text = format!("{src} > {dst}");
    for at in [12, 16, 20] {
        match (half(at), half(at + 2)) {
            (Some(tpid @ (0x8100 | 0x88a8)), Some(tci)) => {
                let _ = write!(text, " {tpid:04x} vid {} pcp {}", tci & 0xfff, tci >> 13);
            }
            (Some(ethertype), _) => {
                let _ = write!(text, " {ethertype:04x}");
                break;
            }
            (None, _) => break,
        }
    }
    text
}
