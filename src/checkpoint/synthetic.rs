//! Makes a base of made-up weights. It is drawn and quantized tensor by tensor, so that the model never exists in 16
//! bits as a whole.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::Result;
use rayon::prelude::*;

use crate::comm::{ShardSource, SharedBytes};
use crate::device::{Arena, Buffer, Ops, QuantizeAbsmax, QuantizeNf4, Uniform};
use crate::fsdp::exec::{Base, Embed};
use crate::fsdp::layout::UnitLayout;
use crate::fsdp::unit::NumUnits;
use crate::model::spec::{ModelSpec, TensorId};
use crate::quant::double::{self, NestedAbsmax};
use crate::quant::nf4::{Absmax, Nf4Tensor};
use crate::quant::record::{BLOCK, Encoding, RECORD_WEIGHTS, SUPERBLOCK};

use super::encodings::InBf16;
use super::load;
use super::made_up::in_bf16;

/// Rows of the embedding table; token ids beyond begin again.
pub(super) const EMBEDDING_ROWS: usize = 4096;
pub(super) const EMBEDDING_SEED: u64 = (1 << 24) - 1;
pub(super) const HALF_WIDTH: f32 = 0.035;

/// Returns the seed of a tensor, which is entry `idx` of its unit.
pub(super) fn seed(unit: usize, idx: usize) -> u64 {
    (unit << 8 | idx) as u64
}

/// Bytes of the embedding table that a process keeps.
pub fn embedding_bytes(spec: &ModelSpec) -> usize {
    EMBEDDING_ROWS * spec.hidden_size * size_of::<f32>()
}

/// Layouts of all units of a model of this shape: projections in NF4, or in bf16 where `nf4_double_quant` is `None`;
/// the rest in bf16.
pub fn layouts(spec: &ModelSpec, nf4_double_quant: Option<bool>, num_shards: usize) -> Result<Vec<UnitLayout>> {
    load::layouts(spec, &InBf16 { nf4_double_quant }, num_shards)
}

/// Shard `shard` of `num_shards` of a model of this shape, drawn by a device when it is stored. Weights are uniform
/// in ±0.035 (deviation 0.02), factors of norms 1; they depend on unit, tensor and element alone.
pub fn base<D: Ops + Clone>(
    device: &D,
    spec: ModelSpec,
    nf4_double_quant: Option<bool>,
    (shard, num_shards): (usize, usize),
    tell: impl Fn(String) + Copy + 'static,
) -> Result<Base> {
    let units = NumUnits::new(&spec);
    let layouts = layouts(&spec, nf4_double_quant, num_shards)?;
    let largest = layouts.iter().flat_map(UnitLayout::tensors).map(|t| t.elements.len()).max().unwrap_or(0);
    let hidden_size = spec.hidden_size;
    let table_len = EMBEDDING_ROWS * hidden_size;
    let mut drawing = Drawing::new(device.clone(), &spec, largest.max(table_len))?;
    drawing.draw(EMBEDDING_SEED, table_len)?;
    let mut table = vec![0f32; table_len];
    device.download(&mut table, drawing.weights.first(table_len))?;
    // The last shard that is drawn lets the device's buffers go.
    let (drawing, num_units) = (Rc::new(RefCell::new(drawing)), units.count());
    let shards = layouts.iter().cloned().enumerate().map(|(i, layout)| {
        let (bytes, drawing) = (layout.shard_bytes(), drawing.clone());
        let read = move || {
            if (i * 10).is_multiple_of(num_units.next_multiple_of(10)) {
                tell(format!("drawing unit {} of {num_units}", i + 1));
            }
            drawing.borrow_mut().shard(&layout, i, shard)
        };
        ShardSource { bytes, read: Box::new(read) }
    });
    let shards = shards.collect();
    Ok(Base { final_norm: vec![1.0; hidden_size], spec, layouts, shards, embed: embed(table, hidden_size) })
}

/// Returns the lookup in a table of the first rows; ids beyond begin again.
pub(super) fn embed(table: Vec<f32>, hidden_size: usize) -> Box<Embed> {
    Box::new(move |ids: &[u32], out: &mut [f32]| {
        for (&id, row) in ids.iter().zip(out.chunks_exact_mut(hidden_size)) {
            row.copy_from_slice(&table[id as usize % EMBEDDING_ROWS * hidden_size..][..hidden_size]);
        }
        Ok(())
    })
}

/// Device buffers for one tensor at a time.
struct Drawing<D: Ops> {
    device: D,
    spec: ModelSpec,
    weights: Buffer<D, f32>,
    codes: Buffer<D, u8>,
    absmax: Buffer<D, f32>,
    absmax_codes: Buffer<D, u8>,
    nested_absmax: Buffer<D, f32>,
    /// The codes that were downloaded last, and the shard that was made last; their memory is used again.
    host_codes: Vec<u8>,
    shard: Arc<Vec<u8>>,
}

impl<D: Ops + Clone> Drawing<D> {
    fn new(device: D, spec: &ModelSpec, num_weights: usize) -> Result<Self> {
        let blocks = num_weights.div_ceil(BLOCK);
        Arena::carved(&device, |arena| {
            Ok(Drawing {
                device: device.clone(),
                spec: spec.clone(),
                weights: arena.carve("weights", num_weights)?,
                codes: arena.carve("codes", num_weights.div_ceil(2))?,
                absmax: arena.carve("absmax", blocks)?,
                absmax_codes: arena.carve("absmax_codes", blocks)?,
                nested_absmax: arena.carve("nested_absmax", blocks.div_ceil(SUPERBLOCK))?,
                host_codes: Vec::new(),
                shard: Arc::default(),
            })
        })
    }

    fn draw(&mut self, seed: u64, num_weights: usize) -> Result<()> {
        let y = self.weights.first_mut(num_weights);
        self.device.uniform(Uniform { y, seed, first: 0, half_width: HALF_WIDTH })
    }

    /// The range of the tensor that was drawn, quantized; it begins with a record. The offset is that of the whole
    /// tensor.
    fn quantize(&mut self, num_weights: usize, range: Range<usize>, double_quant: bool) -> Result<Nf4Tensor> {
        debug_assert!(range.start.is_multiple_of(RECORD_WEIGHTS));
        let (device, blocks) = (self.device.clone(), num_weights.div_ceil(BLOCK));
        device.quantize_nf4(QuantizeNf4 {
            codes: self.codes.first_mut(num_weights.div_ceil(2)),
            absmax: self.absmax.first_mut(blocks),
            weights: self.weights.first(num_weights),
        })?;
        let of = |weights: usize| range.start / weights..range.end.div_ceil(weights);
        let mut absmax = vec![0f32; blocks];
        device.download(&mut absmax, self.absmax.first(blocks))?;
        let mut codes = std::mem::take(&mut self.host_codes);
        codes.resize(range.len().div_ceil(2), 0);
        device.download(&mut codes, self.codes.view().range(of(2)))?;
        if !double_quant {
            let absmax = Absmax::F32(absmax[of(BLOCK)].to_vec());
            return Ok(Nf4Tensor { num_weights: range.len(), codes, absmax });
        }
        let offset = double::mean(&absmax);
        device.quantize_absmax(QuantizeAbsmax {
            codes: self.absmax_codes.first_mut(blocks),
            nested_absmax: self.nested_absmax.first_mut(blocks.div_ceil(SUPERBLOCK)),
            absmax: self.absmax.first(blocks),
            offset,
        })?;
        let superblocks = of(RECORD_WEIGHTS);
        let mut nested =
            NestedAbsmax { codes: vec![0; of(BLOCK).len()], nested_absmax: vec![0.0; superblocks.len()], offset };
        device.download(&mut nested.codes, self.absmax_codes.view().range(of(BLOCK)))?;
        device.download(&mut nested.nested_absmax, self.nested_absmax.view().range(superblocks))?;
        Ok(Nf4Tensor { num_weights: range.len(), codes, absmax: Absmax::Nested(nested) })
    }

    fn shard(&mut self, layout: &UnitLayout, unit: usize, shard: usize) -> Result<SharedBytes> {
        let mut shared = std::mem::take(&mut self.shard);
        let bytes = unshared(&mut shared);
        bytes.resize(layout.shard_bytes(), 0);
        bytes[layout.shard_range(shard).len()..].fill(0);
        for (idx, tensor) in layout.tensors().iter().enumerate() {
            let Some((weights, at)) = layout.part(idx, shard) else { continue };
            let out = &mut bytes[at];
            let norm = match tensor.id {
                TensorId::Norm(id) => Some(1.0 - self.spec.layers[unit].norm_offset(id)),
                _ => None,
            };
            if norm.is_none() {
                self.draw(seed(unit, idx), tensor.elements.len())?;
            }
            match tensor.encoding {
                Encoding::Nf4 { double_quant } => {
                    let part = self.quantize(tensor.elements.len(), weights, double_quant)?;
                    part.write_records(out)?;
                    self.host_codes = part.codes;
                }
                Encoding::Plain(_) => {
                    let mut values = vec![norm.unwrap_or_default(); weights.len()];
                    if norm.is_none() {
                        self.device.download(&mut values, self.weights.view().range(weights))?;
                    }
                    let record_bytes = tensor.encoding.parts(RECORD_WEIGHTS).bytes;
                    let records = out.par_chunks_mut(record_bytes).zip(values.par_chunks(RECORD_WEIGHTS));
                    records.for_each(|(record, values)| in_bf16(values, record));
                }
            }
        }
        self.shard = shared;
        Ok(self.shard.clone())
    }
}

/// Returns these bytes if nobody else holds them any more, else new ones.
fn unshared(bytes: &mut Arc<Vec<u8>>) -> &mut Vec<u8> {
    if Arc::get_mut(bytes).is_none() {
        *bytes = Arc::default();
    }
    Arc::get_mut(bytes).expect("nobody else has new ones")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::device::cpu::Cpu;
    use crate::fsdp::layout::UnitTensor;

    #[test]
    fn shards_are_parts_of_what_one_rank_draws() {
        [Some(true), Some(false), None].into_iter().for_each(shards_are_parts);
    }

    fn shards_are_parts(double_quant: Option<bool>) {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny");
        let text = std::fs::read_to_string(tiny.join("config.json")).unwrap();
        let text = text.replace("\"intermediate_size\": 128", "\"intermediate_size\": 1024");
        let config = ModelSpec::parse(text.as_bytes(), "config.json").unwrap();
        let drawn = |shard, num_shards| {
            let base = base(&Cpu::new(1), config.clone(), double_quant, (shard, num_shards), |_| ()).unwrap();
            let units = base.shards.into_iter().enumerate();
            units.map(|(unit, source)| (*source.take(unit).unwrap()).as_ref().to_vec()).collect::<Vec<_>>()
        };
        let whole = drawn(0, 1);
        for shard in 0..5 {
            let (layouts, shards) = (layouts(&config, double_quant, 5).unwrap(), drawn(shard, 5));
            for ((layout, own), whole) in layouts.iter().zip(&shards).zip(&whole) {
                let (part, padding) = own.split_at(layout.shard_range(shard).len());
                assert!(part == &whole[layout.shard_range(shard)] && padding.iter().all(|&b| b == 0));
                assert_eq!(own.len(), layout.shard_bytes());
            }
        }
        let layer = &layouts(&config, double_quant, 5).unwrap()[0];
        let is_cut =
            |(idx, tensor): (usize, &UnitTensor)| tensor.name.ends_with("proj.weight") && layer.segments(idx).len() > 1;
        assert!(layer.tensors().iter().enumerate().any(is_cut), "a projection is in several shards");
    }
}
