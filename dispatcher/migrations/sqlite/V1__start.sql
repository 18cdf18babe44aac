-- Moments are milliseconds since 1970 UTC. Columns called `…_sealed` and `data` are sealed with the master key.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE pools (
    name       TEXT PRIMARY KEY,
    public_key TEXT NOT NULL,
    created    INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE tokens (
    id         TEXT PRIMARY KEY,           -- `root`, or random
    hash       BLOB NOT NULL UNIQUE,       -- SHA-256 of the token
    read       TEXT,                       -- JSON list of globs; none = everything (root)
    created    INTEGER NOT NULL,
    expiration INTEGER
) STRICT, WITHOUT ROWID;

CREATE TABLE secrets (
    id               TEXT PRIMARY KEY,
    path             TEXT NOT NULL UNIQUE,
    kind             TEXT NOT NULL CHECK (kind IN ('static', 'base', 'dynamic')),
    attributes       TEXT NOT NULL,        -- JSON, as it was written
    description      TEXT,
    data             BLOB NOT NULL,
    version          INTEGER NOT NULL,
    linked           TEXT REFERENCES secrets (id),
    pool             TEXT REFERENCES pools (name),
    created          INTEGER NOT NULL,
    created_by       TEXT NOT NULL,
    last_modified    INTEGER NOT NULL,
    last_modified_by TEXT NOT NULL,
    CHECK ((kind = 'dynamic') = (linked IS NOT NULL AND pool IS NOT NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX secrets_linked ON secrets (linked) WHERE linked IS NOT NULL;
CREATE INDEX secrets_pool ON secrets (pool) WHERE pool IS NOT NULL;

-- Every version of a base secret that a lease may still need, whatever becomes of the secret.
CREATE TABLE base_versions (
    secret_id     TEXT NOT NULL,
    version       INTEGER NOT NULL,
    target_sealed BLOB NOT NULL,
    server        TEXT,                    -- identity of the server last seen behind it
    PRIMARY KEY (secret_id, version)
) STRICT, WITHOUT ROWID;

CREATE TABLE leases (
    id                 TEXT PRIMARY KEY,
    path               TEXT NOT NULL,
    pool               TEXT NOT NULL,
    role               TEXT NOT NULL,
    state              TEXT NOT NULL CHECK (state IN ('pending', 'active', 'revoking', 'revoked', 'failed')),
    base_secret_id     TEXT NOT NULL,
    base_version       INTEGER NOT NULL,
    database           TEXT NOT NULL,
    owned_objects      TEXT NOT NULL,      -- JSON
    traceparent        TEXT NOT NULL,
    created            INTEGER NOT NULL,
    created_by         TEXT NOT NULL,
    ttl_seconds        INTEGER NOT NULL,
    create_deadline    INTEGER NOT NULL,
    expiration         INTEGER,            -- by the database's clock
    server             TEXT,               -- where the role was made
    engine             TEXT,               -- who made it
    revoked_at         INTEGER,
    revoked_by         TEXT,
    attempts           INTEGER NOT NULL,
    last_error         TEXT,
    stuck              INTEGER NOT NULL,
    next_reconcile     INTEGER,            -- none = settled
    reconcile_attempts INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX leases_path ON leases (path, id);
CREATE INDEX leases_pool ON leases (pool, id);
CREATE INDEX leases_state ON leases (state, id);
CREATE INDEX leases_role ON leases (role);
CREATE INDEX leases_created_by ON leases (created_by, id);
CREATE INDEX leases_stuck ON leases (stuck, id) WHERE stuck = 1;
CREATE INDEX leases_stuck_pool ON leases (pool, id) WHERE stuck = 1;
CREATE INDEX leases_live_path ON leases (path, id) WHERE state IN ('pending', 'active');
CREATE INDEX leases_reconcile ON leases (pool, next_reconcile) WHERE next_reconcile IS NOT NULL;
CREATE INDEX leases_overdue ON leases (pool, expiration) WHERE next_reconcile IS NOT NULL AND revoked_at IS NULL;
CREATE INDEX leases_base ON leases (base_secret_id, base_version) WHERE next_reconcile IS NOT NULL;
CREATE INDEX leases_ended ON leases (created) WHERE next_reconcile IS NULL;

-- How many leases a pool has in each state, so that nobody ever counts rows.
CREATE TABLE lease_counts (
    pool  TEXT NOT NULL,
    state TEXT NOT NULL,
    n     INTEGER NOT NULL,
    PRIMARY KEY (pool, state)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER leases_inserted AFTER INSERT ON leases BEGIN
    INSERT INTO lease_counts VALUES (NEW.pool, NEW.state, 1)
        ON CONFLICT (pool, state) DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER leases_moved AFTER UPDATE OF state ON leases WHEN OLD.state <> NEW.state BEGIN
    UPDATE lease_counts SET n = n - 1 WHERE pool = OLD.pool AND state = OLD.state;
    INSERT INTO lease_counts VALUES (NEW.pool, NEW.state, 1)
        ON CONFLICT (pool, state) DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER leases_deleted AFTER DELETE ON leases BEGIN
    UPDATE lease_counts SET n = n - 1 WHERE pool = OLD.pool AND state = OLD.state;
END;
