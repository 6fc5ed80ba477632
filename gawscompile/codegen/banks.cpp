// What a bank's adapters add (`ir/banked.py`); `cpp.py` puts it behind `projections.cpp` where a group has a bank.

struct Use {
  int32_t a, b, ra, rb;
  float scale, weight;
  int32_t same, adapters;

  bool mode() const { return ra < 0; }
  int64_t columns() const { return mode() ? 0 : rb; }  // of B: numbers of u
  bool scales() const { return rb - ra == 2 && !mode(); }
};

// An entry as I_before ⊗ G ⊗ I_after, G [rows, cols]. The last of its chain is scaled.
struct Mode {
  int64_t g, before, rows, cols, after;
  bool last;
  float scale;

  explicit Mode(const Use& use) : g(use.a), before(use.b), rows(-use.ra), cols(use.rb) {
    int32_t width;  // below zero where a mode follows
    std::memcpy(&width, &use.weight, sizeof width);
    last = width > 0, after = last ? width : -width, scale = last ? use.scale : 1;
  }
  int64_t inputs() const { return before * cols * after; }
  int64_t outputs() const { return before * rows * after; }

  // Work for a tile of tokens, as pieces of what `cost` counts in multiplications of a block of rows: G's rows in blocks
  // times some slices, or times a stretch of what each slice is as wide as.
  int64_t stretch() const { return after == 1 ? min<int64_t>(before, 2 * TOKENS) : min<int64_t>(after, 8 * V); }
  int64_t stretches() const { return after == 1 ? blocks(before, stretch()) : before * blocks(after, stretch()); }
  int64_t pieces() const { return blocks(rows, ROWS) * stretches(); }
  int64_t cost() const { return cols * stretch(); }
};

constexpr int64_t UNIT = 32;
constexpr int64_t KEPT = 1 << 14;  // integers that a thread keeps for the next call

// One module's part of a schedule, for m tokens: `u` has a line of `room` numbers for each, `z` one of `span` for what
// modes make, `key` the first row that has the same adapters. `order` has the tokens by their keys: those of the key r from
// `start[r]` on.
template <class T>
struct Bank {
  const T* pool;
  const Use* entries;
  int64_t rows, width, room, each;  // each: tokens of a row
  bool dora = false;                // whether any adapter scales the rows of W x
  bool plain = true;                // whether all rows have the same adapters, and each is A and B alone
  int64_t span = 0, stages = 0;     // stages: modes of the longest chain
  float *u = nullptr, *z = nullptr;
  int32_t *key = nullptr, *order = nullptr, *start = nullptr;

  Bank(const T* pool, const int32_t* schedule, int64_t m)
      : pool(pool), entries((const Use*)schedule), rows(entries->a), width(entries->b), room(entries->ra), each(m / rows) {
    for (int64_t r = 0; r < rows; ++r) {
      plain &= row(r)->same == 0;
      for (const Use *use = row(r), *end = use + use->adapters; use < end; ++use)
        dora |= use->scales(), plain &= use->ra == use->rb;
      chains(r, [&](const Mode& mode, int64_t stage, int64_t at) {
        span = max(span, blocks(at + mode.outputs(), V) * V), stages = max(stages, stage + 1);
      });
    }
  }

  bool adds() const { return room || stages; }
  bool lone() const { return plain && row(0)->adapters <= 1; }  // one plain adapter for all rows, or none

  const Use* row(int64_t r) const { return entries + (1 + r) * width; }
  const T* a(const Use& use) const { return pool + use.a * UNIT; }
  const T* b(const Use& use) const { return pool + use.b * UNIT; }

  int64_t rank() const {  // of all adapters of the first row
    int64_t total = 0;
    for (const Use *use = row(0), *end = use + use->adapters; use < end; ++use) total += use->ra;
    return total;
  }

  // f(Int<count>, t) for those of W tokens from t0 on that run together: all if they share their adapters, or each alone
  template <int W, class Fn>
  [[gnu::always_inline]] void together(int64_t t0, Fn&& f) const {
    bool one = true;
    for (int t = 1; t < W; ++t) one &= key[t0 + t] == key[t0];
    if (one) f(Int<W>{}, 0);
    else
      for (int t = 0; t < W; ++t) f(Int<1>{}, t);
  }

  // 1 and what the adapters of the key r add to it: the scales of `count` rows of W x from n on
  void scale(int64_t r, int64_t n, int64_t count, float* scales) const {
    for (int64_t i = 0; i < count; ++i) scales[i] = 1;
    for (const Use *use = row(r), *end = use + use->adapters; use < end; ++use) {
      if (!use->scales()) continue;
      const T* column = b(*use) + n * use->rb + use->ra + 1;
      for (int64_t i = 0; i < count; ++i) scales[i] += use->weight * float(column[i * use->rb]);
    }
  }

  // f(mode, stage, at) for the modes of the key r: their numbers in their chains, and where in a line of z what they make
  // begins
  template <class Fn>
  void chains(int64_t r, Fn&& f) const {
    int64_t stage = 0, at = 0;
    for (const Use *use = row(r), *end = use + use->adapters; use < end; ++use) {
      if (!use->mode()) continue;
      const Mode mode(*use);
      f(mode, stage, at);
      at += mode.outputs(), stage = mode.last ? 0 : stage + 1;
    }
  }

  // f(key, first, last) for the tokens of `order` that share their adapters, wherever their rows are
  template <class Fn>
  void runs(Fn&& f) const {
    for (int64_t r = 0; r < rows; ++r)
      if (row(r)->adapters && start[r] < start[r + 1]) f(r, start[r], start[r + 1]);
  }

  int64_t cost(int64_t k) const {  // of `shrink`, in multiplications of a block of A's rows
    int64_t total = 0;
    runs([&](int64_t r, int64_t lo, int64_t hi) {
      for (int64_t i = 0; i < row(r)->adapters; ++i) total += blocks(row(r)[i].columns(), ROWS) * blocks(hi - lo, TILE);
    });
    return total * k + chained(0);
  }

  int64_t chained(int64_t wanted) const {  // the cost of a stage of modes
    int64_t total = 0;
    if (wanted < stages)
      runs([&](int64_t r, int64_t lo, int64_t hi) {
        chains(r, [&](const Mode& mode, int64_t stage, int64_t) {
          if (stage == wanted) total += mode.pieces() * mode.cost() * blocks(hi - lo, TILE);
        });
      });
    return total;
  }

  // How many `place` takes of each.
  int64_t numbers(int64_t m) const { return m * (room + span); }
  int64_t integers(int64_t m) const { return 2 * m + rows + 2; }

  // Memory behind that of what came before, and the order in it: tokens are counted by their keys, then sorted.
  void place(float*& memory, int32_t*& more, int64_t m) {
    u = memory, z = memory + m * room, key = more, order = more + m, start = more + 2 * m;
    std::memset(start, 0, (rows + 2) * sizeof *start);
    for (int64_t r = 0; r < rows; ++r) start[row(r)->same + 2] += each;
    for (int64_t r = 0; r < rows; ++r) start[r + 2] += start[r + 1];
    for (int64_t t = 0; t < m; ++t) order[start[(key[t] = row(t / each)->same) + 1]++] = t;
    memory += numbers(m), more += integers(m);
  }
};

// u = A x, scaled, the weight of a bias, and 0 for a scale of W x: a thread's share.
template <int64_t K, class T, class TX>
[[gnu::noinline]] void shrink(Share& share, const Bank<T>& bank, const TX* x) {
  bank.runs([&](int64_t r, int64_t lo, int64_t hi) {
    const int64_t tiles = blocks(hi - lo, TILE);
    float* u = bank.u;
    for (int64_t i = 0; i < bank.row(r)->adapters; u += bank.row(r)[i++].columns()) {
      const Use use = bank.row(r)[i];
      if (use.mode()) continue;
      const T* a = bank.a(use);
      share.piece(blocks(use.rb, ROWS) * tiles, K, [&](int64_t piece) {
        const int64_t t1 = lo + piece % tiles * TILE, t2 = min(hi, t1 + TILE), block = piece / tiles;
        if (use.rb > use.ra && block == use.ra / ROWS)
          for (int64_t t = t1; t < t2; ++t)
            for (int64_t k = use.ra; k < use.rb; ++k) u[bank.order[t] * bank.room + k] = k == use.ra ? use.weight : 0;
        if (block < blocks(use.ra, ROWS))
          for_rows<false>(use.ra, block, [&](auto rows, int64_t row) {
            for_tokens(t1, t2, [&](auto width, int64_t t0) {
              constexpr int R = decltype(rows)::value, W = decltype(width)::value;
              const TX* xs[W];
              for (int t = 0; t < W; ++t) xs[t] = x + bank.order[t0 + t] * K;
              F acc[R][W];
              clear(acc);
              if constexpr (W == 1) stream<K>(acc, a + row * K, xs[0], K, t0 == lo);
              else dot_at<K, TX>(acc, a + row * K, [&](int t) __attribute__((always_inline)) { return xs[t]; });
              for (int t = 0; t < W; ++t)
                for (int n = 0; n < R; ++n) u[bank.order[t0 + t] * bank.room + row + n] = use.scale * sum(acc[n][t]);
            });
          });
      });
    }
  });
}

// One vector of fp32: most ranks are no more.
inline F load_one(const float* p) { return F::loadu(p); }
inline F load_one(const float* p, int count) { return F::loadu(p, count); }

template <class T>
inline F load_one(const T* p, int count) { return load_pair(p, count).lo; }

template <class T>
inline F load_one(const T* p) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return widened(p);
#else
  return load_pair(p, V).lo;
#endif
}

// acc[r][t] += sum over k < n of b[r, k] * u[t, k], for W tokens from column t on
template <int W, int R, int TOKENS_, class T, class TU>
[[gnu::always_inline]] inline void dot_some(
    F (&acc)[R][TOKENS_], int at, const T* b, int64_t n, const TU* u, int64_t ldu) {
  const auto step = [&](int64_t k, auto... count) __attribute__((always_inline)) {
    F us[W];
    for (int t = 0; t < W; ++t) us[t] = load_one(u + t * ldu + k, count...);
    for (int r = 0; r < R; ++r) {
      const F bs = load_one(b + r * n + k, count...);
      for (int t = 0; t < W; ++t) acc[r][at + t] = fmadd(bs, us[t], acc[r][at + t]);
    }
  };
  int64_t k = 0;
  for (; k + V <= n; k += V) step(k);
  if (k < n) step(k, int(n - k));
}

// Dots that scale what is there, which must be W x.
template <class T>
inline auto rescaled(const Bank<T>& bank) {
  return [&bank](auto& acc, int64_t row, int64_t t0) __attribute__((always_inline)) {
    if (!bank.dora) return;
    constexpr int R = std::extent_v<std::remove_reference_t<decltype(acc)>>;
    constexpr int W = std::extent_v<std::remove_reference_t<decltype(acc)>, 1>;
    float scales[R];
    for (int t = 0; t < W; ++t) {
      if (t == 0 || bank.key[t0 + t] != bank.key[t0 + t - 1]) bank.scale(bank.key[t0 + t], row, R, scales);
      for (int r = 0; r < R; ++r) acc[r][t] = acc[r][t] * F(scales[r]);
    }
  };
}

// A line that scales what the line `product` adds, which must be W x.
template <class T, class Line>
inline auto rescaled(const Bank<T>& bank, Line product) {
  return [&bank, product](auto& v, int64_t row, int64_t t) {
    if (!bank.dora) return product(v, row, t);
    std::remove_reference_t<decltype(v)> own{};
    product(own, row, t);
    constexpr int R = sizeof own / sizeof(float);
    float scales[R];
    bank.scale(bank.key[t], row, R, scales);
    own *= load_as(own, scales);
    v += own;
  };
}

// Dots: B u of each token's adapters.
template <class T>
inline auto banked(const Bank<T>& bank) {
  return [&bank](auto& acc, int64_t row, int64_t t0) __attribute__((always_inline)) {
    if (!bank.room) return;
    constexpr int W = std::extent_v<std::remove_reference_t<decltype(acc)>, 1>;
    bank.template together<W>(t0, [&](auto count, int t) __attribute__((always_inline)) {
      const float* u = bank.u + (t0 + t) * bank.room;
      const Use* use = bank.row(bank.key[t0 + t]);
      for (int64_t left = use->adapters; left > 0; --left, u += use++->columns())
        if (!use->mode())
          dot_some<decltype(count)::value>(acc, t, bank.b(*use) + row * use->rb, use->rb, u, bank.room);
    });
  };
}

// Dots: B u of the only adapter, if there is one. To be called where `bank.lone()`: no list of adapters is read for each
// block of rows.
template <class T>
inline auto only_adapter(const Bank<T>& bank) {
  const Use* use = bank.row(0);
  const int64_t rank = use->adapters ? use->rb : 0, room = bank.room;
  return [b = bank.b(*use), u = bank.u, rank, room](auto& acc, int64_t row, int64_t t0) __attribute__((always_inline)) {
    dot_some<std::extent_v<std::remove_reference_t<decltype(acc)>, 1>>(acc, 0, b + row * rank, rank, u + t0 * room, room);
  };
}

// A term of `add` on W x: its scale and B u, for 2V columns from n0 on, unless ΔW is in W. The block of B's rows is
// transposed once for tokens one after the other that share their adapters.
template <class T>
struct Joined {
  const Bank<T>& bank;
  int64_t n0, columns;
  bool none;
  Buffer memory{};
  float* turned = nullptr;  // [room + 1, 2V], the scale of W x behind B's columns
  mutable int64_t key = -1, rank = 0;

  Joined(const Bank<T>& bank, int64_t n0, int64_t n, bool folded = false)
      : bank(bank), n0(n0), columns(min<int64_t>(2 * V, n - n0)), none(folded || !bank.room) {
    if (none) return;
    turned = memory.of((bank.room + 1) * 2 * V);
    std::memset(turned, 0, (bank.room + 1) * 2 * V * sizeof(float));
  }

  void turn(int64_t row) const {
    key = row, rank = 0;
    for (int64_t i = 0; i < bank.row(row)->adapters; ++i) {
      const Use use = bank.row(row)[i];
      if (use.mode()) continue;
      const T* b = bank.b(use) + n0 * use.rb;
      for (int64_t k = 0; k < use.rb; ++k, ++rank)
        for (int64_t c = 0; c < columns; ++c) turned[rank * 2 * V + c] = float(b[c * use.rb + k]);
    }
    if (bank.dora) bank.scale(row, n0, columns, turned + bank.room * 2 * V);
  }

  template <int W>
  [[gnu::always_inline]] void operator()(Pair (&acc)[W], int64_t t0) const {
    if (none) return;
    bank.template together<W>(t0, [&](auto count, int t) __attribute__((always_inline)) {
      if (bank.key[t0 + t] != key) turn(bank.key[t0 + t]);
      if (bank.dora)
        for (int s = 0; s < decltype(count)::value; ++s) acc[t + s] *= load_pair(turned + bank.room * 2 * V);
      for (int64_t k = 0; k < rank; ++k) {
        const Pair b = load_pair(turned + k * 2 * V);
        for (int s = 0; s < decltype(count)::value; ++s) {
          const F us(bank.u[(t0 + t + s) * bank.room + k]);
          acc[t + s] = {fmadd(b.lo, us, acc[t + s].lo), fmadd(b.hi, us, acc[t + s].hi)};
        }
      }
    });
  }
};

// ---- modes ----------------------------------------------------------------------------------------------------

// Some rows of G times slices [s0, s1) of a token: what tokens are to a weight, slices are to G.
template <int R, class T, class TX>
inline void slices_of(const Mode& mode, const T* g, int64_t row, const TX* x, float* z, int64_t s0, int64_t s1) {
  for_tokens(s0, s1, [&](auto width, int64_t s) {
    constexpr int W = decltype(width)::value;
    F acc[R][W];
    clear(acc);
    dot_some<W>(acc, 0, g + row * mode.cols, mode.cols, x + s * mode.cols, mode.cols);
    for (int i = 0; i < W; ++i)
      for (int r = 0; r < R; ++r) z[(s + i) * mode.rows + row + r] = mode.scale * sum(acc[r][i]);
  });
}

// The same for a slice x [cols, after], from `a0` to `a1` of its width.
template <int R, class T, class TX>
inline void along(const Mode& mode, const T* g, int64_t row, const TX* x, float* z, int64_t a0, int64_t a1) {
  const auto some = [&](int64_t a, auto... count) {
    Pair acc[R];
    for (auto& v : acc) v = {F(0), F(0)};
    for (int64_t i = 0; i < mode.cols; ++i) {
      const Pair v = load_pair(x + i * mode.after + a, count...);
      for (int r = 0; r < R; ++r) {
        const F w(mode.scale * float(g[(row + r) * mode.cols + i]));
        acc[r] = {fmadd(w, v.lo, acc[r].lo), fmadd(w, v.hi, acc[r].hi)};
      }
    }
    for (int r = 0; r < R; ++r) store_pair(z + (row + r) * mode.after + a, acc[r], count...);
  };
  for (; a0 + 2 * V <= a1; a0 += 2 * V) some(a0);
  if (a0 < a1) some(a0, int(a1 - a0));
}

// A thread's share of the modes that come as the `wanted`-th of their chains. The first read x, the others z.
template <int64_t K, class T, class TX>
[[gnu::noinline]] void chain(Share& share, const Bank<T>& bank, const TX* x, int64_t wanted) {
  if (wanted >= bank.stages) return;
  bank.runs([&](int64_t r, int64_t lo, int64_t hi) {
    bank.chains(r, [&](const Mode& mode, int64_t stage, int64_t at) {
      if (stage != wanted) return;
      const T* g = bank.pool + mode.g * UNIT;
      const int64_t stretch = mode.stretch(), stretches = mode.stretches(), count = blocks(mode.rows, ROWS);
      const auto token = [&](const auto* from, float* z, int64_t block, int64_t own) {
        for_rows<false>(mode.rows, block, [&](auto rows, int64_t row) {
          constexpr int R = decltype(rows)::value;
          if (mode.after == 1) {
            const int64_t s = own * stretch;
            slices_of<R>(mode, g, row, from, z, s, min(mode.before, s + stretch));
          } else {
            const int64_t each = stretches / mode.before, slice = own / each, a = own % each * stretch;
            from += slice * mode.cols * mode.after, z += slice * mode.rows * mode.after;
            along<R>(mode, g, row, from, z, a, min(mode.after, a + stretch));
          }
        });
      };
      share.piece(mode.pieces() * blocks(hi - lo, TILE), mode.cost(), [&](int64_t piece) {
        const int64_t block = piece % count, own = piece / count % stretches, t0 = lo + piece / mode.pieces() * TILE;
        for (int64_t t = t0; t < min(hi, t0 + TILE); ++t) {
          float* line = bank.z + bank.order[t] * bank.span;
          if (stage) token(line + at - mode.inputs(), line + at, block, own);
          else token(x + bank.order[t] * K, line + at, block, own);
        }
      });
    });
  });
}

// A line: what the last modes of each token's chains make.
template <class T>
inline auto chained(const Bank<T>& bank) {
  return [&bank](auto& v, int64_t row, int64_t t, auto... count) {
    if (!bank.stages) return;
    bank.chains(bank.key[t], [&](const Mode& mode, int64_t, int64_t at) {
      if (mode.last) v += load_as(v, bank.z + t * bank.span + at + row, count...);
    });
  };
}
