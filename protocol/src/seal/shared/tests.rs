#![allow(clippy::unwrap_used)]

use super::*;
use crate::seal::{Form, SUITE};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

fn sealed(from: &KeyPair, to: &KeyPair, second: i64, body: &[u8]) -> Vec<u8> {
    from.seal_as(Form::Shared, to.public(), at(second), b"head", body)
        .unwrap()
}

fn opened(to: &KeyPair, from: &KeyPair, envelope: &[u8]) -> Result<Vec<u8>, SealError> {
    to.open(from.public(), b"head", envelope)
        .map(|text| text.to_vec())
}

/// The same keys in another process, or after a restart: nothing is remembered.
fn restarted(pair: &KeyPair) -> KeyPair {
    KeyPair::from_base64(&pair.to_base64()).unwrap()
}

fn remembered(of: &KeyPair, from: &KeyPair) -> usize {
    let opened = of.encapsulations.opened();
    let of_sender = opened.senders.get(&from.public().0);
    of_sender.map_or(0, |one| one.secrets.len())
}

fn encapped(envelope: &[u8]) -> &[u8] {
    &envelope[HEAD_BYTES - ENCAPPED_BYTES..HEAD_BYTES]
}

fn salt(envelope: &[u8]) -> &[u8] {
    &envelope[HEAD_BYTES..HEAD_BYTES + SALT_BYTES]
}

#[test]
fn messages_of_a_minute_share_an_encapsulation_and_each_opens_alone() {
    let (from, to) = (KeyPair::generate(), KeyPair::generate());
    let envelopes = [0, 1, 59, 60].map(|second| sealed(&from, &to, second, b"body"));
    assert_eq!(encapped(&envelopes[0]), encapped(&envelopes[2]));
    assert_ne!(encapped(&envelopes[0]), encapped(&envelopes[3]));
    for envelope in envelopes.iter().rev() {
        assert_eq!(opened(&restarted(&to), &from, envelope).unwrap(), b"body");
        assert_eq!(opened(&to, &from, envelope).unwrap(), b"body");
        assert_eq!(opened(&to, &from, envelope).unwrap(), b"body", "remembered");
    }
    assert_eq!(remembered(&to, &from), 2);
    // Another recipient has another encapsulation.
    let other = sealed(&from, &KeyPair::generate(), 59, b"body");
    assert_ne!(encapped(&envelopes[2]), encapped(&other));
}

#[test]
fn only_the_right_keys_open_it_whether_or_not_the_encapsulation_is_remembered() {
    let (from, to, other) = (
        KeyPair::generate(),
        KeyPair::generate(),
        KeyPair::generate(),
    );
    let envelope = sealed(&from, &to, 0, b"body");
    let second = sealed(&from, &to, 1, b"other body");
    for _ in 0..2 {
        let wrong_head = to.open(from.public(), b"other", &envelope);
        assert_eq!(wrong_head, Err(SealError::NotAuthentic));
        let not_theirs = opened(&other, &from, &envelope);
        assert_eq!(not_theirs, Err(SealError::OtherKey));
        // With the key of another sender the envelope is refused.
        let other_sender = opened(&to, &other, &envelope);
        assert_eq!(other_sender, Err(SealError::NotAuthentic));
        for place in 0..envelope.len() {
            let mut bent = envelope.clone();
            bent[place] ^= 1;
            assert!(opened(&to, &from, &bent).is_err(), "byte {place}");
        }
        for length in 0..envelope.len() {
            assert!(opened(&to, &from, &envelope[..length]).is_err(), "{length}");
        }
        // A salt belongs to its message.
        let mut mixed = envelope.clone();
        mixed[HEAD_BYTES..HEAD_BYTES + SALT_BYTES].copy_from_slice(salt(&second));
        assert_eq!(opened(&to, &from, &mixed), Err(SealError::NotAuthentic));
        // The second round has the encapsulation in memory.
        assert_eq!(opened(&to, &from, &second).unwrap(), b"other body");
    }
}

/// A ciphertext under the encapsulation of another minute, sender or form is not authentic.
#[test]
fn a_ciphertext_is_bound_to_its_encapsulation() {
    let (from, to, rogue) = (
        KeyPair::generate(),
        KeyPair::generate(),
        KeyPair::generate(),
    );
    let first = sealed(&from, &to, 0, b"body");
    let later = sealed(&from, &to, 100, b"body");
    let forged = sealed(&rogue, &to, 0, b"body");
    // All three are in the reader's memory.
    for (sender, envelope) in [(&from, &first), (&from, &later), (&rogue, &forged)] {
        assert!(opened(&to, sender, envelope).is_ok());
    }
    for (under, sender) in [(&later, &from), (&forged, &from), (&forged, &rogue)] {
        let mut moved = first.clone();
        moved[..HEAD_BYTES].copy_from_slice(&under[..HEAD_BYTES]);
        assert_eq!(opened(&to, sender, &moved), Err(SealError::NotAuthentic));
    }
    let mut other_form = first.clone();
    other_form[0] = SUITE;
    assert_eq!(
        opened(&to, &from, &other_form),
        Err(SealError::NotAuthentic)
    );
    let mut alone = from.seal(to.public(), b"head", b"body").unwrap();
    alone[0] = SUITE_SHARED;
    assert_eq!(opened(&to, &from, &alone), Err(SealError::NotAuthentic));
}

/// No key encrypts two messages, neither within a process nor after a restart.
#[test]
fn no_message_key_is_used_twice() {
    let (from, to) = (KeyPair::generate(), KeyPair::generate());
    let mut seen = std::collections::HashSet::new();
    for process in [restarted(&from), restarted(&from)] {
        for _ in 0..200 {
            let envelope = sealed(&process, &to, 0, b"body");
            assert!(seen.insert((encapped(&envelope).to_vec(), salt(&envelope).to_vec())));
        }
    }
    let encapsulations: std::collections::HashSet<_> = seen.iter().map(|(one, _)| one).collect();
    assert_eq!(encapsulations.len(), 2, "one for each process");
    let salts: std::collections::HashSet<_> = seen.iter().map(|(_, salt)| salt).collect();
    assert_eq!(salts.len(), seen.len());
}

#[test]
fn a_forger_fills_no_memory_and_a_sender_displaces_only_its_own() {
    let (honest, hostile, to) = (
        KeyPair::generate(),
        KeyPair::generate(),
        KeyPair::generate(),
    );
    let kept = sealed(&honest, &to, 0, b"body");
    assert!(opened(&to, &honest, &kept).is_ok());
    // These envelopes are not authentic: another sender or nobody made them.
    for n in 0..300_u32 {
        let mut forged = kept.clone();
        forged[HEAD_BYTES - 4..HEAD_BYTES].copy_from_slice(&n.to_be_bytes());
        assert!(opened(&to, &honest, &forged).is_err());
        assert!(opened(&to, &hostile, &kept).is_err());
    }
    assert_eq!(
        (remembered(&to, &honest), remembered(&to, &hostile)),
        (1, 0)
    );
    // These envelopes are authentic, with an encapsulation for each message.
    for minute in 0..200 {
        let envelope = sealed(&hostile, &to, 60 * minute, b"body");
        assert!(opened(&to, &hostile, &envelope).is_ok());
    }
    assert_eq!(
        (remembered(&to, &honest), remembered(&to, &hostile)),
        (1, ENCAPSULATIONS_MAX)
    );
    assert_eq!(from_memory(&to), 1 + ENCAPSULATIONS_MAX);
}

fn from_memory(of: &KeyPair) -> usize {
    let opened = of.encapsulations.opened();
    opened.senders.values().map(|one| one.secrets.len()).sum()
}

#[test]
fn the_least_recently_used_is_forgotten_and_opens_again() {
    let (from, to) = (KeyPair::generate(), KeyPair::generate());
    let often = sealed(&from, &to, -100, b"often");
    let once = sealed(&from, &to, -300, b"once");
    for envelope in [&often, &once] {
        assert!(opened(&to, &from, envelope).is_ok());
    }
    for minute in 0..200 {
        assert!(opened(&to, &from, &sealed(&from, &to, 60 * minute, b"x")).is_ok());
        assert!(opened(&to, &from, &often).is_ok());
    }
    let is_known = |envelope: &[u8]| {
        let opened = to.encapsulations.opened();
        opened.senders[&from.public().0]
            .secrets
            .contains_key(encapped(envelope))
    };
    assert!(is_known(&often) && !is_known(&once));
    assert_eq!(opened(&to, &from, &once).unwrap(), b"once");
}

/// A number as 32 bytes.
fn bytes(n: usize) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&n.to_be_bytes());
    bytes
}

#[test]
fn encapsulations_are_forgotten_in_the_order_of_their_last_use() {
    let (mut opened, sender) = (Opened::default(), PublicKey(bytes(0)));
    for n in 0..ENCAPSULATIONS_MAX {
        opened.remember(&sender, bytes(n), ExportedSecret::default());
    }
    for n in (0..ENCAPSULATIONS_MAX).step_by(2) {
        assert!(opened.find(&sender, &bytes(n)).is_some());
    }
    for n in (1..ENCAPSULATIONS_MAX).step_by(2) {
        assert!(opened.senders[&sender.0].secrets.contains_key(&bytes(n)));
        opened.remember(&sender, bytes(1000 + n), ExportedSecret::default());
        assert!(!opened.senders[&sender.0].secrets.contains_key(&bytes(n)));
    }
    for n in (0..ENCAPSULATIONS_MAX).step_by(2) {
        assert!(opened.find(&sender, &bytes(n)).is_some(), "{n}");
    }
}

#[test]
fn a_new_sender_displaces_the_one_used_least_recently_and_a_known_one_none() {
    let mut opened = Opened::default();
    let secret = ExportedSecret::default;
    for n in 0..SENDERS_MAX {
        opened.remember(&PublicKey(bytes(n)), bytes(0), secret());
    }
    opened.remember(&PublicKey(bytes(7)), bytes(1), secret());
    assert_eq!(opened.senders.len(), SENDERS_MAX);
    assert!(opened.find(&PublicKey(bytes(0)), &bytes(0)).is_some());
    opened.remember(&PublicKey(bytes(SENDERS_MAX)), bytes(0), secret());
    assert_eq!(opened.senders.len(), SENDERS_MAX);
    for (n, is_known) in [(0, true), (1, false), (2, true), (SENDERS_MAX, true)] {
        assert_eq!(opened.senders.contains_key(&bytes(n)), is_known, "{n}");
    }
}

#[test]
fn recipients_of_a_minute_keep_their_encapsulations() {
    let from = KeyPair::generate();
    let (one, other) = (KeyPair::generate(), KeyPair::generate());
    let first = sealed(&from, &one, 0, b"body");
    sealed(&from, &other, 0, b"body");
    let second = sealed(&from, &one, 1, b"body");
    assert_eq!(encapped(&first), encapped(&second));
}

/// Nothing else holds a secret that is no longer remembered, so it has been wiped.
#[test]
fn a_forgotten_secret_is_dropped() {
    let (from, to) = (KeyPair::generate(), KeyPair::generate());
    let first = sealed(&from, &to, 0, b"body");
    assert!(opened(&to, &from, &first).is_ok());
    let sent = Arc::downgrade(&from.encapsulations.made()[&to.public().0].secret);
    let read = {
        let opened = to.encapsulations.opened();
        let of_sender = &opened.senders[&from.public().0];
        Arc::downgrade(&of_sender.secrets[encapped(&first)].1)
    };
    assert!(sent.strong_count() == 1 && read.strong_count() == 1);
    sealed(&from, &to, 60, b"body");
    assert!(sent.upgrade().is_none(), "of the sender, after its minute");
    for minute in 2..200 {
        assert!(opened(&to, &from, &sealed(&from, &to, 60 * minute, b"x")).is_ok());
    }
    assert!(read.upgrade().is_none(), "of the reader, when displaced");
}

/// This form on the wire does not change: a later process can open what an earlier process has parked.
#[test]
fn an_envelope_of_earlier_is_opened() {
    let key = |n: u8| {
        let text = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, [n; 32]);
        KeyPair::from_base64(&crate::secret::Secret::new(text)).unwrap()
    };
    let (from, to) = (key(1), key(2));
    let parse = |text: &str| {
        base64::Engine::decode(&base64::prelude::BASE64_STANDARD, text.trim()).unwrap()
    };
    let shared = parse(include_str!("shared.b64"));
    let alone = parse(include_str!("alone.b64"));
    assert_eq!((shared[0], alone[0]), (SUITE_SHARED, SUITE));
    for envelope in [shared, alone] {
        assert_eq!(opened(&to, &from, &envelope).unwrap(), b"body");
    }
}
