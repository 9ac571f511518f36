// A stand-in for the CUDA runtime: two GPUs whose memory is the host's, for tests of host code where there is no GPU.
//
// The library is loaded before torch (LD_PRELOAD), and its functions take the place of libcudart's. A function that it
// lacks reaches the real runtime, which reports that there is no driver. Work on a stream is done at once, in the
// caller's thread. torch's kernels are noted and do nothing; the project's run in the model of tests/kernels/simt.h.
// The environment variable STANDIN_LOG names a file that gets a line for each call of interest, fields between tabs;
// with STANDIN_EXECUTE=0 launches are checked and noted only, for shapes whose data the host cannot hold.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <mutex>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace standin {

// What an H100 SXM has, as its data sheet and the CUDA programming guide (table of compute capabilities) say.
constexpr int kDevices = 2, kProcessors = 132, kCapability = 9, kThreadsPerProcessor = 2048, kBlocksPerProcessor = 32;
constexpr size_t kMemory = size_t(80) << 30, kL2 = size_t(50) << 20;
constexpr size_t kSharedPerBlock = 48 << 10, kSharedOptIn = 227 << 10, kSharedPerProcessor = 228 << 10;
constexpr size_t kSharedReserved = 1 << 10;  // of each block

using Work = std::function<void()>;

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::vector<Work> nodes;
  bool valid = true;
};

// Writes a result, as most functions of the runtime do.
template <class T>
cudaError_t answer(T* to, T value) {
  *to = value;
  return cudaSuccess;
}

std::mutex& mutex();
int current_device();
bool executes();
void log(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Remembers an error for cudaGetLastError, and returns it.
cudaError_t remember(cudaError_t error);
// An error of a kernel, which every later call that waits returns, as on a device.
void set_fault(cudaError_t error);
cudaError_t fault();

int number_of(cudaStream_t stream);
bool is_capturing(cudaStream_t stream);
// Success where the stream belongs to the current device.
cudaError_t check_stream(cudaStream_t stream);
// Does the work, or adds it to the graph that the stream captures.
void submit(cudaStream_t stream, const Work& work);
// An error where a capture forbids this call, which also ends the capture; `call` is named in the log.
cudaError_t check_not_capturing(const char* call);
// Notes that the caller waits for `what`, and returns what a device would.
cudaError_t wait_for(const char* what);

}  // namespace standin
