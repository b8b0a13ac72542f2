//! Records to dense f32 weights, and weights to codes.

use anyhow::Result;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use crate::device::{Dequantize, Nf4Ops, QuantizeAbsmax, QuantizeNf4};
use crate::quant::double::{DYNAMIC_MAP, quantize_absmax_around};
use crate::quant::nf4::{self, CODEBOOK};
use crate::quant::record::{BLOCK, Dtype, Encoding, RECORD_WEIGHTS, RecordParts};

use super::Cpu;

/// Both values of a byte.
const PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [CODEBOOK[byte >> 4], CODEBOOK[byte & 15]];
        byte += 1;
    }
    pairs
};

impl Nf4Ops for Cpu {
    fn dequantize(&self, parts: Vec<Dequantize<'_, Cpu, f32>>) -> Result<()> {
        self.dequantize_f32(parts)
    }

    fn dequantize_f32(&self, parts: Vec<Dequantize<'_, Cpu, f32>>) -> Result<()> {
        for part in parts {
            part.num_weights()?;
            let Dequantize { weights, records, encoding } = part;
            let (weights, records) = (weights.host_mut(), records.host());
            if self.num_threads == 1 {
                dequantize_records(weights, records, encoding);
            } else {
                let records = records.par_chunks(encoding.parts(RECORD_WEIGHTS).bytes);
                let one = |(weights, record): (&mut [f32], &[u8])| dequantize_records(weights, record, encoding);
                weights.par_chunks_mut(RECORD_WEIGHTS).zip(records).for_each(one);
            }
        }
        Ok(())
    }

    fn quantize_nf4(&self, args: QuantizeNf4<'_, Cpu>) -> Result<()> {
        args.num_weights()?;
        let QuantizeNf4 { codes, absmax, weights } = args;
        let (codes, absmax, weights) = (codes.host_mut(), absmax.host_mut(), weights.host());
        (codes.par_chunks_mut(RECORD_WEIGHTS / 2), absmax.par_chunks_mut(RECORD_WEIGHTS / BLOCK))
            .into_par_iter()
            .zip(weights.par_chunks(RECORD_WEIGHTS))
            .for_each(|((codes, absmax), weights)| nf4::quantize_blocks(weights, codes, absmax));
        Ok(())
    }

    fn quantize_absmax(&self, args: QuantizeAbsmax<'_, Cpu>) -> Result<()> {
        args.num_blocks()?;
        let QuantizeAbsmax { codes, nested_absmax, absmax, offset } = args;
        let quantized = quantize_absmax_around(absmax.host(), offset);
        codes.host_mut().copy_from_slice(&quantized.codes);
        nested_absmax.host_mut().copy_from_slice(&quantized.nested_absmax);
        Ok(())
    }
}

/// Writes the weights of whole records that lie back to back; the last record of a tensor may be shorter.
pub fn dequantize_records(weights: &mut [f32], records: &[u8], encoding: Encoding) {
    let records = records.chunks(encoding.parts(RECORD_WEIGHTS).bytes);
    for (weights, record) in weights.chunks_mut(RECORD_WEIGHTS).zip(records) {
        let parts = encoding.parts(weights.len());
        match encoding {
            Encoding::Nf4 { double_quant } => dequantize_nf4(weights, record, &parts, double_quant),
            Encoding::Plain(dtype) => convert(weights, &record[parts.codes], dtype),
        }
    }
}

/// w = code · absmax, absmax = map[u8] · nested_absmax + offset, all in f32 as bitsandbytes does it.
fn dequantize_nf4(weights: &mut [f32], record: &[u8], parts: &RecordParts, double_quant: bool) {
    let f32_at = |byte: usize| f32::from_le_bytes(record[byte..byte + 4].try_into().expect("four bytes"));
    let codes = &record[parts.codes.clone()];
    for (i, (weights, codes)) in weights.chunks_mut(BLOCK).zip(codes.chunks(BLOCK / 2)).enumerate() {
        let absmax = match double_quant {
            true => DYNAMIC_MAP[record[parts.absmax.start + i] as usize] * f32_at(0) + f32_at(4),
            false => f32_at(parts.absmax.start + 4 * i),
        };
        for (pair, &byte) in weights.chunks_mut(2).zip(codes) {
            for (w, code) in pair.iter_mut().zip(PAIRS[byte as usize]) {
                *w = code * absmax;
            }
        }
    }
}

/// Plain weights to f32; records are aligned to 16 bytes, so the casts cannot fail.
fn convert(weights: &mut [f32], bytes: &[u8], dtype: Dtype) {
    match dtype {
        Dtype::F32 => weights.copy_from_slice(bytemuck::cast_slice(bytes)),
        Dtype::F16 => bytemuck::cast_slice::<u8, f16>(bytes).convert_to_f32_slice(weights),
        Dtype::Bf16 => bytemuck::cast_slice::<u8, bf16>(bytes).convert_to_f32_slice(weights),
    }
}
