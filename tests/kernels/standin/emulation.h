// The project's kernels on the CPU: the sources of csrc/cuda in the model of tests/kernels/simt.h.
#pragma once

#include <stddef.h>

#include <functional>
#include <string>

namespace standin {

struct Emulation {
  // Runs a launch on a copy of the kernel's argument that was made when this was. Returns the error, or "".
  std::function<std::string()> run;
};

// "search_kernel<float, NormalLaw, Block<128>>" of a demangled name, whatever compiler it comes from.
std::string readable(const std::string& name);
// An emulation of a launch of the kernel with this readable name, empty where there is none.
Emulation emulation_of(const std::string& kernel, unsigned grid, unsigned block, size_t shared, const void* argument);

}  // namespace standin
