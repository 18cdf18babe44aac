//! The state of a session at its server, from the server's own catalogs: prepared statements and settings, which can
//! be made again in another session, and state that cannot.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, sink};

use super::errors::state_of;
use super::frames::message;
use super::notes::Notes;
use super::talk::Unnamed;

/// The name of the proxy's own statement. It is closed after each use.
const OURS: &[u8] = b"mayfly proxy";
/// Largest answer to a question, in bytes. A session with more is not carried over.
const ANSWER_MAX: u64 = 1024 * 1024;
/// The type of a message and its length, in bytes.
const HEADER: u64 = 5;
/// Names are qualified, because a session may have any search path. `pg_cursors` shows the unnamed portal of this
/// very query. Settings of a transaction are not settings of the session. `pg_settings` does not list the role,
/// which `set_config` and functions set without the tag of SET. The account's own role becomes `none`, which is the
/// next account's own role.
const QUESTION: &str = "\
SELECT 'statement'::pg_catalog.text, s.name, s.statement, s.parameter_types::pg_catalog.oid[]::pg_catalog.text \
  FROM pg_catalog.pg_prepared_statements s WHERE NOT s.from_sql AND s.name OPERATOR(pg_catalog.<>) 'mayfly proxy' \
UNION ALL SELECT 'setting', s.name, s.setting, NULL FROM pg_catalog.pg_settings s \
  WHERE s.source OPERATOR(pg_catalog.=) 'session' AND s.name OPERATOR(pg_catalog.!~) '^transaction_' \
UNION ALL SELECT 'setting', 'role', CASE WHEN pg_catalog.current_setting('role') OPERATOR(pg_catalog.=) \
  session_user::pg_catalog.text THEN 'none' ELSE pg_catalog.current_setting('role') END, NULL \
UNION ALL SELECT 'other', 'a statement of PREPARE', NULL, NULL FROM pg_catalog.pg_prepared_statements s WHERE s.from_sql \
UNION ALL SELECT 'other', 'a cursor', NULL, NULL FROM pg_catalog.pg_cursors c WHERE c.name OPERATOR(pg_catalog.<>) '' \
UNION ALL SELECT 'other', 'a LISTEN', NULL, NULL FROM pg_catalog.pg_listening_channels() \
UNION ALL SELECT 'other', 'an advisory lock', NULL, NULL FROM pg_catalog.pg_locks l \
  WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() \
UNION ALL SELECT 'other', 'a temporary table', NULL, NULL FROM pg_catalog.pg_class c \
  WHERE pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid \
    AND c.relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema() \
UNION ALL SELECT 'other', 'a temporary type', NULL, NULL FROM pg_catalog.pg_type t \
  WHERE pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid \
    AND t.typnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema() \
UNION ALL SELECT 'other', 'a temporary function', NULL, NULL FROM pg_catalog.pg_proc p \
  WHERE pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid \
    AND p.pronamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()";
const SET: &str = "SELECT pg_catalog.set_config($1, $2, false)";

/// The setting of SET ROLE.
const ROLE: &[u8] = b"role";

/// What can be made again in another session.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Carried {
    statements: Vec<Statement>,
    settings: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A prepared statement with a name.
#[derive(Debug, PartialEq, Eq)]
struct Statement {
    name: Vec<u8>,
    query: Vec<u8>,
    /// The ids of its parameters' types.
    types: Vec<u32>,
}

/// Why a session is not carried over: a state that cannot be made again.
pub(super) type Obstacle = String;

/// Asks the server of an idle session what the session has. What else the server says goes to `aside`, for the client.
///
/// # Errors
/// The connection is broken, or what came is no answer.
pub(super) async fn ask<R, W>(
    from: &mut R,
    to: &mut W,
    aside: &mut Notes,
) -> io::Result<Result<Carried, Obstacle>>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut request = prepare(OURS, QUESTION.as_bytes(), &[]);
    request.extend(execute(&[]));
    request.extend(close_and_sync());
    let answer = exchange(from, to, &request, aside).await?;
    if let Some(state) = answer.refused {
        return Ok(Err(format!("a state that could not be read ({state})")));
    }
    if answer.is_too_large {
        return Ok(Err("many prepared statements or settings".to_owned()));
    }
    answer
        .rows
        .iter()
        .try_fold(Ok(Carried::default()), |carried, row| {
            let Ok(mut carried) = carried else {
                return Ok(carried);
            };
            match row.as_slice() {
                [Some(kind), Some(name), Some(query), Some(types)] if kind == b"statement" => {
                    carried.statements.push(Statement {
                        name: name.clone(),
                        query: query.clone(),
                        types: type_ids(types).ok_or_else(garbled)?,
                    });
                }
                [Some(kind), Some(name), Some(value), _] if kind == b"setting" => {
                    carried.settings.push((name.clone(), value.clone()));
                }
                [Some(kind), Some(what), ..] if kind == b"other" => {
                    return Ok(Err(String::from_utf8_lossy(what).into_owned()));
                }
                _ => return Err(garbled()),
            }
            Ok(Ok(carried))
        })
}

/// Makes the state of an earlier session again in a new session.
///
/// # Errors
/// The connection is broken.
pub(super) async fn make<R, W>(
    from: &mut R,
    to: &mut W,
    carried: &Carried,
    unnamed: &Unnamed,
    aside: &mut Notes,
) -> io::Result<Result<(), Obstacle>>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut request = prepare(OURS, SET.as_bytes(), &[]);
    // The role is set last: another role may not be allowed to make the settings that the account may make.
    let (role, settings): (Vec<_>, Vec<_>) =
        carried.settings.iter().partition(|(name, _)| name == ROLE);
    for (name, value) in settings.into_iter().chain(role) {
        request.extend(execute(&[name, value]));
    }
    for statement in &carried.statements {
        request.extend(prepare(&statement.name, &statement.query, &statement.types));
    }
    request.extend(close_and_sync());
    let made = exchange(from, to, &request, aside).await?;
    if let Some(state) = made.refused {
        return Ok(Err(format!(
            "a setting or a prepared statement that could not be made again ({state})"
        )));
    }
    match unnamed {
        Unnamed::None => {}
        Unnamed::TooLong => return Ok(Err("a long unnamed prepared statement".to_owned())),
        Unnamed::Known(parse) => {
            // A statement that the earlier server refused is refused here too. Then neither session has an unnamed
            // statement.
            let request = [message(b'P', parse), message(b'S', b"")].concat();
            exchange(from, to, &request, aside).await?;
        }
    }
    Ok(Ok(()))
}

fn garbled() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed message")
}

fn text(bytes: &[u8]) -> Vec<u8> {
    [bytes, b"\0"].concat()
}

/// A length or a number of the protocol. Larger numbers were refused when they were read.
fn number<T: TryFrom<usize> + Default>(of: usize) -> T {
    T::try_from(of).unwrap_or_default()
}

/// The Parse message of a statement.
fn prepare(name: &[u8], query: &[u8], types: &[u32]) -> Vec<u8> {
    let mut body = [text(name), text(query)].concat();
    body.extend_from_slice(&number::<u16>(types.len()).to_be_bytes());
    for id in types {
        body.extend_from_slice(&id.to_be_bytes());
    }
    message(b'P', &body)
}

/// A Bind of the proxy's own statement with texts, and an Execute.
fn execute(values: &[&[u8]]) -> Vec<u8> {
    // The unnamed portal, and all formats are text.
    let mut body = [text(b""), text(OURS), vec![0, 0]].concat();
    body.extend_from_slice(&number::<u16>(values.len()).to_be_bytes());
    for value in values {
        body.extend_from_slice(&number::<u32>(value.len()).to_be_bytes());
        body.extend_from_slice(value);
    }
    body.extend_from_slice(&[0, 0]);
    // All rows.
    let rows = [text(b""), vec![0; 4]].concat();
    [message(b'B', &body), message(b'E', &rows)].concat()
}

fn close_and_sync() -> Vec<u8> {
    let name = [b"S", OURS, b"\0"].concat();
    [message(b'C', &name), message(b'S', b"")].concat()
}

/// An array as the server prints it: `{23,25}`.
fn type_ids(array: &[u8]) -> Option<Vec<u32>> {
    let array = std::str::from_utf8(array).ok()?;
    let inner = array.strip_prefix('{')?.strip_suffix('}')?;
    let ids = inner.split(',').filter(|id| !id.is_empty());
    ids.map(|id| id.parse().ok()).collect()
}

type Row = Vec<Option<Vec<u8>>>;

/// What the server has answered.
#[derive(Default)]
struct Answer {
    rows: Vec<Row>,
    /// The SQLSTATE of the first error.
    refused: Option<String>,
    is_too_large: bool,
}

/// Sends a request that ends in a Sync, and reads its answer.
async fn exchange<R, W>(
    from: &mut R,
    to: &mut W,
    request: &[u8],
    aside: &mut Notes,
) -> io::Result<Answer>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let send = async {
        to.write_all(request).await?;
        to.flush().await
    };
    // A server that sends a long answer reads nothing more until its answer is read. So this function sends and reads
    // at the same time.
    let (sent, answer) = tokio::join!(send, read(from, aside));
    sent?;
    answer
}

async fn read<R>(from: &mut R, aside: &mut Notes) -> io::Result<Answer>
where
    R: AsyncRead + Unpin,
{
    let mut answer = Answer::default();
    let mut size = 0;
    loop {
        let kind = from.read_u8().await?;
        let length = from.read_u32().await?.checked_sub(4).ok_or_else(garbled)?;
        // The header counts too: otherwise an answer of empty messages would never reach the limit.
        size += HEADER + u64::from(length);
        if size > ANSWER_MAX && kind == b'D' {
            answer.is_too_large = true;
            let discarded = copy(&mut from.take(length.into()), &mut sink()).await?;
            if discarded < length.into() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            continue;
        }
        if size > 2 * ANSWER_MAX {
            return Err(garbled());
        }
        let mut body = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        from.read_exact(&mut body).await?;
        match kind {
            b'Z' if body == b"I" => return Ok(answer),
            b'Z' => return Err(garbled()),
            b'D' => answer.rows.push(row(&body).ok_or_else(garbled)?),
            b'E' => {
                let state = state_of(&body).unwrap_or("?").to_owned();
                answer.refused.get_or_insert(state);
            }
            // ParameterStatus, NoticeResponse, NotificationResponse.
            b'S' | b'N' | b'A' => aside.add(kind, &body),
            _ => {}
        }
    }
}

/// The columns of a DataRow; a NULL is `None`. Returns `None` if the message is malformed.
fn row(body: &[u8]) -> Option<Row> {
    let (number, mut rest) = body.split_first_chunk()?;
    let mut row = Vec::new();
    for _ in 0..u16::from_be_bytes(*number) {
        let (length, after) = rest.split_first_chunk()?;
        match usize::try_from(i32::from_be_bytes(*length)) {
            Ok(length) => {
                let (value, after) = after.split_at_checked(length)?;
                row.push(Some(value.to_vec()));
                rest = after;
            }
            // -1: NULL.
            Err(_) => {
                row.push(None);
                rest = after;
            }
        }
    }
    Some(row)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn data(values: &[Option<&str>]) -> Vec<u8> {
        let mut body = u16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
        for value in values {
            match value {
                Some(value) => {
                    body.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
                    body.extend_from_slice(value.as_bytes());
                }
                None => body.extend_from_slice(&[255; 4]),
            }
        }
        message(b'D', &body)
    }

    async fn asked(answer: &[u8]) -> (io::Result<Result<Carried, Obstacle>>, Vec<u8>) {
        let (mut sent, mut aside) = (Vec::new(), Notes::default());
        let result = ask(&mut &answer[..], &mut sent, &mut aside).await;
        assert_eq!(sent.last_chunk(), Some(b"S\0\0\0\x04"));
        (result, aside.take())
    }

    #[tokio::test]
    async fn what_the_server_lists_is_carried_or_an_obstacle() {
        let ready = message(b'Z', b"I");
        let statement = data(&[
            Some("statement"),
            Some("s1"),
            Some("SELECT $1"),
            Some("{23}"),
        ]);
        let setting = data(&[Some("setting"), Some("work_mem"), Some("64"), None]);
        let notice = message(b'N', b"x\0");
        let whole = [statement.clone(), notice.clone(), setting, ready.clone()].concat();
        let (carried, aside) = asked(&whole).await;
        let carried = carried.unwrap().unwrap();
        assert_eq!(aside, notice);
        assert_eq!(carried.statements[0].types, [23]);
        assert_eq!(carried.settings[0].0, b"work_mem");

        let other = data(&[Some("other"), Some("an advisory lock"), None, None]);
        let (obstacle, _) = asked(&[statement, other, ready.clone()].concat()).await;
        assert_eq!(obstacle.unwrap().unwrap_err(), "an advisory lock");
        let large = "x".repeat(1024 * 1024);
        let large = data(&[Some("statement"), Some("s1"), Some(&large), Some("{}")]);
        let (obstacle, _) = asked(&[large, ready.clone()].concat()).await;
        assert!(obstacle.unwrap().unwrap_err().starts_with("many prepared"));
        let refused = message(b'E', b"SERROR\0C42501\0\0");
        let (obstacle, _) = asked(&[refused, ready].concat()).await;
        assert!(obstacle.unwrap().unwrap_err().contains("42501"));
        // A server that leaves, is in a transaction, or lies about a length.
        for broken in [
            &b""[..],
            &message(b'Z', b"T"),
            b"D\0\0\0\x03",
            b"D\x7f\0\0\0",
            &message(b'D', b"\0\x01\0\0\0\x09x"),
        ] {
            assert!(asked(broken).await.0.is_err(), "{broken:?}");
        }
    }

    /// Makes a statement, a setting and this unnamed statement. Returns what was sent.
    async fn made(answers: &[u8], unnamed: &[u8]) -> (Result<(), Obstacle>, Vec<u8>) {
        let carried = Carried {
            statements: vec![Statement {
                name: b"s1".to_vec(),
                query: b"SELECT $1".to_vec(),
                types: vec![23],
            }],
            settings: vec![(b"a".to_vec(), b"b".to_vec())],
        };
        let unnamed = match unnamed {
            b"" => Unnamed::TooLong,
            parse => Unnamed::Known(parse.to_vec()),
        };
        let (mut from, mut sent, mut aside) = (answers, Vec::new(), Notes::default());
        let made = make(&mut from, &mut sent, &carried, &unnamed, &mut aside).await;
        (made.unwrap(), sent)
    }

    /// Messages without a body are not read without end.
    #[tokio::test]
    async fn an_answer_of_empty_messages_ends() {
        let answer = message(b'C', b"").repeat(usize::try_from(ANSWER_MAX).unwrap());
        let endless = [answer, message(b'Z', b"I")].concat();
        assert!(asked(&endless).await.0.is_err());
    }

    #[tokio::test]
    async fn the_role_is_set_after_the_other_settings() {
        let setting = |name: &str, value: &str| (name.into(), value.into());
        let carried = Carried {
            statements: vec![],
            settings: vec![setting("role", "low"), setting("work_mem", "64")],
        };
        let (ready, mut sent) = (message(b'Z', b"I"), Vec::new());
        let (none, mut aside) = (Unnamed::None, Notes::default());
        let made = make(&mut &ready[..], &mut sent, &carried, &none, &mut aside).await;
        assert_eq!(made.unwrap(), Ok(()));
        let at = |part: &[u8]| sent.windows(part.len()).position(|it| it == part).unwrap();
        assert!(at(b"work_mem") < at(b"low"));
    }

    #[tokio::test]
    async fn what_was_carried_is_made() {
        let ready = message(b'Z', b"I");
        let unnamed = b"\0SELECT 2\0\0\0";
        let (result, sent) = made(&[ready.clone(), ready.clone()].concat(), unnamed).await;
        assert_eq!(result, Ok(()));
        let parse = prepare(b"s1", b"SELECT $1", &[23]);
        assert!(sent.windows(parse.len()).any(|it| it == parse));
        assert!(sent.ends_with(&[message(b'P', unnamed), message(b'S', b"")].concat()));
        let refused = [message(b'E', b"C42P05\0\0"), ready.clone()].concat();
        assert!(
            made(&refused, unnamed)
                .await
                .0
                .unwrap_err()
                .contains("42P05")
        );
        assert!(made(&ready, b"").await.0.unwrap_err().contains("long"));
    }
}
