// Attention of few queries over keys and values as a cache holds them: ``softmax(s Q Kᵀ + mask) V``, the heads of a group
// over one key and one value head. All in fp32 before the one rounding. `T`, `D` (features of a head), `CAUSAL` (query
// i sees keys up to i) and `CAP` (scores become CAP tanh(scores / CAP)) stand in front, and `FEW`, queries of a head that
// are taken one by one.

#include <cmath>
#include <cstdlib>
#include <limits>

namespace {

constexpr int NV = (D + V - 1) / V;  // vectors of one head
constexpr int LEFT = D % V;          // numbers in its last one, 0 where that is whole
constexpr int MOST = max(1, min(4, (V >= 16 ? 16 : 8) / NV));  // queries whose sums stay in registers
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();
constexpr float LOWEST_FLOAT = -std::numeric_limits<float>::max();
constexpr float LOWEST = sizeof(T) == 4 ? LOWEST_FLOAT : std::is_same_v<T, f16> ? -65504.0f : -0x1.fep127f;  // of T

// Addresses, and strides in numbers by row, head (of keys: of a group) and token; what a mask has for all it has once.
struct Call {
  const T *q, *k, *v;
  const void* mask;
  T* out;
  int64_t rows, heads, groups, queries, keys;
  int64_t qs[3], ks[3], vs[3], os[3], ms[4];
  int64_t kind;  // of mask: 0 none, 1 what may be seen, 2 added, a T, 3 added, a float
  float scale;
  const void* sinks;  // of each head one more score, which weighs no value
  int64_t step, wide;  // from head to head; 1 if floats, 0 if T
};

inline float sink(const Call& c, int64_t head) {
  if (!c.sinks) return MINUS_INFINITY;
  return c.wide ? static_cast<const float*>(c.sinks)[head * c.step] : float(static_cast<const T*>(c.sinks)[head * c.step]);
}

// Scores, before a mask is added.
inline F capped(const F& scores) {
  if constexpr (CAP > 0) return F(CAP) * tanh(scores * F(1 / CAP));
  return scores;
}

inline F features(const T* p, int j) {
  if (LEFT == 0 || j < NV - 1) return vector_of(p + j * V);
  float end[V] = {};
  for (int i = 0; i < LEFT; ++i) end[i] = float(p[j * V + i]);
  return F::loadu(end);
}

// What is added to the score of a key: 0 or -infinity of a mask that says what may be seen.
inline float masked(const Call& c, const char* row, int64_t l) {
  switch (c.kind) {
    case 0: return 0;
    case 1: return reinterpret_cast<const bool*>(row)[l * c.ms[3]] ? 0 : MINUS_INFINITY;
    case 2: return float(reinterpret_cast<const T*>(row)[l * c.ms[3]]);
    default: return reinterpret_cast<const float*>(row)[l * c.ms[3]];
  }
}

// Whether a key weighs nothing beside one that is not hidden: by -infinity, or by the lowest number of its dtype.
inline bool hidden(const Call& c, const char* row, int64_t l) {
  return masked(c, row, l) <= (c.kind == 2 ? LOWEST : LOWEST_FLOAT);
}

template <int R>
void attend_rows(const Call& c, int64_t row, int64_t group, int64_t first) {
  const int64_t shared = c.heads / c.groups;
  F q[R][NV];
  const char* mask[R] = {};
  T* out[R];
  float extra[R];
  int64_t begin = c.keys, end = 0;
  for (int r = 0; r < R; ++r) {
    const int64_t head = group * shared + (first + r) / c.queries, query = (first + r) % c.queries;
    const T* from = c.q + row * c.qs[0] + head * c.qs[1] + query * c.qs[2];
    for (int j = 0; j < NV; ++j) q[r][j] = features(from, j) * F(c.scale);
    extra[r] = sink(c, head);
    out[r] = c.out + row * c.os[0] + head * c.os[1] + query * c.os[2];
    const int64_t size = c.kind == 1 ? 1 : c.kind == 2 ? sizeof(T) : sizeof(float);
    if (c.kind) mask[r] = static_cast<const char*>(c.mask) + size * (row * c.ms[0] + head * c.ms[1] + query * c.ms[2]);
    int64_t last = c.keys, at = 0;  // the keys in between are all that this query can see
    while (last > 0 && hidden(c, mask[r], last - 1)) --last;
    while (at < last && hidden(c, mask[r], at)) ++at;
    if (last == 0 && c.kind > 1) last = c.keys;  // all of them are, and weigh the same, unless by -infinity
    begin = min(begin, at);
    end = max(end, last);
  }
  const int64_t span = max<int64_t>(end - begin, 0), padded = (span + V - 1) / V * V + 4;
  float* scores = static_cast<float*>(std::malloc(sizeof(float) * size_t(R * padded)));
  const T* keys = c.k + row * c.ks[0] + group * c.ks[1] + begin * c.ks[2];
  for (int64_t l = 0; l < span; l += 4) {  // past the end, the last one again
    F sums[R][4];
    for (int t = 0; t < 4; ++t) {
      const T* key = keys + min(l + t, span - 1) * c.ks[2];
      for (int r = 0; r < R; ++r) sums[r][t] = F(0.0f);
      for (int j = 0; j < NV; ++j) {
        const F part = features(key, j);
        for (int r = 0; r < R; ++r) sums[r][t] = fmadd(part, q[r][j], sums[r][t]);
      }
    }
    for (int r = 0; r < R; ++r) {
      const Quad four = sum4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
      std::memcpy(scores + r * padded + l, &four, sizeof four);
    }
  }
  float whole[R];
  for (int r = 0; r < R; ++r) {
    float* s = scores + r * padded;
    if constexpr (CAP > 0)
      for (int64_t l = 0; l < span; l += V) capped(F::loadu(s + l)).store(s + l);
    if (c.kind)
      for (int64_t l = 0; l < span; ++l) s[l] += masked(c, mask[r], begin + l);
    for (int64_t l = span; l < padded; ++l) s[l] = MINUS_INFINITY;
    float most = extra[r];
#pragma omp simd reduction(max : most)
    for (int64_t l = 0; l < span; ++l) most = s[l] > most ? s[l] : most;
    F total(0.0f);
    const F shift(most == MINUS_INFINITY ? 0.0f : -most);  // a query that sees nothing gets zeros
    for (int64_t l = 0; l < span; l += V) {
      const F part = exp(F::loadu(s + l) + shift);
      part.store(s + l);
      total = total + part;
    }
    whole[r] = sum(total) + (c.sinks ? std::exp(extra[r] - most) : 0.0f);
  }
  F made[R][NV];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) made[r][j] = F(0.0f);
  const T* values = c.v + row * c.vs[0] + group * c.vs[1] + begin * c.vs[2];
  for (int64_t l = 0; l < span; ++l) {
    const T* value = values + l * c.vs[2];
    F weight[R];
    for (int r = 0; r < R; ++r) weight[r] = F(scores[r * padded + l]);
    for (int j = 0; j < NV; ++j) {
      const F part = features(value, j);
      for (int r = 0; r < R; ++r) made[r][j] = fmadd(part, weight[r], made[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    float all[NV * V];
    const F scale(whole[r] == 0 ? 0.0f : 1 / whole[r]);
    for (int j = 0; j < NV; ++j) (made[r][j] * scale).store(all + j * V);
    for (int i = 0; i < D; ++i) out[r][i] = T(all[i]);
  }
  std::free(scores);
}

template <int R>
void attend_up_to(const Call& c, int64_t row, int64_t group, int64_t first, int64_t count) {
  if constexpr (R > 1) {
    if (count < R) return attend_up_to<R - 1>(c, row, group, first, count);
  }
  attend_rows<R>(c, row, group, first);
}

void attend_few(const Call& c) {
  const int64_t queries = c.heads / c.groups * c.queries, groups = c.rows * c.groups;
  const int64_t threads = omp_get_max_threads();
  // a whole group at a time spares loads of its keys; every thread has a piece where there are as many queries
  const int64_t pieces = min(queries, max<int64_t>(blocks(queries, MOST), blocks(threads, max<int64_t>(groups, 1))));
  const int64_t size = blocks(queries, pieces), count = blocks(queries, size);
#pragma omp parallel for schedule(static) if (c.rows * c.heads * c.queries * c.keys * D > 1 << 15)
  for (int64_t i = 0; i < groups * count; ++i) {
    const int64_t group = i / count, first = i % count * size;
    attend_up_to<MOST>(c, group / c.groups, group % c.groups, first, min(size, queries - first));
  }
}

}  // namespace
