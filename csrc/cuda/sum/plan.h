// From a problem to passes, and to the geometry of their launches. Host code without CUDA: its arithmetic depends on
// the problem alone, not on the device, and so do the bits of every sum.
#pragma once
#include "pass.h"

namespace fusionsum {
namespace cuda {

constexpr int kMaxPasses = kMaxOperands;  // each serves one derivative at least

// What is launched: `kernel`, then a `combine` for each sum in which blocks have parts.
struct Launch {
  Pass pass;
  PassKernel* kernel;
  bool by_columns;  // the kernel is `columns`, not `rows`
  int64_t blocks;
  int combines;
  Combine combine[kPassOperands];
};

struct Plan {
  int launches;
  Launch launch[kMaxPasses];
  int64_t workspace_bytes;  // the launches use it one after the other
};

// Null, or what about the problem no kernel takes. Partial sums are offsets into the workspace, until `place_sums`.
const char* make_plan(const Problem& problem, Plan& plan);
void place_sums(Launch& launch, void* workspace);

}  // namespace cuda
}  // namespace fusionsum
