// Numbers for the tests: a fixed generator, dtypes by arithmetic, tensors in odd strides, and the tolerance.
#pragma once

#include <gtest/gtest.h>

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "lighthouse/view.h"

namespace lighthouse::test {

using Values = std::vector<double>;
using Sizes = std::array<int64_t, 4>;

inline constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

// The same numbers on every machine (splitmix64): the standard's distributions are not.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  double uniform() { return 0x1p-53 * static_cast<double>(bits() >> 11); }
  double normal() {  // near enough: the sum of twelve
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) {
      sum += uniform();
    }
    return sum;
  }

 private:
  uint64_t state_;
};

// --- dtypes, by arithmetic rather than by the bit tricks under test -------------------------------------------------

inline double rounded(DType dtype, double value) {
  if (dtype == DType::float64 || !std::isfinite(value) || value == 0.0) {
    return value;
  }
  const auto single = static_cast<double>(static_cast<float>(value));
  if (dtype == DType::float32 || !std::isfinite(single) || single == 0.0) {
    return single;
  }
  const bool half = dtype == DType::float16;
  const int exponent = std::max(std::ilogb(single), half ? -14 : -126);
  const double step = std::ldexp(1.0, exponent - (half ? 10 : 7));
  const double result = std::nearbyint(single / step) * step;
  const double largest = half ? 65504.0 : 0x1.fep127;
  return std::abs(result) > largest ? std::copysign(std::numeric_limits<double>::infinity(), result) : result;
}

inline Values rounded(DType dtype, Values values) {
  for (double& value : values) {
    value = rounded(dtype, value);
  }
  return values;
}

inline void store(DType dtype, std::byte* to, double value) {
  value = rounded(dtype, value);
  const auto single = static_cast<float>(value);
  if (dtype == DType::float64) {
    std::memcpy(to, &value, 8);
  } else if (dtype == DType::float32) {
    std::memcpy(to, &single, 4);
  } else if (dtype == DType::bfloat16) {
    const auto bits = static_cast<uint16_t>(std::bit_cast<uint32_t>(single) >> 16 | (std::isnan(single) ? 0x40 : 0));
    std::memcpy(to, &bits, 2);
  } else {
    uint16_t bits = 0x7e00;
    if (!std::isnan(value)) {
      const double magnitude = std::abs(value);
      if (std::isinf(value)) {
        bits = 0x7c00;
      } else if (magnitude < 0x1p-14) {
        bits = static_cast<uint16_t>(magnitude * 0x1p24);
      } else {
        const int exponent = std::ilogb(magnitude);
        bits = static_cast<uint16_t>((exponent + 14) * 1024 + static_cast<int>(std::ldexp(magnitude, 10 - exponent)));
      }
    }
    bits = static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
    std::memcpy(to, &bits, 2);
  }
}

inline double load(DType dtype, const std::byte* from) {
  if (dtype == DType::float64) {
    double value;
    std::memcpy(&value, from, 8);
    return value;
  }
  if (dtype == DType::float32) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, from, 2);
  if (dtype == DType::bfloat16) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

// --- tensors --------------------------------------------------------------------------------------------------------

enum class Memory {
  packed,
  transposed,  // [batch, tokens, heads, head_dim] in memory
  sliced,      // a slice of a longer head_dim, starting at its second element: the address alone is unaligned
  gaps,        // room left between tokens, heads and batches: the strides alone are unaligned
  far,         // strides that take every offset past 2^31 elements; of address space only, few pages are touched
};

inline const char* name(Memory memory) {
  static constexpr const char* kNames[] = {"packed", "transposed", "sliced", "gaps", "far"};
  return kNames[static_cast<size_t>(memory)];
}

// Where a tensor's elements lie, counted from the start of its memory.
struct Placement {
  std::array<int64_t, 4> strides;
  int64_t start = 0;
  int64_t span = 0;  // elements from the memory's start to the last one's end

  Placement(const Sizes& sizes, Memory memory) : strides(contiguous_strides(sizes)) {
    const auto [batch, heads, tokens, dim] = sizes;
    if (memory == Memory::transposed) {
      strides = {tokens * heads * dim, dim, heads * dim, 1};
    } else if (memory == Memory::sliced) {
      const int64_t row = dim + 8;
      strides = {heads * tokens * row, tokens * row, row, 1};
      start = 1;
    } else if (memory == Memory::gaps) {
      const int64_t token = dim + 5;
      const int64_t head = tokens * token + 7;
      strides = {heads * head + 11, head, token, 1};
    } else if (memory == Memory::far) {
      const int64_t token = (int64_t{1} << 31) / tokens + 64;  // the last token alone is past 2^31
      const int64_t head = tokens * token + 32;
      strides = {heads * head + 16, head, token, 1};
    }
    span = start + 1;
    for (size_t i = 0; i < 4; ++i) {
      span += (sizes[i] - 1) * strides[i];
    }
  }
};

// Owns a tensor's memory. Starts as poison: every byte 0xff, which reads as NaN in each dtype.
class Tensor {
 public:
  Tensor(DType dtype, Sizes sizes, Memory memory = Memory::packed) : memory_(memory) {
    const Placement placement(sizes, memory);
    view_.dtype = dtype;
    view_.sizes = sizes;
    view_.strides = placement.strides;
    bytes_ = static_cast<size_t>(placement.span * size_of(dtype));
    if (memory == Memory::far) {
      void* pages = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (pages == MAP_FAILED) {
        throw std::bad_alloc();
      }
      storage_ = {static_cast<std::byte*>(pages), [bytes = bytes_](std::byte* p) { munmap(p, bytes); }};
    } else {
      storage_ = {new std::byte[bytes_], [](std::byte* p) { delete[] p; }};
      std::memset(storage_.get(), 0xff, bytes_);
    }
    view_.data = storage_.get() + placement.start * size_of(dtype);
  }

  Tensor(DType dtype, Sizes sizes, Memory memory, const Values& values) : Tensor(dtype, sizes, memory) {
    size_t next = 0;
    each_element([&](std::byte* element) { store(view_.dtype, element, values.at(next++)); });
  }

  operator View() const { return view_; }
  operator ConstView() const { return view_; }
  const View& view() const { return view_; }

  Values values() const {
    Values result;
    each_element([&](const std::byte* element) { result.push_back(load(view_.dtype, element)); });
    return result;
  }

  // All the bytes, gaps among them: for comparing bit by bit.
  std::vector<std::byte> bits() const {
    if (memory_ != Memory::far) {
      return {storage_.get(), storage_.get() + bytes_};
    }
    std::vector<std::byte> result;
    each_element(
        [&](const std::byte* element) { result.insert(result.end(), element, element + size_of(view_.dtype)); });
    return result;
  }

  // What lies between the elements was not written to.
  bool gaps_untouched() const {
    std::vector<std::byte> rest = bits();
    if (memory_ == Memory::far) {
      return true;
    }
    each_element([&](const std::byte* element) {
      std::fill_n(rest.begin() + (element - storage_.get()), size_of(view_.dtype), std::byte{0xff});
    });
    return std::all_of(rest.begin(), rest.end(), [](std::byte b) { return b == std::byte{0xff}; });
  }

 private:
  template <class Function>
  void each_element(const Function& function) const {
    for (int64_t b = 0; b < view_.sizes[0]; ++b) {
      for (int64_t h = 0; h < view_.sizes[1]; ++h) {
        for (int64_t t = 0; t < view_.sizes[2]; ++t) {
          for (int64_t d = 0; d < view_.sizes[3]; ++d) {
            const int64_t offset =
                b * view_.strides[0] + h * view_.strides[1] + t * view_.strides[2] + d * view_.strides[3];
            function(static_cast<std::byte*>(view_.data) + offset * size_of(view_.dtype));
          }
        }
      }
    }
  }

  View view_;
  Memory memory_;
  size_t bytes_ = 0;
  std::shared_ptr<std::byte> storage_;
};

inline Values random_values(Random& random, const Sizes& sizes) {
  Values values(static_cast<size_t>(sizes[0] * sizes[1] * sizes[2] * sizes[3]));
  for (double& value : values) {
    value = random.normal();
  }
  return values;
}

inline double dot(const Values& a, const Values& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    sum += a.at(i) * b.at(i);
  }
  return sum;
}

// --- the tolerance --------------------------------------------------------------------------------------------------

// The one rule for results with arithmetic in them: the largest error against float64 is at most twice that of plain
// loops whose every tensor is rounded to the dtype, plus some roundings of the sums, which are made in float32.
inline void expect_close(const Values& ours, const Values& exact, const Values& plain, DType dtype) {
  ASSERT_EQ(ours.size(), exact.size());
  ASSERT_EQ(plain.size(), exact.size());
  double error = 0.0;
  double plain_error = 0.0;
  double magnitude = 0.0;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (!std::isfinite(exact[i])) {
      ASSERT_TRUE(ours[i] == exact[i] || (std::isnan(ours[i]) && std::isnan(exact[i]))) << "element " << i;
      continue;
    }
    ASSERT_TRUE(std::isfinite(ours[i])) << "element " << i << ": " << ours[i] << ", not " << exact[i];
    error = std::max(error, std::abs(ours[i] - exact[i]));
    plain_error = std::max(plain_error, std::abs(plain[i] - exact[i]));
    magnitude = std::max(magnitude, std::abs(exact[i]));
  }
  const double eps = dtype == DType::float64 ? 64 * 0x1p-53 : 16 * 0x1p-24;  // float64 has no plain error
  EXPECT_LE(error, 2.0 * plain_error + eps * magnitude) << "magnitude " << magnitude;
}

inline void expect_close(const Values& ours, const Values& exact, DType dtype) {
  expect_close(ours, exact, rounded(dtype, exact), dtype);
}

}  // namespace lighthouse::test
