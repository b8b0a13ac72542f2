//! Every op of the CUDA device against that of the CPU device, on the same inputs (random, exact in bf16). Where bytes move
//! the results are equal; else the error is at most twice that of the plain formula with its results rounded to bf16 (three
//! times for gradients). Without a GPU the tests say so and pass, unless REQUIRE_GPU=1.
#![allow(clippy::print_stderr, reason = "says what it skips")]

mod attention;
mod lora;

use std::sync::{Mutex, MutexGuard};

use attention::{attention, attention_of_new_tokens_over_past_ones, attention_of_one_token};
use bytemuck::Zeroable;
use fsdp_qlora::device::cpu::Cpu;
use fsdp_qlora::device::cuda::{Cuda, HalfType, libraries};
use fsdp_qlora::device::*;
use fsdp_qlora::quant::record::{Dtype, Encoding};
use fsdp_qlora::quant::{double, nf4};
use half::{bf16, f16};
use lora::{lora_dropout_has_the_masks_of_the_cpu, lora_linear, lora_products};

/// A type of activations that the kernels are tested in.
trait Tested: HalfType + Into<f32> {}
impl Tested for bf16 {}
impl Tested for f16 {}

/// The kernels' folder, and one test at a time: they share the GPU.
static GPU: Mutex<()> = Mutex::new(());

fn gpu<A: Tested>() -> Option<(MutexGuard<'static, ()>, Cuda<A>)> {
    let required = std::env::var("REQUIRE_GPU").is_ok_and(|v| v == "1");
    if !required && !libraries::driver_is_there() {
        eprintln!("skipped: no GPU");
        return None;
    }
    let guard = GPU.lock().unwrap_or_else(|e| e.into_inner());
    let cache = std::env::temp_dir().join("fsdp-qlora-test-kernels");
    match Cuda::new(0, &cache) {
        Ok(cuda) => {
            cuda.bind_to_thread().unwrap();
            Some((guard, cuda))
        }
        Err(error) if required => panic!("REQUIRE_GPU=1: {error:#}"),
        Err(error) => {
            eprintln!("skipped: no GPU: {error:#}");
            None
        }
    }
}

/// Returns whether a case of this many elements is run. Under a sanitizer, which is slow, only small ones are
/// (`SMALL_CASES=1`).
fn is_run(elements: usize) -> bool {
    elements < 2_000_000 || std::env::var("SMALL_CASES").is_err()
}

/// Makes a buffer whose every byte is 0xFF: elements that are not written stay NaN.
fn buffer<D: Device, T: Element>(device: &D, len: usize) -> Buffer<D, T> {
    let mut buffer = Arena::carved(device, |arena| arena.carve("x", len)).unwrap();
    device.fill_bytes(buffer.view_mut(), 0xFF).unwrap();
    buffer
}

fn put<D: Device, T: Element>(device: &D, values: &[T]) -> Buffer<D, T> {
    let mut buffer = buffer(device, values.len());
    device.upload(buffer.view_mut(), values).unwrap();
    buffer
}

fn put_act<D: Ops>(device: &D, values: &[f32]) -> Buffer<D, D::Act> {
    let mut buffer = buffer(device, values.len());
    let mut rounded = vec![D::Act::zeroed(); values.len()];
    D::round(&mut rounded, values);
    device.upload(buffer.view_mut(), &rounded).unwrap();
    buffer
}

fn get<D: Device, T: Element>(device: &D, buffer: &Buffer<D, T>) -> Vec<T> {
    let mut values = vec![T::zeroed(); buffer.len()];
    device.download(&mut values, buffer.view()).unwrap();
    values
}

fn get_act<D: Ops>(device: &D, buffer: &Buffer<D, D::Act>) -> Vec<f32>
where
    D::Act: Into<f32>,
{
    get(device, buffer).into_iter().map(Into::into).collect()
}

/// Numbers around 0 of a deviation near `scale`, exact in bf16 and in fp16.
fn random(len: usize, scale: f32, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32) - 0.5
    };
    (0..len).map(|_| rounded::<f16>(rounded::<bf16>((uniform() + uniform() + uniform()) * 2.0 * scale))).collect()
}

fn rounded<A: Tested>(x: f32) -> f32 {
    let mut rounded = [A::zeroed()];
    A::round(&mut rounded, &[x]);
    rounded[0].into()
}

/// ‖a − b‖ / ‖b‖; NaN when anything is NaN.
fn error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    let norm: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
    if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

/// The result may be `times` as far from the reference as the reference rounded to bf16 is.
fn close<A: Tested>(what: &str, result: &[f32], reference: &[f32], times: f64) {
    let plain: Vec<f32> = reference.iter().map(|&v| rounded::<A>(v)).collect();
    close_as(what, result, &plain, reference, times);
}

/// The result may be `times` as far from the reference as the plain formula's result is.
fn close_as(what: &str, result: &[f32], plain: &[f32], reference: &[f32], times: f64) {
    let (error, allowed) = (error(result, reference), times * error(plain, reference));
    assert!(error <= allowed, "{what}: error {error:e}, allowed {allowed:e}");
}

fn within(what: &str, result: &[f32], reference: &[f32], allowed: f64) {
    let error = error(result, reference);
    assert!(error <= allowed, "{what}: error {error:e}, allowed {allowed:e}");
}

const ROWS: [(usize, usize); 5] = [(1, 8), (7, 264), (13, 576), (257, 4096), (3, 8192)];

fn rms_norm<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, rows: usize, hidden: usize) -> [Vec<f32>; 5]
    where
        D::Act: Into<f32>,
    {
        let (x, weight) = (put_act(d, &random(rows * hidden, 1.0, 1)), put(d, &random(hidden, 1.0, 2)));
        let (mut y, mut rstd) = (buffer(d, rows * hidden), buffer(d, rows));
        let forward = |y: &mut Buffer<D, D::Act>, rstd: &mut Buffer<D, f32>, x: Normed<'_, D>| {
            let (y, rstd, weight) = (y.view_mut(), rstd.view_mut(), weight.view());
            d.rms_norm_forward(RmsNormForward { y, rstd, x, weight, eps: 1e-5 }).unwrap();
        };
        let (mut sum, addend) =
            (put_act(d, &random(rows * hidden, 1.0, 5)), put_act(d, &random(rows * hidden, 1.0, 6)));
        forward(&mut y, &mut rstd, Normed::Sum { sum: sum.view_mut(), addend: addend.view() });
        let of_sum = get_act(d, &y);
        forward(&mut y, &mut rstd, Normed::Plain(x.view()));
        let (d_y, mut d_x) = (put_act(d, &random(rows * hidden, 1.0, 3)), put_act(d, &random(rows * hidden, 0.5, 4)));
        let (weight, rstd_view) = (weight.view(), rstd.view());
        d.rms_norm_backward(RmsNormBackward {
            d_x: d_x.view_mut(),
            d_y: d_y.view(),
            x: x.view(),
            rstd: rstd_view,
            weight,
        })
        .unwrap();
        [get_act(d, &y), get(d, &rstd), get_act(d, &d_x), get_act(d, &sum), of_sum]
    }
    for (rows, hidden) in ROWS {
        let (results, references) = (run(&cuda, rows, hidden), run(&Cpu::new(1), rows, hidden));
        close::<A>("y", &results[0], &references[0], 2.0);
        within("rstd", &results[1], &references[1], 1e-6);
        close::<A>("d_x", &results[2], &references[2], 3.0);
        let sum: Vec<f32> = references[3].iter().map(|&v| rounded::<A>(v)).collect();
        assert!(results[3] == sum, "the residual stream of [{rows}, {hidden}]");
        // Plain: the sum is rounded before it is normed.
        let weight = random(hidden, 1.0, 2);
        let norm = |row: &[f32]| -> Vec<f32> {
            let rstd = 1.0 / (row.iter().map(|v| v * v).sum::<f32>() / hidden as f32 + 1e-5).sqrt();
            row.iter().zip(&weight).map(|(v, w)| rounded::<A>(v * rstd * w)).collect()
        };
        let plain: Vec<f32> = sum.chunks(hidden).flat_map(norm).collect();
        close_as("norm of a sum", &results[4], &plain, &references[4], 2.0);
    }
}

fn rope<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, tokens: usize, num_heads: usize, head_dim: usize, inverse: bool) -> Vec<f32>
    where
        D::Act: Into<f32>,
    {
        let mut x = put_act(d, &random(tokens * num_heads * head_dim, 1.0, 1));
        let angles = tokens * head_dim / 2;
        let (cos, sin) = (put(d, &random(angles, 0.5, 2)), put(d, &random(angles, 0.5, 3)));
        d.rope(Rope { x: x.view_mut(), cos: cos.view(), sin: sin.view(), num_heads, head_dim, inverse }).unwrap();
        get_act(d, &x)
    }
    for (tokens, heads, head_dim) in [(1, 1, 64), (7, 9, 64), (131, 3, 96), (257, 32, 128)] {
        for inverse in [false, true] {
            let reference = run(&Cpu::new(1), tokens, heads, head_dim, inverse);
            close::<A>("rope", &run(&cuda, tokens, heads, head_dim, inverse), &reference, 2.0);
        }
    }
}

fn swiglu<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, len: usize) -> [Vec<f32>; 3]
    where
        D::Act: Into<f32>,
    {
        let (gate, up, d_y) =
            (put_act(d, &random(len, 3.0, 1)), put_act(d, &random(len, 1.0, 2)), put_act(d, &random(len, 1.0, 3)));
        let (mut y, mut d_gate, mut d_up) = (buffer(d, len), buffer(d, len), buffer(d, len));
        d.swiglu_forward(SwigluForward { y: y.view_mut(), gate: gate.view(), up: up.view() }).unwrap();
        let (gate, up) = (gate.view(), up.view());
        let args = SwigluBackward { d_gate: d_gate.view_mut(), d_up: d_up.view_mut(), d_y: d_y.view(), gate, up };
        d.swiglu_backward(args).unwrap();
        [get_act(d, &y), get_act(d, &d_gate), get_act(d, &d_up)]
    }
    for len in [8, 13 * 8, 257 * 8, 512 * 14_336].into_iter().filter(|&n| is_run(n)) {
        let (results, references) = (run(&cuda, len), run(&Cpu::new(1), len));
        for (what, times, (result, reference)) in [("y", 2.0, 0), ("d_gate", 3.0, 1), ("d_up", 3.0, 2)]
            .map(|(what, times, i)| (what, times, (&results[i], &references[i])))
        {
            close::<A>(what, result, reference, times);
        }
    }
}

fn elementwise<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, rows: usize, width: usize) -> [Vec<f32>; 5]
    where
        D::Act: Into<f32>,
    {
        let len = rows * width;
        let (mut y, x) = (put_act(d, &random(len, 1.0, 1)), put_act(d, &random(len, 1.0, 2)));
        d.add(y.view_mut(), x.view()).unwrap();
        let sum = get_act(d, &y);
        d.add_bias(y.view_mut(), put(d, &random(width, 1.0, 3)).view()).unwrap();
        let biased = get_act(d, &y);
        let f32s: Vec<f32> = random(len, 1.0, 4).iter().map(|v| v * 1.001).collect();
        d.cast(y.view_mut(), put(d, &f32s).view()).unwrap();
        let cast = get_act(d, &y);
        let picked: Vec<u32> = (0..rows as u32).rev().step_by(2).collect();
        let indices = put(d, &picked);
        let mut some = buffer(d, picked.len() * width);
        d.gather_rows(some.view_mut(), x.view(), indices.view(), width).unwrap();
        let mut all = buffer(d, len);
        d.scatter_rows(all.view_mut(), some.view(), indices.view(), width).unwrap();
        [sum, biased, cast, get_act(d, &some), get_act(d, &all)]
    }
    for (rows, width) in ROWS {
        let (results, references) = (run(&cuda, rows, width), run(&Cpu::new(1), rows, width));
        close::<A>("add", &results[0], &references[0], 2.0);
        // Plain: the first sum is rounded, then the second.
        let bias = random(width, 1.0, 3);
        let plain: Vec<f32> =
            references[0].iter().enumerate().map(|(i, v)| rounded::<A>(rounded::<A>(*v) + bias[i % width])).collect();
        close_as("add_bias", &results[1], &plain, &references[1], 2.0);
        let cast: Vec<f32> = references[2].iter().map(|&v| rounded::<A>(v)).collect();
        assert!(results[2] == cast && results[3] == references[3] && results[4] == references[4], "moved bytes");
    }
    for len in [1, 1023, 1025, 1_000_003] {
        let x = random(len, 1.0, 9);
        let sum = cuda.sum_of_squares(put(&cuda, &x).view()).unwrap();
        let reference = Cpu::new(1).sum_of_squares(put(&Cpu::new(1), &x).view()).unwrap();
        assert_eq!(sum, reference, "the same bits wherever it runs");
    }
}

fn gemm_of_all_transpositions<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    use Transpose::{No, Yes};
    fn run<D: Ops>(d: &D, [m, n, k]: [usize; 3], transpose: [Transpose; 2], beta: f32) -> [Vec<f32>; 2]
    where
        D::Act: Into<f32>,
    {
        let (a, b) = (put_act(d, &random(m * k, 1.0, 1)), put_act(d, &random(k * n, 1.0, 2)));
        let (mut c, mut grad) = (put_act(d, &random(m * n, 1.0, 3)), put(d, &random(m * n, 1.0, 4)));
        let [transpose_a, transpose_b] = transpose;
        let (a, b, alpha) = (a.view(), b.view(), 0.5);
        d.gemm(Gemm { c: c.view_mut(), a, b, transpose_a, transpose_b, m, n, k, alpha, beta }).unwrap();
        d.gemm_grad(Gemm { c: grad.view_mut(), a, b, transpose_a, transpose_b, m, n, k, alpha, beta }).unwrap();
        [get_act(d, &c), get(d, &grad)]
    }
    for sizes in [[1, 8, 8], [7, 16, 576], [131, 1536, 576], [512, 4096, 64]] {
        for transpose in [[No, No], [No, Yes], [Yes, No], [Yes, Yes]] {
            let product = run(&Cpu::new(1), sizes, transpose, 0.0);
            let before = random(sizes[0] * sizes[1], 1.0, 3);
            for beta in [0.0, 1.0] {
                let what = format!("gemm {sizes:?} {transpose:?} beta {beta}");
                let results = run(&cuda, sizes, transpose, beta);
                let references = run(&Cpu::new(1), sizes, transpose, beta);
                // Plain: the product is rounded, then the sum.
                let plain = product[0].iter().zip(&before).map(|(p, c)| rounded::<A>(rounded::<A>(*p) + beta * c));
                close_as(&what, &results[0], &plain.collect::<Vec<_>>(), &references[0], 2.0);
                within(&what, &results[1], &references[1], 1e-5);
            }
        }
    }
}

fn dequantize_is_exact<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, records: &[u8], len: usize, encoding: Encoding) -> [Vec<f32>; 2]
    where
        D::Act: Into<f32>,
    {
        let records = put(d, records);
        let (mut act, mut f32s) = (buffer(d, len), buffer(d, len));
        d.dequantize(Dequantize { weights: act.view_mut(), records: records.view(), encoding }).unwrap();
        d.dequantize_f32(Dequantize { weights: f32s.view_mut(), records: records.view(), encoding }).unwrap();
        [get_act(d, &act), get(d, &f32s)]
    }
    for len in [1, 63, 64, 65, 16_383, 16_384, 16_385, 576 * 1536 + 7, 4096 * 4096].into_iter().filter(|&n| is_run(n)) {
        let weights = random(len, 0.02, len as u64);
        for double_quant in [false, true] {
            let encoding = Encoding::Nf4 { double_quant };
            let read = |first: usize, out: &mut [f32]| {
                out.copy_from_slice(&weights[first..first + out.len()]);
                Ok(())
            };
            let tensor = nf4::quantize(len, double_quant, read).unwrap();
            let mut records = vec![0u8; encoding.tensor_bytes(len)];
            tensor.write_records(&mut records).unwrap();
            compare::<A>(&run(&cuda, &records, len, encoding), &run(&Cpu::new(1), &records, len, encoding));
        }
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let encoding = Encoding::Plain(dtype);
            let mut records = vec![0u8; encoding.tensor_bytes(len)];
            for (record, weights) in records.chunks_mut(encoding.parts(16_384).bytes).zip(weights.chunks(16_384)) {
                for (i, &w) in weights.iter().enumerate() {
                    match dtype {
                        Dtype::F32 => record[4 * i..4 * i + 4].copy_from_slice(&w.to_le_bytes()),
                        Dtype::F16 => record[2 * i..2 * i + 2].copy_from_slice(&half::f16::from_f32(w).to_le_bytes()),
                        Dtype::Bf16 => record[2 * i..2 * i + 2].copy_from_slice(&bf16::from_f32(w).to_le_bytes()),
                    }
                }
            }
            compare::<A>(&run(&cuda, &records, len, encoding), &run(&Cpu::new(1), &records, len, encoding));
        }
    }
    fn compare<A: Tested>([act, f32s]: &[Vec<f32>; 2], [_, reference]: &[Vec<f32>; 2]) {
        assert!(f32s == reference, "f32 weights of {}", f32s.len());
        assert!(act.iter().zip(reference).all(|(a, &r)| *a == rounded::<A>(r)), "16-bit weights of {}", act.len());
    }
}

fn adamw<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, len: usize) -> [Vec<f32>; 3] {
        let mut state = [1, 2, 3].map(|i| put(d, &random(len, 0.1, i).iter().map(|v| v.abs()).collect::<Vec<_>>()));
        let grad = put(d, &random(len, 1.0, 4));
        let [param, exp_avg, exp_avg_sq] = &mut state;
        d.adamw(AdamW {
            param: param.view_mut(),
            exp_avg: exp_avg.view_mut(),
            exp_avg_sq: exp_avg_sq.view_mut(),
            grad: grad.view(),
            grad_scale: 0.7,
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            step: 3,
        })
        .unwrap();
        state.map(|buffer| get(d, &buffer))
    }
    for len in [1, 257, 100_003] {
        for (result, reference) in run(&cuda, len).iter().zip(&run(&Cpu::new(1), len)) {
            assert!(result == reference, "adamw of {len}: the same bits wherever it runs");
        }
    }
}

fn cross_entropy_over_pieces<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, n: usize, hidden: usize, vocab: usize) -> [Vec<f32>; 4]
    where
        D::Act: Into<f32>,
    {
        let x = put_act(d, &random(n * hidden, 1.0, 1));
        let ids: Vec<u32> = (0..n as u32).map(|i| i * 7919 % vocab as u32).collect();
        let ids = put(d, &ids);
        let (mut max, mut sum) = (put(d, &vec![f32::NEG_INFINITY; n]), put(d, &vec![0f32; n]));
        let mut acc = put(d, &vec![0f32; n * hidden]);
        let (mut logit, mut rows): (_, Buffer<D, D::Act>) = (buffer(d, n), buffer(d, n * hidden));
        let weights = random(vocab * hidden, 0.1, 2);
        for first_id in (0..vocab).step_by(4096) {
            let num_rows = 4096.min(vocab - first_id);
            let weight = put_act(d, &weights[first_id * hidden..(first_id + num_rows) * hidden]);
            let mut logits = buffer(d, n * num_rows);
            d.cross_entropy_piece(CrossEntropyPiece {
                max: max.view_mut(),
                sum: sum.view_mut(),
                target_logit: logit.view_mut(),
                acc: Some(acc.view_mut()),
                logits: logits.view_mut(),
                x: x.view(),
                weight: weight.view(),
                target_ids: ids.view(),
                first_id,
            })
            .unwrap();
            let (target_rows, weight, target_ids) = (rows.view_mut(), weight.view(), ids.view());
            d.gather_target_rows(GatherTargetRows { target_rows, weight, target_ids, first_id }).unwrap();
        }
        let coefficients = put(d, &vec![0.25f32; n]);
        let mut d_x = buffer(d, n * hidden);
        d.cross_entropy_finish(CrossEntropyFinish {
            d_x: d_x.view_mut(),
            acc: acc.view(),
            sum: sum.view(),
            target_rows: rows.view(),
            coefficients: coefficients.view(),
        })
        .unwrap();
        let (max, sum) = (get(d, &max), get(d, &sum));
        let lse = max.iter().zip(&sum).map(|(m, s)| m + s.ln()).collect();
        [lse, get(d, &logit), get_act(d, &d_x), get_act(d, &rows)]
    }
    for (n, hidden, vocab) in [(1, 8, 13), (7, 64, 4097), (131, 576, 49_152)] {
        let (results, references) = (run(&cuda, n, hidden, vocab), run(&Cpu::new(1), n, hidden, vocab));
        within("log-sum-exp", &results[0], &references[0], 1e-6);
        within("target logit", &results[1], &references[1], 1e-5);
        close::<A>("d_x", &results[2], &references[2], 3.0);
        assert!(results[3] == references[3], "target rows");
    }
}

fn quantize_is_exact<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, weights: &[f32]) -> (Vec<u8>, Vec<f32>, Vec<u8>, Vec<f32>) {
        let (n, blocks) = (weights.len(), weights.len().div_ceil(64));
        let weights = put(d, weights);
        let (mut codes, mut absmax) = (buffer(d, n.div_ceil(2)), buffer(d, blocks));
        let args = QuantizeNf4 { codes: codes.view_mut(), absmax: absmax.view_mut(), weights: weights.view() };
        d.quantize_nf4(args).unwrap();
        let (mut absmax_codes, mut nested) = (buffer(d, blocks), buffer(d, blocks.div_ceil(256)));
        d.quantize_absmax(QuantizeAbsmax {
            codes: absmax_codes.view_mut(),
            nested_absmax: nested.view_mut(),
            absmax: absmax.view(),
            offset: double::mean(&get(d, &absmax)),
        })
        .unwrap();
        (get(d, &codes), get(d, &absmax), get(d, &absmax_codes), get(d, &nested))
    }
    for len in [1, 2, 63, 64, 65, 16_383, 16_385, 576 * 1536 + 7, 4096 * 4096].into_iter().filter(|&n| is_run(n)) {
        let mut weights = random(len, 0.02, len as u64);
        // A block of zeros, and values that are ties of neighbouring codes.
        if len > 256 {
            weights[64..128].fill(0.0);
            weights[128..192].iter_mut().enumerate().for_each(|(i, w)| *w = (i as f32 - 31.0) / 32.0);
        }
        assert!(run(&cuda, &weights) == run(&Cpu::new(1), &weights), "{len} weights");
    }
}

fn uniform_is_exact<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, len: usize) -> Vec<f32> {
        let mut y = buffer(d, len);
        d.uniform(Uniform { y: y.view_mut(), seed: 77, first: 12_345, half_width: 0.035 }).unwrap();
        get(d, &y)
    }
    for len in [1, 257, 1_000_003] {
        assert!(run(&cuda, len) == run(&Cpu::new(2), len), "{len} numbers");
    }
}

/// Declares each of these tests for each type of activations.
macro_rules! for_both_types {
    ($($name:ident),* $(,)?) => {
        mod in_bf16 {
            $(#[test]
            fn $name() {
                super::$name::<half::bf16>();
            })*
        }
        mod in_fp16 {
            $(#[test]
            fn $name() {
                super::$name::<half::f16>();
            })*
        }
    };
}
for_both_types!(
    rms_norm,
    rope,
    swiglu,
    elementwise,
    gemm_of_all_transpositions,
    dequantize_is_exact,
    lora_dropout_has_the_masks_of_the_cpu,
    lora_products,
    lora_linear,
    adamw,
    cross_entropy_over_pieces,
    attention,
    attention_of_one_token,
    attention_of_new_tokens_over_past_ones,
    quantize_is_exact,
    uniform_is_exact
);
