//! Does everything between a job and the first step: ranks agree, the model is opened, a device is taken, memory is
//! budgeted, and the engine is made.
//!
//! A subcommand goes through these steps in this order: [`Start::job`], [`Start::open`],
//! [`agree::agree_on_inputs`] for what was read, [`Start::base`], [`Start::with_engine`]. All of them are collective,
//! over one communicator, which the engine's queue keeps in the end. [`planned`] answers for a machine that is not
//! there.

pub mod adapter;
pub mod agree;
pub mod begin;
mod budget;
pub mod data;
pub mod engine;
mod facts;
mod host_memory;
mod locate;
pub mod options;
pub mod placement;
pub mod planned;
pub mod tokens;

use std::path::Path;

use anyhow::{Context, Result};
use jiff::Zoned;

use crate::checkpoint::load::{self, OpenedBase};
use crate::checkpoint::made_up::MadeUp;
use crate::comm::Comm;
use crate::comm::local::LocalComm;
use crate::comm::mpi::World;
use crate::fsdp::exec::Base;
use crate::recipe::{FsdpJob, Job};
use crate::train::log::Log;

use agree::{Agreed, agree_on};
pub use facts::Facts;
use options::load_options;
use placement::{DeviceKind, Placement};

/// A rank that has been started.
pub struct Start<'a> {
    pub world: &'a World,
    pub log: Log,
    /// The time at which the program was started, by the clock of rank 0.
    pub clock: Zoned,
    /// The device that the command line asks for.
    pub device: DeviceKind,
    pub ranks_per_gpu: usize,
}

impl Start<'_> {
    /// Returns the number of ranks that hold a base together.
    pub fn num_shards(&self, job: &FsdpJob) -> Result<usize> {
        options::num_shards(job, self.world.world_size, self.world.node_size)
    }

    /// Returns the job that all ranks have decided alike, with local files in the place of what it names of the hub. Collective.
    pub fn job(&self, comm: &mut dyn Comm, job: Job) -> Result<Agreed<Job>> {
        let Agreed(job) = agree_on(comm, job)?;
        Ok(Agreed(locate::locate(comm, job, self.world.local_rank == 0, self.log)?))
    }

    /// Returns the job of a command that runs on rank 0 alone, with local files in the place of what it names of the hub.
    pub fn job_of_one(job: Job) -> Result<Job> {
        let mut alone = LocalComm::world(1).pop().context("a world of one rank")?;
        locate::locate(&mut alone, job, true, Log { enabled: true })
    }

    /// Opens and checks a job's model, which must be the same on all ranks. Collective.
    pub fn open(&self, comm: &mut dyn Comm, job: &Agreed<Job>) -> Result<OpenedBase> {
        self.open_in_shards(comm, job, self.num_shards(&job.fsdp)?)
    }

    /// Opens and checks a job's model like [`Start::open`], but for another number of shards than the ranks of this
    /// run need. Collective.
    pub fn open_in_shards(&self, comm: &mut dyn Comm, job: &Agreed<Job>, num_shards: usize) -> Result<OpenedBase> {
        let options = load_options(job, num_shards);
        let opened = load::open(&job.model, &options, comm, &mut |line| self.log.line(line))?;
        agree_on_base(comm, opened)
    }

    /// Opens made-up weights whose shards are in `dir`, or will be. Collective.
    pub fn open_made_up(
        &self,
        comm: &mut dyn Comm,
        job: &Agreed<Job>,
        weights: MadeUp,
        dir: &Path,
        num_shards: usize,
    ) -> Result<OpenedBase> {
        agree_on_base(comm, load::made_up(weights, dir, &load_options(job, num_shards))?)
    }

    /// Returns the device and the base with this rank's shard mapped, which is made if it is not there. All ranks
    /// have agreed on the inputs before. Collective.
    pub fn base(
        &self,
        comm: &mut dyn Comm,
        opened: OpenedBase,
        job: &Agreed<Job>,
        _: &Agreed<Facts>,
    ) -> Result<(Placement, Base)> {
        let placement = self.place_for(comm, job, &opened.spec)?;
        let writes = opened.shard_spec.is_written_here(comm)?;
        // A warning is about the shard file of this rank.
        let mut warn = |line: String| tracing::warn!("{line}");
        let base = opened.load(comm, writes, &mut |line| self.log.line(line), &mut warn)?;
        Ok((placement, base))
    }
}

/// Returns a base that is the same on all ranks. Collective.
fn agree_on_base(comm: &mut dyn Comm, opened: OpenedBase) -> Result<OpenedBase> {
    let mut facts = Facts::default();
    facts.add("model", format!("content {}", opened.identity()));
    agree::agree(comm, &facts)?;
    Ok(opened)
}
