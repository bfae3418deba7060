// The module fusionsum._core: Python's names for the functions (python/fusionsum/_core.pyi has their types).
#include "../cpu/dispatch.h"
#include "../cpu/parallel.h"
#include "execute.h"
#include "parse.h"
#include "scores.h"
#include "steps.h"
#include "sum.h"
#include "torch.h"

namespace py = pybind11;

namespace fusionsum {
namespace {

template <size_t N>
py::tuple names(const char* const (&all)[N], size_t first) {
  py::tuple to(N - first);
  for (size_t i = first; i < N; ++i) to[i - first] = all[i];
  return to;
}

}  // namespace
}  // namespace fusionsum

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  using namespace fusionsum;
  m.def("fusion_sum", &fusion_sum);
  m.def("fusion_sum_grad", &fusion_sum_grad);
  define_scores(m);
  define_steps(m);
  m.def("use_torch", &use_torch);
  m.def("use_cuda", &use_cuda);
  m.def("isa", [] { return active_isa().name; });
  m.def("isas", [] {
    py::list all;
    for (const auto& [name, runs_here] : isas()) all.append(py::make_tuple(name, runs_here));
    return all;
  });
  m.def("thread_backend", [] { return uses_torch_pool() ? "torch" : "own"; });
  m.def("set_num_threads", &set_num_threads);
  m.def("get_num_threads", &get_num_threads);
  m.attr("dtypes") = names(kDTypeNames, 0);
  m.attr("activations") = names(kActivationNames, 1);
}
