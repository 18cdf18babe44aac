//! The bounds of the exploration, and the mistakes that the model must notice.

use crate::world::Ticks;

/// The part of the world that is explored.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Length of a tick. Ten seconds keep the order of all steps; with five, shorter times have a length too.
    pub tick_seconds: u8,
    /// Life of the account.
    pub ttl: Ticks,
    /// The database's clock, less the dispatcher's.
    pub skew: Ticks,
    /// Faults that may happen in one run.
    pub faults: u8,
    /// Renewals, each to `ttl` from then.
    pub renewals: u8,
    /// Messages that the broker's operator has recorded and can send again, at any time.
    pub replays: u8,
    /// The user may request its end.
    pub asks: bool,
    /// The broker may lose everything, once.
    pub wipe: bool,
    /// The store may be restored from a backup, once.
    pub restore: bool,
    /// Accounts past their end that no lease needs are swept.
    pub sweep: bool,
    /// The last tick.
    pub last: Ticks,
    /// A mistake on purpose.
    pub mistake: Option<Mistake>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            tick_seconds: 10,
            ttl: 2,
            skew: 0,
            faults: 1,
            renewals: 0,
            replays: 0,
            asks: false,
            wipe: false,
            restore: false,
            sweep: false,
            last: 5,
            mistake: None,
        }
    }
}

/// Mistakes that the model must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mistake {
    /// The first report that the account is gone settles the lease, and ends its revocation.
    SettleOnFirstGone,
    /// The caller is answered before it is certain that the end is parked.
    AnswerUnparked,
    /// An engine looks at `VALID UNTIL`, and takes login and role later without another look.
    LookThenDrop,
    /// An `expire` does not look at `VALID UNTIL`.
    ExpireAtSight,
    /// A reconciler's copy is parked like any other message.
    ParkCopies,
    /// Nothing is published again.
    NoReconciler,
    /// A create may commit at any later time.
    SlowCreate,
    /// A message is acknowledged before its successor is parked.
    AckFirst,
    /// A renewal does not check whether the account may still log in.
    BlindRenewal,
    /// An outcome counts from its arrival, not from the engine's look.
    TrustOldNews,
    /// A role of that name is dropped although it was made again.
    DropAnew,
    /// An engine takes a recorded create at any time.
    TakeRecorded,
    /// An engine reports that nothing was made while the broker may give the create to another engine.
    SayNothingUnheard,
}
