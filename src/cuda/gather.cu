// Tokens to chosen entries, and the gradient back (METHOD 1 and 7). The three tensors go in one launch.

#include "core/check.h"
#include "cuda/windows.cuh"
#include "lighthouse/cuda.h"

namespace lighthouse::cuda {

int64_t workspace_bytes(const GatherArgs& args) {
  return sum_workspace(pairs_of(args), args.selection.sequences, rules::kPooling);
}

void run(const GatherArgs& args, const Workspace& workspace, Stream stream) {
  check(args);
  sum_windows(pairs_of(args), args.selection, rules::kPooling, workspace, stream);
}

void run(const GatherBackwardArgs& args, const Workspace&, Stream stream) {
  check(args);
  spread_windows(pairs_of(args), args.selection, rules::kPooling, stream);
}

}  // namespace lighthouse::cuda
