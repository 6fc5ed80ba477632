// The one C++ op of gawscompile:  gaws::project(Tensor x, Tensor[] operands, str program) -> Tensor[]
//
// It finds the kernels of `program` (asking Python to build them the first time), checks every operand against the
// spec (a parameter may have been replaced since compilation), allocates the outputs and runs the plan that the
// program names for this number of tokens. Operands that are hoisted follow their sources: in every call a checksum is
// taken of all of these, by gemv itself of what it reads, and where one is another than when the operand was derived,
// that is done again, and gemv with it. `codegen/checksum.cpp` stands in front of this file.
// The op is boxed: it reads its operands and its text where the dispatcher has put them.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <pthread.h>

#include <algorithm>
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
using SummingKernel = void (*)(int64_t m, const void* x, const void* const* in, void* const* out, uint64_t* sums);

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

// A tensor that others are derived from.
struct Source {
  size_t argument;
  int64_t sum;   // at which gemv sums up its numbers as it reads them, or -1
  int64_t rows;  // that it hashes together
};

// A source as it was when something was derived from it.
struct State {
  const void* data;
  uint64_t version, layout, numbers;  // numbers: a checksum of all of them

  bool same_tensor(const State& o) const { return data == o.data && version == o.version && layout == o.layout; }
};

struct Derived {
  int64_t operand;
  std::string recipe;
  std::vector<size_t> sources;  // of the program's

  struct Value {
    std::vector<State> states;
    std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> alive;  // and no address that is a key is used again
    Tensor tensor;
  };
  mutable std::map<std::vector<const void*>, std::shared_ptr<const Value>> values;  // by the sources' identities
};

using Values = std::vector<std::shared_ptr<const Derived::Value>>;  // one for each of a program's `derived`

struct Program {
  void* gemv;         // a Kernel, or a SummingKernel where it has `sums`
  Kernel accumulate;  // null where nothing is to be added to W x
  int64_t gemv_max;         // the most tokens that gemv runs; beyond, the library multiplies
  int64_t k;
  ScalarType x_dtype;
  std::vector<Operand> operands;
  std::vector<Projection> projections;
  bool swiglu;  // two projections, one output: silu(first) * second
  std::vector<Derived> derived;  // by rising operand
  std::vector<Source> sources;
  size_t sums;       // how many of the sources gemv sums up
  size_t arguments;  // how many the op takes: the other operands, then sources that are none of them
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

// What is known of all sources before their numbers are read.
std::vector<State> states_of(const Program& program, const Tensors& arguments) {
  std::vector<State> states;
  for (const Source& source : program.sources) {
    const Tensor& t = arguments[source.argument];
    TORCH_CHECK(t.is_cpu(), "gaws::project: a source of a hoisted operand has left the CPU");
    uint64_t layout = uint64_t(t.scalar_type());
    for (int64_t n = 0; n < t.dim(); ++n) layout = (layout * 31 + uint64_t(t.size(n))) * 31 + uint64_t(t.stride(n));
    states.push_back({t.const_data_ptr(), t.is_inference() ? 0 : uint64_t(t._version()), layout, 0});
  }
  return states;
}

constexpr size_t PIECE = 1 << 14;  // bytes that one thread reads at a time, at least
constexpr size_t FEW = 1 << 16;    // bytes that are read before other threads are awake

// Adds the checksums of the sources that gemv sums up, or those of all others. All threads read: what they read, the
// kernel reads next, so that it comes from memory once.
void read(const Program& program, const Tensors& arguments, std::vector<State>& states, bool summed_by_gemv) {
  struct Piece {
    const char* data;
    size_t bytes, unit, number, of;  // `number`: of its first unit
    uint64_t sum;
  };
  std::vector<Piece> pieces;
  std::list<Tensor> plain;  // keeps copies of what is not contiguous
  size_t total = 0;
  for (size_t of = 0; of < states.size(); ++of) {
    const Source& source = program.sources[of];
    if ((source.sum >= 0) != summed_by_gemv) continue;
    const Tensor& t = arguments[source.argument];
    const char* data = static_cast<const char*>(
        (t.is_contiguous() ? t : plain.emplace_back(t.contiguous())).const_data_ptr());
    const size_t bytes = t.nbytes();
    const size_t unit = summed_by_gemv && bytes ? bytes / t.size(0) * source.rows : PIECE;
    const size_t units = (PIECE + unit - 1) / unit;
    for (size_t from = 0; from < bytes; from += units * unit)
      pieces.push_back({data + from, std::min(units * unit, bytes - from), unit, from / unit, of, 0});
    total += bytes;
    states[of].numbers = 0;
  }
#pragma omp parallel for if (total > FEW)
  for (size_t i = 0; i < pieces.size(); ++i) {
    Checksum sum;
    Piece& piece = pieces[i];
    for (size_t at = 0; at < piece.bytes; at += piece.unit)
      sum.add(piece.data + at, std::min(piece.unit, piece.bytes - at), piece.number + at / piece.unit);
    piece.sum = sum.folded();
  }
  for (const Piece& piece : pieces) states[piece.of].numbers += piece.sum;
}

std::vector<const void*> key_of(const Program& program, const Derived& d, const Tensors& arguments) {
  std::vector<const void*> key;
  for (size_t source : d.sources) key.push_back(arguments[program.sources[source].argument].unsafeGetTensorImpl());
  return key;
}

// What was derived from sources in these states, or null. `unread`: the numbers that gemv sums up are still unknown.
std::shared_ptr<const Derived::Value> known(
    const Program& program, const Derived& d, const Tensors& arguments, const std::vector<State>& states, bool unread) {
  std::shared_lock lock(mutex);
  const auto it = d.values.find(key_of(program, d, arguments));
  if (it == d.values.end()) return nullptr;
  for (size_t i = 0; i < d.sources.size(); ++i) {
    const State &then = it->second->states[i], &now = states[d.sources[i]];
    if (!then.same_tensor(now)) return nullptr;
    if (then.numbers != now.numbers && !(unread && program.sources[d.sources[i]].sum >= 0)) return nullptr;
  }
  return it->second;
}

// The operands that are derived from `arguments`, all of whose numbers are read first, then computed anew where any
// source is no longer what it was. What is written in between shows as a checksum that does not agree.
Values derive(const Program& program, const Tensors& arguments, std::vector<State>& states) {
  read(program, arguments, states, true);
  Values values;
  for (const Derived& d : program.derived) {
    values.push_back(known(program, d, arguments, states, false));
    if (values.back()) continue;
    c10::List<Tensor> sources;
    auto value = std::make_shared<Derived::Value>();
    for (size_t source : d.sources) {
      const Tensor& t = arguments[program.sources[source].argument];
      sources.push_back(t);
      value->states.push_back(states[source]);
      value->alive.emplace_back(t.getIntrusivePtr());
    }
    const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow("gaws::derive", "");
    torch::jit::Stack stack{sources, d.recipe};
    op.callBoxed(stack);
    value->tensor = stack.back().toTensor();
    values.back() = value;
    Values let_go;
    std::unique_lock lock(mutex);
    for (auto it = d.values.begin(); it != d.values.end();) {
      const auto& all = it->second->alive;
      const bool gone = std::any_of(all.begin(), all.end(), [](const auto& one) { return one.expired(); });
      if (gone) let_go.push_back(std::move(it->second));
      it = gone ? d.values.erase(it) : std::next(it);
    }
    let_go.push_back(std::exchange(d.values[key_of(program, d, arguments)], std::move(value)));
  }
  return values;
}

// The same, where gemv will sum up what it reads: as long as nothing else speaks against it, what was derived before.
Values expected(const Program& program, const Tensors& arguments, std::vector<State>& states) {
  Values values;
  for (const Derived& d : program.derived) {
    values.push_back(known(program, d, arguments, states, true));
    if (!values.back()) return derive(program, arguments, states);
  }
  return values;
}

// Whether gemv read the numbers from which its derived operands were computed.
bool agree(const Program& program, const Values& values, const std::vector<uint64_t>& sums) {
  for (size_t at = 0; at < values.size(); ++at) {
    const std::vector<size_t>& sources = program.derived[at].sources;
    for (size_t i = 0; i < sources.size(); ++i) {
      const int64_t sum = program.sources[sources[i]].sum;
      if (sum >= 0 && sums[sum] != values[at]->states[i].numbers) return false;
    }
  }
  return true;
}

// A view of dense memory, for the library's matmul; the caller keeps the memory alive.
Tensor view(void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, ScalarType dtype) {
  return at::from_blob(data, {rows, cols}, {row_stride, col_stride}, at::TensorOptions(dtype));
}

constexpr int ATTEMPTS = 4;  // the first may meet old values; more only where someone writes while the op reads

c10::List<Tensor> project(Tensor x, Tensors arguments, const std::string& text) {
  const Program& program = find(text);
  TORCH_CHECK(
      x.dim() > 0 && x.size(-1) == program.k && x.scalar_type() == program.x_dtype,
      "gaws::project: x does not fit the compiled kernel (wanted ", program.k, " features): ", text);
  TORCH_CHECK(
      arguments.all.size() == program.arguments,
      "gaws::project: ", arguments.all.size(), " operands, the kernel takes ", program.arguments, ": ", text);
  const int64_t m = program.k ? x.numel() / program.k : 0;
  if (!x.is_contiguous()) x = x.contiguous();
  Values values;
  std::vector<const void*> in(program.operands.size());
  const auto place = [&](bool hoisted) {  // the operands that are derived from others, or those that are given
    size_t given = 0, at = 0;
    for (size_t i = 0; i < in.size(); ++i) {
      const bool derived = at < program.derived.size() && program.derived[at].operand == int64_t(i);
      const size_t own = derived ? at++ : given++;
      if (derived != hoisted) continue;
      const Tensor* operand = derived ? &values[own]->tensor : arguments.all[own];
      TORCH_CHECK(
          fits(*operand, program.operands[i], m), "gaws::project: operand ", program.operands[i].name,
          " no longer has the dtype, shape or device it was compiled for, and no guard saw it: leave Dynamo its guards, or use "
          "gawscompile.compile: ",
          text);
      if (!operand->is_contiguous()) operand = arguments.keep(operand->contiguous());
      in[i] = operand->const_data_ptr();
    }
  };
  place(false);
  std::vector<State> states;
  if (!program.derived.empty()) {
    states = states_of(program, arguments);
    read(program, arguments, states, false);
    const bool summed = program.sums && 0 < m && m <= program.gemv_max;
    values = summed ? expected(program, arguments, states) : derive(program, arguments, states);
    place(true);
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
    for (int attempt = 1;; ++attempt) {
      std::vector<uint64_t> sums(program.sums);
      if (sums.empty()) Kernel(program.gemv)(m, rows, in.data(), out.data());
      else SummingKernel(program.gemv)(m, rows, in.data(), out.data(), sums.data());
      if (attempt == ATTEMPTS || agree(program, values, sums)) return outputs;
      values = derive(program, arguments, states);
      place(true);
    }
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
    const int64_t* counts, const int64_t* sources, int64_t n_summed, const int64_t* summed,
    const int64_t* unit_rows) {
  auto program = std::make_unique<Program>();
  program->gemv = gemv;
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
  program->sums = size_t(n_summed);
  for (int64_t i = 0; i < n_derived; sources += counts[i++]) {
    Derived derived{places[i], recipes[i], {}, {}};
    for (int64_t j = 0; j < counts[i]; ++j) {
      const size_t argument = size_t(sources[j]);
      program->arguments = std::max(program->arguments, argument + 1);
      const auto same = [&](const Source& source) { return source.argument == argument; };
      const auto it = std::find_if(program->sources.begin(), program->sources.end(), same);
      derived.sources.push_back(size_t(it - program->sources.begin()));
      if (it != program->sources.end()) continue;
      const int64_t sum = std::find(summed, summed + n_summed, sources[j]) - summed;
      program->sources.push_back(sum < n_summed ? Source{argument, sum, unit_rows[sum]} : Source{argument, -1, 0});
    }
    program->derived.push_back(std::move(derived));
  }
  std::unique_lock lock(mutex);
  programs.emplace(text, std::move(program));  // never replaced: calls in flight hold references
}

static const auto registration = c10::Dispatcher::singleton().registerImpl(
    {"gaws::project", ""}, c10::DispatchKey::CPU, c10::KernelFunction::makeFromBoxedFunction<&boxed>(), std::nullopt,
    nullptr, "gawscompile/runtime/dispatch.cpp");
