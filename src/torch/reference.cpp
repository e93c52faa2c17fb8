// The oracle for Python: operators on contiguous float64 tensors, for comparing, not for use.

#include "lighthouse/reference.h"

#include <tuple>

#include "core/check.h"
#include "torch/tensors.h"

namespace lighthouse::bindings {
namespace {

const double* numbers(const char* argument, const Tensor& tensor) {
  require(tensor.scalar_type() == ScalarType::Double && tensor.dim() == 4 && tensor.is_contiguous(), argument,
          " must be a contiguous float64 tensor [batch, heads, tokens, head_dim]");
  return static_cast<const double*>(tensor.data_ptr());
}

double* new_numbers(Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

Sequences sequences_of(const Tensor& scores, const std::vector<int64_t>& windows, int64_t numerator,
                       int64_t denominator, bool cover_start, int64_t local_window) {
  require_choice_sizes("query_score", scores);
  return Sequences::of_rows(scores.size(0), scores.size(2),
                            {.pyramid = Pyramid::from_windows(windows),
                             .topk = topk_of(numerator, denominator),
                             .cover_start = cover_start,
                             .local_window = local_window});
}

const float* scores_of(const char* argument, const Tensor& scores) {
  return data_of<float>(argument, scores, ScalarType::Float, "float32");
}

// The oracle's loops follow these sizes without looking.
reference::AttentionArgs checked_args(const Sequences& sequences, const Tensor& query, const Tensor& key,
                                      const Tensor& value, const Tensor& query_score, const Tensor& key_score,
                                      double scale) {
  const View query_view = view_of("query", query), key_view = view_of("key", key);
  require_choice_sizes("query_score", query_score);
  require_same_sizes("key", key, "value", value);
  require_same_sizes("query_score", query_score, "key_score", key_score);
  check_view("query", query_view, query_view);
  check_view("key", key_view, query_view);
  check_heads(query_view.heads(), key_view.heads());
  check_sizes("query", query_view, query_score.size(0), query_view.heads(), query_score.size(2));
  check_sizes("key", key_view, query_score.size(0), query_score.size(1), query_score.size(2));
  return {.sequences = sequences,
          .shape = {query_view.heads(), key_view.heads(), query_view.head_dim()},
          .query = numbers("query", query),
          .key = numbers("key", key),
          .value = numbers("value", value),
          .query_score = scores_of("query_score", query_score),
          .key_score = scores_of("key_score", key_score),
          .scale = scale};
}

// [entries, 2]: level and index in causal order, of one sequence and key-value head.
Tensor reference_select(Tensor query_score, Tensor key_score, std::vector<int64_t> windows, int64_t numerator,
                        int64_t denominator, bool cover_start, int64_t batch, int64_t head) {
  const Sequences sequences = sequences_of(query_score, windows, numerator, denominator, cover_start, 0);
  require_same_sizes("query_score", query_score, "key_score", key_score);
  require(0 <= batch && batch < query_score.size(0) && 0 <= head && head < query_score.size(1), "batch=", batch,
          ", head=", head, ": outside of the scores");
  const int64_t start = (batch * query_score.size(1) + head) * query_score.size(2);
  const auto entries =
      reference::select(sequences.method, sequences.at(batch), scores_of("query_score", query_score) + start,
                        scores_of("key_score", key_score) + start);
  const std::array<int64_t, 2> sizes{static_cast<int64_t>(entries.size()), 2};
  Tensor result = torch::stable::new_empty(query_score, sizes, ScalarType::Long);
  auto* out = static_cast<int64_t*>(result.data_ptr());
  for (const auto& entry : entries) {
    *out++ = entry.level;
    *out++ = entry.index;
  }
  return result;
}

Tensor reference_attention(Tensor query, Tensor key, Tensor value, Tensor query_score, Tensor key_score,
                           std::vector<int64_t> windows, int64_t numerator, int64_t denominator, bool cover_start,
                           double scale, int64_t local_window) {
  const Sequences sequences = sequences_of(query_score, windows, numerator, denominator, cover_start, local_window);
  const auto args = checked_args(sequences, query, key, value, query_score, key_score, scale);
  Tensor output = torch::stable::empty_like(query);
  reference::attention(args, new_numbers(output));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> reference_attention_backward(Tensor query, Tensor key, Tensor value,
                                                                Tensor query_score, Tensor key_score,
                                                                std::vector<int64_t> windows, int64_t numerator,
                                                                int64_t denominator, bool cover_start, double scale,
                                                                Tensor grad_output, int64_t local_window) {
  const Sequences sequences = sequences_of(query_score, windows, numerator, denominator, cover_start, local_window);
  const auto args = checked_args(sequences, query, key, value, query_score, key_score, scale);
  require_same_sizes("query", query, "grad_output", grad_output);
  Tensor grad_query = torch::stable::empty_like(query), grad_key = torch::stable::empty_like(key),
         grad_value = torch::stable::empty_like(value);
  reference::attention_backward(args, numbers("grad_output", grad_output), new_numbers(grad_query),
                                new_numbers(grad_key), new_numbers(grad_value));
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace lighthouse::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(lighthouse, library) {
  library.def(
      "reference_select(Tensor query_score, Tensor key_score, int[] windows, int topk_numerator, int topk_denominator, "
      "bool cover_start, int batch, int head) -> Tensor");
  library.def(
      "reference_attention(Tensor query, Tensor key, Tensor value, Tensor query_score, Tensor key_score, "
      "int[] windows, int topk_numerator, int topk_denominator, bool cover_start, float scale, "
      "int local_window=0) -> Tensor");
  library.def(
      "reference_attention_backward(Tensor query, Tensor key, Tensor value, Tensor query_score, Tensor key_score, "
      "int[] windows, int topk_numerator, int topk_denominator, bool cover_start, float scale, Tensor grad_output, "
      "int local_window=0)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lighthouse, CPU, library) {
  using namespace lighthouse::bindings;
  library.impl("reference_select", TORCH_BOX(&reference_select));
  library.impl("reference_attention", TORCH_BOX(&reference_attention));
  library.impl("reference_attention_backward", TORCH_BOX(&reference_attention_backward));
}
