// The k best of s + epsilon * Z for every row and sample, the losses made of them, and their gradient, in CUDA.
//
// Formula and sampler: topk_fast/reference.py; draws: noise.h. A team of 32 or 128 threads takes a row: `cut_of` finds
// the cut from groups of classes, `collect` streams the row in 16-byte loads and keeps the classes above the cut,
// `draw` gives them noise, `walk` lets all others come as arrivals, a warp a sample, and the kernel ends with the mean,
// the hinge and the class ids. Few long rows are collected by several blocks first, in a launch of their own.
// Fused: noise lives in registers; a draw costs a comparison of its word, and a normal only where that passes.
// Bytes: the row once (twice where it does not fit into shared memory: 1/stride of it for the cut), 32 for each
// arrival's score; the gradient's once. Bits: every rounding is noise.h's or written here, without contraction
// (--fmad=false); what `word_bound` drops could not have entered. Lists are kept in (value, class) order, which is
// total: no result depends on the order in which threads find things.
#include "cuda/gradient.h"
#include "cuda/search.h"

namespace topk_fast {
namespace {

template <class T, class S>
void launch_search(const Args& a, cudaStream_t stream) {
  const unsigned shared = (unsigned)(a.l.shared * a.l.teams);
  if (a.l.parts > 1) {
    const auto kernel = collect_kernel<T, S>;
    TOPK_FAST_LAUNCH(kernel, (unsigned)(a.p.n_rows * a.l.parts), kBlock, shared, stream, a);
  }
  const auto kernel = a.l.team == 32 ? search_kernel<T, S, 32> : search_kernel<T, S, kBlock>;
  TOPK_FAST_LAUNCH(kernel, (unsigned)a.l.blocks, kBlock, shared, stream, a);
}

template <class T, class S>
void launch_gradient(const CudaGradient& g, cudaStream_t stream) {
  const int64_t share = kGradientBytes / sizeof(T);
  const auto kernel = gradient_kernel<T, S>;
  TOPK_FAST_LAUNCH(kernel, (unsigned)((g.n_rows * g.n_classes + share - 1) / share), kBlock, 0, stream, g);
}

int last_error() {
#ifdef __CUDACC__
  return (int)cudaGetLastError();
#else
  return 0;
#endif
}

}  // namespace
}  // namespace topk_fast

using namespace topk_fast;

#ifdef __CUDACC__
extern "C" int topk_cuda_processors(int device) {
  int n = 0;
  return cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && n > 0 ? n : 1;
}
#endif

extern "C" int64_t topk_cuda_workspace(const CudaSearch* search) { return arguments(*search).l.workspace; }

extern "C" int topk_cuda_search(const CudaSearch* search, void* stream_) {
  const Args a = arguments(*search);
  const cudaStream_t stream = (cudaStream_t)stream_;
  switch (search->dtype) {
    case kFloat32: launch_search<float, float>(a, stream); break;
    case kFloat64: launch_search<double, double>(a, stream); break;
    case kBFloat16: launch_search<BFloat16, float>(a, stream); break;
    case kFloat16: launch_search<Half, float>(a, stream); break;
  }
  return last_error();
}

extern "C" int topk_cuda_gradient(const CudaGradient* gradient, void* stream_) {
  const cudaStream_t stream = (cudaStream_t)stream_;
  switch (gradient->dtype) {
    case kFloat32: launch_gradient<float, float>(*gradient, stream); break;
    case kFloat64: launch_gradient<double, double>(*gradient, stream); break;
    case kBFloat16: launch_gradient<BFloat16, float>(*gradient, stream); break;
    case kFloat16: launch_gradient<Half, float>(*gradient, stream); break;
  }
  return last_error();
}
