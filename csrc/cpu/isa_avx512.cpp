#include "simd/avx512.h"
#include "sum/walk.inl"
#include "isa.inl"
