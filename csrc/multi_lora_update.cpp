// Y[m] += s_l X[m] A_l^T B_l^T with l = ids[m], on a CPU: rows brought together by adapter, two rounds of tasks. Rows without an
// adapter, ids that name no slot and slots that do not lie in A add nothing; a rank ends with A and with max_rank.
#include <algorithm>
#include <memory>
#include <vector>

#include "lora_kernels/update_args.h"

namespace lora {

using Shrink = void (*)(const UpdateArgs&, const Chunk&, const int64_t* order, int begin, int end, float* xa);
using Expand = void (*)(const UpdateArgs&, const Chunk&, const int64_t* order, int begin, int end, const float* xa, float* packed);

#define LORA_LEVEL(name)                                                                         \
  void shrink_##name(const UpdateArgs&, const Chunk&, const int64_t*, int, int, float*);         \
  void expand_##name(const UpdateArgs&, const Chunk&, const int64_t*, int, int, const float*, float*);
LORA_LEVEL(plain)
#if defined(__x86_64__)
LORA_LEVEL(avx2)
LORA_LEVEL(avx512)
LORA_LEVEL(avx512bf16)
constexpr Shrink SHRINK[] = {shrink_plain, shrink_avx2, shrink_avx512, shrink_avx512bf16};
constexpr Expand EXPAND[] = {expand_plain, expand_avx2, expand_avx512, expand_avx512bf16};
#else
constexpr Shrink SHRINK[] = {shrink_plain};
constexpr Expand EXPAND[] = {expand_plain};
#endif

int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
  if (!wide) return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

namespace {

struct Task {
  int32_t chunk, begin, end;  // ranks to make, or columns of Y
};

struct Plan {
  std::vector<int64_t> order;  // rows with an adapter, by slot, in their own order
  std::vector<Chunk> chunks;
  std::vector<Task> shrink, expand;
  int64_t xa = 0;  // floats
};

Plan plan_update(const UpdateArgs& args) {
  Plan plan;
  std::vector<int64_t> place(args.L + 1);  // of each slot's next row in order
  const auto rank = [&](int64_t l) {
    const int64_t first = args.starts[l];
    return first < 0 ? 0 : std::max<int64_t>(0, std::min<int64_t>({args.ranks[l], args.max_rank, args.R - first}));
  };
  const auto owned = [&](int64_t m) { return args.ids[m] >= 0 && args.ids[m] < args.L; };
  for (int64_t m = 0; m < args.M; ++m) {
    if (owned(m)) ++place[args.ids[m] + 1];
  }
  int64_t row = 0;
  for (int64_t l = 0; l < args.L; ++l) {
    const int64_t rows = place[l + 1], r = rows ? rank(l) : 0;
    place[l] = r ? row : -1;
    for (int64_t done = 0; r && done < rows; done += CHUNK) {
      const auto part = int32_t(std::min<int64_t>(CHUNK, rows - done));
      const auto chunk = int32_t(plan.chunks.size());
      plan.chunks.push_back({row + done, plan.xa, part, args.starts[l], int32_t(r), args.scalings[l]});
      plan.xa += part * r;
      for (int32_t j = 0; j < r; j += RANK_PART) plan.shrink.push_back({chunk, j, int32_t(std::min<int64_t>(r, j + RANK_PART))});
      for (int64_t n = 0; n < args.N; n += COLUMNS) {
        plan.expand.push_back({chunk, int32_t(n), int32_t(std::min(args.N, n + COLUMNS))});
      }
    }
    if (r) row += rows;
  }
  plan.order.resize(row);
  for (int64_t m = 0; m < args.M; ++m) {
    if (owned(m) && place[args.ids[m]] >= 0) plan.order[place[args.ids[m]]++] = m;
  }
  return plan;
}

struct Round {
  const UpdateArgs& args;
  const Plan& plan;
  float* xa;
  int level;
};

constexpr int64_t ENOUGH = 1 << 16;  // multiplications that are worth a thread

int64_t grain(int64_t multiplications, int64_t tasks) { return std::max<int64_t>(1, ENOUGH * tasks / std::max<int64_t>(1, multiplications)); }

void shrink_tasks(int64_t begin, int64_t end, void* context) {
  const Round& round = *static_cast<const Round*>(context);
  for (int64_t t = begin; t < end; ++t) {
    const Task& task = round.plan.shrink[t];
    SHRINK[round.level](round.args, round.plan.chunks[task.chunk], round.plan.order.data(), task.begin, task.end, round.xa);
  }
}

void expand_tasks(int64_t begin, int64_t end, void* context) {
  const Round& round = *static_cast<const Round*>(context);
  int32_t widest = 0;
  for (int64_t t = begin; t < end; ++t) widest = std::max(widest, round.plan.chunks[round.plan.expand[t].chunk].r);
  const std::unique_ptr<float[]> packed(new float[int64_t(widest) * COLUMNS]);
  for (int64_t t = begin; t < end; ++t) {
    const Task& task = round.plan.expand[t];
    EXPAND[round.level](round.args, round.plan.chunks[task.chunk], round.plan.order.data(), task.begin, task.end, round.xa, packed.get());
  }
}

}  // namespace

void multi_lora_update(const UpdateArgs& args, Parallel parallel, int level) {
  const Plan plan = plan_update(args);
  if (plan.chunks.empty()) return;
  static const int best = best_level();
  const std::unique_ptr<float[]> xa(new float[plan.xa]);
  Round round{args, plan, xa.get(), level < 0 ? best : std::min(level, best)};
  const auto shrinks = int64_t(plan.shrink.size()), expands = int64_t(plan.expand.size());
  parallel(shrinks, grain(plan.xa * args.K, shrinks), shrink_tasks, &round);
  parallel(expands, grain(plan.xa * args.N, expands), expand_tasks, &round);
}

}  // namespace lora
