//! `bench`: one file a benchmark.

mod collectives;
mod kernels;
mod step;

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;

use super::start::Start;
use super::usage;
use crate::device::{Arena, Buffer, Element, Ops};
use crate::model::config::ModelConfig;
use crate::model::shapes;

#[derive(Subcommand)]
pub enum Bench {
    /// Training steps on made-up weights of a shape; prints one JSON object
    Step(step::StepBench),
    /// Each op at the sizes of a layer; prints one JSON object a line
    Kernels(kernels::KernelBench),
    /// Bus bandwidth between the ranks; prints one JSON object a line
    Collectives(collectives::CollectiveBench),
}

pub fn run(start: &Start, bench: &Bench, overrides: &[String]) -> Result<()> {
    match bench {
        Bench::Step(args) => step::run(start, args, overrides),
        Bench::Kernels(args) => kernels::run(start, args, overrides),
        Bench::Collectives(args) => collectives::run(start, args, overrides),
    }
}

/// The configuration that `--shape` names, with fewer layers when `layers` says so.
pub fn shape(name: &str, layers: Option<usize>) -> Result<ModelConfig> {
    let folder = PathBuf::from(name);
    if !folder.join("config.json").exists() {
        return shapes::named(name, layers).map_err(|error| usage(&error.to_string()));
    }
    let config = ModelConfig::load(&folder)?;
    Ok(ModelConfig { num_hidden_layers: layers.unwrap_or(config.num_hidden_layers), ..config })
}

/// A buffer of its own, cleared.
fn buffer<D: Ops, T: Element>(device: &D, len: usize) -> Result<Buffer<D, T>> {
    let mut buffer = Arena::carved(device, |arena| arena.carve("bench", len))?;
    device.fill_bytes(buffer.view_mut(), 0)?;
    Ok(buffer)
}
