//! Host memory behind the device-neutral buffers: the one place of the CPU device that is unsafe.
#![expect(unsafe_code, reason = "makes and registers mappings")]

use std::any::Any;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicU64;

use anyhow::{Context, Result, ensure};
use memmap2::MmapMut;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::device::{Element, View, ViewMut};

use super::Cpu;

/// One mapping of exact size, anonymous or shared with other processes, zeroed, unmapped on drop. Pages that are
/// never touched are never resident.
pub struct HostRegion {
    memory: MmapMut,
    /// Keeps the pages pinned for a GPU; it is let go before they are unmapped.
    pin: Option<Box<dyn Any + Send + Sync>>,
}

/// The file, in memory only, behind a region that other processes can map; they find it by its number for as long as
/// this lives.
pub struct SharedFile(File);

impl SharedFile {
    /// The number of the file in this process.
    pub fn number(&self) -> u64 {
        self.0.as_raw_fd() as u64
    }
}

impl HostRegion {
    /// `bytes` > 0.
    pub fn new(bytes: usize) -> Result<Self> {
        let memory = MmapMut::map_anon(bytes).with_context(|| format!("{bytes} bytes of host memory{}", limits()))?;
        Ok(Self { memory, pin: None })
    }

    /// Memory of `bytes` > 0 that other processes of this machine can map.
    pub fn shareable(bytes: usize) -> Result<(Self, SharedFile)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("fsdp-qlora", flags).context("shared host memory")?);
        file.set_len(bytes as u64).with_context(|| format!("{bytes} bytes of shared host memory"))?;
        // A page of a file that was cut off cannot be read: no process may cut it.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).context("shared host memory")?;
        Ok((Self::of_file(&file)?, SharedFile(file)))
    }

    /// Maps the memory that process `process` has made with [`HostRegion::shareable`], whose [`SharedFile`] must
    /// still live.
    ///
    /// # Safety
    /// No byte is written through any mapping of this memory while a reference to it exists in another one: the
    /// processes agree on who writes which part when.
    pub unsafe fn shared_by(process: u64, number: u64, bytes: usize) -> Result<Self> {
        let path = format!("/proc/{process}/fd/{number}");
        let file = File::options().read(true).write(true).open(&path).with_context(|| path.clone())?;
        let found = file.metadata().with_context(|| path.clone())?.len();
        ensure!(found == bytes as u64, "{path}: {found} bytes, expected {bytes}");
        Self::of_file(&file)
    }

    fn of_file(file: &File) -> Result<Self> {
        // SAFETY: the file is in memory and sealed, so that it is never shortened; who writes which part when is the
        // business of those who call `shared_by`, without which nobody else maps it.
        let memory =
            unsafe { MmapMut::map_mut(file) }.with_context(|| format!("mapping of shared host memory{}", limits()))?;
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

/// Names the limits of this process's memory beside what the machine has, for messages: `ulimit -v` and `ulimit -d`.
fn limits() -> String {
    let text = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let set = ["Max address space", "Max data size"].iter().filter_map(|name| {
        let limit = text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?;
        (limit != "unlimited")
            .then(|| format!("{} is {limit} bytes", name.to_lowercase().replace("max", "the limit of")))
    });
    let set: Vec<String> = set.collect();
    if set.is_empty() { String::new() } else { format!(" ({})", set.join(", ")) }
}

/// Words that several processes read and write, each word as a whole: nothing that they do is a data race.
pub struct SharedWords(HostRegion);

impl SharedWords {
    /// Words of this process, zeroed. `bytes` > 0.
    pub fn new(bytes: usize) -> Result<Self> {
        HostRegion::new(bytes).map(Self)
    }

    /// Words that other processes of this machine can map.
    pub fn shareable(bytes: usize) -> Result<(Self, SharedFile)> {
        let (region, file) = HostRegion::shareable(bytes)?;
        Ok((Self(region), file))
    }

    /// Maps the words that process `process` has made with [`SharedWords::shareable`], whose [`SharedFile`] must
    /// still live.
    ///
    /// # Safety
    /// The file of this number is that of such words, not of memory that is read or written in another way.
    pub unsafe fn shared_by(process: u64, number: u64, bytes: usize) -> Result<Self> {
        // SAFETY: all processes reach the memory through `words` alone.
        unsafe { HostRegion::shared_by(process, number, bytes) }.map(Self)
    }

    /// Two mappings of the same words.
    #[cfg(test)]
    pub fn pair(bytes: usize) -> Result<(Self, Self)> {
        let (first, file) = Self::shareable(bytes)?;
        // SAFETY: the file was made above.
        let second = unsafe { Self::shared_by(u64::from(std::process::id()), file.number(), bytes) }?;
        Ok((first, second))
    }

    /// The words.
    pub fn words(&self) -> &[AtomicU64] {
        let HostRegion { memory, .. } = &self.0;
        // SAFETY: the mapping begins at a page, is that long, lives as long as `self`, and is reached as atomic words
        // alone.
        unsafe { std::slice::from_raw_parts(memory.as_ptr().cast(), memory.len() / size_of::<AtomicU64>()) }
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
        // SAFETY: a view of a `Buffer<Cpu, T>` lies in its live region, aligned to 256 bytes plus whole elements,
        // zeroed at allocation; its lifetime borrows the buffer, which alone owns the range, in this process and
        // (`HostRegion::shared_by`) in others. `T` is plain old data.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_cannot_be_is_an_error_with_its_size() {
        let error = format!("{:#}", HostRegion::new(1 << 60).err().expect("an exbibyte"));
        assert!(error.starts_with("1152921504606846976 bytes of host memory"), "{error}");
    }

    #[test]
    fn shared_memory_cannot_be_cut_off() {
        let (_region, file) = HostRegion::shareable(8192).unwrap();
        assert!(file.0.set_len(4096).is_err() && file.0.set_len(16384).is_err());
    }
}
