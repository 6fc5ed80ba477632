// A checksum of a tensor's bytes that any threads may take, each of any units of it, in any order: every unit is hashed
// by itself, with its number, and what the units give is summed. `gemv` takes it of weights as it reads them, the op of
// everything else (`runtime/dispatch.cpp`); both say the same of the same bytes.
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AES__)
#include <immintrin.h>
#endif

namespace {

class Checksum {
 public:
  static constexpr size_t CHAINS = 2, STEP = 64;  // a step waits for the one before in its chain: lines take turns
  static constexpr int64_t DEEP = 16;             // `columns` reads panels of a multiple of so many rows
#if defined(CPU_CAPABILITY_AVX512)
  static constexpr int64_t COLUMNS = 32;  // threads share work by twice a vector of fp32
#elif defined(CPU_CAPABILITY_AVX2)
  static constexpr int64_t COLUMNS = 16;
#else
  static constexpr int64_t COLUMNS = 8;
#endif

#if defined(__VAES__) && defined(__AVX512F__)
  typedef uint32_t Words __attribute__((vector_size(64)));
#else
  typedef uint32_t Words __attribute__((vector_size(16)));
#endif
  static constexpr size_t PARTS = STEP / sizeof(Words);

  struct Line {
    Words parts[PARTS];
  };

  // A unit while it is read. One to one in what a step adds: where one word differs, so does what comes of it.
  struct Unit {
    Line chains[CHAINS];

    explicit Unit(uint64_t number) {
      for (size_t c = 0; c < CHAINS; ++c) {
        chains[c] = lanes();
        for (Words& part : chains[c].parts) part = (part + uint32_t(c << 8)) * (ODD + 2 * uint32_t(number));
      }
    }
    // The line at `place`: the first, second … of a unit; the bytes beyond `count` are zero.
    void line(size_t place, const void* data) {
      Line words;
      std::memcpy(&words, data, STEP);
      step(chains[place % CHAINS], words, ODD);
    }
    void line(size_t place, const void* data, size_t count) {
      Line words{};
      std::memcpy(&words, data, count);
      step(chains[place % CHAINS], words, ODD);
    }
  };

  void add(const Unit& unit) {
    Line all = unit.chains[0];
    mix(all);
    step(all, unit.chains[1], LAST);
    mix(all);
    step(all, lanes(), LAST);
    for (size_t p = 0; p < PARTS; ++p) sums[p] += (Longs)all.parts[p];
  }

  __attribute__((noinline)) void add(const void* data, size_t bytes, uint64_t number) {
    const char* from = static_cast<const char*>(data);
    Unit unit(number);
    size_t place = 0;
    for (; (place + CHAINS) * STEP <= bytes; place += CHAINS)
      for (size_t c = 0; c < CHAINS; ++c) {
        __builtin_prefetch(from + (place + c) * STEP + AHEAD, 0, 2);
        unit.line(c, from + (place + c) * STEP);
      }
    for (; place * STEP < bytes; ++place)
      unit.line(place, from + place * STEP, bytes - place * STEP < STEP ? bytes - place * STEP : STEP);
    add(unit);
  }

  // Rows [row, end) and columns [first, last) of a matrix of N columns that is read by columns, `data` its beginning: by
  // units of DEEP rows and COLUMNS columns, or those that are left. `row` and `first` begin one.
  __attribute__((noinline)) void columns(
      const void* data, int64_t n, size_t element, int64_t row, int64_t end, int64_t first, int64_t last) {
    const int64_t across = (n + COLUMNS - 1) / COLUMNS;
    for (; row < end; row += DEEP) {
      const int64_t deep = end - row < DEEP ? end - row : DEEP;
      for (int64_t column = first; column < last; column += COLUMNS) {
        const char* from = static_cast<const char*>(data) + (row * n + column) * element;
        const size_t bytes = (last - column < COLUMNS ? last - column : COLUMNS) * element;
        Unit unit(row / DEEP * across + column / COLUMNS);
        const auto line = [&](size_t chain, const char* data) {
          size_t at = 0;
          for (; at + STEP <= bytes; at += STEP) unit.line(chain, data + at);
          if (at < bytes) unit.line(chain, data + at, bytes - at);
        };
        int64_t r = 0;
        for (; r + 2 <= deep; r += 2)
          for (int64_t c = 0; c < 2; ++c) line(c, from + (r + c) * n * element);
        if (r < deep) line(0, from + r * n * element);
        add(unit);
      }
    }
  }

  // The unit `number`, of ROWS rows or those that are left, of a matrix of n rows of K numbers.
  template <int64_t K, int64_t ROWS, class T>
  void rows(const T* matrix, int64_t n, int64_t number) {
    const int64_t first = number * ROWS, count = first + ROWS <= n ? ROWS : n - first;
    add(matrix + first * K, size_t(count * K) * sizeof(T), uint64_t(number));
  }

  // As a number that adds up too: a polynomial whose coefficients are the lanes.
  uint64_t folded() const {
    uint64_t all = 0;
    for (const Longs& sum : sums)
      for (size_t i = 0; i < sizeof sum / sizeof all; ++i) all = all * ODD64 + sum[i];
    return all;
  }

 private:
  typedef uint64_t Longs __attribute__((vector_size(sizeof(Words))));

  static constexpr size_t AHEAD = 4 << 10;  // bytes that are asked for into the second cache
  static constexpr uint32_t ODD = 0x9E3779B1u, LAST = 0x85EBCA6Bu;  // the last steps are none of a chain's own
  static constexpr uint64_t ODD64 = 0x9E3779B97F4A7C15u;

  Longs sums[PARTS] = {};

  static Line lanes() {
    constexpr uint32_t numbers[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    Line line;
    std::memcpy(&line, numbers, sizeof line);
    return line;
  }

  // Apart by more than a few steps, so that two chains' differences do not meet as equals.
  static void mix(Line& state) {
    for (int times = 0; times < 3; ++times) step(state, lanes(), LAST);
  }

  static void step(Line& state, const Line& words, uint32_t odd) {
    for (size_t p = 0; p < PARTS; ++p) state.parts[p] = step(state.parts[p], words.parts[p], odd);
  }

#if defined(__AES__)
  // A round of AES, in which every byte of the state goes through a table and into four others: one instruction.
  static Words step(const Words& state, const Words& words, uint32_t) {
#if defined(__VAES__) && defined(__AVX512F__)
    return (Words)_mm512_aesenc_epi128((__m512i)state, (__m512i)words);
#else
    return (Words)_mm_aesenc_si128((__m128i)state, (__m128i)words);
#endif
  }
#else
  // The turn brings the highest bits of either half of a long down to the lowest, as a multiplication spreads a bit upwards
  // alone; of all turns, 37 spreads a bit most evenly. The shift makes two bits of a highest one, which no multiplication
  // spreads: it would be the sign of a number of the next line.
  static Words step(const Words& state, const Words& words, uint32_t odd) {
    const Longs longs = (Longs)state;
    const Words product = (Words)(longs << 37 | longs >> 27) * odd;
    return (product ^ product >> 15) + words;
  }
#endif
};

}  // namespace
