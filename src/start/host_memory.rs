//! Host memory that a rank may plan with: what the machine and the control groups around the process leave, less a
//! reserve.

use std::path::{Path, PathBuf};

/// The rest of the system may come to need this much while a run lasts, and this share of what is available.
const SYSTEM_BYTES: usize = 256 << 20;
const SYSTEM_SHARE: usize = 64;

/// Returns a rank's share of `available` bytes of a machine with `local_size` ranks. The system's reserve goes off
/// first, and then what saving takes on each rank. Memory that a rank already holds, for its tokenized rows above
/// all, is not available any more.
pub fn share(available: usize, local_size: usize, saving_bytes: usize) -> usize {
    let reserve = (SYSTEM_BYTES + available / SYSTEM_SHARE).min(available / 2);
    ((available - reserve) / local_size.max(1)).saturating_sub(saving_bytes)
}

/// Returns MemAvailable, or what the control groups leave where that is less. Without /proc there is no limit to look
/// for.
pub fn available_bytes() -> usize {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let meminfo = text("/proc/meminfo");
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let available = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<usize>().ok());
    let groups = groups(&text("/proc/self/cgroup"), &text("/proc/self/mountinfo"));
    let left = groups.iter().filter_map(Group::bytes_left).min().unwrap_or(usize::MAX);
    available.map_or(usize::MAX, |kib| kib * 1024).min(left)
}

/// The control group of this process in one hierarchy that limits memory.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    version: Version,
    /// The place where the hierarchy, or the part of it that is seen from here, is mounted.
    mount: PathBuf,
    path: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// Returns the groups that limit memory, from /proc/self/cgroup (`0::/path`, or `4:memory:/path` in version 1;
/// cgroups(7)) and /proc/self/mountinfo (proc_pid_mountinfo(5)).
fn groups(cgroup: &str, mountinfo: &str) -> Vec<Group> {
    let of_line = |line: &str| -> Option<Group> {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let version = match controllers {
            "" => Version::V2,
            list if list.split(',').any(|controller| controller == "memory") => Version::V1,
            _ => return None,
        };
        let (root, mount) = mountinfo.lines().find_map(|line| mounted(line, version))?;
        // A container may see its own group as the root of the mount, under a path that is not below that root.
        let path = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
        Some(Group { version, path: mount.join(path), mount })
    };
    cgroup.lines().filter_map(of_line).collect()
}

/// Returns root and place of a mount, if it is a hierarchy that limits memory.
fn mounted(line: &str, version: Version) -> Option<(&str, PathBuf)> {
    let (before, after) = line.split_once(" - ")?;
    let (mut before, mut after) = (before.split(' ').skip(3), after.split(' '));
    let (root, place) = (before.next()?, before.next()?);
    let (kind, options) = (after.next()?, after.nth(1)?);
    let fits = match version {
        Version::V2 => kind == "cgroup2",
        Version::V1 => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
    };
    fits.then(|| (root, PathBuf::from(place)))
}

impl Group {
    /// Returns what the limits of this group and of those around it leave, or `None` without a limit. Page cache can
    /// be given back.
    fn bytes_left(&self) -> Option<usize> {
        let Group { version, mount, path } = self;
        path.ancestors().take_while(|p| p.starts_with(mount)).filter_map(|p| bytes_left(*version, p)).min()
    }
}

fn bytes_left(version: Version, path: &Path) -> Option<usize> {
    let number = |file: &str| -> Option<usize> { std::fs::read_to_string(path.join(file)).ok()?.trim().parse().ok() };
    let stat = std::fs::read_to_string(path.join("memory.stat")).unwrap_or_default();
    let of = |name: &str| -> Option<usize> {
        stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
    };
    // Shared memory counts as file, and stays. The totals of version 1 include the groups below.
    let (limit, used, cache, shared) = match version {
        Version::V2 => (number("memory.max")?, number("memory.current")?, of("file"), of("shmem")),
        Version::V1 => {
            let limit = number("memory.limit_in_bytes")?;
            // Groups further out than what is mounted count here.
            let limit = limit.min(of("hierarchical_memory_limit").unwrap_or(limit));
            (limit, number("memory.usage_in_bytes")?, of("total_cache"), of("total_shmem"))
        }
    };
    let cache = cache.unwrap_or(0).saturating_sub(shared.unwrap_or(0));
    Some(limit.saturating_sub(used.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "31 24 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";

    fn write(path: &Path, files: &[(&str, &str)]) {
        std::fs::create_dir_all(path).unwrap();
        files.iter().for_each(|(name, text)| std::fs::write(path.join(name), text).unwrap());
    }

    #[test]
    fn the_groups_of_both_versions_are_found() {
        let v1 = "34 25 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                  36 25 0:32 /docker/ab /sys/fs/cgroup/memory rw shared:9 master:2 - cgroup cgroup rw,memory\n";
        let group = |version, mount: &str, path: &str| Group { version, mount: mount.into(), path: path.into() };
        assert_eq!(groups("0::/job/step\n", V2), [group(Version::V2, "/sys/fs/cgroup", "/sys/fs/cgroup/job/step")]);
        let lines = "9:cpu,cpuacct:/x\n4:memory:/docker/ab/c\n1:name=systemd:/y\n";
        let memory = "/sys/fs/cgroup/memory";
        assert_eq!(groups(lines, v1), [group(Version::V1, memory, "/sys/fs/cgroup/memory/c")]);
        assert_eq!(groups("4:memory:/elsewhere\n", v1), [group(Version::V1, memory, memory)]);
        let hybrid = format!("{lines}0::/job\n");
        assert_eq!(groups(&hybrid, &format!("{v1}{V2}")).len(), 2);
        assert_eq!(groups("0::/\n", ""), []);
    }

    #[test]
    fn the_tightest_group_around_the_process_counts() {
        let root = tempfile::tempdir().unwrap();
        let group = |version, name: &str| {
            let mount = root.path().join(name);
            Group { version, path: mount.join("job/step"), mount }
        };
        let v2 = group(Version::V2, "v2");
        assert_eq!(v2.bytes_left(), None, "no limit is set");
        let step = [("memory.max", "max"), ("memory.current", "5"), ("memory.stat", "anon 1\nfile 0\n")];
        write(&v2.path, &step);
        let stat = "anon 1\nfile_mapped 7\nfile 14\nshmem 4\n";
        write(v2.path.parent().unwrap(), &[("memory.max", "100"), ("memory.current", "30"), ("memory.stat", stat)]);
        assert_eq!(v2.bytes_left(), Some(100 - (30 - (14 - 4))));

        let v1 = group(Version::V1, "v1");
        let unlimited = [("memory.limit_in_bytes", "9223372036854771712"), ("memory.usage_in_bytes", "50")];
        write(&v1.path, &unlimited);
        let stat = "cache 1\nhierarchical_memory_limit 9223372036854771712\ntotal_cache 22\ntotal_shmem 2\n";
        let job = [("memory.limit_in_bytes", "200"), ("memory.usage_in_bytes", "80"), ("memory.stat", stat)];
        write(v1.path.parent().unwrap(), &job);
        assert_eq!(v1.bytes_left(), Some(200 - (80 - 20)));
        write(&v1.path, &[("memory.stat", "hierarchical_memory_limit 90\n")]);
        assert_eq!(v1.bytes_left(), Some(40), "a limit of a group that is not mounted");
    }

    #[test]
    fn the_system_and_saving_have_their_reserve() {
        let gib = 1 << 30;
        let alone = share(64 * gib, 1, 0);
        assert!(alone < 63 * gib && alone > 62 * gib, "{alone}");
        assert_eq!(share(64 * gib, 2, gib), alone / 2 - gib);
        assert_eq!(share(1 << 20, 1, gib), 0, "saving takes more than there is");
        assert!(share(1 << 20, 1, 0) == 1 << 19 && share(usize::MAX, 1, 0) > usize::MAX / 2);
    }
}
