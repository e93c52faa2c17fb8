// The order in which numbers are added (rules/order.h): the bits of every device are those of plain float32 loops,
// which the tolerances of the other tests would not see.
#include <map>

#include "device.h"

namespace lighthouse::test {
namespace {

using Row = std::vector<float>;

// One sequence of one head. `shift` is 1 for what is written back, whose windows begin one token earlier.
class PlainFloat {
 public:
  PlainFloat(const Problem& problem, const Choice& choice) : problem_(problem), choice_(choice) {}

  // The sum of a window in the order of the rule, one number of it.
  float sum(const Row& x, int64_t at, int level, int64_t first, int64_t shift) const {
    const std::vector<int64_t>& windows = problem_.windows;
    const auto window = windows[static_cast<size_t>(level)];
    float total = 0;
    if (level > 1) {
      const auto finer = windows[static_cast<size_t>(level - 1)];
      for (int64_t part = first; part < first + window && part - shift < problem_.tokens; part += finer) {
        total += sum(x, at, level - 1, part, shift);
      }
      return total;
    }
    const int64_t piece = pieces_.at(window);
    for (int64_t begin = first; begin < first + window && begin - shift < problem_.tokens; begin += piece) {
      float part = 0;
      for (int64_t u = begin; u < begin + piece; ++u) {
        const int64_t token = u - shift;
        if (0 <= token && token < problem_.tokens) part += x[static_cast<size_t>(token * problem_.head_dim + at)];
      }
      total += part;
    }
    return total;
  }

  Row to_entries(const Row& x, int64_t shift) const {
    Row result;
    for (const Entry& entry : choice_.entries[0]) {
      const auto window = problem_.windows[static_cast<size_t>(entry.level)];
      for (int64_t at = 0; at < problem_.head_dim; ++at) {
        const float total = entry.level == 0 ? x[static_cast<size_t>(entry.index * problem_.head_dim + at)]
                                             : sum(x, at, entry.level, (entry.index + shift) * window, shift);
        result.push_back(shift == 0 ? total / static_cast<float>(window) : total);
      }
    }
    return result;
  }

  Row to_tokens(const Row& entries, int64_t shift) const {
    Row result(static_cast<size_t>(problem_.tokens * problem_.head_dim));
    for (int level = static_cast<int>(problem_.windows.size()) - 1; level >= 0; --level) {
      for (size_t place = 0; place < choice_.entries[0].size(); ++place) {
        const Entry& entry = choice_.entries[0][place];
        if (entry.level != level) continue;
        const auto window = problem_.windows[static_cast<size_t>(level)];
        const int64_t first = level == 0 ? entry.index : (entry.index + shift) * window - shift;
        for (int64_t token = first; token < std::min(problem_.tokens, first + window); ++token) {
          for (int64_t at = 0; at < problem_.head_dim; ++at) {
            const float value = entries[place * static_cast<size_t>(problem_.head_dim) + static_cast<size_t>(at)];
            result[static_cast<size_t>(token * problem_.head_dim + at)] +=
                shift == 0 ? value / static_cast<float>(window) : value;
          }
        }
      }
    }
    return result;
  }

 private:
  const Problem& problem_;
  const Choice& choice_;
  // Of every window of level 1 in the table below.
  const std::map<int64_t, int64_t> pieces_{{2, 2},    {3, 3},     {4, 4},    {64, 64},   {67, 67}, {100, 50},
                                           {128, 64}, {134, 134}, {256, 64}, {509, 509}, {514, 2}, {521, 1}};
};

class Bits : public DeviceTable<Problem> {};

TEST_P(Bits, AreThoseOfPlainFloatLoops) {
  Problem problem = row();
  problem.head_dim = device().head_dim(problem.head_dim);
  Random random(31);
  const Choice choice = problem.random_choice(random);
  const PlainFloat plain(problem, choice);
  const auto floats = [](const Tensor& tensor) {
    const Values values = tensor.values();
    return Row(values.begin(), values.end());
  };
  const auto tensor = [&](const Sizes& sizes) {
    return Tensor(DType::float32, sizes, Memory::packed, random_values(random, sizes));
  };
  const Tensor x = tensor(problem.query_sizes()), y = tensor(problem.query_sub_sizes());
  const Tensor sub[] = {{DType::float32, problem.query_sub_sizes()},
                        {DType::float32, problem.query_sub_sizes()},
                        {DType::float32, problem.query_sub_sizes()}};
  const Tensor whole[] = {{DType::float32, problem.query_sizes()},
                          {DType::float32, problem.query_sizes()},
                          {DType::float32, problem.query_sizes()}};
  device().run(GatherArgs{x, x, x, choice, sub[0], sub[1], sub[2]});
  EXPECT_EQ(floats(sub[0]), plain.to_entries(floats(x), 0)) << "gather";
  device().run(ScatterBackwardArgs{x, choice, sub[1]});
  EXPECT_EQ(floats(sub[1]), plain.to_entries(floats(x), 1)) << "scatter_backward";
  device().run(ScatterArgs{y, choice, whole[0]});
  EXPECT_EQ(floats(whole[0]), plain.to_tokens(floats(y), 1)) << "scatter";
  device().run(GatherBackwardArgs{y, y, y, choice, whole[0], whole[1], whole[2]});
  EXPECT_EQ(floats(whole[2]), plain.to_tokens(floats(y), 0)) << "gather_backward";
}

const Problem kBits[] = {
    {"defaults", 1, 1, 1, 1033, 8, {1, 4, 16}, TopK::count(9)},
    {"windows_that_are_no_powers_of_two", 1, 1, 1, 1000, 8, {1, 3, 15, 60}, TopK::count(9)},
    {"every_level_to_128", 1, 1, 1, 1500, 8, {1, 2, 4, 8, 16, 32, 64, 128}, TopK::count(4)},
    {"a_first_window_of_64", 1, 1, 1, 1100, 8, {1, 64, 192}, TopK::count(4)},
    {"a_first_window_of_67", 1, 1, 1, 1100, 8, {1, 67, 201}, TopK::count(4)},
    {"a_first_window_of_100", 1, 1, 1, 1130, 8, {1, 100}, TopK::count(4)},
    {"a_first_window_of_128", 1, 1, 1, 2100, 8, {1, 128, 512}, TopK::count(4)},
    {"a_first_window_of_134", 1, 1, 1, 2100, 8, {1, 134}, TopK::count(4)},
    {"a_first_window_of_256", 1, 1, 1, 4100, 8, {1, 256, 1024}, TopK::count(3)},
    {"a_first_window_of_509", 1, 1, 1, 2100, 8, {1, 509}, TopK::count(2)},
    {"a_first_window_of_514", 1, 1, 1, 2100, 8, {1, 514}, TopK::count(2)},
    {"a_first_window_of_521", 1, 1, 1, 2100, 8, {1, 521}, TopK::count(2)},
    {"a_later_window_of_4096", 1, 1, 1, 9000, 8, {1, 4, 256, 4096}, TopK::count(2)},
};

INSTANTIATE_TEST_SUITE_P(Cases, Bits, on_each(devices(), kBits), on_device_name);

}  // namespace
}  // namespace lighthouse::test
