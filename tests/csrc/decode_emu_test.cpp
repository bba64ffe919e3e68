// decode.cuh on the machine of emu.h, against plain double arithmetic, by the package's error rule.
//
//   decode_emu_test SEED COUNT [EDGES]     COUNT drawn batches, after the list of edges unless EDGES is 0
//
// With EMU_SMALL only what up to 16 tokens in bf16 need is compiled, and larger batches are left out.
// Every batch runs with both rings, in two orders of threads and blocks, and all must agree bit for bit, as must one of its
// tokens in a batch of its own; counters must be zero afterwards; A and B hold NaN wherever no adapter is; every array ends where its last element does.
#include <cstdint>

#include "lora_kernels/decode.cuh"

using namespace lora;

namespace {

std::mt19937 generator;
int pick(int n) { return int(generator() % unsigned(n)); }
int pick(std::initializer_list<int> options) { return options.begin()[pick(int(options.size()))]; }
float normal() { return std::normal_distribution<float>()(generator); }

struct Batch {
  int M, N, K, blocks, stages;
  std::vector<int> ids, ranks;
  bool transposed;  // B as a pool holds it: (R, N)
  bool bias;
  int pad;          // elements between rows of X, W, A and B; a multiple of eight
  int hostile;      // slots whose place is not in A
  int sick = -1;    // a slot whose adapter is NaN, or infinite where M is odd
};

// Ends where its last row ends, on addresses of 16 bytes.
struct Matrix {
  int64_t stride;
  std::vector<uint16_t> bits;
  Matrix(int64_t rows, int64_t columns, int pad, uint16_t fill) : stride(columns + pad) {
    bits.assign(rows ? (rows - 1) * stride + columns : 0, fill);
  }
  uint16_t& at(int64_t row, int64_t column) { return bits[row * stride + column]; }
  uint16_t at(int64_t row, int64_t column) const { return bits[row * stride + column]; }
};

struct Norms {
  double most = 0, squares = 0;
  void take(double error) { most = std::fmax(most, std::fabs(error)), squares += error * error; }
};

template <class Number>
struct Layer {
  Batch batch;
  int R = 0, max_rank = 0, L;
  std::vector<int32_t> starts, ranks, ids;
  std::vector<float> scalings;
  Matrix X, W, A, B;
  std::vector<uint16_t> bias;

  explicit Layer(const Batch& b)
      : batch(b), L(int(b.ranks.size())), X(b.M, b.K, b.pad, nan()), W(b.N, b.K, b.pad, nan()),
        A(0, b.K, b.pad, nan()), B(0, 0, 0, nan()) {
    for (int slot = L - 1; slot >= 0; --slot) {  // not in order, and with gaps
      starts.insert(starts.begin(), R + slot % 2);
      R += b.ranks[slot] + slot % 2;
      max_rank = std::max(max_rank, b.ranks[slot]);
    }
    ranks.assign(b.ranks.begin(), b.ranks.end());
    ids.assign(b.ids.begin(), b.ids.end());
    A = Matrix(R, b.K, b.pad, nan());
    B = b.transposed ? Matrix(R, b.N, (8 - b.N % 8) % 8 + b.pad, nan()) : Matrix(b.N, R, b.pad, nan());
    const float spread = 1 / std::sqrt(float(b.K));
    fill(X, b.M, b.K, 1), fill(W, b.N, b.K, spread);
    for (int slot = 0; slot < L; ++slot) {
      scalings.push_back(1.7f / float(1 + slot % 3));
      for (int r = 0; r < ranks[slot]; ++r) {
        const bool sick = slot == b.sick;
        for (int k = 0; k < b.K; ++k) A.at(starts[slot] + r, k) = sick ? ill() : Number::narrow(normal() * spread);
        const float size = 1 / (scalings[slot] * std::sqrt(float(ranks[slot])));
        for (int n = 0; n < b.N; ++n) of_b(n, starts[slot] + r) = sick ? ill() : Number::narrow(normal() * size);
      }
    }
    for (int n = 0; b.bias && n < b.N; ++n) bias.push_back(Number::narrow(normal()));
    for (int slot = 0; slot < std::min(b.hostile, L); ++slot) {
      int32_t& start = starts[slot];
      int32_t& rank = ranks[slot];
      switch (slot % 6) {
        case 0: start = -1; break;
        case 1: start = R; rank = std::max(rank, 1); break;
        case 2: start = INT32_MAX; break;
        case 3: rank = INT32_MAX; break;
        case 4: rank = -5; break;
        default: start = INT32_MIN; rank = INT32_MIN;
      }
    }
  }
  static uint16_t nan() { return Number::narrow(NAN); }
  uint16_t ill() const { return Number::narrow(batch.M % 2 ? INFINITY : NAN); }
  uint16_t& of_b(int n, int r) { return batch.transposed ? B.at(r, n) : B.at(n, r); }
  uint16_t of_b(int n, int r) const { return batch.transposed ? B.at(r, n) : B.at(n, r); }
  static void fill(Matrix& matrix, int rows, int columns, float size) {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) matrix.at(i, j) = Number::narrow(normal() * size);
    }
  }

  template <template <int> class Ring, int TOKENS>
  void launch(std::vector<uint16_t>& Y, unsigned seed) const {
    const int blocks = int(std::min<int64_t>(batch.blocks, int64_t(tiles_of(batch.N)) * k_units(batch.K)));
    DecodeArgs args{};
    args.X = X.bits.data(), args.W = W.bits.data(), args.A = A.bits.data(), args.B = B.bits.data();
    args.bias = batch.bias ? bias.data() : nullptr;
    args.Y = Y.data();
    args.starts = starts.data(), args.ranks = ranks.data(), args.scalings = scalings.data(), args.ids = ids.data();
    args.M = batch.M, args.N = batch.N, args.K = batch.K, args.R = R, args.L = L, args.max_rank = max_rank;
    args.stride_xm = X.stride, args.stride_wn = W.stride, args.stride_ar = A.stride, args.stride_ym = batch.N;
    args.stride_bn = batch.transposed ? 1 : B.stride, args.stride_br = batch.transposed ? B.stride : 1;
    args.b_vector = batch.transposed && batch.N % 8 == 0, args.y_vector = batch.N % 8 == 0;
    args.stages = batch.stages;
    const int64_t bytes = workspace_bytes(batch.M, batch.K, max_rank, blocks);
    std::vector<char> workspace(bytes, char(0xff));
    std::memset(workspace.data(), 0, 4 * COUNTERS);
    bind_workspace(args, workspace.data(), blocks);
    emu::check(counters_needed(batch.N, max_rank) <= COUNTERS, "too many counters");
    for (int launch = 0; launch < 2; ++launch) {  // the second must find what the first has left
      std::fill(Y.begin(), Y.end(), nan());
      const char* after = workspace.data() + 4 * COUNTERS;
      emu::launch(blocks, Ring<TOKENS>::THREADS, shared_bytes(TOKENS, batch.stages), seed + launch, after, bytes - 4 * COUNTERS,
                  [&] { decode_kernel<Number, Ring, TOKENS>(args); });
      for (int i = 0; i < COUNTERS; ++i) emu::check(args.counters[i] == 0, "a counter that is not zero after the launch");
    }
  }
  template <template <int> class Ring>
  std::vector<uint16_t> run(unsigned seed) const {
    std::vector<uint16_t> Y(int64_t(batch.M) * batch.N);
    switch (width_of(batch.M)) {
      case 8: launch<Ring, 8>(Y, seed); break;
      case 16: launch<Ring, 16>(Y, seed); break;
#if !defined(EMU_SMALL)
      case 32: launch<Ring, 32>(Y, seed); break;
      default: launch<Ring, 64>(Y, seed);
#endif
    }
    return Y;
  }

  Layer alone(int m) const {  // token m in a batch of its own
    Layer one(*this);
    one.batch.M = 1;
    one.X = Matrix(1, batch.K, batch.pad, nan());
    std::copy_n(X.bits.begin() + m * X.stride, batch.K, one.X.bits.begin());
    one.ids = {ids[m]};
    return one;
  }

  int rank_of(int m) const {  // what token m may use: 0 is the base alone
    const int id = ids[m];
    if (id < 0 || id >= L || starts[id] < 0 || starts[id] >= R) return 0;
    return std::max(0, std::min({ranks[id], max_rank, R - starts[id]}));
  }
  void judge(const std::vector<uint16_t>& Y, Norms& ours, Norms& plain, Norms& truth) const {
    const auto value = [](uint16_t bits) { return double(Number::widen(bits)); };
    const auto rounded = [&](double x) { return value(Number::narrow(float(x))); };
    for (int m = 0; m < batch.M; ++m) {
      const int r = rank_of(m), slot = r ? ids[m] : -1;
      std::vector<double> exact_xa(r), plain_xa(r);
      for (int i = 0; i < r; ++i) {
        for (int k = 0; k < batch.K; ++k) exact_xa[i] += value(X.at(m, k)) * value(A.at(starts[slot] + i, k));
        plain_xa[i] = rounded(exact_xa[i]);
      }
      for (int n = 0; n < batch.N; ++n) {
        const double got = value(Y[int64_t(m) * batch.N + n]);
        double base = batch.bias ? value(bias[n]) : 0, update = 0, plain_update = 0;
        for (int k = 0; k < batch.K; ++k) base += value(X.at(m, k)) * value(W.at(n, k));
        for (int i = 0; i < r; ++i) {
          update += exact_xa[i] * value(of_b(n, starts[slot] + i));
          plain_update += plain_xa[i] * value(of_b(n, starts[slot] + i));
        }
        const double exact = base + (slot < 0 ? 0 : scalings[slot] * update);
        if (!std::isfinite(exact)) {
          emu::check(!std::isfinite(got), "a token whose adapter is not finite got a number");
          continue;
        }
        const double simple = slot < 0 ? rounded(base)
                                       : rounded(rounded(base) + rounded(rounded(scalings[slot]) * rounded(plain_update)));
        emu::check(std::isfinite(got), "a number that is not finite");
        ours.take(got - exact), plain.take(simple - exact), truth.take(exact);
      }
    }
  }
};

std::string words(const Batch& b, bool bfloat16) {
  std::string text = bfloat16 ? "bf16" : "fp16";
  for (const auto& [name, value] : {std::pair{"M", b.M}, {"N", b.N}, {"K", b.K}, {"blocks", b.blocks}, {"stages", b.stages},
                                    {"pad", b.pad}, {"transposed", int(b.transposed)}, {"bias", int(b.bias)},
                                    {"hostile", b.hostile}, {"sick", b.sick}}) {
    text += std::string(" ") + name + "=" + std::to_string(value);
  }
  text += " ranks";
  for (const int r : b.ranks) text += " " + std::to_string(r);
  text += " ids";
  for (const int id : b.ids) text += " " + std::to_string(id);
  return text;
}

void judge_all(const Norms& ours, const Norms& plain, const Norms& truth, double u, const char* what) {
  const bool close = ours.most <= 2 * plain.most + u / 4 * truth.most &&
                     std::sqrt(ours.squares) <= 1.25 * std::sqrt(plain.squares) + u / 4 * std::sqrt(truth.squares);
  if (!close) std::fprintf(stderr, "errors: ours %g, plain %g, truth %g\n", ours.most, plain.most, truth.most);
  emu::check(close, what);
}

struct Small {  // results too small to judge alone are judged together
  Norms ours, plain, truth;
};

template <class Number>
void examine(const Batch& batch, double u, Small& small) {
  constexpr bool bfloat16 = std::is_same_v<Number, gpu::Bfloat16>;
  if (std::getenv("EMU_WORDS")) std::fprintf(stderr, "%s\n", words(batch, bfloat16).c_str());
  const Layer<Number> layer(batch);
  const unsigned seed = generator();
  const std::vector<uint16_t> Y = layer.template run<AsyncRing>(seed), other = layer.template run<BulkRing>(seed + 7);
  if (std::memcmp(Y.data(), other.data(), 2 * Y.size())) {
    emu::fault(("the rings or the orders disagree: " + words(batch, bfloat16)).c_str());
  }
  const int m = pick(batch.M);
  const std::vector<uint16_t> one = layer.alone(m).template run<BulkRing>(seed + 11);
  if (std::memcmp(Y.data() + int64_t(m) * batch.N, one.data(), 2 * one.size())) {
    emu::fault(("a token gets something else when it is alone: " + words(batch, bfloat16)).c_str());
  }
  Norms ours, plain, truth;
  layer.judge(Y, ours, plain, truth);
  if (Y.size() >= 256) return judge_all(ours, plain, truth, u, words(batch, bfloat16).c_str());
  layer.judge(Y, small.ours, small.plain, small.truth);
}

Batch drawn() {
  Batch b{};
  b.M = pick({1, 2, 7, 8, 9, 12, 16, 17, 24, 32, 33, 64});
  b.N = pick({1, 8, 24, 63, 64, 65, 72, 128, 130, 200});
  b.K = pick({8, 16, 40, 120, 128, 136, 256, 264, 512, 520});
  b.blocks = pick({1, 2, 3, 4});
  b.stages = pick({2, 3, 4, 8});
  b.transposed = pick(3) > 0, b.bias = pick(2);
  b.pad = pick({0, 0, 8, 24});
  const int L = pick({0, 1, 2, 3, 5, 9});
  for (int slot = 0; slot < L; ++slot) b.ranks.push_back(pick({0, 1, 3, 8, 16, 16, 17, 33, 40}));
  const int kind = pick(5);
  for (int m = 0; m < b.M; ++m) {
    const int any = L ? pick(L) : 0;
    b.ids.push_back(kind == 0 ? -1 : kind == 1 ? m % std::max(L, 1) : kind == 2 && m % 2 ? -1 : any);
    if (pick(12) == 0) b.ids.back() = pick({L, L + 1, -2, INT32_MAX, INT32_MIN});
  }
  b.hostile = pick(4) ? 0 : pick(7);
  if (L && pick(4) == 0) b.sick = pick(L);
  return b;
}

std::vector<int> turns(int M, int L) {
  std::vector<int> ids;
  for (int m = 0; m < M; ++m) ids.push_back(m % (L + 1) - 1);
  return ids;
}

std::vector<Batch> edges() {
  return {
      {1, 64, 128, 1, 2, {0}, {16}, true, true, 0, 0},
      {5, 200, 520, 3, 3, turns(5, 3), {16, 0, 33}, true, false, 8, 0},        // several tiles a block, tiles shared
      {12, 200, 128, 1, 4, turns(12, 2), {4, 4}, true, false, 0, 0},           // a tile a stage, one after another
      {16, 72, 1032, 4, 2, turns(16, 4), {1, 8, 17, 40}, true, true, 0, 0},    // three parts of XA; a tail of every kind
      {17, 65, 136, 3, 8, turns(17, 2), {5, 7}, false, true, 8, 0},            // nothing by 16 bytes along N
      {64, 64, 256, 2, 2, turns(64, 9), {8, 8, 8, 8, 16, 16, 4, 1, 2}, true, true, 0, 0},
      {33, 128, 128, 2, 4, turns(33, 6), {4, 4, 4, 4, 4, 4}, true, true, 8, 6},  // every slot out of bounds
      {8, 64, 128, 1, 2, std::vector<int>(8, -1), {16, 16}, true, true, 0, 0},
      {9, 130, 264, 3, 3, turns(9, 3), {16, 3, 20}, true, true, 8, 0, 1},      // NaN beside numbers
      {4, 8, 8, 1, 2, turns(4, 1), {2}, true, false, 0, 0},
      {7, 72, 136, 2, 3, turns(7, 6), {4, 3, 4, 4, 4, 5}, true, false, 0, 6},  // out of bounds in six ways
  };
}

}  // namespace

int main(int count, char** words) {
  generator.seed(count > 1 ? std::atoi(words[1]) : 1);
  const int random = count > 2 ? std::atoi(words[2]) : 4;
  std::vector<Batch> batches;
  if (count <= 3 || std::atoi(words[3])) batches = edges();
  for (int i = 0; i < random; ++i) batches.push_back(drawn());
  Small bfloat16, half;
#if defined(EMU_SMALL)
  std::erase_if(batches, [](const Batch& batch) { return batch.M > 16; });
  for (const Batch& batch : batches) examine<gpu::Bfloat16>(batch, 1. / 256, bfloat16);
#else
  for (size_t i = 0; i < batches.size(); ++i) {
    if (i % 3 == 2) {
      examine<gpu::Half>(batches[i], 1. / 2048, half);
    } else {
      examine<gpu::Bfloat16>(batches[i], 1. / 256, bfloat16);
    }
  }
#endif
  judge_all(bfloat16.ours, bfloat16.plain, bfloat16.truth, 1. / 256, "small results in bf16");
  judge_all(half.ours, half.plain, half.truth, 1. / 2048, "small results in fp16");
  std::printf("%zu batches are right\n", batches.size());
}
