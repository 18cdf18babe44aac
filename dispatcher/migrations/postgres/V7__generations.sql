-- Passwords come from a random nonce, keys have generations, and a pool may be distrusted.

ALTER TABLE leases ADD COLUMN nonce BYTEA;                -- while the password may be given once more
ALTER TABLE leases ADD COLUMN derivation BIGINT;          -- generation of the key; none = derived from the lease's id, with the first
CREATE INDEX leases_derivation ON leases (derivation) WHERE state IN ('pending', 'active');
ALTER TABLE pools ADD COLUMN distrusted BIGINT;           -- since when
ALTER TABLE pools ADD COLUMN dispatcher_generation BIGINT NOT NULL DEFAULT 1;  -- the dispatcher's newest key that all its engines know
ALTER TABLE pools ADD COLUMN next_dispatcher_generation BIGINT;                -- the one handed out with next_key

-- The version of the base secret which that pool was last sent.
ALTER TABLE base_pools ADD COLUMN version BIGINT;
UPDATE base_pools SET version = (SELECT s.version FROM secrets s WHERE s.id = base_pools.secret_id);

-- A lease may be taken over by another pool.
CREATE TRIGGER leases_taken_over AFTER UPDATE OF pool ON leases FOR EACH ROW WHEN (OLD.pool <> NEW.pool)
    EXECUTE FUNCTION count_leases();
