//! `bench`: one file a benchmark.

mod collectives;
mod kernels;
mod step;

use anyhow::Result;
use clap::Subcommand;
use serde_json::Value;

use super::usage;
use crate::comm::mpi::MpiComm;
use crate::device::{Arena, Buffer, Element, Ops};
use crate::model::shapes;
use crate::model::spec::ModelSpec;
use crate::recipe;
use crate::start::Start;

#[derive(Subcommand)]
pub enum Bench {
    /// Time training steps on made-up weights of a shape, and print one JSON object
    Step(step::StepBench),
    /// Time each op at the sizes of a layer, and print one JSON object a line
    Kernels(kernels::KernelBench),
    /// Measure the bus bandwidth between the ranks, and print one JSON object a line
    Collectives(collectives::CollectiveBench),
}

pub fn run(start: &Start, comm: MpiComm, bench: &Bench, overrides: &[String]) -> Result<()> {
    match bench {
        Bench::Step(args) => step::run(start, comm, args, overrides),
        Bench::Kernels(args) => kernels::run(start, comm, args, overrides),
        Bench::Collectives(args) => collectives::run(start, comm, args, overrides),
    }
}

/// The help of `--shape`.
pub fn shape_help() -> String {
    format!("A folder with a config.json, or one of {}", shapes::names())
}

/// The configuration that `--shape` names, with fewer layers when `layers` says so.
pub fn shape(name: &str, layers: Option<u32>) -> Result<ModelSpec> {
    let folder = recipe::read_path(name).map_err(|error| usage(&format!("--shape: found {name}: {error}")))?;
    let mut config = match folder.join("config.json").exists() {
        true => ModelSpec::load(&folder)?,
        false => shapes::named(name, None).map_err(|error| usage(&error.to_string()))?,
    };
    let all = config.num_layers();
    match layers.map_or(all, |layers| layers as usize) {
        layers if (1..=all).contains(&layers) => {
            config.layers.truncate(layers);
            Ok(config)
        }
        layers => Err(usage(&format!("--layers: found {layers}, allowed: 1 to the {all} of {name}"))),
    }
}

/// Keys that sizes on the command line stand for: tokens of a sequence, sequences of a micro-batch, micro-batches of
/// a step.
pub fn given([seq, micro_batch, accum]: [u32; 3]) -> Vec<(&'static str, Value)> {
    vec![
        ("data.max_length", seq.into()),
        ("training.per_device_train_batch_size", micro_batch.into()),
        ("training.gradient_accumulation_steps", accum.into()),
    ]
}

/// A buffer of its own, cleared.
fn buffer<D: Ops, T: Element>(device: &D, len: usize) -> Result<Buffer<D, T>> {
    let mut buffer = Arena::carved(device, |arena| arena.carve("bench", len))?;
    device.fill_bytes(buffer.view_mut(), 0)?;
    Ok(buffer)
}
