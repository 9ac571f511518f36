// Stands in for the launches of csrc/cuda: each is handed to a function of the caller, which may run it.
#pragma once

#include <stddef.h>

#include <type_traits>

namespace launches {
using Hook = void (*)(const void* kernel, unsigned grid, unsigned size, size_t shared, const void* argument,
                      size_t bytes);
inline Hook& hook() {
  static Hook given = nullptr;
  return given;
}
template <class K, class A>
void launch(K* kernel, unsigned grid, unsigned size, size_t shared, const A& argument) {
  static_assert(std::is_trivially_copyable_v<A>, "the argument of a kernel is copied to the device");
  hook()((const void*)kernel, grid, size, shared, &argument, sizeof argument);
}
}  // namespace launches

#define TOPK_FAST_LAUNCH(kernel, grid, size, shared, stream, ...) \
  ((void)(stream), launches::launch(kernel, grid, size, shared, __VA_ARGS__))

extern "C" inline __attribute__((used)) void launches_hook(launches::Hook given) { launches::hook() = given; }
