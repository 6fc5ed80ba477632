// What `stream` and `columns` read joins a checksum: `checksum.cpp` stands before the prelude, this behind it.

// Of rows, or of columns of a weight kept as [k, n], from `first` on.
struct Seen {
  Checksum& sum;
  int64_t first = 0;
  static_assert(2 * V % Checksum::COLUMNS == 0);

  Seen from(int64_t at) const { return {sum, at}; }
  Checksum::Unit row(int r) const { return Checksum::Unit(uint64_t(first + r)); }
  void add(const Checksum::Unit& unit) const { sum.add(unit); }
  template <int R, int N, class T>
  void rows(const T* w) const {
    for (int r = 0; r < R; ++r) sum.add(w + r * N, N * sizeof(T), uint64_t(first + r));
  }
  template <class T>
  void panel(const T* w, int64_t n, int64_t count, int64_t row, int64_t end) const {
    sum.columns(w - first, n, sizeof(T), row, end, first, first + count);
  }
};

// Blocks of rows of K numbers.
template <int64_t K, class T>
inline auto hash(Checksum& sum, const T* matrix) {
  return [&sum, matrix](int64_t n, int64_t block) { sum.rows<K, ROWS>(matrix, n, block); };
}
