//! SQL that gives the objects of a role in one database to another role, or drops them. This module is pure.

use super::new_owner::NewOwner;
use super::sql::{ident, literal};

pub(super) fn drop_owned(owner: &str) -> String {
    format!("DO 'BEGIN EXECUTE ''DROP OWNED BY '' || {owner}::oid::regrole; END'")
}

/// Statements that give all objects of a role in this database to the new owner. `owner` is an expression for the
/// role's oid. The new owner needs CREATE on the schemas of these objects. If it lacks that right, it gets it for
/// the change only.
pub(super) fn give_away(owner: &str, new_owner: &NewOwner, superuser: bool) -> String {
    let body = format!(
        "DECLARE owner regrole := {owner}; new_owner regrole := {new_owner}; place name; places name[]; BEGIN \
         IF NOT {superuser} THEN places := ARRAY({schemas}); END IF; \
         FOREACH place IN ARRAY coalesce(places, '{{}}') LOOP \
           EXECUTE format('GRANT CREATE ON SCHEMA %I TO %s', place, new_owner); END LOOP; \
         EXECUTE format('REASSIGN OWNED BY %s TO %s', owner, new_owner); \
         FOREACH place IN ARRAY coalesce(places, '{{}}') LOOP \
           EXECUTE format('REVOKE CREATE ON SCHEMA %I FROM %s', place, new_owner); END LOOP; END",
        new_owner = new_owner.oid,
        schemas = owning_schemas(owner, new_owner.oid),
    );
    format!("DO {}", literal(&body))
}

/// Makes the functions of the quarantine role run with the rights of their caller. Otherwise one object in
/// quarantine could give access to the others.
pub(super) fn without_security_definer(quarantine: &str) -> String {
    let body = format!(
        "DECLARE routine regprocedure; BEGIN \
         FOR routine IN SELECT oid FROM pg_proc WHERE prosecdef AND proowner = {}::regrole LOOP \
           EXECUTE format('ALTER ROUTINE %s SECURITY INVOKER', routine); END LOOP; END",
        literal(&ident(quarantine))
    );
    format!("DO {}", literal(&body))
}

/// Schemas in which the role owns something and its new owner may not create yet. In other schemas the new owner has
/// the right already, and must keep it.
fn owning_schemas(owner: &str, new_owner: u32) -> String {
    let owned = [
        ("pg_class", "relnamespace", "relowner"),
        ("pg_proc", "pronamespace", "proowner"),
        ("pg_type", "typnamespace", "typowner"),
        ("pg_operator", "oprnamespace", "oprowner"),
        ("pg_opclass", "opcnamespace", "opcowner"),
        ("pg_opfamily", "opfnamespace", "opfowner"),
        ("pg_collation", "collnamespace", "collowner"),
        ("pg_conversion", "connamespace", "conowner"),
        ("pg_ts_config", "cfgnamespace", "cfgowner"),
        ("pg_ts_dict", "dictnamespace", "dictowner"),
        ("pg_statistic_ext", "stxnamespace", "stxowner"),
    ]
    .map(|(catalog, schema, column)| {
        format!("SELECT {schema} FROM {catalog} WHERE {column} = {owner}")
    })
    .join(" UNION ");
    format!(
        "SELECT nspname FROM pg_namespace WHERE oid IN ({owned}) AND nspname !~ '^pg_(toast|temp)' \
         AND NOT has_schema_privilege({new_owner}, oid, 'CREATE') ORDER BY 1"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn create_is_lent_only_where_it_is_lacking() {
        let new_owner = NewOwner {
            name: "keeper".to_owned(),
            oid: 42,
        };
        let text = give_away("7", &new_owner, false);
        assert!(text.contains("IF NOT false THEN"), "{text}");
        assert!(text.contains("NOT has_schema_privilege(42, oid"), "{text}");
        let (lend, take) = (text.find("GRANT CREATE"), text.find("REVOKE CREATE"));
        let give = text.find("REASSIGN OWNED");
        assert!(lend < give && give < take, "{text}");
        assert!(give_away("7", &new_owner, true).contains("IF NOT true THEN"));
    }
}
