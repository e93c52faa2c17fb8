// The two directions between tokens and chosen entries on the GPU; cpu/windows.h says what they are.
#pragma once

#include "cuda/device.cuh"
#include "lighthouse/cuda.h"
#include "rules/order.h"

namespace lighthouse::cuda {

struct WindowRule {
  rules::Reach reach;
  bool mean;  // divided by the window's full length
};

inline constexpr WindowRule kPooling{rules::Reach::pooled, true};
inline constexpr WindowRule kWriteBack{rules::Reach::written, false};

inline constexpr int kMaxTensors = 3;

struct Pair {
  ConstView source;
  View target;
};

// Tokens to entries: every chosen entry of the target is the sum (or mean) of the source's tokens that it reaches.
int64_t sum_workspace(const Layout& layout, WindowRule rule, int64_t heads, int64_t head_dim);
void sum_windows(const Layout& layout, WindowRule rule, const Pair* pairs, int count, const ConstSelection& selection,
                 const Workspace& workspace, Stream stream);

// Entries to tokens: every token of the target is the sum of the source's chosen entries that reach it, each (for a
// mean) divided by its window's length.
void spread_windows(const Layout& layout, WindowRule rule, const Pair* pairs, int count,
                    const ConstSelection& selection, Stream stream);

}  // namespace lighthouse::cuda
