//! How a process's memory gets to the destination: which mode is chosen, and why one is refused. **Pure**.
//!
//! | mode | while the service stands still | afterwards |
//! |---|---|---|
//! | stop-and-copy | everything is copied | nothing depends on the source |
//! | post-copy | everything but memory is copied | memory follows, on demand and in the background; until it is over, losing the source or the way to it ends the service |
//!
//! Post-copy is never chosen unless it is allowed: it trades the length of the freeze for a time in which the service lives
//! on two servers. Pre-copy (memory copied while the service runs, what it changed again) needs the kernel's soft-dirty
//! tracking and is refused without.

use std::time::Duration;

/// What is asked for.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    /// Whatever keeps the freeze below the limit, the one with the fewest dependencies first.
    #[default]
    Auto,
    /// See the file's header.
    StopAndCopy,
    /// See the file's header.
    PreCopy,
    /// See the file's header.
    PostCopy,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// See the file's header.
    StopAndCopy,
    /// See the file's header.
    PostCopy,
}

impl Mode {
    /// The name in logs and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::StopAndCopy => "stop-and-copy",
            Self::PostCopy => "post-copy",
        }
    }
}

/// What this server's policy is, where a request does not say otherwise (`[memory]` in the configuration).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// The mode.
    pub mode: Wanted,
    /// Post-copy may be chosen, its failure domain is accepted.
    pub allow_post_copy: bool,
    /// For `auto`: how long the service may stand still.
    pub max_downtime_ms: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self { mode: Wanted::Auto, allow_post_copy: false, max_downtime_ms: 200 }
    }
}

/// What this server can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Means {
    /// The kernel tells which pages a process has written to (CONFIG_MEM_SOFT_DIRTY).
    pub soft_dirty: bool,
    /// The kernel hands page faults to a program, also those of children (userfaultfd, non-cooperative).
    pub userfault: bool,
    /// Largest pipe this daemon may make, bytes (`fs.pipe-max-size`, or no limit).
    pub pipe_size: u64,
}

/// CRIU's page server moves pages through a pipe of this size; with a smaller one it fails when the first page is asked for,
/// the copy being stopped by then (measured: 2 MiB fail, 4 MiB work).
pub const PIPE_SIZE: u64 = 4 << 20;

/// How fast memory is taken to be copied, bytes per second: read, encrypted, sent and restored. For the choice only.
const BANDWIDTH: u64 = 500 << 20;

/// What a freeze is taken to last without any memory. For the choice only.
const REST: Duration = Duration::from_millis(50);

/// How long the service would stand still if `memory` bytes were copied meanwhile.
fn expected_freeze(memory: u64) -> Duration {
    REST + Duration::from_micros(memory.saturating_mul(1_000_000) / BANDWIDTH)
}

/// Why a mode cannot be had: a code for programs, words for people, and the way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// For programs.
    pub code: &'static str,
    /// For people.
    pub message: &'static str,
    /// The way out.
    pub remedy: &'static str,
}

/// Why post-copy cannot be had, if so.
fn against_post_copy(policy: &Policy, means: Means) -> Option<Refusal> {
    let refuse = |code, message, remedy| Some(Refusal { code, message, remedy });
    if !policy.allow_post_copy {
        refuse(
            "post-copy-not-allowed",
            "post-copy is not allowed: until all memory has followed, losing the source or the migration network would end the service",
            "set allow_post_copy = true in [memory] of the source's migrator, or use stop-and-copy",
        )
    } else if !means.userfault {
        refuse(
            "no-userfaultfd",
            "post-copy needs userfaultfd with non-cooperative events, which kernel or CRIU here lacks",
            "use a kernel with CONFIG_USERFAULTFD, or stop-and-copy",
        )
    } else if means.pipe_size < PIPE_SIZE {
        refuse(
            "pipe-size",
            "post-copy needs pipes of 4 MiB, more than fs.pipe-max-size allows here",
            "`sysctl fs.pipe-max-size=4194304`, or run the daemon with CAP_SYS_RESOURCE",
        )
    } else {
        None
    }
}

/// The mode for a process with `memory` bytes.
///
/// # Errors
/// The mode that was asked for cannot be had. `auto` always can.
pub fn choose(policy: &Policy, means: Means, memory: u64) -> Result<Mode, Refusal> {
    match policy.mode {
        Wanted::StopAndCopy => Ok(Mode::StopAndCopy),
        Wanted::PostCopy => against_post_copy(policy, means).map_or(Ok(Mode::PostCopy), Err),
        Wanted::PreCopy if !means.soft_dirty => Err(Refusal {
            code: "no-soft-dirty",
            message: "pre-copy needs to know what a process writes, and this kernel has no soft-dirty tracking",
            remedy: "use a kernel with CONFIG_MEM_SOFT_DIRTY, or another mode",
        }),
        Wanted::PreCopy => Err(Refusal {
            code: "no-pre-copy",
            message: "pre-copy is not built into this version",
            remedy: "use another mode",
        }),
        Wanted::Auto => {
            let long = expected_freeze(memory) > Duration::from_millis(policy.max_downtime_ms);
            let post_copy = long && against_post_copy(policy, means).is_none();
            Ok(if post_copy { Mode::PostCopy } else { Mode::StopAndCopy })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEANS: Means = Means { soft_dirty: false, userfault: true, pipe_size: PIPE_SIZE };
    const ALLOWED: Policy = Policy { mode: Wanted::Auto, allow_post_copy: true, max_downtime_ms: 200 };

    fn refusal(mode: Wanted, policy: Policy, means: Means) -> &'static str {
        choose(&Policy { mode, ..policy }, means, 0).unwrap_err().code
    }

    #[test]
    fn auto_takes_post_copy_only_where_it_is_allowed_possible_and_needed() {
        let large = 1 << 30;
        assert_eq!(choose(&ALLOWED, MEANS, large), Ok(Mode::PostCopy));
        for (policy, means, memory) in [
            (ALLOWED, MEANS, 8 << 20),
            (Policy::default(), MEANS, large),
            (ALLOWED, Means { userfault: false, ..MEANS }, large),
            (ALLOWED, Means { pipe_size: PIPE_SIZE - 1, ..MEANS }, large),
            (Policy { max_downtime_ms: 60_000, ..ALLOWED }, MEANS, large),
        ] {
            assert_eq!(
                choose(&policy, means, memory),
                Ok(Mode::StopAndCopy),
                "{policy:?} {means:?} {memory}"
            );
        }
    }

    #[test]
    fn a_mode_that_cannot_be_had_is_refused_by_name() {
        assert_eq!(refusal(Wanted::PostCopy, Policy::default(), MEANS), "post-copy-not-allowed");
        assert_eq!(refusal(Wanted::PostCopy, ALLOWED, Means { userfault: false, ..MEANS }), "no-userfaultfd");
        assert_eq!(refusal(Wanted::PostCopy, ALLOWED, Means { pipe_size: 1 << 20, ..MEANS }), "pipe-size");
        assert_eq!(refusal(Wanted::PreCopy, ALLOWED, MEANS), "no-soft-dirty");
        let post = Policy { mode: Wanted::PostCopy, ..ALLOWED };
        assert_eq!(choose(&post, MEANS, 0), Ok(Mode::PostCopy));
        let stop = Policy { mode: Wanted::StopAndCopy, ..ALLOWED };
        assert_eq!(choose(&stop, MEANS, u64::MAX), Ok(Mode::StopAndCopy));
    }

    #[test]
    fn more_memory_means_a_longer_freeze() {
        assert!(expected_freeze(0) < expected_freeze(1 << 30));
        assert!(expected_freeze(u64::MAX) > Duration::from_secs(60));
    }
}
