// The parameters of `merge` (merge.cu): what tiles have found of rows, of columns or of the whole chunk is added to
// what is known of them.
#pragma once
#include "tile.cuh"

namespace fusionsum {
namespace cuda {

struct Merge {
  const double* parts;  // [entry][part][value]
  int64_t entries, parts_of_entry;
  int values;
  bool log_sum_exp;  // the two values are a reference and a sum relative to it
  double* to;        // [value][entry]; a value's entries lie `step` from the next one's
  int64_t step;
};

}  // namespace cuda
}  // namespace fusionsum
