//! Host memory behind the device-neutral buffers: the one place of the CPU device that is unsafe.

use std::any::Any;

use anyhow::{Context, Result};
use memmap2::MmapMut;

use crate::device::{Element, View, ViewMut};

use super::Cpu;

/// One anonymous mapping of exact size, zeroed, unmapped on drop. Pages that are never touched are never resident.
pub struct HostRegion {
    memory: MmapMut,
    /// What keeps the pages pinned for a GPU, let go before they are unmapped.
    pin: Option<Box<dyn Any + Send + Sync>>,
}

impl HostRegion {
    /// `bytes` > 0.
    pub fn new(bytes: usize) -> Result<Self> {
        let memory = MmapMut::map_anon(bytes).with_context(|| format!("{bytes} bytes of host memory"))?;
        Ok(Self { memory, pin: None })
    }

    /// Keeps `pin` for as long as the memory is mapped.
    pub fn pinned_by(mut self, pin: impl Any + Send + Sync) -> Self {
        self.pin = Some(Box::new(pin));
        self
    }

    /// Address of the first byte.
    pub fn addr(&self) -> usize {
        self.memory.as_ptr() as usize
    }
}

impl Drop for HostRegion {
    fn drop(&mut self) {
        self.pin = None;
    }
}

impl<'a, T: Element> View<'a, Cpu, T> {
    /// The elements.
    pub fn host(self) -> &'a [T] {
        // SAFETY: a view of a `Buffer<Cpu, T>` lies in its live region, aligned to 256 bytes plus whole elements, zeroed
        // at allocation; its lifetime borrows the buffer, which alone owns the range. `T` is plain old data.
        unsafe { std::slice::from_raw_parts(self.addr() as *const T, self.len()) }
    }
}

impl<'a, T: Element> ViewMut<'a, Cpu, T> {
    /// The elements.
    pub fn host_mut(self) -> &'a mut [T] {
        // SAFETY: as for `host`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.addr() as *mut T, self.len()) }
    }
}
