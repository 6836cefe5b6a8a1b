//! Recipes for tests.

use std::path::{Path, PathBuf};
use std::process::Command;

pub use testbed::rpms::*;
use testbed::*;

/// A tar archive of `tree` in `dir`, made with these options.
pub fn archive(tree: &Path, name: &str, options: &[&str]) -> PathBuf {
    let file = tree.with_file_name(name);
    succeed(Command::new("tar").args(options).arg("-cf").arg(&file).arg("-C").arg(tree).arg("."));
    file
}

pub fn write(tree: &Path, name: &str, content: &str) {
    let file = tree.join(name);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, content).unwrap();
}

/// A small recipe with a template, in `dir`.
pub fn small(dir: &Path) -> PathBuf {
    let tree = dir.join("small");
    write(&tree, ".ims_recipe_template.yaml", "template_files:\n- config.xml\n- root/etc/motd\n");
    write(
        &tree,
        "config.xml",
        "<image name='small'>\n<repository><source path='{{ MIRROR }}'/></repository>\n</image>\n",
    );
    write(&tree, "root/etc/motd", "{% if NAME %}{{ NAME }}{% else %}nobody{% endif %}\n");
    tree
}

/// Paths below `tree`, with what they are.
pub fn listed(tree: &Path) -> String {
    succeed(Command::new("sh").args(["-c", "cd \"$0\" && find . -printf '%P %y %m %l\\n' | sort"]).arg(tree))
}
