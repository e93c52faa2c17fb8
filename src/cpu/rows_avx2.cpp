// The row functions compiled for AVX2 (cmake sets the flags); nothing inline from outside may be called here.
#include "cpu/rows_kernels.h"

namespace lighthouse::cpu {

constinit const RowTable kRowsAvx2 = {"AVX2", row_functions<float, float>(), row_functions<double, double>(),
                                      row_functions<BFloat16, float>(), row_functions<Half, float>()};

}  // namespace lighthouse::cpu
