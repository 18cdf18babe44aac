//! Privileges of PostgreSQL, and which of them each kind of object has in which version.

/// A privilege of PostgreSQL (documentation, "Privileges", table 5.1), and membership.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Privilege {
    Select,
    Insert,
    Update,
    Delete,
    Truncate,
    References,
    Trigger,
    Maintain,
    Create,
    Connect,
    Temporary,
    Execute,
    Usage,
    Set,
    AlterSystem,
    Member,
}

impl Privilege {
    pub(super) const ALL: [Self; 16] = [
        Self::Select,
        Self::Insert,
        Self::Update,
        Self::Delete,
        Self::Truncate,
        Self::References,
        Self::Trigger,
        Self::Maintain,
        Self::Create,
        Self::Connect,
        Self::Temporary,
        Self::Execute,
        Self::Usage,
        Self::Set,
        Self::AlterSystem,
        Self::Member,
    ];

    /// The SQL key word.
    pub fn as_sql(self) -> &'static str {
        match self {
            Self::Select => "SELECT",
            Self::Insert => "INSERT",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Truncate => "TRUNCATE",
            Self::References => "REFERENCES",
            Self::Trigger => "TRIGGER",
            Self::Maintain => "MAINTAIN",
            Self::Create => "CREATE",
            Self::Connect => "CONNECT",
            Self::Temporary => "TEMPORARY",
            Self::Execute => "EXECUTE",
            Self::Usage => "USAGE",
            Self::Set => "SET",
            Self::AlterSystem => "ALTER SYSTEM",
            Self::Member => "MEMBER",
        }
    }

    /// Whether it can be given on columns of a table.
    pub fn is_of_columns(self) -> bool {
        matches!(
            self,
            Self::Select | Self::Insert | Self::Update | Self::References
        )
    }

    pub(super) fn parse(word: &str) -> Option<Self> {
        if word.eq_ignore_ascii_case("temp") {
            return Some(Self::Temporary);
        }
        Self::ALL
            .into_iter()
            .find(|p| word.eq_ignore_ascii_case(p.as_sql()))
    }
}

/// The kinds of object a grant can be on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// Table, view, materialized view, foreign table, partitioned table.
    Table,
    /// Sequence, also one behind a serial column.
    Sequence,
    /// Function, procedure or aggregate.
    Function,
    /// Schema of the database.
    Schema,
    /// Database of the server.
    Database,
    /// Type or domain, also a built-in one.
    Type,
    /// Foreign server (`CREATE SERVER`).
    Server,
    /// Foreign-data wrapper (`CREATE FOREIGN DATA WRAPPER`).
    Wrapper,
    /// Large object, by its number.
    LargeObject,
    /// Setting of the server.
    Parameter,
    /// An existing role, to be a member of.
    Role,
}

impl ObjectKind {
    /// The word in messages.
    pub fn word(self) -> &'static str {
        match self {
            Self::Table => "table",
            Self::Sequence => "sequence",
            Self::Function => "function",
            Self::Schema => "schema",
            Self::Database => "database",
            Self::Type => "type",
            Self::Server => "foreign server",
            Self::Wrapper => "foreign-data wrapper",
            Self::LargeObject => "large object",
            Self::Parameter => "parameter",
            Self::Role => "role",
        }
    }

    /// The privileges this kind of object has on a server of this version
    /// (`server_version_num / 10000`): `MAINTAIN` came with 17, parameters have some since 15.
    pub fn privileges(self, server_major: u32) -> &'static [Privilege] {
        use Privilege::*;
        match self {
            Self::Table if server_major >= 17 => &[
                Select, Insert, Update, Delete, Truncate, References, Trigger, Maintain,
            ],
            Self::Table => &[
                Select, Insert, Update, Delete, Truncate, References, Trigger,
            ],
            Self::Sequence => &[Usage, Select, Update],
            Self::Function => &[Execute],
            Self::Schema => &[Create, Usage],
            Self::Database => &[Create, Connect, Temporary],
            Self::Type | Self::Server | Self::Wrapper => &[Usage],
            Self::LargeObject => &[Select, Update],
            Self::Parameter if server_major >= 15 => &[Set, AlterSystem],
            Self::Parameter => &[],
            Self::Role => &[Member],
        }
    }

    pub(super) fn may_have(self, privilege: Privilege) -> bool {
        self.privileges(u32::MAX).contains(&privilege)
    }
}
