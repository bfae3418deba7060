#include "simd_scalar.h"
#include "kernel.inl"
