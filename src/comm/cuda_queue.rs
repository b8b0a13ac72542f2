//! Collectives and copies of the CUDA device, each kind on a stream of its own, ordered with the compute stream by events: NCCL
//! between ranks (with one rank, copies), fetches from and puts to pinned host memory. Scalars and what belongs to the host go
//! over MPI.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::{CudaEvent, CudaStream};
use rayon::prelude::*;

use super::nccl::Nccl;
use super::watchdog::Watchdog;
use super::{Comm, Delays, HostCopy, Kind, Queue, ShardSource, TrainableBuffers, Waits};
use crate::device::cuda::{Cuda, HalfType};
use crate::device::{Arena, Buffer, Device, Element, MemoryPlan, Place};

/// Bytes that one thread copies at a time.
const COPY_BYTES: usize = 1 << 20;

/// What a queue is made for.
#[derive(Clone, Copy, Debug, Default)]
pub struct QueueOptions {
    /// Length of the longest gradient buffer that will be reduced.
    pub max_gradients: usize,
    /// Several ranks on one GPU.
    pub share_gpu: bool,
    pub delays: Delays,
}

/// The queues of one rank.
pub struct CudaQueue<A: HalfType> {
    // The watchdog goes before what it watches.
    watchdog: Watchdog,
    cuda: Cuda<A>,
    communication: Arc<CudaStream>,
    fetch: Arc<CudaStream>,
    put: Arc<CudaStream>,
    comm: Box<dyn Comm>,
    nccl: Option<Arc<Nccl>>,
    /// What the other ranks send of a layer's gradients.
    received: Buffer<Cuda<A>, f32>,
    delays: Delays,
    device_bytes: usize,
    host_bytes: usize,
    /// Before and after each wait, on the compute stream.
    waits: Vec<(Kind, CudaEvent, CudaEvent)>,
}

/// An action under way on a stream.
pub struct Pending<T> {
    value: T,
    kind: Kind,
    done: Arc<CudaEvent>,
}

impl<A: HalfType> CudaQueue<A> {
    /// Collective.
    pub fn new(cuda: Cuda<A>, mut comm: Box<dyn Comm>, options: QueueOptions) -> Result<Self> {
        let nccl = match comm.world_size() {
            1 => None,
            _ => Some(Arc::new(Nccl::new(&mut *comm, options.share_gpu)?)),
        };
        let received = if nccl.is_some() { options.max_gradients } else { 0 };
        let mut plan = Arena::<Cuda<A>>::measure();
        plan.carve::<f32>("received gradients", received)?;
        let received = Arena::allocate(&cuda, plan.into_plan())?.carve("received gradients", received)?;
        let communication = cuda.new_stream()?;
        if let Some(nccl) = &nccl {
            connect(&cuda, nccl, &communication)?;
        }
        Ok(CudaQueue {
            watchdog: Watchdog::new(nccl.clone())?,
            communication,
            fetch: cuda.new_stream()?,
            put: cuda.new_stream()?,
            cuda,
            comm,
            nccl,
            device_bytes: received.len() * size_of::<f32>(),
            received,
            delays: options.delays,
            host_bytes: 0,
            waits: Vec::new(),
        })
    }

    /// An action whose last part is on `stream`.
    fn pending<T>(&self, name: String, kind: Kind, stream: &CudaStream, value: T) -> Result<Pending<T>> {
        let done = Arc::new(stream.record_event(None).map_err(|e| anyhow!("GPU event: {e}"))?);
        self.watchdog.watch(name, done.clone());
        Ok(Pending { value, kind, done })
    }

    /// What comes on `stream` follows all that the compute stream has been given.
    fn begin(&self, stream: &CudaStream, delay: Duration) -> Result<()> {
        self.cuda.order(self.cuda.compute(), stream)?;
        self.cuda.spin_on(stream, delay)
    }

    fn nccl(&self) -> Result<&Nccl> {
        self.nccl.as_deref().context("a collective of one rank has other ranks' parts")
    }

    /// Gathers `shard` into `whole`, on whichever streams it takes; returns the last one.
    fn gather<T: Element>(
        &self,
        shard: &Place<Cuda<A>, T>,
        num_shards: usize,
        whole: &mut Buffer<Cuda<A>, T>,
    ) -> Result<Arc<CudaStream>> {
        let (len, delays) = (shard.len(), &self.delays);
        let mut whole = whole.first_mut(len * num_shards);
        match shard {
            Place::Device(shard) => {
                self.begin(&self.communication, delays.before_gather)?;
                match num_shards {
                    1 => self.cuda.copy_on(&self.communication, whole, shard.view())?,
                    _ => self.nccl()?.all_gather(shard.view(), whole, &self.communication)?,
                }
                Ok(self.communication.clone())
            }
            Place::Host(shard) => {
                self.begin(&self.fetch, delays.before_fetch)?;
                let own = if num_shards == 1 { 0 } else { self.comm.rank() * len };
                self.cuda.fetch_on(&self.fetch, whole.range_mut(own..own + len), shard.view())?;
                if num_shards == 1 {
                    return Ok(self.fetch.clone());
                }
                self.cuda.order(&self.fetch, &self.communication)?;
                self.cuda.spin_on(&self.communication, delays.before_gather)?;
                self.nccl()?.all_gather_in_place(whole, &self.communication)?;
                Ok(self.communication.clone())
            }
        }
    }

    /// Sums `full` over ranks into this rank's part of it, or, where every rank keeps all, into every part.
    fn sum_over_ranks(&mut self, full: &mut Buffer<Cuda<A>, f32>, everywhere: bool) -> Result<()> {
        let (len, world_size) = (full.len(), self.comm.world_size());
        let part = len / world_size;
        ensure!(part * world_size == len && len <= self.received.len(), "{len} gradients, {world_size} ranks");
        let mut received = std::mem::replace(&mut self.received, Buffer::none());
        let (nccl, stream) = (self.nccl()?, &self.communication);
        nccl.all_to_all(full.view(), received.first_mut(len), stream)?;
        // The sum takes the place of this rank's own part of the gradients, which has been sent.
        let own = nccl.rank() * part..(nccl.rank() + 1) * part;
        self.cuda.sum_parts_on(stream, full.view_mut().into_range(own), received.first(len))?;
        if everywhere {
            nccl.all_gather_in_place(full.view_mut(), stream)?;
        }
        self.received = received;
        Ok(())
    }

    fn all_gather_values<T: bytemuck::Pod>(&mut self, name: &str, values: &[T]) -> Result<Vec<T>> {
        let mut received = vec![T::zeroed(); values.len() * self.comm.world_size()];
        self.comm
            .all_gather(bytemuck::cast_slice(values), bytemuck::cast_slice_mut(&mut received))
            .with_context(|| name.to_string())?;
        Ok(received)
    }
}

/// Runs each collective once on a few bytes: NCCL takes its buffers at the first use, and they should be there before memory is
/// planned.
fn connect<A: HalfType>(cuda: &Cuda<A>, nccl: &Nccl, stream: &CudaStream) -> Result<()> {
    const BYTES_OF_A_RANK: usize = 256;
    let len = nccl.world_size() * BYTES_OF_A_RANK;
    let carve = |arena: &mut Arena<Cuda<A>>| -> Result<[Buffer<Cuda<A>, u8>; 2]> {
        Ok([arena.carve("sent", len)?, arena.carve("received", len)?])
    };
    let mut plan = Arena::measure();
    carve(&mut plan)?;
    let [mut sent, mut received] = carve(&mut Arena::allocate(cuda, plan.into_plan())?)?;
    cuda.fill_bytes(sent.view_mut(), 0)?;
    cuda.order(cuda.compute(), stream)?;
    nccl.all_gather_in_place(sent.view_mut(), stream)?;
    nccl.all_to_all(sent.view(), received.view_mut(), stream)?;
    cuda.order(stream, cuda.compute())?;
    cuda.synchronize()
}

/// The plan of shards that go to one place.
fn shard_plan(shards: &[ShardSource], chosen: impl Fn(usize) -> bool) -> MemoryPlan {
    let mut arena = Arena::<crate::device::cpu::Cpu>::measure();
    for (i, shard) in shards.iter().enumerate().filter(|(i, _)| chosen(*i)) {
        arena.carve::<u8>(&format!("shards/{i}"), shard.bytes).expect("measuring does not fail");
    }
    arena.into_plan()
}

impl<A: HalfType> Queue<Cuda<A>> for CudaQueue<A> {
    type Pending<T: Send + 'static> = Pending<T>;
    type Shard = Place<Cuda<A>, u8>;

    /// Resident shards go to the GPU, the others to pinned memory; either way the mapped file is let go.
    fn store(&mut self, shards: Vec<ShardSource>, resident: &[bool]) -> Result<Vec<Self::Shard>> {
        let (on_device, on_host) = (shard_plan(&shards, |i| resident[i]), shard_plan(&shards, |i| !resident[i]));
        self.device_bytes += on_device.total_bytes();
        self.host_bytes += on_host.total_bytes();
        let mut device = Arena::allocate(&self.cuda, on_device).context("resident shards")?;
        let mut host = match on_host.total_bytes() {
            0 => Arena::measure(),
            _ => Arena::allocate_host(&self.cuda, on_host).context("shards in pinned host memory")?,
        };
        let stored = shards.into_iter().enumerate().map(|(i, shard)| {
            let (expected, shard) = (shard.bytes, (shard.read)()?);
            let (bytes, name): (&[u8], _) = ((*shard).as_ref(), format!("shards/{i}"));
            ensure!(bytes.len() == expected, "shard {i} has {} bytes, expected {expected}", bytes.len());
            if resident[i] {
                let mut stored = device.carve(&name, bytes.len())?;
                self.cuda.upload(stored.view_mut(), bytes)?;
                return Ok(Place::Device(stored));
            }
            let mut stored: Buffer<_, u8> = host.carve(&name, bytes.len())?;
            let parts = stored.view_mut().host_mut().par_chunks_mut(COPY_BYTES);
            parts.zip(bytes.par_chunks(COPY_BYTES)).for_each(|(to, from)| to.copy_from_slice(from));
            Ok(Place::Host(stored))
        });
        stored.collect()
    }

    fn device_bytes(&self) -> usize {
        self.device_bytes
    }

    fn host_bytes(&self) -> usize {
        self.host_bytes
    }

    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn world_size(&self) -> usize {
        self.comm.world_size()
    }

    fn gather_frozen(
        &mut self,
        name: String,
        shard: &Self::Shard,
        num_shards: usize,
        mut out: Buffer<Cuda<A>, u8>,
    ) -> Result<Pending<Buffer<Cuda<A>, u8>>> {
        let stream = self.gather(shard, num_shards, &mut out).with_context(|| name.clone())?;
        self.pending(name, Kind::Collective, &stream, out)
    }

    fn gather_trainable(
        &mut self,
        name: String,
        mut buffers: TrainableBuffers<Cuda<A>>,
    ) -> Result<Pending<TrainableBuffers<Cuda<A>>>> {
        let TrainableBuffers { shard, full } = &mut buffers;
        let num_shards = full.len() / shard.len().max(1);
        let stream = self.gather(shard, num_shards, full).with_context(|| name.clone())?;
        self.pending(name, Kind::Collective, &stream, buffers)
    }

    fn reduce(
        &mut self,
        name: String,
        mut buffers: TrainableBuffers<Cuda<A>>,
    ) -> Result<Pending<TrainableBuffers<Cuda<A>>>> {
        let TrainableBuffers { shard, full } = &mut buffers;
        let (len, world_size, rank) = (full.len(), self.comm.world_size(), self.comm.rank());
        ensure!(shard.len() == len / world_size || shard.len() == len, "{len} gradients into {}", shard.len());
        self.begin(&self.communication, self.delays.before_reduce)?;
        if world_size > 1 {
            self.sum_over_ranks(full, shard.len() == len).with_context(|| name.clone())?;
        }
        let own = if shard.len() == len { 0..len } else { rank * shard.len()..(rank + 1) * shard.len() };
        let sum = full.view().range(own);
        let stream = match shard {
            Place::Device(shard) => {
                self.cuda.copy_on(&self.communication, shard.view_mut(), sum)?;
                &self.communication
            }
            Place::Host(shard) => {
                self.cuda.order(&self.communication, &self.put)?;
                self.cuda.spin_on(&self.put, self.delays.before_put)?;
                self.cuda.put_on(&self.put, shard.view_mut(), sum)?;
                &self.put
            }
        };
        self.pending(name, Kind::Collective, stream, buffers)
    }

    fn put<T: Element>(
        &mut self,
        name: String,
        mut copy: HostCopy<Cuda<A>, T>,
    ) -> Result<Pending<HostCopy<Cuda<A>, T>>> {
        self.begin(&self.put, self.delays.before_put)?;
        self.cuda.put_on(&self.put, copy.host.first_mut(copy.len), copy.device.first(copy.len))?;
        self.pending(name, Kind::Copy, &self.put, copy)
    }

    fn fetch<T: Element>(
        &mut self,
        name: String,
        mut copy: HostCopy<Cuda<A>, T>,
    ) -> Result<Pending<HostCopy<Cuda<A>, T>>> {
        self.begin(&self.fetch, self.delays.before_fetch)?;
        self.cuda.fetch_on(&self.fetch, copy.device.first_mut(copy.len), copy.host.first(copy.len))?;
        self.pending(name, Kind::Copy, &self.fetch, copy)
    }

    /// The compute stream waits; the host does not.
    fn wait<T: Send + 'static>(&mut self, pending: Pending<T>) -> Result<T> {
        let before = self.cuda.timed_event()?;
        self.cuda.compute().wait(&pending.done).map_err(|e| anyhow!("GPU event: {e}"))?;
        self.waits.push((pending.kind, before, self.cuda.timed_event()?));
        Ok(pending.value)
    }

    fn take_waits(&mut self) -> Result<Waits> {
        let mut waits = Waits::default();
        for (kind, before, after) in self.waits.drain(..) {
            let elapsed = self.cuda.elapsed(&before, &after)?;
            match kind {
                Kind::Collective => waits.gather += elapsed,
                Kind::Copy => waits.copy += elapsed,
            }
        }
        Ok(waits)
    }

    fn all_gather_f64(&mut self, name: &str, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        let received = self.all_gather_values(name, values)?;
        Ok(received.chunks(values.len().max(1)).map(<[f64]>::to_vec).collect())
    }

    fn all_gather_f32(&mut self, name: &str, values: &[f32]) -> Result<Vec<f32>> {
        self.all_gather_values(name, values)
    }
}
