// Memory for large tensors, in an arena of their own that keeps its pages: torch's CPU allocator from `memory.py` on.
//
// A training step frees large tensors and asks for the same ones again. The C library either gives their pages back,
// and has them mapped and zeroed again at the next touch, or keeps them in its heap, between small blocks that outlive
// the step: there a freed block does not merge with its neighbours, and the next large tensor finds no hole that fits.
// Here are no small blocks, and neighbours always merge, so that the arena ends little above the most that ever lived.
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace {

constexpr size_t LARGE = 64 << 10;  // of fewer bytes: the C library's, which maps none below 128 KiB on their own
constexpr size_t ALIGNMENT = 64;    // torch's, a cache line
constexpr size_t GROWTH = 64 << 20;

constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Addresses for as much as the machine has memory, reserved at once so that all blocks are neighbours; the system gives
// pages when they are touched. Of the free blocks that are large enough the smallest is taken, the lowest of such: what
// was never used is the largest, the last to be touched.
class Arena {
 public:
  Arena() : size_(static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE)) {
    void* reserved = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reserved == MAP_FAILED) return;
    madvise(reserved, size_, MADV_HUGEPAGE);  // fewer misses of the TLB; where the system has none, nothing is lost
    begin_ = end_ = static_cast<char*>(reserved);
    add_free(begin_, size_);
  }

  bool exists() const { return begin_; }
  bool holds(const char* address) const { return begin_ <= address && address < begin_ + size_; }

  // Null where the arena or the system has no more.
  void* take(size_t n) {
    n = round_up(n, ALIGNMENT);
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto fit = free_.lower_bound({n, nullptr});
    if (fit == free_.end()) return nullptr;
    const auto [size, block] = *fit;
    if (!open_up_to(block + n)) return nullptr;
    free_.erase(fit);
    blocks_[block] = {n, false};
    if (size > n) add_free(block + n, size - n);
    return block;
  }

  void give_back(char* address) {
    const std::lock_guard<std::mutex> guard(mutex_);
    auto block = blocks_.find(address);
    size_t size = block->second.size;
    if (const auto next = std::next(block); next != blocks_.end() && next->second.is_free) size += remove_free(next);
    if (block != blocks_.begin() && std::prev(block)->second.is_free) {
      const auto previous = std::prev(block);
      blocks_.erase(block);
      address = previous->first;
      size += remove_free(previous);
    }
    add_free(address, size);
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Block {
    size_t size;
    bool is_free;
  };
  using Blocks = std::map<char*, Block>;

  void add_free(char* address, size_t size) {
    blocks_[address] = {size, true};
    free_.insert({size, address});
  }

  size_t remove_free(Blocks::iterator block) {
    const auto [address, size] = std::pair(block->first, block->second.size);
    free_.erase({size, address});
    blocks_.erase(block);
    return size;
  }

  // Lets the addresses below `end` be used: a piece at a time, since a system that does not overcommit counts them.
  bool open_up_to(char* end) {
    if (end <= end_) return true;
    const size_t more = std::min(round_up(end - end_, GROWTH), static_cast<size_t>(begin_ + size_ - end_));
    if (mprotect(end_, more, PROT_READ | PROT_WRITE) != 0) return false;
    end_ += more;
    return true;
  }

  const size_t size_;
  char* begin_ = nullptr;
  char* end_ = nullptr;                       // of what may be used
  Blocks blocks_;                             // all of them, each beginning where the one before ends
  std::set<std::pair<size_t, char*>> free_;  // by size, then by address
  std::mutex mutex_;
};

// Neither is ever destroyed: tensors may be freed when the process ends, after everything else.
Arena* arena = nullptr;
c10::Allocator* standard = nullptr;

void give_back(void* address) {
  const auto block = static_cast<char*>(address);
  if (!arena->holds(block)) return standard->raw_deallocate(address);
  c10::profiledCPUMemoryReporter().Delete(address);
  arena->give_back(block);
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    void* address = n < LARGE ? nullptr : arena->take(n);
    if (address)
      c10::profiledCPUMemoryReporter().New(address, n);
    else
      address = standard->raw_allocate(n);
    return {address, address, give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return give_back; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

const char* install() {
  standard = c10::GetCPUAllocator();
  if (!standard->raw_deleter()) return "torch has an allocator whose blocks no other can free";
  arena = new Arena;
  if (!arena->exists()) return "the system reserves no addresses (ulimit -v?)";
  // A child has the arena as it was at the fork, so no other thread may be half through with it then.
  if (pthread_atfork([] { arena->lock(); }, [] { arena->unlock(); }, [] { arena->unlock(); }) != 0)
    return "the system has no memory";
  // glibc maps and unmaps blocks of 128 KiB and more (decoded images, say) one by one until a larger one is freed; from
  // then on it keeps all up to that size in its heap. Torch's large tensors, which taught it that, no longer come.
  standard->raw_deallocate(standard->raw_allocate(31 << 20));
  auto* const ours = new Allocator;
  c10::SetCPUAllocator(ours);
  return c10::GetCPUAllocator() == ours ? nullptr : "torch has an allocator of higher priority";
}

}  // namespace

// Makes it torch's allocator for what is allocated from now on. Returns why not, or null; the same at every call.
extern "C" const char* fastln_keep_memory() {
  static const char* const refusal = install();
  return refusal;
}
