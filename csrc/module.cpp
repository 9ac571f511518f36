// The Python module _C: importing it registers the ops; it exposes the contract's functions (noise.h) and bounds to the
// tests, the build's facts, and the choice of instruction set.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "bounds.h"
#include "topk_cpu.h"

namespace topk_fast {

namespace {

struct Isa {
  const char* name;
  SearchFn search;
};

const std::vector<Isa>& available() {
  static const std::vector<Isa> list = [] {
    std::vector<Isa> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back({"avx512", avx512::search});
    if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", avx2::search});
#endif
    found.push_back({"baseline", baseline::search});
    return found;
  }();
  return list;
}

const Isa* chosen = nullptr;

}  // namespace

SearchFn search_function() { return chosen ? chosen->search : available().front().search; }

}  // namespace topk_fast

namespace py = pybind11;
using namespace topk_fast;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class In, class Out, class F>
py::array_t<Out> map(const Array<In>& x, F f) {
  py::array_t<Out> out(x.size());
  for (py::ssize_t i = 0; i < x.size(); ++i) out.mutable_data()[i] = f(x.data()[i]);
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("philox", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    const Words w = philox(c0, c1, c2, c3, k0, k1);
    return py::make_tuple(w.w0, w.w1, w.w2, w.w3);
  });
  m.def("normal", [](const Array<uint32_t>& w) {
    return map<uint32_t, float>(w, [](uint32_t x) { return normal<Scalar>((int32_t)x); });
  });
  m.def("gap", [](const Array<uint32_t>& w) {
    return map<uint32_t, int32_t>(w, [](uint32_t x) { return gap<Scalar>((int32_t)x); });
  });
  m.def("ln", [](const Array<float>& x) { return map<float, float>(x, [](float v) { return ln<Scalar>(v); }); });
  m.def("upper_quantile",
        [](const Array<float>& p) { return map<float, float>(p, [](float v) { return upper_quantile<Scalar>(v); }); });
  m.def("hazard_quantile",
        [](const Array<float>& e) { return map<float, float>(e, [](float v) { return hazard_quantile<Scalar>(v); }); });
  m.def("word_bound", [](const Array<float>& score, float reach, double epsilon) {
    return map<float, int32_t>(score, [=](float s) { return word_bound<Scalar>(s, reach, bound_epsilon(epsilon)); });
  });
  m.def("time_bound", [](const Array<float>& cut, float reach, double epsilon) {
    return map<float, float>(cut, [=](float c) { return time_bound<Scalar>(c, reach, bound_epsilon(epsilon)); });
  });
  m.def("plan", [](int64_t n_classes, int64_t k) -> py::object {
    const Plan p = plan(n_classes, k);
    if (p.all) return py::none();
    return py::make_tuple(p.group, p.stride, p.rank);
  });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa& isa : available()) names.push_back(isa.name);
    return names;
  });
  m.def("use_isa", [](const std::string& name) {
    for (const Isa& isa : available())
      if (isa.name == name) {
        chosen = &isa;
        return;
      }
    throw py::value_error("no such instruction set here: " + name);
  });
  m.def("compiler", [] { return std::string("g++ " __VERSION__); });
}
