// Sizes at which a kernel goes on in steps of its grid, or an offset outgrows 32 bits: minutes, and much memory.
#include "cuda_chain.h"

namespace lighthouse::test {
namespace {

struct LargeCase : Named {
  Problem problem;
  Memory memory;
};

class CudaLarge : public testing::TestWithParam<LargeCase> {
 protected:
  void SetUp() override { skip_without(cuda_device()); }
};

TEST_P(CudaLarge, ChainHasTheBitsOfTheCpu) {
  const Chain chain(GetParam().problem, DType::bfloat16, GetParam().memory);
  const int64_t needed = chain.bytes() + chain.workspace_bytes() + (int64_t{1} << 28);
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total));
  if (static_cast<int64_t>(free) < needed) {
    GTEST_SKIP() << "needs " << (needed >> 20) << " MiB of the GPU's memory; " << (free >> 20) << " are free";
  }
  std::unique_ptr<std::byte[]> expected;
  try {
    expected = chain.run_on_cpu(1);
  } catch (const std::bad_alloc&) {
    GTEST_SKIP() << "needs " << (chain.bytes() >> 20) << " MiB of the host's memory";
  }
  const CudaChain on_cuda(chain);
  on_cuda.reset(expected.get());
  on_cuda.enqueue(nullptr);
  on_cuda.expect_same(expected.get());
}

// A launch takes 65,535 blocks along rows and along pieces of a sequence.
const Problem kRows{{}, 70000, 2, 1, 20, 8, {1, 4, 16}, TopK::count(1)};
const Problem kPieces{{}, 1, 1, 1, 2200001, 32, {1, 2}, TopK::share(1, 64)};  // in unaligned rows
// More than 2^31 elements: 8 heads of 2^20 tokens; 2 heads in unaligned rows with 65,538 windows longer than a thread
// sums.
const Problem kElements{{}, 1, 8, 1, 1048583, 256, {1, 4, 16}, TopK::share(1, 64)};
const Problem kElementsInLongWindows{{}, 1, 2, 1, 65538 * 128 + 5, 128, {1, 128}, TopK::share(1, 1024)};

const LargeCase kLargeCases[] = {
    {"more_rows_than_blocks", kRows, Memory::packed},
    {"more_unaligned_rows_than_blocks", kRows, Memory::gaps},
    {"more_pieces_than_blocks", kPieces, Memory::gaps},
    {"more_than_2_31_elements", kElements, Memory::packed},
    {"more_than_2_31_elements_transposed", kElements, Memory::transposed},
    {"more_than_2_31_elements_in_long_windows", kElementsInLongWindows, Memory::gaps},
};

INSTANTIATE_TEST_SUITE_P(Cases, CudaLarge, testing::ValuesIn(kLargeCases), case_name);

}  // namespace
}  // namespace lighthouse::test
