// The function `step` for module.cpp: a step of a chunk of scores (cuda/scores/chunk.h), for
// python/fusionsum/chunks.py.
#pragma once
#include <pybind11/pybind11.h>

namespace fusionsum {

void define_steps(pybind11::module_& m);

}  // namespace fusionsum
