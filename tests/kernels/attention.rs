//! Attention: packed documents, grouped heads, windows, capped scores, tokens over a past.

use std::ops::Range;

use anyhow::Result;
use fsdp_qlora::testing::*;

use super::{Tested, buffer, close, close_as, get, get_act, gpu, put_act, put_documents, random, rounded, within};

/// The sizes and scores of one attention.
#[derive(Clone, Copy, Debug)]
pub struct Case<'a> {
    pub num_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// Lengths of the documents; one document where there are past tokens.
    pub lengths: &'a [usize],
    pub num_past_tokens: usize,
    pub scale: f32,
    pub window: Option<usize>,
    pub softcap: Option<f32>,
}

/// Llama's attention: the scale is 1 / sqrt(head_dim), there is no window and no cap.
pub fn llama(num_heads: usize, num_key_value_heads: usize, head_dim: usize, lengths: &[usize]) -> Case<'_> {
    let scale = 1.0 / (head_dim as f32).sqrt();
    let (num_past_tokens, window, softcap) = (0, None, None);
    Case { num_heads, num_key_value_heads, head_dim, lengths, num_past_tokens, scale, window, softcap }
}

impl Case<'_> {
    /// Columns of q, and of k and v.
    fn widths(&self) -> (usize, usize) {
        (self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim)
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Position of each token in its document.
    fn positions(&self) -> Vec<u32> {
        let past = self.num_past_tokens;
        self.lengths.iter().flat_map(|&n| past as u32..(past + n) as u32).collect()
    }

    /// The keys that each token sees: those of its document that are no more than `window` − 1 before it.
    fn visible_keys(&self) -> Vec<Range<usize>> {
        let before = |position: u32| (position as usize).min(self.window.unwrap_or(usize::MAX) - 1);
        let keys = |(t, position): (usize, u32)| {
            let own = self.num_past_tokens + t;
            own - before(position)..own + 1
        };
        self.positions().into_iter().enumerate().map(keys).collect()
    }
}

/// The inputs of an attention, forward and backward.
pub struct Inputs {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub d_out: Vec<f32>,
}

impl Inputs {
    pub fn new(case: &Case<'_>) -> Inputs {
        let (tokens, (width, kv_width)) = (case.tokens(), case.widths());
        let keys = case.num_past_tokens + tokens;
        Inputs {
            q: random(tokens * width, 1.0, 1),
            k: random(keys * kv_width, 1.0, 2),
            v: random(keys * kv_width, 1.0, 3),
            d_out: random(tokens * width, 1.0, 4),
        }
    }
}

/// out, d_q, d_k, d_v and the log-sum-exp; the gradients are empty where there are past tokens, which backward does not have.
pub fn run<D: Ops>(d: &D, case: &Case<'_>, inputs: &Inputs) -> [Vec<f32>; 5]
where
    D::Act: Into<f32>,
{
    try_run(d, case, inputs).unwrap()
}

pub fn try_run<D: Ops>(d: &D, case: &Case<'_>, inputs: &Inputs) -> Result<[Vec<f32>; 5]>
where
    D::Act: Into<f32>,
{
    let Case { num_heads, num_key_value_heads, head_dim, num_past_tokens, scale, window, softcap, .. } = *case;
    let mut documents = vec![0];
    documents.extend(case.lengths.iter().scan(0, |at, &n| {
        *at += n as u32;
        Some(*at)
    }));
    let (q, k, v) = (put_act(d, &inputs.q), put_act(d, &inputs.k), put_act(d, &inputs.v));
    let documents = put_documents(d, &documents, num_past_tokens);
    let rows = documents.num_tokens() * num_heads;
    let documents = &documents;
    let shape = AttentionShape { num_heads, num_key_value_heads, head_dim, scale, softcap, window, documents };
    let (mut out, mut lse) = (buffer(d, q.len()), buffer(d, rows));
    let (q, k, v) = (q.view(), k.view(), v.view());
    d.attention_forward(AttentionForward { out: out.view_mut(), lse: lse.view_mut(), q, k, v, shape })?;
    if num_past_tokens > 0 {
        return Ok([get_act(d, &out), Vec::new(), Vec::new(), Vec::new(), get(d, &lse)]);
    }
    let (mut d_q, mut d_k, mut d_v) = (buffer(d, q.len()), buffer(d, k.len()), buffer(d, v.len()));
    let (mut head_d_k, mut head_d_v) = (buffer(d, q.len()), buffer(d, q.len()));
    let (d_out, mut delta) = (put_act(d, &inputs.d_out), buffer(d, rows));
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
        q,
        k,
        v,
        shape,
    })?;
    Ok([get_act(d, &out), get_act(d, &d_q), get_act(d, &d_k), get_act(d, &d_v), get(d, &lse)])
}

/// The plain formula in f64, one head and token after the other, each matrix rounded by `round`: out, d_q, d_k, d_v and the
/// log-sum-exp, as [`run`].
pub fn formula(case: &Case<'_>, inputs: &Inputs, round: impl Fn(f64) -> f64) -> [Vec<f64>; 5] {
    let Case { num_heads, num_key_value_heads, head_dim: dim, softcap, .. } = *case;
    let (scale, (width, kv_width)) = (f64::from(case.scale), case.widths());
    let Inputs { q, k, v, d_out } = inputs;
    let [mut out, mut d_q] = [(); 2].map(|()| vec![0f64; q.len()]);
    let [mut d_k, mut d_v] = [(); 2].map(|()| vec![0f64; k.len()]);
    let mut lse = vec![0f64; case.tokens() * num_heads];
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let keys_of = case.visible_keys();
    for (head, (t, keys)) in (0..num_heads).flat_map(|head| keys_of.iter().enumerate().map(move |row| (head, row))) {
        let kv = head / (num_heads / num_key_value_heads) * dim;
        let at = t * width + head * dim..t * width + head * dim + dim;
        let (query, d_row) = (&q[at.clone()], &d_out[at.clone()]);
        let kv_at = |j: usize| j * kv_width + kv..j * kv_width + kv + dim;
        let cap = |z: f64| softcap.map_or(z, |c| round(f64::from(c) * (z / f64::from(c)).tanh()));
        let slope = |y: f64| softcap.map_or(1.0, |c| 1.0 - (y / f64::from(c)).powi(2));
        let s: Vec<f64> = keys.clone().map(|j| cap(round(dot(query, &k[kv_at(j)]) * scale))).collect();
        let max = s.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
        let sum: f64 = s.iter().map(|s| (s - max).exp()).sum();
        lse[t * num_heads + head] = max + sum.ln();
        let p: Vec<f64> = s.iter().map(|s| round((s - max).exp() / sum)).collect();
        for (p, j) in p.iter().zip(keys.clone()) {
            out[at.clone()].iter_mut().zip(&v[kv_at(j)]).for_each(|(o, v)| *o += p * f64::from(*v));
        }
        out[at.clone()].iter_mut().for_each(|o| *o = round(*o));
        // FlashAttention-2 (Dao 2023, algorithm 2) computes delta from the output, which is rounded.
        let delta: f64 = out[at.clone()].iter().zip(d_row).map(|(o, d)| o * f64::from(*d)).sum();
        for (i, j) in keys.clone().enumerate() {
            let d_s = round(p[i] * (round(dot(d_row, &v[kv_at(j)])) - delta) * slope(s[i]));
            for e in 0..dim {
                d_q[at.start + e] += scale * d_s * f64::from(k[kv_at(j).start + e]);
                d_k[kv_at(j).start + e] += scale * d_s * f64::from(query[e]);
                d_v[kv_at(j).start + e] += p[i] * f64::from(d_row[e]);
            }
        }
    }
    [&mut d_q, &mut d_k, &mut d_v].into_iter().flatten().for_each(|x| *x = round(*x));
    [out, d_q, d_k, d_v, lse]
}

/// Holds the GPU's results against the CPU's: twice the error of the formula rounded to 16 bits is allowed, three times for gradients.
fn check<A: Tested>(cuda: &Cuda<A>, case: &Case<'_>) {
    let inputs = Inputs::new(case);
    let (results, references) = (run(cuda, case, &inputs), run(&Cpu::new(1), case, &inputs));
    let plain = formula(case, &inputs, |x| f64::from(rounded::<A>(x as f32)));
    for (i, (what, times)) in [("out", 2.0), ("d_q", 3.0), ("d_k", 3.0), ("d_v", 3.0)].into_iter().enumerate() {
        if references[i].is_empty() {
            continue;
        }
        let plain: Vec<f32> = plain[i].iter().map(|&x| x as f32).collect();
        close_as(&format!("{what} of {case:?}"), &results[i], &plain, &references[i], times);
    }
    within(&format!("log-sum-exp of {case:?}"), &results[4], &references[4], 1e-4);
    assert!(results == run(cuda, case, &inputs), "{case:?}: the same run twice");
}

pub fn attention<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    for case in [
        // Many heads, so that the error is not that of one number.
        llama(32, 32, 64, &[2]),
        llama(9, 3, 64, &[65]),
        llama(4, 2, 96, &[7, 130, 1, 64]),
        llama(4, 1, 128, &[257]),
        llama(8, 2, 128, &[100, 31, 200]),
        llama(2, 2, 64, &[3, 3, 3, 120, 63]),
        llama(3, 3, 96, &[127, 129]),
        // Many tiles, and documents that begin and end inside of them.
        llama(8, 2, 128, &[300, 1, 500]),
        llama(4, 1, 96, &[513]),
        llama(2, 1, 64, &[700, 400]),
        // So many keys that one block adds the gradients of all heads that share them, or of two of four.
        llama(512, 256, 64, &[30, 35]),
        llama(512, 128, 64, &[65]),
        // Gemma's width.
        llama(32, 32, 256, &[2]),
        llama(4, 2, 256, &[7, 130, 1, 64]),
        llama(8, 4, 256, &[257]),
        llama(3, 1, 256, &[300, 1, 100]),
        // Granite's scale, far from 1 / sqrt(head_dim).
        Case { scale: 1.0 / 128.0, ..llama(4, 2, 128, &[100, 200]) },
        Case { scale: 0.3, ..llama(4, 2, 64, &[100, 200]) },
    ] {
        check(&cuda, &case);
    }
}

/// Windows smaller and larger than a tile of 64 or 128 keys, and just above and below a document's length.
pub fn attention_in_a_window<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    for head_dim in [64, 96, 128, 256] {
        for window in [3, 64, 65, 128, 200] {
            check(&cuda, &Case { window: Some(window), ..llama(4, 2, head_dim, &[500, 1, 90]) });
        }
        for window in [129, 130, 131] {
            check(&cuda, &Case { window: Some(window), ..llama(3, 1, head_dim, &[130, 40, 130]) });
        }
        let (num_past_tokens, case) = (300, llama(4, 2, head_dim, &[140]));
        for window in [20, 129, 439, 440] {
            check(&cuda, &Case { num_past_tokens, window: Some(window), ..case });
        }
        // A window that hides no key changes no bit.
        let [full, wide] = [None, Some(200)].map(|window| Case { window, ..llama(4, 1, head_dim, &[200, 70]) });
        let inputs = Inputs::new(&full);
        assert!(run(&cuda, &full, &inputs) == run(&cuda, &wide, &inputs), "head_dim {head_dim}: a wide window");
    }
}

/// Scores that the cap bends much, and hardly.
pub fn attention_with_capped_scores<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    for head_dim in [64, 96, 128, 256] {
        for (scale, softcap, window) in
            [(1.0, 2.0, None), (1.0, 50.0, Some(100)), (0.0625, 50.0, None), (3.0, 5.0, Some(64))]
        {
            let softcap = Some(softcap);
            check(&cuda, &Case { scale, softcap, window, ..llama(4, 2, head_dim, &[257, 1, 90]) });
        }
        let (softcap, num_past_tokens) = (Some(2.0), 300);
        check(&cuda, &Case { softcap, num_past_tokens, window: Some(129), ..llama(4, 2, head_dim, &[40]) });
    }
}

/// The probability of a single key is 1: the value passes through, and the scores have no gradient.
pub fn attention_of_one_key<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    for case in [
        llama(2, 1, 64, &[1]),
        llama(2, 1, 256, &[1]),
        Case { window: Some(1), ..llama(2, 1, 64, &[150, 3]) },
        Case { window: Some(1), ..llama(2, 1, 128, &[150, 3]) },
        Case { window: Some(1), softcap: Some(20.0), ..llama(2, 1, 256, &[150, 3]) },
    ] {
        let inputs = Inputs::new(&case);
        let [out, d_q, d_k, d_v, _] = run(&cuda, &case, &inputs);
        let twice = |v: &[f32]| v.chunks(case.head_dim).flat_map(|row| [row, row].concat()).collect::<Vec<f32>>();
        assert_eq!(out, twice(&inputs.v), "{case:?}");
        assert!(d_q.iter().chain(&d_k).all(|d| d.abs() < 2e-5), "{case:?}: {d_q:?} {d_k:?}");
        let pairs = inputs.d_out.chunks(2 * case.head_dim).map(|pair| pair.split_at(case.head_dim));
        let sums: Vec<f32> = pairs.flat_map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b)).collect();
        close::<A>(&format!("d_v of {case:?}"), &d_v, &sums, 2.0);
    }
}

pub fn attention_of_new_tokens_over_past_ones<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    for (num_past_tokens, lengths) in [(0, [5]), (1, [1]), (200, [1]), (63, [70]), (500, [300])] {
        for head_dim in [64, 256] {
            let case = Case { num_past_tokens, ..llama(9, 3, head_dim, &lengths) };
            let inputs = Inputs::new(&case);
            let [result, reference] =
                [run(&cuda, &case, &inputs), run(&Cpu::new(1), &case, &inputs)].map(|r| r[0].clone());
            close::<A>(&format!("out of {case:?}"), &result, &reference, 2.0);
        }
    }
}
