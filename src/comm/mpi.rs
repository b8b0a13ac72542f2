//! Ranks started by `mpirun` or `srun`: bootstrap, host collectives, and the end of all ranks when one fails.

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mpi::Threading;
use mpi::environment::Universe;
use mpi::topology::{Color, SimpleCommunicator};
use mpi::traits::*;

use super::pairs::{self, PIECE_BYTES};
use super::{Comm, Groups};

/// Variables in which a launcher says how many ranks it started.
const LAUNCHER_SIZES: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "PALS_SIZE"];

/// Time between two looks at a collective that is under way: a rank that waits leaves its core to the computation.
const POLL: Duration = Duration::from_micros(50);

/// How long the launcher gets to pass on what was printed, before it prints its own message about the abort.
const MESSAGE_FIRST: Duration = Duration::from_millis(200);

/// Whether there are others to end, and any thread may call MPI_Abort.
static ANY_THREAD_MAY_ABORT: AtomicBool = AtomicBool::new(false);

/// The MPI world. Dropping it finalizes MPI, which waits for all ranks.
pub struct World {
    _universe: Universe,
    pub rank: usize,
    pub world_size: usize,
    pub local_rank: usize,
    pub local_size: usize,
    /// Ranks of each node, where all have as many and rank = node · node_size + local rank.
    pub node_size: Option<usize>,
}

/// Makes several nodes of one, for tests: the ranks of each.
const NODE_SIZE_VARIABLE: &str = "FSDP_QLORA_RANKS_PER_NODE";

impl World {
    /// Initializes MPI. Fails when the launcher speaks of more ranks than this MPI sees: an MPI that does not belong to
    /// the launcher starts every rank as a world of its own.
    pub fn init() -> Result<World> {
        let (universe, provided) =
            mpi::initialize_with_threading(Threading::Multiple).context("MPI is initialized already")?;
        ensure!(provided >= Threading::Serialized, "this MPI gives thread level {provided:?}; Serialized is needed");
        let world = universe.world();
        let (rank, world_size) = (world.rank() as usize, world.size() as usize);
        // A rank alone just exits.
        ANY_THREAD_MAY_ABORT.store(provided == Threading::Multiple && world_size > 1, Ordering::Relaxed);
        if world_size == 1 {
            check_launcher()?;
        }
        let node = world.split_shared(rank as i32);
        let (local_rank, local_size) = (node.rank() as usize, node.size() as usize);
        let (mut places, place) = (vec![[0u64; 2]; world_size], [local_rank as u64, local_size as u64]);
        world.all_gather_into(&place[..], places.as_flattened_mut());
        let in_order = |(rank, [local, size]): (usize, &[u64; 2])| *size == place[1] && rank as u64 % size == *local;
        let node_size = places.iter().enumerate().all(in_order).then_some(local_size);
        let node_size = match std::env::var(NODE_SIZE_VARIABLE) {
            Err(_) => node_size,
            Ok(text) => {
                Some(text.parse().ok().filter(|n| *n > 0 && local_size.is_multiple_of(*n)).with_context(|| {
                    format!(
                        "{NODE_SIZE_VARIABLE} is {text:?}, allowed: a divisor of the {local_size} ranks of this machine"
                    )
                })?)
            }
        };
        Ok(World { _universe: universe, rank, world_size, local_rank, local_size, node_size })
    }

    /// Whether groups of this many ranks that follow each other lie inside a node.
    pub fn fits_a_node(&self, num_ranks: usize) -> bool {
        self.node_size.is_some_and(|size| size.is_multiple_of(num_ranks))
    }
}

fn check_launcher() -> Result<()> {
    let mut sizes: Vec<(&str, String)> =
        LAUNCHER_SIZES.iter().filter_map(|&name| Some((name, std::env::var(name).ok()?))).collect();
    if let (Ok(_), Ok(tasks)) = (std::env::var("SLURM_STEP_ID"), std::env::var("SLURM_STEP_NUM_TASKS")) {
        sizes.push(("SLURM_STEP_NUM_TASKS", tasks));
    }
    for (name, value) in sizes {
        if value.parse::<usize>().is_ok_and(|size| size > 1) {
            bail!(
                "the launcher started {value} ranks ({name}), but this program's MPI sees a world of 1: mpirun or srun \
                 belongs to another MPI than the one this program was built with ({}). Use that MPI's mpirun, or \
                 `srun --mpi=pmix`",
                mpi::environment::library_version().unwrap_or_default().lines().next().unwrap_or_default().trim()
            );
        }
    }
    Ok(())
}

/// Ends every rank of the job with this exit status. Does nothing but exit when there is no other rank.
pub fn abort(status: i32) -> ! {
    if ANY_THREAD_MAY_ABORT.load(Ordering::Relaxed) {
        std::thread::sleep(MESSAGE_FIRST);
        // SAFETY: MPI was initialized with thread level Multiple, so any thread may call it at any time.
        unsafe { mpi::ffi::MPI_Abort(mpi::ffi::RSMPI_COMM_WORLD, status) };
    }
    // Without MPI_Abort: mpirun ends the job when one of its processes exits with a status other than 0.
    std::process::exit(status)
}

/// Host collectives over an MPI communicator; all calls come from the queue's thread.
pub struct MpiComm {
    /// Never freed: that would be one more collective, and a rank that fails does not come to it.
    communicator: ManuallyDrop<SimpleCommunicator>,
    rank: usize,
    world_size: usize,
    timeout: Duration,
}

// SAFETY: the handle of a communicator is the same on every thread; MPI runs at thread level Serialized or Multiple and
// only the thread that owns this value makes calls through it.
unsafe impl Send for MpiComm {}

impl MpiComm {
    /// `_world` proves that MPI is initialized.
    pub fn new(_world: &World) -> Result<MpiComm> {
        Self::over(SimpleCommunicator::world())
    }

    fn over(comm: SimpleCommunicator) -> Result<MpiComm> {
        let (rank, world_size) = (comm.rank() as usize, comm.size() as usize);
        Ok(MpiComm { communicator: ManuallyDrop::new(comm), rank, world_size, timeout: super::timeout()? })
    }

    /// This communicator, and those of the base's shards and replicas, where groups of `num_shards` ranks hold a base. Collective.
    pub fn into_groups(self, num_shards: usize) -> Result<Groups> {
        ensure!(
            num_shards > 0 && self.world_size.is_multiple_of(num_shards),
            "{} ranks do not divide into groups of {num_shards}",
            self.world_size
        );
        let split = |color: usize| -> Result<Box<dyn Comm>> {
            let part = self
                .communicator
                .split_by_color(Color::with_value(color as i32))
                .context("MPI made no communicator")?;
            Ok(Box::new(MpiComm::over(part)?))
        };
        let (shards, replicas) = (split(self.rank / num_shards)?, split(self.rank % num_shards)?);
        Ok(Groups { world: Box::new(self), shards, replicas })
    }
}

/// Whether MPI, which counts in `i32`, can move this many bytes in one call.
fn is_countable(bytes: usize) -> bool {
    i32::try_from(bytes).is_ok()
}

fn poll<'a, T: ?Sized>(
    what: &str,
    mut request: mpi::request::Request<'a, T, &mpi::request::LocalScope<'a>>,
    limit: Duration,
) -> Result<()> {
    let start = Instant::now();
    loop {
        request = match request.test() {
            Ok(_) => return Ok(()),
            Err(request) => request,
        };
        if start.elapsed() > limit {
            abort_after_timeout(what, limit);
        }
        std::thread::sleep(POLL);
    }
}

/// MPI owns the buffers of a request that did not end, so there is nothing to return to.
fn abort_after_timeout(what: &str, limit: Duration) -> ! {
    crate::stderr::line(&format!(
        "error: {what} did not end within {} s: another rank is stuck or gone",
        limit.as_secs()
    ));
    abort(1)
}

impl Comm for MpiComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_gather(&mut self, send: &[u8], recv: &mut [u8]) -> Result<()> {
        ensure!(recv.len() == send.len() * self.world_size, "all_gather: {} into {} bytes", send.len(), recv.len());
        if !is_countable(recv.len()) {
            return pairs::all_gather(self, send, recv);
        }
        let limit = self.timeout;
        mpi::request::scope(|scope| {
            poll("all_gather", self.communicator.immediate_all_gather_into(scope, send, recv), limit)
        })
    }

    fn all_to_all(&mut self, send: &[u8], recv: &mut [u8]) -> Result<()> {
        ensure!(
            send.len() == recv.len() && send.len().is_multiple_of(self.world_size),
            "all_to_all: {} bytes",
            send.len()
        );
        if !is_countable(recv.len()) {
            return pairs::all_to_all(self, send, recv);
        }
        let limit = self.timeout;
        mpi::request::scope(|scope| {
            poll("all_to_all", self.communicator.immediate_all_to_all_into(scope, send, recv), limit)
        })
    }

    fn send_receive(&mut self, to: usize, send: &[u8], from: usize, recv: &mut [u8]) -> Result<()> {
        ensure!(to < self.world_size && from < self.world_size, "send_receive: ranks {to} and {from}");
        if to == self.rank && from == self.rank {
            ensure!(send.len() == recv.len(), "send_receive: {} into {} bytes", send.len(), recv.len());
            recv.copy_from_slice(send);
            return Ok(());
        }
        let limit = self.timeout;
        let [to, from] = [to, from].map(|rank| self.communicator.process_at_rank(rank as i32));
        let (mut pieces, mut places) = (send.chunks(PIECE_BYTES), recv.chunks_mut(PIECE_BYTES));
        loop {
            let (piece, place) = (pieces.next(), places.next());
            if piece.is_none() && place.is_none() {
                return Ok(());
            }
            mpi::request::scope(|scope| {
                let received = place.map(|place| from.immediate_receive_into(scope, place));
                let sent = piece.map(|piece| to.immediate_send(scope, piece));
                received.map_or(Ok(()), |request| poll("receiving from a rank", request, limit))?;
                sent.map_or(Ok(()), |request| poll("sending to a rank", request, limit))
            })?;
        }
    }
}
