//! Heads as headers, what is unreadable, and where each message goes.

use super::*;
use mayfly_protocol::names::LeaseId;

const ISSUED_MS: i64 = 1_700_000_000_123;

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(ms).unwrap()
}

fn head() -> Head {
    Head {
        kind: Kind::Revoke,
        pool: "pool1".parse().unwrap(),
        lease: None,
        issued: at(ISSUED_MS),
        deadline: None,
        attempt: 0,
        settling: false,
        traceparent: String::new(),
    }
}

fn message(to: Address, head: Head) -> Message {
    Message {
        to,
        head,
        body: vec![1, 2, 3],
        reply_as: None,
        answers: None,
        expires: None,
    }
}

fn routes(entry: bool, entrances: bool) -> Routes {
    Routes {
        reply_to: Some("mayfly.v1.dispatcher.replies".to_owned()),
        entrances,
        entry: AtomicBool::new(entry),
        probes: "PROBE-1".to_owned(),
    }
}

fn written_for(head: Head) -> BasicProperties {
    let message = message(Address::Outcomes, head);
    properties(&message, "id", &routes(true, true))
}

fn with(found: &BasicProperties, name: &str, value: AMQPValue) -> BasicProperties {
    let mut headers = found.headers().clone().unwrap();
    headers.insert(name.into(), value);
    found.clone().with_headers(headers)
}

fn without(found: &BasicProperties, name: &str) -> BasicProperties {
    let mut headers = FieldTable::default();
    for (other, value) in found.headers().as_ref().unwrap().inner() {
        if other.as_str() != name {
            headers.insert(other.clone(), value.clone());
        }
    }
    found.clone().with_headers(headers)
}

/// Nothing is written for an absent value. Earlier versions read exactly these headers.
#[test]
fn a_head_is_read_as_it_was_written() {
    let lease = LeaseId::random();
    let full = Head {
        lease: Some(lease),
        deadline: Some(at(ISSUED_MS + 30_000)),
        attempt: u32::MAX,
        settling: true,
        traceparent: "00-abc-def-01".to_owned(),
        ..head()
    };
    let of_full = [
        ("mayfly-pool", AMQPValue::LongString("pool1".into())),
        ("mayfly-issued-ms", AMQPValue::LongLongInt(ISSUED_MS)),
        (
            "mayfly-lease",
            AMQPValue::LongString(lease.to_string().into()),
        ),
        (
            "mayfly-deadline-ms",
            AMQPValue::LongLongInt(ISSUED_MS + 30_000),
        ),
        ("mayfly-attempt", AMQPValue::LongLongInt(4_294_967_295)),
        ("mayfly-settling", AMQPValue::Boolean(true)),
        ("traceparent", AMQPValue::LongString("00-abc-def-01".into())),
    ];
    for (head, expected) in [(head(), &of_full[..2]), (full, &of_full[..])] {
        let found = written_for(head.clone());
        let mut headers = FieldTable::default();
        for (name, value) in expected {
            headers.insert((*name).into(), value.clone());
        }
        assert_eq!(found.headers().as_ref(), Some(&headers));
        let read = parse_head(&found).unwrap();
        assert_eq!(read, head);
    }
}

/// A user who may publish to a queue can write any header.
#[test]
fn a_head_without_kind_pool_or_time_is_unreadable() {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let whole = written_for(head());
    for unreadable in [
        BasicProperties::default(),
        whole.clone().with_headers(FieldTable::default()),
        BasicProperties::default().with_headers(whole.headers().clone().unwrap()),
        without(&whole, H_POOL),
        without(&whole, H_ISSUED),
        with(&whole, H_POOL, text("not a pool!")),
        with(&whole, H_POOL, AMQPValue::LongString(vec![0xff].into())),
        with(&whole, H_POOL, AMQPValue::Boolean(true)),
        with(&whole, H_ISSUED, text("1700000000123")),
        with(&whole, H_ISSUED, AMQPValue::LongLongInt(i64::MAX)),
    ] {
        assert!(parse_head(&unreadable).is_none(), "{unreadable:?}");
    }
}

#[test]
fn other_wrong_headers_count_as_absent() {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let whole = written_for(Head {
        attempt: 7,
        ..head()
    });
    for (name, value) in [
        (H_LEASE, text("x")),
        (H_DEADLINE, AMQPValue::LongLongInt(i64::MIN)),
        (H_SETTLING, text("true")),
        (H_TRACE, AMQPValue::LongLongInt(1)),
    ] {
        let read = parse_head(&with(&whole, name, value)).unwrap();
        let expected = Head {
            attempt: 7,
            ..head()
        };
        assert_eq!(read, expected, "{name}");
    }
    for attempt in [-1, i64::from(u32::MAX) + 1] {
        let wrong = with(&whole, H_ATTEMPT, AMQPValue::LongLongInt(attempt));
        assert_eq!(parse_head(&wrong).unwrap().attempt, 0);
    }
    let newer = whole.with_type("a kind of tomorrow".into());
    assert_eq!(parse_head(&newer).unwrap().kind, Kind::Unknown);
}

/// The exchange of a message depends on what the engine's user may do. For delays only `entry` decides.
#[test]
fn each_address_has_its_exchange() {
    let second = Duration::from_secs(1);
    let pool = || "pool1".parse::<PoolName>().unwrap();
    let (level, key) = topology::delay_route_to(second, "pool1");
    let (_, probe) = topology::delay_route_to(second, "PROBE-1");
    let delayed = || Address::Delayed(second, pool());
    let of_earlier = format!("{}.x", topology::DIRECT_REPLY_TO);
    for (to, entry, entrances, exchange, expected, mandatory) in [
        (delayed(), true, true, topology::ENTRY, key.as_str(), true),
        (delayed(), true, false, topology::ENTRY, &key, true),
        (delayed(), false, true, topology::PARK, &key, true),
        (delayed(), false, false, &level, &key, true),
        (
            Address::Probe(second),
            true,
            true,
            topology::ENTRY,
            &probe,
            true,
        ),
        (
            Address::Outcomes,
            true,
            true,
            topology::ANSWERS,
            topology::OUTCOMES,
            true,
        ),
        (Address::Outcomes, true, false, "", topology::OUTCOMES, true),
        (Address::Queue("q".to_owned()), true, true, "", "q", true),
        // The caller of this answer may have left.
        (
            Address::Answer("q".to_owned()),
            true,
            true,
            topology::ANSWERS,
            "q",
            false,
        ),
        (
            Address::Answer(of_earlier.clone()),
            true,
            true,
            "",
            &of_earlier,
            false,
        ),
        (Address::Engines, true, true, topology::ENGINES, "", false),
    ] {
        let sent = outgoing(
            &message(to.clone(), head()),
            "id".to_owned(),
            &routes(entry, entrances),
        );
        assert_eq!(
            (sent.exchange.as_str(), sent.key.as_str()),
            (exchange, expected),
            "{to:?} {entry} {entrances}"
        );
        assert_eq!(sent.mandatory, mandatory, "{to:?}");
    }
}

#[test]
fn a_request_names_its_queue_and_an_answer_its_request() {
    let of = |reply_as: Option<&str>, answers: Option<&str>, routes: &Routes| {
        let message = Message {
            reply_as: reply_as.map(str::to_owned),
            answers: answers.map(str::to_owned),
            expires: Some(Duration::from_millis(1500)),
            ..message(Address::Outcomes, head())
        };
        let found = properties(&message, "id", routes);
        assert_eq!(found.expiration().as_ref().unwrap().as_str(), "1500");
        assert_eq!(found.delivery_mode(), &Some(2));
        let text = |text: &Option<ShortString>| text.as_ref().map(ToString::to_string);
        (text(found.reply_to()), text(found.correlation_id()))
    };
    let some = |text: &str| Some(text.to_owned());
    let routes = routes(true, true);
    let queue = some("mayfly.v1.dispatcher.replies");
    assert_eq!(of(Some("a"), None, &routes), (queue, some("a")));
    assert_eq!(of(None, Some("b"), &routes), (None, some("b")));
    assert_eq!(of(None, None, &routes), (None, None));
    // An engine has no queue for answers.
    let of_engine = Routes {
        reply_to: None,
        ..routes
    };
    assert_eq!(of(Some("a"), None, &of_engine), (None, None));
}

/// The broker's own headers would be taken for those of this publish.
#[test]
fn an_unreadable_message_is_kept_in_part_without_the_headers_of_the_broker() {
    let found = with(&written_for(head()), "x-death", AMQPValue::Boolean(true));
    for (length, kept) in [
        (0, 0),
        (SPECIMEN_BYTES, SPECIMEN_BYTES),
        (SPECIMEN_BYTES + 1, SPECIMEN_BYTES),
    ] {
        let sent = specimen(&found, &vec![7; length], "new".to_owned());
        assert_eq!(sent.body.len(), kept);
        assert_eq!(
            (sent.exchange.as_str(), sent.key.as_str(), sent.mandatory),
            (topology::ANSWERS, topology::UNREADABLE, false)
        );
        let headers = sent.properties.headers().clone().unwrap();
        assert_eq!(
            Some(&headers),
            without(&found, "x-death").headers().as_ref()
        );
        assert_eq!(sent.properties.message_id(), &Some("new".into()));
        assert_eq!(sent.properties.kind(), found.kind());
    }
}
