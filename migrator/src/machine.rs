//! What one migration may do next, on either side, and what a restarted daemon does with it. Pure: no I/O, no clock;
//! the table test below is the specification.
//!
//! ```text
//! source                                              destination
//!   Prepared --Freeze--> Freezing --Vote--> Voted       Reserved --Restore--> Restoring --Vote--> Restored
//!                                    |        |                                                     |
//!                            VoteYielded    Yield                                                 Resume
//!                                    v        v                                                     v
//!                                    Yielded <-                                                 Resuming --Done--> Resumed
//!                                    |
//!                                   End --> Ending --Done--> Ended
//!   any but Ending, Ended --Abort--> Aborting --Done--> Aborted       any but Resuming, Resumed --Abort--> Discarding
//!   any but those and Yielded --AbortAlone--> Aborting                                     --Done--> Discarded
//! ```
//!
//! Invariants: a source leaves `Yielded` only when told; a destination never votes twice, and runs only after `Resume`;
//! what has been decided (`Ending`, `Resuming`) is never undone.

use serde::{Deserialize, Serialize};

/// State of a migration at the source. Everything but [`Freezing`](Self::Freezing)'s progress is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceState {
    /// The process is known and runs; the destination has reserved.
    Prepared,
    /// Between the call and the vote; the tasks may be frozen.
    Freezing,
    /// Frozen, v gone, the copy stands restored at the destination. May still go back alone.
    Voted,
    /// As voted, but the right to go back alone is given up.
    Yielded,
    /// COMMIT: the original is being ended.
    Ending,
    /// The original is gone and nothing of it is left.
    Ended,
    /// Being undone.
    Aborting,
    /// Undone: the original runs.
    Aborted,
}

/// State of a migration at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DestinationState {
    /// Place is kept; images may be arriving.
    Reserved,
    /// v is fenced and added, CRIU works.
    Restoring,
    /// The copy stands stopped under the fence.
    Restored,
    /// COMMIT: fence off, the copy is being continued.
    Resuming,
    /// The copy is the service.
    Resumed,
    /// Being undone.
    Discarding,
    /// Undone.
    Discarded,
}

/// What happens to a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceEvent {
    /// The controller asks to freeze.
    Freeze,
    /// All is done that comes before the vote.
    Vote,
    /// The same, and the policy is to yield with the vote.
    VoteYielded,
    /// The controller asks to give up the right to go back alone.
    Yield,
    /// The controller says COMMIT.
    End,
    /// The controller says ABORT.
    Abort,
    /// This side fails, or its lease is over.
    AbortAlone,
    /// `Ending` or `Aborting` has finished.
    Done,
}

/// What happens to a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DestinationEvent {
    /// The source asks to restore.
    Restore,
    /// CRIU's final response has come.
    Vote,
    /// The controller says COMMIT.
    Resume,
    /// The controller says ABORT, the source discards, or this side fails.
    Abort,
    /// `Resuming` or `Discarding` has finished.
    Done,
}

/// The answer of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next<S> {
    /// Make this state durable, then act.
    Go(S),
    /// It was done before: give the same answer.
    Already,
    /// Not in this state; the words say why.
    Refuse(&'static str),
}

/// What a restarted daemon does with a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// Undo at once.
    Undo,
    /// Hold everything as it is until told.
    Wait,
    /// The decision is known: finish it.
    Finish,
    /// Over; kept to answer repeated calls.
    Nothing,
}

impl SourceState {
    /// The next state on `event`.
    pub fn on(self, event: SourceEvent) -> Next<Self> {
        use Next::{Already, Go, Refuse};
        use SourceEvent as E;
        use SourceState as S;
        match (self, event) {
            (S::Prepared, E::Freeze) => Go(S::Freezing),
            (S::Freezing, E::Freeze) => Refuse("a freeze is under way"),
            (S::Voted | S::Yielded | S::Ending | S::Ended, E::Freeze) => Already,

            (S::Freezing, E::Vote) => Go(S::Voted),
            (S::Freezing, E::VoteYielded) => Go(S::Yielded),
            (_, E::Vote | E::VoteYielded) => Refuse("there is no freeze to vote on"),

            (S::Voted, E::Yield) => Go(S::Yielded),
            (S::Yielded | S::Ending | S::Ended, E::Yield) => Already,

            (S::Yielded | S::Ending, E::End) => Go(S::Ending),
            (S::Ended, E::End) => Already,

            (S::Ending | S::Ended, E::Abort | E::AbortAlone) => Refuse("it was committed"),
            (S::Aborted, E::Abort | E::AbortAlone) => Already,
            (S::Yielded, E::AbortAlone) => Refuse("it has yielded: only the controller decides"),
            (_, E::Abort | E::AbortAlone) => Go(S::Aborting),

            (S::Ending, E::Done) => Go(S::Ended),
            (S::Aborting, E::Done) => Go(S::Aborted),
            (_, E::Done) => Refuse("nothing was under way"),

            (S::Prepared | S::Freezing, E::Yield | E::End) => Refuse("it has not voted"),
            (S::Voted, E::End) => Refuse("it has not yielded"),
            (S::Aborting | S::Aborted, E::Freeze | E::Yield | E::End) => {
                Refuse("it was aborted; the service runs on at the source")
            }
        }
    }

    /// What to do with it after a restart.
    pub fn recovery(self) -> Recovery {
        match self {
            Self::Prepared | Self::Freezing | Self::Voted | Self::Aborting => Recovery::Undo,
            Self::Yielded => Recovery::Wait,
            Self::Ending => Recovery::Finish,
            Self::Ended | Self::Aborted => Recovery::Nothing,
        }
    }

    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prepared => "prepared",
            Self::Freezing => "freezing",
            Self::Voted => "voted",
            Self::Yielded => "yielded",
            Self::Ending => "ending",
            Self::Ended => "ended",
            Self::Aborting => "aborting",
            Self::Aborted => "aborted",
        }
    }
}

impl DestinationState {
    /// The next state on `event`.
    pub fn on(self, event: DestinationEvent) -> Next<Self> {
        use DestinationEvent as E;
        use DestinationState as S;
        use Next::{Already, Go, Refuse};
        match (self, event) {
            (S::Reserved, E::Restore) => Go(S::Restoring),
            (S::Restoring, E::Restore) => Refuse("a restore is under way"),
            (S::Restored | S::Resuming | S::Resumed, E::Restore) => Already,

            (S::Restoring, E::Vote) => Go(S::Restored),
            (_, E::Vote) => Refuse("there is no restore to vote on"),

            (S::Restored | S::Resuming, E::Resume) => Go(S::Resuming),
            (S::Resumed, E::Resume) => Already,
            (S::Reserved | S::Restoring, E::Resume) => Refuse("the copy is not restored"),

            (S::Resuming | S::Resumed, E::Abort) => {
                Refuse("it was committed; the service runs at the destination")
            }
            (S::Discarded, E::Abort) => Already,
            (_, E::Abort) => Go(S::Discarding),

            (S::Resuming, E::Done) => Go(S::Resumed),
            (S::Discarding, E::Done) => Go(S::Discarded),
            (_, E::Done) => Refuse("nothing was under way"),

            (S::Discarding | S::Discarded, E::Restore | E::Resume) => Refuse("it was discarded"),
        }
    }

    /// What to do with it after a restart.
    pub fn recovery(self) -> Recovery {
        match self {
            Self::Reserved | Self::Restoring | Self::Discarding => Recovery::Undo,
            Self::Restored => Recovery::Wait,
            Self::Resuming => Recovery::Finish,
            Self::Resumed | Self::Discarded => Recovery::Nothing,
        }
    }

    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Restoring => "restoring",
            Self::Restored => "restored",
            Self::Resuming => "resuming",
            Self::Resumed => "resumed",
            Self::Discarding => "discarding",
            Self::Discarded => "discarded",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `.` for refused, `=` for already, else the first letters of the next state.
    fn cell<S>(next: Next<S>, name: fn(S) -> &'static str) -> String {
        match next {
            Next::Go(s) => name(s).into(),
            Next::Already => "=".into(),
            Next::Refuse(_) => ".".into(),
        }
    }

    #[test]
    fn the_source_table() {
        use SourceEvent::{Abort, AbortAlone, Done, End, Freeze, Vote, VoteYielded, Yield};
        use SourceState::{Aborted, Aborting, Ended, Ending, Freezing, Prepared, Voted, Yielded};
        let events = [Freeze, Vote, VoteYielded, Yield, End, Abort, AbortAlone, Done];
        #[rustfmt::skip]
        let table = [
            //           Freeze      Vote     VoteYielded Yield      End       Abort       AbortAlone  Done
            (Prepared, ["freezing", ".",     ".",        ".",       ".",      "aborting", "aborting", "."],       Recovery::Undo),
            (Freezing, [".",        "voted", "yielded",  ".",       ".",      "aborting", "aborting", "."],       Recovery::Undo),
            (Voted,    ["=",        ".",     ".",        "yielded", ".",      "aborting", "aborting", "."],       Recovery::Undo),
            (Yielded,  ["=",        ".",     ".",        "=",       "ending", "aborting", ".",        "."],       Recovery::Wait),
            (Ending,   ["=",        ".",     ".",        "=",       "ending", ".",        ".",        "ended"],   Recovery::Finish),
            (Ended,    ["=",        ".",     ".",        "=",       "=",      ".",        ".",        "."],       Recovery::Nothing),
            (Aborting, [".",        ".",     ".",        ".",       ".",      "aborting", "aborting", "aborted"], Recovery::Undo),
            (Aborted,  [".",        ".",     ".",        ".",       ".",      "=",        "=",        "."],       Recovery::Nothing),
        ];
        for (state, row, recovery) in table {
            let got = events.map(|e| cell(state.on(e), SourceState::name));
            assert_eq!(got.each_ref().map(String::as_str), row, "{state:?}");
            assert_eq!(state.recovery(), recovery, "{state:?}");
        }
    }

    #[test]
    fn the_destination_table() {
        use DestinationEvent::{Abort, Done, Restore, Resume, Vote};
        use DestinationState::{Discarded, Discarding, Reserved, Restored, Restoring, Resumed, Resuming};
        let events = [Restore, Vote, Resume, Abort, Done];
        #[rustfmt::skip]
        let table = [
            //             Restore      Vote        Resume      Abort         Done
            (Reserved,   ["restoring", ".",        ".",        "discarding", "."],         Recovery::Undo),
            (Restoring,  [".",         "restored", ".",        "discarding", "."],         Recovery::Undo),
            (Restored,   ["=",         ".",        "resuming", "discarding", "."],         Recovery::Wait),
            (Resuming,   ["=",         ".",        "resuming", ".",          "resumed"],   Recovery::Finish),
            (Resumed,    ["=",         ".",        "=",        ".",          "."],         Recovery::Nothing),
            (Discarding, [".",         ".",        ".",        "discarding", "discarded"], Recovery::Undo),
            (Discarded,  [".",         ".",        ".",        "=",          "."],         Recovery::Nothing),
        ];
        for (state, row, recovery) in table {
            let got = events.map(|e| cell(state.on(e), DestinationState::name));
            assert_eq!(got.each_ref().map(String::as_str), row, "{state:?}");
            assert_eq!(state.recovery(), recovery, "{state:?}");
        }
    }
}
