// Any fusion sum: bytes become a problem, which every instruction set and number of threads must get right.
#include "fuzz.h"

#if defined(FUSIONSUM_LIBFUZZER)
constexpr int64_t kMost = 1 << 15;  // it likes the large ones, which take a second
#else
constexpr int64_t kMost = 1 << 19;  // the least that needs a second pass over the rows
#endif

void native::check_input(Bytes& bytes, uint32_t seed) { Memory(draw(bytes, kMost), seed).check_everything(); }
