// Chosen entries' outputs back to the tokens they stand for, and the gradient (METHOD 6 and 7).

#include "core/check.h"
#include "cuda/windows.cuh"
#include "lighthouse/cuda.h"

namespace lighthouse::cuda {

void run(const ScatterArgs& args, const Workspace&, Stream stream) {
  check(args);
  spread_windows(pairs_of(args), args.selection, rules::kWriteBack, stream);
}

int64_t workspace_bytes(const ScatterBackwardArgs& args) {
  return sum_workspace(pairs_of(args), args.selection.sequences, rules::kWriteBack);
}

void run(const ScatterBackwardArgs& args, const Workspace& workspace, Stream stream) {
  check(args);
  sum_windows(pairs_of(args), args.selection, rules::kWriteBack, workspace, stream);
}

}  // namespace lighthouse::cuda
