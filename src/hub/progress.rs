//! The state of a download, which one thread shows while others download, and the way to end it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between two looks at whether the download is to end.
const LOOK: Duration = Duration::from_millis(50);

/// Shared by the threads that download and the one that tells.
#[derive(Default)]
pub struct Progress {
    /// Bytes that have arrived, and bytes of all files.
    done: AtomicU64,
    total: AtomicU64,
    is_stopped: AtomicBool,
    notes: Mutex<Vec<String>>,
}

impl Progress {
    /// Counts bytes that have arrived.
    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Takes back bytes that have to be downloaded again.
    pub fn take_back(&self, bytes: u64) {
        self.done.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Counts bytes of files that will be downloaded.
    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Returns the bytes that have arrived, and those of all files.
    pub fn bytes(&self) -> [u64; 2] {
        [self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed)]
    }

    /// Keeps a message until [`Self::take_notes`].
    pub fn note(&self, text: String) {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    /// Takes the messages that were kept.
    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut self.notes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes all threads end soon, because one has failed.
    pub fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    pub fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }

    /// Sleeps for this time, or until [`Self::stop`].
    pub fn pause(&self, time: Duration) {
        let end = Instant::now() + time;
        while !self.is_stopped() && Instant::now() < end {
            std::thread::sleep(LOOK.min(end.saturating_duration_since(Instant::now())));
        }
    }
}
