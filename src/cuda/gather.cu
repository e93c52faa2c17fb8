// Tokens to chosen entries, and the gradient back (METHOD 1 and 7). The three tensors go in one launch.

#include "core/check.h"
#include "cuda/windows.cuh"

namespace lighthouse::cuda {

int64_t gather_workspace(const Layout& layout, const ConstView& query, const ConstView& key) {
  return sum_workspace(layout, kPooling, query.heads() + 2 * key.heads(), query.head_dim());
}

void gather(const Layout& layout, const ConstView& query, const ConstView& key, const ConstView& value,
            const ConstSelection& selection, const View& query_sub, const View& key_sub, const View& value_sub,
            const Workspace& workspace, Stream stream) {
  check_pair("query", query, "query_sub", query_sub, query, layout, selection);
  check_pair("key", key, "key_sub", key_sub, query, layout, selection);
  check_pair("value", value, "value_sub", value_sub, query, layout, selection);
  check_sizes("key", key, layout.rows, selection.kv_heads, layout.tokens);
  check_sizes("value", value, layout.rows, selection.kv_heads, layout.tokens);
  const Pair pairs[] = {{query, query_sub}, {key, key_sub}, {value, value_sub}};
  sum_windows(layout, kPooling, pairs, 3, selection, workspace, stream);
}

void gather_backward(const Layout& layout, const ConstView& grad_query_sub, const ConstView& grad_key_sub,
                     const ConstView& grad_value_sub, const ConstSelection& selection, const View& grad_query,
                     const View& grad_key, const View& grad_value, Stream stream) {
  check_pair("grad_query", grad_query, "grad_query_sub", grad_query_sub, grad_query, layout, selection);
  check_pair("grad_key", grad_key, "grad_key_sub", grad_key_sub, grad_query, layout, selection);
  check_pair("grad_value", grad_value, "grad_value_sub", grad_value_sub, grad_query, layout, selection);
  check_sizes("grad_key", grad_key, layout.rows, selection.kv_heads, layout.tokens);
  check_sizes("grad_value", grad_value, layout.rows, selection.kv_heads, layout.tokens);
  const Pair pairs[] = {{grad_query_sub, grad_query}, {grad_key_sub, grad_key}, {grad_value_sub, grad_value}};
  spread_windows(layout, kPooling, pairs, 3, selection, stream);
}

}  // namespace lighthouse::cuda
