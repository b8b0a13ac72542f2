//! The memory that a rank may take, and the decision where each part of a run is kept. All ranks decide alike, since
//! only the least that any of them has counts.

use anyhow::Result;

use crate::checkpoint::adapter::Adapter;
use crate::comm::cuda_queue::{CudaQueue, Rates};
use crate::comm::{Comm, Gather, Queue, all_gather_u64};
use crate::device::Device;
use crate::device::cpu::Cpu;
use crate::device::cuda::{CONTEXT_BYTES, Cuda, HalfType, LIBRARY_BYTES};
use crate::fsdp::memory::Limits;
use crate::plan::decide::Budget;
use crate::plan::hardware::Hardware;
use crate::plan::memory::Sizes;
use crate::plan::throughput::{Links, Workload};
use crate::plan::wishes::{KeepRange, Wishes};
use crate::recipe::Job;

use super::options::{possible_gather, wishes};
use super::{Start, host_memory};

/// The rate that is assumed between nodes when choices are weighed: 10 Gbit/s.
const NETWORK_BYTES_PER_S: f64 = 1.25e9;

/// A run for which it is not decided yet what is kept where.
pub struct Undecided<'a> {
    pub sizes: Sizes<'a>,
    pub adapter: Option<&'a Adapter>,
    /// Everything but what is kept and where.
    pub limits: Limits,
    pub job: &'a Job,
}

impl Undecided<'_> {
    /// Decides for ranks on the host's cores, where what is kept must leave room for everything else that the machine
    /// does. Collective.
    pub fn decide_on_cpu(&self, start: &Start, comm: &mut dyn Comm) -> Result<Limits> {
        let Undecided { sizes, limits, job, .. } = *self;
        let hardware = Hardware::of_a_core();
        let mut wishes = wishes(job, start.world.world_size);
        let in_a_node = start.world.fits_a_node(sizes.num_shards());
        wishes.gather = possible_gather(&job.fsdp, sizes.num_shards(), in_a_node)?.or(Some(Gather::Collective));
        let shares = all_gather_u64(comm, self.host_budget(start) as u64)?;
        let share = shares.into_iter().min().map_or(0, |share| share as usize);
        let budget = Budget { device: job.fsdp.vram_budget.unwrap_or(share), host: share };
        let keeps = Limits { keep: wishes.keep.most, ..limits };
        if wishes.keep == KeepRange::ANY && sizes.cost::<Cpu>(&keeps)?.device_bytes() > budget.device / 4 {
            wishes.keep = KeepRange::AT_MOST_LORA;
        }
        let links = Links::new(&hardware, true, true, NETWORK_BYTES_PER_S);
        let workload = Workload { sizes, act: Cpu::ACT, hardware: &hardware, links };
        workload.decide::<Cpu>(limits, &wishes, budget)
    }

    /// Decides for ranks on GPUs. `free_before` is what the GPU had free before any rank made its queue. Collective.
    pub fn decide_on_gpu<A: HalfType>(
        &self,
        start: &Start,
        cuda: &Cuda<A>,
        queue: &mut CudaQueue<A>,
        free_before: usize,
    ) -> Result<Limits> {
        let Undecided { sizes, limits, job, .. } = *self;
        let ranks = start.ranks_per_gpu.min(start.world.local_size);
        let (card, is_known) = Hardware::of_device(&cuda.name()?)?;
        if !is_known {
            start.log.line(format!(
                "plan: choices are weighed with the rates of a guess, {}, as this card is unknown",
                card.name
            ));
        }
        let mut hardware = card.shared_by(ranks);
        let gather = self.gathers(start, queue, &mut hardware)?;
        let wishes = Wishes { gather, ..wishes(job, start.world.world_size) };
        // No rank looks before all of them have their queues.
        queue.all_gather_f64("start", &[0.0])?;
        let free = cuda.free_bytes()?;
        let taken = CONTEXT_BYTES + LIBRARY_BYTES + free_before.saturating_sub(free) / ranks;
        let free = free.saturating_sub(ranks * LIBRARY_BYTES) / ranks;
        let device = job.fsdp.vram_budget.map_or(free, |budget| budget.saturating_sub(taken).min(free));
        // The plan counts the buffers that the queue has taken.
        let mut budget = Budget { device: device + queue.device_bytes(), host: self.host_budget(start) };
        least_of_all(queue, &mut budget, &mut hardware)?;
        let fits_a_node = |ranks| start.world.fits_a_node(ranks);
        let (base_in_a_node, one_node) = (fits_a_node(sizes.num_shards()), fits_a_node(start.world.world_size));
        let links = Links::new(&hardware, base_in_a_node, one_node, NETWORK_BYTES_PER_S);
        let workload = Workload { sizes, act: A::DTYPE, hardware: &hardware, links };
        let limits = workload.decide::<Cuda<A>>(limits, &wishes, budget)?;
        if gather.is_none() {
            start.log.line(format!("gather: {} is taken", limits.gather.word()));
        }
        Ok(limits)
    }

    /// Returns the only possible way to gather, or `None` where both are possible: then both have been measured, and
    /// their rates are in `hardware`. Collective.
    fn gathers<A: HalfType>(
        &self,
        start: &Start,
        queue: &mut CudaQueue<A>,
        hardware: &mut Hardware,
    ) -> Result<Option<Gather>> {
        let num_shards = queue.position().num_shards;
        if let Some(gather) = possible_gather(&self.job.fsdp, num_shards, start.world.fits_a_node(num_shards))? {
            start.log.line(format!(
                "plan: {:.0} GB/s between host and GPU is assumed; it is measured where ranks gather from each other and fsdp.gather is auto",
                hardware.host_bytes_per_s * 1e-9
            ));
            return Ok(Some(gather));
        }
        let Rates { nccl, host } = queue.measure_gathers()?;
        hardware.peer_bytes_per_s = nccl;
        let host = match host {
            Ok(host) => host,
            Err(why) => {
                start.log.line(format!("gather: NCCL, {:.1} GB/s; not from shared host memory: {why}", nccl * 1e-9));
                return Ok(Some(Gather::Collective));
            }
        };
        hardware.host_bytes_per_s = host;
        start.log.line(format!(
            "gather: NCCL brings {:.1} GB/s to a rank, shared host memory {:.1}",
            nccl * 1e-9,
            host * 1e-9
        ));
        Ok(None)
    }

    /// Returns the host memory of a rank: its share of what is available, less what saving takes, or what the recipe
    /// allows where that is less.
    fn host_budget(&self, start: &Start) -> usize {
        // Saving brings the trained values of all ranks together on each of them.
        let saving_bytes = self.adapter.map_or(0, Adapter::bytes);
        let share = host_memory::share(host_memory::available_bytes(), start.world.local_size, saving_bytes);
        self.job.fsdp.host_budget.map_or(share, |budget| budget.min(share))
    }
}

/// Replaces this rank's memory and rates by the least of all ranks, so that they decide alike. Collective.
fn least_of_all<D: Device, Q: Queue<D>>(queue: &mut Q, budget: &mut Budget, hardware: &mut Hardware) -> Result<()> {
    let Hardware { matrix_flops, memory_bytes_per_s, host_bytes_per_s, peer_bytes_per_s, .. } = hardware;
    let rates = [*matrix_flops, *memory_bytes_per_s, *host_bytes_per_s, *peer_bytes_per_s];
    let own = [&[budget.device as f64, budget.host as f64], &rates[..]].concat();
    let of_ranks = queue.all_gather_f64("memory and rates", &own)?;
    let least = |i: usize| of_ranks.iter().map(|own| own[i]).fold(f64::INFINITY, f64::min);
    *budget = Budget { device: least(0) as usize, host: least(1) as usize };
    (*matrix_flops, *memory_bytes_per_s, *host_bytes_per_s, *peer_bytes_per_s) =
        (least(2), least(3), least(4), least(5));
    Ok(())
}
