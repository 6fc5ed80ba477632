// The orders that x is laid out in for packed weights: numbers are made of many codes at once, without a shuffle that puts
// them in line, and x meets them as they come. Stands before `packed.cpp`.
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

// Orders of 64 columns in which x in bf16 is made whole numbers of 16 bits: 15 bits for the largest of 64 numbers. Codes, or
// what they stand for, are whole numbers too, so products are exact. A column of x takes WIDTH numbers of 16 bits. A product
// of 1 stands for UNIT times what x's steps stand for.
struct InWholes {
  static constexpr bool WHOLE = true;
  static constexpr int STEP = 64, WIDTH = 1;
#if defined(CPU_CAPABILITY_AVX2)
  static constexpr bool KNOWN = true;
  static constexpr float X_MOST = 32767, STEPS = 62000;  // STEPS: of a rest, in a step of X_MOST

  // The whole numbers nearest to V numbers of x, 32768 at most; x becomes the rest.
  static __m256i nearest(float* x) {
    const __m256i found = _mm256_cvtps_epi32(F::loadu(x));
    fmadd(F(_mm256_cvtepi32_ps(found)), F(-1.f), F::loadu(x)).store(x);
    return found;
  }
#else
  static constexpr bool KNOWN = false;
#endif
};

// x as two bytes with a sign each, for codes of 4 bits, which stay bytes (`vpmaddubsw`): eight sums of two products fit into
// 16 bits.
struct InBytes : InWholes {
#if defined(CPU_CAPABILITY_AVX2)
  static constexpr float X_MOST = 127 * 256 + 127, UNIT = 1;

  // Of 64 numbers the upper bytes, then the lower ones.
  static void split(float* x, int8_t* to) {
    const __m256i in_line = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int i = 0; i < 64; i += 4 * V) {
      __m256i upper[4], lower[4];
      for (int j = 0; j < 4; ++j) {
        const __m256i wholes = nearest(x + i + j * V);
        upper[j] = _mm256_srai_epi32(_mm256_add_epi32(wholes, _mm256_set1_epi32(128)), 8);
        lower[j] = _mm256_sub_epi32(wholes, _mm256_slli_epi32(upper[j], 8));
      }
      const auto narrowed = [&](const __m256i (&w)[4], int8_t* p) {
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(w[0], w[1]), _mm256_packs_epi32(w[2], w[3]));
        _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bytes, in_line));
      };
      narrowed(upper, to + i), narrowed(lower, to + 64 + i);
    }
  }
#endif
};

// Of bytes that have the codes of two rows each, for columns in line.
struct HalvesAsBytes : InBytes {
#if defined(CPU_CAPABILITY_AVX2)
  static void lay(float* x, int16_t* to) { split(x, (int8_t*)to); }
#endif
};

// Of four columns at a time, whose bytes lie by columns: the upper bytes of the first and third, twice, those of the others,
// and the lower ones.
struct TilesAsBytes : InBytes {
#if defined(CPU_CAPABILITY_AVX2)
  static constexpr int WIDTH = 2;
  static void lay(float* x, int16_t* to) {
    int8_t bytes[128];
    split(x, bytes);
    const __m128i first = _mm_setr_epi8(0, 2, 0, 2, 1, 3, 1, 3, 4, 6, 4, 6, 5, 7, 5, 7);
    const __m128i second = _mm_add_epi8(first, _mm_set1_epi8(8));
    for (int i = 0; i < 64; i += 16) {  // four columns' upper bytes and their lower ones lie beside each other, then in pairs
      const __m128i upper = _mm_loadu_si128((const __m128i*)(bytes + i));
      const __m128i lower = _mm_loadu_si128((const __m128i*)(bytes + 64 + i));
      for (const __m128i& eight : {_mm_unpacklo_epi32(upper, lower), _mm_unpackhi_epi32(upper, lower)})
        for (const __m128i& four : {first, second}) {
          _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(eight, four));
          to += 8;
        }
    }
  }
#endif
};

// Of codes of one byte, as they lie.
template <class T>
struct BytesAsWholes : InWholes {
#if defined(CPU_CAPABILITY_AVX2)
  static constexpr float UNIT = 1;

  // Adds products of tokens, whose x are `ldx` numbers apart, to lanes: eight to each.
  template <int TOKENS>
  [[gnu::always_inline]] static void add(__m256i (&sums)[TOKENS], const T* codes, const int16_t* x, int64_t ldx) {
#pragma GCC unroll 4
    for (int i = 0; i < 64; i += 16) {
      const __m128i some = _mm_loadu_si128((const __m128i*)(codes + i));
      const __m256i numbers = std::is_signed_v<T> ? _mm256_cvtepi8_epi16(some) : _mm256_cvtepu8_epi16(some);
      for (int t = 0; t < TOKENS; ++t) {
        const __m256i v = _mm256_loadu_si256((const __m256i*)(x + t * ldx + i));
        sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(numbers, v));
      }
    }
  }

  static void lay(float* x, int16_t* to) {
    for (int i = 0; i < 64; i += 2 * V) {
      const __m256i lo = nearest(x + i), hi = nearest(x + i + V);
      const __m256i in_line = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
      _mm256_storeu_si256((__m256i*)(to + i), in_line);
    }
  }
#endif
};

// Of codes of four bits in the columns of `ByBytes`: levels have 13 bits beside the largest.
template <const float* TABLE>
struct LevelsAsWholes : InWholes {
#if defined(CPU_CAPABILITY_AVX2)
  static constexpr float LEVEL_MOST = 8191;
  static_assert(8. * X_MOST * LEVEL_MOST < 2147483648.);

  static constexpr float largest() {
    float found = 0;
    for (int i = 0; i < 16; ++i) found = max(found, max(TABLE[i], -TABLE[i]));
    return found;
  }
  static constexpr float LARGEST = largest(), UNIT = LARGEST / LEVEL_MOST;
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

  template <int TOKENS>
  [[gnu::always_inline]] static void add(__m256i (&sums)[TOKENS], const uint8_t* codes, const int16_t* x, int64_t ldx) {
    const __m256i some = _mm256_loadu_si256((const __m256i*)codes);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      __m256i levels[2];
      get(levels, some, odd);
      for (int t = 0; t < TOKENS; ++t)
        for (int i = 0; i < 2; ++i) {
          const __m256i v = _mm256_loadu_si256((const __m256i*)(x + t * ldx) + 2 * odd + i);
          sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(levels[i], v));
        }
    }
  }

  static void lay(float* x, int16_t* to) {
    int32_t wholes[64];
    for (int i = 0; i < 64; i += V) _mm256_storeu_si256((__m256i*)(wholes + i), nearest(x + i));
    for (int i = 0; i < 64; ++i) to[i] = int16_t(wholes[2 * (i / 8 % 2 * 16 + i / 16 % 2 * 8 + i % 8) + i / 32]);
  }
#endif
};

}  // namespace
