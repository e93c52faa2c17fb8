// Torch's tensors as the core's views, through the stable ABI alone.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "core/require.h"
#include "lighthouse/executor.h"
#include "lighthouse/selection.h"
#include "lighthouse/view.h"

namespace lighthouse::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      require(false, argument, " must be float32, float64, bfloat16 or float16");
      return DType::float32;
  }
}

inline View view_of(const char* argument, const Tensor& tensor) {
  require(tensor.dim() == 4, argument, " has ", tensor.dim(),
          " dimensions: [batch, heads, tokens, head_dim] is needed");
  View view{tensor.data_ptr(), dtype_of(argument, tensor), {}, {}};
  for (int64_t i = 0; i < 4; ++i) {
    view.sizes[static_cast<size_t>(i)] = tensor.size(i);
    view.strides[static_cast<size_t>(i)] = tensor.stride(i);
  }
  return view;
}

// The numbers of a [rows, kv_heads, tokens] tensor without gaps.
template <class T>
T* data_of(const char* argument, const Tensor& tensor, ScalarType type, const char* type_name) {
  require(tensor.scalar_type() == type && tensor.dim() == 3 && tensor.is_contiguous(), argument,
          " must be a contiguous ", type_name, " tensor [batch, kv_heads, tokens]");
  return static_cast<T*>(tensor.data_ptr());
}

inline void require_same_sizes(const char* argument, const Tensor& tensor, const char* other_argument,
                               const Tensor& other) {
  bool same = tensor.dim() == other.dim();
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == other.size(i);
  require(same, argument, " and ", other_argument, " differ in size");
}

inline void require_choice_sizes(const char* argument, const Tensor& tensor) {
  require(tensor.dim() == 3, argument, " has ", tensor.dim(), " dimensions: [batch, kv_heads, tokens] is needed");
}

// A choice from outside, for sub-sequences of `length`.
inline ConstSelection selection_of(const Tensor& mask, const Tensor& prefix, const std::vector<int64_t>& windows,
                                   int64_t length) {
  require_choice_sizes("mask", mask);
  require_same_sizes("mask", mask, "prefix", prefix);
  return {Sequences::of_choice(mask.size(0), mask.size(2), length, Pyramid::from_windows(windows)), mask.size(1),
          data_of<uint8_t>("mask", mask, ScalarType::Byte, "uint8"),
          data_of<int32_t>("prefix", prefix, ScalarType::Int, "int32")};
}

// A table of documents as a tensor on the host, a row each; row 0 says what it was made for.
inline constexpr int64_t kTableColumns = sizeof(Document) / sizeof(int64_t);
static_assert(sizeof(Document) % sizeof(int64_t) == 0 && std::is_trivially_copyable_v<Document> &&
              kTableColumns >= kMaxLevels + 1);

inline std::array<int64_t, kTableColumns> table_head(const Pyramid& pyramid) {
  std::array<int64_t, kTableColumns> head{pyramid.levels};
  std::copy(pyramid.windows.begin(), pyramid.windows.end(), head.begin() + 1);
  return head;
}

inline Tensor table_of(const Documents& made, const Tensor& like) {
  const Sequences& all = made.sequences();
  Tensor table = torch::stable::new_empty(like, std::array{all.count() + 1, kTableColumns});
  auto* const rows = static_cast<int64_t*>(table.data_ptr());
  const auto head = table_head(all.method.pyramid);
  std::copy(head.begin(), head.end(), rows);
  std::memcpy(rows + kTableColumns, all.documents, static_cast<size_t>(all.count()) * sizeof(Document));
  return table;
}

// What `like` says, of documents. Their numbers are trusted: they must be of the operator that makes a table.
inline Sequences sequences_of(const Tensor& table, const Sequences& like) {
  require(table.is_cpu() && table.scalar_type() == ScalarType::Long && table.dim() == 2 && table.is_contiguous() &&
              table.size(0) >= 2 && table.size(1) == kTableColumns,
          "documents must be a table that torch.ops.lighthouse.documents made, on the CPU");
  const auto* const rows = static_cast<const int64_t*>(table.data_ptr());
  const auto head = table_head(like.method.pyramid);
  require(std::equal(head.begin(), head.end(), rows), "documents were described for other windows");
  const auto* const first = reinterpret_cast<const Document*>(rows + kTableColumns);
  Sequences all = Sequences::of_table({first, static_cast<size_t>(table.size(0) - 1)}, like.method);
  require(all.rows == like.rows && all.tokens == like.tokens, "documents have ", all.tokens, " tokens in ", all.rows,
          " row, the tensors ", like.tokens, " in ", like.rows);
  require(like.entries == 0 || all.entries == like.entries, "documents have ", all.entries,
          " entries, the sub-sequence ", like.entries);
  return all;
}

// The operators' two numbers: parents per level, or over a denominator a share of the tokens.
inline TopK topk_of(int64_t numerator, int64_t denominator) {
  return denominator == 0 ? TopK::count(numerator) : TopK::share(numerator, denominator);
}

// A large tensor is new memory to the process, and its first touch costs a fault per page: with pages of 2 MB instead
// of 4 KB, writing one takes a third of the time. A hint: where the system has none, nothing changes.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr size_t kSmallest = size_t{4} << 20;
  constexpr size_t kPage = 4096;
  if (bytes < kSmallest || std::align(kPage, kPage, data, bytes) == nullptr) return;
  madvise(data, bytes / kPage * kPage, MADV_HUGEPAGE);
#endif
}

// A new tensor like `like` in dtype and device, without gaps when its dimensions are taken in this order, the
// slowest first.
inline Tensor empty_in_order(const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& order,
                             const Tensor& like) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t i = 4; i-- > 0;) {
    const auto dimension = static_cast<size_t>(order[i]);
    strides[dimension] = stride;
    stride *= sizes[dimension];
  }
  int32_t dtype = 0, device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes.data(), strides.data(), dtype, device_type, device_index, &handle));
  Tensor tensor(handle);
  if (tensor.is_cpu())
    advise_huge_pages(tensor.data_ptr(), static_cast<size_t>(stride * size_of(dtype_of("tensor", like))));
  return tensor;
}

inline constexpr std::array<int64_t, 4> kHeadsFirst{0, 1, 2, 3};   // [batch, heads, tokens, head_dim]
inline constexpr std::array<int64_t, 4> kTokensFirst{0, 2, 1, 3};  // [batch, tokens, heads, head_dim] in memory

inline std::array<int64_t, 4> order_of(const char* argument, const std::vector<int64_t>& order) {
  require(order.size() == 4 && order[3] == 3, argument, " must name four dimensions, the head dimension last");
  require(std::is_permutation(order.begin(), order.end(), kHeadsFirst.begin()), argument,
          " must be a permutation of 0, 1, 2, 3");
  return {order[0], order[1], order[2], order[3]};
}

// Torch's own threads. What a piece throws is kept: it must not cross torch's C interface.
class TorchExecutor final : public Executor {
 public:
  void parallel_for(int64_t begin, int64_t end, int64_t grain,
                    const std::function<void(int64_t, int64_t)>& body) const override {
    std::exception_ptr failure;
    std::mutex mutex;
    torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
      try {
        body(first, last);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!failure) failure = std::current_exception();
      }
    });
    if (failure) std::rethrow_exception(failure);
  }
};

}  // namespace lighthouse::bindings
