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

  ConstSelection in(const Layout& layout, const ConstSelection& selection) {
    const int64_t count = layout.rows * selection.kv_heads * layout.tokens;
    return {in(selection.mask, count), in(selection.prefix, count), selection.kv_heads};
  }

  cuda::Workspace workspace(int64_t bytes) { return memory_.emplace_back(bytes); }

  // Waits, and brings the outputs back.
  void finish() const {
    check(cudaDeviceSynchronize());
    for (const Output& output : outputs_) {
      check(cudaMemcpy(output.host, output.device, static_cast<size_t>(output.bytes), cudaMemcpyDefault));
    }
    for (const DeviceMemory& memory : memory_) {
      EXPECT_TRUE(memory.guards_untouched()) << "written before or behind an output or the workspace";
    }
  }

 private:
  struct Output {
    void* host;
    const void* device;
    int64_t bytes;
  };

  static int64_t span(const ConstView& view) {
    int64_t elements = 1;
    for (size_t i = 0; i < 4; ++i) {
      elements += (view.sizes[i] - 1) * view.strides[i];
    }
    return elements * size_of(view.dtype);
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
  CudaDevice() : Device("Cuda", kCudaDTypes, 8) {}

  std::string missing() const override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error == cudaSuccess && count > 0 ? "" : std::string("no CUDA device: ") + cudaGetErrorString(error);
  }

  void score(const ConstView& query, const ConstView& key, float* query_score, float* key_score) const override {
    Loan loan;
    const int64_t count = key.batch() * key.heads() * key.tokens();
    cuda::score(loan.in(query), loan.in(key), loan.out(query_score, count), loan.out(key_score, count), nullptr);
    loan.finish();
  }

  void select(const Plan& plan, const float* query_score, const float* key_score,
              const Selection& selection) const override {
    Loan loan;
    const int64_t count = plan.layout.rows * selection.kv_heads * plan.layout.tokens;
    const Selection lent{loan.out(selection.mask, count), loan.out(selection.prefix, count), selection.kv_heads};
    cuda::select(plan, loan.in(query_score, count), loan.in(key_score, count), lent,
                 loan.workspace(cuda::select_workspace(plan, selection.kv_heads)), nullptr);
    loan.finish();
  }

  void gather(const Layout& layout, const ConstView& query, const ConstView& key, const ConstView& value,
              const ConstSelection& selection, const View& query_sub, const View& key_sub,
              const View& value_sub) const override {
    Loan loan;
    cuda::gather(layout, loan.in(query), loan.in(key), loan.in(value), loan.in(layout, selection), loan.out(query_sub),
                 loan.out(key_sub), loan.out(value_sub), loan.workspace(cuda::gather_workspace(layout, query, key)),
                 nullptr);
    loan.finish();
  }

  void gather_backward(const Layout& layout, const ConstView& grad_query_sub, const ConstView& grad_key_sub,
                       const ConstView& grad_value_sub, const ConstSelection& selection, const View& grad_query,
                       const View& grad_key, const View& grad_value) const override {
    Loan loan;
    cuda::gather_backward(layout, loan.in(grad_query_sub), loan.in(grad_key_sub), loan.in(grad_value_sub),
                          loan.in(layout, selection), loan.out(grad_query), loan.out(grad_key), loan.out(grad_value),
                          nullptr);
    loan.finish();
  }

  void scatter(const Layout& layout, const ConstView& output_sub, const ConstSelection& selection,
               const View& output) const override {
    Loan loan;
    cuda::scatter(layout, loan.in(output_sub), loan.in(layout, selection), loan.out(output), nullptr);
    loan.finish();
  }

  void scatter_backward(const Layout& layout, const ConstView& grad_output, const ConstSelection& selection,
                        const View& grad_output_sub) const override {
    Loan loan;
    cuda::scatter_backward(layout, loan.in(grad_output), loan.in(layout, selection), loan.out(grad_output_sub),
                           loan.workspace(cuda::scatter_backward_workspace(layout, grad_output)), nullptr);
    loan.finish();
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
