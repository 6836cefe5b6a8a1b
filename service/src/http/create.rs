//! POST and PATCH of keys, recipes, images and nodes.

use std::collections::BTreeSet;

use axum::body::Body;
use axum::http::{Response, StatusCode};
use ims_sshd::sshd::public_keys;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::problem::Problem;
use super::{Request, Service, created, json as answer};
use crate::records::rules::{self, Field};
use crate::records::{Image, Kind, Link, Node, PublicKey, Recipe, Record, new_id, now, wire};

impl Service {
    /// POST of a public key. Like upstream, takes any text, but no private key: every client could read it.
    pub async fn create_public_key(&self, request: &Request) -> Result<Response<Body>, Problem> {
        let key = new::<PublicKey>(request, rules::NEW_PUBLIC_KEY)?;
        if public_keys::is_private(&key.public_key) {
            return Err(Problem::unprocessable(format!("cannot accept public_key: {}", public_keys::IS_PRIVATE)));
        }
        self.insert(&key).await
    }

    /// POST of a recipe.
    pub async fn create_recipe(&self, request: &Request) -> Result<Response<Body>, Problem> {
        let recipe = new::<Recipe>(request, rules::NEW_RECIPE)?;
        let Some(link) = &recipe.link else { return self.insert(&recipe).await };
        let work = async {
            self.object(link).await?;
            self.insert(&recipe).await
        };
        self.linking(link, work).await
    }

    /// POST of an image.
    pub async fn create_image(&self, request: &Request) -> Result<Response<Body>, Problem> {
        let image = new::<Image>(request, rules::NEW_IMAGE)?;
        let Some(link) = &image.link else { return self.insert(&image).await };
        let work = async {
            self.check_image(link).await?;
            self.insert(&image).await
        };
        self.linking(link, work).await
    }

    /// POST of a remote build node; an existing node stays as it is.
    pub async fn create_node(&self, request: &Request) -> Result<Response<Body>, Problem> {
        let node: Node = record(checked(request, rules::NEW_NODE)?);
        if node.xname.contains('\0') {
            return Err(Problem::unprocessable("the xname holds NUL, which no host name does"));
        }
        let mut change = self.database.change(&[Kind::Nodes]).await?;
        if change.record::<Node>(&node.xname).await?.is_none() {
            change.insert(&node).await?;
        }
        change.commit().await?;
        Ok(created(&node))
    }

    /// PATCH of a recipe.
    pub async fn patch_recipe(&self, id: &str, request: &Request) -> Result<Response<Body>, Problem> {
        let found = self.found::<Recipe>(id).await?;
        let patch = checked(request, rules::PATCH_RECIPE)?;
        let patched = self.patch::<Recipe>(id, &patch, |recipe, patch| {
            let mut fields = json!(recipe);
            fields.as_object_mut().expect("a record").extend(patch);
            *recipe = serde_json::from_value(fields).expect("checked fields");
        });
        let Some(link) = new_link(&found, &patch)? else { return patched.await };
        let work = async {
            self.object(&link).await?;
            patched.await
        };
        self.linking(&link, work).await
    }

    /// PATCH of an image.
    pub async fn patch_image(&self, id: &str, request: &Request) -> Result<Response<Body>, Problem> {
        let found = self.found::<Image>(id).await?;
        let patch = checked(request, rules::PATCH_IMAGE)?;
        let patched = self.patch::<Image>(id, &patch, |image, mut patch| {
            if let Some(change) = patch.remove("metadata") {
                let text = |name: &str| change.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
                if text("operation") == "set" {
                    image.metadata.insert(text("key"), text("value"));
                } else {
                    image.metadata.remove(&text("key"));
                }
            }
            let mut fields = json!(image);
            fields.as_object_mut().expect("a record").extend(patch);
            *image = serde_json::from_value(fields).expect("checked fields");
        });
        let Some(link) = new_link(&found, &patch)? else { return patched.await };
        let work = async {
            self.check_image(&link).await?;
            patched.await
        };
        self.linking(&link, work).await
    }

    /// Runs `work`, which gives `link` to a record, while no other request can move or remove the link's object.
    async fn linking<T>(
        &self,
        link: &Link,
        work: impl Future<Output = Result<T, Problem>> + Send,
    ) -> Result<T, Problem> {
        let name = super::links::location(link)?.to_string();
        let claim = self.claim(BTreeSet::from([name])).await.map_err(|problem| match problem.status {
            StatusCode::CONFLICT => {
                let path = &link.path;
                let detail = format!("cannot use the link {path}: another request uses its object; try again later");
                Problem::unprocessable(detail)
            }
            _ => problem,
        })?;
        self.holding(&claim, work).await
    }

    /// Returns a record; fails with 404 if it does not exist.
    pub async fn found<R: Record>(&self, id: &str) -> Result<R, Problem> {
        self.database.record(id).await?.ok_or_else(|| Problem::not_found(R::KIND.noun()))
    }

    async fn insert<R: Record>(&self, record: &R) -> Result<Response<Body>, Problem> {
        let mut change = self.database.change(&[R::KIND]).await?;
        if let Some(link) = record.link() {
            taken(&mut change, R::KIND, link, record.id()).await?;
        }
        change.insert(record).await?;
        change.commit().await?;
        Ok(created(record))
    }

    /// Applies a checked patch to the record as it is now, since it may have changed after the check.
    async fn patch<R: Record>(
        &self,
        id: &str,
        patch: &Map<String, Value>,
        apply: impl FnOnce(&mut R, Map<String, Value>) + Send,
    ) -> Result<Response<Body>, Problem> {
        let mut change = self.database.change(&[R::KIND]).await?;
        let mut record = change.record::<R>(id).await?.ok_or_else(|| Problem::not_found(R::KIND.noun()))?;
        if let Some(link) = new_link(&record, patch)? {
            taken(&mut change, R::KIND, &link, id).await?;
        }
        apply(&mut record, patch.clone());
        change.update(&record).await?;
        change.commit().await?;
        Ok(answer(StatusCode::OK, wire::sorted(&record)))
    }
}

/// Fails if another record already has the link.
async fn taken(change: &mut crate::database::Change, kind: Kind, link: &Link, id: &str) -> Result<(), Problem> {
    if change.is_linked(kind, &link.path, id).await? {
        let detail = format!("cannot use the link {}: another {} has it", link.path, kind.noun());
        return Err(Problem::unprocessable(detail));
    }
    Ok(())
}

/// Returns the link that a patch gives to a record; `None` if the patch has no link, or the one that the record already
/// has.
fn new_link(record: &impl Record, patch: &Map<String, Value>) -> Result<Option<Link>, Problem> {
    let Some(link) = patch.get("link") else { return Ok(None) };
    let link: Link = serde_json::from_value(link.clone()).expect("a checked link");
    match record.link() {
        Some(own) if *own == link => Ok(None),
        Some(own) => Err(Problem::conflict(format!("cannot change the link: it is {} already", own.path))),
        None => Ok(Some(link)),
    }
}

/// Checks the fields of a request and returns them converted.
pub fn checked(request: &Request, fields: &[Field]) -> Result<Map<String, Value>, Problem> {
    rules::check(&request.json()?, fields).map_err(|errors| Problem::fields(&errors))
}

fn record<R: DeserializeOwned>(fields: Map<String, Value>) -> R {
    serde_json::from_value(Value::Object(fields)).expect("checked fields")
}

fn new<R: DeserializeOwned>(request: &Request, fields: &[Field]) -> Result<R, Problem> {
    let mut fields = checked(request, fields)?;
    fields.insert("id".into(), json!(new_id()));
    fields.insert("created".into(), json!(now()));
    Ok(record(fields))
}
