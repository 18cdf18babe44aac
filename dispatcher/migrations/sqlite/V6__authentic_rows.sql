-- Each row's code under the master key; see store/authentic.rs. None in rows that a dispatcher of the version
-- before wrote, until the upgrade is over.
ALTER TABLE meta ADD COLUMN mac BLOB;
ALTER TABLE pools ADD COLUMN mac BLOB;
ALTER TABLE tokens ADD COLUMN mac BLOB;
ALTER TABLE secrets ADD COLUMN mac BLOB;
ALTER TABLE base_versions ADD COLUMN mac BLOB;
ALTER TABLE leases ADD COLUMN mac BLOB;
ALTER TABLE reads ADD COLUMN mac BLOB;
ALTER TABLE rotations ADD COLUMN mac BLOB;
ALTER TABLE base_pools ADD COLUMN mac BLOB;
