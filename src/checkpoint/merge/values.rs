//! The values of one tensor of the result, some rows at a time.

use std::io::Write;

use anyhow::{Context, Result, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::{Form, Linear, Merge, Planned};
use crate::checkpoint::source::{Dtype, TensorView};
use crate::checkpoint::weights::of_files;
use crate::device::cpu::{dequantize_records, product};
use crate::files::shown;
use crate::model::trainable::{Kind, LayerTrainables, LoraModule};
use crate::quant::record::{Encoding, RECORD_WEIGHTS};

/// Number of bytes that are copied at a time, and about as many elements are computed at a time.
const PIECE: usize = 1 << 22;

/// The values of W, which are read as f32, a range of elements at a time.
enum Source<'a> {
    Plain(TensorView<'a>),
    /// Records of the whole tensor. A range that is read must begin with a record.
    Records(Vec<u8>, Encoding),
}

impl Source<'_> {
    fn read(&self, first: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Source::Plain(view) => view.to_f32(first, out),
            Source::Records(records, encoding) => {
                dequantize_records(out, &records[encoding.tensor_bytes(first)..], *encoding);
                Ok(())
            }
        }
    }
}

/// What an adapter adds to a weight: scale · B · A.
struct Delta<'a> {
    /// `[out_features, r]`
    b: &'a [f32],
    /// `[r, in_features]`
    a: &'a [f32],
    lora_rank: usize,
    scale: f32,
}

impl Delta<'_> {
    /// Adds the delta of the rows from `first_row` on to `weights`, `[rows, in_features]`. `scratch` must have as many
    /// elements.
    fn add_to(&self, weights: &mut [f32], scratch: &mut [f32], first_row: usize) {
        let in_features = self.a.len() / self.lora_rank;
        let rows = weights.len() / in_features;
        let b = &self.b[first_row * self.lora_rank..][..rows * self.lora_rank];
        product(scratch, b, self.a, [rows, in_features, self.lora_rank]);
        weights.iter_mut().zip(scratch).for_each(|(w, delta)| *w += self.scale * *delta);
    }
}

impl Merge<'_> {
    /// Writes the bytes of a tensor.
    pub(super) fn write_tensor(&self, tensor: &Planned<'_>, out: &mut impl Write) -> Result<()> {
        let view = self.model.tensor(tensor.name)?;
        match &tensor.linear {
            None if view.dtype == tensor.dtype => {
                view.bytes.chunks(PIECE).try_for_each(|piece| out.write_all(piece))?
            }
            None => self.write_pieces(tensor, &Source::Plain(view), None, PIECE, out)?,
            Some(linear) => {
                let source = self.source(linear, view)?;
                let columns = tensor.columns();
                let step = rows_at_a_time(columns) * columns;
                self.write_pieces(tensor, &source, self.delta(linear), step, out)?;
            }
        }
        self.model.release(&view)
    }

    fn source<'a>(&self, linear: &Linear, view: TensorView<'a>) -> Result<Source<'a>> {
        let encoding = linear.tensor.encoding;
        if self.options.form == Form::Original || matches!(encoding, Encoding::Plain(_)) {
            return Ok(Source::Plain(view));
        }
        let mut records = vec![0; encoding.tensor_bytes(linear.tensor.elements.len())];
        of_files(self.model, &linear.tensor, &mut records)?;
        Ok(Source::Records(records, encoding))
    }

    /// Returns what the adapter adds to a weight, or `None` if it has nothing for it.
    fn delta(&self, linear: &Linear) -> Option<Delta<'_>> {
        let (layer, module) = linear.place?;
        let (lora, values) = (self.adapter.settings.lora_config(), &self.adapter.layers[layer]);
        let trainables = LayerTrainables::new(&self.opened.spec.layers[layer], &lora.layers[layer]);
        let matrix = |kind| trainables.get(module, kind).map(|matrix| &values[matrix.range.clone()]);
        let (a, b) = matrix(Kind::A).zip(matrix(Kind::B))?;
        let LoraModule { lora_rank, scale, .. } = *trainables.module(module)?;
        Some(Delta { b, a, lora_rank, scale })
    }

    /// Writes a tensor `step` elements at a time.
    fn write_pieces(
        &self,
        tensor: &Planned<'_>,
        source: &Source<'_>,
        delta: Option<Delta<'_>>,
        step: usize,
        out: &mut impl Write,
    ) -> Result<()> {
        let num: usize = tensor.shape.iter().product();
        let (mut values, mut scratch, mut halves) = (vec![0.0; step.min(num)], Vec::new(), Vec::new());
        if delta.is_some() {
            scratch.resize(values.len(), 0.0);
        }
        for first in (0..num).step_by(step) {
            let values = &mut values[..step.min(num - first)];
            source.read(first, values)?;
            if let Some(delta) = &delta {
                let len = values.len();
                delta.add_to(values, &mut scratch[..len], first / tensor.columns());
            }
            write_as(values, first, tensor.dtype, &mut halves, out)
                .with_context(|| format!("tensor {}", shown(tensor.stored)))?;
        }
        Ok(())
    }
}

/// Number of rows that are computed at a time: whole records, and about [`PIECE`] elements.
fn rows_at_a_time(in_features: usize) -> usize {
    let step = RECORD_WEIGHTS / gcd(RECORD_WEIGHTS, in_features);
    (PIECE / in_features / step).max(1) * step
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Writes the values in this type, rounded to nearest, ties to even. The first value is element `first` of its tensor.
fn write_as(values: &[f32], first: usize, dtype: Dtype, halves: &mut Vec<u16>, out: &mut impl Write) -> Result<()> {
    halves.resize(values.len(), 0);
    let (bytes, not_finite): (&[u8], _) = match dtype {
        Dtype::F32 => (bytemuck::cast_slice(values), values.iter().position(|x| !x.is_finite())),
        Dtype::BF16 => {
            let halves = bytemuck::cast_slice_mut::<u16, bf16>(halves);
            halves.convert_from_f32_slice(values);
            (bytemuck::cast_slice(halves), halves.iter().position(|x| !x.is_finite()))
        }
        Dtype::F16 => {
            let halves = bytemuck::cast_slice_mut::<u16, f16>(halves);
            halves.convert_from_f32_slice(values);
            (bytemuck::cast_slice(halves), halves.iter().position(|x| !x.is_finite()))
        }
        other => bail!("dtype {other:?}; allowed: F32, F16, BF16"),
    };
    if let Some(idx) = not_finite {
        let (at, value) = (first + idx, values[idx]);
        bail!("element {at} is {value}, which {dtype:?} cannot hold\nhelp: --dtype bfloat16 or float32");
    }
    out.write_all(bytes).context("it cannot be written")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_rows_and_whole_records() {
        for in_features in [1, 48, 64, 576, 1001, 4096, 14_336, 28_672, 1 << 24] {
            let elements = rows_at_a_time(in_features) * in_features;
            assert!(elements.is_multiple_of(RECORD_WEIGHTS), "{in_features}");
            assert!(elements <= PIECE || rows_at_a_time(in_features) <= RECORD_WEIGHTS, "{in_features}");
        }
    }

    #[test]
    fn values_are_rounded_once_and_must_fit() {
        let written = |value: f32, dtype| {
            let mut out = Vec::new();
            write_as(&[value], 7, dtype, &mut Vec::new(), &mut out).map(|()| out)
        };
        // These lie halfway between two numbers of bfloat16, and go to the even one.
        assert_eq!(written(1.0 + 1.0 / 256.0, Dtype::BF16).unwrap(), bf16::from_f32(1.0).to_le_bytes());
        assert_eq!(written(1.0 + 3.0 / 256.0, Dtype::BF16).unwrap(), bf16::from_f32(1.015_625).to_le_bytes());
        assert_eq!(written(65_519.0, Dtype::F16).unwrap(), f16::MAX.to_le_bytes());
        assert_eq!(written(0.1, Dtype::F32).unwrap(), 0.1f32.to_le_bytes());
        for (value, dtype) in [(65_520.0, Dtype::F16), (f32::NAN, Dtype::F32), (f32::INFINITY, Dtype::BF16)] {
            let error = written(value, dtype).unwrap_err().to_string();
            assert!(error.contains(&format!("element 7 is {value}, which {dtype:?} cannot hold")), "{error}");
        }
    }
}
