//! A base of made-up weights, drawn and quantized tensor by tensor: nothing of the size of the model in 16 bits ever exists.

use std::sync::Arc;

use anyhow::Result;
use half::bf16;

use crate::comm::SharedBytes;
use crate::fsdp::exec::Base;
use crate::fsdp::layout::UnitLayout;
use crate::fsdp::unit::{self, Encodings, NumUnits};
use crate::model::config::ModelConfig;
use crate::quant::nf4;
use crate::quant::record::{Dtype, Encoding, RECORD_WEIGHTS};

/// Rows of the embedding table; token ids beyond begin again.
const EMBEDDING_ROWS: usize = 4096;

/// NF4 with double quantization for projections, bf16 for the rest.
struct AsQlora;

impl Encodings for AsQlora {
    fn projection(&self, _: &str) -> Result<Encoding> {
        Ok(Encoding::Nf4 { double_quant: true })
    }
    fn plain(&self, _: &str) -> Result<Dtype> {
        Ok(Dtype::Bf16)
    }
}

/// Shard `shard` of `num_shards` of a model of this shape. Weights are uniform in ±0.035 (deviation 0.02), norms 1; they depend
/// on unit, tensor and element alone.
pub fn base(config: ModelConfig, shard: usize, num_shards: usize, tell: &mut dyn FnMut(String)) -> Result<Base> {
    let units = NumUnits::new(&config);
    let (mut layouts, mut shards) = (Vec::new(), Vec::new());
    for (i, unit) in units.all().enumerate() {
        let layout = UnitLayout::new(unit::tensors(&config, &AsQlora, unit)?, num_shards);
        if (i * 10).is_multiple_of(units.count().next_multiple_of(10)) {
            tell(format!("drawing unit {} of {}", i + 1, units.count()));
        }
        shards.push(draw(&layout, i as u64, shard)?);
        layouts.push(layout);
    }
    let hidden_size = config.hidden_size;
    let table: Vec<f32> = (0..EMBEDDING_ROWS * hidden_size).map(|i| weight(u64::MAX, i)).collect();
    let embed = move |ids: &[u32], out: &mut [f32]| -> Result<()> {
        for (&id, row) in ids.iter().zip(out.chunks_exact_mut(hidden_size)) {
            row.copy_from_slice(&table[id as usize % EMBEDDING_ROWS * hidden_size..][..hidden_size]);
        }
        Ok(())
    };
    Ok(Base { final_norm: vec![1.0; hidden_size], config, layouts, shards, embed: Box::new(embed) })
}

fn draw(layout: &UnitLayout, unit: u64, shard: usize) -> Result<SharedBytes> {
    let mut flat = vec![0u8; layout.flat_bytes()];
    for (idx, tensor) in layout.tensors().iter().enumerate() {
        let (num_weights, out) = (tensor.elements.len(), &mut flat[layout.tensor_range(idx)]);
        let seed = unit << 8 | idx as u64;
        let one = tensor.name.ends_with("norm.weight");
        match tensor.encoding {
            Encoding::Nf4 { double_quant } => {
                let read = |first: usize, weights: &mut [f32]| {
                    weights.iter_mut().enumerate().for_each(|(i, w)| *w = weight(seed, first + i));
                    Ok(())
                };
                nf4::quantize(num_weights, double_quant, read)?.write_records(out)?;
            }
            Encoding::Plain(_) => {
                let record_bytes = tensor.encoding.parts(RECORD_WEIGHTS).bytes;
                for i in 0..num_weights {
                    let value = bf16::from_f32(if one { 1.0 } else { weight(seed, i) });
                    let at = i / RECORD_WEIGHTS * record_bytes + i % RECORD_WEIGHTS * 2;
                    out[at..at + 2].copy_from_slice(&value.to_le_bytes());
                }
            }
        }
    }
    let mut own = vec![0u8; layout.shard_bytes()];
    let range = layout.shard_range(shard);
    own[..range.len()].copy_from_slice(&flat[range]);
    Ok(Arc::new(own))
}

/// A number that looks random, of a tensor and an element (the finalizer of MurmurHash3, Appleby 2011).
fn weight(seed: u64, element: usize) -> f32 {
    let mut z = (element as u64).wrapping_add(seed << 40);
    z = (z ^ (z >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    z = (z ^ (z >> 33)).wrapping_mul(0xC4CE_B9FE_1A85_EC53);
    ((z >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.07
}
