// y = silu(gate) * up: of kernels with SwiGLU.

inline F silu(const F& v) { return v / (F(1) + exp(v.neg())); }

// Columns of y for some tokens, from gate and up in lines of `ldh`.
template <class TY, class H>
[[gnu::noinline]] void multiply(
    int64_t tokens, int64_t count, const H* gate, const H* up, int64_t ldh, TY* y, int64_t ldy) {
  const auto product = [](const Pair& a, const Pair& b) { return Pair{silu(a.lo) * b.lo, silu(a.hi) * b.hi}; };
  for (int64_t t = 0; t < tokens; ++t, gate += ldh, up += ldh, y += ldy) {
    int64_t c = 0;
    for (; c + 2 * V <= count; c += 2 * V) store_pair(y + c, product(load_pair(gate + c), load_pair(up + c)));
    if (c < count) {
      const int rest = int(count - c);
      store_pair(y + c, product(load_pair(gate + c, rest), load_pair(up + c, rest)), rest);
    }
  }
}

// A share of the rows of gate and up: a panel of both for a tile of tokens, then their product, a line at a time (a vector
// along four rows would waste most of its lanes on exp).
template <bool EVEN, int64_t PANEL, class TY, class Dots0, class Lines0, class Dots1, class Lines1, class... Hashes>
[[gnu::noinline]] void gated(
    Share& share, int64_t cost, int64_t n, int64_t m, TY* y, Dots0 dots0, Lines0 lines0, Dots1 dots1, Lines1 lines1,
    Hashes... hashes) {
  share.range(blocks(n, ROWS), cost, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel += PANEL / ROWS) {
      const int64_t end = min<int64_t>(last, panel + PANEL / ROWS), row0 = panel * ROWS;
      for_tokens(0, m, [&](auto width, int64_t t0) {
        constexpr int T = decltype(width)::value;
        float gate[T * PANEL], up[T * PANEL];
        for (int64_t block = panel; block < end; ++block) {
          for_rows<EVEN>(n, block, [&](auto rows, int64_t row) {
            tile<decltype(rows)::value, T>(row, t0, gate - row0, PANEL, dots0, lines0);
            tile<decltype(rows)::value, T>(row, t0, up - row0, PANEL, dots1, lines1);
          });
          if (t0 == 0) (hashes(n, block), ...);
        }
        multiply(T, min(n, end * ROWS) - row0, gate, up, PANEL, y + t0 * n + row0, n);
      });
    }
  });
}
