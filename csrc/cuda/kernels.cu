// The k best of s + epsilon * Z for every row and sample, excesses and losses made of them, and the gradient, in CUDA.
//
// Formula and sampler: topk_fast/reference.py; draws: noise.h. A team, a warp or a block, takes a row through its
// stages (search.h): `cut_of` finds the cut from groups of classes, `collect` streams the row and lists the contenders,
// `draw` gives them noise, `walk` lets all others come as arrivals, a warp a sample, and each rank's mean is taken.
// Teams on a multiprocessor are in different stages, so that some stream while others search. With few long rows,
// several blocks collect each row first, in launches of their own. Fused: noise lives in registers; a draw costs a
// comparison of its word, and a normal only where that passes. Bytes: the row once, 1/stride of it twice for the cut,
// 32 for each arrival's score; the gradient's once. Bits: every rounding is noise.h's or written here, without
// contraction (--fmad=false); what `word_bound` drops could not have entered. Lists are kept in (value, class) order,
// which is total: no result depends on the order of the threads.
#include "gradient.h"
#include "link.h"
#include "search.h"

namespace topk_fast {
namespace {

// The cuts of rows that several blocks collect, a block a row.
template <class T>
__global__ void __launch_bounds__(kBlock, kResident<T> / kBlock) cut_kernel(const Args a) {
  TOPK_FAST_SHARED(shared);
  using S = ArithmeticOf<T>;
  const int64_t n = blockIdx.x;
  if (is_ignored(a.search, n)) return;
  const S cut = cut_of<Block<kBlock>>(a, scores_of<T>(a.search, n), make_state<Block<kBlock>, T>(a, shared, n));
  if (threadIdx.x == 0) *Parts<S>(a, n).cut = cut;
}

// The contenders of one part of a row, [rows * parts] blocks.
template <class T>
__global__ void __launch_bounds__(kBlock, kResident<T> / kBlock) collect_kernel(const Args a) {
  TOPK_FAST_SHARED(shared);
  using S = ArithmeticOf<T>;
  const int64_t n = blockIdx.x / a.layout.parts;
  const int part = (int)(blockIdx.x % a.layout.parts);
  if (is_ignored(a.search, n)) return;
  const Parts<S> parts(a, n);
  State<T>& state = make_state<Block<kBlock>, T>(a, shared, n);
  if (threadIdx.x == 0) {
    state.row.scores = scores_of<T>(a.search, n), state.row.cut = *parts.cut;
    start_pass(state, part, a.layout.parts);
    state.listed.at = parts.list + (int64_t)part * a.layout.part_capacity;
    state.listed.capacity = a.layout.part_capacity;
  }
  __syncthreads();
  collect<Block<kBlock>>(state);
  if (threadIdx.x == 0) parts.counts[part] = state.listed.is_last() ? state.listed.found : -1;
}

template <class T, class L, class Threads>
__global__ void __launch_bounds__(kBlockOf<Threads>, kResident<T> / kBlockOf<Threads>) search_kernel(const Args a) {
  TOPK_FAST_SHARED(shared);
  using S = ArithmeticOf<T>;
  const Search& p = a.search;
  const int team = (int)threadIdx.x / Threads::kSize, teams = kBlockOf<Threads> / Threads::kSize;
  State<T>& state = make_state<Threads, T>(a, shared + team * a.layout.shared, (int64_t)blockIdx.x * teams + team);
  while (state.n < p.n_rows) {
    if (is_ignored(p, state.n))
      write_ignored<Threads, S>(p, state.n);
    else if (p.target && (p.target[state.n] < 0 || p.target[state.n] >= p.n_classes))
      TOPK_FAST_STOP("target out of bounds");
    else
      search_row<L, Threads>(a, state);
    Threads::sync();
    if (Threads::rank() == 0) state.n += (int64_t)gridDim.x * teams;
    Threads::sync();
  }
}

template <class S>
__global__ void __launch_bounds__(kLinkBlock) link_kernel(const Link p) {
  TOPK_FAST_SHARED(shared);
  write_losses<S>(p, (int64_t*)shared);
}

template <class T>
__global__ void __launch_bounds__(kBlock) gradient_kernel(const Gradient g) {
  write_gradient<T>(g);
}

template <class T, class L>
void launch_search(const Args& a, cudaStream_t stream) {
  const unsigned shared = (unsigned)(a.layout.shared * a.layout.teams);
  if (a.layout.parts > 1) {
    const auto cut = cut_kernel<T>;
    TOPK_FAST_LAUNCH(cut, (unsigned)a.search.n_rows, kBlock, shared, stream, a);
    const auto collect = collect_kernel<T>;
    TOPK_FAST_LAUNCH(collect, (unsigned)(a.search.n_rows * a.layout.parts), kBlock, shared, stream, a);
  }
  const int team = a.layout.team;
  const auto kernel = team == 32       ? search_kernel<T, L, Warp>
                      : team == kBlock ? search_kernel<T, L, Block<kBlock>>
                                       : search_kernel<T, L, Block<kLargest<T>>>;
  TOPK_FAST_LAUNCH(kernel, (unsigned)a.layout.blocks, (unsigned)(team * a.layout.teams), shared, stream, a);
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
extern "C" Gpu topk_cuda_gpu(int device) {
  const auto get = [device](cudaDeviceAttr attribute, int otherwise) {
    int n = 0;
    if (cudaDeviceGetAttribute(&n, attribute, device) == cudaSuccess) return n > 0 ? n : otherwise;
    cudaGetLastError();  // or the next launch would be blamed for it
    return otherwise;
  };
  const int processors = get(cudaDevAttrMultiProcessorCount, 1);
  // GDDR has 3 to 7 bits of a bus for each multiprocessor, HBM about 40.
  const bool is_slow = get(cudaDevAttrGlobalMemoryBusWidth, 40 * processors) < 10 * processors;
  return {processors, get(cudaDevAttrMaxSharedMemoryPerMultiprocessor, kBlockBudget), get(cudaDevAttrL2CacheSize, 0),
          is_slow};
}

extern "C" const char* topk_cuda_message(int error) { return cudaGetErrorString((cudaError_t)error); }
#endif

extern "C" int64_t topk_cuda_workspace(const Search* search, const Gpu* gpu) {
  return arguments(*search, *gpu).layout.workspace;
}

extern "C" int topk_cuda_search(const Search* search, const Gpu* gpu, void* workspace, void* stream_) {
  if (!search->n_rows) return 0;
  Args a = arguments(*search, *gpu);
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

extern "C" int topk_cuda_link(const Link* link, void* stream) {
  const int64_t blocks = link->reduction == Reduction::kNone ? (link->n_rows + kLinkBlock - 1) / kLinkBlock : 1;
  const auto kernel = link->is_double ? link_kernel<double> : link_kernel<float>;
  const unsigned grid = (unsigned)(blocks ? blocks : 1), shared = kLinkBlock / 32 * sizeof(int64_t);
  TOPK_FAST_LAUNCH(kernel, grid, kLinkBlock, shared, (cudaStream_t)stream, *link);
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
