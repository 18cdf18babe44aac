-- Dispatchers empty their search path: what a trigger names has its schema.
CREATE OR REPLACE FUNCTION public.count_leases() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        UPDATE public.lease_counts SET n = n - 1 WHERE pool = OLD.pool AND state = OLD.state;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO public.lease_counts VALUES (NEW.pool, NEW.state, 1)
            ON CONFLICT (pool, state) DO UPDATE SET n = lease_counts.n + 1;
    END IF;
    RETURN NULL;
END $$;
