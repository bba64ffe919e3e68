// The pipeline that brings W and X: `stages` stages of ROWS rows of W and TOKENS rows of X, BLOCK_K columns each.
//
// Both rings copy what exists and nothing else: rows past N, tokens past M and columns past K stay as they are, whoever
// multiplies masks the columns, and whoever writes Y masks rows and tokens.
#pragma once
#include "decode_args.h"
#include "gpu.cuh"

namespace lora {

// cp.async, sm_80: every thread copies 16-byte pieces; one barrier a stage.
template <int TOKENS>
struct AsyncRing {
  static constexpr int THREADS = 32 * WARPS;
  static constexpr bool BULK = false;
  const DecodeArgs& args;
  char* memory;
  int count, tile, step;  // units of this block; where the next one lies
  uint64_t policy;

  LORA_DEVICE AsyncRing(const DecodeArgs& args_, char* memory_, char*, Deal deal)
      : args(args_), memory(memory_), count(deal.count(gpu::block())), tile(deal.tile(gpu::block())),
        step(deal.step(gpu::block())), policy(gpu::streaming_policy()) {}

  LORA_DEVICE bool producer() const { return false; }
  LORA_DEVICE void run() {}

  LORA_DEVICE void issue(int i) {  // the i-th unit of this block; past the last an empty group, to keep count
    if (i < count) {
      const int k0 = step * BLOCK_K;
      char* stage = memory + i % args.stages * stage_bytes(TOKENS);
      constexpr int PIECES = BLOCK_K / 8;
      for (int piece = gpu::thread(); piece < (ROWS + TOKENS) * PIECES; piece += THREADS) {
        const int row = piece / PIECES, k = k0 + piece % PIECES * 8;
        char* to = stage + row_offset(row) + piece % PIECES * 16;
        const int n = tile * ROWS + row, m = row - ROWS;
        if (k >= args.K) continue;
        if (row < ROWS) {
          if (n < args.N) {
            gpu::copy16_streaming(to, static_cast<const uint16_t*>(args.W) + n * args.stride_wn + k, policy);
          }
        } else if (m < args.M) {
          gpu::copy16(to, static_cast<const uint16_t*>(args.X) + m * args.stride_xm + k);
        }
      }
      if (++step == k_units(args.K)) step = 0, ++tile;
    }
    gpu::commit_copies();
  }
  LORA_DEVICE void start() {
    for (int i = 0; i < args.stages - 1; ++i) issue(i);
  }
  LORA_DEVICE const char* acquire(int i) {
    gpu::wait_copies(args.stages - 2);
    // Everyone's pieces are here, and everyone has read the stage that is filled next.
    gpu::sync_block<THREADS>(1);
    issue(i + args.stages - 1);
    return memory + i % args.stages * stage_bytes(TOKENS);
  }
  LORA_DEVICE void release(int) {}
};

// cp.async.bulk, sm_90: one more warp copies whole rows ahead, without descriptors; full and empty barriers a stage.
template <int TOKENS>
struct BulkRing {
  static constexpr int THREADS = 32 * (WARPS + 1);
  static constexpr bool BULK = true;
  const DecodeArgs& args;
  char* memory;
  uint64_t *full, *empty;
  Deal deal;

  LORA_DEVICE BulkRing(const DecodeArgs& args_, char* memory_, char* barriers, Deal deal_)
      : args(args_), memory(memory_), full(reinterpret_cast<uint64_t*>(barriers)), empty(full + MAX_STAGES), deal(deal_) {}

  LORA_DEVICE bool producer() const { return gpu::thread() >= 32 * WARPS; }

  LORA_DEVICE void start() {
    if (gpu::thread() == 32 * WARPS) {
      for (int stage = 0; stage < args.stages; ++stage) {
        gpu::barrier_init(full + stage, 1);  // the producer's, and every byte
        gpu::barrier_init(empty + stage, WARPS);
      }
      gpu::barriers_ready();
    }
    gpu::sync_block<THREADS>(0);
  }
  LORA_DEVICE void run() {  // the producer's warp, from the first unit to the last
    const int lane = gpu::thread() % 32, count = deal.count(gpu::block());
    const uint64_t policy = gpu::streaming_policy();
    int stage = 0, phase = 0, tile = deal.tile(gpu::block()), step = deal.step(gpu::block());
    for (int i = 0; i < count; ++i) {
      const int k0 = step * BLOCK_K;
      const int rows = args.N - tile * ROWS < ROWS ? args.N - tile * ROWS : ROWS;
      const int bytes = 2 * (args.K - k0 < BLOCK_K ? args.K - k0 : BLOCK_K);
      char* to = memory + stage * stage_bytes(TOKENS);
      gpu::barrier_wait(empty + stage, phase ^ 1);
      if (lane == 0) gpu::barrier_arrive_expecting(full + stage, (rows + args.M) * bytes);
      gpu::sync_warp();
      const uint16_t* W = static_cast<const uint16_t*>(args.W) + int64_t(tile) * ROWS * args.stride_wn + k0;
      const uint16_t* X = static_cast<const uint16_t*>(args.X) + k0;
      for (int row = lane; row < rows; row += 32) {
        gpu::bulk_copy_streaming(to + row_offset(row), W + row * args.stride_wn, bytes, full + stage, policy);
      }
      for (int m = lane; m < args.M; m += 32) {
        gpu::bulk_copy(to + row_offset(ROWS + m), X + m * args.stride_xm, bytes, full + stage);
      }
      if (++stage == args.stages) stage = 0, phase ^= 1;
      if (++step == deal.steps) step = 0, ++tile;
    }
  }
  LORA_DEVICE const char* acquire(int i) {
    const int stage = i % args.stages;
    gpu::barrier_wait(full + stage, i / args.stages & 1);
    return memory + stage * stage_bytes(TOKENS);
  }
  LORA_DEVICE void release(int i) {
    gpu::sync_warp();
    if (gpu::thread() % 32 == 0) gpu::barrier_arrive(empty + i % args.stages);
  }
};

}  // namespace lora
