// The only chooser: a table of instruction sets, best first, asked once. CMake defines FUSIONSUM_HAVE_<ISA> for each set that
// its compiler can build.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace fusionsum {

namespace scalar {
extern const Isa isa;
}
#if defined(FUSIONSUM_HAVE_AVX2)
namespace avx2 {
extern const Isa isa;
}
#endif

namespace {

bool always() { return true; }

#if defined(FUSIONSUM_HAVE_AVX2)
// CPUID says what the processor has; XGETBV what the system saves on a task switch. Both are needed.
bool runs_avx2() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  const bool fma = c & bit_FMA, osxsave = c & bit_OSXSAVE, avx = c & bit_AVX, f16c = c & bit_F16C;
  if (!(fma && osxsave && avx && f16c)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kXmmYmm = 6;
  return (low & kXmmYmm) == kXmmYmm && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}
#endif

struct Row {
  const Isa* isa;
  bool (*runs_here)();
};

constexpr Row kTable[] = {
#if defined(FUSIONSUM_HAVE_AVX2)
    {&avx2::isa, runs_avx2},
#endif
    {&scalar::isa, always},
};

const Isa& choose() {
  const char* name = std::getenv("FUSIONSUM_ISA");
  std::string known;
  for (const Row& row : kTable) {
    if (name && *name && row.isa->name != std::string(name)) {
      known += std::string(known.empty() ? "" : ", ") + row.isa->name;
    } else if (row.runs_here()) {
      return *row.isa;
    } else if (name && *name) {
      throw std::invalid_argument(std::string("FUSIONSUM_ISA=") + name + ": this processor does not support it");
    }
  }
  throw std::invalid_argument(std::string("FUSIONSUM_ISA=") + name + ": expected one of those compiled in: " + known);
}

}  // namespace

std::vector<std::pair<std::string, bool>> isas() {
  std::vector<std::pair<std::string, bool>> all;
  for (const Row& row : kTable) all.emplace_back(row.isa->name, row.runs_here());
  return all;
}

const Isa& active_isa() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace fusionsum
