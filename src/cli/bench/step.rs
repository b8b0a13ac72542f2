//! `bench step`: training steps on made-up weights of a shape.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::checkpoint::adapter;
use crate::checkpoint::synthetic;
use crate::comm::Queue;
use crate::comm::mpi::MpiComm;
use crate::comm::watch::{self, Phase};
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::memory::Residency;
use crate::fsdp::schedule::Keep;
use crate::fsdp::unit::NumUnits;
use crate::model::batch::MicroBatch;
use crate::model::spec::ModelSpec;
use crate::model::stage::Saved;
use crate::model::stage::cost::{Circumstances, Cost};
use crate::optim::adamw::Update;
use crate::optim::loss_scale::LossScaler;
use crate::plan::trace;
use crate::recipe::{self, Command, Job};
use crate::start::adapter::new_settings;
use crate::start::agree::{agree, agree_on};
use crate::start::engine::{Setup, Work};
use crate::start::options::{nf4_double_quant, step_limits};
use crate::start::placement::Placement;
use crate::start::{Facts, Start};
use crate::train::metrics::{peak_host_bytes, pss_bytes};
use crate::train::step::{StepArgs, StepRecord, step};

use super::super::check_trace;
use super::kernels;

#[derive(Args)]
pub struct StepBench {
    #[arg(long, help = super::shape_help())]
    shape: String,
    /// Number of layers, if fewer than the shape has
    #[arg(long)]
    layers: Option<u32>,
    /// Sequences of a micro-batch
    #[arg(long, default_value_t = 1)]
    micro_batch: u32,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 1024)]
    seq: u32,
    /// Micro-batches of a step on each rank
    #[arg(long, default_value_t = 1)]
    accum: u32,
    /// Timed steps, after two that warm up
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    steps: u32,
    /// Write a trace of the last step, which is not timed, for <https://ui.perfetto.dev>
    #[arg(long, value_parser = recipe::read_path)]
    trace: Option<PathBuf>,
}

const WARM_UP_STEPS: u32 = 2;

pub fn run(start: &Start, mut comm: MpiComm, args: &StepBench, overrides: &[String]) -> Result<()> {
    let sizes = [args.seq, args.micro_batch, args.accum];
    let job = agree_on(&mut comm, recipe::from_options(Command::BenchStep, super::given(sizes), overrides)?)?;
    check_trace(args.trace.as_deref())?;
    let config = super::shape(&args.shape, args.layers)?;
    let mut inputs = Facts::default();
    inputs.add("config.json of --shape", format!("{config:?}"));
    agree(&mut comm, &inputs)?;
    let settings = new_settings(&job.lora, &config)?;
    let placement = start.place_for(&mut comm, &job, &config)?;
    let num_shards = start.num_shards(&job.fsdp)?;
    let (part, nf4) = ((start.world.rank % num_shards, num_shards), nf4_double_quant(&job));
    let log = start.log;
    let tell = move |line: String| log.line(line);
    let matrix_rate = match &placement {
        Placement::Cpu(cpu) => kernels::matrix_rate(cpu),
        Placement::Bf16(cuda, _) => kernels::matrix_rate(cuda),
        Placement::Fp16(cuda, _) => kernels::matrix_rate(cuda),
    }?;
    let base = match &placement {
        Placement::Cpu(cpu) => synthetic::base(cpu, config.clone(), nf4, part, tell),
        Placement::Bf16(cuda, _) => synthetic::base(cuda, config.clone(), nf4, part, tell),
        Placement::Fp16(cuda, _) => synthetic::base(cuda, config.clone(), nf4, part, tell),
    }?;
    let adapter = adapter::fresh(settings, &config, 42);
    let limits = step_limits(&job, start.world.world_size);
    let setup = Setup { comm, base, adapter: Some(&adapter), limits, job: &job };
    start.with_engine(placement, setup, Steps { start, args, job: &job, matrix_rate })
}

struct Steps<'a> {
    start: &'a Start<'a>,
    args: &'a StepBench,
    job: &'a Job,
    /// FLOP/s of a large matrix product on this device.
    matrix_rate: f64,
}

impl Work for Steps<'_> {
    type Output = ();

    fn run<D: Ops, Q: Queue<D>>(self, engine: &mut Engine<D, Q>) -> Result<()> {
        let (Steps { start, args, .. }, config) = (&self, engine.spec().clone());
        let (mut records, mut losses) = (Vec::new(), Vec::new());
        let (mut scaler, mut num_updates) = (LossScaler::new(D::NEEDS_LOSS_SCALING), 0);
        let num_steps = WARM_UP_STEPS + args.steps;
        for step_idx in 1..=num_steps + u32::from(args.trace.is_some()) {
            engine.record_spans(step_idx > num_steps);
            watch::phase(Phase::Step(step_idx as usize))?;
            let batches: Vec<MicroBatch> = (0..args.accum)
                .map(|m| {
                    batch(
                        args,
                        &config,
                        u64::from(step_idx) * u64::from(args.accum) + u64::from(m),
                        start.world.rank as u64,
                    )
                })
                .collect();
            let update = Update {
                learning_rate: 1e-4,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.0,
                max_grad_norm: Some(1.0),
                loss_scale: scaler.scale(),
                step: num_updates + 1,
            };
            let num_micro_batches = args.accum as usize;
            let step_args = StepArgs { step: step_idx, num_micro_batches, update: &update, seed: 42 };
            let record = step(engine, &batches, &step_args)?;
            let StepRecord { loss, grad_norm, updated, .. } = record;
            let goes_on = loss.is_finite() && scaler.note(updated);
            ensure!(goes_on, "step {step_idx}: loss {loss}, grad_norm {grad_norm}: not finite");
            num_updates += u32::from(updated);
            start.log.line(format!("step {step_idx}  loss {:.4}  {:.1} ms", loss, record.step_ms));
            losses.push(loss);
            if (WARM_UP_STEPS + 1..=num_steps).contains(&step_idx) {
                records.push(record);
            }
        }
        if let Some(path) = args.trace.as_deref().filter(|_| start.log.enabled) {
            trace::write(path, engine.spans())?;
        }
        // While every rank has all that it takes.
        let used_bytes = engine.device().used_bytes()?;
        let (pss_bytes, cached_bytes) = pss_bytes();
        let memory = engine.queue.all_reduce_f64("host memory", &[pss_bytes as f64, cached_bytes as f64])?;
        if start.log.enabled {
            println!("{}", self.report(engine, &records, &losses, (used_bytes, &memory)));
        }
        Ok(())
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
        let Steps { start, args, job, matrix_rate } = self;
        let (config, world_size) = (engine.spec(), start.world.world_size);
        let median = |of: fn(&StepRecord) -> f64| {
            let mut values: Vec<f64> = records.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let step_ms = median(|r| r.step_ms);
        let tokens =
            [args.micro_batch, args.seq, args.accum].into_iter().map(f64::from).product::<f64>() * world_size as f64;
        let seconds = step_ms * 1e-3 * world_size as f64;
        let (limits, num_layers) = (*engine.limits(), config.num_layers());
        let (model, hardware) = flops_per_token(config, args.seq as usize, limits.keep);
        let inputs = limits.largest(NumUnits::new(config));
        let residency = Residency {
            units: limits.residency.units.min(engine.num_units()),
            boundary_buffers: inputs.num_boundary_buffers,
            ..limits.residency
        };
        json!({
            "shape": args.shape, "layers": config.num_layers(), "micro_batch": args.micro_batch,
            "seq": args.seq, "accum": args.accum, "world_size": world_size,
            "ranks_per_gpu": if D::IS_HOST { 1 } else { start.ranks_per_gpu }, "dropout": job.lora.dropout, "job": job.values(),
            "num_shards": engine.queue.position().num_shards, "accumulation": limits.accumulation.word(),
            "gather": limits.gather.word(), "keep": limits.keep.clamped(num_layers), "residency": residency,
            "step_ms": step_ms, "compute_ms": median(|r| r.compute_ms),
            "gather_wait_ms": median(|r| r.gather_wait_ms), "copy_wait_ms": median(|r| r.copy_wait_ms),
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

/// Sequences of ids that look random; every token but the first of a sequence counts.
fn batch(args: &StepBench, config: &ModelSpec, micro: u64, rank: u64) -> MicroBatch {
    let mut batch = MicroBatch::new();
    for row in 0..u64::from(args.micro_batch) {
        let sample = (rank << 32) + micro * u64::from(args.micro_batch) + row;
        let mixed = |t: u64| sample.wrapping_mul(1_000_003).wrapping_add(t * 7919).wrapping_mul(2_654_435_761);
        let id = |t: u64| (mixed(t) % config.vocab_size as u64) as u32;
        let ids: Vec<u32> = (0..u64::from(args.seq)).map(id).collect();
        batch.push(sample, &ids, &vec![true; ids.len()]);
    }
    batch
}

/// (model, hardware) FLOPs of a token: two for each weight forward and two backward (the frozen base has no
/// gradient), the head likewise; causal attention 2·T·q_width forward and 5·T·q_width backward (its scores are
/// computed again). The hardware does the parts of forward that are not kept once more. LoRA is left out.
fn flops_per_token(spec: &ModelSpec, seq: usize, keep: Keep) -> (f64, f64) {
    let at = Circumstances { hidden_size: spec.hidden_size, max_length: seq, has_dropout: false };
    let flops = |cost: Cost| 2.0 * cost.weights + cost.forward_scores + cost.backward_scores;
    let head = (spec.vocab_size * spec.hidden_size) as f64;
    let (mut model, mut again) = (4.0 * head, 0.0);
    for (layer, stages) in spec.layers.iter().enumerate() {
        model += flops(stages.forward_cost(&at, Saved { attention: true, mlp: true, rest: true }, true));
        model += flops(stages.backward_cost(&at));
        let kept = keep.of(layer, spec.num_layers());
        let computed = Saved { attention: !kept.attention, mlp: !kept.mlp, rest: !kept.rest };
        again += flops(stages.forward_cost(&at, computed, false));
    }
    (model, model + again)
}
