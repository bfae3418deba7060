#include "simd/scalar.h"
#include "sum/walk.inl"
#include "isa.inl"
