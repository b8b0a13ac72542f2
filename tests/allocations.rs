//! Memory that a training step takes from the heap beside the arena, counted by the allocator of this program.
#![allow(unsafe_code, reason = "an allocator that counts")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::on_all_ranks;
use common::steps::{NOTHING_RESIDENT, rows, trainer, update};
use fsdp_qlora::testing::{
    Arena, Cpu, Gather, Gemm, GemmOps, Keep, Packing, Residency, Sampler, StepArgs, Transpose, data, step,
};

/// Bytes of one activation of the largest micro-batch, `[320, 64]` in f32. An op of the CPU may take as much from the
/// heap while it runs (panels of a matrix product, gradients of one document's attention); all else is in the arena.
const ACTIVATION_BYTES: usize = 320 * 64 * size_of::<f32>();

/// Bytes by which the heap may be larger or smaller after a step: channels take their room some messages ahead.
const KEPT_BYTES: usize = 256;

static IS_COUNTED: AtomicBool = AtomicBool::new(false);
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

fn taken(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    if IS_COUNTED.load(Ordering::Relaxed) {
        PEAK.fetch_max(live, Ordering::Relaxed);
        LARGEST.fetch_max(bytes, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `dealloc`, and the block came from the system's allocator.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Live bytes, once they have stood still for a while: the thread of the queue gives back the memory of an action a
/// moment after it has told that the action is done.
fn settled() -> usize {
    let (mut live, mut since) = (LIVE.load(Ordering::Relaxed), Instant::now());
    while since.elapsed() < Duration::from_millis(50) {
        std::thread::sleep(Duration::from_millis(1));
        let now = LIVE.load(Ordering::Relaxed);
        if now != live {
            (live, since) = (now, Instant::now());
        }
    }
    live
}

/// Live bytes after a step, the most that were live during it, and its largest block.
fn counted<T>(f: impl FnOnce() -> T) -> (T, [usize; 3]) {
    PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
    LARGEST.store(0, Ordering::Relaxed);
    IS_COUNTED.store(true, Ordering::Relaxed);
    let value = f();
    IS_COUNTED.store(false, Ordering::Relaxed);
    (value, [settled(), PEAK.load(Ordering::Relaxed), LARGEST.load(Ordering::Relaxed)])
}

/// Makes every thread of the pool compute a matrix product. The gemm crate gives a thread a buffer as large as its L2
/// cache at its first one, and it is left to chance which step brings a thread its first.
fn warm_up() {
    rayon::broadcast(|_| {
        const SIZE: usize = 64;
        let cpu = Cpu::new(1);
        let carve = |arena: &mut Arena<Cpu>| ["c", "a", "b"].map(|name| arena.carve::<f32>(name, SIZE * SIZE).unwrap());
        let mut plan = Arena::measure();
        carve(&mut plan);
        let [mut c, a, b] = carve(&mut Arena::allocate(&cpu, plan.into_plan()).unwrap());
        let (transpose_a, transpose_b) = (Transpose::No, Transpose::No);
        let (c, a, b, alpha, beta) = (c.view_mut(), a.view(), b.view(), 1.0, 0.0);
        cpu.gemm(Gemm { c, a, b, transpose_a, transpose_b, m: SIZE, n: SIZE, k: SIZE, alpha, beta }).unwrap();
    });
}

#[test]
fn after_the_first_step_nothing_stays_on_the_heap_and_no_block_is_larger_than_an_activation() {
    let data = rows(Packing::BestFit);
    warm_up();
    for (gather, residency, keep) in [
        (Gather::Collective, Residency::ALL, Keep::EVERYTHING),
        (Gather::Collective, NOTHING_RESIDENT, Keep::NOTHING),
        (Gather::Host, NOTHING_RESIDENT, Keep::NOTHING),
    ] {
        let shards = tempfile::tempdir().unwrap();
        let mut options = trainer();
        options.max_micro_batches = 4;
        (options.gather, options.residency, options.keep) = (gather, residency, keep);
        options.adapter.as_mut().unwrap().settings.dropout = 0.1;
        on_all_ranks(1, |groups| {
            let mut engine = options.engine(groups, shards.path());
            let mut sampler = Sampler::new(data.sequences.len(), 42);
            for number in 1..=6 {
                let batches = data::step_micro_batches(&data, &mut sampler, 4 * (number - 1), 4, 1, 1, 0);
                let update = update(number as u32, 1e-2);
                let args =
                    StepArgs { step: number as u32, num_micro_batches: 4, update: &update, seed: 42, next: None };
                let start = settled();
                let (record, [live, peak, largest]) = counted(|| step(&mut engine, &batches, &args));
                assert!(record.unwrap().updated);
                if number == 1 {
                    assert!(peak > start && largest > 0, "the allocator counts");
                    continue;
                }
                let what = format!("{gather:?}, {residency:?}, step {number}");
                assert!(live.abs_diff(start) <= KEPT_BYTES, "{what}: {start} bytes before, {live} after");
                assert!(largest <= ACTIVATION_BYTES, "{what}: a block of {largest} bytes");
                assert!(peak - start <= 4 * ACTIVATION_BYTES, "{what}: {} bytes at a time", peak - start);
            }
        });
    }
}
