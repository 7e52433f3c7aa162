// A token as the lanes of a warp hold it in the kernel `append` of append_cuda.cu -> its codes and range: with minima,
// symmetric, and uneven.

#pragma once

// Pack the B bits from bit `shift` on of each code in scratch.
template <int B>
__device__ __forceinline__ void pack_words(const u8 *scratch, int shift, u16 *words, int lane) {
    constexpr int COUNT = D * B / 16;
#pragma unroll
    for (int w = lane; w < COUNT; w += 32) {
        u32 word = 0;
#pragma unroll
        for (int j = 0; j < 16 / B; j++) word |= (u32)(scratch[j * COUNT + w] >> shift) << B * j;
        words[w] = (u16)word;
    }
}

// Quantize to B bits. The upper BODY bits of a code go to `codes`, the others, if any, to `lower`, WIDTH bits each.
template <int B, int BODY, int WIDTH>
__device__ __forceinline__ void quantize(const float (&x)[N], float clip, u8 *scratch, u16 *codes, u16 *range,
                                         u16 *lower, int lane) {
    constexpr int TOP = (1 << B) - 1, SIZE = D / GROUPS;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        float low = INFINITY, high = -INFINITY;
        bool broken = false;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int channel = lane + 32 * i;
            if (channel < D && channel / SIZE == g)
                low = fminf(low, x[i]), high = fmaxf(high, x[i]), broken |= x[i] != x[i];
        }
#pragma unroll
        for (int h = 16; h; h /= 2) {
            low = fminf(low, __shfl_xor_sync(ALL, low, h));
            high = fmaxf(high, __shfl_xor_sync(ALL, high, h));
        }
        broken = __any_sync(ALL, broken);
        low = broken ? NAN : low * clip, high = broken ? NAN : high * clip;
        float scale = high / TOP - low / TOP;
        scale = scale < SCALE_FLOOR ? SCALE_FLOOR : scale;
        const u16 scale_half = saturated(scale), low_half = saturated(low);
        scale = from_half(scale_half), low = from_half(low_half);
        if (lane == 0) range[g] = scale_half, range[GROUPS + g] = low_half;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int channel = lane + 32 * i;
            if (channel < D && channel / SIZE == g) {
                // fmaxf makes 0 of NaN
                const float code = fminf(fmaxf(rintf((x[i] - low) / scale), 0.f), (float)TOP);
                scratch[channel] = (u8)(int)code;
            }
        }
    }
    __syncwarp();
    pack_words<BODY>(scratch, B - BODY, codes, lane);
    if (WIDTH) {
        __syncwarp();
        for (int i = lane; i < D; i += 32) scratch[i] &= (1 << (B - BODY)) - 1;
        __syncwarp();
        pack_words<WIDTH ? WIDTH : 8>(scratch, 0, lower, lane);
    }
    __syncwarp();
}

// Quantize registers [FROM, TO) of a token to B bits with levels around zero; SIZE of their numbers are members of the
// group, the others are not. Members' codes are filled in. Returns the scale.
template <int B, int SIZE, int FROM, int TO>
__device__ __forceinline__ u16 encode_symmetric(const float (&x)[N], const bool (&member)[N], int (&codes)[N]) {
    constexpr float MIDDLE = ((1 << B) - 1) * .5f;
    float length = 0.f, along = 0.f;
#pragma unroll
    for (int i = FROM; i < TO; i++)
        if (member[i]) length += x[i] * x[i];
    length = warp_sum(length);
    float step = (B == 2 ? STEP_2 : STEP_4) * sqrtf(length / SIZE);
    step = step == 0.f ? 1.f : step;
#pragma unroll
    for (int i = FROM; i < TO; i++)
        if (member[i]) {
            const float code = fminf(fmaxf(rintf(x[i] / step + MIDDLE), 0.f), 2 * MIDDLE);  // fmaxf makes 0 of NaN
            along += x[i] * (code - MIDDLE), codes[i] = (int)code;
        }
    along = warp_sum(along);
    return saturated(length == 0.f ? 0.f : length / along);
}

// quantize, of a symmetric layout.
template <int B>
__device__ __forceinline__ void quantize_symmetric(const float (&x)[N], u8 *scratch, u16 *words, u16 *range, int lane) {
    bool member[N];
    int codes[N] = {};
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
#pragma unroll
        for (int i = 0; i < N; i++) member[i] = lane + 32 * i < D && (lane + 32 * i) / (D / GROUPS) == g;
        const u16 scale = encode_symmetric<B, D / GROUPS, 0, N>(x, member, codes);
        if (lane == 0) range[g] = scale;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        if (lane + 32 * i < D) scratch[lane + 32 * i] = (u8)codes[i];
    __syncwarp();
    pack_words<B>(scratch, 0, words, lane);
    __syncwarp();
}

// quantize, of an uneven layout: slots are high and low codes of the first part, then codes of the middle.
__device__ __forceinline__ void quantize_uneven(const float (&x)[N], u8 *scratch, u16 *words, u16 *range, int lane) {
    bool member[N];
    int codes[N] = {};
#pragma unroll
    for (int i = 0; i < N; i++) member[i] = channel_of(i, lane) < D;
    const u16 fine = encode_symmetric<4, FIRST, 0, N_FIRST>(x, member, codes);
    const u16 coarse = encode_symmetric<2, 2 * FIRST, N_FIRST, N_FIRST + N_MIDDLE>(x, member, codes);
    if (lane == 0) range[0] = fine, range[1] = coarse;
#pragma unroll
    for (int i = 0; i < N_FIRST + N_MIDDLE; i++) {
        const int channel = channel_of(i, lane);
        if (channel >= D) continue;
        if (i < N_FIRST)
            scratch[channel] = (u8)(codes[i] >> 2), scratch[FIRST + channel] = (u8)(codes[i] & 3);
        else
            scratch[FIRST + channel] = (u8)codes[i];
    }
    __syncwarp();
    pack_words<2>(scratch, 0, words, lane);
    __syncwarp();
}
