// An arena for large tensors that keeps its pages; `memory.py` makes it torch's CPU allocator, and undoes that.
//
// A training step frees large tensors and asks for the same ones again. The C library does one of two things. It gives
// their pages back, and the system maps and zeroes them again at the next touch. Or it keeps them in its heap, between
// small blocks that outlive the step: there a freed block does not merge with its neighbours, and the next large tensor
// finds no hole that fits. The arena holds no small blocks, and free neighbours always merge. So it ends little above
// the most that ever lived at once.
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace {

constexpr size_t LARGE = 64 << 10;  // smaller ones go to the C library, which maps none below 128 KiB on their own
constexpr size_t ALIGNMENT = 64;    // torch's, a cache line
constexpr size_t GROWTH = 64 << 20;

constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// It reserves all its addresses at once, so that all blocks are neighbours; the system gives pages when they are
// touched. `take` chooses the smallest free block that is large enough, and among equals the lowest. What was never
// used is the largest block, so it is touched last. Not thread-safe: callers hold `mutex`.
class Arena {
 public:
  explicit Arena(size_t size) : size_(size) {
    void* reserved = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reserved == MAP_FAILED) return;
    madvise(reserved, size_, MADV_HUGEPAGE);  // fewer misses of the TLB; a system without huge pages refuses, no harm
    begin_ = end_ = static_cast<char*>(reserved);
    add_free(begin_, size_);
  }
  ~Arena() {
    if (begin_) munmap(begin_, size_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  size_t size() const { return size_; }
  bool exists() const { return begin_; }
  bool is_unused() const { return blocks_.size() == 1 && blocks_.begin()->second.is_free; }
  bool holds(const char* address) const { return begin_ <= address && address < begin_ + size_; }

  // Null where the arena or the system has no more.
  void* take(size_t n) {
    n = round_up(n, ALIGNMENT);
    const auto fit = free_.lower_bound({n, nullptr});
    if (fit == free_.end()) return nullptr;
    const auto [size, block] = *fit;
    if (!open_up_to(block + n)) return nullptr;
    free_.erase(fit);
    blocks_[block] = {n, false};
    if (size > n) add_free(block + n, size - n);
    return block;
  }

  // Returns where the free block begins that the freed one is now a part of.
  char* give_back(char* address) {
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
    return address;
  }

  // Gives a free block's pages back to the system; its addresses stay the arena's.
  void drop_pages(char* block) {
    static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    char* const end = std::min(block + blocks_.at(block).size, end_);
    const size_t before = (page - reinterpret_cast<uintptr_t>(block) % page) % page;  // of a page that others share
    const size_t after = reinterpret_cast<uintptr_t>(end) % page;
    if (end > block + before + after) madvise(block + before, end - block - before - after, MADV_DONTNEED);
  }

  void drop_free_pages() {
    for (const auto& [size, block] : free_) drop_pages(block);
  }

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

  // Makes the addresses below `end` usable: a piece at a time, since a system that does not overcommit counts them.
  bool open_up_to(char* end) {
    if (end <= end_) return true;
    const size_t more = std::min(round_up(end - end_, GROWTH), static_cast<size_t>(begin_ + size_ - end_));
    if (mprotect(end_, more, PROT_READ | PROT_WRITE) != 0) return false;
    end_ += more;
    return true;
  }

  const size_t size_;
  char* begin_ = nullptr;
  char* end_ = nullptr;                       // of what is usable
  Blocks blocks_;                             // all of them; each begins where the one before ends
  std::set<std::pair<size_t, char*>> free_;  // by size, then by address
};

// None of these is ever destroyed: tensors may be freed when the process ends, after everything else.
std::mutex mutex;                    // guards the next four
size_t n_users = 0;                  // torch's allocator is ours while there is one
Arena* arena = nullptr;              // there while it has users, or blocks that outlive the last user
c10::Allocator* standard = nullptr;  // torch's, from the first install on
c10::Allocator* ours = nullptr;

// Call while nobody uses the arena.
void retire() {
  if (!arena->is_unused()) return arena->drop_free_pages();
  delete arena;
  arena = nullptr;
}

bool is_in_arena(void* address) {
  const std::lock_guard<std::mutex> guard(mutex);
  return arena && arena->holds(static_cast<char*>(address));
}

void give_back(void* address) {
  if (!is_in_arena(address)) return standard->raw_deallocate(address);
  c10::profiledCPUMemoryReporter().Delete(address);
  const std::lock_guard<std::mutex> guard(mutex);
  char* const block = arena->give_back(static_cast<char*>(address));
  if (n_users > 0) return;
  if (arena->is_unused())
    retire();
  else
    arena->drop_pages(block);
}

// Tensors from before the last release still ask it when they grow; then it passes them on.
class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    void* const address = n < LARGE ? nullptr : take(n);
    if (!address) return standard->allocate(n);
    c10::profiledCPUMemoryReporter().New(address, n);
    return {address, address, give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return give_back; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }

 private:
  static void* take(size_t n) {
    const std::lock_guard<std::mutex> guard(mutex);
    return n_users > 0 ? arena->take(n) : nullptr;
  }
};

// Why torch's allocator cannot be replaced now, or null.
const char* obstacle() {
  if (n_users > 0) return nullptr;
  c10::Allocator* const now = c10::GetCPUAllocator();
  if (standard && now != standard) return "torch's allocator was replaced by another one meanwhile";
  if (!now->raw_deleter()) return "torch has an allocator whose blocks no other can free";
  return nullptr;
}

// At the first install. Returns why it failed, or null.
const char* prepare() {
  if (ours) return nullptr;
  // A child gets the arena as it is at the fork, so no other thread may be half through a change of it then.
  if (pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); }) != 0)
    return "the system has no memory for a handler of forks";
  standard = c10::GetCPUAllocator();
  ours = new Allocator;
  // glibc maps and unmaps blocks of 128 KiB and more (decoded images, say) one by one until a larger one is freed; from
  // then on it keeps all up to that size in its heap. Without the arena torch's first large tensors teach it that.
  standard->raw_deallocate(standard->raw_allocate(31 << 20));
  return nullptr;
}

}  // namespace

// Why the arena cannot become torch's allocator, or null. Changes nothing.
extern "C" const char* fastln_arena_obstacle() {
  const std::lock_guard<std::mutex> guard(mutex);
  return obstacle();
}

// How many users the arena has now.
extern "C" size_t fastln_arena_users() {
  const std::lock_guard<std::mutex> guard(mutex);
  return n_users;
}

// Counts one user more. For the first it reserves `size` bytes of addresses, makes the arena torch's allocator for what
// is allocated from now on, and sets `*reserved` to the arena's size (else to 0). Returns why it failed, or null.
extern "C" const char* fastln_install_arena(size_t size, size_t* reserved) {
  const std::lock_guard<std::mutex> guard(mutex);
  *reserved = 0;
  if (n_users > 0) {
    ++n_users;
    return nullptr;
  }
  if (const char* const why = obstacle()) return why;
  if (const char* const why = prepare()) return why;
  if (!arena) arena = new Arena(size);
  if (!arena->exists()) {
    delete arena;
    arena = nullptr;
    return "the system does not reserve that many addresses (see ulimit -v)";
  }
  c10::SetCPUAllocator(ours);
  if (c10::GetCPUAllocator() != ours) {
    retire();
    return "torch has an allocator of higher priority";
  }
  n_users = 1;
  *reserved = arena->size();
  return nullptr;
}

// Counts one user less. The last one gives torch its standard allocator back and the system all pages that hold no
// tensor; the pages and addresses of tensors that live on follow when these are freed.
extern "C" void fastln_release_arena() {
  const std::lock_guard<std::mutex> guard(mutex);
  if (n_users == 0 || --n_users > 0) return;
  if (c10::GetCPUAllocator() == ours) c10::SetCPUAllocator(standard);
  retire();
}
