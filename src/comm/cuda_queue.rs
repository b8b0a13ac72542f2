//! Collectives and copies of the CUDA device, each kind on a stream of its own, ordered with the compute stream by events: NCCL
//! between ranks (with one rank, copies), fetches from and puts to pinned host memory. Scalars and what belongs to the host go
//! over MPI.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::{CudaEvent, CudaStream};
use rayon::prelude::*;

use super::nccl::Nccl;
use super::spans::{Lane, Span};
use super::watchdog::Watchdog;
use super::{Comm, Delays, HostCopy, Queue, ShardSource, TrainableBuffers, Waits};
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

/// What is waited for: a gather of one rank is a copy too, on the lane of fetches.
#[derive(Clone, Copy)]
enum Kind {
    Collective,
    Copy,
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
    /// What the other streams did; nothing while that is not recorded.
    spans: Option<Vec<(Lane, String, CudaEvent, CudaEvent)>>,
}

/// Begin and end of an action's part on a stream, where spans are recorded.
type Marks = Vec<(Lane, CudaEvent, CudaEvent)>;

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
        let received = Arena::carved(&cuda, |arena| arena.carve::<f32>("received gradients", received))?;
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
            spans: None,
        })
    }

    /// An action that ends on `lane`.
    fn pending<T>(&mut self, name: String, kind: Kind, lane: Lane, marks: Marks, value: T) -> Result<Pending<T>> {
        let done = Arc::new(self.stream(lane).record_event(None).map_err(|e| anyhow!("GPU event: {e}"))?);
        if let Some(spans) = &mut self.spans {
            spans.extend(marks.into_iter().map(|(lane, begin, end)| (lane, name.clone(), begin, end)));
        }
        self.watchdog.watch(name, done.clone());
        Ok(Pending { value, kind, done })
    }

    fn stream(&self, lane: Lane) -> &CudaStream {
        match lane {
            Lane::Compute => self.cuda.compute(),
            Lane::Communication => &self.communication,
            Lane::Fetch => &self.fetch,
            Lane::Put => &self.put,
        }
    }

    /// Does `f` on a lane, after all that `after` has been given.
    fn on(
        &self,
        lane: Lane,
        after: Lane,
        delay: Duration,
        marks: &mut Marks,
        f: impl FnOnce(&CudaStream) -> Result<()>,
    ) -> Result<()> {
        let stream = self.stream(lane);
        self.cuda.order(self.stream(after), stream)?;
        let begin = self.spans.as_ref().map(|_| self.cuda.mark_on(stream)).transpose()?;
        self.cuda.spin_on(stream, delay)?;
        f(stream)?;
        if let Some(begin) = begin {
            marks.push((lane, begin, self.cuda.mark_on(stream)?));
        }
        Ok(())
    }

    fn nccl(&self) -> Result<&Nccl> {
        self.nccl.as_deref().context("a collective of one rank has other ranks' parts")
    }

    /// Gathers `shard` into `whole`, on whichever lanes it takes; returns the last one.
    fn gather<T: Element>(
        &self,
        shard: &Place<Cuda<A>, T>,
        num_shards: usize,
        whole: &mut Buffer<Cuda<A>, T>,
        marks: &mut Marks,
    ) -> Result<Lane> {
        let (len, delays) = (shard.len(), &self.delays);
        let mut whole = whole.first_mut(len * num_shards);
        match shard {
            Place::Device(shard) => {
                self.on(Lane::Communication, Lane::Compute, delays.before_gather, marks, |stream| match num_shards {
                    1 => self.cuda.copy_on(stream, whole, shard.view()),
                    _ => self.nccl()?.all_gather(shard.view(), whole, stream),
                })?;
                Ok(Lane::Communication)
            }
            Place::Host(shard) => {
                let own = if num_shards == 1 { 0 } else { self.comm.rank() * len };
                self.on(Lane::Fetch, Lane::Compute, delays.before_fetch, marks, |stream| {
                    self.cuda.fetch_on(stream, whole.range_mut(own..own + len), shard.view())
                })?;
                if num_shards == 1 {
                    return Ok(Lane::Fetch);
                }
                self.on(Lane::Communication, Lane::Fetch, delays.before_gather, marks, |stream| {
                    self.nccl()?.all_gather_in_place(whole, stream)
                })?;
                Ok(Lane::Communication)
            }
        }
    }

    /// Sums `full` over ranks into this rank's part of it, or, where every rank keeps all, into every part. `received` is for
    /// what the other ranks send.
    fn sum_over_ranks(
        &self,
        full: &mut Buffer<Cuda<A>, f32>,
        received: &mut Buffer<Cuda<A>, f32>,
        everywhere: bool,
        stream: &CudaStream,
    ) -> Result<()> {
        let (len, nccl) = (full.len(), self.nccl()?);
        let part = len / nccl.world_size();
        ensure!(
            part * nccl.world_size() == len && len <= received.len(),
            "{len} gradients, {} planned",
            received.len()
        );
        nccl.all_to_all(full.view(), received.first_mut(len), stream)?;
        // The sum takes the place of this rank's own part of the gradients, which has been sent.
        let own = nccl.rank() * part..(nccl.rank() + 1) * part;
        self.cuda.sum_parts_on(stream, full.view_mut().into_range(own), received.first(len))?;
        if everywhere {
            nccl.all_gather_in_place(full.view_mut(), stream)?;
        }
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
    let [mut sent, mut received] = Arena::carved(cuda, carve)?;
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
        let mut marks = Marks::new();
        let lane = self.gather(shard, num_shards, &mut out, &mut marks).with_context(|| name.clone())?;
        self.pending(name, Kind::Collective, lane, marks, out)
    }

    fn gather_trainable(
        &mut self,
        name: String,
        mut buffers: TrainableBuffers<Cuda<A>>,
    ) -> Result<Pending<TrainableBuffers<Cuda<A>>>> {
        let TrainableBuffers { shard, full } = &mut buffers;
        let (num_shards, mut marks) = (full.len() / shard.len().max(1), Marks::new());
        let lane = self.gather(shard, num_shards, full, &mut marks).with_context(|| name.clone())?;
        self.pending(name, Kind::Collective, lane, marks, buffers)
    }

    fn reduce(
        &mut self,
        name: String,
        mut buffers: TrainableBuffers<Cuda<A>>,
    ) -> Result<Pending<TrainableBuffers<Cuda<A>>>> {
        let TrainableBuffers { shard, full } = &mut buffers;
        let (len, world_size, rank) = (full.len(), self.comm.world_size(), self.comm.rank());
        ensure!(shard.len() == len / world_size || shard.len() == len, "{len} gradients into {}", shard.len());
        let (everywhere, mut marks) = (shard.len() == len, Marks::new());
        let mut received = std::mem::replace(&mut self.received, Buffer::none());
        self.on(Lane::Communication, Lane::Compute, self.delays.before_reduce, &mut marks, |stream| match world_size {
            1 => Ok(()),
            _ => self.sum_over_ranks(full, &mut received, everywhere, stream),
        })
        .with_context(|| name.clone())?;
        self.received = received;
        let own = if everywhere { 0..len } else { rank * shard.len()..(rank + 1) * shard.len() };
        let sum = full.view().range(own);
        let lane = match shard {
            Place::Device(shard) => {
                self.cuda.copy_on(&self.communication, shard.view_mut(), sum)?;
                Lane::Communication
            }
            Place::Host(shard) => {
                self.on(Lane::Put, Lane::Communication, self.delays.before_put, &mut marks, |stream| {
                    self.cuda.put_on(stream, shard.view_mut(), sum)
                })?;
                Lane::Put
            }
        };
        self.pending(name, Kind::Collective, lane, marks, buffers)
    }

    fn put<T: Element>(
        &mut self,
        name: String,
        mut copy: HostCopy<Cuda<A>, T>,
    ) -> Result<Pending<HostCopy<Cuda<A>, T>>> {
        let (mut marks, HostCopy { device, host, len }) = (Marks::new(), &mut copy);
        self.on(Lane::Put, Lane::Compute, self.delays.before_put, &mut marks, |stream| {
            self.cuda.put_on(stream, host.first_mut(*len), device.first(*len))
        })?;
        self.pending(name, Kind::Copy, Lane::Put, marks, copy)
    }

    fn fetch<T: Element>(
        &mut self,
        name: String,
        mut copy: HostCopy<Cuda<A>, T>,
    ) -> Result<Pending<HostCopy<Cuda<A>, T>>> {
        let (mut marks, HostCopy { device, host, len }) = (Marks::new(), &mut copy);
        self.on(Lane::Fetch, Lane::Compute, self.delays.before_fetch, &mut marks, |stream| {
            self.cuda.fetch_on(stream, device.first_mut(*len), host.first(*len))
        })?;
        self.pending(name, Kind::Copy, Lane::Fetch, marks, copy)
    }

    /// The compute stream waits; the host does not.
    fn wait<T: Send + 'static>(&mut self, pending: Pending<T>) -> Result<T> {
        let before = self.cuda.mark()?;
        self.cuda.compute().wait(&pending.done).map_err(|e| anyhow!("GPU event: {e}"))?;
        self.waits.push((pending.kind, before, self.cuda.mark()?));
        Ok(pending.value)
    }

    fn take_waits(&mut self) -> Result<Waits> {
        let mut waits = Waits::default();
        for (kind, before, after) in self.waits.drain(..) {
            let elapsed = Duration::from_secs_f64(self.cuda.seconds_between(&before, &after)?.max(0.0));
            match kind {
                Kind::Collective => waits.gather += elapsed,
                Kind::Copy => waits.copy += elapsed,
            }
        }
        Ok(waits)
    }

    fn record_spans(&mut self, on: bool) {
        self.spans = on.then(Vec::new);
    }

    fn take_spans(&mut self, begin: &CudaEvent) -> Result<Vec<Span>> {
        let Some(spans) = &mut self.spans else { return Ok(Vec::new()) };
        let seconds = |at: &CudaEvent| self.cuda.seconds_between(begin, at);
        let spans = std::mem::take(spans).into_iter();
        spans
            .map(|(lane, name, from, to)| Ok(Span { lane, name, begin: seconds(&from)?, end: seconds(&to)? }))
            .collect()
    }

    fn all_gather_f64(&mut self, name: &str, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        let received = self.all_gather_values(name, values)?;
        Ok(received.chunks(values.len().max(1)).map(<[f64]>::to_vec).collect())
    }

    fn all_gather_f32(&mut self, name: &str, values: &[f32]) -> Result<Vec<f32>> {
        self.all_gather_values(name, values)
    }
}
