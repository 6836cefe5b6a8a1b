//! Versions of the database's tables. A released version is never changed; new versions are added at the end.

use sqlx::{AnyPool, Row};

use super::Result;
use crate::records::Kind;

/// Key of the row in `imports` that holds the name of this database. No imported file has an empty name.
const IDENTITY: &str = "";

/// Statements that upgrade each version to the next.
const VERSIONS: &[&[&str]] = &[
    &[
        "CREATE TABLE kinds (kind TEXT PRIMARY KEY, version BIGINT NOT NULL)",
        "CREATE TABLE records (kind TEXT NOT NULL, id TEXT NOT NULL, place BIGINT NOT NULL, link TEXT NOT NULL, \
        body TEXT NOT NULL, PRIMARY KEY (kind, id))",
        "CREATE INDEX records_in_order ON records (kind, place)",
        "CREATE INDEX records_by_link ON records (kind, link)",
        "CREATE TABLE removals (bucket TEXT NOT NULL, object TEXT NOT NULL, due BIGINT NOT NULL, \
        PRIMARY KEY (bucket, object))",
        "CREATE TABLE imports (file TEXT PRIMARY KEY, state TEXT NOT NULL)",
        "CREATE TABLE set_aside (kind TEXT NOT NULL, body TEXT NOT NULL, reason TEXT NOT NULL, moved TEXT NOT NULL)",
    ],
    &["CREATE TABLE claims (name TEXT PRIMARY KEY, owner TEXT NOT NULL, due BIGINT NOT NULL)"],
];

/// Upgrades the tables to the newest version and returns the name of this database. Several replicas may call it at
/// once.
pub(super) async fn run(pool: &AnyPool) -> Result<String> {
    let mut transaction = pool.begin().await?;
    if transaction.backend_name() == "PostgreSQL" {
        // Let replicas wait for each other: CREATE TABLE IF NOT EXISTS fails if two replicas run it together.
        sqlx::query("SELECT pg_advisory_xact_lock(470100)").execute(&mut *transaction).await?;
    }
    sqlx::query("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)")
        .execute(&mut *transaction)
        .await?;
    let row = sqlx::query("SELECT COALESCE(MAX(version), 0) FROM schema_version").fetch_one(&mut *transaction).await?;
    let version: i64 = row.try_get(0)?;
    let done = usize::try_from(version).unwrap_or(0);
    if done > VERSIONS.len() {
        let newer =
            format!("its tables have version {done}, this program knows {}; use the newer program", VERSIONS.len());
        return Err(sqlx::Error::Configuration(newer.into()));
    }
    for (number, statements) in (1_i64..).zip(VERSIONS).skip(done) {
        for statement in *statements {
            sqlx::query(statement).execute(&mut *transaction).await?;
        }
        sqlx::query("INSERT INTO schema_version (version) VALUES ($1)").bind(number).execute(&mut *transaction).await?;
    }
    for kind in Kind::ALL.into_iter().chain([Kind::Starting]) {
        let statement = "INSERT INTO kinds (kind, version) VALUES ($1, 0) ON CONFLICT (kind) DO NOTHING";
        sqlx::query(statement).bind(kind.name()).execute(&mut *transaction).await?;
    }
    // Choose a random name once. ETags contain it, since the version of a list means nothing in another database.
    let statement = "INSERT INTO imports (file, state) VALUES ($1, $2) ON CONFLICT (file) DO NOTHING";
    sqlx::query(statement).bind(IDENTITY).bind(crate::records::new_id()).execute(&mut *transaction).await?;
    let row = sqlx::query("SELECT state FROM imports WHERE file = $1").bind(IDENTITY);
    let identity = row.fetch_one(&mut *transaction).await?.try_get(0)?;
    transaction.commit().await?;
    Ok(identity)
}
