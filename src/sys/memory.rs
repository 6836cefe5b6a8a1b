//! Memory that this process may use.

use std::fs::read_to_string;
use std::path::Path;

/// Memory controllers of cgroups v2 and v1: directory of the hierarchy, file of the limit.
const CONTROLLERS: [(&str, &str); 2] =
    [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")];

/// Memory available to this process, in bytes: the smallest limit of its control groups, or the machine's memory.
/// `None` if neither can be read.
pub(crate) fn available() -> Option<u64> {
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let meminfo = read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo.split_whitespace().nth(1).and_then(|kilobytes| kilobytes.parse::<u64>().ok());
    limits(&groups, |file| read_to_string(file).ok()).chain(total.map(|kilobytes| kilobytes << 10)).min()
}

/// Limits of the groups in `groups` (the text of /proc/PID/cgroup) and of those above them. A container sees its own
/// group at the top of the hierarchy, whatever that text says, so the top is always read.
fn limits(groups: &str, read: impl Fn(&Path) -> Option<String>) -> impl Iterator<Item = u64> {
    let mut found = Vec::new();
    for line in groups.lines().chain([":memory:/", "::/"]) {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let (top, file) = match controllers {
            "" => CONTROLLERS[0],
            _ if controllers.split(',').any(|controller| controller == "memory") => CONTROLLERS[1],
            _ => continue,
        };
        for group in Path::new(group.trim_start_matches('/')).ancestors() {
            found.extend(read(&Path::new(top).join(group).join(file)).and_then(|text| text.trim().parse::<u64>().ok()));
        }
    }
    found.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_of_the_own_group_and_of_all_above() {
        type Files = &'static [(&'static str, &'static str)];
        let tells = |present: Files| {
            move |file: &Path| {
                let found = present.iter().find(|(name, _)| Path::new(name) == file);
                found.map(|(_, text)| (*text).to_owned())
            }
        };
        let cases: [(&str, Files, &[u64]); 5] = [
            ("0::/a/b\n", &[("/sys/fs/cgroup/a/memory.max", "7\n"), ("/sys/fs/cgroup/a/b/memory.max", "max\n")], &[7]),
            ("4:memory:/x\n0::/\n", &[("/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "9\n")], &[9]),
            ("4:memory:/docker/1\n", &[("/sys/fs/cgroup/memory/memory.limit_in_bytes", "5\n")], &[5, 5]),
            ("", &[("/sys/fs/cgroup/memory.max", "3\n")], &[3]),
            ("9:cpu,cpuacct:/x\nnonsense\n", &[("/sys/fs/cgroup/x/memory.max", "3\n")], &[]),
        ];
        for (groups, present, expected) in cases {
            assert_eq!(limits(groups, tells(present)).collect::<Vec<_>>(), expected, "{groups}");
        }
        assert!(available().is_some_and(|bytes| bytes > 1 << 20));
    }
}
