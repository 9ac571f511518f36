// The CPU ops on the LibTorch stable ABI: ops.h over this device. Search: search.h; gradient: gradient.h; link: link.h.
#include <algorithm>
#include <memory>

#include "../ops.h"
#include "exact.h"
#include "gradient.h"
#include "kernel.h"
#include "link.h"

namespace topk_fast {
namespace {

// Rows that a thread should take at least, at a cost of so many steps each.
int64_t grain(int64_t cost) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cost)); }

struct Cpu {
  static constexpr bool kReduces = false;  // torch adds the rows' losses up

  explicit Cpu(const Tensor&) {}
  bool holds(const Tensor& x) const { return x.is_cpu(); }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return topk_fast::empty(sizes, dtype, aoti_torch_device_type_cpu(), 0);
  }
  // Scores whose rows are strided but whose classes are not are read in place.
  Tensor readable(const Tensor& x) const {
    return x.size(1) > 1 && x.stride(1) != 1 ? torch::stable::contiguous(x) : x;
  }

  // All rows and, where rows are fewer than threads, shares of their samples in parallel.
  void search(Search& p) const {
    for (int64_t n = 0; p.target && n < p.n_rows; ++n)
      STD_TORCH_CHECK(p.target[n] == p.ignore_index || (p.target[n] >= 0 && p.target[n] < p.n_classes),
                      "target out of bounds");
    if (p.schedule) p.epsilon = *p.schedule, p.schedule = nullptr;
    const int64_t threads = torch::stable::get_num_threads(), quads = (p.n_sample + 3) / 4;
    const int64_t wanted = std::min(quads, (threads + p.n_rows - 1) / p.n_rows);
    const int64_t share = (quads + wanted - 1) / wanted * 4;
    Job job{p, (p.n_sample + share - 1) / share, share, nullptr};
    std::unique_ptr<double[]> picked;
    if (job.n_split > 1 && p.n_ranks) picked.reset(new double[p.n_rows * p.n_sample * p.n_ranks]);
    job.picked = picked.get();
    const Kernel& kernel = chosen_kernel();
    const int64_t cost = p.n_classes + 256 * std::min(share, p.n_sample);
    torch::stable::parallel_for(0, p.n_rows * job.n_split, grain(cost), [&](int64_t begin, int64_t end) {
      const ExactFloats exact;
      const std::unique_ptr<int64_t[]> workspace(new int64_t[workspace_words(job)]);
      kernel.search(job, begin, end, workspace.get());
    });
    if (!job.picked) return;
    const ExactFloats exact;
    kernel.finish(job);
  }

  void link(const Link& p) const {
    STD_TORCH_CHECK(p.kind != LinkKind::kSoftplus, "a softplus of the CPU's excesses is left to torch");
    const ExactFloats exact;
    p.is_double ? write_losses<double>(p) : write_losses<float>(p);
  }

  void gradient(const Gradient& g) const {
    const int64_t cost = g.n_classes / 16 + 8 * g.n_sample * g.n_ranks;
    torch::stable::parallel_for(0, g.n_rows, grain(cost), [&](int64_t begin, int64_t end) {
      const ExactFloats exact;
      switch (g.type) {
        case ScoreType::kFloat32: return gradient_rows<float>(g, begin, end);
        case ScoreType::kFloat64: return gradient_rows<double>(g, begin, end);
        case ScoreType::kBFloat16: return gradient_rows<BFloat16>(g, begin, end);
        case ScoreType::kFloat16: return gradient_rows<Half>(g, begin, end);
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(topk_fast, CPU, m) {
  m.impl("candidates_cpp", TORCH_BOX(&Ops<Cpu>::candidates));
  m.impl("excess_cpp", TORCH_BOX(&Ops<Cpu>::excess));
  m.impl("gradient_cpp", TORCH_BOX(&Ops<Cpu>::gradient));
  m.impl("link_cpp", TORCH_BOX(&Ops<Cpu>::link));
  m.impl("linked_gradient_cpp", TORCH_BOX(&Ops<Cpu>::linked_gradient));
}

}  // namespace topk_fast
