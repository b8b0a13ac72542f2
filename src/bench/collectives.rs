//! Bus bandwidth of the collectives that the schedule uses, as nccl-tests defines it: the bytes that cross the busiest
//! link, divided by the time. The slot is cleared within that time, as it is in a step.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::buffer;
use crate::comm::cuda_queue::{CudaQueue, QueueOptions};
use crate::comm::guarded::Guarded;
use crate::comm::host_queue::HostQueue;
use crate::comm::mpi::MpiComm;
use crate::comm::{Delays, Gather, Queue, ShardSource, TrainableBuffers};
use crate::device::cuda::{Cuda, HalfType};
use crate::device::{Ops, Place};
use crate::recipe::ComputeDtype;
use crate::start::Start;
use crate::start::placement::Placement;

/// Timed calls, of which the median counts.
const REPEATS: usize = 5;

/// Measures all-gathers of shards of 1 MiB to `max_mib`, and the reduce-scatters beside them. Gives `tell` one object
/// for each size and collective, on rank 0. Collective.
pub fn run(start: &Start, mut comm: MpiComm, max_mib: usize, tell: &impl Fn(Value)) -> Result<()> {
    ensure!(start.world.world_size > 1, "bench collectives: one rank; start several, e.g. mpirun -np 2");
    match start.place(&mut comm, ComputeDtype::Auto)? {
        Placement::Cpu(cpu) => {
            let queue = HostQueue::new(comm.into_groups(start.world.world_size)?, Delays::default())?;
            all_sizes(start, max_mib, &cpu, queue, tell)
        }
        Placement::Bf16(cuda, _) => on_gpu(start, max_mib, cuda, comm, tell),
        Placement::Fp16(cuda, _) => on_gpu(start, max_mib, cuda, comm, tell),
    }
}

fn on_gpu<A: HalfType>(
    start: &Start,
    max_mib: usize,
    cuda: Cuda<A>,
    comm: MpiComm,
    tell: &impl Fn(Value),
) -> Result<()> {
    let max_gradients = max_mib << 18;
    let options = QueueOptions { max_gradients, share_gpu: start.ranks_per_gpu > 1, delays: Delays::default() };
    let queue = CudaQueue::new(cuda.clone(), comm.into_groups(start.world.world_size)?, options)?;
    all_sizes(start, max_mib, &cuda, queue, tell)
}

fn all_sizes<D: Ops, Q: Queue<D>>(
    start: &Start,
    max_mib: usize,
    device: &D,
    mut queue: Q,
    tell: &impl Fn(Value),
) -> Result<()> {
    let world_size = queue.world_size();
    let rate = |name: &str, bytes: usize, seconds: f64| {
        if start.log.enabled {
            let bus = bytes as f64 * (world_size - 1) as f64 / world_size as f64 / seconds * 1e-9;
            let ms = seconds * 1e3;
            tell(json!({"collective": name, "ranks": world_size, "bytes": bytes, "ms": ms, "bus_gb_per_s": bus}));
        }
    };
    let mut mib = 1;
    while mib <= max_mib {
        let bytes = mib << 20;
        let shard =
            queue.store(vec![ShardSource::ready(Arc::new(vec![7u8; bytes]))], &[true], Gather::Collective)?.remove(0);
        let mut slot = Some(buffer::<D, u8>(device, bytes * world_size)?);
        let seconds = median(device, || {
            let pending = queue.gather_frozen("all-gather".into(), &shard, slot.take().expect("waited for"))?;
            slot = Some(queue.wait(pending)?);
            Ok(())
        })?;
        rate("all_gather", bytes * world_size, seconds);
        // The reduce-scatter's whole buffer is as large as one shard of the all-gather.
        let part = bytes / 4 / world_size;
        let mut buffers = Some(TrainableBuffers {
            shard: Guarded::new(Place::Device(buffer::<D, f32>(device, part)?)),
            full: buffer(device, part * world_size)?,
        });
        let seconds = median(device, || {
            let pending = queue.reduce("reduce-scatter".into(), buffers.take().expect("waited for"))?;
            buffers = Some(queue.wait(pending)?);
            Ok(())
        })?;
        rate("reduce_scatter", part * world_size * 4, seconds);
        mib *= 4;
    }
    // No rank ends before rank 0 has told everything.
    queue.all_gather_f64("end", &[0.0]).map(drop)
}

fn median<D: Ops>(device: &D, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..=REPEATS {
        let start = Instant::now();
        call()?;
        device.synchronize()?;
        times.push(start.elapsed().as_secs_f64());
    }
    // The first call connects the ranks.
    times.remove(0);
    times.sort_by(f64::total_cmp);
    Ok(times[REPEATS / 2])
}
