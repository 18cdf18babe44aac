-- A change of an admin's password under way: which of two is in force is not known until a login tells.
CREATE TABLE rotations (
    secret_id       TEXT PRIMARY KEY REFERENCES secrets (id),
    version         INTEGER NOT NULL,      -- of the base secret before the change
    password_sealed BLOB NOT NULL,         -- the new one
    pool            TEXT NOT NULL,
    started         INTEGER NOT NULL,
    started_by      TEXT NOT NULL,
    settles_at      INTEGER NOT NULL       -- after it nothing of the change can still happen
) STRICT, WITHOUT ROWID;

-- The pool that made accounts with a base secret before its last dynamic secret was deleted.
CREATE TABLE base_pools (
    secret_id TEXT PRIMARY KEY,
    pool      TEXT NOT NULL
) STRICT, WITHOUT ROWID;
