//! GFLOP/s of the CPU device's matrix products at the shapes of SmolLM2-135M: `cargo bench --bench kernels`.
#![allow(clippy::print_stdout, reason = "prints what it measured")]

use std::time::Instant;

use fsdp_qlora::testing::{Arena, Cpu, Gemm, GemmOps, Transpose};

const TOKENS: usize = 512;

fn main() {
    let threads: usize = std::env::var("RAYON_NUM_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    println!("{threads} threads, median of 15");
    use Transpose::{No, Yes};
    let shapes = [
        ("q forward", No, Yes, [TOKENS, 576, 576]),
        ("gate forward", No, Yes, [TOKENS, 1536, 576]),
        ("down forward", No, Yes, [TOKENS, 576, 1536]),
        ("head piece logits", No, Yes, [TOKENS, 4096, 576]),
        ("head piece gradient", No, No, [TOKENS, 576, 4096]),
        ("gate backward", No, No, [TOKENS, 576, 1536]),
        ("LoRA x·Aᵀ", No, Yes, [TOKENS, 16, 576]),
        ("LoRA u·Bᵀ", No, Yes, [TOKENS, 1536, 16]),
        ("LoRA dA", Yes, No, [16, 576, TOKENS]),
        ("LoRA dB", Yes, No, [1536, 16, TOKENS]),
    ];
    for (name, transpose_a, transpose_b, [m, n, k]) in shapes {
        let cpu = Cpu::new(threads);
        let carve = |arena: &mut Arena<Cpu>| {
            let mut carve = |name: &str, len: usize| arena.carve::<f32>(name, len).expect("the plan's sizes");
            (carve("c", m * n), carve("a", m * k), carve("b", k * n))
        };
        let mut measured = Arena::measure();
        carve(&mut measured);
        let mut arena = Arena::allocate(&cpu, measured.into_plan()).expect("memory");
        let (mut c, mut a, mut b) = carve(&mut arena);
        a.view_mut().host_mut().fill(0.5);
        b.view_mut().host_mut().fill(0.25);
        let mut seconds: Vec<f64> = (0..15)
            .map(|_| {
                let start = Instant::now();
                let (c, a, b) = (c.view_mut(), a.view(), b.view());
                cpu.gemm(Gemm { c, a, b, transpose_a, transpose_b, m, n, k, alpha: 1.0, beta: 0.0 }).expect("sizes");
                start.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        println!("{name:20} {m:5} {n:5} {k:5}  {:7.1} GFLOP/s", 2e-9 * (m * n * k) as f64 / seconds[7]);
    }
}
