// The devices by which the operators run the verbs, with what torch keeps for them: threads, stream, memory. Each
// operator is written once, for any of these.
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
  void check_selection(const ConstSelection& selection) const { cpu::check_selection(selection, kExecutor); }

  template <class Args>
  void run(const Args& args) const {
    cpu::run(args, kExecutor);
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
  void check_selection(const ConstSelection&) const {}

  // The workspace is torch's memory, which it hands on to what is enqueued later on this stream.
  template <class Args>
  void run(const Args& args) const {
    std::optional<Tensor> scratch;
    cuda::Workspace workspace{.bytes = cuda::workspace_bytes(args)};
    if (workspace.bytes > 0) {
      scratch.emplace(torch::stable::new_empty(like_, std::array{workspace.bytes}, ScalarType::Byte));
      workspace.data = scratch->data_ptr();
    }
    cuda::run(args, workspace, stream_);
  }

 private:
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
