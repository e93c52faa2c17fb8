// Chosen entries' outputs back to the tokens they stand for, and the gradient (METHOD 6 and 7).

#include "core/check.h"
#include "cpu/windows.h"
#include "lighthouse/cpu.h"

namespace lighthouse::cpu {

void run(const ScatterArgs& args, const Executor& executor) {
  check(args);
  spread_windows(pairs_of(args), args.selection, rules::kWriteBack, executor);
}

void run(const ScatterBackwardArgs& args, const Executor& executor) {
  check(args);
  sum_windows(pairs_of(args), args.selection, rules::kWriteBack, executor);
}

}  // namespace lighthouse::cpu
