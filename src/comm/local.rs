//! Ranks as threads of one process, for tests.

use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result, ensure};

use super::{Comm, Groups};

/// One rank of a world of threads. After a rank is dropped the others' next collective fails.
pub struct LocalComm {
    rank: usize,
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Receiver<Vec<u8>>>,
}

impl LocalComm {
    /// Makes all ranks of a world.
    pub fn world(world_size: usize) -> Vec<LocalComm> {
        let mut to: Vec<Vec<_>> = (0..world_size).map(|_| Vec::new()).collect();
        let mut from: Vec<Vec<_>> = (0..world_size).map(|_| Vec::new()).collect();
        for receivers in &mut from {
            for senders in &mut to {
                let (sender, receiver) = channel();
                senders.push(sender);
                receivers.push(receiver);
            }
        }
        to.into_iter().zip(from).enumerate().map(|(rank, (to, from))| LocalComm { rank, to, from }).collect()
    }
}

/// Makes all ranks of a world in which groups of `num_shards` ranks hold a base.
pub fn groups(world_size: usize, num_shards: usize) -> Vec<Groups> {
    let num_replicas = world_size / num_shards;
    assert_eq!(num_shards * num_replicas, world_size, "groups of one size");
    let boxed = |comms: Vec<LocalComm>| comms.into_iter().map(|comm| Box::new(comm) as Box<dyn Comm>);
    let shards = (0..num_replicas).flat_map(|_| boxed(LocalComm::world(num_shards)));
    let mut replicas: Vec<_> = (0..num_shards).map(|_| boxed(LocalComm::world(num_replicas))).collect();
    boxed(LocalComm::world(world_size))
        .zip(shards)
        .enumerate()
        .map(|(rank, (world, shards))| {
            let replicas = replicas[rank % num_shards].next().expect("one for each replica");
            Groups { world, shards, replicas }
        })
        .collect()
}

impl Comm for LocalComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.from.len()
    }

    fn all_gather(&mut self, send: &[u8], recv: &mut [u8]) -> Result<()> {
        ensure!(recv.len() == send.len() * self.world_size(), "all_gather: {} into {} bytes", send.len(), recv.len());
        let repeated = send.repeat(self.world_size());
        self.all_to_all(&repeated, recv)
    }

    fn all_to_all(&mut self, send: &[u8], recv: &mut [u8]) -> Result<()> {
        ensure!(
            send.len() == recv.len() && send.len().is_multiple_of(self.world_size()),
            "all_to_all: {} bytes",
            send.len()
        );
        let part = send.len() / self.world_size();
        for (rank, to) in self.to.iter().enumerate() {
            pass(rank, to, &send[rank * part..][..part])?;
        }
        for (rank, from) in self.from.iter().enumerate() {
            take(rank, from, &mut recv[rank * part..][..part])?;
        }
        Ok(())
    }

    fn send_receive(&mut self, to: usize, send: &[u8], from: usize, recv: &mut [u8]) -> Result<()> {
        if !send.is_empty() {
            pass(to, &self.to[to], send)?;
        }
        if !recv.is_empty() {
            take(from, &self.from[from], recv)?;
        }
        Ok(())
    }
}

fn pass(rank: usize, to: &Sender<Vec<u8>>, bytes: &[u8]) -> Result<()> {
    to.send(bytes.to_vec()).ok().with_context(|| format!("rank {rank} has gone"))
}

fn take(rank: usize, from: &Receiver<Vec<u8>>, out: &mut [u8]) -> Result<()> {
    let bytes = from.recv().with_context(|| format!("rank {rank} has gone"))?;
    ensure!(bytes.len() == out.len(), "rank {rank} sent {} bytes, expected {}", bytes.len(), out.len());
    out.copy_from_slice(&bytes);
    Ok(())
}
