// The C++ of a mixed batch's update, by every instruction set that this CPU has, against double arithmetic. Arrays end where their
// last element does (ASan sees a step further), A and B are NaN where no adapter lies, tasks run in drawn order and cuts, and
// each row must have the bits that it has alone, whatever an adapter of others or another row holds.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "lora_kernels/update_args.h"

using namespace lora;

static std::mt19937 draw;
static int below(int n) { return int(draw() % unsigned(n)); }

static void in_order(int64_t count, int64_t, void (*f)(int64_t, int64_t, void*), void* context) { f(0, count, context); }

static void shuffled(int64_t count, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context) {
  std::vector<std::pair<int64_t, int64_t>> parts;
  for (int64_t begin = 0; begin < count;) {
    const int64_t end = std::min(count, begin + std::max<int64_t>(grain > 4 ? 3 : grain, 1 + below(5)));
    parts.emplace_back(begin, end), begin = end;
  }
  std::shuffle(parts.begin(), parts.end(), draw);
  for (const auto& [begin, end] : parts) f(begin, end, context);
}

static uint16_t half(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return uint16_t(std::isnan(x) ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static float whole(uint16_t h) {
  const uint32_t u = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

struct Matrix {  // of floats or bfloat16 in memory that ends with the last element
  int64_t rows, columns, stride;
  bool halves;
  std::vector<double> value;
  std::unique_ptr<char[]> memory;
  Matrix(int64_t rows, int64_t columns, bool halves, int gap) : rows(rows), columns(columns), stride(columns + gap), halves(halves), value(rows * columns) {
    const int64_t count = rows ? (rows - 1) * stride + columns : 0;
    memory.reset(new char[count * (halves ? 2 : 4)]);
    for (int64_t i = 0; i < count; ++i) write(i, NAN);
  }
  void write(int64_t at, float x) {
    if (halves) reinterpret_cast<uint16_t*>(memory.get())[at] = half(x);
    else reinterpret_cast<float*>(memory.get())[at] = x;
  }
  float read(int64_t i, int64_t j) const {
    const int64_t at = i * stride + j;
    return halves ? whole(reinterpret_cast<const uint16_t*>(memory.get())[at]) : reinterpret_cast<const float*>(memory.get())[at];
  }
  void set(int64_t i, int64_t j, float x) { write(i * stride + j, x), value[i * columns + j] = read(i, j); }
  void fill(int64_t from, int64_t to) {
    std::normal_distribution<float> normal;
    for (int64_t i = from; i < to; ++i) for (int64_t j = 0; j < columns; ++j) set(i, j, normal(draw));
  }
};

static bool fault(const char* what) { return std::fprintf(stderr, "fault: %s\n", what), false; }

static bool one_case(bool halves, int level) {
  const int sizes[] = {1, 3, 15, 16, 17, 40, 64, 65, 130, 257, 300};
  const int64_t K = sizes[below(11)], N = sizes[below(11)], M = below(4) ? 1 + below(40) : 100 + below(200), L = 1 + below(6);
  const int shape[] = {0, 1, 2, 4, 5, 8, 16, 17, 33};
  std::vector<int32_t> starts(L), ranks(L), ids(M);
  std::vector<float> scalings(L);
  int64_t R = below(3), max_rank = 1;
  for (int64_t l = 0; l < L; ++l) {
    starts[l] = int32_t(R), ranks[l] = shape[below(9)], scalings[l] = 0.25f * (1 + below(8));
    R += ranks[l] + below(3), max_rank = std::max<int64_t>(max_rank, ranks[l]);
  }
  R += max_rank == 1 && R == 0;  // max_rank is at most R
  max_rank = std::min(max_rank, R);
  for (auto& id : ids) id = below(8) ? below(int(L)) : below(2) ? -1 : int(L);
  const int wild[] = {INT32_MAX, INT32_MIN, -1, -2, int(R)};
  std::vector<int32_t> true_starts = starts, true_ranks = ranks;
  if (below(2)) {  // a slot out of the buffers, or a rank past their end
    const int64_t l = below(int(L));
    if (below(2)) starts[l] = wild[below(5)], true_ranks[l] = 0;
    else if (starts[l] + ranks[l] == R) ranks[l] = INT32_MAX, true_ranks[l] = int32_t(std::min(max_rank, R - starts[l]));
  }
  const bool by_rank = below(2);
  Matrix X(M, K, halves, below(3)), A(R, K, halves, below(3)), B(by_rank ? R : N, by_rank ? N : R, halves, below(3)), Y(M, N, halves, below(3));
  X.fill(0, M), Y.fill(0, M);
  for (int64_t l = 0; l < L; ++l) {
    A.fill(true_starts[l], true_starts[l] + true_ranks[l]);
    std::normal_distribution<float> normal;
    for (int64_t j = true_starts[l]; j < true_starts[l] + true_ranks[l]; ++j) {
      for (int64_t n = 0; n < N; ++n) by_rank ? B.set(j, n, normal(draw)) : B.set(n, j, normal(draw));
    }
  }
  const Matrix before(std::move(Y));
  const auto made = [&](Parallel parallel, int64_t from, int64_t rows) {  // Y of rows from .. from + rows alone
    const int64_t bytes = halves ? 2 : 4;
    std::unique_ptr<char[]> out(new char[((rows - 1) * before.stride + N) * bytes]);
    std::memcpy(out.get(), before.memory.get() + from * before.stride * bytes, ((rows - 1) * before.stride + N) * bytes);
    std::vector<int32_t> own(ids.begin() + from, ids.begin() + from + rows);
    UpdateArgs args{};
    args.X = X.memory.get() + from * X.stride * bytes, args.A = A.memory.get(), args.B = B.memory.get(), args.Y = out.get();
    args.ids = own.data(), args.starts = starts.data(), args.ranks = ranks.data(), args.scalings = scalings.data();
    args.half = halves, args.M = rows, args.N = N, args.K = K, args.R = R, args.L = L, args.max_rank = max_rank;
    args.stride_xm = X.stride, args.stride_ar = A.stride, args.stride_ym = before.stride;
    args.stride_bn = by_rank ? 1 : B.stride, args.stride_br = by_rank ? B.stride : 1;
    multi_lora_update(args, parallel, level);
    return out;
  };
  const auto value = [&](const char* out, int64_t m, int64_t n) {
    const int64_t at = m * before.stride + n;
    return halves ? whole(reinterpret_cast<const uint16_t*>(out)[at]) : reinterpret_cast<const float*>(out)[at];
  };
  const auto out = made(in_order, 0, M);
  for (int64_t m = 0; m < M; ++m) {
    const int64_t l = ids[m];
    const int64_t r = l >= 0 && l < L ? true_ranks[l] : 0;
    for (int64_t n = 0; n < N; ++n) {
      double sum = before.value[m * N + n], size = std::abs(sum);
      for (int64_t j = 0; j < r; ++j) {
        double xa = 0, xa_size = 0;
        for (int64_t k = 0; k < K; ++k) {
          const double term = X.value[m * K + k] * A.value[(true_starts[l] + j) * K + k];
          xa += term, xa_size += std::abs(term);
        }
        const double b = by_rank ? B.value[(true_starts[l] + j) * N + n] : B.value[n * R + true_starts[l] + j];
        sum += scalings[l] * xa * b, size += std::abs(scalings[l] * xa_size * b);
      }
      const double allowed = halves ? std::abs(sum) / 256 + size * 1e-6 : size * 1e-6;
      if (!(std::abs(value(out.get(), m, n) - sum) <= allowed)) {
        std::fprintf(stderr, "Y[%ld, %ld] is %g and not %g (rank %ld)\n", long(m), long(n), value(out.get(), m, n), sum, long(r));
        return fault("wrong");
      }
    }
  }
  const int64_t bytes = ((M - 1) * before.stride + N) * (halves ? 2 : 4);
  if (std::memcmp(out.get(), made(shuffled, 0, M).get(), bytes)) return fault("another order, other bits");
  const int64_t m = below(int(M));
  const auto alone = made(in_order, m, 1);
  const int64_t row = before.stride * (halves ? 2 : 4);
  if (std::memcmp(out.get() + m * row, alone.get(), N * (halves ? 2 : 4))) return fault("a row alone has other bits");

  // What one adapter or one row of X holds reaches no other row.
  const int64_t ill = below(int(L)), sick = below(int(M));
  const float values[] = {NAN, INFINITY, -INFINITY, 1e38f, 3e38f};
  const float bad = values[below(5)];
  const int where = below(3);
  for (int64_t j = true_starts[ill]; where < 2 && j < true_starts[ill] + true_ranks[ill]; ++j) {
    for (int64_t k = 0; k < K; ++k) if (where == 0) A.set(j, k, bad);
    for (int64_t n = 0; n < N; ++n) by_rank ? B.set(j, n, bad) : B.set(n, j, bad);
  }
  for (int64_t k = 0; where == 2 && k < K; ++k) X.set(sick, k, bad);
  const auto after = made(in_order, 0, M);
  for (int64_t i = 0; i < M; ++i) {
    if (where == 2 ? i == sick : ids[i] == ill) continue;
    if (std::memcmp(out.get() + i * row, after.get() + i * row, N * (halves ? 2 : 4))) return fault("a row takes from another");
  }
  return true;
}

int main(int, char** arguments) {
  const int seed = std::atoi(arguments[1]), cases = std::atoi(arguments[2]);
  int made = 0;
  for (int level = 0; level <= best_level(); ++level) {
    for (const bool halves : {false, true}) {
      for (int i = 0; i < cases; ++i, ++made) {
        draw.seed(seed * 1000003 + i);
        if (!one_case(halves, level)) return std::fprintf(stderr, "level %d, halves %d, case %d\n", level, halves, i), 1;
      }
    }
  }
  std::printf("%d batches are right, instruction sets 0 to %d\n", made, best_level());
}
