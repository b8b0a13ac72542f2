//! Host memory behind the device-neutral buffers: the one place of the CPU device that is unsafe.

use std::any::Any;
use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use memmap2::MmapMut;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::device::{Element, View, ViewMut};

use super::Cpu;

/// One mapping of exact size, anonymous or shared with other processes, zeroed, unmapped on drop. Pages that are never touched are never resident.
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

    /// Memory of `bytes` > 0 that other processes of this machine can map, and the file that it is; no file on disk.
    pub fn shareable(bytes: usize) -> Result<(Self, File)> {
        let file = File::from(memfd_create("fsdp-qlora", MemfdFlags::CLOEXEC).context("shared host memory")?);
        file.set_len(bytes as u64).with_context(|| format!("{bytes} bytes of shared host memory"))?;
        Ok((Self::of_file(&file)?, file))
    }

    /// What another process calls a file of [`HostRegion::shareable`].
    pub fn number(file: &File) -> u64 {
        file.as_raw_fd() as u64
    }

    /// Memory that process `process` has made with [`HostRegion::shareable`]; its file must be open there.
    pub fn shared_by(process: u64, number: u64, bytes: usize) -> Result<Self> {
        let path = format!("/proc/{process}/fd/{number}");
        let file = File::options().read(true).write(true).open(&path).with_context(|| path.clone())?;
        let found = file.metadata().with_context(|| path.clone())?.len();
        ensure!(found == bytes as u64, "{path}: {found} bytes, expected {bytes}");
        Self::of_file(&file)
    }

    fn of_file(file: &File) -> Result<Self> {
        // SAFETY: the file is in memory and never shortened; ranks agree on who writes which part when.
        let memory = unsafe { MmapMut::map_mut(file) }.context("mapping of shared host memory")?;
        Ok(Self { memory, pin: None })
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.memory.len()
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
        // at allocation; its lifetime borrows the buffer, which alone owns the range, or shares it with other processes that write only
        // before a barrier after which it is read. `T` is plain old data.
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
