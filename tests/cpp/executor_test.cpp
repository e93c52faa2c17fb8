// The executor's contract: the range once and whole, pieces of at least the grain, exceptions to the caller.
#include "support.h"

#include <atomic>
#include <mutex>

namespace lighthouse::test {
namespace {

struct Range : Named {
  int threads;
  int64_t begin, end, grain;
};

class Executors : public testing::TestWithParam<Range> {};

TEST_P(Executors, CoverTheRangeOnce) {
  const Range& range = GetParam();
  const ThreadExecutor threads(range.threads);
  const BackwardExecutor backward;
  for (const Executor* executor : {static_cast<const Executor*>(&threads), static_cast<const Executor*>(&backward)}) {
    std::mutex mutex;
    std::vector<std::pair<int64_t, int64_t>> pieces;
    executor->parallel_for(range.begin, range.end, range.grain, [&](int64_t first, int64_t last) {
      const std::lock_guard lock(mutex);
      pieces.emplace_back(first, last);
    });
    std::sort(pieces.begin(), pieces.end());
    int64_t next = range.begin;
    for (const auto& [first, last] : pieces) {
      EXPECT_EQ(first, next);
      EXPECT_LT(first, last);
      EXPECT_TRUE(last - first >= range.grain || last == range.end) << first << " to " << last;
      next = last;
    }
    EXPECT_EQ(next, std::max(range.begin, range.end));
  }
}

const Range kExecutorsCases[] = {
    {"one_thread", 1, 0, 100, 1},
    {"two_threads", 2, 0, 100, 1},
    {"more_threads_than_work", 16, 0, 5, 1},
    {"grain_larger_than_the_range", 4, 0, 5, 100},
    {"grain_that_does_not_divide", 3, 0, 100, 33},
    {"grain_just_over_half", 2, 0, 100, 51},
    {"grain_of_zero", 3, 0, 10, 0},
    {"start_above_zero", 3, 1000, 1017, 4},
    {"one_item", 4, 7, 8, 1},
    {"far_numbers", 3, (int64_t{1} << 40) - 5, (int64_t{1} << 40) + 5, 1},
};

INSTANTIATE_TEST_SUITE_P(Cases, Executors, testing::ValuesIn(kExecutorsCases), case_name);

TEST(ThreadExecutor, DoesNothingOnAnEmptyRange) {
  bool called = false;
  ThreadExecutor(3).parallel_for(5, 5, 1, [&](int64_t, int64_t) { called = true; });
  ThreadExecutor(3).parallel_for(5, 4, 1, [&](int64_t, int64_t) { called = true; });
  EXPECT_FALSE(called);
}

TEST(ThreadExecutor, RethrowsAfterAllPiecesAreDone) {
  for (const int64_t failing : {0, 1, 2}) {
    std::atomic<int> done = 0;
    try {
      ThreadExecutor(3).parallel_for(0, 3, 1, [&](int64_t first, int64_t) {
        ++done;
        if (first == failing) {
          throw std::runtime_error("piece " + std::to_string(first));
        }
      });
      FAIL() << "nothing was thrown";
    } catch (const std::runtime_error& error) {
      EXPECT_EQ(error.what(), "piece " + std::to_string(failing));
    }
    EXPECT_EQ(done, 3);
  }
}

TEST(ThreadExecutor, RethrowsOneOfSeveral) {
  EXPECT_THROW(ThreadExecutor(3).parallel_for(0, 3, 1, [](int64_t, int64_t) { throw std::runtime_error("all"); }),
               std::runtime_error);
}

TEST(ThreadExecutor, RefusesFewerThanOneThread) {
  expect_refused([] { ThreadExecutor(0); }, {"threads=0", "at least one"});
  expect_refused([] { ThreadExecutor(-2); }, {"threads=-2", "at least one"});
}

}  // namespace
}  // namespace lighthouse::test
