// The functions fusion_sum and fusion_sum_grad of the module, for module.cpp; each returns NotImplemented for a call
// that is not wholly as it should be (parse.h).
#pragma once
#include <pybind11/pybind11.h>

namespace fusionsum {

namespace py = pybind11;

py::object fusion_sum(py::handle weights, py::handle factors, py::handle activations, py::handle present,
                      py::handle absent, py::handle dim, py::handle trusted);

py::object fusion_sum_grad(py::handle grad_output, py::handle weights, py::handle factors, py::handle activations,
                           py::handle present, py::handle absent, py::handle dim, py::handle needs, py::handle trusted);

}  // namespace fusionsum
