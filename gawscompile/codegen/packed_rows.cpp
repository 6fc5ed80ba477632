// Packed weights whose bytes have codes of rows that do not follow each other (`ir/packed.py`): sums of those rows are made
// in memory before adapters join them. Stands behind `packed.cpp`.
namespace {

// Of four bits, by blocks of 32 rows: for two columns that follow each other 32 bytes, of rows i and i + 16 the first
// column's and the second's. TABLE's levels are an operand; scales lie by groups, those of all N rows after each other.
template <int64_t K_, int64_t N_, int64_t GROUP_, class TS>
struct Blocks {
  static constexpr int64_t K = K_, N = N_, GROUP = GROUP_, ROWS_OF_ONE = 32;
  static constexpr int AT_ONCE = TOKENS;
  const uint8_t* codes;
  const float* table;
  const TS* scales;

  const uint8_t* at(int64_t row, int64_t k) const { return codes + row / ROWS_OF_ONE * (K / 2) * 32 + k / 2 * 32; }

  // z[t] = 32 rows from `row` on times x[t], for T tokens
  template <int T, class TX>
  void dot(int64_t row, const TX* x, float* z, int64_t ldz) const {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
    if constexpr (std::is_same_v<TX, bf16>) return dot_pairs<T>(row, x, z, ldz);
#endif
#if defined(CPU_CAPABILITY_AVX512)
    // lanes: eight rows, of each the first column and the second
    const Levels levels = Levels::of(table);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    F acc[T][2];
    for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = F(0.f);
    for (int64_t g = 0; g < K / GROUP; ++g) {
      F part[T][4];
      for (int t = 0; t < T; ++t)
        for (F& p : part[t]) p = F(0.f);
      for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += 2) {
        const uint8_t* p = at(row, k);
        __builtin_prefetch(p + NEARBY, 0, 2);
        const __m512i a = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + 16)));
        const F w[4] = {levels(a), levels(b), levels(_mm512_srli_epi32(a, 4)), levels(_mm512_srli_epi32(b, 4))};
        for (int t = 0; t < T; ++t) {
          const float two[2] = {float(x[t * K + k]), float(x[t * K + k + 1])};
          double both;
          std::memcpy(&both, two, sizeof both);
          const F xs(_mm512_castpd_ps(_mm512_set1_pd(both)));
          for (int i = 0; i < 4; ++i) part[t][i] = fmadd(w[i], xs, part[t][i]);
        }
      }
      for (int half = 0; half < 2; ++half) {
        const F s = scale(row + 16 * half, g);
        for (int t = 0; t < T; ++t) {
          const F &lo = part[t][2 * half], &hi = part[t][2 * half + 1];
          const F rows = F(_mm512_permutex2var_ps(lo, even, hi)) + F(_mm512_permutex2var_ps(lo, odd, hi));
          acc[t][half] = fmadd(rows, s, acc[t][half]);
        }
      }
    }
    for (int t = 0; t < T; ++t)
      for (int half = 0; half < 2; ++half) acc[t][half].store(z + t * ldz + 16 * half);
#else
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < 32; ++r) {
        float sum = 0;
        for (int64_t k = 0; k < K; ++k) sum += number(row, r, k) * float(x[t * K + k]);
        z[t * ldz + r] = sum;
      }
#endif
  }

#if defined(CPU_CAPABILITY_AVX512)
  static constexpr int NEARBY = 4 << 10;
  F scale(int64_t row, int64_t g) const {
    if constexpr (std::is_same_v<TS, float>) return F::loadu(scales + g * N + row);
    else return widened(scales + g * N + row);
  }
#endif

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  // vdpbf16ps sums two columns up by itself. Levels are rounded to bf16 for it, as bitsandbytes' own kernel rounds them.
  template <int T>
  void dot_pairs(int64_t row, const bf16* x, float* z, int64_t ldz) const {
    const __m512i levels = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(F::loadu(table)));
    F acc[T][2];
    for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = F(0.f);
    for (int64_t g = 0; g < K / GROUP; ++g) {
      F part[T][4];  // sums of every other pair of columns: one multiply-add waits for the one before
      for (int t = 0; t < T; ++t)
        for (F& p : part[t]) p = F(0.f);
      for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += 4)
        for (int i = 0; i < 2; ++i) {
          const uint8_t* p = at(row, k + 2 * i);
          if (i == 0) __builtin_prefetch(p + NEARBY, 0, 2);
          const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
          const __m512bh a = (__m512bh)_mm512_permutexvar_epi16(codes, levels);
          const __m512bh b = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), levels);
          for (int t = 0; t < T; ++t) {
            int32_t both;
            std::memcpy(&both, x + t * K + k + 2 * i, sizeof both);
            const __m512bh xs = (__m512bh)_mm512_set1_epi32(both);
            part[t][2 * i] = F(_mm512_dpbf16_ps(part[t][2 * i], a, xs));
            part[t][2 * i + 1] = F(_mm512_dpbf16_ps(part[t][2 * i + 1], b, xs));
          }
        }
      for (int half = 0; half < 2; ++half) {
        const F s = scale(row + 16 * half, g);
        for (int t = 0; t < T; ++t) acc[t][half] = fmadd(part[t][half] + part[t][half + 2], s, acc[t][half]);
      }
    }
    for (int t = 0; t < T; ++t)
      for (int half = 0; half < 2; ++half) acc[t][half].store(z + t * ldz + 16 * half);
  }
#endif

  float number(int64_t row, int r, int64_t k) const {
    const uint8_t byte = at(row, k)[2 * (r % 16) + k % 2];
    return table[r < 16 ? byte & 15 : byte >> 4] * float(scales[k / GROUP * N + row + r]);
  }
};

template <int64_t K, int64_t N, int64_t GROUP, class TS>
auto blocks_of(const uint8_t* codes, const float* table, const TS* scales) {
  return Blocks<K, N, GROUP, TS>{codes, table, scales};
}

// x from a token on.
template <int64_t K, class TX>
inline const TX* from(const TX* x, int64_t t) { return x + t * K; }

template <int64_t K, class X>
inline X from(const X& x, int64_t t) { return x.from(t); }

// A weight that lies in blocks or tiles, for `rows_apart`.
template <class W, class X>
struct ByBlocks {
  static constexpr int64_t UNIT = W::ROWS_OF_ONE, LENGTH = W::N, PARTS = 1;
  W w;
  X x;
  static int64_t at_once(int64_t) { return 8 * UNIT; }
  void fill(float* z, int64_t ldz, int64_t m, int64_t at, int64_t count) const {
    int64_t t = 0;
    const auto some = [&](auto width) {
      for (constexpr int T = decltype(width)::value; t + T <= m; t += T)
        for (int64_t row = 0; row < count; row += UNIT)
          w.template dot<T>(at + row, from<W::K>(x, t), z + t * ldz + row, ldz);
    };
    some(Int<W::AT_ONCE>{});
    if constexpr (W::AT_ONCE > 4) some(Int<4>{});
    some(Int<2>{}), some(Int<1>{});
  }
};

template <class W, class X>
inline auto by_blocks(const W& w, X x) { return ByBlocks<W, X>{w, x}; }

// W as a matrix, for the library.
template <int64_t K, int64_t N, int64_t GROUP, class TS, class T>
void unpack(const Blocks<K, N, GROUP, TS>& w, T* out) {
#pragma omp parallel for
  for (int64_t row = 0; row < N; row += 32) {
#if defined(CPU_CAPABILITY_AVX512)
    const Levels levels = Levels::of(w.table);
    alignas(64) double two[V][32];  // columns k and k + 1 of 32 rows, for V times k
    for (int64_t k = 0; k < K; k += 2 * V) {
      for (int i = 0; i < V; ++i) {
        const uint8_t* p = w.at(row, k + 2 * i);
        const __m512i a = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + 16)));
        float* to = (float*)two[i];
        levels(a).store(to), levels(b).store(to + V);
        levels(_mm512_srli_epi32(a, 4)).store(to + 2 * V), levels(_mm512_srli_epi32(b, 4)).store(to + 3 * V);
      }
      for (int r = 0; r < 32; ++r) {
        double line[V];
        for (int i = 0; i < V; ++i) line[i] = two[i][r];
        const F s(float(w.scales[k / GROUP * N + row + r]));
        const Pair v = load_pair((const float*)line);
        store_pair(out + (row + r) * K + k, Pair{v.lo * s, v.hi * s});
      }
    }
#else
    for (int r = 0; r < 32; ++r)
      for (int64_t k = 0; k < K; ++k) out[(row + r) * K + k] = T(w.number(row, r, k));
#endif
  }
}

// Rows from `row` on and those N/2 further down, whose codes the same bytes have, times T tokens of x.
template <int R, int T, class W, bool FULL>
[[gnu::always_inline]] inline void halves_dot(
    F (&upper)[R][T], F (&lower)[R][T], const W& w, int64_t row, Ordered<W::K, FULL> x) {
  constexpr int64_t K = W::K, G = W::GROUP, HALF = W::N / 2;
  for (int64_t g = 0; g < K / G; ++g) {
    typename W::Codes high[R], low[R];
    for (int i = 0; i < R; ++i) high[i] = w.group(row + i, g), low[i] = w.group(HALF + row + i, g);
    for (int64_t k = g * G; k < (g + 1) * G; k += 2 * V) {
      Pair xs[T];
      for (int t = 0; t < T; ++t) xs[t] = load_pair(x.numbers + t * K + k);
      const char* ahead = (const char*)w.at(row, 0) + R * k + AHEAD;
      for (int i = 0; i < R * 2 * V; i += LINE) __builtin_prefetch(ahead + i, 0, 2);
      for (int i = 0; i < R; ++i) {
        const Pair a = w.get(high[i], row + i, k), b = w.get(low[i], HALF + row + i, k);
        for (int t = 0; t < T; ++t) {
          upper[i][t] = fmadd(a.hi, xs[t].hi, fmadd(a.lo, xs[t].lo, upper[i][t]));
          lower[i][t] = fmadd(b.hi, xs[t].hi, fmadd(b.lo, xs[t].lo, lower[i][t]));
        }
      }
    }
  }
}

// The same for an x of 16 bits that is not made whole numbers, in a third of the time: codes are summed up as they lie, without sign and zero, which costs
// a digit of fp32.
template <int R, int T, class W>
[[gnu::always_inline]] inline void halves_dot(
    F (&upper)[R][T], F (&lower)[R][T], const W& w, int64_t row, Spread<ByWords, W::K, W::GROUP> x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  constexpr int64_t K = W::K, G = W::GROUP, HALF = W::N / 2, PART = G % 64 == 0 ? 64 : 4 * V;
  constexpr int CHAINS = T == 1 ? 2 : 1;  // one multiply-add waits for the one before
  const typename W::template Lines<R> above(w, row), below(w, HALF + row);
  const uint8_t* codes = w.at(row, 0);
  for (int64_t at = 0; at < K; at += PART) {  // the same short code for groups of any size
    for (int64_t line = 0; line < R * PART; line += LINE)
      __builtin_prefetch((const char*)codes + R * at + line + AHEAD, 0, 2);
    const float* xs = x.at(0, at);
    F sums[R][2][T][CHAINS];  // of lower and upper halves
    for (auto& of_row : sums)
      for (auto& of_half : of_row) clear(of_half);
    for (int64_t k = 0; k < PART; k += 4 * V) {
      Words words[R];  // rows share what is loaded of x
      for (int r = 0; r < R; ++r) std::memcpy(&words[r], codes + r * K + at + k, sizeof words[r]);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        F halves[R];
        for (int r = 0; r < R; ++r) halves[r] = half_of(words[r], j);
        for (int t = 0; t < T; ++t) {
          const F v = F::loadu(xs + 2 * (t * K + k) + j * V);
          for (int r = 0; r < R; ++r) {
            F& sum = sums[r][j % 2][t][j / 2 % CHAINS];
            sum = fmadd(halves[r], v, sum);
          }
        }
      }
    }
    const int64_t g = at / G;
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) {
        for (const F& sum : sums[r][0][t]) lower[r][t] = fmadd(sum, F(below.scale[r][g]), lower[r][t]);
        for (const F& sum : sums[r][1][t]) upper[r][t] = fmadd(sum, F(above.scale[r][g]), upper[r][t]);
        if (!W::ZEROS || at % G != 0) continue;
        const F total(x.sums[t * (K / G) + g]);
        lower[r][t] = fmadd(total, F(below.added[r][g]), lower[r][t]);
        upper[r][t] = fmadd(total, F(above.added[r][g]), upper[r][t]);
      }
  }
#endif
}

#if defined(CPU_CAPABILITY_AVX2)
// Sums of 64 columns of a row of bytes times an x in bytes, of lower and of upper halves, for T tokens.
template <int T>
[[gnu::always_inline]] inline void halves_sum(
    __m256i (&lower)[T], __m256i (&upper)[T], const uint8_t* codes, const int16_t* x, int64_t ldx) {
  const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), places = _mm256_set1_epi16(256);
  __m256i halves[2][2];
  for (int i = 0; i < 2; ++i) {
    const __m256i some = _mm256_loadu_si256((const __m256i*)codes + i);
    halves[0][i] = _mm256_and_si256(some, mask), halves[1][i] = _mm256_and_si256(_mm256_srli_epi16(some, 4), mask);
  }
  for (int t = 0; t < T; ++t) {
    const __m256i* bytes = (const __m256i*)(x + t * ldx);
    for (int half = 0; half < 2; ++half) {
      __m256i parts[2];  // of x's upper bytes, and of the lower ones
      for (int p = 0; p < 2; ++p)
        parts[p] = _mm256_add_epi16(
            _mm256_maddubs_epi16(halves[half][0], _mm256_loadu_si256(bytes + 2 * p)),
            _mm256_maddubs_epi16(halves[half][1], _mm256_loadu_si256(bytes + 2 * p + 1)));
      (half ? upper : lower)[t] =
          _mm256_add_epi32(_mm256_madd_epi16(parts[0], places), _mm256_madd_epi16(parts[1], ones));
    }
  }
}

// One token's, in a function of its own, as few are asked for.
[[gnu::noinline, gnu::cold]] inline void halves_of_rests(
    __m256i (&lower)[1], __m256i (&upper)[1], const uint8_t* codes, const int16_t* rests) {
  halves_sum(lower, upper, codes, rests, 0);
}

// The same for an x in bf16, by whole numbers.
template <int R, int T, class W>
[[gnu::always_inline]] inline void halves_dot(
    F (&upper)[R][T], F (&lower)[R][T], const W& w, int64_t row, Wholes<HalvesAsBytes, W::K, W::GROUP> x) {
  constexpr int64_t K = W::K, G = W::GROUP, HALF = W::N / 2, PART = 64;
  const typename W::template Lines<R> above(w, row), below(w, HALF + row);
  const uint8_t* codes = w.at(row, 0);
  const auto join = [](F& a, __m256i sum, float by) { a = fmadd(F(_mm256_cvtepi32_ps(sum)), F(by), a); };
  for (int r = 0; r < R; ++r, codes += K)
    for (int64_t at = 0; at < K; at += PART) {
      const int64_t g = at / G;
      __builtin_prefetch((const char*)codes + at + near(1), 0, 2);
      __m256i low[T], high[T];
      halves_sum(low, high, codes + at, x.numbers + at, K);
      for (int t = 0; t < T; ++t) {
        const float unit = x.units[t * (K / PART) + at / PART];
        join(lower[r][t], low[t], below.scale[r][g] * unit), join(upper[r][t], high[t], above.scale[r][g] * unit);
        if (!W::ZEROS || at % G != 0) continue;
        const F total(x.sums[t * (K / G) + g]);
        lower[r][t] = fmadd(total, F(below.added[r][g]), lower[r][t]);
        upper[r][t] = fmadd(total, F(above.added[r][g]), upper[r][t]);
      }
    }
  if (x.any) [[unlikely]]
    for (int64_t at = 0; at < K; at += PART)
      for (int t = 0; t < T; ++t)
        if (const float by = x.finer[t * (K / PART) + at / PART]; by != 0)
          for (int r = 0; r < R; ++r) {
            __m256i low[1], high[1];
            halves_of_rests(low, high, w.at(row + r, at), x.rests + t * K + at);
            join(lower[r][t], low[0], below.scale[r][at / G] * by), join(upper[r][t], high[0], above.scale[r][at / G] * by);
          }
}
#endif

// The same by vdpbf16ps, which is quick enough to read bytes twice.
template <int R, int T, class W>
[[gnu::always_inline]] inline void halves_dot(
    F (&upper)[R][T], F (&lower)[R][T], const W& w, int64_t row, Paired<W::K, W::GROUP> x) {
  unpack_dot(upper, w, row, x), unpack_dot(lower, w, W::N / 2 + row, x);
}

// A weight whose bytes have codes of rows n/2 apart, for `rows_apart`: both rows are summed up while a byte is at hand.
template <class W, class X>
struct ByHalves {
  static constexpr int64_t K = W::K, UNIT = ROWS, LENGTH = W::N / 2, PARTS = 2;
  static constexpr bool AS_IT_LIES = std::is_same_v<X, Ordered<K, true>> || std::is_same_v<X, Ordered<K, false>>;
  static constexpr bool PAIRED_X = std::is_same_v<X, Paired<K, W::GROUP>>;
  static_assert(LENGTH % ROWS == 0 && !W::Codes::PAIRS);
  W w;
  X x;
  static int64_t at_once(int64_t) { return 256; }
  void fill(float* z, int64_t ldz, int64_t m, int64_t at, int64_t count) const {
    const auto some = [&](auto rows, auto width, int64_t r, int64_t t0) {
      constexpr int R = decltype(rows)::value, T = decltype(width)::value;
      F upper[R][T], lower[R][T];
      clear(upper), clear(lower);
      halves_dot(upper, lower, w, at + r, x.from(t0));
      for (int t = 0; t < T; ++t)
        for (int i = 0; i < R; ++i) {
          z[(t0 + t) * ldz + r + i] = sum(upper[i][t]);
          z[(m + t0 + t) * ldz + r + i] = sum(lower[i][t]);
        }
    };
    for_tokens(0, m, [&](auto width, int64_t t0) {  // as many accumulators as there are registers for
      constexpr int T = decltype(width)::value, R = PAIRED_X || (AS_IT_LIES && T <= 2) ? ROWS : 2;
      for (int64_t r = 0; r < count; r += R) some(Int<R>{}, width, r, t0);
    });
  }
};

template <class W, class X>
inline auto by_halves(const W& w, const X& x) { return ByHalves<W, X>{w, x}; }

}  // namespace
