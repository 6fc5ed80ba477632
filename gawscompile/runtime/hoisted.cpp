// Operands that are hoisted, of `dispatch.cpp`, which follows: they are computed from sources among the op's arguments.
//
// In every call a checksum is taken of all sources (`codegen/checksum.cpp`, which stands in front): by gemv itself of what
// it reads, of everything else by all threads beforehand. Where one is another than when the operand was derived, that is
// done again. No tensor's version would do: it does not see `.data`, numpy, or what is done in inference mode.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

using at::Tensor;

namespace {

// Tensors by address: the dispatcher's own, or those of `kept`, which stay where they are as it grows.
struct Tensors {
  std::vector<const Tensor*> all;
  std::list<Tensor> kept;

  Tensors() = default;
  Tensors(Tensors&&) = default;  // a copy would point into this one
  const Tensor& operator[](size_t i) const { return *all[i]; }
  const Tensor* keep(Tensor t) { return &kept.emplace_back(std::move(t)); }
};

// A tensor that others are derived from.
struct Source {
  size_t argument;
  int64_t sum;   // at which gemv sums up its numbers as it reads them, or -1
  int64_t rows;  // that it hashes together, or 0: it does so by columns
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

using Values = std::vector<std::shared_ptr<const Derived::Value>>;  // one for each that is derived

// Of one program.
struct Hoisted {
  std::vector<Derived> derived;  // by rising operand
  std::vector<Source> sources;
  size_t sums;  // how many of the sources gemv sums up
};

std::shared_mutex values_mutex;

// What is known of all sources before their numbers are read.
std::vector<State> states_of(const Hoisted& hoisted, const Tensors& arguments) {
  std::vector<State> states;
  for (const Source& source : hoisted.sources) {
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
void read(const Hoisted& hoisted, const Tensors& arguments, std::vector<State>& states, bool summed_by_gemv) {
  struct Piece {
    const char* data;
    size_t bytes, unit, number, of;  // `number`: of its first unit
    uint64_t sum;
  };
  std::vector<Piece> pieces;
  std::list<Tensor> plain;  // keeps copies of what is not contiguous
  size_t total = 0;
  for (size_t of = 0; of < states.size(); ++of) {
    const Source& source = hoisted.sources[of];
    if ((source.sum >= 0) != summed_by_gemv) continue;
    const Tensor& t = arguments[source.argument];
    const char* data = static_cast<const char*>(
        (t.is_contiguous() ? t : plain.emplace_back(t.contiguous())).const_data_ptr());
    const size_t bytes = t.nbytes();
    size_t unit = PIECE;
    if (summed_by_gemv && bytes) unit = bytes / t.size(0) * (source.rows ? source.rows : Checksum::DEEP);
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
    const Source& source = hoisted.sources[piece.of];
    if (source.sum >= 0 && source.rows == 0) {
      const Tensor& t = arguments[source.argument];
      const int64_t n = t.size(1), row = int64_t(piece.number) * Checksum::DEEP;
      const int64_t end = row + int64_t(piece.bytes / (n * t.element_size()));
      sum.columns(piece.data - row * n * t.element_size(), n, t.element_size(), row, end, 0, n);
    } else for (size_t at = 0; at < piece.bytes; at += piece.unit)
      sum.add(piece.data + at, std::min(piece.unit, piece.bytes - at), piece.number + at / piece.unit);
    piece.sum = sum.folded();
  }
  for (const Piece& piece : pieces) states[piece.of].numbers += piece.sum;
}

std::vector<const void*> key_of(const Hoisted& hoisted, const Derived& d, const Tensors& arguments) {
  std::vector<const void*> key;
  for (size_t source : d.sources) key.push_back(arguments[hoisted.sources[source].argument].unsafeGetTensorImpl());
  return key;
}

// What was derived from sources in these states, or null. `unread`: the numbers that gemv sums up are still unknown.
std::shared_ptr<const Derived::Value> known(
    const Hoisted& hoisted, const Derived& d, const Tensors& arguments, const std::vector<State>& states, bool unread) {
  std::shared_lock lock(values_mutex);
  const auto it = d.values.find(key_of(hoisted, d, arguments));
  if (it == d.values.end()) return nullptr;
  for (size_t i = 0; i < d.sources.size(); ++i) {
    const State &then = it->second->states[i], &now = states[d.sources[i]];
    if (!then.same_tensor(now)) return nullptr;
    if (then.numbers != now.numbers && !(unread && hoisted.sources[d.sources[i]].sum >= 0)) return nullptr;
  }
  return it->second;
}

// The operands that are derived from `arguments`, all of whose numbers are read first, then computed anew where any
// source is no longer what it was. What is written in between shows as a checksum that does not agree.
Values derive(const Hoisted& hoisted, const Tensors& arguments, std::vector<State>& states) {
  read(hoisted, arguments, states, true);
  Values values;
  for (const Derived& d : hoisted.derived) {
    values.push_back(known(hoisted, d, arguments, states, false));
    if (values.back()) continue;
    c10::List<Tensor> sources;
    auto value = std::make_shared<Derived::Value>();
    for (size_t source : d.sources) {
      const Tensor& t = arguments[hoisted.sources[source].argument];
      sources.push_back(t);
      value->states.push_back(states[source]);
      value->alive.emplace_back(t.getIntrusivePtr());
    }
    const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow("gaws::derive", "");
    torch::jit::Stack stack{sources, d.recipe};
    op.callBoxed(stack);
    value->tensor = stack.back().toTensor();
    values.back() = value;
    std::unique_lock lock(values_mutex);
    for (auto it = d.values.begin(); it != d.values.end();) {
      const auto& all = it->second->alive;
      const bool gone = std::any_of(all.begin(), all.end(), [](const auto& one) { return one.expired(); });
      it = gone ? d.values.erase(it) : std::next(it);
    }
    d.values.insert_or_assign(key_of(hoisted, d, arguments), std::move(value));
  }
  return values;
}

// The same, where gemv will sum up what it reads: as long as nothing else speaks against it, what was derived before.
Values expected(const Hoisted& hoisted, const Tensors& arguments, std::vector<State>& states) {
  Values values;
  for (const Derived& d : hoisted.derived) {
    values.push_back(known(hoisted, d, arguments, states, true));
    if (!values.back()) return derive(hoisted, arguments, states);
  }
  return values;
}

// Whether gemv read the numbers from which its derived operands were computed.
bool agree(const Hoisted& hoisted, const Values& values, const std::vector<uint64_t>& sums) {
  for (size_t at = 0; at < values.size(); ++at) {
    const std::vector<size_t>& sources = hoisted.derived[at].sources;
    for (size_t i = 0; i < sources.size(); ++i) {
      const int64_t sum = hoisted.sources[sources[i]].sum;
      if (sum >= 0 && sums[sum] != values[at]->states[i].numbers) return false;
    }
  }
  return true;
}

}  // namespace
