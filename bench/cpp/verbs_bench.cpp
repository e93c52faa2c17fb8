// Times the six functions at 32,768 tokens, 4 heads of 64, windows 1, 4, 16 and k = N/64, by dtype and threads.
// Bytes per second count what must move: every tensor, score, mask and prefix once. Results are checked before timing.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "lighthouse/cpu.h"

namespace lighthouse {
namespace {

constexpr int64_t kTokens = 32768, kHeads = 4, kHeadDim = 64;

// A tensor without gaps, filled with small numbers.
class Filled {
 public:
  Filled(DType dtype, int64_t length) : bytes_(static_cast<size_t>(kHeads * length * kHeadDim * size_of(dtype))) {
    const std::array<int64_t, 4> sizes{1, kHeads, length, kHeadDim};
    view_ = {bytes_.data(), dtype, sizes, contiguous_strides(sizes)};
    uint32_t random = 1;
    const int64_t size = size_of(dtype);
    for (int64_t i = 0; i < std::ssize(bytes_); i += size) {
      random = random * 1664525 + 1013904223;
      // A bfloat16 is the upper half of a float32: zeros below make the number the same in both.
      const float number = static_cast<float>(random >> 24) / 64.0F - 2.0F;
      const auto bits = std::bit_cast<uint32_t>(number) >> (size == 2 ? 16 : 0);
      std::memcpy(bytes_.data() + i, &bits, static_cast<size_t>(size));
    }
  }
  operator View() const { return view_; }
  operator ConstView() const { return view_; }
  DType dtype() const { return view_.dtype; }
  double bytes() const { return static_cast<double>(bytes_.size()); }
  double at(int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, bytes_.data() + i * size_of(view_.dtype), static_cast<size_t>(size_of(view_.dtype)));
    return std::bit_cast<float>(bits << (view_.dtype == DType::bfloat16 ? 16 : 0));
  }
  int64_t size() const { return std::ssize(bytes_) / size_of(view_.dtype); }

 private:
  std::vector<std::byte> bytes_;
  View view_;
};

double dot(const Filled& a, const Filled& b) {
  double sum = 0.0;
  for (int64_t i = 0; i < a.size(); ++i) sum += a.at(i) * b.at(i);
  return sum;
}

void check(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("wrong result, nothing timed: ") + what);
}

struct Setup {
  Sequences sequences =
      Sequences::of_rows(1, kTokens, {Pyramid::from_windows(std::array<int64_t, 3>{1, 4, 16}), TopK::share(1, 64)});
  Filled query, key, value, grad_query, grad_key, grad_value;
  Filled query_sub, key_sub, value_sub;
  std::vector<float> query_score = std::vector<float>(kHeads * kTokens), key_score = query_score;
  std::vector<uint8_t> mask = std::vector<uint8_t>(kHeads * kTokens);
  std::vector<int32_t> prefix = std::vector<int32_t>(kHeads * kTokens);
  Selection selection{sequences, kHeads, mask.data(), prefix.data()};

  explicit Setup(DType dtype)
      : query(dtype, kTokens),
        key(dtype, kTokens),
        value(dtype, kTokens),
        grad_query(dtype, kTokens),
        grad_key(dtype, kTokens),
        grad_value(dtype, kTokens),
        query_sub(dtype, sequences.entries),
        key_sub(dtype, sequences.entries),
        value_sub(dtype, sequences.entries) {
    check_results(ThreadExecutor(1));
  }

  void score(const Executor& executor) {
    cpu::run(ScoreArgs{query, key, query_score.data(), key_score.data()}, executor);
  }
  void select(const Executor& executor) {
    cpu::run(SelectArgs{query_score.data(), key_score.data(), selection}, executor);
  }
  void gather(const Executor& executor) {
    cpu::run(GatherArgs{query, key, value, selection, query_sub, key_sub, value_sub}, executor);
  }
  void gather_backward(const Executor& executor) {
    cpu::run(GatherBackwardArgs{query_sub, key_sub, value_sub, selection, grad_query, grad_key, grad_value}, executor);
  }
  void scatter(const Executor& executor) { cpu::run(ScatterArgs{query_sub, selection, grad_query}, executor); }
  void scatter_backward(const Executor& executor) {
    cpu::run(ScatterBackwardArgs{query, selection, query_sub}, executor);
  }

  double whole() const { return query.bytes(); }
  double sub() const { return query_sub.bytes(); }
  static double scores() { return 2.0 * sizeof(float) * kHeads * kTokens; }
  static double choice() { return (sizeof(uint8_t) + sizeof(int32_t)) * static_cast<double>(kHeads * kTokens); }

 private:
  // <gather x, gather x> == <x, gather_backward gather x>, and so for scatter_backward: all linear, all adjoint.
  void check_results(const Executor& executor) {
    const double tolerance = query.dtype() == DType::float32 ? 1e-5 : 1e-2;
    const auto adjoint = [&](const char* what) {
      const double forth = dot(query_sub, query_sub);
      const double back = dot(query, grad_query);
      check(forth > 0.0 && std::abs(forth - back) <= tolerance * forth, what);
    };
    score(executor);
    double square = 0.0;
    for (int64_t d = 0; d < kHeadDim; ++d) square += query.at(d) * query.at(d);
    check(std::abs(query_score[0] - std::sqrt(square)) < 1e-4, "score");
    select(executor);
    cpu::check_selection(selection, executor);
    gather(executor);
    gather_backward(executor);
    adjoint("gather, gather_backward");
    scatter_backward(executor);
    scatter(executor);
    adjoint("scatter, scatter_backward");
  }
};

Setup& setup_of(DType dtype) {
  static std::map<DType, Setup> setups;
  return setups.try_emplace(dtype, dtype).first->second;
}

struct Verb {
  const char* name;
  void (Setup::*run)(const Executor&);
  double (*bytes)(const Setup&);
};

const Verb kVerbs[] = {
    {"score", &Setup::score, [](const Setup& s) { return 2 * s.whole() + Setup::scores(); }},
    {"select", &Setup::select, [](const Setup&) { return Setup::scores() + Setup::choice(); }},
    {"gather", &Setup::gather, [](const Setup& s) { return 3 * s.whole() + 3 * s.sub() + Setup::choice(); }},
    {"gather_backward", &Setup::gather_backward,
     [](const Setup& s) { return 3 * s.whole() + 3 * s.sub() + Setup::choice(); }},
    {"scatter", &Setup::scatter, [](const Setup& s) { return s.whole() + s.sub() + Setup::choice(); }},
    {"scatter_backward", &Setup::scatter_backward,
     [](const Setup& s) { return s.whole() + s.sub() + Setup::choice(); }},
};

// One line a benchmark: the median of 31 runs after three to warm up. (The CPU column is of all of them.)
template <class Work>
double median_seconds(const Work& work) {
  std::array<double, 31> seconds;
  for (int i = 0; i < 3; ++i) work();
  for (double& each : seconds) {
    const auto start = std::chrono::steady_clock::now();
    work();
    each = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  std::nth_element(seconds.begin(), seconds.begin() + 15, seconds.end());
  return seconds[15];
}

[[maybe_unused]] const bool kRegistered = [] {
  for (const Verb& verb : kVerbs) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      for (const int threads : {1, 2}) {
        const std::string title = std::string(verb.name) + "/" + name(dtype) + "/threads:" + std::to_string(threads);
        const auto body = [&verb, dtype, threads](benchmark::State& state) {
          Setup& setup = setup_of(dtype);
          const ThreadExecutor executor(threads);
          for ([[maybe_unused]] auto _ : state) {
            state.SetIterationTime(median_seconds([&] { (setup.*verb.run)(executor); }));
          }
          state.SetBytesProcessed(static_cast<int64_t>(verb.bytes(setup)));
        };
        benchmark::RegisterBenchmark(title.c_str(), body)
            ->UseManualTime()
            ->Iterations(1)
            ->Unit(benchmark::kMicrosecond);
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace lighthouse
