// The op of compiled graphs that takes a snapshot of a bank without Python:
//
//     gaws::snapshot(Tensor state, SymInt rows, int modules, int width) -> Tensor
//
// What ``gaws::schedule`` returns (`banked.py`). A bank publishes the schedule that it has made for a batch of so many
// rows, with the number of what is active. A switch to what was active before finds its schedules again. When anything
// else changes, the bank retracts them all. What is not published, Python makes.
// The snapshot is a copy, as Inductor may write to it. It keeps what it is a copy of, by which the bank knows that
// somebody may still read the factors of that time.

#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <map>

namespace {

std::shared_mutex published_mutex;
const int published_at_fork = pthread_atfork(
    [] { published_mutex.lock(); }, [] { published_mutex.unlock(); }, [] { new (&published_mutex) std::shared_mutex; });
struct Schedules {
  int64_t active = 0;
  size_t bytes = 0;
  std::map<std::pair<int64_t, int64_t>, Tensor> made;  // by what is active and rows
};

auto& published = *new std::map<int64_t, Schedules>;  // by bank; of Python's memory, which may be gone at exit

constexpr size_t KEPT = 32 << 20;  // bytes of a bank's schedules, beyond which all but the newest one go

Tensor published_for(int64_t bank, int64_t rows) {
  std::shared_lock lock(published_mutex);
  const auto own = published.find(bank);
  if (own == published.end()) return Tensor();
  const auto it = own->second.made.find({own->second.active, rows});
  return it == own->second.made.end() ? Tensor() : it->second;
}

void snapshot(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const auto arguments = stack->end() - 4;
  const int64_t bank = *arguments[0].toTensor().const_data_ptr<int64_t>(), rows = arguments[1].toInt();
  const Tensor made = published_for(bank, rows);
  if (!made.defined()) {
    static const auto python = c10::Dispatcher::singleton().findSchemaOrThrow("gaws::schedule", "");
    python.callBoxed(stack);
    return;
  }
  const int64_t sizes[] = {arguments[2].toInt(), rows + 1, arguments[3].toInt(), made.size(-1)};
  TORCH_CHECK(made.sizes() == at::IntArrayRef(sizes), "gaws::snapshot: the graph was compiled for another bank");
  void* memory = nullptr;
  const size_t bytes = made.nbytes();
  TORCH_CHECK(posix_memalign(&memory, 64, std::max<size_t>(bytes, 64)) == 0, "gaws::snapshot: no memory");
  std::memcpy(memory, made.const_data_ptr(), bytes);
  Tensor copied = at::from_blob(
      memory, made.sizes(), [made](void* p) { std::free(p); }, at::TensorOptions(ScalarType::Int));
  stack->erase(arguments, stack->end());
  stack->emplace_back(std::move(copied));
}

const auto snapshot_registration = c10::Dispatcher::singleton().registerImpl(
    {"gaws::snapshot", ""}, c10::DispatchKey::CPU, c10::KernelFunction::makeFromBoxedFunction<&snapshot>(), std::nullopt,
    nullptr, "gawscompile/runtime/banks.cpp");

// gaws::publish(Tensor made, int bank, int rows, int active) -> ()
void publish(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const auto arguments = stack->end() - 4;
  Tensor made = arguments[0].toTensor();
  Schedules gone;
  {
    std::unique_lock lock(published_mutex);
    Schedules& own = published[arguments[1].toInt()];
    if (own.bytes + made.nbytes() > KEPT) std::swap(own, gone);
    own.active = arguments[3].toInt(), own.bytes += made.nbytes();
    std::swap(own.made[{own.active, arguments[2].toInt()}], made);
    if (made.defined()) own.bytes -= made.nbytes();
  }  // what was there before goes without the lock: that may wait for Python's
  stack->erase(arguments, stack->end());
}

const auto publish_registration = c10::Dispatcher::singleton().registerImpl(
    {"gaws::publish", ""}, c10::DispatchKey::CPU, c10::KernelFunction::makeFromBoxedFunction<&publish>(), std::nullopt,
    nullptr, "gawscompile/runtime/banks.cpp");

}  // namespace

// Nothing of a bank is valid any more.
extern "C" void gaws_retract(int64_t bank) {
  Schedules gone;  // as above
  std::unique_lock lock(published_mutex);
  if (const auto own = published.find(bank); own != published.end()) {
    gone = std::move(own->second);
    published.erase(own);
  }
  lock.unlock();
}

// Something else is active, of the number `active`, and all else is as before.
extern "C" void gaws_switch(int64_t bank, int64_t active) {
  std::unique_lock lock(published_mutex);
  if (const auto own = published.find(bank); own != published.end()) own->second.active = active;
}
