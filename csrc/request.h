// Requests: what the ops ask of the kernels, on every device. Plain structs without torch; host and device code.
//
// topk_fast/request.py has the same requests in Python, and topk_fast/ops.py their schemas.
#pragma once

#include <stdint.h>

namespace topk_fast {

enum class ScoreType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class Law : int32_t { kNormal, kGumbel };

constexpr int kMaxRanks = 32;

// A search for the k best of s + epsilon * Z of every (row, sample). Values and excesses are double where scores are
// double, else float. Classes are global ids, -1 where fewer than k scores are finite or the row is ignored, and -2
// where the row holds a NaN or one of its excesses is NaN.
struct Search {
  const void* scores;  // [n_rows, n_classes] of `type`
  ScoreType type;
  int64_t n_rows, n_classes, row_stride, class_stride;
  const int64_t* target;  // [n_rows], or null: the smoothed values in place of their excesses over the true score
  int64_t ignore_index;
  bool exclude_target;  // rank the other classes only
  const int64_t* seed;  // one number on the scores' device
  double epsilon;
  const double* schedule;  // null, or one number on the scores' device that replaces epsilon
  int64_t first_row, first_class, k, n_sample;
  int32_t n_ranks, ranks[kMaxRanks];  // n_ranks = 0: all k best, without a target
  Law law;
  bool dense;        // every class is a contender
  void* values;      // [n_rows, n_sample, k], or excesses [n_rows, n_ranks]
  int64_t* classes;  // [n_rows, n_sample, k or n_ranks]
};

// The gradient of the scores from that of the excesses, or the slice of it from first_class on.
struct Gradient {
  const void* grad;        // [n_rows, n_ranks], double where the scores are double, else float
  const int64_t* classes;  // [n_rows, n_sample, n_ranks]
  const int64_t* target;   // [n_rows] or null
  int64_t ignore_index, n_rows, n_sample, n_ranks, first_class, n_classes;
  ScoreType type;
  void* out;  // [n_rows, n_classes] of `type`
};

}  // namespace topk_fast
