//! `quantize`

use anyhow::Result;

use crate::comm::mpi::MpiComm;
use crate::recipe::{self, Command};
use crate::start::Start;
use crate::start::agree::agree_on;
use crate::train::log::bytes;

/// Writes the shard files of a model, this rank its part of them.
pub fn run(
    start: &Start,
    mut comm: MpiComm,
    model: &str,
    output: &str,
    world_size: u32,
    overrides: &[String],
) -> Result<()> {
    let given = vec![("model", model.into()), ("shards", output.into())];
    let job = agree_on(&mut comm, recipe::from_options(Command::Quantize, given, overrides)?)?;
    let num_shards = world_size as usize;
    let mut tell = |line| start.log.line(line);
    let mut opened = start.open_in_shards(&mut comm, &job, num_shards)?;
    start.threads(&mut comm)?;
    let own: Vec<usize> = (0..num_shards).filter(|s| s % start.world.world_size == start.world.rank).collect();
    opened.write(&mut comm, &own, &mut tell)?;
    opened.keep_digests(&mut tell);
    let size = bytes(opened.spec.data_bytes());
    start.log.line(format!(
        "{}: {num_shards} shard files of {size}, {}",
        opened.spec.dir.display(),
        opened.spec.encoding
    ));
    Ok(())
}
