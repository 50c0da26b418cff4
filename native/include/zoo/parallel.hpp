// Threads of the kernels. Work is cut statically and no two threads write the same place, so a result does not
// depend on how many threads computed it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "zoo/export.hpp"

namespace zoo {

using TeamTask = void (*)(void* context, int64_t thread, int64_t threads);

// Runs task(context, t, T) for t = 0..T-1, where T <= threads is the size of the team that was given.
// In a process that holds torch this is torch's own OpenMP team: a second pool beside it would fight for the cores.
void run_team(int64_t threads, TeamTask task, void* context);

// What a thread must at least have to do to be woken, in steps of a kernel (a kept weight read and multiplied, or eight of
// them at once): microseconds of work, as waking it takes.
constexpr int64_t kStepsPerThread = 32768;

// How many of the threads so many steps are worth.
inline int64_t worthwhile(int64_t threads, int64_t steps) {
  return std::clamp<int64_t>(steps / kStepsPerThread, 1, std::max<int64_t>(threads, 1));
}

// body(begin, end) over a static partition of [0, items) into contiguous ranges, at most one per thread.
template <class Body>
void parallel_for(int64_t items, int64_t threads, Body&& body) {
  if (items <= 0) return;
  threads = std::min(threads, items);
  if (threads <= 1) {
    body(int64_t{0}, items);
    return;
  }
  struct Context {
    std::remove_reference_t<Body>* body;
    int64_t items;
    std::atomic<Code> code{kOk};
  } context{&body, items};
  run_team(
      threads,
      [](void* raw, int64_t thread, int64_t team) {
        auto* c = static_cast<Context*>(raw);
        const int64_t begin = c->items * thread / team, end = c->items * (thread + 1) / team;
        try {
          if (begin < end) (*c->body)(begin, end);
        } catch (...) {  // the team's runtime is no C++: nothing may be thrown through it
          c->code = code_of_exception();
        }
      },
      &context);
  if (const Code code = context.code; code == kOutOfMemory) throw std::bad_alloc();
  else if (code != kOk) throw Failure{code};
}

// body(begin, end) over row ranges that hold about equal shares of the entries counted by the prefix sum
// pointer[0..rows] (each row also weighs `row_cost` entries, so that empty rows are not free).
template <class Pointer, class Body>
void parallel_rows(const Pointer* pointer, int64_t rows, int64_t row_cost, int64_t threads, Body&& body) {
  const int64_t base = rows > 0 ? static_cast<int64_t>(pointer[0]) : 0;
  const auto cost = [&](int64_t row) { return static_cast<int64_t>(pointer[row]) - base + row * row_cost; };
  const auto first_row = [&](int64_t target) {
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) < target) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  if (rows <= 0) return;
  threads = std::min(threads, rows);
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    const int64_t total = cost(rows);
    const int64_t from = begin == 0 ? 0 : first_row(total * begin / threads);
    const int64_t to = end == threads ? rows : first_row(total * end / threads);
    if (from < to) body(from, to);
  });
}

// A buffer of this thread, at least `bytes` long and 64-byte aligned; its content is undefined, and the next call
// with the same slot on the same thread invalidates it.
void* scratch(int64_t bytes, int slot = 0);

// Fresh memory that is about to be written whole: asks for large pages where there are enough of them in it. Faults of
// small pages take longer than most of what these kernels compute.
void expect_large(void* memory, int64_t bytes);

template <class T>
T* scratch_of(int64_t count, int slot = 0) {
  return static_cast<T*>(scratch(count * static_cast<int64_t>(sizeof(T)), slot));
}

}  // namespace zoo
