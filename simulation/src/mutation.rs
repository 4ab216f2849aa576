//! Bugs planted on purpose, one at a time, in the simulation's model of the daemons: a checker that does not find them
//! proves nothing. Production code knows none of this.

/// A planted bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[non_exhaustive]
pub enum Mutation {
    /// The controller acts on a decision while it is still being written.
    ResumeBeforeDecisionIsDurable,
    /// The controller tells the operator of a session before its request is durable.
    AnswerBeforeRequestIsDurable,
    /// The controller takes a yield whose answer was lost for granted.
    LostYieldTakenForGranted,
    /// The controller undoes a committed migration whose destination does not answer.
    UndoAfterCommit,
    /// The controller undoes at the source although a COMMIT is durable, because it forgets decisions at a restart.
    ForgetDecision,
    /// The controller does not look whether a forgotten switch that it made again was finished.
    SwitchAgainNotFinished,
    /// The controller says that it cancelled what it has committed.
    CancelAfterCommit,
    /// The lease of the source ends also after it has yielded.
    ThawAfterYieldOnTimeout,
    /// The source's vote and yield are spoken, but not durable.
    ForgetSourcePromise,
    /// The destination's vote is spoken, but not durable.
    ForgetDestinationVote,
    /// The source relies on CRIU to hold the tasks, which fails open.
    NoFreezer,
    /// The source freezes without a fence.
    FreezeWithoutFence,
    /// The destination adds v and restores without a fence.
    RestoreWithoutFence,
    /// The source, undoing, lets the tasks go before the fence and v are as they were.
    UnfencedThaw,
    /// The destination does not keep the restored copy stopped.
    RestoreRunning,
    /// The source lifts the fence before the original is ended.
    EndUnfencesFirst,
    /// An abort of a migration that a migrator does not know (yet) leaves no note there.
    MigratorForgetsUnknownAbort,
    /// An abort of a migration that a gateway does not know (yet) leaves no note there.
    GatewayForgetsUnknownAbort,
    /// A gateway gives each switch the same generation and goes by its number alone.
    GenerationReused,
}
