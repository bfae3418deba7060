// The fusion sum and its gradient: from Python's arguments to a Problem (../sum.h), which is executed (execute.h), and
// back.
#include "sum.h"

#include <algorithm>

#include "execute.h"
#include "parse.h"

namespace fusionsum {
namespace {

// A call's arguments, read; operands in the order of the Problem's, whose `grad`s are still to be allocated.
struct Arguments {
  Home home;
  int operands = 1;           // grad_output's place included, whether it was given or not
  int factors, first_factor;  // how many, and which operand is the first
  Array array[kMaxOperands];
  Broadcast dims;
  int sum_dim;  // of the broadcast shape
  int output_ndim = 0;
  int64_t output_shape[kMaxArrayDims];
  Problem problem;
};

bool read_grad_output(py::handle object, Arguments& a) {
  Array& g = a.array[0];
  if (!read_floats(object, a.home, g) || g.ndim != a.output_ndim) return false;
  if (!std::equal(g.shape, g.shape + g.ndim, a.output_shape)) return false;
  Operand& u = a.problem.operand[0];
  u.data = g.data;
  u.dtype = g.dtype;
  a.problem.wide = a.problem.wide || g.dtype == DType::f64;
  align(a.dims, g.ndim, g.shape, g.stride, a.sum_dim, u.stride);
  return true;
}

bool parse(Arguments& a, py::handle grad_output, py::handle weights, py::handle factors, py::handle activations,
           py::handle present, py::handle absent, py::handle dim, py::handle trusted) {
  if (!PyTuple_Check(factors.ptr()) || py::len(factors) < 1 || py::len(factors) > kMaxFactors) return false;
  a.factors = static_cast<int>(py::len(factors));
  if (!find_home(item(factors, 0), trusted, a.home)) return false;
  if (!weights.is_none() && !read_floats(weights, a.home, a.array[a.operands++])) return false;
  a.first_factor = a.operands;
  for (int m = 0; m < a.factors; ++m)
    if (!read_floats(item(factors, m), a.home, a.array[a.operands++])) return false;
  const Array* const given = a.array + 1;  // the weights, if any, and the factors
  const int count = a.operands - 1;

  Broadcast& dims = a.dims;
  if (!broadcast(given, count, dims) || !read_dim(dim, dims.ndim, a.sum_dim)) return false;
  for (int d = 0; d < dims.ndim; ++d)
    if (d != a.sum_dim) a.output_shape[a.output_ndim++] = dims.size[d];
  if (dims.kept_dims == 0) dims.kept[dims.kept_dims++] = a.sum_dim;  // one entry: the loop is over its single term

  Problem& p = a.problem;
  p.operands = a.operands;
  p.wide = has_float64(given, count);
  p.ndim = dims.kept_dims;
  p.sum_dim = -1;
  for (int i = 0; i < p.ndim; ++i) {
    p.size[i] = dims.size[dims.kept[i]];
    if (dims.kept[i] == a.sum_dim) p.sum_dim = i;
  }
  Operand& u = p.operand[0];
  u = Operand{};
  u.dtype = promoted(given, count);
  u.dims = (1u << p.ndim) - 1;
  if (p.sum_dim >= 0) u.dims &= ~(1u << p.sum_dim);
  if (!grad_output.is_none() && !read_grad_output(grad_output, a)) return false;
  for (int k = 1; k < a.operands; ++k) set_operand(dims, a.array[k], p.operand[k]);
  Operand* const factor = p.operand + a.first_factor;
  return read_activations(activations, a.factors, factor) && read_absent(absent, p.absent) &&
         read_masks(present, a.factors, a.array + a.first_factor, dims, a.sum_dim, a.home, factor);
}

}  // namespace

py::object fusion_sum(py::handle weights, py::handle factors, py::handle activations, py::handle present,
                      py::handle absent, py::handle dim, py::handle trusted) {
  Arguments a;
  if (!parse(a, py::none(), weights, factors, activations, present, absent, dim, trusted)) return declined();
  Operand& u = a.problem.operand[0];
  py::object output = allocate_grad(a.dims, a.home, u.dtype, a.output_ndim, a.output_shape, a.sum_dim, u);
  if (!a.dims.empty) execute(a.problem, a.home.device);
  const bool is_scalar = a.home.framework == Framework::numpy && a.output_ndim == 0;
  return is_scalar ? py::object(output[py::tuple()]) : output;
}

py::object fusion_sum_grad(py::handle grad_output, py::handle weights, py::handle factors, py::handle activations,
                           py::handle present, py::handle absent, py::handle dim, py::handle needs,
                           py::handle trusted) {
  Arguments a;
  if (grad_output.is_none() || !parse(a, grad_output, weights, factors, activations, present, absent, dim, trusted))
    return declined();
  const int count = 1 + a.factors;  // the weights' place is there even where they are None
  if (!is_sequence_of(needs, count)) return declined();
  py::tuple grads(count);
  bool any = false;
  for (int i = 0; i < count; ++i) {
    const int k = i + a.first_factor - 1;
    grads[i] = py::none();
    if (k < 1 || PyObject_IsTrue(item(needs, i).ptr()) != 1) continue;
    const Array& z = a.array[k];
    grads[i] = allocate_grad(a.dims, a.home, z.dtype, z.ndim, z.shape, -1, a.problem.operand[k]);
    any = true;
  }
  if (any && !a.dims.empty) execute(a.problem, a.home.device);
  return grads;
}

}  // namespace fusionsum
