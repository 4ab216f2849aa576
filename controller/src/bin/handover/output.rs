//! Tables that line up, JSON, and when there is colour: on a terminal only, and not with `NO_COLOR`.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use clap::ValueEnum;
use comfy_table::{Attribute, Cell, CellAlignment, Color, Table, presets};
use handover_api::v1::{self, finding::Severity};
use serde_json::{Value, json};

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Prints data. A reader that has gone away (`| head`) is no error.
pub fn print(text: &str) -> anyhow::Result<()> {
    match writeln!(io::stdout(), "{text}") {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// Prints JSON.
pub fn print_json(value: &Value) -> anyhow::Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}

fn colour() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// A table with a header; columns in `right` are aligned to the right.
pub fn table(header: &[&str], right: &[usize], rows: Vec<Vec<Cell>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let bold = colour();
    table.set_header(header.iter().map(|h| {
        let cell = Cell::new(h);
        if bold { cell.add_attribute(Attribute::Bold) } else { cell }
    }));
    table.add_rows(rows);
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&i) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|l| l.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// A cell whose colour says whether it is good.
pub fn verdict(text: &str) -> Cell {
    let cell = Cell::new(text);
    if !colour() {
        return cell;
    }
    match text {
        "done" | "completed" | "yes" => cell.fg(Color::Green),
        "failed" | "no" | "needs-operator" | "refused" => cell.fg(Color::Red),
        "undone" | "rolled-back" | "running" | "waiting" | "cancelled" => cell.fg(Color::Yellow),
        _ => cell,
    }
}

/// Microseconds as milliseconds.
pub fn ms(us: u64) -> String {
    format!("{}.{:03}", us / 1000, us % 1000)
}

/// A duration as people say it.
pub fn ago(d: Duration) -> String {
    match d.as_secs() {
        s @ 0..60 => format!("{s} s"),
        s @ 60..3600 => format!("{} min", s / 60),
        s @ 3600..86400 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86400),
    }
}

/// An outcome as people and programs see it.
pub fn outcome(session: &v1::Session) -> &'static str {
    match session.outcome() {
        _ if session.queue_position > 0 => "waiting",
        v1::Outcome::Refused if session.state == "cancelled" => "cancelled",
        v1::Outcome::Unspecified | v1::Outcome::Running => "running",
        v1::Outcome::Completed => "completed",
        v1::Outcome::RolledBack => "rolled-back",
        v1::Outcome::Refused => "refused",
        v1::Outcome::NeedsOperator => "needs-operator",
    }
}

fn severity(finding: &v1::Finding) -> &'static str {
    match finding.severity() {
        Severity::Error => "error",
        Severity::Warning | Severity::Unspecified => "warning",
    }
}

/// Whether one of them is an error.
pub fn has_error(findings: &[v1::Finding]) -> bool {
    findings.iter().any(|f| f.severity() == Severity::Error)
}

/// Findings as JSON.
pub fn findings_json(findings: &[v1::Finding]) -> Value {
    findings
        .iter()
        .map(|f| {
            json!({
                "severity": severity(f), "code": f.code, "reporter": f.reporter,
                "message": f.message, "remedy": f.remedy,
            })
        })
        .collect()
}

/// Findings for a person, two lines each.
pub fn findings_text(findings: &[v1::Finding]) -> String {
    let mut lines = Vec::new();
    for f in findings {
        lines.push(format!("{}: {} [{}, by {}]", severity(f), f.message, f.code, f.reporter));
        if !f.remedy.is_empty() {
            lines.push(format!("  way out: {}", f.remedy));
        }
    }
    lines.join("\n")
}

/// A session as JSON: the fields of the message, outcome and severities in words.
pub fn session_json(session: &v1::Session) -> anyhow::Result<Value> {
    let mut value = serde_json::to_value(session)?;
    value["outcome"] = outcome(session).into();
    value["findings"] = findings_json(&session.findings);
    Ok(value)
}

/// The steps of a session, in the order they began.
pub fn steps_table(session: &v1::Session) -> String {
    let mut steps: Vec<&v1::SessionStep> = session.steps.iter().collect();
    steps.sort_by_key(|s| s.started_us);
    let rows = steps.into_iter().map(|s| {
        // everything else is a part that a daemon named, inside the call before it
        let inner = !OUTER.contains(&s.name.as_str());
        vec![
            Cell::new(if inner { format!("  {}", s.name) } else { s.name.clone() }),
            Cell::new(&s.actor),
            Cell::new(ms(s.started_us)),
            Cell::new(if s.state == "running" { "-".into() } else { ms(s.took_us) }),
            verdict(&s.state),
            Cell::new(&s.detail),
        ]
    });
    table(&["STEP", "BY", "START (ms)", "TOOK (ms)", "STATE", "DETAIL"], &[2, 3], rows.collect())
}

/// Steps that are a call or an act of the controller's own.
const OUTER: [&str; 17] = [
    "request",
    "preflight",
    "stage",
    "prepare",
    "hold",
    "freeze",
    "switch",
    "yield",
    "decision",
    "resume",
    "end",
    "finish",
    "abort",
    "cancel",
    "resolve",
    "completed",
    "rolled-back",
];

/// A session for a person: who, where, what became of it, its steps.
pub fn session_text(s: &v1::Session) -> String {
    let users = if s.users.is_empty() { "none".to_owned() } else { s.users.join(", ") };
    let mut lines = vec![
        format!("session    {}", s.id),
        format!(
            "service    {}: {} ({}) -> {} ({})",
            s.service, s.from_site, s.from_server, s.to_site, s.to_server
        ),
        format!("users      {users}"),
        format!("state      {}", s.state),
        format!("outcome    {}", outcome(s)),
    ];
    if s.frozen_us > 0 {
        lines.push(format!(
            "frozen     {} ms at most, {} KiB of images, {} connection{}",
            ms(s.frozen_us),
            s.image_bytes.div_ceil(1024),
            s.connections,
            if s.connections == 1 { "" } else { "s" }
        ));
    }
    if let Some(frames) = s.held_frames {
        let (dropped, late) = (s.held_dropped.unwrap_or(0), s.held_late.unwrap_or(0));
        lines.push(format!("held       {frames} frames kept and sent on, {dropped} dropped, {late} late"));
    }
    if let Some(window) = s.switch_window_ns {
        lines.push(format!("switch     window {}.{:03} us", window / 1000, window % 1000));
    }
    if s.queue_position > 0 {
        lines.push(format!("queue      number {}: {}", s.queue_position, s.waits_for));
    }
    if !s.failed_step.is_empty() {
        lines.push(format!("failed     {}: {}", s.failed_step, s.reason));
    } else if !s.reason.is_empty() {
        lines.push(format!("reason     {}", s.reason));
    }
    lines.extend(s.losses.iter().map(|l| format!("lost       {l}")));
    lines.extend(s.pending.iter().map(|p| format!("pending    {p}")));
    if !s.findings.is_empty() {
        lines.push(String::new());
        lines.push(findings_text(&s.findings));
    }
    if !s.steps.is_empty() {
        lines.push(String::new());
        lines.push(steps_table(s));
    }
    lines.join("\n")
}
