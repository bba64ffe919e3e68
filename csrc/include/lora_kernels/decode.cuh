// One launch of the linear layer with many adapters for up to 64 tokens; l = ids[m], the adapter of token m:
//
//   XA[m] = scaling_l X[m] A_l^T                          (rank_l,)   rounded to X's 16 bits, as every plan of this package does
//   Y[m]  = X[m] W^T + bias + XA[m] B_l^T                 (N,)
//
// A block streams its units of W (decode_args.h: Deal) and, before its first multiplication, makes its share of XA while
// the ring fills: tasks of one adapter, 16 of its rows of A and 512 columns. Whoever brings a task's last part adds the
// parts up; whoever brings a tile's last part adds those up, waits for XA, adds B's product and writes Y. A block that
// waits has done its own tasks, and all blocks are resident (a cooperative launch), so what it waits for comes.
//
// Every sum has a fixed order; no float is added atomically. What a token gets depends on its own adapter alone: products
// of other adapters, NaN or not, are never added to it. The mix is read on the device; where no token has an adapter,
// nothing is made, waited for or counted.
#pragma once
#include "decode_args.h"
#include "decode_ring.cuh"
#include "gpu.cuh"

namespace lora {

constexpr int COMPUTE = 32 * WARPS;  // threads that multiply
constexpr int READY = 0, LEFT = 1, FIRST_TASK = 2;  // counters: parts of XA that are made, blocks that have left, tasks

template <class Number, template <int> class RingOf, int TOKENS>
struct Decode {
  static constexpr int OCTETS = TOKENS / 8;
  using Ring = RingOf<TOKENS>;

  const DecodeArgs& args;
  Mix& mix;
  float* sums;  // TOKENS x SUM_PITCH
  Deal deal;
  int thread, warp, lane, group, quad;  // of a matrix fragment: group = row of eight, quad = place among four columns

  LORA_DEVICE Decode(const DecodeArgs& args_, char* shared, Deal deal_)
      : args(args_), mix(*reinterpret_cast<Mix*>(shared + BARRIER_BYTES)), sums(reinterpret_cast<float*>(shared + SUMS_AT)),
        deal(deal_), thread(gpu::thread()), warp(thread / 32), lane(thread % 32), group(lane / 4), quad(lane % 4) {}

  static LORA_DEVICE void sync() { gpu::sync_block<COMPUTE>(1); }
  LORA_DEVICE int pitch() const { return xa_pitch(args.max_rank); }
  LORA_DEVICE int tasks() const { return mix.before[MAX_TOKENS]; }
  LORA_DEVICE int32_t* tile_counter(int tile) const {
    return args.counters + FIRST_TASK + MAX_TOKENS * (pitch() / RANK_TILE) + tile;
  }

  static LORA_DEVICE void run(const DecodeArgs& args) {
    char* shared = gpu::shared();
    const Deal deal{int64_t(tiles_of(args.N)) * k_units(args.K), gpu::blocks(), k_units(args.K)};
    Ring ring(args, shared + stages_at(TOKENS), shared, deal);
    ring.start();
    if (ring.producer()) return ring.run();
    Decode self(args, shared, deal);
    self.read_mix();
    self.make_xa();
    self.stream(ring);
    self.leave();
  }

  // An empty slot, one that starts outside of A, and an id that names none give the base alone; a rank ends with A and max_rank.
  LORA_DEVICE void read_mix() {
    const int m = thread;
    if (m < MAX_TOKENS) {
      const int id = m < args.M ? args.ids[m] : -1;
      int start = 0, rank = 0;
      float scaling = 0;
      if (id >= 0 && id < args.L) {
        start = args.starts[id], rank = args.ranks[id], scaling = args.scalings[id];
        if (start < 0) start = 0, rank = 0;
        if (rank > args.max_rank) rank = args.max_rank;
        if (rank > args.R - start) rank = args.R - start;
      }
      mix.slot[m] = rank > 0 ? id : -1;
      mix.start[m] = start, mix.rank[m] = rank, mix.scaling[m] = scaling;
    }
    sync();
    if (m < MAX_TOKENS) {
      int leader = -1;
      for (int other = 0; other <= m && leader < 0; ++other) {
        if (mix.rank[m] > 0 && mix.slot[other] == mix.slot[m]) leader = other;
      }
      mix.leader[m] = leader;
    }
    sync();
    if (m <= MAX_TOKENS) {
      int before = 0;
      for (int other = 0; other < m && other < args.M; ++other) {
        if (mix.leader[other] == other) before += rank_tiles(other);
      }
      mix.before[m] = before;
    }
    if (m < MAX_TOKENS / 8) {
      uint32_t heads = 0;
      for (int i = 0; i < 8; ++i) {
        bool first = mix.leader[m * 8 + i] >= 0;
        for (int other = 0; other < i; ++other) first = first && mix.leader[m * 8 + other] != mix.leader[m * 8 + i];
        heads |= uint32_t(first) << i;
      }
      mix.heads[m] = heads;
    }
    sync();
  }
  LORA_DEVICE int rank_tiles(int token) const { return (mix.rank[token] + RANK_TILE - 1) / RANK_TILE; }

  // This block's tasks, and a word ahead to L2 for the columns of B that its tiles will want.
  LORA_DEVICE void make_xa() {
    if (tasks() == 0) return;
    const int splits = shrink_splits(args.K);
    for (int task = gpu::block(); task < tasks() * splits; task += gpu::blocks()) {
      const int part = task / splits;
      int leader = 0;  // the last token with before[token] <= part
      for (int step = MAX_TOKENS / 2; step; step /= 2) {
        if (mix.before[leader + step] <= part) leader += step;
      }
      shrink(leader, part - mix.before[leader], task % splits, part);
    }
    if (!args.b_vector) return;
    for (int64_t tile = deal.tile(gpu::block()); (tile + 1) * deal.steps <= deal.begin(gpu::block() + 1); ++tile) {
      for (int m = warp; m < args.M; m += WARPS) {
        if (mix.leader[m] != m) continue;
        for (int r = lane; r < mix.rank[m]; r += 32) {
          gpu::prefetch(static_cast<const uint16_t*>(args.B) + (mix.start[m] + r) * args.stride_br + tile * ROWS);
        }
      }
    }
  }

  // The adapter of `leader`: rows 16 tile .. of its A times X of its tokens, over columns 512 split ..
  LORA_DEVICE void shrink(int leader, int tile, int split, int part) {
    const int rows = mix.rank[leader] - tile * RANK_TILE;  // may be more than RANK_TILE
    const uint16_t* A = static_cast<const uint16_t*>(args.A) + (mix.start[leader] + tile * RANK_TILE) * args.stride_ar;
    float d[OCTETS][4] = {};
    LORA_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int k = split * SHRINK_K + warp * (SHRINK_K / WARPS) + j * 32 + quad * 8;
      gpu::Chunk a[2] = {}, x[OCTETS] = {};
      if (k < args.K) {
        if (group < rows) a[0] = gpu::load(A + group * args.stride_ar + k);
        if (group + 8 < rows) a[1] = gpu::load(A + (group + 8) * args.stride_ar + k);
        LORA_UNROLL
        for (int octet = 0; octet < OCTETS; ++octet) {
          const int m = octet * 8 + group;
          if (mix.leader[m] == leader) x[octet] = gpu::load_cached(static_cast<const uint16_t*>(args.X) + m * args.stride_xm + k);
        }
      }
      LORA_UNROLL
      for (int octet = 0; octet < OCTETS; ++octet) {
        multiply(d[octet], a[0], a[1], x[octet]);
      }
    }
    // Sums of the eight warps, first of four pairs, then of those in order: [token][pair][16 rows of A].
    LORA_UNROLL
    for (int half = 1; half >= 0; --half) {
      if (warp / 4 == half) {
        LORA_UNROLL
        for (int octet = 0; octet < OCTETS; ++octet) {
          LORA_UNROLL
          for (int i = 0; i < 4; ++i) {
            float* sum = sums + (octet * 8 + 2 * quad + i % 2) * SUM_PITCH + warp % 4 * RANK_TILE + group + i / 2 * 8;
            *sum = half ? d[octet][i] : *sum + d[octet][i];
          }
        }
      }
      sync();
    }
    for (int i = thread; i < TOKENS * 4; i += COMPUTE) {
      const int m = i / 4, r = i % 4 * 4;
      if (mix.leader[m] != leader) continue;
      const float* sum = sums + m * SUM_PITCH + r;
      gpu::Chunk c;
      LORA_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float value = sum[e] + sum[e + 16] + sum[e + 32] + sum[e + 48];
        c.w[e] = gpu::as_bits(r + e < rows ? value : 0.f);
      }
      gpu::publish(xa_part(split, m, tile * RANK_TILE + r), c);
    }
    const int splits = shrink_splits(args.K);
    if (!last_to_arrive(args.counters + FIRST_TASK + part, splits)) return;
    for (int i = thread; i < TOKENS * 4; i += COMPUTE) {
      const int m = i / 4, r = tile * RANK_TILE + i % 4 * 4;
      if (mix.leader[m] != leader) continue;
      float sum[4] = {};
      for (int s = 0; s < splits; ++s) {
        const gpu::Chunk c = gpu::load_published(xa_part(s, m, r));
        LORA_UNROLL
        for (int e = 0; e < 4; ++e) sum[e] += gpu::as_float(c.w[e]);
      }
      const float scaling = mix.scaling[leader];
      const gpu::Pair xa{{pack(scaling * sum[0], scaling * sum[1]), pack(scaling * sum[2], scaling * sum[3])}};
      gpu::publish(args.xa + m * pitch() + r, xa);
    }
    sync();
    if (thread == 0) gpu::add_acq_rel(args.counters + READY, 1);
  }
  LORA_DEVICE float* xa_part(int split, int m, int r) const {
    return args.xa_parts + (int64_t(split) * TOKENS + m) * pitch() + r;
  }
  static LORA_DEVICE uint32_t pack(float low, float high) {
    return Number::narrow(low) | uint32_t(Number::narrow(high)) << 16;
  }

  // d += rows (16 x 32 columns) times tokens (8 x 32 columns). A lane brings eight neighbouring columns of rows `group` and
  // `group + 8` and of token `group`: which columns a step of the instruction takes is the same for both, so it is free.
  static LORA_DEVICE void multiply(float (&d)[4], const gpu::Chunk& low, const gpu::Chunk& high, const gpu::Chunk& x) {
    LORA_UNROLL
    for (int step = 0; step < 2; ++step) {
      const uint32_t a[4] = {low.w[2 * step], high.w[2 * step], low.w[2 * step + 1], high.w[2 * step + 1]};
      const uint32_t b[2] = {x.w[2 * step], x.w[2 * step + 1]};
      Number::mma(d, a, b);
    }
  }

  // Whether this block is the last of `count` to bring its part; all that the others published may be read then.
  LORA_DEVICE bool last_to_arrive(int32_t* counter, int count) {
    sync();
    if (thread == 0) {
      mix.found = gpu::add_acq_rel(counter, 1) == count - 1;
      if (mix.found) gpu::reset(counter);
    }
    sync();
    return mix.found;
  }

  LORA_DEVICE void stream(Ring& ring) {
    const int steps = deal.steps, count = deal.count(gpu::block());
    int tile = deal.tile(gpu::block()), step = deal.step(gpu::block());
    bool waited = tasks() == 0;
    for (int i = 0; i < count; ++tile, step = 0) {
      const bool begun = step == 0;
      float d[2][OCTETS][4] = {};
      for (; step < steps && i < count; ++step, ++i) {
        const char* stage = ring.acquire(i);
        accumulate(d, stage, step * BLOCK_K);
        ring.release(i);
      }
      add_up(d);
      if ((begun && step == steps) || last_part(tile)) {
        if (!waited) wait_for_xa();
        waited = true;
        finish(tile);
      }
      sync();  // the sums may be overwritten
    }
  }
  LORA_DEVICE void wait_for_xa() {
    if (thread == 0) {
      while (gpu::load_acquire(args.counters + READY) < tasks()) gpu::pause();
    }
    sync();
  }

  // One stage: this warp's 32 rows and 32 columns. Past K there is nothing in the stage, or what an earlier one left.
  LORA_DEVICE void accumulate(float (&d)[2][OCTETS][4], const char* stage, int k0) {
    const int warp_n = warp % WARPS_N, column = warp / WARPS_N * 32 + quad * 8;
    const bool inside = k0 + column < args.K;
    gpu::Chunk w[4] = {};
    LORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (inside) w[i] = gpu::load_shared(stage + row_offset(warp_n * 32 + i * 8 + group) + column * 2);
    }
    LORA_UNROLL
    for (int octet = 0; octet < OCTETS; ++octet) {
      gpu::Chunk x = {};
      if (inside) x = gpu::load_shared(stage + row_offset(ROWS + octet * 8 + group) + column * 2);
      multiply(d[0][octet], w[0], w[1], x);
      multiply(d[1][octet], w[2], w[3], x);
    }
  }

  // The tile's sums over the warps that share its columns, in order, as sums[token][row].
  LORA_DEVICE void add_up(const float (&d)[2][OCTETS][4]) {
    for (int turn = 0; turn < WARPS_K; ++turn) {
      if (warp / WARPS_N == turn) {
        LORA_UNROLL
        for (int half = 0; half < 2; ++half) {
          LORA_UNROLL
          for (int octet = 0; octet < OCTETS; ++octet) {
            LORA_UNROLL
            for (int e = 0; e < 4; ++e) {
              const int m = octet * 8 + 2 * quad + e % 2, n = warp % WARPS_N * 32 + half * 16 + group + e / 2 * 8;
              float* sum = sums + m * SUM_PITCH + n;
              *sum = turn ? *sum + d[half][octet][e] : d[half][octet][e];
            }
          }
        }
      }
      sync();
    }
  }

  // Publishes this block's part of a tile that several blocks share; true for the last, which then has the whole in `sums`.
  LORA_DEVICE bool last_part(int tile) {
    for (int i = thread; i < TOKENS * ROWS / 4; i += COMPUTE) {
      const int m = i / (ROWS / 4), n = i % (ROWS / 4) * 4;
      gpu::publish(plane(gpu::block(), tile) + m * ROWS + n, gpu::load_shared(sums + m * SUM_PITCH + n));
    }
    const int from = deal.owner(int64_t(tile) * deal.steps), to = deal.owner(int64_t(tile + 1) * deal.steps - 1);
    if (!last_to_arrive(tile_counter(tile), to - from + 1)) return false;
    for (int i = thread; i < TOKENS * ROWS / 4; i += COMPUTE) {
      const int m = i / (ROWS / 4), n = i % (ROWS / 4) * 4;
      float* sum = sums + m * SUM_PITCH + n;
      for (int block = from; block <= to; ++block) {
        const gpu::Chunk c = gpu::load_published(plane(block, tile) + m * ROWS + n);
        LORA_UNROLL
        for (int e = 0; e < 4; ++e) sum[e] = block == from ? gpu::as_float(c.w[e]) : sum[e] + gpu::as_float(c.w[e]);
      }
    }
    sync();
    return true;
  }
  // Where `block` leaves its part: it shares at most its first tile and its last one with others.
  LORA_DEVICE float* plane(int block, int tile) const {
    const bool later = deal.tile(block) != tile;
    return args.planes + (int64_t(block) * 2 + later) * (TOKENS * ROWS);
  }

  // Y of a whole tile, a warp for eight tokens. A lane has eight neighbouring rows of W for two tokens.
  LORA_DEVICE void finish(int tile) {
    const int octet = warp, n0 = tile * ROWS + group * 8;
    if (octet >= OCTETS || octet * 8 >= args.M || tile * ROWS >= args.N) return;
    float y[2][8];
    LORA_UNROLL
    for (int token = 0; token < 2; ++token) {
      LORA_UNROLL
      for (int half = 0; half < 8; half += 4) {
        const float* sum = sums + (octet * 8 + 2 * quad + token) * SUM_PITCH + group * 8 + half;
        const gpu::Chunk c = gpu::load_shared(sum);
        LORA_UNROLL
        for (int e = 0; e < 4; ++e) y[token][half + e] = gpu::as_float(c.w[e]);
      }
    }
    if (args.bias) {
      LORA_UNROLL
      for (int e = 0; e < 8; ++e) {
        const float bias = n0 + e < args.N ? Number::widen(static_cast<const uint16_t*>(args.bias)[n0 + e]) : 0.f;
        y[0][e] += bias, y[1][e] += bias;
      }
    }
    if (tasks() && args.b_vector) expand<true, 4>(y, octet, n0);
    if (tasks() && !args.b_vector) expand<false, 1>(y, octet, n0);
    LORA_UNROLL
    for (int token = 0; token < 2; ++token) {
      const int m = octet * 8 + 2 * quad + token;
      if (m >= args.M) continue;
      uint16_t* Y = static_cast<uint16_t*>(args.Y) + m * args.stride_ym + n0;
      if (args.y_vector) {
        gpu::Chunk c;
        LORA_UNROLL
        for (int e = 0; e < 4; ++e) c.w[e] = pack(y[token][2 * e], y[token][2 * e + 1]);
        if (n0 < args.N) gpu::store(Y, c);
      } else {
        LORA_UNROLL
        for (int e = 0; e < 8; ++e) {
          if (n0 + e < args.N) Y[e] = Number::narrow(y[token][e]);
        }
      }
    }
  }

  // y += XA B_l^T, adapter after adapter of the octet, 16 ranks a step; the loads of AHEAD steps go out together.
  template <bool VECTOR, int AHEAD>
  LORA_DEVICE void expand(float (&y)[2][8], int octet, int n0) {
    const int m0 = octet * 8;
    float part[4][4] = {};
    int current = -1, tile = 0;  // the adapter being added; the next step of the next one
    uint32_t heads = mix.heads[octet];
    do {
      int leader[AHEAD];
      gpu::Chunk b[AHEAD][4];
      gpu::Pair xa[AHEAD];
      LORA_UNROLL
      for (int step = 0; step < AHEAD; ++step) {
        leader[step] = heads ? mix.leader[m0 + gpu::lowest_bit(heads)] : -1;
        load_step<VECTOR>(b[step], xa[step], leader[step], m0 + group, tile * RANK_TILE + quad * 4, n0);
        if (heads && ++tile == rank_tiles(leader[step])) heads &= heads - 1, tile = 0;
      }
      LORA_UNROLL
      for (int step = 0; step < AHEAD; ++step) {
        if (leader[step] != current) {
          if (current >= 0) take(y, part, current, m0);
          current = leader[step];
        }
        if (current >= 0) {
          LORA_UNROLL
          for (int i = 0; i < 4; ++i) {  // rows 2 i and 2 i + 1 of each group's eight
            const gpu::Chunk(&c)[4] = b[step];
            const uint32_t a[4] = {low(c[0].w[i], c[1].w[i]), high(c[0].w[i], c[1].w[i]), low(c[2].w[i], c[3].w[i]),
                                   high(c[2].w[i], c[3].w[i])};
            Number::mma(part[i], a, xa[step].w);
          }
        }
      }
    } while (current >= 0);
  }
  static LORA_DEVICE uint32_t low(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
  static LORA_DEVICE uint32_t high(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

  // Ranks r .. r + 3 of an adapter: b[i] = B[n0 .. n0 + 7, start + r + i], zero past its rank and past N; xa of token m.
  template <bool VECTOR>
  LORA_DEVICE void load_step(gpu::Chunk (&b)[4], gpu::Pair& xa, int leader, int m, int r, int n0) const {
    xa = {};
    const int rank = leader >= 0 ? mix.rank[leader] : 0;
    if (rank > 0 && mix.leader[m] == leader) xa = gpu::load_pair_published(args.xa + m * pitch() + r);
    LORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      b[i] = {};
      if (r + i >= rank || n0 >= args.N) continue;
      const uint16_t* B = static_cast<const uint16_t*>(args.B) + (mix.start[leader] + r + i) * args.stride_br;
      if constexpr (VECTOR) {
        b[i] = gpu::load_cached(B + n0);
      } else {
        LORA_UNROLL
        for (int e = 0; e < 8; ++e) {
          if (n0 + e < args.N) b[i].w[e / 2] |= uint32_t(B[(n0 + e) * args.stride_bn]) << 16 * (e % 2);
        }
      }
    }
  }
  // Adds an adapter's product to the tokens that have it, and to no other.
  LORA_DEVICE void take(float (&y)[2][8], float (&part)[4][4], int leader, int m0) const {
    LORA_UNROLL
    for (int token = 0; token < 2; ++token) {
      const bool mine = mix.leader[m0 + 2 * quad + token] == leader;
      LORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (mine) y[token][2 * i] += part[i][token], y[token][2 * i + 1] += part[i][2 + token];
      }
    }
    LORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      LORA_UNROLL
      for (int e = 0; e < 4; ++e) part[i][e] = 0;
    }
  }

  // The last block to leave puts back the counter that the others have waited on.
  LORA_DEVICE void leave() {
    if (tasks() && thread == 0 && gpu::add_acq_rel(args.counters + LEFT, 1) == gpu::blocks() - 1) {
      gpu::reset(args.counters + READY);
      gpu::reset(args.counters + LEFT);
    }
  }
};

template <class Number, template <int> class Ring, int TOKENS>
LORA_KERNEL(Ring<TOKENS>::THREADS) decode_kernel(LORA_PARAM DecodeArgs args) {
  if constexpr (gpu::RUNS<Ring<TOKENS>::BULK>) Decode<Number, Ring, TOKENS>::run(args);
}

}  // namespace lora
