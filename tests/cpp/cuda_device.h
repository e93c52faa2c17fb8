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
// sees every byte that is read after it.
class DeviceMemory {
 public:
  static constexpr int64_t kGuard = 256;

  // `past` bytes after an aligned address.
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
      : Device("Cuda", kCudaDTypes, cuda::kHeadDimStep), stream_(stream), workspace_(workspace) {}

  void run(const AnyArgs& any) const override {
    std::visit([&](const auto& args) { cuda::run(args, workspace_, stream_); }, any);
  }

 private:
  cudaStream_t stream_;
  cuda::Workspace workspace_;
};

}  // namespace lighthouse::test
