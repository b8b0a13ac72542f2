//! What the subcommands have in common: threads, the base, the engine.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use half::{bf16, f16};
use jiff::Zoned;

use crate::checkpoint::adapter::{self, Adapter};
use crate::checkpoint::load::{self, LoadOptions, OpenedBase};
use crate::checkpoint::shards;
use crate::comm::cuda_queue::{CudaQueue, QueueOptions, Rates};
use crate::comm::host_queue::HostQueue;
use crate::comm::mpi::{MpiComm, World};
use crate::comm::watch::{self, Phase};
use crate::comm::{Comm, Delays, Gather, Queue, all_gather_u64, anywhere, barrier};
use crate::device::cpu::Cpu;
use crate::device::cuda::{self, CONTEXT_BYTES, Cuda, HalfType, LIBRARY_BYTES};
use crate::device::{Device, MemoryPlan, Ops};
use crate::fsdp::exec::{Base, Engine};
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::Keep;
use crate::model::config::ModelConfig;
use crate::model::layer::LayerLora;
use crate::plan::decide::{Budget, Wishes};
use crate::plan::hardware::Hardware;
use crate::plan::limits;
use crate::plan::memory::Sizes;
use crate::plan::throughput::{Links, Workload};
use crate::recipe::{ComputeDtype, FsdpJob, Job, ShardingStrategy};
use crate::train::log::{Log, bytes};

use super::agree::{self, Agreed, Facts};
use super::host_memory;
use super::options::{load_options, possible_gather, wishes};

/// What is assumed of the network between nodes when choices are weighed: 10 Gbit/s.
const NETWORK_BYTES_PER_S: f64 = 1.25e9;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// The fastest that is there
    Auto,
    /// Ranks on the host's cores
    Cpu,
    /// One NVIDIA GPU a rank
    Cuda,
}

/// A rank that has been started.
pub struct Start<'a> {
    pub world: &'a World,
    pub log: Log,
    /// When the program was started, by the clock of rank 0.
    pub clock: Zoned,
    /// As the command line has it.
    pub device: DeviceKind,
    pub ranks_per_gpu: usize,
}

/// Where a run computes: on this share of the host's cores, or on a GPU that has them beside it.
pub enum Placement {
    Cpu(Cpu),
    Bf16(Cuda<bf16>, Cpu),
    Fp16(Cuda<f16>, Cpu),
}

/// What a subcommand makes its engine of.
pub struct Setup<'a> {
    pub comm: MpiComm,
    pub base: Base,
    pub adapter: Option<&'a Adapter>,
    /// Everything but what is kept and where.
    pub limits: Limits,
    pub job: &'a Job,
}

/// What a subcommand does with its engine, on whichever device.
pub trait Work {
    type Output;
    fn run<D: Ops, Q: Queue<D>>(self, engine: &mut Engine<D, Q>) -> Result<Self::Output>;
}

impl Start<'_> {
    /// Returns the job, if all ranks have decided the same. Collective.
    pub fn agree_on(&self, job: Job) -> Result<Agreed<Job>> {
        agree::agree_on(&mut MpiComm::new(self.world)?, job)
    }

    /// Returns the inputs, if all ranks have read the same. Collective.
    pub fn agree_on_inputs(&self, inputs: Facts) -> Result<Agreed<Facts>> {
        agree::agree_on_inputs(&mut MpiComm::new(self.world)?, inputs)
    }

    /// Opens and checks a job's model, which must be the same on all ranks. Collective.
    pub fn open(&self, job: &Agreed<Job>) -> Result<OpenedBase> {
        self.open_with(job, &load_options(job, self.num_shards(&job.fsdp)?))
    }

    /// Opens and checks a job's model with other options than the job's. Collective.
    pub fn open_with(&self, job: &Agreed<Job>, options: &LoadOptions) -> Result<OpenedBase> {
        let mut comm = MpiComm::new(self.world)?;
        let opened = load::open(&job.model, options, &mut comm, &mut |line| self.log.line(line))?;
        let mut facts = Facts::default();
        facts.add("model", format!("content {}", opened.identity()));
        agree::agree(&mut comm, &facts)?;
        Ok(opened)
    }

    /// The adapter that a job names, and what the user should know about it.
    pub fn adapter(&self, job: &Job, config: &ModelConfig) -> Result<Option<Adapter>> {
        let Some(dir) = &job.lora.adapter else { return Ok(None) };
        let name = job.command.name_of("lora.adapter").unwrap_or_default();
        let adapter = adapter::load(dir, config).with_context(|| name.to_string())?;
        for remark in adapter::remarks(dir, &job.model)? {
            self.log.line(format!("{name}: {remark}"));
        }
        Ok(Some(adapter))
    }

    /// How many ranks hold a base together.
    pub fn num_shards(&self, job: &FsdpJob) -> Result<usize> {
        match job.sharding_strategy {
            ShardingStrategy::FullShard => Ok(self.world.world_size),
            ShardingStrategy::NoShard => Ok(1),
            ShardingStrategy::HybridShard => self.world.node_size.context(
                "fsdp.sharding_strategy: hybrid_shard needs as many ranks on every node, one node after the other: mpirun --map-by \
                 slot, or srun --distribution=block with --ntasks-per-node",
            ),
        }
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
    pub fn place(&self, comm: &mut dyn Comm, dtype: ComputeDtype) -> Result<Placement> {
        watch::phase(Phase::Device)?;
        let threads = self.threads(comm)?;
        let World { world_size, local_rank, local_size, .. } = *self.world;
        let refused = |device: &str, allowed: &str| {
            let key = "quantization.bnb_4bit_compute_dtype";
            format!("{key}: the {device} computes in {allowed}; found {dtype:?}, allowed here: auto, {allowed}")
        };
        let cpu = |why: &str| {
            let allowed = matches!(dtype, ComputeDtype::Auto | ComputeDtype::Float32);
            ensure!(allowed, "{} (device: cpu, {why})", refused("CPU", "float32"));
            self.log.line(format!("device: cpu ({why}), {world_size} ranks x {threads} threads, f32"));
            Ok(Placement::Cpu(Cpu::new(threads)))
        };
        if self.device == DeviceKind::Cpu {
            return cpu("as asked");
        }
        let gpus = cuda::num_devices()?;
        let enough = local_size <= gpus * self.ranks_per_gpu;
        let everywhere = !anywhere(comm, !enough)?;
        if !everywhere && self.device == DeviceKind::Auto {
            return cpu(if gpus == 0 { "no GPU" } else { "more ranks than GPUs" });
        }
        ensure!(
            everywhere,
            "--device cuda: {local_size} ranks on this machine, {gpus} GPUs: start one rank a GPU, or let several share one \
             with --ranks-per-gpu"
        );
        let (host, gpu) = (Cpu::new(threads), local_rank / self.ranks_per_gpu);
        match dtype {
            ComputeDtype::Auto | ComputeDtype::Bfloat16 => Ok(Placement::Bf16(self.gpu(gpu)?, host)),
            ComputeDtype::Float16 => Ok(Placement::Fp16(self.gpu(gpu)?, host)),
            ComputeDtype::Float32 => bail!(refused("GPU", "bfloat16 or float16")),
        }
    }

    /// As [`Start::place`] for a job, whose model and way to gather must be possible on the device.
    pub fn place_for(&self, comm: &mut dyn Comm, job: &Agreed<Job>, config: &ModelConfig) -> Result<Placement> {
        let placement = self.place(comm, job.quantization.compute_dtype)?;
        if !matches!(placement, Placement::Cpu(_)) {
            limits::check_gpu(config)?;
        }
        ensure!(
            job.fsdp.gather != Some(Gather::Collective) || !matches!(placement, Placement::Cpu(_)),
            "fsdp.gather: found nccl; CPU ranks gather over MPI, allowed here: auto, host"
        );
        Ok(placement)
    }

    fn gpu<A: HalfType>(&self, ordinal: usize) -> Result<Cuda<A>> {
        let wait = watch::wait(format!("starting GPU {ordinal}"));
        let cuda = Cuda::new(ordinal, &shards::cache_dir()?.join("kernels"))?;
        drop(wait);
        let sharing =
            if self.ranks_per_gpu > 1 { format!(", {} ranks on each", self.ranks_per_gpu) } else { String::new() };
        let (name, world_size) = (cuda.name()?, self.world.world_size);
        self.log.line(format!("device: cuda ({name}), {world_size} ranks{sharing}, {}", A::NAME));
        Ok(cuda)
    }

    /// Returns communicator, device and the base with its shard mapped, which is made if it is not there. All ranks have agreed on the
    /// inputs before. Collective.
    pub fn base(&self, opened: OpenedBase, job: &Agreed<Job>, _: &Agreed<Facts>) -> Result<(MpiComm, Placement, Base)> {
        let mut comm = MpiComm::new(self.world)?;
        let placement = self.place_for(&mut comm, job, &opened.config)?;
        let writes = self.world.local_rank < opened.spec.num_shards;
        let mut warn = |line: String| Log { enabled: true }.line(format!("rank {}: {line}", self.world.rank));
        let base = opened.load(&mut comm, writes, &mut |line| self.log.line(line), &mut warn)?;
        Ok((comm, placement, base))
    }

    /// Decides what is kept where, makes the engine, loads the adapter's values, and does the work.
    pub fn with_engine<W: Work>(&self, placement: Placement, setup: Setup<'_>, work: W) -> Result<W::Output> {
        let lora = setup.adapter.map(|adapter| LayerLora::new(&setup.base.config, adapter.settings.lora_config()));
        match placement {
            Placement::Cpu(cpu) => self.on_cpu(cpu, lora, setup, work),
            Placement::Bf16(cuda, host) => self.on_gpu(cuda, host, lora, setup, work),
            Placement::Fp16(cuda, host) => self.on_gpu(cuda, host, lora, setup, work),
        }
    }

    fn on_cpu<W: Work>(&self, cpu: Cpu, lora: Option<LayerLora>, setup: Setup<'_>, work: W) -> Result<W::Output> {
        let Setup { mut comm, base, adapter, limits, job } = setup;
        let limits = self.decide_on_cpu(&mut comm, &base, (lora.as_ref(), adapter), limits, job)?;
        let queue = HostQueue::new(comm.into_groups(base.layouts[0].num_shards())?, Delays::default())?;
        self.run(Engine::new(cpu.clone(), cpu, queue, base, lora, limits)?, adapter, work)
    }

    fn on_gpu<A: HalfType, W: Work>(
        &self,
        cuda: Cuda<A>,
        host: Cpu,
        lora: Option<LayerLora>,
        setup: Setup<'_>,
        work: W,
    ) -> Result<W::Output> {
        let Setup { mut comm, base, adapter, limits, job } = setup;
        let ranks = self.ranks_per_gpu.min(self.world.local_size);
        let sizes = self.sizes(&base, lora.as_ref());
        let options = QueueOptions {
            max_gradients: sizes.max_gradients(),
            share_gpu: self.ranks_per_gpu > 1,
            delays: Delays::default(),
        };
        // What NCCL takes is known when its communicator is there. Ranks that share a GPU look before any of them takes more.
        barrier(&mut comm)?;
        let before = cuda.free_bytes()?;
        barrier(&mut comm)?;
        let mut queue = CudaQueue::new(cuda.clone(), comm.into_groups(sizes.num_shards())?, options)?;
        let (card, is_known) = Hardware::of_device(&cuda.name()?)?;
        if !is_known {
            self.log.line(format!(
                "plan: choices are weighed with the rates of a guess, {}, as this card is unknown",
                card.name
            ));
        }
        let mut hardware = card.shared_by(ranks);
        let wishes = wishes(job, self.world.world_size);
        let job = &job.fsdp;
        let wishes = Wishes { gather: self.gathers(&mut queue, job, &mut hardware)?, ..wishes };
        queue.all_gather_f64("start", &[0.0])?;
        let free = cuda.free_bytes()?;
        let taken = CONTEXT_BYTES + LIBRARY_BYTES + before.saturating_sub(free) / ranks;
        let free = free.saturating_sub(ranks * LIBRARY_BYTES) / ranks;
        let device = job.vram_budget.map_or(free, |budget| budget.saturating_sub(taken).min(free));
        // What the queue has taken is in the plan.
        let mut budget = Budget { device: device + queue.device_bytes(), host: self.host_budget(job, adapter) };
        least_of_all(&mut queue, &mut budget, &mut hardware)?;
        let (base_in_a_node, one_node) =
            (self.world.fits_a_node(sizes.num_shards()), self.world.fits_a_node(self.world.world_size));
        let links = Links::new(&hardware, base_in_a_node, one_node, NETWORK_BYTES_PER_S);
        let workload = Workload { sizes, hardware: &hardware, links };
        let limits = workload.decide::<Cuda<A>>(limits, &wishes, budget)?;
        if wishes.gather.is_none() {
            self.log.line(format!("gather: {} is taken", limits.gather.word()));
        }
        self.run(Engine::new(cuda, host, queue, base, lora, limits)?, adapter, work)
    }

    /// Which ways to gather are possible, after measuring both where the recipe leaves it open; nothing: both.
    fn gathers<A: HalfType>(
        &self,
        queue: &mut CudaQueue<A>,
        job: &FsdpJob,
        hardware: &mut Hardware,
    ) -> Result<Option<Gather>> {
        let num_shards = queue.position().num_shards;
        if let Some(gather) = possible_gather(job, num_shards, self.world.fits_a_node(num_shards))? {
            self.log.line(format!(
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
                self.log.line(format!("gather: NCCL, {:.1} GB/s; not from shared host memory: {why}", nccl * 1e-9));
                return Ok(Some(Gather::Collective));
            }
        };
        hardware.host_bytes_per_s = host;
        self.log.line(format!(
            "gather: NCCL brings {:.1} GB/s to a rank, shared host memory {:.1}",
            nccl * 1e-9,
            host * 1e-9
        ));
        Ok(None)
    }

    /// Keeping activations on the CPU must leave room for everything else that the machine does. The rank with the least memory
    /// decides for all. Collective.
    fn decide_on_cpu(
        &self,
        comm: &mut dyn Comm,
        base: &Base,
        (lora, adapter): (Option<&LayerLora>, Option<&Adapter>),
        limits: Limits,
        job: &Job,
    ) -> Result<Limits> {
        let (sizes, hardware) = (self.sizes(base, lora), Hardware::of_a_core());
        let mut wishes = wishes(job, self.world.world_size);
        let in_a_node = self.world.fits_a_node(sizes.num_shards());
        let job = &job.fsdp;
        wishes.gather = possible_gather(job, sizes.num_shards(), in_a_node)?.or(Some(Gather::Collective));
        let shares = all_gather_u64(comm, self.host_budget(job, adapter) as u64)?;
        let share = shares.into_iter().min().map_or(0, |share| share as usize);
        let budget = Budget { device: job.vram_budget.unwrap_or(share), host: share };
        let keeps = Limits { keep: Keep::EVERYTHING, ..limits };
        if wishes.keep.is_none() && sizes.cost::<Cpu>(&keeps)?.device_bytes() > budget.device / 4 {
            wishes.keep = Some(Keep::NOTHING);
        }
        let links = Links::new(&hardware, true, true, NETWORK_BYTES_PER_S);
        Workload { sizes, hardware: &hardware, links }.decide::<Cpu>(limits, &wishes, budget)
    }

    fn sizes<'a>(&self, base: &'a Base, lora: Option<&'a LayerLora>) -> Sizes<'a> {
        let (config, layouts, world_size) = (&base.config, &base.layouts[..], self.world.world_size);
        Sizes { config, layouts, lora, world_size }
    }

    /// Host memory for a rank: what the recipe allows, or its share of what is available, less what saving takes.
    fn host_budget(&self, job: &FsdpJob, adapter: Option<&Adapter>) -> usize {
        // The trained values of all ranks come together on each of them.
        let saving_bytes = adapter.map_or(0, Adapter::bytes);
        let share = host_memory::share(host_memory::available_bytes(), self.world.local_size, saving_bytes);
        job.host_budget.map_or(share, |budget| budget.min(share))
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
        self.tell_memory(&engine);
        let result = work.run(&mut engine);
        if result.is_err() {
            // Its threads and its GPU may be waiting for a rank that never comes; the error is to be told now.
            std::mem::forget(engine);
        }
        result
    }

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

/// The least of all ranks, so that they decide alike. Collective.
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

/// Fails when a file cannot be made at a path, as its folder is not there.
pub fn check_folder_of(key: &str, path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    ensure!(folder.is_none_or(Path::is_dir), "{key}: the folder of {} is not there", path.display());
    Ok(())
}

/// Fails when a path that should be a file is none.
pub fn check_file(key: &str, path: &Path) -> Result<()> {
    ensure!(path.exists(), "{key}: {} is not there", path.display());
    Ok(())
}
