// The limit of a row that multiplies: fused multiply-adds in registers, compiled for this machine by machine.py.
#include <cstdint>

// 32 registers with AVX-512 and on ARM, else 16. A multiply-add takes about 4 cycles and 2 to 4 start in each, so that 12
// sums at least have to be under way; one register is left for the factor, one for the addend.
#if defined(__AVX512F__)
constexpr int width = 16, sums = 24;
#elif defined(__AVX__)
constexpr int width = 8, sums = 12;
#elif defined(__ARM_NEON)
constexpr int width = 4, sums = 24;
#else
constexpr int width = 4, sums = 12;
#endif

typedef float Vector __attribute__((vector_size(4 * width)));

extern "C" int64_t flop_per_round() { return 2 * width * sums; }

extern "C" float multiply(int64_t rounds, float factor, float addend) {
    Vector x = Vector{} + factor, y = Vector{} + addend, sum[sums];
    for (int i = 0; i < sums; ++i) sum[i] = Vector{} + float(i);
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 32
        for (int i = 0; i < sums; ++i) sum[i] = sum[i] * x + y;
    Vector total{};
    for (int i = 0; i < sums; ++i) total += sum[i];
    float result = 0;
    for (int i = 0; i < width; ++i) result += total[i];
    return result;
}
