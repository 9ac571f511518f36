// The k best of s + epsilon * Z for every row and sample, the excesses made of them, and the gradient, in CUDA.
//
// Formula and sampler: topk_fast/reference.py; draws: noise.h. A team of 32 or 128 threads takes a row through its
// stages (search.h): `cut_of` finds the cut from groups of classes, `collect` streams the row and keeps the contenders,
// `draw` gives them noise, `walk` lets all others come as arrivals, a warp a sample, and each rank's mean is taken.
// With few long rows, several blocks collect each row first, in a launch of their own.
// Fused: noise lives in registers; a draw costs a comparison of its word, and a normal only where that passes.
// Bytes: the row once (twice where it does not fit into shared memory: 1/stride of it for the cut), 32 for each
// arrival's score; the gradient's once. Bits: every rounding is noise.h's or written here, without contraction
// (--fmad=false); what `word_bound` drops could not have entered. Lists are kept in (value, class) order, which is
// total: no result depends on the order in which threads find things.
#include "gradient.h"
#include "search.h"

namespace topk_fast {
namespace {

// The lists of one part of a row, [rows * parts] blocks.
template <class T>
__global__ void __launch_bounds__(kBlock) collect_kernel(const Args a) {
  TOPK_FAST_SHARED(shared);
  using S = ArithmeticOf<T>;
  const int64_t n = blockIdx.x / a.layout.parts, part = blockIdx.x % a.layout.parts;
  if (is_ignored(a.search, n)) return;
  const Memory<S> memory(a, shared, n);
  const Scores<T> scores{(const T*)a.search.scores + n * a.search.row_stride, a.search.class_stride,
                         a.search.n_classes};
  const S cut = cut_of<kBlock>(a, scores, memory);
  const int64_t share = (scores.n + a.layout.parts - 1) / a.layout.parts, begin = part * share;
  const int64_t end = begin + share < scores.n ? begin + share : scores.n;
  const int segment = (int)part * (kBlock / 32) + Team<kBlock>::warp();
  Contender<S>* list = memory.lists + (int64_t)segment * a.layout.capacity;
  const int count = begin < end ? collect<kBlock>(scores, begin, end, cut, list, a.layout.capacity) : 0;
  char* header = header_of(a, n);
  if (Team<kBlock>::lane() == 0) ((int32_t*)(header + 16))[segment] = count;
  if (part == 0 && threadIdx.x == 0) *(S*)header = cut;
}

template <class T, class L, int TEAM>
__global__ void __launch_bounds__(kBlock, kResident) search_kernel(const Args a) {
  TOPK_FAST_SHARED(shared);
  using S = ArithmeticOf<T>;
  const Search& p = a.search;
  const int team = (int)(threadIdx.x / TEAM), teams = kBlock / TEAM;
  const int64_t slot = (int64_t)blockIdx.x * teams + team;
  const Memory<S> memory(a, shared + team * a.layout.shared, slot);
  for (int64_t n = slot; n < p.n_rows; n += (int64_t)gridDim.x * teams) {
    if (is_ignored(p, n)) {
      write_ignored<TEAM, S>(p, n);
    } else if (p.target && (p.target[n] < 0 || p.target[n] >= p.n_classes)) {
      TOPK_FAST_STOP("target out of bounds");
    } else {
      search_row<T, L, TEAM>(a, memory, n);
    }
    Team<TEAM>::sync();
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) gradient_kernel(const Gradient g) {
  write_gradient<T>(g);
}

template <class T, class L>
void launch_search(const Args& a, cudaStream_t stream) {
  const unsigned shared = (unsigned)(a.layout.shared * a.layout.teams);
  if (a.layout.parts > 1) {
    const auto kernel = collect_kernel<T>;
    TOPK_FAST_LAUNCH(kernel, (unsigned)(a.search.n_rows * a.layout.parts), kBlock, shared, stream, a);
  }
  const auto kernel = a.layout.team == 32 ? search_kernel<T, L, 32> : search_kernel<T, L, kBlock>;
  TOPK_FAST_LAUNCH(kernel, (unsigned)a.layout.blocks, kBlock, shared, stream, a);
}

template <class T>
void launch_search(const Args& a, cudaStream_t stream) {
  a.search.law == Law::kNormal ? launch_search<T, NormalLaw>(a, stream) : launch_search<T, GumbelLaw>(a, stream);
}

template <class T>
void launch_gradient(const Gradient& g, cudaStream_t stream) {
  const int64_t share = kGradientBytes / sizeof(T);
  const auto kernel = gradient_kernel<T>;
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

extern "C" const char* topk_cuda_message(int error) { return cudaGetErrorString((cudaError_t)error); }
#endif

extern "C" int64_t topk_cuda_workspace(const Search* search, int n_processors) {
  return arguments(*search, n_processors).layout.workspace;
}

extern "C" int topk_cuda_search(const Search* search, int n_processors, void* workspace, void* stream_) {
  if (!search->n_rows) return 0;
  Args a = arguments(*search, n_processors);
  a.workspace = (char*)workspace;
  const cudaStream_t stream = (cudaStream_t)stream_;
  switch (search->type) {
    case ScoreType::kFloat32: launch_search<float>(a, stream); break;
    case ScoreType::kFloat64: launch_search<double>(a, stream); break;
    case ScoreType::kBFloat16: launch_search<BFloat16>(a, stream); break;
    case ScoreType::kFloat16: launch_search<Half>(a, stream); break;
  }
  return last_error();
}

extern "C" int topk_cuda_gradient(const Gradient* gradient, void* stream_) {
  if (!gradient->n_rows || !gradient->n_classes) return 0;
  const cudaStream_t stream = (cudaStream_t)stream_;
  switch (gradient->type) {
    case ScoreType::kFloat32: launch_gradient<float>(*gradient, stream); break;
    case ScoreType::kFloat64: launch_gradient<double>(*gradient, stream); break;
    case ScoreType::kBFloat16: launch_gradient<BFloat16>(*gradient, stream); break;
    case ScoreType::kFloat16: launch_gradient<Half>(*gradient, stream); break;
  }
  return last_error();
}
