// score, gather, scatter and the gradients of the latter two (METHOD 2, 6 and 7): against plain float64 loops over
// lists of entries, for every dtype, on odd lengths and in odd strides, and the same bits from any executor.
#include "support.h"

namespace lighthouse::test {
namespace {

struct Arguments {
  DType dtype;
  Memory inputs, outputs;
};

std::string describe(const Arguments& a) {
  return std::string(lighthouse::name(a.dtype)) + ", " + name(a.inputs) + " to " + name(a.outputs);
}

// Every dtype, and every kind of memory as input and as output, without all the pairs.
std::vector<Arguments> all_arguments() {
  std::vector<Arguments> all;
  for (const DType dtype : kDTypes) {
    all.push_back({dtype, Memory::packed, Memory::packed});
    all.push_back({dtype, Memory::transposed, Memory::transposed});
    all.push_back({dtype, Memory::sliced, Memory::gaps});
    all.push_back({dtype, Memory::gaps, Memory::sliced});
  }
  return all;
}

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();  // of scores: no maximum forgets it

Values to_values(const std::vector<float>& numbers) { return {numbers.begin(), numbers.end()}; }

class Verbs : public testing::TestWithParam<Problem> {
 protected:
  const Problem& problem() const { return GetParam(); }
  const ThreadExecutor executor{2};
  Random random{11};
};

TEST_P(Verbs, ScoreEqualsTheOracle) {
  const Plan plan = problem().plan();
  for (const Arguments& a : all_arguments()) {
    SCOPED_TRACE(describe(a));
    const Values query = rounded(a.dtype, random_values(random, problem().query_sizes()));
    const Values key = rounded(a.dtype, random_values(random, problem().kv_sizes()));
    const auto count = static_cast<size_t>(problem().rows * problem().kv_heads * problem().tokens);
    std::vector<float> query_score(count, kPoison), key_score(count, kPoison), exact_query(count), exact_key(count);
    cpu::score(Tensor(a.dtype, problem().query_sizes(), a.inputs, query),
               Tensor(a.dtype, problem().kv_sizes(), a.inputs, key), query_score.data(), key_score.data(), executor);
    reference::score(plan, problem().shape(), query.data(), key.data(), exact_query.data(), exact_key.data());
    expect_close(to_values(query_score), to_values(exact_query), DType::float32);
    expect_close(to_values(key_score), to_values(exact_key), DType::float32);
  }
}

TEST_P(Verbs, GatherEqualsPlainLoops) {
  const Layout layout = problem().plan().layout;
  for (const Arguments& a : all_arguments()) {
    SCOPED_TRACE(describe(a));
    const Choice choice = problem().random_choice(random);
    const Sizes sizes[] = {problem().query_sizes(), problem().kv_sizes(), problem().kv_sizes()};
    const Sizes sub_sizes[] = {problem().query_sub_sizes(), problem().kv_sub_sizes(), problem().kv_sub_sizes()};
    std::vector<Tensor> whole, sub;
    for (int i = 0; i < 3; ++i) {
      whole.emplace_back(a.dtype, sizes[i], a.inputs, random_values(random, sizes[i]));
      sub.emplace_back(a.dtype, sub_sizes[i], a.outputs);
    }
    cpu::gather(layout, whole[0], whole[1], whole[2], choice, sub[0], sub[1], sub[2], executor);
    for (size_t i = 0; i < 3; ++i) {
      expect_close(sub[i].values(), plain_gather(layout, choice, sizes[i][1], problem().head_dim, whole[i].values()),
                   a.dtype);
      EXPECT_TRUE(sub[i].gaps_untouched());
    }
  }
}

TEST_P(Verbs, GatherBackwardEqualsPlainLoops) {
  const Layout layout = problem().plan().layout;
  for (const Arguments& a : all_arguments()) {
    SCOPED_TRACE(describe(a));
    const Choice choice = problem().random_choice(random);
    const Sizes sizes[] = {problem().query_sizes(), problem().kv_sizes(), problem().kv_sizes()};
    const Sizes sub_sizes[] = {problem().query_sub_sizes(), problem().kv_sub_sizes(), problem().kv_sub_sizes()};
    std::vector<Tensor> whole, sub;
    for (int i = 0; i < 3; ++i) {
      whole.emplace_back(a.dtype, sizes[i], a.outputs);
      sub.emplace_back(a.dtype, sub_sizes[i], a.inputs, random_values(random, sub_sizes[i]));
    }
    cpu::gather_backward(layout, sub[0], sub[1], sub[2], choice, whole[0], whole[1], whole[2], executor);
    for (size_t i = 0; i < 3; ++i) {
      expect_close(whole[i].values(),
                   plain_gather_backward(layout, choice, sizes[i][1], problem().head_dim, sub[i].values()), a.dtype);
      EXPECT_TRUE(whole[i].gaps_untouched());
    }
  }
}

TEST_P(Verbs, ScatterEqualsPlainLoops) {
  const Layout layout = problem().plan().layout;
  for (const Arguments& a : all_arguments()) {
    SCOPED_TRACE(describe(a));
    const Choice choice = problem().random_choice(random);
    const Tensor sub(a.dtype, problem().query_sub_sizes(), a.inputs,
                     random_values(random, problem().query_sub_sizes()));
    const Tensor whole(a.dtype, problem().query_sizes(), a.outputs);
    cpu::scatter(layout, sub, choice, whole, executor);
    expect_close(whole.values(), plain_scatter(layout, choice, problem().query_heads, problem().head_dim, sub.values()),
                 a.dtype);
    EXPECT_TRUE(whole.gaps_untouched());
  }
}

TEST_P(Verbs, ScatterBackwardEqualsPlainLoops) {
  const Layout layout = problem().plan().layout;
  for (const Arguments& a : all_arguments()) {
    SCOPED_TRACE(describe(a));
    const Choice choice = problem().random_choice(random);
    const Tensor whole(a.dtype, problem().query_sizes(), a.inputs, random_values(random, problem().query_sizes()));
    const Tensor sub(a.dtype, problem().query_sub_sizes(), a.outputs);
    cpu::scatter_backward(layout, whole, choice, sub, executor);
    expect_close(sub.values(),
                 plain_scatter_backward(layout, choice, problem().query_heads, problem().head_dim, whole.values()),
                 a.dtype);
    EXPECT_TRUE(sub.gaps_untouched());
  }
}

// <gather(x), y> == <x, gather_backward(y)>, and so for scatter: without any loop of the tests' own.
TEST_P(Verbs, BackwardsAreAdjoint) {
  const Layout layout = problem().plan().layout;
  const Choice choice = problem().random_choice(random);
  const auto make = [&](const Sizes& sizes, bool filled) {
    return filled ? Tensor(DType::float64, sizes, Memory::transposed, random_values(random, sizes))
                  : Tensor(DType::float64, sizes, Memory::packed);
  };
  const Sizes q = problem().query_sizes(), kv = problem().kv_sizes();
  const Sizes q_sub = problem().query_sub_sizes(), kv_sub = problem().kv_sub_sizes();
  const Tensor x[] = {make(q, true), make(kv, true), make(kv, true)};
  const Tensor y[] = {make(q_sub, true), make(kv_sub, true), make(kv_sub, true)};
  const Tensor gathered[] = {make(q_sub, false), make(kv_sub, false), make(kv_sub, false)};
  const Tensor spread[] = {make(q, false), make(kv, false), make(kv, false)};
  cpu::gather(layout, x[0], x[1], x[2], choice, gathered[0], gathered[1], gathered[2], executor);
  cpu::gather_backward(layout, y[0], y[1], y[2], choice, spread[0], spread[1], spread[2], executor);
  for (int i = 0; i < 3; ++i) {
    EXPECT_NEAR(dot(gathered[i].values(), y[i].values()), dot(x[i].values(), spread[i].values()), 1e-10);
  }
  cpu::scatter(layout, y[0], choice, spread[0], executor);
  cpu::scatter_backward(layout, x[0], choice, gathered[0], executor);
  EXPECT_NEAR(dot(gathered[0].values(), y[0].values()), dot(x[0].values(), spread[0].values()), 1e-10);
}

// All the bytes that the six functions but select write.
std::vector<std::vector<std::byte>> run_all(const Problem& problem, const Choice& choice, DType dtype,
                                            const Executor& executor, Memory inputs = Memory::transposed,
                                            Memory outputs = Memory::packed) {
  Random random(12);
  const Layout layout = problem.plan().layout;
  const auto in = [&](const Sizes& sizes) { return Tensor(dtype, sizes, inputs, random_values(random, sizes)); };
  const auto out = [&](const Sizes& sizes) { return Tensor(dtype, sizes, outputs); };
  const Sizes q = problem.query_sizes(), kv = problem.kv_sizes();
  const Sizes q_sub = problem.query_sub_sizes(), kv_sub = problem.kv_sub_sizes();
  std::vector<std::vector<std::byte>> result;
  {
    const Tensor query = in(q), key = in(kv), value = in(kv);
    std::vector<float> scores[2];
    for (std::vector<float>& score : scores) {
      score.assign(static_cast<size_t>(problem.rows * problem.kv_heads * problem.tokens), kPoison);
    }
    cpu::score(query, key, scores[0].data(), scores[1].data(), executor);
    for (const std::vector<float>& score : scores) {
      const auto* bytes = reinterpret_cast<const std::byte*>(score.data());
      result.emplace_back(bytes, bytes + score.size() * sizeof(float));
    }
    const Tensor query_sub = out(q_sub), key_sub = out(kv_sub), value_sub = out(kv_sub);
    cpu::gather(layout, query, key, value, choice, query_sub, key_sub, value_sub, executor);
    result.insert(result.end(), {query_sub.bits(), key_sub.bits(), value_sub.bits()});
    const Tensor output_sub = out(q_sub);
    cpu::scatter_backward(layout, query, choice, output_sub, executor);
    result.push_back(output_sub.bits());
  }
  const Tensor query_sub = in(q_sub), key_sub = in(kv_sub), value_sub = in(kv_sub);
  const Tensor query = out(q), key = out(kv), value = out(kv), output = out(q);
  cpu::gather_backward(layout, query_sub, key_sub, value_sub, choice, query, key, value, executor);
  result.insert(result.end(), {query.bits(), key.bits(), value.bits()});
  cpu::scatter(layout, query_sub, choice, output, executor);
  result.push_back(output.bits());
  return result;
}

TEST_P(Verbs, HaveTheSameBitsFromAnyExecutor) {
  for (const DType dtype : kDTypes) {
    const Choice choice = problem().random_choice(random);
    const auto one = run_all(problem(), choice, dtype, ThreadExecutor(1));
    for (const auto& [name, other] : executors()) {
      EXPECT_EQ(one, run_all(problem(), choice, dtype, *other)) << name << ", " << lighthouse::name(dtype);
    }
  }
}

const Problem kVerbsCases[] = {
    {"defaults", 1, 2, 2, 1024, 64, {1, 4, 16}, TopK::share(1, 64)},
    {"grouped_heads", 2, 6, 2, 517, 16, {1, 4, 16}, TopK::count(9)},
    {"one_kv_head", 1, 4, 1, 300, 8, {1, 2, 4, 8}, TopK::count(12)},
    {"without_cover_start", 2, 2, 2, 400, 8, {1, 4, 16}, TopK::count(3), false},
    {"one_token", 2, 2, 1, 1, 8, {1, 4, 16}, TopK::count(1)},
    {"one_level", 1, 2, 2, 333, 8, {1}, TopK::count(1)},
    {"two_levels", 1, 2, 1, 600, 8, {1, 7}, TopK::count(20)},
    {"shorter_than_a_window", 1, 2, 2, 15, 8, {1, 4, 16}, TopK::count(2)},
    {"one_token_past_a_window", 1, 2, 2, 257, 8, {1, 4, 16}, TopK::count(2)},
    {"one_token_short_of_a_window", 1, 2, 2, 511, 8, {1, 4, 16}, TopK::count(2)},
    {"windows_of_nine", 2, 3, 3, 1000, 5, {1, 3, 9}, TopK::count(20)},
    {"windows_of_sixty", 1, 2, 1, 1033, 12, {1, 5, 15, 60}, TopK::count(6)},
    {"eight_levels", 1, 2, 1, 1500, 8, {1, 2, 4, 8, 16, 32, 64, 128}, TopK::count(4)},
    {"a_window_longer_than_a_block_of_work", 1, 1, 1, 3000, 8, {1, 10, 1000}, TopK::count(2)},
    {"a_window_longer_than_half_the_sequence", 1, 2, 2, 777, 8, {1, 8, 400}, TopK::count(5)},
    {"a_window_beyond_the_sequence", 1, 2, 2, 70, 8, {1, 8, int64_t{1} << 40}, TopK::count(5)},
    {"all_chosen", 1, 2, 2, 333, 8, {1, 4, 16}, TopK::share(1, 1)},
    {"several_strata", 1, 1, 1, 4 * 601 + 3, 8, {1, 4}, TopK::count(301)},
    {"head_dim_one", 1, 2, 1, 100, 1, {1, 4, 16}, TopK::count(2)},
    {"head_dim_odd", 1, 2, 1, 100, 67, {1, 4, 16}, TopK::count(2)},
    {"head_dim_129", 1, 2, 1, 100, 129, {1, 4, 16}, TopK::count(2)},
    {"head_dim_256", 1, 1, 1, 100, 256, {1, 4, 16}, TopK::count(2)},
};

INSTANTIATE_TEST_SUITE_P(Cases, Verbs, testing::ValuesIn(kVerbsCases), case_name);

// Many small problems at random: what no table thinks of.
TEST(VerbsAtRandom, EqualPlainLoops) {
  const ThreadExecutor executor(2);
  Random random(16);
  for (int round = 0; round < 200 && !testing::Test::HasFailure(); ++round) {
    std::vector<int64_t> windows{1};
    const int64_t levels = 1 + random.below(8);
    while (std::ssize(windows) < levels && windows.back() < 400) {
      windows.push_back(windows.back() * (2 + random.below(4)));
    }
    const int64_t kv_heads = 1 + random.below(2), heads = kv_heads * (1 + random.below(2));
    const Problem problem{{"random"},
                          1 + random.below(2),
                          heads,
                          kv_heads,
                          1 + random.below(600),
                          1 + random.below(5),
                          windows,
                          TopK::count(1 + random.below(40)),
                          random.below(2) == 0};
    SCOPED_TRACE(problem.plan().str());
    const Layout layout = problem.plan().layout;
    const int64_t dim = problem.head_dim;
    const Choice choice = problem.random_choice(random);
    const auto in = [&](const Sizes& sizes) {
      return Tensor(DType::float64, sizes, Memory::gaps, random_values(random, sizes));
    };
    const Tensor x = in(problem.query_sizes()), kv = in(problem.kv_sizes());
    const Tensor y = in(problem.query_sub_sizes()), kv_y = in(problem.kv_sub_sizes());
    const Tensor sub(DType::float64, problem.query_sub_sizes()), kv_sub(DType::float64, problem.kv_sub_sizes()),
        kv_sub2(DType::float64, problem.kv_sub_sizes());
    const Tensor whole(DType::float64, problem.query_sizes()), kv_whole(DType::float64, problem.kv_sizes()),
        kv_whole2(DType::float64, problem.kv_sizes());
    cpu::gather(layout, x, kv, kv, choice, sub, kv_sub, kv_sub2, executor);
    expect_close(sub.values(), plain_gather(layout, choice, heads, dim, x.values()), DType::float64);
    expect_close(kv_sub2.values(), plain_gather(layout, choice, kv_heads, dim, kv.values()), DType::float64);
    cpu::gather_backward(layout, y, kv_y, kv_y, choice, whole, kv_whole, kv_whole2, executor);
    expect_close(whole.values(), plain_gather_backward(layout, choice, heads, dim, y.values()), DType::float64);
    expect_close(kv_whole.values(), plain_gather_backward(layout, choice, kv_heads, dim, kv_y.values()),
                 DType::float64);
    cpu::scatter(layout, y, choice, whole, executor);
    expect_close(whole.values(), plain_scatter(layout, choice, heads, dim, y.values()), DType::float64);
    cpu::scatter_backward(layout, x, choice, sub, executor);
    expect_close(sub.values(), plain_scatter_backward(layout, choice, heads, dim, x.values()), DType::float64);
  }
}

// --- what the table does not say ------------------------------------------------------------------------------------

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

TEST(ScoreOfOddNumbers, IsNanOrInfinityInEveryDType) {
  const ThreadExecutor executor(1);
  for (const DType dtype : kDTypes) {
    SCOPED_TRACE(lighthouse::name(dtype));
    const Values query = {kNan, 1, 0, -kInf, 3, 4, -0.0, 0, /* second head */ 1, 1, 0, kNan, 0, 0, 0, -0.0};
    const Values key = {0, kInf, kNan, kInf, -0.0, -0.0, 3, -4};
    float query_score[4], key_score[4];
    cpu::score(Tensor(dtype, {1, 2, 4, 2}, Memory::packed, query), Tensor(dtype, {1, 1, 4, 2}, Memory::packed, key),
               query_score, key_score, executor);
    EXPECT_TRUE(std::isnan(query_score[0]));
    EXPECT_TRUE(std::isnan(query_score[1]));  // one head infinite, the other NaN
    EXPECT_EQ(query_score[2], 5.0F);
    EXPECT_EQ(query_score[3], 0.0F);
    EXPECT_EQ(key_score[0], std::numeric_limits<float>::infinity());
    EXPECT_TRUE(std::isnan(key_score[1]));
    EXPECT_EQ(key_score[2], 0.0F);
    EXPECT_EQ(key_score[3], 5.0F);
  }
}

// NaN and infinity reach the windows and tokens that they are in, and no others.
TEST(OddNumbers, StayInTheirWindows) {
  const Problem problem{{}, 1, 2, 1, 333, 4, {1, 4, 16}, TopK::count(6)};
  const Layout layout = problem.plan().layout;
  const ThreadExecutor executor(2);
  Random random(13);
  for (const DType dtype : kDTypes) {
    SCOPED_TRACE(lighthouse::name(dtype));
    const Choice choice = problem.random_choice(random);
    const auto sprinkled = [&](const Sizes& sizes) {
      Values values = random_values(random, sizes);
      for (double& value : values) {
        const int64_t die = random.below(200);
        value = die == 0 ? kNan : die == 1 ? kInf : die == 2 ? -kInf : value;
      }
      return Tensor(dtype, sizes, Memory::packed, values);
    };
    const Tensor query = sprinkled(problem.query_sizes()), key = sprinkled(problem.kv_sizes());
    const Tensor query_sub(dtype, problem.query_sub_sizes()), key_sub(dtype, problem.kv_sub_sizes());
    const Tensor value_sub(dtype, problem.kv_sub_sizes());
    cpu::gather(layout, query, key, key, choice, query_sub, key_sub, value_sub, executor);
    expect_close(query_sub.values(), plain_gather(layout, choice, 2, 4, query.values()), dtype);
    expect_close(key_sub.values(), plain_gather(layout, choice, 1, 4, key.values()), dtype);
    cpu::scatter_backward(layout, query, choice, query_sub, executor);
    expect_close(query_sub.values(), plain_scatter_backward(layout, choice, 2, 4, query.values()), dtype);

    const Tensor sub = sprinkled(problem.query_sub_sizes()), kv_sub = sprinkled(problem.kv_sub_sizes());
    const Tensor output(dtype, problem.query_sizes()), kv(dtype, problem.kv_sizes()), kv2(dtype, problem.kv_sizes());
    cpu::scatter(layout, sub, choice, output, executor);
    expect_close(output.values(), plain_scatter(layout, choice, 2, 4, sub.values()), dtype);
    cpu::gather_backward(layout, sub, kv_sub, kv_sub, choice, output, kv, kv2, executor);
    expect_close(output.values(), plain_gather_backward(layout, choice, 2, 4, sub.values()), dtype);
    expect_close(kv2.values(), plain_gather_backward(layout, choice, 1, 4, kv_sub.values()), dtype);
  }
}

// Without cover_start the tokens that no entry reaches get zeros, not what was there.
TEST(UncoveredTokens, GetZeros) {
  const Plan plan = make_plan(1, 64, pyramid({1, 4, 16}), TopK::count(1), false);
  std::vector<float> score(64, 0.0F);
  score[40] = 1.0F;
  const Choice choice = oracle_choice(plan, 1, score, score);
  const Tensor sub(DType::float32, {1, 1, plan.length(), 2}, Memory::packed,
                   Values(static_cast<size_t>(plan.length() * 2), 1.0));
  const Tensor output(DType::float32, {1, 1, 64, 2});
  cpu::scatter(plan.layout, sub, choice, output, ThreadExecutor(1));
  const Values values = output.values();
  for (size_t i = 0; i < 15 * 2; ++i) {
    ASSERT_EQ(values[i], 0.0) << i;
  }
  EXPECT_EQ(values[15 * 2], 1.0);
}

// Sums of many in float32, not in the dtype: bfloat16 alone would stop at 256.
TEST(LongWindows, AreSummedInFloat32) {
  const Plan plan = make_plan(1, 4096, pyramid({1, 2048}), TopK::count(1));
  const std::vector<float> score(4096, 0.0F);
  const Choice choice = oracle_choice(plan, 1, score, score);
  for (const DType dtype : kDTypes) {
    const Tensor ones(dtype, {1, 1, 4096, 1}, Memory::packed, Values(4096, 1.0));
    const Tensor sub(dtype, {1, 1, plan.length(), 1}), sub2(dtype, {1, 1, plan.length(), 1}),
        sub3(dtype, {1, 1, plan.length(), 1});
    cpu::gather(plan.layout, ones, ones, ones, choice, sub, sub2, sub3, ThreadExecutor(1));
    EXPECT_EQ(sub.values(), Values(static_cast<size_t>(plan.length()), 1.0)) << lighthouse::name(dtype);
    cpu::scatter_backward(plan.layout, ones, choice, sub, ThreadExecutor(1));
    EXPECT_EQ(sub.values()[2048], 2048.0) << lighthouse::name(dtype);  // the first coarse entry
  }
}

// Several heads that are one in memory, as expanded tensors are: inputs only.
TEST(ExpandedInputs, AreRead) {
  const Problem problem{{}, 2, 2, 2, 100, 8, {1, 4, 16}, TopK::count(2)};
  const Layout layout = problem.plan().layout;
  const ThreadExecutor executor(2);
  Random random(14);
  const Choice choice = problem.random_choice(random);
  const Tensor row(DType::float32, {1, 1, 100, 8}, Memory::packed, random_values(random, {1, 1, 100, 8}));
  ConstView expanded = row;
  expanded.sizes = problem.query_sizes();
  expanded.strides = {0, 0, 8, 1};
  Values repeated;
  for (int i = 0; i < 4; ++i) {
    const Values values = row.values();
    repeated.insert(repeated.end(), values.begin(), values.end());
  }
  const Tensor sub[] = {{DType::float32, problem.query_sub_sizes()},
                        {DType::float32, problem.query_sub_sizes()},
                        {DType::float32, problem.query_sub_sizes()}};
  cpu::gather(layout, expanded, expanded, expanded, choice, sub[0], sub[1], sub[2], executor);
  expect_close(sub[2].values(), plain_gather(layout, choice, 2, 8, repeated), DType::float32);
}

// Offsets past 2^31 elements, in batches, heads and tokens alike; with the same bits as in dense memory.
class FarStrides : public testing::TestWithParam<DType> {};

TEST_P(FarStrides, HaveTheSameBits) {
  const Problem problem{{}, 2, 2, 1, 37, 8, {1, 4, 16}, TopK::count(2)};
  Random random(15);
  const Choice choice = problem.random_choice(random);
  const ThreadExecutor executor(2);
  const auto near = run_all(problem, choice, GetParam(), executor, Memory::packed, Memory::packed);
  try {
    EXPECT_EQ(near, run_all(problem, choice, GetParam(), executor, Memory::far, Memory::packed)) << "inputs";
    EXPECT_EQ(near, run_all(problem, choice, GetParam(), executor, Memory::packed, Memory::far)) << "outputs";
  } catch (const std::bad_alloc&) {
    GTEST_SKIP() << "this machine gives no such address space";
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, FarStrides, testing::ValuesIn(kDTypes),
                         [](const auto& test) { return std::string(lighthouse::name(test.param)); });

// --- what is refused ------------------------------------------------------------------------------------------------

// Arguments that are right until a case breaks one of them.
struct Call {
  static constexpr DType kDType = DType::float32;
  Layout layout = make_plan(2, 40, pyramid({1, 4, 16}), TopK::count(1)).layout;
  Tensor q{kDType, {2, 4, 40, 8}}, k{kDType, {2, 2, 40, 8}}, v{kDType, {2, 2, 40, 8}};
  Tensor q_sub{kDType, {2, 4, layout.entries, 8}}, k_sub{kDType, {2, 2, layout.entries, 8}},
      v_sub{kDType, {2, 2, layout.entries, 8}};
  View query = q, key = k, value = v, query_sub = q_sub, key_sub = k_sub, value_sub = v_sub;
  std::vector<uint8_t> mask = std::vector<uint8_t>(2 * 2 * 40, 1);
  std::vector<int32_t> prefix = std::vector<int32_t>(2 * 2 * 40, 0);
  std::vector<float> query_score = std::vector<float>(2 * 2 * 40, 0), key_score = query_score;
  float* query_scores = query_score.data();
  float* key_scores = key_score.data();
  Selection selection{mask.data(), prefix.data(), 2};
};

struct RefusedCall : Named {
  std::function<void(Call&)> spoil;
  std::vector<std::string_view> words;
};

const ThreadExecutor kOneThread(1);

void score(const Call& c) { cpu::score(c.query, c.key, c.query_scores, c.key_scores, kOneThread); }
void gather(const Call& c) {
  cpu::gather(c.layout, c.query, c.key, c.value, c.selection, c.query_sub, c.key_sub, c.value_sub, kOneThread);
}
void gather_backward(const Call& c) {
  cpu::gather_backward(c.layout, c.query_sub, c.key_sub, c.value_sub, c.selection, c.query, c.key, c.value, kOneThread);
}
void scatter(const Call& c) { cpu::scatter(c.layout, c.query_sub, c.selection, c.query, kOneThread); }
void scatter_backward(const Call& c) { cpu::scatter_backward(c.layout, c.query, c.selection, c.query_sub, kOneThread); }

void expect_call_refused(const RefusedCall& refused, void (*verb)(const Call&)) {
  Call call;
  refused.spoil(call);
  expect_refused([&] { verb(call); }, refused.words);
  // Before anything is written.
  for (const Tensor* tensor : {&call.q, &call.k, &call.v, &call.q_sub, &call.k_sub, &call.v_sub}) {
    const std::vector<std::byte> bits = tensor->bits();
    EXPECT_TRUE(std::all_of(bits.begin(), bits.end(), [](std::byte b) { return b == std::byte{0xff}; }));
  }
}

class ScoreRefuses : public testing::TestWithParam<RefusedCall> {};
TEST_P(ScoreRefuses, BadInput) { expect_call_refused(GetParam(), score); }

const RefusedCall kScoreRefusesCases[] = {
    {"key_of_another_dtype", [](Call& c) { c.key.dtype = DType::float64; }, {"key", "float64", "float32"}},
    {"key_of_another_head_dim", [](Call& c) { c.key.sizes[3] = 4; }, {"key", "head_dim", "4", "8"}},
    {"key_of_another_length", [](Call& c) { c.key.sizes[2] = 39; }, {"key", "39", "40"}},
    {"key_of_another_batch", [](Call& c) { c.key.sizes[0] = 1; }, {"key", "1", "2"}},
    {"heads_that_do_not_divide", [](Call& c) { c.key.sizes[1] = 3; }, {"key has 3 heads, query 4", "multiple"}},
    {"more_key_heads_than_query_heads",
     [](Call& c) { c.query.sizes[1] = 1; },
     {"key has 2 heads, query 1", "multiple"}},
    {"no_key_heads", [](Call& c) { c.key.sizes[1] = 0; }, {"key", "empty"}},
    {"no_tokens", [](Call& c) { c.query.sizes[2] = 0; }, {"query", "empty"}},
    {"no_rows", [](Call& c) { c.query.sizes[0] = 0; }, {"query", "empty"}},
    {"no_head_dim", [](Call& c) { c.query.sizes[3] = 0; }, {"query", "empty"}},
    {"last_stride_of_two", [](Call& c) { c.query.strides[3] = 2; }, {"query", "stride 2", "copy"}},
    {"query_without_data", [](Call& c) { c.query.data = nullptr; }, {"query", "no data"}},
    {"scores_without_data", [](Call& c) { c.key_scores = nullptr; }, {"score", "no data"}},
};

INSTANTIATE_TEST_SUITE_P(Cases, ScoreRefuses, testing::ValuesIn(kScoreRefusesCases), case_name);

class BothDirectionsRefuse : public testing::TestWithParam<RefusedCall> {};
TEST_P(BothDirectionsRefuse, BadInputToGather) { expect_call_refused(GetParam(), gather); }
TEST_P(BothDirectionsRefuse, BadInputToGatherBackward) { expect_call_refused(GetParam(), gather_backward); }

const RefusedCall kBothDirectionsRefuseCases[] = {
    {"value_of_another_dtype", [](Call& c) { c.value.dtype = DType::bfloat16; }, {"value", "bfloat16"}},
    {"sub_of_another_dtype", [](Call& c) { c.key_sub.dtype = DType::float16; }, {"key_sub", "float16"}},
    {"key_of_another_head_dim", [](Call& c) { c.key.sizes[3] = 4; }, {"key", "head_dim 4"}},
    {"sub_of_another_head_dim", [](Call& c) { c.value_sub.sizes[3] = 4; }, {"value_sub", "head_dim 4"}},
    {"query_of_another_length", [](Call& c) { c.query.sizes[2] = 39; }, {"query", "39", "40"}},
    {"query_of_other_rows", [](Call& c) { c.query.sizes[0] = 1; }, {"query", "1", "2"}},
    {"sub_of_another_length", [](Call& c) { --c.query_sub.sizes[2]; }, {"query_sub"}},
    {"sub_of_other_heads", [](Call& c) { c.query_sub.sizes[1] = 2; }, {"query_sub", "2", "4"}},
    {"key_of_fewer_heads_than_were_chosen_for",
     [](Call& c) { c.key.sizes[1] = c.key_sub.sizes[1] = 1; },
     {"key", "heads"}},
    {"key_of_more_heads_than_were_chosen_for",
     [](Call& c) {
       c.key = c.query;
       c.key_sub = c.query_sub;
     },
     {"key", "4", "2"}},
    {"value_of_more_heads_than_were_chosen_for",
     [](Call& c) {
       c.value = c.query;
       c.value_sub = c.query_sub;
     },
     {"value", "4", "2"}},
    {"heads_that_do_not_divide",
     [](Call& c) { c.query.sizes[1] = c.query_sub.sizes[1] = 3; },
     {"2 heads", "3", "multiple"}},
    {"no_chosen_heads", [](Call& c) { c.selection.kv_heads = 0; }, {"heads"}},
    {"last_stride_of_two", [](Call& c) { c.value_sub.strides[3] = 2; }, {"value_sub", "stride 2"}},
    {"no_mask", [](Call& c) { c.selection.mask = nullptr; }, {"selection"}},
    {"no_prefix", [](Call& c) { c.selection.prefix = nullptr; }, {"selection"}},
    {"key_without_data", [](Call& c) { c.key.data = nullptr; }, {"key", "no data"}},
};

INSTANTIATE_TEST_SUITE_P(Cases, BothDirectionsRefuse, testing::ValuesIn(kBothDirectionsRefuseCases), case_name);

class WriteBackRefuses : public testing::TestWithParam<RefusedCall> {};
TEST_P(WriteBackRefuses, BadInputToScatter) { expect_call_refused(GetParam(), scatter); }
TEST_P(WriteBackRefuses, BadInputToScatterBackward) { expect_call_refused(GetParam(), scatter_backward); }

const RefusedCall kWriteBackRefusesCases[] = {
    {"another_dtype", [](Call& c) { c.query_sub.dtype = DType::bfloat16; }, {"output", "bfloat16"}},
    {"another_head_dim", [](Call& c) { c.query.sizes[3] = 4; }, {"output", "head_dim"}},
    {"another_length", [](Call& c) { c.query.sizes[2] = 39; }, {"output", "39", "40"}},
    {"another_sub_length", [](Call& c) { --c.query_sub.sizes[2]; }, {"output_sub"}},
    {"other_rows", [](Call& c) { c.query_sub.sizes[0] = 1; }, {"output_sub"}},
    {"other_heads", [](Call& c) { c.query_sub.sizes[1] = 2; }, {"output_sub"}},
    {"heads_that_do_not_divide", [](Call& c) { c.query.sizes[1] = c.query_sub.sizes[1] = 3; }, {"multiple"}},
    {"last_stride_of_two", [](Call& c) { c.query.strides[3] = 2; }, {"output", "stride 2"}},
    {"no_mask", [](Call& c) { c.selection.mask = nullptr; }, {"selection"}},
    {"no_data", [](Call& c) { c.query_sub.data = nullptr; }, {"output_sub", "no data"}},
};

INSTANTIATE_TEST_SUITE_P(Cases, WriteBackRefuses, testing::ValuesIn(kWriteBackRefusesCases), case_name);

struct RefusedSelect : Named {
  std::function<void(Call&)> spoil;
  std::vector<std::string_view> words;
};

class SelectRefuses : public testing::TestWithParam<RefusedSelect> {};

TEST_P(SelectRefuses, BadInput) {
  const Plan plan = make_plan(2, 40, pyramid({1, 4, 16}), TopK::count(1));
  Call call;
  GetParam().spoil(call);
  expect_refused([&] { cpu::select(plan, call.query_scores, call.key_scores, call.selection, kOneThread); },
                 GetParam().words);
}

const RefusedSelect kSelectRefusesCases[] = {
    {"no_heads", [](Call& c) { c.selection.kv_heads = 0; }, {"kv_heads=0"}},
    {"no_query_scores", [](Call& c) { c.query_scores = nullptr; }, {"scores", "no data"}},
    {"no_key_scores", [](Call& c) { c.key_scores = nullptr; }, {"scores", "no data"}},
    {"no_mask", [](Call& c) { c.selection.mask = nullptr; }, {"selection", "no data"}},
    {"no_prefix", [](Call& c) { c.selection.prefix = nullptr; }, {"selection", "no data"}},
};

INSTANTIATE_TEST_SUITE_P(Cases, SelectRefuses, testing::ValuesIn(kSelectRefusesCases), case_name);

}  // namespace
}  // namespace lighthouse::test
