//! Checks room on disks, summed over the ranks that write to the same disk.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{statfs, statvfs};
use xxhash_rust::xxh3::xxh3_64;

use crate::comm::{Comm, all_gather_u64s, anywhere, boot_id};

/// Number of bytes that a rank will write to a folder.
#[derive(Clone, Debug)]
pub struct Want {
    pub dir: PathBuf,
    pub bytes: usize,
}

/// File systems that several machines see as one (statfs(2)): NFS, SMB, CIFS, Ceph, Lustre, GPFS, BeeGFS.
const SHARED_FILE_SYSTEMS: [u64; 7] =
    [0x6969, 0xfe53_4d42, 0xff53_4d42, 0x00c3_6400, 0x0bd0_0bd0, 0x4750_4653, 0x1983_0326];

/// Makes the folders. Fails on all ranks if those that write to one disk need more than is free there. Collective.
pub fn check(comm: &mut dyn Comm, wants: &[Want]) -> Result<()> {
    let own = |want: &Want| Ok([disk(&want.dir)?, free(&want.dir)?, want.bytes as u64]);
    let own: Result<Vec<[u64; 3]>> = wants.iter().map(own).collect();
    let failed = anywhere(comm, own.is_err())?;
    let told = own?.concat();
    ensure!(!failed, "another rank cannot make or look at a folder that it is to write to");
    let of_ranks = all_gather_u64s(comm, &told)?;
    for (disk, Sum { bytes, free, ranks }) in sums(&of_ranks) {
        let Some(own) = told.as_chunks::<3>().0.iter().position(|own| own[0] == disk) else {
            ensure!(bytes <= free, "the disk of another rank has no room: {bytes} bytes are needed, {free} are free");
            continue;
        };
        ensure!(
            bytes <= free,
            "{}: {bytes} bytes are needed on this disk by {ranks} rank(s) together, {free} are free",
            wants[own].dir.display()
        );
    }
    Ok(())
}

/// Bytes that the ranks want of a disk.
#[derive(Debug, PartialEq, Eq)]
struct Sum {
    bytes: u64,
    free: u64,
    ranks: usize,
}

/// Sums by disk, from (disk, free, wanted) of each rank.
fn sums(of_ranks: &[Vec<u64>]) -> BTreeMap<u64, Sum> {
    let mut sums: BTreeMap<u64, Sum> = BTreeMap::new();
    for of_rank in of_ranks {
        let mut seen = Vec::new();
        for want in of_rank.as_chunks::<3>().0 {
            let sum = sums.entry(want[0]).or_insert(Sum { bytes: 0, free: u64::MAX, ranks: 0 });
            (sum.bytes, sum.free) = (sum.bytes.saturating_add(want[2]), sum.free.min(want[1]));
            sum.ranks += usize::from(!seen.contains(&want[0]));
            seen.push(want[0]);
        }
    }
    sums
}

/// Returns a number that identifies a disk: equal on all ranks of a machine, and on several machines for a file
/// system that they share.
fn disk(dir: &Path) -> Result<u64> {
    std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot be created", dir.display()))?;
    let place = || dir.display().to_string();
    let (kind, id) = (statfs(dir).with_context(place)?.f_type as u64, statvfs(dir).with_context(place)?.f_fsid);
    let name = if SHARED_FILE_SYSTEMS.contains(&kind) && id != 0 {
        format!("{kind} {id}")
    } else {
        let device = std::fs::metadata(dir).with_context(place)?.dev();
        format!("{device} {}", boot_id())
    };
    Ok(xxh3_64(name.as_bytes()))
}

fn free(dir: &Path) -> Result<u64> {
    let disk = statvfs(dir).with_context(|| dir.display().to_string())?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::local::LocalComm;

    #[test]
    fn ranks_that_share_a_disk_want_their_sum() {
        let of_ranks = [vec![7, 100, 60, 7, 90, 10], vec![7, 95, 30], vec![], vec![8, 50, 50]];
        let found: Vec<(u64, Sum)> = sums(&of_ranks).into_iter().collect();
        assert_eq!(found[0], (7, Sum { bytes: 100, free: 90, ranks: 2 }));
        assert_eq!(found[1], (8, Sum { bytes: 50, free: 50, ranks: 1 }));
    }

    #[test]
    fn shards_that_fit_alone_and_not_together_are_refused_on_all_ranks() {
        let dir = tempfile::tempdir().unwrap();
        let free = free(dir.path()).unwrap() as usize;
        let on_ranks = |bytes: usize, only_first: bool| -> Vec<Result<()>> {
            std::thread::scope(|scope| {
                let ranks: Vec<_> = LocalComm::world(3)
                    .into_iter()
                    .map(|mut comm| {
                        let want = Want { dir: dir.path().join(format!("rank {}", comm.rank())), bytes };
                        let wants = if only_first && comm.rank() > 0 { Vec::new() } else { vec![want] };
                        scope.spawn(move || check(&mut comm, &wants))
                    })
                    .collect();
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
            })
        };
        assert!(on_ranks(free / 8, false).iter().all(Result::is_ok));
        assert!(on_ranks(free / 8 * 7, true).iter().all(Result::is_ok));
        for result in on_ranks(free / 2, false) {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("on this disk by 3 rank(s) together"), "{error}");
        }
    }
}
