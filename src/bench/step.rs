//! Training steps on made-up weights of a shape.

use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::checkpoint::adapter;
use crate::checkpoint::synthetic;
use crate::comm::Queue;
use crate::comm::mpi::MpiComm;
use crate::comm::spans::idle_share;
use crate::comm::watch::{self, Phase};
use crate::data::made_up::input_ids;
use crate::device::Ops;
use crate::fsdp::exec::{Base, Engine};
use crate::fsdp::memory::Residency;
use crate::fsdp::schedule::Inputs;
use crate::fsdp::unit::NumUnits;
use crate::model::batch::MicroBatch;
use crate::model::spec::ModelSpec;
use crate::model::stage::Saved;
use crate::model::stage::cost::{Circumstances, Cost};
use crate::optim::adamw::Update;
use crate::optim::loss_scale::LossScaler;
use crate::plan::trace;
use crate::recipe::Job;
use crate::start::adapter::new_settings;
use crate::start::agree::{Agreed, agree};
use crate::start::engine::{Setup, Work};
use crate::start::options::{nf4_double_quant, step_limits};
use crate::start::placement::Placement;
use crate::start::{Facts, Start};
use crate::train::metrics::{peak_host_bytes, pss_bytes};
use crate::train::step::{StepArgs, StepRecord, step};

use super::timer;

/// The steps to time.
pub struct StepBench<'a> {
    /// Name of the shape.
    pub shape: &'a str,
    pub spec: ModelSpec,
    /// Timed steps, after two that warm up.
    pub steps: u32,
    /// File that gets the trace of the step after them.
    pub trace: Option<&'a Path>,
}

const WARM_UP_STEPS: u32 = 2;
const SEED: u64 = 42;

/// Makes a base, trains it, and returns the medians on rank 0. The job says how large a step is. Collective.
pub fn run(start: &Start, mut comm: MpiComm, job: &Agreed<Job>, bench: StepBench) -> Result<Option<Value>> {
    let mut inputs = Facts::default();
    inputs.add("config.json of --shape", format!("{:?}", bench.spec));
    agree(&mut comm, &inputs)?;
    let settings = new_settings(&job.lora, &bench.spec)?;
    let placement = start.place_for(&mut comm, job, &bench.spec)?;
    let (matrix_rate, base) = match &placement {
        Placement::Cpu(cpu) => made_up(start, cpu, job, &bench.spec),
        Placement::Bf16(cuda, _) => made_up(start, cuda, job, &bench.spec),
        Placement::Fp16(cuda, _) => made_up(start, cuda, job, &bench.spec),
    }?;
    let adapter = adapter::fresh(settings, &bench.spec, SEED);
    let limits = step_limits(job, start.world.world_size);
    let setup = Setup { comm, base, adapter: Some(&adapter), limits, job };
    start.with_engine(placement, setup, Steps { start, bench: &bench, job, matrix_rate })
}

/// Returns FLOP/s of a large matrix product on this device, and this rank's shard of a made-up base.
fn made_up<D: Ops + Clone>(start: &Start, device: &D, job: &Job, spec: &ModelSpec) -> Result<(f64, Base)> {
    let num_shards = start.num_shards(&job.fsdp)?;
    let (part, log) = ((start.world.rank % num_shards, num_shards), start.log);
    let matrix_rate = timer::matrix_rate(device)?;
    let base = synthetic::base(device, spec.clone(), nf4_double_quant(job), part, move |line| log.line(line))?;
    Ok((matrix_rate, base))
}

struct Steps<'a> {
    start: &'a Start<'a>,
    bench: &'a StepBench<'a>,
    job: &'a Job,
    /// FLOP/s of a large matrix product on this device.
    matrix_rate: f64,
}

impl Work for Steps<'_> {
    type Output = Option<Value>;

    fn run<D: Ops, Q: Queue<D>>(self, engine: &mut Engine<D, Q>) -> Result<Option<Value>> {
        let Steps { start, bench, job, .. } = self;
        let (mut records, mut losses) = (Vec::new(), Vec::new());
        let (mut scaler, mut num_updates) = (LossScaler::new(D::NEEDS_LOSS_SCALING), 0);
        let num_micro_batches = job.training.accumulation_steps(start.world.world_size);
        let num_steps = WARM_UP_STEPS + bench.steps;
        let vocab_size = engine.spec().vocab_size;
        let batches = |step_idx: u32| -> Vec<MicroBatch> {
            let first = u64::from(step_idx) * num_micro_batches as u64;
            let micros = first..first + num_micro_batches as u64;
            micros.map(|micro| batch(job, vocab_size, micro, start.world.rank as u64)).collect()
        };
        let mut next = batches(1);
        // The spans of one more step show when the compute queue has nothing to do.
        for step_idx in 1..=num_steps + 1 {
            engine.record_spans(step_idx > num_steps);
            watch::phase(Phase::Step(step_idx as usize))?;
            let batches = std::mem::replace(&mut next, batches(step_idx + 1));
            let update = Update {
                learning_rate: 1e-4,
                lr_ratio: 1.0,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.0,
                max_grad_norm: Some(1.0),
                loss_scale: scaler.scale(),
                step: num_updates + 1,
            };
            let step_args =
                StepArgs { step: step_idx, num_micro_batches, update: &update, seed: SEED, next: next.first() };
            let record = step(engine, &batches, &step_args)?;
            let StepRecord { loss, grad_norm, updated, .. } = record;
            let goes_on = loss.is_finite() && scaler.note(updated);
            ensure!(goes_on, "step {step_idx}: loss {loss}, grad_norm {grad_norm}: not finite");
            num_updates += u32::from(updated);
            start.log.line(format!("step {step_idx}  loss {:.4}  {:.1} ms", loss, record.step_ms));
            if step_idx <= num_steps {
                losses.push(loss);
            }
            if (WARM_UP_STEPS + 1..=num_steps).contains(&step_idx) {
                records.push(record);
            }
        }
        if let Some(path) = bench.trace.filter(|_| start.log.enabled) {
            trace::write(path, engine.spans())?;
        }
        // No rank ends before this, so each still has all the memory that it takes.
        let used_bytes = engine.device().used_bytes()?;
        let (pss_bytes, cached_bytes) = pss_bytes();
        let memory = engine.queue.all_reduce_f64("host memory", &[pss_bytes as f64, cached_bytes as f64])?;
        Ok(start.log.enabled.then(|| self.report(engine, &records, &losses, (used_bytes, &memory))))
    }
}

impl Steps<'_> {
    fn report<D: Ops, Q: Queue<D>>(
        &self,
        engine: &Engine<D, Q>,
        records: &[StepRecord],
        losses: &[f64],
        (used_bytes, memory): (usize, &[f64]),
    ) -> Value {
        let Steps { start, bench, job, matrix_rate } = self;
        let (config, world_size) = (engine.spec(), start.world.world_size);
        let median = |of: fn(&StepRecord) -> f64| {
            let mut values: Vec<f64> = records.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let step_ms = median(|r| r.step_ms);
        let (micro_batch, seq) = (job.training.per_device_train_batch_size, job.data.max_length);
        let accum = job.training.accumulation_steps(world_size);
        let tokens = (micro_batch * seq * accum * world_size) as f64;
        let seconds = step_ms * 1e-3 * world_size as f64;
        let (limits, num_layers) = (*engine.limits(), config.num_layers());
        let inputs = limits.largest(NumUnits::new(config));
        let (model, hardware) = flops_per_token(config, seq, &inputs);
        let residency = Residency {
            units: limits.residency.units.min(engine.num_units()),
            boundary_buffers: inputs.num_boundary_buffers,
            ..limits.residency
        };
        json!({
            "shape": bench.shape, "layers": config.num_layers(), "micro_batch": micro_batch,
            "seq": seq, "accum": accum, "world_size": world_size,
            "ranks_per_gpu": if D::IS_HOST { 1 } else { start.ranks_per_gpu },
            "dropout": job.lora.dropout, "job": job.values(),
            "num_shards": engine.queue.position().num_shards, "accumulation": limits.accumulation.word(),
            "gather": limits.gather.word(), "keep": limits.keep.clamped(num_layers), "residency": residency,
            "dense_layers": limits.dense_layers.min(num_layers),
            "step_ms": step_ms, "compute_ms": median(|r| r.compute_ms),
            "gather_wait_ms": median(|r| r.gather_wait_ms), "copy_wait_ms": median(|r| r.copy_wait_ms),
            "launches": median(|r| r.launches as f64), "host_ms": median(|r| r.host_ms),
            "idle_share": idle_share(engine.spans()),
            "gathered_bytes": median(|r| r.gathered_bytes as f64), "tokens_per_second": tokens / (step_ms * 1e-3),
            "model_tflops_per_rank": model * tokens / seconds * 1e-12,
            "hardware_tflops_per_rank": hardware * tokens / seconds * 1e-12,
            "matrix_tflops": matrix_rate * 1e-12, "share_of_matrix_rate": hardware * tokens / seconds / matrix_rate,
            "flops": "a token: 4 a weight and head weight, 3.5 causal attention; hardware: and what is computed again",
            "device_bytes": engine.plan().device.total_bytes() + engine.queue.device_bytes(),
            "used_bytes_of_device": used_bytes,
            "pinned_bytes": engine.plan().host.total_bytes() + engine.queue.host_bytes(),
            "peak_host_bytes": peak_host_bytes(),
            "pss_bytes_of_all_ranks": memory[0], "page_cache_bytes_of_all_ranks": memory[1],
            "losses": losses,
        })
    }
}

/// Sequences of ids that look random; every token but the first of a sequence counts. `micro` is the number of the
/// micro-batch in the run.
fn batch(job: &Job, vocab_size: usize, micro: u64, rank: u64) -> MicroBatch {
    let (rows, len) = (job.training.per_device_train_batch_size as u64, job.data.max_length);
    let mut batch = MicroBatch::new();
    for row in 0..rows {
        let sample = (rank << 32) + micro * rows + row;
        let ids = input_ids(sample, len, vocab_size);
        batch.push(sample, &ids, &vec![true; ids.len()]);
    }
    batch
}

/// Returns the (model, hardware) FLOPs of a token: two for each weight forward and two backward (the frozen base has no
/// gradient), the head likewise; causal attention 2·T·q_width forward and 5·T·q_width backward (its scores are
/// computed again). The hardware computes once more those parts of forward that are recomputed. LoRA is left out.
fn flops_per_token(spec: &ModelSpec, seq: usize, inputs: &Inputs) -> (f64, f64) {
    let at = Circumstances { hidden_size: spec.hidden_size, max_length: seq, has_dropout: false };
    let flops = |cost: Cost| 2.0 * cost.weights + cost.forward_scores + cost.backward_scores;
    let head = (spec.vocab_size * spec.hidden_size) as f64;
    let (mut model, mut again) = (4.0 * head, 0.0);
    for (layer, stages) in spec.layers.iter().enumerate() {
        model += flops(stages.forward_cost(&at, Saved::EVERYTHING, true));
        model += flops(stages.backward_cost(&at));
        let computed = inputs.keep.of(layer, spec.num_layers()).missing();
        let num_recomputed = inputs.trained().filter(|&micro| inputs.recomputes(layer, micro)).count();
        let share = num_recomputed as f64 / inputs.num_micro_batches() as f64;
        again += share * flops(stages.forward_cost(&at, computed, false));
    }
    (model, model + again)
}
