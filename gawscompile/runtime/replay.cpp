// Runs a graph as `layout.cpp`, which stands in front, has laid it out; where an input has other sizes, strides, dispatch keys
// or another dtype, it is laid out anew. Or nothing is done, and the graph's steps are run one by one.

namespace {

constexpr size_t MOST_TRIES = 4;  // to lay an executor out, each for a thread or for another kind of inputs

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
  executor.why_not = "";
  try {
    return std::make_shared<Replay>(executor, given);
  } catch (const NotLaidOut& error) {
    executor.why_not = error.why;
  } catch (const c10::Error&) {  // the ordinary way raises it
    executor.why_not = "an input does not fit";
  }
  return nullptr;
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
  Memory memory;
  memory.all.swap(held.memory.all);
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
    const c10::Storage& storage = memory.all[count];
    void* const start = replay->inputs[input].written ? storage.mutable_data() : const_cast<void*>(storage.data());
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

// With the GIL held. From now on a check of the watch is for a call of the executor, of whose `n` inputs the tensors at
// `inputs` are the watch's; where there is null, a call gives them. 0: one of them is given twice or is none of the
// watch's, or the watch is bound already.
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
extern "C" int64_t gaws_replays(const void* executor) {
  return int64_t(static_cast<const Executor*>(executor)->idle.size());
}

extern "C" const char* gaws_why_not(const void* executor) { return static_cast<const Executor*>(executor)->why_not; }
