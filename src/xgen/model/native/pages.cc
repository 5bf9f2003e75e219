// Causal attention over a cache of pages, for CPUs with AVX512-BF16.
//
// The queries of the heads that share keys are the rows of one product. A row's result depends on its own keys alone,
// not on what else is computed with it. Rows of one query are decoded in float32 too.

#include "softmax.h"

namespace ffi = xla::ffi;

namespace xgen {
namespace {

constexpr int64_t kShare = 1024;  // keys of a task where a row has one query

template <typename T>
struct Pages {
  const T *queries, *keys, *values;  // [R C H E], [P K E N], [P K N E]
  const int32_t *table, *start, *length;
  T* result;
  int64_t rows, columns, heads, size, kv_heads, page, reach;  // reach: pages in a row of the table

  int64_t group() const { return heads / kv_heads; }
  const T* query(int64_t row, int64_t head, int64_t i) const {
    return queries + ((row * columns + i / group()) * heads + head * group() + i % group()) * size;
  }
  T* result_of(int64_t row, int64_t head, int64_t i) const { return result + (query(row, head, i) - queries); }
  // Number of a page of keys or values that holds a row's place `at`.
  int64_t place(int64_t row, int64_t head, int64_t at) const { return table[row * reach + at / page] * kv_heads + head; }
  const T* keys_of(int64_t place) const { return keys + place * size * page; }
  const T* values_of(int64_t place) const { return values + place * size * page; }
};

struct Narrow : Pages<bf16> {

  // Queries [from, to) of a row's heads that share the keys of `head`, over the keys [begin, end).
  void run(Softmax& softmax, int64_t row, int64_t head, int64_t from, int64_t begin, int64_t end) const {
    for (int64_t i = 0; i < softmax.count; ++i) {
      softmax.queries[i * softmax.step + size / 2] = 0;
      std::memcpy(softmax.queries + i * softmax.step, query(row, head, from + i), size * sizeof(bf16));
    }
    const int64_t wide = up(page, kColumns);
    bf16* key_panels = kept<bf16>(0, wide * up(size, 2));
    bf16* value_panels = kept<bf16>(2, up(page, 2) * softmax.width);
    for (int64_t at = begin / page * page; at < end; at += page) {
      const int64_t number = place(row, head, at), keys = std::min(page, end - at);
      pack_b({keys_of(number), size, page, false}, 0, size, 0, keys, key_panels);
      pack_b({values_of(number), page, size, false}, 0, keys, 0, size, value_panels);
      softmax.take(key_panels, value_panels, keys, Prefix{start[row] + 1 - at, group(), from, keys});
    }
  }

  // Queries of a row's head group, whole.
  void prefill(int64_t row, int64_t head, int64_t from) const {
    const int64_t filled = length[row] * group(), count = std::min(kQueries, columns * group() - from);
    Softmax softmax(count, size);
    if (from < filled) {
      const int64_t last = std::min(from + count, filled) - 1;
      run(softmax, row, head, from, 0, start[row] + last / group() + 1);
    }
    for (int64_t i = 0; i < count; ++i)
      scaled(softmax.mixed + i * softmax.width, softmax.mass[i] > 0 ? 1 / softmax.mass[i] : 0.0f, size,
             result_of(row, head, from + i));
  }

  // The running softmax of one query a head over the keys [begin, end): peaks, masses, mixed values.
  void stretch(int64_t row, int64_t head, int64_t begin, int64_t end, float* to) const {
    Softmax softmax(group(), size);
    run(softmax, row, head, 0, begin, end);
    std::copy_n(softmax.peak, group(), to);
    std::copy_n(softmax.mass, group(), to + group());
    std::copy_n(softmax.mixed, group() * softmax.width, to + 2 * group());
  }

  static void put(const float* sum, float factor, int64_t count, bf16* to) { scaled(sum, factor, count, to); }
};

// C[R, columns] of A[R, depth] and B[depth, columns], at most 16 V columns. B is read once, as it lies.
template <int R, int V>
void wide_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, int64_t columns, float* c,
               int64_t c_stride, bool add) {
  constexpr int64_t kAhead = 4096 / (16 * V);  // of B, in rows: what the processor does not foresee past a page's end
  __m512 sums[R][V];
  __mmask16 masks[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    masks[v] = first(std::clamp<int64_t>(columns - 16 * v, 0, 16));
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r)
      sums[r][v] = add ? _mm512_maskz_loadu_ps(masks[v], c + r * c_stride + 16 * v) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = b + k * b_stride;
    __m512 left[R];
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) left[r] = _mm512_set1_ps(a[r * a_stride + k]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      _mm_prefetch(row + kAhead * b_stride + 16 * v, _MM_HINT_T0);
      const __m512 right = _mm512_maskz_loadu_ps(masks[v], row + 16 * v);
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) sums[r][v] = _mm512_fmadd_ps(left[r], right, sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) _mm512_mask_storeu_ps(c + r * c_stride + 16 * v, masks[v], sums[r][v]);
}

template <int V>
void wide_columns(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t depth,
                  int64_t columns, float* c, int64_t c_stride, bool add) {
  constexpr decltype(&wide_tile<1, V>) kTiles[] = {wide_tile<1, V>, wide_tile<2, V>, wide_tile<3, V>};
  for (int64_t n = 0; n < columns; n += 16 * V)
    for (int64_t r = 0; r < rows; r += 3)
      kTiles[std::min<int64_t>(rows - r, 3) - 1](a + r * a_stride, a_stride, b + n, b_stride, depth,
                                                 std::min<int64_t>(columns - n, 16 * V), c + r * c_stride + n, c_stride, add);
}

void wide_product(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t depth,
                  int64_t columns, float* c, int64_t c_stride, bool add) {
  const auto run = columns > 64 ? wide_columns<8> : wide_columns<4>;
  run(a, a_stride, rows, b, b_stride, depth, columns, c, c_stride, add);
}

struct Wide : Pages<float> {
  // As Narrow's, a page's keys and values read in place.
  void stretch(int64_t row, int64_t head, int64_t begin, int64_t end, float* to) const {
    const int64_t width = up(size, kColumns);
    float *peak = to, *mass = to + group(), *mixed = to + 2 * group(), *scores = kept<float>(5, group() * page);
    const float factor = kLog2E / std::sqrt(float(size));
    std::fill_n(peak, group(), kNone);
    for (int64_t at = begin / page * page; at < end; at += page) {
      const int64_t number = place(row, head, at), keys = std::min(page, end - at);
      wide_product(query(row, head, 0), size, group(), keys_of(number), page, size, keys, scores, page, false);
      for (int64_t i = 0; i < group(); ++i) {
        const float before = peak[i], sum = weigh(scores + i * page, keys, factor, &peak[i]);
        const float left = std::exp2((before - peak[i]) * factor);
        mass[i] = mass[i] * left + sum;
        for (int64_t e = 0; e < width; ++e) mixed[i * width + e] *= left;
      }
      wide_product(scores, page, group(), values_of(number), size, keys, size, mixed, width, true);
    }
  }

  // Scores to weights, in their place; their sum.
  static float weigh(float* scores, int64_t keys, float factor, float* peak) {
    __m512 highest = _mm512_set1_ps(*peak), sum = _mm512_setzero_ps();
    for (int64_t n = 0; n < keys; n += 16) {
      const __mmask16 mask = first(std::min<int64_t>(16, keys - n));
      highest = _mm512_mask_max_ps(highest, mask, highest, _mm512_maskz_loadu_ps(mask, scores + n));
    }
    *peak = _mm512_reduce_max_ps(highest);
    const __m512 scale = _mm512_set1_ps(factor), most = _mm512_set1_ps(*peak);
    for (int64_t n = 0; n < keys; n += 16) {
      const __mmask16 mask = first(std::min<int64_t>(16, keys - n));
      const __m512 weight = power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + n), most), scale));
      _mm512_mask_storeu_ps(scores + n, mask, weight);
      sum = _mm512_mask_add_ps(sum, mask, sum, weight);
    }
    return _mm512_reduce_add_ps(sum);
  }

  static void put(const float* sum, float factor, int64_t count, float* to) {
    for (int64_t e = 0; e < count; ++e) to[e] = factor * sum[e];
  }
};

// One query a row: long rows are shared out by stretches of keys, which are then merged in order.
template <typename Kind>
void decode(ffi::ThreadPool& pool, const Kind& pages) {
  const int64_t group = pages.group(), width = up(pages.size, kColumns), each = group * (width + 2);
  const int64_t stretch = std::max(kShare / pages.page, int64_t{1}) * pages.page;
  std::vector<int64_t> firsts{0};  // a row's first stretch
  for (int64_t row = 0; row < pages.rows; ++row)
    firsts.push_back(firsts.back() + (pages.length[row] > 0 ? (pages.start[row] + stretch) / stretch : 0));
  const int64_t stretches = firsts.back();
  std::vector<float> parts(stretches * pages.kv_heads * each);
  Crew::run(pool, stretches * pages.kv_heads, [&](int64_t at) {
    const int64_t head = at % pages.kv_heads, which = at / pages.kv_heads;
    const int64_t row = std::upper_bound(firsts.begin(), firsts.end(), which) - firsts.begin() - 1;
    const int64_t begin = (which - firsts[row]) * stretch, end = std::min<int64_t>(begin + stretch, pages.start[row] + 1);
    pages.stretch(row, head, begin, end, parts.data() + at * each);
  });
  std::vector<float> sum(width);
  for (int64_t row = 0; row < pages.rows; ++row)
    for (int64_t head = 0; head < pages.kv_heads; ++head)
      for (int64_t i = 0; i < group; ++i) {
        const auto part = [&](int64_t which) { return parts.data() + (which * pages.kv_heads + head) * each; };
        float peak = kNone, mass = 0;
        for (int64_t which = firsts[row]; which < firsts[row + 1]; ++which) peak = std::max(peak, part(which)[i]);
        std::fill(sum.begin(), sum.end(), 0.0f);
        const float factor = kLog2E / std::sqrt(float(pages.size));
        for (int64_t which = firsts[row]; which < firsts[row + 1]; ++which) {
          const float share = std::exp2((part(which)[i] - peak) * factor);
          mass += share * part(which)[group + i];
          for (int64_t e = 0; e < width; ++e) sum[e] += share * part(which)[2 * group + i * width + e];
        }
        Kind::put(sum.data(), mass > 0 ? 1 / mass : 0.0f, pages.size, pages.result_of(row, head, i));
      }
}

template <typename Kind, typename T>
Kind pages_of(const ffi::AnyBuffer& queries, const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values,
              const ffi::Buffer<ffi::S32>& table, const ffi::Buffer<ffi::S32>& start, const ffi::Buffer<ffi::S32>& length,
              ffi::Result<ffi::AnyBuffer>& result) {
  const auto q = queries.dimensions(), v = values.dimensions();
  const auto data = [](const auto& buffer) { return static_cast<const T*>(buffer.untyped_data()); };
  return {{data(queries),       data(keys), data(values), table.typed_data(), start.typed_data(), length.typed_data(),
           static_cast<T*>(result->untyped_data()), q[0], q[1], q[2], q[3], v[1], v[2], table.dimensions()[1]}};
}

// Whether the operands' shapes belong together: see Pages.
bool fit(const ffi::AnyBuffer& queries, const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values,
         const ffi::Buffer<ffi::S32>& table, const ffi::Buffer<ffi::S32>& start, const ffi::Buffer<ffi::S32>& length) {
  const auto q = queries.dimensions(), k = keys.dimensions(), v = values.dimensions();
  const int64_t rows = q[0], page = v[2];
  return v[1] > 0 && q[2] % v[1] == 0 && page > 0 && v[3] == q[3] && k[0] == v[0] && k[1] == v[1] && k[2] == q[3] &&
         k[3] == page && table.dimensions()[0] == rows && int64_t(start.element_count()) == rows &&
         int64_t(length.element_count()) == rows;
}

ffi::Error over_pages(ffi::ThreadPool pool, ffi::AnyBuffer queries, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                      ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> length,
                      ffi::Result<ffi::AnyBuffer> result) {
  if (!fit(queries, keys, values, table, start, length)) return misshapen();
  if (queries.element_type() == ffi::DataType::F32) {
    if (queries.dimensions()[1] != 1) return ffi::Error::InvalidArgument("float32 rows have one query each");
    decode(pool, pages_of<Wide, float>(queries, keys, values, table, start, length, result));
    return ffi::Error::Success();
  }
  const auto pages = pages_of<Narrow, bf16>(queries, keys, values, table, start, length, result);
  if (pages.columns == 1) {
    decode(pool, pages);
    return ffi::Error::Success();
  }
  const int64_t chunks = (pages.columns * pages.group() + kQueries - 1) / kQueries;
  Crew::run(pool, pages.rows * pages.kv_heads * chunks, [&](int64_t at) {
    // The last queries, which see most, first: what is left at the end is short.
    const int64_t chunk = chunks - 1 - at / (pages.rows * pages.kv_heads), rest = at % (pages.rows * pages.kv_heads);
    pages.prefill(rest / pages.kv_heads, rest % pages.kv_heads, chunk * kQueries);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xgen

XLA_FFI_DEFINE_HANDLER_SYMBOL(xgen_attend_pages, xgen::over_pages,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
