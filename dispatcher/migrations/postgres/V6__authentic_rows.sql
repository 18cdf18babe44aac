-- Each row's code under the master key; see store/authentic.rs. None in rows that a dispatcher of the version
-- before writes during an upgrade.
ALTER TABLE meta ADD COLUMN mac BYTEA;
ALTER TABLE pools ADD COLUMN mac BYTEA;
ALTER TABLE tokens ADD COLUMN mac BYTEA;
ALTER TABLE secrets ADD COLUMN mac BYTEA;
ALTER TABLE base_versions ADD COLUMN mac BYTEA;
ALTER TABLE leases ADD COLUMN mac BYTEA;
ALTER TABLE reads ADD COLUMN mac BYTEA;
ALTER TABLE rotations ADD COLUMN mac BYTEA;
ALTER TABLE base_pools ADD COLUMN mac BYTEA;
