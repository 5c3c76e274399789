// Stands in for mobilemamba_kernels._C: importing it registers the CUDA kernels, run by the emulation, for CPU tensors.
#include <Python.h>

#include "include/capability.h"

static PyObject* name(PyObject*, PyObject*) { return PyUnicode_FromString("emulated CUDA"); }
static PyObject* names(PyObject*, PyObject*) { return Py_BuildValue("[s]", "emulated CUDA"); }
static PyObject* set(PyObject*, PyObject*) { return Py_BuildValue(""); }

static PyMethodDef methods[] = {{"cpu_capability", name, METH_NOARGS, nullptr},
                                {"cpu_capabilities", names, METH_NOARGS, nullptr},
                                {"set_cpu_capability", set, METH_O, nullptr},
                                {nullptr, nullptr, 0, nullptr}};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
