// The core's verbs by device, with what torch keeps for them: threads, stream, memory. Each operator is written once,
// for any of these.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <optional>

#include "lighthouse/cpu.h"
#include "torch/tensors.h"
#if defined(LIGHTHOUSE_CUDA)
#include "lighthouse/cuda.h"

// Only a torch with CUDA has it; declared weak, the library loads under any.
extern "C" [[gnu::weak]] AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace lighthouse::bindings {

inline const TorchExecutor kExecutor;

class Cpu {
 public:
  explicit Cpu(const Tensor&) {}

  void check(const char*, const Tensor&) const {}

  // Mask and prefix come from outside and are addresses in effect: looked at before they are followed.
  void check_selection(const Layout& layout, const ConstSelection& selection) const {
    cpu::check_selection(layout, selection, kExecutor);
  }

  void score(const View& query, const View& key, float* query_score, float* key_score) const {
    cpu::score(query, key, query_score, key_score, kExecutor);
  }
  void select(const Plan& plan, const float* query_score, const float* key_score, const Selection& selection) const {
    cpu::select(plan, query_score, key_score, selection, kExecutor);
  }
  void gather(const Layout& layout, const View& query, const View& key, const View& value,
              const ConstSelection& selection, const View& query_sub, const View& key_sub,
              const View& value_sub) const {
    cpu::gather(layout, query, key, value, selection, query_sub, key_sub, value_sub, kExecutor);
  }
  void gather_backward(const Layout& layout, const View& grad_query_sub, const View& grad_key_sub,
                       const View& grad_value_sub, const ConstSelection& selection, const View& grad_query,
                       const View& grad_key, const View& grad_value) const {
    cpu::gather_backward(layout, grad_query_sub, grad_key_sub, grad_value_sub, selection, grad_query, grad_key,
                         grad_value, kExecutor);
  }
  void scatter(const Layout& layout, const View& output_sub, const ConstSelection& selection,
               const View& output) const {
    cpu::scatter(layout, output_sub, selection, output, kExecutor);
  }
  void scatter_backward(const Layout& layout, const View& grad_output, const ConstSelection& selection,
                        const View& grad_output_sub) const {
    cpu::scatter_backward(layout, grad_output, selection, grad_output_sub, kExecutor);
  }
};

#if defined(LIGHTHOUSE_CUDA)

inline cuda::Stream current_stream(int32_t device) {
  require(aoti_torch_get_current_cuda_stream != nullptr, "this torch is built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

class Cuda {
 public:
  // `like`: whose device is worked on.
  explicit Cuda(const Tensor& like) : like_(like), guard_(index_of(like)), stream_(current_stream(index_of(like))) {}

  void check(const char* argument, const Tensor& tensor) const {
    require(tensor.is_cuda() && tensor.get_device_index() == like_.get_device_index(), argument,
            " is on another device than the first tensor: all must be on one");
  }

  // Nothing: a look at them would wait for the device. They must be what `select` returned.
  void check_selection(const Layout&, const ConstSelection&) const {}

  void score(const View& query, const View& key, float* query_score, float* key_score) const {
    cuda::score(query, key, query_score, key_score, stream_);
  }
  void select(const Plan& plan, const float* query_score, const float* key_score, const Selection& selection) const {
    const Scratch scratch(like_, cuda::select_workspace(plan, selection.kv_heads));
    cuda::select(plan, query_score, key_score, selection, scratch.workspace, stream_);
  }
  void gather(const Layout& layout, const View& query, const View& key, const View& value,
              const ConstSelection& selection, const View& query_sub, const View& key_sub,
              const View& value_sub) const {
    const Scratch scratch(like_, cuda::gather_workspace(layout, query, key));
    cuda::gather(layout, query, key, value, selection, query_sub, key_sub, value_sub, scratch.workspace, stream_);
  }
  void gather_backward(const Layout& layout, const View& grad_query_sub, const View& grad_key_sub,
                       const View& grad_value_sub, const ConstSelection& selection, const View& grad_query,
                       const View& grad_key, const View& grad_value) const {
    cuda::gather_backward(layout, grad_query_sub, grad_key_sub, grad_value_sub, selection, grad_query, grad_key,
                          grad_value, stream_);
  }
  void scatter(const Layout& layout, const View& output_sub, const ConstSelection& selection,
               const View& output) const {
    cuda::scatter(layout, output_sub, selection, output, stream_);
  }
  void scatter_backward(const Layout& layout, const View& grad_output, const ConstSelection& selection,
                        const View& grad_output_sub) const {
    const Scratch scratch(like_, cuda::scatter_backward_workspace(layout, grad_output));
    cuda::scatter_backward(layout, grad_output, selection, grad_output_sub, scratch.workspace, stream_);
  }

 private:
  // Torch's memory, which it hands on to what is enqueued later on this stream.
  struct Scratch {
    Scratch(const Tensor& like, int64_t bytes) {
      if (bytes == 0) return;
      tensor.emplace(torch::stable::new_empty(like, std::array{bytes}, ScalarType::Byte));
      workspace = {tensor->data_ptr(), bytes};
    }
    std::optional<Tensor> tensor;
    cuda::Workspace workspace;
  };

  // Asked before anything else: another device's index would be taken for a GPU's.
  static int32_t index_of(const Tensor& tensor) {
    require(tensor.is_cuda(), "the first tensor is not on a CUDA device, another one is: all must be on one");
    return tensor.get_device_index();
  }

  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_;
};

#endif

}  // namespace lighthouse::bindings
