// A graph of constant sizes run again. Every call takes the same steps, on tensors of the same sizes; only where inputs and
// results lie changes. So its steps are laid out once, as kernels and their pointers. What it computes in between shares
// one block of memory, by liveness. `replay.cpp` runs that: it places the inputs' and the results' addresses and calls the
// kernels; no tensor is made, viewed, checked or freed in between.
//
// Where anything is not of a kind known here, or takes more memory than is kept, `NotLaidOut` says why, and the steps are
// run one by one (`executor.cpp`). Part of the op's library; `unchanged.cpp` stands in front.

namespace {

constexpr size_t MOST_BETWEEN = size_t(1) << 20;  // bytes that a replay keeps: those of a few tokens
constexpr size_t APART = 64;                      // bytes, as the allocator aligns

struct NotLaidOut {
  const char* why;
};
constexpr const char* OTHERWISE = "a tensor lies otherwise than its kernel reads it";

// Bytes into an input, or into a block, whose number is the inputs' count and more.
struct Place {
  int64_t owner, offset;
};

// A tensor as it will be: `like` has no memory, unless it is an input.
struct Laid {
  Tensor like;
  Place place;
};

// Memory that a step allocates: for the kernels `first` to `last`, or beyond, for a result.
struct Span {
  Tensor like;
  size_t bytes, first, last, at = 0;
  bool escapes = false;
};

struct Fix {
  size_t pointer;
  Place place;
};

struct Command {
  const Step* step;
  size_t first = 0;           // of its pointers
  void* kernel = nullptr;     // PROJECT: null where the op itself is to be called
  const Program* program = nullptr;
  int64_t tokens = 0;
  size_t operands = 0;        // KERNEL: all arguments
  std::vector<Laid> tensors, outputs;  // of the op itself
  AttendCall attend = {};
  void (*attention)(const AttendCall*) = nullptr;
};

// An input as it was.
struct Expected {
  Numbers sizes, strides;
  caffe2::TypeMeta dtype;
  c10::DispatchKeySet keys;
  bool read = false, written = false;

  explicit Expected(const c10::TensorImpl& t)
      : sizes(t.sizes().vec()), strides(t.strides().vec()), dtype(t.dtype()), keys(t.key_set()) {}

  bool same(const c10::TensorImpl& t) const {
    return t.sizes() == at::IntArrayRef(sizes) && t.strides() == at::IntArrayRef(strides) && t.dtype() == dtype &&
           t.key_set() == keys;
  }
  bool fits(const Tensor& t) const {
    const c10::TensorImpl& now = *t.unsafeGetTensorImpl();
    return comparable(now) && same(now) && now.unsafe_storage().nbytes() >= needed(now);
  }
};

Tensor without_memory(at::IntArrayRef sizes, at::IntArrayRef strides, ScalarType dtype) {
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, c10::DataPtr(nullptr, c10::DeviceType::CPU), nullptr, false);
  Tensor t = at::detail::make_tensor<c10::TensorImpl>(
      std::move(none), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(dtype));
  t.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return t;
}

struct Replay {
  const Executor& executor;
  std::vector<Expected> inputs;
  std::vector<Command> commands;
  std::vector<void*> pointers;
  std::vector<Fix> fixes;         // of pointers to inputs and results; all others stay
  std::vector<Span> escaping;     // blocks that results are in, new in every call
  std::vector<Laid> results;      // undefined: none
  std::vector<std::pair<int64_t, int64_t>> aligned;  // inputs, and to what
  c10::Storage memory;
  std::vector<char*> bases;       // of inputs, then of `escaping`
  std::vector<int64_t> whole;     // inputs that are needed as tensors

  Replay(const Executor& executor, const Tensor* const* given);

  bool takes(const Tensor* const* given) const {
    for (size_t i = 0; i < inputs.size(); ++i)
      if (inputs[i].read && !inputs[i].fits(*given[i])) return false;
    return true;
  }

  bool all_aligned() const {
    return std::all_of(aligned.begin(), aligned.end(), [&](const auto& one) {
      return reinterpret_cast<uintptr_t>(bases[one.first]) % size_t(one.second) == 0;
    });
  }

  void place(int64_t input, const Tensor& t) {
    const Expected& one = inputs[input];
    if (one.written) bases[input] = static_cast<char*>(t.mutable_data_ptr());
    else if (one.read) bases[input] = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  }

  // Once all inputs are placed.
  c10::List<Tensor> run(const Tensor* const* given);

 private:
  std::vector<std::vector<Laid>> registers;
  std::vector<Span> blocks;

  Laid& at(int64_t r) {
    if (r < 0 || registers[r].size() != 1) throw NotLaidOut{"a step reads what no step makes"};
    return registers[r][0];
  }
  Laid block(at::IntArrayRef sizes, at::IntArrayRef strides, ScalarType dtype);
  void use(const Laid& one, bool writes);
  void point(const Laid& one, bool writes);
  void lay_project(const Step& step);
  void lay_attend(const Step& step);
  void lay(const Step& step);
  void share_memory();
  Tensor tensor(const Laid& one, const Tensor* const* given) const;
};

Laid Replay::block(at::IntArrayRef sizes, at::IntArrayRef strides, ScalarType dtype) {
  Tensor like = without_memory(sizes, strides, dtype);
  blocks.push_back({like, needed(*like.unsafeGetTensorImpl()), commands.size(), commands.size()});
  return {like, {executor.inputs + int64_t(blocks.size()) - 1, 0}};
}

void Replay::use(const Laid& one, bool writes) {
  const int64_t owner = one.place.owner;
  if (owner >= executor.inputs) blocks[owner - executor.inputs].last = commands.size();
  else inputs[owner].read = true, inputs[owner].written |= writes;
}

void Replay::point(const Laid& one, bool writes) {
  use(one, writes);
  fixes.push_back({pointers.size(), one.place});
  pointers.push_back(nullptr);
}

void Replay::lay_project(const Step& step) {
  const Program& program = find(step.text);
  const Laid& x = at(step.in[0]);
  const bool ready = x.like.dim() > 0 && x.like.size(-1) == program.k && x.like.scalar_type() == program.x_dtype &&
                     x.like.is_contiguous() && program.k && step.in.size() - 1 == program.arguments;
  const int64_t m = ready ? x.like.numel() / program.k : 0;
  if (m == 0) throw NotLaidOut{OTHERWISE};
  const Plan plan = plan_of(program, m);
  Command command{&step, pointers.size()};
  command.program = &program, command.tokens = m, command.operands = program.arguments;
  // a bank's schedule is checked in every call, what is hoisted is derived anew where its sources change
  const bool banked = std::any_of(program.operands.begin(), program.operands.end(), of_bank);
  if (!banked && program.hoisted.derived.empty() && plan != LIBRARY)
    command.kernel = plan == GEMM ? reinterpret_cast<void*>(program.gemm) : program.gemv;
  for (size_t i = 0; i < step.in.size(); ++i) {
    const Laid& one = at(step.in[i]);
    if (command.kernel && i && !(fits(one.like, program.operands[i - 1], m) && one.like.is_contiguous()))
      throw NotLaidOut{OTHERWISE};
    if (command.kernel) point(one, false);
    else use(one, false), command.tensors.push_back(one);
  }
  std::vector<Laid>& made = registers[step.out];
  std::vector<int64_t> sizes = x.like.sizes().vec();
  for (const Projection& p : program.projections) {
    if (program.swiglu && !made.empty()) break;
    sizes.back() = p.n;
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
    made.push_back(block(sizes, strides, p.dtype));
    if (command.kernel) point(made.back(), true);
    else use(made.back(), true), command.outputs.push_back(made.back());
  }
  commands.push_back(std::move(command));
}

void Replay::lay_attend(const Step& step) {
  const auto& given = step.arguments;
  const Attention& kernel = attention(given[5].constant.toStringRef());
  const Laid &q = at(given[0].values[0]), &k = at(given[1].values[0]), &v = at(given[2].values[0]);
  const Laid* mask = given[3].kind == TENSOR ? &at(given[3].values[0]) : nullptr;
  const Laid* sinks = given[6].kind == TENSOR ? &at(given[6].values[0]) : nullptr;
  for (const Laid* one : {&q, &k, &v})
    if (one->like.dim() != 4 || one->like.size(3) != kernel.features || one->like.scalar_type() != kernel.dtype ||
        one->like.stride(3) != 1)
      throw NotLaidOut{OTHERWISE};
  if (!q.like.is_non_overlapping_and_dense() || !q.like.numel()) throw NotLaidOut{OTHERWISE};
  Command command{&step, pointers.size()};
  command.attend = described(
      kernel, q.like, k.like, v.like, mask ? &mask->like : nullptr, given[4].constant.toDouble(),
      sinks ? &sinks->like : nullptr);
  command.attention = kernel.kernel;
  for (const Laid* one : {&q, &k, &v}) point(*one, false);
  for (const Laid* one : {mask, sinks}) {
    if (one) point(*one, false);
    else pointers.push_back(nullptr);
  }
  const Laid out = block(q.like.sizes(), q.like.strides(), kernel.dtype);
  ::place(out.like, command.attend.os);
  point(out, true);
  registers[step.out] = {out};
  commands.push_back(std::move(command));
}

void Replay::lay(const Step& step) {
  const auto read = [&](const Numbers& places) {
    Numbers numbers;
    for (const int64_t place : places) numbers.push_back(executor.integers[place]);
    return numbers;
  };
  switch (step.code) {
    case ALLOCATE: registers[step.out] = {block(read(step.sizes), read(step.strides), step.dtype)}; break;
    case VIEW: {
      const Laid& of = at(step.in[0]);
      const int64_t offset = executor.integers[step.offset];
      const Laid view{
          viewed(of.like, read(step.sizes), read(step.strides), offset),
          {of.place.owner, of.place.offset + offset * int64_t(of.like.itemsize())}};
      registers[step.out] = {view};
      break;
    }
    case FREE:
      for (const int64_t r : step.in) registers[r].clear();
      break;
    case ITEM: {
      const auto& of = registers[step.in[0]];
      if (size_t(step.number) >= of.size()) throw NotLaidOut{"a step reads what no step makes"};
      const Laid item = of[step.number];
      registers[step.out] = {item};
      break;
    }
    case KERNEL: {
      Command command{&step, pointers.size()};
      command.operands = step.in.size();
      for (const int64_t r : step.in) {
        if (r < 0) pointers.push_back(reinterpret_cast<void*>(executor.integers[-1 - r]));
        else point(at(r), true);
      }
      commands.push_back(std::move(command));
      break;
    }
    case PROJECT: lay_project(step); break;
    case ATTEND: lay_attend(step); break;
    case FITS: {
      const Tensor& t = at(step.in[0]).like;
      use(at(step.in[0]), false);
      if (!lies_as(t, read(step.sizes), read(step.strides))) throw NotLaidOut{OTHERWISE};
      break;
    }
    case ALIGNED: {
      const Place& place = at(step.in[0]).place;
      use(at(step.in[0]), false);
      if (place.offset || (place.owner >= executor.inputs && APART % size_t(step.number))) throw NotLaidOut{OTHERWISE};
      if (place.owner < executor.inputs) aligned.emplace_back(place.owner, step.number);
      break;
    }
    case CALL: throw NotLaidOut{"it calls an op that is not ours"};
    case COMPUTE: throw NotLaidOut{"it computes sizes"};
    case RESULT:
      for (const int64_t r : step.in) {
        results.push_back(r < 0 ? Laid() : at(r));
        if (r < 0) continue;
        use(at(r), false);
        if (const int64_t owner = at(r).place.owner; owner >= executor.inputs) blocks[owner - executor.inputs].escapes = true;
      }
  }
}

// Each block at the first place that no block alive at the same time has; those that escape have none.
void Replay::share_memory() {
  std::vector<const Span*> placed;
  size_t total = 0;
  for (Span& one : blocks) {
    if (one.escapes) continue;
    one.bytes = (std::max<size_t>(one.bytes, 1) + APART - 1) / APART * APART;
    for (bool moved = true; moved;) {
      moved = false;
      for (const Span* other : placed) {
        if (one.first > other->last || other->first > one.last) continue;
        if (one.at >= other->at + other->bytes || other->at >= one.at + one.bytes) continue;
        one.at = other->at + other->bytes, moved = true;
      }
    }
    placed.push_back(&one);
    total = std::max(total, one.at + one.bytes);
  }
  if (total > MOST_BETWEEN) throw NotLaidOut{"more than 1 MB lies between its kernels"};
  memory = c10::Storage(
      c10::Storage::use_byte_size_t(), total, c10::GetCPUAllocator()->allocate(total), nullptr, false);
}

Replay::Replay(const Executor& executor, const Tensor* const* given) : executor(executor) {
  registers.resize(executor.inputs + executor.registers);
  for (int64_t i = 0; i < executor.inputs; ++i) {
    const c10::TensorImpl& t = *given[i]->unsafeGetTensorImpl();
    if (!comparable(t) || !given[i]->is_cpu() || t.unsafe_storage().nbytes() < needed(t))
      throw NotLaidOut{"an input is no plain tensor"};
    inputs.emplace_back(t);
    registers[i] = {{*given[i], {i, 0}}};
  }
  for (const Step& step : executor.steps) lay(step);
  share_memory();
  std::vector<int64_t> number(blocks.size(), -1);  // among the bases
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (!blocks[i].escapes) continue;
    number[i] = executor.inputs + int64_t(escaping.size());
    escaping.push_back(blocks[i]);
  }
  char* const start = static_cast<char*>(memory.mutable_data());
  const auto settle = [&](Place& place) {  // whether it is an input's or a result's
    if (place.owner < executor.inputs) return true;
    const size_t i = size_t(place.owner - executor.inputs);
    if (number[i] >= 0) return place.owner = number[i], true;
    return place.owner = -1, place.offset += int64_t(blocks[i].at), false;
  };
  std::vector<Fix> kept;
  for (Fix& fix : fixes) {
    if (settle(fix.place)) kept.push_back(fix);
    else pointers[fix.pointer] = start + fix.place.offset;
  }
  fixes = std::move(kept);
  for (Command& command : commands) {
    for (auto* tensors : {&command.tensors, &command.outputs})
      for (Laid& one : *tensors)
        if (settle(one.place) && one.place.owner >= executor.inputs)
          throw NotLaidOut{"a result comes from a bank, from hoisted operands or from the library"};
  }
  for (Laid& one : results) {
    if (!one.like.defined()) continue;
    settle(one.place);
    if (one.place.owner >= executor.inputs) continue;
    one.like = without_memory(one.like.sizes(), one.like.strides(), one.like.scalar_type());
    whole.push_back(one.place.owner);
  }
  for (Command& command : commands)
    for (Laid& one : command.tensors)  // no input is kept alive
      if (one.place.owner >= 0) one.like = Tensor(), whole.push_back(one.place.owner);
  registers.clear(), blocks.clear();
  bases.resize(executor.inputs + escaping.size());
}

}  // namespace
