//! Synthetic numbers, to the bit.

use super::*;

pub fn uniform_is_exact<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    fn run<D: Ops>(d: &D, len: usize) -> Vec<f32> {
        let mut y = buffer(d, len);
        d.uniform(Uniform { y: y.view_mut(), seed: 77, first: 12_345, half_width: 0.035 }).unwrap();
        get(d, &y)
    }
    for len in [1, 257, 1_000_003] {
        assert!(run(&cuda, len) == run(&Cpu::new(2), len), "{len} numbers");
    }
}
