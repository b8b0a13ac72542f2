//! Counts the edges of the control flow that an input takes, in a build that `scripts/fuzz` makes with
//! `-Cpasses=sancov-module`: LLVM then puts a counter of 8 bits on each edge. A plain build has no counters.
#![expect(unsafe_code, reason = "LLVM hands over the counters as two pointers")]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Eight counters in a word, so that those of edges that were not taken are passed over together.
static COUNTERS: OnceLock<&'static [AtomicU64]> = OnceLock::new();

/// Called by the constructors that LLVM adds, with the bounds of all counters of the program.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(begin: *const AtomicU8, end: *const AtomicU8) {
    // SAFETY: both are bounds of one section of the program, which lives as long as the program and which nobody sees as
    // plain bytes. The program counts in it with stores of bytes; a count that is lost in a race is harmless. The few bytes
    // before and behind the words are left out.
    let counters = unsafe { std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin)).align_to().1 };
    COUNTERS.get_or_init(|| counters);
}

fn counters() -> &'static [AtomicU64] {
    COUNTERS.get().copied().unwrap_or_default()
}

/// Remembers for each edge which classes of counts have occurred with earlier inputs.
pub struct Seen(Vec<[u8; 8]>);

impl Seen {
    pub fn new() -> Seen {
        Seen(vec![[0; 8]; counters().len()])
    }

    /// Number of edges that were taken at least once.
    pub fn num_edges(&self) -> usize {
        self.0.iter().flatten().filter(|&&classes| classes != 0).count()
    }

    /// Runs `f`; returns its result, and true if it took an edge as often as no input before it.
    pub fn run<T>(&mut self, f: impl FnOnce() -> T) -> (T, bool) {
        counters().iter().for_each(|word| word.store(0, Ordering::Relaxed));
        let result = f();
        let mut is_new = false;
        for (word, seen) in counters().iter().zip(&mut self.0) {
            let word = word.load(Ordering::Relaxed);
            if word == 0 {
                continue;
            }
            for (count, seen) in word.to_ne_bytes().into_iter().zip(seen) {
                let class = class(count);
                is_new |= *seen & class != class;
                *seen |= class;
            }
        }
        (result, is_new)
    }
}

/// Classes of counts as in AFL: 1, 2, 3, 4–7, 8–15, 16–31, 32–127, 128 and more.
fn class(count: u8) -> u8 {
    match count {
        0 => 0,
        1 => 1,
        2 => 2,
        3 => 4,
        4..8 => 8,
        8..16 => 16,
        16..32 => 32,
        32..128 => 64,
        128.. => 128,
    }
}
