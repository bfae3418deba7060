// The instruction set that cpu/dispatch.cpp finds in a native module without kernels of the CPU (emulation.py).
#include "cpu/dispatch.h"

namespace fusionsum {
namespace scalar {
extern const Isa isa{"none", nullptr, nullptr, nullptr};
}
}  // namespace fusionsum
