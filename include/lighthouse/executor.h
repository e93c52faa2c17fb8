// Who runs the loops. The core owns no threads: every CPU function takes an executor, so a host program's own
// pool (torch's, say) does the work, and the result has the same bits whatever that pool does.
#pragma once

#include <cstdint>
#include <functional>

namespace lighthouse {

class Executor {
 public:
  virtual ~Executor() = default;

  // Calls body(first, last) for pieces that together make up [begin, end), each at least `grain` long except the
  // last; pieces may run at the same time. Returns when all are done; rethrows what a piece threw.
  virtual void parallel_for(int64_t begin, int64_t end, int64_t grain,
                            const std::function<void(int64_t, int64_t)>& body) const = 0;
};

// std::thread workers, started for each call: for programs without a pool of their own.
class ThreadExecutor final : public Executor {
 public:
  explicit ThreadExecutor(int threads);  // throws std::invalid_argument below 1
  void parallel_for(int64_t begin, int64_t end, int64_t grain,
                    const std::function<void(int64_t, int64_t)>& body) const override;

 private:
  int threads_;
};

}  // namespace lighthouse
