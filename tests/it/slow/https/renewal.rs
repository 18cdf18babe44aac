//! New certificate files while requests come in, and files that cannot be used.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use mayfly_tests::pki::Pki;
use tokio::task::JoinSet;

use super::{Files, Program, both, pki, trusting};

/// Clients that ask without a pause while the certificate is renewed, and while its files are broken.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_renewed_without_a_failed_request() {
    let (old, new) = (pki(), pki());
    let files = Files::of(&old);
    let dispatcher = Arc::new(Program::start("mayfly-dispatcher", &both(&files)));
    let both = trusting(&[&old, &new]).build().unwrap();
    dispatcher.healthy(&both).await;
    let (asked, stop) = (
        Arc::new(AtomicU32::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let mut asking = JoinSet::new();
    for n in 0..4 {
        // Half of the clients make a connection for each request.
        let client = trusting(&[&old, &new]).pool_max_idle_per_host(n % 2);
        let client = client.build().unwrap();
        let (dispatcher, asked, stop) = (dispatcher.clone(), asked.clone(), stop.clone());
        asking.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(dispatcher.ask(&client).await.unwrap(), 200);
                asked.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }
    // Each question uses a new client, so its connection begins now.
    let believes = async |pki: &Pki| {
        let client = trusting(&[pki]).build().unwrap();
        dispatcher.ask(&client).await.is_ok()
    };
    assert!(believes(&old).await && !believes(&new).await);
    dispatcher.reloaded(&both, true).await;
    // Only the certificate is replaced, so the key does not belong to it.
    files.put(&new, "crt");
    dispatcher.reloaded(&both, false).await;
    assert!(believes(&old).await && !believes(&new).await);
    files.put(&new, "key");
    dispatcher.reloaded(&both, true).await;
    assert!(believes(&new).await && !believes(&old).await);
    let broken: [&dyn Fn(); 4] = [
        &|| files.write("key", "no key"),
        &|| files.write("crt", ""),
        &|| std::fs::remove_file(files.path("crt")).unwrap(),
        &|| {
            let mode = std::fs::Permissions::from_mode(0o644);
            std::fs::set_permissions(files.path("key"), mode).unwrap();
        },
    ];
    for (n, break_it) in broken.into_iter().enumerate() {
        break_it();
        dispatcher.reloaded(&both, false).await;
        assert!(believes(&new).await, "broken {n}");
        files.put(&new, "crt");
        files.put(&new, "key");
        dispatcher.reloaded(&both, true).await;
    }
    let log = dispatcher.log();
    for words in [
        "http.tls.key_file is not the key of",
        "http.tls.key_file is not a PEM private key",
        "http.tls.cert_file has no PEM certificate",
        "http.tls.cert_file: cannot read",
        "chmod 600",
        "admin.tls.key_file",
    ] {
        assert!(log.contains(words), "{words} is not in {log}");
    }
    assert!(!log.contains("BEGIN"), "{log}");
    stop.store(true, Ordering::Relaxed);
    asking.join_all().await;
    let asked = asked.load(Ordering::Relaxed);
    assert!(asked > 50, "only {asked} requests");
}
