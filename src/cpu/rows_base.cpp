// The row functions compiled for any CPU.
#include "cpu/rows_kernels.h"

namespace lighthouse::cpu {

constinit const RowTable kRowsBase = {"portable", row_functions<float, float>(), row_functions<double, double>(),
                                      row_functions<BFloat16, float>(), row_functions<Half, float>()};

}  // namespace lighthouse::cpu
