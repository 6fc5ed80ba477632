// The vectors of fp32 that kernels are written in: on x86 intrinsics and no more, on other machines ATen's.
namespace {

template <class T>
constexpr T min(T a, T b) { return b < a ? b : a; }

template <class T>
constexpr T max(T a, T b) { return a < b ? b : a; }

// A thread's own memory, from a line of the cache on. It only grows, and loses what it held when it does.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { delete[] memory_; }
  float* of(size_t count) {
    if (count > size_) {
      delete[] memory_;
      memory_ = nullptr, size_ = 0;  // as it is if there is no memory
      memory_ = new float[count + LINE];
      size_ = count;
    }
    return memory_ + (LINE - uintptr_t(memory_) / sizeof(float) % LINE) % LINE;
  }

 private:
  static constexpr size_t LINE = 64 / sizeof(float);
  float* memory_ = nullptr;
  size_t size_ = 0;
};

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

#if defined(CPU_CAPABILITY_AVX512)
using Lanes = __m512;
using Halves = __m256i;  // as many numbers of 16 bits
#else
using Lanes = __m256;
using Halves = __m128i;
#endif

struct bf16 {
  uint16_t x;

  bf16() = default;
  explicit bf16(float v) {  // rounded to the nearest, ties to even; every NaN becomes one NaN
    uint32_t wide;
    std::memcpy(&wide, &v, sizeof v);
    x = v != v ? 0x7fc0 : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t wide = uint32_t(x) << 16;
    float v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
  }
};

struct f16 {
  uint16_t x;

  f16() = default;
#if defined(CPU_CAPABILITY_AVX512)  // F16C is no part of it
  explicit f16(float v) {
    const __m256i halves = _mm512_cvtps_ph(_mm512_set1_ps(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = uint16_t(_mm_cvtsi128_si32(_mm256_castsi256_si128(halves)));
  }
  operator float() const { return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16(short(x)))); }
#else
  explicit f16(float v) : x(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) {}
  operator float() const { return _cvtsh_ss(x); }
#endif
};

struct F {
  Lanes lanes;

  F() : lanes{} {}
  F(Lanes v) : lanes(v) {}
  operator Lanes() const { return lanes; }
  static constexpr int size() { return sizeof(Lanes) / sizeof(float); }
  static F loadu(const float* p) {
    F v;
    std::memcpy(&v.lanes, p, sizeof v.lanes);
    return v;
  }
  void store(float* p) const { std::memcpy(p, &lanes, sizeof lanes); }

  friend F operator+(const F& a, const F& b) { return a.lanes + b.lanes; }
  friend F operator*(const F& a, const F& b) { return a.lanes * b.lanes; }
  friend F operator/(const F& a, const F& b) { return a.lanes / b.lanes; }

#if defined(CPU_CAPABILITY_AVX512)
  explicit F(float v) : lanes(_mm512_set1_ps(v)) {}
  static F loadu(const float* p, int count) { return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p); }
#else
  explicit F(float v) : lanes(_mm256_set1_ps(v)) {}
  static F loadu(const float* p, int count) {
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
  }
#endif
  F neg() const { return -lanes; }
};

#if defined(CPU_CAPABILITY_AVX512)

inline F fmadd(const F& a, const F& b, const F& c) { return _mm512_fmadd_ps(a, b, c); }

inline float sum(const F& v) {
  Lanes s = v.lanes + _mm512_shuffle_f32x4(v, v, 0x4E);
  s += _mm512_shuffle_f32x4(s, s, 0xB1);
  s += _mm512_shuffle_ps(s, s, 0x4E);
  s += _mm512_shuffle_ps(s, s, 0xB1);
  return _mm512_cvtss_f32(s);
}

inline F widened(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const Halves*)p)), 16));
}
inline F widened(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const Halves*)p)); }
inline F widened(const float* p, int count) { return F::loadu(p, count); }
inline F widened(const bf16* p, int count) {
  const __m256i halves = _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline F widened(const f16* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p));
}

// Rounded to the nearest, ties to even; every NaN becomes one NaN.
inline void narrowed(bf16* p, const F& v) {
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)), bits);
  const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
  const __m512i nan = _mm512_set1_epi32(0xffff), high = _mm512_srli_epi32(rounded, 16);
  _mm256_storeu_si256((Halves*)p, _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(number, nan, high)));
}
inline void narrowed(f16* p, const F& v) {
  _mm256_storeu_si256((Halves*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

inline F fmadd(const F& a, const F& b, const F& c) { return _mm256_fmadd_ps(a, b, c); }

inline float sum(const F& v) {
  Lanes s = v.lanes + _mm256_permute2f128_ps(v, v, 0x1);
  s += _mm256_shuffle_ps(s, s, 0x4E);
  s += _mm256_shuffle_ps(s, s, 0xB1);
  return _mm256_cvtss_f32(s);
}

inline F widened(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const Halves*)p)), 16));
}
inline F widened(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const Halves*)p)); }

// Rounded to the nearest, ties to even; every NaN becomes one NaN.
inline void narrowed(bf16* p, const F& v) {
  const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)), bits);
  const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_set1_epi32(0xffff), _mm256_srli_epi32(rounded, 16), number);
  _mm_storeu_si128((Halves*)p, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
inline void narrowed(f16* p, const F& v) {
  _mm_storeu_si128((Halves*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#endif

struct Pair {
  F lo, hi;
};

template <class T>
inline Pair load_pair(const T* p) { return {widened(p), widened(p + F::size())}; }

template <class T>
inline void store_pair(T* p, const Pair& v) {
  narrowed(p, v.lo);
  narrowed(p + F::size(), v.hi);
}

// Numbers at even places, and those at odd ones: a bitwise step each, where to widen those that lie side by side crosses
// lanes first. Only for sums of products, whose order does not matter; both factors must be read so.
#if defined(CPU_CAPABILITY_AVX512)
inline Pair apart(__m512i words) {
  const __m512i odd = _mm512_and_si512(words, _mm512_set1_epi32(0xffff0000));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), _mm512_castsi512_ps(odd)};
}
inline Pair apart(const bf16* p) { return apart(_mm512_loadu_si512(p)); }
inline Pair apart(const bf16* p, int count) {
  return apart(_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p));
}
#else
inline Pair apart(const bf16* p) {
  const __m256i words = _mm256_loadu_si256((const __m256i*)p), odd = _mm256_and_si256(words, _mm256_set1_epi32(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)), _mm256_castsi256_ps(odd)};
}
inline Pair apart(const bf16* p, int count) {
  bf16 padded[2 * F::size()] = {};
  std::memcpy(padded, p, count * sizeof(bf16));
  return apart(padded);
}
#endif

#else

using bf16 = c10::BFloat16;
using f16 = c10::Half;
using F = at::vec::Vectorized<float>;
using at::vec::fmadd;

inline float sum(const F& v) {
  return at::vec::vec_reduce_all<float>([](F& a, F& b) { return a + b; }, v);
}

struct Pair {
  F lo, hi;
};

template <class T>
inline Pair load_pair(const T* p) {
  auto [lo, hi] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(p));
  return {lo, hi};
}

template <class T>
inline void store_pair(T* p, const Pair& v) {
  at::vec::convert_from_float<T>(v.lo, v.hi).store(p);
}

#endif

}  // namespace
