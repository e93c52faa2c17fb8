// The two directions between tokens and chosen entries on the GPU; cpu/windows.h says what they are.
#pragma once

#include <span>

#include "core/check.h"
#include "cuda/device.cuh"
#include "lighthouse/cuda.h"
#include "rules/order.h"

namespace lighthouse::cuda {

inline constexpr int kMaxPairs = 3;

// Tokens to entries.
int64_t sum_workspace(std::span<const Pair> pairs, const Sequences& sequences, rules::WindowRule rule);
void sum_windows(std::span<const Pair> pairs, const ConstSelection& selection, rules::WindowRule rule,
                 const Workspace& workspace, Stream stream);

// Entries to tokens, plus what is added; for a mean each entry is divided by its window's length.
void spread_windows(std::span<const Pair> pairs, const ConstSelection& selection, rules::WindowRule rule,
                    Stream stream);

}  // namespace lighthouse::cuda
