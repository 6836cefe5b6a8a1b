//! Fills in a recipe's templates with the values of the job. The templates are files in Jinja's language that
//! `.ims_recipe_template.yaml` lists.
//!
//! A template is untrusted input. Therefore templates have no function that reads a file or starts a program, cannot
//! load other templates, and have bounded loops. They are filled in by a confined child process, since deep nesting, of
//! operators or of values, overflows the stack, and minijinja limits only some kinds of it. Both ends of the protocol
//! between parent and child are in this file.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Component, Path};
use std::process::Command;

use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};
use rustix::fs::{FileType, OFlags};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Attempt, Error, Result};
use crate::image::packer::inheritable;
use crate::printable::listed;
use crate::sys::file_kind::FileKind;
use crate::sys::process::OWN_PROGRAM;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::transfer::confinement::Confined;

/// File of a recipe that lists the templates.
const LIST: &str = ".ims_recipe_template.yaml";

/// Maximum length of [`LIST`], in bytes.
const LONGEST_LIST: u64 = 1 << 20;
/// Maximum length of a template, in bytes.
const LONGEST_TEMPLATE: u64 = 16 << 20;

/// Number of instructions after which a template counts as an endless loop.
const FUEL: u64 = 5_000_000;

/// Stack of the child, in bytes. The depths that minijinja allows fit into it.
const STACK: usize = 8 << 20;

/// First argument of the child process.
const CHILD: &str = "fill-in-as-child";

/// Values for templates, by name.
pub(crate) type Values = BTreeMap<String, String>;

/// Content of [`LIST`].
#[derive(Deserialize)]
struct Listed {
    template_files: Vec<String>,
}

/// A template as the child gets it.
#[derive(Serialize, Deserialize)]
struct Order {
    text: String,
    /// Values to fill in; if `None`, the child only looks for the names of values.
    values: Option<Values>,
}

/// Result of the child.
#[derive(Serialize, Deserialize)]
enum Answer {
    Filled(String),
    Asked(BTreeSet<String>),
    Refused(Refusal),
}

/// Reason why a template cannot be filled in.
#[derive(Debug, Serialize, Deserialize)]
struct Refusal {
    line: Option<usize>,
    why: String,
    advice: Option<String>,
}

impl Refusal {
    fn of(self, name: &str) -> Error {
        let place = self.line.map_or_else(|| name.to_owned(), |line| format!("{name}, line {line}"));
        let refused = Error::new(format!("fill in the template {place}")).because(self.why);
        match self.advice {
            Some(advice) => refused.advise(advice),
            None => refused,
        }
    }
}

/// Starts the child processes that fill in templates.
pub(crate) struct Renderer<'a> {
    /// Interrupts the child.
    pub(crate) work: &'a Work,
    /// Working directory of the child, which it does not use.
    pub(crate) directory: &'a Tree,
}

impl Renderer<'_> {
    /// Returns `None` if the child was killed by a signal.
    fn ask(&self, name: &str, text: &str, values: Option<&Values>) -> Result<Option<Answer>> {
        let attempted = format!("fill in the template {name}");
        let order = json!(Order { text: text.to_owned(), values: values.cloned() }).to_string();
        let order = inheritable(order.as_bytes()).attempt(|| &attempted)?;
        let own = File::open(OWN_PROGRAM).attempt(|| "open this program's own file")?;
        let mut child = Command::new(OWN_PROGRAM);
        child.args([CHILD, &order.as_raw_fd().to_string()]);
        let confined = Confined::computing(self.directory).reading([own.as_fd()].into_iter())?;
        let output = self.work.run(&attempted, &mut child, Some(&confined), |_| {})?;
        if output.status.signal().is_some() {
            return Ok(None);
        }
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(Error::new(attempted).because(if said.is_empty() { output.status.to_string() } else { said }));
        }
        serde_json::from_slice(&output.stdout).map(Some).attempt(|| attempted)
    }

    fn filled(&self, name: &str, text: &str, values: &Values) -> Result<String> {
        match self.ask(name, text, Some(values))? {
            Some(Answer::Filled(text)) => return Ok(text),
            Some(Answer::Refused(refusal)) => return Err(refusal.of(name)),
            Some(Answer::Asked(_)) | None => {}
        }
        // A killed child names no line. Find the first one up to which a child is killed as well.
        let ends: Vec<_> = text.match_indices('\n').map(|(at, _)| at + 1).collect();
        let ends_well = |end: &usize| matches!(self.ask(name, &text[..*end], Some(values)), Ok(Some(_)));
        let refusal = Refusal {
            line: Some(ends.partition_point(ends_well) + 1),
            why: "it nests operators, statements or values too deeply, or makes a value too large".into(),
            advice: Some("split it into smaller expressions".into()),
        };
        Err(refusal.of(name))
    }
}

/// Fills in a template if this process was started for that, and returns the exit code; otherwise returns `None`.
pub fn run_as_child() -> Option<u8> {
    let mut words = std::env::args_os().skip(1);
    if words.next()? != CHILD {
        return None;
    }
    let _ = rustix::thread::set_name(c"ims-sshd");
    let answer = match (words.next(), words.next()) {
        (Some(order), None) => read(&order),
        _ => Err("started by 'ims-sshd fetch-recipe', not by hand; see ims-sshd --help".into()),
    };
    // The main thread's stack may be unlimited.
    let answer = answer.and_then(|order| {
        let started = std::thread::Builder::new().stack_size(STACK).spawn(|| carried_out(order));
        started.map_err(|e| e.to_string())?.join().map_err(|_| String::new())
    });
    Some(match answer {
        Ok(answer) => {
            print!("{}", json!(answer));
            0
        }
        Err(why) => {
            eprint!("{why}");
            1
        }
    })
}

fn read(order: &OsStr) -> std::result::Result<Order, String> {
    let text = std::fs::read(Path::new("/proc/self/fd").join(order)).map_err(|e| e.to_string())?;
    serde_json::from_slice(&text).map_err(|e| e.to_string())
}

fn carried_out(order: Order) -> Answer {
    match order.values {
        Some(values) => render(&order.text, &values).map_or_else(Answer::Refused, Answer::Filled),
        None => Answer::Asked(names_in(&order.text)),
    }
}

/// Parses the values that IMS passes, a JSON object of strings. An empty file counts as an object without values.
pub(crate) fn parse_values(text: &[u8], shown: &str) -> Result<Values> {
    if text.trim_ascii().is_empty() {
        return Ok(Values::new());
    }
    let advice = r#"it has to be a JSON object of strings: {"NAME": "VALUE"}"#;
    serde_json::from_slice(text).map_err(|e| {
        // Do not show the parser's message: it quotes the value, which may be a password.
        let why = format!("line {}, column {}: {}", e.line(), e.column(), kind_of(&e));
        Error::new(format!("read the values in {shown}")).because(why).advise(advice)
    })
}

fn kind_of(error: &serde_json::Error) -> &'static str {
    match error.classify() {
        serde_json::error::Category::Eof => "it ends too early",
        serde_json::error::Category::Data => "a value is not a string, or the text is not an object",
        _ => "the text is not JSON",
    }
}

/// Fills in the templates of `recipe`, to which nobody else can write. `values` is `None` if the job has no values.
pub(crate) fn fill_in(renderer: &Renderer, recipe: &Tree, values: Option<&Values>) -> Result<()> {
    let list_read = || format!("read {LIST} of the recipe");
    let values_given = values.filter(|values| !values.is_empty());
    if recipe.look(LIST).attempt(list_read)?.is_none() {
        if values_given.is_some() {
            tracing::warn!("values are given, and the recipe has no {LIST}: nothing is filled in");
        }
        return Ok(());
    }
    let text = recipe.read(LIST, LONGEST_LIST).attempt(list_read)?;
    let text = String::from_utf8(text).attempt(list_read)?;
    let listed: Listed = serde_saphyr::from_str(&text).map_err(|e| {
        let why = e.to_string().lines().next().unwrap_or_default().to_owned();
        Error::new(list_read()).because(why).advise("expected 'template_files:' and a list of files")
    })?;
    let Some(values) = values_given else {
        if listed.template_files.is_empty() {
            return Ok(());
        }
        let why =
            format!("{LIST} names {}, and the job has no values", crate::printable::listed(&listed.template_files));
        let asked: BTreeSet<_> = listed.template_files.iter().flat_map(|name| asked(renderer, recipe, name)).collect();
        let asked = match asked.len() {
            0 => String::new(),
            _ => format!("they ask for {}: ", crate::printable::listed(&asked.iter().collect::<Vec<_>>())),
        };
        return Err(Error::new("fill in the recipe's templates").because(why).advise(format!(
            "{asked}give the recipe a template_dictionary in IMS, or values on the command line (--set NAME=VALUE, \
             --values)",
        )));
    };
    let mut filled = BTreeSet::new();
    for name in &listed.template_files {
        fill_in_file(renderer, recipe, name, values, &mut filled)?;
        tracing::info!("filled in {name}");
    }
    Ok(())
}

/// Returns the names of the values that a template uses; none if the template cannot be read.
fn asked(renderer: &Renderer, recipe: &Tree, name: &str) -> BTreeSet<String> {
    let text = recipe.read(name.trim_start_matches("./"), LONGEST_TEMPLATE).unwrap_or_default();
    let text = String::from_utf8(text).unwrap_or_default();
    match renderer.ask(name, &text, None) {
        Ok(Some(Answer::Asked(names))) => names,
        _ => BTreeSet::new(),
    }
}

fn names_in(text: &str) -> BTreeSet<String> {
    let environment = Environment::new();
    let names = environment.template_from_str(text).map(|template| template.undeclared_variables(false));
    names.unwrap_or_default().into_iter().collect()
}

/// Fills in the template `name`, unless `filled` already contains the device and inode of its file (under another
/// name).
fn fill_in_file(
    renderer: &Renderer,
    recipe: &Tree,
    name: &str,
    values: &Values,
    filled: &mut BTreeSet<(u64, u64)>,
) -> Result<()> {
    let attempted = || format!("fill in the template {name}");
    let path = Path::new(name);
    let path = path.strip_prefix(".").unwrap_or(path);
    let is_below = path.components().all(|part| matches!(part, Component::Normal(_)));
    if !is_below || path.as_os_str().is_empty() {
        let why = format!("{LIST} names a file outside the recipe");
        return Err(Error::new(attempted()).because(why).advise("name it relative to the recipe"));
    }
    let handle = recipe.handle_without_links(path).map_err(|e| {
        let why = if e.raw_os_error() == Some(libc::ELOOP) {
            "a directory in its path is a link".into()
        } else {
            e.to_string()
        };
        Error::new(attempted()).because(why).advise(format!("{LIST} names it"))
    })?;
    let found = rustix::fs::fstat(&handle).attempt(attempted)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        let why = format!("it is {}, and must be a file", FileKind::of(&found));
        return Err(Error::new(attempted()).because(why).advise(format!("{LIST} names it")));
    }
    // Fill in each file only once: in a second pass, values that the first one inserted would be taken for template
    // text.
    if !filled.insert((found.st_dev, found.st_ino)) {
        return Ok(());
    }
    // Write into the existing file, so that its mode and owner stay.
    let mut file = recipe.open_regular(path, OFlags::RDWR | OFlags::NOFOLLOW).attempt(attempted)?;
    let mut text = String::new();
    (&mut file).take(LONGEST_TEMPLATE + 1).read_to_string(&mut text).attempt(attempted)?;
    if text.len() as u64 > LONGEST_TEMPLATE {
        return Err(Error::new(attempted()).because(format!("it is larger than {LONGEST_TEMPLATE} bytes")));
    }
    let text = renderer.filled(name, &text, values)?;
    file.rewind().attempt(attempted)?;
    file.set_len(0).attempt(attempted)?;
    file.write_all(text.as_bytes()).attempt(attempted)
}

/// Fills in `text`. In contrast to IMS's use of Jinja2, printing an unknown value is an error. A condition may still use
/// an unknown value.
fn render(text: &str, values: &Values) -> std::result::Result<String, Refusal> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::SemiStrict);
    // Switch escaping off. By default it depends on the file's name: in config.xml, '&' in a value would become
    // '&amp;', but values are already in the file's syntax.
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    let template = environment.template_from_str(text).map_err(|e| refusal(text, values, &e, &[]))?;
    template.render(values).map_err(|e| {
        let asked: Vec<_> = template.undeclared_variables(false).into_iter().collect();
        refusal(text, values, &e, &asked)
    })
}

fn refusal(text: &str, values: &Values, error: &minijinja::Error, asked: &[String]) -> Refusal {
    let line = error.line();
    let known = || match values.len() {
        0 => "no value is known".to_owned(),
        _ => format!("these are known: {}", listed(&values.keys().collect::<Vec<_>>())),
    };
    if error.kind() == ErrorKind::UndefinedError {
        let on_line = line.and_then(|line| text.lines().nth(line.checked_sub(1)?)).unwrap_or_default();
        let mut missing: Vec<_> = asked.iter().filter(|name| !values.contains_key(*name)).collect();
        missing.sort();
        if missing.iter().any(|name| holds_word(on_line, name)) {
            missing.retain(|name| holds_word(on_line, name));
        }
        let advice = format!("{}; give it a value, or ask with {{% if … is defined %}}", known());
        let why = match missing.as_slice() {
            [] => "it prints a value that is not defined".into(),
            missing => format!("there is no value named {}", listed(missing)),
        };
        return Refusal { line, why, advice: Some(advice) };
    }
    let why = error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    Refusal { line, why, advice: None }
}

fn holds_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|part| part == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(text: &str, values: &[(&str, &str)]) -> std::result::Result<String, String> {
        let values = values.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        render(text, &values).map_err(|refusal| refusal.of("config.xml").to_string())
    }

    #[test]
    fn values_are_filled_in_as_jinja2_does() {
        let values = [("A", "x & <y>"), ("V", "15.5"), ("EMPTY", "")];
        for (template, result) in [
            ("a {{ A }} b", "a x & <y> b"),
            ("{{A}}\n", "x & <y>"),
            ("{{ A }}\n\n", "x & <y>\n"),
            ("{% if A %}1{% else %}2{% endif %}{% if NO %}1{% else %}2{% endif %}", "12"),
            ("{{ V.split('.')[0] }}-{{ V.replace('.', '_') }}-{{ V|upper }}", "15-15_5-15.5"),
            ("{{ NO|default('d') }}{{ EMPTY }}{# not this #}", "d"),
            ("{% set B = A + '!' %}{{ B }}", "x & <y>!"),
            ("{% for n in [1, 2] %}{{ n }}{% if not loop.last %},{% endif %}{% endfor %}", "1,2"),
            ("{% raw %}{{ NO }}{% endraw %}", "{{ NO }}"),
            ("no template", "no template"),
        ] {
            assert_eq!(filled(template, &values).as_deref(), Ok(result), "{template}");
        }
    }

    #[test]
    fn unknown_value_is_an_error_with_file_line_name_and_known_names() {
        let refused = filled("a\nb {{ CSM_RELASE }} {{ B }}\n{{ C }}", &[("B", ""), ("CSM_RELEASE", "1")]).unwrap_err();
        let wanted = "cannot fill in the template config.xml, line 2: there is no value named CSM_RELASE; these are \
            known: B, CSM_RELEASE; give it a value";
        assert!(refused.starts_with(wanted), "{refused}");
        for template in ["{{ A.b.c }}", "{{ NO|upper }}", "{% for x in NO %}{{ x }}{% endfor %}", "{{ 'a' ~ NO }}"] {
            let refused = filled(template, &[("A", "x")]);
            assert!(refused.as_ref().is_err_and(|e| e.contains("line 1")), "{template}: {refused:?}");
        }
    }

    #[test]
    fn syntax_errors_name_the_line() {
        for template in ["\n{{ A", "\n{% if A %}", "\n{% unknown %}", "\n{{ A | nofilter }}"] {
            let refused = filled(template, &[("A", "x")]).unwrap_err();
            assert!(refused.contains("config.xml, line 2"), "{template:?}: {refused}");
        }
    }

    #[test]
    fn templates_run_no_code_read_no_files_and_end() {
        for template in [
            "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ self.__init__.__globals__ }}",
            "{% include '/etc/passwd' %}",
            "{% import '/etc/passwd' as x %}",
            "{% extends '/etc/passwd' %}",
            "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
        ] {
            assert!(filled(template, &[]).is_err(), "{template}");
        }
    }

    #[test]
    fn values_are_an_object_of_strings_and_are_not_quoted_in_errors() {
        assert_eq!(parse_values(b"", "f").unwrap(), Values::new());
        assert_eq!(parse_values(br#"{"A": "b"}"#, "f").unwrap()["A"], "b");
        for wrong in
            ["[]", r#"{"A": 12345678}"#, r#"{"A": ["hidden-12345678"]}"#, "{'A'", r#"{"A": "12345678"#, "12345678"]
        {
            let refused = parse_values(wrong.as_bytes(), "f").unwrap_err().to_string();
            assert!(
                refused.starts_with("cannot read the values in f: line 1") && !refused.contains("12345678"),
                "{refused}"
            );
        }
    }
}
