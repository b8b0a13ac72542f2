//! Storage of a rank's frozen shards on a machine with GPUs, on the device or in pinned host memory.
#![expect(unsafe_code, reason = "starts copies whose memory the queue keeps")]

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;

use super::node::{Draft, Published};
use super::{Comm, Gather, ShardSource, anywhere, barrier, watch};
use crate::device::cpu::Cpu;
use crate::device::cuda::{Cuda, HalfType};
use crate::device::{Arena, Buffer, Device, MemoryPlan, Place};
use crate::progress;

/// Bytes that one thread copies at a time.
const COPY_BYTES: usize = 1 << 20;

/// Bytes of a rank that go to the others in one message.
const GATHER_BYTES: usize = 16 << 20;

/// A unit of the base as a rank holds it. Only the queue reaches its memory, and nobody writes to it once it is
/// stored.
pub struct Stored<A: HalfType>(pub(super) StoredUnit<A>);

pub(super) enum StoredUnit<A: HalfType> {
    /// This rank's shard; NCCL brings the others.
    Shard(Place<Cuda<A>, u8>),
    /// All shards, in memory that the ranks of the node share.
    Node(Vec<Published<u8>>),
    /// All shards, one after the other.
    Whole(Buffer<Cuda<A>, u8>),
}

/// All units and the memory that they take.
pub struct Store<A: HalfType> {
    pub units: Vec<Stored<A>>,
    pub device_bytes: usize,
    /// Bytes in host memory that this rank allocated; shared memory of other ranks is not counted.
    pub host_bytes: usize,
}

/// Copies resident shards to the GPU and the others to pinned memory, and releases the pages of the mapped files.
/// Collective over the ranks that hold the base.
pub fn store<A: HalfType>(
    cuda: &Cuda<A>,
    comm: &mut dyn Comm,
    shards: Vec<ShardSource>,
    resident: &[bool],
    gather: Gather,
) -> Result<Store<A>> {
    let whole = if gather == Gather::Host { comm.world_size() } else { 1 };
    let plan = |on_device: bool, times: usize| {
        let mut plan = MemoryPlan::default();
        let chosen = shards.iter().enumerate().filter(|(i, _)| resident[*i] == on_device);
        chosen.for_each(|(i, shard)| plan.push(&name(i), shard.bytes * times));
        plan
    };
    let (on_device, on_host) = (plan(true, whole), plan(false, 1));
    let (device_bytes, host_bytes) = (on_device.total_bytes(), on_host.total_bytes());
    let mut device = Arena::allocate(cuda, on_device).context("resident shards")?;
    let mut host = HostMemory::new(cuda, comm, on_host, gather).context("shards in pinned host memory")?;
    // `None` stands for a unit in shared memory until that memory is published.
    let mut units: Vec<Option<StoredUnit<A>>> = Vec::new();
    let num_units = shards.len();
    for (i, shard) in shards.into_iter().enumerate() {
        let (expected, shard) = (shard.bytes, shard.take(i)?);
        let bytes = (*shard).as_ref();
        units.push(match (resident[i], &mut host) {
            (true, _) if gather == Gather::Collective => {
                let mut stored = device.carve(&name(i), expected)?;
                cuda.upload(stored.view_mut(), bytes)?;
                Some(StoredUnit::Shard(Place::Device(stored)))
            }
            (true, _) => {
                let mut stored = device.carve(&name(i), expected * comm.world_size())?;
                gather_to(cuda, comm, bytes, &mut stored)?;
                Some(StoredUnit::Whole(stored))
            }
            (false, HostMemory::Own(arena)) => {
                let mut stored = arena.carve(&name(i), expected)?;
                copy(stored.view_mut().host_mut(), bytes);
                Some(StoredUnit::Shard(Place::Host(stored)))
            }
            (false, HostMemory::Shared(draft)) => {
                copy(draft.carve(&name(i), expected)?, bytes);
                None
            }
            (false, HostMemory::None) => bail!("{} was not planned in host memory", name(i)),
        });
        shard.let_go();
        watch::beat();
        progress::bar("loading", i + 1, num_units, String::new);
    }
    progress::end();
    let mut shared = match host {
        HostMemory::Shared(draft) => draft.publish(comm)?.into_iter(),
        HostMemory::Own(_) | HostMemory::None => {
            barrier(comm)?;
            Vec::new().into_iter()
        }
    };
    let units = units.into_iter().map(|unit| unit.or_else(|| shared.next().map(StoredUnit::Node)));
    let units = units
        .map(|unit| unit.map(Stored))
        .collect::<Option<_>>()
        .context("a shard that is shared was not published")?;
    Ok(Store { units, device_bytes, host_bytes })
}

/// Gathers every rank's shard of a unit into `stored` on the device, one after the other. Collective.
fn gather_to<A: HalfType>(
    cuda: &Cuda<A>,
    comm: &mut dyn Comm,
    shard: &[u8],
    stored: &mut Buffer<Cuda<A>, u8>,
) -> Result<()> {
    let mut at = 0;
    for part in shard.chunks(GATHER_BYTES) {
        let mut all = vec![0; part.len() * comm.world_size()];
        comm.all_gather(part, &mut all)?;
        for (rank, part) in all.chunks_exact(part.len()).enumerate() {
            let begin = rank * shard.len() + at;
            cuda.upload(stored.view_mut().into_range(begin..begin + part.len()), part)?;
        }
        at += part.len();
    }
    Ok(())
}

fn copy(to: &mut [u8], from: &[u8]) {
    to.par_chunks_mut(COPY_BYTES).zip(from.par_chunks(COPY_BYTES)).for_each(|(to, from)| to.copy_from_slice(from));
}

fn name(unit: usize) -> String {
    format!("shards/{unit}")
}

/// Pinned memory for the shards that are not resident.
enum HostMemory {
    /// All shards are resident.
    None,
    Own(Arena<Cpu>),
    /// Memory that all ranks of the node read.
    Shared(Draft),
}

impl HostMemory {
    fn new<A: HalfType>(cuda: &Cuda<A>, comm: &mut dyn Comm, plan: MemoryPlan, gather: Gather) -> Result<HostMemory> {
        match gather {
            _ if plan.total_bytes() == 0 => Ok(HostMemory::None),
            Gather::Collective => Ok(HostMemory::Own(Arena::allocate_host(cuda, plan)?)),
            Gather::Host => Ok(HostMemory::Shared(Draft::new(cuda, comm, &plan)?)),
        }
    }
}

/// Bytes of each rank, and number of repeats, in the measurement of ways to gather.
pub const PROBE_BYTES: usize = 32 << 20;
pub const PROBES: usize = 3;

/// Measures how many bytes per second a rank fetches from memory that the ranks of the node share while all ranks
/// fetch at once. Collective; if one rank fails, all do.
pub fn host_bytes_per_s<A: HalfType>(cuda: &Cuda<A>, comm: &mut dyn Comm) -> Result<f64> {
    let mut plan = MemoryPlan::default();
    plan.push("probe", PROBE_BYTES);
    let shared = Draft::new(cuda, comm, &plan).and_then(|mut draft| {
        draft.carve("probe", PROBE_BYTES)?;
        draft.publish(comm)
    });
    let out = Arena::carved(cuda, |arena| arena.carve::<u8>("probe", PROBE_BYTES));
    let failed = anywhere(comm, shared.is_err() || out.is_err())?;
    let (shared, mut out) = (shared?, out?);
    ensure!(!failed, "another rank of this node has no memory to measure with");
    let shards = &shared[0];
    let start = Instant::now();
    let mut probes = (0..PROBES).flat_map(|_| shards);
    let fetched = probes.try_for_each(|shard| {
        // SAFETY: both buffers live until the stream is synchronized, or the device is idle, below; nobody else
        // reaches them.
        unsafe { cuda.fetch_on(cuda.compute(), out.view_mut(), shard.view()) }
    });
    let fetched = fetched.and_then(|()| cuda.synchronize());
    let seconds = start.elapsed().as_secs_f64();
    // No rank frees its memory before the others have read it.
    barrier(comm)?;
    fetched.map(|()| (PROBES * shards.len() * PROBE_BYTES) as f64 / seconds)
}
