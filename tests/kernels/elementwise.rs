//! Sums, biases, casts, and the sum of squares to the bit.

use super::*;

pub fn elementwise<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    fn run<D: Ops>(d: &D, rows: usize, width: usize) -> [Vec<f32>; 3]
    where
        D::Act: Into<f32>,
    {
        let len = rows * width;
        let (mut y, x) = (put_act(d, &random(len, 1.0, 1)), put_act(d, &random(len, 1.0, 2)));
        d.add(y.view_mut(), x.view()).unwrap();
        let sum = get_act(d, &y);
        d.add_bias(y.view_mut(), put(d, &random(width, 1.0, 3)).view(), 0.22).unwrap();
        let biased = get_act(d, &y);
        let f32s: Vec<f32> = random(len, 1.0, 4).iter().map(|v| v * 1.001).collect();
        d.cast(y.view_mut(), put(d, &f32s).view()).unwrap();
        [sum, biased, get_act(d, &y)]
    }
    for (rows, width) in ROWS {
        let (results, references) = (run(&cuda, rows, width), run(&Cpu::new(1), rows, width));
        close::<A>("add", &results[0], &references[0], 2.0);
        // Plain: the first sum is rounded, then the second.
        let bias = random(width, 1.0, 3);
        let plain: Vec<f32> = references[0]
            .iter()
            .enumerate()
            .map(|(i, v)| rounded::<A>(rounded::<A>(*v) + 0.22 * bias[i % width]))
            .collect();
        close_as("add_bias", &results[1], &plain, &references[1], 2.0);
        let cast: Vec<f32> = references[2].iter().map(|&v| rounded::<A>(v)).collect();
        assert!(results[2] == cast, "cast");
    }
    fn shifted<D: Ops>(d: &D, x: &[f32]) -> Vec<f32> {
        let mut x = put(d, x);
        d.add_scalar(x.view_mut(), 1.0).unwrap();
        get(d, &x)
    }
    let x = random(4097, 0.3, 5);
    let sums: Vec<f32> = x.iter().map(|x| x + 1.0).collect();
    assert!(shifted(&cuda, &x) == sums && shifted(&Cpu::new(1), &x) == sums, "add_scalar");
    // More sums than a GPU makes between two looks of the host.
    let lens: Vec<usize> = (0..150).map(|i| 7 * i).chain([1, 1023, 1025, 1_000_003]).collect();
    fn sums_of_squares<D: Ops>(d: &D, lens: &[usize]) -> Vec<f64> {
        let buffers: Vec<_> = lens.iter().map(|&len| put(d, &random(len, 1.0, len as u64))).collect();
        d.sums_of_squares(&buffers.iter().map(Buffer::view).collect::<Vec<_>>()).unwrap()
    }
    let found = sums_of_squares(&cuda, &lens);
    assert!(found[1..].iter().all(|&sum| sum > 0.0) && found == sums_of_squares(&Cpu::new(1), &lens));
}
