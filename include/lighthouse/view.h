// Strided views of tensors in the layout of PyTorch's attention: [batch, heads, tokens, head_dim].
// A view owns nothing. The head dimension is contiguous; every other stride is free, in elements.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

namespace lighthouse {

enum class DType : uint8_t { float32, float64, bfloat16, float16 };

const char* name(DType dtype);
int64_t size_of(DType dtype);

template <class Pointer>
struct BasicView {
  Pointer data = nullptr;
  DType dtype = DType::float32;
  std::array<int64_t, 4> sizes{};    // batch, heads, tokens, head_dim
  std::array<int64_t, 4> strides{};  // in elements; strides[3] == 1

  int64_t batch() const { return sizes[0]; }
  int64_t heads() const { return sizes[1]; }
  int64_t tokens() const { return sizes[2]; }
  int64_t head_dim() const { return sizes[3]; }

  // The first number of one token of one head.
  template <class T>
  constexpr auto* row(int64_t batch, int64_t head, int64_t token) const {
    using Number = std::conditional_t<std::is_same_v<Pointer, void*>, T, const T>;
    return static_cast<Number*>(data) + batch * strides[0] + head * strides[1] + token * strides[2];
  }
};

using View = BasicView<void*>;

struct ConstView : BasicView<const void*> {
  ConstView() = default;
  ConstView(const View& view) : BasicView{view.data, view.dtype, view.sizes, view.strides} {}
};

// Strides of a tensor without gaps, the last dimension fastest.
std::array<int64_t, 4> contiguous_strides(const std::array<int64_t, 4>& sizes);

}  // namespace lighthouse
