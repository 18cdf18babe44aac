-- Active leases in the order in which an engine lists the roles of a server: both are compared page by page.
CREATE INDEX leases_active_role ON leases (base_secret_id, pool, role) WHERE state = 'active';
