//! `bench`

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Args, Subcommand};
use serde_json::json;

use crate::checkpoint::adapter::{self, AdapterSettings};
use crate::checkpoint::synthetic;
use crate::comm::Queue;
use crate::comm::mpi::MpiComm;
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::{Accumulation, Mode, Recompute};
use crate::model::batch::MicroBatch;
use crate::model::config::ModelConfig;
use crate::model::names::Projection;
use crate::model::shapes;
use crate::optim::adamw::Update;
use crate::train::metrics::peak_host_bytes;
use crate::train::step::step;

use super::start::{Start, Work};

#[derive(Subcommand)]
pub enum Bench {
    /// Training steps on made-up weights of a shape; prints one JSON object
    Step(StepArgs),
}

#[derive(Args)]
pub struct StepArgs {
    /// llama-3.1-8b, llama-3.1-70b, llama-3.1-405b, or a folder with a config.json
    #[arg(long)]
    shape: String,
    /// Fewer layers than the shape has
    #[arg(long)]
    layers: Option<usize>,
    /// Sequences of a micro-batch
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    micro_batch: u32,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..))]
    seq: u32,
    /// Micro-batches of a step on each rank
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    accum: u32,
    /// Timed steps, after two that warm up
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    #[arg(long, default_value_t = 0.05)]
    dropout: f32,
    /// Keep all activations instead of recomputing them
    #[arg(long)]
    keep: bool,
}

const WARM_UP_STEPS: u32 = 2;

pub fn run(start: &Start, bench: &Bench) -> Result<()> {
    let Bench::Step(args) = bench;
    ensure!((0.0..1.0).contains(&args.dropout), "--dropout: found {}; allowed: 0 to below 1", args.dropout);
    let folder = PathBuf::from(&args.shape);
    let config = match folder.join("config.json").exists() {
        true => {
            let config = ModelConfig::load(&folder)?;
            ModelConfig { num_hidden_layers: args.layers.unwrap_or(config.num_hidden_layers), ..config }
        }
        false => shapes::named(&args.shape, args.layers)?,
    };
    let mut comm = MpiComm::new(start.world);
    let placement = start.place(&mut comm)?;
    let (rank, world_size) = (start.world.rank, start.world.world_size);
    let base = synthetic::base(config.clone(), rank, world_size, &mut |line| start.log.line(line))?;
    let settings = AdapterSettings {
        lora_rank: 16,
        alpha: 16.0,
        dropout: args.dropout,
        use_rslora: false,
        targets: Projection::ALL.to_vec(),
    };
    let adapter = adapter::fresh(settings, &config, 42);
    let limits = Limits {
        mode: Mode::Train,
        max_tokens: (args.micro_batch * args.seq) as usize,
        max_micro_batches: args.accum as usize,
        max_context: 0,
        accumulation: Accumulation::Layer,
        recompute: if args.keep { Recompute::Nothing } else { Recompute::All },
        num_slots: 2,
    };
    start.with_engine(comm, placement, base, Some(&adapter), limits, Steps { start, args })
}

struct Steps<'a> {
    start: &'a Start<'a>,
    args: &'a StepArgs,
}

impl Work for Steps<'_> {
    type Output = ();

    fn run<D: Ops, Q: Queue<D>>(self, mut engine: Engine<D, Q>) -> Result<()> {
        let Steps { start, args } = self;
        let (config, world_size) = (engine.config().clone(), start.world.world_size);
        let (mut ms, mut losses) = (Vec::new(), Vec::new());
        for step_idx in 1..=WARM_UP_STEPS + args.steps {
            let batches: Vec<MicroBatch> = (0..args.accum)
                .map(|m| batch(args, &config, u64::from(step_idx * args.accum + m), start.world.rank as u64))
                .collect();
            let update = Update {
                learning_rate: 1e-4,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.0,
                max_grad_norm: Some(1.0),
                step: step_idx,
            };
            let record = step(&mut engine, &batches, args.accum as usize, &update, 42)?;
            start.log.line(format!("step {step_idx}  loss {:.4}  {:.1} ms", record.loss, record.step_ms));
            losses.push(record.loss);
            if step_idx > WARM_UP_STEPS {
                ms.push(record.step_ms);
            }
        }
        ms.sort_by(f64::total_cmp);
        let step_ms = ms[ms.len() / 2];
        let tokens = f64::from(args.micro_batch * args.seq * args.accum) * world_size as f64;
        let seconds = step_ms * 1e-3 * world_size as f64;
        let (model, hardware) = flops_per_token(&config, f64::from(args.seq), !args.keep);
        if start.log.enabled {
            println!(
                "{}",
                json!({
                    "shape": args.shape, "layers": config.num_hidden_layers, "micro_batch": args.micro_batch,
                    "seq": args.seq, "accum": args.accum, "world_size": world_size, "dropout": args.dropout,
                    "recompute": !args.keep, "step_ms": step_ms, "tokens_per_second": tokens / (step_ms * 1e-3),
                    "model_tflops_per_rank": model * tokens / seconds * 1e-12,
                    "hardware_tflops_per_rank": hardware * tokens / seconds * 1e-12,
                    "planned_device_bytes": engine.plan().total_bytes(),
                    "shard_device_bytes": engine.queue.device_bytes(), "peak_host_bytes": peak_host_bytes(),
                    "losses": losses,
                })
            );
        }
        Ok(())
    }
}

/// Sequences of ids that look random; every token but the first of a sequence counts.
fn batch(args: &StepArgs, config: &ModelConfig, micro: u64, rank: u64) -> MicroBatch {
    let mut batch = MicroBatch::new();
    for row in 0..u64::from(args.micro_batch) {
        let sample = (rank << 32) + micro * u64::from(args.micro_batch) + row;
        let id = |t: u64| ((sample * 1_000_003 + t * 7919) * 2_654_435_761 % config.vocab_size as u64) as u32;
        let ids: Vec<u32> = (0..u64::from(args.seq)).map(id).collect();
        batch.push(sample, &ids, &vec![true; ids.len()]);
    }
    batch
}

/// (model, hardware) FLOPs of a token: two for each weight forward and two backward (the frozen base has no gradient), the head
/// likewise; causal attention 2·T·q_width forward and 5·T·q_width backward (its scores are computed again). With recompute the
/// hardware does the layers' forward once more, less the last projection. LoRA is left out.
fn flops_per_token(config: &ModelConfig, seq: f64, recompute: bool) -> (f64, f64) {
    let weights = |p: Projection| p.shape(config).iter().product::<usize>() as f64;
    let layer: f64 = Projection::ALL.into_iter().map(weights).sum();
    let attention = 2.0 * seq * (config.num_attention_heads * config.head_dim) as f64;
    let layers = config.num_hidden_layers as f64;
    let head = (config.vocab_size * config.hidden_size) as f64;
    let model = layers * (4.0 * layer + 3.5 * attention) + 4.0 * head;
    let again = layers * (2.0 * (layer - weights(Projection::Down)) + attention);
    (model, model + if recompute { again } else { 0.0 })
}
