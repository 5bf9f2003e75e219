// What goes along a row, in a pass or two over it: RMSNorm and its gradients, the turning of heads by their position,
// and the loss of a row of logits with its gradient. Computed in float32 and rounded once.

#include <cmath>

#include "tiles.h"

namespace ffi = xla::ffi;

namespace xgen {
namespace {

constexpr int64_t kGroup = 32;  // rows of a task: the sums over rows are the same for any number of threads

__mmask16 left(int64_t count) { return __mmask16(first(std::min<int64_t>(16, count))); }

const float* floats(const ffi::AnyBuffer& buffer) { return static_cast<const float*>(buffer.untyped_data()); }

float* floats(ffi::Result<ffi::AnyBuffer>& buffer) { return static_cast<float*>(buffer->untyped_data()); }

// 1 / sqrt(mean of squares + epsilon)
float inverse_root(const bf16* x, int64_t size, float epsilon) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < size; at += 16) {
    const __m512 value = widen(x + at, left(size - at));
    sum = _mm512_fmadd_ps(value, value, sum);
  }
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / size + epsilon);
}

// `each(row)` for every row, `kGroup` of them a task; `begin(task)` before the first of a task.
template <typename Begin, typename Each>
void rows_of(ffi::ThreadPool& pool, int64_t rows, Begin begin, Each each) {
  Crew::run(pool, (rows + kGroup - 1) / kGroup, [&](int64_t task) {
    begin(task);
    for (int64_t row = task * kGroup; row < std::min(rows, (task + 1) * kGroup); ++row) each(task, row);
  });
}

void nothing(int64_t) {}

ffi::Error rms_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> result,
                    float epsilon) {
  const int64_t size = scale.element_count();
  if (size == 0 || x.dimensions().back() != size) return misshapen();
  const int64_t rows = x.element_count() / size;
  rows_of(pool, rows, nothing, [&](int64_t, int64_t row) {
    const bf16* from = in(x) + row * size;
    const __m512 root = _mm512_set1_ps(inverse_root(from, size, epsilon));
    for (int64_t at = 0; at < size; at += 16) {
      const __mmask16 mask = left(size - at);
      const __m512 normed = _mm512_mul_ps(widen(from + at, mask), root);
      narrow(_mm512_mul_ps(normed, _mm512_maskz_loadu_ps(mask, floats(scale) + at)), out(result) + row * size + at, mask);
    }
  });
  return ffi::Error::Success();
}

// With r = 1 / sqrt(mean x^2 + epsilon) and h = gradient scale: dx = r h - x r^3 (h . x) / size; d scale = sum of
// gradient x r over the rows.
ffi::Error rms_norm_gradients(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::AnyBuffer gradient,
                              ffi::Result<ffi::AnyBuffer> x_gradient, ffi::Result<ffi::AnyBuffer> scale_gradient,
                              float epsilon) {
  const int64_t size = scale.element_count(), wide = up(size, 16);
  if (size == 0 || x.dimensions().back() != size || gradient.element_count() != x.element_count()) return misshapen();
  const int64_t rows = x.element_count() / size;
  const int64_t tasks = (rows + kGroup - 1) / kGroup;
  float* parts = kept<float>(7, tasks * wide);
  auto begin = [&](int64_t task) { std::fill_n(parts + task * wide, wide, 0.0f); };
  rows_of(pool, rows, begin, [&](int64_t task, int64_t row) {
    const bf16 *from = in(x) + row * size, *above = in(gradient) + row * size;
    const float root = inverse_root(from, size, epsilon);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < size; at += 16) {
      const __mmask16 mask = left(size - at);
      const __m512 along = _mm512_mul_ps(widen(from + at, mask), widen(above + at, mask));
      float* part = parts + task * wide + at;
      _mm512_storeu_ps(part, _mm512_fmadd_ps(along, _mm512_set1_ps(root), _mm512_loadu_ps(part)));
      sum = _mm512_fmadd_ps(along, _mm512_maskz_loadu_ps(mask, floats(scale) + at), sum);
    }
    const __m512 r = _mm512_set1_ps(root), back = _mm512_set1_ps(_mm512_reduce_add_ps(sum) * root * root * root / size);
    for (int64_t at = 0; at < size; at += 16) {
      const __mmask16 mask = left(size - at);
      const __m512 h = _mm512_mul_ps(widen(above + at, mask), _mm512_maskz_loadu_ps(mask, floats(scale) + at));
      const __m512 value = _mm512_fnmadd_ps(widen(from + at, mask), back, _mm512_mul_ps(r, h));
      narrow(value, out(x_gradient) + row * size + at, mask);
    }
  });
  for (int64_t at = 0; at < size; at += 16) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t task = 0; task < tasks; ++task) sum = _mm512_add_ps(sum, _mm512_loadu_ps(parts + task * wide + at));
    _mm512_mask_storeu_ps(floats(scale_gradient) + at, left(size - at), sum);
  }
  return ffi::Error::Success();
}

// Each head's planes (x_i, x_{i + half}) by the angle of its place; backwards, by the angle's negative.
ffi::Error rotate(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer cosine, ffi::AnyBuffer sine,
                  ffi::Result<ffi::AnyBuffer> result, bool backwards) {
  const int64_t size = x.dimensions().back(), heads = x.dimensions()[x.dimensions().size() - 2], half = size / 2;
  const __m512 sign = _mm512_set1_ps(backwards ? -1.0f : 1.0f);
  if (heads * half == 0 || size % 2) return misshapen();
  const int64_t places = x.element_count() / (heads * size), angles = places * half;
  if (int64_t(cosine.element_count()) != angles || int64_t(sine.element_count()) != angles) return misshapen();
  rows_of(pool, places, nothing, [&](int64_t, int64_t row) {
    for (int64_t at = 0; at < half; at += 16) {
      const __mmask16 mask = left(half - at);
      const __m512 c = _mm512_maskz_loadu_ps(mask, floats(cosine) + row * half + at);
      const __m512 s = _mm512_mul_ps(sign, _mm512_maskz_loadu_ps(mask, floats(sine) + row * half + at));
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t place = (row * heads + head) * size + at;
        const __m512 a = widen(in(x) + place, mask), b = widen(in(x) + place + half, mask);
        narrow(_mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), out(result) + place, mask);
        narrow(_mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)), out(result) + place + half, mask);
      }
    }
  });
  return ffi::Error::Success();
}

// Of a row of logits: log-sum-exp, the target's negative log-likelihood, and the gradient of
// weight (nll + z_loss lse^2), which is weight ((1 + 2 z_loss lse) softmax - target). Columns past `vocabulary` are none,
// and the likelihood of a target that is none of the others is no number.
ffi::Error cross_entropy(ffi::ThreadPool pool, ffi::AnyBuffer scores, ffi::AnyBuffer targets, ffi::AnyBuffer weights,
                         ffi::Result<ffi::AnyBuffer> nll, ffi::Result<ffi::AnyBuffer> lse,
                         ffi::Result<ffi::AnyBuffer> gradient, int64_t vocabulary, float z_loss) {
  const int64_t rows = targets.element_count(), columns = scores.dimensions().back();
  if (scores.element_count() != targets.element_count() * columns || weights.element_count() != targets.element_count() ||
      vocabulary < 1 || vocabulary > columns)
    return misshapen();
  const __m512 log2e = _mm512_set1_ps(kLog2E);
  Crew::run(pool, rows, [&](int64_t row) {
    const float* from = floats(scores) + row * columns;
    const int64_t target = static_cast<const int32_t*>(targets.untyped_data())[row];
    __m512 highest = _mm512_set1_ps(-INFINITY);
    for (int64_t at = 0; at < vocabulary; at += 16) {
      const __mmask16 mask = left(vocabulary - at);
      highest = _mm512_mask_max_ps(highest, mask, highest, _mm512_maskz_loadu_ps(mask, from + at));
    }
    const float peak = _mm512_reduce_max_ps(highest);
    const __m512 most = _mm512_set1_ps(peak);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < vocabulary; at += 16) {
      const __mmask16 mask = left(vocabulary - at);
      const __m512 power = power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, from + at), most), log2e));
      sum = _mm512_mask_add_ps(sum, mask, sum, power);
    }
    const float mass = std::log(_mm512_reduce_add_ps(sum)), whole = peak + mass;
    floats(lse)[row] = whole;
    floats(nll)[row] = target < 0 || target >= vocabulary ? NAN : peak - from[target] + mass;
    const float weight = floats(weights)[row];
    const __m512 share = _mm512_set1_ps(weight * (1 + 2 * z_loss * whole) * std::exp(-mass));
    bf16* to = out(gradient) + row * columns;
    for (int64_t at = 0; at < columns; at += 16) {
      const __mmask16 mask = left(columns - at), real = vocabulary > at ? left(vocabulary - at) : 0;
      const __m512 power = power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(real, from + at), most), log2e));
      __m512 value = _mm512_maskz_mul_ps(real, share, power);
      if (target >= at && target < at + 16)
        value = _mm512_mask_sub_ps(value, __mmask16(1u << (target - at)), value, _mm512_set1_ps(weight));
      narrow(value, to + at, mask);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xgen

XLA_FFI_DEFINE_HANDLER_SYMBOL(xgen_rms_norm, xgen::rms_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xgen_rms_norm_gradients, xgen::rms_norm_gradients,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xgen_rotate, xgen::rotate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("backwards"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xgen_cross_entropy, xgen::cross_entropy,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("vocabulary")
                                  .Attr<float>("z_loss"));
