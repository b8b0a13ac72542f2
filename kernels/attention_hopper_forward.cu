// Forward of attention on Hopper; see attention_hopper.cuh.
#include "attention_hopper.cuh"

__device__ u32 forward_ticket;

// The largest score and the sum so far of a thread's two rows.
struct Softmax {
    float max[2], sum[2], rescale[2];
    __device__ __forceinline__ Softmax() {
        max[0] = max[1] = -INFINITY_F32;
        sum[0] = sum[1] = 0.0f;
    }

    // Scores become exponentials relative to the largest so far; what was summed before must be rescaled.
    template <int HALF> __device__ __forceinline__ void step(float (&s)[HALF], float log2_scale) {
        float shift[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float new_max = max[i];
#pragma unroll
            for (int e = 2 * i; e < HALF; e += 4) new_max = fmaxf(new_max, fmaxf(s[e], s[e + 1]));
            new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 1));
            new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 2));
            // A row that has seen no key yet keeps zeros: its maximum stands for 0.
            shift[i] = new_max == -INFINITY_F32 ? 0.0f : new_max * log2_scale;
            rescale[i] = exp2_fast(max[i] * log2_scale - shift[i]);
            max[i] = new_max;
            sum[i] *= rescale[i];
        }
#pragma unroll
        for (int e = 0; e < HALF; e++) {
            s[e] = exp2_fast(s[e] * log2_scale - shift[e / 2 % 2]);
            sum[e / 2 % 2] += s[e];
        }
    }
};

// One pass over the keys. The scores of a tile are computed beside the product of the probabilities of the tile before it with its
// values, and the two warpgroups take turns to start products.
template <int D>
__device__ void forward(Act *out, float *lse, const TensorMap &q_map, const TensorMap &k_map, const TensorMap &v_map,
                        const u32 *positions, int tokens, int num_heads, int num_kv_heads, int past, int max_reach, float scale) {
    const int KEYS = 128, STAGES = 2;
    typedef ForQueries<D, KEYS, STAGES, 1> Block;
    typedef typename Block::Rows Rows;
    typedef typename Block::Keys Keys;
    __shared__ int drawn;
    Block block(tokens, num_heads);
    bool computes = divide_block<40, 232>([&]() {
        if (threadIdx.x == 0)
            block.produce(&forward_ticket, &drawn, {&q_map}, k_map, v_map, positions, num_heads / num_kv_heads, past,
                          max_reach);
    });
    if (!computes) return;
    Place place;
    Ring<STAGES> stage;
    float log2_scale = scale * LOG2_E;
    if (place.warpgroup == 1) named_arrive(1, CONSUMERS);
    for (u32 parity = 0;; parity ^= 1) {
        int work = next_work(block.rows_full(), parity, drawn);
        if (work < 0) break;
        int head = block.head(work), first_row = block.first_row(work), row = first_row + place.row;
        int first_key = uniform(past + first_row - reach(positions, first_row, max_reach)), key = past + first_row + ROWS - KEYS;
        Sight sight(positions, max_reach, first_row + place.warp_row, row, tokens, past);
        Softmax softmax;
        float acc[D / 2], s[KEYS / 2];
        u32 p[KEYS / 16][4];
        auto scores = [&](u32 at) {
            multiply_transposed<D, Rows, Keys>(s, block.shared, place.warpgroup * 64, block.k(at));
        };
        barrier_wait(block.k_full(stage.index), stage.parity);
        products_begin();
        scores(stage.index);
        products_wait<0>();
        pin(s);
        barrier_arrive(block.k_empty(stage.index));
        sight.hide(s, key, place.column, -INFINITY_F32);
        softmax.step(s, log2_scale);
        round_scores(p, s);
        bool accumulate = false;
        for (key -= KEYS; key > first_key - KEYS; key -= KEYS, accumulate = true) {
            Ring<STAGES> before = stage;
            stage.next();
            barrier_wait(block.k_full(stage.index), stage.parity);
            named_wait(1 + place.warpgroup, CONSUMERS);
            products_begin();
            scores(stage.index);
            barrier_wait(block.v_full(before.index), before.parity);
            multiply<Keys>(acc, p, block.v(before.index), accumulate);
            named_arrive(2 - place.warpgroup, CONSUMERS);
            products_wait<1>();
            pin(s);
            barrier_arrive(block.k_empty(stage.index));
            sight.hide(s, key, place.column, -INFINITY_F32);
            softmax.step(s, log2_scale);
            products_wait<0>();
            pin(acc);
            barrier_arrive(block.v_empty(before.index));
#pragma unroll
            for (int e = 0; e < D / 2; e++) acc[e] *= softmax.rescale[e / 2 % 2];
            round_scores(p, s);
        }
        barrier_arrive(block.rows_empty());
        barrier_wait(block.v_full(stage.index), stage.parity);
        products_begin();
        multiply<Keys>(acc, p, block.v(stage.index), accumulate);
        products_wait<0>();
        pin(acc);
        barrier_arrive(block.v_empty(stage.index));
        stage.next();
        float reciprocal[2];
        for (int i = 0; i < 2; i++) {
            float sum = softmax.sum[i];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            reciprocal[i] = 1.0f / sum;
            if (place.column == 0 && row + 8 * i < tokens)
                lse[(u64)(row + 8 * i) * num_heads + head] = softmax.max[i] * scale + logf(sum);
        }
        store_rows(out + head * D, acc, row, place.column, tokens, num_heads * D, reciprocal[0], reciprocal[1]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_hopper_forward(Act *out, float *lse, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                             const __grid_constant__ TensorMap v, const u32 *positions, int tokens, int num_heads,
                             int num_kv_heads, int past, int max_reach, float scale) {
    forward<HEAD_DIM>(out, lse, q, k, v, positions, tokens, num_heads, num_kv_heads, past, max_reach, scale);
}
