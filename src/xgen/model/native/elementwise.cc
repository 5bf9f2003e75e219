// SwiGLU and its gradients in one pass each, for CPUs with AVX512-BF16; computed in float32 and rounded once. And what
// does nothing to an array but have it wait.

#include "tiles.h"

namespace ffi = xla::ffi;

namespace xgen {
namespace {

constexpr int64_t kStretch = 1 << 15;  // elements of a task

__m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-kLog2E)))));
}

// `each(at, mask)` for every 16 elements.
template <typename Each>
void stretches(ffi::ThreadPool& pool, int64_t count, Each each) {
  Crew::run(pool, (count + kStretch - 1) / kStretch, [&](int64_t task) {
    const int64_t end = std::min(count, (task + 1) * kStretch);
    for (int64_t at = task * kStretch; at < end; at += 16) each(at, __mmask16(first(std::min<int64_t>(16, end - at))));
  });
}

// What the remaining operands hold does not matter: they are there before this begins.
ffi::Error swiglu(ffi::ThreadPool pool, ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::RemainingArgs,
                  ffi::Result<ffi::AnyBuffer> result) {
  if (gate.element_count() != up.element_count()) return misshapen();
  stretches(pool, gate.element_count(), [&](int64_t at, __mmask16 mask) {
    const __m512 g = widen(in(gate) + at, mask), u = widen(in(up) + at, mask);
    narrow(_mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u), out(result) + at, mask);
  });
  return ffi::Error::Success();
}

// With s = sigmoid(gate): d up = gradient gate s; d gate = gradient up s (1 + gate (1 - s)).
ffi::Error swiglu_gradients(ffi::ThreadPool pool, ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::AnyBuffer gradient,
                            ffi::Result<ffi::AnyBuffer> gate_gradient, ffi::Result<ffi::AnyBuffer> up_gradient) {
  if (gate.element_count() != up.element_count() || gate.element_count() != gradient.element_count()) return misshapen();
  stretches(pool, gate.element_count(), [&](int64_t at, __mmask16 mask) {
    const __m512 g = widen(in(gate) + at, mask), u = widen(in(up) + at, mask), d = widen(in(gradient) + at, mask);
    const __m512 s = sigmoid(g), ds = _mm512_mul_ps(d, s), one = _mm512_set1_ps(1.0f);
    const __m512 slope = _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one);
    narrow(_mm512_mul_ps(_mm512_mul_ps(ds, u), slope), out(gate_gradient) + at, mask);
    narrow(_mm512_mul_ps(ds, g), out(up_gradient) + at, mask);
  });
  return ffi::Error::Success();
}

// The result takes the operand's place, and so nothing is done, unless the program reads the operand elsewhere.
ffi::Error after(ffi::AnyBuffer x, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> result) {
  if (result->size_bytes() != x.size_bytes()) return misshapen();
  if (result->untyped_data() != x.untyped_data()) std::memcpy(result->untyped_data(), x.untyped_data(), x.size_bytes());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xgen

XLA_FFI_DEFINE_HANDLER_SYMBOL(xgen_swiglu, xgen::swiglu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(xgen_swiglu_gradients, xgen::swiglu_gradients,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(xgen_after, xgen::after,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
