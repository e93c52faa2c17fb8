// The oracle itself: against dense attention written out here, against finite differences, against choices made by
// hand, and for what METHOD promises of every choice.
#include "support.h"

namespace lighthouse::test {
namespace {

// Causal softmax attention, [heads][tokens][dim], with nothing in common with the oracle but the definition.
Values dense_attention(const Problem& problem, const Values& query, const Values& key, const Values& value) {
  const int64_t tokens = problem.tokens;
  const int64_t dim = problem.head_dim;
  Values output(query.size());
  for (int64_t head = 0; head < problem.rows * problem.query_heads; ++head) {
    const int64_t kv = head / problem.query_heads * problem.kv_heads +
                       head % problem.query_heads / (problem.query_heads / problem.kv_heads);
    const auto at = [&](const Values& x, int64_t h, int64_t t, int64_t d) {
      return x.at(static_cast<size_t>((h * tokens + t) * dim + d));
    };
    for (int64_t i = 0; i < tokens; ++i) {
      double total = 0.0;
      Values sum(static_cast<size_t>(dim), 0.0);
      for (int64_t j = 0; j <= i; ++j) {
        double logit = 0.0;
        for (int64_t d = 0; d < dim; ++d) {
          logit += at(query, head, i, d) * at(key, kv, j, d);
        }
        const double weight = std::exp(logit / std::sqrt(static_cast<double>(dim)));
        total += weight;
        for (int64_t d = 0; d < dim; ++d) {
          sum[static_cast<size_t>(d)] += weight * at(value, kv, j, d);
        }
      }
      for (int64_t d = 0; d < dim; ++d) {
        output[static_cast<size_t>((head * tokens + i) * dim + d)] = sum[static_cast<size_t>(d)] / total;
      }
    }
  }
  return output;
}

struct Inputs {
  Values query, key, value;
  std::vector<float> query_score, key_score;
};

Inputs random_inputs(const Problem& problem, Random& random) {
  Inputs in{random_values(random, problem.query_sizes()),
            random_values(random, problem.kv_sizes()),
            random_values(random, problem.kv_sizes()),
            {},
            {}};
  in.query_score.resize(static_cast<size_t>(problem.rows * problem.kv_heads * problem.tokens));
  in.key_score.resize(in.query_score.size());
  reference::score(problem.sequences(), problem.shape(), in.query.data(), in.key.data(), in.query_score.data(),
                   in.key_score.data());
  return in;
}

reference::AttentionArgs args_of(const Problem& problem, const Inputs& in) {
  return {.sequences = problem.sequences(),
          .shape = problem.shape(),
          .query = in.query.data(),
          .key = in.key.data(),
          .value = in.value.data(),
          .query_score = in.query_score.data(),
          .key_score = in.key_score.data()};
}

Values attend(const Problem& problem, const Inputs& in) {
  Values output(in.query.size());
  reference::attention(args_of(problem, in), output.data());
  return output;
}

class DenseReference : public testing::TestWithParam<Problem> {};

TEST_P(DenseReference, EqualsDenseAttention) {
  Random random(1);
  const Inputs in = random_inputs(GetParam(), random);
  expect_close(attend(GetParam(), in), dense_attention(GetParam(), in.query, in.key, in.value), DType::float64);
}

const Problem kDenseReferenceCases[] = {
    {"one_level", 2, 4, 2, 33, 8, {1}, TopK::count(3)},
    {"one_token", 1, 1, 1, 1, 4, {1, 4, 16}, TopK::count(1)},
    {"shorter_than_a_window", 1, 3, 1, 15, 4, {1, 4, 16}, TopK::count(1)},
    {"one_level_without_cover_start", 1, 1, 1, 20, 4, {1}, TopK::share(1, 1), false},
};

INSTANTIATE_TEST_SUITE_P(Cases, DenseReference, testing::ValuesIn(kDenseReferenceCases), case_name);

class ReferenceGradient : public testing::TestWithParam<Problem> {};

// Central differences along random directions of all three inputs; the choice stays, as its scores do.
TEST_P(ReferenceGradient, EqualsFiniteDifferences) {
  const Problem& problem = GetParam();
  Random random(2);
  const Inputs in = random_inputs(problem, random);
  const Values grad_output = random_values(random, problem.query_sizes());
  Values grad_query(in.query.size()), grad_key(in.key.size()), grad_value(in.value.size());
  reference::attention_backward(args_of(problem, in), grad_output.data(), grad_query.data(), grad_key.data(),
                                grad_value.data());

  const std::pair<Values Inputs::*, const Values*> arguments[] = {
      {&Inputs::query, &grad_query}, {&Inputs::key, &grad_key}, {&Inputs::value, &grad_value}};
  for (const auto& [member, gradient] : arguments) {
    for (int direction = 0; direction < 8; ++direction) {
      Values step((in.*member).size());
      for (double& value : step) {
        value = random.normal();
      }
      constexpr double kStep = 1e-5;
      Inputs above = in;
      Inputs below = in;
      for (size_t i = 0; i < step.size(); ++i) {
        (above.*member)[i] += kStep * step[i];
        (below.*member)[i] -= kStep * step[i];
      }
      const double slope =
          (dot(attend(problem, above), grad_output) - dot(attend(problem, below), grad_output)) / (2 * kStep);
      EXPECT_NEAR(dot(step, *gradient), slope, 1e-6 * (1.0 + std::abs(slope)));
    }
  }
}

const Problem kReferenceGradientCases[] = {
    {"dense", 1, 2, 1, 12, 4, {1}, TopK::count(1)},
    {"grouped_heads", 2, 4, 2, 37, 4, {1, 2, 8}, TopK::count(2)},
    {"odd_windows", 1, 1, 1, 50, 3, {1, 3, 9}, TopK::count(2)},
    {"without_cover_start", 1, 2, 2, 40, 4, {1, 4, 16}, TopK::count(1), false},
};

INSTANTIATE_TEST_SUITE_P(Cases, ReferenceGradient, testing::ValuesIn(kReferenceGradientCases), case_name);

using Entries = std::vector<Entry>;

Entries select_first(const Sequences& sequences, const float* query_score, const float* key_score) {
  return reference::select(sequences.method, sequences.at(0), query_score, key_score);
}

// METHOD 3 by hand: 8 tokens, windows 1 and 2, two parents, which are entry 0 and the best by key of the others.
TEST(ReferenceSelect, ChoosesByHand) {
  const Sequences sequences = sequences_of(1, 8, pyramid({1, 2}), TopK::count(2));
  const float query[] = {0, 0, 9, 0, 0, 0, 0, 0};
  const float key[] = {0, 0, 0, 0, 0, 0, 0, 5};
  EXPECT_EQ(select_first(sequences, query, key),
            (Entries{{0, 0}, {0, 1}, {1, 0}, {1, 1}, {1, 2}, {0, 6}, {0, 7}, {1, 3}}));
  Sequences open = sequences;
  open.method.cover_start = false;
  EXPECT_EQ(select_first(open, query, key), (Entries{{1, 0}, {0, 2}, {0, 3}, {1, 1}, {1, 2}, {0, 6}, {0, 7}, {1, 3}}));
}

TEST(ReferenceSelect, PutsNanBehindMinusInfinityAndTheLowerIndexFirst) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const Sequences sequences = sequences_of(1, 6, pyramid({1, 2}), TopK::count(1), false);
  const float none[] = {0, 0, 0, 0, 0, 0};
  const float nan_and_minus_infinity[] = {kNan, kInf, -kInf, -kInf, -kInf, -kInf};
  EXPECT_EQ(select_first(sequences, none, nan_and_minus_infinity), (Entries{{1, 0}, {0, 2}, {0, 3}, {1, 1}, {1, 2}}));
  const float zeros[] = {-1, -1, -0.0F, -0.0F, 0, 0};
  EXPECT_EQ(select_first(sequences, none, zeros), (Entries{{1, 0}, {0, 2}, {0, 3}, {1, 1}, {1, 2}}));
}

TEST(ReferenceScore, TakesTheGroupsMaximumAndKeepsNan) {
  const Problem problem{{}, 1, 2, 1, 3, 2, {1}, TopK::count(1)};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double query[] = {3, 4, 1, 0, nan, 0, /* second head */ 6, 8, 0, 0.5, 1, 1};
  const double key[] = {0, 2, -3, 0, 0, 0};
  float query_score[3], key_score[3];
  reference::score(problem.sequences(), problem.shape(), query, key, query_score, key_score);
  EXPECT_EQ(query_score[0], 10.0F);
  EXPECT_EQ(query_score[1], 1.0F);
  EXPECT_TRUE(std::isnan(query_score[2]));
  EXPECT_EQ(key_score[0], 2.0F);
  EXPECT_EQ(key_score[1], 3.0F);
  EXPECT_EQ(key_score[2], 0.0F);
}

// Between the oracle's float64 and the dtypes stand the tests' own conversions.
TEST(Support, ConvertsDtypes) {
  std::byte bytes[8];
  for (const DType dtype : kDTypes) {
    for (const double value : {0.0, -0.0, 1.0, -1.5, 0.1, 65504.0, 1e-7, 6e-8, 3e-39, 123.456, 1e30}) {
      store(dtype, bytes, value);
      EXPECT_EQ(load(dtype, bytes), rounded(dtype, value)) << lighthouse::name(dtype) << " " << value;
    }
  }
  EXPECT_EQ(rounded(DType::float16, 65520.0), std::numeric_limits<double>::infinity());
  EXPECT_EQ(rounded(DType::float16, 1.0 + 0x1p-11), 1.0);
  EXPECT_EQ(rounded(DType::float16, 1.0 + 0x3p-11), 1.0 + 0x2p-10);
  EXPECT_EQ(rounded(DType::bfloat16, 1.0 + 0x1p-8), 1.0);
  EXPECT_EQ(rounded(DType::float16, 0x1p-24), 0x1p-24);
}

}  // namespace
}  // namespace lighthouse::test
