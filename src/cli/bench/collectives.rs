//! `bench collectives`: bus bandwidth of what the schedule uses, as nccl-tests defines it: the bytes that cross the
//! busiest link over the time, in which the slot is cleared first, as in a step.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::json;

use super::buffer;
use crate::comm::cuda_queue::{CudaQueue, QueueOptions};
use crate::comm::guarded::Guarded;
use crate::comm::host_queue::HostQueue;
use crate::comm::mpi::MpiComm;
use crate::comm::{Delays, Gather, Queue, ShardSource, TrainableBuffers};
use crate::device::cuda::{Cuda, HalfType};
use crate::device::{Ops, Place};
use crate::recipe::{self, Command, ComputeDtype};
use crate::start::Start;
use crate::start::agree::agree_on;
use crate::start::placement::Placement;

#[derive(Args)]
pub struct CollectiveBench {
    /// Bytes of a rank's shard of the largest all-gather, in MiB; smaller ones come first
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1024))]
    max_mib: u32,
}

const REPEATS: usize = 5;

pub fn run(start: &Start, mut comm: MpiComm, args: &CollectiveBench, overrides: &[String]) -> Result<()> {
    agree_on(&mut comm, recipe::from_options(Command::BenchCollectives, Vec::new(), overrides)?)?;
    ensure!(start.world.world_size > 1, "bench collectives: one rank; start several, e.g. mpirun -np 2");
    match start.place(&mut comm, ComputeDtype::Auto)? {
        Placement::Cpu(cpu) => {
            let queue = HostQueue::new(comm.into_groups(start.world.world_size)?, Delays::default())?;
            all_sizes(start, args, &cpu, queue)
        }
        Placement::Bf16(cuda, _) => on_gpu(start, args, cuda, comm),
        Placement::Fp16(cuda, _) => on_gpu(start, args, cuda, comm),
    }
}

fn on_gpu<A: HalfType>(start: &Start, args: &CollectiveBench, cuda: Cuda<A>, comm: MpiComm) -> Result<()> {
    let max_gradients = (args.max_mib as usize) << 18;
    let options = QueueOptions { max_gradients, share_gpu: start.ranks_per_gpu > 1, delays: Delays::default() };
    let queue = CudaQueue::new(cuda.clone(), comm.into_groups(start.world.world_size)?, options)?;
    all_sizes(start, args, &cuda, queue)
}

fn all_sizes<D: Ops, Q: Queue<D>>(start: &Start, args: &CollectiveBench, device: &D, mut queue: Q) -> Result<()> {
    let world_size = queue.world_size();
    let mut mib = 1;
    while mib <= args.max_mib as usize {
        let bytes = mib << 20;
        let shard =
            queue.store(vec![ShardSource::ready(Arc::new(vec![7u8; bytes]))], &[true], Gather::Collective)?.remove(0);
        let mut slot = Some(buffer::<D, u8>(device, bytes * world_size)?);
        let seconds = median(device, || {
            let pending = queue.gather_frozen("all-gather".into(), &shard, slot.take().expect("waited for"))?;
            slot = Some(queue.wait(pending)?);
            Ok(())
        })?;
        tell(start, "all_gather", bytes * world_size, seconds, world_size);
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
        tell(start, "reduce_scatter", part * world_size * 4, seconds, world_size);
        mib *= 4;
    }
    // The other ranks end when rank 0 has told all.
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
    // The first connects ranks.
    times.remove(0);
    times.sort_by(f64::total_cmp);
    Ok(times[REPEATS / 2])
}

fn tell(start: &Start, name: &str, bytes: usize, seconds: f64, world_size: usize) {
    if start.log.enabled {
        let bus = bytes as f64 * (world_size - 1) as f64 / world_size as f64 / seconds * 1e-9;
        let (ms, ranks) = (seconds * 1e3, world_size);
        println!("{}", json!({"collective": name, "ranks": ranks, "bytes": bytes, "ms": ms, "bus_gb_per_s": bus}));
    }
}
