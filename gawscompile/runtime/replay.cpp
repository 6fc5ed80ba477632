// A graph of constant sizes run again. Every call takes the same steps, on tensors of the same sizes; only where inputs and
// results lie changes. So its steps are laid out once, as kernels and their pointers. What it computes in between shares
// one block of memory, by liveness. A call then places the inputs' and the results' addresses and runs the kernels: no
// tensor is made, viewed, checked or freed in between.
//
// Where anything is not of a kind known here, or takes more memory than is kept, the steps are run one by one as before
// (`executor.cpp`). So they are where an input's sizes, strides, dtype or flags are others. Part of the op's library;
// `unchanged.cpp` stands in front.

namespace {

constexpr size_t MOST_BETWEEN = size_t(1) << 20;  // bytes that a replay keeps: those of a few tokens
constexpr size_t MOST_TRIES = 4;                  // to lay an executor out, each for a thread or for another kind of inputs
constexpr size_t APART = 64;                      // bytes, as the allocator aligns

struct NotLaidOut {};

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
  std::vector<Span> escaping;    // blocks that results are in, new in every call
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
    if (r < 0 || registers[r].size() != 1) throw NotLaidOut();
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
  if (m == 0) throw NotLaidOut();
  const Plan plan = plan_of(program, m);
  Command command{&step, pointers.size()};
  command.program = &program, command.tokens = m, command.operands = program.arguments;
  // a bank's schedule is checked in every call, what is hoisted is derived anew where its sources change
  const bool banked = std::any_of(program.operands.begin(), program.operands.end(), of_bank);
  if (!banked && program.hoisted.derived.empty() && plan != LIBRARY)
    command.kernel = plan == GEMM ? reinterpret_cast<void*>(program.gemm) : program.gemv;
  for (size_t i = 0; i < step.in.size(); ++i) {
    const Laid& one = at(step.in[i]);
    if (command.kernel && i && !(fits(one.like, program.operands[i - 1], m) && one.like.is_contiguous())) throw NotLaidOut();
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
      throw NotLaidOut();
  if (!q.like.is_non_overlapping_and_dense() || !q.like.numel()) throw NotLaidOut();
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
      if (size_t(step.number) >= of.size()) throw NotLaidOut();
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
    case CALL:
      if (step.text != "gaws::attend" || step.out < 0) throw NotLaidOut();
      lay_attend(step);
      break;
    case FITS: {
      const Tensor& t = at(step.in[0]).like;
      use(at(step.in[0]), false);
      const Numbers sizes = read(step.sizes), strides = read(step.strides);
      bool fits = t.sizes() == at::IntArrayRef(sizes);
      for (size_t d = 0; fits && d < strides.size(); ++d) fits = sizes[d] <= 1 || t.stride(d) == strides[d];
      if (!fits) throw NotLaidOut();
      break;
    }
    case ALIGNED: {
      const Place& place = at(step.in[0]).place;
      use(at(step.in[0]), false);
      if (place.offset || (place.owner >= executor.inputs && APART % size_t(step.number))) throw NotLaidOut();
      if (place.owner < executor.inputs) aligned.emplace_back(place.owner, step.number);
      break;
    }
    case COMPUTE: throw NotLaidOut();
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
  if (total > MOST_BETWEEN) throw NotLaidOut();
  memory = c10::Storage(
      c10::Storage::use_byte_size_t(), total, c10::GetCPUAllocator()->allocate(total), nullptr, false);
}

Replay::Replay(const Executor& executor, const Tensor* const* given) : executor(executor) {
  registers.resize(executor.inputs + executor.registers);
  for (int64_t i = 0; i < executor.inputs; ++i) {
    const c10::TensorImpl& t = *given[i]->unsafeGetTensorImpl();
    if (!comparable(t) || !given[i]->is_cpu() || t.unsafe_storage().nbytes() < needed(t)) throw NotLaidOut();
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
        if (settle(one.place) && one.place.owner >= executor.inputs) throw NotLaidOut();
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

Tensor Replay::tensor(const Laid& one, const Tensor* const* given) const {
  if (one.place.owner >= 0) return *given[one.place.owner];
  Tensor t = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(memory), one.like.key_set(), one.like.dtype());
  t.unsafeGetTensorImpl()->set_storage_offset(one.place.offset / int64_t(one.like.itemsize()));
  t.unsafeGetTensorImpl()->set_sizes_and_strides(one.like.sizes(), one.like.strides());
  return t;
}

c10::List<Tensor> Replay::run(const Tensor* const* given) {
  std::vector<Tensor> fresh;
  for (size_t i = 0; i < escaping.size(); ++i) {
    const Tensor& like = escaping[i].like;
    fresh.push_back(fresh_strided(like.sizes(), like.strides(), like.scalar_type()));
    bases[executor.inputs + i] = static_cast<char*>(fresh.back().mutable_data_ptr());
  }
  for (const Fix& fix : fixes) pointers[fix.pointer] = bases[fix.place.owner] + fix.place.offset;
  for (const Command& command : commands) {
    void* const* const at = pointers.data() + command.first;
    if (command.step->code == KERNEL) {
      RECORD_FUNCTION(command.step->text, {});
      invokers[command.operands](command.step->kernel, at);
    } else if (command.attention) {
      RECORD_FUNCTION("gaws::attend", {});
      AttendCall call = command.attend;
      call.q = at[0], call.k = at[1], call.v = at[2], call.mask = at[3], call.sinks = at[4], call.out = at[5];
      command.attention(&call);
    } else if (command.kernel) {
      RECORD_FUNCTION("gaws::project", {});
      Kernel(command.kernel)(command.tokens, at[0], at + 1, at + 1 + command.operands);
    } else {
      RECORD_FUNCTION("gaws::project", {});
      std::vector<Tensor> tensors, outputs;
      for (const Laid& one : command.tensors) tensors.push_back(tensor(one, given));
      for (const Laid& one : command.outputs) outputs.push_back(tensor(one, given));
      Tensors arguments;
      for (size_t i = 1; i < tensors.size(); ++i) arguments.all.push_back(&tensors[i]);
      project(*command.program, tensors[0], std::move(arguments), command.step->text, outputs);
    }
  }
  c10::List<Tensor> list;
  list.reserve(results.size());
  for (const Laid& one : results) {
    const auto& [like, place] = one;
    if (!like.defined()) {
      list.push_back(Tensor());
      continue;
    }
    const Tensor& of = place.owner < executor.inputs ? *given[place.owner] : fresh[place.owner - executor.inputs];
    const bool whole = place.offset == 0 && of.sizes() == like.sizes() && of.strides() == like.strides();
    list.push_back(whole ? of : viewed(of, like.sizes(), like.strides(), place.offset / int64_t(of.itemsize())));
  }
  return list;
}

// One that is not running and fits, or nothing. The first call is not laid out: many graphs are called once.
std::shared_ptr<Replay> take(const Executor& executor, const Tensor* const* given) {
  const std::unique_lock lock(executor.mutex, std::try_to_lock);
  if (!lock || executor.calls++ == 0) return nullptr;
  auto& idle = executor.idle;
  const auto found = std::find_if(idle.begin(), idle.end(), [&](const auto& one) { return one->takes(given); });
  if (found != idle.end()) {
    std::shared_ptr<Replay> one = std::move(*found);
    idle.erase(found);
    return one;
  }
  if (executor.tries == MOST_TRIES) return nullptr;
  ++executor.tries;
  try {
    return std::make_shared<Replay>(executor, given);
  } catch (const NotLaidOut&) {
    return nullptr;
  } catch (const c10::Error&) {  // these inputs do not fit: the ordinary way says so
    return nullptr;
  }
}

// A replay for one call, which is put back whatever becomes of that.
struct Lent {
  std::shared_ptr<Replay> replay;

  ~Lent() {
    if (!replay) return;
    const Executor& executor = replay->executor;
    const std::lock_guard lock(executor.mutex);
    executor.idle.push_back(std::move(replay));
  }
};

c10::List<Tensor> replayed(const Executor& executor, at::ArrayRef<c10::IValue> inputs) {
  c10::List<Tensor> results;
  if (int64_t(inputs.size()) != executor.inputs) return results;
  at::AutoDispatchBelowAutograd below;
  std::vector<const Tensor*> given;
  given.reserve(inputs.size());
  for (const c10::IValue& one : inputs) given.push_back(&one.toTensor());
  const Lent lent{take(executor, given.data())};
  Replay* const replay = lent.replay.get();
  if (!replay) return results;
  for (size_t i = 0; i < given.size(); ++i) replay->place(int64_t(i), *given[i]);
  if (replay->all_aligned()) results = replay->run(given.data());
  return results;
}

// Parameters of a model as a graph's inputs.
struct Bound {
  const Executor& executor;
  std::vector<int64_t> offsets;  // of the tensors that are inputs, in bytes, in their order
  std::vector<int64_t> rest;     // inputs that a call gives
  std::vector<std::shared_ptr<Replay>> known;  // that fit all of these parameters
};

bool fits(const Watch& watch, const Replay& replay) {
  for (size_t i = 0; i < watch.tensors.size(); ++i) {
    if (watch.inputs[i] < 0) continue;
    const Expected& one = replay.inputs[watch.inputs[i]];
    if (one.read && !one.same(*reinterpret_cast<const c10::TensorImpl*>(watch.tensors[i].fields.data()))) return false;
  }
  const auto given = [&](int64_t i) { return std::binary_search(watch.bound->rest.begin(), watch.bound->rest.end(), i); };
  return std::all_of(replay.whole.begin(), replay.whole.end(), given);
}

std::shared_ptr<Replay> take_bound(const Watch& watch, at::ArrayRef<c10::IValue> rest) {
  Bound& bound = *watch.bound;
  const std::unique_lock lock(bound.executor.mutex, std::try_to_lock);
  if (!lock) return nullptr;
  auto& idle = bound.executor.idle;
  for (auto it = idle.begin(); it != idle.end(); ++it) {
    bool fitting = std::find(bound.known.begin(), bound.known.end(), *it) != bound.known.end();
    if (!fitting && fits(watch, **it)) bound.known.push_back(*it), fitting = true;
    for (size_t i = 0; fitting && i < rest.size(); ++i) {
      const Expected& one = (*it)->inputs[bound.rest[i]];
      fitting = rest[i].isTensor() && (!one.read || one.fits(rest[i].toTensor()));
    }
    if (!fitting) continue;
    std::shared_ptr<Replay> found = std::move(*it);
    idle.erase(it);
    return found;
  }
  return nullptr;
}

// The graph's results, or nothing where it has no replay that fits: then nothing was done. Right after the check of
// `watch`, whose parameters are its other inputs.
c10::List<Tensor> resume(const Watch& watch, at::ArrayRef<c10::IValue> rest) {
  c10::List<Tensor> results;
  std::vector<c10::Storage> memory;
  memory.swap(held.memory);
  if (std::exchange(held.watch, nullptr) != &watch || !watch.bound || rest.size() != watch.bound->rest.size())
    return results;
  const Bound& bound = *watch.bound;
  at::AutoDispatchBelowAutograd below;
  const Lent lent{take_bound(watch, rest)};
  Replay* const replay = lent.replay.get();
  if (!replay) return results;
  size_t count = 0;
  for (const int64_t input : watch.inputs) {
    if (input < 0) continue;
    void* const start = replay->inputs[input].written ? memory[count].mutable_data() : const_cast<void*>(memory[count].data());
    replay->bases[input] = static_cast<char*>(start) + bound.offsets[count];
    ++count;
  }
  std::vector<const Tensor*> given(bound.executor.inputs);
  for (size_t i = 0; i < rest.size(); ++i) {
    const int64_t input = bound.rest[i];
    given[input] = &rest[i].toTensor();
    replay->place(input, *given[input]);
  }
  if (replay->all_aligned()) results = replay->run(given.data());
  return results;
}

void boxed_resume(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const auto arguments = stack->end() - 2;
  c10::List<Tensor> results = resume(*reinterpret_cast<const Watch*>(arguments[1].toInt()), arguments[0].toListRef());
  stack->erase(arguments, stack->end());
  stack->emplace_back(std::move(results));
}

}  // namespace

// With the GIL held. From now on a check of the watch is for a call of the executor, of whose `n` inputs the tensors at `inputs` are the
// watch's; where there is null, a call gives them. 0: one of them is none of the watch's, or it is bound already.
extern "C" int gaws_bind(void* handle, const void* executor, int64_t n, const void* const* inputs) {
  Watch& watch = *static_cast<Watch*>(handle);
  if (watch.bound) return 0;  // another thread may be using it
  Bound bound{*static_cast<const Executor*>(executor), {}, {}, {}};
  std::unordered_map<const void*, int64_t> numbers;
  for (int64_t i = 0; i < n; ++i) {
    if (!inputs[i]) bound.rest.push_back(i);
    else if (!numbers.emplace(inputs[i], i).second) return 0;
  }
  std::vector<int64_t> found;
  for (const Metadata& one : watch.tensors) {
    const auto it = numbers.find(one.tensor);
    found.push_back(it == numbers.end() ? -1 : it->second);
    if (it == numbers.end()) continue;
    const auto& was = *reinterpret_cast<const c10::TensorImpl*>(one.fields.data());
    bound.offsets.push_back(was.storage_offset() * int64_t(was.itemsize()));
  }
  if (bound.offsets.size() != numbers.size()) return 0;
  watch.bound = std::make_shared<Bound>(std::move(bound));
  watch.inputs = std::move(found);
  return 1;
}

static const auto resuming = c10::Dispatcher::singleton().registerImpl(
    {"gaws::resume", ""}, c10::DispatchKey::CompositeImplicitAutograd,
    c10::KernelFunction::makeFromBoxedFunction<&boxed_resume>(), std::nullopt, nullptr, "gawscompile/runtime/replay.cpp");

// How many replays of it wait for a call: for tests.
extern "C" int64_t gaws_replays(const void* executor) { return int64_t(static_cast<const Executor*>(executor)->idle.size()); }
