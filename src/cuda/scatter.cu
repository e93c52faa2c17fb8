// Chosen entries' outputs back to the tokens they stand for, and the gradient (METHOD 6 and 7).

#include "core/check.h"
#include "cuda/windows.cuh"

namespace lighthouse::cuda {

void scatter(const Layout& layout, const ConstView& output_sub, const ConstSelection& selection, const View& output,
             Stream stream) {
  check_pair("output", output, "output_sub", output_sub, output_sub, layout, selection);
  const Pair pairs[] = {{output_sub, output}};
  spread_windows(layout, kWriteBack, pairs, 1, selection, stream);
}

int64_t scatter_backward_workspace(const Layout& layout, const ConstView& grad_output) {
  return sum_workspace(layout, kWriteBack, grad_output.heads(), grad_output.head_dim());
}

void scatter_backward(const Layout& layout, const ConstView& grad_output, const ConstSelection& selection,
                      const View& grad_output_sub, const Workspace& workspace, Stream stream) {
  check_pair("grad_output", grad_output, "grad_output_sub", grad_output_sub, grad_output, layout, selection);
  const Pair pairs[] = {{grad_output, grad_output_sub}};
  sum_windows(layout, kWriteBack, pairs, 1, selection, workspace, stream);
}

}  // namespace lighthouse::cuda
