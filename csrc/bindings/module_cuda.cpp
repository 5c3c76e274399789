// The Python module mobilemamba_kernels._C_cuda: importing it registers the CUDA kernels.
#include <Python.h>

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module); }
