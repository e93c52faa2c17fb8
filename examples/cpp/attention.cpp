// Lighthouse attention on plain arrays, forward and backward, without a framework.
// Prints what was found; returns 1 when something is wrong.
#include <array>
#include <cmath>
#include <cstdio>
#include <vector>

#include "lighthouse/attention.h"

using namespace lighthouse;

constexpr int64_t kTokens = 1000, kHeads = 4, kKvHeads = 2, kHeadDim = 16;

struct Array {  // [1, heads, tokens, head_dim]
  std::array<int64_t, 4> sizes;
  std::vector<float> numbers;

  explicit Array(int64_t heads) : sizes{1, heads, kTokens, kHeadDim} {
    static int count = 0;
    while (std::ssize(numbers) < heads * kTokens * kHeadDim) {
      ++count;
      numbers.push_back(std::sin(static_cast<float>(count) * static_cast<float>(count % 1009)));
    }
  }
  operator View() { return {numbers.data(), DType::float32, sizes, contiguous_strides(sizes)}; }
  operator ConstView() { return static_cast<View>(*this); }
};

double dot(const Array& a, const Array& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.numbers.size(); ++i) sum += a.numbers[i] * b.numbers[i];
  return sum;
}

int main() {
  const Pyramid pyramid = Pyramid::from_windows(std::array<int64_t, 3>{1, 4, 16});
  const Sequences sequences = Sequences::of_rows(
      1, kTokens, {.pyramid = pyramid, .topk = TopK::share(1, 64), .local_window = 64});  // 0: the published method
  const ThreadExecutor threads(2);
  Array query(kHeads), key(kKvHeads), value(kKvHeads), output(kHeads);
  Array grad_output(kHeads), grad_query(kHeads), grad_key(kKvHeads), grad_value(kKvHeads);

  const auto state = cpu::attention_forward({.sequences = sequences,
                                             .query = query,
                                             .key = key,
                                             .value = value,
                                             .output = output,
                                             .inner = cpu::causal_attention(threads)},
                                            threads);
  cpu::attention_backward(
      *state, {.grad_output = grad_output, .grad_query = grad_query, .grad_key = grad_key, .grad_value = grad_value});

  // Token 0 sees itself alone, in the pyramid and in the window, so its output is twice its value; and the output is
  // linear in the values.
  const float first = std::fabs(output.numbers[0] - 2 * value.numbers[0]);
  const double forth = dot(output, grad_output), back = dot(value, grad_value);
  const bool right = first < 1e-6F && std::fabs(forth - back) < 1e-4 * (1.0 + std::fabs(forth));
  std::printf(
      "%s\n<output, grad_output> = %.5f, <value, grad_value> = %.5f, token 0 differs from twice its value by %g: %s\n",
      sequences.str().c_str(), forth, back, static_cast<double>(first), right ? "right" : "WRONG");
  return right ? 0 : 1;
}
