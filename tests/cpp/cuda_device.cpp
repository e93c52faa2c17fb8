// The functions of the GPU on host memory: everything is copied there, strides, gaps and alignment as they are, and the
// outputs with their poison back.
#include "cuda_device.h"

#include <deque>

namespace lighthouse::test {
namespace {

// What one call borrows from the host.
class Loan {
 public:
  ConstView in(const ConstView& view) {
    ConstView lent = view;
    lent.data = copy(view.data, span(view), 0).data();
    return lent;
  }
  ConstView maybe_in(const ConstView& view) { return view.data == nullptr ? view : in(view); }
  View out(const View& view) {
    View lent = view;
    lent.data = out(view.data, span(view));
    return lent;
  }

  template <class T>
  const T* in(const T* host, int64_t count) {
    return reinterpret_cast<const T*>(copy(host, count * static_cast<int64_t>(sizeof(T)), 0).data());
  }
  template <class T>
  T* out(T* host, int64_t count) {
    return static_cast<T*>(out(static_cast<void*>(host), count * static_cast<int64_t>(sizeof(T))));
  }

  ConstSelection in(const ConstSelection& selection) {
    const int64_t count = size_of(selection);
    return {selection.sequences, selection.kv_heads, in(selection.mask, count), in(selection.prefix, count)};
  }

  ScoreArgs lend(const ScoreArgs& a) {
    const int64_t count = a.key.batch() * a.key.heads() * a.key.tokens();
    return {in(a.query), in(a.key), out(a.query_score, count), out(a.key_score, count)};
  }
  SelectArgs lend(const SelectArgs& a) {
    const int64_t count = size_of(a.selection);
    return {
        in(a.query_score, count),
        in(a.key_score, count),
        {a.selection.sequences, a.selection.kv_heads, out(a.selection.mask, count), out(a.selection.prefix, count)}};
  }
  GatherArgs lend(const GatherArgs& a) {
    return {in(a.query), in(a.key), in(a.value), in(a.selection), out(a.query_sub), out(a.key_sub), out(a.value_sub)};
  }
  GatherBackwardArgs lend(const GatherBackwardArgs& a) {
    return {in(a.grad_query_sub),  in(a.grad_key_sub),     in(a.grad_value_sub), in(a.selection),
            out(a.grad_query),     out(a.grad_key),        out(a.grad_value),    maybe_in(a.added_query),
            maybe_in(a.added_key), maybe_in(a.added_value)};
  }
  ScatterArgs lend(const ScatterArgs& a) {
    return {in(a.output_sub), in(a.selection), out(a.output), maybe_in(a.added)};
  }
  ScatterBackwardArgs lend(const ScatterBackwardArgs& a) {
    return {in(a.grad_output), in(a.selection), out(a.grad_output_sub)};
  }

  cuda::Workspace workspace(int64_t bytes) { return memory_.emplace_back(bytes); }

  // Waits, and brings the outputs back.
  void finish() const {
    check(cudaDeviceSynchronize());
    for (const Output& output : outputs_) {
      check(cudaMemcpy(output.host, output.device, static_cast<size_t>(output.bytes), cudaMemcpyDefault));
    }
    for (const DeviceMemory& memory : memory_) {
      EXPECT_TRUE(memory.guards_untouched()) << "written before or after an output or the workspace";
    }
  }

 private:
  struct Output {
    void* host;
    const void* device;
    int64_t bytes;
  };

  static int64_t size_of(const ConstSelection& selection) {
    return selection.sequences.rows * selection.kv_heads * selection.sequences.tokens;
  }
  static int64_t span(const ConstView& view) {
    int64_t elements = 1;
    for (size_t i = 0; i < 4; ++i) {
      elements += (view.sizes[i] - 1) * view.strides[i];
    }
    return elements * lighthouse::size_of(view.dtype);
  }

  const DeviceMemory& copy(const void* host, int64_t bytes, int64_t guard) {
    const DeviceMemory& memory =
        memory_.emplace_back(bytes, guard, static_cast<int64_t>(reinterpret_cast<uintptr_t>(host) % 16));
    check(cudaMemcpy(memory.data(), host, static_cast<size_t>(bytes), cudaMemcpyDefault));
    return memory;
  }

  void* out(void* host, int64_t bytes) {
    void* const device = copy(host, bytes, DeviceMemory::kGuard).data();
    outputs_.push_back({host, device, bytes});
    return device;
  }

  std::deque<DeviceMemory> memory_;
  std::vector<Output> outputs_;
};

class CudaDevice final : public Device {
 public:
  CudaDevice() : Device("Cuda", kCudaDTypes, cuda::kHeadDimStep) {}

  std::string missing() const override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error == cudaSuccess && count > 0 ? "" : std::string("no CUDA device: ") + cudaGetErrorString(error);
  }

  void run(const AnyArgs& any) const override {
    std::visit(
        [](const auto& args) {
          Loan loan;
          cuda::run(loan.lend(args), loan.workspace(cuda::workspace_bytes(args)), nullptr);
          loan.finish();
        },
        any);
  }
};

}  // namespace

const Device& cuda_device() {
  static const CudaDevice device;
  return device;
}

const Device& cuda_calls() {
  static const CudaCalls device(nullptr, {});
  return device;
}

}  // namespace lighthouse::test
