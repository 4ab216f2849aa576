//! `handover-migrator`: moves a running service from this server to another, or from another to this.
//!
//! One daemon per server; in each migration it is the *source* or the *destination*. The controller calls its service
//! `Migrator` over the control network; the source's daemon calls the destination's service `MigratorPeer` over the
//! migration network. What both promise is in [`machine`] and made durable by [`record`].

pub mod address;
pub mod config;
pub mod criu;
pub mod destination;
pub mod error;
pub mod fence;
pub mod freezer;
pub mod machine;
pub mod marker;
pub mod node;
pub mod preflight;
pub mod process;
pub mod record;
pub mod server;
pub mod sockets;
pub mod source;
pub mod timers;
pub mod transfer;
