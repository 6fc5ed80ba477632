// gaws::attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, str kernel, Tensor? sinks=None) -> Tensor
//
// Attention of few queries over unexpanded keys and values, by the kernel of that name (`codegen/attention.cpp`), which
// Python builds the first time. Part of the op's library: `executor.cpp` stands in front.

#include <ATen/ops/empty_like.h>

namespace {

// As `codegen/attention.cpp` has it.
struct AttendCall {
  const void *q, *k, *v, *mask;
  void* out;
  int64_t rows, heads, groups, queries, keys;
  int64_t qs[3], ks[3], vs[3], os[3], ms[4];
  int64_t kind;
  float scale;
  const void* sinks;
  int64_t step, wide;
};

struct Attention {
  void (*kernel)(const AttendCall*);
  int64_t features;
  ScalarType dtype;
};

std::unordered_map<std::string, Attention> attentions;  // under the programs' mutex; none is ever replaced

const Attention& attention(const std::string& text) {
  for (int attempt = 0;; ++attempt) {
    {
      std::shared_lock lock(mutex);
      const auto it = attentions.find(text);
      if (it != attentions.end()) return it->second;
    }
    TORCH_CHECK(resolver && attempt == 0, "gaws::attend: no kernel was registered for: ", text);
    const char* error = resolver(text.c_str());
    TORCH_CHECK(error == nullptr, "gaws::attend: ", error ? error : "");
  }
}

// [rows, heads, tokens, features], each token's features one after the other.
Tensor laid_out(const Tensor& t, const Attention& kernel, const char* name) {
  TORCH_CHECK(
      t.dim() == 4 && t.size(3) == kernel.features && t.scalar_type() == kernel.dtype && t.is_cpu(), "gaws::attend: ", name,
      " is ", t.scalar_type(), " of ", t.sizes(), "; the kernel takes ", kernel.dtype, " of ", kernel.features, " features");
  return t.stride(3) == 1 ? t : t.contiguous();
}

void place(const Tensor& t, int64_t* strides) {
  for (int d = 0; d < 3; ++d) strides[d] = t.stride(d);
}

// A call but for its pointers, and for how its result lies.
AttendCall described(
    const Attention& kernel, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* mask, double scale,
    const Tensor* sinks) {
  const int64_t rows = q.size(0), heads = q.size(1), queries = q.size(2), groups = k.size(1), keys = k.size(2);
  TORCH_CHECK(
      k.size(0) == rows && v.sizes() == k.sizes() && groups > 0 && heads % groups == 0, "gaws::attend: q is ", q.sizes(),
      ", k ", k.sizes(), ", v ", v.sizes());
  AttendCall call{};
  place(q, call.qs), place(k, call.ks), place(v, call.vs);
  if (mask) {
    const bool said = mask->scalar_type() == ScalarType::Bool, added = mask->scalar_type() == ScalarType::Float;
    call.kind = said ? 1 : added ? 3 : 2;
    const int64_t whole[] = {rows, heads, queries, keys};
    bool fits = mask->dim() == 4 && (said || added || mask->scalar_type() == kernel.dtype);
    for (int d = 0; fits && d < 4; ++d) {
      fits = mask->size(d) == 1 || mask->size(d) == whole[d];
      call.ms[d] = mask->size(d) == 1 ? 0 : mask->stride(d);
    }
    TORCH_CHECK(fits, "gaws::attend: the mask is ", mask->scalar_type(), " of ", mask->sizes());
  }
  if (sinks) {
    call.wide = sinks->scalar_type() == ScalarType::Float;
    TORCH_CHECK(
        sinks->dim() == 1 && sinks->size(0) == heads && (call.wide || sinks->scalar_type() == kernel.dtype),
        "gaws::attend: the sinks are ", sinks->scalar_type(), " of ", sinks->sizes(), " for ", heads, " heads");
    call.step = sinks->stride(0);
  }
  call.rows = rows, call.heads = heads, call.groups = groups, call.queries = queries, call.keys = keys;
  call.scale = float(scale);
  return call;
}

Tensor attend(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const c10::IValue& mask_, double scale, const std::string& text,
    const c10::IValue& sinks_) {
  const Attention& kernel = attention(text);
  const Tensor q = laid_out(q_, kernel, "q"), k = laid_out(k_, kernel, "k"), v = laid_out(v_, kernel, "v");
  const Tensor* mask = mask_.isNone() ? nullptr : &mask_.toTensor();
  const Tensor* sinks = sinks_.isNone() ? nullptr : &sinks_.toTensor();
  AttendCall call = described(kernel, q, k, v, mask, scale, sinks);
  Tensor out = q.is_non_overlapping_and_dense()
      ? fresh_strided(q.sizes(), q.strides(), kernel.dtype)
      : at::empty_like(q);
  // of queries that overlap: `cpp_attention.result_of` has the same rule
  if (out.stride(3) != 1) out = at::empty_like(q, at::TensorOptions(), at::MemoryFormat::Contiguous);
  place(out, call.os);
  if (mask) call.mask = mask->const_data_ptr();
  if (sinks) call.sinks = sinks->const_data_ptr();
  call.q = q.const_data_ptr(), call.k = k.const_data_ptr(), call.v = v.const_data_ptr();
  call.out = out.mutable_data_ptr();
  if (out.numel()) kernel.kernel(&call);
  return out;
}

void boxed_attend(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const auto a = stack->end() - 7;
  Tensor out = attend(a[0].toTensor(), a[1].toTensor(), a[2].toTensor(), a[3], a[4].toDouble(), a[5].toStringRef(), a[6]);
  stack->erase(a, stack->end());
  stack->emplace_back(std::move(out));
}

}  // namespace

extern "C" void gaws_register_attention(const char* text, void* kernel, int64_t features, int32_t dtype) {
  std::unique_lock lock(mutex);
  attentions.emplace(text, Attention{reinterpret_cast<void (*)(const AttendCall*)>(kernel), features, ScalarType(dtype)});
}

static const auto attending = c10::Dispatcher::singleton().registerImpl(
    {"gaws::attend", ""}, c10::DispatchKey::CPU, c10::KernelFunction::makeFromBoxedFunction<&boxed_attend>(), std::nullopt,
    nullptr, "gawscompile/runtime/attention.cpp");
