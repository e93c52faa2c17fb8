// What is asked of CUDA alone: the CPU's choice and, where no sum rounds, the CPU's bits; streams, graphs, and refusals
// of its own. The rest is in the tables that all devices share.
#include "cuda_chain.h"

namespace lighthouse::test {
namespace {

template <class Row>
class CudaTable : public testing::TestWithParam<Row> {
 protected:
  void SetUp() override { skip_without(cuda_device()); }
};

class CudaChains : public CudaTable<Problem> {};

TEST_P(CudaChains, HaveTheBitsOfTheCpu) {
  for (const DType dtype : kCudaDTypes) {
    for (const Memory memory : {Memory::packed, Memory::transposed, Memory::sliced, Memory::gaps}) {
      SCOPED_TRACE(std::string(lighthouse::name(dtype)) + ", " + name(memory));
      const Chain chain(GetParam(), dtype, memory);
      const auto expected = chain.run_on_cpu(1);
      const CudaChain on_cuda(chain);
      on_cuda.reset(expected.get());
      on_cuda.enqueue(nullptr);
      on_cuda.expect_same(expected.get());
    }
  }
}

const Problem kChains[] = {
    {"defaults", 2, 4, 2, 3001, 64, {1, 4, 16}, TopK::share(1, 64)},
    {"every_level_in_one_thread", 1, 2, 1, 1027, 16, {1, 2, 4, 8, 16, 32, 64}, TopK::count(5)},
    {"one_level", 1, 2, 1, 130, 24, {1}, TopK::count(5)},
    {"long_windows", 2, 2, 1, 3100, 40, {1, 4, 128, 1024}, TopK::count(3)},
    {"long_windows_alone", 1, 2, 1, 3100, 128, {1, 256}, TopK::count(3)},
    {"many_entries", 1, 1, 1, 40000, 8, {1, 2, 4}, TopK::share(1, 4)},  // 70,000 of them
    {"head_dim_248", 1, 2, 2, 200, 248, {1, 8, 16}, TopK::count(3)},
    {"head_dim_256", 1, 2, 2, 200, 256, {1, 8, 16}, TopK::count(3)},
};

INSTANTIATE_TEST_SUITE_P(Cases, CudaChains, testing::ValuesIn(kChains), case_name);

// --- streams and graphs ---------------------------------------------------------------------------------------------

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class CudaStreams : public testing::Test {
 protected:
  void SetUp() override { skip_without(cuda_device()); }
  // Strata and windows that take workspace.
  const Chain chain{Problem{{}, 2, 4, 2, 9001, 64, {1, 4, 128}, TopK::count(3)}, DType::bfloat16, Memory::transposed};
};

TEST_F(CudaStreams, TwoAtOnceHaveTheSameBits) {
  const Stream streams[2];
  const CudaChain on_cuda[] = {CudaChain(chain), CudaChain(chain)};
  const std::unique_ptr<std::byte[]> expected[] = {chain.run_on_cpu(1), chain.run_on_cpu(2)};
  for (size_t i = 0; i < 2; ++i) {
    on_cuda[i].reset(expected[i].get());
  }
  for (int round = 0; round < 20; ++round) {
    for (size_t i = 0; i < 2; ++i) {
      on_cuda[i].enqueue(streams[i]);
    }
  }
  for (size_t i = 0; i < 2; ++i) {
    on_cuda[i].expect_same(expected[i].get());
  }
}

TEST_F(CudaStreams, AGraphIsReplayedWithNewContents) {
  const Stream stream;
  const CudaChain on_cuda(chain);
  on_cuda.reset(1);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  on_cuda.enqueue(stream);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  for (const uint64_t seed : {2, 3}) {
    on_cuda.reset(seed);
    check(cudaGraphLaunch(executable, stream));
    on_cuda.expect_same(chain.run_on_cpu(seed).get());
  }
  check(cudaGraphExecDestroy(executable));
  check(cudaGraphDestroy(graph));
}

// --- the choice -----------------------------------------------------------------------------------------------------

struct Choosing : Named {
  int64_t tokens;
  std::vector<int64_t> windows;
  TopK topk;
  int64_t kv_heads = 1;
};

class CudaSelect : public CudaTable<Choosing> {};

template <class T>
int64_t first_difference(const std::vector<T>& a, const std::vector<T>& b) {
  const auto at = std::mismatch(a.begin(), a.end(), b.begin()).first;
  return at == a.end() ? -1 : at - a.begin();
}

TEST_P(CudaSelect, ChoosesWhatTheCpuChooses) {
  const Choosing& c = GetParam();
  Random random(21);
  for (const bool cover_start : {true, false}) {
    const Sequences sequences = sequences_of(1, c.tokens, pyramid(c.windows), c.topk, cover_start);
    for (const ScoreKind kind : kScoreKinds) {
      SCOPED_TRACE(std::string(name(kind)) + (cover_start ? ", start covered" : ", start open"));
      const std::vector<float> query_score = make_scores(kind, c.kv_heads * c.tokens, random);
      const std::vector<float> key_score = make_scores(kind, c.kv_heads * c.tokens, random);
      std::vector<uint8_t> masks[2];
      std::vector<int32_t> prefixes[2];
      const Device* const both[] = {&kCpu, &cuda_device()};
      for (size_t i = 0; i < 2; ++i) {
        masks[i].assign(query_score.size(), 0xff);
        prefixes[i].assign(query_score.size(), -1);
        both[i]->run(SelectArgs{
            query_score.data(), key_score.data(), {sequences, c.kv_heads, masks[i].data(), prefixes[i].data()}});
      }
      EXPECT_EQ(first_difference(masks[0], masks[1]), -1);
      EXPECT_EQ(first_difference(prefixes[0], prefixes[1]), -1);
    }
  }
}

// Up to 2,048 candidates and the masks of 16,384 tokens of a stratum are in shared memory.
const Choosing kChoosing[] = {
    {"as_many_candidates_as_fit", 4 * 2048, {1, 4}, TopK::count(100)},
    {"a_candidate_too_many", 4 * 2049, {1, 4}, TopK::count(100)},
    {"candidates_in_workspace_for_each_head", 4 * 2300 + 1, {1, 4}, TopK::count(128), 3},
    {"candidates_too_many_below_the_coarsest", 256 * 150 + 7, {1, 4, 256}, TopK::count(100), 2},
    {"as_many_tokens_as_fit", 16384, {1, 64}, TopK::count(100)},
    {"a_window_too_many", 16384 + 64, {1, 64}, TopK::count(100)},
    {"tokens_too_many_for_each_head", 20011, {1, 8, 64}, TopK::count(50), 3},
    {"both_too_many", 100003, {1, 4, 16}, TopK::count(3), 2},
    {"both_too_many_in_each_of_three_strata", 150001, {1, 4, 16}, TopK::count(300)},
    {"more_than_65535_entries", 70001, {1, 2, 4}, TopK::share(1, 4)},
    {"strata_that_begin_at_odd_tokens", 30001, {1, 3, 15}, TopK::count(700), 2},
};

INSTANTIATE_TEST_SUITE_P(Cases, CudaSelect, testing::ValuesIn(kChoosing), case_name);

// --- refusals: without a GPU too ------------------------------------------------------------------------------------

// Calls all that take tensors, each of which must say `words`.
void expect_all_refused(DType dtype, int64_t head_dim, const std::vector<std::string_view>& words) {
  const Problem problem{{}, 1, 1, 1, 40, head_dim, {1, 4, 16}, TopK::count(1)};
  const Sequences sequences = problem.sequences();
  const Tensor whole(dtype, problem.query_sizes()), sub(dtype, problem.query_sub_sizes());
  std::vector<uint8_t> mask(40, 1);
  std::vector<int32_t> prefix(40, 0);
  std::vector<float> score(40, 0.0F);
  const Selection selection{sequences, 1, mask.data(), prefix.data()};
  const Device& device = cuda_calls();
  expect_refused([&] { device.run(ScoreArgs{whole, whole, score.data(), score.data()}); }, words);
  expect_refused([&] { device.run(GatherArgs{whole, whole, whole, selection, sub, sub, sub}); }, words);
  expect_refused([&] { device.run(GatherBackwardArgs{sub, sub, sub, selection, whole, whole, whole}); }, words);
  expect_refused([&] { device.run(ScatterArgs{sub, selection, whole}); }, words);
  expect_refused([&] { device.run(ScatterBackwardArgs{whole, selection, sub}); }, words);
}

TEST(CudaRefuses, Float64) { expect_all_refused(DType::float64, 8, {"float64", "float32, bfloat16 or float16"}); }

TEST(CudaRefuses, AMachineWithoutADriver) {
  int version = -1, devices = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version > 0 || cudaGetDeviceCount(&devices) == cudaSuccess) {
    GTEST_SKIP() << "there is a driver, for CUDA " << version / 1000;
  }
  const Tensor whole(DType::bfloat16, {1, 1, 40, 8});
  std::vector<float> score(40, 0.0F);
  try {
    cuda_calls().run(ScoreArgs{whole, whole, score.data(), score.data()});
    FAIL() << "a kernel was launched without a driver";
  } catch (const std::runtime_error& error) {
    EXPECT_TRUE(std::string_view(error.what()).ends_with("update the driver")) << error.what();
  }
}

TEST(CudaRefuses, HeadDimsThatDoNotFit) {
  for (const int64_t head_dim : {1, 4, 12, 129, 260, 264, 512}) {
    expect_all_refused(DType::bfloat16, head_dim, {"head_dim=" + std::to_string(head_dim), "multiple of 8", "256"});
  }
}

TEST(CudaRefuses, AWorkspaceThatIsTooSmall) {
  const Problem problem{{}, 1, 2, 1, 4 * 2500, 8, {1, 4, 128}, TopK::count(1)};
  const Tensor query(DType::float32, problem.query_sizes()), key(DType::float32, problem.kv_sizes());
  const Tensor query_sub(DType::float32, problem.query_sub_sizes()), key_sub(DType::float32, problem.kv_sub_sizes());
  std::vector<uint8_t> mask(static_cast<size_t>(problem.tokens), 0);
  std::vector<int32_t> prefix(mask.size(), 0);
  std::vector<float> score(mask.size(), 0.0F);
  const auto selection = [&](const Sequences& sequences) {
    return Selection{sequences, 1, mask.data(), prefix.data()};
  };
  const auto expect_short = [](const auto& args) {
    const int64_t needed = cuda::workspace_bytes(args);
    ASSERT_GT(needed, 0);
    expect_refused([&] { CudaCalls(nullptr, {nullptr, needed - 1}).run(args); },
                   {"workspace of " + std::to_string(needed - 1) + " bytes", std::to_string(needed) + " are needed"});
  };
  const Sequences many_candidates = sequences_of(1, problem.tokens, pyramid({1, 4}), TopK::count(1));
  expect_short(SelectArgs{score.data(), score.data(), selection(many_candidates)});
  expect_short(GatherArgs{query, key, key, selection(problem.sequences()), query_sub, key_sub, key_sub});
  expect_short(ScatterBackwardArgs{query, selection(problem.sequences()), query_sub});
}

}  // namespace
}  // namespace lighthouse::test
