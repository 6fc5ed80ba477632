// W x of many tokens: rows of W are turned to a panel [k, rows] once, and tiles of tokens meet it. No sum of a product is
// horizontal, all is fp32, and the panel lies in the second cache (Goto and van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication", 2008: the weight is packed, x is read as it lies). `turning.cpp` stands in front.

constexpr int64_t DEPTH = 1024;     // of k in one panel
constexpr int64_t AT_ONCE = 512;    // tokens that meet a panel, at most; twice as many where their sums stay in registers
constexpr int64_t FOLDED = 1280;    // of them where ΔW is added to each panel, which takes as long for one token
constexpr int64_t TOGETHER = 48;    // ranks of ΔW that are added at once
constexpr int64_t FEW = 16 * TALL;  // and at least, as a panel takes time to turn
constexpr int64_t PIECES = 8;       // of work for each thread: none waits for another longer than a piece takes
constexpr int64_t FEWER = 4;        // pieces for each thread suffice where more would turn panels for less than FEW tokens
constexpr int64_t LONG = 1 << 23;   // numbers of x in fp32 at once, 32 MB; more for LEAST tokens, as each time turns all panels
constexpr int64_t LEAST = 256;

// Tokens that meet a panel, in parts of one size: a short one takes as long to turn. They are fewer where there are too few
// stripes for all threads.
inline int64_t part_of(int64_t m, int64_t parts, int64_t most) {
  if (m == 0) return TALL;  // none are cut in no parts
  const int64_t each = max(FEW, blocks(m, max(parts, blocks(m, most))));
  return blocks(blocks(m, blocks(m, each)), TALL) * TALL;
}

template <int64_t K>
inline int64_t tokens_at_once(int64_t m, int64_t stripes, int64_t threads) {
  const int64_t parts = min(blocks(PIECES * threads, stripes), max(m / FEW, blocks(FEWER * threads, stripes)));
  return part_of(m, parts, K <= DEPTH ? 2 * AT_ONCE : AT_ONCE);
}

inline int64_t tokens_folded(int64_t m, int64_t stripes, int64_t threads) {
  return part_of(m, blocks(FEWER * threads, stripes), FOLDED);
}

// Tokens whose x is in fp32 at once, in parts of one size.
template <int64_t K>
inline int64_t tokens_widened(int64_t m) {
  return m == 0 ? 0 : blocks(m, blocks(m, max(LONG / K, LEAST)));
}

// V numbers of a row, the first `count` of them.
template <class T>
inline F line_of(const T* p, int64_t count) {
  if (count >= V) return vector_of(p);
  T padded[V] = {};
  std::memcpy(padded, p, size_t(count) * sizeof(T));
  return vector_of(padded);
}

// A thread's share of x in fp32.
template <class T>
inline void widen(int64_t id, int64_t threads, int64_t count, const T* x, float* to) {
  const int64_t lo = count * id / threads, hi = count * (id + 1) / threads;
  int64_t i = lo;
  for (; i + V <= hi; i += V) vector_of(x + i).store(to + i);
  for (; i < hi; ++i) to[i] = float(x[i]);
}

// What is read next from memory, by bytes for each step of k: it comes into the second cache meanwhile.
struct Ahead {
  const char* from;
  int64_t bytes;
};

// z[t, 0..C·V) of T tokens plus, unless they are the first, what `depth` of k make of them. Where these are the last, they
// stay in registers for end(sums).
template <int T, int C, class End>
[[gnu::noinline]] void meet(
    const float* panel, const float* x, int64_t ldx, int64_t depth, float* z, bool first, bool last, Ahead ahead,
    const End& end) {
  F acc[T][C];
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < C; ++c) acc[t][c] = first ? F(0) : F::loadu(z + t * STRIPE + c * V);
  const auto fetch = [&](int64_t k) { __builtin_prefetch(ahead.from + k * ahead.bytes, 0, 2); };
  multiply_add(acc, x, ldx, panel, C * V, depth, fetch);
  if (last) return end(acc);
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < C; ++c) acc[t][c].store(z + t * STRIPE + c * V);
}

// W kept by its columns, [K, N], as the backward of a layer reads its weight.
template <int64_t N, class TW>
struct Columns {
  const TW* w;
};

template <int64_t N, class TW>
inline Columns<N, TW> columns(const TW* w) {
  return {w};
}

// panel[k, r] = w[row + r, from + k] of `rows` rows and `depth` of k, a k's rows WIDTH apart: rows become columns.
template <int64_t K, int64_t WIDTH, class TW>
inline void fill(const TW* w, int64_t row, int64_t rows, int64_t from, int64_t depth, float* panel) {
  for (int64_t r = 0; r < rows; r += V)
    for (int64_t k = 0; k < depth; k += V) {
      F lines[V];
      for (int i = 0; i < V; ++i)
        lines[i] = r + i < rows ? line_of(w + (row + r + i) * K + from + k, depth - k) : F(0);
      turn(lines);
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) lines[i].store(panel + (k + i) * WIDTH + r);
    }
}

// The same where they are columns already.
template <int64_t K, int64_t WIDTH, int64_t N, class TW>
inline void fill(Columns<N, TW> of, int64_t row, int64_t rows, int64_t from, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t r = 0; r < rows; r += V) line_of(of.w + (from + k) * N + row + r, rows - r).store(panel + k * WIDTH + r);
}

// Some ranks of ΔW = sum of A's rows times B's columns, for a stripe with C vectors of rows of W.
template <int C, class TA>
struct Ranks {
  int64_t count = 0;
  const TA* a[TOGETHER];
  alignas(64) float b[TOGETHER][C * V] = {};

  // panel[k, r] += sum over j of a[j, k] b[j, r]. Stretches of A's rows are copied side by side in fp32 first: where rows
  // are a multiple of 4 KB apart, all want the same lines of the first cache.
  [[gnu::noinline]] void flush(int64_t depth, float* panel) {
    constexpr int64_t STRETCH = 8 * TALL / V * V;
    alignas(64) float lines[TOGETHER][STRETCH];
    for (int64_t k0 = 0; k0 < depth; k0 += STRETCH) {
      const int64_t end = min(depth, k0 + STRETCH);
      for (int64_t j = 0; j < count; ++j)
        for (int64_t k = k0; k < end; k += V) {
          line_of(a[j] + k, depth - k).store(lines[j] + k - k0);
          __builtin_prefetch(a[j] + k + STRETCH);
        }
      int64_t k = k0;
      for (; k + TALL <= end; k += TALL) add<TALL>(lines[0] + k - k0, STRETCH, panel + k * C * V);
      for (; k < end; ++k) add<1>(lines[0] + k - k0, STRETCH, panel + k * C * V);
    }
    count = 0;
  }

 private:
  template <int T>
  [[gnu::always_inline]] void add(const float* line, int64_t stretch, float* panel) const {
    F acc[T][C];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[t][c] = F::loadu(panel + t * C * V + c * V);
    for (int64_t j = 0; j < count; ++j, line += stretch) {
      F row[C];
      for (int c = 0; c < C; ++c) row[c] = F::loadu(b[j] + c * V);
      for (int t = 0; t < T; ++t) {
        const F one(line[t]);
        for (int c = 0; c < C; ++c) acc[t][c] = fmadd(one, row[c], acc[t][c]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[t][c].store(panel + t * C * V + c * V);
  }
};

// panel[k, r] += s B A of all that each(join) calls join(rank, s, A, B, ldb) with: W + ΔW is in it then.
template <int64_t K, int C, class T, class Each>
inline void add_delta(int64_t row, int64_t rows, int64_t from, int64_t depth, float* panel, const Each& each) {
  Ranks<C, T> ranks;
  each([&](int64_t rank, float scale, const T* a, const auto* b, int64_t ldb) {
    for (int64_t j = 0; j < rank; ++j) {
      ranks.a[ranks.count] = a + j * K + from;
      for (int64_t r = 0; r < rows; ++r) ranks.b[ranks.count][r] = scale * float(b[(row + r) * ldb + j]);
      if (++ranks.count == TOGETHER) ranks.flush(depth, panel);
    }
  });
  if (ranks.count) ranks.flush(depth, panel);
}

template <int64_t RANK, int64_t K, class TA, class TB>
inline auto delta(const TA* a, const TB* b, float scale) {
  return [=](auto vectors, auto... at) {
    add_delta<K, decltype(vectors)::value, TA>(at..., [=](const auto& join) { join(RANK, scale, a, b, RANK); });
  };
}

// Those of a `plain` bank.
template <int64_t K, template <class> class Bank, class T>
inline auto deltas(const Bank<T>& bank) {
  return [&bank](auto vectors, auto... at) {
    add_delta<K, decltype(vectors)::value, T>(at..., [&](const auto& join) {
      for (auto use = bank.row(0), end = use + use->adapters; use < end; ++use)
        join(use->ra, use->scale, bank.a(*use), bank.b(*use), use->rb);
    });
  };
}

// A weight whose panels have ΔW in them, if `folded`.
template <class W, class Deltas>
struct Adapted {
  W w;
  bool folded;
  Deltas deltas;
};

template <class W, class Deltas>
inline Adapted<W, Deltas> adapted(W w, bool folded, Deltas deltas) {
  return {w, folded, deltas};
}

template <int64_t K, int64_t WIDTH, class W, class Deltas>
inline void fill(
    const Adapted<W, Deltas>& of, int64_t row, int64_t rows, int64_t from, int64_t depth, float* panel) {
  fill<K, WIDTH>(of.w, row, rows, from, depth, panel);
  if (of.folded) of.deltas(Int<WIDTH / V>{}, row, rows, from, depth, panel);
}

// What joins a tile's sums unless it is in the panel.
template <class Term>
inline auto unless(bool folded, Term term) {
  return [=](auto& sums, int64_t t) __attribute__((always_inline)) {
    if (!folded) term(sums, t);
  };
}

// Whether ΔW is folded into panels, `delta` multiplications for each time that all are turned, rather than that every
// token multiplies by A and B: `factors`.
inline bool folds(int64_t m, int64_t each, int64_t delta, int64_t factors) { return blocks(m, each) * delta < m * factors; }

// A tile's part, `tokens` of `count` from t on, of the `rows` rows from `row` on, which come next: bytes of all of them.
template <int64_t K, class TW>
inline Ahead ahead_of(const TW* w, int64_t row, int64_t rows, int64_t from, int64_t t, int64_t tokens, int64_t count) {
  const int64_t bytes = rows * int64_t(sizeof(TW)), each = bytes * tokens / count;
  return {reinterpret_cast<const char*>(w + row * K) + bytes * t / count * K + from * each, each};
}

// The first tiles have one line of every k each.
template <int64_t K, int64_t N, class TW>
inline Ahead ahead_of(Columns<N, TW> of, int64_t row, int64_t rows, int64_t from, int64_t t, int64_t tokens, int64_t) {
  const int64_t at = t / tokens * LINE;
  if (at >= rows * int64_t(sizeof(TW))) return {reinterpret_cast<const char*>(of.w), 0};
  return {reinterpret_cast<const char*>(of.w + from * N + row) + at, N * int64_t(sizeof(TW))};
}

template <int64_t K, class W, class Deltas>
inline Ahead ahead_of(
    const Adapted<W, Deltas>& of, int64_t row, int64_t rows, int64_t from, int64_t t, int64_t tokens, int64_t count) {
  return ahead_of<K>(of.w, row, rows, from, t, tokens, count);
}

// How many vectors of columns a stripe with as many rows has.
constexpr int vectors_of(int64_t rows) { return rows > 2 * V ? WIDE : rows > V ? 2 : 1; }

// A stripe of weights of N rows, and the tokens [lo, hi). Its memory holds a panel, and sums of as many `weights`, a
// token's STRIPE numbers apart.
template <int64_t K, int64_t N>
struct Stripe {
  static constexpr int64_t DEEP = min<int64_t>(DEPTH, (K + V - 1) / V * V) * STRIPE;
  const int64_t lo, hi, column, rows, left;
  float* panel;
  Stripe(int64_t stripe, int64_t from, int64_t to, int64_t weights)
      : lo(from), hi(to), column(stripe * STRIPE), rows(min<int64_t>(STRIPE, N - column)), left(N - column - rows) {
    static thread_local Buffer memory;
    panel = aligned(memory.of(DEEP + weights * (hi - lo) * STRIPE + 16));
  }
  // The sums of one of the weights: those of token t and column n are at [t * STRIPE + n].
  float* sums(int64_t weight) const { return panel + DEEP + (weight * (hi - lo) - lo) * STRIPE - column; }
  // Makes the sums of one weight tile by tile, and calls end(tile's sums, its first token) for each.
  template <class W, class End>
  void multiply(int64_t weight, W w, const float* x, const End& end) const {
    constexpr int64_t REST = N % STRIPE;
    if constexpr (REST != 0) {
      if (rows < STRIPE) return products<vectors_of(REST)>(weight, w, x, end);
    }
    if constexpr (N >= STRIPE) products<WIDE>(weight, w, x, end);
  }
  // An `end`: block(n0), called once, makes what joins 2V columns, and that is called for each tile.
  template <class Block>
  auto ending(Block block) const {
    return [first = block(column), second = block(column + 2 * V)](auto& acc, int64_t t) __attribute__((always_inline)) {
      const auto halves = [&](auto half, const auto& part) __attribute__((always_inline)) {
        constexpr int T = sizeof(acc) / sizeof(acc[0]), C = sizeof(acc[0]) / sizeof(F), AT = decltype(half)::value;
        Pair sums[T];
        for (int i = 0; i < T; ++i) sums[i] = {acc[i][AT], AT + 1 < C ? acc[i][AT + 1 < C ? AT + 1 : AT] : F(0)};
        part(sums, t);
      };
      halves(Int<0>{}, first);
      if constexpr (sizeof(acc[0]) > 2 * sizeof(F)) halves(Int<2>{}, second);
    };
  }

 private:
  template <int C, class W, class End>
  void products(int64_t weight, W w, const float* x, const End& end) const {
    const int64_t count = hi - lo, next = min<int64_t>(left, STRIPE);
    float* const z = sums(weight) + lo * STRIPE + column;
    for (int64_t from = 0; from < K; from += DEPTH) {
      const int64_t depth = min(DEPTH, K - from);
      fill<K, C * V>(w, column, rows, from, depth, panel);
      const auto tile = [&](auto tokens, int64_t t) {
        constexpr int T = decltype(tokens)::value;
        const Ahead ahead = ahead_of<K>(w, column + rows, next, from, t, T, count);
        meet<T, C>(panel, x + (lo + t) * K + from, K, depth, z + t * STRIPE, from == 0, K - from <= DEPTH, ahead,
            [&](auto& acc) __attribute__((always_inline)) { end(acc, lo + t); });
      };
      constexpr int MOST = C == 1 ? 2 * TALL : TALL;  // a tile of two would be more code to build, and save little
      int64_t t = 0;
      for (; t + MOST <= count; t += MOST) tile(Int<MOST>{}, t);
      for (; t < count; ++t) tile(Int<1>{}, t);
    }
  }
};

// Work for all threads: each takes what lies in its own share, then what is left in those of others, as some are slower.
class Queue {
 public:
  Queue() : taken_((int64_t*)memory().of(size_t(omp_get_max_threads()) * LINE_NUMBERS)) {
    std::memset(taken_, 0, size_t(omp_get_max_threads()) * LINE_NUMBERS * sizeof(float));
  }
  // Calls f(piece), of `total`.
  template <class Fn>
  void run(int64_t id, int64_t threads, int64_t total, Fn&& f) {
    for (int64_t step = 0; step < threads; ++step) {
      const int64_t of = (id + step) % threads, lo = total * of / threads, hi = total * (of + 1) / threads;
      int64_t* const taken = taken_ + of * (LINE_NUMBERS / 2);
      for (int64_t at; (at = lo + __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED)) < hi;) f(at);
    }
  }

  // Before the next run, when no thread is in the last.
  void clear(int64_t id) { taken_[id * (LINE_NUMBERS / 2)] = 0; }

 private:
  static constexpr int64_t LINE_NUMBERS = LINE / sizeof(float);
  static Buffer& memory() {
    static thread_local Buffer own;  // of the calling thread
    return own;
  }
  int64_t* taken_;  // a line for each thread
};
