//! Envelopes and keys, as their receivers get them.

use super::*;
use crate::secret::Secret;

#[test]
fn only_the_right_hands_open_it() {
    let (dispatcher, pool, other) = (
        KeyPair::generate(),
        KeyPair::generate(),
        KeyPair::generate(),
    );
    let sealed = dispatcher.seal(pool.public(), b"head", b"body").unwrap();
    assert_eq!(
        pool.open(dispatcher.public(), b"head", &sealed)
            .unwrap()
            .as_slice(),
        b"body"
    );
    assert_eq!(
        other.open(dispatcher.public(), b"head", &sealed),
        Err(SealError::OtherKey)
    );
    assert_eq!(
        pool.open(other.public(), b"head", &sealed),
        Err(SealError::NotAuthentic)
    );
    assert_eq!(
        pool.open(dispatcher.public(), b"other", &sealed),
        Err(SealError::NotAuthentic)
    );
    for at in 0..sealed.len() {
        let mut bent = sealed.clone();
        bent[at] ^= 1;
        assert!(
            pool.open(dispatcher.public(), b"head", &bent).is_err(),
            "byte {at}"
        );
    }
    assert_eq!(
        pool.open(dispatcher.public(), b"head", b"short"),
        Err(SealError::UnknownForm)
    );
}

/// An engine drops what is no envelope, and keeps an envelope that it cannot open for another version.
#[test]
fn an_envelope_is_recognised_by_its_length_and_its_suite() {
    let shortest = HEAD_BYTES + TAG_BYTES;
    for (length, suite, is_envelope) in [
        (0, 1, false),
        (shortest - 1, 1, false),
        (shortest, 1, true),
        (shortest + 1, 1, true),
        (shortest, 0, false),
        (shortest, 99, true),
    ] {
        let mut bytes = vec![7; length];
        if let Some(first) = bytes.first_mut() {
            *first = suite;
        }
        assert_eq!(is_sealed(&bytes), is_envelope, "{length} bytes, {suite}");
    }
}

#[test]
fn the_form_of_an_envelope_is_its_first_byte() {
    let (from, to) = (KeyPair::generate(), KeyPair::generate());
    for form in [Form::Alone, Form::Shared] {
        let at = Timestamp::UNIX_EPOCH;
        let sealed = from.seal_as(form, to.public(), at, b"", b"x").unwrap();
        assert_eq!(Form::of(&sealed), form);
    }
    assert_eq!(Form::of(b""), Form::Alone);
}

/// An envelope that is only a head, or has less than a tag after its head, is refused as an unknown form or as not
/// authentic.
#[test]
fn what_is_too_short_is_refused_by_its_form() {
    let (from, to) = (KeyPair::generate(), KeyPair::generate());
    let sealed = from.seal(to.public(), b"", b"x").unwrap();
    let opened = |length: usize| to.open(from.public(), b"", &sealed[..length]);
    assert_eq!(opened(HEAD_BYTES - 1), Err(SealError::UnknownForm));
    assert_eq!(opened(HEAD_BYTES), Err(SealError::NotAuthentic));
    let mut other_suite = sealed.clone();
    other_suite[0] = 3;
    assert_eq!(
        to.open(from.public(), b"", &other_suite),
        Err(SealError::UnknownForm)
    );
}

#[test]
fn two_keys_are_valid_side_by_side() {
    let dispatcher = KeyPair::generate();
    let ring = KeyRing {
        newest: KeyPair::generate(),
        previous: vec![KeyPair::generate()],
    };
    for key in [&ring.newest, &ring.previous[0]] {
        let sealed = dispatcher.seal(key.public(), b"head", b"body").unwrap();
        let opened = Open::open(&ring, dispatcher.public(), b"head", &sealed).unwrap();
        assert_eq!(opened.as_slice(), b"body");
    }
    let sealed = dispatcher
        .seal(KeyPair::generate().public(), b"head", b"body")
        .unwrap();
    assert_eq!(
        Open::open(&ring, dispatcher.public(), b"head", &sealed),
        Err(SealError::OtherKey)
    );
}

#[test]
fn keys_travel_as_base64() {
    let pair = KeyPair::generate();
    let again = KeyPair::from_base64(&pair.to_base64()).unwrap();
    assert_eq!(again.public(), pair.public());
    assert!(PublicKey::from_base64("AAAA").is_err());
    assert!(KeyPair::from_base64(&Secret::new("AAAA")).is_err());
    let public = pair.public().to_base64();
    assert_eq!(PublicKey::from_base64(&public).unwrap(), *pair.public());
    assert_eq!(format!("{:?}", pair.public()), public);
}
