// Mode products: (I_B ⊗ G ⊗ I_A) x, x[t, (b, i, a)] → z[t, (b, o, a)], G [O, I]; `cpp.py` puts them behind `prelude.cpp`.

constexpr int64_t NARROW = 2 * V;  // an A below this is no vector: its slices are turned, x[t, (b, a, i)], and dotted

template <int64_t A>
constexpr bool turns = A > 1 && A < NARROW;

// x[t, (b, i, a)] as [t, (b, a, i)] for tokens [lo, hi), as this thread alone will read it.
template <int64_t B, int64_t I, int64_t A, class TX>
inline void turn(Buffer& turned, const TX* x, int64_t ldx, int64_t lo, int64_t hi) {
  float* to = turned.of((hi - lo) * B * I * A);
  for (int64_t t = lo; t < hi; ++t)
    for (int64_t b = 0; b < B; ++b)
      for (int64_t a = 0; a < A; ++a)
        for (int64_t i = 0; i < I; ++i) *to++ = float(x[t * ldx + (b * I + i) * A + a]);
}

// Rows of one block of G, for all slices of tokens [lo, hi). The slices of a token are to G what tokens are to a weight:
// tiles of them share each load of its rows. Where A turns, x is what `turn` made of these tokens.
template <int64_t B, int64_t O, int64_t I, int64_t A, class TG, class TX>
inline void mode(
    float* z, const TG* g, const TX* x, int64_t ldz, int64_t ldx, int64_t block, int64_t lo, int64_t hi, float scale) {
  for_rows<even(O)>(O, block, [&](auto rows, int64_t row) {
    constexpr int R = decltype(rows)::value;
    for (int64_t t = lo; t < hi; ++t) {
      if constexpr (A == 1 || turns<A>) {
        const TX* from = turns<A> ? x + (t - lo) * B * I * A : x + t * ldx;
        for_tokens(0, B * A, [&](auto width, int64_t s0) {
          constexpr int T = decltype(width)::value;
          F acc[R][T];
          clear(acc);
          dot<I>(acc, g + row * I, from + s0 * I, I);
          for (int s = 0; s < T; ++s)
            for (int r = 0; r < R; ++r)
              z[t * ldz + ((s0 + s) / A * O + row + r) * A + (s0 + s) % A] = scale * sum(acc[r][s]);
        });
      } else {
        for (int64_t b = 0; b < B; ++b) {
          const auto along = [&](int64_t a, auto load, auto store) {
            Pair acc[R];
            for (auto& v : acc) v = {F(0), F(0)};
            for (int i = 0; i < I; ++i) {
              const Pair v = load(x + t * ldx + (b * I + i) * A + a);
              for (int r = 0; r < R; ++r) {
                const F w(scale * float(g[(row + r) * I + i]));
                acc[r] = {fmadd(w, v.lo, acc[r].lo), fmadd(w, v.hi, acc[r].hi)};
              }
            }
            for (int r = 0; r < R; ++r) store(z + t * ldz + (b * O + row + r) * A + a, acc[r]);
          };
          for (int64_t a = 0; a + NARROW <= A; a += NARROW)
            along(a, [](const TX* p) { return load_pair(p); }, [](float* p, const Pair& v) { store_pair(p, v); });
          if constexpr (A % NARROW != 0) {
            constexpr int rest = A % NARROW;
            along(
                A - rest, [](const TX* p) { return load_pair(p, rest); },
                [](float* p, const Pair& v) { store_pair(p, v, rest); });
          }
        }
      }
    }
  });
}

// A thread's share of a mode product from lines of LDX numbers into lines of LDZ: by blocks of G's rows times tiles of
// tokens.
template <int64_t B, int64_t O, int64_t I, int64_t A, int64_t LDZ, int64_t LDX, class TG, class TX>
[[gnu::noinline]] void mode_product(Share& share, int64_t m, float* z, const TG* g, const TX* x, float scale) {
  constexpr int64_t COUNT = blocks(O, ROWS);
  int64_t tile = -1;
  share.piece(COUNT * blocks(m, TILE), B * I * A, [&](int64_t piece) {
    const int64_t block = piece % COUNT, own = piece / COUNT, lo = own * TILE, hi = min(m, lo + TILE);
    if constexpr (turns<A>) {
      static thread_local Buffer turned;
      if (tile != own) turn<B, I, A>(turned, x, LDX, lo, hi);
      tile = own;
      mode<B, O, I, A>(z, g, turned.of(0), LDZ, 0, block, lo, hi, scale);
    } else {
      mode<B, O, I, A>(z, g, x, LDZ, LDX, block, lo, hi, scale);
    }
  });
}

constexpr int64_t CHUNK = 64;  // features of a piece of work that only scales

// The same for z = scale * diag(v) x of n features, v along the middle axis, or z = scale * x where v is null.
template <int64_t I, int64_t A, int64_t LDZ, int64_t LDX, class TG, class TX>
[[gnu::noinline]] void diagonal(Share& share, int64_t m, int64_t n, float* z, const TG* v, const TX* x, float scale) {
  const int64_t count = blocks(n, CHUNK);
  share.piece(count * blocks(m, TILE), CHUNK, [&](int64_t piece) {
    const int64_t first = piece % count * CHUNK, lo = piece / count * TILE;
    for (int64_t t = lo; t < min(m, lo + TILE); ++t)
      for (int64_t k = first; k < min(n, first + CHUNK); ++k)
        z[t * LDZ + k] = scale * float(x[t * LDX + k]) * (v ? float(v[k / A % I]) : 1.0f);
  });
}

// acc[r][t] += row (row + r) of I ⊗ G times x[t], which lies in slices of I; the rows may cross into the next slice
template <int64_t O, int64_t I, int R, int T, class TG, class TX>
inline void slice_dot(F (&acc)[R][T], const TG* g, int64_t row, const TX* x, int64_t ldx) {
  if (R == 1 || O % R == 0 || row % O + R <= O) {
    dot<I>(acc, g + row % O * I, x + row / O * I, ldx);
  } else {
    for (int r = 0; r < R; ++r) {
      F one[1][T];
      for (int t = 0; t < T; ++t) one[0][t] = acc[r][t];
      dot<I>(one, g + (row + r) % O * I, x + (row + r) / O * I, ldx);
      for (int t = 0; t < T; ++t) acc[r][t] = one[0][t];
    }
  }
}
