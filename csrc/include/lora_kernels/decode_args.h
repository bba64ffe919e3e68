// What the decode kernel is given, its tiles, and where its workspace holds what. Host and device, no CUDA, no torch.
#pragma once
#include <algorithm>
#include <cstdint>

#if defined(__CUDACC__)
#define LORA_BOTH __host__ __device__ __forceinline__
#else
#define LORA_BOTH inline
#endif

namespace lora {

constexpr int MAX_TOKENS = 64;
constexpr int ROWS = 64;           // rows of W a tile: the wide side of the matrix instruction
constexpr int BLOCK_K = 128;       // of W and X a pipeline stage: copies of 256 bytes a row
constexpr int SHRINK_K = 512;      // of A and X a shrink task; fixed, so that a token's sums never depend on its batch
constexpr int RANK_TILE = 16;      // rows of A a shrink task
constexpr int WARPS = 8;           // that multiply: WARPS_N x WARPS_K of them, 32 rows x 32 of BLOCK_K each
constexpr int WARPS_N = 2, WARPS_K = 4;
constexpr int MAX_STAGES = 8;
constexpr int SUM_PITCH = ROWS + 4;  // floats; 2 * 68 = 8 mod 32 banks: fragments land without conflicts
constexpr int COUNTERS = 16384;      // int32 at the workspace's head: zero before and after every launch, whatever its shape

LORA_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 64 more bytes every two rows: eight lanes then read two rows of four 16-byte chunks from 32 different banks.
LORA_BOTH int row_offset(int row) { return (row >> 1) * (4 * BLOCK_K + 64) + (row & 1) * (2 * BLOCK_K + 64); }
LORA_BOTH int stage_bytes(int tokens) { return row_offset(ROWS + tokens); }

// What a block knows of the batch, in shared memory. A token's adapter is named by the first token that has it: its leader.
struct Mix {
  int32_t slot[MAX_TOKENS];      // of a token; -1: the base alone
  int32_t leader[MAX_TOKENS];    // a token, or -1
  int32_t start[MAX_TOKENS];     // of the token's adapter in A and B
  int32_t rank[MAX_TOKENS];      // 0: the base alone
  float scaling[MAX_TOKENS];
  int32_t before[MAX_TOKENS + 1];  // rank tiles of the adapters whose leaders come before this token; last: of all
  uint32_t heads[MAX_TOKENS / 8];  // of eight tokens those whose adapter none before them among the eight has, a bit each
  int32_t found;                   // what one thread tells the others
};

// Shared memory: barriers, Mix, one tile of fp32 sums, the stages.
constexpr int BARRIER_BYTES = 2 * MAX_STAGES * 8;
constexpr int SUMS_AT = (BARRIER_BYTES + int(sizeof(Mix)) + 127) / 128 * 128;
LORA_BOTH int stages_at(int tokens) { return SUMS_AT + tokens * SUM_PITCH * 4; }
LORA_BOTH int shared_bytes(int tokens, int stages) { return stages_at(tokens) + stages * stage_bytes(tokens); }

struct DecodeArgs {
  const void *X, *W, *A, *B, *bias;  // 16 bit; bias may be null
  void* Y;
  const int32_t *starts, *ranks, *ids;
  const float* scalings;
  int32_t* counters;  // the workspace, cut up by bind_workspace
  float *planes, *xa_parts;
  uint16_t* xa;
  int32_t M, N, K, R, L, max_rank;
  int64_t stride_xm, stride_wn, stride_ar, stride_bn, stride_br, stride_ym;  // elements; X, W, A, Y: last stride 1
  int32_t stages, b_vector, y_vector;  // vector: eight neighbours along N may be read or written as 16 bytes
};

LORA_BOTH int width_of(int tokens) { return tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64; }
LORA_BOTH int xa_pitch(int max_rank) { return int(ceil_div(max_rank, RANK_TILE)) * RANK_TILE; }
LORA_BOTH int shrink_splits(int K) { return int(ceil_div(K, SHRINK_K)); }
LORA_BOTH int tiles_of(int N) { return int(ceil_div(N, ROWS)); }
LORA_BOTH int k_units(int K) { return int(ceil_div(K, BLOCK_K)); }

// Stream-K: the units (tile, step of K), tile-major, are dealt out evenly and without a gap to the blocks.
struct Deal {
  int64_t units;
  int blocks, steps;  // steps: units of a tile
  LORA_BOTH int64_t begin(int block) const { return units * block / blocks; }
  LORA_BOTH int count(int block) const { return int(begin(block + 1) - begin(block)); }
  LORA_BOTH int tile(int block) const { return int(begin(block) / steps); }  // of its first unit
  LORA_BOTH int step(int block) const { return int(begin(block) % steps); }
  LORA_BOTH int owner(int64_t unit) const { return int(((unit + 1) * blocks - 1) / units); }
};

inline int64_t counters_needed(int N, int max_rank) {
  return 2 + int64_t(MAX_TOKENS) * (xa_pitch(max_rank) / RANK_TILE) + tiles_of(N);
}

// Bytes for `blocks` blocks: counters, two planes of partial sums a block, partial planes of XA, XA.
inline int64_t workspace_bytes(int M, int K, int max_rank, int blocks) {
  const int64_t tokens = width_of(M), pitch = xa_pitch(max_rank);
  return 4 * (COUNTERS + int64_t(blocks) * 2 * tokens * ROWS + shrink_splits(K) * tokens * pitch) + 2 * tokens * pitch;
}

inline void bind_workspace(DecodeArgs& args, void* workspace, int blocks) {
  const int64_t tokens = width_of(args.M), pitch = xa_pitch(args.max_rank);
  args.counters = static_cast<int32_t*>(workspace);
  args.planes = reinterpret_cast<float*>(args.counters + COUNTERS);
  args.xa_parts = args.planes + int64_t(blocks) * 2 * tokens * ROWS;
  args.xa = reinterpret_cast<uint16_t*>(args.xa_parts + shrink_splits(args.K) * tokens * pitch);
}

// In multi_lora_decode.cu. Both return null, or the text of what went wrong.
// How many blocks a launch of these sizes has on `device`: as many as stay resident, or as there are units.
const char* decode_blocks(const DecodeArgs& args, bool bfloat16, int device, int* blocks);
// Launches on `stream` of `device`, which is the current one; `bytes` of workspace that begin with zeroed counters.
const char* launch_decode(DecodeArgs args, bool bfloat16, void* workspace, int64_t bytes, int device, void* stream);

}  // namespace lora
