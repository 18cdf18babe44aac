//! Messages of a server to a client whose session is idle: notices, and changed parameters. They are sent before the
//! next answer.

use super::frames::message;

/// Notices beyond this number are dropped.
const NOTES_MAX: usize = 32;
/// Parameters beyond this number, notices included, are dropped. PostgreSQL 18 reports 15.
const PARAMETERS_MAX: usize = 2 * NOTES_MAX;
/// Maximum length of all messages together, in bytes. Messages beyond this are dropped.
const NOTES_BYTES: usize = 64 * 1024;

/// Messages for a client that were not sent yet. They are few, because an idle client may stay idle for days.
#[derive(Debug, Default)]
pub(super) struct Notes(Vec<Vec<u8>>);

impl Notes {
    /// Adds a message, if there is room. A ParameterStatus takes the place of an earlier one of the same parameter.
    pub(super) fn add(&mut self, kind: u8, body: &[u8]) {
        if kind == b'S' {
            let end = body.iter().position(|byte| *byte == 0);
            let name = &body[..end.unwrap_or(body.len())];
            let is_same = |it: &[u8]| {
                it.first() == Some(&b'S')
                    && it
                        .get(5..)
                        .is_some_and(|it| it.starts_with(name) && it.get(name.len()) == Some(&0))
            };
            self.0.retain(|it| !is_same(it));
        }
        let most = match kind {
            b'S' => PARAMETERS_MAX,
            _ => NOTES_MAX,
        };
        let bytes: usize = self.0.iter().map(Vec::len).sum();
        if self.0.len() < most && bytes + body.len() < NOTES_BYTES {
            self.0.push(message(kind, body));
        }
    }

    /// Takes all of them, as one text.
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0).concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client may be idle for days. The size of the messages that wait for it is limited.
    #[test]
    fn notes_are_few() {
        let mut notes = Notes::default();
        for n in 0..1000 {
            notes.add(b'S', format!("session_authorization\0u{n}\0").as_bytes());
            notes.add(b'N', b"x\0");
        }
        notes.add(b'S', b"session\0a\0");
        let text = notes.take();
        assert_eq!(
            String::from_utf8_lossy(&text)
                .matches("session_auth")
                .count(),
            1
        );
        assert!(text.windows(5).any(|it| it == b"u999\0") && text.len() < 400);
        assert!(notes.take().is_empty());
    }

    /// A hostile server reports parameters without end, and long notices.
    #[test]
    fn what_a_server_says_aside_is_bounded() {
        let mut notes = Notes::default();
        for n in 0..1000 {
            notes.add(b'S', format!("p{n}\0v\0").as_bytes());
            notes.add(b'S', b"");
        }
        let text = notes.take();
        assert_eq!(
            text.iter().filter(|byte| **byte == b'S').count(),
            PARAMETERS_MAX
        );
        for _ in 0..NOTES_MAX {
            notes.add(b'N', &[b'x'; 10_000]);
        }
        assert!(notes.take().len() < NOTES_BYTES + 1000);
    }
}
