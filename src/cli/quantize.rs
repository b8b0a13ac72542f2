//! `quantize`: writes the shard files of a model, or of made-up weights, ahead of time.

use anyhow::Result;
use clap::Args;

use super::shape;
use crate::checkpoint::made_up::MadeUp;
use crate::comm::mpi::MpiComm;
use crate::recipe::{self, Command};
use crate::start::Start;
use crate::train::log::bytes;

#[derive(Args)]
pub struct QuantizeArgs {
    /// Hugging Face directory, or ORG/NAME or ORG/NAME@REVISION of the hub
    #[arg(long, required_unless_present = "shape", conflicts_with = "shape")]
    model: Option<String>,
    #[arg(long, help = shape::made_up_help())]
    shape: Option<String>,
    /// Folder of the shard files; auto: the user's cache folder
    #[arg(long)]
    output: String,
    /// Number of shards, one for each rank that will hold the base together: all ranks, or those of a node
    /// (hybrid_shard)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=super::MAX_RANKS))]
    world_size: u32,
}

/// Writes the shard files. Each rank writes some of them.
pub fn run(start: &Start, mut comm: MpiComm, args: &QuantizeArgs, overrides: &[String]) -> Result<()> {
    let command = if args.shape.is_some() { Command::QuantizeShape } else { Command::Quantize };
    let mut given = vec![("shards", args.output.clone().into())];
    given.extend(args.model.clone().map(|model| ("model", model.into())));
    let job = start.job(&mut comm, recipe::from_options(command, given, overrides)?)?;
    let num_shards = args.world_size as usize;
    let mut tell = |line| start.log.line(line);
    let made_up = args.shape.as_deref().map(made_up).transpose()?;
    let mut opened = match &made_up {
        Some(weights) => {
            let dir = shape::folder(&job, "--output")?;
            weights.check_folder(&dir)?;
            start.open_made_up(&mut comm, &job, weights.clone(), &dir, num_shards)?
        }
        None => start.open_in_shards(&mut comm, &job, num_shards)?,
    };
    start.threads(&mut comm)?;
    let own: Vec<usize> = (0..num_shards).filter(|s| s % start.world.world_size == start.world.rank).collect();
    let mut warn = |line: String| tracing::warn!("{line}");
    opened.write(&mut comm, &own, &mut tell, &mut warn)?;
    opened.keep_digests(&mut tell);
    if let Some(weights) = &made_up {
        weights.finish_folder(&mut comm, &opened.shard_spec.dir)?;
    }
    let size = bytes(opened.shard_spec.data_bytes());
    start.log.line(format!(
        "{}: {num_shards} shard files of {size}, {}",
        opened.shard_spec.dir.display(),
        opened.shard_spec.encoding
    ));
    Ok(())
}

/// Returns made-up weights of a shape.
fn made_up(name: &str) -> Result<MadeUp> {
    MadeUp::new(shape::config(name)?, name)
}
