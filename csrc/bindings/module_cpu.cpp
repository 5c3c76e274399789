// The Python module mobilemamba_kernels._C: importing it registers the kernels; its functions name the instruction set.

#include <Python.h>

#include <cstdlib>
#include <cstring>

#include "include/capability.h"

namespace mobilemamba {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16", "amx"};

Capability best_supported() {
#ifdef MOBILEMAMBA_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && __builtin_cpu_supports("amx-bf16")) return Capability::kAmx;
  if (bf16) return Capability::kAvx512Bf16;
  return avx512 ? Capability::kAvx512 : avx2 ? Capability::kAvx2 : Capability::kDefault;
#else
  return Capability::kDefault;
#endif
}

// The vendor's products of bfloat16 run without matrix instructions too, more slowly.
Capability best_runnable() {
  const Capability best = best_supported();
  return best == Capability::kAvx512Bf16 ? Capability::kAmx : best;
}

// PyTorch's own variable lowers the choice and never raises it.
Capability initial() {
  const Capability best = best_supported();
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  for (int i = 0; wanted && i < static_cast<int>(best); ++i)
    if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<Capability>(i);
  return best;
}

Capability current = initial();

PyObject* cpu_capability(PyObject*, PyObject*) { return PyUnicode_FromString(kNames[static_cast<int>(current)]); }

PyObject* cpu_capabilities(PyObject*, PyObject*) {
  const int count = static_cast<int>(best_runnable()) + 1;
  PyObject* list = PyList_New(count);
  for (int i = 0; list && i < count; ++i) {
    PyObject* name = PyUnicode_FromString(kNames[i]);
    if (!name) return Py_DecRef(list), nullptr;
    PyList_SetItem(list, i, name);
  }
  return list;
}

PyObject* set_cpu_capability(PyObject*, PyObject* argument) {
  PyObject* bytes = PyUnicode_AsUTF8String(argument);
  if (!bytes) return nullptr;
  int chosen = -1;
  for (int i = 0; i <= static_cast<int>(best_runnable()); ++i)
    if (std::strcmp(PyBytes_AsString(bytes), kNames[i]) == 0) chosen = i;
  Py_DecRef(bytes);
  if (chosen < 0) {
    PyErr_Format(PyExc_ValueError, "set_cpu_capability: this processor cannot run %R; see cpu_capabilities()",
                 argument);
    return nullptr;
  }
  current = static_cast<Capability>(chosen);
  return Py_BuildValue("");
}

PyMethodDef methods[] = {{"cpu_capability", cpu_capability, METH_NOARGS,
                          "The instruction set in use: default, avx2, avx512, avx512_bf16 or amx."},
                         {"cpu_capabilities", cpu_capabilities, METH_NOARGS,
                          "The instruction sets that can be used here, in the order of their speed."},
                         {"set_cpu_capability", set_cpu_capability, METH_O, "Use another instruction set; for tests."},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

Capability capability() { return current; }

}  // namespace mobilemamba

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&mobilemamba::module); }
