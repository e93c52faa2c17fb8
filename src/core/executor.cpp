// Threads started for each call. What a piece throws is kept until all have ended: it must not leave its thread.

#include "lighthouse/executor.h"

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

#include "core/require.h"

namespace lighthouse {

ThreadExecutor::ThreadExecutor(int threads) : threads_(threads) {
  require(threads >= 1, "threads=", threads, ": at least one is needed");
}

void ThreadExecutor::parallel_for(int64_t begin, int64_t end, int64_t grain,
                                  const std::function<void(int64_t, int64_t)>& body) const {
  if (begin >= end) return;
  const int64_t total = end - begin;
  const int64_t pieces = std::clamp<int64_t>(total / std::max<int64_t>(1, grain), 1, threads_);
  std::vector<std::exception_ptr> failures(static_cast<size_t>(pieces));
  const auto run = [&](int64_t piece) {
    try {
      // The first `total % pieces` pieces are one longer.
      const auto bound = [&](int64_t i) { return begin + i * (total / pieces) + std::min(i, total % pieces); };
      body(bound(piece), bound(piece + 1));
    } catch (...) {
      failures[static_cast<size_t>(piece)] = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> workers;  // joined on leaving, also when a start fails
    for (int64_t piece = 1; piece < pieces; ++piece) workers.emplace_back(run, piece);
    run(0);
  }
  for (const auto& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

}  // namespace lighthouse
