//! Cross-entropy over pieces of a vocabulary.

use super::*;

pub fn cross_entropy_over_pieces<A: Tested>() {
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

/// Ids are not checked on the host: the kernels compare each with the piece's rows before they follow it.
pub fn a_target_of_no_piece_is_not_followed<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
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
