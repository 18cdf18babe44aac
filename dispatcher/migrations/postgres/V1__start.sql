-- The tables of ../sqlite, all its migrations together. Text sorts and compares by its bytes, as in SQLite.
-- Moments are milliseconds since 1970 UTC. Columns called `…_sealed` and `data` are sealed with the master key.

CREATE TABLE meta (
    key   TEXT COLLATE "C" PRIMARY KEY,
    value BYTEA NOT NULL
);

CREATE TABLE pools (
    name       TEXT COLLATE "C" PRIMARY KEY,
    public_key TEXT COLLATE "C" NOT NULL,
    created    BIGINT NOT NULL,
    next_key     TEXT COLLATE "C",         -- of a rotation that is under way
    previous_key TEXT COLLATE "C"          -- of before the last rotation
);

CREATE TABLE tokens (
    id         TEXT COLLATE "C" PRIMARY KEY,           -- `root`, or random
    hash       BYTEA NOT NULL UNIQUE,       -- SHA-256 of the token
    read       TEXT COLLATE "C",                       -- JSON list of globs; none = everything (root)
    created    BIGINT NOT NULL,
    expiration BIGINT,
    max_leases BIGINT
);

CREATE TABLE secrets (
    id               TEXT COLLATE "C" PRIMARY KEY,
    path             TEXT COLLATE "C" NOT NULL UNIQUE,
    kind             TEXT COLLATE "C" NOT NULL CHECK (kind IN ('static', 'base', 'dynamic')),
    attributes       TEXT COLLATE "C" NOT NULL,        -- JSON, as it was written
    description      TEXT COLLATE "C",
    data             BYTEA NOT NULL,
    version          BIGINT NOT NULL,
    linked           TEXT COLLATE "C" REFERENCES secrets (id),
    pool             TEXT COLLATE "C" REFERENCES pools (name),
    created          BIGINT NOT NULL,
    created_by       TEXT COLLATE "C" NOT NULL,
    last_modified    BIGINT NOT NULL,
    last_modified_by TEXT COLLATE "C" NOT NULL,
    CHECK ((kind = 'dynamic') = (linked IS NOT NULL AND pool IS NOT NULL))
);
CREATE INDEX secrets_linked ON secrets (linked) WHERE linked IS NOT NULL;
CREATE INDEX secrets_pool ON secrets (pool) WHERE pool IS NOT NULL;

-- Every version of a base secret that a lease may still need, whatever becomes of the secret.
CREATE TABLE base_versions (
    secret_id     TEXT COLLATE "C" NOT NULL,
    version       BIGINT NOT NULL,
    target_sealed BYTEA NOT NULL,
    server        TEXT COLLATE "C",                    -- identity of the server last seen behind it
    PRIMARY KEY (secret_id, version)
);

CREATE TABLE leases (
    id                 TEXT COLLATE "C" PRIMARY KEY,
    path               TEXT COLLATE "C" NOT NULL,
    pool               TEXT COLLATE "C" NOT NULL,
    role               TEXT COLLATE "C" NOT NULL,
    state              TEXT COLLATE "C" NOT NULL CHECK (state IN ('pending', 'active', 'revoking', 'revoked', 'failed')),
    base_secret_id     TEXT COLLATE "C" NOT NULL,
    base_version       BIGINT NOT NULL,
    database           TEXT COLLATE "C" NOT NULL,
    owned_objects      TEXT COLLATE "C" NOT NULL,      -- JSON
    traceparent        TEXT COLLATE "C" NOT NULL,
    created            BIGINT NOT NULL,
    created_by         TEXT COLLATE "C" NOT NULL,
    ttl_seconds        BIGINT NOT NULL,
    create_deadline    BIGINT NOT NULL,
    expiration         BIGINT,            -- by the database's clock
    server             TEXT COLLATE "C",               -- where the role was made
    engine             TEXT COLLATE "C",               -- who made it
    revoked_at         BIGINT,
    revoked_by         TEXT COLLATE "C",
    attempts           BIGINT NOT NULL,
    last_error         TEXT COLLATE "C",
    stuck              BIGINT NOT NULL,
    next_reconcile     BIGINT,            -- none = settled
    reconcile_attempts BIGINT NOT NULL,
    secret_version     BIGINT NOT NULL,
    max_ttl_seconds    BIGINT NOT NULL,
    renewable_until    BIGINT,             -- by the database's clock
    objects            TEXT COLLATE "C",   -- JSON list; what the last failure named
    next_try           BIGINT,             -- when the engines try again by themselves
    skew_ms            BIGINT NOT NULL,    -- the database's clock less this one's
    ends_here          BIGINT              -- `expiration` by this clock
);
CREATE INDEX leases_path ON leases (path, id);
CREATE INDEX leases_pool ON leases (pool, id);
CREATE INDEX leases_state ON leases (state, id);
CREATE INDEX leases_role ON leases (role);
CREATE INDEX leases_created_by ON leases (created_by, id);
CREATE INDEX leases_stuck ON leases (stuck, id) WHERE stuck = 1;
CREATE INDEX leases_stuck_pool ON leases (pool, id) WHERE stuck = 1;
CREATE INDEX leases_live_path ON leases (path, id) WHERE state IN ('pending', 'active');
CREATE INDEX leases_reconcile ON leases (pool, next_reconcile) WHERE next_reconcile IS NOT NULL;
CREATE INDEX leases_overdue ON leases (pool, ends_here) WHERE next_reconcile IS NOT NULL AND revoked_at IS NULL;
CREATE INDEX leases_base ON leases (base_secret_id, base_version) WHERE next_reconcile IS NOT NULL;
CREATE INDEX leases_ended ON leases (created) WHERE next_reconcile IS NULL;

-- How many leases a pool has in each state, so that nobody ever counts rows.
CREATE TABLE lease_counts (
    pool  TEXT COLLATE "C" NOT NULL,
    state TEXT COLLATE "C" NOT NULL,
    n     BIGINT NOT NULL,
    PRIMARY KEY (pool, state)
);

-- Leases that hold a place: not settled, and their account not seen to be gone.
CREATE INDEX leases_held_path ON leases (path, created_by) WHERE next_reconcile IS NOT NULL AND revoked_at IS NULL;
CREATE INDEX leases_held_caller ON leases (created_by) WHERE next_reconcile IS NOT NULL AND revoked_at IS NULL;

-- Reads under an Idempotency-Key, and the lease each was answered with.
CREATE TABLE reads (
    created_by TEXT COLLATE "C" NOT NULL,
    path       TEXT COLLATE "C" NOT NULL,
    key        TEXT COLLATE "C" NOT NULL,
    lease      TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (created_by, path, key)
);
CREATE INDEX reads_lease ON reads (lease);

-- A change of an admin's password under way: which of two is in force is not known until a login tells.
CREATE TABLE rotations (
    secret_id       TEXT COLLATE "C" PRIMARY KEY REFERENCES secrets (id),
    version         BIGINT NOT NULL,      -- of the base secret before the change
    password_sealed BYTEA NOT NULL,         -- the new one
    pool            TEXT COLLATE "C" NOT NULL,
    started         BIGINT NOT NULL,
    started_by      TEXT COLLATE "C" NOT NULL,
    settles_at      BIGINT NOT NULL       -- after it nothing of the change can still happen
);

-- The pool that made accounts with a base secret before its last dynamic secret was deleted.
CREATE TABLE base_pools (
    secret_id TEXT COLLATE "C" PRIMARY KEY,
    pool      TEXT COLLATE "C" NOT NULL
);

-- Which dispatcher reconciles.
CREATE TABLE leaders (
    name   TEXT COLLATE "C" PRIMARY KEY,
    holder TEXT COLLATE "C" NOT NULL,
    until  BIGINT NOT NULL
);

CREATE FUNCTION count_leases() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        UPDATE lease_counts SET n = n - 1 WHERE pool = OLD.pool AND state = OLD.state;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO lease_counts VALUES (NEW.pool, NEW.state, 1)
            ON CONFLICT (pool, state) DO UPDATE SET n = lease_counts.n + 1;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER leases_added AFTER INSERT OR DELETE ON leases FOR EACH ROW EXECUTE FUNCTION count_leases();
CREATE TRIGGER leases_moved AFTER UPDATE OF state ON leases FOR EACH ROW WHEN (OLD.state <> NEW.state)
    EXECUTE FUNCTION count_leases();
