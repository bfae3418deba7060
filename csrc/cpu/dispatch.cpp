// The only chooser: the list of instruction sets (lists.h), best first, asked once. CMakeLists.txt compiles those that
// its compiler knows.
#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
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
[[maybe_unused]] constexpr bool kEmulated = true;
#else
[[maybe_unused]] constexpr bool kEmulated = false;
#endif

// Which sets this machine runs, a member for each in the list.
struct Cpu {
  bool scalar = true, avx2 = false, avx512 = false, avx512_bf16 = false, neon = false, neon_bf16 = false;
  // AMD multiplies pairs of bf16 at twice the rate of float32 (Zen 4), Intel's Xeons at half of it: measured, 112 and
  // 226 GFLOP/s on a core of Sapphire Rapids.
  bool pairs_are_fast = false;
#if defined(__x86_64__) || defined(__i386__)
  // CPUID says what the processor has; XGETBV what the system saves on a task switch. Both are needed.
  Cpu() {
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return;
    const bool fma = c & bit_FMA, avx = c & bit_AVX, f16c = c & bit_F16C;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const unsigned subleaves = a;
    constexpr unsigned kYmm = 0x6, kZmm = 0xe6, kAvx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    avx2 = fma && avx && f16c && (saved & kYmm) == kYmm && (b & bit_AVX2);
    avx512 = avx2 && (kEmulated || ((saved & kZmm) == kZmm && (b & kAvx512) == kAvx512));
    constexpr unsigned kBf16 = 1u << 5;
    avx512_bf16 = avx512 && subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBf16);
    pairs_are_fast = __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx && c == signature_AMD_ecx;
  }
#elif defined(__aarch64__)
  Cpu() {
    neon = true;  // a part of the architecture
#if defined(__linux__)
    constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which headers older than 2020 lack
    neon_bf16 = getauxval(AT_HWCAP2) & kBf16;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    neon_bf16 = sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#endif
  }
#endif
};

struct Candidate {
  const Isa* isa;  // null: not compiled in
  bool runs_here, by_default;
};

std::vector<Candidate> compiled_in() {
  const Cpu cpu;
  std::vector<Candidate> all{
#define CANDIDATE(name) {&name::isa, cpu.name, cpu.name},
      FUSIONSUM_ISAS(CANDIDATE)
#undef CANDIDATE
  };
  all.erase(std::remove_if(all.begin(), all.end(), [](const Candidate& c) { return !c.isa; }), all.end());
  for (Candidate& c : all) c.by_default = c.by_default && (!c.isa->pairs || cpu.pairs_are_fast);
  return all;
}

const Isa& choose() {
  const char* name = std::getenv("FUSIONSUM_ISA");
  const bool asked = name && *name;
  std::string here;
  for (const Candidate& candidate : compiled_in()) {
    if (!candidate.runs_here) continue;
    if (asked ? candidate.isa->name == std::string(name) : candidate.by_default) return *candidate.isa;
    here += std::string(here.empty() ? "" : ", ") + candidate.isa->name;
  }
  throw std::invalid_argument(std::string("FUSIONSUM_ISA=") + name +
                              ": expected one of those that are compiled in and that this processor has: " + here);
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

const ScoreKernels& kernels_for(const Scores& scores, const Isa& isa) {
  return isa.pairs && suits_bf16_pairs(scores) ? *isa.pairs : *isa.scores;
}

}  // namespace fusionsum
