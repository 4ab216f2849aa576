//! The transaction under every fault, deterministically: one controller, two migrators, up to three gateways, an operator.
//!
//! ```text
//!  operator --> controller (real World, Session, patience; journal modelled)
//!                  |  calls: lost, doubled, overtaken, late, cut by partitions and crashes
//!        +---------+-----------+
//!        v                     v
//!  gateways (real Table;   migrators (real machine; records, host and CRIU modelled)
//!  maps as real words)
//! ```
//!
//! What is real: the controller's session machine, its fold of the journal and its planning, its rules of patience; the
//! migrators' state machines with their recovery; the gateways' switch table and the words of the maps. What is modelled
//! is what does I/O: the driver ([`controller`]), the two sequences of a migrator step by step over a host of which only
//! that is known which the promises are about ([`server`]), calls and their faults ([`sim`]).
//!
//! Everything random comes from the seed, time is a number, nothing else is asked of the machine: a seed replays exactly.
//! After every event the promises of [`check`] are compared with the truth, which no daemon sees as a whole. When the
//! faults are over everything has to come to rest, nothing may be left, and one more migration has to succeed.
//!
//! Messages behave as over TCP between daemons: a call may be lost before or after it did its work, arrive late, twice,
//! or after a later one; but it never reaches a daemon that was started after it was sent, because its connection is gone.

mod check;
mod controller;
mod gateway;
mod mutation;
mod rng;
mod server;
mod sim;

pub use mutation::Mutation;
pub use sim::{Figures, Violation, replay, simulate};
