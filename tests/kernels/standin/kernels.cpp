// Every kernel of csrc/cuda by its name. A new kernel, or a new template argument, gets its line in `kernels`.
#include "../simt.h"
// the kernels, as C++
#include <map>
#include <mutex>
#include <regex>

#include "../../../csrc/cuda/kernels.cu"
#include "emulation.h"

namespace standin {

using namespace topk_fast;

std::string readable(const std::string& name) {
  const std::string bare =
      std::regex_replace(name, std::regex("(\\w+|\\{anonymous\\}|\\(anonymous namespace\\))::"), "");
  std::smatch found;
  if (!std::regex_search(bare, found, std::regex("\\w+_kernel(<[\\w, <>]*>)?"))) return bare;
  return std::regex_replace(found.str(), std::regex(" >"), ">");
}

namespace {

struct Launch {
  unsigned grid, block;
  size_t shared;
  const void* argument;
};
using Start = Emulation (*)(const Launch&);
using Table = std::map<std::string, Start>;

std::string run(const Launch& launch, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  simt::launch(launch.grid, launch.block, launch.shared, body);
  std::string error;
  error.swap(simt::error());
  return error;
}

template <class Argument, void (*Kernel)(Argument)>
Emulation start(const Launch& launch) {
  const Argument argument = *(const Argument*)launch.argument;
  return {[=] { return run(launch, [=] { Kernel(argument); }); }};
}

template <auto Kernel>
struct Named;
template <class Argument, void (*Kernel)(Argument)>
struct Named<Kernel> {
  static void add(Table& table) { table[readable(__PRETTY_FUNCTION__)] = start<Argument, Kernel>; }
};

template <class T, class L>
void add_searches(Table& table) {
  Named<search_kernel<T, L, Warp>>::add(table);
  Named<search_kernel<T, L, Block<kBlock>>>::add(table);
  if (kLargest<T> != kBlock) Named<search_kernel<T, L, Block<kLargest<T>>>>::add(table);
}

template <class T>
void add_kernels(Table& table) {
  Named<cut_kernel<T>>::add(table);
  Named<collect_kernel<T>>::add(table);
  Named<gradient_kernel<T>>::add(table);
  add_searches<T, NormalLaw>(table);
  add_searches<T, GumbelLaw>(table);
}

const Table& kernels() {
  static const Table all = [] {
    Table table;
    Named<link_kernel<float>>::add(table), Named<link_kernel<double>>::add(table);
    add_kernels<float>(table), add_kernels<double>(table), add_kernels<BFloat16>(table), add_kernels<Half>(table);
    return table;
  }();
  return all;
}

}  // namespace

Emulation emulation_of(const std::string& kernel, unsigned grid, unsigned block, size_t shared, const void* argument) {
  const auto found = kernels().find(kernel);
  return found == kernels().end() ? Emulation{} : found->second({grid, block, shared, argument});
}

}  // namespace standin
