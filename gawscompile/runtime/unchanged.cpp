
// ---- whether anything changed in a model since its guards last held (`unchanged.py`) ---------------------------------
//
// A watch holds addresses, and no references. Its words and lists come in the order in which one reaches them from the
// root: while all before it are unchanged, a dictionary, a list or an object is alive, and so is all else once all are.

#include <c10/core/TensorImpl.h>

namespace {

// A tensor's sizes, strides, offset, dtype, device, flags and dispatch keys lie next to each other, last in its
// implementation, and are compared as bytes. Not the address of its numbers: calls read it anew.
struct Metadata {
  const c10::TensorImpl* const* slot;  // where the Python tensor keeps its implementation
  const c10::TensorImpl* tensor;
  std::array<const void*, 2> behind;  // where it last had its storage and what autograd keeps: to be asked for, not read
  size_t bytes;                       // that its storage must hold
  bool gradient;
  alignas(c10::TensorImpl) std::array<char, sizeof(c10::TensorImpl)> fields;  // and all before them, as it was
};

// CPython's list: what it holds can be exchanged, and so can the array that holds it.
struct List {
  uint64_t references, type, size;
  const uint64_t* items;
};

struct Items {
  const List* list;
  const uint64_t* place;  // where its items lay: to be asked for, not read
  size_t behind, first, size;  // how many words come before it; which of all lists' items are its own
};

// Of a watch over parameters that a graph is to be run with (`replay.cpp`).
struct Bound;

struct Watch {
  std::vector<std::pair<const uint64_t*, uint64_t>> words;  // versions of dictionaries; classes of objects, and which dictionary each has
  std::vector<Items> lists;
  std::vector<uint64_t> items;  // of all lists
  std::vector<Metadata> tensors;
  size_t from;  // where the fields begin
  std::vector<int64_t> inputs;  // which input of that graph each tensor is, or -1; empty where there is no graph
  std::shared_ptr<Bound> bound;
};

constexpr size_t DISTANCE = 24;  // entries ahead of which memory is asked for: after a step nothing is in a cache

// Storages that are held for a while. A reference is given back in memory that nothing has read since the step.
struct Memory {
  std::vector<c10::Storage> all;

  ~Memory() { clear(); }
  void clear() {
    for (size_t i = 0; i < all.size(); ++i) {
      if (i + DISTANCE < all.size()) __builtin_prefetch(all[i + DISTANCE].unsafeGetStorageImpl(), 1);
      all[i] = c10::Storage();
    }
    all.clear();
  }
};

// What a call takes over from the check before it: the memory of the inputs that a watch has found unchanged, in their
// order among its tensors. Another thread may replace a parameter meanwhile.
struct Held {
  const Watch* watch = nullptr;
  Memory memory;
};

thread_local Held held;

size_t fields_of(const c10::TensorImpl& t) {
  return size_t(reinterpret_cast<const char*>(t.sizes().data()) - reinterpret_cast<const char*>(&t)) - sizeof(size_t);
}

// Whether an implementation's fields can be compared: its sizes are numbers, and few enough to lie in it.
bool comparable(const c10::TensorImpl& t) {
  return !t.has_symbolic_sizes_strides() && t.has_storage() && fields_of(t) < sizeof t;
}

size_t needed(const c10::TensorImpl& t) {
  int64_t last = t.storage_offset();
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.sizes()[d] - 1) * t.strides()[d];
  return t.numel() ? size_t(last + 1) * t.itemsize() : 0;
}

bool same(const Watch& watch, size_t i) {
  constexpr size_t AHEAD = 4;  // lists are few among the words
  if (i + AHEAD < watch.lists.size()) {
    __builtin_prefetch(watch.lists[i + AHEAD].list);
    __builtin_prefetch(watch.lists[i + AHEAD].place);
  }
  const Items& one = watch.lists[i];
  const auto was = watch.items.begin() + one.first;
  return one.list->size == one.size && std::equal(was, was + one.size, one.list->items);
}

}  // namespace

// No call follows the check: what it has this thread hold is let go.
extern "C" void gaws_let_go() {
  held.watch = nullptr;
  held.memory.clear();
}

// A watch over `words`, the tensors at `slots` and `lists`, as they are now; null where a tensor cannot be one's.
extern "C" void* gaws_watch(int64_t n, const uint64_t* const* words, int64_t m, const void* const* slots, int64_t k,
                            const void* const* lists, const int64_t* behind) {
  auto watch = std::make_unique<Watch>();
  for (int64_t i = 0; i < n; ++i) watch->words.emplace_back(words[i], *words[i]);
  for (int64_t i = 0; i < k; ++i) {
    const auto list = static_cast<const List*>(lists[i]);
    watch->lists.push_back({list, list->items, size_t(behind[i]), watch->items.size(), list->size});
    watch->items.insert(watch->items.end(), list->items, list->items + list->size);
  }
  for (int64_t i = 0; i < m; ++i) {
    const auto slot = static_cast<const c10::TensorImpl* const*>(slots[i]);
    const c10::TensorImpl& t = **slot;
    if (!comparable(t) || t.unsafe_storage().nbytes() < needed(t)) return nullptr;
    watch->from = fields_of(t);
    const std::array<const void*, 2> behind{t.unsafe_storage().unsafeGetStorageImpl(), t.autograd_meta()};
    watch->tensors.push_back({slot, &t, behind, needed(t), t.requires_grad(), {}});
    std::memcpy(watch->tensors.back().fields.data(), &t, sizeof t);
  }
  if (held.watch == watch.get()) gaws_let_go();  // an older one's, of that address
  return watch.release();
}

static bool unchanged(const Watch& watch, Memory& memory) {
  memory.all.reserve(watch.inputs.size());
  size_t list = 0;
  for (size_t i = 0; i < watch.words.size(); ++i) {
    if (i + DISTANCE < watch.words.size()) __builtin_prefetch(watch.words[i + DISTANCE].first);
    for (; list < watch.lists.size() && watch.lists[list].behind <= i; ++list)
      if (!same(watch, list)) return false;
    if (*watch.words[i].first != watch.words[i].second) return false;
  }
  for (; list < watch.lists.size(); ++list)
    if (!same(watch, list)) return false;
  for (size_t i = 0; i < watch.tensors.size(); ++i) {
    if (i + DISTANCE < watch.tensors.size()) {
      const Metadata& later = watch.tensors[i + DISTANCE];
      const char* ahead = reinterpret_cast<const char*>(later.tensor);  // asked for, not read
      __builtin_prefetch(later.slot);
      __builtin_prefetch(ahead);
      for (size_t at = watch.from; at < sizeof *later.tensor; at += 64) __builtin_prefetch(ahead + at);
      for (const void* one : later.behind) __builtin_prefetch(one);
      __builtin_prefetch(static_cast<const char*>(later.behind[0]) + 64);
    }
    const Metadata& one = watch.tensors[i];
    const c10::TensorImpl* t = one.tensor;
    if (*one.slot != t) return false;
    const char* now = reinterpret_cast<const char*>(t);
    if (std::memcmp(now + watch.from, one.fields.data() + watch.from, sizeof *t - watch.from) != 0) return false;
    if (t->unsafe_storage().nbytes() < one.bytes || t->requires_grad() != one.gradient) return false;
    if (!watch.inputs.empty() && watch.inputs[i] >= 0) memory.all.push_back(t->unsafe_storage());
  }
  return true;
}

// Whether all is as it was. The caller holds the GIL.
extern "C" int gaws_unchanged(const void* handle) {
  const Watch& watch = *static_cast<const Watch*>(handle);
  if (watch.inputs.empty()) return unchanged(watch, held.memory);  // a call asks several watches; one is bound
  held.memory.clear();
  const bool same = unchanged(watch, held.memory);
  if (!same) held.memory.clear();
  held.watch = same ? &watch : nullptr;
  return same;
}

extern "C" void gaws_unwatch(void* handle) {
  if (held.watch == handle) gaws_let_go();
  delete static_cast<Watch*>(handle);
}
