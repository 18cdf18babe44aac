//! The activity of a session, as far as the types of its messages show it. No SQL is parsed.
//!
//! It knows transactions, requests in flight, LISTEN, DECLARE CURSOR and SET (by their command tags). It cannot know
//! temporary tables, advisory locks, prepared statements and settings by functions.

use tokio::time::Instant;

use super::frames::{Frames, Garbled, KEPT};

/// A longer unnamed statement is not kept, in bytes.
const UNNAMED_MAX: usize = 16 * 1024;

/// The messages of one session.
#[derive(Debug)]
pub(super) struct Talk {
    from_client: Frames,
    from_server: Frames,
    /// `ReadyForQuery` messages that the server owes.
    owed: u32,
    /// Messages of the extended protocol without a Sync behind them.
    is_unsynced: bool,
    /// The last request was a simple query or a function call, not a Sync.
    last_is_simple: bool,
    /// The server waits for the data of a COPY.
    is_copying_in: bool,
    /// The status in the last `ReadyForQuery`: `I`, `T` or `E`.
    status: u8,
    listens: u32,
    cursors: u32,
    /// The tag of SET or LOAD was seen.
    has_set: bool,
    /// The unnamed statement is kept.
    keeps_unnamed: bool,
    unnamed: Unnamed,
    /// Bytes are being passed on.
    to_server: bool,
    to_client: bool,
    idle_since: Instant,
}

/// The statement that was prepared without a name. It lives up to the next one, or to a simple query
/// (PostgreSQL documentation, "Extended Query").
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum Unnamed {
    #[default]
    None,
    /// The body of its Parse.
    Known(Vec<u8>),
    TooLong,
}

impl Unnamed {
    /// The unnamed statement of a Parse, from its body. The end of the body may be missing. `None`: the statement
    /// has a name.
    fn of(parse: &[u8]) -> Option<Self> {
        let query = parse.strip_prefix(b"\0")?;
        let whole = query.iter().position(|byte| *byte == 0).is_some_and(|end| {
            // The number of parameter types, and their ids.
            let types = &query[end + 1..];
            types.split_first_chunk().is_some_and(|(number, types)| {
                types.len() == 4 * usize::from(u16::from_be_bytes(*number))
            })
        });
        Some(match whole {
            true => Self::Known(parse.to_vec()),
            false => Self::TooLong,
        })
    }
}

impl Talk {
    /// A session that has just logged in: it is in no transaction. `keeps_unnamed`: its unnamed statement is kept.
    pub(super) fn new(keeps_unnamed: bool) -> Self {
        Self {
            from_client: Frames::default(),
            from_server: Frames::default(),
            owed: 0,
            is_unsynced: false,
            last_is_simple: false,
            is_copying_in: false,
            status: b'I',
            listens: 0,
            cursors: 0,
            has_set: false,
            keeps_unnamed,
            unnamed: Unnamed::None,
            to_server: false,
            to_client: false,
            idle_since: Instant::now(),
        }
    }

    /// A chunk of the client, which is about to be passed on.
    pub(super) fn client(&mut self, chunk: &[u8]) -> Result<(), Garbled> {
        self.to_server = true;
        let mut frames = std::mem::take(&mut self.from_client);
        let keeps_unnamed = self.keeps_unnamed;
        let kept = |kind| match kind {
            b'P' if keeps_unnamed => UNNAMED_MAX,
            _ => KEPT,
        };
        let result = frames.follow(chunk, kept, |kind, body| self.client_message(kind, body));
        self.from_client = frames;
        result.map(drop)
    }

    /// The chunk was passed on.
    pub(super) fn client_sent(&mut self) {
        self.to_server = false;
    }

    fn client_message(&mut self, kind: u8, body: &[u8]) {
        match kind {
            b'Q' => self.unnamed = Unnamed::None,
            b'P' if self.keeps_unnamed => {
                if let Some(unnamed) = Unnamed::of(body) {
                    self.unnamed = unnamed;
                }
            }
            _ => {}
        }
        match kind {
            // Query, FunctionCall, Sync.
            b'Q' | b'F' | b'S' => {
                self.owed = self.owed.saturating_add(1);
                self.is_unsynced = false;
                self.last_is_simple = kind != b'S';
            }
            // CopyDone, CopyFail. The server ignores a Sync that comes while it takes the data of a COPY
            // (PostgreSQL documentation, "COPY Operations").
            b'c' | b'f' if self.is_copying_in => {
                self.is_copying_in = false;
                self.owed = u32::from(self.last_is_simple);
                // By the extended protocol a Sync has to follow.
                self.is_unsynced = !self.last_is_simple;
            }
            // Parse, Bind, Describe, Execute, Close, Flush.
            b'P' | b'B' | b'D' | b'E' | b'C' | b'H' => self.is_unsynced = true,
            _ => {}
        }
    }

    /// A chunk of the server, which is about to be passed on. Returns the length of its part up to the last end
    /// of a message.
    pub(super) fn server(&mut self, chunk: &[u8]) -> Result<usize, Garbled> {
        self.to_client = true;
        let mut frames = std::mem::take(&mut self.from_server);
        let result = frames.follow(
            chunk,
            |_| KEPT,
            |kind, body| self.server_message(kind, body),
        );
        self.from_server = frames;
        result
    }

    /// The chunk was passed on.
    pub(super) fn server_sent(&mut self) {
        self.to_client = false;
    }

    fn server_message(&mut self, kind: u8, body: &[u8]) {
        match kind {
            // ReadyForQuery.
            b'Z' => {
                self.owed = self.owed.saturating_sub(1);
                self.status = body.first().copied().unwrap_or(b'E');
                self.is_copying_in = false;
                self.idle_since = Instant::now();
            }
            // CopyInResponse, CopyBothResponse.
            b'G' | b'W' => self.is_copying_in = true,
            b'C' => self.command(body),
            _ => {}
        }
    }

    /// A command tag, which ends in a zero byte.
    fn command(&mut self, tag: &[u8]) {
        match tag {
            b"LISTEN\0" => self.listens = self.listens.saturating_add(1),
            b"UNLISTEN\0" => self.listens = self.listens.saturating_sub(1),
            b"DECLARE CURSOR\0" => self.cursors = self.cursors.saturating_add(1),
            b"CLOSE CURSOR\0" => self.cursors = self.cursors.saturating_sub(1),
            b"CLOSE CURSOR ALL\0" => self.cursors = 0,
            b"SET\0" | b"LOAD\0" => self.has_set = true,
            b"DISCARD ALL\0" => {
                self.listens = 0;
                self.cursors = 0;
                self.has_set = false;
            }
            _ => {}
        }
    }

    /// Since when the session has no request in progress and no state that is known here. `None`: it has a request or
    /// such a state.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let is_idle = self.owed == 0
            && self.status == b'I'
            && !self.is_unsynced
            && !self.is_copying_in
            && !self.to_server
            && !self.to_client
            && self.from_client.is_between()
            && self.from_server.is_between()
            && self.listens == 0
            && self.cursors == 0;
        is_idle.then_some(self.idle_since)
    }

    /// Whether the session may have settings that the server does not list.
    pub(super) fn has_set(&self) -> bool {
        self.has_set
    }

    /// The unnamed statement of the last Parse without a name, unless a simple query has dropped it.
    pub(super) fn unnamed(&self) -> Unnamed {
        self.unnamed.clone()
    }

    /// Whether a message can be sent to the client at this place of the stream.
    pub(super) fn can_speak_to_client(&self) -> bool {
        self.from_server.is_between() && !self.to_client
    }

    /// Whether a chunk is being written to the client.
    pub(super) fn is_writing_to_client(&self) -> bool {
        self.to_client
    }

    /// Why the session is not idle, for the message of a cut.
    pub(super) fn what_is_open(&self) -> &'static str {
        match (self.status, self.owed, self.listens, self.cursors) {
            (b'T' | b'E', ..) => "a transaction was open",
            (_, 1.., ..) => "a request was being worked on",
            (_, _, 1.., _) => "the session had a LISTEN",
            (_, _, _, 1..) => "the session had a cursor",
            _ => "the session was in use",
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::frames::message;
    use super::*;

    /// A message: `>` or `<`, its type, its body.
    type Step<'b> = (char, u8, &'b [u8]);

    /// Sends messages both ways.
    fn after(steps: &[Step<'_>]) -> Talk {
        let mut talk = Talk::new(true);
        for (way, kind, body) in steps {
            let bytes = message(*kind, body);
            if *way == '>' {
                talk.client(&bytes).unwrap();
                talk.client_sent();
            } else {
                assert_eq!(talk.server(&bytes), Ok(bytes.len()));
                talk.server_sent();
            }
        }
        talk
    }

    fn is_idle(steps: &[Step<'_>]) -> bool {
        after(steps).idle_since().is_some()
    }

    const READY: Step<'static> = ('<', b'Z', b"I");

    #[test]
    fn a_session_is_idle_between_requests() {
        let query: Step<'_> = ('>', b'Q', b"SELECT 1\0");
        assert!(is_idle(&[]));
        assert!(!is_idle(&[query]));
        assert!(!is_idle(&[query, ('<', b'C', b"SELECT 1\0")]));
        assert!(is_idle(&[query, READY]));
        assert!(!is_idle(&[query, ('<', b'Z', b"T")]));
        assert!(!is_idle(&[query, ('<', b'Z', b"E")]));
        // Two are in flight.
        assert!(!is_idle(&[query, query, READY]));
        assert!(is_idle(&[query, query, READY, READY]));
    }

    #[test]
    fn a_pipeline_is_in_flight_up_to_its_sync() {
        let (parse, sync): (Step<'_>, Step<'_>) = (('>', b'P', b"\0"), ('>', b'S', b""));
        assert!(!is_idle(&[parse]));
        assert!(!is_idle(&[parse, sync]));
        assert!(is_idle(&[parse, sync, READY]));
        // The next Parse came before the answer.
        assert!(!is_idle(&[parse, sync, parse, READY]));
        assert!(!is_idle(&[parse, ('>', b'H', b"")]));
    }

    /// The server answers only the Sync behind the data. It ignores the first Sync.
    #[test]
    fn a_copy_by_the_extended_protocol_owes_one_answer() {
        let begin: [Step<'_>; 3] = [('>', b'E', b"\0"), ('>', b'S', b""), ('<', b'G', b"\0\0\0")];
        assert!(!is_idle(&begin));
        let data: [Step<'_>; 3] = [('>', b'd', b"1\n"), ('>', b'c', b""), ('>', b'S', b"")];
        let whole = [&begin[..], &data[..]].concat();
        // The data has ended, and the Sync behind it has not come yet.
        assert!(!is_idle(&whole[..whole.len() - 1]));
        assert!(!is_idle(&whole));
        assert!(is_idle(&[&whole[..], &[READY]].concat()));
        // By the simple protocol there is no Sync.
        let simple: [Step<'_>; 4] = [
            ('>', b'Q', b"COPY t FROM STDIN\0"),
            ('<', b'G', b"\0\0\0"),
            ('>', b'd', b"1\n"),
            ('>', b'c', b""),
        ];
        assert!(!is_idle(&simple));
        assert!(is_idle(&[&simple[..], &[READY]].concat()));
        // The server refuses the data before the client has sent all.
        let refused: [Step<'_>; 5] = [
            ('>', b'Q', b"COPY t FROM STDIN\0"),
            ('<', b'G', b"\0\0\0"),
            ('<', b'E', b"\0"),
            READY,
            ('>', b'c', b""),
        ];
        assert!(is_idle(&refused));
    }

    #[test]
    fn what_is_listened_to_and_cursors_stay() {
        let done = |tag: &'static [u8]| ('<', b'C', tag);
        assert!(!is_idle(&[done(b"LISTEN\0")]));
        assert!(is_idle(&[done(b"LISTEN\0"), done(b"UNLISTEN\0")]));
        assert!(!is_idle(&[
            done(b"LISTEN\0"),
            done(b"LISTEN\0"),
            done(b"UNLISTEN\0")
        ]));
        assert!(!is_idle(&[done(b"DECLARE CURSOR\0")]));
        assert!(is_idle(&[
            done(b"DECLARE CURSOR\0"),
            done(b"CLOSE CURSOR\0")
        ]));
        assert!(is_idle(&[
            done(b"LISTEN\0"),
            done(b"DECLARE CURSOR\0"),
            done(b"DISCARD ALL\0")
        ]));
        assert_eq!(
            after(&[done(b"LISTEN\0")]).what_is_open(),
            "the session had a LISTEN"
        );
    }

    #[test]
    fn the_unnamed_statement_is_kept_up_to_the_next() {
        let parse = b"\0SELECT $1\0\0\x01\0\0\0\x17";
        let known = Unnamed::Known(parse.to_vec());
        assert_eq!(after(&[('>', b'P', parse)]).unnamed(), known);
        let named: Step<'_> = ('>', b'P', b"a\0SELECT 1\0\0\0");
        assert_eq!(after(&[('>', b'P', parse), named]).unnamed(), known);
        let query: Step<'_> = ('>', b'Q', b"SELECT 1\0");
        assert_eq!(after(&[('>', b'P', parse), query]).unnamed(), Unnamed::None);
        let long = [b"\0", vec![b'x'; UNNAMED_MAX].as_slice(), b"\0\0\0"].concat();
        assert_eq!(after(&[('>', b'P', &long)]).unnamed(), Unnamed::TooLong);
        // In two chunks.
        let bytes = message(b'P', parse);
        let mut talk = Talk::new(true);
        talk.client(&bytes[..9]).unwrap();
        talk.client(&bytes[9..]).unwrap();
        assert_eq!(talk.unnamed(), known);
    }

    #[test]
    fn set_stays_up_to_discard_all() {
        let done = |tag: &'static [u8]| ('<', b'C', tag);
        assert!(after(&[done(b"SET\0")]).has_set());
        assert!(after(&[done(b"LOAD\0")]).has_set());
        assert!(after(&[done(b"SET\0"), done(b"RESET\0")]).has_set());
        assert!(!after(&[done(b"SET\0"), done(b"DISCARD ALL\0")]).has_set());
    }

    #[test]
    fn half_a_message_is_not_idle() {
        let mut talk = Talk::new(false);
        let query = message(b'Q', b"SELECT 1\0");
        talk.client(&query[..3]).unwrap();
        talk.client_sent();
        assert_eq!(talk.idle_since(), None);
        let mut talk = Talk::new(false);
        talk.server(&message(b'A', b"notification")[..7]).unwrap();
        talk.server_sent();
        assert!(talk.idle_since().is_none() && !talk.can_speak_to_client());
    }
}
