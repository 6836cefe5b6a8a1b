//! Reads a recipe's description, as far as the steps around kiwi-ng need it.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use roxmltree::{Document, Node};

use crate::error::{Attempt, Error, Result};
use crate::printable::listed;
use crate::sys::tree::Tree;

/// File names of a description, in the order in which kiwi-ng tries them (`kiwi/tasks/base.py`). After these it tries
/// files whose names end in [`ENDING`].
const NAMES: [&str; 2] = ["config.xml", "image/config.xml"];
/// Ending of all other file names that a description can have.
const ENDING: &str = ".kiwi";

/// Maximum length of a description, in bytes.
const LONGEST: u64 = 16 << 20;

/// The description of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Description {
    /// Path of the description below the recipe.
    pub(crate) file: PathBuf,
    /// The image's name.
    pub(crate) name: String,
    /// Paths or URLs of included descriptions, whose sections belong to this one.
    includes: Vec<String>,
    /// Profiles that are built if the user names none.
    pub(crate) imported: BTreeSet<String>,
    /// All profiles, each with the profiles that it requires.
    pub(crate) profiles: Vec<(String, Vec<String>)>,
    /// Package managers, each with the profiles and architectures for which it is used.
    pub(crate) package_managers: Vec<(Scope, String)>,
    /// Types of images, each with its scope.
    pub(crate) types: Vec<(Scope, String)>,
    /// Packages of the bootstrap phase, each with its scope.
    pub(crate) bootstrap: Vec<(Scope, String)>,
    /// Value of `$releasever`, if the description sets it.
    pub(crate) release: Option<String>,
    /// Repositories, each with its scope.
    pub(crate) repositories: Vec<(Scope, Repository)>,
}

/// Profiles and architectures to which a part of a description applies; an empty list means all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Scope {
    profiles: Vec<String>,
    architectures: Vec<String>,
}

/// A repository of packages, as the description defines it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Repository {
    /// `rpm-md`, `apt-deb` and others; empty if the package manager decides.
    pub(crate) kind: String,
    /// Name of the repository, or its path if it has no name.
    pub(crate) alias: String,
    /// URL or path of the repository.
    pub(crate) path: String,
    /// `mirrorlist` or `metalink` if the path is the URL of a list of mirrors.
    pub(crate) source_type: String,
    /// Release of a Debian repository.
    pub(crate) distribution: String,
    /// Components of a Debian repository.
    pub(crate) components: String,
    /// User and password for this repository, if the description has them.
    pub(crate) login: Option<(String, String)>,
    /// True if the repository is only configured in the image, and the build installs nothing from it.
    pub(crate) is_for_image_only: bool,
}

/// Profiles and architecture of a build.
#[derive(Debug, Clone, Default)]
pub(crate) struct Selection {
    pub(crate) profiles: BTreeSet<String>,
    pub(crate) architecture: &'static str,
}

impl Description {
    /// Finds and reads the description of `recipe`.
    pub(crate) fn read(recipe: &Tree) -> Result<Self> {
        let file = find(recipe)?;
        let attempted = || format!("read {} of the recipe", file.display());
        let text = read(recipe, &file).attempt(attempted)?;
        let mut found = Self::parse(&text, file.clone()).attempt(attempted)?;
        // Do not follow includes of included files: kiwi-ng ignores them (`kiwi/xsl/include.xsl`).
        for from in std::mem::take(&mut found.includes) {
            let included = || format!("read '{from}', which {} of the recipe includes", file.display());
            let text = match from.split_once(":/").map(|(scheme, rest)| (scheme, rest.trim_start_matches('/'))) {
                Some(("this", rest)) => read(recipe, &file.with_file_name(rest)).attempt(included)?,
                // Go on without the file: the container that builds may have it although this container does not.
                _ => match Tree::open(Path::new("/")).and_then(|root| read(&root, Path::new(local_path(&from)))) {
                    Ok(text) => text,
                    Err(e) => {
                        tracing::info!("the repositories in '{from}' are not known here: {e}");
                        continue;
                    }
                },
            };
            found.add(&text).attempt(included)?;
        }
        Ok(found)
    }

    fn parse(text: &str, file: PathBuf) -> std::result::Result<Self, String> {
        let mut found = Self {
            file,
            name: String::new(),
            includes: Vec::new(),
            imported: BTreeSet::new(),
            profiles: Vec::new(),
            package_managers: Vec::new(),
            types: Vec::new(),
            bootstrap: Vec::new(),
            release: None,
            repositories: Vec::new(),
        };
        found.name = found.add(text)?;
        Ok(found)
    }

    /// Adds the sections of a description, and returns its name.
    fn add(&mut self, text: &str) -> std::result::Result<String, String> {
        let document = Document::parse(text).map_err(|e| format!("it is not XML: {e}"))?;
        let image = document.root_element();
        if image.tag_name().name() != "image" {
            return Err(format!("its root element is <{}>: expected <image>", image.tag_name().name()));
        }
        for section in image.children().filter(Node::is_element) {
            let scope = Scope::of(section, &Scope::default());
            match section.tag_name().name() {
                "profiles" => {
                    section.children().filter(|n| n.has_tag_name("profile")).for_each(|p| self.add_profile(p));
                }
                "preferences" => self.add_preferences(section, &scope),
                "repository" => self.add_repository(section, scope),
                "include" => self.includes.push(attribute(section, "from")),
                "packages" if section.attribute("type") == Some("bootstrap") => {
                    let packages = section.children().filter(|n| n.has_tag_name("package"));
                    self.bootstrap.extend(packages.map(|p| (Scope::of(p, &scope), attribute(p, "name"))));
                }
                _ => {}
            }
        }
        Ok(attribute(image, "name"))
    }

    fn add_profile(&mut self, profile: Node) {
        let name = attribute(profile, "name");
        if profile.attribute("import") == Some("true") {
            self.imported.insert(name.clone());
        }
        let requires = profile.children().filter(|node| node.has_tag_name("requires"));
        self.profiles.push((name, requires.map(|node| attribute(node, "profile")).collect()));
    }

    fn add_preferences(&mut self, section: Node, scope: &Scope) {
        for node in section.children().filter(Node::is_element) {
            let text = || node.text().unwrap_or_default().trim().to_owned();
            match node.tag_name().name() {
                "packagemanager" => self.package_managers.push((scope.clone(), text())),
                "release-version" => self.release = Some(text()),
                "type" => self.types.push((Scope::of(node, scope), attribute(node, "image"))),
                _ => {}
            }
        }
    }

    fn add_repository(&mut self, node: Node, scope: Scope) {
        let path = node.children().find(|n| n.has_tag_name("source")).map(|source| attribute(source, "path"));
        let path = path.unwrap_or_default();
        let alias = Some(attribute(node, "alias")).filter(|alias| !alias.is_empty()).unwrap_or_else(|| path.clone());
        let user = node.attribute("username").map(str::to_owned);
        self.repositories.push((
            scope,
            Repository {
                kind: attribute(node, "type"),
                alias,
                path,
                source_type: attribute(node, "sourcetype"),
                distribution: attribute(node, "distribution"),
                components: attribute(node, "components"),
                login: user.map(|user| (user, attribute(node, "password"))),
                is_for_image_only: node.attribute("imageonly") == Some("true"),
            },
        ));
    }

    /// Returns the profiles that a build selects, including all profiles that these require: those in `asked` or, if
    /// `asked` is empty, those that the description imports. An unknown profile is an error.
    pub(crate) fn select(&self, asked: &[String], architecture: &'static str) -> Result<Selection> {
        if let Some(unknown) = asked.iter().find(|asked| !self.profiles.iter().any(|(name, _)| name == *asked)) {
            let known: Vec<_> = self.profiles.iter().map(|(name, _)| name).collect();
            let known = if known.is_empty() { "it has none".into() } else { format!("it has {}", listed(&known)) };
            return Err(Error::bad_input(format!("--profile is '{unknown}': the recipe has no such profile; {known}")));
        }
        let mut ahead: Vec<_> = if asked.is_empty() { self.imported.iter().cloned().collect() } else { asked.to_vec() };
        let mut profiles = BTreeSet::new();
        while let Some(name) = ahead.pop() {
            let required = self.profiles.iter().find(|(profile, _)| *profile == name).map(|(_, required)| required);
            if profiles.insert(name) {
                ahead.extend(required.into_iter().flatten().cloned());
            }
        }
        Ok(Selection { profiles, architecture })
    }
}

impl Scope {
    fn of(node: Node, above: &Self) -> Self {
        let list = |name: &str| {
            attribute(node, name).split(',').map(str::trim).filter(|p| !p.is_empty()).map(str::to_owned).collect()
        };
        let (profiles, architectures): (Vec<_>, Vec<_>) = (list("profiles"), list("arch"));
        Self {
            profiles: if profiles.is_empty() { above.profiles.clone() } else { profiles },
            architectures: if architectures.is_empty() { above.architectures.clone() } else { architectures },
        }
    }

    /// Returns whether a build of `selection` uses a part that has this scope.
    pub(crate) fn holds(&self, selection: &Selection) -> bool {
        (self.profiles.is_empty() || self.profiles.iter().any(|profile| selection.profiles.contains(profile)))
            && (self.architectures.is_empty() || self.architectures.iter().any(|name| name == selection.architecture))
    }
}

fn attribute(node: Node, name: &str) -> String {
    node.attribute(name).unwrap_or_default().to_owned()
}

/// Reads the text of a description.
fn read(tree: &Tree, file: &Path) -> io::Result<String> {
    String::from_utf8(tree.read(file, LONGEST)?).map_err(io::Error::other)
}

/// Returns the path, on this machine, of an included file that is outside the recipe.
fn local_path(from: &str) -> &str {
    from.split_once("://").map_or(from, |(_, path)| path)
}

/// Returns the path of the description below `recipe`.
fn find(recipe: &Tree) -> Result<PathBuf> {
    let attempted = || "find the recipe's description".to_owned();
    for name in NAMES {
        if recipe.look(name).is_ok_and(|found| found.is_some()) {
            return Ok(name.into());
        }
    }
    let names = recipe.names().attempt(attempted)?;
    let mut names: Vec<_> = names.iter().map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    let described: Vec<_> = names.iter().filter(|name| name.ends_with(ENDING)).collect();
    match described.as_slice() {
        [one] => Ok(Path::new(one).into()),
        [] if names.is_empty() => Err(Error::new(attempted()).because("the recipe is empty")),
        [] => {
            let why = format!("the recipe has no config.xml and no *.kiwi; at its top it has {}", listed(&names));
            Err(Error::new(attempted()).because(why))
        }
        several => {
            let why = format!("the recipe has several descriptions: {}", listed(several));
            Err(Error::new(attempted()).because(why).advise("keep only one of them, or rename one to config.xml"))
        }
    }
}

/// Returns whether `recipe` contains a file that can be a description.
pub(crate) fn is_there(recipe: &Tree) -> bool {
    let is_description = |name: &std::ffi::OsString| name.to_string_lossy().ends_with(ENDING);
    NAMES.iter().any(|name| recipe.look(name).is_ok_and(|found| found.is_some()))
        || recipe.names().is_ok_and(|names| names.iter().any(is_description))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECIPE: &str = r#"<?xml version="1.0"?>
<image schemaversion="7.4" name="compute">
    <profiles>
        <profile name="base" description="" import="true"/>
        <profile name="big" description=""><requires profile="extra"/></profile>
        <profile name="extra" description=""/>
    </profiles>
    <preferences><packagemanager>zypper</packagemanager><release-version>15.5</release-version><type image="tbz"/></preferences>
    <preferences profiles="big"><type image="oem"/></preferences>
    <repository type="rpm-md" alias="all" username="me" password="pw"><source path="https://h/all"/></repository>
    <repository profiles="base,big" arch="aarch64"><source path="https://h/arm"/></repository>
    <repository profiles="extra"><source path="https://h/extra"/></repository>
    <repository profiles="base" imageonly="true"><source path="https://h/only"/></repository>
    <packages type="bootstrap"><package name="a"/><package name="b" arch="aarch64"/></packages>
    <packages type="image"><package name="c"/></packages>
</image>"#;

    fn names(of: &Description, profiles: &[&str], architecture: &'static str) -> Vec<String> {
        let asked: Vec<_> = profiles.iter().map(|p| (*p).to_owned()).collect();
        let selection = of.select(&asked, architecture).unwrap();
        of.repositories.iter().filter(|(scope, _)| scope.holds(&selection)).map(|(_, r)| r.alias.clone()).collect()
    }

    #[test]
    fn repositories_of_the_selected_profiles_and_architecture_are_used() {
        let description = Description::parse(RECIPE, "config.xml".into()).unwrap();
        assert_eq!(names(&description, &[], "x86_64"), ["all", "https://h/only"]);
        assert_eq!(names(&description, &[], "aarch64"), ["all", "https://h/arm", "https://h/only"]);
        assert_eq!(names(&description, &["big"], "x86_64"), ["all", "https://h/extra"], "with what it requires");
        assert_eq!(description.repositories[0].1.login, Some(("me".into(), "pw".into())));
        assert_eq!(description.release.as_deref(), Some("15.5"));
        let refused = description.select(&["no".into()], "x86_64").unwrap_err();
        assert!(refused.to_string().contains("it has base, big, extra"), "{refused}");
        let here = description.select(&[], "x86_64").unwrap();
        let of = |parts: &[(Scope, String)]| {
            parts.iter().filter(|(s, _)| s.holds(&here)).map(|(_, name)| name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(
            (of(&description.types), of(&description.bootstrap)),
            (vec!["tbz".to_owned()], vec!["a".to_owned()])
        );
    }

    #[test]
    fn sections_of_included_files_belong_to_the_description() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let repository = |alias: &str| format!("<repository alias='{alias}'><source path='https://h/r'/></repository>");
        let include = |from: &str| format!("<include from='{from}'/>");
        let outside = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&outside, format!("<image>{}</image>", repository("outside"))).unwrap();
        let from = format!("file://{}", outside.path().display());
        let includes = [include("this://./parts.xml"), include(&from), include("file:///nowhere.xml")].concat();
        write("config.xml", &format!("<image name='whole'>{includes}{}</image>", repository("own")));
        write("parts.xml", &format!("<image>{}{}</image>", repository("part"), include("this://config.xml")));
        let read = || Description::read(&Tree::open(dir.path()).unwrap());
        let description = read().unwrap();
        assert_eq!(
            (description.name.as_str(), names(&description, &[], "x86_64")),
            ("whole", vec!["own".into(), "part".into(), "outside".into()])
        );
        write("config.xml", &format!("<image>{}</image>", include("this://gone.xml")));
        let refused = read().unwrap_err().to_string();
        assert!(
            refused.contains("cannot read 'this://gone.xml', which config.xml of the recipe includes"),
            "{refused}"
        );
        // The scheme `this:` must not read files outside of the recipe.
        write("config.xml", &format!("<image>{}</image>", include("this://../etc/passwd")));
        assert!(read().is_err());
    }

    #[test]
    fn text_that_is_no_description_is_refused() {
        for (text, why) in [
            ("<image><a></image>", "it is not XML"),
            ("", "it is not XML"),
            ("<images/>", ": expected <image>"),
            ("<!DOCTYPE x [<!ENTITY a 'b'>]><image>&a;</image>", "it is not XML"),
        ] {
            let refused = Description::parse(text, "config.xml".into()).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }
}
