// The update of a mixed batch on a CPU: what it is given, and how it is cut into tasks. No torch, no vectors.
#pragma once
#include <cstdint>
#include <vector>

namespace lora {

constexpr int CHUNK = 64;      // rows of one adapter that a task takes
constexpr int RANK_PART = 16;  // ranks of a shrink task
constexpr int COLUMNS = 256;   // of Y an expand task

struct Chunk {          // rows of one adapter
  int64_t row;          // the first, in order; also in XA
  int64_t xa;           // where its XA (rows, r) begins
  int32_t rows, first, r;
  float scaling;
};

struct Task {
  int32_t chunk, begin, end;  // ranks to make, or columns of Y
};

struct UpdateArgs {
  const void *X, *A, *B;  // float, or bfloat16 where ``half``
  void* Y;
  const int32_t *ids, *starts, *ranks;
  const float* scalings;
  bool half;
  int64_t M, N, K, R, L, max_rank;
  int64_t stride_xm, stride_ar, stride_bn, stride_br, stride_ym;  // elements; X, A, Y: last stride 1
};

struct Plan {
  std::vector<int64_t> order;  // rows with an adapter, by slot, in their own order
  std::vector<Chunk> chunks;
  std::vector<Task> shrink, expand;
  int64_t xa = 0;  // floats
};

Plan plan_update(const UpdateArgs& args);

// Runs f(context, begin, end) over parts of 0 .. count, each of ``grain`` or more, in any order, on any threads.
using Parallel = void (*)(int64_t count, int64_t grain, void (*f)(int64_t begin, int64_t end, void* context), void* context);

// Y += XA B^T by adapter. ``level``: 0 the plain build, 1 AVX2, 2 AVX-512, 3 with its bfloat16, at most what the CPU has; -1 the best.
void multi_lora_update(const UpdateArgs& args, Parallel parallel, int level = -1);
int best_level();

}  // namespace lora
