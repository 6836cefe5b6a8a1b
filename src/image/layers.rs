//! Saved container images (`docker save`, `podman save`, an OCI layout): layers that are tar archives, one above the
//! other.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use serde_json::Value;

use crate::error::{Attempt, Error, Result};
use crate::printable::listed;
use crate::sys::attributes::Node;
use crate::sys::tree::Tree;
use crate::sys::walk::Descent;
use crate::transfer::checksum::sha256_of;

/// Name of an opaque whiteout, which makes its directory hide all entries of the layers below (OCI image layer
/// specification, "Whiteouts").
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Prefix of a whiteout, which hides the entry whose name follows the prefix.
const WHITEOUT: &[u8] = b".wh.";
/// Prefix of files that belong to the storage driver aufs.
const OF_DRIVER: &[u8] = b".wh..wh.";

/// Maximum size of an image's description, in bytes.
const LARGEST: u64 = 4 << 20;

/// Maximum number of layers of an image; no container engine makes more.
const MOST_LAYERS: usize = 1000;

/// Maximum nesting of indexes; deeper nesting occurs only in images that were built to waste time.
const DEEPEST: usize = 4;

/// Resolution of file times, with a margin: the kernel takes them from its last clock tick.
const CLOCK_TICK: Duration = Duration::from_millis(50);

/// One layer of a saved image.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    /// Path below the directory of the saved image, with links resolved.
    pub(crate) path: PathBuf,
    /// SHA-256 of the file in hexadecimal digits, if the image refers to the file by its digest.
    pub(crate) digest: Option<String>,
    /// SHA-256 of the uncompressed tar archive, if the image's configuration has it.
    pub(crate) diff_id: Option<String>,
}

/// Reference to content in a description: the SHA-256 in hexadecimal digits, if given; the path; and the size in bytes,
/// if given.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Named {
    digest: Option<String>,
    path: String,
    size: Option<u64>,
}

/// Media types of indexes (OCI image specification, "Media Types"; Docker's "Image Manifest V 2, Schema 2").
const INDEXES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
/// Media types of manifests, from the same specifications.
const MANIFESTS: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];

/// Layers of the image that is saved in the directory `saved`, lowest first; `None` if it is not a saved image.
/// Verifies every description that is referred to by its digest.
pub(crate) fn layers(saved: &Tree) -> Result<Option<Vec<Layer>>> {
    let attempted = || "read the description of the saved image";
    let strange =
        || Error::new(attempted()).because("it does not name its layers as docker and OCI do, by SHA-256 and size");
    let (config, layers) = match description(saved, "manifest.json") {
        Some(images) if images[0]["Layers"].is_array() => {
            let images = images.as_array().map(Vec::as_slice).unwrap_or_default();
            let [image] = images else {
                let names = images.iter().map(|image| image["RepoTags"][0].as_str().unwrap_or("one without a name"));
                return Err(several(&names.collect::<Vec<_>>()));
            };
            let layers = strings(&image["Layers"]).ok_or_else(strange)?;
            (image["Config"].as_str().map(docker), layers.iter().map(|path| docker(path)).collect::<Vec<_>>())
        }
        // Saved by `podman save --format docker-dir` or `skopeo copy … dir:`.
        Some(image) if image["layers"].is_array() && saved.look("version").is_ok_and(|found| found.is_some()) => {
            let beside = |blob: Named| Named { path: blob.digest.clone().unwrap_or_default(), ..blob };
            refuse_confusion(&image, None).map_err(|why| Error::new(attempted()).because(why))?;
            let (config, layers) = blobs(&image).ok_or_else(strange)?;
            (config.map(beside), layers.into_iter().map(beside).collect())
        }
        _ if saved.look("oci-layout").is_ok_and(|found| found.is_some()) => {
            let attempted = || "read index.json of the saved image";
            let index = saved.read("index.json", LARGEST).attempt(attempted)?;
            let index = serde_json::from_slice(&index).attempt(attempted)?;
            refuse_confusion(&index, None)
                .map_err(|why| Error::new("use index.json of the saved image").because(why))?;
            blobs(&image_of(saved, index, 0)?).ok_or_else(strange)?
        }
        _ => return Ok(None),
    };
    if layers.is_empty() {
        return Err(Error::new(attempted()).because("it has no layers"));
    }
    if layers.len() > MOST_LAYERS {
        return Err(Error::new(attempted()).because(format!("it has more than {MOST_LAYERS} layers")));
    }
    let config = match config {
        Some(named) if named.digest.is_some() => verified(saved, &named)?,
        Some(named) => description(saved, &named.path).unwrap_or_default(),
        None => Value::Null,
    };
    let diff_id = |number: usize| sha256(config["rootfs"]["diff_ids"][number].as_str()?);
    let resolve = |(number, Named { digest, path, size }): (usize, Named)| {
        let attempted = || format!("find the layer {path} of the saved image");
        let found = saved.leads_to(&path).attempt(attempted)?;
        // Refuses a device or a fifo as a layer.
        let file = saved.open_regular(&found, OFlags::RDONLY | OFlags::NOFOLLOW).attempt(attempted)?;
        let length = file.metadata().attempt(attempted)?.len();
        refuse_length(length, size).map_err(|why| Error::new(attempted()).because(why))?;
        Ok(Layer { path: found, digest, diff_id: diff_id(number) })
    };
    layers.into_iter().enumerate().map(resolve).collect::<Result<_>>().map(Some)
}

fn description(saved: &Tree, path: &str) -> Option<Value> {
    serde_json::from_slice(&saved.read(path, LARGEST).ok()?).ok()
}

/// Reads a description that is referred to by its digest, and verifies the digest.
fn verified(saved: &Tree, named: &Named) -> Result<Value> {
    let digest = named.digest.as_deref().unwrap_or_default();
    let attempted = || format!("use sha256:{digest} of the saved image");
    let text = saved.read(&named.path, LARGEST).attempt(attempted)?;
    refuse_length(text.len() as u64, named.size).map_err(|why| Error::new(attempted()).because(why))?;
    let sum = sha256_of(&text);
    if sum != digest {
        return Err(Error::new(attempted()).because(format!("its SHA-256 is {sum}")));
    }
    serde_json::from_slice(&text).attempt(attempted)
}

/// Refuses content whose `length` is not the described `size`.
fn refuse_length(length: u64, size: Option<u64>) -> std::result::Result<(), String> {
    match size {
        Some(size) if size != length => Err(format!("it has {length} bytes, expected {size}")),
        _ => Ok(()),
    }
}

/// Refuses a description that is both an index and a manifest, or that has another type than it claims: programs that
/// disagree on the type take different images from it (CVE-2021-41190). `expected` is the type that the index above
/// gives.
fn refuse_confusion(description: &Value, expected: Option<&Value>) -> std::result::Result<(), String> {
    let (is_index, is_manifest) = (!description["manifests"].is_null(), !description["layers"].is_null());
    if is_index && is_manifest {
        return Err("it is both an index and a manifest".into());
    }
    let types = if is_index { INDEXES } else { MANIFESTS };
    for told in [Some(&description["mediaType"]), expected].into_iter().flatten().filter(|told| !told.is_null()) {
        if !told.as_str().is_some_and(|told| types.contains(&told)) {
            let told = told.as_str().map_or_else(|| told.to_string(), str::to_owned);
            return Err(format!("its type is {told}, but it is {}", if is_index { "an index" } else { "a manifest" }));
        }
    }
    Ok(())
}

fn strings(list: &Value) -> Option<Vec<String>> {
    list.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect()
}

fn several(names: &[&str]) -> Error {
    Error::new("use the saved images as one image root")
        .because(format!("there are {}: {}", names.len(), listed(names)))
        .advise("save one of them, for one architecture (podman save, skopeo copy --override-arch)")
}

/// Manifest of the only image that `index` leads to.
fn image_of(saved: &Tree, index: Value, depth: usize) -> Result<Value> {
    if index["layers"].is_array() {
        return Ok(index);
    }
    let entries = index["manifests"].as_array().map(Vec::as_slice).unwrap_or_default();
    // Skips attestations, which buildx lists beside the image with an unknown architecture.
    let is_image = |entry: &&Value| entry["platform"]["architecture"] != "unknown";
    let images: Vec<_> = entries.iter().filter(is_image).collect();
    if images.is_empty() {
        return Err(Error::new("use the saved image").because("its index names no image"));
    }
    let [image] = images.as_slice() else {
        let name = |entry: &&Value| -> String {
            let name = entry["annotations"]["org.opencontainers.image.ref.name"].as_str();
            name.or(entry["platform"]["architecture"].as_str()).unwrap_or("one without a name").to_owned()
        };
        let names: Vec<_> = images.iter().map(name).collect();
        return Err(several(&names.iter().map(String::as_str).collect::<Vec<_>>()));
    };
    let refused = || {
        let digest = image["digest"].as_str().unwrap_or("without a digest");
        Error::new(format!("use the manifest {digest} of the saved image"))
    };
    let named = blob(image)
        .ok_or_else(|| refused().because("expected sha256: and 64 hexadecimal digits, and a size in bytes"))?;
    if depth == DEEPEST {
        return Err(refused().because("its indexes are nested too deeply"));
    }
    let below = verified(saved, &named)?;
    refuse_confusion(&below, Some(&image["mediaType"])).map_err(|why| refused().because(why))?;
    image_of(saved, below, depth + 1)
}

/// Configuration and layers that an OCI manifest refers to.
fn blobs(manifest: &Value) -> Option<(Option<Named>, Vec<Named>)> {
    let config = &manifest["config"];
    let config = if config.is_null() { None } else { Some(blob(config)?) };
    Some((config, manifest["layers"].as_array()?.iter().map(blob).collect::<Option<_>>()?))
}

/// Content that a descriptor refers to; `None` if the descriptor is malformed.
fn blob(descriptor: &Value) -> Option<Named> {
    let digest = sha256(descriptor["digest"].as_str()?)?;
    let size = descriptor.get("size").map(Value::as_u64);
    // If a size is given, it must be a number.
    let size = if size == Some(None) { return None } else { size.flatten() };
    Some(Named { path: format!("blobs/sha256/{digest}"), digest: Some(digest), size })
}

/// Content that Docker's manifest refers to by path. The last component may be a digest with an extension:
/// `DIGEST.tar`, `blobs/sha256/DIGEST`.
fn docker(path: &str) -> Named {
    let name = path.rsplit('/').next().unwrap_or_default();
    let stem = name.strip_prefix("sha256:").unwrap_or(name).split('.').next().unwrap_or_default();
    Named { digest: sha256(&format!("sha256:{stem}")), path: path.to_owned(), size: None }
}

/// Hexadecimal digits of a digest `sha256:DIGITS`; `None` if it is malformed.
fn sha256(digest: &str) -> Option<String> {
    let digits = digest.strip_prefix("sha256:")?;
    let is_digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (digits.len() == 64 && digits.bytes().all(is_digit)).then(|| digits.to_owned())
}

/// Moves the entries of `layer`, which was unpacked after `began`, over those of `root`, and removes from `root` the
/// entries that the layer hides. Both must be on one file system, and nobody else may change them. Follows no link.
pub(crate) fn merge(layer: &Tree, root: &Tree, began: SystemTime) -> io::Result<()> {
    let mut directories = vec![(PathBuf::new(), false)];
    let mut attributes = Vec::new();
    let (mut layers, mut roots) = (Descent::of(layer), Descent::of(root));
    while let Some((path, is_new)) = directories.pop() {
        let (from, to) = (layers.directory_without_links(&path)?, roots.directory_without_links(&path)?);
        let found = rustix::fs::fstat(from)?;
        let names: BTreeSet<OsString> = from.names()?.into_iter().collect();
        if names.contains(OsStr::from_bytes(OPAQUE)) {
            to.names()?.iter().try_for_each(|name| to.remove_whole(name))?;
        }
        let is_whiteout = |name: &&OsString| name.as_bytes().starts_with(WHITEOUT);
        for name in names.iter().filter(is_whiteout) {
            match &name.as_bytes()[WHITEOUT.len()..] {
                b"" | b"." | b".." => return Err(Errno::INVAL.into()),
                _ if name.as_bytes().starts_with(OF_DRIVER) => {}
                hidden => to.remove_whole(OsStr::from_bytes(hidden))?,
            }
        }
        for name in names.iter().filter(|name| !is_whiteout(name)) {
            let (new, old) = (is_directory(from, name)?, is_directory(to, name)?);
            if (new, old) == (Some(true), Some(true)) {
                directories.push((path.join(name), false));
                continue;
            }
            to.remove_whole(name)?;
            if new == Some(true) {
                rustix::fs::mkdirat(to, name, Mode::RWXU)?;
                directories.push((path.join(name), true));
            } else {
                rustix::fs::renameat(from, name, to, name)?;
            }
        }
        // Skip the attributes of a directory for which the layer has no entry of its own: tar has created the directory
        // just now, for the entries below it.
        if is_new || modified(&found) + CLOCK_TICK < began {
            attributes.push((path, found));
        }
    }
    // Moving entries into a directory changed its times.
    for (path, found) in attributes {
        let (from, to) = (layers.directory_without_links(&path)?, roots.directory_without_links(&path)?);
        let [from, to] = [from, to].map(|directory| Node { directory, name: OsStr::new(".") });
        to.take(&found, &from.attributes()?)?;
    }
    Ok(())
}

fn is_directory(tree: &Tree, name: &OsStr) -> io::Result<Option<bool>> {
    Ok(tree.look(name)?.map(|found| FileType::from_raw_mode(found.st_mode) == FileType::Directory))
}

fn modified(found: &Stat) -> SystemTime {
    let seconds = Duration::from_secs(found.st_mtime.try_into().unwrap_or_default());
    UNIX_EPOCH + seconds + Duration::from_nanos(found.st_mtime_nsec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tree(files: &[(&str, Value)]) -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content.to_string()).unwrap();
        }
        let tree = Tree::open(dir.path()).unwrap();
        (dir, tree)
    }

    #[test]
    fn layers_are_read_from_docker_podman_and_oci_layouts() {
        let found = |files: &[(&str, Value)]| {
            let (_dir, tree) = tree(files);
            layers(&tree).map_err(|e| e.to_string())
        };
        let text = || json!("");
        let layer = |path: &str, digest: Option<&str>, diff_id: Option<&str>| Layer {
            path: path.into(),
            digest: digest.map(str::to_owned),
            diff_id: diff_id.map(str::to_owned),
        };
        let digest = |content: &Value| sha256_of(content.to_string().as_bytes());
        let path_of = |content: &Value| format!("blobs/sha256/{}", digest(content));
        let descriptor = |content: &Value| json!({"digest": format!("sha256:{}", digest(content))});
        let (one, two) = (json!("one"), json!("two"));
        let config = json!({"rootfs": {"diff_ids": [format!("sha256:{}", digest(&one)), "none"]}});
        let docker = json!([{"Config": "c.json", "RepoTags": ["a:1"], "Layers": ["1/layer.tar", "2.tar"]}]);
        let files = [("manifest.json", docker), ("1/layer.tar", text()), ("2.tar", text()), ("c.json", config.clone())];
        let wanted = vec![layer("1/layer.tar", None, Some(&digest(&one))), layer("2.tar", None, None)];
        assert_eq!(found(&files), Ok(Some(wanted)));
        // Newer versions name layers by their digests.
        let names = [digest(&one) + ".tar", path_of(&two)];
        let docker = |config: &str| json!([{"Config": config, "Layers": names}]);
        let files = |config: &str, content: &Value| {
            found(&[
                ("manifest.json", docker(config)),
                (&names[0], text()),
                (&names[1], text()),
                (config, content.clone()),
            ])
        };
        let wanted = || {
            let by_digest = |path: &str, content| layer(path, Some(&digest(content)), None);
            vec![Layer { diff_id: Some(digest(&one)), ..by_digest(&names[0], &one) }, by_digest(&names[1], &two)]
        };
        for name in [digest(&config) + ".json", path_of(&config), format!("sha256:{}", digest(&config))] {
            assert_eq!(files(&name, &config), Ok(Some(wanted())));
            assert!(files(&name, &json!({})).unwrap_err().contains(&digest(&config)), "another configuration");
        }

        let manifest = json!({"config": descriptor(&config), "layers": [descriptor(&one), descriptor(&two)]});
        let attested = json!({"digest": "sha256:00", "platform": {"architecture": "unknown", "os": "unknown"}});
        let mut entry = descriptor(&manifest);
        entry["platform"] = json!({"architecture": "amd64"});
        let index = json!({"manifests": [entry, attested]});
        let blobs = [&one, &two, &config, &manifest, &index].map(|content| (path_of(content), content.clone()));
        let with = |index: Value, changed: &str| {
            let blobs = blobs.iter().map(|(path, content)| {
                (path.as_str(), if changed == path { json!({"layers": []}) } else { content.clone() })
            });
            found(&blobs.chain([("oci-layout", json!({})), ("index.json", index)]).collect::<Vec<_>>())
        };
        let oci = |index: Value| with(index, "");
        let by_digest = |content, diff_id| layer(&path_of(content), Some(&digest(content)), diff_id);
        let both = Ok(Some(vec![by_digest(&one, Some(&digest(&one))), by_digest(&two, None)]));
        assert_eq!(oci(index.clone()), both);
        // An index of an index, as buildx writes it.
        let outer = json!({"manifests": [descriptor(&index)]});
        assert_eq!(oci(outer.clone()), both);
        for changed in [&config, &manifest, &index] {
            let error = with(outer.clone(), &path_of(changed)).unwrap_err();
            assert!(error.contains(&digest(changed)) && error.contains("its SHA-256 is"), "{error}");
        }
        for (hostile, word) in [
            ("sha256:../../../etc/passwd", "expected sha256"),
            ("sha256:", "expected sha256"),
            ("sha512:00", "expected sha256"),
            ("aa", "expected sha256"),
            (&format!("sha256:{}", "ee".repeat(32)), "No such file"),
        ] {
            assert!(oci(json!({"manifests": [{"digest": hostile}]})).unwrap_err().contains(word), "{hostile}");
        }
        let mut entries = [descriptor(&manifest), descriptor(&manifest)];
        entries[0]["platform"] = json!({"architecture": "amd64"});
        entries[1]["platform"] = json!({"architecture": "arm64"});
        assert!(oci(json!({ "manifests": entries })).unwrap_err().contains("there are 2: amd64, arm64; save one"));
        let two = json!([{"RepoTags": ["a:1"], "Layers": []}, {"RepoTags": ["b:1"], "Layers": []}]);
        assert!(found(&[("manifest.json", two)]).unwrap_err().contains("a:1, b:1"));
        assert!(
            found(&[("manifest.json", json!([{"Layers": ["../../etc/passwd"]}]))])
                .unwrap_err()
                .contains("cannot find the layer")
        );
        assert!(found(&[("manifest.json", json!([{"Layers": vec!["l"; 1001]}])), ("l", text())]).is_err());
        // An image root with a file of its own called manifest.json.
        for manifest in [json!({"name": "app"}), json!([1]), json!("text")] {
            assert_eq!(found(&[("manifest.json", manifest), ("etc/passwd", text())]), Ok(None));
        }
    }

    #[test]
    fn a_description_that_says_two_things_or_a_wrong_size_or_names_no_layer_is_refused() {
        let digest = |content: &Value| sha256_of(content.to_string().as_bytes());
        let sized =
            |content: &Value, size: Value| json!({"digest": format!("sha256:{}", digest(content)), "size": size});
        let descriptor = |content: &Value| sized(content, json!(content.to_string().len()));
        let (layer, config) = (json!("layer"), json!({}));
        let found = |files: &[(&str, Value)]| {
            let (_dir, tree) = tree(files);
            layers(&tree).map_err(|e| e.to_string())
        };
        let oci = |entry: Value, manifest: &Value| {
            let blobs = [&layer, &config, manifest].map(|c| (format!("blobs/sha256/{}", digest(c)), c.clone()));
            let blobs: Vec<_> = blobs.iter().map(|(path, content)| (path.as_str(), content.clone())).collect();
            let index = json!({"manifests": [entry]});
            found(&[&blobs[..], &[("oci-layout", json!({})), ("index.json", index)]].concat())
        };
        let whole = |manifest: &Value| oci(descriptor(manifest), manifest);
        let refused = |said: &str, found: std::result::Result<Option<Vec<Layer>>, String>| {
            let error = found.expect_err(said);
            assert!(error.contains(said), "{said}: {error}");
        };
        let manifest = json!({"config": descriptor(&config), "layers": [descriptor(&layer)]});
        let (index, image) = ("application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json");
        let with = |name: &str, value: Value| {
            let mut changed = manifest.clone();
            changed[name] = value;
            changed
        };
        assert_eq!(whole(&manifest).unwrap().unwrap().len(), 1);
        assert_eq!(whole(&with("mediaType", json!(image))).unwrap().unwrap().len(), 1);
        refused("both an index and a manifest", whole(&with("manifests", json!([]))));
        for confused in [index, "application/vnd.docker.distribution.manifest.list.v2+json", "text/plain"] {
            refused(&format!("its type is {confused}"), whole(&with("mediaType", json!(confused))));
            let mut entry = descriptor(&manifest);
            entry["mediaType"] = json!(confused);
            refused(&format!("its type is {confused}"), oci(entry, &manifest));
        }
        for size in [json!(1), json!(8), json!(0)] {
            refused("bytes, expected", whole(&with("layers", json!([sized(&layer, size.clone())]))));
            refused("bytes, expected", whole(&with("config", sized(&config, size.clone()))));
            refused("bytes, expected", oci(sized(&manifest, size), &manifest));
        }
        for size in [json!(-1), json!("7"), json!(null), json!(1.5)] {
            refused("SHA-256 and size", whole(&with("layers", json!([sized(&layer, size)]))));
        }
        refused("it has no layers", whole(&with("layers", json!([]))));
        refused("it has no layers", found(&[("manifest.json", json!([{"Config": "c", "Layers": []}]))]));
        refused("it has no layers", found(&[("manifest.json", with("layers", json!([]))), ("version", json!(""))]));
    }

    #[test]
    fn an_index_that_cannot_be_read_or_names_no_image_is_told_as_that() {
        let found = |index: Option<&str>| {
            let (dir, tree) = tree(&[("oci-layout", json!({}))]);
            if let Some(index) = index {
                std::fs::write(dir.path().join("index.json"), index).unwrap();
            }
            layers(&tree).unwrap_err().to_string()
        };
        let large = " ".repeat(usize::try_from(LARGEST).unwrap() + 1);
        let deep = format!("{}1{}", "[".repeat(1000), "]".repeat(1000));
        let attested = r#"{"manifests": [{"platform": {"architecture": "unknown"}}]}"#;
        for (index, why) in [
            (None, "index.json of the saved image: No such file"),
            (Some("{"), "index.json of the saved image: EOF while parsing"),
            (Some(&deep), "recursion limit exceeded"),
            (Some(&large), "index.json of the saved image: larger than"),
            (Some(r#"{"manifests": []}"#), "its index names no image"),
            (Some("{}"), "its index names no image"),
            (Some(attested), "its index names no image"),
        ] {
            let error = found(index);
            assert!(error.contains(why), "{why}: {error}");
        }
        let many: Vec<_> = (0..3000).map(|n| json!({"RepoTags": [format!("a:{n}")], "Layers": []})).collect();
        let (_dir, tree) = tree(&[("manifest.json", json!(many))]);
        let error = layers(&tree).unwrap_err().to_string();
        assert!(error.contains("there are 3000: a:0") && error.contains("a:19 and 2980 more"), "{error}");
    }

    #[test]
    fn a_layer_that_leads_out_of_the_saved_image_or_is_no_file_is_refused() {
        let (dir, tree) = tree(&[("manifest.json", json!([{"Layers": ["layer.tar"]}]))]);
        let layer = dir.path().join("layer.tar");
        for target in ["/etc/passwd", "../../../../etc/passwd", "layer.tar"] {
            let _ = std::fs::remove_file(&layer);
            std::os::unix::fs::symlink(target, &layer).unwrap();
            assert!(layers(&tree).is_err(), "{target}");
        }
        std::fs::remove_file(&layer).unwrap();
        nix::unistd::mkfifo(&layer, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(layers(&tree).is_err());
    }

    #[test]
    fn a_whiteout_of_the_directory_above_is_refused() {
        for name in [".wh.", ".wh..", ".wh..."] {
            let (_layer, layer) = tree(&[(name, json!(""))]);
            let (dir, root) = tree(&[("kept/file", json!(""))]);
            let root = root.directory("kept").unwrap();
            assert!(merge(&layer, &root, SystemTime::now()).is_err(), "{name}");
            assert!(dir.path().join("kept/file").exists());
        }
    }
}
