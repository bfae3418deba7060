#include "simd_avx2.h"
#include "kernel.inl"
