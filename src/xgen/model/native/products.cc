// Products of bfloat16 matrices with float32 sums, for CPUs with AVX512-BF16.
//
// Every element of C is summed by one thread in an order that depends on the shapes alone: results repeat.

#include "tiles.h"

namespace ffi = xla::ffi;

namespace xgen {
namespace {

// Few rows: it is the reading of B that takes the time, so B goes from memory straight into the products. R rows of A by
// G panels of B, which lies as [K, N].
template <int R, int G>
void stream(const uint32_t* a, int64_t step, const Matrix& b, int64_t n, int64_t n1, float* c, int64_t c_stride) {
  constexpr int64_t kAhead = 16;  // rows
  const int64_t depth = b.rows, stride = b.columns;
  __m512 low[R][G], high[R][G];
  __mmask32 masks[G];
  for (int g = 0; g < G; ++g) masks[g] = first(n1 - n - g * kColumns);
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) low[r][g] = high[r][g] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2) {
    const bf16* row = b.data + k * stride + n;
    const bool second = k + 1 < depth;
    for (int g = 0; g < G; ++g) {
      _mm_prefetch(row + kAhead * stride + g * kColumns, _MM_HINT_T0);
      _mm_prefetch(row + (kAhead + 1) * stride + g * kColumns, _MM_HINT_T0);
      __m512i b0, b1;
      interleave(_mm512_maskz_loadu_epi16(masks[g], row + g * kColumns),
                 _mm512_maskz_loadu_epi16(second ? masks[g] : 0, row + stride + g * kColumns), &b0, &b1);
      for (int r = 0; r < R; ++r) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(a[r * step + k / 2]);
        low[r][g] = _mm512_dpbf16_ps(low[r][g], x, (__m512bh)b0);
        high[r][g] = _mm512_dpbf16_ps(high[r][g], x, (__m512bh)b1);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) {
      _mm512_storeu_ps(c + r * c_stride + g * kColumns, low[r][g]);
      _mm512_storeu_ps(c + r * c_stride + g * kColumns + 16, high[r][g]);
    }
}

// The same of 4 columns of a B that lies as [N, K].
template <int R>
void stream_turned(const uint32_t* a, int64_t step, const Matrix& b, int64_t n, int64_t n1, float* c, int64_t c_stride) {
  const int64_t depth = b.rows, count = std::min<int64_t>(4, n1 - n);
  const bf16* rows[4];
  __m512 sums[R][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = b.data + (n + std::min<int64_t>(i, count - 1)) * depth;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r][i] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; k += 32) {
    const __mmask32 mask = first(depth - k);
    __m512bh w[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) w[i] = (__m512bh)_mm512_maskz_loadu_epi16(mask, rows[i] + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512bh x = (__m512bh)_mm512_maskz_loadu_epi16(mask, reinterpret_cast<const bf16*>(a + r * step) + k);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], x, w[i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const float sum = _mm512_reduce_add_ps(sums[r][i]);
      if (i < count) c[r * c_stride + i] = sum;
    }
  }
}

// R rows of A by B's columns [n0, n1); more than four rows in two passes, of which the second finds B in the cache.
template <int R>
void few(const uint32_t* a, int64_t step, const Matrix& b, int64_t n0, int64_t n1, float* c, int64_t c_stride) {
  constexpr int kFirst = R <= 4 ? R : (R + 1) / 2, kSecond = R - kFirst;
  constexpr int G = kFirst <= 3 ? 4 : 3;
  const int64_t wide = b.turned ? 4 : G * kColumns;
  for (int64_t n = n0; n < n1; n += wide) {
    float* to = c + (n - n0);
    if (b.turned)
      stream_turned<kFirst>(a, step, b, n, n1, to, c_stride);
    else
      stream<kFirst, G>(a, step, b, n, n1, to, c_stride);
    if constexpr (kSecond > 0) {
      const uint32_t* rest = a + kFirst * step;
      if (b.turned)
        stream_turned<kSecond>(rest, step, b, n, n1, to + kFirst * c_stride, c_stride);
      else
        stream<kSecond, G>(rest, step, b, n, n1, to + kFirst * c_stride, c_stride);
    }
  }
}

using Few = void (*)(const uint32_t*, int64_t, const Matrix&, int64_t, int64_t, float*, int64_t);
constexpr Few kFew[] = {few<1>, few<2>, few<3>, few<4>, few<5>, few<6>, few<7>, few<8>};
constexpr int64_t kFewest = 8;

struct Product {
  Matrix a, b;
  void* c;
  bool wide;  // C is float32, else bfloat16
  int64_t rows, columns;  // of C, that a task computes

  // C[m0:m1, n0:n1]
  void block(int64_t m0, int64_t m1, int64_t n0, int64_t n1) const {
    if (a.rows <= kFewest && !a.turned) return stripe(n0, n1);
    const int64_t width = up(n1 - n0, kColumns), depth = a.columns;
    const int64_t parts = (depth + kDepth - 1) / kDepth, part = up((depth + parts - 1) / parts, 2);
    bf16* packed = kept<bf16>(0, width * up(part, 2));
    uint32_t* left = kept<uint32_t>(1, a.turned ? up(m1 - m0, 16) * (part + 1) / 2 + 64 : kRows * a_stride(false, 0, part) + 64);
    float* sums = kept<float>(2, up(m1 - m0, kRows) * width);
    for (int64_t k0 = 0; k0 < depth; k0 += part) {
      const int64_t deep = std::min(part, depth - k0), pairs = (deep + 1) / 2;
      pack_b(b, k0, deep, n0, n1, packed);
      if (a.turned) pack_a(a, k0, deep, m0, m1, left);
      for (int64_t m = m0; m < m1; m += kRows) {
        const int64_t count = std::min(kRows, m1 - m);
        if (!a.turned) pack_a(a, k0, deep, m, m + count, left);
        const uint32_t* from = a.turned ? left + (m - m0) : left;
        const int64_t step = a_stride(a.turned, m1 - m0, deep);
        const Tile run = a.turned ? tile_of<true>(count) : tile_of<false>(count);
        for (int64_t n = 0; n < width; n += kColumns)
          run(from, step, packed + n * 2 * pairs, pairs, sums + (m - m0) * width + n, width, k0 > 0);
        if (k0 + deep == depth)
          for (int64_t i = m; i < m + count; ++i) write(sums + (i - m0) * width, i, n0, n1);
      }
    }
  }

  void stripe(int64_t n0, int64_t n1) const {
    const int64_t step = a_stride(false, 0, a.columns), width = up(n1 - n0, kColumns) + 4 * kColumns;
    uint32_t* left = kept<uint32_t>(1, a.rows * step + 64);
    float* sums = kept<float>(2, a.rows * width);
    pack_a(a, 0, a.columns, 0, a.rows, left);
    kFew[a.rows - 1](left, step, b, n0, n1, sums, width);
    for (int64_t m = 0; m < a.rows; ++m) write(sums + m * width, m, n0, n1);
  }

  void write(const float* from, int64_t m, int64_t n0, int64_t n1) const {
    const int64_t at = m * b.columns;
    if (wide) {
      std::memcpy(static_cast<float*>(c) + at + n0, from, (n1 - n0) * sizeof(float));
      return;
    }
    bf16* to = static_cast<bf16*>(c) + at;
    for (int64_t n = n0; n < n1; n += 16) {
      narrow(_mm512_loadu_ps(from + (n - n0)), to + n, first(std::min<int64_t>(16, n1 - n)));
    }
  }
};

ffi::Error multiply(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> c, bool a_turned,
                    bool b_turned) {
  const auto at = a.dimensions(), bt = b.dimensions();
  Product product{{reinterpret_cast<const bf16*>(a.untyped_data()), at[a_turned], at[1 - a_turned], a_turned},
                  {reinterpret_cast<const bf16*>(b.untyped_data()), bt[b_turned], bt[1 - b_turned], b_turned},
                  c->untyped_data(),
                  c->element_type() == ffi::DataType::F32,
                  0,
                  0};
  if (product.a.columns != product.b.rows) return ffi::Error::InvalidArgument("the inner dimensions differ");
  const int64_t rows = product.a.rows, columns = product.b.columns;
  if (rows == 0 || columns == 0) return ffi::Error::Success();
  const int64_t depth = std::min(std::max<int64_t>(product.a.columns, 1), kDepth);
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  int64_t down = (rows + kChunk - 1) / kChunk;
  int64_t across = (columns + kBlock / depth - 1) / std::min<int64_t>(kBlock / depth, 1 << 20);
  across = std::max(across, std::min((4 * threads + down - 1) / down, (columns + 2 * kColumns - 1) / (2 * kColumns)));
  if (rows <= kFewest && !a_turned) across = std::min(2 * threads, (columns + 4 * kColumns - 1) / (4 * kColumns));
  product.rows = up((rows + down - 1) / down, rows > kRows ? kRows : 1);
  product.columns = up((columns + across - 1) / across, rows <= kFewest ? 4 * kColumns : kColumns);
  down = (rows + product.rows - 1) / product.rows;
  across = (columns + product.columns - 1) / product.columns;
  Crew::run(pool, down * across, [&](int64_t at) {
    const int64_t m = at % down * product.rows, n = at / down * product.columns;
    product.block(m, std::min(m + product.rows, rows), n, std::min(n + product.columns, columns));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xgen

XLA_FFI_DEFINE_HANDLER_SYMBOL(xgen_multiply, xgen::multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("a_turned")
                                  .Attr<bool>("b_turned"));
