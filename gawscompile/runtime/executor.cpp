// The code that Inductor prints around its kernels, run without Python. `runtime/wrapper.py` reads that code and writes
// it down as steps over registers; here they are run. Part of the op's library: `dispatch.cpp` stands in front.
//
// Registers hold what the code's variables hold: the first ones are the graph's inputs. The caller owns these, unless they
// were lent: then steps free them, and what is left is given back if nothing was done.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>

#include <array>
#include <cstring>
#include <utility>

namespace {

enum Code : int64_t { ALLOCATE, VIEW, FREE, ITEM, KERNEL, CALL, ATTEND, PROJECT, FITS, ALIGNED, COMPUTE, RESULT };
enum Kind : int64_t { NONE, TENSOR, TENSORS, INTEGER, INTEGERS, NUMBER, BOOLEAN, TEXT };
enum Sign : int64_t { PLUS, MINUS, TIMES, OVER, MODULO, MAXIMUM, MINIMUM };

using Numbers = std::vector<int64_t>;

struct Argument {
  Kind kind;
  Numbers values;  // registers, places of integers, a boolean
  c10::IValue constant;
};

struct Step {
  Code code;
  int64_t out = -1;   // a register; of COMPUTE, a place among the integers
  Numbers in;         // registers; of KERNEL, integers as -1 - place
  Numbers sizes, strides;  // places among the integers
  int64_t offset = 0, number = 0;  // of VIEW, of ITEM, ALIGNED and COMPUTE; of FITS 1 where it is of an input
  ScalarType dtype = ScalarType::Undefined;
  void* kernel = nullptr;
  std::vector<Argument> arguments;
  std::optional<c10::OperatorHandle> op;
  std::string text;  // PROJECT: the program; FITS and ALIGNED: of what
  mutable const Program* program = nullptr;
};

struct Replay;

struct Executor {
  int64_t inputs, registers;
  Numbers integers;  // those that a call gives, then constants and computed ones
  size_t given;
  std::vector<Step> steps;
  mutable std::mutex mutex;  // of what is below: how it is replayed (`replay.cpp`)
  mutable std::vector<std::shared_ptr<Replay>> idle;
  mutable size_t calls = 0, tries = 0;
  mutable const char* why_not = "";  // they were not laid out when that was last tried
};

// The results, or nothing where the steps are to be run one by one.
c10::List<Tensor> replayed(const Executor& executor, at::ArrayRef<c10::IValue> inputs);

template <size_t>
using Pointer = void*;

template <size_t... I>
void invoke(void* kernel, void* const* arguments, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(Pointer<I>...)>(kernel)(arguments[I]...);
}

template <size_t N>
void invoke_all(void* kernel, void* const* arguments) {
  invoke(kernel, arguments, std::make_index_sequence<N>());
}

template <size_t... N>
constexpr auto invokers_of(std::index_sequence<N...>) {
  return std::array<void (*)(void*, void* const*), sizeof...(N)>{&invoke_all<N>...};
}

constexpr size_t MOST = 64;  // arguments of one kernel, less one
const auto invokers = invokers_of(std::make_index_sequence<MOST>());

Tensor viewed(const Tensor& of, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset) {
  Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(of.storage()), of.key_set(), of.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(of.storage_offset() + offset);
  view.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return view;
}

int64_t computed(int64_t sign, int64_t a, int64_t b) {
  const auto floor = [](int64_t x, int64_t y) { return x / y - (x % y != 0 && (x < 0) != (y < 0)); };
  switch (sign) {
    case PLUS: return a + b;
    case MINUS: return a - b;
    case TIMES: return a * b;
    case OVER: return floor(a, b);
    case MODULO: return a - floor(a, b) * b;
    case MAXIMUM: return std::max(a, b);
    default: return std::min(a, b);
  }
}

// Strides of one element, or none, say nothing.
bool lies_as(const Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides) {
  bool fits = t.sizes() == sizes;
  for (size_t d = 0; fits && d < strides.size(); ++d) fits = sizes[d] <= 1 || t.stride(d) == strides[d];
  return fits;
}

thread_local std::vector<c10::IValue> lent;
thread_local int64_t lent_to = 0;

// The results, or nothing where an input does not fit: then nothing was done. `own`: inputs that were lent.
c10::List<Tensor> execute(
    const Executor& executor, at::ArrayRef<c10::IValue> inputs, const Numbers& integers,
    std::vector<c10::IValue>& own) {
  at::AutoDispatchBelowAutograd below;
  TORCH_CHECK(
      int64_t(inputs.size()) == executor.inputs && integers.size() == executor.given, "gaws::execute: ", inputs.size(),
      " tensors and ", integers.size(), " integers, not ", executor.inputs, " and ", executor.given);
  Numbers all;
  if (!integers.empty()) {
    all = executor.integers;
    std::copy(integers.begin(), integers.end(), all.begin());
  }
  const int64_t* n = integers.empty() ? executor.integers.data() : all.data();
  std::vector<c10::IValue> registers(executor.registers);
  const auto value = [&](int64_t r) -> const c10::IValue& {
    return r < executor.inputs ? inputs[r] : registers[r - executor.inputs];
  };
  const auto put = [&](int64_t r, c10::IValue v) {
    (r < executor.inputs ? own[r] : registers[r - executor.inputs]) = std::move(v);
  };
  c10::SmallVector<int64_t, 8> sizes, strides;
  const auto read = [&](const Numbers& places, auto& into) {
    into.clear();
    for (const int64_t place : places) into.push_back(n[place]);
  };
  torch::jit::Stack stack;
  void* arguments[MOST];
  for (const Step& step : executor.steps) {
    switch (step.code) {
      case ALLOCATE:
        read(step.sizes, sizes), read(step.strides, strides);
        put(step.out, fresh_strided(sizes, strides, step.dtype));
        break;
      case VIEW:
        read(step.sizes, sizes), read(step.strides, strides);
        put(step.out, viewed(value(step.in[0]).toTensor(), sizes, strides, n[step.offset]));
        break;
      case FREE:
        for (const int64_t r : step.in) put(r, {});
        break;
      case ITEM: {
        const c10::IValue& of = value(step.in[0]);
        put(step.out, of.isTuple() ? of.toTupleRef().elements()[step.number] : c10::IValue(of.toListRef()[step.number]));
        break;
      }
      case KERNEL: {
        RECORD_FUNCTION(step.text, {});
        size_t count = 0;
        for (const int64_t r : step.in)
          arguments[count++] = r < 0 ? reinterpret_cast<void*>(n[-1 - r]) : value(r).toTensor().data_ptr();
        invokers[count](step.kernel, arguments);
        break;
      }
      case PROJECT: {
        RECORD_FUNCTION("gaws::project", {});
        if (!step.program) step.program = &find(step.text);
        Tensors tensors;
        tensors.all.reserve(step.in.size());
        for (size_t i = 1; i < step.in.size(); ++i) tensors.all.push_back(&value(step.in[i]).toTensor());
        put(step.out, project(*step.program, value(step.in[0]).toTensor(), std::move(tensors), step.text));
        break;
      }
      case CALL:
      case ATTEND: {
        stack.clear();
        for (const Argument& a : step.arguments) {
          switch (a.kind) {
            case TENSOR: stack.push_back(value(a.values[0])); break;
            case TENSORS: {
              c10::List<Tensor> list;
              for (const int64_t r : a.values) list.push_back(value(r).toTensor());
              stack.emplace_back(std::move(list));
              break;
            }
            case INTEGER: stack.emplace_back(n[a.values[0]]); break;
            case INTEGERS: {
              c10::List<int64_t> list;
              for (const int64_t place : a.values) list.push_back(n[place]);
              stack.emplace_back(std::move(list));
              break;
            }
            default: stack.push_back(a.constant);
          }
        }
        step.op->callBoxed(&stack);
        if (step.out < 0) break;
        if (stack.size() == 1) put(step.out, std::move(stack[0]));
        else put(step.out, c10::ivalue::Tuple::create(std::vector<c10::IValue>(stack.begin(), stack.end())));
        break;
      }
      case FITS: {
        const Tensor& t = value(step.in[0]).toTensor();
        read(step.sizes, sizes), read(step.strides, strides);
        if (lies_as(t, sizes, strides)) break;
        if (step.number) return c10::List<Tensor>();
        TORCH_CHECK(false, step.text, " gave ", t.sizes(), " and strides ", t.strides(), ", expected ", sizes, " and ", strides);
      }
      case ALIGNED:
        TORCH_CHECK(
            reinterpret_cast<uintptr_t>(value(step.in[0]).toTensor().data_ptr()) % size_t(step.number) == 0, step.text,
            " gave memory that is not aligned to ", step.number);
        break;
      case COMPUTE:
        all[step.out] = computed(step.number, n[step.in[0]], n[step.in[1]]);
        break;
      case RESULT: {
        c10::List<Tensor> results;
        results.reserve(step.in.size());
        for (const int64_t r : step.in) results.push_back(r < 0 ? Tensor() : value(r).toTensor());
        return results;
      }
    }
  }
  return c10::List<Tensor>();
}

// Numbers one after the other, each list behind its length, and texts by their number.
struct Reader {
  const int64_t* at;
  const char* const* texts;

  int64_t number() { return *at++; }
  Numbers numbers() {
    const int64_t count = number();
    at += count;
    return {at - count, at};
  }
  std::string text() {
    const int64_t i = number();
    return i < 0 ? std::string() : texts[i];
  }
  Argument argument() {
    Argument a{Kind(number()), {}, {}};
    if (a.kind == NUMBER) {
      double d;
      const int64_t bits = number();
      std::memcpy(&d, &bits, sizeof d);
      a.constant = d;
    } else if (a.kind == TEXT) {
      a.constant = text();
    } else {
      a.values = numbers();
      if (a.kind == BOOLEAN) a.constant = a.values[0] != 0;
    }
    return a;
  }
};

void boxed_execute(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const auto arguments = stack->end() - 3;
  const auto* executor = reinterpret_cast<const Executor*>(arguments[2].toInt());
  std::vector<c10::IValue> own;
  if (lent_to == arguments[2].toInt()) own = std::exchange(lent, {});
  const at::ArrayRef<c10::IValue> inputs = own.empty() ? arguments[0].toListRef() : at::ArrayRef<c10::IValue>(own);
  c10::List<Tensor> results;
  if (own.empty() && !executor->given) results = replayed(*executor, inputs);
  if (results.empty()) results = execute(*executor, inputs, arguments[1].toIntVector(), own);
  if (results.empty()) lent = std::move(own);
  stack->erase(arguments, stack->end());
  stack->emplace_back(std::move(results));
}

// Hands tensors over to this thread's next call of that executor, a backward, and gives back those of one that did nothing.
void boxed_lend(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const auto arguments = stack->end() - 2;
  const std::vector<c10::IValue> before = std::exchange(lent, arguments[0].toListRef().vec());
  lent_to = arguments[1].toInt();
  if (lent_to) kept.train();
  stack->erase(arguments, stack->end());
  c10::List<Tensor> back;
  for (const c10::IValue& one : before) back.push_back(one.isTensor() ? one.toTensor() : Tensor());
  stack->emplace_back(std::move(back));
}

}  // namespace

extern "C" void* gaws_executor(
    int64_t inputs, int64_t registers, int64_t count, const int64_t* words, const char* const* texts,
    int64_t n_integers, const int64_t* integers, int64_t given) {
  auto executor = std::make_unique<Executor>();
  executor->inputs = inputs;
  executor->registers = registers;
  executor->integers.assign(integers, integers + n_integers);
  executor->given = size_t(given);
  Reader reader{words, texts};
  for (int64_t i = 0; i < count; ++i) {
    Step step{};
    step.code = Code(reader.number());
    step.out = reader.number();
    step.in = reader.numbers();
    step.sizes = reader.numbers();
    step.strides = reader.numbers();
    step.offset = reader.number();
    step.number = reader.number();
    step.dtype = ScalarType(reader.number());
    step.kernel = reinterpret_cast<void*>(reader.number());
    step.text = reader.text();
    for (int64_t left = reader.number(); left > 0; --left) step.arguments.push_back(reader.argument());
    if (step.code == CALL || step.code == ATTEND) {
      const size_t dot = step.text.find('.');
      step.op = c10::Dispatcher::singleton().findSchemaOrThrow(
          step.text.substr(0, dot).c_str(), dot == std::string::npos ? "" : step.text.substr(dot + 1).c_str());
    }
    executor->steps.push_back(std::move(step));
  }
  return executor.release();
}

extern "C" void gaws_executor_free(void* executor) { delete static_cast<Executor*>(executor); }

static const auto execution = c10::Dispatcher::singleton().registerImpl(
    {"gaws::execute", ""}, c10::DispatchKey::CompositeImplicitAutograd,
    c10::KernelFunction::makeFromBoxedFunction<&boxed_execute>(), std::nullopt, nullptr,
    "gawscompile/runtime/executor.cpp");

static const auto lending = c10::Dispatcher::singleton().registerImpl(
    {"gaws::lend", ""}, c10::DispatchKey::CompositeImplicitAutograd,
    c10::KernelFunction::makeFromBoxedFunction<&boxed_lend>(), std::nullopt, nullptr,
    "gawscompile/runtime/executor.cpp");
