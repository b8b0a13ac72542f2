//! The gate itself: a queue that leaves out one copy or collective, whichever it is, changes the gradients or the
//! trained values. So a run whose numbers equal those of the reference has moved everything that it had to move.

use std::time::Instant;

use anyhow::Result;
use fsdp_qlora::testing::{
    Buffer, Cpu, Element, Gather, Guarded, HostBuffer, HostCopy, HostQueue, Keep, Packing, Position, Queue, Residency,
    Sampler, ShardSource, Span, StepArgs, TrainableBuffers, Values, ViewMut, Waits, data, step,
};

use crate::common::on_all_ranks;
use crate::common::steps::{NOTHING_RESIDENT, layers, rows, trainer, update};

type OfHost<T> = <HostQueue as Queue<Cpu>>::Pending<T>;

/// A queue that moves nothing when it is given action number `left_out`.
struct LeavesOut {
    inner: HostQueue,
    left_out: Option<usize>,
    num_actions: usize,
}

enum Pending<T: Send + 'static> {
    Started(OfHost<T>),
    LeftOut(T),
}

impl LeavesOut {
    fn is_left_out(&mut self) -> bool {
        self.num_actions += 1;
        self.left_out == Some(self.num_actions - 1)
    }
}

/// Fills a buffer as the queue does before it fills it with what it should.
fn poison<T: Element>(buffer: &mut Buffer<Cpu, T>) {
    bytemuck::cast_slice_mut::<T, u8>(buffer.view_mut().host_mut()).fill(0xFF);
}

impl Queue<Cpu> for LeavesOut {
    type Pending<T: Send + 'static> = Pending<T>;
    type Shard = <HostQueue as Queue<Cpu>>::Shard;

    fn store(&mut self, shards: Vec<ShardSource>, resident: &[bool], gather: Gather) -> Result<Vec<Self::Shard>> {
        self.inner.store(shards, resident, gather)
    }

    fn device_bytes(&self) -> usize {
        self.inner.device_bytes()
    }

    fn host_bytes(&self) -> usize {
        self.inner.host_bytes()
    }

    fn position(&self) -> Position {
        self.inner.position()
    }

    fn gather_frozen(
        &mut self,
        name: String,
        shard: &Self::Shard,
        mut out: Buffer<Cpu, u8>,
    ) -> Result<Pending<Buffer<Cpu, u8>>> {
        if self.is_left_out() {
            poison(&mut out);
            return Ok(Pending::LeftOut(out));
        }
        self.inner.gather_frozen(name, shard, out).map(Pending::Started)
    }

    fn gather_trainable(
        &mut self,
        name: String,
        mut buffers: TrainableBuffers<Cpu>,
    ) -> Result<Pending<TrainableBuffers<Cpu>>> {
        if self.is_left_out() {
            poison(&mut buffers.full);
            return Ok(Pending::LeftOut(buffers));
        }
        self.inner.gather_trainable(name, buffers).map(Pending::Started)
    }

    fn reduce(&mut self, name: String, buffers: TrainableBuffers<Cpu>) -> Result<Pending<TrainableBuffers<Cpu>>> {
        if self.is_left_out() {
            return Ok(Pending::LeftOut(buffers));
        }
        self.inner.reduce(name, buffers).map(Pending::Started)
    }

    fn put<T: Element>(&mut self, name: String, copy: HostCopy<Cpu, T>) -> Result<Pending<HostCopy<Cpu, T>>> {
        if self.is_left_out() {
            return Ok(Pending::LeftOut(copy));
        }
        self.inner.put(name, copy).map(Pending::Started)
    }

    fn fetch<T: Element>(&mut self, name: String, mut copy: HostCopy<Cpu, T>) -> Result<Pending<HostCopy<Cpu, T>>> {
        if self.is_left_out() {
            poison(&mut copy.device);
            return Ok(Pending::LeftOut(copy));
        }
        self.inner.fetch(name, copy).map(Pending::Started)
    }

    fn upload<T: Element>(
        &mut self,
        name: String,
        device: ViewMut<'_, Cpu, T>,
        host: &mut Guarded<HostBuffer<T>>,
    ) -> Result<()> {
        self.inner.upload(name, device, host)
    }

    fn wait<T: Send + 'static>(&mut self, pending: Pending<T>) -> Result<T> {
        match pending {
            Pending::Started(pending) => self.inner.wait(pending),
            Pending::LeftOut(value) => Ok(value),
        }
    }

    fn take_waits(&mut self) -> Result<Waits> {
        self.inner.take_waits()
    }

    fn record_spans(&mut self, on: bool) {
        self.inner.record_spans(on);
    }

    fn take_spans(&mut self, begin: &Instant) -> Result<Vec<Span>> {
        Queue::<Cpu>::take_spans(&mut self.inner, begin)
    }

    fn all_gather_f64(&mut self, name: &str, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        self.inner.all_gather_f64(name, values)
    }

    fn collect_f32(&mut self, name: &str, values: &mut [f32]) -> Result<()> {
        self.inner.collect_f32(name, values)
    }

    fn broadcast_f32(&mut self, name: &str, values: &mut Vec<f32>) -> Result<()> {
        self.inner.broadcast_f32(name, values)
    }

    fn gather_shards_f32(&mut self, name: &str, values: &[f32]) -> Result<Vec<f32>> {
        self.inner.gather_shards_f32(name, values)
    }
}

/// Gradients and trained values of one step of two ranks, and the number of actions that each has given its queue.
fn one_step(gather: Gather, residency: Residency, left_out: Option<usize>) -> (Vec<Vec<f32>>, usize) {
    let shards = tempfile::tempdir().unwrap();
    let mut options = trainer();
    options.max_micro_batches = 3;
    (options.gather, options.residency, options.keep) = (gather, residency, Keep::NOTHING);
    let data = rows(Packing::None);
    let results = on_all_ranks(2, |groups| {
        let mut engine =
            options.engine_with(groups, shards.path(), |inner| LeavesOut { inner, left_out, num_actions: 0 });
        let rank = engine.queue.rank();
        let batches = data::step_micro_batches(&data, &mut Sampler::new(24, 1), 0, 6, 1, 2, rank);
        let update = update(1, 1e-2);
        step(&mut engine, &batches, &StepArgs { step: 1, num_micro_batches: 3, update: &update, seed: 42, next: None })
            .unwrap();
        let mut values = layers(&mut engine, Values::Grad);
        values.extend(layers(&mut engine, Values::Master));
        (values, engine.queue.num_actions)
    });
    assert_eq!(results[0].1, results[1].1);
    results.into_iter().next().unwrap()
}

#[test]
fn a_copy_or_collective_that_moves_nothing_changes_the_numbers() {
    let mut reference = None;
    for (gather, residency) in
        [(Gather::Collective, Residency::ALL), (Gather::Collective, NOTHING_RESIDENT), (Gather::Host, NOTHING_RESIDENT)]
    {
        let (values, num_actions) = one_step(gather, residency, None);
        assert!(*reference.get_or_insert_with(|| values.clone()) == values, "{gather:?}, {residency:?}");
        for i in 0..num_actions {
            let (without, _) = one_step(gather, residency, Some(i));
            assert!(without != values, "{gather:?}, {residency:?}: nobody notices that action {i} moves nothing");
        }
    }
}
