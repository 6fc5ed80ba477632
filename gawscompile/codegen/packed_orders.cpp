// The orders that x is laid out in for packed weights of 4 bits: numbers are made of many codes at once, without a shuffle
// that puts them in line, and x meets them as they come. Stands before `packed.cpp`.
namespace {

// Half j of V words of four bytes, masked where it lies: 16^j times its code, or the code where j is 7.
#if defined(CPU_CAPABILITY_AVX512)
using Words = __m512i;
inline F half_of(Words words, int j) {
  return F(_mm512_cvtepi32_ps(
      j < 7 ? _mm512_and_si512(words, _mm512_set1_epi32(15 << 4 * j)) : _mm512_srli_epi32(words, 28)));
}
#elif defined(CPU_CAPABILITY_AVX2)
using Words = __m256i;
inline F half_of(Words words, int j) {
  return F(_mm256_cvtepi32_ps(
      j < 7 ? _mm256_and_si256(words, _mm256_set1_epi32(15 << 4 * j)) : _mm256_srli_epi32(words, 28)));
}
#endif

// What makes half j its code again.
constexpr float factor_of(int j) { return j < 7 ? 1.f / float(1 << 4 * j) : 1.f; }

// An order is KNOWN where this CPU has the kernels for it. STEP columns make NUMBERS, which `lay` writes.
struct AsItLies {
  static constexpr bool KNOWN = false, WHOLE = false;
};

// Of 4V columns with a byte each, for each half of V words of bytes V numbers of x, which undo the half's factor.
struct ByWords {
  static constexpr bool WHOLE = false;
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  static constexpr bool KNOWN = true;
#else
  static constexpr bool KNOWN = false;
#endif
  static constexpr int STEP = 4 * V, NUMBERS = 8 * V;
  static void lay(const float* x, float* to) {
    for (int byte = 0; byte < 4; ++byte) {
      float numbers[V];
      for (int i = 0; i < V; ++i) numbers[i] = x[4 * i + byte];
      const F all = F::loadu(numbers);
      for (int half = 2 * byte; half < 2 * byte + 2; ++half) (all * F(factor_of(half))).store(to + half * V);
    }
  }
};

// Of 64 columns, whose codes are looked up 32 at a time, byte by byte of the numbers that they stand for. Even columns come
// first.
template <const float* TABLE>
struct ByBytes {
  static constexpr bool WHOLE = false;
  static constexpr int STEP = 64, NUMBERS = 64;
#if defined(CPU_CAPABILITY_AVX2)
  static constexpr bool KNOWN = true;
  static constexpr int column(int i) {
    const int lane = i % V, vector = i / V % 4, within = 4 * (vector % 2) + lane % 4;
    return 2 * (lane / 4 * 16 + vector / 2 * 8 + within) + i / 32;
  }
  struct Places {
    uint8_t of[NUMBERS] = {};
    constexpr Places() {
      for (int i = 0; i < NUMBERS; ++i) of[i] = uint8_t(column(i));
    }
  };
  static void lay(const float* x, float* to) {
    static constexpr Places PLACES;
    for (int i = 0; i < NUMBERS; ++i) to[i] = x[PLACES.of[i]];
  }

  struct Tables {
    alignas(32) uint8_t bytes[4][32];
  };
  static constexpr Tables tables() {
    Tables found = {};
    for (int b = 0; b < 4; ++b)
      for (int i = 0; i < 32; ++i) found.bytes[b][i] = uint8_t(__builtin_bit_cast(uint32_t, TABLE[i % 16]) >> 8 * b);
    return found;
  }
  static constexpr Tables TABLES = tables();

  // Of the even columns that 32 bytes have, or of the odd ones, four vectors.
  static void get(F (&w)[4], __m256i codes, bool odd) {
    const __m256i halves = _mm256_and_si256(odd ? codes : _mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
    __m256i bytes[4];
    for (int b = 0; b < 4; ++b)
      bytes[b] = _mm256_shuffle_epi8(_mm256_load_si256((const __m256i*)TABLES.bytes[b]), halves);
    const auto lanes = [](__m256i v) { return F(_mm256_castsi256_ps(v)); };
    const __m256i low[2] = {_mm256_unpacklo_epi8(bytes[0], bytes[1]), _mm256_unpackhi_epi8(bytes[0], bytes[1])};
    const __m256i high[2] = {_mm256_unpacklo_epi8(bytes[2], bytes[3]), _mm256_unpackhi_epi8(bytes[2], bytes[3])};
    for (int i = 0; i < 2; ++i) {
      w[2 * i] = lanes(_mm256_unpacklo_epi16(low[i], high[i]));
      w[2 * i + 1] = lanes(_mm256_unpackhi_epi16(low[i], high[i]));
    }
  }
#else
  static constexpr bool KNOWN = false;
#endif
};

// The same columns, where x in bf16 and levels are both made whole numbers of 16 bits, whose products are exact: x of 15
// bits beside the largest of its 64 numbers, a level of 13 beside the largest of all. Eight products make no 2^31.
template <const float* TABLE>
struct AsWholes {
  static constexpr bool WHOLE = true;
  static constexpr int STEP = 64;
#if defined(CPU_CAPABILITY_AVX2)
  static constexpr bool KNOWN = true;
  static constexpr float X_MOST = 32767, LEVEL_MOST = 8191, STEPS = 62000;  // STEPS: of a rest, in a step of X_MOST
  static_assert(8. * X_MOST * LEVEL_MOST < 2147483648.);

  static constexpr float largest() {
    float found = 0;
    for (int i = 0; i < 16; ++i) found = max(found, max(TABLE[i], -TABLE[i]));
    return found;
  }
  static constexpr float LARGEST = largest();
  struct Tables {
    alignas(32) uint8_t bytes[2][32];
  };
  static constexpr Tables tables() {
    Tables found = {};
    for (int i = 0; i < 32; ++i) {
      const float whole = TABLE[i % 16] / LARGEST * LEVEL_MOST;
      const int16_t level = int16_t(whole < 0 ? whole - 0.5f : whole + 0.5f);
      found.bytes[0][i] = uint8_t(level), found.bytes[1][i] = uint8_t(level >> 8);
    }
    return found;
  }
  static constexpr Tables TABLES = tables();

  // Of the even columns that 32 bytes have, or of the odd ones, two vectors.
  static void get(__m256i (&w)[2], __m256i codes, bool odd) {
    const __m256i halves = _mm256_and_si256(odd ? codes : _mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
    const __m256i low = _mm256_shuffle_epi8(_mm256_load_si256((const __m256i*)TABLES.bytes[0]), halves);
    const __m256i high = _mm256_shuffle_epi8(_mm256_load_si256((const __m256i*)TABLES.bytes[1]), halves);
    w[0] = _mm256_unpacklo_epi8(low, high), w[1] = _mm256_unpackhi_epi8(low, high);
  }

  // Of 64 columns. In a function of its own, as few are asked for.
  [[gnu::noinline, gnu::cold]] static __m256i dot(const uint8_t* codes, const int16_t* numbers) {
    __m256i total = _mm256_setzero_si256(), levels[2];
    for (int odd = 0; odd < 2; ++odd) {
      get(levels, _mm256_loadu_si256((const __m256i*)codes), odd);
      for (int i = 0; i < 2; ++i) {
        const __m256i v = _mm256_loadu_si256((const __m256i*)numbers + 2 * odd + i);
        total = _mm256_add_epi32(total, _mm256_madd_epi16(levels[i], v));
      }
    }
    return total;
  }

  // Of 64 numbers of x, 32768 at most, the nearest whole ones, in the order in which levels come; x becomes the rest.
  static void lay(float* x, int16_t* to) {
    int32_t wholes[64];
    for (int i = 0; i < 64; i += V) {
      const __m256i nearest = _mm256_cvtps_epi32(F::loadu(x + i));
      _mm256_storeu_si256((__m256i*)(wholes + i), nearest);
      fmadd(F(_mm256_cvtepi32_ps(nearest)), F(-1.f), F::loadu(x + i)).store(x + i);
    }
    for (int i = 0; i < 64; ++i) to[i] = int16_t(wholes[2 * (i / 8 % 2 * 16 + i / 16 % 2 * 8 + i % 8) + i / 32]);
  }
#else
  static constexpr bool KNOWN = false;
#endif
};

}  // namespace
