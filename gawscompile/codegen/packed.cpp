// Weights that are kept as codes of 8 or 4 bits (`ir/packed.py`): numbers are made of them in registers, 2V at a time.
namespace {

// What stands for scales or zeros that are none.
struct Nothing {};

// A scale, or a zero, for each GROUP of a row's columns.
template <int64_t GROUPS, class T>
struct Plain {
  const T* numbers;
  float factor;
  float at(int64_t row, int64_t g) const { return factor * float(numbers[row * GROUPS + g]); }
};

// The same, where they are coded by 8 bits once more.
template <int64_t GROUPS>
struct Coded {
  const uint8_t* codes;
  const float *levels, *outer;
  float offset, factor;
  float at(int64_t row, int64_t g) const {
    const int64_t i = row * GROUPS + g;
    return factor * (levels[codes[i]] * outer[i / 256] + offset);
  }
};

// ---- codes: 2V numbers from where a row's codes lie, and the order in which x's meet them --------------------

// of one byte each
template <class T>
struct Byte {
  using Code = T;
  static constexpr bool PAIRS = false;
  static constexpr int64_t BITS = 8;
  F scale, shift;

  template <class S>
  explicit Byte(S s) : scale(s), shift(0.f) {}
  Byte(float s, float z) : scale(s), shift(-z * s) {}
  Byte() = default;
  static const T* of(const T* codes, int64_t row, int64_t k, int64_t, int64_t size) { return codes + row * size + k; }

  static Pair raw(const T* p) {
#if defined(CPU_CAPABILITY_AVX512)
    const auto wide = [](const T* q) {
      const __m128i codes = _mm_loadu_si128((const __m128i*)q);
      return F(_mm512_cvtepi32_ps(std::is_signed_v<T> ? _mm512_cvtepi8_epi32(codes) : _mm512_cvtepu8_epi32(codes)));
    };
    return {wide(p), wide(p + V)};
#elif defined(CPU_CAPABILITY_AVX2)
    const auto wide = [](const T* q) {
      const __m128i codes = _mm_loadl_epi64((const __m128i*)q);
      return F(_mm256_cvtepi32_ps(std::is_signed_v<T> ? _mm256_cvtepi8_epi32(codes) : _mm256_cvtepu8_epi32(codes)));
    };
    return {wide(p), wide(p + V)};
#else
    float numbers[2 * V];
    for (int i = 0; i < 2 * V; ++i) numbers[i] = float(p[i]);
    return load_pair(numbers);
#endif
  }
  template <bool ZEROS>
  Pair get(const T* p, int64_t) const {
    const Pair q = raw(p);
    if constexpr (ZEROS) return {fmadd(q.lo, scale, shift), fmadd(q.hi, scale, shift)};
    else return {q.lo * scale, q.hi * scale};
  }
};

// The sixteen numbers that codes of four bits stand for in a group: scaled once, they cost nothing more.
struct Levels {
#if defined(CPU_CAPABILITY_AVX512)
  F all;
  Levels scaled(float s) const { return {all * F(s)}; }
  Levels scaled(float s, float z) const { return {fmadd(all, F(s), F(-z * s))}; }
  F operator()(__m512i codes) const { return F(_mm512_permutexvar_ps(codes, all)); }
  static Levels of(const float* p) { return {F::loadu(p)}; }
#elif defined(CPU_CAPABILITY_AVX2)
  F lo, hi;
  Levels scaled(float s) const { return {lo * F(s), hi * F(s)}; }
  Levels scaled(float s, float z) const { return {fmadd(lo, F(s), F(-z * s)), fmadd(hi, F(s), F(-z * s))}; }
  F operator()(__m256i codes) const {
    const __m256 low = _mm256_permutevar8x32_ps(lo, codes), high = _mm256_permutevar8x32_ps(hi, codes);
    return F(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28))));
  }
  static Levels of(const float* p) { return {F::loadu(p), F::loadu(p + V)}; }
#else
  float all[16];
  Levels scaled(float s, float z = 0) const {
    Levels found;
    for (int i = 0; i < 16; ++i) found.all[i] = s * (all[i] - z);
    return found;
  }
  static Levels of(const float* p) {
    Levels found;
    std::memcpy(found.all, p, sizeof found.all);
    return found;
  }
#endif
};

constexpr float NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
constexpr float FP4[16] = {0.0f, 0.005208333333f, 0.66666667f, 1.0f, 0.33333333f, 0.5f, 0.16666667f, 0.25f,
                           0.0f, -0.005208333333f, -0.66666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f};
constexpr float UINT4[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Of four bits: a byte has the codes of two columns, the first in its upper half. x's even columns come first, then
// the odd ones, of every 2V.
template <const float* TABLE>
struct Nibbles {
  using Code = uint8_t;
  static constexpr bool PAIRS = true;
  static constexpr int64_t BITS = 4;
  Levels levels;

  template <class... Numbers>
  explicit Nibbles(Numbers... scale_and_zero) : levels(Levels::of(TABLE).scaled(scale_and_zero...)) {}
  Nibbles() = default;
  static const uint8_t* of(const uint8_t* codes, int64_t row, int64_t k, int64_t, int64_t size) {
    return codes + (row * size + k) / 2;
  }
  template <bool>
  Pair get(const uint8_t* p, int64_t) const {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    return {levels(_mm512_srli_epi32(codes, 4)), levels(codes)};
#elif defined(CPU_CAPABILITY_AVX2)
    const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    return {levels(_mm256_srli_epi32(codes, 4)), levels(codes)};
#else
    float numbers[2 * V];
    for (int i = 0; i < V; ++i) numbers[i] = levels.all[p[i] >> 4], numbers[V + i] = levels.all[p[i] & 15];
    return load_pair(numbers);
#endif
  }
};

// Of four bits: a byte has the codes of a row in its upper half and of the row n/2 further down in the other.
template <const float* TABLE>
struct Split {
  using Code = uint8_t;
  static constexpr bool PAIRS = false;
  static constexpr int64_t BITS = 4;
  Levels levels;

  template <class... Numbers>
  explicit Split(Numbers... scale_and_zero) : levels(Levels::of(TABLE).scaled(scale_and_zero...)) {}
  Split() = default;
  static const uint8_t* of(const uint8_t* codes, int64_t row, int64_t k, int64_t n, int64_t size) {
    return codes + (row < n / 2 ? row : row - n / 2) * size + k;
  }
  template <bool>
  Pair get(const uint8_t* p, int64_t upper) const {
    const int shift = upper ? 4 : 0;
#if defined(CPU_CAPABILITY_AVX512)
    const auto some = [&](const uint8_t* q) {
      return levels(_mm512_srli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)q)), shift));
    };
    return {some(p), some(p + V)};
#elif defined(CPU_CAPABILITY_AVX2)
    const auto some = [&](const uint8_t* q) {
      const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)q));
      return levels(_mm256_and_si256(_mm256_srli_epi32(codes, shift), _mm256_set1_epi32(15)));
    };
    return {some(p), some(p + V)};
#else
    float numbers[2 * V];
    for (int i = 0; i < 2 * V; ++i) numbers[i] = levels.all[p[i] >> shift & 15];
    return load_pair(numbers);
#endif
  }
};

// Of four bits, by blocks of 32 rows: for two columns that follow each other 32 bytes, of rows i and i + 16 the first
// column's and the second's. TABLE's levels are an operand; scales lie by groups, those of all N rows after each other.
template <int64_t K_, int64_t N_, int64_t GROUP_, class TS>
struct Blocks {
  static constexpr int64_t K = K_, N = N_, GROUP = GROUP_, ROWS_OF_ONE = 32;
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

// A share of a weight that lies in blocks: the rows of some are summed up in z, then f(first, last, z, ldz) expands them.
template <class W, class TX, class Fn>
inline void by_blocks(Share& share, int64_t cost, int64_t m, const W& w, const TX* x, Fn&& f) {
  constexpr int64_t SIZE = W::ROWS_OF_ONE;
  static thread_local Buffer sums;
  share.range(W::N / SIZE, SIZE / ROWS * cost, [&](int64_t first, int64_t last) {
    const int64_t ldz = 8 * SIZE;
    for (int64_t at = first * SIZE; at < last * SIZE; at += ldz) {
      const int64_t count = min(ldz, last * SIZE - at);
      float* z = sums.of(m * ldz);
      for_tokens(0, m, [&](auto width, int64_t t0) {
        for (int64_t row = 0; row < count; row += SIZE)
          w.template dot<decltype(width)::value>(at + row, x + t0 * W::K, z + t0 * ldz + row, ldz);
      });
      f(at / ROWS, (at + count) / ROWS, z - at, ldz);
    }
  });
}

// ---- a weight ------------------------------------------------------------------------------------------------

template <int64_t K_, int64_t N_, int64_t GROUP_, class Codes_, class Scales, class Zeros>
struct Packed {
  static constexpr int64_t K = K_, N = N_, GROUP = GROUP_;
  using Codes = Codes_;
  static constexpr bool SCALES = !std::is_same_v<Scales, Nothing>, ZEROS = !std::is_same_v<Zeros, Nothing>;
  // a scale for a whole row waits until the row is summed up
  static constexpr bool LATE = SCALES && !ZEROS && GROUP == K && Codes::BITS == 8;
  const typename Codes::Code* codes;
  Scales scales;
  Zeros zeros;

  Codes group(int64_t row, int64_t g) const {
    if constexpr (!SCALES || LATE) return Codes(1.f);
    else if constexpr (ZEROS) return Codes(scales.at(row, g), zeros.at(row, g));
    else return Codes(scales.at(row, g));
  }
  const typename Codes::Code* at(int64_t row, int64_t k) const { return Codes::of(codes, row, k, N, K); }
  Pair get(const Codes& group, int64_t row, int64_t k) const {
    if constexpr ((!SCALES || LATE) && Codes::BITS == 8) return Codes::raw(at(row, k));
    else return group.template get<ZEROS>(at(row, k), row < N / 2);
  }
};

template <int64_t K, int64_t N, int64_t GROUP, class Codes, class Scales, class Zeros>
auto packed(const typename Codes::Code* codes, Scales scales, Zeros zeros) {
  return Packed<K, N, GROUP, Codes, Scales, Zeros>{codes, scales, zeros};
}

// x in fp32, in the order in which codes are read: a thread's own copy, unless it lies so already.
template <class Codes, int64_t K, class TX>
inline const float* ordered(const TX* x, int64_t m) {
  if constexpr (std::is_same_v<TX, float> && !Codes::PAIRS) {
    return x;
  } else {
    static thread_local Buffer numbers;
    float* found = numbers.of(m * K);
    for (int64_t at = 0; at < m * K; at += 2 * V) {
      const Pair v = load_pair(x + at);
#if defined(CPU_CAPABILITY_AVX512)
      if constexpr (Codes::PAIRS) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        store_pair(found + at, Pair{_mm512_permutex2var_ps(v.lo, even, v.hi), _mm512_permutex2var_ps(v.lo, odd, v.hi)});
        continue;
      }
#endif
      store_pair(found + at, v);
      if constexpr (Codes::PAIRS) {
        float line[2 * V];
        std::memcpy(line, found + at, sizeof line);
        for (int i = 0; i < V; ++i) found[at + i] = line[2 * i], found[at + V + i] = line[2 * i + 1];
      }
    }
    return found;
  }
}

// acc[r][t] = W x for R rows and T tokens: nothing has joined the sums before.
template <int R, int T, class W>
[[gnu::always_inline]] inline void unpack_dot(F (&acc)[R][T], const W& w, int64_t row, const float* x) {
  constexpr int64_t K = W::K, G = W::GROUP, BYTES = 2 * V * W::Codes::BITS / 8;
  for (int64_t g = 0; g < K / G; ++g) {
    typename W::Codes groups[R];
    for (int r = 0; r < R; ++r) groups[r] = w.group(row + r, g);
    for (int64_t k = g * G; k < (g + 1) * G; k += 2 * V) {
      Pair xs[T];
      for (int t = 0; t < T; ++t) xs[t] = load_pair(x + t * K + k);
      const char* ahead = (const char*)w.at(row, 0) + R * (k / (2 * V)) * BYTES + AHEAD;
      for (int at = 0; at < R * BYTES; at += LINE) __builtin_prefetch(ahead + at, 0, 2);
      for (int r = 0; r < R; ++r) {
        const Pair v = w.get(groups[r], row + r, k);
        for (int t = 0; t < T; ++t) {
          acc[r][t] = fmadd(v.lo, xs[t].lo, acc[r][t]);
          acc[r][t] = fmadd(v.hi, xs[t].hi, acc[r][t]);
        }
      }
    }
  }
  if constexpr (W::LATE)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) acc[r][t] = acc[r][t] * F(w.scales.at(row + r, 0));
}

// A share of a weight whose bytes have codes of rows n/2 apart: both rows are summed up while a byte is at hand. `f` is
// by_blocks' and is called for the upper rows, then for the lower.
template <class W, class Fn>
inline void by_halves(Share& share, int64_t cost, int64_t m, const W& w, const float* x, Fn&& f) {
  constexpr int64_t K = W::K, G = W::GROUP, HALF = W::N / 2, LDZ = 256;
  static_assert(HALF % ROWS == 0 && !W::Codes::PAIRS);
  static thread_local Buffer sums;
  share.range(HALF / ROWS, 2 * cost, [&](int64_t first, int64_t last) {
    for (int64_t at = first * ROWS; at < last * ROWS; at += LDZ) {
      const int64_t count = min(LDZ, last * ROWS - at);
      float* z = sums.of(2 * m * LDZ);
      const auto some = [&](auto rows, auto width, int64_t r, int64_t t0) {
        constexpr int R = decltype(rows)::value, T = decltype(width)::value;
        F upper[R][T], lower[R][T];
        clear(upper), clear(lower);
        for (int64_t g = 0; g < K / G; ++g) {
          typename W::Codes high[R], low[R];
          for (int i = 0; i < R; ++i) high[i] = w.group(at + r + i, g), low[i] = w.group(HALF + at + r + i, g);
          for (int64_t k = g * G; k < (g + 1) * G; k += 2 * V) {
            Pair xs[T];
            for (int t = 0; t < T; ++t) xs[t] = load_pair(x + (t0 + t) * K + k);
            const char* ahead = (const char*)w.at(at + r, 0) + R * k + AHEAD;
            for (int i = 0; i < R * 2 * V; i += LINE) __builtin_prefetch(ahead + i, 0, 2);
            for (int i = 0; i < R; ++i) {
              const Pair a = w.get(high[i], at + r + i, k), b = w.get(low[i], HALF + at + r + i, k);
              for (int t = 0; t < T; ++t) {
                upper[i][t] = fmadd(a.hi, xs[t].hi, fmadd(a.lo, xs[t].lo, upper[i][t]));
                lower[i][t] = fmadd(b.hi, xs[t].hi, fmadd(b.lo, xs[t].lo, lower[i][t]));
              }
            }
          }
        }
        for (int t = 0; t < T; ++t)
          for (int i = 0; i < R; ++i) {
            z[(t0 + t) * LDZ + r + i] = sum(upper[i][t]);
            z[(m + t0 + t) * LDZ + r + i] = sum(lower[i][t]);
          }
      };
      for_tokens(0, m, [&](auto width, int64_t t0) {  // as many accumulators as there are registers for
        constexpr int R = decltype(width)::value <= 2 ? ROWS : 2;
        for (int64_t r = 0; r < count; r += R) some(Int<R>{}, width, r, t0);
      });
      f(at / ROWS, (at + count) / ROWS, z - at, LDZ);
      f((HALF + at) / ROWS, (HALF + at + count) / ROWS, z + m * LDZ - HALF - at, LDZ);
    }
  });
}

// W x: a part of a projection, the first to join a tile's sums.
template <class W>
inline auto unpacked(const W& w, const float* x) {
  return [=](auto& acc, int64_t row, int64_t t0) __attribute__((always_inline)) { unpack_dot(acc, w, row, x + t0 * W::K); };
}

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

// W as a matrix, for the library.
template <class W, class T>
void unpack(const W& w, T* out) {
#pragma omp parallel for
  for (int64_t row = 0; row < W::N; ++row)
    for (int64_t k = 0; k < W::K; k += 2 * V) {
      Pair v = w.get(w.group(row, k / W::GROUP), row, k);
      if constexpr (W::LATE) {
        const F s(w.scales.at(row, 0));
        v = {v.lo * s, v.hi * s};
      }
      if constexpr (W::Codes::PAIRS) {
#if defined(CPU_CAPABILITY_AVX512)
        const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        v = {_mm512_permutex2var_ps(v.lo, first, v.hi), _mm512_permutex2var_ps(v.lo, second, v.hi)};
#else
        float even[2 * V], line[2 * V];
        store_pair(even, v);
        for (int i = 0; i < V; ++i) line[2 * i] = even[i], line[2 * i + 1] = even[V + i];
        v = load_pair(line);
#endif
      }
      store_pair(out + row * W::K + k, v);
    }
}

}  // namespace
