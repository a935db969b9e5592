// A function small enough to read at a glance that takes the whole path of a compiled op:
// registered in torch, threaded by torch's pool, compiled for every instruction set. The tests of
// the packaging call it.
#include "isa.h"

FASTDIFF_KERNEL(probe_square_relu, void, (const float* x, float* y, int64_t n))

#ifdef FASTDIFF_ISA
namespace fastdiff::FASTDIFF_ISA {

void probe_square_relu(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] < 0.f ? 0.f : x[i] * x[i];
}

}  // namespace fastdiff::FASTDIFF_ISA
#endif

#ifdef FASTDIFF_REGISTER
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fastdiff {
namespace {

using torch::stable::Tensor;

Tensor probe(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float && x.is_contiguous(),
                  "probe: expected a contiguous float32 tensor");
  Tensor y = torch::stable::empty_like(x);
  const float* source = x.const_data_ptr<float>();
  float* target = y.mutable_data_ptr<float>();
  const auto kernel = FASTDIFF_PICK(probe_square_relu);
  constexpr int64_t grain = 1 << 14;
  torch::stable::parallel_for(0, x.numel(), grain, [&](int64_t begin, int64_t end) {
    kernel(source + begin, target + begin, end - begin);
  });
  return y;
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_native, m) { m.def("probe(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(fastdiff_native, CPU, m) { m.impl("probe", TORCH_BOX(&fastdiff::probe)); }
#endif
