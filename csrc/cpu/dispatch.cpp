// The only chooser: the list of instruction sets (lists.h), best first, asked once. CMakeLists.txt compiles those that
// its compiler knows.
#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace fusionsum {

// A set that this build lacks, because its compiler does or because it is another machine's, is a null address.
#define DECLARE(name)                         \
  namespace name {                            \
  extern const Isa isa __attribute__((weak)); \
  }
FUSIONSUM_ISAS(DECLARE)
#undef DECLARE

namespace {

// Whether AVX-512 was compiled to AVX2's instructions, to be tested on any processor (tests/simde).
#ifdef FUSIONSUM_SIMDE
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

// Which sets this machine runs, a member for each in the list.
struct Cpu {
  bool scalar = true, avx2 = false, avx512 = false;
#if defined(__x86_64__) || defined(__i386__)
  // CPUID says what the processor has; XGETBV what the system saves on a task switch. Both are needed.
  Cpu() {
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return;
    const bool fma = c & bit_FMA, avx = c & bit_AVX, f16c = c & bit_F16C;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    constexpr unsigned kYmm = 0x6, kZmm = 0xe6, kAvx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    avx2 = fma && avx && f16c && (saved & kYmm) == kYmm && (b & bit_AVX2);
    avx512 = avx2 && (kEmulated || ((saved & kZmm) == kZmm && (b & kAvx512) == kAvx512));
  }
#endif
};

struct Candidate {
  const Isa* isa;  // null: not compiled in
  bool runs_here;
};

std::vector<Candidate> compiled_in() {
  const Cpu cpu;
  std::vector<Candidate> all{
#define CANDIDATE(name) {&name::isa, cpu.name},
      FUSIONSUM_ISAS(CANDIDATE)
#undef CANDIDATE
  };
  all.erase(std::remove_if(all.begin(), all.end(), [](const Candidate& c) { return !c.isa; }), all.end());
  return all;
}

const Isa& choose() {
  const char* name = std::getenv("FUSIONSUM_ISA");
  std::string known;
  for (const Candidate& candidate : compiled_in()) {
    if (name && *name && candidate.isa->name != std::string(name)) {
      known += std::string(known.empty() ? "" : ", ") + candidate.isa->name;
    } else if (candidate.runs_here) {
      return *candidate.isa;
    } else if (name && *name) {
      throw std::invalid_argument(std::string("FUSIONSUM_ISA=") + name + ": this processor does not support it");
    }
  }
  throw std::invalid_argument(std::string("FUSIONSUM_ISA=") + name + ": expected one of those compiled in: " + known);
}

}  // namespace

std::vector<std::pair<std::string, bool>> isas() {
  std::vector<std::pair<std::string, bool>> all;
  for (const Candidate& candidate : compiled_in()) all.emplace_back(candidate.isa->name, candidate.runs_here);
  return all;
}

const Isa& active_isa() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace fusionsum
