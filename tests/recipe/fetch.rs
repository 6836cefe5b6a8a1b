//! Recipes become directories, or leave nothing.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

use testbed::file_server::{Fault, FileServer};
use testbed::ims_server::ImsServer;
use testbed::job::*;
use testbed::s3_server::Bucket;
use testbed::*;

use crate::recipes::*;

fn fetch(to: &Path, source: &str, options: &[&str], variables: &[(&str, String)]) -> Output {
    let mut arguments = vec!["fetch-recipe", to.to_str().unwrap(), source];
    arguments.extend(options);
    ims_sshd(&arguments, variables).output().unwrap()
}

fn content(tree: &Path, name: &str) -> String {
    std::fs::read_to_string(tree.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Checks that the recipe is refused with this reason, and that nothing is left beside it.
fn refused(dir: &Path, source: &Path, options: &[&str], reason: &str) {
    let parent = dir.join("volume");
    std::fs::create_dir_all(&parent).unwrap();
    let output = fetch(&parent.join("recipe"), source.to_str().unwrap(), options, &[]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(reason), "expected '{reason}': {said}");
    assert_eq!(std::fs::read_dir(&parent).unwrap().count(), 0, "{}", listed(&parent));
}

#[test]
fn archive_of_every_kind_url_and_directory_give_the_same_recipe() {
    let dir = directory();
    let tree = small(dir.path());
    std::fs::set_permissions(tree.join("root/etc/motd"), PermissionsExt::from_mode(0o750)).unwrap();
    symlink("/run/motd", tree.join("root/etc/link")).unwrap();
    let mut sources = vec![tree.display().to_string()];
    for (name, options) in
        [("a.tar", &[][..]), ("a.tgz", &["-z"]), ("a.tar.bz2", &["-j"]), ("a.txz", &["-J"]), ("a.tzst", &["--zstd"])]
    {
        sources.push(archive(&tree, name, options).display().to_string());
    }
    let bytes = std::fs::read(tree.with_file_name("a.tgz")).unwrap();
    sources.push(FileServer::start(bytes.clone(), &[Fault::ResetAfter(100)]).url);
    let bucket = Bucket::new();
    bucket.put("recipes/a.tgz", &bytes);
    sources.push(format!("s3://{}/recipes/a.tgz", bucket.name));
    let values = ["--set", "MIRROR=https://h/?a&amp;b", "--set", "NAME=<me>"];
    let first = dir.path().join("recipe-0");
    for (number, source) in sources.iter().enumerate() {
        let to = dir.path().join(format!("recipe-{number}"));
        let output = fetch(&to, source, &values, &bucket.variables());
        assert!(output.status.success(), "{source}: {}", text(&output.stderr));
        // Values are not escaped, and the last newline goes, as with the program that this replaces.
        assert_eq!(content(&to, "root/etc/motd"), "<me>");
        assert!(content(&to, "config.xml").ends_with("'https://h/?a&amp;b'/></repository>\n</image>"));
        let kept = "root/etc/link l 777 /run/motd\nroot/etc/motd f 750 \n";
        assert!(listed(&to).contains(kept), "{source}: {}", listed(&to));
        assert_eq!(listed(&to), listed(&first), "{source}");
        let beside: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!beside.iter().any(|name| name.to_string_lossy().starts_with('.')), "{beside:?}");
    }
}

#[test]
fn container_of_a_pod_is_replaced_with_its_script_name_variables_and_statuses() {
    let dir = directory();
    let tree = small(dir.path());
    let served = FileServer::start(std::fs::read(archive(&tree, "a.tgz", &["-z"])).unwrap(), &[]);
    let (ims, volume) = (ImsServer::start(), dir.path().join("volume"));
    std::fs::create_dir(&volume).unwrap();
    let script = dir.path().join("fetch-recipe.sh");
    symlink(&*IMS_SSHD, &script).unwrap();
    let values = dir.path().join("template_dictionary");
    std::fs::write(&values, r#"{"MIRROR": "https://h"}"#).unwrap();
    let run = |values: &Path| {
        let mut command = Command::new(&script);
        command.arg(volume.join("recipe")).arg(&served.url).arg("--values").arg(values).env_clear();
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LOG_LEVEL", "INFO").envs(ims.variables());
        command.output().unwrap()
    };
    // The recipe of a container that was started again is made again.
    for _ in 0..2 {
        let output = run(&values);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(content(&volume.join("recipe"), "root/etc/motd"), "nobody");
    }
    assert_eq!(ims.statuses(), ["fetching_recipe", "fetching_recipe"]);
    std::fs::write(&values, r#"{"MIRROR": "#).unwrap();
    let output = run(&values);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(ims.statuses().last().unwrap(), "error");
}

#[test]
fn wrong_checksum_of_an_archive_is_refused() {
    let dir = directory();
    let file = archive(&small(dir.path()), "a.tgz", &["-z"]);
    let sum = md5(&std::fs::read(&file).unwrap());
    let to = dir.path().join("recipe");
    let run =
        |sum: &str| fetch(&to, file.to_str().unwrap(), &["--set", "MIRROR=x"], &[("DOWNLOAD_MD5SUM", sum.to_owned())]);
    let output = run(&sum.chars().rev().collect::<String>());
    assert!(text(&output.stderr).contains("its MD5 is"), "{}", text(&output.stderr));
    assert!(!to.exists());
    assert!(run(&sum).status.success());
    // Somebody's directory is not replaced outside of a job.
    let output = run(&sum);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("it exists; remove it"), "{}", text(&output.stderr));
    let of_directory = [("DOWNLOAD_MD5SUM", sum)];
    let output = fetch(&dir.path().join("other"), dir.path().join("small").to_str().unwrap(), &[], &of_directory);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("it is a directory, which has no checksum"), "{}", text(&output.stderr));
}

#[test]
fn recipe_one_directory_deeper_is_found() {
    let dir = directory();
    let tree = dir.path().join("outer");
    std::fs::create_dir(&tree).unwrap();
    std::fs::rename(small(dir.path()), tree.join("recipe-main")).unwrap();
    let to = dir.path().join("recipe");
    let file = archive(&tree, "a.tgz", &["-z"]);
    let output = fetch(&to, file.to_str().unwrap(), &["--set", "MIRROR=x"], &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(to.join("config.xml").exists());
}

#[test]
fn hostile_and_damaged_archives_are_refused_and_leave_nothing() {
    let dir = directory();
    let tree = small(dir.path());
    let good = std::fs::read(archive(&tree, "good.tgz", &["-z"])).unwrap();
    let at = |name: &str| dir.path().join(name);
    let set = ["--set", "MIRROR=x"];
    std::fs::write(at("cut"), &good[..good.len() / 2]).unwrap();
    refused(dir.path(), &at("cut"), &set, "cut as a recipe: ");
    std::fs::write(at("page"), "<html>").unwrap();
    refused(dir.path(), &at("page"), &set, "page as a recipe: it is neither");
    succeed(Command::new("mksquashfs").arg(&tree).arg(at("image")).arg("-quiet"));
    refused(dir.path(), &at("image"), &set, "image as a recipe: it is a squashfs or a cpio archive; a recipe is a tar");
    let outside = at("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "secret").unwrap();
    let make = "
import io, sys, tarfile
archive, kind, outside = sys.argv[1:]
with tarfile.open(archive, 'w') as tar:
    def add(name, content=b'<image/>', **fields):
        member = tarfile.TarInfo(name)
        for key, value in fields.items(): setattr(member, key, value)
        member.size = 0 if 'type' in fields else len(content)
        tar.addfile(member, io.BytesIO(content))
    add('config.xml')
    if kind == 'dots': add('../build_failed')
    if kind == 'absolute-link':
        add('way', type=tarfile.SYMTYPE, linkname=outside)
        add('way/made')
    if kind == 'hardlink': add('copy', type=tarfile.LNKTYPE, linkname=outside + '/secret')
    if kind == 'device': add('root/dev/sda', type=tarfile.BLKTYPE, devmajor=8, devminor=0)
    if kind == 'fifo': add('config.sh', type=tarfile.FIFOTYPE)
    if kind == 'link-out': add('root', type=tarfile.SYMTYPE, linkname='/')
    if kind == 'link-nowhere': add('root', type=tarfile.SYMTYPE, linkname='missing')
";
    for (kind, reason) in [
        ("dots", "Member name contains '..'"),
        ("absolute-link", "as a recipe: "),
        ("hardlink", "as a recipe: "),
        ("device", "cannot use root/dev/sda as a part of a recipe: it is a block device"),
        ("fifo", "cannot use config.sh as a part of a recipe: it is a "),
        ("link-out", "cannot use root as a part of a recipe: it is a link that leads out of the recipe"),
        ("link-nowhere", "cannot use root as a part of a recipe: it is a link that leads nowhere: No such file"),
    ] {
        let file = at(&format!("{kind}.tar"));
        succeed(Command::new("/usr/bin/python3").args(["-c", make]).arg(&file).arg(kind).arg(&outside));
        refused(dir.path(), &file, &set, reason);
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1, "{kind}");
    }
    // An absolute name is one below the recipe.
    let file = at("absolute.tar");
    let absolute = "import io, sys, tarfile
with tarfile.open(sys.argv[1], 'w') as tar:
    for name in ['config.xml', sys.argv[2]]:
        member = tarfile.TarInfo(name); member.size = 8
        tar.addfile(member, io.BytesIO(b'<image/>'))";
    let way = outside.join("made");
    succeed(Command::new("/usr/bin/python3").args(["-c", absolute]).arg(&file).arg(&way));
    let output = fetch(&at("recipe"), file.to_str().unwrap(), &[], &[]);
    assert!(output.status.success() && !way.exists(), "{}", text(&output.stderr));
}

#[test]
fn wrong_templates_are_refused_with_file_line_and_name() {
    let dir = directory();
    let tree = small(dir.path());
    let case = |options: &[&str], reason: &str| refused(dir.path(), &tree, options, reason);
    case(&[], "the job has no values; they ask for MIRROR, NAME: give the recipe a template_dictionary");
    case(&["--set", "MIROR=x"], "config.xml, line 2: there is no value named MIRROR; these are known: MIROR");
    let set = ["--set", "MIRROR=x"];
    write(&tree, "root/etc/motd", "a\n{{ cycler.__init__.__globals__.os.popen('id').read() }}\n");
    case(&set, "root/etc/motd, line 2");
    write(&tree, "root/etc/motd", "a\n{% if A %}\n");
    case(&set, "root/etc/motd, line ");
    for (list, reason) in [
        ("template_files: [config.xml", "cannot read .ims_recipe_template.yaml of the recipe"),
        ("templates:\n- config.xml\n", "expected 'template_files:' and a list of files"),
        ("template_files:\n- /etc/passwd\n", "names a file outside the recipe"),
        ("template_files:\n- ../recipe-source\n", "names a file outside the recipe"),
        ("template_files:\n- missing\n", "cannot fill in the template missing: No such file"),
        ("template_files:\n- root\n", "cannot fill in the template root: it is a directory"),
        ("template_files:\n- root/etc/link\n", "cannot fill in the template root/etc/link: it is a symbolic link"),
        ("template_files:\n- root/way/hostname\n", "a directory in its path is a link"),
    ] {
        write(&tree, ".ims_recipe_template.yaml", list);
        let _ = symlink("/etc/hostname", tree.join("root/etc/link"));
        let _ = symlink("/etc", tree.join("root/way"));
        case(&set, reason);
    }
}

#[test]
fn templates_that_would_overflow_the_stack_are_refused_with_file_and_line() {
    let dir = directory();
    let tree = small(dir.path());
    for (begin, repeated, end) in [
        ("{{ ", "not ", "1 }}"),
        ("{{ ", "(", "1 }}"),
        ("{{ 1", "+1", " }}"),
        ("{{ MIRROR", "|upper", " }}"),
        ("{% for ", "(", "a in [] %}{% endfor %}"),
        ("", "{% if 1 %}", ""),
        ("{% if 1 %}", "{% elif 1 %}", "{% endif %}"),
        // Each round puts the value into a list, so dropping it takes as deep a recursion.
        (
            "{% set n = namespace(v=1) %}{% for a in range(300) %}{% for b in range(300) %}{% set n.v = [n.v] %}",
            "",
            "{% endfor %}{% endfor %}",
        ),
    ] {
        let template = format!("<image>\n{begin}{}{end}\n</image>\n", repeated.repeat(50_000));
        write(&tree, "config.xml", &template);
        refused(dir.path(), &tree, &["--set", "MIRROR=x"], "cannot fill in the template config.xml, line 2: ");
    }
    // Without values, the templates are read for the names that they ask for.
    write(&tree, "config.xml", &format!("{{{{ {}1 }}}}", "not ".repeat(50_000)));
    refused(dir.path(), &tree, &[], "the job has no values; they ask for NAME: give the recipe");
    // The depths that docs/RECIPES.md promises.
    let template = [
        format!("<image>{{{{ {}MIRROR{}{} }}}}", "(".repeat(50), ")".repeat(50), "|upper".repeat(500)),
        format!("{{{{ 0{} }}}}{{{{ {}true }}}}", "+1".repeat(500), "not ".repeat(500)),
        format!("{{% if 0 %}}{}5{{% endif %}}", "{% elif 0 %}".repeat(499) + "{% else %}"),
        format!("{}6{}</image>", "{% if 1 %}".repeat(50), "{% endif %}".repeat(50)),
    ];
    write(&tree, "config.xml", &template.concat());
    let to = dir.path().join("recipe");
    let output = fetch(&to, tree.to_str().unwrap(), &["--set", "MIRROR=x"], &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(content(&to, "config.xml"), "<image>X500True56</image>");
}

#[test]
fn recipe_without_templates_is_left_as_it_is() {
    let dir = directory();
    let tree = dir.path().join("plain");
    write(&tree, "appliance.kiwi", "<image name='{{ NAME }}'/>\n");
    let to = dir.path().join("recipe");
    let output = fetch(&to, tree.to_str().unwrap(), &["--set", "NAME=x"], &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("nothing is filled in"), "{}", text(&output.stderr));
    assert_eq!(content(&to, "appliance.kiwi"), "<image name='{{ NAME }}'/>\n");
}

#[test]
fn recipe_without_a_description_is_refused_with_what_it_has() {
    let dir = directory();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    refused(dir.path(), &tree, &[], "cannot find the recipe's description: the recipe is empty");
    write(&tree, "config.xnl", "<image/>");
    write(&tree, "root/etc/motd", "");
    refused(dir.path(), &tree, &[], "the recipe has no config.xml and no *.kiwi; at its top it has config.xnl, root");
    write(&tree, "a.kiwi", "<image/>");
    write(&tree, "b.kiwi", "<image/>");
    refused(dir.path(), &tree, &[], "the recipe has several descriptions: a.kiwi, b.kiwi");
    write(&tree, "config.xml", "<image><repository></image>");
    refused(dir.path(), &tree, &[], "cannot read config.xml of the recipe: it is not XML");
}

#[test]
fn recipe_is_closed_and_gives_no_rights_whatever_its_source_has() {
    let dir = directory();
    let tree = small(dir.path());
    let modes = [
        ("bin/cat", 0o4755),
        ("config.sh", 0o2777),
        ("open", 0o1777),
        ("root/tmp", 0o1777),
        ("root/bin/su", 0o4755),
        ("thin/etc/x", 0o660),
        ("config.xml", 0o666),
        ("", 0o777),
    ];
    write(&tree, "config.xml", "<image><profiles><profile name='thin'/></profiles></image>\n");
    for name in ["bin/cat", "config.sh", "root/bin/su", "thin/etc/x", "open/f", "root/tmp/f"] {
        write(&tree, name, "");
    }
    succeed(Command::new("chown").arg("-R").args(["1234:1234"]).arg(&tree));
    for (name, mode) in modes {
        std::fs::set_permissions(tree.join(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    let capable = ["cap_net_raw=ep"];
    for name in ["config.sh", "root/bin/su"] {
        succeed(Command::new("/usr/sbin/setcap").args(capable).arg(tree.join(name)));
    }
    let file = archive(&tree, "a.tgz", &["-z", "--xattrs", "--xattrs-include=*"]);
    let outer = dir.path().join("outer");
    std::fs::create_dir(&outer).unwrap();
    succeed(Command::new("cp").arg("-a").arg(&tree).arg(outer.join("main")));
    for (number, source) in [&file, &tree, &outer].into_iter().enumerate() {
        let to = dir.path().join(format!("recipe-{number}"));
        let output = fetch(&to, source.to_str().unwrap(), &["--set", "MIRROR=x"], &[]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let others = ["!", "-uid", "0", "-o", "!", "-gid", "0"];
        assert_eq!(succeed(Command::new("find").arg(&to).args(others)), "", "{}", source.display());
        let found = modes.map(|(name, _)| to.join(name).metadata().unwrap().permissions().mode() & 0o7777);
        assert_eq!(found.map(|mode| format!("{mode:o}")), ["755", "755", "755", "1777", "4755", "660", "644", "700"]);
        let capabilities = |name: &str| succeed(Command::new("/usr/sbin/getcap").arg(to.join(name)));
        assert_eq!(capabilities("config.sh"), "");
        assert!(capabilities("root/bin/su").contains("cap_net_raw"));
    }
}

#[test]
fn place_that_another_user_can_change_is_refused() {
    let dir = directory();
    let tree = small(dir.path());
    let theirs = dir.path().join("theirs");
    std::fs::create_dir(&theirs).unwrap();
    std::os::unix::fs::chown(&theirs, Some(1234), None).unwrap();
    let output = fetch(&theirs.join("recipe"), tree.to_str().unwrap(), &["--set", "MIRROR=x"], &[]);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains("belongs to user 1234, who can replace what is there; name one in"), "{said}");
    assert_eq!(std::fs::read_dir(&theirs).unwrap().count(), 0);
}

#[test]
fn template_that_is_listed_twice_is_filled_in_once() {
    let dir = directory();
    let tree = small(dir.path());
    std::fs::hard_link(tree.join("config.xml"), tree.join("linked")).unwrap();
    let list = "template_files: [config.xml, config.xml, ./config.xml, linked]\n";
    write(&tree, ".ims_recipe_template.yaml", list);
    let to = dir.path().join("recipe");
    let output = fetch(&to, tree.to_str().unwrap(), &["--set", "MIRROR={{ NAME }}", "--set", "NAME=x"], &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(content(&to, "config.xml").contains("path='{{ NAME }}'"), "{}", content(&to, "config.xml"));
}
