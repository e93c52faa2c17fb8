// Memory of the GPU for the tests, and the functions on it.
#pragma once

#include <cuda_runtime.h>

#include "device.h"
#include "lighthouse/cuda.h"

namespace lighthouse::test {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(error));
  }
}

// Starts as poison. With a guard it can tell whether anything was written around it; without one, compute-sanitizer
// sees every byte that is read behind it.
class DeviceMemory {
 public:
  static constexpr int64_t kGuard = 256;

  // `past` bytes behind an aligned address.
  explicit DeviceMemory(int64_t bytes, int64_t guard = kGuard, int64_t past = 0)
      : bytes_(bytes), guard_(guard), past_(past) {
    check(cudaMalloc(&start_, static_cast<size_t>(std::max<int64_t>(whole(), 1))));
    poison();
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  DeviceMemory(DeviceMemory&& other) noexcept
      : start_(std::exchange(other.start_, nullptr)), bytes_(other.bytes_), guard_(other.guard_), past_(other.past_) {}
  DeviceMemory& operator=(DeviceMemory&&) = delete;
  ~DeviceMemory() { cudaFree(start_); }

  std::byte* data() const { return static_cast<std::byte*>(start_) + guard_ + past_; }
  operator cuda::Workspace() const { return {data(), bytes_}; }

  void poison() const { check(cudaMemset(start_, 0xff, static_cast<size_t>(whole()))); }

  bool guards_untouched() const {
    std::vector<std::byte> bytes(static_cast<size_t>(2 * guard_ + past_));
    const auto before = static_cast<size_t>(guard_ + past_);
    check(cudaMemcpy(bytes.data(), start_, before, cudaMemcpyDefault));
    check(cudaMemcpy(bytes.data() + before, data() + bytes_, static_cast<size_t>(guard_), cudaMemcpyDefault));
    return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0xff}; });
  }

 private:
  int64_t whole() const { return guard_ + past_ + bytes_ + guard_; }

  void* start_ = nullptr;
  int64_t bytes_, guard_, past_;
};

inline constexpr DType kCudaDTypes[] = {DType::float32, DType::bfloat16, DType::float16};

// On the device's own memory; nothing is waited for.
class CudaCalls final : public Device {
 public:
  CudaCalls(cudaStream_t stream, cuda::Workspace workspace)
      : Device("Cuda", kCudaDTypes, 8), stream_(stream), workspace_(workspace) {}

  void score(const ConstView& query, const ConstView& key, float* query_score, float* key_score) const override {
    cuda::score(query, key, query_score, key_score, stream_);
  }
  void select(const Plan& plan, const float* query_score, const float* key_score,
              const Selection& selection) const override {
    cuda::select(plan, query_score, key_score, selection, workspace_, stream_);
  }
  void gather(const Layout& layout, const ConstView& query, const ConstView& key, const ConstView& value,
              const ConstSelection& selection, const View& query_sub, const View& key_sub,
              const View& value_sub) const override {
    cuda::gather(layout, query, key, value, selection, query_sub, key_sub, value_sub, workspace_, stream_);
  }
  void gather_backward(const Layout& layout, const ConstView& grad_query_sub, const ConstView& grad_key_sub,
                       const ConstView& grad_value_sub, const ConstSelection& selection, const View& grad_query,
                       const View& grad_key, const View& grad_value) const override {
    cuda::gather_backward(layout, grad_query_sub, grad_key_sub, grad_value_sub, selection, grad_query, grad_key,
                          grad_value, stream_);
  }
  void scatter(const Layout& layout, const ConstView& output_sub, const ConstSelection& selection,
               const View& output) const override {
    cuda::scatter(layout, output_sub, selection, output, stream_);
  }
  void scatter_backward(const Layout& layout, const ConstView& grad_output, const ConstSelection& selection,
                        const View& grad_output_sub) const override {
    cuda::scatter_backward(layout, grad_output, selection, grad_output_sub, workspace_, stream_);
  }

 private:
  cudaStream_t stream_;
  cuda::Workspace workspace_;
};

}  // namespace lighthouse::test
