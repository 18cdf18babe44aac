//! Which certificates the command line, the programs and their clients accept.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use mayfly_tests::pki::Pki;

use super::{Files, Program, both, identity, pki, said, trusting};

/// The command line trusts the authority that it is given, keeps that authority with its login, and names what helps.
#[tokio::test]
async fn the_command_line_speaks_tls() {
    let pki = pki();
    let client = trusting(&[&pki]).build().unwrap();
    let dispatcher = Program::start("mayfly-dispatcher", &both(&Files::of(&pki)));
    dispatcher.healthy(&client).await;
    assert_eq!(dispatcher.ask(&client).await.unwrap(), 200);
    let page = dispatcher.page(&client, "/readyz").await.unwrap();
    assert_eq!(page, "ok\n");

    let https = format!("https://{}", dispatcher.http);
    let token = dispatcher.directory.join("data/root-token");
    let token = token.to_str().unwrap();
    let root = pki.file("root.crt");
    let login = ["login", "--address", &https, "--token-file", token];
    let refused = dispatcher.cli(&login);
    assert_eq!(refused.status.code(), Some(5), "{}", said(&refused));
    assert!(
        said(&refused).contains("UnknownIssuer") && said(&refused).contains("--ca-file"),
        "{}",
        said(&refused)
    );
    let trusting = [&login[..], &["--ca-file", root.to_str().unwrap()]].concat();
    let done = dispatcher.cli(&trusting);
    assert!(done.status.success(), "{}", said(&done));
    // The login knows the address and the authority.
    let listed = dispatcher.cli(&["token", "list", "-e", "json"]);
    assert!(listed.status.success(), "{}", said(&listed));

    // Without TLS a client hears what is wrong.
    let plain = format!("http://{}", dispatcher.http);
    let refused = dispatcher.cli(&["token", "list", "--address", &plain, "--token-file", token]);
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    assert!(said(&refused).contains("https://"), "{}", said(&refused));

    let engine = Files::of(&pki).settings("ADMIN");
    let engine = Program::start("mayfly-engine", &engine);
    engine.healthy(&client).await;
    let page = engine.page(&client, "/metrics").await.unwrap();
    let line = "mayfly_tls_last_reload_successful{listener=\"admin\"} 1";
    assert!(page.contains(line), "{page}");
}

/// A handshake by openssl, in one version of TLS.
fn handshake(to: SocketAddr, pki: &Pki, version: &str) -> (bool, String) {
    let output = Command::new("openssl")
        // The client's own limits are set aside, so that only the server refuses.
        .args(["s_client", "-brief", "-cipher", "ALL:@SECLEVEL=0", version])
        .args(["-connect", &to.to_string(), "-CAfile"])
        .arg(pki.file("root.crt"))
        .arg("-cert")
        .arg(pki.file("client.crt"))
        .arg("-key")
        .arg(pki.file("client.key"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (output.status.success(), said(&output))
}

/// If clients are asked for a certificate, neither one of another authority nor none is accepted. No version of TLS
/// before 1.2 is.
#[tokio::test]
async fn clients_show_a_certificate_and_speak_1_2() {
    let (pki, other) = (pki(), pki());
    let mut settings = both(&Files::of(&pki));
    settings.push((
        "MAYFLY__HTTP__TLS__CLIENT_CA_FILE".to_owned(),
        pki.file("root.crt"),
    ));
    let dispatcher = Program::start("mayfly-dispatcher", &settings);
    let nobody = trusting(&[&pki]).build().unwrap();
    dispatcher.healthy(&nobody).await;
    let known = trusting(&[&pki]).identity(identity(&pki)).build().unwrap();
    let unknown = trusting(&[&pki]).identity(identity(&other));
    let unknown = unknown.build().unwrap();
    assert_eq!(dispatcher.ask(&known).await.unwrap(), 200);
    assert!(dispatcher.ask(&nobody).await.is_err());
    assert!(dispatcher.ask(&unknown).await.is_err());

    let https = format!("https://{}", dispatcher.http);
    let file = |pki: &Pki, name: &str| pki.file(name).to_str().unwrap().to_owned();
    let token = dispatcher.directory.join("data/root-token");
    let (root, certificate, key) = (
        file(&pki, "root.crt"),
        file(&pki, "client.crt"),
        file(&pki, "client.key"),
    );
    let login = ["login", "--address", &https, "--ca-file", &root];
    let login = [&login[..], &["--token-file", token.to_str().unwrap()]].concat();
    let refused = dispatcher.cli(&login);
    assert_eq!(refused.status.code(), Some(5), "{}", said(&refused));
    let shown = [
        "--client-cert-file",
        &certificate,
        "--client-key-file",
        &key,
    ];
    let done = dispatcher.cli(&[&login[..], &shown[..]].concat());
    assert!(done.status.success(), "{}", said(&done));
    let listed = dispatcher.cli(&["token", "list", "-e", "json"]);
    assert!(listed.status.success(), "{}", said(&listed));

    for (version, is_taken) in [("-tls1_1", false), ("-tls1_2", true), ("-tls1_3", true)] {
        let (taken, told) = handshake(dispatcher.http, &pki, version);
        assert_eq!(taken, is_taken, "{version}: {told}");
        if !is_taken {
            // This is the server's refusal.
            assert!(told.contains("SSL alert number"), "{told}");
        }
    }
}
