-- A count has a part for each session, so that leases of one pool are recorded side by side: none waits for the
-- row of another. A count is the sum of its parts, as every version reads it.
ALTER TABLE lease_counts ADD COLUMN part BIGINT NOT NULL DEFAULT 0;
ALTER TABLE lease_counts DROP CONSTRAINT lease_counts_pkey;
ALTER TABLE lease_counts ADD PRIMARY KEY (pool, state, part);

CREATE OR REPLACE FUNCTION public.count_leases() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    own bigint := pg_catalog.pg_backend_pid();
BEGIN
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO public.lease_counts (pool, state, part, n) VALUES (OLD.pool, OLD.state, own, -1)
            ON CONFLICT (pool, state, part) DO UPDATE SET n = lease_counts.n - 1;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO public.lease_counts (pool, state, part, n) VALUES (NEW.pool, NEW.state, own, 1)
            ON CONFLICT (pool, state, part) DO UPDATE SET n = lease_counts.n + 1;
    END IF;
    RETURN NULL;
END $$;
