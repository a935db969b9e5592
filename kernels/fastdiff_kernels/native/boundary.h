// The torch side of a kernel file (FASTDIFF_REGISTER): what it may ask of tensors, and how it
// divides work. A size or a stride that was not checked here is not trusted.
#pragma once

#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <initializer_list>
#include <optional>

namespace fastdiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

[[maybe_unused]] Type type_of(const char* op, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
      ": expected float32, bfloat16 or float16");
  return type == ScalarType::Float      ? Type::f32
         : type == ScalarType::BFloat16 ? Type::bf16
                                        : Type::f16;
}

// A contiguous tensor of this dtype and of so many elements: its data.
[[maybe_unused]] void* data(const char* op, const char* name, const Tensor& t, ScalarType type,
                            int64_t elements) {
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " has another dtype");
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " is not contiguous");
  STD_TORCH_CHECK(t.numel() == elements, op, ": ", name, " has ", t.numel(), " elements; expected ",
                  elements);
  return t.data_ptr();
}

[[maybe_unused]] void* data(const char* op, const char* name, const MaybeTensor& t, ScalarType type,
                            int64_t elements) {
  return t ? data(op, name, *t, type, elements) : nullptr;
}

// Images (B, C, H, W) of this dtype that leave no gap, contiguous or in channels_last, and of so
// many elements: their data.
[[maybe_unused]] void* dense(const char* op, const char* name, const Tensor& t, ScalarType type,
                             bool channels_last, int64_t elements) {
  if (!channels_last) return data(op, name, t, type, elements);
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " has another dtype");
  STD_TORCH_CHECK(t.dim() == 4 && t.numel() == elements, op, ": ", name, " has ", t.numel(),
                  " elements; expected ", elements);
  int64_t stride = 1;
  for (const int64_t axis : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(elements == 0 || t.size(axis) == 1 || t.stride(axis) == stride, op, ": ", name,
                    " is not channels_last");
    stride *= t.size(axis);
  }
  return t.data_ptr();
}

// A tensor to be filled: `p`, its data. From 32 MiB on malloc maps new memory for every tensor, and
// the first touch of its pages takes longer than the kernel: asks for huge ones.
[[maybe_unused]] void* fresh(void* p, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t page = 4096;
  if (p && bytes >= int64_t{32} << 20) {
    const auto begin = (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page;
    const auto end = (reinterpret_cast<uintptr_t>(p) + bytes) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // no harm where refused
  }
#endif
  return p;
}

[[maybe_unused]] float* floats(const char* op, const char* name, const MaybeTensor& t,
                               int64_t elements) {
  return static_cast<float*>(data(op, name, t, ScalarType::Float, elements));
}

// Uninitialised float32 for partial sums.
[[maybe_unused]] Tensor workspace(const Tensor& like, int64_t elements) {
  return torch::stable::new_empty(like, {elements}, ScalarType::Float);
}

// f(i) for i in 0..n-1 on torch's threads. What an i does may not depend on the number of threads:
// cut the work into pieces by its size alone, and add up partial sums of pieces in their order.
template <class F>
void for_pieces(int64_t n, const F& f) {
  if (n == 1) return f(int64_t{0});
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace
}  // namespace fastdiff
