// An arena for large tensors that keeps its pages. `memory.py` makes it torch's CPU allocator, and undoes that.
//
// A training step frees large tensors and allocates the same ones again. The C library does one of two things. It
// returns their pages to the system, which maps and zeroes them again at the next access. Or it keeps them in its heap,
// between small blocks that outlive the step. There a freed block does not merge with its neighbours, and the next
// large tensor finds no gap that fits. The arena holds no small blocks, and free neighbours always merge. So it grows
// little beyond the largest total size of live tensors.
//
// The same allocator can count: the bytes that live of all that torch allocates on the CPU, and their peak. It counts
// with the arena and without it.
#include <c10/core/CPUAllocator.h>
#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
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
  void* take(size_t n, bool is_counted) {
    n = round_up(n, ALIGNMENT);
    const auto fit = free_.lower_bound({n, nullptr});
    if (fit == free_.end()) return nullptr;
    const auto [size, block] = *fit;
    if (!open_up_to(block + n)) return nullptr;
    free_.erase(fit);
    blocks_[block] = {n, false, is_counted};
    if (size > n) add_free(block + n, size - n);
    return block;
  }

  // Returns a taken block's size if it is counted, else 0.
  size_t counted_size(char* address) const {
    const Block& block = blocks_.at(address);
    return block.is_counted ? block.size : 0;
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
    bool is_counted;
  };
  using Blocks = std::map<char*, Block>;

  void add_free(char* address, size_t size) {
    blocks_[address] = {size, true, false};
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
std::mutex mutex;                    // guards the next five
size_t n_users = 0;                  // of the arena; while this or the next is not 0, torch uses our allocator
size_t n_counters = 0;               // who wants allocations counted
Arena* arena = nullptr;              // exists while it has users, or blocks that outlive the last user
c10::Allocator* standard = nullptr;  // torch's own, set at the first install
c10::Allocator* ours = nullptr;

// What is counted. No other memory depends on it, so the order in which other threads see it does not matter.
std::atomic<bool> counts{false};
std::atomic<int64_t> live{0}, peak{0};

void count(int64_t n) {
  const int64_t now = live.fetch_add(n, std::memory_order_relaxed) + n;
  int64_t before = peak.load(std::memory_order_relaxed);
  while (now > before && !peak.compare_exchange_weak(before, now, std::memory_order_relaxed)) continue;
}

// A block of torch's own allocator, whose size only the C library knows: what was asked for, rounded up by it.
int64_t size_of(void* address) { return static_cast<int64_t>(malloc_usable_size(address)); }

void give_back_counted(void* address) {
  count(-size_of(address));
  standard->raw_deallocate(address);
}

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
  if (!is_in_arena(address)) {  // a raw pointer, which does not say whether it is counted
    if (counts.load(std::memory_order_relaxed)) count(-size_of(address));
    return standard->raw_deallocate(address);
  }
  c10::profiledCPUMemoryReporter().Delete(address);
  const std::lock_guard<std::mutex> guard(mutex);
  count(-static_cast<int64_t>(arena->counted_size(static_cast<char*>(address))));
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
    const bool is_counted = counts.load(std::memory_order_relaxed);
    void* const address = n < LARGE ? nullptr : take(n, is_counted);
    if (!address) return is_counted ? counted(standard->allocate(n)) : standard->allocate(n);
    c10::profiledCPUMemoryReporter().New(address, n);
    return {address, address, give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return give_back; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }

 private:
  static void* take(size_t n, bool is_counted) {
    const std::lock_guard<std::mutex> guard(mutex);
    void* const block = n_users > 0 ? arena->take(n, is_counted) : nullptr;
    if (block) count(static_cast<int64_t>(arena->counted_size(static_cast<char*>(block))));
    return block;
  }

  static c10::DataPtr counted(c10::DataPtr made) {
    if (!made.get() || made.get_context() != made.get()) return made;
    void* const address = made.release_context();
    count(size_of(address));
    return {address, address, give_back_counted, c10::Device(c10::DeviceType::CPU)};
  }
};

// Returns why torch's allocator cannot be replaced now, or null.
const char* obstacle() {
  if (n_users + n_counters > 0) return nullptr;
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

// Makes our allocator torch's, if it is not yet. Returns why it failed, or null.
const char* take_over() {
  if (n_users + n_counters > 0) return nullptr;
  if (const char* const why = obstacle()) return why;
  if (const char* const why = prepare()) return why;
  c10::SetCPUAllocator(ours);
  return c10::GetCPUAllocator() == ours ? nullptr : "torch has an allocator of higher priority";
}

// Gives torch its own allocator back, if nobody wants ours.
void hand_over() {
  if (n_users + n_counters == 0 && c10::GetCPUAllocator() == ours) c10::SetCPUAllocator(standard);
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
  if (const char* const why = take_over()) return why;
  if (!arena) arena = new Arena(size);
  if (!arena->exists()) {
    delete arena;
    arena = nullptr;
    hand_over();
    return "the system does not reserve that many addresses (see ulimit -v)";
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
  hand_over();
  retire();
}

// Adds someone who wants allocations counted, from now on. Returns why it failed, or null.
extern "C" const char* fastln_start_counting() {
  const std::lock_guard<std::mutex> guard(mutex);
  if (const char* const why = take_over()) return why;
  if (n_counters++ > 0) return nullptr;
  peak = live.load();  // of blocks that an earlier counter saw begin
  counts = true;
  return nullptr;
}

// Removes one of them.
extern "C" void fastln_stop_counting() {
  const std::lock_guard<std::mutex> guard(mutex);
  if (n_counters == 0 || --n_counters > 0) return;
  counts = false;
  hand_over();
}

extern "C" int64_t fastln_live_bytes() { return live; }
extern "C" int64_t fastln_peak_bytes() { return peak; }
extern "C" void fastln_reset_peak() { peak = live.load(); }
