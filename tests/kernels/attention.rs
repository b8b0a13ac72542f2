//! Attention: packed documents, grouped heads, tokens over a past.

use fsdp_qlora::device::cpu::Cpu;
use fsdp_qlora::device::*;

use super::{Tested, buffer, close, close_as, get, get_act, gpu, put, put_act, random, rounded, within};

/// Heads, key-value heads, width, and the lengths of the documents.
type AttentionCase<'a> = (usize, usize, usize, &'a [usize]);

struct AttentionInputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_out: Vec<f32>,
    documents: Vec<u32>,
    positions: Vec<u32>,
}

fn attention_inputs((heads, kv_heads, head_dim, lengths): AttentionCase<'_>) -> AttentionInputs {
    let tokens: usize = lengths.iter().sum();
    let mut documents = vec![0];
    documents.extend(lengths.iter().scan(0, |at, &n| {
        *at += n as u32;
        Some(*at)
    }));
    AttentionInputs {
        q: random(tokens * heads * head_dim, 1.0, 1),
        k: random(tokens * kv_heads * head_dim, 1.0, 2),
        v: random(tokens * kv_heads * head_dim, 1.0, 3),
        d_out: random(tokens * heads * head_dim, 1.0, 4),
        documents,
        positions: lengths.iter().flat_map(|&n| 0..n as u32).collect(),
    }
}

/// out, d_q, d_k, d_v and the log-sum-exp.
fn run_attention<D: Ops>(d: &D, case: AttentionCase<'_>) -> [Vec<f32>; 5]
where
    D::Act: Into<f32>,
{
    let inputs = attention_inputs(case);
    let (num_heads, num_key_value_heads, head_dim, _) = case;
    let (q, k, v, d_out) =
        (put_act(d, &inputs.q), put_act(d, &inputs.k), put_act(d, &inputs.v), put_act(d, &inputs.d_out));
    let (positions, rows) = (put(d, &inputs.positions), inputs.positions.len() * num_heads);
    let shape = AttentionShape {
        num_heads,
        num_key_value_heads,
        head_dim,
        documents: &inputs.documents,
        positions: positions.view(),
        num_past_tokens: 0,
    };
    let (mut out, mut lse) = (buffer(d, q.len()), buffer(d, rows));
    let (q, k, v) = (q.view(), k.view(), v.view());
    d.attention_forward(AttentionForward { out: out.view_mut(), lse: lse.view_mut(), q, k, v, shape }).unwrap();
    let (mut d_q, mut d_k, mut d_v, mut delta) =
        (buffer(d, q.len()), buffer(d, k.len()), buffer(d, v.len()), buffer(d, rows));
    let (mut head_d_k, mut head_d_v) = (buffer(d, q.len()), buffer(d, q.len()));
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
    })
    .unwrap();
    [get_act(d, &out), get_act(d, &d_q), get_act(d, &d_k), get_act(d, &d_v), get(d, &lse)]
}

/// The plain formula of one head after the other, each matrix rounded to bf16 as a bf16 framework does: out, d_q, d_k, d_v.
fn plain_attention<A: Tested>(case: AttentionCase<'_>) -> [Vec<f32>; 4] {
    let AttentionInputs { q, k, v, d_out, documents, positions } = attention_inputs(case);
    let (heads, kv_heads, dim, _) = case;
    let (width, kv_width, tokens) = (heads * dim, kv_heads * dim, positions.len());
    let scale = 1.0 / (dim as f32).sqrt();
    let mut out = [vec![0f32; q.len()], vec![0f32; q.len()], vec![0f32; k.len()], vec![0f32; k.len()]];
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    assert_eq!(*documents.last().unwrap() as usize, tokens);
    for head in 0..heads {
        let kv = head / (heads / kv_heads);
        for t in 0..tokens {
            let keys = t - positions[t] as usize..t + 1;
            let row = |x: &[f32], t: usize| -> Vec<f32> { x[t * width + head * dim..][..dim].to_vec() };
            let kv_row = |x: &[f32], t: usize| -> Vec<f32> { x[t * kv_width + kv * dim..][..dim].to_vec() };
            let (query, d_row) = (row(&q, t), row(&d_out, t));
            let s: Vec<f32> = keys.clone().map(|j| rounded::<A>(dot(&query, &kv_row(&k, j)) * scale)).collect();
            let max = s.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let sum: f32 = s.iter().map(|s| (s - max).exp()).sum();
            let p: Vec<f32> = s.iter().map(|s| rounded::<A>((s - max).exp() / sum)).collect();
            let d_p: Vec<f32> = keys.clone().map(|j| rounded::<A>(dot(&d_row, &kv_row(&v, j)))).collect();
            // As FlashAttention-2 has it (Dao 2023, algorithm 2): from the output in 16 bits.
            let mut out_row = vec![0f32; dim];
            for (p, j) in p.iter().zip(keys.clone()) {
                out_row.iter_mut().zip(kv_row(&v, j)).for_each(|(o, v)| *o += p * v);
            }
            let delta = dot(&d_row, &out_row.into_iter().map(rounded::<A>).collect::<Vec<_>>());
            for (i, j) in keys.enumerate() {
                let d_s = rounded::<A>(p[i] * (d_p[i] - delta));
                let (key, value) = (kv_row(&k, j), kv_row(&v, j));
                for e in 0..dim {
                    out[0][t * width + head * dim + e] += p[i] * value[e];
                    out[1][t * width + head * dim + e] += scale * d_s * key[e];
                    out[2][j * kv_width + kv * dim + e] += scale * d_s * query[e];
                    out[3][j * kv_width + kv * dim + e] += p[i] * d_row[e];
                }
            }
        }
    }
    out.map(|x| x.into_iter().map(rounded::<A>).collect())
}

pub fn attention<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    let cases: [AttentionCase<'_>; 12] = [
        // Many heads, so that the error is not that of one number.
        (32, 32, 64, &[2]),
        (9, 3, 64, &[65]),
        (4, 2, 96, &[7, 130, 1, 64]),
        (4, 1, 128, &[257]),
        (8, 2, 128, &[100, 31, 200]),
        (2, 2, 64, &[3, 3, 3, 120, 63]),
        (3, 3, 96, &[127, 129]),
        // Many tiles, and documents that begin and end inside of them.
        (8, 2, 128, &[300, 1, 500]),
        (4, 1, 96, &[513]),
        (2, 1, 64, &[700, 400]),
        // So many keys that one block adds the gradients of all heads that share them, or of two of four.
        (512, 256, 64, &[30, 35]),
        (512, 128, 64, &[65]),
    ];
    for case in cases {
        let (results, references) = (run_attention(&cuda, case), run_attention(&Cpu::new(1), case));
        let plain = plain_attention::<A>(case);
        for (i, (what, times)) in [("out", 2.0), ("d_q", 3.0), ("d_k", 3.0), ("d_v", 3.0)].into_iter().enumerate() {
            close_as(&format!("{what} of {case:?}"), &results[i], &plain[i], &references[i], times);
        }
        within("log-sum-exp", &results[4], &references[4], 1e-4);
        assert!(results == run_attention(&cuda, case), "{case:?}: the same run twice");
    }
}

/// The probability of a single key is 1: the value passes through, and the scores have no gradient.
pub fn attention_of_one_token<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    let case = (2, 1, 64, &[1usize][..]);
    let (inputs, [out, d_q, d_k, d_v, _]) = (attention_inputs(case), run_attention(&cuda, case));
    assert_eq!(out, [&inputs.v[..], &inputs.v[..]].concat());
    assert!(d_q.iter().chain(&d_k).all(|d| d.abs() < 1e-5), "{d_q:?} {d_k:?}");
    let sum: Vec<f32> = inputs.d_out[..64].iter().zip(&inputs.d_out[64..]).map(|(a, b)| a + b).collect();
    close::<A>("d_v", &d_v, &sum, 2.0);
}

pub fn attention_of_new_tokens_over_past_ones<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, past: usize, new: usize) -> Vec<f32>
    where
        D::Act: Into<f32>,
    {
        let (num_heads, num_key_value_heads, head_dim) = (9, 3, 64);
        let q = put_act(d, &random(new * num_heads * head_dim, 1.0, 1));
        let [k, v] = [2, 3].map(|seed| put_act(d, &random((past + new) * num_key_value_heads * head_dim, 1.0, seed)));
        let positions: Vec<u32> = (past as u32..(past + new) as u32).collect();
        let (documents, positions) = ([0, new as u32], put(d, &positions));
        let (documents, positions, num_past_tokens) = (&documents, positions.view(), past);
        let shape = AttentionShape { num_heads, num_key_value_heads, head_dim, documents, positions, num_past_tokens };
        let (mut out, mut lse) = (buffer(d, q.len()), buffer(d, new * num_heads));
        let (q, k, v) = (q.view(), k.view(), v.view());
        d.attention_forward(AttentionForward { out: out.view_mut(), lse: lse.view_mut(), q, k, v, shape }).unwrap();
        get_act(d, &out)
    }
    for (past, new) in [(0, 5), (1, 1), (200, 1), (63, 70), (500, 300)] {
        close::<A>("out", &run(&cuda, past, new), &run(&Cpu::new(1), past, new), 2.0);
    }
}
