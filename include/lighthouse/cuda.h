// The four verbs of the method on a CUDA device, and the gradients of two of them: cpu.h on device memory.
//
// Everything is enqueued on the caller's stream and device; nothing synchronises, allocates or uses atomics, so the
// calls can be captured into a graph and give the same bits on every run. float32, bfloat16 and float16; head_dim a
// multiple of 8 up to 256. Errors: std::invalid_argument before anything is enqueued, std::runtime_error with CUDA's
// own words when a launch fails.
#pragma once

#include <cstdint>

#include "lighthouse/plan.h"
#include "lighthouse/selection.h"
#include "lighthouse/view.h"

namespace lighthouse::cuda {

using Stream = void*;  // a cudaStream_t

// Scratch memory of the caller's, at least as many bytes as the function of the same name with _workspace says.
struct Workspace {
  void* data = nullptr;
  int64_t bytes = 0;
};

void score(const ConstView& query, const ConstView& key, float* query_score, float* key_score, Stream stream);

int64_t select_workspace(const Plan& plan, int64_t kv_heads);
void select(const Plan& plan, const float* query_score, const float* key_score, const Selection& selection,
            const Workspace& workspace, Stream stream);

int64_t gather_workspace(const Layout& layout, const ConstView& query, const ConstView& key);
void gather(const Layout& layout, const ConstView& query, const ConstView& key, const ConstView& value,
            const ConstSelection& selection, const View& query_sub, const View& key_sub, const View& value_sub,
            const Workspace& workspace, Stream stream);

void gather_backward(const Layout& layout, const ConstView& grad_query_sub, const ConstView& grad_key_sub,
                     const ConstView& grad_value_sub, const ConstSelection& selection, const View& grad_query,
                     const View& grad_key, const View& grad_value, Stream stream);

void scatter(const Layout& layout, const ConstView& output_sub, const ConstSelection& selection, const View& output,
             Stream stream);

int64_t scatter_backward_workspace(const Layout& layout, const ConstView& grad_output);
void scatter_backward(const Layout& layout, const ConstView& grad_output, const ConstSelection& selection,
                      const View& grad_output_sub, const Workspace& workspace, Stream stream);

}  // namespace lighthouse::cuda
