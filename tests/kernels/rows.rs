//! Rows picked by index, and matrices without a row that an index may reach.

use super::*;

pub fn rows_are_moved_and_reach_nothing_else<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    fn run<D: Ops>(d: &D, rows: usize, width: usize) -> [Vec<f32>; 2]
    where
        D::Act: Into<f32>,
    {
        let x = put_act(d, &random(rows * width, 1.0, 2));
        let picked: Vec<u32> = (0..rows as u32).rev().step_by(2).collect();
        let mut indices = Arena::carved(d, |arena| RowIndices::carve(arena, "rows", picked.len())).unwrap();
        indices.put(d, &picked, rows).unwrap();
        let mut some = buffer(d, picked.len() * width);
        d.gather_rows(some.view_mut(), x.view(), &indices, width).unwrap();
        let mut all = buffer(d, rows * width);
        d.scatter_rows(all.view_mut(), some.view(), &indices, width).unwrap();
        // One row fewer than the indices may reach.
        let fewer = (rows - 1) * width;
        let error = d.gather_rows(some.view_mut(), x.first(fewer), &indices, width).unwrap_err().to_string();
        assert_eq!(error, format!("gather_rows: {fewer} elements, indices reach {rows} rows of {width}"));
        let error = d.scatter_rows(all.first_mut(fewer), some.view(), &indices, width).unwrap_err().to_string();
        assert_eq!(error, format!("scatter_rows: {fewer} elements, indices reach {rows} rows of {width}"));
        [get_act(d, &some), get_act(d, &all)]
    }
    for (rows, width) in ROWS {
        assert!(run(&cuda, rows, width) == run(&Cpu::new(1), rows, width), "moved bytes");
    }
}
