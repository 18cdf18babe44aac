//! Translates SQLite's SQL, in which the store's queries are written, to PostgreSQL's.

/// Translates SQLite's SQL to PostgreSQL's. `?1` and `?` become `$1`. Index hints are left out. Tables get their
/// schema, because the search path does not have it.
pub(in crate::store) fn for_postgres(sql: &str) -> String {
    let mut text = String::with_capacity(sql.len());
    let mut rest = sql;
    let mut next = 1;
    while let Some(at) = rest.find('?') {
        text.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        text.push('$');
        if digits == 0 {
            text.push_str(&next.to_string());
            next += 1;
        } else {
            text.push_str(&rest[..digits]);
            rest = &rest[digits..];
        }
    }
    text.push_str(rest);
    while let Some(at) = text.find("INDEXED BY ") {
        let name = &text[at + "INDEXED BY ".len()..];
        let end = name.find(char::is_whitespace).unwrap_or(name.len());
        text.replace_range(at..at + "INDEXED BY ".len() + end, "");
    }
    with_schema(&text)
}

/// Puts the schema before each table: the word after FROM, JOIN, INTO or UPDATE.
fn with_schema(sql: &str) -> String {
    let mut text = String::with_capacity(sql.len() + 32);
    let (mut last, mut one_before) = ("", "");
    let mut rest = sql;
    while !rest.is_empty() {
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let names_table = match last {
            "FROM" => one_before != "DISTINCT",
            "UPDATE" => !matches!(one_before, "DO" | "FOR"),
            "JOIN" | "INTO" => true,
            _ => false,
        };
        if !word.is_empty() {
            // A name `with_…` belongs to the WITH clause of its query.
            let is_none = word.starts_with("with_") || word == "LATERAL";
            if names_table && !is_none && !after.starts_with(['.', '(']) {
                text.push_str("public.");
            }
            (one_before, last) = (last, word);
        }
        text.push_str(word);
        let gap = after.find(is_word).unwrap_or(after.len());
        if !after[..gap].trim().is_empty() {
            // A word after a bracket or an operator is not the table of a keyword.
            (one_before, last) = ("", "");
        }
        text.push_str(&after[..gap]);
        rest = &after[gap..];
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sql_is_translated() {
        assert_eq!(
            for_postgres("SELECT a FROM t INDEXED BY t_a WHERE a = ?1 AND b > ?12 AND c = ?1"),
            "SELECT a FROM public.t  WHERE a = $1 AND b > $12 AND c = $1"
        );
        assert_eq!(
            for_postgres("a = ? AND (b = ? OR b >= ?)"),
            "a = $1 AND (b = $2 OR b >= $3)"
        );
    }

    #[test]
    fn tables_are_named_with_their_schema() {
        for (sql, told) in [
            (
                "INSERT INTO t (a) VALUES (1) ON CONFLICT (a) DO UPDATE SET a = excluded.a WHERE t.a < 2",
                "INSERT INTO public.t (a) VALUES (1) ON CONFLICT (a) DO UPDATE SET a = excluded.a WHERE t.a < 2",
            ),
            (
                "UPDATE t SET a = given.a FROM (VALUES (1)) AS given (a) WHERE t.a = given.a",
                "UPDATE public.t SET a = given.a FROM (VALUES (1)) AS given (a) WHERE t.a = given.a",
            ),
            (
                "DELETE FROM t WHERE a IS DISTINCT FROM b AND c IN (SELECT d FROM\n u JOIN v ON x = y)",
                "DELETE FROM public.t WHERE a IS DISTINCT FROM b AND c IN (SELECT d FROM\n public.u JOIN public.v ON x = y)",
            ),
            (
                "WITH with_x (a) AS (SELECT a FROM t) SELECT a FROM with_x AS w CROSS JOIN LATERAL (SELECT b FROM u) AS v",
                "WITH with_x (a) AS (SELECT a FROM public.t) SELECT a FROM with_x AS w CROSS JOIN LATERAL (SELECT b FROM public.u) AS v",
            ),
            (
                "SELECT a FROM pg_catalog.b FOR UPDATE",
                "SELECT a FROM pg_catalog.b FOR UPDATE",
            ),
            ("SELECT 'é', 1 FROM f(2)", "SELECT 'é', 1 FROM f(2)"),
        ] {
            assert_eq!(for_postgres(sql), told);
        }
    }
}
