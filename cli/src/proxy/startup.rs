//! The first packet of a client (PostgreSQL documentation, "Start-up"). It has no type, so its length is limited
//! before it is read.

use super::errors::{State, fatal};

/// PostgreSQL has the same limit (`MAX_STARTUP_PACKET_LENGTH`).
pub(super) const PACKET_MAX: usize = 10_000;
/// The shortest packet: a length and a code.
pub(super) const PACKET_MIN: usize = 8;
/// The key of protocol 3.0 has 4 bytes, that of 3.2 up to 256. The id of the process comes before the key.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 8..=260;

const CANCEL: u32 = 80_877_102;
const SSL: u32 = 80_877_103;
const GSS: u32 = 80_877_104;

/// The first packet of a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum First {
    /// TLS or GSSAPI encryption: neither is offered.
    Encryption,
    /// A request to cancel what the session with this process id and key does.
    Cancel(Vec<u8>),
    /// A session with these parameters.
    Session(Startup),
}

/// What a client asks for in its session.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Startup {
    /// 3.0 or later, as it was sent.
    version: u32,
    /// Names and values as they came. With `--hold` they are kept for the whole session, and a client may send
    /// thousands of short ones: a buffer for each would cost a multiple of the packet.
    parameters: Box<[u8]>,
}

/// Reads a packet, without its length. An error is a message for the client, or `None` if what came is not of
/// PostgreSQL's protocol.
pub(super) fn parse(packet: &[u8]) -> Result<First, Option<Vec<u8>>> {
    let (code, rest) = packet.split_first_chunk().ok_or(None)?;
    match u32::from_be_bytes(*code) {
        SSL | GSS if rest.is_empty() => Ok(First::Encryption),
        CANCEL if KEY_BYTES.contains(&rest.len()) => Ok(First::Cancel(rest.to_vec())),
        SSL | GSS | CANCEL => Err(None),
        version if version >> 16 == 3 => {
            if !is_list_of_pairs(rest) {
                let text = "invalid startup packet layout";
                return Err(Some(fatal(State::ProtocolViolation, text, None)));
            }
            Ok(First::Session(Startup {
                version,
                parameters: rest.into(),
            }))
        }
        version => Err(Some(fatal(
            State::NotSupported,
            &format!(
                "unsupported frontend protocol {}.{}: 3.0 and later are supported",
                version >> 16,
                version & 0xffff
            ),
            None,
        ))),
    }
}

/// The next text, which ends in a zero byte.
fn text<'p>(rest: &mut &'p [u8]) -> Option<&'p [u8]> {
    let end = rest.iter().position(|byte| *byte == 0)?;
    let (text, after) = rest.split_at(end);
    *rest = &after[1..];
    Some(text)
}

/// Whether these are pairs of a name and a value, and then one empty name.
fn is_list_of_pairs(mut rest: &[u8]) -> bool {
    loop {
        match text(&mut rest) {
            Some(b"") => return rest.is_empty(),
            Some(_) if text(&mut rest).is_some() => {}
            _ => return false,
        }
    }
}

impl Startup {
    fn pairs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut rest = &*self.parameters;
        std::iter::from_fn(move || {
            let name = text(&mut rest).filter(|name| !name.is_empty())?;
            Some((name, text(&mut rest)?))
        })
    }

    /// The last value of this name, which is the one that the server uses.
    fn get(&self, name: &str) -> Option<&[u8]> {
        let named = self.pairs().filter(|(it, _)| *it == name.as_bytes());
        named.last().map(|(_, value)| value)
    }

    /// Whether this session may be opened for the database of a lease. An error is a message for the client.
    pub(super) fn check(&self, database: &str) -> Result<(), Vec<u8>> {
        let off: [&[u8]; 5] = [b"false", b"off", b"no", b"0", b""];
        if self
            .get("replication")
            .is_some_and(|value| !off.contains(&value.to_ascii_lowercase().as_slice()))
        {
            return Err(fatal(
                State::NotSupported,
                "replication connections do not go through mayfly proxy",
                Some("Connect to the server itself with a credential of `mayfly secret read`."),
            ));
        }
        match self.get("database").filter(|name| !name.is_empty()) {
            // If a client names no database, PostgreSQL uses the user's name. The proxy accepts this.
            Some(name) if name != database.as_bytes() && Some(name) != self.get("user") => {
                Err(fatal(
                    State::InvalidDatabase,
                    &format!(
                        "this proxy serves the database \"{database}\", not \"{}\"",
                        String::from_utf8_lossy(name)
                    ),
                    Some(
                        "The secret names the database. For another database, make another secret and another listener.",
                    ),
                ))
            }
            _ => Ok(()),
        }
    }

    /// The packet for the server: the client's packet with this user and database.
    pub(super) fn packet(&self, user: &str, database: &str) -> Vec<u8> {
        let mut packet = vec![0; 4];
        packet.extend_from_slice(&self.version.to_be_bytes());
        let mut add = |name: &[u8], value: &[u8]| {
            packet.extend_from_slice(name);
            packet.push(0);
            packet.extend_from_slice(value);
            packet.push(0);
        };
        add(b"user", user.as_bytes());
        add(b"database", database.as_bytes());
        for (name, value) in self.pairs() {
            if !matches!(name, b"user" | b"database" | b"replication") {
                add(name, value);
            }
        }
        packet.push(0);
        let length = u32::try_from(packet.len()).unwrap_or(u32::MAX);
        packet[..4].copy_from_slice(&length.to_be_bytes());
        packet
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::errors::state_of;
    use super::*;
    use proptest::prelude::*;

    fn startup(version: u32, pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut packet = version.to_be_bytes().to_vec();
        for (name, value) in pairs {
            packet.extend_from_slice(format!("{name}\0{value}\0").as_bytes());
        }
        packet.push(0);
        packet
    }

    fn session(version: u32, pairs: &[(&str, &str)]) -> Startup {
        match parse(&startup(version, pairs)).unwrap() {
            First::Session(session) => session,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn user_and_database_are_those_of_the_lease() {
        let asked = session(
            0x3_0002,
            &[
                ("user", "app"),
                ("database", "app"),
                ("options", "-c x=1"),
                ("_pq_.y", "z"),
            ],
        );
        let packet = asked.packet("mayfly_1", "db");
        assert_eq!(
            packet.len(),
            usize::try_from(u32::from_be_bytes(packet[..4].try_into().unwrap())).unwrap()
        );
        let sent = session(
            0x3_0002,
            &[
                ("user", "mayfly_1"),
                ("database", "db"),
                ("options", "-c x=1"),
                ("_pq_.y", "z"),
            ],
        );
        assert_eq!(parse(&packet[4..]), Ok(First::Session(sent)));
    }

    #[test]
    fn another_database_and_replication_are_refused() {
        for (pairs, expected) in [
            (vec![("user", "u")], None),
            (vec![("user", "u"), ("database", "u")], None),
            (vec![("user", "u"), ("database", "app")], None),
            (vec![("user", "u"), ("database", "")], None),
            (vec![("user", "u"), ("database", "other")], Some("3D000")),
            (
                vec![("user", "u"), ("replication", "database")],
                Some("0A000"),
            ),
            (vec![("user", "u"), ("replication", "TRUE")], Some("0A000")),
            (vec![("user", "u"), ("replication", "false")], None),
        ] {
            let refused = session(0x3_0000, &pairs).check("app").err();
            let state = refused.as_deref().and_then(|error| state_of(&error[5..]));
            assert_eq!(state, expected, "{pairs:?}");
        }
    }

    /// 64 KB for each connection is the limit; the packet itself may have 10,000 bytes.
    #[test]
    fn many_short_parameters_are_kept_in_one_buffer() {
        let pairs = b"a\0b\0".repeat(2_400);
        let packet = [&0x3_0000_u32.to_be_bytes()[..], &pairs, b"\0"].concat();
        let Ok(First::Session(asked)) = parse(&packet) else {
            panic!("it is a startup packet");
        };
        assert_eq!(asked.parameters.len(), pairs.len() + 1);
        assert_eq!(asked.pairs().count(), 2_400);
        assert_eq!(asked.get("a"), Some(&b"b"[..]));
        // A longer packet is refused.
        assert!(packet.len() <= PACKET_MAX);
    }

    #[test]
    fn the_last_value_counts() {
        let asked = session(0x3_0000, &[("database", "one"), ("database", "two")]);
        assert_eq!(asked.get("database"), Some(&b"two"[..]));
    }

    #[test]
    fn other_first_packets() {
        let coded = |code: u32, rest: &[u8]| [&code.to_be_bytes(), rest].concat();
        assert_eq!(parse(&coded(SSL, b"")), Ok(First::Encryption));
        assert_eq!(parse(&coded(GSS, b"")), Ok(First::Encryption));
        assert_eq!(parse(&coded(SSL, b"x")), Err(None));
        assert_eq!(
            parse(&coded(CANCEL, b"12345678")),
            Ok(First::Cancel(b"12345678".to_vec()))
        );
        assert!(parse(&coded(CANCEL, &[1; 260])).is_ok());
        assert_eq!(parse(&coded(CANCEL, &[1; 261])), Err(None));
        assert_eq!(parse(&coded(CANCEL, b"1234567")), Err(None));
        for (packet, state) in [
            (coded(0x2_0000, b"x\0"), "0A000"),
            (coded(0x3_0000, b"user\0"), "08P01"),
            (coded(0x3_0000, b"user\0u\0\0x"), "08P01"),
            (coded(0x3_0000, b""), "08P01"),
        ] {
            let error = parse(&packet).unwrap_err().unwrap();
            assert_eq!(state_of(&error[5..]), Some(state));
        }
    }

    proptest! {
        #[test]
        fn any_packet_is_read_or_refused(packet in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&packet);
            let _ = parse(&[&0x3_0000_u32.to_be_bytes(), packet.as_slice()].concat());
        }
    }
}
