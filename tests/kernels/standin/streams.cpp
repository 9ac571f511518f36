// Streams, events, captures and graphs, and the rules of a capture.
#include <set>

#include "standin.h"

namespace standin {

struct Stream {
  int number, device;
  Capture* capture = nullptr;
};
struct Event {
  Capture* capture = nullptr;
};

// Null and the two special handles are the device's default streams, which cannot capture.
static Stream* stream_of(cudaStream_t handle) { return (uintptr_t)handle <= 2 ? nullptr : (Stream*)handle; }
static Event* event_of(cudaEvent_t handle) { return (Event*)handle; }
static std::vector<Work>* nodes_of(void* graph) { return (std::vector<Work>*)graph; }

static std::set<Capture*> captures;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

int number_of(cudaStream_t stream) { return stream_of(stream) ? stream_of(stream)->number : 0; }
bool is_capturing(cudaStream_t stream) { return stream_of(stream) && stream_of(stream)->capture; }

cudaError_t check_stream(cudaStream_t stream) {
  const bool fits = !stream_of(stream) || stream_of(stream)->device == current_device();
  return fits ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

void submit(cudaStream_t stream, const Work& work) {
  if (is_capturing(stream))
    stream_of(stream)->capture->nodes.push_back(work);
  else
    work();
}

cudaError_t check_not_capturing(const char* call) {
  bool forbidden = false;
  for (Capture* one : captures)
    if (one->mode != cudaStreamCaptureModeRelaxed && thread_mode != cudaStreamCaptureModeRelaxed)
      one->valid = false, forbidden = true;
  if (!forbidden) return cudaSuccess;
  log("what=forbidden\tcall=%s", call);
  return remember(cudaErrorStreamCaptureUnsupported);
}

cudaError_t wait_for(const char* what) {
  log("what=synchronise\tof=%s\tdevice=%d", what, current_device());
  return remember(fault());
}

}  // namespace standin

using namespace standin;

EXPORTED cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int) {
  static int streams = 0;
  return answer(out, (cudaStream_t) new Stream{++streams, current_device()});
}
EXPORTED cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }
EXPORTED cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream_of(stream);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return answer(priority, 0); }
EXPORTED cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) {
  *least = 0;
  return answer(most, -5);
}
EXPORTED cudaError_t cudaStreamQuery(cudaStream_t) { return check_not_capturing("cudaStreamQuery"); }

EXPORTED cudaError_t cudaDeviceSynchronize() {
  const cudaError_t error = check_not_capturing("cudaDeviceSynchronize");
  return error ? error : wait_for("device");
}
EXPORTED cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (is_capturing(stream)) {
    stream_of(stream)->capture->valid = false;
    log("what=forbidden\tcall=cudaStreamSynchronize");
    return remember(cudaErrorStreamCaptureUnsupported);
  }
  const cudaError_t error = check_not_capturing("cudaStreamSynchronize");
  return error ? error : wait_for("stream");
}

EXPORTED cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  return answer(out, (cudaEvent_t) new Event);
}
EXPORTED cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
EXPORTED cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event_of(event);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  if (const cudaError_t error = check_stream(stream)) return remember(error);
  log("what=record\tstream=%d", number_of(stream));
  event_of(event)->capture = is_capturing(stream) ? stream_of(stream)->capture : nullptr;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
EXPORTED cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  log("what=wait\tstream=%d", number_of(stream));
  Capture* capture = event_of(event)->capture;
  if (capture && !stream_of(stream)) return remember(cudaErrorStreamCaptureImplicit);
  if (capture) stream_of(stream)->capture = capture;  // the stream joins
  return cudaSuccess;
}
EXPORTED cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event_of(event)->capture ? remember(cudaErrorCapturedEvent) : check_not_capturing("cudaEventQuery");
}
EXPORTED cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const cudaError_t error = cudaEventQuery(event);
  return error ? error : wait_for("event");
}
EXPORTED cudaError_t cudaEventElapsedTime(float*, cudaEvent_t, cudaEvent_t) {
  return remember(cudaErrorNotSupported);  // nothing here takes a device's time
}

EXPORTED cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  static unsigned long long count = 0;
  if (!stream_of(stream)) return remember(cudaErrorStreamCaptureUnsupported);
  log("what=begin capture\tstream=%d", number_of(stream));
  captures.insert(stream_of(stream)->capture = new Capture{++count, mode, {}});
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!is_capturing(stream)) return remember(cudaErrorIllegalState);
  Capture* capture = stream_of(stream)->capture;
  log("what=end capture\tstream=%d\tnodes=%zu", number_of(stream), capture->nodes.size());
  const bool valid = capture->valid;
  *graph = valid ? (cudaGraph_t) new std::vector<Work>(capture->nodes) : nullptr;
  stream_of(stream)->capture = nullptr;
  captures.erase(capture);
  return valid ? cudaSuccess : remember(cudaErrorStreamCaptureInvalidated);
}
EXPORTED cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
EXPORTED cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                              unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                              const cudaGraphEdgeData** edges, size_t* count) {
  Capture* capture = is_capturing(stream) ? stream_of(stream)->capture : nullptr;
  *status = !capture         ? cudaStreamCaptureStatusNone
            : capture->valid ? cudaStreamCaptureStatusActive
                             : cudaStreamCaptureStatusInvalidated;
  if (id && capture) *id = capture->id;
  if (graph) *graph = capture ? (cudaGraph_t)&capture->nodes : nullptr;
  // Of nodes only the number is kept here.
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

EXPORTED cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return answer(count, nodes_of(graph)->size());
}
EXPORTED cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  return answer(out, (cudaGraphExec_t) new std::vector<Work>(*nodes_of(graph)));
}
EXPORTED cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  if (const cudaError_t error = check_stream(stream)) return remember(error);
  log("what=replay\tstream=%d\tnodes=%zu", number_of(stream), nodes_of(graph)->size());
  for (const Work& work : *nodes_of(graph)) work();
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete nodes_of(graph);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete nodes_of(graph);
  return cudaSuccess;
}
