-- Leases whose account was seen to be gone while their create could still commit: shown as ended, and few.
CREATE INDEX leases_gone ON leases (pool, expiration) WHERE state = 'revoking' AND revoked_at IS NOT NULL;
