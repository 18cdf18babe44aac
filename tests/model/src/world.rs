//! Everything at one moment, in ticks.

use std::fmt;

pub use crate::bag::Bag;

/// A moment or a time, in ticks.
pub type Ticks = i8;

/// The state of a lease; see `lease::State`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// The account is being made.
    Pending,
    /// Somebody holds the credential.
    Active,
    /// The lease must end.
    Revoking,
    /// The account is gone.
    Revoked,
    /// There never was a credential.
    Failed,
}

/// The relevant part of a lease's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Row {
    /// The lease's state.
    pub state: State,
    /// `VALID UNTIL`, as far as the dispatcher knows. Set since it was active.
    pub expiration: Option<Ticks>,
    /// An engine reported that it made the account.
    pub made: bool,
    /// The time of the reconciler's next look.
    pub look: Option<Ticks>,
}

/// The progress of a publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Publish {
    /// Not begun.
    Open,
    /// The broker has it.
    Confirmed,
    /// The broker may have it.
    Unsure,
    /// The message was never sent.
    Never,
}

/// The task of the dispatcher that issues the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Issue {
    /// Not begun.
    Idle,
    /// The row is committed; the end is parked and the create published, side by side.
    Publishing {
        /// The publish of the end.
        park: Publish,
        /// The publish of the create.
        create: Publish,
    },
    /// Both publishes are confirmed; an engine's answer is awaited.
    Waiting,
    /// The result is known, and not yet stored.
    Ending(End),
    /// Answered, or the dispatcher died.
    Over,
}

/// The result of an issue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// The account is there, until then.
    Made(Ticks),
    /// There is certainly no account.
    Nothing,
    /// There may be an account.
    Unknown,
}

/// The create task in its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Create {
    /// None.
    Absent,
    /// To be delivered, until then.
    Ready(Ticks),
    /// An engine has it. If the engine dies, it is ready until then.
    Delivered(Ticks),
}

/// An engine that works on the create.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Work {
    /// When it was delivered.
    pub since: Ticks,
    /// The message is still this engine's.
    pub owner: bool,
    /// The answer, when it is known.
    pub answer: Option<Answer>,
}

/// An engine's answer to the create.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Answer {
    /// The account is there, until then.
    Created(Ticks),
    /// There is no account, or not for certain.
    Failed,
    /// The create failed before anything was made, and no engine will get it again.
    Nothing,
}

/// A revocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Message {
    /// `expire`, else `now`.
    pub expire: bool,
    /// A copy by the reconciler.
    pub copy: bool,
    /// The revocation comes for the second time, after the window.
    pub settling: bool,
    /// How long after its arrival the create could still commit.
    pub window: Ticks,
    /// When it can be delivered.
    pub due: Ticks,
    /// An engine has it, and has taken the login away.
    pub closed: bool,
}

/// An engine's report about a revocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// Dropped or absent.
    Gone {
        /// When, by the database's clock.
        at: Ticks,
        /// The create of the lease could not commit any more.
        conclusive: bool,
    },
    /// The account lives until then.
    NotDue(Ticks),
    /// The account could not be ended.
    Failing,
}

/// The account in the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Role {
    /// `VALID UNTIL`.
    pub until: Ticks,
    /// Whether it may log in.
    pub login: bool,
}

/// A requested renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Renewal {
    /// None.
    Idle,
    /// The request is on its way.
    Asked,
    /// An engine found that the role may be renewed until then, and is about to do so.
    Begun(Ticks),
    /// The renewal was done, until then, and is not yet stored.
    Done(Ticks),
}

/// Stands for any past moment, if nothing depends on which.
pub const PAST: Ticks = -9;

/// Everything.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct World {
    /// The dispatcher's and the broker's clock. At the last tick it stands for all later ones.
    pub now: Ticks,
    /// The lease in the store.
    pub row: Option<Row>,
    /// The dispatcher's task.
    pub issue: Issue,
    /// The create task.
    pub create: Create,
    /// Engines at work on it.
    pub works: Bag<Work, 3>,
    /// Revocations, parked or ready.
    pub revokes: Bag<Message, 10>,
    /// Outcomes on their way.
    pub outcomes: Bag<Outcome, 10>,
    /// Answers on their way.
    pub answers: Bag<Answer, 3>,
    /// The account.
    pub role: Option<Role>,
    /// An engine that lost its message, and is about to drop the account nevertheless.
    pub ghost: bool,
    /// The end until which somebody was promised a working credential.
    pub held: Option<Ticks>,
    /// Somebody requested the end.
    pub asked: bool,
    /// The renewal in progress.
    pub renewal: Renewal,
    /// Renewals that may still be requested.
    pub renewals: u8,
    /// The create was given back once, so the next engine is not the first.
    pub again: bool,
    /// The create reached the broker once, so that the broker's operator may have recorded it.
    pub sent: bool,
    /// Messages that the broker's operator may still send again.
    pub replays: u8,
    /// The broker lost everything once.
    pub wiped: bool,
    /// The store was restored once.
    pub restored: bool,
    /// Faults that may still happen.
    pub faults: u8,
    /// A bag was full.
    pub full: bool,
}

/// The elements that exist, and no empty places.
impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {}: {:?}", self.now, self.issue)?;
        match self.row {
            None => write!(f, ", no lease")?,
            Some(row) => write!(
                f,
                ", {:?} until {:?}, look {:?}",
                row.state, row.expiration, row.look
            )?,
        }
        if self.create != Create::Absent {
            write!(f, ", create {:?}", self.create)?;
        }
        for work in self.works.iter() {
            write!(f, ", {work:?}")?;
        }
        for message in self.revokes.iter() {
            let word = |is: bool, word| if is { word } else { "" };
            write!(
                f,
                ", {}{}{}{} (due {}, window {})",
                if message.expire { "expire" } else { "now" },
                word(message.copy, " copy"),
                word(message.settling, " settling"),
                word(message.closed, " begun"),
                message.due,
                message.window
            )?;
        }
        for outcome in self.outcomes.iter() {
            write!(f, ", sent {outcome:?}")?;
        }
        for answer in self.answers.iter() {
            write!(f, ", answered {answer:?}")?;
        }
        if let Some(role) = self.role {
            write!(f, ", {role:?}")?;
        }
        if let Some(held) = self.held {
            write!(f, ", held until {held}")?;
        }
        if self.renewal != Renewal::Idle {
            write!(f, ", renewal {:?}", self.renewal)?;
        }
        for (is, word) in [
            (self.asked, "asked to end"),
            (self.ghost, "ghost"),
            (self.wiped, "wiped"),
            (self.restored, "restored"),
        ] {
            if is {
                write!(f, ", {word}")?;
            }
        }
        if self.replays > 0 {
            write!(f, ", {} replays left", self.replays)?;
        }
        write!(f, ", {} faults left", self.faults)
    }
}
