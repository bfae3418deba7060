// A fuzzer's entry and main: bytes become whatever the including program checks.
//
//     fuzz COUNT FIRST                 inputs FIRST, FIRST + 1, ... of random bytes, from g++'s build
//     fuzz -max_total_time=600 CORPUS  libFuzzer, from clang's (the variant "fuzzer")
//
// The first kind prints each input before it runs: `fuzz 1 INPUT` repeats the last. What lives elsewhere: the check
// itself, `check_input`, which the program defines (fuzz.cpp, fuzz_scores.cpp).
#pragma once
#include <random>

#include "problem.h"

namespace native {
void check_input(Bytes& bytes, uint32_t seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  native::Bytes bytes(data, size);
  const uint32_t seed = bytes.below(1u << 31);
  native::check_input(bytes, seed);
  return 0;
}

#if !defined(FUSIONSUM_LIBFUZZER)
int main(int count, char** arguments) {
  if (count != 3) native::fail("expected: fuzz COUNT FIRST");
  const int64_t first = std::atoll(arguments[2]);
  for (int64_t input = first; input < first + std::atoll(arguments[1]); ++input) {
    std::mt19937_64 random(static_cast<uint64_t>(input));
    std::vector<uint8_t> bytes(16 + random() % 240);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    std::printf("%lld\n", static_cast<long long>(input));
    std::fflush(stdout);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
}
#endif
