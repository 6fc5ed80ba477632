// A checksum of a tensor's bytes that any threads may take, each of any units of it, in any order: every unit is hashed
// by itself, with its number, and what the units give is summed. `gemv` takes it of weights as it reads them, the op of
// everything else (`runtime/dispatch.cpp`); both say the same of the same bytes.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

struct Checksum {
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef uint64_t Longs __attribute__((vector_size(64)));

  static constexpr int64_t ROWS = 4;      // of a matrix, make a unit; of the last one, those that are left
  static constexpr size_t NEAR = 4 << 10;  // bytes behind the next unit that are asked for: memory must not idle meanwhile

  Longs sum = {};

  // One to one in `state` and in `words`, so that a unit in which one word differs never gives the same. Halves of a
  // long are turned into each other: sums of products alone would not see that two sign bits flip.
  static Words step(Words state, const Words& words) {
    const Longs longs = (Longs)state;
    return (Words)(longs << 29 | longs >> 35) * ODD + words;
  }

  __attribute__((noinline)) void unit(const void* data, size_t bytes, uint64_t number) {
    const char* from = static_cast<const char*>(data);
    const Words lanes = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    Words chains[CHAINS], words;
    for (uint32_t c = 0; c < CHAINS; ++c) chains[c] = (lanes + (c << 8)) * (ODD + 2 * uint32_t(number));
    size_t at = 0;
    for (; at + sizeof chains <= bytes; at += sizeof chains)
      for (size_t c = 0; c < CHAINS; ++c) {
        __builtin_prefetch(from + at + c * sizeof words + bytes + NEAR, 0, 2);
        std::memcpy(&words, from + at + c * sizeof words, sizeof words);
        chains[c] = step(chains[c], words);
      }
    for (size_t c = 0; at < bytes; ++c, at += sizeof words) {
      words = Words{};
      std::memcpy(&words, from + at, bytes - at < sizeof words ? bytes - at : sizeof words);
      chains[c] = step(chains[c], words);
    }
    Words all = chains[0];
    for (size_t c = 1; c < CHAINS; ++c) all = step(all, chains[c]);
    for (int mixed = 0; mixed < 3; ++mixed) all = step(all, lanes);
    sum += (Longs)all;
  }

  // The unit `number` of a matrix of N rows of K numbers.
  template <int64_t N, int64_t K, class T>
  void rows(const T* matrix, int64_t number) {
    const int64_t first = number * ROWS, count = first + ROWS <= N ? ROWS : N - first;
    unit(matrix + first * K, size_t(count * K) * sizeof(T), uint64_t(number));
  }

  // As a number that adds up too.
  uint64_t folded() const {
    uint64_t all = 0;
    for (size_t i = 0; i < sizeof sum / sizeof all; ++i) all += sum[i] * (0x9E3779B97F4A7C15ull + 2 * i);
    return all;
  }

 private:
  static constexpr size_t CHAINS = 4;  // one multiplication waits for the one before
  static constexpr uint32_t ODD = 0x9E3779B1u;
};

}  // namespace
