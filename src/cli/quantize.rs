//! `quantize`

use std::path::Path;

use anyhow::Result;

use crate::checkpoint::load::{self, LoadOptions};
use crate::comm::mpi::MpiComm;
use crate::recipe;
use crate::train::log::bytes;

use super::start::{Start, load_options};

pub fn run(start: &Start, model: &Path, output: &Path, world_size: u32, overrides: &[String]) -> Result<()> {
    let job = recipe::for_quantize(model, overrides)?;
    let num_shards = world_size as usize;
    let options = LoadOptions { shards: Some(output.to_path_buf()), ..load_options(&job, num_shards) };
    let opened = load::open(&job.model, &options)?;
    let mut comm = MpiComm::new(start.world)?;
    start.threads(&mut comm)?;
    let own: Vec<usize> = (0..num_shards).filter(|s| s % start.world.world_size == start.world.rank).collect();
    opened.write(&mut comm, &own, &mut |line| start.log.line(line))?;
    let size = bytes(opened.spec.data_bytes());
    start.log.line(format!("{}: {num_shards} shard files of {size}, {}", output.display(), opened.spec.encoding));
    Ok(())
}
