//! Rows picked by index.

use super::*;

pub fn rows_are_moved<A: Tested>() {
    let Some((_guard, cuda)) = gpu::<A>() else { return };
    fn run<D: Ops>(d: &D, rows: usize, width: usize) -> [Vec<f32>; 2]
    where
        D::Act: Into<f32>,
    {
        let x = put_act(d, &random(rows * width, 1.0, 2));
        let picked: Vec<u32> = (0..rows as u32).rev().step_by(2).collect();
        let indices = put(d, &picked);
        let mut some = buffer(d, picked.len() * width);
        d.gather_rows(some.view_mut(), x.view(), indices.view(), width).unwrap();
        let mut all = buffer(d, rows * width);
        d.scatter_rows(all.view_mut(), some.view(), indices.view(), width).unwrap();
        [get_act(d, &some), get_act(d, &all)]
    }
    for (rows, width) in ROWS {
        assert!(run(&cuda, rows, width) == run(&Cpu::new(1), rows, width), "moved bytes");
    }
}
