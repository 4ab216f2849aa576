//! `handover pki`: the private authority and the certificates of daemons and operators.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use handover_api::tls::{self, Role};
use serde_json::json;

use crate::{
    failure::Exit,
    output::{self, Format},
};

/// Certificates for daemons and operators.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:\n  \
    handover pki init /etc/handover/ca\n  \
    handover pki issue /etc/handover/ca gateway gw --out /etc/handover\n  \
    handover pki issue /etc/handover/ca operator alice\n\n\
    Roles: controller, gateway, migrator (the daemons), operator (may do everything), viewer (may look).")]
pub enum Verb {
    /// Makes a new authority: DIR/ca.pem and DIR/ca.key.
    Init {
        /// Where; made if there is no such directory.
        dir: PathBuf,
    },
    /// Issues a certificate: ROLE-NAME.pem and ROLE-NAME.key.
    Issue {
        /// Where the authority is.
        dir: PathBuf,
        /// controller, gateway, migrator, operator or viewer.
        role: Role,
        /// Of the daemon, as in the inventory; or of the operator.
        name: String,
        /// Where the files go; without: DIR.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
}

/// # Errors
/// A file cannot be read or written, or exists already.
pub fn run(verb: Verb, format: Format) -> anyhow::Result<Exit> {
    let files = match verb {
        Verb::Init { dir } => {
            if dir.join("ca.key").exists() {
                bail!(
                    "{} has an authority already; a new one would lock every daemon out: name another directory",
                    dir.display()
                );
            }
            std::fs::create_dir_all(&dir).with_context(|| format!("directory {}", dir.display()))?;
            tls::init_authority(&dir)?;
            json!({ "ca": dir.join("ca.pem"), "key": dir.join("ca.key") })
        }
        Verb::Issue { dir, role, name, out } => {
            if !dir.join("ca.key").exists() {
                bail!(
                    "{} has no authority; make one with `handover pki init {}`",
                    dir.display(),
                    dir.display()
                );
            }
            let out = out.unwrap_or_else(|| dir.clone());
            std::fs::create_dir_all(&out).with_context(|| format!("directory {}", out.display()))?;
            let files = tls::issue(&dir, &out, role, &name)?;
            json!({ "ca": files.ca, "cert": files.cert, "key": files.key })
        }
    };
    match format {
        Format::Json => output::print_json(&files)?,
        Format::Table => {
            for (what, path) in files.as_object().into_iter().flatten() {
                output::print(&format!("{what:<5} {}", path.as_str().unwrap_or_default()))?;
            }
        }
    }
    Ok(Exit::Done)
}
