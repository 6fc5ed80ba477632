// What every generated kernel builds on; `cpp.py` puts it in front of them, behind `vectors.cpp`.
namespace {

constexpr int V = F::size();
constexpr int ROWS = 4;                  // rows of a weight that one tile keeps in flight
constexpr int TOKENS = V >= 16 ? 6 : 3;  // tokens per tile: 24 accumulators of 32 registers, or 12 of 16
constexpr int64_t TILE = 4 * TOKENS;     // tokens of a piece of work where rows are few

template <int N>
using Int = std::integral_constant<int, N>;

// ---- loads: two vectors of fp32 from any dtype, the first `count` of 2V elements, the rest zero -------------

inline Pair load_pair(const float* p) { return {F::loadu(p), F::loadu(p + V)}; }

template <class T>
inline Pair load_pair(const T* p, int count) {
#if defined(CPU_CAPABILITY_AVX512)
  return {widened(p, min(count, V)), count > V ? widened(p + V, count - V) : F(0)};
#else
  T padded[2 * V] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load_pair(padded);
#endif
}

inline void store_pair(float* p, const Pair& v) {
  v.lo.store(p);
  v.hi.store(p + V);
}

template <class T>
inline void store_pair(T* p, const Pair& v, int count) {
  T padded[2 * V];
  store_pair(padded, v);
  std::memcpy(p, padded, count * sizeof(T));
}

// ---- one step of a dot product: the widest multiply-add that the two dtypes allow --------------------------

template <class TW, class TX>
struct Step {
  static constexpr int N = 2 * V;
  using Chunk = Pair;
  template <class T, class... Count>
  static Chunk get(const T* p, Count... count) { return load_pair(p, count...); }
  static void dot(F& acc, const Chunk& w, const Chunk& x) {
    acc = fmadd(w.lo, x.lo, acc);
    acc = fmadd(w.hi, x.hi, acc);
  }
};

template <>
struct Step<float, float> {
  static constexpr int N = V;
  using Chunk = F;
  template <class... Count>
  static Chunk get(const float* p, Count... count) { return F::loadu(p, count...); }
  static void dot(F& acc, const Chunk& w, const Chunk& x) { acc = fmadd(w, x, acc); }
};

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
template <>
struct Step<bf16, bf16> {
  static constexpr int N = 32;
  using Chunk = __m512bh;
  static Chunk get(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Chunk get(const bf16* p, int count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p);
  }
  static void dot(F& acc, const Chunk& w, const Chunk& x) { acc = F(_mm512_dpbf16_ps(acc, w, x)); }
};
#elif defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <>
struct Step<bf16, bf16> {
  static constexpr int N = 2 * V;
  using Chunk = Pair;
  template <class... Count>
  static Chunk get(const bf16* p, Count... count) { return apart(p, count...); }
  static void dot(F& acc, const Chunk& w, const Chunk& x) {
    acc = fmadd(w.lo, x.lo, acc);
    acc = fmadd(w.hi, x.hi, acc);
  }
};
#endif

// Bytes ahead of the reader that are asked for, into the second cache: a few rows of most weights. Four rows in flight are
// four streams, which hardware follows badly where rows are short; this asks for memory in its own order.
constexpr int AHEAD = 24 << 10, LINE = 64;

template <int R, int T>
inline void clear(F (&acc)[R][T]) {
  for (auto& row_acc : acc)
    for (auto& a : row_acc) a = F(0);
}

// acc[r][t] += sum over k < N of w[r, k] * x(t)[k], the rows of w lying one after the other, those of x wherever x(t) is
template <int N, class TX, int R, int T, class TW, class At>
[[gnu::always_inline]] inline void dot_at(F (&acc)[R][T], const TW* w, At&& x) {
  using S = Step<TW, TX>;
  constexpr int WHOLE = N - N % S::N, BYTES = S::N * sizeof(TW);
  const auto step = [&](int k, auto... count) __attribute__((always_inline)) {
    typename S::Chunk xs[T];
    for (int t = 0; t < T; ++t) xs[t] = S::get(x(t) + k, count...);
    for (int r = 0; r < R; ++r) {
      const auto ws = S::get(w + r * N + k, count...);
      if (sizeof...(count) == 0 && R == ROWS && r * BYTES % LINE == 0)
        for (int at = 0; at < BYTES; at += LINE)
          __builtin_prefetch((const char*)(w + R * k) + r * BYTES + at + AHEAD, 0, 2);
      for (int t = 0; t < T; ++t) S::dot(acc[r][t], ws, xs[t]);
    }
  };
  for (int k = 0; k < WHOLE; k += S::N) step(k);
  if constexpr (WHOLE < N) step(WHOLE, N - WHOLE);
}

template <int N, int R, int T, class TW, class TX>
[[gnu::always_inline]] inline void dot(F (&acc)[R][T], const TW* w, const TX* x, int64_t ldx) {
  dot_at<N, TX>(acc, w, [=](int t) __attribute__((always_inline)) { return x + t * ldx; });
}

// Where nobody asks whether a weight has changed.
struct NoSum {
  struct Row {
    template <class... Args>
    void line(const Args&...) {}
  };
  NoSum from(int64_t) const { return {}; }
  Row row(int) const { return {}; }
  void add(const Row&) const {}
  template <int R, int N, class T>
  void rows(const T*) const {}
  template <class T>
  void panel(const T*, int64_t, int64_t, int64_t, int64_t) const {}
};

// How many bytes ahead a lone stream is asked for, as measured. `bytes`: of a number of the weight.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int near(int) { return 4 << 10; }
#else
constexpr int near(int bytes) { return bytes == 4 ? 512 : 1536; }
#endif

// Whether rows are read one after the other: on AVX2 rows of whole lines of memory, with AVX-512 those of eight steps or
// more, where a line is one multiply-add.
template <class TW, class TX>
constexpr bool in_line(int64_t k) {
#if defined(CPU_CAPABILITY_AVX512)
  using S = Step<TW, TX>;
  return S::N * sizeof(TW) == LINE && k >= 8 * S::N && !std::is_same_v<typename S::Chunk, Pair>;
#elif defined(CPU_CAPABILITY_AVX2)
  return k % (LINE / int64_t(sizeof(TW))) == 0;
#else
  return false;
#endif
}

// R rows of a weight that comes from memory times a lone token. It waits for nothing else, and hardware follows one stream
// best: rows are read one after the other, as they lie, and asked for a little ahead. Two sums in flight: one multiply-add
// waits for the one before. On AVX2 it is a function of its own: inlined, it slowed tiles of three tokens down.
template <int N, int R, class TW, class TX, class Sum>
#if defined(CPU_CAPABILITY_AVX512)
[[gnu::always_inline]] inline
#else
[[gnu::noinline]]
#endif
void lone(F (&acc)[R][1], const TW* w, const TX* x, Sum sum) {
  using S = Step<TW, TX>;
  constexpr int EACH = LINE / sizeof(TW), STEPS = EACH / S::N;  // numbers of a line, and steps
  static_assert(EACH % S::N == 0 && (STEPS == 1 || N % EACH == 0));
  for (int r = 0; r < R; ++r, w += N) {
    F sums[2] = {acc[r][0], F(0)};
    auto row = sum.row(r);
    const auto line = [&](int place, int k, auto... count) __attribute__((always_inline)) {
      for (int i = 0; i < STEPS; ++i) {
        const int at = k + i * S::N;
        S::dot(sums[(place * STEPS + i) % 2], S::get(w + at, count...), S::get(x + at, count...));
      }
      row.line(place, w + k, count * sizeof(TW)...);
    };
    int k = 0;
    for (; k + 2 * EACH <= N; k += 2 * EACH)
      for (int place = 0; place < 2; ++place) {
        __builtin_prefetch((const char*)(w + k + place * EACH) + near(sizeof(TW)), 0, 2);
        line(place, k + place * EACH);
      }
    if (k + EACH <= N) line(0, k);
    if constexpr (N % EACH != 0) line(N / EACH % 2, N - N % EACH, N % EACH);
    acc[r][0] = sums[0] + sums[1];
    sum.add(row);
  }
}

// `dot` for a weight that comes from memory, where these are the first tokens of a call. `sum` takes the rows' checksums
// (`sums.cpp`), if there is one.
template <int N, int R, int T, class TW, class TX, class Sum = NoSum>
[[gnu::always_inline]] inline void stream(
    F (&acc)[R][T], const TW* w, const TX* x, int64_t ldx, bool first, Sum sum = {}) {
  if constexpr (T == 1 && in_line<TW, TX>(N))
    if (first) return lone<N>(acc, w, x, sum);
  dot<N>(acc, w, x, ldx);
  if (first) sum.template rows<R, N>(w);
}

// ---- a weight kept as [k, n]: its columns are added up in memory that stays in the first cache ---------------

// of one block, a multiple of 2V on every machine: long lines stream best, many tokens' sums must stay in a cache
inline int64_t columns_for(int64_t m) { return m <= 2 ? 2048 : 512; }

// How the sums of a group of 2V columns lie in memory while they grow, and how a step of D rows of w adds to them.
template <class TW, class TX>
struct Outer {
  static constexpr int DEPTH = 4;
  static void settle(float*) {}
  template <int T, int D>
  static void step(float* z, int64_t ldz, const TW* w, int64_t ldw, int64_t count, const TX* x, int64_t ldx) {
    F xs[T][D];
    for (int t = 0; t < T; ++t)
      for (int d = 0; d < D; ++d) xs[t][d] = F(float(x[t * ldx + d]));
    const auto group = [&](int64_t c, auto load) {
      Pair ws[D];
      for (int d = 0; d < D; ++d) ws[d] = load(w + d * ldw + c);
      for (int t = 0; t < T; ++t) {
        Pair acc = load_pair(z + t * ldz + c);
        for (int d = 0; d < D; ++d)
          acc = {fmadd(ws[d].lo, xs[t][d], acc.lo), fmadd(ws[d].hi, xs[t][d], acc.hi)};
        store_pair(z + t * ldz + c, acc);
      }
    };
    int64_t c = 0;
    for (; c + 2 * V <= count; c += 2 * V) group(c, [](const TW* p) { return load_pair(p); });
    if (c < count) group(c, [&](const TW* p) { return load_pair(p, int(count - c)); });
  }
};

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
// Two rows at a time: the rows' numbers interleave into the pairs that vdpbf16ps takes. Interleaving goes by lanes of
// 128 bits, so the sums of 32 columns lie as 0-3, 8-11, 16-19, 24-27, then 4-7, 12-15, …, until `settle`.
template <>
struct Outer<bf16, bf16> {
  static constexpr int DEPTH = 8;
  static void settle(float* z) {
    const __m512 lo = _mm512_loadu_ps(z), hi = _mm512_loadu_ps(z + 16);
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    _mm512_storeu_ps(z, _mm512_permutex2var_ps(lo, first, hi));
    _mm512_storeu_ps(z + 16, _mm512_permutex2var_ps(lo, second, hi));
  }
  template <int T, int D>
  static void step(float* z, int64_t ldz, const bf16* w, int64_t ldw, int64_t count, const bf16* x, int64_t ldx) {
    constexpr int P = (D + 1) / 2;
    __m512bh xs[T][P];
    for (int t = 0; t < T; ++t)
      for (int p = 0; p < P; ++p) {
        uint16_t two[2] = {x[t * ldx + 2 * p].x, 2 * p + 1 < D ? x[t * ldx + 2 * p + 1].x : uint16_t(0)};
        int32_t pair;
        std::memcpy(&pair, two, sizeof pair);
        xs[t][p] = (__m512bh)_mm512_set1_epi32(pair);
      }
    for (int64_t c = 0; c < count; c += 32) {
      const __mmask32 mask = c + 32 <= count ? ~0u : (1u << (count - c)) - 1;
      __m512bh lo[P], hi[P];
      for (int p = 0; p < P; ++p) {
        const __m512i a = _mm512_maskz_loadu_epi16(mask, w + 2 * p * ldw + c);
        const __m512i b =
            2 * p + 1 < D ? _mm512_maskz_loadu_epi16(mask, w + (2 * p + 1) * ldw + c) : _mm512_setzero_si512();
        lo[p] = (__m512bh)_mm512_unpacklo_epi16(a, b);
        hi[p] = (__m512bh)_mm512_unpackhi_epi16(a, b);
      }
      for (int t = 0; t < T; ++t) {
        float* at = z + t * ldz + c;
        __m512 first = _mm512_loadu_ps(at), second = _mm512_loadu_ps(at + 16);
        for (int p = 0; p < P; ++p) {
          first = _mm512_dpbf16_ps(first, lo[p], xs[t][p]);
          second = _mm512_dpbf16_ps(second, hi[p], xs[t][p]);
        }
        _mm512_storeu_ps(at, first);
        _mm512_storeu_ps(at + 16, second);
      }
    }
  }
};
#endif

// ---- four row sums at once: shuffles of four accumulators cost a third of four separate reductions ---------

typedef float Quad __attribute__((vector_size(16)));

inline Quad sum4(const F& a, const F& b, const F& c, const F& d) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 q = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(q), _mm512_extractf32x8_ps(q, 1));
  return (Quad)_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256 q = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
  return (Quad)_mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1));
#else
  return Quad{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// What joins a value of that kind: numbers of four rows, of one, of 2V columns or of `count`.
inline Quad load_as(const Quad&, const float* p) {
  Quad v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline Quad load_as(const Quad&, const T* p) { return Quad{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }

template <class T>
inline float load_as(float, const T* p) { return float(*p); }

template <class T, class... Count>
inline Pair load_as(const Pair&, const T* p, Count... count) { return load_pair(p, count...); }

inline void operator+=(Pair& a, const Pair& b) { a = {a.lo + b.lo, a.hi + b.hi}; }
inline void operator*=(Pair& a, const Pair& b) { a = {a.lo * b.lo, a.hi * b.hi}; }

inline void store_rows(float* p, const Quad& v) { std::memcpy(p, &v, sizeof v); }

template <class T>
inline void store_rows(T* p, const Quad& v) {
  for (int i = 0; i < 4; ++i) p[i] = T(v[i]);
}

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
inline void store_rows(bf16* p, const Quad& v) { _mm_storel_epi64((__m128i*)p, (__m128i)_mm_cvtneps_pbh((__m128)v)); }
#endif

template <class T>
inline void store_rows(T* p, float v) { *p = T(v); }

template <int T>
[[gnu::always_inline]] inline Quad sum_rows(const F (&acc)[ROWS][T], int t) {
  return sum4(acc[0][t], acc[1][t], acc[2][t], acc[3][t]);
}

template <int T>
[[gnu::always_inline]] inline float sum_rows(const F (&acc)[1][T], int t) { return sum(acc[0][t]); }

// ---- work: tokens in tiles, rows in blocks ------------------------------------------------------------------

// f(Int<T>, t) for tiles that cover the tokens [lo, hi)
template <class Fn>
inline void for_tokens(int64_t lo, int64_t hi, Fn&& f) {
  int64_t t = lo;
  for (; t + TOKENS <= hi; t += TOKENS) f(Int<TOKENS>{}, t);
  if constexpr (TOKENS > 4) {
    for (; t + 4 <= hi; t += 4) f(Int<4>{}, t);
  }
  for (; t + 2 <= hi; t += 2) f(Int<2>{}, t);
  for (; t < hi; ++t) f(Int<1>{}, t);
}

// Whether n rows make whole blocks: their functions need no code for the rest.
constexpr bool even(int64_t n) { return n % ROWS == 0; }

// f(Int<R>, row) for the rows of block `block` of n rows: four at once, or the last n % 4 one by one
template <bool EVEN, class Fn>
inline void for_rows(int64_t n, int64_t block, Fn&& f) {
  const int64_t row = block * ROWS;
  if (EVEN || row + ROWS <= n) {
    f(Int<ROWS>{}, row);
  } else if constexpr (!EVEN) {
    for (int64_t r = row; r < n; ++r) f(Int<1>{}, r);
  }
}

// z[t * ldz + c] = sum over k < K of x[t, k] * w[k, c] for c < count <= ldz. Panels of w stay in the second cache while
// tile after tile of tokens meets them. `sum` takes their checksums (`sums.cpp`), if there is one.
template <int64_t K, class TW, class TX, class Sum = NoSum>
[[gnu::noinline]] void columns(
    float* z, int64_t ldz, const TW* w, int64_t ldw, int64_t count, const TX* x, int64_t m, Sum sum = {}) {
  using O = Outer<TW, TX>;
  const int64_t rows = max<int64_t>(16, (int64_t(1) << 17) / int64_t(ldz * sizeof(TW)) / 16 * 16);
  std::memset(z, 0, m * ldz * sizeof(float));
  for (int64_t panel = 0; panel < K; panel += rows) {
    const int64_t end = min<int64_t>(K, panel + rows);
    for_tokens(0, m, [&](auto width, int64_t t0) {
      constexpr int T = decltype(width)::value;
      int64_t k = panel;
      const auto run = [&](auto depth) {
        constexpr int D = decltype(depth)::value;
        for (; k + D <= end; k += D)
          O::template step<T, D>(z + t0 * ldz, ldz, w + k * ldw, ldw, count, x + t0 * K + k, K);
      };
      run(Int<T <= 2 ? 16 : O::DEPTH>{});
      run(Int<1>{});
    });
    sum.panel(w, ldw, count, panel, end);
  }
  for (int64_t t = 0; t < m; ++t)
    for (int64_t c = 0; c < count; c += 2 * V) O::settle(z + t * ldz + c);
}

constexpr int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The share of thread `id` of `count` in a line of work: pieces of `length` blocks that cost `cost` each. Both ends
// of a share round alike, so the shares of all threads cover every block exactly once.
struct Share {
  int64_t lo, hi, base = 0;
  Share(int64_t total, int64_t id, int64_t count) : lo(total * id / count), hi(total * (id + 1) / count) {}
  template <class Fn>
  void range(int64_t length, int64_t cost, Fn&& f) {
    const auto at = [&](int64_t w) { return min<int64_t>(max<int64_t>((w - base + cost - 1) / cost, 0), length); };
    const int64_t first = lo <= base ? 0 : at(lo), last = hi <= base ? 0 : at(hi);
    if (first < last) f(first, last);
    base += length * cost;
  }
  template <class Fn>
  void piece(int64_t length, int64_t cost, Fn&& f) {
    range(length, cost, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) f(b);
    });
  }
};
