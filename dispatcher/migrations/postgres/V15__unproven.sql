-- By the database's clock: after it nothing of the change can still happen. None of a dispatcher of before.
ALTER TABLE rotations ADD COLUMN over_there BIGINT;

-- The other password of an admin, until a lease was made with the one in force.
CREATE TABLE unproven (
    secret_id       TEXT COLLATE "C" PRIMARY KEY,
    version         BIGINT NOT NULL,  -- of the base secret beside which it is kept
    password_sealed BYTEA NOT NULL,
    since           BIGINT NOT NULL,
    doubted         BIGINT,           -- when a login with the one in force was refused
    mac             BYTEA
);
