// Operands in memory: sixteen bytes at a time, or one value of a type known only at run time.
//
// What lives elsewhere: the loops (kernel.cuh), the conversions in software (dtype.h), which stand in the emulator for
// the GPU's instructions.
#pragma once
#include <type_traits>

#include "../gpu.h"
#include "pass.h"

namespace fusionsum {
namespace cuda {

FUSIONSUM_INLINE double fetch(const double* p) { return __ldg(p); }
FUSIONSUM_INLINE float fetch(const float* p) { return __ldg(p); }
FUSIONSUM_INLINE Bf16 fetch(const Bf16* p) { return {__ldg(&p->bits)}; }
FUSIONSUM_INLINE F16 fetch(const F16* p) { return {__ldg(&p->bits)}; }

FUSIONSUM_INLINE double wide(double x) { return x; }
FUSIONSUM_INLINE float wide(float x) { return x; }
FUSIONSUM_INLINE float wide(Bf16 x) { return widen(x); }
FUSIONSUM_INLINE void narrow_fast(double x, double* to) { *to = x; }
FUSIONSUM_INLINE void narrow_fast(float x, float* to) { *to = x; }
#if defined(__CUDA_ARCH__)
FUSIONSUM_INLINE float wide(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
FUSIONSUM_INLINE void narrow_fast(float x, F16* to) { to->bits = __half_as_ushort(__float2half_rn(x)); }
FUSIONSUM_INLINE void narrow_fast(float x, Bf16* to) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#else
FUSIONSUM_INLINE float wide(F16 x) { return widen(x); }
FUSIONSUM_INLINE void narrow_fast(float x, F16* to) { narrow(x, to); }
FUSIONSUM_INLINE void narrow_fast(float x, Bf16* to) { narrow(x, to); }
#endif

// Sixteen bytes of values of type S, in four registers. `get` and `set` are for unrolled loops, whose places are known
// at compile time: a register cannot be indexed at run time. A loop that is not unrolled, because activations are long
// code, takes the first value and pushes the last.
template <class S>
struct Storage {
  using T = decltype(widen(S{}));
  static constexpr int width = 16 / sizeof(S);

  struct Packet {
    uint32_t word[4];

    FUSIONSUM_INLINE T get(int i) const {
      if constexpr (sizeof(S) == 2) {
        return wide(S{static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2)))});
      } else {
        S value;
        __builtin_memcpy(&value, &word[i * sizeof(S) / 4], sizeof(S));
        return value;
      }
    }
    FUSIONSUM_INLINE void set(int i, T x) {
      S value;
      narrow_fast(x, &value);
      if constexpr (sizeof(S) == 2) {
        word[i / 2] = i % 2 ? (word[i / 2] & 0xffffu) | static_cast<uint32_t>(value.bits) << 16 : value.bits;
      } else {
        __builtin_memcpy(&word[i * sizeof(S) / 4], &value, sizeof(S));
      }
    }
    FUSIONSUM_INLINE T take() {
      const T first = get(0);
      push(first);
      return first;
    }
    FUSIONSUM_INLINE void push(T x) {
      if constexpr (sizeof(S) == 2) {
        for (int j = 0; j < 3; ++j) word[j] = word[j] >> 16 | word[j + 1] << 16;
        word[3] >>= 16;
      } else {
        constexpr int kWords = sizeof(S) / 4;
        FUSIONSUM_UNROLL(4)
        for (int j = 0; j + kWords < 4; ++j) word[j] = word[j + kWords];
      }
      set(width - 1, x);
    }
  };

  FUSIONSUM_INLINE static Packet all(T x) {
    Packet packet{};
    FUSIONSUM_UNROLL(8)
    for (int i = 0; i < width; ++i) packet.set(i, x);
    return packet;
  }
  FUSIONSUM_INLINE static Packet load(const PassOperand& o, int64_t at) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(static_cast<const S*>(o.data) + at));
    return {{v.x, v.y, v.z, v.w}};
  }
  FUSIONSUM_INLINE static void store(const PassOperand& o, int64_t at, const Packet& packet, bool stream) {
    uint4* const to = reinterpret_cast<uint4*>(static_cast<S*>(o.grad) + at);
    const uint4 v = make_uint4(packet.word[0], packet.word[1], packet.word[2], packet.word[3]);
    if (stream) {
      __stcs(to, v);
    } else {
      __stwb(to, v);  // a plain assignment may become four stores
    }
  }
};

// grad[at] = value, rounded once to the dtype.
template <class V>
FUSIONSUM_INLINE void store_value(DType dtype, void* grad, int64_t at, V value) {
  with_dtype(dtype, grad, [&](const auto* p) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
    narrow(value, const_cast<S*>(p) + at);
  });
}

// One value, of a dtype known at run time, in the working precision.
template <class Working>
struct Any {};
template <class Working>
struct Storage<Any<Working>> {
  using T = Working;
  static constexpr int width = 1;

  struct Packet {
    T value;
    FUSIONSUM_INLINE T get(int) const { return value; }
    FUSIONSUM_INLINE void set(int, T x) { value = x; }
    FUSIONSUM_INLINE T take() { return value; }
    FUSIONSUM_INLINE void push(T x) { value = x; }
  };

  FUSIONSUM_INLINE static Packet all(T x) { return {x}; }
  FUSIONSUM_INLINE static Packet load(const PassOperand& o, int64_t at) {
    Packet packet;
    with_dtype(o.dtype, o.data, [&](const auto* p) { packet.value = static_cast<T>(wide(fetch(p + at))); });
    return packet;
  }
  FUSIONSUM_INLINE static void store(const PassOperand& o, int64_t at, const Packet& packet, bool) {
    store_value(o.dtype, o.grad, at, packet.value);
  }
};

}  // namespace cuda
}  // namespace fusionsum
