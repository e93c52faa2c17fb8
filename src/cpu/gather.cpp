// Tokens to chosen entries, and the gradient back (METHOD 1 and 7). The three tensors go in one parallel loop.

#include "core/check.h"
#include "cpu/windows.h"
#include "lighthouse/cpu.h"

namespace lighthouse::cpu {

void run(const GatherArgs& args, const Executor& executor) {
  check(args);
  sum_windows(pairs_of(args), args.selection, rules::kPooling, executor);
}

void run(const GatherBackwardArgs& args, const Executor& executor) {
  check(args);
  spread_windows(pairs_of(args), args.selection, rules::kPooling, executor);
}

}  // namespace lighthouse::cpu
