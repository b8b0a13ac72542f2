//! Cross-entropy over pieces of a vocabulary.

use super::*;

/// Tokens, hidden size, vocabulary, and its rows that make a piece.
#[derive(Clone, Copy)]
struct Sizes {
    n: usize,
    hidden: usize,
    vocab: usize,
    piece: usize,
}

/// Every token's factor of −log p.
const COEFFICIENT: f32 = 0.25;

/// The inputs of a case: x, the head's rows, and the targets.
fn inputs(Sizes { n, hidden, vocab, .. }: Sizes) -> (Vec<f32>, Vec<f32>, Vec<u32>) {
    let ids = (0..n as u32).map(|i| i * 7919 % vocab as u32).collect();
    (random(n * hidden, 1.0, 1), random(vocab * hidden, 0.1, 2), ids)
}

/// Log-sum-exp, the target's logit, d_x, the targets' rows.
fn run<D: Ops>(d: &D, sizes: Sizes, softcap: Option<f32>) -> [Vec<f32>; 4]
where
    D::Act: Into<f32>,
{
    let Sizes { n, hidden, vocab, piece } = sizes;
    let (x, weights, ids) = inputs(sizes);
    let (x, ids) = (put_act(d, &x), put(d, &ids));
    let (mut max, mut sum) = (put(d, &vec![f32::NEG_INFINITY; n]), put(d, &vec![0f32; n]));
    let mut acc = put(d, &vec![0f32; n * hidden]);
    let (mut logit, mut rows): (_, Buffer<D, D::Act>) = (buffer(d, n), buffer(d, n * hidden));
    for first_id in (0..vocab).step_by(piece) {
        let num_rows = piece.min(vocab - first_id);
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
            softcap,
        })
        .unwrap();
        let (target_rows, weight, target_ids) = (rows.view_mut(), weight.view(), ids.view());
        d.gather_target_rows(GatherTargetRows { target_rows, weight, target_ids, first_id }).unwrap();
    }
    let coefficients = put(d, &vec![COEFFICIENT; n]);
    let mut d_x = buffer(d, n * hidden);
    d.cross_entropy_finish(CrossEntropyFinish {
        d_x: d_x.view_mut(),
        acc: acc.view(),
        sum: sum.view(),
        target_logit: logit.view(),
        target_rows: rows.view(),
        coefficients: coefficients.view(),
        softcap,
    })
    .unwrap();
    let (max, sum) = (get(d, &max), get(d, &sum));
    let lse = max.iter().zip(&sum).map(|(m, s)| m + s.ln()).collect();
    [lse, get(d, &logit), get_act(d, &d_x), get_act(d, &rows)]
}

pub fn cross_entropy_over_pieces<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    for (n, hidden, vocab) in [(1, 8, 13), (7, 64, 4097), (131, 576, 49_152)] {
        let sizes = Sizes { n, hidden, vocab, piece: 4096 };
        for softcap in [None, Some(30.0), Some(2.0)] {
            let (results, references) = (run(&cuda, sizes, softcap), run(&Cpu::new(1), sizes, softcap));
            within("log-sum-exp", &results[0], &references[0], 1e-6);
            within("target logit", &results[1], &references[1], 1e-5);
            close::<A>("d_x", &results[2], &references[2], 3.0);
            assert!(results[3] == references[3], "target rows");
        }
    }
}

/// The CPU is the reference of the GPU: it is checked against the formula in f64, and its gradient against differences of the formula.
#[test]
fn cross_entropy_of_the_cpu_is_that_of_the_formula() {
    const STEP: f64 = 1e-5;
    let sizes = Sizes { n: 5, hidden: 24, vocab: 700, piece: 300 };
    let (x, weights, ids) = inputs(sizes);
    let x: Vec<f64> = x.into_iter().map(f64::from).collect();
    for softcap in [None, Some(30.0), Some(0.5)] {
        let [lse, target_logit, d_x, _] = run(&Cpu::new(2), sizes, softcap);
        for (i, x) in x.chunks(sizes.hidden).enumerate() {
            let formula = |x: &[f64]| -> [f64; 2] {
                let logits = weights.chunks(sizes.hidden).map(|row| {
                    let logit: f64 = row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
                    softcap.map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh())
                });
                let logits: Vec<f64> = logits.collect();
                [logits.iter().map(|logit| logit.exp()).sum::<f64>().ln(), logits[ids[i] as usize]]
            };
            let expected = formula(x);
            for (found, expected) in [lse[i], target_logit[i]].into_iter().zip(expected) {
                assert!((f64::from(found) - expected).abs() < 1e-5, "{softcap:?}: {found}, not {expected}");
            }
            for j in 0..sizes.hidden {
                let loss = |step: f64| {
                    let mut x = x.to_vec();
                    x[j] += step;
                    let [lse, target] = formula(&x);
                    f64::from(COEFFICIENT) * (lse - target)
                };
                let (expected, found) = ((loss(STEP) - loss(-STEP)) / (2.0 * STEP), d_x[i * sizes.hidden + j]);
                assert!((f64::from(found) - expected).abs() < 1e-6, "{softcap:?}: d_x {found}, not {expected}");
            }
        }
    }
}

/// Ids are not checked on the host: the kernels compare each with the piece's rows before they follow it.
pub fn a_target_of_no_piece_is_not_followed<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    fn run<D: Ops>(d: &D, ids: &[u32], first_id: usize) -> [Vec<f32>; 2]
    where
        D::Act: Into<f32>,
    {
        let (n, hidden, num_rows) = (ids.len(), 8, 16);
        let (x, weight, ids) =
            (put_act(d, &random(n * hidden, 1.0, 1)), put_act(d, &random(num_rows * hidden, 1.0, 2)), put(d, ids));
        let (mut max, mut sum) = (put(d, &vec![f32::NEG_INFINITY; n]), put(d, &vec![0f32; n]));
        let (mut logit, mut logits): (_, Buffer<D, f32>) = (buffer(d, n), buffer(d, n * num_rows));
        let mut rows: Buffer<D, D::Act> = buffer(d, n * hidden);
        d.cross_entropy_piece(CrossEntropyPiece {
            max: max.view_mut(),
            sum: sum.view_mut(),
            target_logit: logit.view_mut(),
            acc: None,
            logits: logits.view_mut(),
            x: x.view(),
            weight: weight.view(),
            target_ids: ids.view(),
            first_id,
            softcap: None,
        })
        .unwrap();
        let (target_rows, weight, target_ids) = (rows.view_mut(), weight.view(), ids.view());
        d.gather_target_rows(GatherTargetRows { target_rows, weight, target_ids, first_id }).unwrap();
        [get(d, &logit), get_act(d, &rows)]
    }
    let (ids, first_id) = ([99, 100, 115, 116, u32::MAX], 100);
    for [logit, rows] in [run(&cuda, &ids, first_id), run(&Cpu::new(1), &ids, first_id)] {
        let there: Vec<bool> = logit.iter().map(|v| !v.is_nan()).collect();
        assert_eq!(there, [false, true, true, false, false]);
        let there: Vec<bool> = rows.chunks(8).map(|row| !row.iter().all(|v| v.is_nan())).collect();
        assert_eq!(there, [false, true, true, false, false]);
    }
}
