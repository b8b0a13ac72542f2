//! Ranks that `mpirun` or `srun` started: how they find each other, host collectives, and how all end when one fails.
#![expect(unsafe_code, reason = "calls MPI where rsmpi has no safe form")]

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mpi::Threading;
use mpi::environment::Universe;
use mpi::topology::{Color, SimpleCommunicator};
use mpi::traits::*;

use super::pairs::{self, PIECE_BYTES};
use super::watch::{self, Board, Limit, Phase};
use super::{Comm, Groups};
use crate::device::cpu::SharedWords;

/// Variables in which a launcher says how many ranks it started.
const LAUNCHER_SIZES: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "PALS_SIZE"];

/// Variables in which a launcher says which rank a process is.
const LAUNCHER_RANKS: [&str; 5] = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PALS_RANKID", "SLURM_PROCID"];

/// Help for an MPI_Init that never returns.
const INIT_HELP: &str =
    "all ranks must be started, by the mpirun or srun of one MPI, and reach each other over the network";

/// Time between two polls of a collective. A rank that waits leaves its core to the computation.
const POLL: Duration = Duration::from_micros(50);

/// Pause in which the launcher passes on printed messages before it prints its own about the abort, and rank 0 notes why all end.
const MESSAGE_FIRST: Duration = Duration::from_millis(500);

/// True while there are other ranks to end and any thread may call MPI_Abort.
static ANY_THREAD_MAY_ABORT: AtomicBool = AtomicBool::new(false);

/// The MPI world. Dropping it finalizes MPI, which waits for all ranks.
pub struct World {
    /// Shared with all communicators, so that MPI is not finalized while one exists.
    universe: Arc<ManuallyDrop<Universe>>,
    pub rank: usize,
    pub world_size: usize,
    pub local_rank: usize,
    pub local_size: usize,
    /// Number of ranks of each node if all nodes have as many and rank = node · node_size + local rank.
    pub node_size: Option<usize>,
}

/// Variable that makes tests treat one machine as several nodes; its value is the number of ranks of each.
const NODE_SIZE_VARIABLE: &str = "FSDP_QLORA_RANKS_PER_NODE";

impl World {
    /// Starts the watchdog and initializes MPI. Fails if the launcher names more ranks than this MPI sees: with an
    /// MPI that does not belong to the launcher, every rank is a world of its own.
    pub fn init() -> Result<World> {
        watch::start(launcher_rank(), launcher_sizes().map(|(_, size)| size).max().unwrap_or(1))?;
        watch::phase(Phase::Start)?;
        let wait = watch::wait_within("MPI_Init", Limit::Start, Some(INIT_HELP));
        let (universe, provided) =
            mpi::initialize_with_threading(Threading::Multiple).context("MPI is initialized already")?;
        ensure!(provided >= Threading::Serialized, "this MPI gives thread level {provided:?}; Serialized is needed");
        let world = universe.world();
        let (rank, world_size) = (world.rank() as usize, world.size() as usize);
        // A single rank just exits.
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
        share_board(&node, rank, world_size)?;
        drop(wait);
        let universe = Arc::new(ManuallyDrop::new(universe));
        Ok(World { universe, rank, world_size, local_rank, local_size, node_size })
    }

    /// Finalizes MPI when all ranks have called it.
    pub fn end(self) -> Result<()> {
        let result = watch::phase(Phase::End);
        if result.is_err() {
            // The other ranks may never reach MPI_Finalize, and the error has to be reported now.
            std::mem::forget(self);
        }
        result
    }

    /// Returns whether groups of this many consecutive ranks each lie inside one node.
    pub fn fits_a_node(&self, num_ranks: usize) -> bool {
        self.node_size.is_some_and(|size| size.is_multiple_of(num_ranks))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // If a communicator still exists, perhaps on another thread, MPI is not finalized before the process ends.
        let Some(universe) = Arc::get_mut(&mut self.universe) else { return };
        let wait = watch::wait("MPI_Finalize");
        // A rank that fails after this line just exits, because MPI_Abort during MPI_Finalize makes Open MPI's launcher crash.
        ANY_THREAD_MAY_ABORT.store(false, Ordering::Relaxed);
        // SAFETY: no communicator is left, and `self` is used no more.
        unsafe { ManuallyDrop::drop(universe) };
        watch::done();
        drop(wait);
    }
}

/// Returns the rank that the launcher's variables give this process, which is known before MPI_Init; 0 if none is
/// set.
pub fn launcher_rank() -> usize {
    let numbers = LAUNCHER_RANKS.iter().filter_map(|name| std::env::var(name).ok()?.parse().ok());
    numbers.into_iter().next().unwrap_or(0)
}

/// Gives the watchdog a board that all ranks of a node write on. If their processes cannot map each other's memory,
/// each keeps its own board. Collective.
fn share_board(node: &SimpleCommunicator, rank: usize, world_size: usize) -> Result<()> {
    let (own, num_ranks) = (node.rank() as usize, node.size() as usize);
    let bytes = Board::bytes(num_ranks);
    let first = if own == 0 { Some(SharedWords::shareable(bytes)?) } else { None };
    let number = first.as_ref().map_or(0, |(_, file)| file.number());
    let mut ranks = vec![[0u64; 3]; num_ranks];
    let told = [rank as u64, u64::from(std::process::id()), number];
    node.all_gather_into(&told[..], ranks.as_flattened_mut());
    let [_, process, number] = ranks[0];
    let (words, file) = match first {
        Some((words, file)) => (Ok(words), Some(file)),
        // SAFETY: local rank 0 has made the file for words, just now.
        None => (unsafe { SharedWords::shared_by(process, number, bytes) }, None),
    };
    let board = words.ok().map(|words| Board::over(words, own));
    // From here on every record is there, and the file may go.
    node.barrier();
    drop(file);
    let world_ranks = ranks.iter().map(|[rank, ..]| *rank as usize).collect();
    match board {
        Some(board) => watch::join(board, rank, world_size, world_ranks),
        None => watch::join(Board::alone()?, rank, world_size, vec![rank]),
    }
    Ok(())
}

/// Returns the number of ranks that the launcher says it started, and the variable that says so.
fn launcher_sizes() -> impl Iterator<Item = (&'static str, usize)> {
    let step = std::env::var("SLURM_STEP_ID").ok().map(|_| "SLURM_STEP_NUM_TASKS");
    let names = LAUNCHER_SIZES.into_iter().chain(step);
    names.filter_map(|name| Some((name, std::env::var(name).ok()?.parse().ok()?)))
}

fn check_launcher() -> Result<()> {
    match launcher_sizes().find(|(_, size)| *size > 1) {
        None => Ok(()),
        Some((name, size)) => bail!(
            "the launcher started {size} ranks ({name}), but this program's MPI sees a world of 1: mpirun or srun belongs to another \
             MPI than the one this program was built with ({}). Use that MPI's mpirun, or `srun --mpi=pmix`",
            library()
        ),
    }
}

/// Returns the name and version of the MPI that the program was built with. Open MPI ends them with a zero byte.
fn library() -> String {
    let text = mpi::environment::library_version().unwrap_or_default();
    let line = text.trim_end_matches('\0').lines().next().unwrap_or_default();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Ends every rank of the job with this exit status. A single rank just exits.
pub fn abort(status: i32) -> ! {
    watch::end_soon();
    watch::tell_the_end();
    if ANY_THREAD_MAY_ABORT.load(Ordering::Relaxed) {
        std::thread::sleep(MESSAGE_FIRST);
        // SAFETY: MPI was initialized with thread level Multiple, so any thread may call it at any time.
        unsafe { mpi::ffi::MPI_Abort(mpi::ffi::RSMPI_COMM_WORLD, status) };
    }
    // MPI_Abort was not called or has returned: mpirun ends the job when a process exits with a status other than 0.
    std::process::exit(status)
}

/// Lock under which MPI is called, for an MPI that allows one thread at a time; otherwise it costs nothing.
static TURN: Mutex<()> = Mutex::new(());

fn in_turn<T>(call: impl FnOnce() -> T) -> T {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    call()
}

/// Host collectives over an MPI communicator.
pub struct MpiComm {
    /// Never freed: that would be a collective, which a failed rank never joins.
    communicator: ManuallyDrop<SimpleCommunicator>,
    /// Keeps MPI from being finalized.
    universe: Arc<ManuallyDrop<Universe>>,
    rank: usize,
    world_size: usize,
}

// SAFETY: the handle of a communicator is valid on every thread, MPI stays initialized while it exists, and calls
// take turns.
unsafe impl Send for MpiComm {}

impl MpiComm {
    /// Makes a communicator of all ranks. One thread at a time may use it, with the same order of calls on every
    /// rank.
    pub fn new(world: &World) -> Result<MpiComm> {
        Ok(Self::over(SimpleCommunicator::world(), &world.universe))
    }

    fn over(comm: SimpleCommunicator, universe: &Arc<ManuallyDrop<Universe>>) -> MpiComm {
        let (rank, world_size) = (comm.rank() as usize, comm.size() as usize);
        MpiComm { communicator: ManuallyDrop::new(comm), universe: universe.clone(), rank, world_size }
    }

    /// Makes another communicator of the same ranks. Collective.
    pub fn another(&self) -> Result<MpiComm> {
        Ok(MpiComm::over(self.split(0)?, &self.universe))
    }

    /// Makes a communicator of the ranks that give the same color. Collective.
    fn split(&self, color: usize) -> Result<SimpleCommunicator> {
        let _wait = watch::wait("MPI_Comm_split");
        in_turn(|| self.communicator.split_by_color(Color::with_value(color as i32)))
            .context("MPI made no communicator")
    }

    /// Returns this communicator and those of the shards and of the replicas, for groups of `num_shards` ranks that
    /// hold a base. Collective.
    pub fn into_groups(self, num_shards: usize) -> Result<Groups> {
        ensure!(
            num_shards > 0 && self.world_size.is_multiple_of(num_shards),
            "{} ranks do not divide into groups of {num_shards}",
            self.world_size
        );
        let split =
            |color: usize| -> Result<Box<dyn Comm>> { Ok(Box::new(MpiComm::over(self.split(color)?, &self.universe))) };
        let (shards, replicas) = (split(self.rank / num_shards)?, split(self.rank % num_shards)?);
        Ok(Groups { world: Box::new(self), shards, replicas })
    }
}

/// Returns whether MPI, which counts in `i32`, can move this many bytes in one call.
fn is_countable(bytes: usize) -> bool {
    i32::try_from(bytes).is_ok()
}

/// Returns when a request of MPI is done. If that takes too long the watchdog ends all ranks. There is no error to
/// return: MPI still owns the buffers of the request.
fn complete<'a, T: ?Sized>(mut request: mpi::request::Request<'a, T, &mpi::request::LocalScope<'a>>) {
    let _wait = watch::wait_here();
    loop {
        request = match in_turn(|| request.test()) {
            Ok(_) => return,
            Err(request) => request,
        };
        std::thread::sleep(POLL);
    }
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
        // Two empty buffers have one address, which MPI refuses.
        if recv.is_empty() {
            return Ok(());
        }
        mpi::request::scope(|scope| {
            complete(in_turn(|| self.communicator.immediate_all_gather_into(scope, send, recv)));
        });
        Ok(())
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
        if recv.is_empty() {
            return Ok(());
        }
        mpi::request::scope(|scope| {
            complete(in_turn(|| self.communicator.immediate_all_to_all_into(scope, send, recv)));
        });
        Ok(())
    }

    fn send_receive(&mut self, to: usize, send: &[u8], from: usize, recv: &mut [u8]) -> Result<()> {
        ensure!(to < self.world_size && from < self.world_size, "send_receive: ranks {to} and {from}");
        if to == self.rank && from == self.rank {
            ensure!(send.len() == recv.len(), "send_receive: {} into {} bytes", send.len(), recv.len());
            recv.copy_from_slice(send);
            return Ok(());
        }
        let [to, from] = [to, from].map(|rank| self.communicator.process_at_rank(rank as i32));
        let (mut pieces, mut places) = (send.chunks(PIECE_BYTES), recv.chunks_mut(PIECE_BYTES));
        loop {
            let (piece, place) = (pieces.next(), places.next());
            if piece.is_none() && place.is_none() {
                return Ok(());
            }
            mpi::request::scope(|scope| {
                let received = place.map(|place| in_turn(|| from.immediate_receive_into(scope, place)));
                let sent = piece.map(|piece| in_turn(|| to.immediate_send(scope, piece)));
                received.into_iter().for_each(complete);
                sent.into_iter().for_each(complete);
            });
        }
    }
}
