-- Renewals, reads under a name, shared leases, quotas, what is in the way of a revocation, two keys of a pool.

ALTER TABLE leases ADD COLUMN secret_version INTEGER NOT NULL DEFAULT 0;
ALTER TABLE leases ADD COLUMN max_ttl_seconds INTEGER NOT NULL DEFAULT 0;
ALTER TABLE leases ADD COLUMN renewable_until INTEGER;    -- by the database's clock
ALTER TABLE leases ADD COLUMN objects TEXT;               -- JSON list; what the last failure named
ALTER TABLE leases ADD COLUMN next_try INTEGER;           -- when the engines try again by themselves
UPDATE leases SET max_ttl_seconds = ttl_seconds;

-- Leases that hold a place: not settled, and their account not seen to be gone.
CREATE INDEX leases_held_path ON leases (path, created_by) WHERE next_reconcile IS NOT NULL AND revoked_at IS NULL;
CREATE INDEX leases_held_caller ON leases (created_by) WHERE next_reconcile IS NOT NULL AND revoked_at IS NULL;

-- Reads under an Idempotency-Key, and the lease each was answered with.
CREATE TABLE reads (
    created_by TEXT NOT NULL,
    path       TEXT NOT NULL,
    key        TEXT NOT NULL,
    lease      TEXT NOT NULL,
    PRIMARY KEY (created_by, path, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX reads_lease ON reads (lease);

ALTER TABLE pools ADD COLUMN next_key TEXT;               -- of a rotation that is under way
ALTER TABLE pools ADD COLUMN previous_key TEXT;           -- of before the last rotation
ALTER TABLE tokens ADD COLUMN max_leases INTEGER;
