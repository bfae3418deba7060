#include "simd/avx512.h"
#include "sum/walk.inl"
#include "scores/walk.inl"
#include "isa.inl"
