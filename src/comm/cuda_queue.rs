//! Collectives of the CUDA device: NCCL on a stream of its own, ordered with the compute stream by events. With one rank
//! they are copies. Scalars and what belongs to the host go over MPI.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::{CudaEvent, CudaStream};

use super::nccl::Nccl;
use super::{Comm, Queue, SharedBytes, TrainableBuffers};
use crate::device::cuda::Cuda;
use crate::device::{Arena, Buffer, Device, Element};

/// The queue of one rank.
pub struct CudaQueue {
    cuda: Cuda,
    stream: Arc<CudaStream>,
    comm: Box<dyn Comm>,
    nccl: Option<Nccl>,
    /// What the other ranks send of a layer's gradients.
    received: Buffer<Cuda, f32>,
    device_bytes: usize,
}

/// A collective under way on the stream.
pub struct Pending<T> {
    value: T,
    done: CudaEvent,
}

impl CudaQueue {
    /// `max_gradients` is the length of the longest buffer that will be reduced; `share_gpu` allows several ranks on one GPU.
    /// Collective.
    pub fn new(cuda: Cuda, mut comm: Box<dyn Comm>, max_gradients: usize, share_gpu: bool) -> Result<CudaQueue> {
        let nccl = if comm.world_size() > 1 { Some(Nccl::new(&mut *comm, share_gpu)?) } else { None };
        let received = buffer(&cuda, "received gradients", if nccl.is_some() { max_gradients } else { 0 })?;
        let device_bytes = received.len() * size_of::<f32>();
        Ok(CudaQueue { stream: cuda.new_stream()?, cuda, comm, nccl, received, device_bytes })
    }

    /// Runs `f` on the stream after all that the compute stream has been given.
    fn start<T>(&mut self, mut value: T, f: impl FnOnce(&mut Self, &mut T) -> Result<()>) -> Result<Pending<T>> {
        self.cuda.order(self.cuda.compute(), &self.stream)?;
        f(self, &mut value)?;
        let done = self.stream.record_event(None).map_err(|e| anyhow!("GPU event: {e}"))?;
        Ok(Pending { value, done })
    }

    fn nccl(&self) -> Result<&Nccl> {
        self.nccl.as_ref().context("a collective of one rank has other ranks' parts")
    }
}

fn buffer<T: Element>(cuda: &Cuda, name: &str, len: usize) -> Result<Buffer<Cuda, T>> {
    let mut measured = Arena::<Cuda>::measure();
    measured.carve::<T>(name, len)?;
    Arena::allocate(cuda, measured.into_plan()).context(name.to_string())?.carve(name, len)
}

impl Queue<Cuda> for CudaQueue {
    type Pending<T: Send + 'static> = Pending<T>;
    type Shard = Buffer<Cuda, u8>;

    fn store(&mut self, shard: SharedBytes) -> Result<Buffer<Cuda, u8>> {
        let bytes: &[u8] = (*shard).as_ref();
        let mut stored = buffer(&self.cuda, "shard", bytes.len())?;
        self.cuda.upload(stored.view_mut(), bytes)?;
        self.device_bytes += bytes.len();
        Ok(stored)
    }

    fn device_bytes(&self) -> usize {
        self.device_bytes
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
        shard: &Buffer<Cuda, u8>,
        num_shards: usize,
        out: Buffer<Cuda, u8>,
    ) -> Result<Pending<Buffer<Cuda, u8>>> {
        self.start(out, |queue, out| {
            let whole = out.first_mut(shard.len() * num_shards);
            match num_shards {
                1 => queue.cuda.copy_on(&queue.stream, whole, shard.view()),
                _ => queue.nccl()?.all_gather(shard.view(), whole, &queue.stream),
            }
        })
        .context(name)
    }

    fn gather_trainable(
        &mut self,
        name: String,
        buffers: TrainableBuffers<Cuda>,
    ) -> Result<Pending<TrainableBuffers<Cuda>>> {
        self.start(buffers, |queue, TrainableBuffers { shard, full }| match shard.len() == full.len() {
            true => queue.cuda.copy_on(&queue.stream, full.view_mut(), shard.view()),
            false => queue.nccl()?.all_gather(shard.view(), full.view_mut(), &queue.stream),
        })
        .context(name)
    }

    fn reduce(&mut self, name: String, buffers: TrainableBuffers<Cuda>) -> Result<Pending<TrainableBuffers<Cuda>>> {
        self.start(buffers, |queue, TrainableBuffers { shard, full }| {
            let (len, world_size) = (full.len(), queue.comm.world_size());
            if world_size == 1 {
                return queue.cuda.copy_on(&queue.stream, shard.view_mut(), full.view());
            }
            let part = len / world_size;
            ensure!(part * world_size == len && len <= queue.received.len(), "{len} gradients, {world_size} ranks");
            ensure!(shard.len() == part || shard.len() == len, "{len} gradients into {}", shard.len());
            let mut received = std::mem::replace(&mut queue.received, Buffer::none());
            let nccl = queue.nccl()?;
            nccl.all_to_all(full.view(), received.first_mut(len), &queue.stream)?;
            if shard.len() == part {
                queue.cuda.sum_parts_on(&queue.stream, shard.view_mut(), received.first(len))?;
            } else {
                // The sum takes the place of this rank's own part of the gradients, which has been sent.
                let own = nccl.rank() * part..(nccl.rank() + 1) * part;
                queue.cuda.sum_parts_on(&queue.stream, full.view_mut().into_range(own.clone()), received.first(len))?;
                nccl.all_gather(full.view().range(own), shard.view_mut(), &queue.stream)?;
            }
            queue.received = received;
            Ok(())
        })
        .context(name)
    }

    /// The compute stream waits; the host does not.
    fn wait<T: Send + 'static>(&mut self, pending: Pending<T>) -> Result<T> {
        self.cuda.compute().wait(&pending.done).map_err(|e| anyhow!("GPU event: {e}"))?;
        Ok(pending.value)
    }

    fn all_gather_f64(&mut self, name: &str, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        let mut received = vec![0f64; values.len() * self.comm.world_size()];
        let comm = &mut self.comm;
        comm.all_gather(bytemuck::cast_slice(values), bytemuck::cast_slice_mut(&mut received))
            .with_context(|| name.to_string())?;
        Ok(received.chunks(values.len().max(1)).map(<[f64]>::to_vec).collect())
    }

    fn all_gather_f32(&mut self, name: &str, values: &[f32]) -> Result<Vec<f32>> {
        let mut received = vec![0f32; values.len() * self.comm.world_size()];
        let comm = &mut self.comm;
        comm.all_gather(bytemuck::cast_slice(values), bytemuck::cast_slice_mut(&mut received))
            .with_context(|| name.to_string())?;
        Ok(received)
    }
}
