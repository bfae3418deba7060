// One instruction set: its name, and the kernels of each operation. isa_<name>.cpp makes one. Which scores are
// multiplied by pairs of bf16, where a set has them, is for scores/plan.cpp to say.
#pragma once
#include "scores/plan.h"
#include "sum/plan.h"

namespace fusionsum {

struct Isa {
  const char* name;
  const SumKernels* sum;
  const ScoreKernels* scores;
  const ScoreKernels* pairs;  // null: none
};

}  // namespace fusionsum
