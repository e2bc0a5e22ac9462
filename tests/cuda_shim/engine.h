// Runs a grid on the CPU. A block's threads are fibres by default: cheap, on one core, resumed in a shuffled order so
// that code which leans on an order fails. With CUDA_SHIM_THREADS they are operating-system threads, for
// ThreadSanitizer. A barrier that some thread never reaches ends the process with a message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#ifdef CUDA_SHIM_THREADS
#include <pthread.h>

#include <thread>
#elif defined(CUDA_SHIM_UCONTEXT) || !defined(__x86_64__) || defined(__SANITIZE_ADDRESS__)
#ifndef CUDA_SHIM_UCONTEXT
#define CUDA_SHIM_UCONTEXT
#endif
#include <ucontext.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local uint3 threadIdx{};
inline thread_local uint3 blockIdx{};
inline thread_local dim3 blockDim{};
inline thread_local dim3 gridDim{};

namespace cuda_shim {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_shim: %s (block %u %u %u, thread %u %u %u)\n", message, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z);
  std::abort();
}

inline unsigned linear_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
inline unsigned lane_index() { return linear_thread() % 32u; }
inline uint3 index_of(uint64_t linear, dim3 extent) {
  return {static_cast<unsigned>(linear % extent.x), static_cast<unsigned>(linear / extent.x % extent.y),
          static_cast<unsigned>(linear / extent.x / extent.y)};
}

inline uint64_t shuffle_state = 0x9e3779b97f4a7c15ull;  // a test may set it: another order of blocks and threads

inline void shuffle(std::vector<unsigned>& order) {
  for (size_t i = order.size(); i > 1; --i) {
    shuffle_state ^= shuffle_state << 13;
    shuffle_state ^= shuffle_state >> 7;
    shuffle_state ^= shuffle_state << 17;
    std::swap(order[i - 1], order[shuffle_state % i]);
  }
}

#ifdef CUDA_SHIM_THREADS

class Barrier {
 public:
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier_, nullptr, count); }
  Barrier(const Barrier&) = delete;
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }
  void leave() {}

 private:
  pthread_barrier_t barrier_;
};

#else

void yield();
inline uint64_t progress = 0;  // barriers opened and threads ended

class Barrier {
 public:
  explicit Barrier(unsigned count) : expected_(count) {}
  void wait() {
    const unsigned mine = generation_;
    arrived_ += 1;
    release_if_complete();
    while (generation_ == mine) yield();
  }
  // A thread that returned no longer counts, as on hardware.
  void leave() {
    expected_ -= 1;
    release_if_complete();
  }

 private:
  void release_if_complete() {
    if (arrived_ > 0 && arrived_ == expected_) {
      arrived_ = 0;
      generation_ += 1;
      progress += 1;
    }
  }
  unsigned expected_;
  unsigned arrived_ = 0;
  unsigned generation_ = 0;
};

#endif

// Two sets of slots in turn: a lane that runs ahead writes the other set, and cannot run two ahead.
struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  Barrier barrier;
  uint64_t slots[2][32] = {};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    for (unsigned first = 0; first < threads; first += 32) {
      warps.push_back(std::make_unique<Warp>(threads - first < 32 ? threads - first : 32));
    }
  }
  Barrier barrier;
  int any = 0;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline Block* block = nullptr;
inline thread_local unsigned exchanges = 0;

inline void block_barrier() { block->barrier.wait(); }

inline int any_in_block(int predicate) {
  block_barrier();  // an earlier answer has been read
  if (linear_thread() == 0) __atomic_store_n(&block->any, 0, __ATOMIC_SEQ_CST);
  block_barrier();
  if (predicate) __atomic_store_n(&block->any, 1, __ATOMIC_SEQ_CST);
  block_barrier();
  return __atomic_load_n(&block->any, __ATOMIC_SEQ_CST);
}

template <typename T>
T exchange(unsigned mask, T value, unsigned source_lane) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  if (mask != 0xffffffffu) fail("only full-mask shuffles are emulated");
  Warp& warp = *block->warps[linear_thread() / 32u];
  uint64_t* slots = warp.slots[exchanges++ % 2];
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  slots[lane_index()] = bits;
  warp.barrier.wait();
  std::memcpy(&value, &slots[source_lane], sizeof(T));
  return value;
}

#ifdef CUDA_SHIM_THREADS

inline void run_block(dim3 grid, dim3 extent, uint3 index, const std::function<void()>& body) {
  const unsigned count = extent.x * extent.y * extent.z;
  Block current(count);
  block = &current;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < count; ++t) {
    threads.emplace_back([=, &body]() {
      gridDim = grid;
      blockDim = extent;
      blockIdx = index;
      threadIdx = index_of(t, extent);
      exchanges = 0;
      body();
    });
  }
  for (auto& thread : threads) thread.join();
  block = nullptr;
}

#else

inline constexpr size_t kStackBytes = 128 * 1024;

void fibre_main();

// A suspended computation with a stack of its own.
#ifdef CUDA_SHIM_UCONTEXT

struct Context {
  ucontext_t saved;
};

inline void start_at_main(Context& context, char* stack, Context& after) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = kStackBytes;
  context.saved.uc_link = &after.saved;
  makecontext(&context.saved, fibre_main, 0);
}
inline void switch_to(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

#else

// swapcontext makes two system calls (0.25 us); these few instructions make a shuffle-heavy block 10 times faster.
struct Context {
  void* stack_pointer = nullptr;
};

__attribute__((naked, noinline)) static void switch_stacks(void** /*save*/, void* /*load*/) {
  __asm__(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

inline void start_at_main(Context& context, char* stack, Context& /*after*/) {
  // Six saved registers, the entry point, and a null return address: at entry rsp is 8 past a multiple of 16.
  auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{15};
  auto* frame = reinterpret_cast<void**>(top) - 8;
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(&fibre_main);
  context.stack_pointer = frame;
}
inline void switch_to(Context& from, Context& to) { switch_stacks(&from.stack_pointer, to.stack_pointer); }

#endif

struct Fibre {
  Context context;
  std::unique_ptr<char[]> stack;
  uint3 index{};
  unsigned exchanges = 0;
  bool done = false;
};

inline std::vector<std::unique_ptr<Fibre>> fibres;  // kept from block to block
inline Context scheduler;
inline Fibre* running = nullptr;
inline const std::function<void()>* kernel_body = nullptr;

inline void yield() {
  running->exchanges = exchanges;
  switch_to(running->context, scheduler);
}

inline void fibre_main() {
  (*kernel_body)();
  running->done = true;
  block->warps[linear_thread() / 32u]->barrier.leave();
  block->barrier.leave();
  yield();
}

inline void prepare(Fibre& fibre, uint3 index) {
  if (!fibre.stack) fibre.stack.reset(new char[kStackBytes]);
  fibre.index = index;
  fibre.exchanges = 0;
  fibre.done = false;
  start_at_main(fibre.context, fibre.stack.get(), scheduler);
}

inline void run_block(dim3 grid, dim3 extent, uint3 index, const std::function<void()>& body) {
  const unsigned count = extent.x * extent.y * extent.z;
  Block current(count);
  block = &current;
  kernel_body = &body;
  gridDim = grid;
  blockDim = extent;
  blockIdx = index;
  while (fibres.size() < count) fibres.push_back(std::make_unique<Fibre>());
  for (unsigned t = 0; t < count; ++t) prepare(*fibres[t], index_of(t, extent));
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  shuffle(order);
  unsigned left = count;
  while (left > 0) {
    const uint64_t before = progress;
    for (const unsigned t : order) {
      Fibre& fibre = *fibres[t];
      if (fibre.done) continue;
      running = &fibre;
      threadIdx = fibre.index;
      exchanges = fibre.exchanges;
      switch_to(scheduler, fibre.context);
      left -= fibre.done;
      progress += fibre.done;
    }
    if (progress == before) fail("threads wait at a barrier that the others never reach");
  }
  block = nullptr;
}

#endif

inline void run_grid(dim3 grid, dim3 extent, const std::function<void()>& body) {
  std::vector<unsigned> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  shuffle(order);
  for (const unsigned b : order) run_block(grid, extent, index_of(b, grid), body);
}

}  // namespace cuda_shim
