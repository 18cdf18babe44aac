//! What a create reports beside its result.

/// What a create reports beside its result.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    /// The reasons of tries beyond the first, and of a wait for replicas that ended too early.
    pub(crate) retries: Vec<&'static str>,
    /// Pairs of object and privilege that patterns skipped, if that was looked at.
    pub(crate) skipped: Option<usize>,
    /// Warnings about privileges that the account gets later.
    pub(crate) warnings: Vec<String>,
    /// Another transaction held the grant role at the last try.
    pub(super) locked: bool,
    /// The account may exist: it was found, or its statements were sent.
    pub(crate) begun: bool,
}
