// Turns records into dense weights (src/quant/record.rs has the byte layout). One block a record of up to 16,384
// weights.
#include "common.cuh"

static const u32 BLOCK = 64, RECORD_WEIGHTS = 16384;

// The number that stands for the type of activations among the dtypes of plain records.
#ifdef ACT_F16
static const u32 ACT_DTYPE = 1;
#else
static const u32 ACT_DTYPE = 2;
#endif

__device__ __forceinline__ void store(Act *y, float value) { *y = to_act(value); }
__device__ __forceinline__ void store(float *y, float value) { *y = value; }

__device__ __forceinline__ u32 align16(u32 bytes) { return (bytes + 15) / 16 * 16; }

// A tensor's records, or some of them, and its weights.
template <typename T>
struct Part {
    T *weights;
    const u8 *records;
    u64 num_weights;
};

// Half of the parts of a launch (`DEQUANTIZED_TOGETHER` in src/device/cuda/nf4.rs); `Arg` in launch.rs has no room for more than five.
template <typename T>
struct Parts {
    Part<T> at[4];
};

// The part that a block works on, and the number of its record there. The records of up to eight parts follow each other in the grid: a
// block finds its part by counting; parts without weights have no block.
template <typename T>
__device__ __forceinline__ Part<T> find_part(const Parts<T> &some, const Parts<T> &others, u32 &index) {
    Part<T> part = some.at[0];
    index = blockIdx.x;
#pragma unroll
    for (int i = 1; i < 8; i++) {
        u32 num_records = (u32)((part.num_weights + RECORD_WEIGHTS - 1) / RECORD_WEIGHTS);
        if (index >= num_records) {
            index -= num_records;
            part = i < 4 ? some.at[i % 4] : others.at[i % 4];
        }
    }
    return part;
}

__device__ __forceinline__ float code_to_weight(const float *codebook, u32 bytes, int j, float scale) {
    u32 nibble = bytes >> (j / 2 * 8 + (j % 2 ? 0 : 4)) & 15;
    return __fmul_rn(codebook[nibble], scale);
}

// Eight weights from four bytes of codes.
template <typename T>
__device__ __forceinline__ void store_eight(T *out, u32 bytes, float scale, const float *codebook) {
    float values[8];
    for (int j = 0; j < 8; j++) values[j] = code_to_weight(codebook, bytes, j, scale);
    if (sizeof(T) == 2) {
        uint4 packed = {pack_act(values[0], values[1]), pack_act(values[2], values[3]), pack_act(values[4], values[5]),
                        pack_act(values[6], values[7])};
        *(uint4 *)out = packed;
    } else {
        for (int j = 0; j < 8; j++) store(out + j, values[j]);
    }
}

// w = code · absmax, absmax = map[u8] · nested_absmax + offset, each product and sum rounded to f32 by itself: bitsandbytes
// dequantizes the absmax in one kernel, adds the offset in another, and multiplies in a third.
// codebook [16], map [256]: uploaded once by the host. A thread takes eight weights at a time. Where a record is whole, it reads all its
// codes before it waits for the absmax.
template <typename T>
__device__ void dequantize_nf4_records(const Parts<T> &some, const Parts<T> &others, u64 record_bytes, u32 double_quant,
                                       const float *codebook, const float *map) {
    static const u32 THREADS = 256, ROUNDS = RECORD_WEIGHTS / 8 / THREADS;
    __shared__ float codes_to_f32[16];
    __shared__ float absmax[RECORD_WEIGHTS / BLOCK];
    u32 index;
    Part<T> part = find_part(some, others, index);
    u64 first = (u64)index * RECORD_WEIGHTS;
    u32 count = (u32)(part.num_weights - first < RECORD_WEIGHTS ? part.num_weights - first : RECORD_WEIGHTS);
    u32 num_blocks = (count + BLOCK - 1) / BLOCK;
    const u8 *record = part.records + index * record_bytes;
    const u8 *codes = record + (double_quant ? align16(16 + num_blocks) : align16(4 * num_blocks));
    T *out = part.weights + first;
    bool is_whole = count == RECORD_WEIGHTS;
    u32 bytes[ROUNDS];
    if (is_whole) {
#pragma unroll
        for (int k = 0; k < ROUNDS; k++) bytes[k] = ((const u32 *)codes)[threadIdx.x + k * THREADS];
    }
    if (threadIdx.x < 16) codes_to_f32[threadIdx.x] = codebook[threadIdx.x];
    if (double_quant) {
        float scale = ((const float *)record)[0], offset = ((const float *)record)[1];
        for (u32 i = threadIdx.x; i < num_blocks; i += THREADS) absmax[i] = __fadd_rn(__fmul_rn(map[record[16 + i]], scale), offset);
    } else {
        for (u32 i = threadIdx.x; i < num_blocks; i += THREADS) absmax[i] = ((const float *)record)[i];
    }
    __syncthreads();
    if (is_whole) {
#pragma unroll
        for (int k = 0; k < ROUNDS; k++) {
            u32 i = (threadIdx.x + k * THREADS) * 8;
            store_eight(out + i, bytes[k], absmax[i / BLOCK], codes_to_f32);
        }
        return;
    }
    u32 whole = count / 8 * 8;
    for (u32 i = threadIdx.x * 8; i < whole; i += THREADS * 8) {
        store_eight(out + i, *(const u32 *)(codes + i / 2), absmax[i / BLOCK], codes_to_f32);
    }
    for (u32 i = whole + threadIdx.x; i < count; i += THREADS) {
        store(out + i, code_to_weight(codes_to_f32, codes[i / 2], i % 2, absmax[i / BLOCK]));
    }
}

__device__ __forceinline__ float plain_weight(const u8 *record, u32 at, u32 dtype) {
    if (dtype == 0) return ((const float *)record)[at];
    u16 bits = ((const u16 *)record)[at];
    return dtype == 1 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

// at is a multiple of eight.
__device__ __forceinline__ Float8 eight_plain_weights(const u8 *record, u32 at, u32 dtype) {
    if (dtype == 0) return ((const Float8 *)record)[at / 8];
    Act8 bits = ((const Act8 *)record)[at / 8];
    Float8 values;
    for (int j = 0; j < 8; j++) values.at[j] = dtype == 1 ? f16_to_f32(bits.at[j].bits) : bf16_to_f32(bits.at[j].bits);
    return values;
}

// Records of plain weights: dtype 0 f32, 1 f16, 2 bf16. A thread takes eight weights at a time. Weights of the type of activations are
// copied.
template <typename T>
__device__ void convert_records(const Parts<T> &some, const Parts<T> &others, u64 record_bytes, u32 dtype) {
    u32 index;
    Part<T> part = find_part(some, others, index);
    u64 first = (u64)index * RECORD_WEIGHTS;
    u32 count = (u32)(part.num_weights - first < RECORD_WEIGHTS ? part.num_weights - first : RECORD_WEIGHTS);
    const u8 *record = part.records + index * record_bytes;
    T *out = part.weights + first;
    for (u32 i = threadIdx.x * 8; i < count; i += blockDim.x * 8) {
        if (count - i < 8) {
            for (u32 j = i; j < count; j++) store(out + j, plain_weight(record, j, dtype));
        } else if (sizeof(T) == 2 && dtype == ACT_DTYPE) {
            *(uint4 *)(out + i) = *(const uint4 *)(record + i * 2);
        } else {
            Float8 values = eight_plain_weights(record, i, dtype);
            for (int j = 0; j < 8; j++) store(out + i + j, values.at[j]);
        }
    }
}

extern "C" __global__ void dequantize_nf4(Parts<Act> some, Parts<Act> others, u64 record_bytes, u32 double_quant,
                                          const float *codebook, const float *map) {
    dequantize_nf4_records(some, others, record_bytes, double_quant, codebook, map);
}

extern "C" __global__ void dequantize_nf4_f32(Parts<float> some, Parts<float> others, u64 record_bytes, u32 double_quant,
                                              const float *codebook, const float *map) {
    dequantize_nf4_records(some, others, record_bytes, double_quant, codebook, map);
}

extern "C" __global__ void convert(Parts<Act> some, Parts<Act> others, u64 record_bytes, u32 dtype) {
    convert_records(some, others, record_bytes, dtype);
}

extern "C" __global__ void convert_f32(Parts<float> some, Parts<float> others, u64 record_bytes, u32 dtype) {
    convert_records(some, others, record_bytes, dtype);
}

// Codes and absmax of the blocks of a tensor, as bitsandbytes' kQuantizeBlockwise finds them: the code of w is the number of
// thresholds [15] below w · (1 / absmax). One warp a block, one byte a lane.
extern "C" __global__ void quantize_nf4(u8 *codes, float *absmax, const float *weights, u64 num_weights, const float *thresholds) {
    u64 block = thread_idx() / 32, first = block * BLOCK;
    u32 lane = threadIdx.x % 32;
    if (first >= num_weights) return;
    u64 at = first + 2 * lane;
    float pair[2] = {at < num_weights ? weights[at] : 0.0f, at + 1 < num_weights ? weights[at + 1] : 0.0f};
    float largest = fmaxf(fabsf(pair[0]), fabsf(pair[1]));
    for (int offset = 16; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    if (lane == 0) absmax[block] = largest;
    float reciprocal = __fdiv_rn(1.0f, largest);
    u32 code[2] = {0, 0};
    for (int i = 0; i < 15; i++) {
        code[0] += __fmul_rn(pair[0], reciprocal) > thresholds[i];
        code[1] += __fmul_rn(pair[1], reciprocal) > thresholds[i];
    }
    // An odd count leaves a low nibble that stands for no weight: 7, the code of zero.
    if (at + 1 >= num_weights) code[1] = 7;
    if (at < num_weights) codes[at / 2] = (u8)(code[0] << 4 | code[1]);
}

// absmax − offset in 8 bits, superblocks of 256 that share their largest magnitude: one thread block each, of 256 threads.
extern "C" __global__ void quantize_absmax(u8 *codes, float *nested_absmax, const float *absmax, u64 num_blocks, float offset,
                                           const float *map) {
    __shared__ float values[256];
    values[threadIdx.x] = map[threadIdx.x];
    u64 i = thread_idx();
    float centered = i < num_blocks ? __fsub_rn(absmax[i], offset) : 0.0f;
    float scale = block_max(fabsf(centered));
    if (threadIdx.x == 0) nested_absmax[blockIdx.x] = scale;
    if (i >= num_blocks) return;
    // The path of bitsandbytes' binary search, which decides ties.
    float x = __fmul_rn(centered, __fdiv_rn(1.0f, scale));
    int lower = 0, pivot = 127, upper = 255;
    for (int step = 64; step > 0; step /= 2) {
        if (x > values[pivot]) {
            lower = pivot;
            pivot += step;
        } else {
            upper = pivot;
            pivot -= step;
        }
    }
    int code = pivot;
    if (x > values[pivot]) {
        if (x > __fmul_rn(__fadd_rn(values[upper], values[pivot]), 0.5f)) code = upper;
    } else if (x < __fmul_rn(__fadd_rn(values[lower], values[pivot]), 0.5f)) {
        code = lower;
    }
    codes[i] = (u8)code;
}
