//! The lab: real network hosts on one machine, and the programs and measurements that the scenarios are made of.
//!
//! A [`Host`] is a network, a pid and a mount namespace with the lab's own process as pid 1. A [`Lab`] makes hosts, joins
//! them by links and takes everything down when it is dropped, on a panic too; killed, it leaves nothing running either.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use handover_lab::{Lab, Program};
//! let mut lab = Lab::new()?;
//! let (a, b) = (lab.add_host("a")?, lab.add_host("b")?);
//! lab.link((&a, "eth0"), (&b, "eth0"))?;
//! a.ip("addr add 10.0.0.1/24 dev eth0")?;
//! b.ip("addr add 10.0.0.2/24 dev eth0")?;
//! a.run(["ip", "route", "get", "10.0.0.2"])?;
//! let daemon = b.start_daemon(Program::new("redis-server"))?;
//! # Ok(()) }
//! ```

pub mod apps;
pub mod bench;
pub mod byhand;
pub mod capture;
pub mod ethtool;
pub mod faults;
mod host;
pub mod init;
mod lab;
mod proto;
pub mod provider;
pub mod residue;
pub mod run;
pub mod scenario;
pub mod topology;

pub use host::{Daemon, Ended, Host, Lines, Output, Process, Program};
pub use lab::{Lab, cgroup_root, program, program_dir};
pub use proto::Io;
