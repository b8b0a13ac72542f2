//! All device memory is carved at start, by name, from a plan.
//!
//! The same carving code runs twice: once with [`Arena::measure`], which only counts and so gives the plan, and once
//! with [`Arena::allocate`], which allocates exactly that and refuses anything that differs from it.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::Device;
use super::cpu::{Cpu, HostRegion};
use super::tensor::{Buffer, Element};

/// Every range begins at a multiple of this (a cache line and a GPU's widest transaction both divide it).
pub const ALIGN_BYTES: usize = 256;

/// One named range of a memory plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanEntry {
    /// Name of its use: `slots/0/flat`, `activations/gate`, …
    pub name: String,
    /// Its size, rounded up to [`ALIGN_BYTES`].
    pub bytes: usize,
}

/// The ranges that will be allocated, in the order in which they are carved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    pub entries: Vec<PlanEntry>,
}

impl MemoryPlan {
    /// Adds a range.
    pub fn push(&mut self, name: &str, bytes: usize) {
        let bytes = bytes.checked_next_multiple_of(ALIGN_BYTES).unwrap_or(usize::MAX);
        self.entries.push(PlanEntry { name: name.to_string(), bytes });
    }

    /// Returns the sum over all entries, in bytes; a sum that overflows is `usize::MAX`, more than any machine has.
    pub fn total_bytes(&self) -> usize {
        self.entries.iter().fold(0, |sum: usize, entry| sum.saturating_add(entry.bytes))
    }

    /// Returns the bytes of each first part of a name, largest first.
    pub fn by_owner(&self) -> Vec<(String, usize)> {
        let mut owners: Vec<(String, usize)> = Vec::new();
        for entry in &self.entries {
            let owner = entry.name.split('/').next().unwrap_or_default();
            match owners.iter_mut().find(|(name, _)| name == owner) {
                Some((_, bytes)) => *bytes += entry.bytes,
                None => owners.push((owner.to_string(), entry.bytes)),
            }
        }
        owners.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        owners
    }
}

/// Hands out [`Buffer`]s in the order of a [`MemoryPlan`].
pub struct Arena<D: Device> {
    memory: Option<(Arc<D::Region>, usize, MemoryPlan)>,
    carved: MemoryPlan,
    used_bytes: usize,
}

impl<D: Device> Arena<D> {
    /// An arena that only counts.
    pub fn measure() -> Self {
        Self { memory: None, carved: MemoryPlan::default(), used_bytes: 0 }
    }

    /// Allocates the whole plan on the device, in one piece.
    pub fn allocate(device: &D, plan: MemoryPlan) -> Result<Self> {
        let memory = device.allocate(plan.total_bytes().max(ALIGN_BYTES))?;
        Ok(Self::over(memory, plan))
    }

    /// Allocates exactly what `carve` takes, and returns what it made: it is called once to measure and once to take.
    pub fn carved<T>(device: &D, carve: impl Fn(&mut Self) -> Result<T>) -> Result<T> {
        let mut measured = Self::measure();
        carve(&mut measured)?;
        carve(&mut Self::allocate(device, measured.into_plan())?)
    }

    fn over((region, addr): (D::Region, usize), plan: MemoryPlan) -> Self {
        Self { memory: Some((Arc::new(region), addr, plan)), carved: MemoryPlan::default(), used_bytes: 0 }
    }

    /// Carves the next range, `len` elements of `T`. Fails when the plan has another one at this place.
    pub fn carve<T: Element>(&mut self, name: &str, len: usize) -> Result<Buffer<D, T>> {
        const { assert!(align_of::<T>() <= ALIGN_BYTES) };
        let bytes = len.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_next_multiple_of(ALIGN_BYTES));
        let bytes = bytes.with_context(|| format!("{name}: {len} elements are more bytes than can be counted"))?;
        let entry = PlanEntry { name: name.to_string(), bytes };
        let buffer = match &self.memory {
            None => Buffer::new(None, 0, len),
            Some((region, addr, plan)) => {
                let planned = plan.entries.get(self.carved.entries.len());
                ensure!(planned == Some(&entry), "memory plan has {planned:?} where {entry:?} is asked for");
                Buffer::new(Some(region.clone()), addr + self.used_bytes, len)
            }
        };
        self.carved.entries.push(entry);
        self.used_bytes += bytes;
        Ok(buffer)
    }

    /// Returns the plan of the ranges that have been carved so far.
    pub fn into_plan(self) -> MemoryPlan {
        self.carved
    }
}

impl Arena<Cpu> {
    /// Allocates the whole plan on the host, for copies to and from `device`.
    pub fn allocate_host<D: Device>(device: &D, plan: MemoryPlan) -> Result<Self> {
        Self::over_host(device.pin(HostRegion::new(plan.total_bytes().max(ALIGN_BYTES))?)?, plan)
    }

    /// Carves the plan from memory that is there already. Fails when it is too small.
    pub fn over_host(region: HostRegion, plan: MemoryPlan) -> Result<Self> {
        let (bytes, needed) = (region.bytes(), plan.total_bytes());
        ensure!(needed <= bytes, "{needed} bytes are planned in {bytes} bytes of host memory");
        let addr = region.addr();
        Ok(Self::over((region, addr), plan))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_run_allocates_exactly_the_plan() {
        let mut measured = Arena::<Cpu>::measure();
        measured.carve::<f32>("a/x", 3).unwrap();
        measured.carve::<u8>("a/y", 257).unwrap();
        let plan = measured.into_plan();
        assert_eq!(plan.by_owner(), vec![("a".to_string(), 768)]);
        let mut arena = Arena::allocate(&Cpu::new(1), plan).unwrap();
        let mut x = arena.carve::<f32>("a/x", 3).unwrap();
        x.view_mut().host_mut().fill(2.0);
        assert_eq!(x.view().host(), [2.0; 3]);
        assert!(arena.carve::<u8>("a/y", 600).is_err(), "a size that the plan does not have");
        assert!(arena.carve::<u8>("a/z", 257).is_err(), "a name that the plan does not have");
    }

    #[test]
    fn no_plan_reaches_beyond_its_memory() {
        let mut plan = MemoryPlan::default();
        plan.push("a", 8192);
        assert!(Arena::over_host(HostRegion::new(4096).unwrap(), plan.clone()).is_err());
        assert!(Arena::over_host(HostRegion::new(8192).unwrap(), plan.clone()).is_ok());
        plan.push("b", usize::MAX - 100);
        assert_eq!(plan.total_bytes(), usize::MAX);
        assert!(Arena::over_host(HostRegion::new(8192).unwrap(), plan.clone()).is_err());
        assert!(Arena::allocate(&Cpu::new(1), plan).is_err());
        assert!(Arena::<Cpu>::measure().carve::<f32>("c", usize::MAX / 2).is_err());
    }
}
