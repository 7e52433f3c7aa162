// Scaled dot-product attention of a few query tokens over a packed cache; attend_cpu.py calls it.
//
// kernels/attend.py says what it computes, kernels/layout.py what is in the buffers. Plain C++17 with the vector
// extensions that GCC and clang share, and no header but the standard library's, so that it compiles in seconds on a
// user's machine.
//
// Positions are cut into chunks. In a chunk each position is read from one place, its owner: a fresh token, else the
// ring, else a pivot, else text, else the body. Owners are found once per batch row for the keys and once for the
// values. Scores and probabilities are stored by position, so keys and values may have different overlays. Softmax is
// computed online, in fp32, chunk by chunk. Where there are few heads, threads share the positions of a head, and their
// parts are merged at the end.
//
// R query rows (query heads of one cache head x tokens) share each code that is unpacked. G channel groups count as G
// rows, each with zeros outside of its group. `head` counts over batch and cache heads, `at` over chunks, `t` over
// tokens.

#include "attend_cpu.h"

#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }  // the pragmas below are ignored, one thread does it all
#endif

namespace {

// What one thread works with.
struct Scratch {
  Tile tile;
  float *q, *q_sum;    // rows times the softmax scale [R][D]; group sums of their slots [G][R]
  float* q_packed[2];  // BODY, TEXT: [G][R][codes of a token], in the order of the codes, 0 outside of g, weighted
  float *scores, *row;  // [R][stride], later probabilities; [D], of the cache or slots of a query
};

struct Plan {
  const Call& call;
  const Cache &key, &value;
  int64_t R, length, chunk, chunks, stride, out_stride, splits;
  Owners *key_owners, *value_owners;  // [B]
  uint8_t* used[2][2];                // [key, value][BODY, TEXT], see find_used
  Place* places[2];                   // BODY, TEXT of keys, [codes of a token]
  float *peak, *mass, *sums;          // [B * H * splits][R], the same, [..][R][out_stride]
  const Rotation &there, &middle, &back;  // of keys, or their first part where uneven; of its middle; of values

  Packed packed(const Cache& cache, int64_t head, int kind) const {
    const int64_t bits = kind == BODY ? cache.bits : cache.text_bits, D = cache.head_dim;
    const bool text = kind == TEXT && bits;
    return {cache.codes + head * cache.capacity * (D * cache.bits / 16),
            cache.range + head * cache.capacity * (cache.symmetric ? 1 : 2) * cache.groups,
            text ? cache.text_codes + head * cache.text_capacity * (D * cache.low_width / 16) : nullptr,
            bits, D, cache.groups, cache.bits, cache.low_width, cache.dtype == F16 && !cache.means,
            bool(cache.symmetric)};
  }

  void dense_row(const Cache& cache, int64_t head, int64_t slot, float* out) const {
    const int64_t D = cache.head_dim, pivot = slot - cache.window, fresh = pivot - cache.pivot_count;
    if (pivot < 0) load_row(cache.ring, cache.dtype, (head * cache.window + slot) * D, D, out);
    else if (fresh < 0) load_row(cache.pivots, cache.dtype, (head * cache.pivot_count + pivot) * D, D, out);
    else load_row(cache.fresh, cache.dtype, (head * call.fresh_count + fresh) * D, D, out);
  }

  // A query as the model made it -> as stored keys are asked (rotate.queries_reference). spare: [D]
  void rotate(float* q, int64_t head, float* spare) const {
    const int64_t D = key.head_dim, first = D / 4, rows = key.uneven ? ORDER + 1 : GAIN + 1;
    const auto map = [&](int64_t row, int64_t j) {
      return from_half(key.affine[((head / call.heads * rows + row) * call.heads + head % call.heads) * D + j]);
    };
    for (int64_t j = 0; key.affine && j < D; j++) q[j] *= map(GAIN, j);
    if (!key.uneven) return there.apply(q, D);
    std::copy(q, q + D, spare);
    for (int64_t j = 0; j < D; j++) q[j] = spare[int64_t(map(ORDER, j))];
    there.apply(q, first), middle.apply(q + first, 2 * first);
  }

  // With what a query asks the slots of a packed key.
  void slots_of(const float* q, float* slots) const {
    const int64_t D = key.head_dim, first = key.uneven ? D / 4 : 0;
    for (int64_t j = 0; j < first; j++) slots[j] = 4 * q[j];
    std::copy(q, q + D - first, slots + first);
  }

  void ask(Scratch& my, int64_t head) const {
    const int64_t D = key.head_dim, G = key.groups;
    for (int64_t r = 0; r < R; r++) {
      load_row(call.q, call.q_dtype, (head * R + r) * D, D, my.q + r * D);
      for (int64_t j = 0; j < D; j++) my.q[r * D + j] *= float(call.scale);
      if (call.rotate) rotate(my.q + r * D, head, my.row);
      slots_of(my.q + r * D, my.row);
      for (int64_t g = 0; g < G; g++) {
        const float* from = my.row + g * (D / G);
        my.q_sum[g * R + r] = 0;
        for (int64_t j = 0; j < D / G; j++) my.q_sum[g * R + r] += from[j];
      }
      for (int kind : {BODY, TEXT}) {
        const Packed source = packed(key, head, kind);
        const int64_t codes = source.bits ? source.columns() * source.per_column() : 0;
        for (int64_t g = 0; g < G; g++)
          for (int64_t i = 0; i < codes; i++) {
            const Place& place = places[kind][i];
            my.q_packed[kind][(g * R + r) * codes + i] = place.group == g ? my.row[place.channel] * place.weight : 0.0f;
          }
      }
    }
  }

  float product(const float* q, const float* k) const {
    Floats sum = {};
    int64_t j = 0;
    for (; j + LANES <= key.head_dim; j += LANES) sum += load<Floats>(q + j) * load<Floats>(k + j);
    float out = total(sum);
    for (; j < key.head_dim; j++) out += q[j] * k[j];
    return out;
  }

  // Of a head: the number at which the mean of a block starts.
  int64_t mean_at(int64_t head, int64_t block) const {
    return (head * ((key.capacity + key.block - 1) / key.block) + block) * key.head_dim;
  }

  void fetch_means(int64_t head, int64_t start, int64_t n) const {
    const int64_t size = key.dtype == F32 ? 4 : 2;
    const char* from = static_cast<const char*>(key.means) + mean_at(head, start / key.block) * size;
    for (int64_t i = 0; i < n / key.block * key.head_dim * size; i += 2 * LINE) __builtin_prefetch(from + i);
  }

  // What codes hold differs from the tokens by the mean of their block, so their scores gain q . mean. Scores of dense
  // tokens are written after this.
  void add_means(Scratch& my, int64_t head, int64_t start, int64_t n) const {
    const int64_t D = key.head_dim;
    for (int64_t t = 0, end; t < n; t = end) {
      const int64_t block = (start + t) / key.block;
      end = std::min(n, (block + 1) * key.block - start);
      load_row(key.means, key.dtype, mean_at(head, block), D, my.row);
      for (int64_t r = 0; r < R; r++) {
        const float gain = product(my.q + r * D, my.row);
        for (int64_t i = t; i < end; i++) my.scores[r * stride + i] += gain;
      }
    }
  }

  void score(Scratch& my, int64_t b, int64_t head, int64_t at) const {
    const Owners& owners = key_owners[b];
    const int64_t *count = owners.count[at], D = key.head_dim;
    if (key.means) fetch_means(head, at * chunk, chunk);
    const int32_t *slot = owners.slot + at * chunk, *position = owners.position + at * chunk;
    for (int kind : {BODY, TEXT}) {
      const int64_t n = count[kind];
      if (!n) continue;
      Tile& tile = my.tile;
      const Packed source = packed(key, head, kind);
      tile.fill(source, slot, position, at * chunk, n);
      if (source.bits == 2) dot_rows<2>(tile, source, R, my.q_packed[kind], used[0][kind]);
      else if (source.bits == 4) dot_rows<4>(tile, source, R, my.q_packed[kind], used[0][kind]);
      else dot_rows<8>(tile, source, R, my.q_packed[kind], used[0][kind]);
      for (int64_t r = 0; r < R; r++) {
        float* whole = tile.rows + r * stride;  // the first group's products become the scores
        for (int64_t g = 0; g < key.groups; g++) {
          const float *x = tile.rows + (g * R + r) * stride, q_sum = my.q_sum[g * R + r];
          const float *s = tile.scale + g * stride, *m = tile.lowest + g * stride;
          for (int64_t t = 0; t < n; t++) whole[t] = (g ? whole[t] : 0.0f) + (x[t] * s[t] + m[t] * q_sum);
        }
        float* to = my.scores + r * stride;
        if (position[n - 1] - position[0] == n - 1) std::memcpy(to + position[0], whole, 4 * n);
        else
          for (int64_t t = 0; t < n; t++) to[position[t]] = whole[t];
      }
      slot += n, position += n;
    }
    if (key.means) add_means(my, head, at * chunk, std::min(chunk, length - at * chunk));
    for (int64_t i = 0; i < count[DENSE]; i++) {
      dense_row(key, head, slot[i], my.row);
      for (int64_t r = 0; r < R; r++) my.scores[r * stride + position[i]] = product(my.q + r * D, my.row);
    }
  }

  void cap(float* scores, int64_t n) const {
    const Floats most = Floats{} + float(call.softcap);
    std::fill(scores + n, scores + round_up(n, LANES), 0.0f);
    for (int64_t t = 0; t < n; t += LANES) store(scores + t, most * hyperbolic_tangent(load<Floats>(scores + t) / most));
  }

  void hide(float* scores, int64_t b, int64_t query_head, int64_t token, int64_t start, int64_t n) const {
    const int64_t* step = call.mask_stride;
    if (call.is_causal)
      for (int64_t t = std::max<int64_t>(token + 1 - start, 0); t < n; t++) scores[t] = -INFINITE;
    if (!call.mask) return;
    const int64_t from = b * step[0] + query_head * step[1] + token * step[2] + start * step[3];
    if (call.mask_dtype == BOOL) {
      const uint8_t* seen = static_cast<const uint8_t*>(call.mask) + from;
      for (int64_t t = 0; t < n; t++) scores[t] = seen[t * step[3]] ? scores[t] : -INFINITE;
    } else if (call.mask_dtype == F32) {
      const float* bias = static_cast<const float*>(call.mask) + from;
      for (int64_t t = 0; t < n; t++)
        scores[t] = bias[t * step[3]] == -INFINITE ? -INFINITE : scores[t] + bias[t * step[3]];
    } else {
      for (int64_t t = 0; t < n; t++) {
        const float bias = element(call.mask, call.mask_dtype, from + t * step[3]);
        scores[t] = bias == -INFINITE ? -INFINITE : scores[t] + bias;
      }
    }
  }

  // Scores to probabilities relative to the row's peak so far; what was summed under an older peak shrinks.
  void weigh(float* scores, int64_t n, float& peak, float& mass, float* sums) const {
    const int64_t padded = round_up(n, LANES);
    std::fill(scores + n, scores + padded, -INFINITE);
    Floats most = Floats{} + peak, sum = {};
    for (int64_t t = 0; t < padded; t += LANES) {
      const Floats s = load<Floats>(scores + t);
      most = s > most ? s : most;  // a NaN never is
    }
    float lane[LANES];
    store(lane, most);
    const float now = *std::max_element(lane, lane + LANES);
    for (int64_t t = 0; t < padded; t += LANES) {
      const Floats s = load<Floats>(scores + t), none = Floats{};
      const Floats p = s == none - INFINITE ? none : exponential(s - now);
      store(scores + t, p), sum += p;
    }
    const float shrink = peak == now ? 1.0f : peak == -INFINITE ? 0.0f : std::exp(peak - now);
    mass = (mass ? mass * shrink : 0.0f) + total(sum);
    if (shrink != 1.0f)
      for (int64_t j = 0; j < out_stride; j++) sums[j] = sums[j] ? sums[j] * shrink : 0.0f;
    peak = now;
  }

  void gather(Scratch& my, int64_t b, int64_t head, int64_t at, float* sums) const {
    const Owners& owners = value_owners[b];
    const int64_t *count = owners.count[at], D = value.head_dim, G = value.groups;
    const int32_t *slot = owners.slot + at * chunk, *position = owners.position + at * chunk;
    for (int kind : {BODY, TEXT}) {
      const int64_t n = count[kind];
      if (!n) continue;
      Tile& tile = my.tile;
      const Packed source = packed(value, head, kind);
      tile.fill(source, slot, position, at * chunk, n);
      for (int64_t r = 0; r < R; r++) {
        const float* p = my.scores + r * stride + position[0];
        if (position[n - 1] - position[0] != n - 1) {
          float* near = tile.rows + (G * R) * stride;
          for (int64_t t = 0; t < n; t++) near[t] = p[position[t] - position[0]];
          p = near;
        }
        for (int64_t g = 0; g < G; g++) {
          const float *s = tile.scale + g * stride, *m = tile.lowest + g * stride;
          float* to = tile.rows + (g * R + r) * stride;
          Floats lowest = {};
          std::fill(to + n, to + tile.padded, 0.0f);
          for (int64_t t = 0; t < n; t++) to[t] = p[t];
          for (int64_t t = 0; t < tile.padded; t += LANES) {  // an unseen token must not bring its NaN in
            const Floats x = load<Floats>(to + t), none = {};
            lowest += x == none ? none : x * load<Floats>(m + t);
            store(to + t, x == none ? none : x * load<Floats>(s + t));
          }
          const float all = total(lowest);
          for (int64_t j = g * (D / G); j < (g + 1) * (D / G); j++) sums[r * out_stride + j] += all;
        }
      }
      if (source.bits == 2) gather_rows<2>(tile, source, R, used[1][kind], sums, out_stride);
      else if (source.bits == 4) gather_rows<4>(tile, source, R, used[1][kind], sums, out_stride);
      else gather_rows<8>(tile, source, R, used[1][kind], sums, out_stride);
      slot += n, position += n;
    }
    for (int64_t i = 0; i < count[DENSE]; i++) {
      dense_row(value, head, slot[i], my.row);
      for (int64_t r = 0; r < R; r++) {
        const float p = my.scores[r * stride + position[i]];
        float* to = sums + r * out_stride;
        if (p != 0)
          for (int64_t j = 0; j < D; j++) to[j] += p * my.row[j];
      }
    }
  }

  int64_t query_head_of(int64_t head, int64_t r) const {
    return head % call.heads * (R / call.tokens) + r / call.tokens;
  }

  // One head of one batch row, one share of its chunks.
  void run(Scratch& my, int64_t unit) const {
    const int64_t head = unit / splits, b = head / call.heads, split = unit % splits;
    float *unit_sums = sums + unit * R * out_stride, *unit_peak = peak + unit * R, *unit_mass = mass + unit * R;
    std::fill(unit_sums, unit_sums + R * out_stride, 0.0f);
    std::fill(unit_mass, unit_mass + R, 0.0f);
    std::fill(unit_peak, unit_peak + R, -INFINITE);
    for (int64_t r = 0; call.sinks && split == 0 && r < R; r++)  // a token of mass 1 and no value, in the first share
      unit_peak[r] = call.sinks[query_head_of(head, r)], unit_mass[r] = 1;
    ask(my, head);
    for (int64_t at = chunks * split / splits; at < chunks * (split + 1) / splits; at++) {
      const int64_t start = at * chunk, n = std::min(chunk, length - start);
      score(my, b, head, at);
      for (int64_t r = 0; r < R; r++) {
        const int64_t query_head = query_head_of(head, r);
        if (call.softcap) cap(my.scores + r * stride, n);
        hide(my.scores + r * stride, b, query_head, r % call.tokens, start, n);
        weigh(my.scores + r * stride, n, unit_peak[r], unit_mass[r], unit_sums + r * out_stride);
      }
      gather(my, b, head, at, unit_sums);
    }
  }

  // The shares of one head put together, each times exp(its peak - the highest). Nothing seen gives 0, as in torch.
  void finish(int64_t head) const {
    const int64_t D = value.head_dim;
    for (int64_t r = 0; r < R; r++) {
      const auto of = [&](int64_t split) { return (head * splits + split) * R + r; };
      float *out = sums + of(0) * out_stride, most = -INFINITE, all = 0;
      for (int64_t s = 0; s < splits; s++) most = peak[of(s)] > most ? peak[of(s)] : most;
      for (int64_t s = 0; s < splits; s++) {
        const float share = peak[of(s)] == most ? 1.0f : mass[of(s)] == 0 ? 0.0f : std::exp(peak[of(s)] - most);
        const float* from = sums + of(s) * out_stride;
        all += mass[of(s)] * share;
        for (int64_t j = 0; j < D; j++) out[j] = (s ? out[j] : 0.0f) + from[j] * share;
      }
      for (int64_t j = 0; j < D; j++) out[j] = all == 0 ? 0.0f : out[j] / all;
      // levels may lie past fp16, which values are read as
      for (int64_t j = 0; value.dtype == F16 && j < D; j++)
        out[j] = std::abs(out[j]) < INFINITE ? std::min(std::max(out[j], -FP16_MAX), FP16_MAX) : out[j];
      if (call.restore) back.apply(out, D);
      store_row(call.out, call.q_dtype, (head * R + r) * D, D, out);
    }
  }
};

// Hands out the pieces of one allocation; without memory it only measures.
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(base + used);
    used += round_up(std::max<int64_t>(count, 0) * sizeof(T), 64);
    return out;
  }
};

Scratch take_scratch(Arena& arena, const Plan& plan) {
  const int64_t D = std::max(plan.key.head_dim, plan.value.head_dim);
  const int64_t rows = std::max(plan.key.groups, plan.value.groups);
  int64_t bits = 0;
  for (const Cache* cache : {&plan.key, &plan.value}) bits = std::max({bits, cache->bits, cache->text_bits});
  const int64_t columns = (D * bits / 16 + 1) / 2;
  Scratch my;
  my.tile.stride = plan.stride;
  my.tile.columns = arena.take<uint32_t>(columns * plan.stride);
  my.tile.scale = arena.take<float>(rows * plan.stride);
  my.tile.lowest = arena.take<float>(rows * plan.stride);
  my.tile.rows = arena.take<float>((rows * plan.R + 1) * plan.stride);
  my.tile.code = arena.take<uint8_t>(D);
  my.tile.joined = arena.take<uint16_t>(D);
  my.q = arena.take<float>(plan.R * D);
  my.q_sum = arena.take<float>(plan.R * plan.key.groups);
  for (float*& q : my.q_packed) q = arena.take<float>(plan.R * plan.key.groups * (D + 16));
  my.scores = arena.take<float>(plan.R * plan.stride);
  my.row = arena.take<float>(D);
  return my;
}

void take_plan(Arena& arena, Plan& plan) {
  const int64_t B = plan.call.batch, units = B * plan.call.heads * plan.splits * plan.R;
  plan.key_owners = arena.take<Owners>(B);
  plan.value_owners = arena.take<Owners>(B);
  for (Owners* owners : {plan.key_owners, plan.value_owners})
    for (int64_t b = 0; b < B; b++) {
      const Owners own = {arena.take<int32_t>(plan.length), arena.take<int32_t>(plan.length),
                          arena.take<int64_t[KINDS]>(plan.chunks)};
      if (arena.base) owners[b] = own;
    }
  for (auto& kinds : plan.used)
    for (uint8_t*& used : kinds) used = arena.take<uint8_t>(512 * std::max(plan.key.groups, plan.value.groups));
  for (Place*& places : plan.places) places = arena.take<Place>(plan.key.head_dim + 16);
  plan.peak = arena.take<float>(units);
  plan.mass = arena.take<float>(units);
  plan.sums = arena.take<float>(units * plan.out_stride);
}

}  // namespace

extern "C" int akvq_attend(const Call* call_, const Cache* key, const Cache* value) {
  Call call = *call_;
  // nothing after the fresh tokens is seen; they own their positions, whatever the ring and the pivots hold of them
  const int64_t end = call.fresh_count ? call.at[call.fresh_count - 1] + 1 : key->state[END];
  call.length = call.length < 0 ? end : call.length;
  for (int64_t i = 0; i < call.fresh_count; i++)
    if (call.at[i] < 0 || call.at[i] >= call.length) return BAD_POSITION;
  if (call.mask || call.fresh_count) call.length = std::min(call.length, end);
  if (call.is_causal) call.length = std::min(call.length, call.tokens);
  call.length = std::max<int64_t>(call.length, 0);
  const int64_t R = call.query_heads / call.heads * call.tokens, heads = call.batch * call.heads;
  int64_t chunk = CHUNK;
  const int64_t rows = R * std::max(key->groups, value->groups);
  while (chunk > CHUNK_MIN && rows * chunk > CHUNK_ROWS * CHUNK) chunk /= 2;
  chunk = std::max<int64_t>(chunk, BLOCK);
  const int64_t chunks = (call.length + chunk - 1) / chunk;
  const int64_t work = heads * R * call.length * (key->head_dim + value->head_dim);
  const int64_t threads = std::max<int64_t>(1, std::min(call.threads, work / WORK_PER_THREAD));
  int64_t splits = threads == 1 ? 1 : (UNITS_PER_THREAD * threads + heads - 1) / heads;
  splits = std::max<int64_t>(1, std::min(splits, chunks));
  const Rotation there(key->uneven ? key->head_dim / 4 : key->head_dim), middle(key->head_dim / 2);
  const Rotation back(value->head_dim);
  Plan plan{call, *key, *value, R, call.length, chunk, chunks, chunk + PAD, round_up(value->head_dim, LANES), splits,
            nullptr, nullptr, {}, {}, nullptr, nullptr, nullptr, there, middle, back};

  const auto place = [&](Arena& arena, Scratch* scratch, int32_t** owner) {
    take_plan(arena, plan);
    for (int64_t i = 0; i < threads; i++) {
      const Scratch my = take_scratch(arena, plan);
      int32_t* const mine = arena.take<int32_t>(call.length);
      if (scratch) scratch[i] = my, owner[i] = mine;
    }
  };
  Arena arena;
  place(arena, nullptr, nullptr);
  const size_t size = arena.used, extra = threads * (sizeof(Scratch) + sizeof(int32_t*)) + 64;
  char* memory = static_cast<char*>(std::malloc(size + extra + 64));
  if (!memory) return NO_MEMORY;
  arena = {memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64, 0};
  Scratch* scratch = reinterpret_cast<Scratch*>(arena.base + size);
  int32_t** owner = reinterpret_cast<int32_t**>(scratch + threads);
  place(arena, scratch, owner);

  for (int kind : {BODY, TEXT})
    if (const Packed source = plan.packed(*key, 0, kind); source.bits) find_places(source, plan.places[kind]);
  for (int kind : {BODY, TEXT})
    for (int which : {0, 1})
      if (const Packed source = plan.packed(which ? *value : *key, 0, kind); source.bits)
        find_used(source, plan.used[which][kind]);
  // Short loops run on one thread: at the end of a parallel one, all wait for the slowest.
#pragma omp parallel for num_threads(threads) if (call.batch * call.length > ALONE)
  for (int64_t i = 0; i < 2 * call.batch; i++) {
    Owners& owners = (i % 2 ? plan.value_owners : plan.key_owners)[i / 2];
    owners.find(i % 2 ? *value : *key, i / 2, call.length, chunk, call, owner[omp_get_thread_num()]);
  }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t unit = 0; unit < heads * splits; unit++) plan.run(scratch[omp_get_thread_num()], unit);
#pragma omp parallel for num_threads(threads) if (heads * splits * R * plan.out_stride > ALONE)
  for (int64_t head = 0; head < heads; head++) plan.finish(head);
  std::free(memory);
  return DONE;
}
