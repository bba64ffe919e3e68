// The machine of csrc/include/lora_kernels/gpu.cuh on one CPU thread, so that a kernel's own text runs under ASan.
//
// Every GPU thread is a fiber, all blocks are there at once, and which fiber goes on is drawn from a seed wherever one has
// to wait; in every
// block one warp at a time falls far behind, and in every second launch who was woken last mostly goes on first. What the hardware may do late is done as late as it may, or at random: a copy poisons its destination when it is
// issued and fills it when the wait for it (cp.async) or chance (bulk copies) says so. Shared memory starts as NaN.
// What one block tells another through global memory is followed by vector clocks: a read needs a release after the
// writer's block has met at a barrier, and an acquire before the reader's has.
// Any fault prints what it is and ends the process with 3.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define LORA_DEVICE inline
#define LORA_KERNEL(threads) inline void
#define LORA_PARAM const
#define LORA_UNROLL
#define LORA_UNROLL_1

namespace emu {

[[noreturn]] inline void fault(const char* what) {
  std::fflush(stdout);
  std::fprintf(stderr, "fault: %s\n", what);
  std::_Exit(3);
}
inline void check(bool fine, const char* what) {
  if (!fine) fault(what);
}

using Clock = std::vector<uint32_t>;  // an entry a block
inline void join(Clock& to, const Clock& from) {
  for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
}

struct Copy {
  char* to;
  const char* from;
  int bytes;
  void* barrier;
  void issue() const { std::memset(to, 0xff, bytes); }
  void land() const { std::memcpy(to, from, bytes); }
};
struct Meeting {  // of the threads at a barrier, or of a warp's lanes at an instruction
  std::vector<int> waiting;
  const char* what = nullptr;
};
struct TransferBarrier {
  int expected = 0, arrivals = 0, bytes = 0, phase = 0;
  std::vector<int> waiting;
};
struct Warp {
  Meeting meeting;
  uint32_t a[2][32][4], b[2][32][2];
};
struct Block {
  std::unique_ptr<char[]> shared;
  Meeting barriers[16];
  std::vector<Warp> warps;
};
struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  int block = 0, thread = 0, turn = 0;
  bool done = false;
  Clock clock;
  std::vector<Copy> group;
  std::deque<std::vector<Copy>> groups;
  void* fake = nullptr;
};
struct Stamp {
  int block = -1, thread = 0;
  uint32_t epoch = 0;
};

constexpr size_t STACK = 48 << 10, GRAIN = 8;

struct Machine {
  std::mt19937 random;
  ucontext_t scheduler;
  void* fake = nullptr;
  const void* home = nullptr;
  size_t home_size = 0;
  std::function<void()> kernel;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<int> ready;
  std::vector<Copy> flying;
  std::map<const void*, TransferBarrier> transfers;
  std::map<const void*, Clock> released;
  std::vector<Stamp> stamps;
  const char* watched = nullptr;
  size_t watched_bytes = 0;
  int current = 0;
  std::vector<int> slow;  // of each block the warp that seldom gets its turn
  long idle = 0, turns = 0;

  uint32_t draw(size_t n) { return uint32_t(random() % n); }
  bool inside(const void* p) const { return p >= watched && p < watched + watched_bytes; }
};
inline Machine* machine = nullptr;
inline Fiber& self() { return machine->fibers[machine->current]; }
inline Block& block() { return machine->blocks[self().block]; }

inline void leave(bool last = false) {  // to the scheduler, until chosen again
  Fiber& fiber = self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake, machine->home, machine->home_size);
#endif
  swapcontext(&fiber.context, &machine->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake, nullptr, nullptr);
#endif
}
inline void yield() {
  machine->ready.push_back(machine->current);
  leave();
}
inline void trampoline() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine->home, &machine->home_size);
#endif
  machine->kernel();
  check(self().group.empty(), "a thread left copies that it never committed");
  self().done = true;
  leave(true);
}
inline void enter(int fiber) {
  machine->current = fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine->fake, machine->fibers[fiber].stack, STACK);
#endif
  swapcontext(&machine->scheduler, &machine->fibers[fiber].context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine->fake, nullptr, nullptr);
#endif
}
inline void settle(TransferBarrier& barrier) {
  if (barrier.arrivals || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.arrivals = barrier.expected;
  machine->ready.insert(machine->ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}
inline void land_one() {
  std::swap(machine->flying[machine->draw(machine->flying.size())], machine->flying.back());
  const Copy copy = machine->flying.back();
  machine->flying.pop_back();
  copy.land();
  TransferBarrier& barrier = machine->transfers[copy.barrier];
  barrier.bytes -= copy.bytes;
  settle(barrier);
}
// Runs `kernel` by `blocks` blocks of `threads` threads; what is published must lie in `watched`.
inline void launch(int blocks, int threads, int shared, unsigned seed, const void* watched, size_t bytes,
                   std::function<void()> kernel) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  Machine m;
  machine = &m;
  m.random.seed(seed);
  m.kernel = std::move(kernel);
  m.watched = static_cast<const char*>(watched), m.watched_bytes = bytes;
  m.stamps.resize(bytes / GRAIN + 1);
  m.blocks.resize(blocks);
  for (Block& block : m.blocks) {
    block.shared.reset(new char[shared]);
    std::memset(block.shared.get(), 0xff, shared);
    block.warps.resize(threads / 32);
  }
  m.fibers.resize(blocks * threads);
  while (stacks.size() < m.fibers.size()) stacks.emplace_back(new char[STACK]);
  for (int i = 0; i < blocks * threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.stack = stacks[i].get(), fiber.block = i / threads, fiber.thread = i % threads;
    fiber.clock.assign(blocks, 0);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack, fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, trampoline, 0);
    m.ready.push_back(i);
  }
  while (!m.ready.empty() || !m.flying.empty()) {
    if (!m.flying.empty() && (m.ready.empty() || m.draw(8) == 0)) {
      land_one();
      continue;
    }
    if (m.turns++ % 8192 == 0) {
      m.slow.resize(blocks);
      for (int& warp : m.slow) warp = int(m.draw(threads / 32));
    }
    for (int tries = seed % 2 && m.draw(16) ? 16 : 0; tries < 16; ++tries) {
      std::swap(m.ready[m.draw(m.ready.size())], m.ready.back());
      const Fiber& fiber = m.fibers[m.ready.back()];
      if (fiber.thread / 32 != m.slow[fiber.block]) break;
    }
    const int next = m.ready.back();
    m.ready.pop_back();
    enter(next);
    check(++m.idle < 1000000, "deadlock: threads wait for a counter that nobody adds to");
  }
  for (const Fiber& fiber : m.fibers) check(fiber.done, "deadlock: threads wait at a barrier that others never reach");
  machine = nullptr;
}

inline bool meet(Meeting& meeting, size_t count, const char* what) {  // true for the last, who wakes the others
  check(meeting.waiting.empty() || meeting.what == what, "lanes of a warp meet at different instructions");
  meeting.what = what;
  meeting.waiting.push_back(machine->current);
  return meeting.waiting.size() == count;
}
inline void wake(Meeting& meeting) {
  machine->idle = 0;
  for (const int fiber : meeting.waiting) machine->ready.push_back(fiber);
  meeting.waiting.clear();
}
inline void meet_warp(const char* what) {
  Meeting& meeting = block().warps[self().thread / 32].meeting;
  if (meet(meeting, 32, what)) wake(meeting);
  leave();
}
inline void aligned(const void* p, size_t bytes) { check(reinterpret_cast<uintptr_t>(p) % bytes == 0, "an address out of line"); }

template <class T>
T read_only(const void* p) {  // through L1, which nothing that this launch publishes may pass
  check(!machine->inside(p), "a load through L1 of what this launch writes");
  aligned(p, sizeof(T));
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}
template <class T>
T read_published(const void* p) {
  aligned(p, sizeof(T));
  check(machine->inside(p), "a load of what nobody publishes");
  const Fiber& fiber = self();
  for (size_t at = 0; at < sizeof(T); at += GRAIN) {
    const Stamp& stamp = machine->stamps[(static_cast<const char*>(p) + at - machine->watched) / GRAIN];
    check(stamp.block >= 0, "a load of what was not published");
    check(fiber.clock[stamp.block] > stamp.epoch, "a load of what was published, but not acquired");
  }
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}
template <class T>
void publish(void* p, const T& value) {
  aligned(p, sizeof(T));
  check(machine->inside(p), "a store outside the workspace");
  const Fiber& fiber = self();
  for (size_t at = 0; at < sizeof(T); at += GRAIN) {
    Stamp& stamp = machine->stamps[(static_cast<char*>(p) + at - machine->watched) / GRAIN];
    check(stamp.block < 0, "a place that was published before");
    stamp = {fiber.block, fiber.thread, fiber.clock[fiber.block]};
  }
  std::memcpy(p, &value, sizeof(T));
}

}  // namespace emu

namespace gpu {

inline int thread() { return emu::self().thread; }
inline int block() { return emu::self().block; }
inline int blocks() { return int(emu::machine->blocks.size()); }
inline char* shared() { return emu::block().shared.get(); }
template <bool BULK> constexpr bool RUNS = true;

template <int THREADS>
void sync_block(int barrier) {
  emu::Fiber& fiber = emu::self();
  emu::check(fiber.thread < THREADS, "a thread at a barrier that does not count it");
  emu::Meeting& meeting = emu::block().barriers[barrier];
  if (emu::meet(meeting, THREADS, "barrier")) {
    emu::Clock all = fiber.clock;
    for (const int other : meeting.waiting) emu::join(all, emu::machine->fibers[other].clock);
    ++all[fiber.block];
    for (const int other : meeting.waiting) emu::machine->fibers[other].clock = all;
    emu::wake(meeting);
  }
  emu::leave();
}
inline void sync_warp() { emu::meet_warp("sync_warp"); }
inline int lowest_bit(uint32_t bits) { return __builtin_ffs(int(bits)) - 1; }

inline Chunk load(const void* p) { return emu::read_only<Chunk>(p); }
inline Chunk load_cached(const void* p) { return emu::read_only<Chunk>(p); }
inline Chunk load_published(const void* p) { return emu::read_published<Chunk>(p); }
inline Pair load_pair_published(const void* p) { return emu::read_published<Pair>(p); }
inline void publish(void* p, Chunk c) { emu::publish(p, c); }
inline void publish(void* p, Pair c) { emu::publish(p, c); }
inline void store(void* p, Chunk c) {
  emu::aligned(p, sizeof(c));
  std::memcpy(p, &c, sizeof(c));
}
inline void prefetch(const void* p) { (void)*static_cast<const volatile char*>(p); }

inline int add_acq_rel(int32_t* p, int value) {
  emu::Fiber& fiber = emu::self();
  emu::machine->idle = 0;
  emu::Clock& released = emu::machine->released[p];
  released.resize(fiber.clock.size());
  emu::join(fiber.clock, released);
  released = fiber.clock;
  const int old = *p;
  *p += value;
  emu::yield();
  return old;
}
inline int load_acquire(const int32_t* p) {
  emu::Fiber& fiber = emu::self();
  emu::Clock& released = emu::machine->released[p];
  released.resize(fiber.clock.size());
  emu::join(fiber.clock, released);
  return *p;
}
inline void reset(int32_t* p) { *p = 0; }
inline void pause() { emu::yield(); }

inline Chunk load_shared(const void* p) {
  emu::aligned(p, 16);
  Chunk c;
  std::memcpy(&c, p, sizeof(c));
  return c;
}

inline uint64_t streaming_policy() { return 0; }
inline void copy16(void* to, const void* from) {
  emu::aligned(to, 16), emu::aligned(from, 16);
  emu::self().group.push_back({static_cast<char*>(to), static_cast<const char*>(from), 16, nullptr});
  emu::self().group.back().issue();
}
inline void copy16_streaming(void* to, const void* from, uint64_t) { copy16(to, from); }
inline void commit_copies() {
  emu::self().groups.push_back(std::move(emu::self().group));
  emu::self().group.clear();
}
inline void wait_copies(int groups_left) {
  auto& groups = emu::self().groups;
  for (; int(groups.size()) > groups_left; groups.pop_front()) {
    for (const emu::Copy& copy : groups.front()) copy.land();
  }
}

inline void barrier_init(uint64_t* barrier, int arrivals) {
  emu::aligned(barrier, 8);
  *barrier = 0;
  emu::machine->transfers[barrier] = {arrivals, arrivals, 0, 0, {}};
}
inline void barriers_ready() {}
inline emu::TransferBarrier& transfer(const void* barrier) {
  const auto found = emu::machine->transfers.find(barrier);
  emu::check(found != emu::machine->transfers.end(), "a barrier that was not initialised");
  return found->second;
}
inline void barrier_arrive_expecting(uint64_t* p, int bytes) {
  emu::machine->idle = 0;
  emu::TransferBarrier& barrier = transfer(p);
  emu::check(barrier.arrivals > 0, "more arrivals at a barrier than it expects");
  --barrier.arrivals, barrier.bytes += bytes;
  emu::settle(barrier);
}
inline void barrier_arrive(uint64_t* p) { barrier_arrive_expecting(p, 0); }
inline void barrier_wait(uint64_t* p, int parity) {
  emu::TransferBarrier& barrier = transfer(p);
  if (barrier.phase != parity) return;
  barrier.waiting.push_back(emu::machine->current);
  emu::leave();
}
inline void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  emu::aligned(to, 16), emu::aligned(from, 16);
  emu::check(bytes > 0 && bytes % 16 == 0, "a bulk copy of no whole number of 16 bytes");
  transfer(barrier);
  emu::machine->flying.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, barrier});
  emu::machine->flying.back().issue();
}
inline void bulk_copy_streaming(void* to, const void* from, int bytes, uint64_t* barrier, uint64_t) {
  bulk_copy(to, from, bytes, barrier);
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// d (16 x 8) += a (16 x 16) b (16 x 8): a lane's place in the fragments as PTX lays out mma.m16n8k16.
template <class Number>
void matrix_multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::Fiber& fiber = emu::self();
  emu::Warp& warp = emu::block().warps[fiber.thread / 32];
  const int lane = fiber.thread % 32, turn = fiber.turn ^= 1;  // two sets of operands: who is late still reads the first
  std::copy(a, a + 4, warp.a[turn][lane]);
  std::copy(b, b + 2, warp.b[turn][lane]);
  emu::meet_warp("mma");
  const auto half = [](uint32_t word, int k) { return Number::widen(uint16_t(k % 2 ? word >> 16 : word)); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = warp.a[turn][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      sum += half(left, k) * half(warp.b[turn][column * 4 + k % 8 / 2][k / 8], k);
    }
    d[i] += sum;
  }
}

struct Bfloat16 {
  static float widen(uint16_t bits) { return as_float(uint32_t(bits) << 16); }
  static uint16_t narrow(float value) {
    const uint32_t bits = as_bits(value);
    if (std::isnan(value)) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { matrix_multiply<Bfloat16>(d, a, b); }
};
struct Half {
  static float widen(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                        : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                                       : std::ldexp(float(fraction), -24);
    return bits >> 15 ? -value : value;
  }
  static uint16_t narrow(float value) {
    const uint16_t sign = uint16_t(as_bits(value) >> 16 & 0x8000);
    const float size = std::fabs(value);
    if (std::isnan(value)) return 0x7fff;
    if (size >= 65520.f) return sign | 0x7c00;
    int exponent;
    std::frexp(size, &exponent);  // size = f 2^exponent, f in [1/2, 1)
    const int unit = std::max(exponent - 11, -24);
    const int steps = int(std::nearbyint(std::ldexp(size, -unit)));  // 1024 .. 2048, below 1024 where subnormal
    return uint16_t(sign | (unit == -24 ? steps : (unit + 24) * 1024 + steps));
  }
  static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { matrix_multiply<Half>(d, a, b); }
};

}  // namespace gpu
