//! Host memory that a queue copies to or from, and who may touch it when.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use cudarc::driver::{CudaEvent, CudaStream};

use crate::device::cuda::asked::waiting;
use crate::device::{Device, Place};

/// A buffer or a [`Place`] that lies in host memory and that a queue copies to or from.
///
/// [`Queue::wait`](super::Queue::wait) orders the compute queue after a copy; on a GPU the host runs ahead of both,
/// so the copy may still be under way when `wait` returns. A guarded buffer can be passed on to the next action of a
/// queue as it is. The host reaches it only by waiting until the last copy has ended.
pub struct Guarded<P> {
    inner: P,
    /// Event at the end of the last copy that a GPU was given; `None` if there is no copy to wait for.
    last_copy: Option<Arc<CudaEvent>>,
}

impl<P> Guarded<P> {
    /// Guards memory that no copy uses yet.
    pub fn new(inner: P) -> Guarded<P> {
        Guarded { inner, last_copy: None }
    }

    /// Waits on the host until the last copy has ended; what it wrote can then be read. While the borrow lasts no
    /// queue can be given the memory.
    pub fn wait_on_host(&self) -> Result<&P> {
        self.wait_for_last_copy()?;
        Ok(&self.inner)
    }

    /// Waits on the host until the last copy has ended; the memory can then be written as well.
    pub fn wait_on_host_mut(&mut self) -> Result<&mut P> {
        self.wait_for_last_copy()?;
        self.last_copy = None;
        Ok(&mut self.inner)
    }

    fn wait_for_last_copy(&self) -> Result<()> {
        let ended = self.last_copy.as_ref().map_or(Ok(()), |event| waiting(|| event.synchronize()));
        ended.map_err(|e| anyhow!("waiting for a copy to or from host memory: the GPU reports: {e}"))
    }

    /// Gives the memory to copies on `stream`, which comes after the last copy; the host does not wait. Whoever
    /// starts a copy calls [`Guarded::copied_until`] with its end.
    pub(super) fn on_stream(&mut self, stream: &CudaStream) -> Result<&mut P> {
        if let Some(event) = &self.last_copy {
            stream.wait(event).map_err(|e| anyhow!("GPU event: {e}"))?;
        }
        Ok(&mut self.inner)
    }

    /// Notes the end of a copy that was started.
    pub(super) fn copied_until(&mut self, end: &Arc<CudaEvent>) {
        self.last_copy = Some(end.clone());
    }
}

impl<D: Device, T> Guarded<Place<D, T>> {
    /// True if the place lies in host memory.
    pub(super) fn is_on_host(&self) -> bool {
        matches!(self.inner, Place::Host(_))
    }
}
