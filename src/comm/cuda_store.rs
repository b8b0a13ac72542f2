//! Where the frozen shards of a rank wait on a machine with GPUs: on the device, or in pinned host memory.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;

use super::{Comm, Gather, ShardSource, anywhere, barrier, node};
use crate::device::cpu::Cpu;
use crate::device::cuda::{Cuda, HalfType};
use crate::device::{Arena, Buffer, Device, HostBuffer, MemoryPlan, Place};

/// Bytes that one thread copies at a time.
const COPY_BYTES: usize = 1 << 20;

/// Bytes of a rank that go to the others in one message.
const GATHER_BYTES: usize = 16 << 20;

/// A unit of the base, as a rank has it.
pub enum Stored<A: HalfType> {
    /// This rank's shard; the others' come by NCCL.
    Shard(Place<Cuda<A>, u8>),
    /// All shards, in memory that the ranks of the node share.
    Node(Vec<HostBuffer<u8>>),
    /// All shards, one after the other.
    Whole(Buffer<Cuda<A>, u8>),
}

/// All units, and what they take.
pub struct Store<A: HalfType> {
    pub units: Vec<Stored<A>>,
    pub device_bytes: usize,
    /// Without what the other ranks have made.
    pub host_bytes: usize,
}

/// Resident shards go to the GPU, the others to pinned memory; either way the mapped file is let go. Collective over the ranks that
/// hold the base.
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
    let mut host = host_arenas(cuda, comm, on_host, gather).context("shards in pinned host memory")?;
    let own = if gather == Gather::Host { comm.rank() } else { 0 };
    let mut units = Vec::new();
    for (i, shard) in shards.into_iter().enumerate() {
        let (expected, shard) = (shard.bytes, shard.take(i)?);
        let bytes = (*shard).as_ref();
        units.push(match (resident[i], gather) {
            (true, Gather::Collective) => {
                let mut stored = device.carve(&name(i), expected)?;
                cuda.upload(stored.view_mut(), bytes)?;
                Stored::Shard(Place::Device(stored))
            }
            (true, Gather::Host) => {
                let mut stored = device.carve(&name(i), expected * comm.world_size())?;
                let mut at = 0;
                for part in bytes.chunks(GATHER_BYTES) {
                    let mut all = vec![0; part.len() * comm.world_size()];
                    comm.all_gather(part, &mut all)?;
                    for (rank, part) in all.chunks_exact(part.len()).enumerate() {
                        let begin = rank * expected + at;
                        cuda.upload(stored.view_mut().into_range(begin..begin + part.len()), part)?;
                    }
                    at += part.len();
                }
                Stored::Whole(stored)
            }
            (false, _) => {
                let mut stored = node::carve(&mut host, &name(i), expected)?;
                let parts = stored[own].view_mut().host_mut().par_chunks_mut(COPY_BYTES);
                parts.zip(bytes.par_chunks(COPY_BYTES)).for_each(|(to, from)| to.copy_from_slice(from));
                match gather {
                    Gather::Collective => Stored::Shard(Place::Host(stored.remove(0))),
                    Gather::Host => Stored::Node(stored),
                }
            }
        });
        shard.let_go();
    }
    // Nobody reads what another rank has not written yet.
    barrier(comm)?;
    Ok(Store { units, device_bytes, host_bytes })
}

fn name(unit: usize) -> String {
    format!("shards/{unit}")
}

/// Pinned memory for a plan: this rank's own, or that of every rank of the node.
fn host_arenas<A: HalfType>(
    cuda: &Cuda<A>,
    comm: &mut dyn Comm,
    plan: MemoryPlan,
    gather: Gather,
) -> Result<Vec<Arena<Cpu>>> {
    match gather {
        _ if plan.total_bytes() == 0 => Ok(Vec::new()),
        Gather::Collective => Ok(vec![Arena::allocate_host(cuda, plan)?]),
        Gather::Host => node::arenas(cuda, comm, &plan),
    }
}

/// Bytes of a rank, and repeats, where ways to gather are measured.
pub const PROBE_BYTES: usize = 32 << 20;
pub const PROBES: usize = 3;

/// How fast units come from memory that the ranks of the node share, in bytes a second: all ranks at once. Collective; an error is
/// one on all ranks.
pub fn host_bytes_per_s<A: HalfType>(cuda: &Cuda<A>, comm: &mut dyn Comm) -> Result<f64> {
    let mut plan = MemoryPlan::default();
    plan.push("probe", PROBE_BYTES);
    let buffers = node::arenas(cuda, comm, &plan).and_then(|mut arenas| {
        let out = Arena::carved(cuda, |arena| arena.carve::<u8>("probe", PROBE_BYTES))?;
        Ok((node::carve(&mut arenas, "probe", PROBE_BYTES)?, out))
    });
    let failed = anywhere(comm, buffers.is_err())?;
    let (shards, mut out) = buffers?;
    ensure!(!failed, "another rank of this node cannot pin shared memory");
    let start = Instant::now();
    let mut probes = (0..PROBES).flat_map(|_| &shards);
    let fetched = probes.try_for_each(|shard| cuda.fetch_on(cuda.compute(), out.view_mut(), shard.view()));
    let fetched = fetched.and_then(|()| cuda.synchronize());
    let seconds = start.elapsed().as_secs_f64();
    // The others' memory stays until they are done with it.
    barrier(comm)?;
    fetched.map(|()| (PROBES * shards.len() * PROBE_BYTES) as f64 / seconds)
}
