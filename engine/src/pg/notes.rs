//! Additional reports of a create, besides its result.

/// Additional reports of a create, besides its result.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    /// Reasons of second and later tries, and of a wait for replicas that ended too early.
    pub(crate) retries: Vec<&'static str>,
    /// Pairs of object and privilege that patterns skipped, if that was looked at.
    pub(crate) skipped: Option<usize>,
    /// Warnings about privileges that the account gets later.
    pub(crate) warnings: Vec<String>,
    /// Whether another transaction held the grant role at the last try.
    pub(super) locked: bool,
    /// Whether the account may exist: it was found, or its statements were sent.
    pub(crate) begun: bool,
}
