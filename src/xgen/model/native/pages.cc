// Causal attention over a cache of pages, for CPUs with AVX512-BF16.
//
// The queries of the heads that share keys are the rows of one product. A row's result depends on its own keys alone,
// not on what else is computed with it.

#include "softmax.h"

namespace ffi = xla::ffi;

namespace xgen {
namespace {

constexpr int64_t kShare = 1024;  // keys of a task where a row has one query

struct Pages {
  const bf16 *queries, *keys, *values;  // [R C H E], [P K E N], [P K N E]
  const int32_t *table, *start, *length;
  bf16* result;
  int64_t rows, columns, heads, size, kv_heads, page, reach;  // reach: pages in a row of the table

  int64_t group() const { return heads / kv_heads; }
  const bf16* query(int64_t row, int64_t head, int64_t i) const {
    return queries + ((row * columns + i / group()) * heads + head * group() + i % group()) * size;
  }

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
      const int64_t place = table[row * reach + at / page] * kv_heads + head, keys = std::min(page, end - at);
      pack_b({keys_of(place), size, page, false}, 0, size, 0, keys, key_panels);
      pack_b({values_of(place), page, size, false}, 0, keys, 0, size, value_panels);
      softmax.take(key_panels, value_panels, keys, Prefix{start[row] + 1 - at, group(), from, keys});
    }
  }

  const bf16* keys_of(int64_t place) const { return keys + place * size * page; }
  const bf16* values_of(int64_t place) const { return values + place * size * page; }

  // Queries of a row's head group, whole.
  void prefill(int64_t row, int64_t head, int64_t from) const {
    const int64_t filled = length[row] * group(), count = std::min(kQueries, columns * group() - from);
    bf16* to = result;
    Softmax softmax(count, size);
    if (from < filled) {
      const int64_t last = std::min(from + count, filled) - 1;
      run(softmax, row, head, from, 0, start[row] + last / group() + 1);
    }
    for (int64_t i = 0; i < count; ++i)
      scaled(softmax.mixed + i * softmax.width, softmax.mass[i] > 0 ? 1 / softmax.mass[i] : 0.0f, size,
             to + (query(row, head, from + i) - queries));
  }
};

// One query a row: long rows are shared out by stretches of keys, which are then merged in order.
void decode(ffi::ThreadPool& pool, const Pages& pages) {
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
    const int64_t begin = (which - firsts[row]) * stretch;
    Softmax softmax(group, pages.size);
    pages.run(softmax, row, head, 0, begin, std::min<int64_t>(begin + stretch, pages.start[row] + 1));
    float* to = parts.data() + at * each;
    std::copy_n(softmax.peak, group, to);
    std::copy_n(softmax.mass, group, to + group);
    std::copy_n(softmax.mixed, group * width, to + 2 * group);
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
        scaled(sum.data(), mass > 0 ? 1 / mass : 0.0f, pages.size,
               pages.result + (pages.query(row, head, i) - pages.queries));
      }
}

ffi::Error over_pages(ffi::ThreadPool pool, ffi::AnyBuffer queries, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                      ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::S32> length,
                      ffi::Result<ffi::AnyBuffer> result) {
  const auto q = queries.dimensions(), v = values.dimensions();
  const auto bits = [](const auto& buffer) { return static_cast<const bf16*>(buffer.untyped_data()); };
  const Pages pages{bits(queries),        bits(keys), bits(values), table.typed_data(), start.typed_data(),
                    length.typed_data(),  static_cast<bf16*>(result->untyped_data()),
                    q[0],                 q[1],       q[2],         q[3],               v[1],
                    v[2],                 table.dimensions()[1]};
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
