#include "simd/neon.h"
#include "sum/walk.inl"
#include "scores/walk.inl"
#include "isa.inl"
