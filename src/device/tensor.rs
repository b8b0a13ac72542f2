//! Owned and borrowed ranges of device memory, the same for every device.
//!
//! A [`Buffer`] owns its range alone; [`View`] and [`ViewMut`] borrow it, so that the borrow checker proves what may
//! alias on a GPU exactly as it does on the host. Shapes are not stored: they stand in each op's contract.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use super::Device;
use super::cpu::Cpu;

/// Types whose values can lie in device memory.
pub trait Element: bytemuck::Pod + Send + Sync + std::fmt::Debug {}
impl<T: bytemuck::Pod + Send + Sync + std::fmt::Debug> Element for T {}

/// A named, uniquely owned range of `len` elements in a device's arena.
pub struct Buffer<D: Device, T> {
    /// `None` when the arena only measures: such a buffer has a length and no memory.
    region: Option<Arc<D::Region>>,
    addr: usize,
    len: usize,
    _element: PhantomData<T>,
}

/// A range of the host's memory.
pub type HostBuffer<T> = Buffer<Cpu, T>;

/// A buffer on the device, or on the host when the device streams it.
pub enum Place<D: Device, T> {
    Device(Buffer<D, T>),
    Host(HostBuffer<T>),
}

impl<D: Device, T: Element> Place<D, T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Place::Device(buffer) => buffer.len(),
            Place::Host(buffer) => buffer.len(),
        }
    }

    /// True for a buffer of no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A shared borrow of a range of device memory.
pub struct View<'a, D, T> {
    addr: usize,
    len: usize,
    _borrow: PhantomData<&'a T>,
    _device: PhantomData<fn() -> D>,
}

/// An exclusive borrow of a range of device memory.
pub struct ViewMut<'a, D, T> {
    addr: usize,
    len: usize,
    _borrow: PhantomData<&'a mut T>,
    _device: PhantomData<fn() -> D>,
}

impl<D: Device, T: Element> Buffer<D, T> {
    pub(super) fn new(region: Option<Arc<D::Region>>, addr: usize, len: usize) -> Self {
        Self { region, addr, len, _element: PhantomData }
    }

    /// Makes a buffer without memory, which stands for one that has been moved out.
    pub fn none() -> Self {
        Self::new(None, 0, 0)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a buffer of no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The whole buffer, shared.
    pub fn view(&self) -> View<'_, D, T> {
        assert!(self.region.is_some(), "a buffer of a measuring arena has no memory");
        View { addr: self.addr, len: self.len, _borrow: PhantomData, _device: PhantomData }
    }

    /// The whole buffer, exclusive.
    pub fn view_mut(&mut self) -> ViewMut<'_, D, T> {
        assert!(self.region.is_some(), "a buffer of a measuring arena has no memory");
        ViewMut { addr: self.addr, len: self.len, _borrow: PhantomData, _device: PhantomData }
    }

    /// The first `len` elements, shared.
    pub fn first(&self, len: usize) -> View<'_, D, T> {
        self.view().range(0..len)
    }

    /// The first `len` elements, exclusive.
    pub fn first_mut(&mut self, len: usize) -> ViewMut<'_, D, T> {
        self.view_mut().into_range(0..len)
    }
}

impl<D, T> Clone for View<'_, D, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D, T> Copy for View<'_, D, T> {}

impl<'a, D: Device, T: Element> View<'a, D, T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a view of no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Device address of the first element.
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// Returns the same bytes as elements of another type, as many as are whole; panics when they are not aligned for it.
    pub fn reinterpret<U: Element>(self) -> View<'a, D, U> {
        const { assert!(size_of::<U>() > 0) };
        assert!(self.addr.is_multiple_of(align_of::<U>()), "elements of {} bytes at {:#x}", align_of::<U>(), self.addr);
        let len = self.len * size_of::<T>() / size_of::<U>();
        View { addr: self.addr, len, _borrow: PhantomData, _device: PhantomData }
    }

    /// Returns a part of the range; panics when it does not lie inside.
    pub fn range(self, range: Range<usize>) -> View<'a, D, T> {
        check_range(&range, self.len);
        View {
            addr: self.addr + range.start * size_of::<T>(),
            len: range.len(),
            _borrow: PhantomData,
            _device: PhantomData,
        }
    }
}

impl<'a, D: Device, T: Element> ViewMut<'a, D, T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a view of no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Device address of the first element.
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// Returns a part of the range; panics when it does not lie inside.
    pub fn into_range(self, range: Range<usize>) -> ViewMut<'a, D, T> {
        check_range(&range, self.len);
        ViewMut {
            addr: self.addr + range.start * size_of::<T>(),
            len: range.len(),
            _borrow: PhantomData,
            _device: PhantomData,
        }
    }

    /// Borrows a part exclusively, for a shorter time; panics when it does not lie inside.
    pub fn range_mut(&mut self, range: Range<usize>) -> ViewMut<'_, D, T> {
        check_range(&range, self.len);
        ViewMut {
            addr: self.addr + range.start * size_of::<T>(),
            len: range.len(),
            _borrow: PhantomData,
            _device: PhantomData,
        }
    }

    /// Returns the same range, shared from here on.
    pub fn into_view(self) -> View<'a, D, T> {
        View { addr: self.addr, len: self.len, _borrow: PhantomData, _device: PhantomData }
    }

    /// Returns the same range, shared for as long as this borrow is not used.
    pub fn view(&self) -> View<'_, D, T> {
        View { addr: self.addr, len: self.len, _borrow: PhantomData, _device: PhantomData }
    }

    /// Splits the range in two parts that do not overlap; panics when `mid` does not lie inside.
    pub fn split_at(self, mid: usize) -> (ViewMut<'a, D, T>, ViewMut<'a, D, T>) {
        check_range(&(0..mid), self.len);
        (
            ViewMut { addr: self.addr, len: mid, _borrow: PhantomData, _device: PhantomData },
            ViewMut {
                addr: self.addr + mid * size_of::<T>(),
                len: self.len - mid,
                _borrow: PhantomData,
                _device: PhantomData,
            },
        )
    }
}

fn check_range(range: &Range<usize>, len: usize) {
    assert!(range.start <= range.end && range.end <= len, "range {range:?} of a view of {len} elements");
}
