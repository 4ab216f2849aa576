//! The errors of this crate: what was attempted, on what, and why it failed.

use std::{fmt::Display, io};

/// Something this server was to do and could not.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call or a file.
    #[error("{op} {subject}")]
    Io {
        /// What was attempted.
        op: &'static str,
        /// On what.
        subject: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Routing netlink: links, addresses, routes.
    #[error("{op} {subject}")]
    Netlink {
        /// What was attempted.
        op: &'static str,
        /// On what.
        subject: String,
        /// Why it failed.
        #[source]
        source: rtnetlink::Error,
    },
    /// The peer migrator or this side cannot go on; the words say why.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// For `map_err`: an I/O error with what was attempted on what.
    pub fn io(op: &'static str, subject: impl Display) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { op, subject: subject.to_string(), source }
    }

    /// For `map_err`: the same of an errno.
    pub fn errno(op: &'static str, subject: impl Display) -> impl FnOnce(nix::errno::Errno) -> Self {
        move |source| Self::Io { op, subject: subject.to_string(), source: source.into() }
    }

    /// For `map_err`: the same of routing netlink.
    pub fn netlink(op: &'static str, subject: impl Display) -> impl FnOnce(rtnetlink::Error) -> Self {
        move |source| Self::Netlink { op, subject: subject.to_string(), source }
    }

    /// An error in words.
    pub fn other(words: impl Into<String>) -> Self {
        Self::Other(words.into())
    }
}

/// Result of an operation of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The error and its sources on one line, for an answer over the wire.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let text = source.to_string();
        // some libraries repeat their source in their own words
        if !words.ends_with(&text) {
            words.push_str(": ");
            words.push_str(&text);
        }
        next = source.source();
    }
    words
}

/// Collects the errors of a teardown, which never stops at the first.
#[derive(Debug, Default)]
pub struct Errors(Vec<String>);

impl Errors {
    /// Keeps the error, if it is one.
    pub fn keep<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|e| self.0.push(chain(&e))).ok()
    }

    /// All of them in one, if there are any.
    ///
    /// # Errors
    /// [`Error::Other`] with all that were kept.
    pub fn finish(self, what: &str) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::other(format!("{what}: {}", self.0.join("; ")))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_names_operation_subject_and_cause_once() {
        let e = Error::io("reading", "/x")(io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(chain(&e), "reading /x: No such file or directory (os error 2)");
    }

    #[test]
    fn a_teardown_tells_all_its_errors() {
        let mut errors = Errors::default();
        errors.keep::<()>(Err(Error::other("a")));
        errors.keep(Ok(1));
        errors.keep::<()>(Err(Error::other("b")));
        assert_eq!(errors.finish("undoing").unwrap_err().to_string(), "undoing: a; b");
    }
}
