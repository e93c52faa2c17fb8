// Where a test's functions run. The tables run on every device that the library is built for; where a device is not
// there, its tests are skipped and say why.
#pragma once

#include <span>
#include <variant>

#include "support.h"

namespace lighthouse::test {

using AnyArgs = std::variant<ScoreArgs, SelectArgs, GatherArgs, GatherBackwardArgs, ScatterArgs, ScatterBackwardArgs>;

// The verbs on host memory, whatever computes them.
class Device {
 public:
  Device(const char* name, std::span<const DType> dtypes, int64_t head_dims)
      : name_(name), dtypes_(dtypes), head_dims_(head_dims) {}
  virtual ~Device() = default;

  const char* name() const { return name_; }
  std::span<const DType> dtypes() const { return dtypes_; }
  DType widest() const {
    return *std::max_element(dtypes_.begin(), dtypes_.end(), [](DType a, DType b) { return size_of(a) < size_of(b); });
  }
  // The least that it takes and that is no less than `wanted`.
  int64_t head_dim(int64_t wanted) const { return (wanted + head_dims_ - 1) / head_dims_ * head_dims_; }
  // Why nothing can run on it here; empty if it can.
  virtual std::string missing() const { return ""; }

  virtual void run(const AnyArgs& args) const = 0;

 private:
  const char* name_;
  std::span<const DType> dtypes_;
  int64_t head_dims_;  // it takes multiples of this
};

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(const Executor& executor) : Device("Cpu", kDTypes, 1), executor_(executor) {}

  void run(const AnyArgs& any) const override {
    std::visit([&](const auto& args) { cpu::run(args, executor_); }, any);
  }

 private:
  const Executor& executor_;
};

inline const ThreadExecutor kTwoThreads(2);
inline const CpuDevice kCpu(kTwoThreads);

#if defined(LIGHTHOUSE_CUDA)
const Device& cuda_device();  // copies host memory to the GPU and back
const Device& cuda_calls();   // passes on what it gets: for what is refused before it is looked at
inline std::vector<const Device*> devices() { return {&kCpu, &cuda_device()}; }
inline std::vector<const Device*> refusing_devices() { return {&kCpu, &cuda_calls()}; }
#else
inline std::vector<const Device*> devices() { return {&kCpu}; }
inline std::vector<const Device*> refusing_devices() { return {&kCpu}; }
#endif

// A row of a table, on one device.
template <class Row>
struct OnDevice {
  const Device* device;
  Row row;
  std::string name() const { return std::string(device->name()) + "_" + row.name; }
};

template <class Row>
std::ostream& operator<<(std::ostream& out, const OnDevice<Row>& on) {
  return out << on.name();
}

template <class Row, size_t count>
auto on_each(const std::vector<const Device*>& devices, const Row (&rows)[count]) {
  std::vector<OnDevice<Row>> all;
  for (const Device* device : devices) {
    for (const Row& row : rows) {
      all.push_back({device, row});
    }
  }
  return testing::ValuesIn(all);
}

inline constexpr auto on_device_name = [](const auto& info) { return info.param.name(); };

inline void skip_without(const Device& device) {
  if (const std::string reason = device.missing(); !reason.empty()) {
    GTEST_SKIP() << reason;
  }
}

template <class Row>
class DeviceTable : public testing::TestWithParam<OnDevice<Row>> {
 protected:
  void SetUp() override { skip_without(device()); }
  const Device& device() const { return *this->GetParam().device; }
  const Row& row() const { return this->GetParam().row; }
};

// Tests without a table.
class DeviceTest : public testing::TestWithParam<const Device*> {
 protected:
  void SetUp() override { skip_without(device()); }
  const Device& device() const { return *GetParam(); }
};

inline void PrintTo(const Device* device, std::ostream* out) { *out << device->name(); }

inline constexpr auto device_name = [](const auto& info) { return std::string(info.param->name()); };

}  // namespace lighthouse::test
