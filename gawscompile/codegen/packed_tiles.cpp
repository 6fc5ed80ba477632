// Packed weights that lie in tiles of rows, as aten keeps 4 bits on CPUs (`ir/packed.py`). Stands behind `packed_rows.cpp`,
// which sums rows up before adapters join them.
namespace {

#if defined(CPU_CAPABILITY_AVX2)
// x in fp32. A lone token in bf16 is made whole numbers, too. Two are not: their sums take more registers than there are.
template <int64_t K, int64_t GROUP>
struct Lone {
  const float* numbers;
  Wholes<TilesAsBytes, K, GROUP> wholes;
  bool alone;
  Lone from(int64_t t) const { return {numbers + t * K, wholes, alone}; }
};
#endif

// Of four bits, by tiles of ROWS rows: for each column half as many bytes, of rows i and i + ROWS / 2. Scales lie by groups,
// those of all N rows after each other, each followed by what is added to the group's numbers.
// FULL: x has all of fp32's digits, and codes get their sign before they are summed up. Else sums are of codes as they
// are, which takes less, and costs a digit of fp32.
template <int64_t K_, int64_t N_, int64_t GROUP_, int64_t HIGH_, bool FULL_, class TS>
struct Tiles {
  static constexpr int64_t K = K_, N = N_, GROUP = GROUP_, ROWS_OF_ONE = HIGH_, BYTES = HIGH_ / 2;
  static constexpr bool FULL = FULL_;
  static constexpr int AT_ONCE = V == 16 ? 4 : 2;  // tokens whose sums stay in registers
  const uint8_t* codes;
  const TS* scales;
  const int32_t* order;  // of x's features, if they have one

  const uint8_t* at(int64_t row, int64_t k) const { return codes + row * (K / 2) + k * BYTES; }

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  static constexpr int NEARBY = 4 << 10, C = HIGH_ / V;  // vectors of rows

#if defined(CPU_CAPABILITY_AVX512)
  // What the sixteen codes stand for.
  static F levels() { return F(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(EACH), _mm512_set1_epi32(8)))); }
#endif

  // A column's bytes and their lower halves; if FULL, what the codes of both halves stand for.
  static void column(const uint8_t* p, F (&w)[C]) {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (FULL) {  // a look-up takes the lowest four bits by itself, and is one step where arithmetic takes three
      const F all = levels();
      for (int c = 0; c < C / 2; ++c) {
        const __m512i some = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + c * V)));
        w[c] = F(_mm512_permutexvar_ps(some, all));
        w[C / 2 + c] = F(_mm512_permutexvar_ps(_mm512_srli_epi32(some, 4), all));
      }
      return;
    }
#endif
    for (int c = 0; c < C / 2; ++c) w[c] = lower_of(p + c * V), w[C / 2 + c] = bytes_of(p + c * V);
    if (!FULL) return;
    halve(w);
    for (F& number : w) number = number + F(-8.f);
  }

  // Upper halves in the place of bytes.
  static void halve(F (&w)[C]) {
    for (int c = 0; c < C / 2; ++c) w[C / 2 + c] = upper_of(w[C / 2 + c], w[c]);
  }

  // Sums of a group's codes times T tokens of x.
  template <int T>
  void columns(F (&part)[T][C], int64_t row, const float* x, int64_t g) const {
    F w[C];
    for (F (&p)[C] : part)
      for (F& one : p) one = F(0.f);
    for (int64_t k = g * GROUP; k < (g + 1) * GROUP; ++k) {
      const uint8_t* p = at(row, k);
      __builtin_prefetch(p + NEARBY, 0, 2);
      column(p, w);
      for (int t = 0; t < T; ++t)
        for (int c = 0; c < C; ++c) part[t][c] = fmadd(w[c], F(x[t * K + k]), part[t][c]);
    }
    if (!FULL)
      for (F (&p)[C] : part) halve(p);
  }

#if defined(CPU_CAPABILITY_AVX512)
  static constexpr bool PAIRED_COLUMNS = false;
#else
  static constexpr bool PAIRED_COLUMNS = BYTES == 16 && !FULL;
  // The same of one token, two columns at a time and without a shuffle: lanes are words of four bytes, whose halves
  // `half_of` makes numbers. Lane i of the lower or upper four has rows 4i and on.
  void pairs(F (&part)[C], int64_t row, const float* x, int64_t g) const {
    const __m256i each = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    __m256 sums[8];
    for (__m256& one : sums) one = _mm256_setzero_ps();
    for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += 2) {
      const uint8_t* p = at(row, k);
      __builtin_prefetch(p + NEARBY, 0, 2);
      const __m256i words = _mm256_loadu_si256((const __m256i*)p);
      double two;
      std::memcpy(&two, x + k, sizeof two);
      const __m256 xs = _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(two)), each);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        sums[j] = fmadd(half_of(words, j), F(xs), F(sums[j]));
      }
    }
    __m128 rows[2][4];  // of lower halves, and of upper ones
    for (int j = 0; j < 8; ++j) {
      const __m128 both = _mm_add_ps(_mm256_castps256_ps128(sums[j]), _mm256_extractf128_ps(sums[j], 1));
      rows[j % 2][j / 2] = _mm_mul_ps(both, _mm_set1_ps(factor_of(j)));
    }
    for (int half = 0; half < 2; ++half) {
      auto& r = rows[half];
      _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
      for (int i = 0; i < 2; ++i) part[2 * half + i] = F(_mm256_set_m128(r[2 * i + 1], r[2 * i]));
    }
  }
#endif

#if defined(CPU_CAPABILITY_AVX2)
  // Sums of 64 columns from k on times an x in bytes, four columns at a time: bytes of the first and third meet in one half
  // of a vector, those of the others in the other.
  [[gnu::always_inline]] void bytes(__m256i (&sums)[C], int64_t row, int64_t k, const int16_t* x) const {
    const __m256i mask = _mm256_set1_epi8(15), places = _mm256_set1_epi32(1 << 16 | 256);  // of upper and lower bytes
    const __m256i each = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    __m256i wide[2][4] = {};                // of lower and upper halves, four rows each, by halves of vectors
    for (int part = 0; part < 2; ++part) {  // of 32 columns: their sums fit into 16 bits
      __m256i narrow[2][2][2] = {};         // of lower and upper halves, eight rows each, times x's upper and lower bytes
#pragma GCC unroll 2
      for (int i = 0; i < 8; ++i) {  // not longer: sums of sums would be made, in memory
        const int64_t four = 8 * part + i;
        const __m256i* p = (const __m256i*)at(row, k + 4 * four);
        __builtin_prefetch((const char*)p + near(1), 0, 2);
        const __m256i first = _mm256_loadu_si256(p), second = _mm256_loadu_si256(p + 1);
        __m256i xs[2];
        for (int b = 0; b < 2; ++b) {
          int64_t two;
          std::memcpy(&two, x + 8 * four + 4 * b, sizeof two);
          xs[b] = _mm256_castps_si256(_mm256_permutevar_ps(_mm256_castsi256_ps(_mm256_set1_epi64x(two)), each));
        }
        for (int eight = 0; eight < 2; ++eight) {
          const __m256i some = eight ? _mm256_unpackhi_epi8(first, second) : _mm256_unpacklo_epi8(first, second);
          for (int half = 0; half < 2; ++half) {
            const __m256i codes = _mm256_and_si256(half ? _mm256_srli_epi16(some, 4) : some, mask);
            for (int b = 0; b < 2; ++b) {
              __m256i& sum = narrow[half][eight][b];
              sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, xs[b]));
            }
          }
        }
      }
      for (int half = 0; half < 2; ++half)
        for (int eight = 0; eight < 2; ++eight) {
          const auto& [upper, lower] = narrow[half][eight];
          __m256i* to = wide[half] + 2 * eight;
          to[0] = _mm256_add_epi32(to[0], _mm256_madd_epi16(_mm256_unpacklo_epi16(upper, lower), places));
          to[1] = _mm256_add_epi32(to[1], _mm256_madd_epi16(_mm256_unpackhi_epi16(upper, lower), places));
        }
    }
    for (int c = 0; c < C; ++c) {
      const __m256i *four = wide[c / 2] + 2 * (c % 2), first = four[0], second = four[1];
      sums[c] = _mm256_add_epi32(
          _mm256_permute2x128_si256(first, second, 0x20), _mm256_permute2x128_si256(first, second, 0x31));
    }
  }

  // Those of rests, in a function of its own, as few are asked for.
  [[gnu::noinline, gnu::cold]] void of_rests(__m256i (&sums)[C], int64_t row, int64_t k, const int16_t* rests) const {
    bytes(sums, row, k, rests);
  }

  // z = HIGH rows from `row` on times a lone token
  void lone(int64_t row, const Wholes<TilesAsBytes, K, GROUP>& x, float* z) const {
    F acc[C], s[C], added[C];
    for (F& a : acc) a = F(0.f);
    for (int64_t g = 0; g < K / GROUP; ++g) {
      F part[C];
      for (F& p : part) p = F(0.f);
      const auto join = [&](const __m256i (&sums)[C], float by) {
        for (int c = 0; c < C; ++c) part[c] = fmadd(F(_mm256_cvtepi32_ps(sums[c])), F(by), part[c]);
      };
      for (int64_t step = g * (GROUP / 64); step < (g + 1) * (GROUP / 64); ++step) {
        __m256i sums[C];
        bytes(sums, row, 64 * step, x.numbers + step * x.STEP);
        join(sums, x.units[step]);
        if (x.finer[step] == 0) continue;
        __m256i rests[C];
        of_rests(rests, row, 64 * step, x.rests + step * x.STEP);
        join(rests, x.finer[step]);
      }
      scaled(row, g, s, added);
      for (int c = 0; c < C; ++c)
        acc[c] = fmadd(part[c], s[c], fmadd(F(x.sums[g]), fmadd(F(-8.f), s[c], added[c]), acc[c]));
    }
    for (int c = 0; c < C; ++c) acc[c].store(z + c * V);
  }

  template <int T>
  void dot(int64_t row, const Lone<K, GROUP>& x, float* z, int64_t ldz) const {
    if constexpr (T == 1 && BYTES == 16)
      if (x.alone) return lone(row, x.wholes, z);
    dot<T>(row, x.numbers, z, ldz);
  }
#endif

  // A group's scales, of all rows, and what is added.
  void scaled(int64_t row, int64_t g, F (&s)[C], F (&z)[C]) const {
    const TS* p = scales + (g * N + row) * 2;
    for (int c = 0; c < C; ++c) {
      const Pair both = load_pair(p + c * 2 * V);
#if defined(CPU_CAPABILITY_AVX512)
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
      s[c] = F(_mm512_permutex2var_ps(both.lo, even, both.hi)), z[c] = F(_mm512_permutex2var_ps(both.lo, odd, both.hi));
#else
      const auto ordered = [](__m256 lanes) {
        return F(_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(lanes), 0xd8)));
      };
      s[c] = ordered(_mm256_shuffle_ps(both.lo, both.hi, 0x88)), z[c] = ordered(_mm256_shuffle_ps(both.lo, both.hi, 0xdd));
#endif
    }
  }
#endif

  // z[t] = HIGH rows from `row` on times x[t], for T tokens
  template <int T>
  void dot(int64_t row, const float* x, float* z, int64_t ldz) const {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    F acc[T][C], s[C], added[C];
    for (int t = 0; t < T; ++t)
      for (F& a : acc[t]) a = F(0.f);
    for (int64_t g = 0; g < K / GROUP; ++g) {
      float totals[T];
      for (int t = 0; t < T; ++t) {
        Pair all = {F(0.f), F(0.f)};
        for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += 2 * V) {
          const Pair xs = load_pair(x + t * K + k);
          all = {all.lo + xs.lo, all.hi + xs.hi};
        }
        totals[t] = sum(all.lo + all.hi);
      }
      F part[T][C];
      if constexpr (T == 1 && PAIRED_COLUMNS) pairs(part[0], row, x, g);
      else columns(part, row, x, g);
      scaled(row, g, s, added);
      for (int c = 0; c < C; ++c) {
        if (!FULL) added[c] = fmadd(F(-8.f), s[c], added[c]);
        for (int t = 0; t < T; ++t) acc[t][c] = fmadd(part[t][c], s[c], fmadd(F(totals[t]), added[c], acc[t][c]));
      }
    }
    for (int t = 0; t < T; ++t)
      for (int c = 0; c < C; ++c) acc[t][c].store(z + t * ldz + c * V);
#else
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < HIGH_; ++r) {
        float sum = 0;
        for (int64_t k = 0; k < K; ++k) sum += number(row, r, k) * x[t * K + k];
        z[t * ldz + r] = sum;
      }
#endif
  }

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  // The same for an x in bf16: vdpbf16ps sums two columns up by itself, and what codes stand for is exact.
  template <int T>
  void dot(int64_t row, const bf16* x, float* z, int64_t ldz) const {
    static_assert(C == 4 && GROUP % 64 == 0);
    constexpr int CHAINS = T == 1 ? 2 : 1;  // one multiply-add waits for the one before
    const __m512i all = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(levels()));
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    F acc[T][C], s[C], added[C];
    for (int t = 0; t < T; ++t)
      for (F& a : acc[t]) a = F(0.f);
    for (int64_t g = 0; g < K / GROUP; ++g) {
      F part[CHAINS][T][C], total[T];
      for (auto& chain : part)
        for (auto& of_token : chain)
          for (F& p : of_token) p = F(0.f);
      for (int64_t at_once = g * GROUP; at_once < (g + 1) * GROUP; at_once += 2 * CHAINS)
#pragma GCC unroll 2
        for (int chain = 0; chain < CHAINS; ++chain) {
          const int64_t k = at_once + 2 * chain;
          const uint8_t* p = at(row, k);
          __builtin_prefetch(p + NEARBY, 0, 2);
          const __m256i first = _mm256_loadu_si256((const __m256i*)p), second = _mm256_loadu_si256((const __m256i*)p + 1);
          // of both columns rows 0 to 7 and 16 to 23, then the others; of their upper halves 32 rows further down
          const __m512i low = _mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(first, second));
          const __m512i high = _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(first, second));
          const __m512i w[C] = {
              _mm512_permutexvar_epi16(low, all), _mm512_permutexvar_epi16(high, all),
              _mm512_permutexvar_epi16(_mm512_srli_epi16(low, 4), all),
              _mm512_permutexvar_epi16(_mm512_srli_epi16(high, 4), all)};
          for (int t = 0; t < T; ++t) {
            int32_t both;
            std::memcpy(&both, x + t * K + k, sizeof both);
            const __m512bh xs = (__m512bh)_mm512_set1_epi32(both);
            for (int c = 0; c < C; ++c) {
              F& sum = part[chain][t][c];
              sum = F(_mm512_dpbf16_ps(sum, (__m512bh)w[c], xs));
            }
          }
        }
      for (int t = 0; t < T; ++t) {
        F lanes(0.f);
        for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += 32)
          lanes = F(_mm512_dpbf16_ps(lanes, (__m512bh)_mm512_loadu_si512(x + t * K + k), ones));
        total[t] = F(sum(lanes));
      }
      scaled(row, g, s, added);
      for (int t = 0; t < T; ++t) {
        for (int c = 0; CHAINS == 2 && c < C; ++c) part[0][t][c] = part[0][t][c] + part[CHAINS - 1][t][c];
        for (int c = 0; c < C; ++c) {
          const F &lo = part[0][t][c / 2 * 2], &hi = part[0][t][c / 2 * 2 + 1];
          const F rows(c % 2 ? _mm512_shuffle_f32x4(lo, hi, 0xee) : _mm512_shuffle_f32x4(lo, hi, 0x44));
          acc[t][c] = fmadd(rows, s[c], fmadd(total[t], added[c], acc[t][c]));
        }
      }
    }
    for (int t = 0; t < T; ++t)
      for (int c = 0; c < C; ++c) acc[t][c].store(z + t * ldz + c * V);
  }
#endif

  float number(int64_t row, int r, int64_t k) const {
    const uint8_t byte = at(row, k)[r % BYTES];
    const TS* p = scales + (k / GROUP * N + row + r) * 2;
    return float((r < BYTES ? byte & 15 : byte >> 4) - 8) * float(p[0]) + float(p[1]);
  }
};

template <int64_t K, int64_t N, int64_t GROUP, int64_t HIGH, bool FULL, class TS>
auto tiles_of(const uint8_t* codes, const TS* scales, const int32_t* order) {
  return Tiles<K, N, GROUP, HIGH, FULL, TS>{codes, scales, order};
}

// The feature that an index means, as aten has it, or -1.
template <int64_t K>
inline int64_t feature(int32_t index) { return index < -K || index >= K ? -1 : index < 0 ? index + K : index; }

// x's features as numbers T, in the order of the columns of weight number I if they have one: a thread's own copy.
// Features that there are not are NaN.
template <int64_t K, int I, class T, class TX>
inline const T* gathered(const TX* x, int64_t m, const int32_t* order) {
  if constexpr (std::is_same_v<TX, T>)
    if (!order) return x;
  static thread_local Buffer own;
  T* found = (T*)own.of(m * K);
  if (!order)
    for (int64_t at = 0; at < m * K; at += 2 * V) store_pair(found + at, load_pair(x + at));
  else
    for (int64_t k = 0; k < K; ++k) {
      const int64_t from = feature<K>(order[k]);
      for (int64_t t = 0; t < m; ++t) found[t * K + k] = T(from < 0 ? __builtin_nanf("") : float(x[t * K + from]));
    }
  return found;
}

// The same as weight w reads it.
template <int I, class W, class TX>
inline auto in_tiles(const W& w, const TX* x, int64_t m) {
  constexpr bool PAIRS = in_pairs<TX>(W::GROUP) && W::BYTES == 32;
  const auto* found = gathered<W::K, I, std::conditional_t<PAIRS, bf16, float>>(x, m, w.order);
#if defined(CPU_CAPABILITY_AVX2)
  constexpr bool WHOLE = std::is_same_v<TX, bf16> && W::BYTES == 16 && fits<TilesAsBytes>(W::GROUP);
  if constexpr (WHOLE) {
    using X = Lone<W::K, W::GROUP>;
    return m == 1 ? X{found, wholes<TilesAsBytes, W::K, W::GROUP, I>(found, 1), true} : X{found, {}, false};
  } else return found;
#else
  return found;
#endif
}

// Adds a number of column k to the feature that it belongs to; two columns may have the same.
template <class W, class T>
inline void put(const W& w, int64_t row, int64_t k, float number, T* out) {
  const int64_t to = feature<W::K>(w.order[k]);
  if (to < 0) out[row * W::K] = T(__builtin_nanf(""));
  else out[row * W::K + to] = T(float(out[row * W::K + to]) + number);
}

template <int64_t K, int64_t N, int64_t GROUP, int64_t HIGH, bool FULL, class TS, class T>
void unpack(const Tiles<K, N, GROUP, HIGH, FULL, TS>& w, T* out) {
#pragma omp parallel for
  for (int64_t row = 0; row < N; row += HIGH) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    constexpr int C = HIGH / V;
    float columns[2 * V][HIGH];
    if (w.order) std::memset((void*)(out + row * K), 0, HIGH * K * sizeof(T));
    for (int64_t k = 0; k < K; k += 2 * V) {
      F level[C], s[C], added[C];
      w.scaled(row, k / GROUP, s, added);
      for (int i = 0; i < 2 * V; ++i) {
        w.column(w.at(row, k + i), level);
        if (!FULL) w.halve(level);
        for (int c = 0; c < C; ++c) {
          if (!FULL) level[c] = level[c] + F(-8.f);
          fmadd(level[c], s[c], added[c]).store(columns[i] + c * V);
        }
      }
      for (int r = 0; r < HIGH; ++r) {
        float line[2 * V];
        for (int i = 0; i < 2 * V; ++i) line[i] = columns[i][r];
        if (w.order) {
          for (int i = 0; i < 2 * V; ++i) put(w, row + r, k + i, line[i], out);
          continue;
        }
        store_pair(out + (row + r) * K + k, load_pair(line));
      }
    }
#else
    if (w.order) std::memset((void*)(out + row * K), 0, HIGH * K * sizeof(T));
    for (int r = 0; r < HIGH; ++r)
      for (int64_t k = 0; k < K; ++k)
        if (w.order) put(w, row + r, k, w.number(row, r, k), out);
        else out[(row + r) * K + k] = T(w.number(row, r, k));
#endif
  }
}

}  // namespace
