//! What may ask for a migration. A trigger decides nothing and touches nothing: it only produces a [`Request`], which the
//! controller checks like any other. So far the only trigger is the operator.

use handover_api::v1;
use serde::{Deserialize, Serialize};

use crate::session::Policy;

/// A migration somebody or something asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The service.
    pub service: String,
    /// Where to.
    pub to_site: String,
    /// Which of its users; empty: all of them.
    pub users: Vec<String>,
    /// When the source yields.
    pub policy: Policy,
    /// Accept that connections of others break.
    pub allow_other_peers: bool,
    /// Keep the users' frames for the service while it stands still.
    pub hold: bool,
    /// Who or what asked.
    pub trigger: String,
}

/// Users that one request may name.
const MOST_USERS: usize = 10_000;
/// Longest name of a session: a service's name and a number.
const LONGEST_NAME: usize = 80;

/// Whether `name` can be a name at all, before it is looked for and repeated in an answer.
///
/// # Errors
/// In words, with as much of it as is fit to be repeated.
pub fn possible(what: &str, name: &str) -> Result<(), String> {
    let letters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.len() > LONGEST_NAME || !name.chars().all(letters) {
        let start: String = name.chars().filter(|c| !c.is_control()).take(40).collect();
        return Err(format!(
            "`{start}` ({} octets) cannot be the name of a {what}: names are at most {LONGEST_NAME} of letters, digits, `-`, `_` and `.`",
            name.len()
        ));
    }
    Ok(())
}

/// The operator's request, as it came over the wire.
///
/// # Errors
/// In words: a field that is missing or has a value nobody knows.
pub fn operator(m: v1::MigrateRequest) -> Result<Request, String> {
    if m.service.is_empty() {
        return Err("the request names no service".into());
    }
    if m.to_site.is_empty() {
        return Err("the request names no site to migrate to".into());
    }
    possible("service", &m.service)?;
    possible("site", &m.to_site)?;
    if m.users.len() > MOST_USERS {
        return Err(format!(
            "the request names {} users, and {MOST_USERS} is the most; leave them out to switch all of the service",
            m.users.len()
        ));
    }
    for user in &m.users {
        possible("user", user)?;
    }
    let policy = match v1::migrate_request::Policy::try_from(m.policy) {
        Ok(v1::migrate_request::Policy::Unspecified | v1::migrate_request::Policy::LateYield) => Policy::Late,
        Ok(v1::migrate_request::Policy::Disaster) => Policy::Disaster,
        Err(_) => return Err(format!("policy {} is not known to this controller", m.policy)),
    };
    let trigger = match m.trigger.as_str() {
        "" | "operator" => "operator".to_owned(),
        other => {
            possible("trigger", other)?;
            return Err(format!(
                "trigger `{other}` is not known to this controller; it takes requests of the operator"
            ));
        }
    };
    Ok(Request {
        service: m.service,
        to_site: m.to_site,
        users: m.users,
        policy,
        allow_other_peers: m.allow_other_peers,
        hold: !m.no_hold,
        trigger,
    })
}
