//! The wire between Handover's daemons and its operators.
//!
//! [`v1`] holds the messages and services generated from `proto/handover/v1/*.proto`; [`tls`] the mutually
//! authenticated channels that carry them and the roles that certificates name; [`users`] how many users are named at once.

pub mod tls;
pub mod users;

/// Messages and services, version 1; documented in the .proto files.
#[allow(missing_docs, clippy::all, rustdoc::all)]
pub mod v1 {
    tonic::include_proto!("handover.v1");
}
