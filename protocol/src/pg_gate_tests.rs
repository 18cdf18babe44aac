//! Tests of what a server may ask for in a login: messages of an honest server, and of a server that lies.

use proptest::prelude::*;

use super::*;
use crate::pg_login::{Auth, ChannelBinding, Methods, WrittenIn};
use crate::target::SslMode;

fn rule(auth: Auth, sslmode: SslMode, channel_binding: Option<ChannelBinding>) -> Rule {
    Rule {
        methods: auth.into(),
        sslmode,
        channel_binding,
        written_in: WrittenIn::BaseSecret,
        is_trial: false,
    }
}

fn request(number: u32, rest: &[u8]) -> Vec<u8> {
    let length = u32::try_from(8 + rest.len()).unwrap();
    [
        &b"R"[..],
        &length.to_be_bytes(),
        &number.to_be_bytes(),
        rest,
    ]
    .concat()
}

fn ok() -> Vec<u8> {
    request(0, b"")
}

fn offer(plus: bool) -> Vec<u8> {
    let list: &[u8] = match plus {
        true => b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0",
        false => b"SCRAM-SHA-256\0\0",
    };
    request(10, list)
}

fn first(mechanism: &[u8]) -> Vec<u8> {
    [b"p\0\0\0\x30", mechanism, b"\0\0\0\0\x20n,,n=,r=x"].concat()
}

/// What comes of the server's first message.
fn first_asked(rule: Rule, tls: bool, bytes: &[u8]) -> Result<(), Cause> {
    let mut gate = Gate::new(rule, tls);
    let taken = gate.take(bytes).map_err(|refusal| refusal.cause);
    match taken {
        Ok(()) => assert_eq!(gate.cleared(), bytes),
        Err(_) => assert!(
            gate.cleared().is_empty(),
            "what is refused is not passed on"
        ),
    }
    taken
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn only_what_is_allowed_is_passed_on() {
    use ChannelBinding::{Disable, Prefer, Require};
    let (clear, md5) = (request(3, b""), request(5, b"salt"));
    let scram = Auth::Scram;
    for (auth, mode, binding, tls, asked, wanted) in [
        // A password in clear and MD5 are sent only if the secret asks for them.
        (
            scram,
            SslMode::Disable,
            None,
            false,
            &clear,
            Err(Cause::Method(Method::Password)),
        ),
        (
            scram,
            SslMode::Prefer,
            None,
            false,
            &clear,
            Err(Cause::Method(Method::Password)),
        ),
        (
            scram,
            SslMode::Require,
            None,
            true,
            &clear,
            Err(Cause::Method(Method::Password)),
        ),
        (
            scram,
            SslMode::Require,
            Some(Disable),
            true,
            &clear,
            Err(Cause::Method(Method::Password)),
        ),
        (
            scram,
            SslMode::VerifyFull,
            None,
            true,
            &clear,
            Err(Cause::Method(Method::Password)),
        ),
        (
            scram,
            SslMode::VerifyFull,
            None,
            true,
            &md5,
            Err(Cause::Method(Method::Md5)),
        ),
        (Auth::Md5, SslMode::Require, None, true, &md5, Ok(())),
        (
            Auth::Md5,
            SslMode::Require,
            None,
            true,
            &clear,
            Err(Cause::Method(Method::Password)),
        ),
        (Auth::Password, SslMode::Require, None, true, &clear, Ok(())),
        (Auth::Password, SslMode::Require, None, true, &md5, Ok(())),
        (
            Auth::Password,
            SslMode::Require,
            Some(Require),
            true,
            &clear,
            Err(Cause::Method(Method::Password)),
        ),
        // SCRAM without its binding is not used where TLS does not verify the name.
        (
            scram,
            SslMode::Require,
            None,
            true,
            &offer(false),
            Err(Cause::Unbound),
        ),
        (scram, SslMode::Require, None, true, &offer(true), Ok(())),
        (
            scram,
            SslMode::Require,
            Some(Prefer),
            true,
            &offer(false),
            Ok(()),
        ),
        (
            scram,
            SslMode::Prefer,
            None,
            true,
            &offer(false),
            Err(Cause::Unbound),
        ),
        (scram, SslMode::Prefer, None, false, &offer(false), Ok(())),
        (
            scram,
            SslMode::Prefer,
            Some(Require),
            false,
            &offer(false),
            Err(Cause::Unbound),
        ),
        (scram, SslMode::Disable, None, false, &offer(false), Ok(())),
        (
            scram,
            SslMode::VerifyFull,
            None,
            true,
            &offer(false),
            Ok(()),
        ),
        (
            scram,
            SslMode::VerifyFull,
            Some(Require),
            true,
            &offer(false),
            Err(Cause::Unbound),
        ),
        (
            Auth::Md5,
            SslMode::Require,
            None,
            true,
            &offer(false),
            Ok(()),
        ),
        // A login without any proof is not accepted where the server could be anybody.
        (
            scram,
            SslMode::Require,
            None,
            true,
            &ok(),
            Err(Cause::Unproven),
        ),
        (scram, SslMode::Require, Some(Disable), true, &ok(), Ok(())),
        (scram, SslMode::Prefer, None, true, &ok(), Ok(())),
        (scram, SslMode::VerifyFull, None, true, &ok(), Ok(())),
        (scram, SslMode::Disable, None, false, &ok(), Ok(())),
        // Kerberos and others, and another mechanism.
        (
            Auth::Password,
            SslMode::Disable,
            None,
            false,
            &request(7, b""),
            Err(Cause::Unsupported(7)),
        ),
        (
            scram,
            SslMode::Disable,
            None,
            false,
            &request(10, b"OAUTHBEARER\0\0"),
            Err(Cause::Unsupported(10)),
        ),
    ] {
        let rule = rule(auth, mode, binding);
        assert_eq!(
            first_asked(rule, tls, asked),
            wanted,
            "{rule:?}, tls {tls}, {asked:?}"
        );
    }
}

#[test]
fn a_login_goes_its_way() {
    let mut gate = Gate::new(rule(Auth::Scram, SslMode::Require, None), true);
    gate.take(&offer(true)).unwrap();
    gate.sends(&first(b"SCRAM-SHA-256-PLUS")).unwrap();
    gate.take(&request(11, b"r=x,s=eA==,i=4096")).unwrap();
    gate.sends(b"p\0\0\0\x08c=,p").unwrap();
    gate.take(&request(12, b"v=eA==")).unwrap();
    assert_eq!(gate.is_in(), None);
    let rest = b"S\0\0\0\x0bname\0v\0R\0\0\0\x08\0\0\0\x03";
    gate.take(&[&ok()[..], rest].concat()).unwrap();
    assert_eq!(gate.is_in(), Some(Method::ScramPlus));
    assert!(gate.cleared().ends_with(rest), "then nothing is checked");
    gate.take(b"anything").unwrap();
    assert_eq!(gate.cleared(), b"anything");
}

#[test]
fn a_client_that_cannot_bind_is_stopped() {
    let mut gate = Gate::new(rule(Auth::Scram, SslMode::Require, None), true);
    gate.take(&offer(true)).unwrap();
    let refusal = gate.sends(&first(b"SCRAM-SHA-256")).unwrap_err();
    assert_eq!(refusal.cause, Cause::Unbindable);
    // A login that is accepted after half an exchange is refused too.
    let mut gate = Gate::new(rule(Auth::Scram, SslMode::Require, None), true);
    gate.take(&offer(true)).unwrap();
    assert_eq!(gate.take(&ok()).unwrap_err().cause, Cause::Garbled);
}

#[test]
fn a_trial_finds_out_who_lets_anybody_in() {
    let trial = Rule {
        is_trial: true,
        ..rule(Auth::Scram, SslMode::Require, None)
    };
    assert_eq!(first_asked(trial, true, &ok()), Ok(()));
    assert_eq!(first_asked(trial, true, &offer(false)), Err(Cause::Unbound));
}

#[test]
fn rounds_have_a_limit() {
    for (message, wanted) in [
        (&b"r=x,s=eA==,i=1000000"[..], Ok(())),
        (b"r=x,s=eA==,i=1000001", Err(Cause::Rounds(1_000_001))),
        (
            b"r=x,s=eA==,i=99999999999999999999999",
            Err(Cause::Rounds(u64::MAX)),
        ),
        (b"r=x,s=eA==", Ok(())),
    ] {
        let asked = request(11, message);
        let rule = rule(Auth::Scram, SslMode::Disable, None);
        assert_eq!(first_asked(rule, false, &asked), wanted);
    }
}

#[test]
fn what_is_no_message_is_refused() {
    let rule = rule(Auth::Password, SslMode::Disable, None);
    for bytes in [
        &b"HTTP/1.1 400 Bad Request\r\n"[..],
        b"R\0\0\0\x03",
        b"R\0\0\0\x06\0\0",
        b"E\0\x02\0\0",
    ] {
        assert_eq!(
            first_asked(rule, false, bytes),
            Err(Cause::Garbled),
            "{bytes:?}"
        );
    }
}

#[test]
fn the_words_name_the_way_out() {
    let mut gate = Gate::new(rule(Auth::Scram, SslMode::Require, None), true);
    let said = gate.take(&request(3, b"")).unwrap_err().to_string();
    assert!(
        said.contains("\"auth\": \"password\"") && said.contains("pg_hba.conf"),
        "{said}"
    );
    let said = gate.refuse(Cause::Unbound).to_string();
    assert!(
        said.contains("verify-full") && said.contains("channelBinding"),
        "{said}"
    );
    let io = std::io::Error::new(std::io::ErrorKind::InvalidData, gate.refuse(Cause::Garbled));
    assert_eq!(Refusal::in_error(&io).unwrap().cause, Cause::Garbled);
    assert!(Refusal::in_error(&std::io::Error::other("x")).is_none());
}

#[test]
fn require_auth_is_read_as_libpq_does() {
    let methods = Methods::parse("scram-sha-256, md5").unwrap();
    assert!(methods.scram && methods.md5 && !methods.password && !methods.none);
    assert!(Methods::parse("!password").is_err() && Methods::parse("").is_err());
}

proptest! {
    /// However the server's bytes are cut, the same is passed on, and never a request for the
    /// password.
    #[test]
    fn cuts_change_nothing(
        cuts in proptest::collection::vec(1_usize..12, 0..40),
        end in 0_usize..3,
    ) {
        let refused = [request(3, b""), request(5, b"salt"), offer(false)];
        let notice = b"N\0\0\0\x09SLOG\0";
        let bytes = [&notice[..], notice, &refused[end], &ok()].concat();
        let mut gate = Gate::new(rule(Auth::Scram, SslMode::Require, None), true);
        let (mut at, mut cuts, mut passed) = (0, cuts.into_iter(), Vec::new());
        let ended = loop {
            let to = bytes.len().min(at + cuts.next().unwrap_or(bytes.len()));
            let taken = gate.take(&bytes[at..to]);
            passed.extend(gate.cleared());
            at = to;
            if taken.is_err() || at == bytes.len() {
                break taken;
            }
        };
        prop_assert!(ended.is_err());
        prop_assert_eq!(passed, [&notice[..], notice].concat());
    }

    /// No bytes make it panic, and what it passes on is what came.
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut gate = Gate::new(rule(Auth::Password, SslMode::Prefer, None), false);
        let _ = gate.take(&bytes);
        prop_assert!(bytes.starts_with(&gate.cleared()));
    }
}
