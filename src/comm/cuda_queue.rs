//! Collectives and copies of the CUDA device. NCCL's collectives (copies if there is one rank), fetches from pinned host memory and
//! puts to it each have a stream of their own, ordered with the compute stream by events. Scalars and host data go over MPI.
#![expect(unsafe_code, reason = "starts copies whose memory the queue keeps")]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use cudarc::driver::{CudaEvent, CudaStream};

use super::communicators::Communicators;
use super::cuda_store::{self, PROBE_BYTES, PROBES, Stored, StoredUnit};
use super::guarded::Guarded;
use super::nccl::{self, Nccl};
use super::spans::{Lane, Span};
use super::watch::{self, Limit, Probe, Probed};
use super::{
    Delays, Gather, Groups, HostCopy, Position, Queue, ShardSource, TrainableBuffers, Waits, all_gather_values,
    broadcast, collect,
};
use crate::device::cuda::{Cuda, HalfType};
use crate::device::{Arena, Buffer, Device, Element, HostBuffer, Place, View, ViewMut};

/// Options of a queue.
#[derive(Clone, Copy, Debug, Default)]
pub struct QueueOptions {
    /// Length of the longest gradient buffer that will be reduced.
    pub max_gradients: usize,
    /// True if several ranks use one GPU.
    pub share_gpu: bool,
    pub delays: Delays,
}

/// Bytes that a rank receives per second by each way to gather, on the slowest rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Rates {
    pub nccl: f64,
    /// The rate, or why this rank or another cannot gather from the host.
    pub host: Result<f64, String>,
}

/// Kind of an action that is waited for. With one rank a gather is a fetch and still counts as a collective.
#[derive(Clone, Copy)]
enum Kind {
    Collective,
    Copy,
}

/// The queues of one rank.
pub struct CudaQueue<A: HalfType> {
    // First, because fields are dropped in order: the watchdog must stop looking before the rest is dropped.
    _probed: Probed,
    /// Tells the watchdog of each action that was started.
    started: Sender<(String, Arc<CudaEvent>)>,
    cuda: Cuda<A>,
    communication: Arc<CudaStream>,
    fetch: Arc<CudaStream>,
    put: Arc<CudaStream>,
    groups: Groups,
    nccl: Communicators,
    /// Buffer for the parts of a layer's gradients that other ranks send.
    received: Buffer<Cuda<A>, f32>,
    delays: Delays,
    device_bytes: usize,
    host_bytes: usize,
    /// Events on the compute stream before and after each wait.
    waits: Vec<(Kind, CudaEvent, CudaEvent)>,
    /// Begin and end of each action on the other streams; `None` while spans are not recorded.
    spans: Option<Vec<(Lane, String, CudaEvent, CudaEvent)>>,
}

/// The watchdog's view of the actions that were started and have not ended, in order.
struct UnderWay {
    actions: Receiver<(String, Arc<CudaEvent>)>,
    oldest: Option<(String, Arc<CudaEvent>)>,
    nccl: Vec<Arc<Nccl>>,
}

impl Probe for UnderWay {
    fn look(&mut self) -> Result<(usize, Option<String>)> {
        let mut num_ended = 0;
        loop {
            self.oldest = self.oldest.take().or_else(|| self.actions.try_recv().ok());
            let Some((name, done)) = &self.oldest else { return Ok((num_ended, None)) };
            self.nccl.iter().try_for_each(|nccl| nccl.check_errors()).with_context(|| name.clone())?;
            let has_ended = done.try_is_complete().map_err(|e| anyhow!("{name}: the GPU reports: {e}"))?;
            if !has_ended {
                return Ok((num_ended, Some(name.clone())));
            }
            (num_ended, self.oldest) = (num_ended + 1, None);
        }
    }
}

/// Begin and end of each part of an action, by stream; empty while spans are not recorded.
type Marks = Vec<(Lane, CudaEvent, CudaEvent)>;

/// An action under way on a stream.
pub struct Pending<T> {
    value: T,
    kind: Kind,
    done: Arc<CudaEvent>,
}

impl<A: HalfType> Pending<TrainableBuffers<Cuda<A>>> {
    fn of_trainables(mut value: TrainableBuffers<Cuda<A>>, done: Arc<CudaEvent>) -> Self {
        if value.shard.is_on_host() {
            value.shard.copied_until(&done);
        }
        Pending { value, kind: Kind::Collective, done }
    }
}

impl<A: HalfType> CudaQueue<A> {
    /// Connects the ranks and makes the streams. Collective.
    pub fn new(cuda: Cuda<A>, mut groups: Groups, options: QueueOptions) -> Result<Self> {
        watch::start(groups.world.rank(), groups.world.world_size())?;
        if options.share_gpu {
            Nccl::hide_host(groups.world.rank());
        }
        let nccl = Communicators::new(&mut groups)?;
        let received = if nccl.all().is_empty() { 0 } else { options.max_gradients };
        let received = Arena::carved(&cuda, |arena| arena.carve::<f32>("received gradients", received))?;
        let communication = cuda.new_stream()?;
        {
            let _wait = watch::wait_within("the first collectives of NCCL", Limit::Start, Some(nccl::HELP));
            nccl.use_first(&cuda, &communication)?;
        }
        let (started, actions) = channel();
        let help = (!nccl.all().is_empty()).then_some(nccl::HELP);
        let under_way = UnderWay { actions, oldest: None, nccl: nccl.all() };
        Ok(CudaQueue {
            _probed: watch::probe(Box::new(under_way), help)?,
            started,
            communication,
            fetch: cuda.new_stream()?,
            put: cuda.new_stream()?,
            cuda,
            groups,
            nccl,
            device_bytes: received.len() * size_of::<f32>(),
            received,
            delays: options.delays,
            host_bytes: 0,
            waits: Vec::new(),
            spans: None,
        })
    }

    /// Measures both ways to gather while all ranks gather at once. Collective.
    pub fn measure_gathers(&mut self) -> Result<Rates> {
        let position = self.position();
        let _wait = watch::wait_within("the measurement of gathers", Limit::Start, Some(nccl::HELP));
        let host = cuda_store::host_bytes_per_s(&self.cuda, &mut *self.groups.shards);
        let nccl = self.nccl.shards.as_deref().context("one rank gathers nothing")?;
        let (part, parts) = (PROBE_BYTES, position.num_shards);
        let mut whole = Arena::carved(&self.cuda, |arena| arena.carve::<u8>("probe", part * parts))?;
        let mut start = Instant::now();
        // The first gather also connects the ranks and is not counted.
        for i in 0..=PROBES {
            nccl.all_gather_in_place(whole.view_mut(), &self.communication)?;
            if i == 0 {
                self.communication.synchronize().map_err(|e| anyhow!("the GPU reports: {e}"))?;
                start = Instant::now();
            }
        }
        self.communication.synchronize().map_err(|e| anyhow!("the GPU reports: {e}"))?;
        let nccl = (PROBES * (parts - 1) * part) as f64 / start.elapsed().as_secs_f64();
        let rates = self.all_gather_f64("rates of gathers", &[nccl, *host.as_ref().unwrap_or(&0.0)])?;
        let least = |i: usize| rates.iter().map(|of_rank| of_rank[i]).fold(f64::INFINITY, f64::min);
        let host = match host {
            Err(error) => Err(format!("{error:#}")),
            Ok(_) if least(1) == 0.0 => Err("it cannot be on another rank".to_string()),
            Ok(_) => Ok(least(1)),
        };
        Ok(Rates { nccl: least(0), host })
    }

    /// Records the end of an action whose last part was started on `lane`.
    fn end(&mut self, name: String, lane: Lane, marks: Marks) -> Result<Arc<CudaEvent>> {
        let done = Arc::new(self.stream(lane).record_event(None).map_err(|e| anyhow!("GPU event: {e}"))?);
        if let Some(spans) = &mut self.spans {
            spans.extend(marks.into_iter().map(|(lane, begin, end)| (lane, name.clone(), begin, end)));
        }
        // The watchdog listens for as long as the queue lives.
        let _ = self.started.send((name, done.clone()));
        Ok(done)
    }

    fn stream(&self, lane: Lane) -> &CudaStream {
        match lane {
            Lane::Compute => self.cuda.compute(),
            Lane::Communication => &self.communication,
            Lane::Fetch => &self.fetch,
            Lane::Put => &self.put,
        }
    }

    /// Runs `f` on a lane, ordered after all work that the lane `after` has been given.
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

    /// Gathers `shard` into `whole` by NCCL and returns the lane on which the gather ends.
    fn gather<T: Element>(
        &self,
        shard: &Place<Cuda<A>, T>,
        whole: &mut Buffer<Cuda<A>, T>,
        marks: &mut Marks,
    ) -> Result<Lane> {
        let (len, delays, position) = (shard.len(), &self.delays, self.position());
        // A read before the slot is filled sees NaNs, in codes, scales and plain weights of every type.
        let first = if matches!(shard, Place::Host(_)) { Lane::Fetch } else { Lane::Communication };
        self.poison(first, whole.view_mut())?;
        let mut whole = whole.first_mut(len * position.num_shards);
        match (shard, &self.nccl.shards) {
            (Place::Device(shard), nccl) => {
                self.on(Lane::Communication, Lane::Compute, delays.before_gather, marks, |stream| match nccl {
                    None => self.cuda.copy_on(stream, whole, shard.view()),
                    Some(nccl) => nccl.all_gather(shard.view(), whole, stream),
                })?;
                Ok(Lane::Communication)
            }
            (Place::Host(shard), nccl) => {
                let own = position.shard * len..(position.shard + 1) * len;
                self.on(Lane::Fetch, Lane::Compute, delays.before_fetch, marks, |stream| {
                    // SAFETY: nobody writes to a shard while it is gathered: a frozen one is never written again, and a trainable
                    // one is guarded until the end of the gather. The memory of either is freed when the GPU is idle.
                    unsafe { self.cuda.fetch_on(stream, whole.range_mut(own), shard.view()) }
                })?;
                let Some(nccl) = nccl else { return Ok(Lane::Fetch) };
                self.on(Lane::Communication, Lane::Fetch, delays.before_gather, marks, |stream| {
                    nccl.all_gather_in_place(whole, stream)
                })?;
                Ok(Lane::Communication)
            }
        }
    }

    /// Fills a slot with 0xFF on a lane, ordered after the computation that uses it.
    fn poison<T: Element>(&self, lane: Lane, slot: ViewMut<'_, Cuda<A>, T>) -> Result<()> {
        self.cuda.order(self.cuda.compute(), self.stream(lane))?;
        self.cuda.fill_on(self.stream(lane), slot, 0xFF)
    }
}

impl<A: HalfType> Queue<Cuda<A>> for CudaQueue<A> {
    type Pending<T: Send + 'static> = Pending<T>;
    type Shard = Stored<A>;

    fn store(&mut self, shards: Vec<ShardSource>, resident: &[bool], gather: Gather) -> Result<Vec<Self::Shard>> {
        let stored = cuda_store::store(&self.cuda, &mut *self.groups.shards, shards, resident, gather)?;
        self.device_bytes += stored.device_bytes;
        self.host_bytes += stored.host_bytes;
        Ok(stored.units)
    }

    fn device_bytes(&self) -> usize {
        self.device_bytes
    }

    fn host_bytes(&self) -> usize {
        self.host_bytes
    }

    fn position(&self) -> Position {
        self.groups.position()
    }

    fn whole<'a>(&self, shard: &'a Stored<A>) -> Option<View<'a, Cuda<A>, u8>> {
        match &shard.0 {
            StoredUnit::Shard(Place::Device(shard)) if self.position().num_shards == 1 => Some(shard.view()),
            StoredUnit::Whole(unit) => Some(unit.view()),
            StoredUnit::Shard(_) | StoredUnit::Node(_) => None,
        }
    }

    fn gather_frozen(
        &mut self,
        name: String,
        shard: &Self::Shard,
        mut out: Buffer<Cuda<A>, u8>,
    ) -> Result<Pending<Buffer<Cuda<A>, u8>>> {
        let (mut marks, delays) = (Marks::new(), self.delays);
        let gathered = match &shard.0 {
            StoredUnit::Shard(shard) => self.gather(shard, &mut out, &mut marks),
            StoredUnit::Whole(_) => bail!("{name}: the whole unit is on the GPU, so that nothing is to be gathered"),
            StoredUnit::Node(shards) => {
                self.poison(Lane::Fetch, out.view_mut())?;
                self.on(Lane::Fetch, Lane::Compute, delays.before_fetch, &mut marks, |stream| {
                    let mut rest = out.view_mut();
                    for shard in shards {
                        let (part, after) = rest.split_at(shard.len());
                        // SAFETY: the shards are published: nobody writes to them, and their memory is let go when the GPU is idle.
                        unsafe { self.cuda.fetch_on(stream, part, shard.view()) }?;
                        rest = after;
                    }
                    Ok(())
                })
                .map(|()| Lane::Fetch)
            }
        };
        let lane = gathered.with_context(|| name.clone())?;
        let done = self.end(name, lane, marks)?;
        Ok(Pending { value: out, kind: Kind::Collective, done })
    }

    fn gather_trainable(
        &mut self,
        name: String,
        mut buffers: TrainableBuffers<Cuda<A>>,
    ) -> Result<Pending<TrainableBuffers<Cuda<A>>>> {
        let (TrainableBuffers { shard, full }, mut marks) = (&mut buffers, Marks::new());
        let shard = shard.on_stream(&self.fetch)?;
        let lane = self.gather(shard, full, &mut marks).with_context(|| name.clone())?;
        let done = self.end(name, lane, marks)?;
        Ok(Pending::of_trainables(buffers, done))
    }

    fn reduce(
        &mut self,
        name: String,
        mut buffers: TrainableBuffers<Cuda<A>>,
    ) -> Result<Pending<TrainableBuffers<Cuda<A>>>> {
        let TrainableBuffers { shard, full } = &mut buffers;
        let (position, mut marks) = (self.position(), Marks::new());
        let shard = shard.on_stream(&self.put)?;
        let len = shard.len() * position.num_shards;
        ensure!(len <= full.len(), "{} gradients into {} of {len}", full.len(), shard.len());
        let mut received = std::mem::replace(&mut self.received, Buffer::none());
        self.on(Lane::Communication, Lane::Compute, self.delays.before_reduce, &mut marks, |stream| {
            self.nccl.sum_over_ranks(&self.cuda, position, full.first_mut(len), &mut received, stream)
        })
        .with_context(|| name.clone())?;
        self.received = received;
        let sum = full.view().range(position.shard * shard.len()..(position.shard + 1) * shard.len());
        let lane = match shard {
            Place::Device(shard) => {
                self.cuda.copy_on(&self.communication, shard.view_mut(), sum)?;
                Lane::Communication
            }
            Place::Host(shard) => {
                self.on(Lane::Put, Lane::Communication, self.delays.before_put, &mut marks, |stream| {
                    // SAFETY: the shard is guarded until the end of the action: the host cannot reach it before.
                    unsafe { self.cuda.put_on(stream, shard.view_mut(), sum) }
                })?;
                Lane::Put
            }
        };
        let done = self.end(name, lane, marks)?;
        Ok(Pending::of_trainables(buffers, done))
    }

    fn put<T: Element>(
        &mut self,
        name: String,
        mut copy: HostCopy<Cuda<A>, T>,
    ) -> Result<Pending<HostCopy<Cuda<A>, T>>> {
        let (mut marks, HostCopy { device, host, len }) = (Marks::new(), &mut copy);
        let host = host.on_stream(&self.put)?;
        self.on(Lane::Put, Lane::Compute, self.delays.before_put, &mut marks, |stream| {
            // SAFETY: the host's buffer is guarded until the end of the copy: the host cannot reach it before.
            unsafe { self.cuda.put_on(stream, host.first_mut(*len), device.first(*len)) }
        })?;
        let done = self.end(name, Lane::Put, marks)?;
        copy.host.copied_until(&done);
        Ok(Pending { value: copy, kind: Kind::Copy, done })
    }

    fn fetch<T: Element>(
        &mut self,
        name: String,
        mut copy: HostCopy<Cuda<A>, T>,
    ) -> Result<Pending<HostCopy<Cuda<A>, T>>> {
        let (mut marks, HostCopy { device, host, len }) = (Marks::new(), &mut copy);
        let host = host.on_stream(&self.fetch)?;
        self.on(Lane::Fetch, Lane::Compute, self.delays.before_fetch, &mut marks, |stream| {
            // SAFETY: the host's buffer is guarded until the end of the copy: the host cannot write to it before.
            unsafe { self.cuda.fetch_on(stream, device.first_mut(*len), host.first(*len)) }
        })?;
        let done = self.end(name, Lane::Fetch, marks)?;
        copy.host.copied_until(&done);
        Ok(Pending { value: copy, kind: Kind::Copy, done })
    }

    fn upload<T: Element>(
        &mut self,
        name: String,
        device: ViewMut<'_, Cuda<A>, T>,
        host: &mut Guarded<HostBuffer<T>>,
    ) -> Result<()> {
        let compute = self.cuda.compute();
        let from = host.on_stream(compute)?.first(device.len());
        // SAFETY: the host's buffer is guarded until the end of the copy: the host cannot write to it before.
        unsafe { self.cuda.fetch_on(compute, device, from) }?;
        host.copied_until(&self.end(name, Lane::Compute, Marks::new())?);
        Ok(())
    }

    /// Makes the compute stream wait; the host runs on.
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
        let received = all_gather_values(&mut *self.groups.world, name, values)?;
        Ok(received.chunks(values.len().max(1)).map(<[f64]>::to_vec).collect())
    }

    fn gather_shards_f32(&mut self, name: &str, values: &[f32]) -> Result<Vec<f32>> {
        all_gather_values(&mut *self.groups.shards, name, values)
    }

    fn collect_f32(&mut self, name: &str, values: &mut [f32]) -> Result<()> {
        collect(&mut *self.groups.shards, bytemuck::cast_slice_mut(values)).with_context(|| name.to_string())
    }

    fn broadcast_f32(&mut self, name: &str, values: &mut Vec<f32>) -> Result<()> {
        broadcast(&mut *self.groups.world, bytemuck::cast_slice_mut(values)).with_context(|| name.to_string())
    }
}
