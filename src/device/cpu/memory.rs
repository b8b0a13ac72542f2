//! Host memory behind the device-neutral buffers: the one place of the CPU device that is unsafe.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

use crate::device::arena::ALIGN_BYTES;
use crate::device::{Element, View, ViewMut};

use super::Cpu;

/// One zeroed allocation, freed on drop.
pub struct HostRegion {
    ptr: *mut u8,
    layout: Layout,
}

// SAFETY: a region is only a lifetime: the memory is reached through `Buffer`s, which own disjoint ranges of it.
unsafe impl Send for HostRegion {}
// SAFETY: as above; a shared region gives access to nothing.
unsafe impl Sync for HostRegion {}

impl HostRegion {
    /// `bytes` > 0; zero pages that are never touched are never resident.
    pub fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes, ALIGN_BYTES).expect("a size below isize::MAX");
        // SAFETY: the layout's size is not zero (the arena asks for at least ALIGN_BYTES).
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        Self { ptr, layout }
    }

    /// Address of the first byte.
    pub fn addr(&self) -> usize {
        self.ptr as usize
    }
}

impl Drop for HostRegion {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; every `Buffer` holds an `Arc` of the region, so none is left.
        unsafe { dealloc(self.ptr, self.layout) }
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
