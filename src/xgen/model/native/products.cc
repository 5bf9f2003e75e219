// Products of bfloat16 matrices with float32 sums, for CPUs with AVX512-BF16.
//
// Every element of C is summed by one thread in an order that depends on the length of the sum alone: results repeat,
// and a row's do not depend on how many others there are.

#include "tiles.h"

namespace ffi = xla::ffi;

namespace xgen {
namespace {

// K is summed in so many at a time, each part by itself: an even number, of which a panel of B fits the first-level cache.
int64_t part_of(int64_t depth) {
  const int64_t parts = std::max<int64_t>((depth + kDepth - 1) / kDepth, 1);
  return up((depth + parts - 1) / parts, 2);
}

// Few rows: it is the reading of B that takes the time, so B goes from memory straight into the products. R rows of A by
// G panels of B, which lies as [K, N], over [k0, k1) of K; added to C where that is not the beginning.
template <int R, int G>
void stream(const uint32_t* a, int64_t step, const Matrix& b, int64_t k0, int64_t k1, int64_t n, int64_t n1, float* c,
            int64_t c_stride) {
  constexpr int64_t kAhead = 16;  // rows
  const int64_t stride = b.columns;
  __m512 low[R][G], high[R][G];
  __mmask32 masks[G];
  for (int g = 0; g < G; ++g) masks[g] = first(n1 - n - g * kColumns);
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) low[r][g] = high[r][g] = _mm512_setzero_ps();
  for (int64_t k = k0; k < k1; k += 2) {
    const bf16* row = b.data + k * stride + n;
    const bool second = k + 1 < k1;
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
      float* to = c + r * c_stride + g * kColumns;
      _mm512_storeu_ps(to, k0 > 0 ? _mm512_add_ps(low[r][g], _mm512_loadu_ps(to)) : low[r][g]);
      _mm512_storeu_ps(to + 16, k0 > 0 ? _mm512_add_ps(high[r][g], _mm512_loadu_ps(to + 16)) : high[r][g]);
    }
}

// R rows of A by B's columns [n0, n1); more than four rows in two passes, of which the second finds B in the cache.
template <int R>
void few(const uint32_t* a, int64_t step, const Matrix& b, int64_t n0, int64_t n1, float* c, int64_t c_stride) {
  constexpr int kFirst = R <= 4 ? R : (R + 1) / 2, kSecond = R - kFirst;
  constexpr int G = kFirst <= 3 ? 4 : 3;
  const int64_t depth = b.rows, part = part_of(depth);
  for (int64_t n = n0; n < n1; n += G * kColumns)
    for (int64_t k0 = 0; k0 < depth; k0 += part) {
      const int64_t k1 = std::min(k0 + part, depth);
      float* to = c + (n - n0);
      stream<kFirst, G>(a, step, b, k0, k1, n, n1, to, c_stride);
      if constexpr (kSecond > 0)
        stream<kSecond, G>(a + kFirst * step, step, b, k0, k1, n, n1, to + kFirst * c_stride, c_stride);
    }
}

// The same where B lies as [N, K], K even: a tile of 12 of its rows by all of A, which is packed as if it were B.
void few_turned(const Matrix& a, const Matrix& b, int64_t n0, int64_t n1, float* c, int64_t c_stride) {
  const int64_t pairs = a.columns / 2, part = part_of(a.columns) / 2;
  bf16* panel = kept<bf16>(0, 2 * kColumns * pairs);
  float* sums = kept<float>(3, kRows * 16);
  pack_b({a.data, a.columns, a.rows, true}, 0, a.columns, 0, a.rows, panel);
  for (int64_t n = n0; n < n1; n += kRows) {
    const int64_t count = std::min(kRows, n1 - n);
    for (int64_t p = 0; p < pairs; p += part) {
      const uint32_t* rows = reinterpret_cast<const uint32_t*>(b.data + n * a.columns) + p;
      const bf16* right = panel + p * 2 * kColumns;
      const int64_t deep = std::min(part, pairs - p);
      if (count == kRows)
        tile<kRows, false, 1>(rows, pairs, right, deep, sums, 16, p > 0);
      else
        for (int64_t i = 0; i < count; ++i) tile<1, false, 1>(rows + i * pairs, pairs, right, deep, sums + 16 * i, 16, p > 0);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t m = 0; m < a.rows; ++m) c[m * c_stride + n - n0 + i] = sums[16 * i + m];
  }
}

using Few = void (*)(const uint32_t*, int64_t, const Matrix&, int64_t, int64_t, float*, int64_t);
constexpr Few kFew[] = {few<1>, few<2>, few<3>, few<4>, few<5>, few<6>, few<7>, few<8>};
constexpr int64_t kFewest = 8;

struct Product {
  Matrix a, b;
  void* c;
  const float* base;  // what C, in float32, is the sum with; null where there is nothing to add
  bool wide;          // C is float32, else bfloat16
  int64_t rows, columns;  // of C, that a task computes

  // C[m0:m1, n0:n1]
  void block(int64_t m0, int64_t m1, int64_t n0, int64_t n1) const {
    if (few_rows()) return stripe(n0, n1);
    const int64_t width = up(n1 - n0, kColumns), depth = a.columns, part = part_of(depth);
    bf16* packed = kept<bf16>(0, width * up(part, 2));
    const int64_t most = a_stride(a.turned, m1 - m0, part);
    uint32_t* left = kept<uint32_t>(1, most * (a.turned ? (part + 1) / 2 : m1 - m0) + 64);
    float* sums = kept<float>(2, (m1 - m0) * width);
    for (int64_t k0 = 0; k0 < depth; k0 += part) {
      const int64_t deep = std::min(part, depth - k0), pairs = (deep + 1) / 2, step = a_stride(a.turned, m1 - m0, deep);
      pack_b(b, k0, deep, n0, n1, packed);
      pack_a(a, k0, deep, m0, m1, left);
      for (int64_t n = 0; n < width; n += kColumns)  // a panel stays in the first-level cache while the rows pass
        for (int64_t m = 0; m < m1 - m0; m += kRows) {
          const int64_t count = std::min(kRows, m1 - m0 - m);
          const Tile run = a.turned ? tile_of<true>(count) : tile_of<false>(count);
          run(left + (a.turned ? m : m * step), step, packed + n * 2 * pairs, pairs, sums + m * width + n, width, k0 > 0);
        }
    }
    for (int64_t m = m0; m < m1; ++m) write(sums + (m - m0) * width, m, n0, n1);
  }

  bool few_rows() const { return a.rows <= kFewest && !a.turned && !(b.turned && a.columns % 2); }

  void stripe(int64_t n0, int64_t n1) const {
    const int64_t step = a_stride(false, 0, a.columns), width = up(n1 - n0, kColumns) + 4 * kColumns;
    uint32_t* left = kept<uint32_t>(1, a.rows * step + 64);
    float* sums = kept<float>(2, a.rows * width);
    if (b.turned) {
      few_turned(a, b, n0, n1, sums, width);
    } else {
      pack_a(a, 0, a.columns, 0, a.rows, left);
      kFew[a.rows - 1](left, step, b, n0, n1, sums, width);
    }
    for (int64_t m = 0; m < a.rows; ++m) write(sums + m * width, m, n0, n1);
  }

  void write(const float* from, int64_t m, int64_t n0, int64_t n1) const {
    const int64_t at = m * b.columns;
    if (base) {
      float* to = static_cast<float*>(c) + at;
      for (int64_t n = n0; n < n1; ++n) to[n] = base[at + n] + from[n - n0];
      return;
    }
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

ffi::Error product_of(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, const float* base,
                      ffi::Result<ffi::AnyBuffer> c, bool a_turned, bool b_turned) {
  const auto at = a.dimensions(), bt = b.dimensions();
  Product product{{reinterpret_cast<const bf16*>(a.untyped_data()), at[a_turned], at[1 - a_turned], a_turned},
                  {reinterpret_cast<const bf16*>(b.untyped_data()), bt[b_turned], bt[1 - b_turned], b_turned},
                  c->untyped_data(),
                  base,
                  c->element_type() == ffi::DataType::F32,
                  0,
                  0};
  const int64_t rows = product.a.rows, columns = product.b.columns;
  const auto ct = c->dimensions();
  if (product.a.columns == 0 || product.a.columns != product.b.rows || ct[0] != rows || ct[1] != columns)
    return misshapen();
  if (rows == 0 || columns == 0) return ffi::Error::Success();
  const int64_t depth = std::min(product.a.columns, kDepth);
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  int64_t down = (rows + kChunk - 1) / kChunk;
  int64_t across = (columns + kBlock / depth - 1) / std::min<int64_t>(kBlock / depth, 1 << 20);
  across = std::max(across, std::min((4 * threads + down - 1) / down, (columns + 2 * kColumns - 1) / (2 * kColumns)));
  if (product.few_rows()) across = std::min(2 * threads, (columns + 4 * kColumns - 1) / (4 * kColumns));
  product.rows = up((rows + down - 1) / down, rows > kRows ? kRows : 1);
  product.columns = up((columns + across - 1) / across, product.few_rows() ? 4 * kColumns : kColumns);
  down = (rows + product.rows - 1) / product.rows;
  across = (columns + product.columns - 1) / product.columns;
  Crew::run(pool, down * across, [&](int64_t at) {
    const int64_t m = at % down * product.rows, n = at / down * product.columns;
    product.block(m, std::min(m + product.rows, rows), n, std::min(n + product.columns, columns));
  });
  return ffi::Error::Success();
}

ffi::Error multiply(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> c, bool a_turned,
                    bool b_turned) {
  return product_of(pool, a, b, nullptr, c, a_turned, b_turned);
}

ffi::Error multiply_add(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::AnyBuffer base,
                        ffi::Result<ffi::AnyBuffer> c, bool a_turned, bool b_turned) {
  return product_of(pool, a, b, static_cast<const float*>(base.untyped_data()), c, a_turned, b_turned);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(xgen_multiply_add, xgen::multiply_add,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("a_turned")
                                  .Attr<bool>("b_turned"));
