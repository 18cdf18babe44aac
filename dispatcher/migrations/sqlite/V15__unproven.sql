-- By the database's clock: after it nothing of the change can still happen. None of a dispatcher of before.
ALTER TABLE rotations ADD COLUMN over_there INTEGER;

-- The other password of an admin, until a lease was made with the one in force.
CREATE TABLE unproven (
    secret_id       TEXT PRIMARY KEY,
    version         INTEGER NOT NULL,  -- of the base secret beside which it is kept
    password_sealed BLOB NOT NULL,
    since           INTEGER NOT NULL,
    doubted         INTEGER,           -- when a login with the one in force was refused
    mac             BLOB
) STRICT, WITHOUT ROWID;
