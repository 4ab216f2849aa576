//! How long a call is waited for and when it is asked again. Pure: time passed is an argument, so that the simulation
//! waits by the same rules as the driver.
//!
//! Before the decision a call has a deadline, and an answer that was lost on the way is asked for again for a short
//! while; then it has failed, and the session aborts. After the decision a call is retried until it is confirmed, at
//! intervals that double; once it has failed for a while the session is told, so that nobody waits in silence.

use std::time::Duration;

use crate::session::{Command, Participant};

const FIRST_BACKOFF: Duration = Duration::from_millis(50);
/// After healing nothing may wait longer than this for somebody who is back.
const LAST_BACKOFF: Duration = Duration::from_millis(250);

/// Preflight looks around on a host and probes a router.
pub const PREFLIGHT: Duration = Duration::from_secs(15);
/// Of one attempt after the decision that may take its time.
const CONFIRM: Duration = Duration::from_secs(5);
/// Of one attempt that asks one daemon for one thing: an answer that was lost is asked for again soon, and a daemon that is
/// still at work goes on with it whoever has stopped waiting.
const CONFIRM_SOON: Duration = Duration::from_millis(500);

/// Plus a second for each [`STAGE_RATE`] of users, each of whom is introduced to the new network's router before the answer.
const STAGE: Duration = Duration::from_secs(10);
/// Users a second: a gateway asks as some 32,000, three times as those for whom the router stays silent.
const STAGE_RATE: u64 = 10_000;
/// Asking a daemon how it is, and telling a gateway its users: plus a second for each [`USERS_RATE`] of them.
const ASK: Duration = Duration::from_secs(3);
/// Users a second that a gateway can be told, or tells of: all told, on a slow machine.
const USERS_RATE: u64 = 20_000;
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

/// How long one attempt after the decision is waited for. A gateway may have held frames to send first, and may be asked
/// more than one thing.
pub fn attempt(command: &Command) -> Duration {
    match command {
        Command::Resume | Command::End | Command::Undo(Participant::Source | Participant::Destination) => {
            CONFIRM_SOON
        }
        _ => CONFIRM,
    }
}

/// How long a gateway of so many users may take to answer when it is asked about them all, or told them.
pub fn ask(users: usize) -> Duration {
    ASK + at_rate(users as u64, USERS_RATE)
}

/// How long `work` takes at `rate` a second, in whole seconds.
fn at_rate(work: u64, rate: u64) -> Duration {
    Duration::from_secs(work / rate)
}

/// How much a call has to do, as far as its patience goes by that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// What a freeze has to carry.
    pub memory_bytes: u64,
    /// The users of the migration at the gateway that is asked.
    pub users: usize,
}

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
    /// For `command`, which has `load` to do.
    pub fn new(command: &Command, load: Load) -> Self {
        let (deadline, ask_again) = match command {
            Command::Stage(_) => (STAGE + at_rate(load.users as u64, STAGE_RATE), ASK_AGAIN),
            Command::Prepare => (PREPARE, ASK_AGAIN),
            Command::Hold(..) => (HOLD, ASK_AGAIN_FROZEN),
            Command::Freeze(_) => (freeze(load.memory_bytes), ASK_AGAIN),
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
    FREEZE + at_rate(memory_bytes, FREEZE_RATE)
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
        let mut asking = Asking::new(&Command::Yield, Load::default());
        // the loss itself came late: patience counts from there
        assert_eq!(asking.lost(ms(2000)), Some(ms(50)));
        assert_eq!(asking.lost(ms(2100)), Some(ms(100)));
        assert_eq!(asking.lost(ms(3301)), None);
        assert_eq!(Asking::new(&Command::Resume, Load::default()).lost(ms(0)), None);
    }

    #[test]
    fn a_deadline_grows_with_what_there_is_to_do() {
        let freeze = |memory_bytes| {
            Asking::new(&Command::Freeze(Default::default()), Load { memory_bytes, users: 1_000_000 })
                .deadline
        };
        assert_eq!((freeze(0), freeze(64 << 20)), (ms(30_000), ms(32_000)));
        let stage = |users| {
            Asking::new(&Command::Stage("gw".into()), Load { memory_bytes: u64::MAX, users }).deadline
        };
        assert_eq!((stage(1), stage(9_999), stage(10_000)), (ms(10_000), ms(10_000), ms(11_000)));
        assert_eq!(
            stage(1_000_000),
            ms(110_000),
            "three rounds of introductions at 32,000 a second are 94 s"
        );
        assert_eq!((ask(0), ask(1_000_000)), (ms(3000), ms(53_000)));
        // while the service is frozen nobody waits for the number of users: the store is one
        let switch = |users| {
            Asking::new(&Command::Switch("gw".into(), 1, 1), Load { memory_bytes: 0, users }).deadline
        };
        assert_eq!(switch(1), switch(1_000_000));
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
            [50, 100, 200, 250, 250, 250, 250, 250].map(ms)
        );
        assert!(!Confirming::new(&Command::Resume).failed(ms(14_999)).0);
        assert!(Confirming::new(&Command::Resume).failed(ms(15_000)).0);
    }
}
