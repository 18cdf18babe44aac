//! Mayfly end to end, on real RabbitMQ and PostgreSQL: what users do, and every fault the design
//! names, by causing it. `make e2e` runs the three tiers, which are the modules `fast`, `matrix` and
//! `slow`. `chaos`, `skew` and `peers` have targets of their own.

#![allow(clippy::unwrap_used, reason = "a test panics where it fails")]
#![allow(
    clippy::too_many_lines,
    reason = "a test tells one story from its start to its end"
)]

mod chaos;
mod fast;
mod matrix;
mod peers;
mod skew;
mod slow;
