//! What the subcommands have in common: threads, the base, the engine.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::load::{self, LoadOptions, OpenedBase};
use crate::checkpoint::shards;
use crate::comm::cuda_queue::CudaQueue;
use crate::comm::host_queue::{Delays, HostQueue};
use crate::comm::mpi::{MpiComm, World};
use crate::comm::{Comm, Queue, all_gather_u64};
use crate::device::Ops;
use crate::device::cpu::Cpu;
use crate::device::cuda::{self, Cuda};
use crate::fsdp::exec::{Base, Engine};
use crate::fsdp::layout::{TrainableLayout, UnitLayout};
use crate::fsdp::memory::Limits;
use crate::model::layer::LayerLora;
use crate::model::lora::LoraLayout;
use crate::recipe::{Job, ShardingStrategy};
use crate::train::log::{Log, bytes};

use super::DeviceKind;

/// A rank that has been started.
pub struct Start<'a> {
    pub world: &'a World,
    pub log: Log,
    /// As the command line has it.
    pub device: DeviceKind,
    pub ranks_per_gpu: usize,
}

/// Where a run computes.
pub enum Placement {
    Cpu { threads: usize },
    Cuda(Cuda),
}

/// What a subcommand does with its engine, on whichever device.
pub trait Work {
    type Output;
    fn run<D: Ops, Q: Queue<D>>(self, engine: Engine<D, Q>) -> Result<Self::Output>;
}

impl Start<'_> {
    /// How a job holds its base.
    pub fn load_options(&self, job: &Job) -> LoadOptions {
        LoadOptions {
            load_in_4bit: job.quantization.load_in_4bit,
            double_quant: job.quantization.double_quant,
            shards: job.shards.clone(),
            num_shards: match job.fsdp.sharding_strategy {
                ShardingStrategy::FullShard => self.world.world_size,
                ShardingStrategy::NoShard => 1,
            },
        }
    }

    /// Opens and checks a job's model.
    pub fn open(&self, job: &Job) -> Result<OpenedBase> {
        load::open(&job.model, &self.load_options(job))
    }

    /// Starts this rank's threads: its share of the cores that it may use.
    pub fn threads(&self, comm: &mut dyn Comm) -> Result<usize> {
        let allowed = std::thread::available_parallelism().map_or(1, usize::from);
        // Ranks that may use the same cores of the same machine share them.
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let status = text("/proc/self/status");
        let mask = status.lines().find(|l| l.starts_with("Cpus_allowed_list")).unwrap_or_default();
        let key = xxhash_rust::xxh3::xxh3_64((text("/proc/sys/kernel/random/boot_id") + mask).as_bytes());
        let sharing = all_gather_u64(comm, key)?.into_iter().filter(|&k| k == key).count();
        let share = (allowed / sharing).max(1);
        let threads = match std::env::var("RAYON_NUM_THREADS") {
            Ok(n) => n
                .parse()
                .ok()
                .filter(|&n| n > 0)
                .with_context(|| format!("RAYON_NUM_THREADS is {n:?}, allowed: 1 or more"))?,
            Err(_) => share,
        };
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("starting the threads")?;
        Ok(threads)
    }

    /// Starts the threads and decides for the CPU or for the GPU of this rank, the same on every rank, and says so.
    pub fn place(&self, comm: &mut dyn Comm) -> Result<Placement> {
        let threads = self.threads(comm)?;
        let World { world_size, local_rank, local_size, .. } = *self.world;
        let cpu = |why: &str| {
            self.log.line(format!("device: cpu ({why}), {world_size} ranks x {threads} threads, f32"));
            Ok(Placement::Cpu { threads })
        };
        if self.device == DeviceKind::Cpu {
            return cpu("as asked");
        }
        let gpus = cuda::num_devices()?;
        let enough = local_size <= gpus * self.ranks_per_gpu;
        let everywhere = all_gather_u64(comm, u64::from(enough))?.iter().all(|&e| e == 1);
        if !everywhere && self.device == DeviceKind::Auto {
            return cpu(if gpus == 0 { "no GPU" } else { "more ranks than GPUs" });
        }
        ensure!(
            everywhere,
            "--device cuda: {local_size} ranks on this machine, {gpus} GPUs: start one rank a GPU, or let several share one \
             with --ranks-per-gpu"
        );
        let cuda = Cuda::new(local_rank / self.ranks_per_gpu, &shards::cache_dir()?.join("kernels"))?;
        let sharing =
            if self.ranks_per_gpu > 1 { format!(", {} ranks on each", self.ranks_per_gpu) } else { String::new() };
        self.log.line(format!("device: cuda ({}), {world_size} ranks{sharing}, bf16", cuda.name()?));
        Ok(Placement::Cuda(cuda))
    }

    /// Communicator, device and the base with its shard mapped.
    pub fn base(&self, opened: OpenedBase) -> Result<(MpiComm, Placement, Base)> {
        let mut comm = MpiComm::new(self.world);
        let placement = self.place(&mut comm)?;
        let writes = opened.spec.num_shards > 1 || self.world.local_rank == 0;
        let mut warn = |line: String| Log { enabled: true }.line(format!("rank {}: {line}", self.world.rank));
        let base = opened.load(&mut comm, writes, &mut |line| self.log.line(line), &mut warn)?;
        Ok((comm, placement, base))
    }

    /// Bytes that each rank will take of its device, and what is free there for all ranks that share it.
    pub fn memory(
        &self,
        placement: &Placement,
        base: &Base,
        lora: Option<&LayerLora>,
        limits: &Limits,
    ) -> Result<(usize, usize)> {
        let world_size = self.world.world_size;
        match placement {
            Placement::Cpu { .. } => {
                let plan = Engine::<Cpu, HostQueue>::plan_for(base, lora, limits, world_size)?;
                Ok((plan.total_bytes(), available_host_bytes()))
            }
            Placement::Cuda(cuda) => {
                let plan = Engine::<Cuda, CudaQueue>::plan_for(base, lora, limits, world_size)?;
                let shards: usize = base.layouts.iter().map(UnitLayout::shard_bytes).sum();
                let received = if world_size > 1 { 4 * max_gradients(lora, world_size) } else { 0 };
                Ok((plan.total_bytes() + shards + received, cuda.free_bytes()?))
            }
        }
    }

    /// Makes the engine, loads the adapter's values, and does the work.
    pub fn with_engine<W: Work>(
        &self,
        comm: MpiComm,
        placement: Placement,
        base: Base,
        adapter: Option<&Adapter>,
        limits: Limits,
        work: W,
    ) -> Result<W::Output> {
        let lora = adapter.map(|adapter| {
            let config = adapter.settings.lora_config();
            let layout = LoraLayout::new(&base.config, &config);
            LayerLora { config, layout }
        });
        let (needed, free) = self.memory(&placement, &base, lora.as_ref(), &limits)?;
        let (kind, sharing) = match &placement {
            Placement::Cpu { .. } => ("host", self.world.local_size),
            Placement::Cuda(_) => ("GPU", self.ranks_per_gpu.min(self.world.local_size)),
        };
        ensure!(
            needed * sharing <= free,
            "{} of {kind} memory are needed by each rank, of which {sharing} share {}; lower \
             training.per_device_train_batch_size, training.gradient_accumulation_steps or data.max_length, or set \
             fsdp.activation_checkpointing: full, fsdp.accumulation: micro_batch",
            bytes(needed),
            bytes(free)
        );
        match placement {
            Placement::Cpu { threads } => {
                let queue = HostQueue::new(Box::new(comm), Delays::default())?;
                self.run(Engine::new(Cpu::new(threads), queue, base, lora, limits)?, adapter, work)
            }
            Placement::Cuda(cuda) => {
                let max_gradients = max_gradients(lora.as_ref(), self.world.world_size);
                let queue = CudaQueue::new(cuda.clone(), Box::new(comm), max_gradients, self.ranks_per_gpu > 1)?;
                self.run(Engine::new(cuda, queue, base, lora, limits)?, adapter, work)
            }
        }
    }

    fn run<W: Work, D: Ops, Q: Queue<D>>(
        &self,
        mut engine: Engine<D, Q>,
        adapter: Option<&Adapter>,
        work: W,
    ) -> Result<W::Output> {
        for (layer, values) in adapter.iter().flat_map(|a| a.layers.iter().enumerate()) {
            engine.load_trainable(layer, values)?;
        }
        let owners: Vec<String> =
            engine.plan().by_owner().into_iter().take(5).map(|(name, n)| format!("{name} {}", bytes(n))).collect();
        self.log.line(format!("memory of a rank: {} ({})", bytes(engine.plan().total_bytes()), owners.join(", ")));
        work.run(engine)
    }
}

/// Longest gradient buffer that will be reduced, in elements.
fn max_gradients(lora: Option<&LayerLora>, world_size: usize) -> usize {
    lora.map_or(0, |l| TrainableLayout { len: l.layout.len, num_parts: world_size }.padded_len())
}

/// MemAvailable; without /proc there is no limit to check.
pub fn available_host_bytes() -> usize {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<usize>().ok()).map_or(usize::MAX, |kib| kib * 1024)
}

/// Fails when a path that should be a file is none.
pub fn check_file(key: &str, path: &Path) -> Result<()> {
    ensure!(path.exists(), "{key}: {} is not there", path.display());
    Ok(())
}
