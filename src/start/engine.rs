//! The engine of a run: what is kept where is decided, memory is carved, the adapter's values are loaded, and a
//! subcommand's [`Work`] is done with it, on whichever device.

use anyhow::Result;

use crate::checkpoint::adapter::Adapter;
use crate::comm::cuda_queue::{CudaQueue, QueueOptions};
use crate::comm::host_queue::HostQueue;
use crate::comm::mpi::MpiComm;
use crate::comm::watch::{self, Phase};
use crate::comm::{Delays, Queue, barrier};
use crate::device::cpu::Cpu;
use crate::device::cuda::{Cuda, HalfType};
use crate::device::{MemoryPlan, Ops};
use crate::fsdp::exec::{Base, Engine};
use crate::fsdp::memory::Limits;
use crate::model::trainable::Trainables;
use crate::plan::memory::Sizes;
use crate::recipe::Job;
use crate::train::log::bytes;

use super::Start;
use super::budget::Undecided;
use super::placement::Placement;

/// The parts of an engine.
pub struct Setup<'a> {
    pub comm: MpiComm,
    pub base: Base,
    pub adapter: Option<&'a Adapter>,
    /// Everything but what is kept and where.
    pub limits: Limits,
    pub job: &'a Job,
}

/// Something that a subcommand does with its engine.
pub trait Work {
    type Output;
    fn run<D: Ops, Q: Queue<D>>(self, engine: &mut Engine<D, Q>) -> Result<Self::Output>;
}

impl Start<'_> {
    /// Decides what is kept where, makes the engine, loads the adapter's values, and does the work. Collective.
    pub fn with_engine<W: Work>(&self, placement: Placement, setup: Setup<'_>, work: W) -> Result<W::Output> {
        watch::phase(Phase::Decide)?;
        let lora = setup.adapter.map(|adapter| Trainables::new(&setup.base.spec, adapter.settings.lora_config()));
        match placement {
            Placement::Cpu(cpu) => self.on_cpu(cpu, lora, setup, work),
            Placement::Bf16(cuda, host) => self.on_gpu(cuda, host, lora, setup, work),
            Placement::Fp16(cuda, host) => self.on_gpu(cuda, host, lora, setup, work),
        }
    }

    fn on_cpu<W: Work>(&self, cpu: Cpu, lora: Option<Trainables>, setup: Setup<'_>, work: W) -> Result<W::Output> {
        let Setup { mut comm, base, adapter, limits, job } = setup;
        let sizes = self.sizes(&base, lora.as_ref());
        let limits = Undecided { sizes, adapter, limits, job }.decide_on_cpu(self, &mut comm)?;
        let queue = HostQueue::new(comm.into_groups(sizes.num_shards())?, Delays::default())?;
        self.run(Engine::new(cpu.clone(), cpu, queue, base, lora, limits)?, adapter, work)
    }

    fn on_gpu<A: HalfType, W: Work>(
        &self,
        cuda: Cuda<A>,
        host: Cpu,
        lora: Option<Trainables>,
        setup: Setup<'_>,
        work: W,
    ) -> Result<W::Output> {
        let Setup { mut comm, base, adapter, limits, job } = setup;
        let sizes = self.sizes(&base, lora.as_ref());
        let options = QueueOptions {
            max_gradients: sizes.max_gradients(),
            share_gpu: self.ranks_per_gpu > 1,
            delays: Delays::default(),
        };
        // NCCL takes memory when its communicator is made, and the difference tells how much. Ranks that share a GPU
        // look before any of them takes more.
        barrier(&mut comm)?;
        let free_before = cuda.free_bytes()?;
        barrier(&mut comm)?;
        let mut queue = CudaQueue::new(cuda.clone(), comm.into_groups(sizes.num_shards())?, options)?;
        let undecided = Undecided { sizes, adapter, limits, job };
        let limits = undecided.decide_on_gpu(self, &cuda, &mut queue, free_before)?;
        self.run(Engine::new(cuda, host, queue, base, lora, limits)?, adapter, work)
    }

    fn sizes<'a>(&self, base: &'a Base, trainables: Option<&'a Trainables>) -> Sizes<'a> {
        let (spec, layouts, world_size) = (&base.spec, &base.layouts[..], self.world.world_size);
        Sizes { spec, layouts, trainables, world_size }
    }

    fn run<W: Work, D: Ops, Q: Queue<D>>(
        &self,
        mut engine: Engine<D, Q>,
        adapter: Option<&Adapter>,
        work: W,
    ) -> Result<W::Output> {
        watch::phase(Phase::Adapter)?;
        for (layer, values) in adapter.iter().flat_map(|a| a.layers.iter().enumerate()) {
            engine.load_trainable(layer, values)?;
        }
        self.tell_memory(&engine);
        let result = work.run(&mut engine);
        if result.is_err() {
            // Its threads and its GPU may be waiting for a rank that never comes; the error is to be told now.
            std::mem::forget(engine);
        }
        result
    }

    /// Says what the engine holds, by name, on the device and in pinned host memory.
    fn tell_memory<D: Ops, Q: Queue<D>>(&self, engine: &Engine<D, Q>) {
        let (plan, queue) = (engine.plan(), &engine.queue);
        let owners = |plan: &MemoryPlan| {
            let largest = plan.by_owner().into_iter().take(5);
            largest.map(|(name, n)| format!("{name} {}", bytes(n))).collect::<Vec<_>>().join(", ")
        };
        let device = plan.device.total_bytes() + queue.device_bytes();
        let shards = match queue.device_bytes() {
            0 => String::new(),
            n => format!("shards and received gradients {}, ", bytes(n)),
        };
        self.log.line(format!("memory of a rank: {} ({shards}{})", bytes(device), owners(&plan.device)));
        let pinned = plan.host.total_bytes() + queue.host_bytes();
        if pinned > 0 {
            let limits = engine.limits();
            let resident = limits.residency.units.min(engine.num_units());
            let others = match plan.host.total_bytes() {
                0 => String::new(),
                _ => format!(", {}", owners(&plan.host)),
            };
            self.log.line(format!(
                "in host memory: {} (shards {}{others}); {resident} of {} units are resident",
                bytes(pinned),
                bytes(queue.host_bytes()),
                engine.num_units()
            ));
        }
    }
}
