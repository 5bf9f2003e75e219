// Causal attention within documents and its gradients, for CPUs with AVX512-BF16: blocks of keys, a running softmax
// forward, scores recomputed backward from the log-sum-exp (Dao 2023).

#include "softmax.h"

namespace ffi = xla::ffi;

namespace xgen {
namespace {

constexpr int64_t kKeys = 128;  // of a block

struct Shape {
  int64_t sequences, length, heads, kv_heads, size;
  const int32_t* segments;  // [B S]

  static Shape of(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::Buffer<ffi::S32>& segments) {
    const auto dims = q.dimensions();
    return {dims[0], dims[1], dims[2], k.dimensions()[2], dims[3], segments.typed_data()};
  }
  // Whether `q`, `k`, `v` and `segments` are of this shape.
  bool fits(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
            const ffi::Buffer<ffi::S32>& segments) const {
    const int64_t places = sequences * length, keys = places * kv_heads * size;
    return kv_heads > 0 && heads % kv_heads == 0 && int64_t(q.element_count()) == places * heads * size &&
           int64_t(k.element_count()) == keys && int64_t(v.element_count()) == keys &&
           int64_t(segments.element_count()) == places;
  }
  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return length * group(); }  // of a head of keys: its queries, place by place

  // Of row i of a head of keys in [B S H E], in [B S K E], and in [B H S].
  int64_t query(int64_t sequence, int64_t head, int64_t i) const {
    return ((sequence * length + i / group()) * heads + head * group() + i % group()) * size;
  }
  int64_t key(int64_t sequence, int64_t head, int64_t at) const {
    return ((sequence * length + at) * kv_heads + head) * size;
  }
  int64_t scalar(int64_t sequence, int64_t head, int64_t i) const {
    return (sequence * heads + head * group() + i % group()) * length + i / group();
  }
  const int32_t* documents(int64_t sequence) const { return segments + sequence * length; }
  // Rows [from, from + count) and keys [at, at + keys) may see each other.
  bool meet(int64_t sequence, int64_t from, int64_t count, int64_t at, int64_t keys) const {
    const int32_t* told = documents(sequence);
    const auto mine = std::minmax_element(told + from / group(), told + (from + count - 1) / group() + 1);
    const auto theirs = std::minmax_element(told + at, told + at + keys);
    return *mine.first <= *theirs.second && *theirs.first <= *mine.second;
  }
};

// Keys of a block at or before a row's place that are of its document.
struct Sight {
  const Prefix causal;
  const int32_t *rows, *keys;  // documents of the queries' places, and of the block's keys

  int64_t seen(int64_t i) const { return causal.seen(i); }
  __mmask16 mask(int64_t i, int64_t n) const {
    const __mmask16 before = causal.mask(i, n);
    const __m512i told = _mm512_maskz_loadu_epi32(before, keys + n);
    return _mm512_mask_cmpeq_epi32_mask(before, told, _mm512_set1_epi32(rows[(causal.offset + i) / causal.group]));
  }
};

// Row i of `count` scattered rows of `size` elements as pairs at to + i step.
template <typename From>
void gather(int64_t count, int64_t size, int64_t step, uint32_t* to, From from) {
  for (int64_t i = 0; i < count; ++i) {
    to[i * step + size / 2] = 0;
    std::memcpy(to + i * step, from(i), size * sizeof(bf16));
  }
}

struct Forward {
  Shape shape;
  const bf16 *q, *k, *v;
  bf16* out;
  float* lse;  // [B H S], of powers of two

  void run(int64_t sequence, int64_t head, int64_t from) const {
    const int64_t count = std::min(kQueries, shape.rows() - from), stride = shape.kv_heads * shape.size;
    const int64_t last = (from + count - 1) / shape.group() + 1;
    Softmax softmax(count, shape.size);
    gather(count, shape.size, softmax.step, softmax.queries, [&](int64_t i) { return q + shape.query(sequence, head, from + i); });
    bf16* key_panels = kept<bf16>(0, kKeys * up(shape.size, 2));
    bf16* value_panels = kept<bf16>(2, kKeys * softmax.width);
    for (int64_t at = 0; at < last; at += kKeys) {
      const int64_t keys = std::min(kKeys, last - at), place = shape.key(sequence, head, at);
      if (!shape.meet(sequence, from, count, at, keys)) continue;
      pack_b({k + place, shape.size, stride, true, stride}, 0, shape.size, 0, keys, key_panels);
      pack_b({v + place, keys, stride, false, stride}, 0, keys, 0, shape.size, value_panels);
      const int32_t* told = shape.documents(sequence);
      softmax.take(key_panels, value_panels, keys, Sight{{1 - at, shape.group(), from, keys}, told, told + at});
    }
    for (int64_t i = 0; i < count; ++i) {
      scaled(softmax.mixed + i * softmax.width, 1 / softmax.mass[i], shape.size, out + shape.query(sequence, head, from + i));
      lse[shape.scalar(sequence, head, from + i)] = softmax.peak[i] * softmax.factor + std::log2(softmax.mass[i]);
    }
  }
};

ffi::Error attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> segments,
                  ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::Buffer<ffi::F32>> lse) {
  const Shape shape = Shape::of(q, k, segments);
  if (!shape.fits(q, k, v, segments)) return misshapen();
  const Forward forward{shape, in(q), in(k), in(v), static_cast<bf16*>(out->untyped_data()), lse->typed_data()};
  const int64_t chunks = (shape.rows() + kQueries - 1) / kQueries, across = shape.sequences * shape.kv_heads;
  Crew::run(pool, across * chunks, [&](int64_t task) {
    // The last queries, which see most, first: what is left at the end is short.
    const int64_t which = task % across, chunk = chunks - 1 - task / across;
    forward.run(which / shape.kv_heads, which % shape.kv_heads, chunk * kQueries);
  });
  return ffi::Error::Success();
}

// With P = softmax(S): dV = P' dO, dS = P (dO V' - rowsum(dO O)) / sqrt(E), dQ = dS K, dK = dS' Q.
struct Backward {
  Shape shape;
  const bf16 *q, *k, *v, *out, *gradient;
  const float* lse;
  bf16 *dq, *dk, *dv;
  int64_t step, width;  // of a row's pairs; of its float32 sums

  // One head of keys, with all queries that see it.
  void run(int64_t sequence, int64_t head) const {
    const int64_t rows = shape.rows();
    // As long as the sequence: not kept, so that threads hold so much only while they need it.
    const std::unique_ptr<void, decltype(&std::free)> held(aligned(rows * (width + 1) * sizeof(float)), &std::free);
    float *query_sums = static_cast<float*>(held.get()), *inner = query_sums + rows * width;
    std::fill_n(query_sums, rows * width, 0.0f);
    for (int64_t i = 0; i < rows; ++i) inner[i] = dot(out + shape.query(sequence, head, i), gradient + shape.query(sequence, head, i));
    float* key_sums = kept<float>(12, 2 * up(kKeys, kRows) * width);
    for (int64_t at = 0; at < shape.length; at += kKeys) {
      const int64_t keys = std::min(kKeys, shape.length - at);
      block(sequence, head, at, keys, query_sums, inner, key_sums, key_sums + up(kKeys, kRows) * width);
    }
    for (int64_t i = 0; i < rows; ++i) scaled(query_sums + i * width, 1, shape.size, dq + shape.query(sequence, head, i));
  }

  float dot(const bf16* a, const bf16* b) const {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t e = 0; e < shape.size; e += 16) {
      const __mmask16 mask = first(std::min<int64_t>(16, shape.size - e));
      sum = _mm512_fmadd_ps(widen(a + e, mask), widen(b + e, mask), sum);
    }
    return _mm512_reduce_add_ps(sum);
  }

  void block(int64_t sequence, int64_t head, int64_t at, int64_t keys, float* query_sums, const float* inner, float* dk_sums,
             float* dv_sums) const {
    const int64_t size = shape.size, stride = shape.kv_heads * size, place = shape.key(sequence, head, at);
    bf16* key_columns = kept<bf16>(13, kKeys * up(size, 2));
    bf16* value_columns = kept<bf16>(14, kKeys * up(size, 2));
    bf16* key_rows = kept<bf16>(15, kKeys * width);
    pack_b({k + place, size, stride, true, stride}, 0, size, 0, keys, key_columns);
    pack_b({v + place, size, stride, true, stride}, 0, size, 0, keys, value_columns);
    pack_b({k + place, keys, stride, false, stride}, 0, keys, 0, size, key_rows);
    std::fill_n(dk_sums, up(kKeys, kRows) * width, 0.0f);
    std::fill_n(dv_sums, up(kKeys, kRows) * width, 0.0f);
    for (int64_t from = at * shape.group(); from < shape.rows(); from += kQueries) {
      const int64_t count = std::min(kQueries, shape.rows() - from);
      if (shape.meet(sequence, from, count, at, keys))
        meet(sequence, head, at, keys, from, count, query_sums, inner, dk_sums, dv_sums);
    }
    for (int64_t i = 0; i < keys; ++i) {
      scaled(dk_sums + i * width, 1, size, dk + place + i * stride);
      scaled(dv_sums + i * width, 1, size, dv + place + i * stride);
    }
  }

  // Rows [from, from + count) and a block of keys.
  void meet(int64_t sequence, int64_t head, int64_t at, int64_t keys, int64_t from, int64_t count, float* query_sums,
            const float* inner, float* dk_sums, float* dv_sums) const {
    const int64_t size = shape.size, pairs = (size + 1) / 2, wide = up(keys, kColumns), key_pairs = (keys + 1) / 2;
    const int32_t* told = shape.documents(sequence);
    const Sight sight{{1 - at, shape.group(), from, keys}, told, told + at};
    uint32_t* queries = kept<uint32_t>(16, kQueries * step);
    uint32_t* gradients = kept<uint32_t>(17, kQueries * step);
    gather(count, size, step, queries, [&](int64_t i) { return q + shape.query(sequence, head, from + i); });
    gather(count, size, step, gradients, [&](int64_t i) { return gradient + shape.query(sequence, head, from + i); });
    const int64_t p_step = a_stride(false, 0, kKeys);
    uint32_t* weights = kept<uint32_t>(18, (kQueries + 1) * p_step);  // P and dS of the chunk
    uint32_t* slopes = kept<uint32_t>(19, (kQueries + 1) * p_step);
    float* scores = kept<float>(20, kRows * kKeys);
    float* d_weights = kept<float>(21, kRows * kKeys);
    for (int64_t i = 0; i < count; i += kRows) {
      const int64_t rows = std::min(kRows, count - i);
      for (int64_t n = 0; n < wide; n += kColumns) {
        tile_of<false>(rows)(queries + i * step, step, packed(13, n, pairs), pairs, scores + n, kKeys, false);
        tile_of<false>(rows)(gradients + i * step, step, packed(14, n, pairs), pairs, d_weights + n, kKeys, false);
      }
      for (int64_t r = i; r < i + rows; ++r)
        weigh(sight, r, wide, scores + (r - i) * kKeys, d_weights + (r - i) * kKeys, lse[shape.scalar(sequence, head, from + r)],
              inner[from + r], reinterpret_cast<bf16*>(weights + r * p_step), reinterpret_cast<bf16*>(slopes + r * p_step));
      for (int64_t e = 0; e < width; e += kColumns)
        tile_of<false>(rows)(slopes + i * p_step, p_step, packed(15, e, key_pairs), key_pairs,
                             query_sums + (from + i) * width + e, width, true);
    }
    add_turned(weights, p_step, count, keys, gradients, dv_sums);
    add_turned(slopes, p_step, count, keys, queries, dk_sums);
  }

  static const bf16* packed(int which, int64_t column, int64_t pairs) { return kept<bf16>(which, 0) + column * 2 * pairs; }

  void weigh(const Sight& sight, int64_t row, int64_t wide, const float* scores, const float* d_weights, float row_lse,
             float row_inner, bf16* weights, bf16* slopes) const {
    const float root = 1 / std::sqrt(float(shape.size));
    for (int64_t n = 0; n < wide; n += 16) {
      const __m512 exponent =
          _mm512_fmsub_ps(_mm512_load_ps(scores + n), _mm512_set1_ps(root * kLog2E), _mm512_set1_ps(row_lse));
      const __m512 weight = _mm512_maskz_mov_ps(sight.mask(row, n), power_of_two(exponent));
      const __m512 d_score = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(d_weights + n), _mm512_set1_ps(row_inner)),
                                           _mm512_mul_ps(weight, _mm512_set1_ps(root)));
      narrow(weight, weights + n, 0xffff);
      narrow(d_score, slopes + n, 0xffff);
    }
  }

  // sums[keys, E] += left' right, both [count] rows of pairs along their columns.
  void add_turned(const uint32_t* left, int64_t left_step, int64_t count, int64_t keys, const uint32_t* right, float* sums) const {
    const int64_t pairs = (count + 1) / 2, turned = a_stride(true, keys, count);
    uint32_t* rows = kept<uint32_t>(22, (kQueries / 2 + 1) * up(kKeys, 16) + 64);
    bf16* panels = kept<bf16>(23, kQueries * width);
    pack_a({reinterpret_cast<const bf16*>(left), keys, count, true, 2 * left_step}, 0, count, 0, keys, rows);
    pack_b({reinterpret_cast<const bf16*>(right), count, shape.size, false, 2 * step}, 0, count, 0, shape.size, panels);
    for (int64_t n = 0; n < keys; n += kRows)
      for (int64_t e = 0; e < width; e += kColumns)
        tile_of<true>(std::min(kRows, keys - n))(rows + n, turned, panels + e * 2 * pairs, pairs, sums + n * width + e, width, true);
  }
};

ffi::Error attend_gradients(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                            ffi::Buffer<ffi::S32> segments, ffi::AnyBuffer out, ffi::Buffer<ffi::F32> lse,
                            ffi::AnyBuffer gradient, ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk,
                            ffi::Result<ffi::AnyBuffer> dv) {
  const Shape shape = Shape::of(q, k, segments);
  if (!shape.fits(q, k, v, segments)) return misshapen();
  const auto to = [](auto& buffer) { return static_cast<bf16*>(buffer->untyped_data()); };
  const Backward backward{shape,            in(q),  in(k),  in(v),  in(out),
                          in(gradient),     lse.typed_data(), to(dq), to(dk), to(dv),
                          a_stride(false, 0, shape.size), up(shape.size, kColumns)};
  Crew::run(pool, shape.sequences * shape.kv_heads,
            [&](int64_t task) { backward.run(task / shape.kv_heads, task % shape.kv_heads); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xgen

XLA_FFI_DEFINE_HANDLER_SYMBOL(xgen_attend, xgen::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(xgen_attend_gradients, xgen::attend_gradients,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
