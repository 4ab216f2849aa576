//! How long a call is waited for and when it is asked again. Pure: time passed is an argument, so that the simulation
//! waits by the same rules as the driver.
//!
//! Before the decision a call has a deadline, and an answer that was lost on the way is asked for again for a short
//! while; then it has failed, and the session aborts. After the decision a call is retried until it is confirmed, at
//! intervals that double; once it has failed for a while the session is told, so that nobody waits in silence.

use std::time::Duration;

use crate::session::{Command, Participant};

const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LAST_BACKOFF: Duration = Duration::from_secs(2);

/// Preflight looks around on a host and probes a router.
pub const PREFLIGHT: Duration = Duration::from_secs(15);
/// Of one attempt after the decision.
pub const CONFIRM: Duration = Duration::from_secs(5);

const STAGE: Duration = Duration::from_secs(10);
const PREPARE: Duration = Duration::from_secs(20);
/// The users' frames wait.
const HOLD: Duration = Duration::from_secs(3);
/// Plus a second for each [`FREEZE_RATE`] of memory.
const FREEZE: Duration = Duration::from_secs(30);
/// What the slowest link that makes sense carries in a second, in bytes.
const FREEZE_RATE: u64 = 32 << 20;
/// The service is frozen: better back at once than switched late.
const SWITCH: Duration = Duration::from_secs(3);
const YIELD: Duration = Duration::from_secs(3);
/// For how long a lost answer is asked for again before the decision.
const ASK_AGAIN: Duration = Duration::from_secs(3);
/// The same, while the service is frozen and nothing but a short call is missing.
const ASK_AGAIN_FROZEN: Duration = Duration::from_millis(1500);
/// What the source gives the gateways' markers to arrive, and the service to read what has arrived, before it freezes.
pub const MARKER: Duration = Duration::from_millis(300);
/// For how long a gateway keeps what it holds, after an ABORT, for the source to thaw first: frames sent on to a service
/// that is still fenced are lost.
pub const RELEASE: Duration = Duration::from_millis(500);
/// After so long without a confirmation the session is told; the service itself is not waiting for this one.
const LATE: Duration = Duration::from_secs(1);
/// The same for a call that the service waits for (resume; abort at the source): then an operator is needed.
const LATE_CRITICAL: Duration = Duration::from_secs(15);

/// Patience with one call before the decision.
#[derive(Debug, Clone)]
pub struct Asking {
    /// From the first attempt on; each attempt has what is left of it.
    pub deadline: Duration,
    ask_again: Duration,
    first_loss: Option<Duration>,
    backoff: Duration,
}

impl Asking {
    /// For `command`; `memory_bytes` is what a freeze has to carry.
    pub fn new(command: &Command, memory_bytes: u64) -> Self {
        let (deadline, ask_again) = match command {
            Command::Stage(_) => (STAGE, ASK_AGAIN),
            Command::Prepare => (PREPARE, ASK_AGAIN),
            Command::Hold(..) => (HOLD, ASK_AGAIN_FROZEN),
            Command::Freeze(_) => (freeze(memory_bytes), ASK_AGAIN),
            Command::Switch(..) => (SWITCH, ASK_AGAIN_FROZEN),
            Command::Yield => (YIELD, ASK_AGAIN_FROZEN),
            Command::Check => (PREFLIGHT, Duration::ZERO),
            Command::DecideCommit
            | Command::DecideAbort
            | Command::Resume
            | Command::End
            | Command::Finish(_)
            | Command::Undo(_) => (CONFIRM, Duration::ZERO),
        };
        Self { deadline, ask_again, first_loss: None, backoff: FIRST_BACKOFF }
    }

    /// An answer was lost on the way, `elapsed` after the first attempt: how long to wait before the next one, or `None`
    /// if the call has failed.
    pub fn lost(&mut self, elapsed: Duration) -> Option<Duration> {
        let since = elapsed.saturating_sub(*self.first_loss.get_or_insert(elapsed));
        if since + self.backoff > self.ask_again {
            return None;
        }
        Some(next(&mut self.backoff))
    }
}

/// Of a freeze that has to carry `memory_bytes`.
fn freeze(memory_bytes: u64) -> Duration {
    FREEZE + Duration::from_secs(memory_bytes / FREEZE_RATE)
}

/// After this a gateway holds no more, whether or not anybody tells it: when all that is waited for between hold and
/// release has taken as long as it may.
pub fn hold_deadline(memory_bytes: u64) -> Duration {
    HOLD + MARKER + freeze(memory_bytes) + SWITCH + YIELD + CONFIRM
}

/// Patience with one call after the decision.
#[derive(Debug, Clone)]
pub struct Confirming {
    late: Duration,
    told: bool,
    backoff: Duration,
}

impl Confirming {
    /// For `command`.
    pub fn new(command: &Command) -> Self {
        let critical = matches!(command, Command::Resume | Command::Undo(Participant::Source));
        let late = if critical { LATE_CRITICAL } else { LATE };
        Self { late, told: false, backoff: FIRST_BACKOFF }
    }

    /// An attempt has failed, `elapsed` after the first one began: whether the session is to be told now, and how long to
    /// wait before the next attempt.
    pub fn failed(&mut self, elapsed: Duration) -> (bool, Duration) {
        let tell = !self.told && elapsed >= self.late;
        self.told |= tell;
        (tell, next(&mut self.backoff))
    }
}

fn next(backoff: &mut Duration) -> Duration {
    let wait = *backoff;
    *backoff = (wait * 2).min(LAST_BACKOFF);
    wait
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_lost_answer_is_asked_for_again_for_a_while() {
        let mut asking = Asking::new(&Command::Yield, 0);
        // the loss itself came late: patience counts from there
        assert_eq!(asking.lost(ms(2000)), Some(ms(50)));
        assert_eq!(asking.lost(ms(2100)), Some(ms(100)));
        assert_eq!(asking.lost(ms(3301)), None);
        assert_eq!(Asking::new(&Command::Resume, 0).lost(ms(0)), None);
        assert_eq!(Asking::new(&Command::Freeze(Default::default()), 64 << 20).deadline, ms(32_000));
    }

    #[test]
    fn after_the_decision_there_is_no_end_of_patience() {
        let mut confirming = Confirming::new(&Command::End);
        let waits: Vec<_> = (0..8).map(|i| confirming.failed(ms(i * 400))).collect();
        assert_eq!(
            waits.iter().map(|w| w.0).collect::<Vec<_>>(),
            [false, false, false, true, false, false, false, false]
        );
        assert_eq!(
            waits.iter().map(|w| w.1).collect::<Vec<_>>(),
            [50, 100, 200, 400, 800, 1600, 2000, 2000].map(ms)
        );
        assert!(!Confirming::new(&Command::Resume).failed(ms(14_999)).0);
        assert!(Confirming::new(&Command::Resume).failed(ms(15_000)).0);
    }
}
