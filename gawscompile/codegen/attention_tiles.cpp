// The same for many queries: tiles of them over blocks of keys, softmax corrected from block to block (FlashAttention,
// arXiv 2205.14135, algorithm 1). Keys are turned to [features, keys] once for all queries of a piece, so that neither
// product ends in a horizontal sum. All in fp32, as above.

#include <initializer_list>

namespace {

constexpr int64_t BLOCK = 4 * 64;  // keys whose scores are kept, and which stay in the second cache
constexpr int64_t PIECE = 256;     // queries that share turned keys
constexpr int PADDED = NV * V;     // features of a head in whole vectors

// exp(v) where v <= 0, to 2 ulp where that is a weight of any size: 2^n times a polynomial (of least largest error).
inline F weight_of(const F& v) {
#if defined(CPU_CAPABILITY_AVX512)
  const Lanes t = _mm512_max_ps(_mm512_set1_ps(-200.0f), F(v * F(1.44269504f)));  // NaN stays
  const Lanes whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F rest(Lanes(t - whole));
  F made(1.32764715e-3f);
  for (const float c : {9.67554133e-3f, 5.55071327e-2f, 2.40221197e-1f, 6.93146967e-1f, 1.00000007f})
    made = fmadd(made, rest, F(c));
  return _mm512_scalef_ps(made, whole);
#else
  return exp(v);
#endif
}

// The first `count` of V numbers, rounded.
template <class H>
inline void store_features(H* p, const F& v, int count) {
  alignas(64) H all[2 * V];
  store_pair(all, Pair{v, v});
  std::memcpy(p, all, size_t(count) * sizeof(H));
}

inline F larger(const F& a, const F& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return at::vec::maximum(a, b);
#endif
}

inline float largest(const F& v) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_max_ps(v);
#else
  float all[V];
  v.store(all);
  float found = all[0];
  for (const float one : all) found = max(found, one);
  return found;
#endif
}

// Some queries of a group and one block of keys. `first` is the piece's first query of all heads of the group.
struct Piece {
  const Call& c;
  int64_t row, group, first, count;
  float *q, *k, *v, *s, *o, *most, *whole;  // [PIECE, PADDED], turned keys, [BLOCK, PADDED], [TALL, BLOCK], [PIECE, PADDED]
  int64_t key = 0, keys = 0;                // of this block

  static constexpr int64_t NUMBERS =
      PIECE * PADDED + D * BLOCK + BLOCK * PADDED + TALL * BLOCK + PIECE * PADDED + 2 * PIECE + 16;

  Piece(const Call& call, int64_t row, int64_t group, int64_t first, int64_t count, float* memory)
      : c(call), row(row), group(group), first(first), count(count) {
    k = memory = aligned(memory), s = k + D * BLOCK, o = s + TALL * BLOCK, v = o + PIECE * PADDED;
    q = v + BLOCK * PADDED, most = q + PIECE * PADDED, whole = most + PIECE;
    for (int64_t t = 0; t < count; ++t) {
      const T* from = c.q + row * c.qs[0] + head(t) * c.qs[1] + query(t) * c.qs[2];
      for (int j = 0; j < NV; ++j) (features(from, j) * F(c.scale)).store(q + t * PADDED + j * V);
      most[t] = sink(c, head(t)), whole[t] = c.sinks ? 1 : 0;
    }
    std::memset(o, 0, sizeof(float) * size_t(count * PADDED));
  }

  int64_t head(int64_t t) const { return group * (c.heads / c.groups) + (first + t) / c.queries; }
  int64_t query(int64_t t) const { return (first + t) % c.queries; }

  // Reads keys [key, key + keys).
  void load() {
    const T* from = c.k + row * c.ks[0] + group * c.ks[1] + key * c.ks[2];
    for (int64_t l = 0; l < keys; l += V)
      for (int j = 0; j < NV; ++j) {
        F lines[V];
        for (int i = 0; i < V; ++i) lines[i] = l + i < keys ? features(from + (l + i) * c.ks[2], j) : F(0.0f);
        turn(lines);
        float* to = k + l / STRIPE * STRIPE * D + j * V * STRIPE + l % STRIPE;
        for (int i = 0; i < min(V, D - j * V); ++i) lines[i].store(to + i * STRIPE);
      }
    from = c.v + row * c.vs[0] + group * c.vs[1] + key * c.vs[2];
    for (int64_t l = 0; l < keys; ++l)
      for (int j = 0; j < NV; ++j) features(from + l * c.vs[2], j).store(v + l * PADDED + j * V);
  }

  // The mask of a query, at this block's first key.
  const char* mask(int64_t t) const {
    const int64_t size = c.kind == 1 ? 1 : c.kind == 2 ? sizeof(T) : sizeof(float);
    const int64_t at = row * c.ms[0] + head(t) * c.ms[1] + query(t) * c.ms[2] + key * c.ms[3];
    return static_cast<const char*>(c.mask) + size * at;
  }

  // Narrows [lo, hi), keys of this block, to the first and the last that a query sees.
  void seen(int64_t t, int64_t& lo, int64_t& hi) const {
    lo = 0, hi = keys;
    if (CAUSAL) hi = max<int64_t>(0, min(hi, query(t) + 1 - key));
    if (!c.kind) return;
    const char* line = mask(t);
    if (c.kind == 1 && c.ms[3] == 1) {  // bytes of what may be seen, eight at a time
      const auto none = [&](int64_t l) {
        int64_t eight;
        std::memcpy(&eight, line + l, sizeof eight);
        return eight == 0;
      };
      while (hi - lo >= 8 && none(hi - 8)) hi -= 8;
      while (hi - lo >= 8 && none(lo)) lo += 8;
    }
    while (hi > lo && masked(c, line, hi - 1) == MINUS_INFINITY) --hi;
    while (lo < hi && masked(c, line, lo) == MINUS_INFINITY) ++lo;
  }

  // Adds a query's mask to its scores of the keys [lo, hi).
  void hide(int64_t t, float* line, int64_t lo, int64_t hi) const {
    if (c.kind == 1 && c.ms[3] == 1) {
      const bool* given = reinterpret_cast<const bool*>(mask(t));
      for (int64_t l = lo; l < hi; ++l) line[l] = given[l] ? line[l] : MINUS_INFINITY;
    } else if (c.kind == 3 && c.ms[3] == 1) {
      const float* given = reinterpret_cast<const float*>(mask(t));
      for (int64_t l = lo; l < hi; ++l) line[l] += given[l];
    } else if (c.kind) {
      const char* given = mask(t);
      for (int64_t l = lo; l < hi; ++l) line[l] += masked(c, given, l);
    }
  }

  // Scores of R queries for C vectors of keys from l on.
  template <int R, int C>
  void score(int64_t t, int64_t l) {
    F acc[R][C];
    clear(acc);
    multiply_add(acc, q + t * PADDED, PADDED, k + l / STRIPE * STRIPE * D + l % STRIPE, STRIPE, D, [](int64_t) {});
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < C; ++j) capped(acc[r][j]).store(s + r * BLOCK + l + j * V);
  }

  // o of R queries, times what corrects it, plus what they make of the values of keys [lo, hi): from vector J on.
  template <int R, int J>
  void add(int64_t t, int64_t lo, int64_t hi, const float* correction) {
    constexpr int C = min(WIDE, NV - J);
    F acc[R][C];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < C; ++j) acc[r][j] = F::loadu(o + (t + r) * PADDED + (J + j) * V) * F(correction[r]);
    multiply_add(acc, s + lo, BLOCK, v + lo * PADDED + J * V, PADDED, hi - lo, [](int64_t) {});
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < C; ++j) acc[r][j].store(o + (t + r) * PADDED + (J + j) * V);
    if constexpr (J + WIDE < NV) add<R, J + WIDE>(t, lo, hi, correction);
  }

  // Scores become weights that are not yet divided by their sum; what o holds is to be multiplied by the result.
  float weigh(int64_t t, float* line, int64_t from, int64_t to) {
    F high(most[t]);
    for (int64_t l = from; l < to; l += V) high = larger(F::loadu(line + l), high);
    const float above = largest(high);
    const F shift(above == MINUS_INFINITY ? 0.0f : -above);  // a query that sees nothing gets zeros
    F total(0.0f);
    for (int64_t l = from; l < to; l += V) {
      const F part = weight_of(F::loadu(line + l) + shift);
      part.store(line + l);
      total = total + part;
    }
    const float correction = most[t] == MINUS_INFINITY ? 0 : std::exp(most[t] - above);
    most[t] = above, whole[t] = whole[t] * correction + sum(total);
    return correction;
  }

  // One block of keys for R queries.
  template <int R>
  [[gnu::noinline]] void tile(int64_t t) {
    int64_t lo = keys, hi = 0, own[R][2];
    for (int r = 0; r < R; ++r) {
      seen(t + r, own[r][0], own[r][1]);
      if (own[r][0] < own[r][1]) lo = min(lo, own[r][0]), hi = max(hi, own[r][1]);
    }
    if (lo >= hi) return;
    const int64_t from = lo / STRIPE * STRIPE, to = (hi + V - 1) / V * V;
    int64_t l = from;
    for (; l + STRIPE <= to; l += STRIPE) score<R, WIDE>(t, l);
    for (; l < to; l += V) score<R, 1>(t, l);
    float correction[R];
    for (int r = 0; r < R; ++r) {
      float* line = s + r * BLOCK;
      hide(t + r, line, own[r][0], own[r][1]);
      for (l = from; l < own[r][0]; ++l) line[l] = MINUS_INFINITY;
      for (l = max(from, own[r][1]); l < to; ++l) line[l] = MINUS_INFINITY;
      correction[r] = weigh(t + r, line, from, to);
    }
    add<R, 0>(t, lo, hi, correction);
  }

  void run() {
    int64_t end = c.keys;
    if (CAUSAL && first / c.queries == (first + count - 1) / c.queries) end = min(end, query(count - 1) + 1);
    for (; key < end; key += BLOCK) {
      keys = min(BLOCK, end - key);
      load();
      for_tiles(count, [&](auto width, int64_t t) { tile<decltype(width)::value>(t); });
    }
    for (int64_t t = 0; t < count; ++t) {
      T* to = c.out + row * c.os[0] + head(t) * c.os[1] + query(t) * c.os[2];
      const F scale(whole[t] == 0 ? 0.0f : 1 / whole[t]);
      for (int j = 0; j < NV; ++j) {
        const F made = F::loadu(o + t * PADDED + j * V) * scale;
        store_features(to + j * V, made, min(V, D - j * V));
      }
    }
  }
};

void attend_many(const Call& c) {
  const int64_t queries = c.heads / c.groups * c.queries, groups = c.rows * c.groups;
  const int64_t threads = omp_get_max_threads();
  const int64_t pieces = max<int64_t>(blocks(queries, PIECE), blocks(threads, max<int64_t>(groups, 1)));
  const int64_t size = min(PIECE, blocks(blocks(queries, pieces), TALL) * TALL), count = blocks(queries, size);
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < groups * count; ++i) {
    static thread_local Buffer memory;
    const int64_t group = i / count, first = i % count * size;
    Piece(c, group / c.groups, group % c.groups, first, min(size, queries - first), memory.of(Piece::NUMBERS)).run();
  }
}

}  // namespace

extern "C" void attend(const Call* call) {
  if (CAUSAL || call->queries > FEW) attend_many(*call);
  else attend_few(*call);
}
