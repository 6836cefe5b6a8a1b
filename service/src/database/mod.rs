//! Records in SQLite or PostgreSQL (the same SQL for both). A committed change survives a kill and a power failure.
//!
//! A record is stored as the text that a GET returns. Each table has a version number. Every change first raises the
//! version of its tables, which also locks these tables against other changes, also those of other replicas. Readers
//! compare versions to see whether a list in memory is current.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use futures_util::TryStreamExt;
use ims_sshd::error::{Error, Result as Started};
use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use sqlx::{Any, AnyPool, Connection, Row, Transaction, TransactionManager};
use tokio::sync::OwnedMutexGuard;

use crate::records::{Kind, Location, Record, wire};

pub mod files;
mod migrations;

/// Result of a statement.
pub type Result<T> = std::result::Result<T, sqlx::Error>;

/// Location of the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place<'a> {
    /// Path of an SQLite file.
    File(&'a Path),
    /// URL of a PostgreSQL database.
    Url(&'a str),
}

/// An open database with the records.
pub struct Database {
    pool: AnyPool,
    /// Lock that the only writer of SQLite holds; `None` for PostgreSQL. Waiting for this lock is fair and has no
    /// timeout, unlike waiting for SQLite's own lock.
    writer: Option<Arc<tokio::sync::Mutex<()>>>,
    /// The last list of each table. The lock is held while a list is read, so that many clients at once cost the memory
    /// of one list.
    lists: BTreeMap<Kind, tokio::sync::Mutex<Option<List>>>,
    identity: String,
}

/// All records of a table, in order of creation.
#[derive(Debug, Clone)]
pub struct List {
    /// Version of the table when the list was read.
    pub version: i64,
    /// Body of an answer with all records. It is cached, since CFS requests all images before each of its calls.
    whole: Bytes,
    /// Position of each record in the body.
    places: Arc<Vec<Range<usize>>>,
}

impl List {
    /// Returns all records as the body of an answer.
    pub fn whole(&self) -> Bytes {
        self.whole.clone()
    }

    /// Returns the records as JSON.
    pub fn records(&self) -> impl Iterator<Item = &str> {
        self.places.iter().map(|place| std::str::from_utf8(&self.whole[place.clone()]).expect("made of texts"))
    }
}

/// Maximum number of connections to PostgreSQL, or of readers of SQLite.
const CONNECTIONS: u32 = 8;

/// Number of records that one INSERT statement of an import contains.
const AT_ONCE: usize = 200;

/// Timeout for getting a free connection to PostgreSQL, or for opening a new one.
const PATIENCE: Duration = Duration::from_secs(5);

/// Timeout for a connection to a file of SQLite: longer, since a file is always reachable, but a busy disk is slow.
const PATIENCE_WITH_DISKS: Duration = Duration::from_mins(1);

/// SQLite's codes of a damaged file: SQLITE_CORRUPT and SQLITE_NOTADB.
const DAMAGED: [i32; 2] = [11, 26];

/// Fails if the file is damaged. The pool would retry until its timeout, and then report only the timeout.
async fn probe(options: &AnyConnectOptions) -> Result<()> {
    let read = async {
        let mut connection = sqlx::AnyConnection::connect_with(options).await?;
        sqlx::query("SELECT count(*) FROM sqlite_master").execute(&mut connection).await?;
        connection.close().await
    };
    let code = |error: &sqlx::Error| error.as_database_error()?.code()?.parse::<i32>().ok();
    // Other failures may pass: another program may hold the lock. The low byte of an extended code is the plain one.
    read.await.or_else(|error| {
        let is_damaged = code(&error).is_some_and(|code| DAMAGED.contains(&(code & 0xff)));
        if is_damaged { Err(error) } else { Ok(()) }
    })
}

impl Database {
    /// Opens the database and brings its tables to the newest version.
    pub async fn open(place: Place<'_>) -> Started<Self> {
        sqlx::any::install_default_drivers();
        let (url, name) = match place {
            Place::File(path) => (format!("sqlite://{}?mode=rwc", encoded(path)), path.display().to_string()),
            Place::Url(url) => (url.to_owned(), "of IMS_DATABASE_URL".into()),
        };
        let is_file = matches!(place, Place::File(_));
        let attempted = || Error::new(format!("open the database {name}"));
        let options = AnyConnectOptions::from_str(&url).map_err(|e| attempted().because(e))?;
        if is_file && let Err(error) = probe(&options).await {
            return Err(attempted().because(error).advise("restore it from a backup"));
        }
        let patience = if is_file { PATIENCE_WITH_DISKS } else { PATIENCE };
        let pool = AnyPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(patience);
        let pool = pool.after_connect(move |connection, _| {
            Box::pin(async move {
                // With WAL, readers continue during a change. With FULL, a commit waits until the data is on the disk.
                for pragma in ["journal_mode = WAL", "synchronous = FULL", "cache_size = -2000"] {
                    if is_file {
                        sqlx::query(&format!("PRAGMA {pragma}")).execute(&mut *connection).await?;
                    }
                }
                Ok(())
            })
        });
        // Do not use a connection again whose transaction could not be rolled back: SQLite itself rolls back when a disk
        // is full, the ROLLBACK of sqlx then fails, and sqlx makes each later transaction a part of one that nobody
        // commits.
        let pool = pool.after_release(|connection, _| {
            Box::pin(async move {
                // sqlx sends a ROLLBACK before the next statement.
                connection.ping().await?;
                Ok(<Any as sqlx::Database>::TransactionManager::get_transaction_depth(connection) == 0)
            })
        });
        let pool = pool.connect_with(options).await.map_err(|e| attempted().because(e))?;
        let identity = migrations::run(&pool).await.map_err(|e| attempted().because(e))?;
        let lists = Kind::ALL.into_iter().chain([Kind::Starting]).map(|kind| (kind, tokio::sync::Mutex::default()));
        Ok(Self { pool, writer: is_file.then(Arc::default), lists: lists.collect(), identity })
    }

    /// Returns the current version of a table.
    pub async fn version(&self, kind: Kind) -> Result<i64> {
        let row = sqlx::query("SELECT version FROM kinds WHERE kind = $1").bind(kind.name());
        row.fetch_one(&self.pool).await?.try_get(0)
    }

    /// Returns all records of a table.
    pub async fn list(&self, kind: Kind) -> Result<List> {
        let mut version = self.version(kind).await?;
        let mut kept = self.lists[&kind].lock().await;
        if kept.as_ref().is_none_or(|list| list.version != version) {
            // While this request waited, another one may have read the list anew.
            version = self.version(kind).await?;
        }
        if let Some(list) = kept.as_ref().filter(|list| list.version == version) {
            return Ok(list.clone());
        }
        let (mut whole, mut places) = (String::from("["), Vec::new());
        let rows = sqlx::query("SELECT body FROM records WHERE kind = $1 ORDER BY place").bind(kind.name());
        let mut rows = rows.fetch(&self.pool);
        while let Some(row) = rows.try_next().await? {
            if !places.is_empty() {
                whole.push(',');
            }
            let begin = whole.len();
            whole.push_str(row.try_get(0)?);
            places.push(begin..whole.len());
        }
        whole.push_str("]\n");
        let list = List { version, whole: whole.into(), places: Arc::new(places) };
        *kept = Some(list.clone());
        Ok(list)
    }

    /// Returns a record as JSON.
    pub async fn text(&self, kind: Kind, id: &str) -> Result<Option<String>> {
        let row = sqlx::query("SELECT body FROM records WHERE kind = $1 AND id = $2").bind(kind.name()).bind(id);
        row.fetch_optional(&self.pool).await?.map(|row| row.try_get(0)).transpose()
    }

    /// Returns a record.
    pub async fn record<R: Record>(&self, id: &str) -> Result<Option<R>> {
        self.text(R::KIND, id).await?.map(|text| parsed(&text)).transpose()
    }

    /// Returns all records of a table, parsed.
    pub async fn records<R: Record>(&self) -> Result<Vec<R>> {
        self.list(R::KIND).await?.records().map(parsed).collect()
    }

    /// Returns the IDs of a table, in order of creation.
    pub async fn ids(&self, kind: Kind) -> Result<Vec<String>> {
        let rows = sqlx::query("SELECT id FROM records WHERE kind = $1 ORDER BY place").bind(kind.name());
        rows.fetch_all(&self.pool).await?.iter().map(|row| row.try_get(0)).collect()
    }

    /// Returns all records of the table `kind`. For tables without a record type of their own: [`Kind::Starting`] holds
    /// jobs.
    pub async fn all_in<R: Record>(&self, kind: Kind) -> Result<Vec<R>> {
        self.list(kind).await?.records().map(parsed).collect()
    }

    /// Random name of this database, used in ETags.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Returns whether other replicas may use this database.
    pub fn is_shared(&self) -> bool {
        self.writer.is_none()
    }

    /// Ends every claim and makes every planned removal due, if only this process uses the database. Called at the
    /// start, when no request can be working on the objects.
    pub async fn free_removals(&self) -> Result<()> {
        if !self.is_shared() {
            for statement in ["UPDATE removals SET due = 0", "DELETE FROM claims"] {
                sqlx::query(statement).execute(&self.pool).await?;
            }
        }
        Ok(())
    }

    /// Returns whether the removal of an object is planned.
    pub async fn is_planned(&self, at: &Location) -> Result<bool> {
        let select = sqlx::query("SELECT due FROM removals WHERE bucket = $1 AND object = $2");
        let select = select.bind(at.bucket.as_str()).bind(at.key.as_str());
        Ok(select.fetch_optional(&self.pool).await?.is_some())
    }

    /// Returns the IDs and the links' paths of all records of a table that have a link.
    pub async fn links(&self, kind: Kind) -> Result<Vec<(String, String)>> {
        let rows = sqlx::query("SELECT id, link FROM records WHERE kind = $1 AND link <> ''").bind(kind.name());
        rows.fetch_all(&self.pool).await?.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
    }

    /// Begins a change of the tables `kinds`. It is rolled back unless it is committed.
    pub async fn change(&self, kinds: &[Kind]) -> Result<Change> {
        let writer = match &self.writer {
            Some(writer) => Some(writer.clone().lock_owned().await),
            None => None,
        };
        let mut change = Change { transaction: self.pool.begin().await?, _writer: writer };
        let mut kinds = kinds.to_vec();
        // Lock tables in the same order in all changes, so that two changes never wait for each other.
        kinds.sort_unstable();
        for kind in kinds {
            let raise = sqlx::query("UPDATE kinds SET version = version + 1 WHERE kind = $1").bind(kind.name());
            raise.execute(&mut *change.transaction).await?;
        }
        Ok(change)
    }

    /// Returns objects whose removal was due at `now` (seconds since 1970), and that nobody has claimed.
    pub async fn removals(&self, now: i64) -> Result<Vec<Location>> {
        let statement = "SELECT bucket, object FROM removals WHERE due <= $1 AND NOT EXISTS \
            (SELECT 1 FROM claims WHERE name = 's3://' || bucket || '/' || object AND claims.due > $2) \
            ORDER BY bucket, object LIMIT 1000";
        let rows = sqlx::query(statement).bind(now).bind(now).fetch_all(&self.pool).await?;
        rows.iter().map(|row| Ok(Location { bucket: row.try_get(0)?, key: row.try_get(1)? })).collect()
    }

    /// Closes all connections, after the changes that have begun.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// A change in progress (a transaction).
pub struct Change {
    transaction: Transaction<'static, Any>,
    _writer: Option<OwnedMutexGuard<()>>,
}

impl Change {
    /// Returns a record.
    pub async fn record<R: Record>(&mut self, id: &str) -> Result<Option<R>> {
        let row = sqlx::query("SELECT body FROM records WHERE kind = $1 AND id = $2").bind(R::KIND.name()).bind(id);
        let row = row.fetch_optional(&mut *self.transaction).await?;
        row.map(|row| parsed(row.try_get(0)?)).transpose()
    }

    /// Returns all records of a table.
    pub async fn records<R: Record>(&mut self) -> Result<Vec<R>> {
        let rows = sqlx::query("SELECT body FROM records WHERE kind = $1 ORDER BY place").bind(R::KIND.name());
        let rows = rows.fetch_all(&mut *self.transaction).await?;
        rows.iter().map(|row| parsed(row.try_get(0)?)).collect()
    }

    /// Adds a record at the end of its table, and first removes a record with the same ID.
    pub async fn insert<R: Record>(&mut self, record: &R) -> Result<()> {
        self.insert_into(R::KIND, record).await
    }

    /// Adds a record at the end of the table `kind`, and first removes a record with the same ID.
    pub async fn insert_into<R: Record>(&mut self, kind: Kind, record: &R) -> Result<()> {
        self.remove(kind, record.id()).await?;
        let statement = "INSERT INTO records (kind, id, place, link, body) \
            SELECT $1, $2, COALESCE(MAX(place), 0) + 1, $3, $4 FROM records WHERE kind = $5";
        let insert = sqlx::query(statement).bind(kind.name()).bind(record.id());
        let insert = insert.bind(record.link().map_or("", |link| &link.path)).bind(text(record)).bind(kind.name());
        insert.execute(&mut *self.transaction).await.map(drop)
    }

    /// Inserts records into an empty table. Each statement inserts many, since an import has thousands.
    pub async fn fill<R: Record>(&mut self, records: &[R]) -> Result<()> {
        let mut place = 0_i64;
        for group in records.chunks(AT_ONCE) {
            let row = |row: usize| format!("({})", [1, 2, 3, 4, 5].map(|at| format!("${}", 5 * row + at)).join(", "));
            let rows: Vec<_> = (0..group.len()).map(row).collect();
            let statement = format!("INSERT INTO records (kind, id, place, link, body) VALUES {}", rows.join(", "));
            let mut insert = sqlx::query(&statement);
            for record in group {
                place += 1;
                let link = record.link().map_or("", |link| &link.path);
                insert = insert.bind(R::KIND.name()).bind(record.id()).bind(place).bind(link).bind(text(record));
            }
            insert.execute(&mut *self.transaction).await?;
        }
        Ok(())
    }

    /// Replaces the record that has the same ID, and keeps its position in the table.
    pub async fn update<R: Record>(&mut self, record: &R) -> Result<()> {
        let update = sqlx::query("UPDATE records SET link = $1, body = $2 WHERE kind = $3 AND id = $4");
        let update = update.bind(record.link().map_or("", |link| &link.path)).bind(text(record));
        update.bind(R::KIND.name()).bind(record.id()).execute(&mut *self.transaction).await.map(drop)
    }

    /// Removes a record; returns whether it existed.
    pub async fn remove(&mut self, kind: Kind, id: &str) -> Result<bool> {
        let delete = sqlx::query("DELETE FROM records WHERE kind = $1 AND id = $2").bind(kind.name()).bind(id);
        Ok(delete.execute(&mut *self.transaction).await?.rows_affected() > 0)
    }

    /// Removes all records of a table.
    pub async fn clear(&mut self, kind: Kind) -> Result<()> {
        let delete = sqlx::query("DELETE FROM records WHERE kind = $1").bind(kind.name());
        delete.execute(&mut *self.transaction).await.map(drop)
    }

    /// Returns whether a record of the table, other than the one with the ID `except`, links to `path`.
    pub async fn is_linked(&mut self, kind: Kind, path: &str, except: &str) -> Result<bool> {
        let select = sqlx::query("SELECT id FROM records WHERE kind = $1 AND link = $2 AND id <> $3 LIMIT 1");
        let select = select.bind(kind.name()).bind(path).bind(except);
        Ok(select.fetch_optional(&mut *self.transaction).await?.is_some())
    }

    /// Plans to remove objects at `due` (seconds since 1970).
    pub async fn plan_removal(&mut self, objects: &[Location], due: i64) -> Result<()> {
        for object in objects {
            let statement = "INSERT INTO removals (bucket, object, due) VALUES ($1, $2, $3) \
                ON CONFLICT (bucket, object) DO UPDATE SET due = excluded.due";
            let insert = sqlx::query(statement).bind(object.bucket.as_str()).bind(object.key.as_str()).bind(due);
            insert.execute(&mut *self.transaction).await?;
        }
        Ok(())
    }

    /// Claims the record or object `name` for `owner` until `due`. Returns false if another owner's claim is valid.
    pub async fn claim(&mut self, name: &str, owner: &str, now: i64, due: i64) -> Result<bool> {
        let statement = "INSERT INTO claims (name, owner, due) VALUES ($1, $2, $3) ON CONFLICT (name) DO UPDATE \
            SET owner = excluded.owner, due = excluded.due WHERE claims.due <= $4";
        let insert = sqlx::query(statement).bind(name).bind(owner).bind(due).bind(now);
        Ok(insert.execute(&mut *self.transaction).await?.rows_affected() > 0)
    }

    /// Renews all claims of `owner`, and returns how many there are.
    pub async fn renew_claims(&mut self, owner: &str, due: i64) -> Result<u64> {
        let update = sqlx::query("UPDATE claims SET due = $1 WHERE owner = $2").bind(due).bind(owner);
        Ok(update.execute(&mut *self.transaction).await?.rows_affected())
    }

    /// Ends all claims of `owner`.
    pub async fn end_claims(&mut self, owner: &str) -> Result<()> {
        sqlx::query("DELETE FROM claims WHERE owner = $1").bind(owner).execute(&mut *self.transaction).await.map(drop)
    }

    /// Takes objects off the list of planned removals, because they are to stay or have been removed.
    pub async fn forget_removal(&mut self, objects: &[Location]) -> Result<()> {
        for object in objects {
            let delete = sqlx::query("DELETE FROM removals WHERE bucket = $1 AND object = $2");
            let delete = delete.bind(object.bucket.as_str()).bind(object.key.as_str());
            delete.execute(&mut *self.transaction).await?;
        }
        Ok(())
    }

    /// Returns the state that an imported file had when it was last imported or exported.
    pub async fn imported(&mut self, file: &str) -> Result<Option<String>> {
        let row = sqlx::query("SELECT state FROM imports WHERE file = $1").bind(file);
        row.fetch_optional(&mut *self.transaction).await?.map(|row| row.try_get(0)).transpose()
    }

    /// Records the state of an imported or exported file.
    pub async fn set_imported(&mut self, file: &str, state: &str) -> Result<()> {
        let statement = "INSERT INTO imports (file, state) VALUES ($1, $2) \
            ON CONFLICT (file) DO UPDATE SET state = excluded.state";
        sqlx::query(statement).bind(file).bind(state).execute(&mut *self.transaction).await.map(drop)
    }

    /// Keeps a text that is not (or no longer) a record, together with the reason, for people who look for it.
    pub async fn set_aside(&mut self, kind: Kind, body: &str, reason: &str) -> Result<()> {
        let insert = sqlx::query("INSERT INTO set_aside (kind, body, reason, moved) VALUES ($1, $2, $3, $4)");
        let insert = insert.bind(kind.name()).bind(body).bind(reason).bind(crate::records::now());
        insert.execute(&mut *self.transaction).await.map(drop)
    }

    /// Commits the change.
    pub async fn commit(self) -> Result<()> {
        self.transaction.commit().await
    }
}

fn text(record: &impl Record) -> String {
    wire::compact(record)
}

fn parsed<R: Record>(text: &str) -> Result<R> {
    serde_json::from_str(text).map_err(|e| sqlx::Error::Decode(Box::new(e)))
}

/// Percent-encodes a path for a URL.
fn encoded(path: &Path) -> String {
    use std::fmt::Write;
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes().iter().fold(String::new(), |mut url, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => url.push(char::from(*byte)),
            _ => write!(url, "%{byte:02X}").expect("a string takes all"),
        }
        url
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::PublicKey;

    fn key(number: usize) -> PublicKey {
        let text = serde_json::json!({
            "id": format!("00000000-0000-4000-8000-{number:012}"),
            "name": "k".repeat(3000),
            "public_key": "ssh-ed25519 A",
            "created": "2026-01-01T00:00:00",
        });
        serde_json::from_value(text).unwrap()
    }

    async fn insert(database: &Database, key: &PublicKey) -> Result<()> {
        let mut change = database.change(&[Kind::PublicKeys]).await?;
        change.insert(key).await?;
        change.commit().await
    }

    #[tokio::test]
    async fn changes_after_a_full_disk_are_stored_or_fail() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("records");
        let database = Database::open(Place::File(&file)).await.unwrap();
        // With this limit SQLite fails as it does on a full disk. It is one of the connection.
        let pages: i64 = sqlx::query("PRAGMA page_count").fetch_one(&database.pool).await.unwrap().get(0);
        let limit = |pages: i64| format!("PRAGMA max_page_count = {pages}");
        sqlx::query(&limit(pages + 2)).execute(&database.pool).await.unwrap();
        let mut stored = Vec::new();
        let mut failed = 0;
        for number in 0..20 {
            if number == 10 {
                sqlx::query(&limit(1 << 20)).execute(&database.pool).await.unwrap();
            }
            match insert(&database, &key(number)).await {
                Ok(()) => stored.push(key(number).id),
                Err(_) => failed += 1,
            }
        }
        assert!(failed > 0 && stored.len() >= 10, "{failed} failed");
        drop(database);
        let database = Database::open(Place::File(&file)).await.unwrap();
        assert_eq!(database.ids(Kind::PublicKeys).await.unwrap(), stored);
    }
}
