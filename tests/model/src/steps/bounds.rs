//! How much is explored, and the mistakes that the model must notice.

use crate::world::Ticks;

/// How much of the world is explored.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Length of a tick. Ten seconds keep the order of all that happens; with five, what is
    /// shorter than ten has a length too.
    pub tick_seconds: u8,
    /// Life of the account.
    pub ttl: Ticks,
    /// The database's clock, less the dispatcher's.
    pub skew: Ticks,
    /// Faults that may happen in one run.
    pub faults: u8,
    /// Renewals, each by `ttl` from then.
    pub renewals: u8,
    /// Messages that the broker's operator has recorded and sends again, at any time.
    pub replays: u8,
    /// The user may ask for its end.
    pub asks: bool,
    /// The broker may lose everything, once.
    pub wipe: bool,
    /// The store may be restored from a backup, once.
    pub restore: bool,
    /// Accounts past their end that no lease wants are swept.
    pub sweep: bool,
    /// The last tick.
    pub last: Ticks,
    /// Something done wrong on purpose.
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
    /// The first word that the account is gone settles the lease, and ends its revocation.
    SettleOnFirstGone,
    /// The caller is answered though it is not sure that the end is parked.
    AnswerUnparked,
    /// An engine looks at the date, and takes login and role away later without another look.
    LookThenDrop,
    /// An `expire` does not look at the date.
    ExpireAtSight,
    /// A reconciler's copy is parked as any other message.
    ParkCopies,
    /// Nothing is published again.
    NoReconciler,
    /// A create may commit whenever it gets to it.
    SlowCreate,
    /// A message is acknowledged before its next is parked.
    AckFirst,
    /// A renewal does not ask whether the account may still log in.
    BlindRenewal,
    /// An outcome counts from the time at which it arrives, not from the time at which the engine looked.
    TrustOldNews,
    /// A role of that name is dropped although it was made again.
    DropAnew,
    /// An engine takes a recorded create at any time.
    TakeRecorded,
    /// An engine says that nothing was made while the broker may give the create to another.
    SayNothingUnheard,
}
