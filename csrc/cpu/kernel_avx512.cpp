#include "simd_avx512.h"
#include "kernel.inl"
