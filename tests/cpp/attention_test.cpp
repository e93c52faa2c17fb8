// The whole method, forward and backward, around the plain inner attention: against the oracle, for every dtype.
#include "support.h"

#include "lighthouse/attention.h"

namespace lighthouse::test {
namespace {

using cpu::attention_backward;
using cpu::attention_forward;
using cpu::causal_attention;
using cpu::InnerArgs;
using cpu::InnerAttention;
using cpu::InnerBackwardArgs;
using cpu::Scores;

struct Inputs {
  Tensor query, key, value, grad_output;
};

Inputs random_inputs(const Problem& problem, DType dtype, Memory memory, Random& random) {
  const Sizes q = problem.query_sizes(), kv = problem.kv_sizes();
  const auto make = [&](const Sizes& sizes) { return Tensor(dtype, sizes, memory, random_values(random, sizes)); };
  return {make(q), make(kv), make(kv), make(q)};
}

struct Scored {
  std::vector<float> query, key;
  operator Scores() const { return {query.data(), key.data()}; }
};

Values sum_of(Values a, const Values& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

Scored scores_of(const Problem& problem, const Inputs& in) {
  const auto count = static_cast<size_t>(problem.rows * problem.kv_heads * problem.tokens);
  Scored scored{std::vector<float>(count), std::vector<float>(count)};
  cpu::run(ScoreArgs{in.query, in.key, scored.query.data(), scored.key.data()}, ThreadExecutor(1));
  return scored;
}

struct Outputs {
  Tensor output, grad_query, grad_key, grad_value;
};

Outputs run(const Problem& problem, const Inputs& in, Memory memory, const Executor& executor,
            std::optional<Scores> scores = std::nullopt, double scale = 0.0) {
  const DType dtype = in.query.view().dtype;
  Outputs out{{dtype, problem.query_sizes(), memory},
              {dtype, problem.query_sizes(), memory},
              {dtype, problem.kv_sizes(), memory},
              {dtype, problem.kv_sizes(), memory}};
  const InnerAttention inner = causal_attention(executor, scale);
  const auto state =
      attention_forward({problem.sequences(), in.query, in.key, in.value, out.output, inner, scores}, executor);
  attention_backward(*state, {in.grad_output, out.grad_query, out.grad_key, out.grad_value});
  return out;
}

struct Result {
  Values output, grad_query, grad_key, grad_value;
};

Result empty_result(const Shape& shape, const Sequences& sequences) {
  const int64_t size = sequences.rows * sequences.tokens * shape.head_dim;
  const auto q = static_cast<size_t>(size * shape.query_heads), kv = static_cast<size_t>(size * shape.kv_heads);
  return {Values(q), Values(q), Values(kv), Values(kv)};
}

Result oracle(const Sequences& sequences, const Shape& shape, const Values& query, const Values& key,
              const Values& value, const Values& grad_output, const Scores& scores, double scale) {
  Result result = empty_result(shape, sequences);
  const reference::AttentionArgs args{sequences,    shape,        query.data(), key.data(),
                                      value.data(), scores.query, scores.key,   scale};
  reference::attention(args, result.output.data());
  reference::attention_backward(args, grad_output.data(), result.grad_query.data(), result.grad_key.data(),
                                result.grad_value.data());
  return result;
}

// The same in plain loops whose every tensor is rounded to the dtype: what the dtype costs.
Result plain(const Problem& problem, DType dtype, const Values& query, const Values& key, const Values& value,
             const Values& grad_output, const Choice& choice) {
  Result local = empty_result(problem.shape(), problem.sequences());
  if (problem.local_window > 0) {
    const Sequences alone =
        sequences_of(problem.rows, problem.tokens, pyramid({1}), TopK::count(0), true, problem.local_window);
    local = oracle(alone, problem.shape(), query, key, value, grad_output, {nullptr, nullptr}, 0.0);
    for (Values* values : {&local.output, &local.grad_query, &local.grad_key, &local.grad_value}) {
      *values = rounded(dtype, *values);
    }
  }
  if (!problem.topk.chooses()) return local;
  const Sequences sequences = problem.sequences();
  const int64_t dim = problem.head_dim;
  const auto pooled = [&](const Values& x, int64_t heads) {
    return rounded(dtype, plain_gather(choice, heads, dim, x));
  };
  const auto unpooled = [&](const Values& x, int64_t heads, const Values& added) {
    return rounded(dtype, sum_of(plain_gather_backward(choice, heads, dim, rounded(dtype, x)), added));
  };
  const Values grad_sub = rounded(dtype, plain_scatter_backward(choice, problem.query_heads, dim, grad_output));
  const Sequences dense = sequences_of(problem.rows, sequences.entries, pyramid({1}), TopK::count(1));
  const std::vector<float> zeros(static_cast<size_t>(problem.rows * problem.kv_heads * sequences.entries));
  const Result sub = oracle(dense, problem.shape(), pooled(query, problem.query_heads), pooled(key, problem.kv_heads),
                            pooled(value, problem.kv_heads), grad_sub, {zeros.data(), zeros.data()}, 0.0);
  return {
      rounded(dtype, sum_of(plain_scatter(choice, problem.query_heads, dim, rounded(dtype, sub.output)), local.output)),
      unpooled(sub.grad_query, problem.query_heads, local.grad_query),
      unpooled(sub.grad_key, problem.kv_heads, local.grad_key),
      unpooled(sub.grad_value, problem.kv_heads, local.grad_value)};
}

class Attention : public testing::TestWithParam<Problem> {};

TEST_P(Attention, EqualsTheOracle) {
  const Problem& problem = GetParam();
  const ThreadExecutor executor(2);
  Random random(21);
  const std::pair<DType, std::pair<Memory, Memory>> arguments[] = {
      {DType::float32, {Memory::transposed, Memory::transposed}},
      {DType::float64, {Memory::sliced, Memory::gaps}},
      {DType::bfloat16, {Memory::gaps, Memory::transposed}},
      {DType::float16, {Memory::packed, Memory::sliced}}};
  for (const auto& [dtype, memory] : arguments) {
    SCOPED_TRACE(lighthouse::name(dtype));
    const Inputs in = random_inputs(problem, dtype, memory.first, random);
    const Scored scores = scores_of(problem, in);
    const Outputs ours = run(problem, in, memory.second, executor);
    const Values query = in.query.values(), key = in.key.values(), value = in.value.values();
    const Values grad_output = in.grad_output.values();
    const Result exact = oracle(problem.sequences(), problem.shape(), query, key, value, grad_output, scores, 0.0);
    const Result cost = plain(problem, dtype, query, key, value, grad_output,
                              oracle_choice(problem.sequences(), problem.kv_heads, scores.query, scores.key));
    expect_close(ours.output.values(), exact.output, cost.output, dtype);
    expect_close(ours.grad_query.values(), exact.grad_query, cost.grad_query, dtype);
    expect_close(ours.grad_key.values(), exact.grad_key, cost.grad_key, dtype);
    expect_close(ours.grad_value.values(), exact.grad_value, cost.grad_value, dtype);
    for (const Tensor* tensor : {&ours.output, &ours.grad_query, &ours.grad_key, &ours.grad_value}) {
      EXPECT_TRUE(tensor->gaps_untouched());
    }
  }
}

const Problem kAttentionCases[] = {
    {"defaults", 1, 2, 2, 1024, 32, {1, 4, 16}, TopK::share(1, 64)},
    {"grouped_heads_and_rows", 2, 6, 2, 203, 8, {1, 4, 16}, TopK::count(4)},
    {"one_kv_head", 1, 4, 1, 190, 16, {1, 2, 4, 8}, TopK::count(8)},
    {"without_cover_start", 1, 2, 1, 300, 8, {1, 4, 16}, TopK::count(2), false},
    {"one_token", 1, 2, 1, 1, 8, {1, 4, 16}, TopK::count(1)},
    {"dense_by_one_level", 1, 4, 2, 150, 8, {1}, TopK::count(1)},
    {"dense_by_length", 1, 4, 2, 15, 8, {1, 4, 16}, TopK::count(1)},
    {"everything_chosen", 1, 2, 2, 130, 8, {1, 4, 16}, TopK::share(1, 1)},
    {"windows_of_sixty", 1, 2, 1, 500, 8, {1, 5, 15, 60}, TopK::count(4)},
    {"eight_levels", 1, 2, 1, 700, 8, {1, 2, 4, 8, 16, 32, 64, 128}, TopK::count(2)},
    {"several_strata", 1, 1, 1, 4 * 150, 4, {1, 4}, TopK::count(131)},
    {"local_window", 2, 6, 2, 203, 8, {1, 4, 16}, TopK::count(4), true, 30},
    {"local_window_of_one_token", 1, 2, 1, 100, 8, {1, 4, 16}, TopK::count(2), true, 1},
    {"local_window_of_all_tokens", 1, 4, 2, 90, 8, {1, 4, 16}, TopK::count(2), true, 90},
    {"local_window_beyond_the_sequence", 1, 4, 2, 90, 8, {1, 4, 16}, TopK::count(2), true, int64_t{1} << 31},
    {"local_window_beside_dense", 1, 2, 1, 15, 8, {1, 4, 16}, TopK::count(1), true, 4},
    {"local_window_and_one_token", 1, 2, 1, 1, 8, {1, 4, 16}, TopK::count(1), true, 256},
    {"local_window_alone", 2, 6, 2, 203, 8, {1, 4, 16}, TopK::count(0), true, 30},
    {"local_window_of_all_tokens_alone", 1, 2, 1, 60, 8, {1, 4, 16}, TopK::count(0), true, 64},
};

INSTANTIATE_TEST_SUITE_P(Cases, Attention, testing::ValuesIn(kAttentionCases), case_name);

const Problem kSome{{"some"}, 2, 4, 2, 203, 8, {1, 4, 16}, TopK::count(4)};

TEST(AttentionScores, AreTheCallers) {
  Random random(22);
  const ThreadExecutor executor(2);
  const Inputs in = random_inputs(kSome, DType::float64, Memory::packed, random);
  for (const ScoreKind kind : kScoreKinds) {
    SCOPED_TRACE(name(kind));
    const Scored scores{make_scores(kind, 2 * 2 * 203, random), make_scores(kind, 2 * 2 * 203, random)};
    const Outputs ours = run(kSome, in, Memory::packed, executor, scores);
    const Result exact = oracle(kSome.sequences(), kSome.shape(), in.query.values(), in.key.values(), in.value.values(),
                                in.grad_output.values(), scores, 0.0);
    expect_close(ours.output.values(), exact.output, DType::float64);
    expect_close(ours.grad_key.values(), exact.grad_key, DType::float64);
  }
}

TEST(AttentionScale, IsTheCallers) {
  Random random(23);
  const ThreadExecutor executor(2);
  const Inputs in = random_inputs(kSome, DType::float64, Memory::packed, random);
  const Scored scores = scores_of(kSome, in);
  const Outputs ours = run(kSome, in, Memory::packed, executor, std::nullopt, 0.7);
  const Result exact = oracle(kSome.sequences(), kSome.shape(), in.query.values(), in.key.values(), in.value.values(),
                              in.grad_output.values(), scores, 0.7);
  expect_close(ours.output.values(), exact.output, DType::float64);
  expect_close(ours.grad_query.values(), exact.grad_query, DType::float64);
  expect_close(ours.grad_key.values(), exact.grad_key, DType::float64);
}

TEST(AttentionThreads, HaveTheSameBits) {
  for (const DType dtype : kDTypes) {
    Random random(24);
    const Inputs in = random_inputs(kSome, dtype, Memory::transposed, random);
    const Outputs one = run(kSome, in, Memory::packed, ThreadExecutor(1));
    for (const auto& [name, executor] : executors()) {
      const Outputs other = run(kSome, in, Memory::packed, *executor);
      EXPECT_EQ(one.output.bits(), other.output.bits()) << name;
      EXPECT_EQ(one.grad_query.bits(), other.grad_query.bits()) << name;
      EXPECT_EQ(one.grad_key.bits(), other.grad_key.bits()) << name;
      EXPECT_EQ(one.grad_value.bits(), other.grad_value.bits()) << name;
    }
  }
}

// The state holds copies of the chosen entries alone: the inputs may go between forward and backward.
TEST(AttentionState, NeedsNoInputs) {
  Random random(25);
  const ThreadExecutor executor(2);
  const Inputs in = random_inputs(kSome, DType::float32, Memory::packed, random);
  const Outputs expected = run(kSome, in, Memory::packed, executor);
  const Tensor output(DType::float32, kSome.query_sizes());
  std::shared_ptr<const cpu::AttentionState> state;
  {
    std::optional<Inputs> copies;
    copies.emplace(Inputs{{DType::float32, kSome.query_sizes(), Memory::packed, in.query.values()},
                          {DType::float32, kSome.kv_sizes(), Memory::packed, in.key.values()},
                          {DType::float32, kSome.kv_sizes(), Memory::packed, in.value.values()},
                          in.grad_output});
    state = attention_forward(
        {kSome.sequences(), copies->query, copies->key, copies->value, output, causal_attention(executor)}, executor);
  }
  const Tensor grad_query(DType::float32, kSome.query_sizes()), grad_key(DType::float32, kSome.kv_sizes()),
      grad_value(DType::float32, kSome.kv_sizes());
  for (int times = 0; times < 2; ++times) {
    attention_backward(*state, {in.grad_output, grad_query, grad_key, grad_value});
    EXPECT_EQ(grad_query.bits(), expected.grad_query.bits());
    EXPECT_EQ(grad_key.bits(), expected.grad_key.bits());
    EXPECT_EQ(grad_value.bits(), expected.grad_value.bits());
  }
}

TEST(InnerAttention, GetsTheSubSequence) {
  Random random(26);
  const ThreadExecutor executor(2);
  const Inputs in = random_inputs(kSome, DType::bfloat16, Memory::transposed, random);
  const Tensor output(DType::bfloat16, kSome.query_sizes());
  int calls = 0;
  InnerAttention inner;
  inner.forward = [&](const InnerArgs& args) {
    ++calls;
    EXPECT_EQ(args.query.sizes, kSome.query_sub_sizes());
    EXPECT_EQ(args.key.sizes, kSome.kv_sub_sizes());
    EXPECT_EQ(args.value.sizes, kSome.kv_sub_sizes());
    EXPECT_EQ(args.output.sizes, kSome.query_sub_sizes());
    EXPECT_EQ(args.query.dtype, DType::bfloat16);
    EXPECT_EQ(args.output.dtype, DType::bfloat16);
    causal_attention(executor).forward(args);
  };
  const auto state = attention_forward({kSome.sequences(), in.query, in.key, in.value, output, inner}, executor);
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(output.bits(), run(kSome, in, Memory::packed, executor).output.bits());
  expect_refused(
      [&] {
        attention_backward(*state,
                           {in.grad_output, Tensor(DType::bfloat16, kSome.query_sizes()),
                            Tensor(DType::bfloat16, kSome.kv_sizes()), Tensor(DType::bfloat16, kSome.kv_sizes())});
      },
      {"inner.backward"});
}

TEST(InnerAttention, MayThrow) {
  Random random(27);
  const ThreadExecutor executor(2);
  const Inputs in = random_inputs(kSome, DType::float32, Memory::packed, random);
  const Tensor output(DType::float32, kSome.query_sizes());
  InnerAttention inner;
  inner.forward = [](const InnerArgs&) { throw std::runtime_error("not today"); };
  EXPECT_THROW(attention_forward({kSome.sequences(), in.query, in.key, in.value, output, inner}, executor),
               std::runtime_error);
}

// --- what is refused ------------------------------------------------------------------------------------------------

struct Call {
  Sequences sequences = kSome.sequences();
  Tensor q{DType::float32, kSome.query_sizes(), Memory::packed, Values(2 * 4 * 203 * 8, 1.0)};
  Tensor kv{DType::float32, kSome.kv_sizes(), Memory::packed, Values(2 * 2 * 203 * 8, 1.0)};
  Tensor out{DType::float32, kSome.query_sizes()}, grad_q{DType::float32, kSome.query_sizes()};
  Tensor grad_k{DType::float32, kSome.kv_sizes()}, grad_v{DType::float32, kSome.kv_sizes()};
  ThreadExecutor executor{1};
  int inner_calls = 0;
  InnerAttention inner = causal_attention(executor);
  std::optional<Scores> scores;
  View query = q, key = kv, value = kv, output = out;
  View grad_output = q, grad_query = grad_q, grad_key = grad_k, grad_value = grad_v;
};

struct RefusedCall : Named {
  std::function<void(Call&)> spoil;
  std::vector<std::string_view> words;
};

class ForwardRefuses : public testing::TestWithParam<RefusedCall> {};

TEST_P(ForwardRefuses, BadInput) {
  Call c;
  const auto forward = c.inner.forward;
  c.inner.forward = [&](const InnerArgs& args) {
    ++c.inner_calls;
    forward(args);
  };
  GetParam().spoil(c);
  expect_refused(
      [&] { attention_forward({c.sequences, c.query, c.key, c.value, c.output, c.inner, c.scores}, c.executor); },
      GetParam().words);
  EXPECT_EQ(c.inner_calls, 0);
}

const RefusedCall kForwardRefusesCases[] = {
    {"key_of_another_dtype", [](Call& c) { c.key.dtype = DType::float64; }, {"key", "float64", "float32"}},
    {"output_of_another_dtype", [](Call& c) { c.output.dtype = DType::bfloat16; }, {"output", "bfloat16"}},
    {"heads_that_do_not_divide",
     [](Call& c) { c.key.sizes[1] = c.value.sizes[1] = 3; },
     {"key has 3 heads, query 4: the query heads must be a multiple of the key heads"}},
    {"value_of_other_heads", [](Call& c) { c.value.sizes[1] = 1; }, {"value", "1", "2"}},
    {"value_of_another_head_dim", [](Call& c) { c.value.sizes[3] = 4; }, {"value", "head_dim 4"}},
    {"tokens_that_are_not_the_plans", [](Call& c) { c.query.sizes[2] = 202; }, {"query", "202", "203"}},
    {"rows_that_are_not_the_plans",
     [](Call& c) { c.sequences = sequences_of(3, 203, pyramid({1, 4}), {}); },
     {"query", "2", "3"}},
    {"output_of_another_shape", [](Call& c) { c.output.sizes[1] = 2; }, {"output"}},
    {"last_stride_of_two", [](Call& c) { c.value.strides[3] = 2; }, {"value", "stride 2"}},
    {"no_tokens", [](Call& c) { c.query.sizes[2] = 0; }, {"query", "empty"}},
    {"no_inner_attention", [](Call& c) { c.inner.forward = nullptr; }, {"inner.forward"}},
    {"scores_without_data", [](Call& c) { c.scores.emplace(); }, {"scores", "no data"}},
};

INSTANTIATE_TEST_SUITE_P(Cases, ForwardRefuses, testing::ValuesIn(kForwardRefusesCases), case_name);

class BackwardRefuses : public testing::TestWithParam<RefusedCall> {};

TEST_P(BackwardRefuses, BadInput) {
  Call c;
  const auto backward = c.inner.backward;
  c.inner.backward = [&](const InnerBackwardArgs& args) {
    ++c.inner_calls;
    backward(args);
  };
  const auto state = attention_forward({c.sequences, c.query, c.key, c.value, c.output, c.inner}, c.executor);
  GetParam().spoil(c);
  expect_refused([&] { attention_backward(*state, {c.grad_output, c.grad_query, c.grad_key, c.grad_value}); },
                 GetParam().words);
  EXPECT_EQ(c.inner_calls, 0);
}

const RefusedCall kBackwardRefusesCases[] = {
    {"grad_output_of_another_dtype", [](Call& c) { c.grad_output.dtype = DType::float64; }, {"grad_output", "float64"}},
    {"grad_output_of_another_length", [](Call& c) { c.grad_output.sizes[2] = 200; }, {"grad_output", "200"}},
    {"grad_query_of_another_length", [](Call& c) { c.grad_query.sizes[2] = 200; }, {"grad_query", "200"}},
    {"grad_key_of_other_heads", [](Call& c) { c.grad_key.sizes[1] = 1; }, {"grad_key"}},
    {"grad_value_of_another_head_dim", [](Call& c) { c.grad_value.sizes[3] = 4; }, {"grad_value", "head_dim"}},
    {"grad_value_of_another_dtype", [](Call& c) { c.grad_value.dtype = DType::float16; }, {"grad_value", "float16"}},
    {"grad_key_without_data", [](Call& c) { c.grad_key.data = nullptr; }, {"grad_key", "no data"}},
};

INSTANTIATE_TEST_SUITE_P(Cases, BackwardRefuses, testing::ValuesIn(kBackwardRefusesCases), case_name);

}  // namespace
}  // namespace lighthouse::test
