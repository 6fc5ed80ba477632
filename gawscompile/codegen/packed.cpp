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

// Of four bits, of which TABLE has the levels.
template <const float* TABLE>
struct FourBits {
  using Code = uint8_t;
  static constexpr int64_t BITS = 4;
  Levels levels;

  template <class... Numbers>
  explicit FourBits(Numbers... scale_and_zero) : levels(Levels::of(TABLE).scaled(scale_and_zero...)) {}
  FourBits() = default;
};

// A byte has the codes of two columns, the first in its upper half. x's even columns come first, then
// the odd ones, of every 2V.
template <const float* TABLE>
struct Pairs : FourBits<TABLE> {
  static constexpr bool PAIRS = true;
  using FourBits<TABLE>::FourBits;
  using FourBits<TABLE>::levels;
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

// A byte has the codes of a row in its upper half and of the row n/2 further down in the other.
template <const float* TABLE>
struct Halved : FourBits<TABLE> {
  static constexpr bool PAIRS = false;
  using FourBits<TABLE>::FourBits;
  using FourBits<TABLE>::levels;
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

// W x: a part of a projection, the first to join a tile's sums.
template <class W>
inline auto unpacked(const W& w, const float* x) {
  return [=](auto& acc, int64_t row, int64_t t0) __attribute__((always_inline)) { unpack_dot(acc, w, row, x + t0 * W::K); };
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
