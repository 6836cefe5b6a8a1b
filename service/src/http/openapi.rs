//! The OpenAPI document, generated from the tables of fields and routes.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use crate::records::STATUSES;
use crate::records::rules::{self, Field, Rule};

/// A table of records, as the document describes it.
struct Table {
    path: &'static str,
    schema: &'static str,
    new: &'static [Field],
    patch: Option<&'static [Field]>,
    /// Query parameters of the request that deletes all records.
    filters: &'static [&'static str],
}

const TABLES: &[Table] = &[
    Table { path: "public-keys", schema: "PublicKey", new: rules::NEW_PUBLIC_KEY, patch: None, filters: &[] },
    Table {
        path: "recipes",
        schema: "Recipe",
        new: rules::NEW_RECIPE,
        patch: Some(rules::PATCH_RECIPE),
        filters: &["cascade"],
    },
    Table {
        path: "images",
        schema: "Image",
        new: rules::NEW_IMAGE,
        patch: Some(rules::PATCH_IMAGE),
        filters: &["cascade"],
    },
    Table {
        path: "jobs",
        schema: "Job",
        new: rules::NEW_JOB,
        patch: Some(rules::PATCH_JOB),
        filters: &["status", "job_type", "age"],
    },
    Table { path: "remote-build-nodes", schema: "RemoteBuildNode", new: rules::NEW_NODE, patch: None, filters: &[] },
];

/// Pattern of an age: numbers, each followed by a unit.
const AGE: &str = "^([0-9]{1,4}(w|weeks?|d|days?|h|hours?|m|min|minutes?))+$";

/// Pattern of a link's path: a URL with a bucket and a key.
const PATH: &str = r"^[^:\x00]*://[^/\x00]+/[^#\x00][^\x00]*$";

/// Returns the document as YAML.
pub fn document() -> String {
    format!("# Made from the code by `ims openapi`; see service/src/http/openapi.rs.\n{}", yaml(&value()))
}

/// Converts JSON to YAML.
pub fn yaml(value: &Value) -> String {
    let mut text = String::new();
    write(&mut text, value, 0);
    text
}

fn value() -> Value {
    let mut paths = Map::new();
    let mut schemas = Map::new();
    for table in TABLES {
        let record = record(table);
        for prefix in ["", "/v2", "/v3"] {
            if table.path == "remote-build-nodes" && prefix != "/v3" {
                continue;
            }
            let all = format!("{prefix}/{}", table.path);
            let key = if table.path == "remote-build-nodes" { "xname" } else { "id" };
            paths.insert(all.clone(), all_operations(table, &all));
            paths.insert(format!("{all}/{{{key}}}"), one_operations(table, &all, key));
        }
        schemas.insert(table.schema.into(), record.clone());
        schemas.insert(format!("New{}", table.schema), object(table.new));
        if let Some(patch) = table.patch {
            schemas.insert(format!("{}Patch", table.schema), object(patch));
        }
        if ["public-keys", "recipes", "images"].contains(&table.path) {
            let mut deleted = record;
            deleted["properties"]["deleted"] = time();
            schemas.insert(format!("Deleted{}", table.schema), deleted);
            let all = format!("/v3/deleted/{}", table.path);
            paths.insert(all.clone(), deleted_operations(table, &all, true));
            paths.insert(format!("{all}/{{id}}"), deleted_operations(table, &all, false));
        }
    }
    schemas.insert("Undelete".into(), object(rules::UNDELETE));
    schemas.insert(
        "Problem".into(),
        json!({
            "type": "object", "required": ["status", "title"],
            "properties": {
                "status": {"type": "integer"}, "title": {"type": "string"}, "detail": {"type": "string"}, "errors": {},
            },
        }),
    );
    schemas.insert("NodeStatus".into(), json!({
        "type": "object",
        "properties": {
            "xname": {"type": "string"}, "nodeArch": {"type": "string"}, "podmanStatus": {"type": "string"},
            "sshStatus": {"type": "string"}, "ableToRunJobs": {"type": "boolean"}, "numCurrentJobs": {"type": "integer"},
        },
    }));
    let status = reference("NodeStatus");
    let statuses = json!({ "type": "array", "items": status });
    paths.insert("/v3/remote-build-nodes/status".into(), get("node_statuses", &statuses, &[]));
    let xname = [path_parameter("xname")];
    paths.insert("/v3/remote-build-nodes/status/{xname}".into(), with_404(get("node_status", &status, &xname)));
    paths.insert("/v3/jobs/{id}/logs".into(), logs());
    for (path, name) in [("/healthz/live", "live"), ("/healthz/ready", "ready"), ("/version", "version")] {
        paths.insert(path.into(), get(name, &json!({ "type": "object" }), &[]));
    }
    json!({
        "openapi": "3.0.3",
        "info": {
            "title": "Image Management Service",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Records of images, recipes, public keys and jobs.",
        },
        // The empty object means that no token is needed, as on the socket and behind a gateway.
        "security": [{}, { "token": [] }],
        "paths": paths,
        "components": {
            "responses": { "Problem": problem_response() },
            "schemas": schemas,
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
        },
    })
}

fn all_operations(table: &Table, path: &str) -> Value {
    let list = json!({ "type": "array", "items": reference(table.schema) });
    let mut page = [query_parameter("limit", "integer"), query_parameter("after", "string")];
    page[0]["schema"]["minimum"] = json!(1);
    let filters: Vec<_> = table.filters.iter().map(|name| filter(name)).collect();
    let mut operations = get(&operation(path, "list"), &list, &page);
    operations["get"]["responses"]["304"] = json!({ "description": "The list is as the ETag says." });
    operations["post"] = json!({
        "operationId": operation(path, "create"),
        "requestBody": body(&format!("New{}", table.schema)),
        "responses": responses("201", Some(&reference(table.schema)), &[400, 415, 422, 500, 503]),
    });
    operations["delete"] = json!({
        "operationId": operation(path, "delete_all"),
        "parameters": filters,
        "responses": responses("204", None, &[400, 500, 503]),
    });
    operations
}

fn one_operations(table: &Table, path: &str, key: &str) -> Value {
    let parameter = path_parameter(key);
    let mut operations =
        with_404(get(&operation(path, "describe"), &reference(table.schema), std::slice::from_ref(&parameter)));
    if table.patch.is_some() {
        operations["patch"] = json!({
            "operationId": operation(path, "update"),
            "parameters": [parameter],
            "requestBody": body(&format!("{}Patch", table.schema)),
            "responses": responses("200", Some(&reference(table.schema)), &[400, 404, 409, 415, 422, 500, 503]),
        });
    }
    let cascade = table.filters.iter().filter(|name| **name == "cascade").map(|name| query_parameter(name, "string"));
    let parameters: Vec<_> = [parameter].into_iter().chain(cascade).collect();
    operations["delete"] = json!({
        "operationId": operation(path, "delete"),
        "parameters": parameters,
        "responses": responses("204", None, &[404, 409, 500, 503]),
    });
    operations
}

fn deleted_operations(table: &Table, path: &str, all: bool) -> Value {
    let schema = reference(&format!("Deleted{}", table.schema));
    let parameters = if all { vec![] } else { vec![path_parameter("id")] };
    let suffix = if all { "_all" } else { "" };
    let mut operations = if all {
        get(&operation(path, "list"), &json!({ "type": "array", "items": schema }), &[])
    } else {
        with_404(get(&operation(path, "describe"), &schema, &parameters))
    };
    operations["patch"] = json!({
        "operationId": operation(path, &format!("undelete{suffix}")),
        "parameters": parameters,
        "requestBody": body("Undelete"),
        "responses": responses("204", None, &[400, 404, 409, 415, 422, 500, 503]),
    });
    operations["delete"] = json!({
        "operationId": operation(path, &format!("delete{suffix}")),
        "parameters": parameters,
        "responses": responses("204", None, &[404, 409, 500, 503]),
    });
    operations
}

fn operation(path: &str, verb: &str) -> String {
    format!("{verb}{}", path.replace(['/', '-'], "_"))
}

fn get(name: &str, schema: &Value, parameters: &[Value]) -> Value {
    json!({
        "get": {
            "operationId": name,
            "parameters": parameters,
            "responses": responses("200", Some(schema), &[400, 500, 503]),
        },
    })
}

fn logs() -> Value {
    let parameters = [path_parameter("id"), query_parameter("follow", "boolean")];
    let mut operations = with_404(get("logs_v3_jobs", &json!({ "type": "string" }), &parameters));
    operations["get"]["responses"]["200"] = json!({
        "description": "What the programs of the job have written; with `follow`, until the job ends.",
        "content": { "text/plain": { "schema": { "type": "string" } } },
    });
    operations
}

fn with_404(mut operations: Value) -> Value {
    operations["get"]["responses"]["404"] = problem();
    operations
}

fn responses(status: &str, schema: Option<&Value>, problems: &[u16]) -> Value {
    let mut responses = Map::new();
    let mut good = json!({ "description": "Done." });
    if let Some(schema) = schema {
        good["content"] = json!({ "application/json": { "schema": schema } });
    }
    responses.insert(status.into(), good);
    responses.extend(problems.iter().chain(&[401]).map(|status| (status.to_string(), problem())));
    Value::Object(responses)
}

/// Reference to the answer that every failed request gets.
fn problem() -> Value {
    json!({ "$ref": "#/components/responses/Problem" })
}

fn problem_response() -> Value {
    let message = json!({ "type": "object", "properties": { "message": { "type": "string" } } });
    json!({
        "description": "A problem (RFC 7807).",
        "content": {
            "application/problem+json": { "schema": reference("Problem") },
            "application/json": { "schema": message },
        },
    })
}

fn body(schema: &str) -> Value {
    json!({ "required": true, "content": { "application/json": { "schema": reference(schema) } } })
}

fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

fn path_parameter(name: &str) -> Value {
    json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } })
}

fn query_parameter(name: &str, kind: &str) -> Value {
    json!({ "name": name, "in": "query", "required": false, "schema": { "type": kind } })
}

/// A query parameter of the request that deletes all records.
fn filter(name: &str) -> Value {
    let mut parameter = query_parameter(name, "string");
    match name {
        "status" => parameter["schema"] = json!({ "type": "array", "items": { "type": "string", "enum": STATUSES } }),
        "age" => parameter["schema"]["pattern"] = json!(AGE),
        _ => {}
    }
    parameter
}

fn time() -> Value {
    json!({ "type": "string", "description": "Local time without a zone." })
}

/// Schema of a table's records: the fields of a POST, and those that the service adds.
fn record(table: &Table) -> Value {
    let mut schema = object(table.new);
    schema["additionalProperties"] = json!(true);
    let fields = schema["properties"].as_object_mut().expect("properties");
    if table.path != "remote-build-nodes" {
        fields.insert("id".into(), json!({ "type": "string", "format": "uuid" }));
        fields.insert("created".into(), time());
    }
    if table.path == "images" {
        fields.insert("metadata".into(), json!({ "type": "object", "additionalProperties": { "type": "string" } }));
    }
    if table.path == "jobs" {
        fields.insert("status".into(), json!({ "type": "string", "enum": STATUSES }));
        fields.insert("arch".into(), json!({ "type": "string", "enum": ["x86_64", "aarch64"] }));
        fields.insert("remote_build_node".into(), json!({ "type": "string" }));
        for name in ["job", "service", "configmap", "namespace", "pvc", "secret"] {
            fields.insert(format!("kubernetes_{name}"), json!({ "type": "string", "nullable": true }));
        }
        let image = json!({ "type": "string", "format": "uuid", "nullable": true });
        fields.insert("resultant_image_id".into(), image);
        fields["ssh_containers"]["items"]["additionalProperties"] = json!(true);
    }
    schema
}

fn object(fields: &[Field]) -> Value {
    let properties: Map<_, _> = fields.iter().map(|field| (field.name.to_owned(), schema(field))).collect();
    let required: Vec<_> = fields.iter().filter(|field| field.required).map(|field| field.name).collect();
    let mut object = json!({ "type": "object", "properties": properties, "additionalProperties": false });
    if !required.is_empty() {
        object["required"] = json!(required);
    }
    object
}

fn schema(field: &Field) -> Value {
    let mut schema = match field.rule {
        Rule::Text { .. } if field.name == "path" => json!({ "type": "string", "pattern": PATH }),
        Rule::Text { empty: true } => json!({ "type": "string" }),
        Rule::Text { empty: false } => json!({ "type": "string", "minLength": 1 }),
        Rule::Flag => json!({ "type": "boolean" }),
        Rule::Count => json!({ "type": "integer", "minimum": 1, "maximum": u32::MAX }),
        Rule::Uuid => json!({ "type": "string", "format": "uuid" }),
        Rule::Word(words) => json!({ "type": "string", "enum": words }),
        Rule::Object(fields) => object(fields),
        Rule::List(fields) => json!({ "type": "array", "items": object(fields) }),
        Rule::Texts => json!({ "type": "object", "additionalProperties": { "type": "string" } }),
        Rule::TextsOrPair => json!({
            "type": "object",
            "additionalProperties": { "type": "string" },
            "description": "The mapping itself, or one pair of it as key and value.",
        }),
    };
    if field.null {
        schema["nullable"] = json!(true);
    }
    schema
}

/// Writes YAML: objects and lists by indentation, everything else as JSON, which is valid YAML.
fn write(text: &mut String, value: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                let key = if name.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'_') {
                    name.clone()
                } else {
                    Value::from(name.as_str()).to_string()
                };
                let _ = write!(text, "{indent}{key}:");
                below(text, value, depth);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                let _ = write!(text, "{indent}-");
                below(text, item, depth);
            }
        }
        value => {
            let _ = writeln!(text, "{indent}{value}");
        }
    }
}

fn below(text: &mut String, value: &Value, depth: usize) {
    let is_nested = match value {
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if is_nested {
        text.push('\n');
        write(text, value, depth + 1);
    } else {
        let _ = writeln!(text, " {value}");
    }
}
