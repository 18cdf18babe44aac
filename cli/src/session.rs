//! The dispatcher's address and the token. A stored token is sent only to the address for which it was stored.

use std::borrow::Cow;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::failure::Failure;
use crate::input::trimmed;
use crate::tls::{Tls, TlsArgs};

/// Default of `--address`: the default of the dispatcher's `http.listen`.
const DEFAULT_ADDRESS: &str = "http://127.0.0.1:8470";
const TOKEN_FILE_BYTES: u64 = 64 << 10;

/// Help of `mayfly login`.
pub(crate) const LOGIN_HELP: &str = "\
The token is that of --token-file, MAYFLY_TOKEN or --token, or else asked for without being
shown (or read as one line, where standard input is no terminal). It is kept, with the address
and how it is reached (--ca-file and the others), in $XDG_CONFIG_HOME/mayfly/token or
~/.config/mayfly/token, readable by you alone.

Examples:
  mayfly login --token-file mayfly-data/root-token
  mayfly login --address https://mayfly.example.com < token.txt
  mayfly login --address https://mayfly.internal:8470 --ca-file ca.pem";

/// The options that choose dispatcher and token.
#[derive(Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct ConnectionArgs {
    /// The dispatcher's address [env: MAYFLY_ADDRESS] [default: that of the login, or
    /// http://127.0.0.1:8470]
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) address: Option<String>,
    /// The token itself. Anyone on this machine can see it in the process list: better use
    /// MAYFLY_TOKEN, --token-file or `mayfly login` [env: MAYFLY_TOKEN]
    #[arg(long, global = true, conflicts_with = "token_file")]
    pub(crate) token: Option<String>,
    /// A file that holds the token [env: MAYFLY_TOKEN_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
}

/// A token: wiped when dropped, and without `Debug`.
pub(crate) struct Token(Zeroizing<String>);

impl Token {
    /// Reads a token. White space around it and a byte order mark are ignored. `None`: the text is empty.
    pub(crate) fn read(text: &str) -> Option<Self> {
        let text = trimmed(text);
        (!text.is_empty()).then(|| Self(Zeroizing::new(text.to_owned())))
    }

    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

/// Address and token in use.
pub(crate) struct Session {
    pub(crate) address: String,
    pub(crate) token: Token,
    /// TLS options for the address.
    pub(crate) tls: Tls,
}

/// Content of a token file: the file of a login, or only a token, as the dispatcher writes its root token.
struct Kept {
    address: Option<String>,
    token: Token,
    tls: Tls,
}

#[derive(Serialize, Deserialize)]
struct LoginFile<'a> {
    #[serde(borrow)]
    address: Cow<'a, str>,
    #[serde(borrow)]
    token: Cow<'a, str>,
    /// TLS options for that address.
    #[serde(flatten)]
    tls: Tls,
}

impl Session {
    /// Finds address and token: first from flags, then from the environment, then from the file of the login.
    pub(crate) fn resolve(given: &ConnectionArgs) -> Result<Self, Failure> {
        if let Some(session) = Self::given(given)? {
            return Ok(session);
        }
        let kept = match login_file() {
            Some(file) if file.exists() => read_token_file(&file)?,
            _ => {
                return Err(Failure::NoToken(
                    "no token: set MAYFLY_TOKEN, give --token-file, or use `mayfly login`".into(),
                ));
            }
        };
        Self::kept(kept, given.address().as_deref(), given.tls.given()?)
    }

    /// Address and token from flags and environment, without the file of the login.
    pub(crate) fn given(given: &ConnectionArgs) -> Result<Option<Self>, Failure> {
        let address = given.address();
        let address = address.as_deref();
        let tls = given.tls.given()?;
        let bare = |token| Session {
            address: given.address_or_default(),
            token,
            tls: tls.clone(),
        };
        if let Some(token) = &given.token {
            return match Token::read(token) {
                Some(token) => Ok(Some(bare(token))),
                None => Err(Failure::Usage("--token is empty".into())),
            };
        }
        if let Some(file) = &given.token_file {
            return Self::kept(read_token_file(file)?, address, tls).map(Some);
        }
        if let Some(token) = std::env::var("MAYFLY_TOKEN")
            .ok()
            .as_deref()
            .and_then(Token::read)
        {
            return Ok(Some(bare(token)));
        }
        match std::env::var_os("MAYFLY_TOKEN_FILE").filter(|file| !file.is_empty()) {
            Some(file) => Self::kept(read_token_file(Path::new(&file))?, address, tls).map(Some),
            None => Ok(None),
        }
    }

    fn kept(kept: Kept, address: Option<&str>, given: Tls) -> Result<Self, Failure> {
        let bare = |address: &str| address.trim_end_matches('/').to_owned();
        match (kept.address, address) {
            (Some(of), Some(wanted)) if bare(&of) != bare(wanted) => {
                Err(Failure::NoToken(format!(
                    "the stored token is for {of}, not for {wanted}: use `mayfly login`, or give a token"
                )))
            }
            (of, wanted) => Ok(Self {
                address: wanted
                    .map(str::to_owned)
                    .or(of)
                    .unwrap_or_else(|| DEFAULT_ADDRESS.into()),
                token: kept.token,
                tls: given.over(kept.tls),
            }),
        }
    }

    /// Stores address and token for later commands, and returns the file.
    pub(crate) fn keep(&self) -> Result<PathBuf, Failure> {
        let file = login_file().ok_or_else(|| {
            Failure::Local(
                "the token cannot be stored: neither XDG_CONFIG_HOME nor HOME is set".into(),
            )
        })?;
        self.write(&file)
            .map_err(|error| Failure::Local(format!("cannot write {}: {error}", file.display())))?;
        Ok(file)
    }

    fn write(&self, file: &Path) -> io::Result<()> {
        let directory = file.parent().unwrap_or(Path::new("."));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
        let text = Zeroizing::new(serde_json::to_string(&LoginFile {
            address: self.address.as_str().into(),
            token: self.token.expose().into(),
            tls: self.tls.clone(),
        })?);
        // tempfile makes the file with mode 0600.
        let mut temporary = tempfile::NamedTempFile::new_in(directory)?;
        writeln!(temporary, "{}", *text)?;
        temporary.as_file().sync_all()?;
        temporary.persist(file)?;
        Ok(())
    }
}

impl ConnectionArgs {
    /// The address that was given. An empty text counts as absent.
    fn address(&self) -> Option<String> {
        let address = self.address.clone();
        address
            .or_else(|| std::env::var("MAYFLY_ADDRESS").ok())
            .filter(|address| !address.is_empty())
    }

    /// The address for a token that was given without an address.
    pub(crate) fn address_or_default(&self) -> String {
        self.address().unwrap_or_else(|| DEFAULT_ADDRESS.into())
    }
}

fn login_file() -> Option<PathBuf> {
    let directory = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|directory| directory.is_absolute())
    };
    let config = directory("XDG_CONFIG_HOME")
        .or_else(|| directory("HOME").map(|home| home.join(".config")))?;
    Some(config.join("mayfly").join("token"))
}

fn read_token_file(file: &Path) -> Result<Kept, Failure> {
    let mut text = Zeroizing::new(String::new());
    fs::File::open(file)
        .and_then(|opened| opened.take(TOKEN_FILE_BYTES).read_to_string(&mut text))
        .map_err(|error| {
            Failure::Usage(format!(
                "cannot read the token file {}: {error}",
                file.display()
            ))
        })?;
    kept(&text)
        .ok_or_else(|| Failure::Usage(format!("{} does not contain a token", file.display())))
}

fn kept(text: &str) -> Option<Kept> {
    let text = trimmed(text);
    match serde_json::from_str::<LoginFile>(text) {
        Ok(login) => Some(Kept {
            address: Some(login.address.into_owned()),
            token: Token::read(&login.token)?,
            tls: login.tls,
        }),
        Err(_) if text.starts_with('{') => None,
        Err(_) => Some(Kept {
            address: None,
            token: Token::read(text)?,
            tls: Tls::default(),
        }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn resolved(text: &str, address: Option<&str>) -> Result<(String, String), Failure> {
        let session = Session::kept(kept(text).unwrap(), address, Tls::default())?;
        Ok((session.address, session.token.expose().to_owned()))
    }

    #[test]
    fn a_bare_token_goes_where_it_is_told() {
        assert_eq!(
            resolved("abc\n", None).unwrap(),
            (DEFAULT_ADDRESS.into(), "abc".into())
        );
        assert_eq!(
            resolved("abc", Some("http://x")).unwrap(),
            ("http://x".into(), "abc".into())
        );
        assert!(kept(" \n").is_none());
        assert!(kept("{\"token\":\"t\"}").is_none());
    }

    #[test]
    fn a_kept_token_goes_to_its_own_dispatcher_only() {
        let file = r#"{"address":"http://x:1","token":"t"}"#;
        assert_eq!(
            resolved(file, None).unwrap(),
            ("http://x:1".into(), "t".into())
        );
        assert_eq!(resolved(file, Some("http://x:1/")).unwrap().1, "t");
        assert_eq!(
            resolved(file, Some("http://y:1")).unwrap_err().exit_code(),
            4
        );
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_token() {
        for text in [
            "\u{feff}s.abc\r\n",
            "\u{feff}{\"address\":\"http://x:1\",\"token\":\"\u{feff}s.abc\"}",
        ] {
            assert_eq!(
                resolved(text, Some("http://x:1")).unwrap().1,
                "s.abc",
                "{text:?}"
            );
        }
        assert!(kept("\u{feff}\n").is_none());
    }

    #[test]
    fn a_login_is_written_for_its_user_alone() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("config/mayfly/token");
        let session = Session {
            address: "http://x:1".into(),
            token: Token::read("t").unwrap(),
            tls: Tls::default(),
        };
        session.write(&file).unwrap();
        session.write(&file).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&file), mode(file.parent().unwrap())), (0o600, 0o700));
        assert_eq!(
            resolved(&fs::read_to_string(&file).unwrap(), None)
                .unwrap()
                .0,
            "http://x:1"
        );
    }
}
