// The ops, once for all devices: candidates, excess, gradient and link, from tensors to requests.
//
// A Device is made for a tensor, whose device it makes current. It has `holds(tensor)`, `empty(sizes, dtype)`,
// `readable(scores)`, `search(Search)`, `gradient(Gradient)`, `link(Link)`, and `kReduces`, whether that reduces losses
// too. What is checked here keeps memory safe; users' errors are raised by topk_fast/checks.py.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "request.h"
#include "stable_tensor.h"

namespace topk_fast {

inline ScoreType score_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return ScoreType::kFloat32;
    case ScalarType::Double: return ScoreType::kFloat64;
    case ScalarType::BFloat16: return ScoreType::kBFloat16;
    case ScalarType::Half: return ScoreType::kFloat16;
    default: STD_TORCH_CHECK(false, "scores must be float32, float64, bfloat16 or float16");
  }
}

template <class Device>
struct Ops {
  using Pair = std::tuple<Tensor, Tensor>;
  using Maybe = std::optional<Tensor>;
  using Ranks = std::vector<int64_t>;

  // Checks that a tensor is on the scores' device, of this dtype and shape.
  static void check(const Device& device, const Tensor& x, const char* name, ScalarType dtype,
                    std::initializer_list<int64_t> sizes) {
    STD_TORCH_CHECK(device.holds(x), name, " must be on the device of the scores");
    bool fits = x.scalar_type() == dtype && x.dim() == (int64_t)sizes.size();
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = x.size((int64_t)i) == sizes.begin()[i];
    STD_TORCH_CHECK(fits, name, " must be ", toString(dtype), " of shape ", shape_string(sizes), ", got ",
                    toString(x.scalar_type()), " of shape ", shape_string(x.sizes()));
  }

  // The same, packed.
  static Tensor checked(const Device& device, const Tensor& x, const char* name, ScalarType dtype,
                        std::initializer_list<int64_t> sizes) {
    check(device, x, name, dtype, sizes);
    return packed(x);
  }

  // A search whose tensors live as long as it.
  struct Request {
    Search search{};
    Tensor scores;
    Maybe schedule, target;
    Tensor seed;
  };

  // The arguments that a search's noise is made of, as topk_fast/request.py's Noise.
  struct Noise {
    const Tensor& seed;
    const Ranks& ranks;
    double epsilon;
    const Maybe& schedule;
    int64_t n_sample, law;
    bool dense;
  };

  static Request request(const Device& device, const Tensor& scores, const Noise& noise) {
    const Ranks& ranks = noise.ranks;
    STD_TORCH_CHECK(scores.dim() == 2 && scores.size(1) > 0 && scores.size(1) < (int64_t(1) << 31),
                    "scores must be [N, L] with L in [1, 2**31), got ", shape_string(scores.sizes()));
    STD_TORCH_CHECK(!ranks.empty() && ranks.size() <= kMaxRanks, "there must be 1 to ", kMaxRanks, " ranks, got ",
                    ranks.size());
    STD_TORCH_CHECK(noise.n_sample >= 1, "n_sample must be positive, got ", noise.n_sample);
    STD_TORCH_CHECK(noise.law == 0 || noise.law == 1, "the law must be 0 (normal) or 1 (gumbel), got ", noise.law);
    Request r{{}, device.readable(scores), {}, {}, checked(device, noise.seed, "seed", ScalarType::Long, {})};
    Search& p = r.search;
    for (size_t m = 0; m < ranks.size(); ++m) {
      STD_TORCH_CHECK(ranks[m] >= 1 && ranks[m] < (int64_t(1) << 31), "ranks must be positive, got ", ranks[m]);
      p.ranks[m] = (int32_t)ranks[m];
      p.k = ranks[m] > p.k ? ranks[m] : p.k;
    }
    p.n_ranks = (int32_t)ranks.size();
    p.scores = r.scores.const_data_ptr(), p.type = score_type(scores.scalar_type());
    p.n_rows = scores.size(0), p.n_classes = scores.size(1);
    p.row_stride = r.scores.stride(0), p.class_stride = r.scores.stride(1);
    p.seed = (const int64_t*)r.seed.const_data_ptr();
    p.epsilon = noise.epsilon, p.n_sample = noise.n_sample, p.law = (Law)noise.law, p.dense = noise.dense;
    if (noise.schedule) {
      r.schedule = checked(device, *noise.schedule, "schedule", ScalarType::Double, {});
      p.schedule = (const double*)r.schedule->const_data_ptr();
    }
    return r;
  }

  static Pair run(const Device& device, Search& p, std::initializer_list<int64_t> values,
                  std::initializer_list<int64_t> classes, ScalarType type) {
    Pair out{device.empty(values, arithmetic(type)), device.empty(classes, ScalarType::Long)};
    p.values = std::get<0>(out).mutable_data_ptr();
    p.classes = (int64_t*)std::get<1>(out).mutable_data_ptr();
    if (p.n_rows) device.search(p);
    return out;
  }

  static Pair candidates(const Tensor& scores, const Tensor& seed, Ranks ranks, double epsilon, const Maybe& schedule,
                         int64_t n_sample, int64_t law, bool dense, int64_t first_row, int64_t first_class) {
    const Device device(scores);
    Request r = request(device, scores, Noise{seed, ranks, epsilon, schedule, n_sample, law, dense});
    Search& p = r.search;
    STD_TORCH_CHECK(first_class >= 0 && first_class < (int64_t(1) << 31) - p.n_classes,
                    "class ids must be in [0, 2**31 - 1), got ", first_class, " for the first of ", p.n_classes);
    p.n_ranks = 0, p.first_row = first_row, p.first_class = first_class;
    return run(device, p, {p.n_rows, n_sample, p.k}, {p.n_rows, n_sample, p.k}, scores.scalar_type());
  }

  static Pair excess(const Tensor& scores, const Tensor& seed, Ranks ranks, double epsilon, const Maybe& schedule,
                     int64_t n_sample, int64_t law, bool dense, const Maybe& target, int64_t ignore_index,
                     bool exclude_target) {
    const Device device(scores);
    Request r = request(device, scores, Noise{seed, ranks, epsilon, schedule, n_sample, law, dense});
    Search& p = r.search;
    if (target) {
      r.target = checked(device, *target, "target", ScalarType::Long, {p.n_rows});
      p.target = (const int64_t*)r.target->const_data_ptr(), p.ignore_index = ignore_index;
      p.exclude_target = exclude_target;
    }
    for (int m = 0; m < p.n_ranks; ++m)
      STD_TORCH_CHECK(p.ranks[m] >= 1 + (int)p.exclude_target, "ranks must be at least 2 without the true class, got ",
                      p.ranks[m]);
    return run(device, p, {p.n_rows, p.n_ranks}, {p.n_rows, n_sample, p.n_ranks}, scores.scalar_type());
  }

  static Tensor gradient(const Tensor& grad, const Tensor& classes, const Maybe& target, int64_t ignore_index,
                         int64_t first_class, int64_t n_classes, ScalarType dtype) {
    return gradient_of(grad, {}, {}, classes, target, ignore_index, first_class, n_classes, dtype);
  }

  static Tensor linked_gradient(const Tensor& grad, const Tensor& slope, const Tensor& divisor, const Tensor& classes,
                                const Maybe& target, int64_t ignore_index, int64_t first_class, int64_t n_classes,
                                ScalarType dtype) {
    return gradient_of(grad, slope, divisor, classes, target, ignore_index, first_class, n_classes, dtype);
  }

  static Tensor gradient_of(const Tensor& grad_, const Maybe& slope_, const Maybe& divisor_, const Tensor& classes_,
                            const Maybe& target_, int64_t ignore_index, int64_t first_class, int64_t n_classes,
                            ScalarType dtype) {
    const Device device(classes_);
    STD_TORCH_CHECK(
        classes_.dim() == 3 && classes_.size(1) > 0 && classes_.size(2) > 0 && classes_.size(2) <= kMaxRanks,
        "classes must be [N, n_sample, M] with M in [1, ", kMaxRanks, "], got ", shape_string(classes_.sizes()));
    STD_TORCH_CHECK(first_class >= 0 && n_classes >= 0, "the slice of classes must not be negative, got ", n_classes,
                    " from ", first_class, " on");
    Gradient g{};
    g.n_rows = classes_.size(0), g.n_sample = classes_.size(1), g.n_ranks = classes_.size(2);
    const Tensor classes = checked(device, classes_, "classes", ScalarType::Long, {g.n_rows, g.n_sample, g.n_ranks});
    Maybe grad, slope, divisor, target;
    if (!slope_) {
      grad = checked(device, grad_, "grad", arithmetic(dtype), {g.n_rows, g.n_ranks});
    } else if (grad_.dim() == 0) {
      check(device, *(grad = grad_), "grad", arithmetic(dtype), {});
    } else {
      check(device, *(grad = grad_), "grad", arithmetic(dtype), {g.n_rows});
      g.grad_stride = grad_.stride(0);
    }
    if (slope_) {
      slope = checked(device, *slope_, "slope", arithmetic(dtype), {g.n_rows, g.n_ranks});
      divisor = checked(device, *divisor_, "divisor", arithmetic(dtype), {});
      g.slope = slope->const_data_ptr(), g.divisor = divisor->const_data_ptr();
    }
    if (target_) {
      target = checked(device, *target_, "target", ScalarType::Long, {g.n_rows});
      g.target = (const int64_t*)target->const_data_ptr(), g.ignore_index = ignore_index;
    }
    Tensor out = device.empty({g.n_rows, n_classes}, dtype);
    g.grad = grad->const_data_ptr(), g.classes = (const int64_t*)classes.const_data_ptr();
    g.first_class = first_class, g.n_classes = n_classes, g.type = score_type(dtype);
    g.out = out.mutable_data_ptr();
    if (g.n_rows && n_classes) device.gradient(g);
    return out;
  }

  // Writes the loss of rows that the device does not add up: torch's sum of them, divided.
  template <class S>
  static void reduce(const Link& p, const Tensor& rows) {
    *(S*)p.losses = *(const S*)torch::stable::sum(rows).const_data_ptr() / *(const S*)p.divisor;
  }

  // The losses, [N] or without dimensions, the slope [N, M], and the divisor.
  static std::tuple<Tensor, Tensor, Tensor> link(const Tensor& excess_, const Tensor& target_, int64_t ignore_index,
                                                 int64_t kind, double temperature, double margin, const Maybe& margins_,
                                                 double scale, std::vector<double> rank_weights, const Maybe& weight_,
                                                 int64_t reduction) {
    const Device device(excess_);
    const ScalarType type = arithmetic(excess_.scalar_type());
    const int64_t n_rows = excess_.dim() == 2 ? excess_.size(0) : 0, n_ranks = (int64_t)rank_weights.size();
    STD_TORCH_CHECK(n_ranks >= 1 && n_ranks <= kMaxRanks, "there must be 1 to ", kMaxRanks, " ranks, got ", n_ranks);
    STD_TORCH_CHECK(kind >= 0 && kind <= 2 && reduction >= 0 && reduction <= 2,
                    "link and reduction must be in [0, 2], got ", kind, " and ", reduction);
    const Tensor excess = checked(device, excess_, "excess", type, {n_rows, n_ranks});
    const Tensor target = checked(device, target_, "target", ScalarType::Long, {n_rows});
    const bool is_reduced = (Reduction)reduction != Reduction::kNone;
    const Tensor losses = is_reduced ? device.empty({}, type) : device.empty({n_rows}, type);
    Maybe rows;
    if (!is_reduced || !Device::kReduces) rows = is_reduced ? device.empty({n_rows}, type) : losses;
    const Tensor slope = device.empty({n_rows, n_ranks}, type), divisor = device.empty({}, type);
    Link p{};
    p.excess = excess.const_data_ptr(), p.target = (const int64_t*)target.const_data_ptr();
    p.ignore_index = ignore_index, p.n_rows = n_rows, p.n_ranks = n_ranks;
    Maybe margins, weight;
    const auto numbers = [&](const Maybe& given, Maybe& kept, const char* name) -> const void* {
      if (!given) return nullptr;
      if (!p.n_classes) p.n_classes = given->numel();
      return (kept = checked(device, *given, name, type, {p.n_classes}))->const_data_ptr();
    };
    p.margins = numbers(margins_, margins, "margins"), p.weight = numbers(weight_, weight, "weight");
    p.temperature = temperature, p.margin = margin, p.scale = scale;
    for (int64_t m = 0; m < n_ranks; ++m) p.rank_weights[m] = rank_weights[m];
    p.kind = (LinkKind)kind, p.reduction = (Reduction)reduction, p.is_double = type == ScalarType::Double;
    p.losses = losses.mutable_data_ptr(), p.slope = slope.mutable_data_ptr();
    p.divisor = divisor.mutable_data_ptr(), p.rows = rows ? rows->mutable_data_ptr() : nullptr;
    device.link(p);
    if constexpr (!Device::kReduces) {
      if (is_reduced) p.is_double ? reduce<double>(p, *rows) : reduce<float>(p, *rows);
    }
    return {losses, slope, divisor};
  }
};

}  // namespace topk_fast
