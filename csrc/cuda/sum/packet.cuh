// Operands in memory: a packet of sixteen bytes, or of values that lie anywhere, of a type known only at run time.
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

// The columns of a thread's packet. Of sixteen bytes: W neighbours from `first` on. Of loose values: `count` columns,
// `step` apart, which is the number of lanes, so that neighbouring lanes read and write neighbouring values whatever
// their alignment. Beyond the count values are 0, and are not stored.
template <int W, bool kLoose>
struct Columns {
  int64_t first;
  static constexpr int step = 1;
  FUSIONSUM_INLINE static int64_t stride(int64_t col) { return col; }
  template <class Int>
  FUSIONSUM_INLINE Columns(int64_t first_col, int, Int) : first(first_col) {}
  FUSIONSUM_INLINE static constexpr bool has(int) { return true; }
};
template <int W>
struct Columns<W, true> {
  int64_t first;
  int log2, step, count;

  // `left` columns, the first among them, are before the end.
  template <class Int>
  FUSIONSUM_INLINE Columns(int64_t first_col, int lanes_log2, Int left)
      : first(first_col), log2(lanes_log2), step(1 << lanes_log2), count(W) {
    if (left < W << lanes_log2) count = static_cast<int>(left + step - 1) >> lanes_log2;
  }
  FUSIONSUM_INLINE bool has(int i) const { return i < count; }
  FUSIONSUM_INLINE int64_t stride(int64_t col) const { return col * (int64_t{1} << log2); }
  FUSIONSUM_INLINE int64_t operator[](int i) const { return first + i * step; }
};

// Sixteen bytes of values of type S, in four registers. `get` and `set` are for unrolled loops, whose places are known
// at compile time: a register cannot be indexed at run time. A loop that is not unrolled, because activations are long
// code, takes the first value and pushes the last.
template <class S>
struct Storage {
  using T = decltype(widen(S{}));
  static constexpr int width = 16 / sizeof(S);
  static constexpr bool loose = false;

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

template <class T>
FUSIONSUM_INLINE T load_value(const PassOperand& o, int64_t at) {
  T value;
  with_dtype(o.dtype, o.data, [&](const auto* p) { value = static_cast<T>(wide(fetch(p + at))); });
  return value;
}

// W values that lie anywhere, of a dtype known at run time, in the working precision. Places and strides are in bytes.
template <class Working, int W>
struct Loose {};
template <class Working, int W>
struct Storage<Loose<Working, W>> {
  using T = Working;
  static constexpr int width = W;
  static constexpr bool loose = true;

  struct Packet {
    T value[W];

    FUSIONSUM_INLINE T get(int i) const { return value[i]; }
    FUSIONSUM_INLINE void set(int i, T x) { value[i] = x; }
    FUSIONSUM_INLINE T take() {
      const T first = value[0];
      push(first);
      return first;
    }
    FUSIONSUM_INLINE void push(T x) {
      FUSIONSUM_UNROLL(8)
      for (int i = 0; i + 1 < W; ++i) value[i] = value[i + 1];
      value[W - 1] = x;
    }
  };

  FUSIONSUM_INLINE static Packet all(T x) {
    Packet packet;
    FUSIONSUM_UNROLL(8)
    for (int i = 0; i < W; ++i) packet.value[i] = x;
    return packet;
  }

  // Loads an operand's packets: for_each(use) calls use(packet, place) for several rows, whose loads are then in flight
  // together. Sixteen-bit values stay as they are until `widen`, for which they must have come.
  template <class ForEach>
  FUSIONSUM_INLINE static void load(const PassOperand& o, const Columns<W, true>& c, ForEach for_each) {
    with_stored(o.dtype, [&](auto type) {
      using S = decltype(type);
      const char* const first = static_cast<const char*>(o.data) + c.first * o.col;
      const int64_t step = c.stride(o.col);
      const auto value = [&](int64_t place, int i) {
        const S x = fetch(reinterpret_cast<const S*>(first + place + i * step));
        if constexpr (sizeof(S) == 2 && sizeof(T) == 4) {
          return float_of(x.bits);
        } else {
          return static_cast<T>(wide(x));
        }
      };
      if (c.count == W) {
        for_each([&](Packet& packet, int64_t place) {
          FUSIONSUM_UNROLL(8)
          for (int i = 0; i < W; ++i) packet.value[i] = value(place, i);
        });
      } else {
        for_each([&](Packet& packet, int64_t place) {
          FUSIONSUM_UNROLL(8)
          for (int i = 0; i < W; ++i) packet.value[i] = c.has(i) ? value(place, i) : T(0);
        });
      }
    });
  }
  template <class ForEach>
  FUSIONSUM_INLINE static void widen(const PassOperand& o, ForEach for_each) {
    if (sizeof(T) == 8 || o.dtype == DType::f32) return;
    const auto widen_from = [&](auto type) {
      for_each([&](Packet& packet, int64_t) {
        FUSIONSUM_UNROLL(8)
        for (int i = 0; i < W; ++i)
          packet.value[i] = static_cast<T>(wide(decltype(type){static_cast<uint16_t>(bits_of(packet.value[i]))}));
      });
    };
    o.dtype == DType::bf16 ? widen_from(Bf16{}) : widen_from(F16{});
  }
  FUSIONSUM_INLINE static void store(const PassOperand& o, int64_t at, const Columns<W, true>& c,
                                     const Packet& packet) {
    with_dtype(o.dtype, o.grad, [&](const auto* grad) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(grad)>>;
      if constexpr (sizeof(S) <= sizeof(T)) {
        char* const first = static_cast<char*>(o.grad) + at + c.first * o.grad_col;
        const int64_t step = c.stride(o.grad_col);
        const auto store_one = [&](int i) {
          S* const to = reinterpret_cast<S*>(first + i * step);
          if constexpr (sizeof(T) == 4) {
            narrow_fast(packet.value[i], to);
          } else {
            narrow(packet.value[i], to);
          }
        };
        if (c.count == W) {
          FUSIONSUM_UNROLL(8)
          for (int i = 0; i < W; ++i) store_one(i);
        } else {
          FUSIONSUM_UNROLL(8)
          for (int i = 0; i < W; ++i)
            if (c.has(i)) store_one(i);
        }
      } else {
        __builtin_unreachable();
      }
    });
  }

 private:
  // Calls use(a value of the type that has the dtype's bits).
  template <class Use>
  FUSIONSUM_INLINE static void with_stored(DType dtype, Use use) {
    if constexpr (sizeof(T) == 8) {
      with_dtype(dtype, nullptr,
                 [&](const auto* p) { use(std::remove_const_t<std::remove_reference_t<decltype(*p)>>{}); });
    } else if (dtype == DType::f32) {
      use(float{});
    } else {
      use(Bf16{});
    }
  }
};

}  // namespace cuda
}  // namespace fusionsum
