// score, gather, scatter and the gradients of the latter two (METHOD 2, 6 and 7): against plain float64 loops over
// lists of entries, for every dtype, on odd lengths and in odd strides, and the same bits from any executor.
#include "device.h"

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
std::vector<Arguments> all_arguments(const Device& device) {
  std::vector<Arguments> all;
  for (const DType dtype : device.dtypes()) {
    all.push_back({dtype, Memory::packed, Memory::packed});
    all.push_back({dtype, Memory::transposed, Memory::transposed});
    all.push_back({dtype, Memory::sliced, Memory::gaps});
    all.push_back({dtype, Memory::gaps, Memory::sliced});
  }
  return all;
}

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();  // of scores: no maximum forgets it

Values to_values(const std::vector<float>& numbers) { return {numbers.begin(), numbers.end()}; }

// The problem with a head_dim that the device takes.
Problem fitted(const Device& device, Problem problem) {
  problem.head_dim = device.head_dim(problem.head_dim);
  return problem;
}

class Verbs : public DeviceTable<Problem> {
 protected:
  const Problem& problem() const { return problem_; }
  Random random{11};

 private:
  const Problem problem_ = fitted(device(), row());
};

TEST_P(Verbs, ScoreEqualsTheOracle) {
  const Sequences sequences = problem().sequences();
  for (const Arguments& a : all_arguments(device())) {
    SCOPED_TRACE(describe(a));
    const Values query = rounded(a.dtype, random_values(random, problem().query_sizes()));
    const Values key = rounded(a.dtype, random_values(random, problem().kv_sizes()));
    const auto count = static_cast<size_t>(problem().rows * problem().kv_heads * problem().tokens);
    std::vector<float> query_score(count, kPoison), key_score(count, kPoison), exact_query(count), exact_key(count);
    device().run(ScoreArgs{Tensor(a.dtype, problem().query_sizes(), a.inputs, query),
                           Tensor(a.dtype, problem().kv_sizes(), a.inputs, key), query_score.data(), key_score.data()});
    reference::score(sequences, problem().shape(), query.data(), key.data(), exact_query.data(), exact_key.data());
    expect_close(to_values(query_score), to_values(exact_query), DType::float32);
    expect_close(to_values(key_score), to_values(exact_key), DType::float32);
  }
}

TEST_P(Verbs, GatherEqualsPlainLoops) {
  for (const Arguments& a : all_arguments(device())) {
    SCOPED_TRACE(describe(a));
    const Choice choice = problem().random_choice(random);
    const Sizes sizes[] = {problem().query_sizes(), problem().kv_sizes(), problem().kv_sizes()};
    const Sizes sub_sizes[] = {problem().query_sub_sizes(), problem().kv_sub_sizes(), problem().kv_sub_sizes()};
    std::vector<Tensor> whole, sub;
    for (int i = 0; i < 3; ++i) {
      whole.emplace_back(a.dtype, sizes[i], a.inputs, random_values(random, sizes[i]));
      sub.emplace_back(a.dtype, sub_sizes[i], a.outputs);
    }
    device().run(GatherArgs{whole[0], whole[1], whole[2], choice, sub[0], sub[1], sub[2]});
    for (size_t i = 0; i < 3; ++i) {
      expect_close(sub[i].values(), plain_gather(choice, sizes[i][1], problem().head_dim, whole[i].values()), a.dtype);
      EXPECT_TRUE(sub[i].gaps_untouched());
    }
  }
}

TEST_P(Verbs, GatherBackwardEqualsPlainLoops) {
  for (const Arguments& a : all_arguments(device())) {
    SCOPED_TRACE(describe(a));
    const Choice choice = problem().random_choice(random);
    const Sizes sizes[] = {problem().query_sizes(), problem().kv_sizes(), problem().kv_sizes()};
    const Sizes sub_sizes[] = {problem().query_sub_sizes(), problem().kv_sub_sizes(), problem().kv_sub_sizes()};
    std::vector<Tensor> whole, sub;
    for (int i = 0; i < 3; ++i) {
      whole.emplace_back(a.dtype, sizes[i], a.outputs);
      sub.emplace_back(a.dtype, sub_sizes[i], a.inputs, random_values(random, sub_sizes[i]));
    }
    device().run(GatherBackwardArgs{sub[0], sub[1], sub[2], choice, whole[0], whole[1], whole[2]});
    for (size_t i = 0; i < 3; ++i) {
      expect_close(whole[i].values(), plain_gather_backward(choice, sizes[i][1], problem().head_dim, sub[i].values()),
                   a.dtype);
      EXPECT_TRUE(whole[i].gaps_untouched());
    }
  }
}

TEST_P(Verbs, ScatterEqualsPlainLoops) {
  for (const Arguments& a : all_arguments(device())) {
    SCOPED_TRACE(describe(a));
    const Choice choice = problem().random_choice(random);
    const Tensor sub(a.dtype, problem().query_sub_sizes(), a.inputs,
                     random_values(random, problem().query_sub_sizes()));
    const Tensor whole(a.dtype, problem().query_sizes(), a.outputs);
    device().run(ScatterArgs{sub, choice, whole});
    expect_close(whole.values(), plain_scatter(choice, problem().query_heads, problem().head_dim, sub.values()),
                 a.dtype);
    EXPECT_TRUE(whole.gaps_untouched());
  }
}

TEST_P(Verbs, ScatterBackwardEqualsPlainLoops) {
  for (const Arguments& a : all_arguments(device())) {
    SCOPED_TRACE(describe(a));
    const Choice choice = problem().random_choice(random);
    const Tensor whole(a.dtype, problem().query_sizes(), a.inputs, random_values(random, problem().query_sizes()));
    const Tensor sub(a.dtype, problem().query_sub_sizes(), a.outputs);
    device().run(ScatterBackwardArgs{whole, choice, sub});
    expect_close(sub.values(),
                 plain_scatter_backward(choice, problem().query_heads, problem().head_dim, whole.values()), a.dtype);
    EXPECT_TRUE(sub.gaps_untouched());
  }
}

// <gather(x), y> == <x, gather_backward(y)>, and so for scatter: without any loop of the tests' own.
TEST_P(Verbs, BackwardsAreAdjoint) {
  const Choice choice = problem().random_choice(random);
  const DType dtype = device().widest();
  const auto make = [&](const Sizes& sizes, bool filled) {
    return filled ? Tensor(dtype, sizes, Memory::transposed, random_values(random, sizes))
                  : Tensor(dtype, sizes, Memory::packed);
  };
  const auto expect_adjoint = [&](const Tensor& forward_x, const Tensor& y, const Tensor& x, const Tensor& backward_y) {
    const Values a = forward_x.values(), b = y.values(), c = x.values(), d = backward_y.values();
    const double sizes = std::sqrt(dot(a, a) * dot(b, b)) + std::sqrt(dot(c, c) * dot(d, d));
    EXPECT_NEAR(dot(a, b), dot(c, d), 16 * (dtype == DType::float64 ? 0x1p-53 : 0x1p-24) * sizes);
  };
  const Sizes q = problem().query_sizes(), kv = problem().kv_sizes();
  const Sizes q_sub = problem().query_sub_sizes(), kv_sub = problem().kv_sub_sizes();
  const Tensor x[] = {make(q, true), make(kv, true), make(kv, true)};
  const Tensor y[] = {make(q_sub, true), make(kv_sub, true), make(kv_sub, true)};
  const Tensor gathered[] = {make(q_sub, false), make(kv_sub, false), make(kv_sub, false)};
  const Tensor spread[] = {make(q, false), make(kv, false), make(kv, false)};
  device().run(GatherArgs{x[0], x[1], x[2], choice, gathered[0], gathered[1], gathered[2]});
  device().run(GatherBackwardArgs{y[0], y[1], y[2], choice, spread[0], spread[1], spread[2]});
  for (int i = 0; i < 3; ++i) {
    expect_adjoint(gathered[i], y[i], x[i], spread[i]);
  }
  device().run(ScatterArgs{y[0], choice, spread[0]});
  device().run(ScatterBackwardArgs{x[0], choice, gathered[0]});
  expect_adjoint(gathered[0], y[0], x[0], spread[0]);
}

// All the bytes that the six functions but select write.
std::vector<std::vector<std::byte>> run_all(const Problem& problem, const Choice& choice, DType dtype,
                                            const Device& device, Memory inputs = Memory::transposed,
                                            Memory outputs = Memory::packed) {
  Random random(12);
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
    device.run(ScoreArgs{query, key, scores[0].data(), scores[1].data()});
    for (const std::vector<float>& score : scores) {
      const auto* bytes = reinterpret_cast<const std::byte*>(score.data());
      result.emplace_back(bytes, bytes + score.size() * sizeof(float));
    }
    const Tensor query_sub = out(q_sub), key_sub = out(kv_sub), value_sub = out(kv_sub);
    device.run(GatherArgs{query, key, value, choice, query_sub, key_sub, value_sub});
    result.insert(result.end(), {query_sub.bits(), key_sub.bits(), value_sub.bits()});
    const Tensor output_sub = out(q_sub);
    device.run(ScatterBackwardArgs{query, choice, output_sub});
    result.push_back(output_sub.bits());
  }
  const Tensor query_sub = in(q_sub), key_sub = in(kv_sub), value_sub = in(kv_sub);
  const Tensor query = out(q), key = out(kv), value = out(kv), output = out(q);
  device.run(GatherBackwardArgs{query_sub, key_sub, value_sub, choice, query, key, value});
  result.insert(result.end(), {query.bits(), key.bits(), value.bits()});
  device.run(ScatterArgs{query_sub, choice, output});
  result.push_back(output.bits());
  return result;
}

TEST_P(Verbs, HaveTheSameBitsInEveryRun) {
  const Choice choice = problem().random_choice(random);
  for (const DType dtype : device().dtypes()) {
    EXPECT_EQ(run_all(problem(), choice, dtype, device()), run_all(problem(), choice, dtype, device()))
        << lighthouse::name(dtype);
  }
}

class VerbsThreads : public testing::TestWithParam<Problem> {};

TEST_P(VerbsThreads, HaveTheSameBits) {
  Random random(11);
  for (const DType dtype : kDTypes) {
    const Choice choice = GetParam().random_choice(random);
    const auto one = run_all(GetParam(), choice, dtype, CpuDevice(ThreadExecutor(1)));
    for (const auto& [name, other] : executors()) {
      EXPECT_EQ(one, run_all(GetParam(), choice, dtype, CpuDevice(*other))) << name << ", " << lighthouse::name(dtype);
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
    {"a_prime_window", 1, 2, 1, 2100, 8, {1, 509}, TopK::count(2)},
    {"a_prime_window_longer_than_a_block_holds", 1, 2, 1, 2100, 8, {1, 521}, TopK::count(2)},
    {"windows_of_17_and_34", 2, 2, 1, 500, 24, {1, 17, 34}, TopK::count(9)},
    {"windows_of_67_and_201", 1, 2, 2, 900, 8, {1, 67, 201}, TopK::count(5)},
    {"a_window_of_130", 1, 2, 1, 1100, 8, {1, 130}, TopK::count(3)},
    {"windows_of_45_and_720", 2, 2, 1, 3100, 8, {1, 3, 9, 45, 720}, TopK::count(3)},
    {"three_windows_longer_than_a_thread_sums", 1, 2, 2, 2900, 8, {1, 4, 128, 256, 1024}, TopK::count(2)},
    {"all_chosen", 1, 2, 2, 333, 8, {1, 4, 16}, TopK::share(1, 1)},
    {"several_strata", 1, 1, 1, 4 * 601 + 3, 8, {1, 4}, TopK::count(301)},
    {"head_dim_one", 1, 2, 1, 100, 1, {1, 4, 16}, TopK::count(2)},
    {"head_dim_odd", 1, 2, 1, 100, 67, {1, 4, 16}, TopK::count(2)},
    {"head_dim_129", 1, 2, 1, 100, 129, {1, 4, 16}, TopK::count(2)},
    {"head_dim_256", 1, 1, 1, 100, 256, {1, 4, 16}, TopK::count(2)},
};

INSTANTIATE_TEST_SUITE_P(Cases, Verbs, on_each(devices(), kVerbsCases), on_device_name);
INSTANTIATE_TEST_SUITE_P(Cases, VerbsThreads, testing::ValuesIn(kVerbsCases), case_name);

class VerbsOnDevice : public DeviceTest {};
INSTANTIATE_TEST_SUITE_P(Devices, VerbsOnDevice, testing::ValuesIn(devices()), device_name);

// The end of the sequence cuts a window at every length: what is written back stops there, what is pooled leaves it
// out.
TEST_P(VerbsOnDevice, EqualPlainLoopsWhereverTheEndCuts) {
  Random random(17);
  const DType dtype = device().widest();
  const int64_t dim = device().head_dim(1);
  for (const std::vector<int64_t>& windows :
       {std::vector<int64_t>{1, 4, 16}, {1, 3, 9}, {1, 2, 4, 8, 16, 32, 64}, {1, 5, 20, 100}, {1, 67}}) {
    for (int64_t rest = 0; rest < windows.back(); ++rest) {
      const int64_t tokens = (1 + rest % 3) * windows.back() + rest;
      const Problem problem{{"cut"}, 1, 1, 1, tokens, dim, windows, TopK::count(2)};
      SCOPED_TRACE(problem.sequences().str());
      const Choice choice = problem.random_choice(random);
      const Tensor x(dtype, problem.query_sizes(), Memory::packed, random_values(random, problem.query_sizes()));
      const Tensor y(dtype, problem.query_sub_sizes(), Memory::packed,
                     random_values(random, problem.query_sub_sizes()));
      const Tensor sub[] = {
          {dtype, problem.query_sub_sizes()}, {dtype, problem.query_sub_sizes()}, {dtype, problem.query_sub_sizes()}};
      const Tensor whole[] = {
          {dtype, problem.query_sizes()}, {dtype, problem.query_sizes()}, {dtype, problem.query_sizes()}};
      device().run(GatherArgs{x, x, x, choice, sub[0], sub[1], sub[2]});
      expect_close(sub[0].values(), plain_gather(choice, 1, dim, x.values()), dtype);
      device().run(GatherBackwardArgs{y, y, y, choice, whole[0], whole[1], whole[2]});
      expect_close(whole[0].values(), plain_gather_backward(choice, 1, dim, y.values()), dtype);
      device().run(ScatterArgs{y, choice, whole[1]});
      expect_close(whole[1].values(), plain_scatter(choice, 1, dim, y.values()), dtype);
      device().run(ScatterBackwardArgs{x, choice, sub[1]});
      expect_close(sub[1].values(), plain_scatter_backward(choice, 1, dim, x.values()), dtype);
      if (testing::Test::HasFailure()) {
        return;
      }
    }
  }
}

// Many small problems at random: what no table thinks of.
TEST_P(VerbsOnDevice, EqualPlainLoopsAtRandom) {
  Random random(16);
  const DType dtype = device().widest();
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
                          device().head_dim(1 + random.below(5)),
                          windows,
                          TopK::count(1 + random.below(40)),
                          random.below(2) == 0};
    SCOPED_TRACE(problem.sequences().str());
    const int64_t dim = problem.head_dim;
    const Choice choice = problem.random_choice(random);
    const auto in = [&](const Sizes& sizes) {
      return Tensor(dtype, sizes, round % 2 == 0 ? Memory::gaps : Memory::packed, random_values(random, sizes));
    };
    const Tensor x = in(problem.query_sizes()), kv = in(problem.kv_sizes());
    const Tensor y = in(problem.query_sub_sizes()), kv_y = in(problem.kv_sub_sizes());
    const Tensor sub(dtype, problem.query_sub_sizes()), kv_sub(dtype, problem.kv_sub_sizes()),
        kv_sub2(dtype, problem.kv_sub_sizes());
    const Tensor whole(dtype, problem.query_sizes()), kv_whole(dtype, problem.kv_sizes()),
        kv_whole2(dtype, problem.kv_sizes());
    device().run(GatherArgs{x, kv, kv, choice, sub, kv_sub, kv_sub2});
    expect_close(sub.values(), plain_gather(choice, heads, dim, x.values()), dtype);
    expect_close(kv_sub2.values(), plain_gather(choice, kv_heads, dim, kv.values()), dtype);
    device().run(GatherBackwardArgs{y, kv_y, kv_y, choice, whole, kv_whole, kv_whole2});
    expect_close(whole.values(), plain_gather_backward(choice, heads, dim, y.values()), dtype);
    expect_close(kv_whole.values(), plain_gather_backward(choice, kv_heads, dim, kv_y.values()), dtype);
    device().run(ScatterArgs{y, choice, whole});
    expect_close(whole.values(), plain_scatter(choice, heads, dim, y.values()), dtype);
    device().run(ScatterBackwardArgs{x, choice, sub});
    expect_close(sub.values(), plain_scatter_backward(choice, heads, dim, x.values()), dtype);
  }
}

// --- what the table does not say ------------------------------------------------------------------------------------

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// Rows of two numbers, with zeros after them up to the device's head_dim.
Values rows_of_two(const Device& device, const Values& numbers) {
  Values rows(numbers.size() / 2 * static_cast<size_t>(device.head_dim(2)), 0.0);
  for (size_t i = 0; i < numbers.size(); ++i) {
    rows.at(i / 2 * static_cast<size_t>(device.head_dim(2)) + i % 2) = numbers[i];
  }
  return rows;
}

TEST_P(VerbsOnDevice, ScoreOddNumbersAsNanOrInfinity) {
  const int64_t dim = device().head_dim(2);
  for (const DType dtype : device().dtypes()) {
    SCOPED_TRACE(lighthouse::name(dtype));
    const Values query =
        rows_of_two(device(), {kNan, 1, 0, -kInf, 3, 4, -0.0, 0, /* second head */ 1, 1, 0, kNan, 0, 0, 0, -0.0});
    const Values key = rows_of_two(device(), {0, kInf, kNan, kInf, -0.0, -0.0, 3, -4});
    float query_score[4], key_score[4];
    device().run(ScoreArgs{Tensor(dtype, {1, 2, 4, dim}, Memory::packed, query),
                           Tensor(dtype, {1, 1, 4, dim}, Memory::packed, key), query_score, key_score});
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
TEST_P(VerbsOnDevice, KeepOddNumbersInTheirWindows) {
  const int64_t dim = device().head_dim(4);
  const Problem problem{{}, 1, 2, 1, 333, dim, {1, 4, 16}, TopK::count(6)};
  Random random(13);
  for (const DType dtype : device().dtypes()) {
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
    device().run(GatherArgs{query, key, key, choice, query_sub, key_sub, value_sub});
    expect_close(query_sub.values(), plain_gather(choice, 2, dim, query.values()), dtype);
    expect_close(key_sub.values(), plain_gather(choice, 1, dim, key.values()), dtype);
    device().run(ScatterBackwardArgs{query, choice, query_sub});
    expect_close(query_sub.values(), plain_scatter_backward(choice, 2, dim, query.values()), dtype);

    const Tensor sub = sprinkled(problem.query_sub_sizes()), kv_sub = sprinkled(problem.kv_sub_sizes());
    const Tensor output(dtype, problem.query_sizes()), kv(dtype, problem.kv_sizes()), kv2(dtype, problem.kv_sizes());
    device().run(ScatterArgs{sub, choice, output});
    expect_close(output.values(), plain_scatter(choice, 2, dim, sub.values()), dtype);
    device().run(GatherBackwardArgs{sub, kv_sub, kv_sub, choice, output, kv, kv2});
    expect_close(output.values(), plain_gather_backward(choice, 2, dim, sub.values()), dtype);
    expect_close(kv2.values(), plain_gather_backward(choice, 1, dim, kv_sub.values()), dtype);
  }
}

// What a local window adds is the last term, before the one rounding: of float64 loops, rounded once.
TEST_P(VerbsOnDevice, AddWhatIsGiven) {
  const int64_t dim = device().head_dim(8);
  for (const std::vector<int64_t>& windows :
       std::vector<std::vector<int64_t>>{{1}, {1, 4, 16}, {1, 2, 64}, {1, 2, 4, 8, 16, 32}}) {
    for (const int64_t tokens : {int64_t{1}, int64_t{70}, int64_t{333}}) {
      const Problem problem{{"added"}, 2, 4, 2, tokens, dim, windows, TopK::count(2)};
      Random random(19);
      const Choice choice = problem.random_choice(random);
      const Sizes q = problem.query_sizes(), kv = problem.kv_sizes();
      for (const DType dtype : device().dtypes()) {
        const auto in = [&](const Sizes& sizes, Memory memory) {
          return Tensor(dtype, sizes, memory, random_values(random, sizes));
        };
        const Tensor sub = in(problem.query_sub_sizes(), Memory::packed), added = in(q, Memory::transposed);
        const Tensor key_sub = in(problem.kv_sub_sizes(), Memory::packed), added_key = in(kv, Memory::sliced);
        const Tensor added_value = in(kv, Memory::gaps);
        const Tensor output(dtype, q), grad_query(dtype, q), grad_key(dtype, kv), grad_value(dtype, kv);
        const auto sum = [](Values a, const Values& b) {
          for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
          return a;
        };
        device().run(ScatterArgs{sub, choice, output, added});
        expect_close(output.values(), sum(plain_scatter(choice, 4, dim, sub.values()), added.values()), dtype);
        device().run(GatherBackwardArgs{sub, key_sub, key_sub, choice, grad_query, grad_key, grad_value, added,
                                        added_key, added_value});
        expect_close(grad_query.values(), sum(plain_gather_backward(choice, 4, dim, sub.values()), added.values()),
                     dtype);
        const Values of_keys = plain_gather_backward(choice, 2, dim, key_sub.values());
        expect_close(grad_key.values(), sum(of_keys, added_key.values()), dtype);
        expect_close(grad_value.values(), sum(of_keys, added_value.values()), dtype);

        // Zeros add nothing, to the bit: the same terms in the same order.
        const Tensor zeros(dtype, q, Memory::packed, Values(output.values().size(), 0.0)), plain(dtype, q);
        device().run(ScatterArgs{sub, choice, plain});
        device().run(ScatterArgs{sub, choice, output, zeros});
        EXPECT_EQ(output.values(), plain.values());
        if (testing::Test::HasFailure()) return;
      }
    }
  }
}

// Without cover_start the tokens that no entry reaches get zeros, not what was there.
TEST_P(VerbsOnDevice, GiveUncoveredTokensZeros) {
  const int64_t dim = device().head_dim(2);
  const Sequences sequences = sequences_of(1, 64, pyramid({1, 4, 16}), TopK::count(1), false);
  std::vector<float> score(64, 0.0F);
  score[40] = 1.0F;
  const Choice choice = oracle_choice(sequences, 1, score, score);
  const Tensor sub(DType::float32, {1, 1, sequences.entries, dim}, Memory::packed,
                   Values(static_cast<size_t>(sequences.entries * dim), 1.0));
  const Tensor output(DType::float32, {1, 1, 64, dim});
  device().run(ScatterArgs{sub, choice, output});
  const Values values = output.values();
  const auto covered = values.begin() + 15 * dim;
  EXPECT_EQ(std::count(values.begin(), covered, 0.0), 15 * dim);
  EXPECT_EQ(*covered, 1.0);
}

// Sums of many in float32, not in the dtype: bfloat16 alone would stop at 256.
TEST_P(VerbsOnDevice, SumLongWindowsInFloat32) {
  const int64_t dim = device().head_dim(1);
  const Sequences sequences = sequences_of(1, 4096, pyramid({1, 2048}), TopK::count(1));
  const std::vector<float> score(4096, 0.0F);
  const Choice choice = oracle_choice(sequences, 1, score, score);
  for (const DType dtype : device().dtypes()) {
    const Tensor ones(dtype, {1, 1, 4096, dim}, Memory::packed, Values(static_cast<size_t>(4096 * dim), 1.0));
    const Tensor sub(dtype, {1, 1, sequences.entries, dim}), sub2(dtype, {1, 1, sequences.entries, dim}),
        sub3(dtype, {1, 1, sequences.entries, dim});
    device().run(GatherArgs{ones, ones, ones, choice, sub, sub2, sub3});
    EXPECT_EQ(sub.values(), Values(static_cast<size_t>(sequences.entries * dim), 1.0)) << lighthouse::name(dtype);
    device().run(ScatterBackwardArgs{ones, choice, sub});
    EXPECT_EQ(sub.values()[static_cast<size_t>(2048 * dim)], 2048.0)
        << lighthouse::name(dtype);  // the first coarse entry
  }
}

// Several heads that are one in memory, as expanded tensors are: inputs only.
TEST_P(VerbsOnDevice, ReadExpandedInputs) {
  const Problem problem{{}, 2, 2, 2, 100, 8, {1, 4, 16}, TopK::count(2)};
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
  device().run(GatherArgs{expanded, expanded, expanded, choice, sub[0], sub[1], sub[2]});
  expect_close(sub[2].values(), plain_gather(choice, 2, 8, repeated), DType::float32);
}

// Offsets past 2^31 elements, in batches, heads and tokens alike; with the same bits as in dense memory.
class FarStrides : public testing::TestWithParam<DType> {};

TEST_P(FarStrides, HaveTheSameBits) {
  const Problem problem{{}, 2, 2, 1, 37, 8, {1, 4, 16}, TopK::count(2)};
  Random random(15);
  const Choice choice = problem.random_choice(random);
  const auto near = run_all(problem, choice, GetParam(), kCpu, Memory::packed, Memory::packed);
  try {
    EXPECT_EQ(near, run_all(problem, choice, GetParam(), kCpu, Memory::far, Memory::packed)) << "inputs";
    EXPECT_EQ(near, run_all(problem, choice, GetParam(), kCpu, Memory::packed, Memory::far)) << "outputs";
  } catch (const std::bad_alloc&) {
    GTEST_SKIP() << "this machine gives no such address space";
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, FarStrides, testing::ValuesIn(kDTypes),
                         [](const auto& test) { return std::string(lighthouse::name(test.param)); });

}  // namespace
}  // namespace lighthouse::test
