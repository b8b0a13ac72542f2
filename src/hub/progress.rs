//! How far a download is, for those that wait for it, and how they end it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between two looks at whether somebody wants the end.
const LOOK: Duration = Duration::from_millis(50);

/// Shared by the threads that download and the one that tells.
#[derive(Default)]
pub struct Progress {
    /// Bytes that are there, and that will be.
    done: AtomicU64,
    total: AtomicU64,
    is_stopped: AtomicBool,
    notes: Mutex<Vec<String>>,
}

impl Progress {
    /// Adds bytes to those that are there.
    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Takes back bytes that have to come again.
    pub fn take_back(&self, bytes: u64) {
        self.done.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Adds bytes to those that will be there.
    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Returns the bytes that are there, and that will be.
    pub fn bytes(&self) -> [u64; 2] {
        [self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed)]
    }

    /// Keeps a sentence for people.
    pub fn note(&self, text: String) {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    /// Takes the sentences that were kept.
    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut self.notes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes all threads end soon, as one has failed.
    pub fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    pub fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }

    /// Sleeps, but not longer than until [`Self::stop`].
    pub fn pause(&self, time: Duration) {
        let end = Instant::now() + time;
        while !self.is_stopped() && Instant::now() < end {
            std::thread::sleep(LOOK.min(end.saturating_duration_since(Instant::now())));
        }
    }
}
