// What the entry points of a group call, for a piece of work each; `cpp.py` puts it behind `modes.cpp`. Functions that
// take n as an argument are compiled once for all projections of the same dtypes and ranks, and for both entry points.

// u = s A x: a thread's share, by blocks of A's rows times tiles of tokens.
template <bool EVEN, int64_t K, int64_t LDU, class TA, class TX, class Sum = NoSum>
[[gnu::noinline]] void low_rank(
    Share& share, int64_t cost, int64_t m, int64_t rank, const TA* a, const TX* x, float scale, float* u, Sum seen = {}) {
  const int64_t tiles = blocks(m, TILE);
  share.piece(blocks(rank, ROWS) * tiles, cost, [&](int64_t piece) {
    const int64_t lo = piece % tiles * TILE, hi = min(m, lo + TILE);
    for_rows<EVEN>(rank, piece / tiles, [&](auto rows, int64_t row) {
      for_tokens(lo, hi, [&](auto width, int64_t t0) {
        constexpr int R = decltype(rows)::value, T = decltype(width)::value;
        F acc[R][T];
        clear(acc);
        stream<K>(acc, a + row * K, x + t0 * K, K, t0 == 0, seen.from(row));
        for (int t = 0; t < T; ++t)
          for (int r = 0; r < R; ++r) u[(t0 + t) * LDU + row + r] = scale * sum(acc[r][t]);
      });
    });
  });
}

// ---- parts of a projection: functions, whose types are those of what they read -------------------------------

// Some parts one after the other.
template <class... Parts>
inline auto all(Parts... parts) {
  return [=](auto&&... at) __attribute__((always_inline)) { (parts(at...), ...); };
}

// Dots join the accumulators of a tile. W x, rows of w lying one after the other:
template <int64_t K, class TW, class TX, class Sum = NoSum>
inline auto weight(const TW* w, const TX* x, Sum seen = {}) {
  return [=](auto& acc, int64_t row, int64_t t0) __attribute__((always_inline)) {
    stream<K>(acc, w + row * K, x + t0 * K, K, t0 == 0, seen.from(row));
  };
}

// B u, a token's u every LD numbers
template <int RANK, int64_t LD, class TB, class TU>
inline auto factor(const TB* b, const TU* u) {
  return [=](auto& acc, int64_t row, int64_t t0) __attribute__((always_inline)) {
    dot<RANK>(acc, b + row * RANK, u + t0 * LD, LD);
  };
}

// (I ⊗ G) x, G [O, I]
template <int64_t O, int64_t I, int64_t LD, class TG, class TX>
inline auto slices(const TG* g, const TX* x) {
  return [=](auto& acc, int64_t row, int64_t t0) __attribute__((always_inline)) {
    slice_dot<O, I>(acc, g, row, x + t0 * LD, LD);
  };
}

// Lines join a sum: of four rows, of one, of 2V columns or of `count`. There is one for all tokens, or one every `ld`
// numbers, where an `Int` is known to the compiler.
template <class T, class Stride = Int<0>>
inline auto plus(const T* p, Stride ld = {}) {
  return [=](auto& v, int64_t row, int64_t t, auto... count) { v += load_as(v, p + t * ld + row, count...); };
}

template <class T>
inline auto times(const T* p) {
  return [=](auto& v, int64_t row, int64_t, auto... count) { v *= load_as(v, p + row, count...); };
}

// B u for 2V columns from n0 on, or those that are left of n: their block of B is transposed once, for all tokens.
template <int RANK, int64_t LD, class TU>
struct Turned {
  const TU* u;
  alignas(64) float bt[RANK][2 * V] = {};

  template <int T>
  [[gnu::always_inline]] void operator()(Pair (&acc)[T], int64_t t0) const {
    for (int k = 0; k < RANK; ++k) {
      const Pair b = load_pair(bt[k]);
      for (int t = 0; t < T; ++t) {
        const F ut(float(u[(t0 + t) * LD + k]));
        acc[t] = {fmadd(b.lo, ut, acc[t].lo), fmadd(b.hi, ut, acc[t].hi)};
      }
    }
  }
};

template <int RANK, int64_t LD, class TB, class TU>
inline auto turned(const TB* b, const TU* u, int64_t n0, int64_t n) {
  Turned<RANK, LD, TU> term{u};
  for (int c = 0; c < min<int64_t>(2 * V, n - n0); ++c)
    for (int k = 0; k < RANK; ++k) term.bt[k][c] = float(b[(n0 + c) * RANK + k]);
  return term;
}

// ---- rows of a projection: dots, one horizontal sum, lines ---------------------------------------------------

// R rows for T tokens, the first of which is t0, and whose line of y begins at y.
template <int R, int T, class TY, class Dots, class Lines>
inline void tile(int64_t row, int64_t t0, TY* y, int64_t ldy, const Dots& dots, const Lines& lines) {
  F acc[R][T];
  clear(acc);
  dots(acc, row, t0);
  for (int t = 0; t < T; ++t) {
    auto v = sum_rows(acc, t);
    lines(v, row, t0 + t);
    store_rows(y + t * ldy + row, v);
  }
}

// All rows of the blocks [first, last), for all tokens, whose lines of y are `ldy` numbers apart. `hashes` take checksums
// of blocks that were just read.
template <bool EVEN, class TY, class Dots, class Lines, class... Hashes>
[[gnu::noinline]] void expand(
    int64_t first, int64_t last, int64_t n, int64_t m, TY* y, int64_t ldy, Dots dots, Lines lines, Hashes... hashes) {
  for_tokens(0, m, [&](auto width, int64_t t0) {
    for (int64_t block = first; block < last; ++block) {
      for_rows<EVEN>(n, block, [&](auto rows, int64_t row) {
        tile<decltype(rows)::value, decltype(width)::value>(row, t0, y + t0 * ldy, ldy, dots, lines);
      });
      if (t0 == 0) (hashes(n, block), ...);
    }
  });
}

// A thread's share of the rows: panels of weights stay in the second cache while tile after tile of tokens meets them.
template <bool EVEN, class TY, class... Parts>
inline void by_panels(
    Share& share, int64_t cost, int64_t panel, int64_t n, int64_t m, TY* y, const Parts&... parts) {
  share.range(blocks(n, ROWS), cost, [&](int64_t first, int64_t last) {
    for (; first < last; first += panel) expand<EVEN>(first, min(last, first + panel), n, m, y, n, parts...);
  });
}

// ---- weights whose rows are summed up in memory before adapters join them. `fill` makes the sums of some of the first
// LENGTH rows, whole UNITs of them. Where a byte has codes of rows LENGTH apart, there are two PARTS of as many rows, and
// `fill` makes those of the second too, m lines further on -----------------------------------------------------

// A weight kept as [k, n].
template <int64_t K, int64_t N, class TW, class TX, class Sum>
struct ByColumns {
  static constexpr int64_t UNIT = 2 * V, LENGTH = N, PARTS = 1;
  const TW* w;
  const TX* x;
  Sum seen;
  static int64_t at_once(int64_t m) { return columns_for(m); }
  void fill(float* z, int64_t ldz, int64_t m, int64_t at, int64_t count) const {
    columns<K>(z, ldz, w + at, N, count, x, m, seen.from(at));
  }
};

template <int64_t K, int64_t N, class TW, class TX, class Sum = NoSum>
inline auto by_columns(const TW* w, const TX* x, Sum seen = {}) {
  return ByColumns<K, N, TW, TX, Sum>{w, x, seen};
}

// A thread's memory for the sums of a gate, and of its partner.
inline Buffer& sums_of(int number) {
  static thread_local Buffer buffers[2];
  return buffers[number];
}

// A share of the rows of a weight, or of a gate's and its partner's, which are of one kind. f(first, last, z, ldz) takes the
// blocks [first, last) of each part: z[i] + row has the sum of that row of weight i for the first token, and `ldz` numbers
// further on that for the next.
template <class Fn, class W, class... Others>
inline void rows_apart(Share& share, int64_t cost, int64_t m, Fn&& f, const W& weight, const Others&... others) {
  static_assert(((Others::UNIT == W::UNIT && Others::LENGTH == W::LENGTH && Others::PARTS == W::PARTS) && ...));
  share.range(blocks(W::LENGTH, W::UNIT), W::UNIT * W::PARTS / ROWS * cost, [&](int64_t first, int64_t last) {
    const int64_t end = min<int64_t>(W::LENGTH, last * W::UNIT), ldz = W::at_once(m);
    for (int64_t at = first * W::UNIT; at < end; at += ldz) {
      const int64_t count = min(ldz, end - at);
      int number = 0;
      const auto filled = [&](const auto& one) {
        float* z = sums_of(number++).of(W::PARTS * m * ldz);
        one.fill(z, ldz, m, at, count);
        return z;
      };
      const std::array<float*, 1 + sizeof...(others)> sums{filled(weight), filled(others)...};
      for (int64_t part = 0; part < W::PARTS; ++part) {
        const int64_t row = part * W::LENGTH + at;
        auto z = sums;
        for (float*& line : z) line += part * m * ldz - row;
        f(row / ROWS, blocks(row + count, ROWS), z, ldz);
      }
    }
  });
}

// f() for 2V columns of N from n0 on, f(count) where fewer are left.
template <int64_t N, class Fn>
[[gnu::always_inline]] inline void for_columns(int64_t n0, Fn&& f) {
  if (N % (2 * V) == 0 || n0 + 2 * V <= N) f(); else if constexpr (N % (2 * V) != 0) f(int(N - n0));
}

// What joins the sums of T tokens from t0 on, 2V columns of N from n0 on, and y: lines, then terms, then lines.
template <int64_t LDY, int T, class TY, class Early, class Late, class Terms, class... Count>
[[gnu::always_inline]] inline void join(
    Pair (&acc)[T], int64_t n0, int64_t t0, TY* y, const Early& early, const Late& late, const Terms& terms,
    Count... count) {
  for (int t = 0; t < T; ++t) early(acc[t], n0, t0 + t, count...);
  terms(acc, t0);
  for (int t = 0; t < T; ++t) late(acc[t], n0, t0 + t, count...);
  for (int t = 0; t < T; ++t) store_pair(y + (t0 + t) * LDY + n0, acc[t], count...);
}

template <int64_t N, int64_t LDY = N, int T, class TY, class Early, class Late, class... Terms>
[[gnu::always_inline]] inline void close(
    Pair (&acc)[T], int64_t n0, int64_t t0, TY* y, Early early, Late late, const Terms&... terms) {
  const auto each = [&](auto& sums, int64_t t) __attribute__((always_inline)) { (terms(sums, t), ...); };
  for_columns<N>(n0, [&](auto... count) __attribute__((always_inline)) {
    join<LDY>(acc, n0, t0, y, early, late, each, count...);
  });
}

// 2V columns of N from n0 on, or those that are left, for all of m tokens, on top of what `base` holds.
template <int64_t N, class TY, class TS, class Early, class Late, class... Terms>
[[gnu::noinline]] void add(
    int64_t n0, int64_t m, TY* y, const TS* base, Early early, Late late, const Terms&... terms) {
  const auto each = [&](auto& sums, int64_t t) __attribute__((always_inline)) { (terms(sums, t), ...); };
  for_columns<N>(n0, [&](auto... count) {
    for_tokens(0, m, [&](auto width, int64_t t0) {
      constexpr int T = decltype(width)::value;
      Pair acc[T];
      for (int t = 0; t < T; ++t) acc[t] = load_pair(base + (t0 + t) * N + n0, count...);
      join<N>(acc, n0, t0, y, early, late, each, count...);
    });
  });
}
