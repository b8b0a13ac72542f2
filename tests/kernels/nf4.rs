//! Records to weights and weights to codes, to the bit.

use fsdp_qlora::testing::{Dtype, Encoding, double, nf4};

use super::*;

pub fn dequantize_is_exact<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    fn run<D: Ops>(d: &D, records: &[u8], len: usize, encoding: Encoding) -> [Vec<f32>; 2]
    where
        D::Act: Into<f32>,
    {
        let records = put(d, records);
        let (mut act, mut f32s) = (buffer(d, len), buffer(d, len));
        d.dequantize(vec![Dequantize { weights: act.view_mut(), records: records.view(), encoding }]).unwrap();
        d.dequantize_f32(vec![Dequantize { weights: f32s.view_mut(), records: records.view(), encoding }]).unwrap();
        [get_act(d, &act), get(d, &f32s)]
    }
    for len in [1, 63, 64, 65, 16_383, 16_384, 16_385, 576 * 1536 + 7, 4096 * 4096].into_iter().filter(|&n| is_run(n)) {
        let weights = random(len, 0.02, len as u64);
        for double_quant in [false, true] {
            let encoding = Encoding::Nf4 { double_quant };
            let read = |first: usize, out: &mut [f32]| {
                out.copy_from_slice(&weights[first..first + out.len()]);
                Ok(())
            };
            let tensor = nf4::quantize(len, double_quant, read).unwrap();
            let mut records = vec![0u8; encoding.tensor_bytes(len)];
            tensor.write_records(&mut records).unwrap();
            compare::<A>(&run(&cuda, &records, len, encoding), &run(&Cpu::new(1), &records, len, encoding));
        }
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let encoding = Encoding::Plain(dtype);
            let mut records = vec![0u8; encoding.tensor_bytes(len)];
            for (record, weights) in records.chunks_mut(encoding.parts(16_384).bytes).zip(weights.chunks(16_384)) {
                for (i, &w) in weights.iter().enumerate() {
                    match dtype {
                        Dtype::F32 => record[4 * i..4 * i + 4].copy_from_slice(&w.to_le_bytes()),
                        Dtype::F16 => record[2 * i..2 * i + 2].copy_from_slice(&half::f16::from_f32(w).to_le_bytes()),
                        Dtype::Bf16 => record[2 * i..2 * i + 2].copy_from_slice(&bf16::from_f32(w).to_le_bytes()),
                    }
                }
            }
            compare::<A>(&run(&cuda, &records, len, encoding), &run(&Cpu::new(1), &records, len, encoding));
        }
    }
    fn compare<A: Tested>([act, f32s]: &[Vec<f32>; 2], [_, reference]: &[Vec<f32>; 2]) {
        assert!(f32s == reference, "f32 weights of {}", f32s.len());
        assert!(act.iter().zip(reference).all(|(a, &r)| *a == rounded::<A>(r)), "16-bit weights of {}", act.len());
    }
}

/// Tensors of several encodings, more than one launch takes, give what each gives by itself.
pub fn tensors_are_dequantized_together<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    let nf4 = |double_quant| Encoding::Nf4 { double_quant };
    let lens = [40_000, 64, 16_384, 7, 0, 32_768, 100, 16_385, 5, 49_153, 128];
    let mut tensors: Vec<(usize, Encoding)> = lens.map(|len| (len, nf4(true))).to_vec();
    for (i, len) in [24_583, 16_384, 0, 130].into_iter().enumerate() {
        tensors.insert(9 + i, (len, Encoding::Plain(Dtype::Bf16)));
    }
    tensors.extend([(33_000, nf4(false)), (99, nf4(true))]);
    let bytes = |i: usize, len: usize, encoding: Encoding| -> Vec<u8> {
        let mut records = vec![0u8; encoding.tensor_bytes(len)];
        let weights = random(len, 0.02, i as u64 + 1);
        let Encoding::Nf4 { double_quant } = encoding else {
            // Whole records take 2 bytes a weight and no more.
            for (two, &w) in records.chunks_mut(2).zip(&weights) {
                two.copy_from_slice(&bf16::from_f32(w).to_le_bytes());
            }
            return records;
        };
        let read = |first: usize, out: &mut [f32]| {
            out.copy_from_slice(&weights[first..first + out.len()]);
            Ok(())
        };
        nf4::quantize(len, double_quant, read).unwrap().write_records(&mut records).unwrap();
        records
    };
    let on_gpu = |&(i, (len, encoding)): &(usize, (usize, Encoding))| put(&cuda, &bytes(i, len, encoding));
    let listed: Vec<(usize, (usize, Encoding))> = tensors.into_iter().enumerate().collect();
    let records: Vec<Buffer<Cuda<A>, u8>> = listed.iter().map(on_gpu).collect();
    let weights = |len| put_act(&cuda, &vec![1.0; len]);
    let mut together: Vec<Buffer<Cuda<A>, A>> = listed.iter().map(|&(_, (len, _))| weights(len)).collect();
    let parts = together.iter_mut().zip(&records).zip(&listed).map(|((weights, records), &(_, (_, encoding)))| {
        Dequantize { weights: weights.view_mut(), records: records.view(), encoding }
    });
    cuda.dequantize(parts.collect()).unwrap();
    for ((&(i, (len, encoding)), records), together) in listed.iter().zip(&records).zip(&together) {
        let mut alone = weights(len);
        let part = Dequantize { weights: alone.view_mut(), records: records.view(), encoding };
        cuda.dequantize(vec![part]).unwrap();
        assert!(get_act(&cuda, together) == get_act(&cuda, &alone), "tensor {i}");
    }
}

pub fn quantize_is_exact<A: Tested>() {
    let (_guard, cuda) = gpu::<A>();
    fn run<D: Ops>(d: &D, weights: &[f32]) -> (Vec<u8>, Vec<f32>, Vec<u8>, Vec<f32>) {
        let (n, blocks) = (weights.len(), weights.len().div_ceil(64));
        let weights = put(d, weights);
        let (mut codes, mut absmax) = (buffer(d, n.div_ceil(2)), buffer(d, blocks));
        let args = QuantizeNf4 { codes: codes.view_mut(), absmax: absmax.view_mut(), weights: weights.view() };
        d.quantize_nf4(args).unwrap();
        let (mut absmax_codes, mut nested) = (buffer(d, blocks), buffer(d, blocks.div_ceil(256)));
        d.quantize_absmax(QuantizeAbsmax {
            codes: absmax_codes.view_mut(),
            nested_absmax: nested.view_mut(),
            absmax: absmax.view(),
            offset: double::mean(&get(d, &absmax)),
        })
        .unwrap();
        (get(d, &codes), get(d, &absmax), get(d, &absmax_codes), get(d, &nested))
    }
    for len in [1, 2, 63, 64, 65, 16_383, 16_385, 576 * 1536 + 7, 4096 * 4096].into_iter().filter(|&n| is_run(n)) {
        let mut weights = random(len, 0.02, len as u64);
        // A block of zeros, and values that are ties of neighbouring codes.
        if len > 256 {
            weights[64..128].fill(0.0);
            weights[128..192].iter_mut().enumerate().for_each(|(i, w)| *w = (i as f32 - 31.0) / 32.0);
        }
        assert!(run(&cuda, &weights) == run(&Cpu::new(1), &weights), "{len} weights");
    }
}
