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

enum class LinkKind : int32_t { kHinge, kSoftplus, kIdentity };
enum class Reduction : int32_t { kMean, kSum, kNone };

// The losses of excesses, as topk_fast/criterion.py's Criterion. Numbers in memory are double where excesses are, else
// float.
struct Link {
  const void* excess;     // [n_rows, n_ranks]
  const int64_t* target;  // [n_rows]
  int64_t ignore_index, n_rows, n_ranks, n_classes;
  const void* margins;  // [n_classes], or null: `margin` for every class
  const void* weight;   // [n_classes], or null: 1
  double temperature, margin, scale, rank_weights[kMaxRanks];
  LinkKind kind;
  Reduction reduction;
  bool is_double;
  void* losses;   // one number, or [n_rows]
  void* rows;     // [n_rows], each row's loss, or null
  void* slope;    // [n_rows, n_ranks]: the derivative of a row's loss in its excesses
  void* divisor;  // one number, by which a mean divides; else it is 1
};

// The gradient of the scores from that of the excesses, or the slice of it from first_class on. With a slope, the
// gradient of an excess is grad / divisor * slope.
struct Gradient {
  const void* grad;        // [n_rows, n_ranks], double where the scores are double, else float
  const int64_t* classes;  // [n_rows, n_sample, n_ranks]
  const int64_t* target;   // [n_rows] or null
  int64_t ignore_index, n_rows, n_sample, n_ranks, first_class, n_classes;
  ScoreType type;
  void* out;            // [n_rows, n_classes] of `type`
  const void* slope;    // [n_rows, n_ranks], or null
  const void* divisor;  // one number
  int64_t grad_stride;  // with a slope, `grad` has one number a row, so far apart
};

}  // namespace topk_fast
