// The Python module _C: importing it registers the ops; it names the compiler and the instruction sets of this machine,
// and chooses among the latter. Python's limited API: one binary serves every Python from 3.10 on.
#include <Python.h>

#include <cstring>
#include <string>
#include <vector>

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

namespace {

using topk_fast::Isa;

PyObject* isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Isa& isa : topk_fast::available()) {
    PyObject* name = names ? PyUnicode_FromString(isa.name) : nullptr;
    if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* use_isa(PyObject*, PyObject* argument) {
  const char* name = PyUnicode_AsUTF8AndSize(argument, nullptr);
  if (!name) return nullptr;
  std::string names;
  for (const Isa& isa : topk_fast::available()) {
    if (!std::strcmp(isa.name, name)) {
      topk_fast::chosen = &isa;
      Py_RETURN_NONE;
    }
    names += names.empty() ? isa.name : std::string(", ") + isa.name;
  }
  return PyErr_Format(PyExc_ValueError, "the instruction set must be one of %s, got %s", names.c_str(), name);
}

PyObject* compiler(PyObject*, PyObject*) { return PyUnicode_FromString("g++ " __VERSION__); }

PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, "Instruction sets that the CPU kernels can use on this machine, the best one first."},
    {"use_isa", use_isa, METH_O, "Choose the instruction set of the CPU kernels, by its name."},
    {"compiler", compiler, METH_NOARGS, "The compiler that built this module, with its version."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "The CPU kernels; importing it registers them.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
