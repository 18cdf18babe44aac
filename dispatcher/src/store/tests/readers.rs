//! Reads beside the writer: they wait for nobody's write, and see all that was committed before.

use super::*;
use mayfly_protocol::names::PathGlob;

/// Keeps the writer's thread busy until the sender is dropped. Resolves when it is.
async fn held(store: &Store) -> (std::sync::mpsc::Sender<()>, tokio::task::JoinHandle<()>) {
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let (begun, is_held) = oneshot::channel();
    let store = store.clone();
    let holding = tokio::spawn(async move {
        let job = move |_: &Connection| {
            let _ = begun.send(());
            // An error only means that the sender is gone.
            let _ = wait.recv();
            Ok(())
        };
        store.run(job).await.unwrap();
    });
    is_held.await.unwrap();
    (release, holding)
}

async fn reader(store: &Store, id: &str) -> Secret {
    let secret = Secret::new(format!("secret-of-{id}"));
    let token = Token {
        id: id.to_owned(),
        read: vec!["db:*".parse::<PathGlob>().unwrap()],
        created: at(0),
        expiration: at(1_000),
        max_leases: None,
    };
    store.create_token(token, &secret).await.unwrap();
    secret
}

/// All that an issue reads, and what shows in gauges and lists, while a write hangs.
#[tokio::test]
async fn reads_wait_for_no_write() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    let secret = reader(&store, "t1").await;
    let lease = lease();
    let admitted = store.admit(lease.clone(), Conditions::default(), at(0));
    admitted.await.unwrap();
    let (release, holding) = held(&store).await;
    let reads = async {
        let bearer = store.bearer(secret).await.unwrap();
        assert!(matches!(bearer, Some(Bearer::Reader(_))), "{bearer:?}");
        let wrong = (0..70).map(|n| token_hash(&Secret::new(format!("wrong-{n}"))));
        let found = store.bearers(wrong.collect()).await.unwrap();
        assert_eq!(found.iter().flatten().count(), 0);
        let read = store.read_secret("db:dyn".parse().unwrap()).await.unwrap();
        assert!(read.base.is_some());
        assert_eq!(store.lease(lease.id).await.unwrap().id, lease.id);
        assert!(store.lease_access(lease.id, 0).await.unwrap().is_some());
        let page = store.leases(Filter::default(), String::new(), 10).await;
        assert_eq!(page.unwrap().len(), 1);
        let counts = store.pool_counts(at(0)).await.unwrap();
        assert_eq!(counts[0].leases, [1, 0, 0, 0, 0]);
        assert!(store.pools_with_due(at(0)).await.unwrap().is_empty());
        assert_eq!(store.pools_with_due(at(100)).await.unwrap().len(), 1);
        store.keys(false).await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(20), reads)
        .await
        .expect("a read waits for a write");
    assert!(!holding.is_finished());
    drop(release);
    holding.await.unwrap();
}

/// A deleted token is refused from the next request on, on this dispatcher and on others, whichever reader
/// is asked and however often it was right before.
#[tokio::test]
async fn a_deleted_token_is_refused_by_the_next_read() {
    let directory = tempfile::tempdir().unwrap();
    let place = tested(directory.path()).await;
    let (store, _, _lock) = Store::open(&place).unwrap();
    let others = match place.backend {
        Backend::Postgres(_) => vec![Store::open(&place).unwrap().0],
        Backend::Sqlite(_) => vec![],
    };
    let stores: Vec<&Store> = std::iter::once(&store).chain(&others).collect();
    for n in 0..20 {
        let id = format!("t{n}");
        let secret = reader(&store, &id).await;
        let asked = |times: usize| {
            let asking = stores.iter().flat_map(|store| {
                std::iter::repeat_with(|| store.bearer(secret.clone())).take(times)
            });
            futures_util::future::join_all(asking)
        };
        assert!(
            asked(8)
                .await
                .iter()
                .all(|found| matches!(found, Ok(Some(_))))
        );
        store.delete_token(id).await.unwrap();
        assert!(asked(8).await.iter().all(|found| matches!(found, Ok(None))));
    }
}

/// A reader's session is read-only: a job that writes in it by mistake fails.
#[tokio::test]
async fn a_reader_writes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _lock) = furnished(directory.path()).await;
    for lane in [Lane::Rows, Lane::Pages] {
        let written = store.read(lane, |connection| {
            connection.execute("DELETE FROM tokens WHERE id = ?1", ["root"])?;
            Ok(())
        });
        assert!(written.await.is_err());
        // The reader still works.
        assert_eq!(store.all_pools().await.unwrap().len(), 1);
    }
    let root = std::fs::read_to_string(place(directory.path()).root_token_file).unwrap();
    let found = store.bearer(Secret::new(root.trim())).await.unwrap();
    assert!(matches!(found, Some(Bearer::Root)));
}

/// A closed store does nothing any more, in any of its threads.
#[tokio::test]
async fn a_close_waits_for_every_thread() {
    let directory = tempfile::tempdir().unwrap();
    let place = tested(directory.path()).await;
    let (store, _, _lock) = Store::open(&place).unwrap();
    let (begun, is_begun) = oneshot::channel();
    let is_done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let done = is_done.clone();
    let reading = {
        let store = store.clone();
        tokio::spawn(async move {
            let read = store.read(Lane::Rows, move |_| {
                let _ = begun.send(());
                std::thread::sleep(Duration::from_millis(300));
                done.store(true, std::sync::atomic::Ordering::Relaxed);
                Ok(())
            });
            read.await
        })
    };
    is_begun.await.unwrap();
    store.close().await;
    assert!(is_done.load(std::sync::atomic::Ordering::Relaxed));
    reading.await.unwrap().unwrap();
}
