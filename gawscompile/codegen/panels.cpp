// W x of many tokens: rows of W are turned to a panel [k, rows] once, and tiles of tokens meet it. No sum of a product is
// horizontal, all is fp32, and the panel lies in the second cache (Goto and van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication", 2008: the weight is packed, x is read as it lies). `turning.cpp` stands in front.

constexpr int64_t DEPTH = 1024;   // of k in one panel
constexpr int64_t AT_ONCE = 512;  // tokens whose sums are kept

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
  multiply_add(acc, x, ldx, panel, STRIPE, depth, fetch);
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

// panel[k, r] = w[row + r, from + k] of `rows` rows and `depth` of k: rows become columns.
template <int64_t K, class TW>
inline void fill(const TW* w, int64_t row, int64_t rows, int64_t from, int64_t depth, float* panel) {
  for (int64_t r = 0; r < rows; r += V)
    for (int64_t k = 0; k < depth; k += V) {
      F lines[V];
      for (int i = 0; i < V; ++i)
        lines[i] = r + i < rows ? line_of(w + (row + r + i) * K + from + k, depth - k) : F(0);
      turn(lines);
      for (int i = 0; i < V; ++i) lines[i].store(panel + (k + i) * STRIPE + r);
    }
}

// The same where they are columns already.
template <int64_t K, int64_t N, class TW>
inline void fill(Columns<N, TW> of, int64_t row, int64_t rows, int64_t from, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t r = 0; r < rows; r += V) line_of(of.w + (from + k) * N + row + r, rows - r).store(panel + k * STRIPE + r);
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

// z[t, r] = sum over k of x[t, k] w[row + r, k] of `rows` rows and `count` tokens; `left` rows follow them.
template <int64_t K, class W>
void products(W w, int64_t row, int64_t rows, int64_t left, const float* x, int64_t count, float* panel, float* z) {
  const Ahead next = ahead_of<K>(w, row + rows, min<int64_t>(left, STRIPE));
  for (int64_t from = 0; from < K; from += DEPTH) {
    const int64_t depth = min(DEPTH, K - from);
    fill<K>(w, row, rows, from, depth, panel);
    const auto tiles = [&](auto width) {
      constexpr int C = decltype(width)::value;
      for_tiles(count, [&](auto tokens, int64_t t) {
        constexpr int T = decltype(tokens)::value;
        const int64_t each = next.bytes * T / count;
        const Ahead ahead{next.from + next.bytes * t / count * K + from * each, each};
        meet<T, C>(panel, x + t * K + from, K, depth, z + t * STRIPE, from == 0, ahead);
      });
    };
    if (rows > 2 * V) tiles(Int<WIDE>{});
    else tiles(Int<2>{});
  }
}

// The columns of stripe number `stripe` of n, of one weight or of gate and up: f(column, end, lo, hi, z...) takes the sums
// of these columns for the tokens [lo, hi), a token's STRIPE numbers apart.
template <int64_t K, class Fn, class... W>
void by_products(int64_t stripe, int64_t n, int64_t m, const float* x, Fn&& f, W... w) {
  static thread_local Buffer memory;
  constexpr int64_t DEEP = min<int64_t>(DEPTH, (K + V - 1) / V * V) * STRIPE;
  const int64_t kept = min(m, AT_ONCE) * STRIPE;
  float* const panel = aligned(memory.of(DEEP + int64_t(sizeof...(w)) * kept + 16));
  const int64_t column = stripe * STRIPE, rows = min<int64_t>(STRIPE, n - column);
  for (int64_t lo = 0; lo < m; lo += AT_ONCE) {
    const int64_t hi = min(m, lo + AT_ONCE);
    float* z = panel + DEEP;
    const auto next = [&](auto weight) {
      float* const own = z;
      products<K>(weight, column, rows, lo ? 0 : n - column - rows, x + lo * K, hi - lo, panel, own);
      z += kept;
      return own - lo * STRIPE - column;
    };
    f(column, column + rows, lo, hi, next(w)...);
  }
}

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
