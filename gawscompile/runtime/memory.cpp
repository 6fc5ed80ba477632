// Memory of what kernels write. When a tensor dies, its block of 1 to 32 MB is kept for the next tensor of about its size.
// The C library would give the block back to the system, and the system zeroes each page of the next one in a fault.
// At most MOST_KEPT bytes are kept in the whole process; then the oldest blocks go. Larger blocks are not kept: the C
// library does not keep them either, and an idle one (a step's logits) would add to the process's peak.
//
// A process that trains keeps blocks of any size from 1 MB on, as a step writes what the step before wrote. Blocks in use
// and kept ones together take no more than blocks in use did at once since the backward before the last began.
//
// Part of the op's library, which `links torch`, in front of all others.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

namespace {

constexpr size_t LARGE = size_t(1) << 20, LARGEST = size_t(32) << 20, MOST_KEPT = size_t(128) << 20;

struct Block {
  c10::DataPtr memory;
  size_t bytes;
};

// A caller that finds the lock taken allocates or frees as if nothing were kept. In a forked child the lock may be one that
// another thread of the parent held, and would never be free.
class Kept {
  using Blocks = std::vector<std::unique_ptr<Block>>;

 public:
  // A backward begins.
  void train() {
    trains_ = true;
    before_ = most_used_.exchange(used_);
  }

  // Gives all back to the system.
  void release(bool trained = false) {
    if (trained) trains_ = false, before_ = 0, most_used_ = size_t(used_);
    Blocks gone;  // without the lock
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    gone.swap(blocks_);
    bytes_ = 0;
  }

  bool takes(size_t bytes) const { return bytes >= LARGE && (bytes <= LARGEST || trains_); }

  // The smallest of at least `bytes` and less than twice as many, or none. In training, of a quarter more at most.
  std::unique_ptr<Block> take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const size_t end = trains_ ? bytes + bytes / 4 : 2 * bytes;
    auto best = blocks_.end();
    for (auto it = blocks_.begin(); it != blocks_.end(); ++it)
      if ((*it)->bytes >= bytes && (*it)->bytes < end && (best == blocks_.end() || (*it)->bytes < (*best)->bytes)) best = it;
    if (best == blocks_.end()) return nullptr;
    std::unique_ptr<Block> found = std::move(*best);
    blocks_.erase(best);
    bytes_ -= found->bytes;
    return found;
  }

  // A block of so many bytes is in use, kept before or new.
  void use(size_t bytes) {
    const size_t used = used_ += bytes;
    size_t most = most_used_;
    while (most < used && !most_used_.compare_exchange_weak(most, used)) {}
    if (trains_) keep(nullptr);
  }

  // A block that is no longer in use is kept. Without a block: more are in use now, and fewer may be kept.
  void keep(std::unique_ptr<Block> block) {
    Blocks gone;  // without the lock
    if (block) used_ -= block->bytes;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    if (block) {
      bytes_ += block->bytes;
      blocks_.push_back(std::move(block));
    }
    const size_t most = allowed();
    while (bytes_ > most) {
      const auto out = trains_ ? smallest(bytes_ - most) : blocks_.begin();
      bytes_ -= (*out)->bytes;
      gone.push_back(std::move(*out));
      blocks_.erase(out);
    }
  }

  int64_t bytes() {
    const std::unique_lock lock(mutex_);
    return int64_t(bytes_);
  }

 private:
  size_t allowed() const {
    if (!trains_) return MOST_KEPT;
    const size_t used = used_, once = std::max(size_t(most_used_), size_t(before_));
    return once > used ? once - used : 0;
  }

  // The smallest block of at least `bytes`, else the largest: a step's logits do not go to make room for a megabyte.
  Blocks::iterator smallest(size_t bytes) {
    return std::min_element(blocks_.begin(), blocks_.end(), [&](const auto& a, const auto& b) {
      const bool enough = a->bytes >= bytes;
      return enough != (b->bytes >= bytes) ? enough : enough ? a->bytes < b->bytes : a->bytes > b->bytes;
    });
  }

  std::mutex mutex_;
  Blocks blocks_;  // the oldest first
  size_t bytes_ = 0;
  std::atomic<size_t> used_ = 0, most_used_ = 0, before_ = 0;  // bytes: now; most since a backward began; most before
  std::atomic<bool> trains_ = false;
};

Kept& kept = *new Kept;  // tensors may outlive the library's variables

struct Keeping final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!kept.takes(bytes)) return fresh_memory(bytes);
    std::unique_ptr<Block> block = kept.take(bytes);
    if (!block) block.reset(new Block{fresh_memory(bytes), bytes});
    kept.use(block->bytes);
    void* const data = block->memory.get();
    return {data, block.release(), &free, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // what it is given is not what it allocates
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static c10::DataPtr fresh_memory(size_t bytes) {
    try {
      return c10::GetCPUAllocator()->allocate(bytes);
    } catch (const c10::Error&) {  // there is no more, unless what is kept makes room
      kept.release();
      return c10::GetCPUAllocator()->allocate(bytes);
    }
  }
  static void free(void* block) { kept.keep(std::unique_ptr<Block>(static_cast<Block*>(block))); }
};

Keeping& keeping = *new Keeping;

at::Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_generic(sizes, &keeping, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

at::Tensor fresh_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  return at::detail::empty_strided_generic(
      sizes, strides, &keeping, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
}

}  // namespace

// Bytes that are kept and belong to no tensor.
extern "C" int64_t gaws_kept() { return kept.bytes(); }

// Gives that back to the system. Until its next backward the process does not train.
extern "C" void gaws_release() { kept.release(true); }
