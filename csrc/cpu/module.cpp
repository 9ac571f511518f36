// The Python module _C: importing it registers the ops. It names the compiler and the instruction sets of this
// machine. Python's limited API: one binary serves every Python from 3.10 on.
#include <Python.h>

#include <string>

#include "kernel.h"

#if defined(__GLIBC__)
// std::shared_ptr asks glibc whether the process has one thread, by a symbol that glibc has from 2.32 on. This one
// stands for it, and always says no, so that a wheel runs wherever torch's own wheels do, from glibc 2.28 on.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif

namespace {

using topk_fast::Kernel;

PyObject* isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Kernel& kernel : topk_fast::kernels()) {
    PyObject* name = names ? PyUnicode_FromString(kernel.name) : nullptr;
    if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* use_isa(PyObject*, PyObject* argument) {
  const char* name = PyUnicode_AsUTF8AndSize(argument, nullptr);
  if (!name) return nullptr;
  if (topk_fast::choose_kernel(name)) Py_RETURN_NONE;
  std::string names;
  for (const Kernel& kernel : topk_fast::kernels())
    names += names.empty() ? kernel.name : std::string(", ") + kernel.name;
  return PyErr_Format(PyExc_ValueError, "the instruction set must be one of %s, got %s", names.c_str(), name);
}

PyObject* compiler(PyObject*, PyObject*) {
#if defined(__clang__)
  return PyUnicode_FromFormat("clang++ %d.%d.%d", __clang_major__, __clang_minor__, __clang_patchlevel__);
#else
  return PyUnicode_FromString("g++ " __VERSION__);
#endif
}

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

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
#if defined(Py_GIL_DISABLED)  // a free-threaded Python
  if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  return module;
}
