// What the kernels share: tiles of bfloat16 products with float32 sums, the packing of their operands, and a crew of
// threads.
//
// The scheme is Goto and van de Geijn's (2008): a block of B is packed once into a core's second-level cache, rows of A
// pass by it, and a tile of C stays in registers through the whole inner loop. VDPBF16PS multiplies pairs of neighbours
// along the summed axis, so B is packed as [panel of 32 columns][K / 2][column][2].
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace xgen {

using bf16 = uint16_t;

constexpr int64_t kRows = 12;       // of a tile: 12 x 2 vectors of sums, 2 of B and one of A fill the 32 registers
constexpr int64_t kColumns = 32;    // of a tile and of a packed panel
constexpr int64_t kDepth = 512;     // of K at a time: a panel of B is then 32 KiB, and stays in the first-level cache
constexpr int64_t kBlock = 1 << 18; // elements of a packed block of B: 512 KiB
constexpr int64_t kChunk = 480;     // rows of A for which a block of B is packed

inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

struct Matrix {
  const bf16* data;
  int64_t rows, columns;
  bool turned;       // stored [columns, rows]
  int64_t apart = 0;  // elements between what is stored as rows; 0 where they follow each other
  int64_t stride() const { return apart ? apart : turned ? rows : columns; }
};

// So many bytes, at the beginning of a page of memory. Without them a kernel cannot go on, nor tell its caller.
inline void* aligned(size_t bytes) {
  void* place = std::aligned_alloc(4096, up(bytes, 4096));
  if (place) return place;
  std::fprintf(stderr, "xgen: the system gives no %zu bytes of memory for a kernel\n", bytes);
  std::abort();
}

// A buffer that a thread keeps from call to call: fresh pages would cost more than what is done in them.
template <typename T>
T* kept(int which, int64_t count) {
  static thread_local std::vector<std::unique_ptr<void, decltype(&std::free)>> held;
  static thread_local std::vector<size_t> sizes;
  if (held.size() <= static_cast<size_t>(which)) {
    for (int i = held.size(); i <= which; ++i) {
      held.emplace_back(nullptr, &std::free);
      sizes.push_back(0);
    }
  }
  size_t bytes = up(count * sizeof(T), 4096);
  if (sizes[which] < bytes) {
    held[which].reset(aligned(bytes));
    sizes[which] = bytes;
  }
  return static_cast<T*>(held[which].get());
}

inline __mmask32 first(int64_t count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1u;
}

// Two rows of 32 become 32 pairs.
inline void interleave(__m512i a, __m512i b, __m512i* low, __m512i* high) {
  const __m512i from_low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                            37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i from_high = _mm512_add_epi16(from_low, _mm512_set1_epi16(16));
  *low = _mm512_permutex2var_epi16(a, from_low, b);
  *high = _mm512_permutex2var_epi16(a, from_high, b);
}

inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Rows [k0, k0 + depth) and columns [n0, n1) of B into panels; what lies past its edges is 0.
inline void pack_b(const Matrix& b, int64_t k0, int64_t depth, int64_t n0, int64_t n1, bf16* out) {
  const int64_t pairs = (depth + 1) / 2, stride = b.stride();
  if (!b.turned) {
    for (int64_t p = 0; p < pairs; ++p) {
      const bf16* row = b.data + (k0 + 2 * p) * stride;
      const bool second = 2 * p + 1 < depth;
      for (int64_t n = n0; n < n1; n += kColumns) {
        const __mmask32 mask = first(n1 - n);
        __m512i low, high;
        interleave(_mm512_maskz_loadu_epi16(mask, row + n), _mm512_maskz_loadu_epi16(second ? mask : 0, row + stride + n),
                   &low, &high);
        bf16* to = out + (n - n0) * 2 * pairs + p * 2 * kColumns;
        _mm512_store_si512(to, low);
        _mm512_store_si512(to + kColumns, high);
      }
    }
    return;
  }
  for (int64_t n = n0; n < n1; n += 16) {
    bf16* to = out + (n - n0) / kColumns * kColumns * 2 * pairs + (n - n0) % kColumns * 2;
    for (int64_t p = 0; p < pairs; p += 16) {
      const __mmask32 mask = first(depth - 2 * p);
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i)
        r[i] = n + i < n1 ? _mm512_maskz_loadu_epi16(mask, b.data + (n + i) * stride + k0 + 2 * p) : _mm512_setzero_si512();
      transpose16(r);
      const int64_t count = std::min<int64_t>(16, pairs - p);
      for (int64_t i = 0; i < count; ++i) _mm512_store_si512(to + (p + i) * 2 * kColumns, r[i]);
    }
  }
  if ((n1 - n0 + 15) / 16 % 2 == 1) {  // the last panel's second half
    bf16* to = out + (n1 - n0) / kColumns * kColumns * 2 * pairs + kColumns;
    for (int64_t p = 0; p < pairs; ++p) _mm512_store_si512(to + p * 2 * kColumns, _mm512_setzero_si512());
  }
}

// Rows [m0, m1) of A as pairs: turned, [pair][row]; else [row][pair], rows apart by an odd number of cache lines, so
// that they do not meet in one set of the cache.
inline int64_t a_stride(bool turned, int64_t rows, int64_t depth) {
  return turned ? up(rows, 16) : up((depth + 1) / 2, 32) + 16;
}

inline void pack_a(const Matrix& a, int64_t k0, int64_t depth, int64_t m0, int64_t m1, uint32_t* out) {
  const int64_t pairs = (depth + 1) / 2, stride = a.stride(), step = a_stride(a.turned, m1 - m0, depth);
  if (a.turned) {
    for (int64_t p = 0; p < pairs; ++p) {
      const bf16* row = a.data + (k0 + 2 * p) * stride;
      const bool second = 2 * p + 1 < depth;
      for (int64_t m = m0; m < m1; m += 32) {
        const __mmask32 mask = first(m1 - m);
        __m512i low, high;
        interleave(_mm512_maskz_loadu_epi16(mask, row + m), _mm512_maskz_loadu_epi16(second ? mask : 0, row + stride + m),
                   &low, &high);
        uint32_t* to = out + p * step + (m - m0);
        _mm512_storeu_si512(to, low);
        if (m1 - m > 16) _mm512_storeu_si512(to + 16, high);
      }
    }
    return;
  }
  for (int64_t m = m0; m < m1; ++m) {
    uint32_t* to = out + (m - m0) * step;
    std::memcpy(to, a.data + m * stride + k0, depth * sizeof(bf16));
    if (depth % 2) reinterpret_cast<bf16*>(to)[depth] = 0;
  }
}

// C[R, 16 V] of A's pairs and a panel of B.
template <int R, bool Turned, int V = 2>
void tile(const uint32_t* a, int64_t step, const bf16* b, int64_t pairs, float* c, int64_t c_stride, bool add) {
  __m512 sums[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[r][v] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = (__m512bh)_mm512_load_si512(b + p * 2 * kColumns + v * kColumns);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(Turned ? a[p * step + r] : a[r * step + p]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_stride + 16 * v;
      _mm512_store_ps(to, add ? _mm512_add_ps(sums[r][v], _mm512_load_ps(to)) : sums[r][v]);
    }
}

using Tile = void (*)(const uint32_t*, int64_t, const bf16*, int64_t, float*, int64_t, bool);

template <bool Turned>
Tile tile_of(int64_t rows) {
  static constexpr Tile kTiles[] = {
      tile<1, Turned>, tile<2, Turned>, tile<3, Turned>, tile<4, Turned>,  tile<5, Turned>,  tile<6, Turned>,
      tile<7, Turned>, tile<8, Turned>, tile<9, Turned>, tile<10, Turned>, tile<11, Turned>, tile<12, Turned>};
  return kTiles[rows - 1];
}

// 2^x for x in [-126, 127], and what is outside taken for the nearer end (Cody and Waite; the polynomial is within 2e-7
// of the value). What is no number stays none: of two operands of which one is none, MAXPS and MINPS give the second.
inline __m512 power_of_two(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(127.0f), _mm512_max_ps(_mm512_set1_ps(-126.0f), x));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.5403530e-4f);
  for (float next : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(next));
  return _mm512_scalef_ps(sum, whole);
}

inline const bf16* in(const xla::ffi::AnyBuffer& buffer) { return static_cast<const bf16*>(buffer.untyped_data()); }

inline xla::ffi::Error misshapen() {
  return xla::ffi::Error::InvalidArgument("the operands' shapes do not belong together");
}

inline bf16* out(xla::ffi::Result<xla::ffi::AnyBuffer>& buffer) { return static_cast<bf16*>(buffer->untyped_data()); }

constexpr float kLog2E = 1.4426950408889634f;

inline __m512 widen(const bf16* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

inline void narrow(__m512 values, bf16* to, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

// Tasks of one call. The calling thread takes them too, and waits only for those that others have begun: a pool whose
// threads are all busy delays nothing.
class Crew {
 public:
  // `task(i)` for every i below `count`, on the threads of `pool` and this one.
  static void run(xla::ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> task) {
    auto crew = std::make_shared<Crew>(count, std::move(task));
    for (int64_t i = 1; i < std::min<int64_t>(pool.num_threads(), count); ++i) pool.Schedule([crew] { crew->work(); });
    crew->work();
    crew->wait();
  }

  Crew(int64_t count, std::function<void(int64_t)> task) : count_(count), task_(std::move(task)) {}

 private:
  void work() {
    int64_t finished = 0;
    for (int64_t at; (at = next_.fetch_add(1)) < count_; ++finished) task_(at);
    if (finished == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    done_ += finished;
    if (done_ == count_) change_.notify_all();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    change_.wait(lock, [this] { return done_ == count_; });
  }

  const int64_t count_;
  const std::function<void(int64_t)> task_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable change_;
  int64_t done_ = 0;
};

}  // namespace xgen
