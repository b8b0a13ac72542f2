//! `quantize`

use anyhow::Result;

use crate::comm::mpi::MpiComm;
use crate::recipe::{self, Command};
use crate::start::engine::Start;
use crate::start::options::load_options;
use crate::train::log::bytes;

pub fn run(start: &Start, model: &str, output: &str, world_size: u32, overrides: &[String]) -> Result<()> {
    let given = vec![("model", model.into()), ("shards", output.into())];
    let job = start.agree_on(recipe::from_options(Command::Quantize, given, overrides)?)?;
    let num_shards = world_size as usize;
    let mut comm = MpiComm::new(start.world)?;
    let mut tell = |line| start.log.line(line);
    let mut opened = start.open_with(&job, &load_options(&job, num_shards))?;
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
