// One instruction set: its name, and the kernels of each operation. isa_<name>.cpp makes one.
#pragma once
#include "scores/plan.h"
#include "sum/plan.h"

namespace fusionsum {

struct Isa {
  const char* name;
  SumKernels sum;
  ScoreKernels scores;
};

}  // namespace fusionsum
