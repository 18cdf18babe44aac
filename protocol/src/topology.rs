//! Names of all queues and exchanges that Mayfly declares in RabbitMQ, and the routing of the delay levels as
//! pure functions. `mayfly_common::broker` has the arguments of each.
//!
//! NServiceBus and Celery use the same delay scheme: binary levels of queues with one TTL each. RabbitMQ
//! expires messages only at the head of a queue, so messages with different delays must not share a queue.

use std::time::Duration;

use crate::names::{EngineName, InstallationId, PoolName};

/// Alternate exchange and queue of messages that match no binding.
pub const UNROUTABLE: &str = "mayfly.v1.unroutable";
/// The exchange at the bottom of the delay levels; each pool's revoke queue is bound to it.
pub const DELIVER: &str = "mayfly.v1.deliver";
/// Queue of revoke outcomes, consumed by dispatchers.
pub const OUTCOMES: &str = "mayfly.v1.outcomes";
/// Fanout exchange of heartbeats; every dispatcher binds a queue of its own.
pub const ENGINES: &str = "mayfly.v1.engines";
/// Direct exchange of all messages from engines to dispatchers. An answer goes to the queue that its request
/// names, an outcome to [`OUTCOMES`], an unreadable message to [`UNREADABLE`].
pub const ANSWERS: &str = "mayfly.v1.answers";
/// Topic exchange through which engines park messages in the right delay level. RabbitMQ checks the routing
/// key against the user's topic permission, so an engine can park only for its own pool.
pub const PARK: &str = "mayfly.v1.park";
/// Topic exchange through which all ends are parked. It is bound directly to the queues of the levels and has
/// no alternate exchange. A message that no level takes is returned (`mandatory`), so a confirm proves that a
/// level has it. If it is absent, engines use [`PARK`], which cannot prove that.
///
/// It has the name of a level above the highest, so that the rights of dispatchers' users cover it.
pub const ENTRY: &str = "mayfly.v1.delay.L24";
/// An exchange that exists while the ends of all leases are known to be parked. It is deleted before a lost
/// delay level is declared again, and declared when all ends are parked again. So if a dispatcher dies in
/// between, the next one sees that ends are missing. Nothing is published to it.
pub const PARKED: &str = "mayfly.v1.dispatcher.parked";
/// Queue of messages without a head that can be read; bounded, consumed by nobody.
pub const UNREADABLE: &str = "mayfly.v1.unreadable";
/// The prefix of RabbitMQ's direct reply-to names, to which dispatchers of earlier versions request answers.
pub const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// Exchange whose argument names the installation of the virtual host. Nothing is published to it.
///
/// It has the name of a dispatcher's queue, so that the rights of dispatchers' users cover it.
pub const OWNER: &str = "mayfly.v1.dispatcher.owner";

const OWNED_BY: &str = "mayfly.v1.dispatcher.";
const PROBE: &str = "PROBE-";
/// Number of delay levels. 24 levels of 250 ms ticks reach 48.5 days.
pub const LEVELS: u32 = 24;
/// The shortest delay, in milliseconds.
pub const TICK_MS: u64 = 250;
/// The longest delay one publish can ask for. A longer one is clamped; the engine parks the
/// remainder again on arrival.
pub const MAX_DELAY: Duration = Duration::from_millis(((1 << LEVELS) - 1) * TICK_MS);

/// Queue of create tasks of a pool.
pub fn create_queue(pool: &PoolName) -> String {
    format!("mayfly.v1.pool.{pool}.create")
}

/// Queue of revoke tasks of a pool.
pub fn revoke_queue(pool: &PoolName) -> String {
    format!("mayfly.v1.pool.{pool}.revoke")
}

/// Exclusive queue of one engine, for pings and verdicts. The pool comes first: a broker user of a
/// pool may have the queues of its pool's engines only, and no pool can take another's names.
pub fn engine_queue(pool: &PoolName, engine: &EngineName) -> String {
    format!("mayfly.v1.engine.{pool}.{engine}")
}

/// Queue of the authorities that messages of a pool name. It has the form of an engine's queue, so that the
/// rights of engines' users cover it; no engine can have this name.
pub fn authorities_queue(pool: &PoolName) -> String {
    format!("mayfly.v1.engine.{pool}.=authorities")
}

/// The queue of an engine of an earlier version.
pub fn earlier_engine_queue(engine: &EngineName) -> String {
    format!("mayfly.v1.engine.{engine}")
}

/// Exclusive queue of one connection of a dispatcher.
pub fn dispatcher_queue(connection: &str, purpose: &str) -> String {
    format!("mayfly.v1.dispatcher.{connection}.{purpose}")
}

/// The argument of [`OWNER`] that names an installation; no exchange has this name.
pub fn owned_by(installation: &InstallationId) -> String {
    format!("{OWNED_BY}{installation}")
}

/// The installations that a text names in this form.
pub fn owners_in(text: &str) -> impl Iterator<Item = InstallationId> {
    let after = text.split(OWNED_BY).skip(1);
    after.filter_map(|rest| rest.get(..36)?.parse().ok())
}

/// Exchange and queue of delay level `n`, 0 (250 ms) to 23 (24.3 days).
pub fn level(n: u32) -> String {
    format!("mayfly.v1.delay.L{n:02}")
}

/// The exchange to which level `n` sends messages, after their delay or without one.
pub fn below(n: u32) -> String {
    match n {
        0 => DELIVER.to_owned(),
        n => level(n - 1),
    }
}

/// Time a message stays in the queue of level `n`, in milliseconds.
pub fn level_ttl_ms(n: u32) -> u64 {
    TICK_MS << n
}

/// Binding key at level `n` for a digit: `1` goes to its queue, `0` to the level below.
pub fn level_binding(n: u32, digit: char) -> String {
    format!("{}{digit}.#", "*.".repeat((LEVELS - 1 - n) as usize))
}

/// Binding key of a pool's revoke queue at [`DELIVER`].
pub fn deliver_binding(pool: &PoolName) -> String {
    binding_of(pool.as_str())
}

/// Binding key at [`DELIVER`] for routing keys with this last word.
pub fn binding_of(word: &str) -> String {
    format!("#.{word}")
}

/// Last word of the routing key of a probe of the delay levels. Only this connection of a dispatcher consumes it. The
/// word has capitals, so it is no pool's name.
pub fn probe_word(connection: &str) -> String {
    format!("{PROBE}{connection}")
}

/// Whether this is the routing key of a probe.
pub fn is_probe_key(key: &str) -> bool {
    let last = key.rsplit('.').next();
    last.is_some_and(|word| word.starts_with(PROBE))
}

/// Binding key at [`PARK`] and [`ENTRY`] of level `n`: the levels above have nothing to hold.
pub fn park_binding(n: u32) -> String {
    format!("{}1.#", "0.".repeat((LEVELS - 1 - n) as usize))
}

/// Exchange and routing key with which a message reaches the pool's revoke queue after `delay`. The delay is
/// rounded up to a whole tick (at least one) and clamped to [`MAX_DELAY`].
pub fn delay_route(delay: Duration, pool: &PoolName) -> (String, String) {
    delay_route_to(delay, pool.as_str())
}

/// Like [`delay_route`], for any last word of the routing key.
pub fn delay_route_to(delay: Duration, word: &str) -> (String, String) {
    let ticks = u64::try_from(delay.min(MAX_DELAY).as_micros())
        .unwrap_or(u64::MAX)
        .div_ceil(TICK_MS * 1000)
        .max(1);
    let exchange = level(ticks.ilog2());
    let mut key = String::with_capacity(2 * LEVELS as usize + word.len());
    for n in (0..LEVELS).rev() {
        key.push(if ticks >> n & 1 == 1 { '1' } else { '0' });
        key.push('.');
    }
    key.push_str(word);
    (exchange, key)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// AMQP topic matching, for the model below.
    fn topic_matches(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.first(), key.first()) {
            (None, None) => true,
            (Some(&"#"), _) => {
                topic_matches(&pattern[1..], key)
                    || (!key.is_empty() && topic_matches(pattern, &key[1..]))
            }
            (Some(&p), Some(&k)) => (p == "*" || p == k) && topic_matches(&pattern[1..], &key[1..]),
            _ => false,
        }
    }

    /// Follows a message through the levels as the bindings would and adds up what it waits.
    fn total_wait_ms(exchange: &str, key: &str) -> u64 {
        let key: Vec<&str> = key.split('.').collect();
        let mut at = exchange.to_owned();
        let mut waited = 0;
        while at != DELIVER {
            let n = (0..LEVELS).find(|n| level(*n) == at).unwrap();
            let one = level_binding(n, '1');
            let zero = level_binding(n, '0');
            let held = topic_matches(&one.split('.').collect::<Vec<_>>(), &key);
            let passed = topic_matches(&zero.split('.').collect::<Vec<_>>(), &key);
            assert!(held != passed, "exactly one binding takes a message");
            if held {
                waited += level_ttl_ms(n);
            }
            at = below(n);
        }
        waited
    }

    #[test]
    fn a_year_is_clamped() {
        let pool = "pool1".parse().unwrap();
        let (exchange, key) = delay_route(Duration::from_secs(365 * 86_400), &pool);
        assert_eq!(exchange, level(23));
        assert_eq!(total_wait_ms(&exchange, &key), MAX_DELAY.as_millis() as u64);
    }

    /// Programs of other versions and the permissions of broker users contain these names.
    #[test]
    fn names_at_the_broker_never_change() {
        let (pool, engine) = ("pool1".parse().unwrap(), "e1".parse().unwrap());
        let installation = "00000000-0000-4000-8000-000000000001".parse().unwrap();
        for (name, expected) in [
            (create_queue(&pool), "mayfly.v1.pool.pool1.create"),
            (revoke_queue(&pool), "mayfly.v1.pool.pool1.revoke"),
            (engine_queue(&pool, &engine), "mayfly.v1.engine.pool1.e1"),
            (
                authorities_queue(&pool),
                "mayfly.v1.engine.pool1.=authorities",
            ),
            (earlier_engine_queue(&engine), "mayfly.v1.engine.e1"),
            (
                dispatcher_queue("c1", "replies"),
                "mayfly.v1.dispatcher.c1.replies",
            ),
            (
                owned_by(&installation),
                "mayfly.v1.dispatcher.00000000-0000-4000-8000-000000000001",
            ),
            (level(0), "mayfly.v1.delay.L00"),
            (level(23), "mayfly.v1.delay.L23"),
            (below(0), DELIVER),
            (below(23), "mayfly.v1.delay.L22"),
            (deliver_binding(&pool), "#.pool1"),
            (probe_word("c1"), "PROBE-c1"),
            (park_binding(23), "1.#"),
            (park_binding(21), "0.0.1.#"),
            (level_binding(23, '1'), "1.#"),
            (level_binding(21, '0'), "*.*.0.#"),
        ] {
            assert_eq!(name, expected);
        }
        assert!(is_probe_key("0.1.PROBE-c1"));
        assert!(!is_probe_key("PROBE-c1.0.pool1") && !is_probe_key(""));
    }

    #[test]
    fn the_entry_is_no_level() {
        assert_eq!(ENTRY, level(LEVELS));
        assert!("PROBE-x".parse::<PoolName>().is_err());
    }

    #[test]
    fn the_queue_of_authorities_is_no_engines() {
        assert!("=authorities".parse::<EngineName>().is_err());
    }

    #[test]
    fn the_owner_is_read_out_of_what_the_broker_says() {
        let (ours, theirs) = (InstallationId::random(), InstallationId::random());
        let said = format!(
            "PRECONDITION_FAILED - inequivalent arg 'alternate-exchange' for exchange '{OWNER}' in vhost 'x': received '{}' but current is '{}'",
            owned_by(&ours),
            owned_by(&theirs)
        );
        assert_eq!(owners_in(&said).collect::<Vec<_>>(), [ours, theirs]);
        assert_eq!(owners_in("current is 'mayfly.v1.dispatcher.x'").count(), 0);
    }

    #[test]
    fn nothing_to_wait_is_one_tick() {
        let (exchange, key) = delay_route(Duration::ZERO, &"p".parse().unwrap());
        assert_eq!(exchange, level(0));
        assert_eq!(total_wait_ms(&exchange, &key), TICK_MS);
    }

    proptest! {
        #[test]
        fn the_levels_add_up(ms in 0u64..=MAX_DELAY.as_millis() as u64) {
            let (exchange, key) = delay_route(Duration::from_millis(ms), &"pool1".parse().unwrap());
            let waited = total_wait_ms(&exchange, &key);
            prop_assert!(waited >= ms && waited < ms.max(1) + TICK_MS);
            // Through the engines' exchange the message reaches the same level, and no other.
            let words: Vec<&str> = key.split('.').collect();
            let entered: Vec<String> = (0..LEVELS)
                .filter(|n| topic_matches(&park_binding(*n).split('.').collect::<Vec<_>>(), &words))
                .map(level)
                .collect();
            prop_assert_eq!(entered, vec![exchange]);
        }
    }
}
