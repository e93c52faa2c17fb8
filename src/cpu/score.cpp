// Scores of tokens: the largest query norm of the group, the key's norm (METHOD 2).

#include <algorithm>

#include "core/check.h"
#include "cpu/rows.h"
#include "lighthouse/cpu.h"
#include "rules/picking.h"

namespace lighthouse::cpu {
namespace {

constexpr int64_t kNumbersPerPiece = 64 * 1024;

template <class T>
const T* row_at(const ConstView& view, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const T*>(view.data) + batch * view.strides[0] + head * view.strides[1] +
         token * view.strides[2];
}

}  // namespace

void score(const ConstView& query, const ConstView& key, float* query_score, float* key_score,
           const Executor& executor) {
  check_view("query", query, query);
  check_view("key", key, query);
  check_heads(query.heads(), key.heads());
  check_sizes("key", key, query.batch(), key.heads(), query.tokens());
  require(query_score != nullptr && key_score != nullptr, "scores have no data");

  const int64_t tokens = key.tokens(), heads = key.heads(), group = query.heads() / heads, n = key.head_dim();
  const int64_t grain = std::max<int64_t>(1, kNumbersPerPiece / ((group + 1) * n));
  visit(query.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto norm = rows().of<T>().norm;
    executor.parallel_for(0, key.batch() * heads * tokens, grain, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t batch = item / tokens / heads, head = item / tokens % heads, token = item % tokens;
        float largest = norm(row_at<T>(query, batch, head * group, token), n);
        for (int64_t member = 1; member < group; ++member) {
          largest = rules::larger_score(largest, norm(row_at<T>(query, batch, head * group + member, token), n));
        }
        query_score[item] = largest;
        key_score[item] = norm(row_at<T>(key, batch, head, token), n);
      }
    });
  });
}

}  // namespace lighthouse::cpu
