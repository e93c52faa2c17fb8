// Tokens to chosen entries, and the gradient back (METHOD 1 and 7). The three tensors go in one parallel loop.

#include <array>

#include "core/check.h"
#include "cpu/windows.h"
#include "lighthouse/cpu.h"

namespace lighthouse::cpu {

void gather(const Layout& layout, const ConstView& query, const ConstView& key, const ConstView& value,
            const ConstSelection& selection, const View& query_sub, const View& key_sub, const View& value_sub,
            const Executor& executor) {
  check_pair("query", query, "query_sub", query_sub, query, layout, selection);
  check_pair("key", key, "key_sub", key_sub, query, layout, selection);
  check_pair("value", value, "value_sub", value_sub, query, layout, selection);
  check_sizes("key", key, layout.rows, selection.kv_heads, layout.tokens);
  check_sizes("value", value, layout.rows, selection.kv_heads, layout.tokens);
  const std::array<TokensToEntries, 3> tensors{{{query, query_sub}, {key, key_sub}, {value, value_sub}}};
  sum_windows(layout, kPooling, tensors, selection, executor);
}

void gather_backward(const Layout& layout, const ConstView& grad_query_sub, const ConstView& grad_key_sub,
                     const ConstView& grad_value_sub, const ConstSelection& selection, const View& grad_query,
                     const View& grad_key, const View& grad_value, const Executor& executor) {
  check_pair("grad_query", grad_query, "grad_query_sub", grad_query_sub, grad_query, layout, selection);
  check_pair("grad_key", grad_key, "grad_key_sub", grad_key_sub, grad_query, layout, selection);
  check_pair("grad_value", grad_value, "grad_value_sub", grad_value_sub, grad_query, layout, selection);
  check_sizes("grad_key", grad_key, layout.rows, selection.kv_heads, layout.tokens);
  check_sizes("grad_value", grad_value, layout.rows, selection.kv_heads, layout.tokens);
  const std::array<EntriesToTokens, 3> tensors{
      {{grad_query_sub, grad_query}, {grad_key_sub, grad_key}, {grad_value_sub, grad_value}}};
  spread_windows(layout, kPooling, tensors, selection, executor);
}

}  // namespace lighthouse::cpu
