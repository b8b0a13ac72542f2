//! Shared by the integration tests: ranks as threads, and an engine on each.
#![allow(dead_code)]

pub mod cli;
pub mod hub;
pub mod running;
pub mod steps;

use std::path::{Path, PathBuf};
use std::time::Duration;

use fsdp_qlora::testing::{
    Accumulation, Adapter, Cpu, Cuda, CudaQueue, Delays, Engine, Gather, Groups, HostQueue, Keep, Limits, LoadOptions,
    Mode, Ops, Queue, QueueOptions, Residency, Sizes, Trainables, adapter, load, local,
};
use half::bf16;

pub type CpuEngine = Engine<Cpu, HostQueue>;

/// A file of tests/golden.
pub fn golden(path: &str) -> PathBuf {
    // At run time, so that tests that were carried to another machine find what was carried with them.
    let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    Path::new(&root).join("tests/golden").join(path)
}

/// Calls `f` on every rank of a world of threads that hold a base together; the results in rank order.
pub fn on_all_ranks<T: Send>(world_size: usize, f: impl Fn(Groups) -> T + Sync) -> Vec<T> {
    on_groups(world_size, world_size, f)
}

/// Calls `f` on every rank of a world of threads in which groups of `num_shards` ranks each hold a base.
pub fn on_groups<T: Send>(world_size: usize, num_shards: usize, f: impl Fn(Groups) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let ranks = local::groups(world_size, num_shards).into_iter();
        let handles: Vec<_> = ranks.map(|groups| scope.spawn(|| f(groups))).collect();
        handles.into_iter().map(|h| h.join().expect("a rank panicked")).collect()
    })
}

/// The engine that a test wants.
#[derive(Clone)]
pub struct EngineOptions {
    pub model: PathBuf,
    pub adapter: Option<Adapter>,
    pub load_in_4bit: bool,
    pub double_quant: Option<bool>,
    pub mode: Mode,
    pub max_tokens: usize,
    pub max_micro_batches: usize,
    pub accumulation: Accumulation,
    pub keep: Keep,
    pub gather: Gather,
    pub residency: Residency,
    pub dense_layers: usize,
    pub delay: Duration,
    pub num_threads: usize,
}

impl EngineOptions {
    pub fn new(model: &str, mode: Mode) -> EngineOptions {
        EngineOptions {
            model: golden(model),
            adapter: None,
            load_in_4bit: true,
            double_quant: None,
            mode,
            max_tokens: 320,
            max_micro_batches: 1,
            accumulation: Accumulation::Layer,
            keep: Keep::NOTHING,
            gather: Gather::Collective,
            residency: Residency::ALL,
            dense_layers: 0,
            delay: Duration::ZERO,
            num_threads: 1,
        }
    }

    pub fn with_adapter(mut self, dir: &str) -> EngineOptions {
        let config = fsdp_qlora::testing::ModelSpec::load(&self.model).unwrap();
        self.adapter = Some(adapter::load(&golden(dir), &config).unwrap());
        self
    }

    /// The engine of one rank; shard files go to `shards`.
    pub fn engine(&self, groups: Groups, shards: &Path) -> CpuEngine {
        self.engine_with(groups, shards, |queue| queue)
    }

    /// The engine of one rank with a queue that `wrap` makes.
    pub fn engine_with<Q: Queue<Cpu>>(
        &self,
        groups: Groups,
        shards: &Path,
        wrap: impl FnOnce(HostQueue) -> Q,
    ) -> Engine<Cpu, Q> {
        let queue = |groups, _: &Sizes| wrap(HostQueue::new(groups, Delays::all(self.delay)).unwrap());
        self.engine_on(Cpu::new(self.num_threads), groups, shards, queue)
    }

    /// The engine of a rank that is alone on a GPU.
    pub fn engine_on_gpu(
        &self,
        cuda: Cuda<bf16>,
        groups: Groups,
        shards: &Path,
    ) -> Engine<Cuda<bf16>, CudaQueue<bf16>> {
        let device = cuda.clone();
        let queue = |groups, sizes: &Sizes| {
            let max_gradients = sizes.max_gradients();
            let options = QueueOptions { max_gradients, share_gpu: false, delays: Delays::all(self.delay) };
            CudaQueue::new(cuda, groups, options).unwrap()
        };
        self.engine_on(device, groups, shards, queue)
    }

    fn engine_on<D: Ops, Q: Queue<D>>(
        &self,
        device: D,
        mut groups: Groups,
        shards: &Path,
        queue: impl FnOnce(Groups, &Sizes) -> Q,
    ) -> Engine<D, Q> {
        let position = groups.position();
        let options = LoadOptions {
            load_in_4bit: self.load_in_4bit,
            double_quant: self.double_quant,
            shards: Some(shards.to_path_buf()),
            num_shards: position.num_shards,
        };
        let opened = load::open(&self.model, &options, &mut *groups.world, &mut |_| ()).unwrap();
        let base = opened.load(&mut *groups.world, position.replica == 0, &mut |_| (), &mut |_| ()).unwrap();
        let limits = Limits {
            max_context: self.max_tokens,
            accumulation: self.accumulation,
            keep: self.keep,
            gather: self.gather,
            residency: self.residency,
            dense_layers: self.dense_layers,
            snapshot: self.mode == Mode::Train,
            ..Limits::new(self.mode, self.max_tokens, self.max_micro_batches)
        };
        let lora = self.adapter.as_ref().map(|a| Trainables::new(&base.spec, a.settings.lora_config()));
        let world_size = position.world_size;
        let sizes = Sizes { spec: &base.spec, layouts: &base.layouts, trainables: lora.as_ref(), world_size };
        let queue = queue(groups, &sizes);
        let mut engine = Engine::new(device, Cpu::new(self.num_threads), queue, base, lora, limits).unwrap();
        for (layer, values) in self.adapter.iter().flat_map(|a| a.layers.iter().enumerate()) {
            engine.load_trainable(layer, values).unwrap();
        }
        engine
    }
}

/// ‖a − b‖ / ‖b‖.
pub fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut b.iter().map(|b| f64::from(*b))).max(f64::MIN_POSITIVE)
}
