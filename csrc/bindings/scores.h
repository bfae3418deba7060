// The functions of scores, for module.cpp: score_matrix, softmax_stats, sigmoid_stats, their gradients, top_k and
// ranks. They take the fields of scores.Scores in their order (python/fusionsum/scores.py) and return NotImplemented
// for what is not wholly as it should be (parse.h).
#pragma once
#include <pybind11/pybind11.h>

namespace fusionsum {

void define_scores(pybind11::module_& m);

}  // namespace fusionsum
