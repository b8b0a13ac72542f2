//! Communication between ranks. [`Comm`] has blocking collectives on host memory. [`Queue`], which the executor uses,
//! has ordered queues of collectives on device memory and of copies between device and host.

mod communicators;
pub mod cuda_queue;
pub mod cuda_store;
pub mod guarded;
pub mod host_queue;
pub mod local;
pub mod mpi;
pub mod nccl;
mod node;
pub mod pairs;
pub mod spans;
mod sums;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytemuck::Pod;

use crate::choices::choices;
use crate::device::{Buffer, Device, Element, HostBuffer, Place, View, ViewMut};
use guarded::Guarded;
use spans::Span;

/// Blocking collectives on host memory, of any number of bytes. All ranks call the same ones in the same order, from
/// one thread each.
pub trait Comm: Send {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// Fills `recv` with the `send` of every rank in rank order; `recv.len() == world_size · send.len()`.
    fn all_gather(&mut self, send: &[u8], recv: &mut [u8]) -> Result<()>;
    /// Fills `whole` with the parts of every rank in rank order, of which this rank's own is there already.
    /// `whole.len()` is a multiple of the world size.
    fn all_gather_in_place(&mut self, whole: &mut [u8]) -> Result<()> {
        pairs::all_gather_in_place(self, whole)
    }
    /// Sends part r of `send` to rank r and receives part r of `recv` from it. Both have world_size equal parts.
    fn all_to_all(&mut self, send: &[u8], recv: &mut [u8]) -> Result<()>;
    /// Sends `send` to rank `to` while `recv` is filled by rank `from`, each of which makes the matching call with as
    /// many bytes. Where there are no bytes, no message is sent.
    fn send_receive(&mut self, to: usize, send: &[u8], from: usize, recv: &mut [u8]) -> Result<()>;
}

/// The ranks of a job, as a sharding strategy groups them.
pub struct Groups {
    /// All ranks.
    pub world: Box<dyn Comm>,
    /// The ranks that hold one base together, each a shard: all of them (full_shard), those of a node (hybrid_shard),
    /// or each rank alone (no_shard).
    pub shards: Box<dyn Comm>,
    /// The ranks that hold the same shard.
    pub replicas: Box<dyn Comm>,
}

impl Groups {
    pub fn position(&self) -> Position {
        Position {
            rank: self.world.rank(),
            world_size: self.world.world_size(),
            shard: self.shards.rank(),
            num_shards: self.shards.world_size(),
            replica: self.replicas.rank(),
            num_replicas: self.replicas.world_size(),
        }
    }
}

/// The place of a rank among the others: rank = replica · num_shards + shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub rank: usize,
    pub world_size: usize,
    pub shard: usize,
    pub num_shards: usize,
    pub replica: usize,
    pub num_replicas: usize,
}

choices! {
    /// The way in which a rank gets the other ranks' shards of the base.
    Gather {
        /// An all-gather sends them: NCCL's between GPUs, MPI's between CPU ranks.
        Collective = "nccl",
        /// The rank reads them from memory that the ranks of a node share.
        Host = "host",
    }
}

/// Bytes of a shard, a range of a mapped shard file.
pub trait ShardBytes: AsRef<[u8]> + Send + Sync {
    /// Says that the bytes have been copied and need not stay in memory.
    fn let_go(&self) {}

    /// Fails if the file that the bytes are mapped from has another length by now.
    fn check_length(&self) -> Result<()> {
        Ok(())
    }
}

impl ShardBytes for Vec<u8> {}

/// Bytes of a shard that stay valid while a collective reads them.
pub type SharedBytes = Arc<dyn ShardBytes>;

/// A shard that is read or made only when it is stored, so that no two have to be in memory at a time.
pub struct ShardSource {
    pub bytes: usize,
    pub read: Box<dyn FnOnce() -> Result<SharedBytes>>,
}

impl ShardSource {
    /// Reads or makes the shard of unit `i` and checks its length.
    pub fn take(self, i: usize) -> Result<SharedBytes> {
        let shard = (self.read)()?;
        let found = (*shard).as_ref().len();
        ensure!(found == self.bytes, "shard {i} has {found} bytes, expected {}", self.bytes);
        Ok(shard)
    }

    /// Wraps a shard that is in memory already.
    pub fn ready(shard: SharedBytes) -> ShardSource {
        ShardSource { bytes: (*shard).as_ref().len(), read: Box::new(move || Ok(shard)) }
    }
}

/// Pauses before actions. Tests set them so that a missing wait shows.
#[derive(Clone, Copy, Default, Debug)]
pub struct Delays {
    pub before_gather: Duration,
    pub before_reduce: Duration,
    pub before_fetch: Duration,
    pub before_put: Duration,
}

impl Delays {
    /// Sets one pause before every action.
    pub fn all(delay: Duration) -> Delays {
        Delays { before_gather: delay, before_reduce: delay, before_fetch: delay, before_put: delay }
    }
}

/// Time for which the computation stood still, waiting for other ranks (`gather`) and for copies.
#[derive(Clone, Copy, Default, Debug)]
pub struct Waits {
    pub gather: Duration,
    pub copy: Duration,
}

/// Ordered queues of collectives on device memory and of copies. Starting an action hands its buffers over and
/// waiting for it gives them back, so that nobody can read a buffer that is still being filled.
pub trait Queue<D: Device> {
    /// An action that was started and not yet waited for.
    type Pending<T: Send + 'static>;
    /// This rank's shard of a unit, ready to be gathered.
    type Shard;

    /// Takes over this rank's shards before the first gather. Shards that are not resident stay in host memory, and
    /// each gather fetches them. Collective.
    fn store(&mut self, shards: Vec<ShardSource>, resident: &[bool], gather: Gather) -> Result<Vec<Self::Shard>>;

    /// Returns the bytes of device memory that the queue has taken in addition to the arena's plan, resident shards
    /// included.
    fn device_bytes(&self) -> usize;

    /// Returns the bytes of host memory that hold shards, mapped files not counted.
    fn host_bytes(&self) -> usize;

    fn position(&self) -> Position;

    fn rank(&self) -> usize {
        self.position().rank
    }

    fn world_size(&self) -> usize {
        self.position().world_size
    }

    /// Returns the frozen bytes of a unit, all shards one after the other, if they lie on the device already. Such a
    /// unit need not be gathered. They are never written to.
    fn whole<'a>(&self, _shard: &'a Self::Shard) -> Option<View<'a, D, u8>> {
        None
    }

    /// Gathers a unit's frozen shards: shard s lands at `s · shard_len` of `out`, which may be longer.
    fn gather_frozen(
        &mut self,
        name: String,
        shard: &Self::Shard,
        out: Buffer<D, u8>,
    ) -> Result<Self::Pending<Buffer<D, u8>>>;

    /// Gathers a unit's trainable shards to the beginning of `full`, which may be longer; waiting returns both
    /// buffers.
    fn gather_trainable(
        &mut self,
        name: String,
        buffers: TrainableBuffers<D>,
    ) -> Result<Self::Pending<TrainableBuffers<D>>>;

    /// Sums `full` over all ranks into each rank's `shard`: over the ranks of its group in their order, then over the
    /// groups in theirs. `full` begins with num_shards parts of the shard's length, each of num_replicas equal ones;
    /// it may be longer.
    fn reduce(&mut self, name: String, buffers: TrainableBuffers<D>) -> Result<Self::Pending<TrainableBuffers<D>>>;

    /// Copies the first `len` elements to the host.
    fn put<T: Element>(&mut self, name: String, copy: HostCopy<D, T>) -> Result<Self::Pending<HostCopy<D, T>>>;

    /// Copies the first `len` elements from the host.
    fn fetch<T: Element>(&mut self, name: String, copy: HostCopy<D, T>) -> Result<Self::Pending<HostCopy<D, T>>>;

    /// Copies from the beginning of host memory to the device, as a part of the computation: what the compute queue is
    /// given from here on comes after it.
    fn upload<T: Element>(
        &mut self,
        name: String,
        device: ViewMut<'_, D, T>,
        host: &mut Guarded<HostBuffer<T>>,
    ) -> Result<()>;

    /// Orders whatever the compute queue is given from here on after the action, and returns the action's buffers. On
    /// a GPU the host does not wait: it reaches memory of its own only through [`Guarded::wait_on_host`].
    fn wait<T: Send + 'static>(&mut self, pending: Self::Pending<T>) -> Result<T>;

    /// Returns how long waits have taken since the last call. The compute queue must be done.
    fn take_waits(&mut self) -> Result<Waits>;

    /// Starts or stops the recording of spans.
    fn record_spans(&mut self, on: bool);

    /// Takes the recorded spans, in seconds since `begin`. The compute queue must be done.
    fn take_spans(&mut self, begin: &D::Mark) -> Result<Vec<Span>>;

    /// Returns every rank's `values` in rank order. Blocks.
    fn all_gather_f64(&mut self, name: &str, values: &[f64]) -> Result<Vec<Vec<f64>>>;

    /// Returns the `values` of each shard's rank, one after the other; all have as many. Blocks.
    fn gather_shards_f32(&mut self, name: &str, values: &[f32]) -> Result<Vec<f32>>;

    /// Brings the shards of values to the rank of the first shard, where `values` begins with its own and has room for
    /// all; elsewhere `values` is the shard. Blocks.
    fn collect_f32(&mut self, name: &str, values: &mut [f32]) -> Result<()>;

    /// Gives every rank the `values` of rank 0; all have as many. Blocks.
    fn broadcast_f32(&mut self, name: &str, values: &mut Vec<f32>) -> Result<()>;

    /// Returns the element-wise sum over ranks, added in rank order. Blocks.
    fn all_reduce_f64(&mut self, name: &str, values: &[f64]) -> Result<Vec<f64>> {
        let mut sum = vec![0.0; values.len()];
        for rank in self.all_gather_f64(name, values)? {
            sum.iter_mut().zip(rank).for_each(|(s, v)| *s += v);
        }
        Ok(sum)
    }
}

/// A unit's trainable values (or gradients): one rank's shard and the whole.
pub struct TrainableBuffers<D: Device> {
    pub shard: Guarded<Place<D, f32>>,
    pub full: Buffer<D, f32>,
}

/// A buffer of the device and its place on the host.
pub struct HostCopy<D: Device, T> {
    pub device: Buffer<D, T>,
    pub host: Guarded<HostBuffer<T>>,
    /// Elements that are copied.
    pub len: usize,
}

/// Gives every rank the bytes of rank 0, from each rank to the next.
pub fn broadcast(comm: &mut dyn Comm, bytes: &mut [u8]) -> Result<()> {
    let (rank, world_size) = (comm.rank(), comm.world_size());
    if rank > 0 {
        comm.send_receive(rank, &[], rank - 1, bytes)?;
    }
    match rank + 1 < world_size {
        true => comm.send_receive(rank + 1, bytes, rank, &mut []),
        false => Ok(()),
    }
}

/// Brings the bytes of all ranks to rank 0, where `bytes` begins with its own and has room for as many of each;
/// elsewhere they are the bytes to send.
pub fn collect(comm: &mut dyn Comm, bytes: &mut [u8]) -> Result<()> {
    let (rank, world_size) = (comm.rank(), comm.world_size());
    if rank > 0 {
        return comm.send_receive(0, bytes, 0, &mut []);
    }
    let len = bytes.len() / world_size;
    (1..world_size).try_for_each(|from| comm.send_receive(from, &[], from, &mut bytes[from * len..(from + 1) * len]))
}

/// Gives every rank the bytes of rank 0; what the other ranks pass is not looked at.
pub fn broadcast_bytes(comm: &mut dyn Comm, bytes: Vec<u8>) -> Result<Vec<u8>> {
    let len = all_gather_u64(comm, bytes.len() as u64)?[0] as usize;
    let mut all = if comm.rank() == 0 { bytes } else { vec![0; len] };
    broadcast(comm, &mut all)?;
    Ok(all)
}

/// Returns the `values` of every rank, one rank's after the other's; all have as many.
pub fn all_gather_values<T: Pod>(comm: &mut dyn Comm, name: &str, values: &[T]) -> Result<Vec<T>> {
    let mut received = vec![T::zeroed(); values.len() * comm.world_size()];
    comm.all_gather(bytemuck::cast_slice(values), bytemuck::cast_slice_mut(&mut received))
        .with_context(|| name.to_string())?;
    Ok(received)
}

/// Returns every rank's `value` in rank order.
pub fn all_gather_u64(comm: &mut dyn Comm, value: u64) -> Result<Vec<u64>> {
    let mut recv = vec![0u8; 8 * comm.world_size()];
    comm.all_gather(&value.to_le_bytes(), &mut recv)?;
    Ok(u64s(&recv))
}

/// Returns every rank's `bytes` in rank order; ranks may have different numbers of them.
pub fn all_gather_bytes(comm: &mut dyn Comm, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let lengths = all_gather_u64(comm, bytes.len() as u64)?;
    let longest = lengths.iter().max().map_or(0, |&len| len as usize);
    let mut send = bytes.to_vec();
    send.resize(longest, 0);
    let mut recv = vec![0; longest * comm.world_size()];
    comm.all_gather(&send, &mut recv)?;
    Ok(lengths.iter().enumerate().map(|(rank, &len)| recv[rank * longest..][..len as usize].to_vec()).collect())
}

/// Returns every rank's `values` in rank order; ranks may have different numbers of them.
pub fn all_gather_u64s(comm: &mut dyn Comm, values: &[u64]) -> Result<Vec<Vec<u64>>> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Ok(all_gather_bytes(comm, &bytes)?.iter().map(|bytes| u64s(bytes)).collect())
}

fn u64s(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks().0.iter().map(|&bytes| u64::from_le_bytes(bytes)).collect()
}

/// Returns the name of this machine, for messages and for the record.
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or("an unknown host".into(), |name| name.trim().into())
}

/// Returns an identifier of this machine since it was started; empty where the system has none. Containers of one
/// machine have the same.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

/// Returns true on all ranks if `here` is true on any.
pub fn anywhere(comm: &mut dyn Comm, here: bool) -> Result<bool> {
    Ok(all_gather_u64(comm, u64::from(here))?.contains(&1))
}

/// Returns when every rank has called it.
pub fn barrier(comm: &mut dyn Comm) -> Result<()> {
    all_gather_u64(comm, 0).map(|_| ())
}
