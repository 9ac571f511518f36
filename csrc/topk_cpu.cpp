// The CPU ops: candidates, smoothed k-th value, loss and gradient, registered on the LibTorch stable ABI.
//
// Maths: topk_fast/reference.py; search: topk_cpu_kernel.h. Users' errors are raised in topk_fast/functional.py;
// what is checked here keeps memory safe.
#include "topk_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>

#include "stable_tensor.h"

namespace topk_fast {
namespace {

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return topk_fast::empty(sizes, dtype, aoti_torch_device_type_cpu(), 0);
}

Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::Double: return Dtype::kDouble;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kHalf;
    default: STD_TORCH_CHECK(false, "scores must be float32, float64, bfloat16 or float16");
  }
}

// Rows that a thread should take at least, at a cost of so many steps each.
int64_t grain(int64_t cost) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cost)); }

// Scores whose rows are strided but whose classes are not are read in place.
struct Scores {
  Tensor tensor;
  int64_t row_stride;
  explicit Scores(const Tensor& x) : tensor(x) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.size(1) < (int64_t(1) << 31), "scores must be [N, L]");
    if (x.size(1) > 1 && x.stride(1) != 1) tensor = torch::stable::contiguous(x);
    row_stride = tensor.stride(0);
  }
};

Search request(const Scores& scores, const Tensor& seed, int64_t k, double epsilon, int64_t n_sample, bool dense) {
  STD_TORCH_CHECK(seed.dim() == 0 && seed.scalar_type() == ScalarType::Long && seed.is_cpu(), "seed must be int64");
  STD_TORCH_CHECK(k >= 1 && k <= (int64_t(1) << 31) && n_sample >= 1, "k and n_sample must be positive");
  Search p{};
  p.scores = scores.tensor.const_data_ptr();
  p.dtype = dtype_of(scores.tensor.scalar_type());
  p.n_rows = scores.tensor.size(0), p.n_classes = scores.tensor.size(1), p.row_stride = scores.row_stride;
  p.seed = *(const uint64_t*)seed.const_data_ptr();
  p.k = k, p.n_sample = n_sample, p.epsilon = epsilon, p.dense = dense;
  return p;
}

// All rows and, where rows are fewer than threads, shares of their samples in parallel.
void run(Search& p, const Tensor& values, const Tensor& classes) {
  p.values = values.mutable_data_ptr();
  p.classes = (int64_t*)classes.mutable_data_ptr();
  const int64_t threads = torch::stable::get_num_threads(), quads = (p.n_sample + 3) / 4;
  const int64_t wanted = p.n_rows ? std::min(quads, (threads + p.n_rows - 1) / p.n_rows) : 1;
  p.samples_per_split = (quads + wanted - 1) / wanted * 4;
  p.n_split = (p.n_sample + p.samples_per_split - 1) / p.samples_per_split;
  const SearchFn search = search_function();
  const int64_t cost = p.n_classes + 256 * std::min(p.samples_per_split, p.n_sample);
  torch::stable::parallel_for(0, p.n_rows * p.n_split, grain(cost), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<int64_t[]> workspace(new int64_t[workspace_words(p)]);
    search(p, begin, end, workspace.get());
  });
}

std::tuple<Tensor, Tensor> candidates(const Tensor& scores_, const Tensor& seed, int64_t k, double epsilon,
                                      int64_t n_sample, int64_t first_row, int64_t first_class, bool dense) {
  const Scores scores(scores_);
  Search p = request(scores, seed, k, epsilon, n_sample, dense);
  p.keep_all = true, p.first_row = first_row, p.first_class = first_class;
  Tensor values = empty({p.n_rows, n_sample, k}, arithmetic(scores_.scalar_type()));
  Tensor classes = empty({p.n_rows, n_sample, k}, ScalarType::Long);
  run(p, values, classes);
  return {values, classes};
}

// Adds in sample order, one product at the end.
template <class S>
S mean(const S* v, int64_t n) {
  S sum = v[0];
  for (int64_t b = 1; b < n; ++b) sum += v[b];
  return sum * (S)(1.0 / (double)n);
}

std::tuple<Tensor, Tensor> smoothed(const Tensor& scores_, const Tensor& seed, int64_t k, double epsilon,
                                    int64_t n_sample, bool dense) {
  const Scores scores(scores_);
  Search p = request(scores, seed, k, epsilon, n_sample, dense);
  const ScalarType type = arithmetic(scores_.scalar_type());
  Tensor values = empty({p.n_rows, n_sample}, type), top = empty({p.n_rows}, type);
  Tensor classes = empty({p.n_rows, n_sample}, ScalarType::Long);
  run(p, values, classes);
  const auto reduce = [&](auto* out) {
    const auto* v = (decltype(out))values.const_data_ptr();
    for (int64_t n = 0; n < p.n_rows; ++n) out[n] = mean(v + n * n_sample, n_sample);
  };
  type == ScalarType::Double ? reduce((double*)top.mutable_data_ptr()) : reduce((float*)top.mutable_data_ptr());
  return {top, classes};
}

template <class S>
S score(const void* scores, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kFloat: return (S)((const float*)scores)[i];
    case Dtype::kDouble: return (S)((const double*)scores)[i];
    case Dtype::kBFloat16: return (S)(float)((const torch::headeronly::BFloat16*)scores)[i];
    default: return (S)(float)((const torch::headeronly::Half*)scores)[i];
  }
}

template <class S>
void hinge_rows(const Search& p, const S* values, const S* margins, S scale, S* losses, S* n_valid) {
  int64_t valid = 0;
  for (int64_t n = 0; n < p.n_rows; ++n) {
    const int64_t y = p.target[n];
    if (y == p.ignore_index) {
      losses[n] = 0;
      std::fill_n(p.classes + n * p.n_sample, p.n_sample, -1);
      continue;
    }
    ++valid;
    const S top = mean(values + n * p.n_sample, p.n_sample), margin = margins ? margins[y] : (S)1;
    const S loss = scale * ((margin + top) - score<S>(p.scores, p.dtype, n * p.row_stride + y));
    losses[n] = loss <= 0 ? (S)0 : loss;
  }
  *n_valid = (S)valid;
}

std::tuple<Tensor, Tensor, Tensor> loss(const Tensor& scores_, const Tensor& target_,
                                        const std::optional<Tensor>& margins_, const Tensor& seed, int64_t k,
                                        double epsilon, int64_t n_sample, double scale, int64_t ignore_index,
                                        bool dense) {
  const Scores scores(scores_);
  Search p = request(scores, seed, k, epsilon, n_sample, dense);
  const ScalarType type = arithmetic(scores_.scalar_type());
  const Tensor target = packed(target_);
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == p.n_rows && target.scalar_type() == ScalarType::Long,
                  "target must be int64 [N]");
  p.target = (const int64_t*)target.const_data_ptr(), p.ignore_index = ignore_index;
  for (int64_t n = 0; n < p.n_rows; ++n)
    STD_TORCH_CHECK(p.target[n] == ignore_index || (p.target[n] >= 0 && p.target[n] < p.n_classes),
                    "target out of bounds");
  std::optional<Tensor> margins;
  if (margins_) {
    margins = packed(*margins_);
    STD_TORCH_CHECK(margins->dim() == 1 && margins->size(0) == p.n_classes && margins->scalar_type() == type,
                    "margins must be [L] of the arithmetic's dtype");
  }
  Tensor values = empty({p.n_rows, n_sample}, type), losses = empty({p.n_rows}, type);
  Tensor classes = empty({p.n_rows, n_sample}, ScalarType::Long);
  run(p, values, classes);
  Tensor n_valid = empty({}, type);
  const auto reduce = [&](auto* out) {
    using S = std::remove_pointer_t<decltype(out)>;
    hinge_rows(p, (const S*)values.const_data_ptr(), margins ? (const S*)margins->const_data_ptr() : nullptr, (S)scale,
               out, (S*)n_valid.mutable_data_ptr());
  };
  type == ScalarType::Double ? reduce((double*)losses.mutable_data_ptr()) : reduce((float*)losses.mutable_data_ptr());
  return {losses, classes, n_valid};
}

// Zero fill, then at most B + 1 entries a row: (grad * scale) * (count / B), counts exact, the true class B less.
// Classes outside [first_class, first_class + n_classes) belong to other slices.
template <class T, class S>
void gradient_rows(const Tensor& grad_, const S* result, const int64_t* classes, int64_t n_sample,
                   const int64_t* target, S scale, T* out, int64_t n_rows, int64_t first_class, int64_t n_classes) {
  const S* grad = (const S*)grad_.const_data_ptr();
  const int64_t step = grad_.stride(0);
  torch::stable::parallel_for(0, n_rows, grain(n_classes / 16 + 8 * n_sample), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<int64_t[]> sorted(new int64_t[n_sample]);
    for (int64_t n = begin; n < end; ++n) {
      T* row = out + n * n_classes;
      if (std::isnan(result[n])) {
        std::fill_n(row, n_classes, (T)std::nanf(""));
        continue;
      }
      std::memset((void*)row, 0, n_classes * sizeof(T));
      if (target && !(result[n] > 0)) continue;
      const S coefficient = grad[n * step] * scale;
      const auto write = [&](int64_t c, int64_t count) {
        if (c >= first_class && c - first_class < n_classes)
          row[c - first_class] = (T)(coefficient * ((S)count / (S)n_sample));
      };
      std::copy_n(classes + n * n_sample, n_sample, sorted.get());
      std::sort(sorted.get(), sorted.get() + n_sample);
      if (target) write(target[n], -n_sample);
      for (int64_t b = 0; b < n_sample;) {
        const int64_t c = sorted[b], start = b;
        while (b < n_sample && sorted[b] == c) ++b;
        if (c >= 0) write(c, b - start - (target && c == target[n] ? n_sample : 0));
      }
    }
  });
}

Tensor gradient(const Tensor& grad, const Tensor& result_, const Tensor& classes_, const std::optional<Tensor>& target_,
                double scale, int64_t first_class, int64_t n_classes, ScalarType dtype) {
  const Tensor result = packed(result_), classes = packed(classes_);
  const int64_t n_rows = classes.size(0), n_sample = classes.size(1);
  const ScalarType type = arithmetic(dtype);
  STD_TORCH_CHECK(classes.dim() == 2 && classes.scalar_type() == ScalarType::Long && grad.dim() == 1 &&
                      grad.size(0) == n_rows && grad.scalar_type() == type && result.dim() == 1 &&
                      result.size(0) == n_rows && result.scalar_type() == type,
                  "grad and result must be [N] of the arithmetic's dtype, classes int64 [N, n_sample]");
  STD_TORCH_CHECK(first_class >= 0 && n_classes >= 0, "first_class and n_classes must not be negative");
  std::optional<Tensor> target;
  if (target_) {
    target = packed(*target_);
    STD_TORCH_CHECK(target->dim() == 1 && target->size(0) == n_rows && target->scalar_type() == ScalarType::Long,
                    "target must be int64 [N]");
  }
  const int64_t* y = target ? (const int64_t*)target->const_data_ptr() : nullptr;
  Tensor out = empty({n_rows, n_classes}, dtype);
  const auto fill = [&](auto* o, auto s) {
    using S = decltype(s);
    gradient_rows(grad, (const S*)result.const_data_ptr(), (const int64_t*)classes.const_data_ptr(), n_sample, y,
                  (S)scale, o, n_rows, first_class, n_classes);
  };
  void* o = out.mutable_data_ptr();
  switch (dtype_of(dtype)) {
    case Dtype::kFloat: fill((float*)o, 0.0f); break;
    case Dtype::kDouble: fill((double*)o, 0.0); break;
    case Dtype::kBFloat16: fill((torch::headeronly::BFloat16*)o, 0.0f); break;
    case Dtype::kHalf: fill((torch::headeronly::Half*)o, 0.0f); break;
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(topk_fast, CPU, m) {
  m.impl("candidates", TORCH_BOX(&candidates));
  m.impl("smoothed", TORCH_BOX(&smoothed));
  m.impl("loss", TORCH_BOX(&loss));
  m.impl("gradient", TORCH_BOX(&gradient));
}

}  // namespace topk_fast
