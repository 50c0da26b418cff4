// Threads, scratch memory and the instruction sets of this CPU.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <ctime>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "zoo/export.hpp"
#include "zoo/parallel.hpp"

namespace zoo {
namespace {

// Entry points of the OpenMP runtime that torch has loaded (GNU ABI, which LLVM's runtime exports too).
struct OpenMP {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread_number)() = nullptr;
  int (*team_size)() = nullptr;
} openmp;

struct Team {
  TeamTask task;
  void* context;
  int64_t *done, *worked;  // when the calling thread had done its share, and its processor time then

  void run(int64_t thread, int64_t size) const;
};

int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Of this thread. What it worked is not told by the clock on the wall, which runs on while it does not run itself.
int64_t processor_time() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec time;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) return time.tv_sec * 1'000'000'000 + time.tv_nsec;
#endif
  return nanoseconds();
}

void Team::run(int64_t thread, int64_t size) const {
  task(context, thread, size);
  if (thread == 0) *done = nanoseconds(), *worked = processor_time();
}

// A thread that another program keeps from running holds the whole team up, for milliseconds, while the others wait
// actively at the end of the region: OpenMP has no other way to wait that could be chosen here. So whoever waited much
// longer than it worked goes on alone for a while, and such waits take a small part of the time at most.
constexpr int64_t kStall = 200'000;  // nanoseconds; to wake a thread takes less
constexpr int64_t kRest = 32;        // times what was waited
std::atomic<int64_t> alone_until{0};

// Used only where there is no OpenMP runtime to share. One team at a time; a nested call runs alone.
class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void run(int64_t threads, const Team& team) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) {
      team.run(0, 1);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int64_t>(workers_.size()) < threads - 1) {
        const int64_t number = static_cast<int64_t>(workers_.size()) + 1;
        workers_.emplace_back([this, number, seen = round_]() mutable { work(number, seen); });
      }
      team_ = team;
      size_ = threads;
      pending_ = threads - 1;
      ++round_;
    }
    wake_.notify_all();
    team.run(0, threads);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  void work(int64_t number, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      if (number >= size_) continue;
      const Team team = team_;
      const int64_t size = size_;
      lock.unlock();
      team.run(number, size);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Team team_{};
  int64_t size_ = 0, pending_ = 0;
  uint64_t round_ = 0;
  bool stop_ = false;
};

Pool& pool() {
  static Pool* instance = new Pool;  // never destroyed: its threads may outlive static destructors
  return *instance;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

constexpr int64_t kHugePage = int64_t{2} << 20;

struct Buffer {
  std::unique_ptr<void, Free> memory;
  int64_t bytes = 0;
};

}  // namespace

void run_team(int64_t threads, TeamTask task, void* context) {
  const int64_t began = threads > 1 ? nanoseconds() : 0;
  if (threads <= 1 || began < alone_until.load(std::memory_order_relaxed)) {
    task(context, 0, 1);
    return;
  }
  const int64_t before = processor_time();
  int64_t done = began, worked = before;
  Team team{task, context, &done, &worked};
  if (openmp.parallel == nullptr) {
    pool().run(threads, team);
  } else {
    openmp.parallel([](void* raw) { static_cast<Team*>(raw)->run(openmp.thread_number(), openmp.team_size()); },
                    &team, static_cast<unsigned>(threads), 0);
  }
  const int64_t now = nanoseconds(), waited = now - done;
  if (waited > std::max(kStall, 2 * (worked - before))) alone_until.store(now + kRest * waited, std::memory_order_relaxed);
}

void* scratch(int64_t bytes, int slot) {
  thread_local Buffer buffers[6];
  Buffer& buffer = buffers[slot];
  if (bytes < 0) throw std::bad_alloc();
  if (buffer.bytes < bytes) {
    // Large buffers lie on huge pages where the system grants them: panels of x are read all over the place.
    const int64_t page = bytes >= kHugePage / 2 ? kHugePage : 4096;
    const int64_t rounded = (bytes + page - 1) / page * page;
    buffer.memory.reset();
    buffer.memory.reset(std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(rounded)));
#if defined(__linux__)
    if (page == kHugePage && buffer.memory) madvise(buffer.memory.get(), static_cast<size_t>(rounded), MADV_HUGEPAGE);
#endif
    buffer.bytes = buffer.memory ? rounded : 0;
    if (!buffer.memory) throw std::bad_alloc();
  }
  return buffer.memory.get();
}

void expect_large(void* memory, int64_t bytes) {
#if defined(__linux__)
  const auto start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (start + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (last >= first + 2 * kHugePage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace zoo

// Number of the interface between the libraries and shared/ops/_native.py; both must agree.
ZOO_EXPORT int64_t zoo_abi_version() { return 11; }

// Hands over GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the runtime that torch uses.
ZOO_EXPORT void zoo_set_openmp(void* parallel, void* thread_number, void* team_size) {
  zoo::openmp.parallel = reinterpret_cast<decltype(zoo::openmp.parallel)>(parallel);
  zoo::openmp.thread_number = reinterpret_cast<decltype(zoo::openmp.thread_number)>(thread_number);
  zoo::openmp.team_size = reinterpret_cast<decltype(zoo::openmp.team_size)>(team_size);
}

// Asks for scratch memory: the self-test of what a kernel does where there is none.
ZOO_EXPORT int64_t zoo_selftest_memory(int64_t bytes) try {
  zoo::scratch(bytes, 3);
  return zoo::kOk;
} ZOO_CATCH

// counts[i] = number of threads whose static share holds item i: the self-test of the thread team.
ZOO_EXPORT int64_t zoo_selftest_threads(int64_t* counts, int64_t items, int64_t threads) try {
  zoo::parallel_for(items, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) counts[i] += 1;
  });
  return zoo::kOk;
} ZOO_CATCH
