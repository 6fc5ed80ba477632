// Matrices by many rows at once: rows become columns, and tiles of rows meet stripes of columns in registers.
namespace {

constexpr int WIDE = V >= 16 ? 4 : 2, STRIPE = WIDE * V;  // vectors of columns, and columns, that meet a tile of rows
constexpr int TALL = 6;                                   // rows of a tile: 24 accumulators of 32 registers, or 12 of 16

// Memory of a `Buffer` that has 16 numbers more than are needed: no load of a vector crosses a line.
inline float* aligned(float* p) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }

inline F vector_of(const float* p) { return F::loadu(p); }

template <class H>
inline F vector_of(const H* p) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return widened(p);
#else
  float all[V];
  for (int i = 0; i < V; ++i) all[i] = float(p[i]);
  return F::loadu(all);
#endif
}

// Which numbers of two lines, the second's counted from V on, make the first and the second line where blocks of SIZE
// numbers change places across the diagonal.
template <int SIZE>
struct Swap {
  alignas(64) int32_t first[V] = {}, second[V] = {};
  constexpr Swap() {
    for (int i = 0; i < V; ++i) first[i] = i & SIZE ? V + i - SIZE : i, second[i] = i & SIZE ? V + i : i + SIZE;
  }
};

// Rows become columns.
template <int SIZE = 1>
[[gnu::always_inline]] inline void turn(F (&rows)[V]) {
#if defined(CPU_CAPABILITY_AVX512)
  static constexpr Swap<SIZE> swap;
  const __m512i first = _mm512_load_si512(swap.first), second = _mm512_load_si512(swap.second);
  for (int i = 0; i < V; ++i) {
    if (i & SIZE) continue;
    const Lanes a = rows[i], b = rows[i + SIZE];
    rows[i] = _mm512_permutex2var_ps(a, first, b);
    rows[i + SIZE] = _mm512_permutex2var_ps(a, second, b);
  }
  if constexpr (2 * SIZE < V) turn<2 * SIZE>(rows);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), own = _mm256_set1_epi32(SIZE);
  const __m256i other = _mm256_xor_si256(lane, own);
  const __m256 later = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(lane, own), own));
  for (int i = 0; i < V; ++i) {
    if (i & SIZE) continue;
    const Lanes a = rows[i], b = rows[i + SIZE];
    rows[i] = _mm256_blendv_ps(a, _mm256_permutevar8x32_ps(b, other), later);
    rows[i + SIZE] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(a, other), b, later);
  }
  if constexpr (2 * SIZE < V) turn<2 * SIZE>(rows);
#else
  float all[V][V];
  for (int i = 0; i < V; ++i) rows[i].store(all[i]);
  for (int i = 0; i < V; ++i) {
    float column[V];
    for (int j = 0; j < V; ++j) column[j] = all[j][i];
    rows[i] = F::loadu(column);
  }
#endif
}

// acc[t][c] += sum over k < depth of x[t, k] b[k, c·V...], rows of x `ldx` numbers apart, those of b `ldb`. each(k) goes with
// every step.
template <int T, int C, class Each>
[[gnu::always_inline]] inline void multiply_add(
    F (&acc)[T][C], const float* x, int64_t ldx, const float* b, int64_t ldb, int64_t depth, Each&& each) {
  for (int64_t k = 0; k < depth; ++k) {
    each(k);
    F row[C];
    for (int c = 0; c < C; ++c) row[c] = F::loadu(b + k * ldb + c * V);
    for (int t = 0; t < T; ++t) {
      const F one(x[t * ldx + k]);
      for (int c = 0; c < C; ++c) acc[t][c] = fmadd(one, row[c], acc[t][c]);
    }
  }
}

// f(Int<T>, t) for tiles that cover the rows [0, count)
template <class Fn>
inline void for_tiles(int64_t count, Fn&& f) {
  int64_t t = 0;
  for (; t + TALL <= count; t += TALL) f(Int<TALL>{}, t);
  for (; t + 2 <= count; t += 2) f(Int<2>{}, t);
  for (; t < count; ++t) f(Int<1>{}, t);
}

}  // namespace
