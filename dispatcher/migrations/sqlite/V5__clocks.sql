-- Ends are by the database's clock, deadlines by the store's: the difference, in milliseconds, and the end by the store's.
ALTER TABLE leases ADD COLUMN skew_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE leases ADD COLUMN ends_here INTEGER;
UPDATE leases SET ends_here = expiration;
DROP INDEX leases_overdue;
CREATE INDEX leases_overdue ON leases (pool, ends_here) WHERE next_reconcile IS NOT NULL AND revoked_at IS NULL;
