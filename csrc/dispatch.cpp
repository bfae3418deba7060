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
#if defined(FUSIONSUM_HAVE_AVX512)
namespace avx512 {
extern const Isa isa;
}
#endif
#if defined(FUSIONSUM_HAVE_AVX2)
namespace avx2 {
extern const Isa isa;
}
#endif

namespace {

bool always() { return true; }

#if defined(__x86_64__) || defined(__i386__)
// CPUID says what the processor has; XGETBV what the system saves on a task switch. Both are needed.
struct Cpu {
  bool avx2 = false, avx512 = false;
  Cpu() {
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return;
    const bool fma = c & bit_FMA, avx = c & bit_AVX, f16c = c & bit_F16C;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    constexpr unsigned kYmm = 0x6, kZmm = 0xe6, kAvx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    avx2 = fma && avx && f16c && (saved & kYmm) == kYmm && (b & bit_AVX2);
    avx512 = avx2 && (saved & kZmm) == kZmm && (b & kAvx512) == kAvx512;
  }
};
#endif
#if defined(FUSIONSUM_HAVE_AVX512)
bool runs_avx512() { return Cpu().avx512; }
#endif
#if defined(FUSIONSUM_HAVE_AVX2)
bool runs_avx2() { return Cpu().avx2; }
#endif

struct Row {
  const Isa* isa;
  bool (*runs_here)();
};

constexpr Row kTable[] = {
#if defined(FUSIONSUM_HAVE_AVX512)
    {&avx512::isa, runs_avx512},
#endif
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
