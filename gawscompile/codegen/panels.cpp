// W x of many tokens: rows of W are turned to a panel [k, rows] once, and tiles of tokens meet it. No sum of a product is
// horizontal, all is fp32, and the panel lies in the second cache (Goto and van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication", 2008: the weight is packed, x is read as it lies). `turning.cpp` stands in front.

constexpr int64_t DEPTH = 1024;   // of k in one panel
constexpr int64_t AT_ONCE = 512;  // tokens that meet a panel, at most
constexpr int64_t FEW = 16 * TALL;  // and at least, as a panel takes time to turn
constexpr int64_t PIECES = 8;       // of work for each thread: what one of them lags behind is a part of a piece

// Tokens that meet a panel: fewer where there are too few stripes for all threads.
inline int64_t tokens_at_once(int64_t m, int64_t stripes, int64_t threads) {
  const int64_t each = blocks(m, blocks(PIECES * threads, stripes));
  return min(AT_ONCE, max(FEW, blocks(each, TALL) * TALL));
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

// z[t, 0..C·V) of T tokens plus, unless they are the first, what `depth` of k make of them.
template <int T, int C>
[[gnu::noinline]] void meet(
    const float* panel, const float* x, int64_t ldx, int64_t depth, float* z, bool first, Ahead ahead) {
  F acc[T][C];
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < C; ++c) acc[t][c] = first ? F(0) : F::loadu(z + t * STRIPE + c * V);
  const auto fetch = [&](int64_t k) { __builtin_prefetch(ahead.from + k * ahead.bytes, 0, 2); };
  multiply_add(acc, x, ldx, panel, C * V, depth, fetch);
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
      for (int i = 0; i < V; ++i) lines[i].store(panel + (k + i) * WIDTH + r);
    }
}

// The same where they are columns already.
template <int64_t K, int64_t WIDTH, int64_t N, class TW>
inline void fill(Columns<N, TW> of, int64_t row, int64_t rows, int64_t from, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t r = 0; r < rows; r += V) line_of(of.w + (from + k) * N + row + r, rows - r).store(panel + k * WIDTH + r);
}

// Of the `rows` rows that come next in memory, if they do.
template <int64_t K, class TW>
inline Ahead ahead_of(const TW* w, int64_t row, int64_t rows) {
  return {reinterpret_cast<const char*>(w + row * K), rows * int64_t(sizeof(TW))};
}

template <int64_t K, int64_t N, class TW>
inline Ahead ahead_of(Columns<N, TW> of, int64_t, int64_t) {
  return {reinterpret_cast<const char*>(of.w), 0};
}

// z[t, r] = sum over k of x[t, k] w[row + r, k] of `rows` rows and `count` tokens; `left` rows follow them. done(t, end) is
// called when these tokens have all theirs, which lie in the first cache.
template <int64_t K, class W, class Fn>
void products(
    W w, int64_t row, int64_t rows, int64_t left, const float* x, int64_t count, float* panel, float* z, Fn&& done) {
  const Ahead next = ahead_of<K>(w, row + rows, min<int64_t>(left, STRIPE));
  for (int64_t from = 0; from < K; from += DEPTH) {
    const int64_t depth = min(DEPTH, K - from);
    const auto tiles = [&](auto width) {
      constexpr int C = decltype(width)::value;
      fill<K, C * V>(w, row, rows, from, depth, panel);
      for_tiles<C == 1 ? 2 * TALL : TALL>(count, [&](auto tokens, int64_t t) {
        constexpr int T = decltype(tokens)::value;
        const int64_t each = next.bytes * T / count;
        const Ahead ahead{next.from + next.bytes * t / count * K + from * each, each};
        meet<T, C>(panel, x + t * K + from, K, depth, z + t * STRIPE, from == 0, ahead);
        if (K - from <= DEPTH) done(t, t + T);
      });
    };
    if (rows > 2 * V) tiles(Int<WIDE>{});
    else if (rows > V) tiles(Int<2>{});
    else tiles(Int<1>{});
  }
}

// Memory of a stripe: a panel, and sums of as many `weights`, a token's STRIPE numbers apart.
template <int64_t K>
struct Stripe {
  static constexpr int64_t DEEP = min<int64_t>(DEPTH, (K + V - 1) / V * V) * STRIPE;
  const int64_t lo, hi, column, rows, left;
  float* panel;
  Stripe(int64_t stripe, int64_t n, int64_t from, int64_t to, int64_t weights)
      : lo(from), hi(to), column(stripe * STRIPE), rows(min<int64_t>(STRIPE, n - column)), left(n - column - rows) {
    static thread_local Buffer memory;
    panel = aligned(memory.of(DEEP + weights * (hi - lo) * STRIPE + 16));
  }
  // The sums of one of the weights, by token and column of the whole.
  float* sums(int64_t weight) const { return panel + DEEP + (weight * (hi - lo) - lo) * STRIPE - column; }
  // Makes them: done(from, to) is called for some tokens after the others.
  template <class W, class Fn>
  void multiply(int64_t weight, W w, const float* x, Fn&& done) const {
    float* const z = sums(weight) + lo * STRIPE + column;
    products<K>(w, column, rows, left, x + lo * K, hi - lo, panel, z, [&](int64_t t, int64_t end) { done(lo + t, lo + end); });
  }
  // What `block(n0)` makes of each 2V columns, which is made once, and called for tokens.
  template <class Block>
  auto ending(Block block) const {
    if constexpr (WIDE > 2) {
      const bool both = rows > 2 * V;
      return [both, first = block(column), second = block(column + 2 * V)](int64_t from, int64_t to) {
        first(from, to);
        if (both) second(from, to);
      };
    } else {
      return block(column);
    }
  }
};

// Work for all threads: each takes what lies in its own share, then what is left in those of others, as some are slower.
class Queue {
 public:
  Queue() : taken_((int64_t*)memory().of(size_t(omp_get_max_threads()) * LINE_NUMBERS)) {
    std::memset(taken_, 0, size_t(omp_get_max_threads()) * LINE_NUMBERS * sizeof(float));
  }
  template <class Fn>
  void run(int64_t id, int64_t threads, int64_t total, Fn&& f) {
    for (int64_t step = 0; step < threads; ++step) {
      const int64_t of = (id + step) % threads, lo = total * of / threads, hi = total * (of + 1) / threads;
      int64_t* const taken = taken_ + of * (LINE_NUMBERS / 2);
      for (int64_t at; (at = lo + __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED)) < hi;) f(at);
    }
  }

 private:
  static constexpr int64_t LINE_NUMBERS = LINE / sizeof(float);
  static Buffer& memory() {
    static thread_local Buffer own;  // of the calling thread
    return own;
  }
  int64_t* taken_;  // a line for each thread
};
