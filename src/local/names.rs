//! Names by which people and machines know an image.

use crate::transfer::without_query;

/// Maximum length of a label of a host name (RFC 1123).
pub(crate) const LONGEST: usize = 63;

/// Extensions of a source's file name that are not part of the image's name.
const ENDINGS: [&str; 13] =
    ["gz", "xz", "zst", "zstd", "tgz", "txz", "tar", "cpio", "sqsh", "sqfs", "squashfs", "img", "oci"];

/// File names that do not distinguish images; the directory above gives the name instead.
const COMMON: [&str; 2] = ["rootfs", "image-root"];

/// Name of the image in `source`, a path or a URL: the file name without extensions.
pub fn of_source(source: &str) -> String {
    let source = without_query(source);
    let absolute = std::path::absolute(&source).map_or_else(|_| source.clone(), |path| path.display().to_string());
    let path = source.split_once("://").map_or(absolute.as_str(), |(_, path)| path);
    let mut names = path.rsplit('/').filter(|name| !["", ".", ".."].contains(name)).map(without_endings);
    let name = names.next().unwrap_or("image");
    let name = names.next().filter(|_| COMMON.contains(&name)).unwrap_or(name);
    // The name becomes a directory of a store, which must not be a hidden one.
    match name.trim_start_matches('.') {
        "" => "image".into(),
        name => name.replace(|c: char| c.is_control(), "_"),
    }
}

fn without_endings(mut name: &str) -> &str {
    while let Some((before, ending)) = name.rsplit_once('.')
        && !before.is_empty()
        && ENDINGS.contains(&ending)
    {
        name = before;
    }
    name
}

/// Turns `name` into a label of a host name: lower-case letters, digits and hyphens.
pub fn host_label(name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let mut label = words.collect::<Vec<_>>().join("-").to_ascii_lowercase();
    label.truncate(LONGEST);
    match label.trim_end_matches('-') {
        "" => "image".into(),
        label => label.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_source_is_named_after_its_file_or_the_directory_of_a_common_file_name() {
        for (source, name) in [
            ("/srv/compute-1.2.sqsh", "compute-1.2"),
            ("/srv/.hidden/rootfs", "hidden"),
            ("./SLES 15.tar.gz", "SLES 15"),
            ("image.sqsh", "image"),
            ("/image-root/", "image-root"),
            ("/srv/debian/image-root", "debian"),
            ("./out/compute/rootfs", "compute"),
            ("https://s3.example/boot-images/46a2731e-a1d0/rootfs?X-Amz-Signature=secret", "46a2731e-a1d0"),
            ("s3://boot-images/gold.squashfs", "gold"),
            (".hidden.tar", "hidden"),
            ("/", "image"),
            ("two\nlines", "two_lines"),
        ] {
            assert_eq!(of_source(source), name, "{source}");
        }
        for (name, label) in
            [("compute-1.2", "compute-1-2"), ("SLES 15", "sles-15"), (".hidden", "hidden"), ("größe", "gr-e")]
        {
            assert_eq!(host_label(name), label);
        }
    }

    proptest! {
        #[test]
        fn every_label_is_valid_in_a_host_name(name in "\\PC{0,100}") {
            let label = host_label(&name);
            prop_assert!((1..=LONGEST).contains(&label.len()));
            prop_assert!(label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            prop_assert!(!label.starts_with('-') && !label.ends_with('-'));
        }
    }
}
