// Chosen entries' outputs back to the tokens they stand for, and the gradient (METHOD 6 and 7).

#include <array>

#include "core/check.h"
#include "cpu/windows.h"
#include "lighthouse/cpu.h"

namespace lighthouse::cpu {

void scatter(const Layout& layout, const ConstView& output_sub, const ConstSelection& selection, const View& output,
             const Executor& executor) {
  check_pair("output", output, "output_sub", output_sub, output_sub, layout, selection);
  spread_windows(layout, kWriteBack, std::array<EntriesToTokens, 1>{{{output_sub, output}}}, selection, executor);
}

void scatter_backward(const Layout& layout, const ConstView& grad_output, const ConstSelection& selection,
                      const View& grad_output_sub, const Executor& executor) {
  check_pair("grad_output", grad_output, "grad_output_sub", grad_output_sub, grad_output, layout, selection);
  sum_windows(layout, kWriteBack, std::array<TokensToEntries, 1>{{{grad_output, grad_output_sub}}}, selection,
              executor);
}

}  // namespace lighthouse::cpu
