//! Sums over ranks of values in host memory, added in the order of ranks.

use anyhow::Result;

use super::Comm;

/// A part of `full` of every rank: those that this rank has to sum.
pub struct Parts<'a>(std::slice::ChunksExact<'a, f32>);

/// Sends part r of `full` to rank r. `received` grows where it is too short.
pub fn exchange<'a>(full: &[f32], received: &'a mut Vec<f32>, comm: &mut dyn Comm) -> Result<Parts<'a>> {
    if received.len() < full.len() {
        received.resize(full.len(), 0.0);
    }
    let received = &mut received[..full.len()];
    comm.all_to_all(bytemuck::cast_slice(full), bytemuck::cast_slice_mut(received))?;
    Ok(Parts(received.chunks_exact((full.len() / comm.world_size()).max(1))))
}

impl Parts<'_> {
    /// Adds the parts in rank order.
    pub fn sum(mut self, sum: &mut [f32]) {
        self.0.next().into_iter().for_each(|first| sum.copy_from_slice(first));
        self.0.for_each(|part| sum.iter_mut().zip(part).for_each(|(sum, value)| *sum += value));
    }
}

/// Replaces `values` by their sum over ranks, added in rank order.
pub fn all_reduce(values: &mut [f32], received: &mut Vec<f32>, comm: &mut dyn Comm) -> Result<()> {
    if comm.world_size() == 1 {
        return Ok(());
    }
    let len = values.len() / comm.world_size();
    let own = comm.rank() * len..(comm.rank() + 1) * len;
    exchange(values, received, comm)?.sum(&mut values[own]);
    comm.all_gather_in_place(bytemuck::cast_slice_mut(values))
}

#[cfg(test)]
mod tests {
    use super::super::local::LocalComm;
    use super::*;

    #[test]
    fn sums_are_in_rank_order() {
        // In f32, (1e8 + 1) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1: only one order gives each.
        let sums = |mut comm: LocalComm| {
            let value = [1e8f32, 1.0, -1e8][comm.rank()];
            let (mut shard, mut received) = ([f32::NAN; 2], Vec::new());
            exchange(&[value; 6], &mut received, &mut comm).unwrap().sum(&mut shard);
            let mut whole = [value; 6];
            all_reduce(&mut whole, &mut received, &mut comm).unwrap();
            assert_eq!((shard, whole), ([0.0; 2], [0.0; 6]));
        };
        std::thread::scope(|scope| {
            for comm in LocalComm::world(3) {
                scope.spawn(move || sums(comm));
            }
        });
    }
}
