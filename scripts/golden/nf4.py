"""tests/golden/nf4.safetensors: weights quantized to NF4 by bitsandbytes on the CPU; with `cuda` as argument, on a GPU:
tests/golden/nf4_cuda.safetensors.

Per case, n weights in blocks of 64 (nb blocks):
  weight              f32 or bf16, two-dimensional
  codes               u8 [(n+1)/2, 1], first weight in the high nibble
  absmax              f32 [nb]: without double quantization
  dq.absmax           u8 [nb]: with double quantization (the same codes); dq.nested_absmax f32 [ceil(nb/256)]; dq.offset f32 [1]
  dq.nearest          u8 [nb]: dq.absmax as rounding to the nearest code gives it (numpy, from dq.offset)
  dequantized         f32, shape of weight, from codes and absmax
  dq.dequantized      f32, shape of weight, from codes and dq.absmax as bitsandbytes rounded them; on a GPU by its own kernels
and `dynamic_map` f32 [256], `codebook` f32 [16].

bitsandbytes' CPU code stores nibble 7 in an all-zero block where its CUDA code stores 0, and divides in a short last block
where CUDA multiplies with the reciprocal: compare those dequantized.
"""

import sys

import bitsandbytes.functional as bnb
import numpy as np
import torch
from common import folder, normal, write_tensors

BLOCK, SUPERBLOCK = 64, 256


def cases():
    """Name -> weight."""
    codebook = bnb.get_4bit_type("nf4", device="cpu")
    thresholds = ((codebook[1:] + codebook[:-1]) / 2).float()
    outliers = normal(2, 32, 64)
    outliers[::5, 7] *= 100.0
    zero_block = normal(3, 8, 64)
    zero_block[3] = 0.0
    zero_block[5, :63] = 0.0
    one_ulp = torch.tensor(float("inf"))
    around = torch.cat([thresholds, torch.nextafter(thresholds, one_ulp), torch.nextafter(thresholds, -one_ulp)])
    row = torch.cat([around, codebook, torch.tensor([0.0, -0.0, 1.0])])  # 64 weights, absmax 1
    ties = torch.stack([row, row * 0.25, -row * 2.0, row * 0.3])
    return {
        "normal_f32": normal(0, 96, 64, std=0.05),
        "normal_bf16": normal(1, 64, 64, std=0.05).bfloat16(),
        "outliers": outliers,
        "zero_block": zero_block,
        "two_superblocks": normal(4, 260, 64, std=0.02).bfloat16(),
        "ties": ties,
        "short_last_block": normal(5, 7, 27),
    }


def nearest_codes(absmax, offset, dynamic_map):
    """u8 codes of `absmax - offset` with superblocks of 256, rounded to nearest as kernels.cu's dQuantize does."""
    centered = absmax - offset
    codes = np.empty(len(centered), dtype=np.uint8)
    midpoints = (dynamic_map[1:] + dynamic_map[:-1]) * np.float32(0.5)
    for start in range(0, len(centered), SUPERBLOCK):
        x = centered[start : start + SUPERBLOCK]
        scale = np.float32(1.0) / np.abs(x).max()
        codes[start : start + SUPERBLOCK] = np.searchsorted(midpoints, x * scale)
    return codes


def dequantize(codes, absmax, codebook, shape):
    """Code times absmax in f32. (bitsandbytes' own is wrong on AVX-512 for rows that are no multiple of 64.)"""
    nibbles = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten()[: shape.numel()]
    return (codebook[nibbles.int()] * absmax.repeat_interleave(BLOCK)[: shape.numel()]).reshape(shape)


def one_case_on_gpu(weight):
    weight = weight.cuda()
    codes, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    dq_codes, dq = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    assert torch.equal(codes, dq_codes)
    state.dtype = dq.dtype = torch.float32
    case = {
        "weight": weight,
        "codes": codes,
        "absmax": state.absmax,
        "dq.absmax": dq.absmax,
        "dq.nested_absmax": dq.state2.absmax,
        "dq.offset": dq.offset.reshape(1),
        "dequantized": bnb.dequantize_4bit(codes, state),
        "dq.dequantized": bnb.dequantize_4bit(dq_codes, dq),
    }
    return {part: tensor.cpu() for part, tensor in case.items()}


def one_case(weight, codebook):
    codes, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    dq_codes, dq = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    dynamic_map = dq.state2.code
    nearest = nearest_codes(state.absmax.numpy(), dq.offset.numpy(), dynamic_map.numpy())
    scales = dq.state2.absmax.repeat_interleave(SUPERBLOCK)[: dq.absmax.numel()]
    dq_absmax = dynamic_map[dq.absmax.int()] * scales + dq.offset
    assert torch.equal(codes, dq_codes)
    return {
        "weight": weight,
        "codes": codes,
        "absmax": state.absmax,
        "dq.absmax": dq.absmax,
        "dq.nested_absmax": dq.state2.absmax,
        "dq.offset": dq.offset.reshape(1),
        "dq.nearest": torch.from_numpy(nearest),
        "dequantized": dequantize(codes, state.absmax, codebook, weight.shape),
        "dq.dequantized": dequantize(codes, dq_absmax, codebook, weight.shape),
    }


def main():
    if sys.argv[1:] == ["cuda"]:
        tensors = {f"{name}.{part}": tensor for name, weight in cases().items() for part, tensor in one_case_on_gpu(weight).items()}
        return write_tensors(folder() / "nf4_cuda.safetensors", tensors)
    codebook = bnb.get_4bit_type("nf4", device="cpu")
    tensors = {"codebook": codebook, "dynamic_map": bnb.create_dynamic_map()}
    for name, weight in cases().items():
        case = one_case(weight, codebook)
        tensors |= {f"{name}.{part}": tensor for part, tensor in case.items()}
        if weight.dtype == torch.float32 and weight.shape[1] % BLOCK == 0:
            own = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4"))
            assert torch.equal(own, case["dequantized"]), name
    write_tensors(folder() / "nf4.safetensors", tensors)


if __name__ == "__main__":
    main()
