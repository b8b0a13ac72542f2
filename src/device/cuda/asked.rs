//! Counts of what the host asks of the compute queue; a process has one rank, which has one GPU.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::device::Asked;

static LAUNCHES: AtomicU64 = AtomicU64::new(0);
static WAITED_NS: AtomicU64 = AtomicU64::new(0);

/// Counts a kernel or a matrix product.
pub(super) fn launched() {
    LAUNCHES.fetch_add(1, Relaxed);
}

/// Runs a call in which the host waits for the GPU, and counts its time.
pub fn waiting<T>(wait: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = wait();
    WAITED_NS.fetch_add(start.elapsed().as_nanos() as u64, Relaxed);
    result
}

pub(super) fn asked() -> Asked {
    Asked { launches: LAUNCHES.load(Relaxed), waited: Duration::from_nanos(WAITED_NS.load(Relaxed)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_and_launches_add_up() {
        let before = asked();
        launched();
        waiting(|| std::thread::sleep(Duration::from_millis(2)));
        // Other tests may count at the same time.
        let Asked { launches, waited } = asked();
        assert!(launches > before.launches && waited >= before.waited + Duration::from_millis(2));
    }
}
