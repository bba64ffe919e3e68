// The two tasks of a mixed batch's update on a CPU. Included once by each file that is compiled for an instruction set, which
// names the floats of a vector first: LORA_VECTOR. All is in an unnamed namespace and nothing of the standard library is
// used, so that no code for one instruction set is linked into another's.
//
//     XA[i, j] = s X[m_i] . A[first + j]                  a row's sum over K in LORA_VECTOR lanes, then over the lanes
//     Y[m_i, n] += sum over j of XA[i, j] B[n, first + j]  in float32, rounded once
//
// Every result is made by one task in an order that depends on its own row alone: no bit of it knows the batch or threads.
#pragma once
#include <cstdint>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "lora_kernels/update_args.h"

namespace lora {
namespace {

constexpr int W = LORA_VECTOR;
typedef float Vec __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
constexpr int ROW_TILE = 4, RANK_STEP = 4, VECTORS = W == 16 ? 4 : 2;  // 16 sums in 32 registers, 8 in 16
constexpr int AHEAD = 4;  // ranks of B

// Of an element type: how STEP of them are loaded as factors of a dot product, and how that is added up.
struct Float {
  using Element = float;
  using Factors = Vec;
  static constexpr int STEP = W;
  static Factors factors(const float* p) { return load(p); }
  static Vec add_product(Vec sum, Factors a, Factors b) { return sum + a * b; }
  static Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
  static float one(float x) { return x; }
  static float rounded(float x) { return x; }
};

struct BFloat16 {
  using Element = uint16_t;
#if defined(__AVX512BF16__)  // two products a lane, in float32
  using Factors = __m512bh;
  static constexpr int STEP = 2 * W;
  static Factors factors(const uint16_t* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static Vec add_product(Vec sum, Factors a, Factors b) {
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
  }
#else
  using Factors = Vec;
  static constexpr int STEP = W;
  static Factors factors(const uint16_t* p) { return load(p); }
  static Vec add_product(Vec sum, Factors a, Factors b) { return sum + a * b; }
#endif
  static Vec load(const uint16_t* p) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
    return reinterpret_cast<Vec>(__builtin_convertvector(h, Bits) << 16);
  }
  static void store(uint16_t* p, Vec v) {  // to nearest, ties to even; NaN stays NaN
    const Bits u = reinterpret_cast<Bits>(v), nan = reinterpret_cast<Bits>(v != v);
    const Bits near = (u + 0x7fff + (u >> 16 & 1)) >> 16, quiet = u >> 16 | 0x40;
    const Halves h = __builtin_convertvector((nan & quiet) | (~nan & near), Halves);
    __builtin_memcpy(p, &h, sizeof h);
  }
  static float one(uint16_t x) {
    const uint32_t u = uint32_t(x) << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
  static uint16_t rounded(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    return uint16_t(x != x ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
};

inline float sum(Vec v) {
  float lane[W];
  __builtin_memcpy(lane, &v, sizeof v);
  for (int half = W / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

template <class T, int ROWS, int RANKS>
void dots(const typename T::Element* const* x, const typename T::Element* a, int64_t stride_ar, int64_t K, float scaling,
          float* xa, int64_t stride_xa) {
  Vec sums[ROWS][RANKS] = {};
  int64_t k = 0;
  for (; k + T::STEP <= K; k += T::STEP) {
    typename T::Factors av[RANKS];
    for (int j = 0; j < RANKS; ++j) av[j] = T::factors(a + j * stride_ar + k);
    for (int i = 0; i < ROWS; ++i) {
      const typename T::Factors xv = T::factors(x[i] + k);
      for (int j = 0; j < RANKS; ++j) sums[i][j] = T::add_product(sums[i][j], xv, av[j]);
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < RANKS; ++j) {
      float total = sum(sums[i][j]);
      for (int64_t t = k; t < K; ++t) total += T::one(x[i][t]) * T::one(a[j * stride_ar + t]);
      xa[i * stride_xa + j] = scaling * total;
    }
  }
}

template <class T>
void shrink(const UpdateArgs& args, const Chunk& chunk, const int64_t* order, int begin, int end, float* xa) {
  using E = typename T::Element;
  const E* X = static_cast<const E*>(args.X);
  const E* A = static_cast<const E*>(args.A) + chunk.first * args.stride_ar;
  for (int i = 0; i < chunk.rows;) {
    const int rows = chunk.rows - i < ROW_TILE ? 1 : ROW_TILE;
    const E* x[ROW_TILE];
    for (int each = 0; each < rows; ++each) x[each] = X + order[chunk.row + i + each] * args.stride_xm;
    for (int j = begin; j < end;) {
      const int ranks = end - j < RANK_STEP ? 1 : RANK_STEP;
      const auto made = rows > 1 ? (ranks > 1 ? dots<T, ROW_TILE, RANK_STEP> : dots<T, ROW_TILE, 1>)
                                 : (ranks > 1 ? dots<T, 1, RANK_STEP> : dots<T, 1, 1>);
      made(x, A + j * args.stride_ar, args.stride_ar, args.K, chunk.scaling, xa + chunk.xa + int64_t(i) * chunk.r + j, chunk.r);
      j += ranks;
    }
    i += rows;
  }
}

// Columns begin .. end of B's ranks as float32, rank by rank: a cache keeps them, where rows of B that lie a power of two apart
// would drive one another out. Zeros up to COLUMNS.
template <class T>
void pack(const UpdateArgs& args, const Chunk& chunk, int begin, int end, float* packed) {
  using E = typename T::Element;
  const E* B = static_cast<const E*>(args.B) + chunk.first * args.stride_br + begin * args.stride_bn;
  const int columns = end - begin;
  for (int j = 0; j < chunk.r; ++j) {
    const E* b = B + j * args.stride_br;
    float* to = packed + int64_t(j) * COLUMNS;
    int c = 0;
    if (args.stride_bn == 1) {
      for (; c + W <= columns; c += W) {
        if (j + AHEAD < chunk.r) __builtin_prefetch(b + AHEAD * args.stride_br + c);
        Float::store(to + c, T::load(b + c));
      }
    }
    for (; c < columns; ++c) to[c] = T::one(b[c * args.stride_bn]);
    for (; c < COLUMNS; ++c) to[c] = 0;
  }
}

template <class T, int ROWS>
void add_outer(const float* xa, int64_t r, const float* b, typename T::Element* const* y, int columns) {
  Vec sums[ROWS][VECTORS] = {};
  for (int64_t j = 0; j < r; ++j) {
    Vec bv[VECTORS];
    for (int v = 0; v < VECTORS; ++v) bv[v] = Float::load(b + j * COLUMNS + v * W);
    for (int i = 0; i < ROWS; ++i) {
      const float factor = xa[i * r + j];
      for (int v = 0; v < VECTORS; ++v) sums[i][v] += factor * bv[v];
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECTORS; ++v) {
      typename T::Element* to = y[i] + v * W;
      const int left = columns - v * W;
      if (left >= W) {
        T::store(to, T::load(to) + sums[i][v]);
      } else {
        for (int e = 0; e < left; ++e) to[e] = T::rounded(T::one(to[e]) + sums[i][v][e]);
      }
    }
  }
}

template <class T>
void expand(const UpdateArgs& args, const Chunk& chunk, const int64_t* order, int begin, int end, const float* xa, float* packed) {
  using E = typename T::Element;
  pack<T>(args, chunk, begin, end, packed);
  for (int i = 0; i < chunk.rows;) {
    const int rows = chunk.rows - i < ROW_TILE ? 1 : ROW_TILE;
    E* y[ROW_TILE];
    for (int each = 0; each < rows; ++each) {
      y[each] = static_cast<E*>(args.Y) + order[chunk.row + i + each] * args.stride_ym + begin;
    }
    for (int c = 0; begin + c < end; c += VECTORS * W) {
      const int columns = end - begin - c < VECTORS * W ? end - begin - c : VECTORS * W;
      const auto added = rows > 1 ? add_outer<T, ROW_TILE> : add_outer<T, 1>;
      added(xa + chunk.xa + int64_t(i) * chunk.r, chunk.r, packed + c, y, columns);
      for (int each = 0; each < rows; ++each) y[each] += VECTORS * W;
    }
    i += rows;
  }
}

}  // namespace

// The entry of this instruction set, by its name.
void LORA_SHRINK(const UpdateArgs& args, const Chunk& chunk, const int64_t* order, int begin, int end, float* xa) {
  args.half ? shrink<BFloat16>(args, chunk, order, begin, end, xa) : shrink<Float>(args, chunk, order, begin, end, xa);
}
void LORA_EXPAND(const UpdateArgs& args, const Chunk& chunk, const int64_t* order, int begin, int end, const float* xa,
                 float* packed) {
  args.half ? expand<BFloat16>(args, chunk, order, begin, end, xa, packed)
            : expand<Float>(args, chunk, order, begin, end, xa, packed);
}

}  // namespace lora
