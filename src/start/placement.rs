//! The device of a rank: its share of the host's cores, or a GPU with such a share beside it.

use std::collections::HashMap;
use std::sync::Once;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use half::{bf16, f16};
use xxhash_rust::xxh3::xxh3_64;

use crate::checkpoint::shards;
use crate::comm::mpi::World;
use crate::comm::watch::{self, Phase};
use crate::comm::{Comm, Gather, all_gather_u64, all_gather_u64s, boot_id};
use crate::device::cpu::Cpu;
use crate::device::cuda::{self, Cuda, HalfType};
use crate::model::spec::ModelSpec;
use crate::plan::hardware::Hardware;
use crate::plan::limits;
use crate::recipe::{ComputeDtype, Job};

use super::Start;
use super::agree::Agreed;

/// A device as the command line asks for it; the comments are its help.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// The fastest that is there
    Auto,
    /// Ranks on the host's cores
    Cpu,
    /// One NVIDIA GPU a rank
    Cuda,
}

/// The device that a rank has taken, with the host's cores beside a GPU.
pub enum Placement {
    Cpu(Cpu),
    Bf16(Cuda<bf16>, Cpu),
    Fp16(Cuda<f16>, Cpu),
}

impl Placement {
    /// Returns the rate at which this rank's part of its GPU multiplies large matrices, in FLOP/s; `None` on a CPU, and
    /// on a GPU whose rate is not known.
    pub fn matrix_flops(&self, ranks_per_gpu: usize) -> Result<Option<f64>> {
        let name = match self {
            Placement::Cpu(_) => return Ok(None),
            Placement::Bf16(cuda, _) => cuda.name()?,
            Placement::Fp16(cuda, _) => cuda.name()?,
        };
        let (hardware, is_known) = Hardware::of_device(&name)?;
        Ok(is_known.then(|| hardware.shared_by(ranks_per_gpu).matrix_flops))
    }
}

impl Start<'_> {
    /// Starts this rank's threads, and returns their number: its share of the cores that it may use. Collective.
    pub fn threads(&self, comm: &mut dyn Comm) -> Result<usize> {
        let allowed = std::thread::available_parallelism().map_or(1, usize::from);
        // Ranks that may use the same cores of the same machine share them.
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find(|l| l.starts_with("Cpus_allowed_list")).unwrap_or_default();
        let key = xxh3_64((boot_id() + mask).as_bytes());
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
        // They are started once, whatever number of engines this process makes.
        static STARTED: Once = Once::new();
        let mut started = Ok(());
        STARTED.call_once(|| started = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global());
        started.context("starting the threads")?;
        Ok(threads)
    }

    /// Starts the threads, takes the CPU or this rank's GPU, the same kind of device on every rank, and says so.
    /// Collective.
    pub fn place(&self, comm: &mut dyn Comm, dtype: ComputeDtype) -> Result<Placement> {
        watch::phase(Phase::Device)?;
        let threads = self.threads(comm)?;
        let World { rank, world_size, local_size, .. } = *self.world;
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
        let boot = boot_id();
        let visible = cuda::device_uuids()?.into_iter().map(|uuid| xxh3_64(format!("{boot}{uuid:?}").as_bytes()));
        let visible = all_gather_u64s(comm, &visible.collect::<Vec<u64>>())?;
        let gpus = visible[rank].len();
        let Some(taken) = take_gpus(&visible, self.ranks_per_gpu) else {
            ensure!(
                self.device == DeviceKind::Auto,
                "--device cuda: {local_size} ranks on this machine, {gpus} GPUs: start one rank a GPU, or let several share \
                 one with --ranks-per-gpu"
            );
            return cpu(if gpus == 0 { "no GPU" } else { "more ranks than GPUs" });
        };
        let (host, gpu) = (Cpu::new(threads), taken[rank]);
        match dtype {
            ComputeDtype::Auto | ComputeDtype::Bfloat16 => Ok(Placement::Bf16(self.gpu(gpu)?, host)),
            ComputeDtype::Float16 => Ok(Placement::Fp16(self.gpu(gpu)?, host)),
            ComputeDtype::Float32 => bail!(refused("GPU", "bfloat16 or float16")),
        }
    }

    /// Takes a device like [`Start::place`], and checks that the job's model and its way to gather are possible
    /// there. Collective.
    pub fn place_for(&self, comm: &mut dyn Comm, job: &Agreed<Job>, config: &ModelSpec) -> Result<Placement> {
        let placement = self.place(comm, job.quantization.compute_dtype)?;
        match &placement {
            Placement::Cpu(_) => ensure!(
                job.fsdp.gather != Some(Gather::Collective),
                "fsdp.gather: found nccl; CPU ranks gather over MPI, allowed here: auto, host"
            ),
            Placement::Bf16(cuda, _) => prepare(cuda, config)?,
            Placement::Fp16(cuda, _) => prepare(cuda, config)?,
        }
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
}

/// Returns the index of the GPU that each rank takes among those that it sees, given by identity: the first that has
/// room for another rank. Ranks that see all GPUs of their machine take them in their order; a launcher may also show
/// each rank its own GPU alone. Returns `None` if a rank finds no room.
fn take_gpus(visible: &[Vec<u64>], ranks_per_gpu: usize) -> Option<Vec<usize>> {
    let mut num_ranks = HashMap::new();
    let mut take = |gpus: &Vec<u64>| {
        let idx = gpus.iter().position(|gpu| num_ranks.get(gpu).is_none_or(|&ranks| ranks < ranks_per_gpu))?;
        *num_ranks.entry(gpus[idx]).or_insert(0) += 1;
        Some(idx)
    };
    visible.iter().map(&mut take).collect()
}

/// Checks that the GPU can run the model, and loads the kernels that not every model needs.
fn prepare<A: HalfType>(cuda: &Cuda<A>, config: &ModelSpec) -> Result<()> {
    limits::check_gpu(config)?;
    limits::check_fp16(config, A::NEEDS_LOSS_SCALING)?;
    let _wait = watch::wait("loading attention's kernels".to_string());
    config.layers.iter().try_for_each(|layer| cuda.load_attention(layer.attention.head_dim, layer.attention.softcap))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_takes_a_gpu_that_no_other_one_has() {
        let all = |node: u64, ranks: usize| vec![vec![10 * node, 10 * node + 1]; ranks];
        let two_nodes = [all(1, 2), all(2, 2)].concat();
        assert_eq!(take_gpus(&two_nodes, 1), Some(vec![0, 1, 0, 1]));
        // SLURM's --gpus-per-task, and CUDA_VISIBLE_DEVICES of each rank.
        assert_eq!(take_gpus(&[vec![10], vec![11], vec![20], vec![21]], 1), Some(vec![0, 0, 0, 0]));
        // Ranks that are placed in turns, and see the GPUs in another order.
        assert_eq!(take_gpus(&[vec![10, 11], vec![20, 21], vec![11, 10], vec![21, 20]], 1), Some(vec![0, 0, 0, 0]));
        assert_eq!(take_gpus(&all(1, 4), 2), Some(vec![0, 0, 1, 1]));
        assert_eq!(take_gpus(&all(1, 3), 1), None);
        assert_eq!(take_gpus(&[vec![10], vec![10]], 1), None);
        assert_eq!(take_gpus(&[vec![10], vec![]], 1), None);
    }
}
