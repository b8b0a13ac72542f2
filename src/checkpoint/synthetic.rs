//! A base of made-up weights, drawn and quantized tensor by tensor: nothing of the size of the model in 16 bits ever exists.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::Result;
use half::bf16;
use rayon::prelude::*;

use crate::comm::{ShardSource, SharedBytes};
use crate::device::ops::{QuantizeAbsmax, QuantizeNf4, Uniform};
use crate::device::{Arena, Buffer, Ops};
use crate::fsdp::exec::Base;
use crate::fsdp::layout::UnitLayout;
use crate::fsdp::unit::{self, Encodings, NumUnits};
use crate::model::config::ModelConfig;
use crate::model::names::Projection;
use crate::quant::double::{self, NestedAbsmax};
use crate::quant::nf4::{Absmax, Nf4Tensor};
use crate::quant::record::{BLOCK, Dtype, Encoding, RECORD_WEIGHTS, SUPERBLOCK};

use super::adapter::AdapterSettings;

/// Rows of the embedding table; token ids beyond begin again.
const EMBEDDING_ROWS: usize = 4096;
const EMBEDDING_SEED: u64 = (1 << 24) - 1;
const HALF_WIDTH: f32 = 0.035;

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

/// The adapter of benchmarks: r 16 on all projections.
pub fn adapter_settings(dropout: f32) -> AdapterSettings {
    let targets = Projection::ALL.to_vec();
    AdapterSettings { lora_rank: 16, alpha: 16.0, dropout, use_rslora: false, targets }
}

/// Layouts of all units of a model of this shape.
pub fn layouts(config: &ModelConfig, num_shards: usize) -> Result<Vec<UnitLayout>> {
    let layout = |unit| Ok(UnitLayout::new(unit::tensors(config, &AsQlora, unit)?, num_shards));
    NumUnits::new(config).all().map(layout).collect()
}

/// Shard `shard` of `num_shards` of a model of this shape, drawn by a device when it is stored. Weights are uniform in ±0.035
/// (deviation 0.02), norms 1; they depend on unit, tensor and element alone.
pub fn base<D: Ops + Clone>(
    device: &D,
    config: ModelConfig,
    shard: usize,
    num_shards: usize,
    tell: impl Fn(String) + Copy + 'static,
) -> Result<Base> {
    let units = NumUnits::new(&config);
    let layouts = layouts(&config, num_shards)?;
    let largest = layouts.iter().flat_map(UnitLayout::tensors).map(|t| t.elements.len()).max().unwrap_or(0);
    let hidden_size = config.hidden_size;
    let table_len = EMBEDDING_ROWS * hidden_size;
    let mut drawing = Drawing::new(device.clone(), largest.max(table_len))?;
    drawing.draw(EMBEDDING_SEED, table_len)?;
    let mut table = vec![0f32; table_len];
    device.download(&mut table, drawing.weights.first(table_len))?;
    let embed = move |ids: &[u32], out: &mut [f32]| -> Result<()> {
        for (&id, row) in ids.iter().zip(out.chunks_exact_mut(hidden_size)) {
            row.copy_from_slice(&table[id as usize % EMBEDDING_ROWS * hidden_size..][..hidden_size]);
        }
        Ok(())
    };
    // The last shard that is drawn lets the device's buffers go.
    let (drawing, num_units) = (Rc::new(RefCell::new(drawing)), units.count());
    let shards = layouts.iter().cloned().enumerate().map(|(i, layout)| {
        let (bytes, drawing) = (layout.shard_bytes(), drawing.clone());
        let read = move || {
            if (i * 10).is_multiple_of(num_units.next_multiple_of(10)) {
                tell(format!("drawing unit {} of {num_units}", i + 1));
            }
            drawing.borrow_mut().shard(&layout, i as u64, shard)
        };
        ShardSource { bytes, read: Box::new(read) }
    });
    let shards = shards.collect();
    Ok(Base { final_norm: vec![1.0; hidden_size], config, layouts, shards, embed: Box::new(embed) })
}

/// Device buffers for one tensor at a time.
struct Drawing<D: Ops> {
    device: D,
    weights: Buffer<D, f32>,
    codes: Buffer<D, u8>,
    absmax: Buffer<D, f32>,
    absmax_codes: Buffer<D, u8>,
    nested_absmax: Buffer<D, f32>,
    /// What was downloaded last, and the flat and the shard that were made last; their memory is used again.
    tensor: Nf4Tensor,
    flat: Arc<Vec<u8>>,
    own: Arc<Vec<u8>>,
}

impl<D: Ops + Clone> Drawing<D> {
    fn new(device: D, num_weights: usize) -> Result<Self> {
        let blocks = num_weights.div_ceil(BLOCK);
        Arena::carved(&device, |arena| {
            Ok(Drawing {
                device: device.clone(),
                weights: arena.carve("weights", num_weights)?,
                codes: arena.carve("codes", num_weights.div_ceil(2))?,
                absmax: arena.carve("absmax", blocks)?,
                absmax_codes: arena.carve("absmax_codes", blocks)?,
                nested_absmax: arena.carve("nested_absmax", blocks.div_ceil(SUPERBLOCK))?,
                tensor: Nf4Tensor { num_weights: 0, codes: Vec::new(), absmax: Absmax::F32(Vec::new()) },
                flat: Arc::default(),
                own: Arc::default(),
            })
        })
    }

    fn draw(&mut self, seed: u64, num_weights: usize) -> Result<()> {
        let y = self.weights.first_mut(num_weights);
        self.device.uniform(Uniform { y, seed, first: 0, half_width: HALF_WIDTH })
    }

    /// Quantizes what was drawn into `self.tensor`.
    fn quantize(&mut self, num_weights: usize) -> Result<()> {
        let (device, blocks) = (self.device.clone(), num_weights.div_ceil(BLOCK));
        let (num_bytes, superblocks) = (num_weights.div_ceil(2), blocks.div_ceil(SUPERBLOCK));
        device.quantize_nf4(QuantizeNf4 {
            codes: self.codes.first_mut(num_bytes),
            absmax: self.absmax.first_mut(blocks),
            weights: self.weights.first(num_weights),
        })?;
        let mut absmax = vec![0f32; blocks];
        device.download(&mut absmax, self.absmax.first(blocks))?;
        let offset = double::mean(&absmax);
        device.quantize_absmax(QuantizeAbsmax {
            codes: self.absmax_codes.first_mut(blocks),
            nested_absmax: self.nested_absmax.first_mut(superblocks),
            absmax: self.absmax.first(blocks),
            offset,
        })?;
        let mut nested = NestedAbsmax { codes: vec![0; blocks], nested_absmax: vec![0.0; superblocks], offset };
        device.download(&mut nested.codes, self.absmax_codes.first(blocks))?;
        device.download(&mut nested.nested_absmax, self.nested_absmax.first(superblocks))?;
        self.tensor.codes.resize(num_bytes, 0);
        device.download(&mut self.tensor.codes, self.codes.first(num_bytes))?;
        (self.tensor.num_weights, self.tensor.absmax) = (num_weights, Absmax::Nested(nested));
        Ok(())
    }

    fn shard(&mut self, layout: &UnitLayout, unit: u64, shard: usize) -> Result<SharedBytes> {
        let mut shared = std::mem::take(&mut self.flat);
        let flat = unshared(&mut shared);
        flat.resize(layout.flat_bytes(), 0);
        for (idx, tensor) in layout.tensors().iter().enumerate() {
            let (num_weights, out) = (tensor.elements.len(), &mut flat[layout.tensor_range(idx)]);
            self.draw(unit << 8 | idx as u64, num_weights)?;
            match tensor.encoding {
                Encoding::Nf4 { .. } => {
                    self.quantize(num_weights)?;
                    self.tensor.write_records(out)?;
                }
                Encoding::Plain(_) => {
                    let mut values = vec![1f32; num_weights];
                    if !tensor.name.ends_with("norm.weight") {
                        self.device.download(&mut values, self.weights.first(num_weights))?;
                    }
                    let record_bytes = tensor.encoding.parts(RECORD_WEIGHTS).bytes;
                    out.par_chunks_mut(record_bytes).zip(values.par_chunks(RECORD_WEIGHTS)).for_each(
                        |(out, values)| {
                            out.fill(0);
                            for (bytes, value) in out.chunks_exact_mut(2).zip(values) {
                                bytes.copy_from_slice(&bf16::from_f32(*value).to_le_bytes());
                            }
                        },
                    );
                }
            }
        }
        self.flat = shared;
        if layout.num_shards() == 1 {
            return Ok(self.flat.clone());
        }
        let (own, range) = (unshared(&mut self.own), layout.shard_range(shard));
        own.clear();
        own.extend_from_slice(&self.flat[range]);
        own.resize(layout.shard_bytes(), 0);
        Ok(self.own.clone())
    }
}

/// The bytes, if nobody else has them any more; else new ones.
fn unshared(bytes: &mut Arc<Vec<u8>>) -> &mut Vec<u8> {
    if Arc::get_mut(bytes).is_none() {
        *bytes = Arc::default();
    }
    Arc::get_mut(bytes).expect("nobody else has new ones")
}
