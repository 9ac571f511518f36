// The Python module _C: importing it registers the ops. It names the compiler and the instruction sets of this
// machine. Python's limited API: one binary serves every Python from 3.10 on.
#include <Python.h>

#include <string>

#include "kernel.h"

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
