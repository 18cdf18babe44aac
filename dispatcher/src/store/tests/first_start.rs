//! The first start: the files it makes, the key that must fit, a root token that was made before.

use super::*;
use std::os::unix::fs::PermissionsExt;

#[tokio::test]
async fn the_first_start_makes_private_files_and_the_key_must_fit() {
    let directory = tempfile::tempdir().unwrap();
    let place = place(directory.path());
    let (store, identity, lock) = Store::open(&place).unwrap();
    let Backend::Sqlite(file) = &place.backend else {
        panic!("a file")
    };
    for file in [file, &place.key_file, &place.root_token_file] {
        assert_eq!(
            std::fs::metadata(file).unwrap().permissions().mode() & 0o777,
            0o600,
            "{file:?}"
        );
    }
    assert_eq!(
        std::fs::metadata(&place.data_dir)
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
    let token = std::fs::read_to_string(&place.root_token_file).unwrap();
    assert!(matches!(
        store.bearer(Secret::new(token.trim())).await.unwrap(),
        Some(Bearer::Root)
    ));
    assert!(store.bearer(Secret::new("other")).await.unwrap().is_none());
    assert!(
        matches!(Store::open(&place), Err(OpenError::Locked { .. })),
        "one dispatcher at a time"
    );
    store.close().await;
    assert!(store.ready().is_err());
    drop(lock);

    let (store, again, lock) = Store::open(&place).unwrap();
    assert_eq!(again.installation, identity.installation);
    assert_eq!(
        std::fs::read_to_string(&place.root_token_file).unwrap(),
        token,
        "made once"
    );
    store.close().await;
    drop(lock);

    let key = std::fs::read(&place.key_file).unwrap();
    std::fs::write(&place.key_file, sealer::Keys::random().expose()).unwrap();
    assert!(
        matches!(Store::open(&place), Err(OpenError::Key { file, .. }) if file == place.key_file)
    );
    std::fs::remove_file(&place.key_file).unwrap();
    assert!(
        matches!(Store::open(&place), Err(OpenError::Key { file, .. }) if file == place.key_file)
    );
    std::fs::write(&place.key_file, key).unwrap();
    assert!(Store::open(&place).is_ok());
}

#[tokio::test]
async fn a_root_token_made_beforehand_is_taken_if_it_is_one() {
    let directory = tempfile::tempdir().unwrap();
    let place = tested(directory.path()).await;
    std::fs::create_dir_all(&place.data_dir).unwrap();
    for bad in ["short", &"with spaces ".repeat(4), &"ü".repeat(32)] {
        std::fs::write(&place.root_token_file, bad).unwrap();
        let refused = Store::open(&place).err().unwrap().to_string();
        assert!(refused.contains("root-token"), "{refused}");
        assert!(!refused.contains(bad), "{refused}");
    }
    let given = "0123456789abcdef".repeat(2);
    std::fs::write(&place.root_token_file, format!("{given}\n")).unwrap();
    let (store, _, _lock) = Store::open(&place).unwrap();
    assert!(matches!(
        store.bearer(Secret::new(given.as_str())).await.unwrap(),
        Some(Bearer::Root)
    ));
}
