// What `stream` reads joins a checksum, row by row: `checksum.cpp` stands before the prelude, this behind it.

// The rows of a weight from `first` on, each of them a unit.
struct Rows {
  Checksum& sum;
  int64_t first;

  Checksum::Unit row(int r) const { return Checksum::Unit(uint64_t(first + r)); }
  void add(const Checksum::Unit& unit) const { sum.add(unit); }
  template <int R, int N, class T>
  void rows(const T* w) const {
    for (int r = 0; r < R; ++r) sum.add(w + r * N, N * sizeof(T), uint64_t(first + r));
  }
};
