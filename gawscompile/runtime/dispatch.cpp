// The one C++ op of gawscompile:  gaws::project(Tensor x, Tensor[] operands, str program) -> Tensor[]
//
// It finds the kernels of `program` (asking Python to build them the first time), checks every operand against the
// spec (a parameter may have been replaced since compilation), allocates the outputs and runs the plan that the
// program names for this number of tokens. Operands that are hoisted follow their sources (`hoisted.cpp`, which stands
// in front): where gemv has read other numbers than these were derived from, they are derived anew, and it runs again.
// The op is boxed: it reads its operands and its text where the dispatcher has put them.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

using at::ScalarType;

namespace {

using Kernel = void (*)(int64_t m, const void* x, const void* const* in, void* const* out);
using Unpacking = void (*)(int64_t projection, const void* const* in, void* out);
using SummingKernel = void (*)(int64_t m, const void* x, const void* const* in, void* const* out, uint64_t* sums);

struct Operand {
  ScalarType dtype;
  std::vector<int64_t> shape;  // -1: the number of tokens, over any leading dimensions; -2: any size
  std::string name;
};

struct Projection {
  int64_t n;
  ScalarType dtype;
  int64_t weight;  // index of its weight among the operands, or -1: its base is opaque
  bool transposed;  // the weight is [k, n]
  bool packed;      // it is kept as codes
};

enum Plan : int64_t { GEMV, GEMM, LIBRARY };  // as `planning/targets.py` has them

struct Row {
  Plan plan;
  int64_t most;  // tokens that it runs
};

struct Program {
  void* gemv;         // a Kernel, or a SummingKernel where it sums up what it reads
  Kernel gemm;
  Kernel accumulate;  // null where nothing is to be added to W x
  Unpacking unpack;   // where a weight is packed: it as a matrix of x's dtype
  std::vector<Row> table;
  int64_t k;
  ScalarType x_dtype;
  std::vector<Operand> operands;
  std::vector<Projection> projections;
  bool swiglu;  // two projections, one output: silu(first) * second
  Hoisted hoisted;
  size_t arguments;  // how many the op takes: the other operands, then sources that are none of them
};

std::shared_mutex mutex;  // of the programs; held while a process forks, as that of the values is
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

bool of_bank(const Operand& o) { return o.dtype == ScalarType::Int; }

bool fits(const Tensor& t, const Operand& o, int64_t m) {
  if (t.scalar_type() != o.dtype || !t.is_cpu()) return false;
  if (!o.shape.empty() && o.shape[0] == -3) return t.numel() == o.shape[1];
  if (!o.shape.empty() && o.shape[0] == -1) return t.dim() > 0 && t.size(-1) == o.shape[1] && t.numel() == m * o.shape[1];
  if (t.dim() != int64_t(o.shape.size())) return false;
  if (of_bank(o) && m > 0) {  // a header, and an entry for each row of the batch
    if (!t.is_contiguous() || t.size(0) < 2 || m % (t.size(0) - 1) || t.size(1) < 1 || t.size(2) != 8) return false;
    const int32_t* header = t.const_data_ptr<int32_t>();
    if (header[0] != t.size(0) - 1 || header[1] != t.size(1)) return false;
  }
  for (size_t d = 0; d < o.shape.size(); ++d)
    if (o.shape[d] != -2 && t.size(d) != o.shape[d]) return false;
  return true;
}

// A view of dense memory, for the library's matmul; the caller keeps the memory alive.
Tensor view(void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, ScalarType dtype) {
  return at::from_blob(data, {rows, cols}, {row_stride, col_stride}, at::TensorOptions(dtype));
}

constexpr int ATTEMPTS = 4;  // the first may meet old values; more only where someone writes while the op reads

Plan plan_of(const Program& program, int64_t m) {
  return std::find_if(program.table.begin(), program.table.end(), [&](const Row& row) { return m <= row.most; })->plan;
}

// `places`: where outputs go, where that is known.
c10::List<Tensor> project(
    const Program& program, Tensor x, Tensors arguments, const std::string& text, at::ArrayRef<Tensor> places = {}) {
  const Hoisted& hoisted = program.hoisted;
  TORCH_CHECK(
      x.dim() > 0 && x.size(-1) == program.k && x.scalar_type() == program.x_dtype,
      "gaws::project: x does not fit the compiled kernel (wanted ", program.k, " features): ", text);
  TORCH_CHECK(
      arguments.all.size() == program.arguments,
      "gaws::project: ", arguments.all.size(), " operands, the kernel takes ", program.arguments, ": ", text);
  const int64_t m = program.k ? x.numel() / program.k : 0;
  const Plan plan = plan_of(program, m);
  if (!x.is_contiguous()) x = x.contiguous();
  Values values;
  std::vector<const void*> in(program.operands.size());
  const auto place = [&](bool of_values) {  // the operands that are derived from others, or those that are given
    size_t given = 0, at = 0;
    for (size_t i = 0; i < in.size(); ++i) {
      const bool derived = at < hoisted.derived.size() && hoisted.derived[at].operand == int64_t(i);
      const size_t own = derived ? at++ : given++;
      if (derived != of_values) continue;
      const Tensor* operand = derived ? &values[own]->tensor : arguments.all[own];
      TORCH_CHECK(
          fits(*operand, program.operands[i], m), "gaws::project: operand ", program.operands[i].name,
          of_bank(program.operands[i])
              ? " does not fit: a bank's adapters are given by row, and tokens must be whole rows of the batch: "
              : " no longer has the dtype, shape or device it was compiled for, and no guard saw it: leave Dynamo its "
                "guards, or use gawscompile.compile: ",
          text);
      if (!operand->is_contiguous()) operand = arguments.keep(operand->contiguous());
      in[i] = operand->const_data_ptr();
    }
  };
  place(false);
  std::vector<State> states;
  if (!hoisted.derived.empty()) {
    states = states_of(hoisted, arguments);
    read(hoisted, arguments, states, false);
    const bool summed = hoisted.sums && 0 < m && plan == GEMV;
    values = summed ? expected(hoisted, arguments, states) : derive(hoisted, arguments, states);
    place(true);
  }
  c10::List<Tensor> outputs;
  std::vector<void*> out;
  std::vector<int64_t> sizes = x.sizes().vec();
  for (const Projection& p : program.projections) {
    if (program.swiglu && !outputs.empty()) break;
    sizes.back() = p.n;
    Tensor y = places.empty() ? fresh(sizes, p.dtype) : places[outputs.size()];
    out.push_back(y.mutable_data_ptr());
    outputs.push_back(std::move(y));
  }
  if (m == 0) return outputs;
  const void* rows = x.const_data_ptr();
  if (plan == GEMM) {
    program.gemm(m, rows, in.data(), out.data());
    return outputs;
  }
  if (plan == GEMV) {
    for (int attempt = 1;; ++attempt) {
      std::vector<uint64_t> sums(hoisted.sums);
      if (sums.empty()) Kernel(program.gemv)(m, rows, in.data(), out.data());
      else SummingKernel(program.gemv)(m, rows, in.data(), out.data(), sums.data());
      if (attempt == ATTEMPTS || agree(hoisted, values, sums)) return outputs;
      values = derive(hoisted, arguments, states);
      place(true);
    }
  }
  std::vector<Tensor> products;  // gate and up, before accumulate makes one output of them
  if (program.swiglu) {
    for (const Projection& p : program.projections) {
      products.push_back(fresh({m, p.n}, p.dtype));
      out.insert(out.end() - 1, products.back().mutable_data_ptr());
    }
  }
  const Tensor matrix = view(const_cast<void*>(rows), m, program.k, program.k, 1, program.x_dtype);
  for (size_t i = 0; i < program.projections.size(); ++i) {
    const Projection& p = program.projections[i];
    if (p.weight < 0) continue;
    Tensor y = view(out[i], m, p.n, p.n, 1, p.dtype);
    const int64_t row = p.transposed ? p.n : 1, column = p.transposed ? 1 : program.k;
    Tensor unpacked;  // a weight that is kept as codes
    if (p.packed) {
      unpacked = fresh({p.n, program.k}, p.dtype);
      program.unpack(int64_t(i), in.data(), unpacked.mutable_data_ptr());
    }
    void* weight = p.packed ? unpacked.mutable_data_ptr() : const_cast<void*>(in[p.weight]);
    at::cpu::mm_out(y, matrix, view(weight, program.k, p.n, row, column, p.dtype));
  }
  if (program.accumulate) program.accumulate(m, rows, in.data(), out.data());
  return outputs;
}

void boxed(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const auto arguments = stack->end() - 3;
  Tensors tensors;
  for (const c10::IValue& one : arguments[1].toListRef()) tensors.all.push_back(&one.toTensor());
  const std::string& text = arguments[2].toStringRef();
  c10::List<Tensor> outputs = project(find(text), arguments[0].toTensor(), std::move(tensors), text);
  stack->erase(arguments, stack->end());
  stack->emplace_back(std::move(outputs));
}

}  // namespace

extern "C" void gaws_set_resolver(const char* (*f)(const char*)) { resolver = f; }

extern "C" void gaws_register(
    const char* text, void* gemv, void* gemm, void* accumulate, void* unpack, int64_t n_rows, const int64_t* plans,
    const int64_t* most, int64_t k, int32_t x_dtype,
    int64_t n_operands, const int32_t* dtypes, const int64_t* ranks, const int64_t* shapes, const char* const* names,
    int64_t n_projections, const int64_t* widths, const int32_t* out_dtypes, const int64_t* weights,
    const bool* transposed, const bool* packed, bool swiglu, int64_t n_derived, const int64_t* places, const char* const* recipes,
    const int64_t* counts, const int64_t* sources, int64_t n_summed, const int64_t* summed,
    const int64_t* unit_rows) {
  auto program = std::make_unique<Program>();
  program->gemv = gemv;
  program->gemm = Kernel(gemm);
  program->accumulate = Kernel(accumulate);
  program->unpack = Unpacking(unpack);
  for (int64_t i = 0; i < n_rows; ++i) program->table.push_back({Plan(plans[i]), most[i]});
  program->k = k;
  program->x_dtype = ScalarType(x_dtype);
  program->swiglu = swiglu;
  for (int64_t i = 0, at = 0; i < n_operands; at += ranks[i++])
    program->operands.push_back({ScalarType(dtypes[i]), {shapes + at, shapes + at + ranks[i]}, names[i]});
  for (int64_t i = 0; i < n_projections; ++i)
    program->projections.push_back({widths[i], ScalarType(out_dtypes[i]), weights[i], transposed[i], packed[i]});
  program->arguments = size_t(n_operands - n_derived);
  Hoisted& hoisted = program->hoisted;
  hoisted.sums = size_t(n_summed);
  for (int64_t i = 0; i < n_derived; sources += counts[i++]) {
    Derived derived{places[i], recipes[i], {}, {}};
    for (int64_t j = 0; j < counts[i]; ++j) {
      const size_t argument = size_t(sources[j]);
      program->arguments = std::max(program->arguments, argument + 1);
      const auto same = [&](const Source& source) { return source.argument == argument; };
      const auto it = std::find_if(hoisted.sources.begin(), hoisted.sources.end(), same);
      derived.sources.push_back(size_t(it - hoisted.sources.begin()));
      if (it != hoisted.sources.end()) continue;
      const int64_t sum = std::find(summed, summed + n_summed, sources[j]) - summed;
      hoisted.sources.push_back(sum < n_summed ? Source{argument, sum, unit_rows[sum]} : Source{argument, -1, 0});
    }
    hoisted.derived.push_back(std::move(derived));
  }
  std::unique_lock lock(mutex);
  programs.emplace(text, std::move(program));  // never replaced: calls in flight hold references
}

static const auto registration = c10::Dispatcher::singleton().registerImpl(
    {"gaws::project", ""}, c10::DispatchKey::CPU, c10::KernelFunction::makeFromBoxedFunction<&boxed>(), std::nullopt,
    nullptr, "gawscompile/runtime/dispatch.cpp");
