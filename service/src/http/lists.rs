//! Lists and single records, answered in the form in which the database stores them.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde_json::Value;

use super::problem::Problem;
use super::{Service, json};
use crate::records::{Kind, wire};

/// Fields by which a list can be filtered: those whose values are texts.
pub const FILTERS: &[&str] = &[
    "name",
    "arch",
    "recipe_type",
    "linux_distribution",
    "status",
    "job_type",
    "artifact_id",
    "resultant_image_id",
    "image_root_archive_name",
];

/// Query of a list. Unknown parameters are ignored; upstream ignores all parameters.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    limit: Option<usize>,
    after: Option<String>,
    filters: Vec<(String, String)>,
}

impl Service {
    /// GET of a table.
    pub async fn list(
        &self,
        kind: Kind,
        path: &str,
        query: &str,
        headers: &HeaderMap,
    ) -> Result<Response<Body>, Problem> {
        let wanted = wanted(query)?;
        let version = self.database.version(kind).await?;
        let etag = self.etag(kind, version);
        let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
        if known.is_some_and(|known| known.split(',').any(|tag| tag.trim().trim_start_matches("W/") == etag)) {
            let mut answer = Response::new(Body::empty());
            *answer.status_mut() = StatusCode::NOT_MODIFIED;
            answer.headers_mut().insert(header::ETAG, HeaderValue::from_str(&etag).expect("letters and digits"));
            return Ok(answer);
        }
        let list = self.database.list(kind).await?;
        let (body, next) = if wanted == Wanted::default() {
            (list.whole(), None)
        } else {
            let (text, next) = page(list.records(), &wanted)?;
            (text.into(), next)
        };
        let mut answer = json(StatusCode::OK, body);
        let etag = self.etag(kind, list.version);
        answer.headers_mut().insert(header::ETAG, HeaderValue::from_str(&etag).expect("letters and digits"));
        if let Some(after) = next {
            let link = format!("<{path}?{}>; rel=\"next\"", next_query(&wanted, &after));
            if let Ok(link) = HeaderValue::from_str(&link) {
                answer.headers_mut().insert(header::LINK, link);
            }
        }
        Ok(answer)
    }

    /// GET of a record.
    pub async fn one(&self, kind: Kind, id: &str) -> Result<Response<Body>, Problem> {
        let text = self.database.text(kind, id).await?.ok_or_else(|| Problem::not_found(kind.noun()))?;
        Ok(json(StatusCode::OK, text + "\n"))
    }

    fn etag(&self, kind: Kind, version: i64) -> String {
        format!("\"{}-{}-{version}\"", self.database.identity(), kind.name())
    }
}

fn wanted(query: &str) -> Result<Wanted, Problem> {
    let mut wanted = Wanted::default();
    for (name, value) in super::pairs(query) {
        match name.as_str() {
            "limit" => {
                let limit = value.parse().ok().filter(|limit| *limit > 0);
                let wrong = || Problem::bad_request(format!("the limit is '{value}': expected a number from 1 on"));
                wanted.limit = Some(limit.ok_or_else(wrong)?);
            }
            "after" => wanted.after = Some(value),
            name if FILTERS.contains(&name) => wanted.filters.push((name.to_owned(), value)),
            _ => {}
        }
    }
    Ok(wanted)
}

/// Returns the records of one page as JSON, and the ID after which the next page begins; `None` on the last page. Fails
/// with 400 if the record after which the page begins has been deleted, since its place in the list is not known then.
fn page<'a>(records: impl Iterator<Item = &'a str>, wanted: &Wanted) -> Result<(String, Option<String>), Problem> {
    let mut parsed = records.filter_map(|text| Some((text, serde_json::from_str::<Value>(text).ok()?)));
    let id = |record: &Value| {
        let id = record.get("id").or_else(|| record.get("xname")).and_then(Value::as_str);
        id.unwrap_or_default().to_owned()
    };
    if let Some(after) = &wanted.after
        && !parsed.any(|(_, record)| id(&record) == *after)
    {
        let detail = format!("no record has the id '{after}' any more: begin the list again, without 'after'");
        return Err(Problem::bad_request(detail));
    }
    let fitting = parsed.filter(|(_, record)| {
        // Ignore the filter for a table without the field, as unknown parameters are ignored.
        wanted.filters.iter().all(|(name, value)| record.get(name).is_none_or(|field| field.as_str() == Some(value)))
    });
    let mut rest = fitting.peekable();
    let mut page = Vec::new();
    let mut last = None;
    while let Some((text, record)) = rest.next_if(|_| wanted.limit.is_none_or(|limit| page.len() < limit)) {
        page.push(text);
        last = Some(id(&record));
    }
    let next = rest.peek().and(last);
    Ok((wire::list(page), next))
}

fn next_query(wanted: &Wanted, after: &str) -> String {
    let mut url = reqwest::Url::parse("http://x/").expect("a URL");
    let mut query = url.query_pairs_mut();
    query.extend_pairs(&wanted.filters);
    if let Some(limit) = wanted.limit {
        query.append_pair("limit", &limit.to_string());
    }
    query.append_pair("after", after);
    drop(query);
    url.query().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other_without_a_gap() {
        let records: Vec<_> = (0..5).map(|id| format!("{{\"id\":\"{id}\",\"arch\":\"{}\"}}", id % 2)).collect();
        let ask = |query: &str| page(records.iter().map(String::as_str), &wanted(query).unwrap());
        let get = |query: &str| ask(query).unwrap();
        let ids = |text: &str| {
            let list: Vec<Value> = serde_json::from_str(text).unwrap();
            list.iter().map(|record| record["id"].as_str().unwrap().to_owned()).collect::<String>()
        };
        let (text, next) = get("limit=2");
        assert_eq!((ids(&text).as_str(), next.as_deref()), ("01", Some("1")));
        let (text, next) = get("limit=3&after=1");
        assert_eq!((ids(&text).as_str(), next), ("234", None));
        let (text, next) = get("arch=1&limit=1&unknown=x");
        assert_eq!((ids(&text).as_str(), next.as_deref()), ("1", Some("1")));
        assert_eq!(
            get("arch=1&name=x").0,
            "[{\"arch\":\"1\",\"id\":\"1\"}]\n"
                .replace("\"arch\":\"1\",\"id\":\"1\"", "\"id\":\"1\",\"arch\":\"1\"")
                .replace("}]", "},{\"id\":\"3\",\"arch\":\"1\"}]")
        );
        assert_eq!(ask("limit=2&after=9").unwrap_err().status, StatusCode::BAD_REQUEST, "deleted between two pages");
        // The last record of a page need not fit any more.
        assert_eq!(ids(&get("arch=1&after=2").0), "3");
        assert!(wanted("limit=0").is_err() && wanted("limit=x").is_err());
        assert_eq!(next_query(&wanted("name=a b&limit=2").unwrap(), "x"), "name=a+b&limit=2&after=x");
    }
}
