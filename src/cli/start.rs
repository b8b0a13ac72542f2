//! What the subcommands have in common: threads, the base, the engine.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::load::{self, LoadOptions, OpenedBase};
use crate::comm::host_queue::{Delays, HostQueue};
use crate::comm::mpi::{MpiComm, World};
use crate::comm::{Comm, all_gather_u64};
use crate::device::cpu::Cpu;
use crate::fsdp::exec::{Base, Engine};
use crate::fsdp::memory::Limits;
use crate::model::layer::LayerLora;
use crate::model::lora::LoraLayout;
use crate::recipe::{Job, ShardingStrategy};
use crate::train::log::{Log, bytes};

/// A rank that has been started.
pub struct Start<'a> {
    pub world: &'a World,
    pub log: Log,
    /// The device was named on the command line.
    pub chosen: bool,
}

/// The engine of the CPU device over MPI.
pub type CpuEngine = Engine<Cpu, HostQueue>;

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
        let why = if self.chosen { "as asked" } else { "this build has no GPU device" };
        self.log.line(format!("device: cpu ({why}), {} ranks x {threads} threads, f32", self.world.world_size));
        Ok(threads)
    }

    /// Communicator, threads and the base with its shard mapped.
    pub fn base(&self, opened: OpenedBase) -> Result<(MpiComm, usize, Base)> {
        let mut comm = MpiComm::new(self.world);
        let threads = self.threads(&mut comm)?;
        let writes = opened.spec.num_shards > 1 || self.world.local_rank == 0;
        let mut warn = |line: String| Log { enabled: true }.line(format!("rank {}: {line}", self.world.rank));
        let base = opened.load(&mut comm, writes, &mut |line| self.log.line(line), &mut warn)?;
        Ok((comm, threads, base))
    }

    /// The engine, with the adapter's values loaded.
    pub fn engine(
        &self,
        comm: MpiComm,
        threads: usize,
        base: Base,
        adapter: Option<&Adapter>,
        limits: Limits,
    ) -> Result<CpuEngine> {
        let lora = adapter.map(|adapter| {
            let config = adapter.settings.lora_config();
            let layout = LoraLayout::new(&base.config, &config);
            LayerLora { config, layout }
        });
        let needed =
            Engine::<Cpu, HostQueue>::plan_for(&base, lora.as_ref(), &limits, self.world.world_size)?.total_bytes();
        let free = available_host_bytes();
        ensure!(
            needed * self.world.local_size <= free,
            "{} of host memory are needed by each of {} ranks on this machine, {} are free; lower \
             training.per_device_train_batch_size, training.gradient_accumulation_steps or data.max_length, or set \
             fsdp.activation_checkpointing: full, fsdp.accumulation: micro_batch",
            bytes(needed),
            self.world.local_size,
            bytes(free)
        );
        let queue = HostQueue::new(Box::new(comm), Delays::default())?;
        let mut engine = Engine::new(Cpu::new(threads), queue, base, lora, limits)?;
        if let Some(adapter) = adapter {
            for (layer, values) in adapter.layers.iter().enumerate() {
                engine.load_trainable(layer, values)?;
            }
        }
        let owners: Vec<String> =
            engine.plan().by_owner().into_iter().take(5).map(|(name, n)| format!("{name} {}", bytes(n))).collect();
        self.log.line(format!("memory of a rank: {} ({})", bytes(needed), owners.join(", ")));
        Ok(engine)
    }
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
