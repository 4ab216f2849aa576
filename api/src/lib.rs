//! The wire between Handover's daemons and its operators.
//!
//! [`v1`] holds the messages and services generated from `proto/handover/v1/*.proto`; [`tls`] the mutually
//! authenticated channels that carry them and the roles that certificates name; [`live`] how
//! their certificates are replaced while they are used; [`gate`] how often a peer may ask, and [`audit`] what is remembered of what
//! it asked; [`users`] how many users are named at once.

pub mod audit;
pub mod gate;
pub mod live;
pub mod tls;
pub mod users;

/// Messages and services, version 1; documented in the .proto files.
#[allow(missing_docs, clippy::all, rustdoc::all)]
pub mod v1 {
    tonic::include_proto!("handover.v1");
}
