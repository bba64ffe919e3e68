// The update of a mixed batch on a CPU: what it is given, and the sizes of its tasks. No torch, nothing of the standard library.
#pragma once
#include <cstdint>

namespace lora {

constexpr int CHUNK = 64;      // rows of one adapter that a task takes
constexpr int RANK_PART = 16;  // ranks of a shrink task
constexpr int COLUMNS = 256;   // of Y an expand task

struct Chunk {          // rows of one adapter
  int64_t row;          // the first, in order
  int64_t xa;           // where its XA (rows, r) begins
  int32_t rows, first, r;
  float scaling;
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

// Runs f(context, begin, end) over parts of 0 .. count, each of ``grain`` or more, in any order, on any threads.
using Parallel = void (*)(int64_t count, int64_t grain, void (*f)(int64_t begin, int64_t end, void* context), void* context);

// Y += XA B^T by adapter. ``level``: 0 the plain build, 1 AVX2, 2 AVX-512, 3 with its bfloat16; at most, and for -1, the CPU's best.
void multi_lora_update(const UpdateArgs& args, Parallel parallel, int level = -1);
int best_level();

}  // namespace lora
