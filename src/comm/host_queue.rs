//! Collectives and copies of the CPU device. A separate thread runs them one after the other while the rank computes.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};

use crate::device::cpu::Cpu;
use crate::device::{Buffer, Element, HostBuffer, MemoryPlan, Place, ViewMut};

use super::guarded::Guarded;
use super::node::{Draft, Published};
use super::spans::{Lane, Span};
use super::sums::{all_reduce, exchange};
use super::{
    Comm, Delays, Gather, Groups, HostCopy, Position, Queue, ShardSource, SharedBytes, TrainableBuffers, Waits,
    broadcast, collect, watch,
};

type Job = Box<dyn FnOnce(&mut Thread) + Send>;

/// State of the queue's thread.
struct Thread {
    groups: Groups,
    /// Gradients that other ranks send, as many as the largest layer has. The first step makes it.
    received: Vec<f32>,
}

/// The queue and its thread, which ends when the queue is dropped.
pub struct HostQueue {
    jobs: Option<Sender<Job>>,
    thread: Option<std::thread::JoinHandle<()>>,
    position: Position,
    delays: Delays,
    waits: Waits,
    host_bytes: usize,
    /// Actions that the thread has done; `None` while spans are not recorded.
    spans: Option<Arc<Mutex<Done>>>,
}

/// A unit of the base, as a rank has it.
#[derive(Clone)]
pub enum Stored {
    /// This rank's shard, sent to the others from where it is.
    Resident(SharedBytes),
    /// This rank's shard, fetched into its place in the slot before it is sent to the others.
    Streamed(SharedBytes),
    /// All shards, in memory that the ranks of the node share.
    Node(Arc<Vec<Published<u8>>>),
}

/// Actions with their begin and end.
type Done = Vec<(Lane, String, Instant, Instant)>;

/// An action under way on the queue's thread.
pub struct Pending<T> {
    name: String,
    lane: Lane,
    result: Receiver<Result<T>>,
}

impl HostQueue {
    /// Hands the communicators to a new thread.
    pub fn new(groups: Groups, delays: Delays) -> Result<HostQueue> {
        let position = groups.position();
        let mut state = Thread { groups, received: Vec::new() };
        let (jobs, queue) = channel::<Job>();
        let thread = std::thread::Builder::new()
            .name("communication".into())
            .spawn(move || queue.into_iter().for_each(|job| job(&mut state)))
            .context("starting the communication thread")?;
        Ok(HostQueue {
            jobs: Some(jobs),
            thread: Some(thread),
            position,
            delays,
            waits: Waits::default(),
            host_bytes: 0,
            spans: None,
        })
    }

    /// Runs `f` after everything in the queue and waits for it. Start-up, quantizing and saving use this.
    pub fn run<T: Send + 'static>(
        &mut self,
        name: &str,
        f: impl FnOnce(&mut Groups) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let pending = self.start(name.to_string(), Lane::Communication, |thread| f(&mut thread.groups))?;
        Queue::wait(self, pending)
    }

    /// Gathers `values` over the communicator that `comm` selects.
    fn all_gather_values<T: bytemuck::Pod + Send>(
        &mut self,
        name: &str,
        values: &[T],
        comm: fn(&mut Groups) -> &mut dyn Comm,
    ) -> Result<Vec<T>> {
        let values = values.to_vec();
        self.run(name, move |groups| {
            let comm = comm(groups);
            let mut received = vec![T::zeroed(); values.len() * comm.world_size()];
            comm.all_gather(bytemuck::cast_slice(&values), bytemuck::cast_slice_mut(&mut received))?;
            Ok(received)
        })
    }

    fn start<T: Send + 'static>(
        &mut self,
        name: String,
        lane: Lane,
        f: impl FnOnce(&mut Thread) -> Result<T> + Send + 'static,
    ) -> Result<Pending<T>> {
        let (done, result) = channel();
        let (spans, span_name) = (self.spans.clone(), name.clone());
        let job: Job = Box::new(move |thread| {
            let begin = Instant::now();
            let wait = watch::wait(span_name.as_str());
            let value = f(thread);
            drop(wait);
            if let Some(spans) = spans {
                spans.lock().unwrap_or_else(PoisonError::into_inner).push((lane, span_name, begin, Instant::now()));
            }
            // If the executor has failed, nobody receives the result: the executor's error is the one to report.
            let _ = done.send(value);
        });
        let jobs = self.jobs.as_ref().context("the communication queue is closed")?;
        jobs.send(job).map_err(|_| anyhow!("the communication thread has ended"))?;
        Ok(Pending { name, lane, result })
    }
}

impl Drop for HostQueue {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take().filter(|_| !std::thread::panicking()) {
            // The panic hook has reported a panic of that thread and ends the process.
            let _ = thread.join();
        }
    }
}

impl Queue<Cpu> for HostQueue {
    type Pending<T: Send + 'static> = Pending<T>;
    type Shard = Stored;

    /// Leaves shards in their mapped files, from which each gather takes them, except if ranks read each other's: these
    /// are copied to memory that they share.
    fn store(&mut self, shards: Vec<ShardSource>, resident: &[bool], gather: Gather) -> Result<Vec<Stored>> {
        if gather == Gather::Collective {
            let stored = |(i, shard): (usize, ShardSource)| {
                let shard = shard.take(i)?;
                Ok(if resident[i] { Stored::Resident(shard) } else { Stored::Streamed(shard) })
            };
            return shards.into_iter().enumerate().map(stored).collect();
        }
        let mut plan = MemoryPlan::default();
        let name = |i: usize| format!("shards/{i}");
        shards.iter().enumerate().for_each(|(i, shard)| plan.push(&name(i), shard.bytes));
        let bytes = plan.total_bytes();
        let mut draft =
            self.run("shared shards", move |groups| Draft::new(&Cpu::new(1), &mut *groups.shards, &plan))?;
        for (i, shard) in shards.into_iter().enumerate() {
            let own = draft.carve(&name(i), shard.bytes)?;
            let shard = shard.take(i)?;
            own.copy_from_slice((*shard).as_ref());
            shard.let_go();
            watch::beat();
        }
        self.host_bytes = bytes;
        let units = self.run("shared shards", |groups| draft.publish(&mut *groups.shards))?;
        Ok(units.into_iter().map(|parts| Stored::Node(Arc::new(parts))).collect())
    }

    fn device_bytes(&self) -> usize {
        0
    }

    fn host_bytes(&self) -> usize {
        self.host_bytes
    }

    fn position(&self) -> Position {
        self.position
    }

    fn gather_frozen(
        &mut self,
        name: String,
        shard: &Stored,
        mut out: Buffer<Cpu, u8>,
    ) -> Result<Pending<Buffer<Cpu, u8>>> {
        let (shard, delays, num_shards) = (shard.clone(), self.delays, self.position.num_shards);
        self.start(name, Lane::Communication, move |Thread { groups, .. }| {
            poison(out.view_mut().host_mut());
            match shard {
                Stored::Resident(shard) => {
                    std::thread::sleep(delays.before_gather);
                    let shard = (*shard).as_ref();
                    gather(shard, out.first_mut(shard.len() * num_shards).host_mut(), &mut *groups.shards)?;
                }
                Stored::Streamed(shard) => {
                    let shard = (*shard).as_ref();
                    let whole = out.first_mut(shard.len() * num_shards).host_mut();
                    fetch_and_gather(shard, whole, &mut *groups.shards, &delays)?;
                }
                Stored::Node(shards) => {
                    std::thread::sleep(delays.before_fetch);
                    let parts = out.view_mut().host_mut().chunks_exact_mut(shards[0].len());
                    parts.zip(&*shards).for_each(|(to, from)| to.copy_from_slice(from.view().host()));
                }
            }
            Ok(out)
        })
    }

    fn gather_trainable(
        &mut self,
        name: String,
        mut buffers: TrainableBuffers<Cpu>,
    ) -> Result<Pending<TrainableBuffers<Cpu>>> {
        let (delays, num_shards) = (self.delays, self.position.num_shards);
        self.start(name, Lane::Communication, move |Thread { groups, .. }| {
            poison(buffers.full.view_mut().host_mut());
            let shard = buffers.shard.wait_on_host()?;
            let whole = bytemuck::cast_slice_mut(buffers.full.first_mut(shard.len() * num_shards).host_mut());
            match shard {
                Place::Device(shard) => {
                    std::thread::sleep(delays.before_gather);
                    gather(bytemuck::cast_slice(shard.view().host()), whole, &mut *groups.shards)?;
                }
                Place::Host(shard) => {
                    let shard = bytemuck::cast_slice(shard.view().host());
                    fetch_and_gather(shard, whole, &mut *groups.shards, &delays)?;
                }
            }
            Ok(buffers)
        })
    }

    fn reduce(&mut self, name: String, mut buffers: TrainableBuffers<Cpu>) -> Result<Pending<TrainableBuffers<Cpu>>> {
        let (delays, Position { shard: own, num_shards, .. }) = (self.delays, self.position);
        self.start(name, Lane::Communication, move |Thread { groups, received }| {
            std::thread::sleep(delays.before_reduce);
            let TrainableBuffers { shard, full } = &mut buffers;
            let (shard, full) = (shard.wait_on_host_mut()?, full.view_mut().host_mut());
            let parts = &mut full[..shard.len() * num_shards];
            match shard {
                Place::Device(shard) => {
                    let shard = shard.view_mut().host_mut();
                    exchange(parts, received, &mut *groups.shards)?.sum(shard);
                    all_reduce(shard, received, &mut *groups.replicas)?;
                }
                Place::Host(shard) => {
                    let shard = shard.view_mut().host_mut();
                    let own = own * shard.len()..(own + 1) * shard.len();
                    exchange(parts, received, &mut *groups.shards)?.sum(&mut parts[own.clone()]);
                    all_reduce(&mut parts[own.clone()], received, &mut *groups.replicas)?;
                    std::thread::sleep(delays.before_put);
                    shard.copy_from_slice(&parts[own]);
                }
            }
            Ok(buffers)
        })
    }

    fn put<T: Element>(&mut self, name: String, mut copy: HostCopy<Cpu, T>) -> Result<Pending<HostCopy<Cpu, T>>> {
        let delay = self.delays.before_put;
        self.start(name, Lane::Put, move |_| {
            std::thread::sleep(delay);
            let host = copy.host.wait_on_host_mut()?;
            host.first_mut(copy.len).host_mut().copy_from_slice(copy.device.first(copy.len).host());
            Ok(copy)
        })
    }

    fn fetch<T: Element>(&mut self, name: String, mut copy: HostCopy<Cpu, T>) -> Result<Pending<HostCopy<Cpu, T>>> {
        let delay = self.delays.before_fetch;
        self.start(name, Lane::Fetch, move |_| {
            poison(copy.device.first_mut(copy.len).host_mut());
            std::thread::sleep(delay);
            let host = copy.host.wait_on_host()?;
            copy.device.first_mut(copy.len).host_mut().copy_from_slice(host.first(copy.len).host());
            Ok(copy)
        })
    }

    fn upload<T: Element>(
        &mut self,
        _name: String,
        device: ViewMut<'_, Cpu, T>,
        host: &mut Guarded<HostBuffer<T>>,
    ) -> Result<()> {
        let len = device.len();
        device.host_mut().copy_from_slice(host.wait_on_host()?.first(len).host());
        Ok(())
    }

    fn wait<T: Send + 'static>(&mut self, pending: Pending<T>) -> Result<T> {
        let start = Instant::now();
        let result = pending.result.recv().map_err(|_| anyhow!("the communication thread has ended"));
        match pending.lane {
            Lane::Fetch | Lane::Put => self.waits.copy += start.elapsed(),
            Lane::Communication | Lane::Compute => self.waits.gather += start.elapsed(),
        }
        result.and_then(|r| r).with_context(|| pending.name)
    }

    fn take_waits(&mut self) -> Result<Waits> {
        Ok(std::mem::take(&mut self.waits))
    }

    fn record_spans(&mut self, on: bool) {
        self.spans = on.then(Default::default);
    }

    fn take_spans(&mut self, begin: &Instant) -> Result<Vec<Span>> {
        let Some(spans) = &self.spans else { return Ok(Vec::new()) };
        let spans = std::mem::take(&mut *spans.lock().unwrap_or_else(PoisonError::into_inner));
        let seconds = |at: Instant| at.saturating_duration_since(*begin).as_secs_f64();
        Ok(spans
            .into_iter()
            .map(|(lane, name, from, to)| Span { lane, name, begin: seconds(from), end: seconds(to) })
            .collect())
    }

    fn all_gather_f64(&mut self, name: &str, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        let received = self.all_gather_values(name, values, |groups| &mut *groups.world)?;
        Ok(received.chunks(values.len().max(1)).map(<[f64]>::to_vec).collect())
    }

    fn gather_shards_f32(&mut self, name: &str, values: &[f32]) -> Result<Vec<f32>> {
        self.all_gather_values(name, values, |groups| &mut *groups.shards)
    }

    fn collect_f32(&mut self, name: &str, values: &mut [f32]) -> Result<()> {
        let mut own = values.to_vec();
        let all = self.run(name, move |groups| {
            collect(&mut *groups.shards, bytemuck::cast_slice_mut(&mut own))?;
            Ok(own)
        })?;
        values.copy_from_slice(&all);
        Ok(())
    }

    fn broadcast_f32(&mut self, name: &str, values: &mut Vec<f32>) -> Result<()> {
        let mut own = std::mem::take(values);
        *values = self.run(name, move |groups| {
            broadcast(&mut *groups.world, bytemuck::cast_slice_mut(&mut own))?;
            Ok(own)
        })?;
        Ok(())
    }
}

/// Fills a slot with NaNs (in codes, scales and plain weights of every type), so that a read before the gather shows.
fn poison<T: Element>(slot: &mut [T]) {
    bytemuck::cast_slice_mut(slot).fill(0xFFu8);
}

/// Gathers the shards into `out`, whose length must match theirs; a shard that is the whole unit is copied.
fn gather(shard: &[u8], out: &mut [u8], comm: &mut dyn Comm) -> Result<()> {
    if shard.len() == out.len() {
        out.copy_from_slice(shard);
        return Ok(());
    }
    let expected = shard.len() * comm.world_size();
    ensure!(out.len() == expected, "the shards are {expected} bytes in all, the slot takes {}", out.len());
    comm.all_gather(shard, out)
}

/// Fetches this rank's shard into its place in `whole`, and gathers those of the others around it.
fn fetch_and_gather(shard: &[u8], whole: &mut [u8], comm: &mut dyn Comm, delays: &Delays) -> Result<()> {
    std::thread::sleep(delays.before_fetch);
    whole[comm.rank() * shard.len()..][..shard.len()].copy_from_slice(shard);
    std::thread::sleep(delays.before_gather);
    comm.all_gather_in_place(whole)
}

#[cfg(test)]
mod tests {
    use super::super::guarded::Guarded;
    use super::super::local::{self, LocalComm};
    use super::*;
    use crate::device::{Arena, Device};
    use std::time::Duration;

    fn on_all_ranks<T: Send>(world_size: usize, f: impl Fn(LocalComm) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let handles: Vec<_> =
                LocalComm::world(world_size).into_iter().map(|comm| scope.spawn(|| f(comm))).collect();
            handles.into_iter().map(|h| h.join().unwrap()).collect()
        })
    }

    fn buffer(values: &[f32]) -> Buffer<Cpu, f32> {
        let cpu = Cpu::new(1);
        let mut buffer = Arena::carved(&cpu, |arena| arena.carve("values", values.len())).unwrap();
        cpu.upload(buffer.view_mut(), values).unwrap();
        buffer
    }

    #[test]
    fn the_host_reads_and_writes_its_side_of_a_copy_when_it_has_waited() {
        let delays = Delays::all(Duration::from_millis(20));
        let mut queue = HostQueue::new(local::groups(1, 1).remove(0), delays).unwrap();
        let copy = HostCopy { device: buffer(&[1.0, 2.0, 3.0]), host: Guarded::new(buffer(&[0.0; 3])), len: 2 };
        let put = queue.put("put".into(), copy).unwrap();
        let mut copy = queue.wait(put).unwrap();
        let host = copy.host.wait_on_host_mut().unwrap().view_mut().host_mut();
        assert_eq!(host, [1.0, 2.0, 0.0]);
        host[0] = 5.0;
        // The host's borrow has ended: only now can the queue be given the buffer again.
        let fetch = queue.fetch("fetch".into(), copy).unwrap();
        let copy = queue.wait(fetch).unwrap();
        assert_eq!(copy.device.view().host(), [5.0, 2.0, 3.0]);
        assert_eq!(copy.host.wait_on_host().unwrap().view().host(), [5.0, 2.0, 0.0]);
    }

    /// Refuses gathers from any other place than the slot itself.
    struct InPlace(LocalComm);

    impl Comm for InPlace {
        fn rank(&self) -> usize {
            self.0.rank()
        }

        fn world_size(&self) -> usize {
            self.0.world_size()
        }

        fn all_gather(&mut self, _: &[u8], _: &mut [u8]) -> Result<()> {
            anyhow::bail!("the gather is not in place")
        }

        fn all_gather_in_place(&mut self, whole: &mut [u8]) -> Result<()> {
            let own = self.rank() as u8;
            let expected = [0, 0, 1, 1, 2, 2].map(|of| if of == own { own } else { 0xFF });
            ensure!(whole == expected, "the slot holds {whole:?} before the gather");
            self.0.all_gather_in_place(whole)
        }

        fn all_to_all(&mut self, send: &[u8], recv: &mut [u8]) -> Result<()> {
            self.0.all_to_all(send, recv)
        }

        fn send_receive(&mut self, to: usize, send: &[u8], from: usize, recv: &mut [u8]) -> Result<()> {
            self.0.send_receive(to, send, from, recv)
        }
    }

    #[test]
    fn a_streamed_shard_is_fetched_to_its_place_in_the_slot_and_a_resident_one_is_not() {
        let results = on_all_ranks(3, |comm| {
            let rank = comm.rank() as u8;
            let Groups { world, replicas, .. } = local::groups(1, 1).remove(0);
            let groups = Groups { world, shards: Box::new(InPlace(comm)), replicas };
            let mut queue = HostQueue::new(groups, Delays::default()).unwrap();
            let shard = || ShardSource::ready(Arc::new(vec![rank; 2]));
            let stored = queue.store(vec![shard(), shard()], &[false, true], Gather::Collective).unwrap();
            stored
                .iter()
                .map(|shard| {
                    let slot = Arena::carved(&Cpu::new(1), |arena| arena.carve("slot", 7)).unwrap();
                    let pending = queue.gather_frozen("gather".into(), shard, slot).unwrap();
                    let gathered = queue.wait(pending).map(|slot| slot.view().host().to_vec());
                    gathered.map_err(|error| error.root_cause().to_string())
                })
                .collect::<Vec<_>>()
        });
        for of_rank in results {
            assert_eq!(of_rank, [Ok(vec![0, 0, 1, 1, 2, 2, 0xFF]), Err("the gather is not in place".to_string())]);
        }
    }

    #[test]
    fn a_slot_of_the_wrong_size_is_an_error_before_the_collective() {
        on_all_ranks(2, |mut comm| {
            let error = gather(&[1, 2], &mut [0; 5], &mut comm).unwrap_err().to_string();
            assert_eq!(error, "the shards are 4 bytes in all, the slot takes 5");
        });
    }

    #[test]
    fn a_rank_that_goes_away_is_an_error_on_the_others() {
        let results = on_all_ranks(2, |mut comm| match comm.rank() {
            0 => Ok(()),
            _ => comm.all_gather(&[1], &mut [0; 2]),
        });
        assert!(results[1].as_ref().unwrap_err().to_string().contains("rank 0 has gone"));
    }
}
