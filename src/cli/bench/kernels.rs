//! `bench kernels`: each op at the sizes of a layer, against the rates that this device reaches on a large copy and a large
//! matrix product.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use crate::comm::mpi::MpiComm;
use crate::device::*;
use crate::model::spec::{ModelSpec, Module, ModuleId};
use crate::quant::record::Encoding;
use crate::recipe::{self, Command, Job};
use crate::start::Start;
use crate::start::agree::agree_on;
use crate::start::placement::Placement;

#[derive(Args)]
pub struct KernelBench {
    #[arg(long, help = super::shape_help())]
    shape: String,
    /// Tokens of one sequence
    #[arg(long, default_value_t = 4096)]
    seq: u32,
}

/// Gemma's width of a head, which has tiles of its own.
const WIDE: usize = 256;

/// The kind of an attention.
#[derive(Clone, Copy)]
struct Scores {
    head_dim: usize,
    window: Option<usize>,
    softcap: Option<f32>,
}

/// Timed batches of calls, of which the median counts, and about how long one lasts.
const BATCHES: usize = 5;
const BATCH_SECONDS: f64 = 0.02;

pub fn run(start: &Start, mut comm: MpiComm, args: &KernelBench, overrides: &[String]) -> Result<()> {
    let given = vec![("data.max_length", args.seq.into())];
    let job = agree_on(&mut comm, recipe::from_options(Command::BenchKernels, given, overrides)?)?;
    let config = super::shape(&args.shape, None)?;
    let placement = start.place_for(&mut comm, &job, &config)?;
    if !start.log.enabled {
        return Ok(());
    }
    match placement {
        Placement::Cpu(cpu) => Timer::new(&cpu)?.all(&config, &job),
        Placement::Bf16(cuda, _) => Timer::new(&cuda)?.all(&config, &job),
        Placement::Fp16(cuda, _) => Timer::new(&cuda)?.all(&config, &job),
    }
}

/// A GPU works for this long before its rate is taken for that of lasting work.
const WARM_UP: Duration = Duration::from_millis(1500);

/// FLOP/s of a large matrix product, after a while of them: a card is faster while it is cool.
pub fn matrix_rate<D: Ops>(device: &D) -> Result<f64> {
    let timer = Timer { device, peak_flops: f64::INFINITY, peak_bytes: f64::INFINITY };
    let start = Instant::now();
    loop {
        let (n, seconds) = timer.matrix_product()?;
        if D::IS_HOST || start.elapsed() > WARM_UP {
            return Ok(2.0 * (n as f64).powi(3) / seconds);
        }
    }
}

/// The work of a call, to be compared with the device's peak.
#[derive(Clone, Copy)]
enum Amount {
    Flops(f64),
    /// Bytes that are read and written.
    Bytes(f64),
}

struct Timer<'a, D: Ops> {
    device: &'a D,
    /// FLOP/s of a large matrix product, bytes/s of a large copy.
    peak_flops: f64,
    peak_bytes: f64,
}

impl<'a, D: Ops> Timer<'a, D> {
    fn new(device: &'a D) -> Result<Self> {
        let mut timer = Timer { device, peak_flops: f64::INFINITY, peak_bytes: f64::INFINITY };
        let (n, seconds) = timer.matrix_product()?;
        let (a, mut c) = (timer.act(n * n)?, timer.act(n * n)?);
        timer.peak_flops = timer.tell(&format!("matrix product {n}"), seconds, Amount::Flops(2.0 * (n as f64).powi(3)));
        let bytes = c.len() * size_of::<D::Act>();
        let seconds = timer.seconds(|| device.copy(c.view_mut(), a.view()))?;
        timer.peak_bytes = timer.tell("copy", seconds, Amount::Bytes(2.0 * bytes as f64));
        Ok(timer)
    }

    /// Size and time of a large matrix product.
    fn matrix_product(&self) -> Result<(usize, f64)> {
        let n = if size_of::<D::Act>() == 2 { 8192 } else { 1024 };
        let (a, b, mut c) = (self.act(n * n)?, self.act(n * n)?, self.act(n * n)?);
        let seconds =
            self.seconds(|| self.product(c.view_mut(), a.view(), b.view(), Transpose::Yes, [n, n, n], 0.0))?;
        Ok((n, seconds))
    }

    fn buffer<T: Element>(&self, len: usize) -> Result<Buffer<D, T>> {
        super::buffer(self.device, len)
    }

    fn f32s(&self, len: usize) -> Result<Buffer<D, f32>> {
        let mut buffer = self.buffer(len)?;
        self.device.uniform(Uniform { y: buffer.view_mut(), seed: len as u64 % 1009, first: 0, half_width: 1.0 })?;
        Ok(buffer)
    }

    fn act(&self, len: usize) -> Result<Buffer<D, D::Act>> {
        let mut buffer = self.buffer(len)?;
        self.device.cast(buffer.view_mut(), self.f32s(len)?.view())?;
        Ok(buffer)
    }

    /// Median time of a call.
    fn seconds(&self, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
        let mut batch = |calls: usize| -> Result<f64> {
            let start = Instant::now();
            (0..calls).try_for_each(|_| call())?;
            self.device.synchronize()?;
            Ok(start.elapsed().as_secs_f64() / calls as f64)
        };
        batch(1)?;
        let calls = (BATCH_SECONDS / batch(1)?).clamp(1.0, 1000.0) as usize;
        let mut times = (0..BATCHES).map(|_| batch(calls)).collect::<Result<Vec<f64>>>()?;
        times.sort_by(f64::total_cmp);
        Ok(times[BATCHES / 2])
    }

    /// Prints a line; returns the rate.
    fn tell(&self, name: &str, seconds: f64, amount: Amount) -> f64 {
        let (rate, unit, scale, peak) = match amount {
            Amount::Flops(flops) => (flops / seconds, "TFLOP/s", 1e12, self.peak_flops),
            Amount::Bytes(bytes) => (bytes / seconds, "GB/s", 1e9, self.peak_bytes),
        };
        let share = if peak.is_finite() { rate / peak } else { 1.0 };
        let line =
            json!({"kernel": name, "ms": seconds * 1e3, "rate": rate / scale, "unit": unit, "share_of_peak": share});
        println!("{line}");
        rate
    }

    fn time(&self, name: &str, amount: Amount, call: impl FnMut() -> Result<()>) -> Result<()> {
        let seconds = self.seconds(call)?;
        self.tell(name, seconds, amount);
        Ok(())
    }

    fn all(&self, config: &ModelSpec, job: &Job) -> Result<()> {
        let (tokens, lora_rank) = (job.data.max_length, job.lora.r);
        self.products(config, tokens, lora_rank)?;
        self.dequantize(config, job.quantization.double_quant.unwrap_or(true))?;
        self.rows(config, tokens)?;
        self.mlp(config, tokens)?;
        self.attentions(config, tokens)?;
        self.head(config, tokens, lora_rank)
    }

    /// c = a · b + beta · c, b transposed or not.
    fn product(
        &self,
        c: ViewMut<'_, D, D::Act>,
        a: View<'_, D, D::Act>,
        b: View<'_, D, D::Act>,
        transpose_b: Transpose,
        [m, n, k]: [usize; 3],
        beta: f32,
    ) -> Result<()> {
        self.device.gemm(Gemm { c, a, b, transpose_a: Transpose::No, transpose_b, m, n, k, alpha: 1.0, beta })
    }

    fn products(&self, config: &ModelSpec, tokens: usize, r: usize) -> Result<()> {
        use Transpose::{No, Yes};
        let layer = &config.layers[0];
        let [inputs, gate_inputs] = [layer.attention.inputs().count(), layer.mlp.inputs().count()];
        for (module, sharing) in [(ModuleId::Q, inputs), (ModuleId::Gate, gate_inputs), (ModuleId::Down, 1)] {
            let Module { out_features: n, in_features: k, .. } = *layer.module(module).context("no such module")?;
            let (x, mut y, w) = (self.act(tokens * k)?, self.act(tokens * n)?, self.act(n * k)?);
            let flops = Amount::Flops(2.0 * (tokens * k * n) as f64);
            self.time(&format!("{module} x·Wᵀ"), flops, || {
                self.product(y.view_mut(), x.view(), w.view(), Yes, [tokens, n, k], 0.0)
            })?;
            let mut d_x = self.act(tokens * k)?;
            self.time(&format!("{module} d_y·W"), flops, || {
                self.product(d_x.view_mut(), y.view(), w.view(), No, [tokens, k, n], 0.0)
            })?;
            self.lora(module.name(), sharing, [tokens, n, k, r], &x, &w)?;
        }
        Ok(())
    }

    /// LoRA's products of a projection, with dropout; those of an input are of all modules that share it. Amounts are what must be read
    /// and written at least.
    fn lora(
        &self,
        name: &str,
        sharing: usize,
        [tokens, n, k, r]: [usize; 4],
        x: &Buffer<D, D::Act>,
        weight: &Buffer<D, D::Act>,
    ) -> Result<()> {
        let d = self.device;
        let (positions, sample_idx) = (self.buffer::<u32>(tokens)?, self.buffer::<u64>(tokens)?);
        let (sample_idx, positions) = (sample_idx.view(), positions.view());
        let mask = Some(DropoutMask { probability: 0.05, seed: 1, step: 1, sample_idx, positions });
        let (a, b, u, mut d_u) = (self.act(r * k)?, self.act(n * r)?, self.act(tokens * r)?, self.act(tokens * r)?);
        let (mut y, mut d_x, mut scratch) =
            (self.act(tokens * n)?, self.act(tokens * k)?, self.act(tokens * n.max(k))?);
        let (mut d_a, mut d_b) = (self.f32s(sharing * r * k)?, self.f32s(n * r)?);
        let moved = |elements: usize| Amount::Bytes((elements * size_of::<D::Act>()) as f64);
        let mut all_u: Vec<_> = (0..sharing).map(|_| self.act(tokens * r)).collect::<Result<_>>()?;
        self.time(&format!("{name} u = dropout(x)·Aᵀ of {sharing}, r {r}"), moved(tokens * k), || {
            let modules = all_u.iter_mut().zip(0..);
            let modules = modules.map(|(u, number)| DownModule { u: u.view_mut(), a: a.view(), number });
            let (modules, x, scratch) = (&mut modules.collect::<Vec<_>>()[..], x.view(), scratch.view_mut());
            d.lora_down(LoraDown { modules, x, mask, lora_rank: r, scratch })
        })?;
        self.time(
            &format!("{name} x·Wᵀ + u·Bᵀ, r {r}"),
            Amount::Flops(2.0 * (tokens * (k + r) * n) as f64),
            || {
                let (y, x, weight, u, b) = (y.view_mut(), x.view(), weight.view(), u.view(), b.view());
                d.lora_linear(LoraLinear {
                    y,
                    x,
                    weight,
                    bias: None,
                    u,
                    b,
                    lora_rank: r,
                    scale: 1.0,
                    output_scale: 1.0,
                })
            },
        )?;
        self.time(&format!("{name} d_u = d_y·B, dB += d_yᵀ·u, r {r}"), moved(tokens * n), || {
            let (d_u, d_b, d_y, u, b) = (d_u.view_mut(), d_b.view_mut(), y.view(), u.view(), b.view());
            let (scale, accumulate, scratch) = (1.0, false, scratch.view_mut());
            d.lora_output(LoraOutput { d_u, d_b, d_y, u, b, lora_rank: r, scale, accumulate, scratch })
        })?;
        // Without the base's products.
        let module = |i: usize| InputModule {
            outputs: Vec::new(),
            output_scale: 1.0,
            lora: Some(InputLora {
                d_u: d_u.view(),
                a: a.view(),
                a_range: i * r * k..(i + 1) * r * k,
                number: i as u32,
            }),
        };
        let modules: Vec<_> = (0..sharing).map(module).collect();
        let what = format!("{name} dA += d_uᵀ·dropout(x), d_x = mask ∘ (d_u·A) of {sharing}, r {r}");
        self.time(&what, moved(2 * tokens * k), || {
            let (d_x, grads, modules, x) = (d_x.view_mut(), d_a.view_mut(), &modules[..], x.view());
            let (accumulate, in_features, scratch) = (false, k, scratch.view_mut());
            d.lora_input(LoraInput { d_x, accumulate, grads, modules, x, in_features, mask, lora_rank: r, scratch })
        })
    }

    fn dequantize(&self, config: &ModelSpec, double_quant: bool) -> Result<()> {
        let (len, encoding) =
            (config.hidden_size * config.layers[0].mlp.intermediate_size, Encoding::Nf4 { double_quant });
        let (records, mut weights) = (self.buffer::<u8>(encoding.tensor_bytes(len))?, self.buffer::<D::Act>(len)?);
        let bytes = (records.len() + len * size_of::<D::Act>()) as f64;
        self.time(&format!("dequantize gate_proj, {}", encoding.name()), Amount::Bytes(bytes), || {
            self.device.dequantize(Dequantize { weights: weights.view_mut(), records: records.view(), encoding })
        })
    }

    /// Ops on `[tokens, hidden]`.
    fn rows(&self, config: &ModelSpec, tokens: usize) -> Result<()> {
        let (d, hidden) = (self.device, config.hidden_size);
        let len = tokens * hidden;
        let moved = |times: f64| Amount::Bytes(times * (len * size_of::<D::Act>()) as f64);
        let (x, mut y, weight, mut rstd) = (self.act(len)?, self.act(len)?, self.f32s(hidden)?, self.f32s(tokens)?);
        self.time("rms_norm forward", moved(2.0), || {
            let (y, rstd, x, weight) = (y.view_mut(), rstd.view_mut(), Normed::Plain(x.view()), weight.view());
            d.rms_norm_forward(RmsNormForward { y, rstd, x, weight, eps: 1e-5 })
        })?;
        let mut d_x = self.act(len)?;
        self.time("rms_norm backward", moved(4.0), || {
            let (d_x, d_y, x) = (d_x.view_mut(), y.view(), x.view());
            d.rms_norm_backward(RmsNormBackward { d_x, d_y, x, rstd: rstd.view(), weight: weight.view() })
        })?;
        self.time("add", moved(3.0), || d.add(y.view_mut(), x.view()))?;
        let (head_dim, num_heads) = (config.layers[0].attention.head_dim, config.layers[0].attention.num_heads);
        let (cos, sin) = (self.f32s(tokens * head_dim / 2)?, self.f32s(tokens * head_dim / 2)?);
        let mut q = self.act(tokens * num_heads * head_dim)?;
        self.time("rope", Amount::Bytes((2 * q.len() * size_of::<D::Act>()) as f64), || {
            let (cos, sin) = (cos.view(), sin.view());
            d.rope(Rope { x: q.view_mut(), cos, sin, num_heads, head_dim, rotary_dim: head_dim, inverse: false })
        })?;
        let (positions, sample_idx) = (self.buffer::<u32>(tokens)?, self.buffer::<u64>(tokens)?);
        self.time("lora_dropout", moved(2.0), || {
            let (sample_idx, positions) = (sample_idx.view(), positions.view());
            let mask = DropoutMask { probability: 0.05, seed: 1, step: 1, sample_idx, positions };
            d.lora_dropout(LoraDropout { y: y.view_mut(), x: x.view(), mask, module: 1, accumulate: false })
        })
    }

    fn mlp(&self, config: &ModelSpec, tokens: usize) -> Result<()> {
        let (d, len) = (self.device, tokens * config.layers[0].mlp.intermediate_size);
        let moved = |times: f64| Amount::Bytes(times * (len * size_of::<D::Act>()) as f64);
        let (gate, up, mut y) = (self.act(len)?, self.act(len)?, self.act(len)?);
        let activation = config.layers[0].mlp.activation;
        self.time("gated forward", moved(3.0), || {
            d.gated_forward(GatedForward { y: y.view_mut(), gate: gate.view(), up: up.view(), activation })
        })?;
        let (mut d_gate, mut d_up) = (self.act(len)?, self.act(len)?);
        self.time("gated backward", moved(5.0), || {
            let (d_gate, d_up, d_y) = (d_gate.view_mut(), d_up.view_mut(), y.view());
            d.gated_backward(GatedBackward { d_gate, d_up, d_y, gate: gate.view(), up: up.view(), activation })
        })
    }

    /// The attention of the model, and those of other families over the same q, k and v: with capped scores, in a window, with heads
    /// of 256.
    fn attentions(&self, config: &ModelSpec, tokens: usize) -> Result<()> {
        let stage = &config.layers[0].attention;
        let plain = Scores { head_dim: stage.head_dim, window: None, softcap: None };
        let window = Some(1024).filter(|window| *window < tokens);
        self.attention("attention", plain, config, tokens)?;
        self.attention("attention, capped", Scores { softcap: Some(50.0), ..plain }, config, tokens)?;
        if window.is_some() {
            self.attention("attention, window 1024", Scores { window, ..plain }, config, tokens)?;
        }
        let [q, kv] = [stage.q_width(), stage.kv_width()];
        if stage.head_dim != WIDE && q.is_multiple_of(WIDE) && kv.is_multiple_of(WIDE) {
            let wide = Scores { head_dim: WIDE, ..plain };
            self.attention("attention, head_dim 256", wide, config, tokens)?;
        }
        Ok(())
    }

    /// Attention over one document. The model's q, k and v are divided into heads of the width that `scores` says.
    fn attention(&self, name: &str, scores: Scores, config: &ModelSpec, tokens: usize) -> Result<()> {
        let Scores { head_dim, window, softcap } = scores;
        let (d, stage) = (self.device, &config.layers[0].attention);
        let (heads, kv_heads) = (stage.q_width() / head_dim, stage.kv_width() / head_dim);
        let (q_len, kv_len) = (tokens * heads * head_dim, tokens * kv_heads * head_dim);
        let (q, k, v) = (self.act(q_len)?, self.act(kv_len)?, self.act(kv_len)?);
        let (mut out, mut lse) = (self.act(q_len)?, self.f32s(tokens * heads)?);
        let mut documents = Arena::carved(d, |arena| Documents::carve(arena, "documents", tokens))?;
        documents.put(d, &[0, tokens as u32], 0)?;
        let shape = AttentionShape {
            num_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            softcap,
            window,
            documents: &documents,
        };
        // Causal: half of the scores, without those outside of the window. Two products forward, five backward.
        let hidden = tokens - window.unwrap_or(tokens);
        let product = ((tokens * tokens - hidden * hidden) * heads * head_dim) as f64;
        self.time(&format!("{name} forward"), Amount::Flops(2.0 * product), || {
            let (out, lse, q, k, v) = (out.view_mut(), lse.view_mut(), q.view(), k.view(), v.view());
            d.attention_forward(AttentionForward { out, lse, q, k, v, shape })
        })?;
        let (mut d_q, mut d_k, mut d_v) = (self.act(q_len)?, self.act(kv_len)?, self.act(kv_len)?);
        let (d_out, mut delta) = (self.act(q_len)?, self.f32s(tokens * heads)?);
        let (mut head_d_k, mut head_d_v) = (self.act(q_len)?, self.act(q_len)?);
        self.time(&format!("{name} backward"), Amount::Flops(5.0 * product), || {
            d.attention_backward(AttentionBackward {
                d_q: d_q.view_mut(),
                d_k: d_k.view_mut(),
                d_v: d_v.view_mut(),
                delta: delta.view_mut(),
                head_d_k: head_d_k.view_mut(),
                head_d_v: head_d_v.view_mut(),
                d_out: d_out.view(),
                out: out.view(),
                lse: lse.view(),
                q: q.view(),
                k: k.view(),
                v: v.view(),
                shape,
            })
        })
    }

    fn head(&self, config: &ModelSpec, tokens: usize, lora_rank: usize) -> Result<()> {
        let (d, hidden) = (self.device, config.hidden_size);
        let rows = crate::fsdp::unit::HEAD_PIECE_ROWS.min(config.vocab_size);
        let (x, weight, target_ids) =
            (self.act(tokens * hidden)?, self.act(rows * hidden)?, self.buffer::<u32>(tokens)?);
        let (mut max, mut sum, mut target_logit) = (self.f32s(tokens)?, self.f32s(tokens)?, self.f32s(tokens)?);
        let (mut acc, mut logits) = (self.f32s(tokens * hidden)?, self.f32s(tokens * rows)?);
        // Logits, and their part of the gradient.
        self.time("cross_entropy piece", Amount::Flops(4.0 * (tokens * rows * hidden) as f64), || {
            d.cross_entropy_piece(CrossEntropyPiece {
                max: max.view_mut(),
                sum: sum.view_mut(),
                target_logit: target_logit.view_mut(),
                acc: Some(acc.view_mut()),
                logits: logits.view_mut(),
                x: x.view(),
                weight: weight.view(),
                target_ids: target_ids.view(),
                first_id: 0,
                softcap: config.head.softcap,
            })
        })?;
        let len = (hidden + config.layers[0].mlp.intermediate_size) * lora_rank;
        let mut state = [self.f32s(len)?, self.f32s(len)?, self.f32s(len)?];
        let grad = self.f32s(len)?;
        self.time("adamw", Amount::Bytes((7 * 4 * len) as f64), || {
            let [param, exp_avg, exp_avg_sq] = &mut state;
            d.adamw(AdamW {
                param: param.view_mut(),
                exp_avg: exp_avg.view_mut(),
                exp_avg_sq: exp_avg_sq.view_mut(),
                grad: grad.view(),
                grad_scale: 1.0,
                learning_rate: 1e-4,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.0,
                step: 1,
            })
        })
    }
}
