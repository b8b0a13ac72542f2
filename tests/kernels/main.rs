//! Every op of the CUDA device against that of the CPU device, on the same inputs (random, exact in bf16). Where bytes move
//! the results are equal; else the error is at most twice that of the plain formula with its results rounded to bf16 (three
//! times for gradients). These tests are ignored unless the caller asks for them; those of the CPU's attention need no GPU.

mod adamw;
mod attention;
mod attention_cpu;
mod cross_entropy;
mod elementwise;
mod gated;
mod gemm;
mod lora;
mod lora_mlp_backward;
mod lora_mlp_forward;
mod nf4;
mod rms_norm;
mod rope;
mod rows;
mod uniform;

use std::sync::{Mutex, MutexGuard};

use adamw::adamw;
use attention::{
    attention, attention_in_a_window, attention_of_new_tokens_over_past_ones, attention_of_one_key,
    attention_with_capped_scores,
};
use bytemuck::Zeroable;
use cross_entropy::{a_target_of_no_piece_is_not_followed, cross_entropy_over_pieces};
use elementwise::elementwise;
use fsdp_qlora::testing::*;
use gated::gated_activations;
use gemm::gemm_of_all_transpositions;
use half::{bf16, f16};
use lora::{
    lora_dropout_has_the_masks_of_the_cpu, lora_input_of_a_gated_activation, lora_linear, lora_linear_and_its_finish,
    lora_products,
};
use lora_mlp_backward::lora_gated_backward;
use lora_mlp_forward::lora_gated_forward;
use nf4::{dequantize_is_exact, quantize_is_exact, tensors_are_dequantized_together};
use rms_norm::rms_norm;
use rope::rope;
use rows::rows_are_moved_and_reach_nothing_else;
use uniform::uniform_is_exact;

/// A type of activations that the kernels are tested in.
trait Tested: HalfType + Into<f32> {}
impl Tested for bf16 {}
impl Tested for f16 {}

/// The kernels' folder, and one test at a time: they share the GPU.
static GPU: Mutex<()> = Mutex::new(());

fn gpu<A: Tested>() -> (MutexGuard<'static, ()>, Cuda<A>) {
    let guard = GPU.lock().unwrap_or_else(|e| e.into_inner());
    let cuda = Cuda::new(0, &std::env::temp_dir().join("fsdp-qlora-test-kernels")).unwrap();
    cuda.bind_to_thread().unwrap();
    (guard, cuda)
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

/// The documents that begin at these tokens; the last number is that of all tokens.
fn put_documents<D: Device>(device: &D, begins: &[u32], num_past_tokens: usize) -> Documents<D> {
    let num_tokens = begins[begins.len() - 1] as usize;
    let mut documents = Arena::carved(device, |arena| Documents::carve(arena, "documents", num_tokens)).unwrap();
    documents.put(device, begins, num_past_tokens).unwrap();
    documents
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

/// Declares each of these tests for each type of activations.
macro_rules! for_both_types {
    ($($name:ident),* $(,)?) => {
        mod in_bf16 {
            $(#[test]
            #[ignore = "needs a GPU"]
            fn $name() {
                super::$name::<half::bf16>();
            })*
        }
        mod in_fp16 {
            $(#[test]
            #[ignore = "needs a GPU"]
            fn $name() {
                super::$name::<half::f16>();
            })*
        }
    };
}
for_both_types!(
    rms_norm,
    rope,
    gated_activations,
    lora_gated_backward,
    elementwise,
    gemm_of_all_transpositions,
    dequantize_is_exact,
    tensors_are_dequantized_together,
    lora_dropout_has_the_masks_of_the_cpu,
    lora_products,
    lora_input_of_a_gated_activation,
    lora_linear_and_its_finish,
    lora_linear,
    lora_gated_forward,
    adamw,
    cross_entropy_over_pieces,
    a_target_of_no_piece_is_not_followed,
    attention,
    attention_in_a_window,
    attention_with_capped_scores,
    attention_of_one_key,
    attention_of_new_tokens_over_past_ones,
    quantize_is_exact,
    rows_are_moved_and_reach_nothing_else,
    uniform_is_exact
);
