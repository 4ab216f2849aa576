//! Exit codes, and errors that carry one.

use std::process::ExitCode;

use tonic::{Code, Status};

/// How the command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Error.
    Error = 1,
    /// Rolled back and alive at the source.
    RolledBack = 3,
    /// No such thing.
    NotFound = 4,
    /// Timed out while still running.
    TimedOut = 5,
    /// Needs an operator.
    NeedsOperator = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An answer of the controller that is an error; in its own words, so the status is no source of it.
#[derive(Debug, thiserror::Error)]
#[error("{}", handover_controller::peers::words(.0))]
pub struct Refused(Status);

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self(status)
    }
}

/// The exit code an error ends with.
pub fn code(error: &anyhow::Error) -> Exit {
    match error.downcast_ref::<Refused>() {
        Some(Refused(status)) if status.code() == Code::NotFound => Exit::NotFound,
        _ => Exit::Error,
    }
}
