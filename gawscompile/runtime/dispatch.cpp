// The one C++ op of gawscompile:  gaws::project(Tensor x, Tensor[] operands, str program) -> Tensor[]
//
// It finds the kernels of `program` (asking Python to build them the first time), checks every operand against the
// spec (a parameter may have been replaced since compilation), allocates the outputs and runs the plan that the
// program names for this number of tokens. Operands that are hoisted are compared with their sources in every call.
// The op is boxed: it reads its operands and its text where the dispatcher has put them.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

using at::ScalarType;
using at::Tensor;

namespace {

using Kernel = void (*)(int64_t m, const void* x, const void* const* in, void* const* out);

struct Operand {
  ScalarType dtype;
  std::vector<int64_t> shape;  // -1: the number of tokens, over any leading dimensions
  std::string name;
};

struct Projection {
  int64_t n;
  ScalarType dtype;
  int64_t weight;  // index of its weight among the operands, or -1: its base's product is its residual
  bool transposed;  // the weight is [k, n]
};

// A tensor as it was when something was derived from it.
struct State {
  const void* data;
  uint64_t version, numbers;  // numbers: of all of them, or of a sample of a large tensor's

  bool operator==(const State& o) const { return data == o.data && version == o.version && numbers == o.numbers; }
};

struct Derived {
  int64_t operand;
  std::string recipe;
  std::vector<int64_t> sources;
  std::vector<char> large;

  struct Value {
    std::vector<State> states;
    std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> alive;  // and no address that is a key is used again
    Tensor tensor;
  };
  using Values = std::map<std::vector<const void*>, Value>;
  mutable Values values;  // by the sources' identities
};

struct Program {
  Kernel gemv, accumulate;  // accumulate: null where nothing is to be added to W x
  int64_t gemv_max;         // the most tokens that gemv runs; beyond, the library multiplies
  int64_t k;
  ScalarType x_dtype;
  std::vector<Operand> operands;
  std::vector<Projection> projections;
  bool swiglu;  // two projections, one output: silu(first) * second
  std::vector<Derived> derived;  // by rising operand
  size_t arguments;              // how many the op takes: the other operands, then sources that are none of them
};

// Of the tables below. Nobody waits for Python who holds it, so tensors are let go after: a thread with Python's lock may
// wait for it, as one that forks does. A child gets a new one, as it knows its writer by a number that forks change.
std::shared_mutex mutex;
const int at_fork = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { new (&mutex) std::shared_mutex; });
std::unordered_map<std::string, std::unique_ptr<Program>> programs;
const char* (*resolver)(const char* program) = nullptr;  // Python: builds and registers; null or an error message

const Program& find(const std::string& text) {
  for (int attempt = 0;; ++attempt) {
    {
      std::shared_lock lock(mutex);
      const auto it = programs.find(text);
      if (it != programs.end()) return *it->second;
    }
    TORCH_CHECK(resolver && attempt == 0, "gaws::project: no kernel was registered for: ", text);
    const char* error = resolver(text.c_str());
    TORCH_CHECK(error == nullptr, "gaws::project: ", error ? error : "");
  }
}

bool fits(const Tensor& t, const Operand& o, int64_t m) {
  if (t.scalar_type() != o.dtype || !t.is_cpu()) return false;
  if (!o.shape.empty() && o.shape[0] == -1) return t.dim() > 0 && t.size(-1) == o.shape[1] && t.numel() == m * o.shape[1];
  if (t.dim() != int64_t(o.shape.size())) return false;
  for (size_t d = 0; d < o.shape.size(); ++d)
    if (t.size(d) != o.shape[d]) return false;
  return true;
}

// Tensors by address: the dispatcher's own, or those of `kept`, which stay where they are as it grows.
struct Tensors {
  std::vector<const Tensor*> all;
  std::list<Tensor> kept;

  Tensors() = default;
  Tensors(Tensors&&) = default;  // a copy would point into this one
  const Tensor& operator[](size_t i) const { return *all[i]; }
  const Tensor* keep(Tensor t) { return &kept.emplace_back(std::move(t)); }
};

constexpr size_t AHEAD = 4096;  // bytes that are asked for into the second cache: one core alone waits for memory

// Every number counts and its place does: each of the lanes is a polynomial in an odd number.
uint64_t hash(const char* data, size_t bytes, uint64_t seed) {
  typedef uint32_t Lanes __attribute__((vector_size(64)));
  constexpr size_t VECTORS = 4;
  Lanes lanes[VECTORS];
  for (size_t v = 0; v < VECTORS; ++v)
    for (size_t i = 0; i < 16; ++i) lanes[v][i] = uint32_t(seed) + uint32_t(16 * v + i);
  const size_t whole = bytes / sizeof lanes;
  for (size_t block = 0; block < whole; ++block)
    for (size_t v = 0; v < VECTORS; ++v) {
      Lanes words;
      __builtin_prefetch(data + block * sizeof lanes + v * sizeof words + AHEAD, 0, 2);
      std::memcpy(&words, data + block * sizeof lanes + v * sizeof words, sizeof words);
      lanes[v] = lanes[v] * 0x9E3779B1u + words;
    }
  uint64_t sum = seed ^ bytes;
  for (size_t i = whole * sizeof lanes; i < bytes; ++i) sum = sum * 0x100000001B3ull + uint8_t(data[i]);
  for (size_t v = 0; v < VECTORS; ++v)
    for (size_t i = 0; i < 16; ++i) sum = (sum ^ lanes[v][i]) * 0x9E3779B97F4A7C15ull;
  return sum ^ sum >> 32;
}

constexpr size_t SAMPLES = 32, LINE = 64;  // of a large tensor: so many pieces of so many bytes
constexpr size_t PIECE = 1 << 14;          // bytes that one thread hashes at a time

// The states of all sources, in the order in which `derived` names them. All threads hash: what they read, the kernel
// reads next, so that it comes from memory once.
std::vector<State> states_of(const std::vector<Derived>& derived, const Tensors& arguments) {
  struct Piece {
    const char* data;
    size_t bytes, of;
    uint64_t hash;  // before: what it starts from
  };
  std::vector<State> states;
  std::vector<Piece> pieces;
  std::vector<Tensor> plain;  // keeps copies of what is not contiguous
  for (const Derived& d : derived)
    for (size_t i = 0; i < d.sources.size(); ++i) {
      const Tensor& t = arguments[d.sources[i]];
      const bool contiguous = t.is_contiguous();
      if (!contiguous) plain.push_back(t.contiguous());
      const char* data = static_cast<const char*>((contiguous ? t : plain.back()).const_data_ptr());
      const size_t bytes = t.nbytes(), at = states.size();
      uint64_t seed = uint64_t(t.scalar_type());
      for (int64_t n = 0; n < t.dim(); ++n) seed = (seed * 31 + uint64_t(t.size(n))) * 31 + uint64_t(t.stride(n));
      if (d.large[i] && bytes > SAMPLES * LINE) {
        std::array<char, SAMPLES * LINE> sample;
        for (size_t n = 0; n < SAMPLES; ++n)
          std::memcpy(sample.data() + n * LINE, data + (bytes - LINE) / (SAMPLES - 1) * n, LINE);
        seed = hash(sample.data(), sample.size(), seed);
      } else {
        for (size_t from = 0; from < bytes; from += PIECE)
          pieces.push_back({data + from, std::min(PIECE, bytes - from), at, seed + from});
      }
      states.push_back({t.const_data_ptr(), t.is_inference() ? 0 : uint64_t(t._version()), seed});
    }
#pragma omp parallel for if (pieces.size() > 2)
  for (size_t i = 0; i < pieces.size(); ++i) pieces[i].hash = hash(pieces[i].data, pieces[i].bytes, pieces[i].hash);
  for (const Piece& piece : pieces) {
    uint64_t& numbers = states[piece.of].numbers;
    numbers = (numbers ^ piece.hash) * 0x9E3779B97F4A7C15ull;
  }
  return states;
}

// Take a value out of the table, to be let go later. What comes after it.
auto drop(const Derived& d, Derived::Values::iterator it, std::vector<Derived::Value>& let_go) {
  let_go.push_back(std::move(it->second));
  return d.values.erase(it);
}

// The operand that is derived from `arguments`, computed anew where any of its sources is no longer what it was.
Tensor derive(const Derived& d, const Tensors& arguments, std::vector<State> states) {
  std::vector<const void*> key;
  for (int64_t source : d.sources) key.push_back(arguments[source].unsafeGetTensorImpl());
  {
    std::shared_lock lock(mutex);
    const auto it = d.values.find(key);
    if (it != d.values.end() && it->second.states == states) return it->second.tensor;
  }
  c10::List<Tensor> sources;
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> alive;
  for (int64_t source : d.sources) {
    sources.push_back(arguments[source]);
    alive.emplace_back(arguments[source].getIntrusivePtr());
  }
  const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow("gaws::derive", "");
  torch::jit::Stack stack{sources, d.recipe};
  op.callBoxed(stack);
  const Tensor tensor = stack.back().toTensor();
  std::vector<Derived::Value> let_go;
  std::unique_lock lock(mutex);
  for (auto it = d.values.begin(); it != d.values.end();) {
    const auto& all = it->second.alive;
    const bool gone = std::any_of(all.begin(), all.end(), [](const auto& one) { return one.expired(); });
    it = gone ? drop(d, it, let_go) : std::next(it);
  }
  Derived::Value& place = d.values[std::move(key)];
  let_go.push_back(std::exchange(place, {std::move(states), std::move(alive), tensor}));
  return tensor;
}

// What the kernels take: `arguments`, with what is derived from them where it belongs.
Tensors with_derived(const Program& program, Tensors arguments) {
  if (program.derived.empty()) return arguments;
  const std::vector<State> states = states_of(program.derived, arguments);
  Tensors operands;
  size_t given = 0;
  auto mine = states.begin();
  for (const Derived& d : program.derived) {
    while (int64_t(operands.all.size()) < d.operand) operands.all.push_back(arguments.all[given++]);
    operands.all.push_back(operands.keep(derive(d, arguments, {mine, mine + d.sources.size()})));
    mine += d.sources.size();
  }
  while (operands.all.size() < program.operands.size()) operands.all.push_back(arguments.all[given++]);
  return operands;
}

// A view of dense memory, for the library's matmul; the caller keeps the memory alive.
Tensor view(void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, ScalarType dtype) {
  return at::from_blob(data, {rows, cols}, {row_stride, col_stride}, at::TensorOptions(dtype));
}

c10::List<Tensor> project(Tensor x, Tensors arguments, const std::string& text) {
  const Program& program = find(text);
  TORCH_CHECK(
      x.dim() > 0 && x.size(-1) == program.k && x.scalar_type() == program.x_dtype,
      "gaws::project: x does not fit the compiled kernel (wanted ", program.k, " features): ", text);
  TORCH_CHECK(
      arguments.all.size() == program.arguments,
      "gaws::project: ", arguments.all.size(), " operands, the kernel takes ", program.arguments, ": ", text);
  Tensors operands = with_derived(program, std::move(arguments));
  const int64_t m = program.k ? x.numel() / program.k : 0;
  if (!x.is_contiguous()) x = x.contiguous();
  std::vector<const void*> in(program.operands.size());
  for (size_t i = 0; i < in.size(); ++i) {
    TORCH_CHECK(
        fits(operands[i], program.operands[i], m), "gaws::project: operand ", program.operands[i].name,
        " no longer has the dtype, shape or device it was compiled for; call torch.compile again after such a change: ",
        text);
    if (!operands[i].is_contiguous()) operands.all[i] = operands.keep(operands[i].contiguous());
    in[i] = operands[i].const_data_ptr();
  }
  c10::List<Tensor> outputs;
  std::vector<void*> out;
  std::vector<int64_t> sizes = x.sizes().vec();
  for (const Projection& p : program.projections) {
    if (program.swiglu && !outputs.empty()) break;
    sizes.back() = p.n;
    Tensor y = at::detail::empty_cpu(sizes, p.dtype);
    out.push_back(y.mutable_data_ptr());
    outputs.push_back(std::move(y));
  }
  if (m == 0) return outputs;
  const void* rows = x.const_data_ptr();
  if (m <= program.gemv_max) {
    program.gemv(m, rows, in.data(), out.data());
    return outputs;
  }
  std::vector<Tensor> products;  // gate and up, before accumulate makes one output of them
  if (program.swiglu) {
    for (const Projection& p : program.projections) {
      products.push_back(at::detail::empty_cpu({m, p.n}, p.dtype));
      out.insert(out.end() - 1, products.back().mutable_data_ptr());
    }
  }
  const Tensor matrix = view(const_cast<void*>(rows), m, program.k, program.k, 1, program.x_dtype);
  for (size_t i = 0; i < program.projections.size(); ++i) {
    const Projection& p = program.projections[i];
    if (p.weight < 0) continue;
    Tensor y = view(out[i], m, p.n, p.n, 1, p.dtype);
    const int64_t row = p.transposed ? p.n : 1, column = p.transposed ? 1 : program.k;
    at::cpu::mm_out(y, matrix, view(const_cast<void*>(in[p.weight]), program.k, p.n, row, column, p.dtype));
  }
  if (program.accumulate) program.accumulate(m, rows, in.data(), out.data());
  return outputs;
}

void boxed(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const auto arguments = stack->end() - 3;
  Tensors tensors;
  for (const c10::IValue& one : arguments[1].toListRef()) tensors.all.push_back(&one.toTensor());
  c10::List<Tensor> outputs = project(arguments[0].toTensor(), std::move(tensors), arguments[2].toStringRef());
  stack->erase(arguments, stack->end());
  stack->emplace_back(std::move(outputs));
}

}  // namespace

extern "C" void gaws_set_resolver(const char* (*f)(const char*)) { resolver = f; }

extern "C" void gaws_register(
    const char* text, void* gemv, void* accumulate, int64_t gemv_max, int64_t k, int32_t x_dtype, int64_t n_operands,
    const int32_t* dtypes, const int64_t* ranks, const int64_t* shapes, const char* const* names,
    int64_t n_projections, const int64_t* widths, const int32_t* out_dtypes, const int64_t* weights,
    const bool* transposed, bool swiglu, int64_t n_derived, const int64_t* places, const char* const* recipes,
    const int64_t* counts, const int64_t* sources, const bool* large) {
  auto program = std::make_unique<Program>();
  program->gemv = Kernel(gemv);
  program->accumulate = Kernel(accumulate);
  program->gemv_max = gemv_max;
  program->k = k;
  program->x_dtype = ScalarType(x_dtype);
  program->swiglu = swiglu;
  for (int64_t i = 0, at = 0; i < n_operands; at += ranks[i++])
    program->operands.push_back({ScalarType(dtypes[i]), {shapes + at, shapes + at + ranks[i]}, names[i]});
  for (int64_t i = 0; i < n_projections; ++i)
    program->projections.push_back({widths[i], ScalarType(out_dtypes[i]), weights[i], transposed[i]});
  program->arguments = size_t(n_operands - n_derived);
  for (int64_t i = 0; i < n_derived; sources += counts[i], large += counts[i], ++i) {
    program->derived.push_back({places[i], recipes[i], {sources, sources + counts[i]}, {large, large + counts[i]}, {}});
    for (int64_t j = 0; j < counts[i]; ++j) program->arguments = std::max(program->arguments, size_t(sources[j] + 1));
  }
  std::unique_lock lock(mutex);
  programs.emplace(text, std::move(program));  // never replaced: calls in flight hold references
}

// Forget what was derived from tensors at these addresses; from all where `count` is negative.
extern "C" void gaws_forget(const void* const* data, int64_t count) {
  std::vector<Derived::Value> let_go;
  std::unique_lock lock(mutex);
  for (auto& [text, program] : programs)
    for (const Derived& d : program->derived)
      for (auto it = d.values.begin(); it != d.values.end();) {
        const auto& states = it->second.states;
        const bool meant = count < 0 || std::any_of(states.begin(), states.end(), [&](const State& s) {
          return std::find(data, data + count, s.data) != data + count;
        });
        it = meant ? drop(d, it, let_go) : std::next(it);
      }
}

static const auto registration = c10::Dispatcher::singleton().registerImpl(
    {"gaws::project", ""}, c10::DispatchKey::CPU, c10::KernelFunction::makeFromBoxedFunction<&boxed>(), std::nullopt,
    nullptr, "gawscompile/runtime/dispatch.cpp");
