// Weights that are kept as codes of 8 or 4 bits (`ir/packed.py`): numbers are made of them in registers, 2V at a time.
namespace {

// What stands for scales or zeros that are none.
struct Nothing {};

#if defined(CPU_CAPABILITY_AVX512)
constexpr int32_t EACH[V] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
inline __mmask16 some(int count) { return (__mmask16)((1u << count) - 1); }
inline __m512i bytes(const uint8_t* p, int count) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some(count), p));
}
#endif

// V bytes as numbers.
template <class T>
inline F bytes_of(const T* p) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i codes = _mm_loadu_si128((const __m128i*)p);
  return F(_mm512_cvtepi32_ps(std::is_signed_v<T> ? _mm512_cvtepi8_epi32(codes) : _mm512_cvtepu8_epi32(codes)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i codes = _mm_loadl_epi64((const __m128i*)p);
  return F(_mm256_cvtepi32_ps(std::is_signed_v<T> ? _mm256_cvtepi8_epi32(codes) : _mm256_cvtepu8_epi32(codes)));
#else
  float numbers[V];
  for (int i = 0; i < V; ++i) numbers[i] = float(p[i]);
  return F::loadu(numbers);
#endif
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// V numbers of any dtype, or with AVX-512 the first `count`.
template <class T>
inline F numbers_of(const T* p, [[maybe_unused]] int count) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(T) > 1) return widened(p, count);
  else if constexpr (!std::is_signed_v<T>) return F(_mm512_cvtepi32_ps(bytes(p, count)));
  else return F(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some(count), p))));
#else
  if constexpr (sizeof(T) == 1) return bytes_of(p);
  else if constexpr (std::is_same_v<T, float>) return F::loadu(p);
  else return widened(p);
#endif
}
#endif

// A scale, or a zero, for each GROUP of a row's columns; V of them where there are such vectors, or with AVX-512 `count`.
template <int64_t GROUPS, class T>
struct Plain {
  const T* numbers;
  float factor;
  float at(int64_t row, int64_t g) const { return factor * float(numbers[row * GROUPS + g]); }
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  F at(int64_t row, int64_t g, int count) const { return F(factor) * numbers_of(numbers + row * GROUPS + g, count); }
#endif
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
#if defined(CPU_CAPABILITY_AVX512)
  F at(int64_t row, int64_t g, int count) const {
    const int64_t i = row * GROUPS + g;
    const F level(_mm512_i32gather_ps(bytes(codes + i, count), levels, 4));
    if (i % 256 <= 256 - count) return F(factor) * fmadd(level, F(outer[i / 256]), F(offset));  // gathers are slow
    const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(int(i % 256)), _mm512_loadu_si512(EACH));
    const F wide(_mm512_mask_i32gather_ps(
        _mm512_setzero_ps(), some(count), _mm512_srli_epi32(places, 8), outer + i / 256, 4));
    return F(factor) * fmadd(level, wide, F(offset));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  F at(int64_t row, int64_t g, int) const {
    const int64_t i = row * GROUPS + g;
    float level[V], wide[V];  // gathers are slower on half of these CPUs
    for (int j = 0; j < V; ++j) level[j] = levels[codes[i + j]];
    if (i % 256 <= 256 - V) return F(factor) * fmadd(F::loadu(level), F(outer[i / 256]), F(offset));
    for (int j = 0; j < V; ++j) wide[j] = outer[(i + j) / 256];
    return F(factor) * fmadd(F::loadu(level), F::loadu(wide), F(offset));
  }
#endif
};

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
constexpr bool PAIRED = true;
#else
constexpr bool PAIRED = false;
#endif

// The lower halves of V bytes as numbers.
inline F lower_of(const uint8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  return F(_mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(15))));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  return F(_mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(15))));
#else
  float numbers[V];
  for (int i = 0; i < V; ++i) numbers[i] = float(p[i] & 15);
  return F::loadu(numbers);
#endif
}

// The upper halves of bytes, or sums of them, of those of the bytes and of their lower halves.
inline F upper_of(F bytes, F lower) { return fmadd(bytes, F(1 / 16.f), lower * F(-1 / 16.f)); }

// ---- codes: 2V numbers from where a row's codes lie, and the order in which x's meet them. `InBf16` makes the numbers
// of 64 columns in bf16, less OFFSET: those of even columns are a sum of PARTS, and so are those of odd ones -----

// of one byte each
template <class T>
struct Byte {
  using Code = T;
  template <class TX>
  using Order = std::conditional_t<std::is_same_v<TX, bf16>, BytesAsWholes<T>, AsItLies>;
  static constexpr bool PAIRS = false;
  static constexpr int64_t BITS = 8;
  F scale, shift;

  template <class S>
  explicit Byte(S s) : scale(s), shift(0.f) {}
  Byte(float s, float z) : scale(s), shift(-z * s) {}
  Byte() = default;
  static const T* of(const T* codes, int64_t row, int64_t k, int64_t, int64_t size) { return codes + row * size + k; }

  static Pair raw(const T* p) { return {bytes_of(p), bytes_of(p + V)}; }
  template <bool ZEROS>
  Pair get(const T* p, int64_t) const {
    const Pair q = raw(p);
    if constexpr (ZEROS) return {fmadd(q.lo, scale, shift), fmadd(q.hi, scale, shift)};
    else return {q.lo * scale, q.hi * scale};
  }

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  // A number less OFFSET is 128 and its lower seven bits, plus -128 or -256: one bitwise step makes either. Both are exact,
  // and the sum of their products is as exact as fp32 is at 256 |x|. (An infinite x gives NaN.)
  struct InBf16 {
    static constexpr int PARTS = 2;
    static constexpr float OFFSET = std::is_signed_v<T> ? 0.f : 128.f;
    void get(__m512bh (&even)[2], __m512bh (&odd)[2], const T* p, bool) const {
      split(even, _mm512_loadu_si512(p));
      split(odd, _mm512_srli_epi16(_mm512_loadu_si512(p), 8));
    }
    static void split(__m512bh (&parts)[2], __m512i codes) {
      constexpr int AND_OR = 0xea, ANDNOT_OR = 0xae, LOWER = std::is_signed_v<T> ? AND_OR : ANDNOT_OR;
      const auto word = [](int bits) { return _mm512_set1_epi16(short(bits)); };
      parts[0] = (__m512bh)_mm512_ternarylogic_epi32(codes, word(0x007f), word(0x4300), AND_OR);
      parts[1] = (__m512bh)_mm512_ternarylogic_epi32(codes, word(0x0080), word(0xc300), LOWER);
    }
  };
#endif
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

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  // Levels are rounded to bf16, as libraries round a weight before they multiply it.
  struct Rounded {
    static constexpr int PARTS = 1;
    static constexpr float OFFSET = 0;
    const __m512i levels = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(F::loadu(TABLE)));
    __m512bh operator()(__m512i codes) const { return (__m512bh)_mm512_permutexvar_epi16(codes, levels); }
  };
#endif
};

// A byte has the codes of two columns, the first in its upper half. x's even columns come first, then
// the odd ones, of every 2V.
template <const float* TABLE>
struct Pairs : FourBits<TABLE> {
  template <class TX>
  using Order = std::conditional_t<std::is_same_v<TX, bf16>, LevelsAsWholes<TABLE>, ByBytes<TABLE>>;
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

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  struct InBf16 : FourBits<TABLE>::Rounded {
    void get(__m512bh (&even)[1], __m512bh (&odd)[1], const uint8_t* p, bool) const {
      const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
      even[0] = (*this)(_mm512_srli_epi16(codes, 4)), odd[0] = (*this)(codes);
    }
  };
#endif
};

// A byte has the codes of a row in its upper half and of the row n/2 further down in the other.
template <const float* TABLE>
struct Halved : FourBits<TABLE> {
  template <class>
  using Order = AsItLies;
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

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  struct InBf16 : FourBits<TABLE>::Rounded {
    void get(__m512bh (&even)[1], __m512bh (&odd)[1], const uint8_t* p, bool upper) const {
      const __m512i codes = _mm512_srli_epi16(_mm512_loadu_si512(p), upper ? 4 : 0);
      even[0] = (*this)(codes), odd[0] = (*this)(_mm512_srli_epi16(codes, 8));
    }
  };
#endif
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
  // Numbers of R rows' groups are `scale` times what their codes stand for, plus `added` in each lane of a sum of V.
  template <int R>
  struct Lines {
    float scale[R][K / GROUP], added[R][ZEROS ? K / GROUP : 1];
    Lines(const Packed& w, int64_t row) {
      constexpr int64_t GROUPS = K / GROUP;
      for (int r = 0; r < R; ++r) {
        int64_t g = 0;
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
        for (; g + V <= GROUPS; g += V) {
          F s(1.f);
          if constexpr (SCALES) s = w.scales.at(row + r, g, V);
          s.store(scale[r] + g);
          if constexpr (ZEROS) (s * w.zeros.at(row + r, g, V) * F(-1.f / V)).store(added[r] + g);
        }
#endif
        for (; g < GROUPS; ++g) {
          scale[r][g] = 1;
          if constexpr (SCALES) scale[r][g] = w.scales.at(row + r, g);
          if constexpr (ZEROS) added[r][g] = scale[r][g] * w.zeros.at(row + r, g) * (-1.f / V);
        }
      }
    }
  };
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

}  // namespace
