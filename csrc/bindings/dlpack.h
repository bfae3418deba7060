// The parts of DLPack 1.x that are used, as its ABI fixes them: https://dmlc.github.io/dlpack/latest/c_api.html.
// Nothing but layouts and numbers; what is done with them is in torch.cpp.
#pragma once
#include <cstdint>

namespace fusionsum {
namespace dlpack {

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, id;
  bool operator==(const Device& other) const { return type == other.type && id == other.id; }
};
constexpr int32_t kCpu = 1, kCuda = 2, kPinned = 3;  // pinned memory is the CPU's too

struct Type {
  uint8_t code, bits;
  uint16_t lanes;
  bool operator==(const Type& other) const { return code == other.code && bits == other.bits && lanes == other.lanes; }
};
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6;

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  Type type;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Managed {
  Version version;
  void* manager;
  void (*deleter)(Managed*);
  uint64_t flags;
  Tensor tensor;
};

// What a framework's tensor type holds as the attribute __dlpack_c_exchange_api__. Functions return 0, or set a Python
// error.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  int (*allocate)(Tensor* prototype, Managed** out, void* context, void (*set_error)(void*, const char*, const char*));
  int (*managed_from_object)(void* object, Managed** out);
  int (*to_object)(Managed* tensor, void** object);
  int (*from_object)(void* object, Tensor* out);
  int (*work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace dlpack
}  // namespace fusionsum
