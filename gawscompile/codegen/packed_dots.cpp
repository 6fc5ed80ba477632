// What multiplies packed weights (`packed.cpp`): dot products by two kinds of vectors, and a dense copy for the library.
namespace {

// x in fp32, in the order in which codes are read; FULL: it has all of fp32's digits.
template <int64_t K, bool FULL>
struct Ordered {
  const float* numbers;
  Ordered from(int64_t t) const { return {numbers + t * K}; }
};

// x in bf16: of every 64 columns the even ones, then the odd ones, and each group's sum.
template <int64_t K, int64_t GROUP>
struct Paired {
  const bf16* numbers;
  const float* sums;
  Paired from(int64_t t) const { return {numbers + t * K, sums + t * (K / GROUP)}; }
};

// x in fp32, in one of the orders of `packed.cpp`, and each group's sum.
template <class Order, int64_t K, int64_t GROUP>
struct Spread {
  static constexpr int64_t NUMBERS = K / Order::STEP * Order::NUMBERS;
  const float *numbers, *sums;
  Spread from(int64_t t) const { return {numbers + t * NUMBERS, sums + t * (K / GROUP)}; }
  const float* at(int64_t t, int64_t k) const { return numbers + t * NUMBERS + k / Order::STEP * Order::NUMBERS; }
};

// Whether there is such an order on this CPU, of groups of that many columns.
template <class Order>
constexpr bool fits(int64_t group) {
  if constexpr (Order::KNOWN) return group % Order::STEP == 0;
  else return false;
}

template <class Order, int64_t K, int64_t GROUP, class TX>
inline Spread<Order, K, GROUP> spread(const TX* x, int64_t m) {
  using X = Spread<Order, K, GROUP>;
  static thread_local Buffer numbers, sums;
  float *to = numbers.of(m * X::NUMBERS), *groups = sums.of(m * (K / GROUP));
  for (int64_t g = 0; g < m * (K / GROUP); ++g) {
    Pair total = {F(0.f), F(0.f)};
    for (int64_t at = g * GROUP; at < (g + 1) * GROUP; at += Order::STEP) {
      float line[Order::STEP];
      for (int i = 0; i < Order::STEP; i += 2 * V) {
        const Pair v = load_pair(x + at + i);
        store_pair(line + i, v);
        total = {total.lo + v.lo, total.hi + v.hi};
      }
      Order::lay(line, to);
      to += Order::NUMBERS;
    }
    groups[g] = sum(total.lo + total.hi);
  }
  return {numbers.of(0), sums.of(0)};
}

#if defined(CPU_CAPABILITY_AVX2)
// x as whole numbers, for each 64 columns what one of a product stands for, and each group's sum. Where the largest leaves
// too few digits to the others, `rests` has what is left, and `finer` what one of its products stands for, else 0. A group
// in which x is no number, or none that sums up, makes NaN.
template <class Order, int64_t K, int64_t GROUP>
struct Wholes {
  static constexpr int64_t LD = K * Order::WIDTH, STEP = 64 * Order::WIDTH;
  const int16_t *numbers, *rests;
  const float *units, *finer, *sums;
  bool any;  // whether there are rests
  Wholes from(int64_t t) const {
    return {numbers + t * LD, rests + t * LD, units + t * (K / 64), finer + t * (K / 64), sums + t * (K / GROUP), any};
  }
};

// For the weights that share it; `I` tells those apart that have an x of their own.
template <class Order, int64_t K, int64_t GROUP, int I = -1, class TX>
inline Wholes<Order, K, GROUP> wholes(const TX* x, int64_t m) {
  using X = Wholes<Order, K, GROUP>;
  static thread_local Buffer numbers, rests, units, finer, sums;
  int16_t *to = (int16_t*)numbers.of(m * X::LD / 2), *rest = (int16_t*)rests.of(m * X::LD / 2);
  float *unit = units.of(m * (K / 64)), *fine = finer.of(m * (K / 64)), *groups = sums.of(m * (K / GROUP));
  bool any = false;
  const auto size = [](F v) { return F(_mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)))); };
  for (int64_t g = 0; g < m * (K / GROUP); ++g) {
    F total(0.f);
    for (int64_t at = g * GROUP; at < (g + 1) * GROUP; at += 64, to += X::STEP, rest += X::STEP) {
      float line[64], lanes[V], most = 0;
      F largest(0.f), capped(0.f);
      for (int i = 0; i < 64; i += 2 * V) {
        const Pair v = load_pair(x + at + i);
        store_pair(line + i, v);
        total = total + (v.lo + v.hi);
        largest = F(_mm256_max_ps(largest, _mm256_max_ps(size(v.lo), size(v.hi))));
      }
      largest.store(lanes);
      for (float lane : lanes) most = max(most, lane);
      const F by(most > 1e-34f ? Order::X_MOST / most : 0.f), cap(Order::X_MOST / 64);
      for (int i = 0; i < 64; i += V) {
        const F v = F::loadu(line + i) * by;
        capped = capped + F(_mm256_min_ps(size(v), cap));
        v.store(line + i);
      }
      Order::lay(line, to);
      *unit++ = most / Order::X_MOST * Order::UNIT;
      *fine++ = 0;
      if (most > 1e-34f && sum(capped) < 32 * (Order::X_MOST / 64)) {  // half of them are less than a hundredth of the largest
        for (int i = 0; i < 64; i += V) (F::loadu(line + i) * F(Order::STEPS)).store(line + i);
        Order::lay(line, rest);
        fine[-1] = unit[-1] / Order::STEPS;
        any = true;
      }
    }
    groups[g] = sum(total);
    const float none = groups[g] - groups[g];  // 0 or NaN
    for (int64_t i = 1; i <= GROUP / 64; ++i) unit[-i] += none;
  }
  return {(const int16_t*)numbers.of(0), (const int16_t*)rests.of(0), units.of(0), finer.of(0), sums.of(0), any};
}
#endif

// Whether products of bf16 multiply x, in groups of so many columns.
template <class TX>
constexpr bool in_pairs(int64_t group) {
  return PAIRED && std::is_same_v<TX, bf16> && group % 64 == 0;
}

// Either, as a weight needs it: a thread's own copy, unless x lies so already.
template <class Codes, int64_t K, int64_t GROUP, class TX>
inline auto ordered(const TX* x, int64_t m) {
  if constexpr (in_pairs<TX>(GROUP)) {
    static thread_local Buffer numbers, sums;
    bf16* words = (bf16*)numbers.of(m * K / 2);
    float* groups = sums.of(m * (K / GROUP));
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
    int16_t places[2][32];
    for (int i = 0; i < 32; ++i) places[0][i] = 2 * i, places[1][i] = 2 * i + 1;
    const __m512i even = _mm512_loadu_si512(places[0]), odd = _mm512_loadu_si512(places[1]);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int64_t g = 0; g < m * (K / GROUP); ++g) {
      F total(0.f);
      for (int64_t at = g * GROUP; at < (g + 1) * GROUP; at += 64) {
        const __m512i a = _mm512_loadu_si512(x + at), b = _mm512_loadu_si512(x + at + 32);
        total = F(_mm512_dpbf16_ps(_mm512_dpbf16_ps(total, (__m512bh)a, ones), (__m512bh)b, ones));
        _mm512_storeu_si512(words + at, _mm512_permutex2var_epi16(a, even, b));
        _mm512_storeu_si512(words + at + 32, _mm512_permutex2var_epi16(a, odd, b));
      }
      groups[g] = sum(total);
    }
#endif
    return Paired<K, GROUP>{words, groups};
#if defined(CPU_CAPABILITY_AVX2)
  } else if constexpr (Codes::template Order<TX>::WHOLE && fits<typename Codes::template Order<TX>>(GROUP)) {
    return wholes<typename Codes::template Order<TX>, K, GROUP>(x, m);
#endif
  } else if constexpr (fits<typename Codes::template Order<TX>>(GROUP)) {
    return spread<typename Codes::template Order<TX>, K, GROUP>(x, m);
  } else if constexpr (std::is_same_v<TX, float> && !Codes::PAIRS) {
    return Ordered<K, true>{x};
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
    return Ordered<K, std::is_same_v<TX, float>>{found};
  }
}

// The same where a byte has the codes of two rows, which are met together.
template <class Codes, int64_t K, int64_t GROUP, class TX>
inline auto halved(const TX* x, int64_t m) {
  constexpr bool WORDS = !in_pairs<TX>(GROUP) && !std::is_same_v<TX, float> && fits<ByWords>(GROUP);
#if defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<TX, bf16> && fits<HalvesAsBytes>(GROUP)) return wholes<HalvesAsBytes, K, GROUP>(x, m);
  else
#endif
  if constexpr (WORDS) return spread<ByWords, K, GROUP>(x, m);
  else return ordered<Codes, K, GROUP>(x, m);
}

// acc[r][t] = W x for R rows and T tokens: nothing has joined the sums before.
template <int R, int T, class W, bool FULL>
[[gnu::always_inline]] inline void unpack_dot(F (&acc)[R][T], const W& w, int64_t row, Ordered<W::K, FULL> x) {
  constexpr int64_t K = W::K, G = W::GROUP, BYTES = 2 * V * W::Codes::BITS / 8;
  // scales that meet the sum of a group are made many at once: one by one they take as long as the group's numbers
  constexpr bool LINED = V == 16 && W::Codes::BITS == 4 && W::SCALES && !W::ZEROS;
  using Scales = std::conditional_t<LINED, typename W::template Lines<R>, Nothing>;
  [[maybe_unused]] const Scales lines = [&] {
    if constexpr (LINED) return Scales(w, row);
    else return Scales{};
  }();
  for (int64_t g = 0; g < K / G; ++g) {
    [[maybe_unused]] F sums[R][T];
    if constexpr (LINED) clear(sums);
    F(&to)[R][T] = LINED ? sums : acc;
    typename W::Codes groups[R];
    for (int r = 0; r < R; ++r)
      if constexpr (LINED) groups[r] = typename W::Codes(1.f);
      else groups[r] = w.group(row + r, g);
    for (int64_t k = g * G; k < (g + 1) * G; k += 2 * V) {
      Pair xs[T];
      for (int t = 0; t < T; ++t) xs[t] = load_pair(x.numbers + t * K + k);
      const char* ahead = (const char*)w.at(row, 0) + R * (k / (2 * V)) * BYTES + AHEAD;
      for (int at = 0; at < R * BYTES; at += LINE) __builtin_prefetch(ahead + at, 0, 2);
      for (int r = 0; r < R; ++r) {
        const Pair v = w.get(groups[r], row + r, k);
        for (int t = 0; t < T; ++t) to[r][t] = fmadd(v.hi, xs[t].hi, fmadd(v.lo, xs[t].lo, to[r][t]));
      }
    }
    if constexpr (LINED)
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) acc[r][t] = fmadd(sums[r][t], F(lines.scale[r][g]), acc[r][t]);
  }
  if constexpr (W::LATE)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) acc[r][t] = acc[r][t] * F(w.scales.at(row + r, 0));
}

#if defined(CPU_CAPABILITY_AVX2)
// The same, by bytes: scales meet the sum of a group. Rows share what is loaded of x.
template <int R, int T, class W, const float* TABLE>
[[gnu::always_inline]] inline void unpack_dot(
    F (&acc)[R][T], const W& w, int64_t row, Spread<ByBytes<TABLE>, W::K, W::GROUP> x) {
  constexpr int64_t K = W::K, G = W::GROUP, PART = 64;
  constexpr int ABREAST = min(R, 2);  // as many rows as there are registers for
  const typename W::template Lines<R> lines(w, row);  // before the loop over numbers, whose steps are short
  for (int64_t at = 0; at < K; at += PART) {
    for (int64_t line = 0; line < R * PART / 2; line += LINE)
      __builtin_prefetch((const char*)w.at(row, 0) + R * at / 2 + line + AHEAD, 0, 2);
    const float* xs = x.at(0, at);
#pragma GCC unroll 4
    for (int first = 0; first < R; first += ABREAST) {
      asm("" : "+r"(xs));  // x is read again, not kept: all registers are taken
      F sums[ABREAST][T];
      clear(sums);
      __m256i codes[ABREAST];
      for (int r = 0; r < ABREAST; ++r) codes[r] = _mm256_loadu_si256((const __m256i*)w.at(row + first + r, at));
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        F numbers[ABREAST][4];
        for (int r = 0; r < ABREAST; ++r) ByBytes<TABLE>::get(numbers[r], codes[r], odd);
        for (int i = 0; i < 4; ++i)
          for (int t = 0; t < T; ++t) {
            const F v = F::loadu(xs + t * K + (4 * odd + i) * V);
            for (int r = 0; r < ABREAST; ++r) sums[r][t] = fmadd(numbers[r][i], v, sums[r][t]);
          }
      }
      const int64_t g = at / G;
      for (int r = 0; r < ABREAST; ++r)
        for (int t = 0; t < T; ++t) {
          F& a = acc[first + r][t];
          a = fmadd(sums[r][t], F(lines.scale[first + r][g]), a);
          if (W::ZEROS && at % G == 0) a = fmadd(F(x.sums[t * (K / G) + g]), F(lines.added[first + r][g]), a);
        }
    }
  }
}

// One token's sum of 64 columns, in a function of its own, as few are asked for.
template <class Order, class Code>
[[gnu::noinline, gnu::cold]] __m256i sum_of_rests(const Code* codes, const int16_t* rests) {
  __m256i sums[1] = {_mm256_setzero_si256()};
  Order::add(sums, codes, rests, 0);
  return sums[0];
}

// The same, by whole numbers: units of x and scales meet their sum. Where codes are bytes memory is what counts, and rows are
// read one after the other, as `stream` does. Those of 4 bits take longer to unpack than to read: rows share what is
// loaded of x.
template <int R, int T, class W, class Order>
[[gnu::always_inline]] inline void unpack_dot(
    F (&acc)[R][T], const W& w, int64_t row, Wholes<Order, W::K, W::GROUP> x) {
  constexpr int64_t K = W::K, G = W::GROUP, PART = 64, BITS = W::Codes::BITS;
  constexpr int ABREAST = BITS == 8 ? 1 : R, DISTANCE = BITS == 8 ? near(1) : AHEAD;
  const typename W::template Lines<R> lines(w, row);
  const auto* codes = w.at(row, 0);
  const auto scale = [&](int r, int64_t at) { return W::LATE ? 1.f : lines.scale[r][at / G]; };
  for (int first = 0; first < R; first += ABREAST)
#pragma GCC unroll 2
    for (int64_t at = 0; at < K; at += PART) {
      const char* ahead = (const char*)codes + (first * K + ABREAST * at) * BITS / 8 + DISTANCE;
      for (int64_t line = 0; line < ABREAST * PART * BITS / 8; line += LINE) __builtin_prefetch(ahead + line, 0, 2);
#pragma GCC unroll 4
      for (int r = first; r < first + ABREAST; ++r) {
        __m256i sums[T];
        for (auto& s : sums) s = _mm256_setzero_si256();
        Order::add(sums, codes + (r * K + at) * BITS / 8, x.numbers + at, K);
        for (int t = 0; t < T; ++t) {
          F& a = acc[r][t];
          a = fmadd(F(_mm256_cvtepi32_ps(sums[t])), F(scale(r, at) * x.units[t * (K / PART) + at / PART]), a);
          if (W::ZEROS && at % G == 0) a = fmadd(F(x.sums[t * (K / G) + at / G]), F(lines.added[r][at / G]), a);
        }
      }
    }
  if (x.any) [[unlikely]]
    for (int64_t at = 0; at < K; at += PART)
      for (int t = 0; t < T; ++t)
        if (const float by = x.finer[t * (K / PART) + at / PART]; by != 0)
          for (int r = 0; r < R; ++r) {
            const __m256i sum = sum_of_rests<Order>(codes + (r * K + at) * BITS / 8, x.rests + t * K + at);
            acc[r][t] = fmadd(F(_mm256_cvtepi32_ps(sum)), F(scale(r, at) * by), acc[r][t]);
          }
  if constexpr (W::LATE)
    for (int r = 0; r < R; ++r)
      for (F& a : acc[r]) a = a * F(lines.scale[r][0]);
}
#endif

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
// The same, by vdpbf16ps: scales and zeros meet the sum of a group, not its numbers.
template <int R, int T, class W>
[[gnu::always_inline]] inline void unpack_dot(F (&acc)[R][T], const W& w, int64_t row, Paired<W::K, W::GROUP> x) {
  constexpr int64_t K = W::K, G = W::GROUP, BYTES = 64 * W::Codes::BITS / 8;
  using Numbers = typename W::Codes::InBf16;
  constexpr int PARTS = Numbers::PARTS, CHAINS = T == 1 ? 2 : 1;  // one multiply-add waits for the one before
  const Numbers numbers;
  constexpr int GROUPS = K / G;
  constexpr bool SHIFTED = W::ZEROS || Numbers::OFFSET != 0;
  float scales[R][blocks(GROUPS, V) * V];  // in fp32, before the loop over numbers, whose steps are short
  for (int g = 0; g < GROUPS; g += V) {
    const int count = min<int>(V, GROUPS - g);
    for (int r = 0; r < R; ++r) {
      F scale(1.f), shift(Numbers::OFFSET);
      if constexpr (W::SCALES) scale = w.scales.at(row + r, g, count);
      if constexpr (W::ZEROS) shift = fmadd(w.zeros.at(row + r, g, count), F(-1.f), shift);
      scale.store(scales[r] + g);
      for (int t = 0; SHIFTED && t < T; ++t)
        acc[r][t] = fmadd(scale * shift, F::loadu(x.sums + t * GROUPS + g, count), acc[r][t]);
    }
  }
  for (int64_t g = 0; g < GROUPS; ++g) {
    F part[R][T][CHAINS];
    for (auto& of_row : part)
      for (auto& of_token : of_row)
        for (F& p : of_token) p = F(0.f);
    for (int64_t k = g * G; k < (g + 1) * G; k += 64) {
      __m512bh xs[T][2];
      for (int t = 0; t < T; ++t)
        for (int i = 0; i < 2; ++i) xs[t][i] = (__m512bh)_mm512_loadu_si512(x.numbers + t * K + k + 32 * i);
      const char* ahead = (const char*)w.at(row, 0) + R * (k / 64) * BYTES + AHEAD;
      for (int at = 0; at < R * BYTES; at += LINE) __builtin_prefetch(ahead + at, 0, 2);
      for (int r = 0; r < R; ++r) {
        __m512bh even[PARTS], odd[PARTS];
        numbers.get(even, odd, w.at(row + r, k), row + r < W::N / 2);
        for (int t = 0; t < T; ++t)
          for (int i = 0; i < PARTS; ++i) {
            F &first = part[r][t][0], &last = part[r][t][CHAINS - 1];
            first = F(_mm512_dpbf16_ps(first, even[i], xs[t][0]));
            last = F(_mm512_dpbf16_ps(last, odd[i], xs[t][1]));
          }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) {
        F total = part[r][t][0];
        if constexpr (CHAINS == 2) total = total + part[r][t][1];
        acc[r][t] = fmadd(total, F(scales[r][g]), acc[r][t]);
      }
  }
}
#endif

// W x: a part of a projection, the first to join a tile's sums.
template <class W, class X>
inline auto unpacked(const W& w, X x) {
  return [=](auto& acc, int64_t row, int64_t t0) __attribute__((always_inline)) { unpack_dot(acc, w, row, x.from(t0)); };
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
