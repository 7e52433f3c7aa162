// Means of blocks of keys in the kernel `append` of append_cuda.cu; which tokens a mean is of: kernels/blocks.py.

#pragma once

// The number of the state that counts warps where one token begins a block, 0 before and after: the one that layouts
// with a text overlay have for this, else that of the overlay.
constexpr int COUNTER = TEXT_BITS ? 3 + MOVED : 2;
constexpr float LARGEST = DTYPE == 0 ? 65504.f : DTYPE == 1 ? 0x1.FEp127f : 0x1.FFFFFEp127f;  // of the tokens' dtype

// 64 times the block of an appended token, less its position.
__device__ __forceinline__ int shift_of(const Params &p) { return MOVED ? p.state[3] : 0; }

// One token, written to `slot`, is the first of its block. Of more tokens the means stand there before.
__device__ __forceinline__ bool begins_block(const Params &p, int slot) {
    return p.tokens == 1 && (slot + shift_of(p)) % BLOCK == 0 && slot >= 0 && slot < p.capacity;
}

// The block of the token at `slot`, which it has from an earlier write or will have by this one.
__device__ __forceinline__ int block_of(const Params &p, int batch, int slot) {
    return MOVED ? p.block_of[(i64)batch * p.capacity + slot] : slot / BLOCK;
}

__device__ __forceinline__ float finite(float x) { return fabsf(x) < INFINITY ? x : 0.f; }

// The mean of the block that begins with a token x at `slot`: of x and the tokens of the BLOCK - 1 positions before it
// that the ring holds. Called before x is written there.
__device__ __forceinline__ void begin_block(const Params &p, i64 lead, int batch, int slot, u8 kind,
                                            const float (&x)[N], float (&mean)[N], int lane) {
    const int end = p.state[0], newest = min(slot, end), oldest = slot - (BLOCK - 1);
    const int held = max(max(p.state[1], end - p.window), 0);  // first position of the ring
    u64 real = 0;                                              // a bit for each position from `oldest` on
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int position = oldest + 32 * half + lane;
        bool is_real = p.window && position >= held && position < newest;
        if (is_real) is_real = p.classes[(i64)batch * p.capacity + position] != PADDING;
        real |= (u64)__ballot_sync(ALL, is_real) << 32 * half;
    }
    const bool own = kind != PADDING;
    const int count = __popcll(real) + own;
#pragma unroll
    for (int i = 0; i < N; i++) mean[i] = own ? finite(x[i]) : 0.f;
#pragma unroll 7
    for (int j = 0; j < (p.window ? BLOCK - 1 : 0); j++) {  // slots that do not count are loaded too: no load waits
        const i64 from = (lead * p.window + max(oldest + j, 0) % p.window) * D;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float x = channel_of(i, lane) < D ? read(p.ring, from + channel_of(i, lane)) : 0.f;
            mean[i] += real >> j & 1 ? finite(x) : 0.f;
        }
    }
    const i64 to = (lead * p.blocks + (slot + shift_of(p)) / BLOCK) * D;
    const i64 before = slot ? (lead * p.blocks + block_of(p, batch, slot - 1)) * D : 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int channel = channel_of(i, lane);
        if (channel >= D) continue;
        mean[i] = rounded(fminf(fmaxf(mean[i] / count, -LARGEST), LARGEST));
        if (count < ENOUGH) mean[i] = slot ? read(p.means, before + channel) : 0.f;
        write(p.means, to + channel, mean[i]);
    }
}

// The mean of the block of a token x, which goes to `slot`.
__device__ __forceinline__ void mean_of_block(const Params &p, i64 lead, int batch, int slot, u8 kind,
                                              const float (&x)[N], float (&mean)[N], int lane) {
    if (begins_block(p, slot)) {
        begin_block(p, lead, batch, slot, kind, x, mean, lane);
        return;
    }
    const i64 from = (lead * p.blocks + block_of(p, batch, slot)) * D;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int channel = channel_of(i, lane);
        mean[i] = channel < D ? read(p.means, from + channel) : 0.f;
    }
}

// Where one token begins a block, all warps read the state, so only the last of them may change it.
__device__ __forceinline__ bool last_to_arrive(const Params &p, int lane) {
    __syncwarp();
    int before = 0;
    if (lane == 0) {
        __threadfence();
        before = atomicAdd(p.state + COUNTER, 1);
        __threadfence();
    }
    before = __shfl_sync(ALL, before, 0);
    if (before + 1 < p.batch * p.heads) return false;
    if (lane == 0) p.state[COUNTER] = 0;
    return true;
}
