// Which instruction set is in use: asked of the CPU once, at the first call. All of them give the same bits.

#include "cpu/rows.h"

namespace lighthouse::cpu {

std::vector<const RowTable*> available_rows() {
  std::vector<const RowTable*> tables{&kRowsBase};
#if defined(LIGHTHOUSE_X86)
  __builtin_cpu_init();
  // Every CPU with AVX2 has F16C, which clang cannot ask for.
  if (__builtin_cpu_supports("avx2")) tables.push_back(&kRowsAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    tables.push_back(&kRowsAvx512);
  }
#endif
  return tables;
}

const RowTable& rows() {
  static const RowTable& best = *available_rows().back();
  return best;
}

}  // namespace lighthouse::cpu
