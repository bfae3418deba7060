// The choice of instruction set. Where each is: cpu/.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "isa.h"

namespace fusionsum {

// The instruction sets compiled in, best first, each with whether this machine runs it.
std::vector<std::pair<std::string, bool>> isas();

// The set in use: the best that runs here and is fast here, or the one that FUSIONSUM_ISA names. Resolved once. Throws
// std::invalid_argument where FUSIONSUM_ISA names one that is unknown, not compiled in or not supported here.
const Isa& active_isa();

// Its kernels for these scores.
const ScoreKernels& kernels_for(const Scores& scores, const Isa& isa);

}  // namespace fusionsum
