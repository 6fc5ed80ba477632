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
  static constexpr bool KNOWN = false;
};

// Of 4V columns with a byte each, for each half of V words of bytes V numbers of x, which undo the half's factor.
struct ByWords {
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

// Of 64 columns, whose codes are looked up 32 at a time, byte by byte of the numbers that they stand for: fp32's four, or
// the upper two, rounded. Even columns come first.
template <const float* TABLE, int BYTES>
struct ByBytes {
  static constexpr int STEP = 64, NUMBERS = 64;
#if defined(CPU_CAPABILITY_AVX2)
  static constexpr bool KNOWN = true;
  static constexpr int column(int i) {
    const int lane = i % V, vector = i / V % 4, within = BYTES == 2 ? 2 * (lane % 4) + vector % 2 : 4 * (vector % 2) + lane % 4;
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
    alignas(32) uint8_t bytes[BYTES][32];
  };
  static constexpr Tables tables() {
    Tables found = {};
    for (int b = 0; b < BYTES; ++b)
      for (int i = 0; i < 32; ++i) {
        uint32_t bits = __builtin_bit_cast(uint32_t, TABLE[i % 16]);
        if (BYTES == 2) bits += 0x7fff + (bits >> 16 & 1);
        found.bytes[b][i] = uint8_t(bits >> 8 * (4 - BYTES + b));
      }
    return found;
  }
  static constexpr Tables TABLES = tables();

  // Of the even columns that 32 bytes have, or of the odd ones, four vectors.
  static void get(F (&w)[4], __m256i codes, bool odd) {
    const __m256i halves = _mm256_and_si256(odd ? codes : _mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
    __m256i bytes[BYTES];
    for (int b = 0; b < BYTES; ++b)
      bytes[b] = _mm256_shuffle_epi8(_mm256_load_si256((const __m256i*)TABLES.bytes[b]), halves);
    const auto lanes = [](__m256i v) { return F(_mm256_castsi256_ps(v)); };
    if constexpr (BYTES == 2) {
      const __m256i words[2] = {_mm256_unpacklo_epi8(bytes[0], bytes[1]), _mm256_unpackhi_epi8(bytes[0], bytes[1])};
      for (int i = 0; i < 2; ++i) {
        w[2 * i] = lanes(_mm256_slli_epi32(words[i], 16));
        w[2 * i + 1] = lanes(_mm256_and_si256(words[i], _mm256_set1_epi32(0xffff0000)));
      }
    } else {
      const __m256i low[2] = {_mm256_unpacklo_epi8(bytes[0], bytes[1]), _mm256_unpackhi_epi8(bytes[0], bytes[1])};
      const __m256i high[2] = {_mm256_unpacklo_epi8(bytes[2], bytes[3]), _mm256_unpackhi_epi8(bytes[2], bytes[3])};
      for (int i = 0; i < 2; ++i) {
        w[2 * i] = lanes(_mm256_unpacklo_epi16(low[i], high[i]));
        w[2 * i + 1] = lanes(_mm256_unpackhi_epi16(low[i], high[i]));
      }
    }
  }
#else
  static constexpr bool KNOWN = false;
#endif
};

}  // namespace
