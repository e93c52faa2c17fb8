// The verbs on a CUDA device: cpu.h on device memory.
//
// Everything is enqueued on the caller's stream and device; nothing synchronises, allocates or uses atomics, so the
// calls can be captured into a graph and give the same bits on every run. float32, bfloat16 and float16; head_dim a
// multiple of 8 up to 256. Errors: std::invalid_argument before anything is enqueued, std::runtime_error with CUDA's
// own words when a launch fails.
#pragma once

#include <cstdint>

#include "lighthouse/verbs.h"

namespace lighthouse::cuda {

inline constexpr int64_t kHeadDimStep = 8, kMaxHeadDim = 256;

using Stream = void*;  // a cudaStream_t

// Scratch memory of the caller's: at least workspace_bytes of the same arguments.
struct Workspace {
  void* data = nullptr;
  int64_t bytes = 0;
};

int64_t workspace_bytes(const SelectArgs& args);
int64_t workspace_bytes(const GatherArgs& args);
int64_t workspace_bytes(const ScatterBackwardArgs& args);
constexpr int64_t workspace_bytes(const ScoreArgs&) { return 0; }
constexpr int64_t workspace_bytes(const GatherBackwardArgs&) { return 0; }
constexpr int64_t workspace_bytes(const ScatterArgs&) { return 0; }

void run(const ScoreArgs& args, const Workspace& workspace, Stream stream);
void run(const SelectArgs& args, const Workspace& workspace, Stream stream);
void run(const GatherArgs& args, const Workspace& workspace, Stream stream);
void run(const GatherBackwardArgs& args, const Workspace& workspace, Stream stream);
void run(const ScatterArgs& args, const Workspace& workspace, Stream stream);
void run(const ScatterBackwardArgs& args, const Workspace& workspace, Stream stream);

}  // namespace lighthouse::cuda
