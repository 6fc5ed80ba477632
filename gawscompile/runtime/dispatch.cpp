// The one C++ op of gawscompile:  gaws::project(Tensor x, Tensor[] operands, str program) -> Tensor[]
//
// It finds the kernels of `program` (asking Python to build them the first time), checks every operand against the
// spec (a parameter may have been replaced since compilation), allocates the outputs and runs the plan that the
// program names for this number of tokens. Operands that are hoisted are compared with their sources in every call.
// Only torch's stable ABI is used, and c10 for what that cannot say: which tensor it is, and its version.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <ATen/core/TensorBase.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

using torch::stable::Tensor;

#define CHECK_OK(call) STD_TORCH_CHECK((call) == 0, "gaws::project: failed: " #call)

namespace {

using Kernel = void (*)(int64_t m, const void* x, const void* const* in, void* const* out);

struct Operand {
  int32_t dtype;
  std::vector<int64_t> shape;  // -1: the number of tokens, over any leading dimensions
  std::string name;
};

struct Projection {
  int64_t n;
  int32_t dtype;
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
  mutable std::map<std::vector<const void*>, Value> values;  // by the sources' identities
};

struct Program {
  Kernel gemv, accumulate;  // accumulate: null where nothing is to be added to W x
  int64_t gemv_max;         // the most tokens that gemv runs; beyond, the library multiplies
  int64_t k;
  int32_t x_dtype;
  std::vector<Operand> operands;
  std::vector<Projection> projections;
  bool swiglu;  // two projections, one output: silu(first) * second
  std::vector<Derived> derived;  // by rising operand
  size_t arguments;              // how many the op takes: the other operands, then sources that are none of them
};

std::shared_mutex mutex;
std::unordered_map<std::string, std::unique_ptr<Program>> programs;
const char* (*resolver)(const char* program) = nullptr;  // Python: builds and registers; null or an error message

const Program& find(const std::string& text) {
  for (int attempt = 0;; ++attempt) {
    {
      std::shared_lock lock(mutex);
      const auto it = programs.find(text);
      if (it != programs.end()) return *it->second;
    }
    STD_TORCH_CHECK(resolver && attempt == 0, "gaws::project: no kernel was registered for: ", text);
    const char* error = resolver(text.c_str());
    STD_TORCH_CHECK(error == nullptr, "gaws::project: ", error ? error : "");
  }
}

int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  CHECK_OK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

bool fits(const Tensor& t, const Operand& o, int64_t m) {
  if (dtype_of(t) != o.dtype || !t.is_cpu()) return false;
  if (!o.shape.empty() && o.shape[0] == -1) return t.dim() > 0 && t.size(-1) == o.shape[1] && t.numel() == m * o.shape[1];
  if (t.dim() != int64_t(o.shape.size())) return false;
  for (size_t d = 0; d < o.shape.size(); ++d)
    if (t.size(d) != o.shape[d]) return false;
  return true;
}

c10::TensorImpl* impl_of(const Tensor& t) {
  // A handle of the stable ABI is a pointer to an at::Tensor, which is a TensorBase and no more.
  return reinterpret_cast<const at::TensorBase*>(t.get())->unsafeGetTensorImpl();
}

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
std::vector<State> states_of(const std::vector<Derived>& derived, const std::vector<Tensor>& arguments) {
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
      c10::TensorImpl* impl = impl_of(t);
      const bool contiguous = t.is_contiguous();
      if (!contiguous) plain.push_back(torch::stable::contiguous(t));
      const char* data = static_cast<const char*>((contiguous ? t : plain.back()).data_ptr());
      const size_t bytes = size_t(t.numel()) * impl->dtype().itemsize(), at = states.size();
      uint64_t seed = uint64_t(dtype_of(t));
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
      states.push_back({t.data_ptr(), impl->is_inference() ? 0 : impl->version_counter().current_version(), seed});
    }
#pragma omp parallel for if (pieces.size() > 2)
  for (size_t i = 0; i < pieces.size(); ++i) pieces[i].hash = hash(pieces[i].data, pieces[i].bytes, pieces[i].hash);
  for (const Piece& piece : pieces) {
    uint64_t& numbers = states[piece.of].numbers;
    numbers = (numbers ^ piece.hash) * 0x9E3779B97F4A7C15ull;
  }
  return states;
}

// The operand that is derived from `arguments`, computed anew where any of its sources is no longer what it was.
Tensor derive(const Derived& d, const std::vector<Tensor>& arguments, std::vector<State> states) {
  std::vector<const void*> key;
  for (int64_t source : d.sources) key.push_back(impl_of(arguments[source]));
  {
    std::shared_lock lock(mutex);
    const auto it = d.values.find(key);
    if (it != d.values.end() && it->second.states == states) return it->second.tensor;
  }
  std::vector<Tensor> sources;
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> alive;
  for (int64_t source : d.sources) {
    sources.push_back(arguments[source]);
    alive.emplace_back(reinterpret_cast<const at::TensorBase*>(arguments[source].get())->getIntrusivePtr());
  }
  std::array<StableIValue, 2> stack{torch::stable::detail::from(sources), torch::stable::detail::from(d.recipe)};
  CHECK_OK(aoti_torch_call_dispatcher("gaws::derive", "", stack.data()));
  Tensor tensor = torch::stable::detail::to<Tensor>(stack[0]);
  std::unique_lock lock(mutex);
  for (auto it = d.values.begin(); it != d.values.end();) {
    const auto& all = it->second.alive;
    const bool gone = std::any_of(all.begin(), all.end(), [](const auto& one) { return one.expired(); });
    it = gone ? d.values.erase(it) : std::next(it);
  }
  d.values.insert_or_assign(std::move(key), Derived::Value{std::move(states), std::move(alive), tensor});
  return tensor;
}

// What the kernels take: `arguments`, with what is derived from them where it belongs.
std::vector<Tensor> with_derived(const Program& program, std::vector<Tensor> arguments) {
  if (program.derived.empty()) return arguments;
  const std::vector<State> states = states_of(program.derived, arguments);
  std::vector<Tensor> operands;
  size_t given = 0, at = 0;
  auto mine = states.begin();
  for (const Derived& d : program.derived) {
    while (int64_t(at) < d.operand) operands.push_back(arguments[given++]), ++at;
    operands.push_back(derive(d, arguments, {mine, mine + d.sources.size()})), ++at;
    mine += d.sources.size();
  }
  while (at++ < program.operands.size()) operands.push_back(arguments[given++]);
  return operands;
}

// A view of dense memory, for the library's matmul; the caller keeps the memory alive.
Tensor view(void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int32_t dtype) {
  const int64_t sizes[2] = {rows, cols}, strides[2] = {row_stride, col_stride};
  AtenTensorHandle handle;
  CHECK_OK(aoti_torch_create_tensor_from_blob(
      data, 2, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// New memory, laid out plainly.
Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d];
  }
  AtenTensorHandle handle;
  CHECK_OK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::vector<Tensor> project(Tensor x, std::vector<Tensor> arguments, std::string text) {
  const Program& program = find(text);
  STD_TORCH_CHECK(
      x.dim() > 0 && x.size(-1) == program.k && dtype_of(x) == program.x_dtype,
      "gaws::project: x does not fit the compiled kernel (wanted ", program.k, " features): ", text);
  STD_TORCH_CHECK(
      arguments.size() == program.arguments,
      "gaws::project: ", arguments.size(), " operands, the kernel takes ", program.arguments, ": ", text);
  std::vector<Tensor> operands = with_derived(program, std::move(arguments));
  const int64_t m = program.k ? x.numel() / program.k : 0;
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  std::vector<const void*> in(operands.size());
  for (size_t i = 0; i < operands.size(); ++i) {
    STD_TORCH_CHECK(
        fits(operands[i], program.operands[i], m), "gaws::project: operand ", program.operands[i].name,
        " no longer has the dtype, shape or device it was compiled for; call torch.compile again after such a change: ",
        text);
    if (!operands[i].is_contiguous()) operands[i] = torch::stable::contiguous(operands[i]);
    in[i] = operands[i].data_ptr();
  }
  std::vector<Tensor> outputs;
  outputs.reserve(program.projections.size());
  std::vector<void*> out;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  for (const Projection& p : program.projections) {
    if (program.swiglu && !outputs.empty()) break;
    sizes.back() = p.n;
    outputs.push_back(empty(sizes, p.dtype));
    out.push_back(outputs.back().data_ptr());
  }
  if (m == 0) return outputs;
  if (m <= program.gemv_max) {
    program.gemv(m, x.data_ptr(), in.data(), out.data());
    return outputs;
  }
  std::vector<Tensor> products;  // gate and up, before accumulate makes one output of them
  if (program.swiglu) {
    for (const Projection& p : program.projections) {
      products.push_back(empty({m, p.n}, p.dtype));
      out.insert(out.end() - 1, products.back().data_ptr());
    }
  }
  Tensor rows = view(x.data_ptr(), m, program.k, program.k, 1, program.x_dtype);
  for (size_t i = 0; i < program.projections.size(); ++i) {
    const Projection& p = program.projections[i];
    if (p.weight < 0) continue;
    Tensor y = view(out[i], m, p.n, p.n, 1, p.dtype);
    const int64_t row = p.transposed ? p.n : 1, column = p.transposed ? 1 : program.k;
    Tensor w = view(const_cast<void*>(in[p.weight]), program.k, p.n, row, column, p.dtype);
    CHECK_OK(aoti_torch_cpu_mm_out(y.get(), rows.get(), w.get()));
  }
  if (program.accumulate) program.accumulate(m, x.data_ptr(), in.data(), out.data());
  return outputs;
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
  program->x_dtype = x_dtype;
  program->swiglu = swiglu;
  for (int64_t i = 0, at = 0; i < n_operands; at += ranks[i++])
    program->operands.push_back({dtypes[i], {shapes + at, shapes + at + ranks[i]}, names[i]});
  for (int64_t i = 0; i < n_projections; ++i)
    program->projections.push_back({widths[i], out_dtypes[i], weights[i], transposed[i]});
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
  std::unique_lock lock(mutex);
  for (auto& [text, program] : programs)
    for (const Derived& d : program->derived)
      for (auto it = d.values.begin(); it != d.values.end();) {
        const auto& states = it->second.states;
        const bool meant = count < 0 || std::any_of(states.begin(), states.end(), [&](const State& s) {
          return std::find(data, data + count, s.data) != data + count;
        });
        it = meant ? d.values.erase(it) : std::next(it);
      }
}

STABLE_TORCH_LIBRARY_IMPL(gaws, CPU, m) { m.impl("project", TORCH_BOX(&project)); }
