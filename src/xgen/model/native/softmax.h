// Attention of a few rows of queries to blocks of keys with a running softmax (Dao 2023).
#pragma once

#include <cmath>

#include "tiles.h"

namespace xgen {

constexpr int64_t kQueries = 192;  // rows that share a packed block of keys
constexpr float kNone = -1e30f;    // largest score where there was none

// The rows of queries of one task, and their running softmax: the largest score, the sum of weights, the mixed values.
struct Softmax {
  int64_t count, size;  // rows; of a head
  float factor;         // of a score's exponent of 2
  uint32_t* queries;    // [count][step] pairs
  int64_t step;
  float* peak;   // [count]
  float* mass;   // [count]
  float* mixed;  // [count][width]
  int64_t width;

  Softmax(int64_t rows, int64_t head) : count(rows), size(head), factor(kLog2E / std::sqrt(float(head))) {
    step = a_stride(false, 0, head);
    width = up(head, kColumns);
    queries = kept<uint32_t>(1, rows * step);
    peak = kept<float>(3, 2 * rows);
    mass = peak + rows;
    mixed = kept<float>(4, rows * width);
    std::fill_n(peak, rows, kNone);
    std::fill_n(mass, rows, 0.0f);
    std::fill_n(mixed, rows * width, 0.0f);
  }

  // Take in `keys` keys, packed, of which row i sees those of `sight.mask(i, .)`, all among the first `sight.seen(i)`,
  // and their values, packed.
  template <typename Sight>
  void take(const bf16* key_panels, const bf16* value_panels, int64_t keys, const Sight& sight) {
    const int64_t across = up(keys, kColumns), p_step = a_stride(false, 0, across);
    float* scores = kept<float>(5, kRows * across);
    uint32_t* weights = kept<uint32_t>(6, kRows * p_step);
    for (int64_t first_row = 0; first_row < count; first_row += kRows) {
      const int64_t rows = std::min(kRows, count - first_row);
      int64_t most = 0;
      for (int64_t i = first_row; i < first_row + rows; ++i) most = std::max(most, sight.seen(i));
      if (most == 0) continue;
      const int64_t pairs = (size + 1) / 2, wide = up(most, kColumns);
      for (int64_t n = 0; n < wide; n += kColumns)
        tile_of<false>(rows)(queries + first_row * step, step, key_panels + n * 2 * pairs, pairs, scores + n, across, false);
      for (int64_t i = 0; i < rows; ++i)
        weigh(first_row + i, scores + i * across, wide, sight, reinterpret_cast<bf16*>(weights + i * p_step));
      const int64_t value_pairs = (keys + 1) / 2;
      for (int64_t e = 0; e < width; e += kColumns)
        tile_of<false>(rows)(weights, p_step, value_panels + e * 2 * value_pairs, (most + 1) / 2,
                             mixed + first_row * width + e, width, true);
    }
  }

  template <typename Sight>
  void weigh(int64_t row, const float* scores, int64_t wide, const Sight& sight, bf16* weights) {
    __m512 highest = _mm512_set1_ps(peak[row]);
    for (int64_t n = 0; n < wide; n += 16)
      highest = _mm512_mask_max_ps(highest, sight.mask(row, n), highest, _mm512_load_ps(scores + n));
    const float higher = _mm512_reduce_max_ps(highest);
    const __m512 scale = _mm512_set1_ps(factor), shift = _mm512_set1_ps(higher * factor);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t n = 0; n < wide; n += 16) {
      const __m512 power = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + n), scale, shift));
      const __m512 weight = _mm512_maskz_mov_ps(sight.mask(row, n), power);
      sum = _mm512_add_ps(sum, weight);
      narrow(weight, weights + n, 0xffff);
    }
    const float left = higher == peak[row] ? 1.0f : std::exp2((peak[row] - higher) * factor);
    if (left != 1.0f) {
      const __m512 factors = _mm512_set1_ps(left);
      for (int64_t e = 0; e < width; e += 16)
        _mm512_store_ps(mixed + row * width + e, _mm512_mul_ps(factors, _mm512_load_ps(mixed + row * width + e)));
    }
    peak[row] = higher;
    mass[row] = mass[row] * left + _mm512_reduce_add_ps(sum);
  }
};

inline void scaled(const float* from, float factor, int64_t count, bf16* to) {
  for (int64_t e = 0; e < count; e += 16) {
    const __m512 values = _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(from + e));
    narrow(values, to + e, first(std::min<int64_t>(16, count - e)));
  }
}

// The first keys of a block, as many as a row's own place lets it see.
struct Prefix {
  int64_t before;         // keys of the block that the first column's queries see: below 0 where it is still ahead
  int64_t group, offset;  // queries of a column; of the first row among all columns' queries
  int64_t keys;

  int64_t seen(int64_t i) const { return std::clamp<int64_t>(before + (offset + i) / group, 0, keys); }
  __mmask16 mask(int64_t i, int64_t n) const { return first(std::min<int64_t>(seen(i) - n, 16)); }
};

}  // namespace xgen
