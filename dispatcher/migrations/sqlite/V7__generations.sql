-- Passwords come from a random nonce, keys have generations, and a pool may be distrusted.

ALTER TABLE leases ADD COLUMN nonce BLOB;                 -- while the password may be given once more
ALTER TABLE leases ADD COLUMN derivation INTEGER;         -- generation of the key; none = derived from the lease's id, with the first
CREATE INDEX leases_derivation ON leases (derivation) WHERE state IN ('pending', 'active');
ALTER TABLE pools ADD COLUMN distrusted INTEGER;          -- since when
ALTER TABLE pools ADD COLUMN dispatcher_generation INTEGER NOT NULL DEFAULT 1;  -- the dispatcher's newest key that all its engines know
ALTER TABLE pools ADD COLUMN next_dispatcher_generation INTEGER;                -- the one handed out with next_key

-- The version of the base secret which that pool was last sent.
ALTER TABLE base_pools ADD COLUMN version INTEGER;
UPDATE base_pools SET version = (SELECT s.version FROM secrets s WHERE s.id = base_pools.secret_id);

-- A lease may be taken over by another pool.
CREATE TRIGGER leases_taken_over AFTER UPDATE OF pool ON leases WHEN OLD.pool <> NEW.pool BEGIN
    UPDATE lease_counts SET n = n - 1 WHERE pool = OLD.pool AND state = OLD.state;
    INSERT INTO lease_counts VALUES (NEW.pool, NEW.state, 1)
        ON CONFLICT (pool, state) DO UPDATE SET n = n + 1;
END;
