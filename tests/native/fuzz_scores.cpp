// Any scores: bytes become a call with its epilogue, which every instruction set and number of threads must get right.
#include "fuzz.h"
#include "scores.h"

constexpr int64_t kMost = 1 << 16;

void native::check_input(Bytes& bytes, uint32_t seed) { ScoreMemory(bytes, seed, kMost).check_everything(); }
