//! Server/network cooperation: the one ordered sequence that moves a running service, its address and its users.
//!
//! ```text
//! CLI, triggers -> service ---request---> controller ---record---> journal (durable)
//!                                             |                       |
//!                                             |<------ world (fold of the journal: inventory, places, sessions)
//!                                             v
//!                                  driver, one per session  <-- session (pure machine: what is outstanding)
//!                                             | calls
//!                                             v
//!                              peers (warm channels to gateways and migrators)
//! ```
//!
//! Pure: [`session`], [`world`] (with what gateways are told of it), [`inventory`], [`queue`], [`patience`],
//! [`report`]. With I/O: [`journal`], [`peers`], the driver and its calls, [`server`]. The daemon `handover-controller` and the CLI `handover` are thin on top.

mod calls;
pub mod config;
mod configuration;
pub mod controller;
mod driver;
pub mod inventory;
pub mod journal;
pub mod patience;
pub mod peers;
pub mod queue;
pub mod report;
pub mod server;
pub mod service;
pub mod session;
pub mod triggers;
pub mod world;
