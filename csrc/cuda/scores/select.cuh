// The best k scores of rows, exactly: a warp walks through what a row has, keeps in shared memory what is better than
// the k-th best that it knows, and sorts when that is full. Hits are ordered by score, then by the key's number, so
// that all of them differ, and what is found does not depend on who looked where.
//
// What lives here: a hit, and the parameters of a launch. The kernels are in select.cu.
#pragma once
#include "tile.cuh"

namespace fusionsum {
namespace cuda {

// A score, as an unsigned integer in the same order, and the complement of its key's number: the greater hit comes
// first. 0, 0 is none; NaN is 1, below all numbers.
template <class U>
struct Hit {
  U score, place;

  FUSIONSUM_INLINE bool operator<(const Hit& other) const {
    return score < other.score || (score == other.score && place < other.place);
  }
};
using Hit32 = Hit<uint32_t>;
using Hit64 = Hit<uint64_t>;

// The room of a warp, in hits, and how many warps a block has: 32 KiB of shared memory.
constexpr int kRoom = 512, kLargeRoom = 2048, kSelectBytes = 32 << 10;
constexpr int64_t kSelectedOfRoom = 256;  // k, at most, for the small room
template <class H, bool kLarge>
constexpr int kSelectWarps = kSelectBytes / ((kLarge ? kLargeRoom : kRoom) * static_cast<int>(sizeof(H)));

struct Selection {
  Chunk c;
  // A row's columns, or its lists, are cut into segments; what is found goes to `to`, [row][segment][k].
  int64_t segments, of_segment;
  const void* lists;  // hits, [row][listed]; null: the chunk's scores
  int64_t listed;
  void* to;         // null: the chunk's `best`
  bool with_known;  // start with the best that are known, else only with what they leave out
};

using SelectKernel = void(const Selection);
SelectKernel* select_kernel(bool wide, bool large);
using LeaveOutKernel = void(const Chunk);
LeaveOutKernel* leave_out_kernel(bool wide);

}  // namespace cuda
}  // namespace fusionsum
