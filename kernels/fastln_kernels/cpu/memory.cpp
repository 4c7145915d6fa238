// An arena for large tensors that keeps its pages. `memory.py` makes it torch's CPU allocator, and undoes that.
//
// A training step frees large tensors and allocates the same ones again. The C library does one of two things. It
// returns their pages to the system, which maps and zeroes them again at the next access. Or it keeps them in its heap,
// between small blocks that outlive the step. There a freed block does not merge with its neighbours, and the next
// large tensor finds no gap that fits. The arena holds no small blocks, and free neighbours always merge. So it grows
// little beyond the largest total size of live tensors.
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

constexpr size_t LARGE = 64 << 10;  // smaller blocks go to the C library, which maps none below 128 KiB separately
constexpr size_t ALIGNMENT = 64;    // a cache line, as in torch
constexpr size_t GROWTH = 64 << 20;

constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// The arena reserves its whole address range at once, so that all blocks are adjacent. The system provides pages at
// first access. `take` chooses the smallest free block that is large enough, and the lowest of equal ones. Unused
// address space is the largest block, so it is used last. Not thread-safe: callers hold `mutex`.
class Arena {
 public:
  explicit Arena(size_t size) : size_(size) {
    void* reserved = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reserved == MAP_FAILED) return;
    madvise(reserved, size_, MADV_HUGEPAGE);  // fewer TLB misses; fails harmlessly on systems without huge pages
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

  // Returns null if the arena or the system has no more memory.
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

  // Returns the start of the free block that now contains the freed block.
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

  // Returns a free block's pages to the system. The arena keeps the addresses.
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

  // Makes the addresses below `end` usable, piece by piece, because a system without overcommit counts them.
  bool open_up_to(char* end) {
    if (end <= end_) return true;
    const size_t more = std::min(round_up(end - end_, GROWTH), static_cast<size_t>(begin_ + size_ - end_));
    if (mprotect(end_, more, PROT_READ | PROT_WRITE) != 0) return false;
    end_ += more;
    return true;
  }

  const size_t size_;
  char* begin_ = nullptr;
  char* end_ = nullptr;                       // end of the usable addresses
  Blocks blocks_;                             // all blocks; each begins at the end of the previous one
  std::set<std::pair<size_t, char*>> free_;  // by size, then by address
};

// These are never destroyed, because tensors may be freed at the end of the process, after everything else.
std::mutex mutex;                    // guards the next four
size_t n_users = 0;                  // while it is not 0, torch uses our allocator
Arena* arena = nullptr;              // exists while it has users, or blocks that outlive the last user
c10::Allocator* standard = nullptr;  // torch's own, set at the first install
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

// After a release, tensors of this allocator still use it when they grow. It then forwards to torch's allocator.
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

// Returns why torch's allocator cannot be replaced now, or null.
const char* obstacle() {
  if (n_users > 0) return nullptr;
  c10::Allocator* const now = c10::GetCPUAllocator();
  if (standard && now != standard) return "torch's allocator was replaced by another one meanwhile";
  if (!now->raw_deleter()) return "torch has an allocator whose blocks no other can free";
  return nullptr;
}

// Runs at the first install. Returns why it failed, or null.
const char* prepare() {
  if (ours) return nullptr;
  // A fork copies the arena, so no other thread may be changing it at that moment.
  if (pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); }) != 0)
    return "the system has no memory for a handler of forks";
  standard = c10::GetCPUAllocator();
  ours = new Allocator;
  // glibc maps and unmaps blocks of 128 KiB and more (such as decoded images) one by one until a large mapped block is
  // freed. From then on it keeps blocks up to that size in its heap. Without the arena, torch's first large tensors
  // have this effect.
  standard->raw_deallocate(standard->raw_allocate(31 << 20));
  return nullptr;
}

}  // namespace

// Returns why the arena cannot become torch's allocator, or null. Changes nothing.
extern "C" const char* fastln_arena_obstacle() {
  const std::lock_guard<std::mutex> guard(mutex);
  return obstacle();
}

// Returns the number of the arena's users.
extern "C" size_t fastln_arena_users() {
  const std::lock_guard<std::mutex> guard(mutex);
  return n_users;
}

// Adds a user. The first user reserves `size` bytes of addresses and makes the arena torch's allocator from now on.
// Sets `*reserved` to the arena's size for the first user, else to 0. Returns why it failed, or null.
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

// Removes a user. The last one gives torch its standard allocator back, and returns all pages without tensors to the
// system. The pages and addresses of live tensors follow when those are freed.
extern "C" void fastln_release_arena() {
  const std::lock_guard<std::mutex> guard(mutex);
  if (n_users == 0 || --n_users > 0) return;
  if (c10::GetCPUAllocator() == ours) c10::SetCPUAllocator(standard);
  retire();
}
