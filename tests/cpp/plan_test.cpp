// The settings and what follows from them: what is refused and in which words, k of a length, the length of the
// sub-sequence (METHOD 1 and 3).
#include "support.h"

namespace lighthouse::test {
namespace {

struct Refused : Named {
  std::function<void()> work;
  std::vector<std::string_view> words;
};

Pyramid raw_pyramid(std::array<int64_t, kMaxLevels> windows, int levels) { return {windows, levels}; }

class SettingsRefused : public testing::TestWithParam<Refused> {};

TEST_P(SettingsRefused, WithTheArgumentTheRuleAndTheValue) { expect_refused(GetParam().work, GetParam().words); }

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

const Refused kSettingsRefusedCases[] = {
    {"no_levels", [] { pyramid({}); }, {"windows", "empty"}},
    {"nine_levels", [] { pyramid({1, 2, 4, 8, 16, 32, 64, 128, 256}); }, {"windows", "9", "at most 8"}},
    {"first_window_of_two", [] { pyramid({2, 4}); }, {"windows[0]=2", "1"}},
    {"first_window_of_zero", [] { pyramid({0}); }, {"windows[0]=0"}},
    {"equal_windows", [] { pyramid({1, 4, 4}); }, {"windows[2]=4", "multiple", "larger"}},
    {"falling_windows", [] { pyramid({1, 4, 2}); }, {"windows[2]=2", "multiple", "larger"}},
    {"windows_that_do_not_divide", [] { pyramid({1, 4, 6}); }, {"windows[2]=6", "multiple", "4"}},
    {"negative_window", [] { pyramid({1, -4}); }, {"windows[1]=-4"}},
    {"window_beyond_any_sequence", [] { pyramid({1, int64_t{1} << 41}); }, {"windows[1]=2199023255552", "2^40"}},
    {"negative_parents", [] { TopK::count(-3); }, {"select_topk=-3", "zero or more"}},
    {"endless_parents", [] { TopK::count(kMax); }, {"select_topk=9223372036854775807", "at most"}},
    {"share_of_nothing", [] { TopK::share(0, 4); }, {"select_topk=0/4", "above 0"}},
    {"negative_share", [] { TopK::share(-1, 4); }, {"select_topk=-1/4", "above 0"}},
    {"share_above_one", [] { TopK::share(5, 4); }, {"select_topk=5/4", "at most 1"}},
    {"share_over_zero", [] { TopK::share(1, 0); }, {"select_topk=1/0", "denominator"}},
    {"share_over_too_many", [] { TopK::share(1, 65537); }, {"select_topk=1/65537", "65536"}},
    {"no_rows", [] { sequences_of(0, 8, pyramid({1, 2}), TopK::count(1)); }, {"rows=0", "at least one"}},
    {"no_tokens", [] { sequences_of(1, 0, pyramid({1, 2}), TopK::count(1)); }, {"tokens=0", "at least one"}},
    {"negative_tokens", [] { sequences_of(1, -8, pyramid({1}), TopK::count(1)); }, {"tokens=-8", "at least one"}},
    {"more_entries_than_a_prefix_holds",
     [] { sequences_of(1, int64_t{1} << 31, pyramid({1}), TopK::count(1)); },
     {"2147483648", "entries", "2^31 - 1"}},
    {"more_tokens_than_64_bits_count",
     [] { sequences_of(1, kMax, pyramid({1, 2}), TopK::share(1, 1)); },
     {"9223372036854775807", "tokens"}},
    {"pyramid_made_by_hand", [] { sequences_of(1, 8, raw_pyramid({1, 3, 4}, 3), TopK::count(1)); }, {"windows[2]=4"}},
    {"pyramid_of_no_levels", [] { sequences_of(1, 8, raw_pyramid({1}, 0), TopK::count(1)); }, {"windows"}},
    {"pyramid_of_nine_levels", [] { sequences_of(1, 8, raw_pyramid({1}, 9), TopK::count(1)); }, {"windows", "9"}},
    {"pyramid_of_minus_one_levels", [] { sequences_of(1, 8, raw_pyramid({1}, -1), TopK::count(1)); }, {"windows"}},
    {"nothing_at_all", [] { sequences_of(1, 8, pyramid({1}), TopK::count(0)); }, {"select_topk=0", "local_window"}},
    {"negative_local_window",
     [] { sequences_of(1, 8, pyramid({1}), TopK::count(1), true, -1); },
     {"local_window=-1", "2^31"}},
    {"local_window_too_long",
     [] { sequences_of(1, 8, pyramid({1}), TopK::count(1), true, kMaxLocalWindow + 1); },
     {"local_window=2147483649"}},
    {"share_made_by_hand", [] { sequences_of(1, 8, pyramid({1}), TopK{3, 2}); }, {"select_topk=3/2"}},
    {"share_over_less_than_zero", [] { sequences_of(1, 8, pyramid({1}), TopK{1, -2}); }, {"select_topk=1/-2"}},
};

INSTANTIATE_TEST_SUITE_P(Cases, SettingsRefused, testing::ValuesIn(kSettingsRefusedCases), case_name);

struct Parents : Named {
  TopK topk;
  int64_t tokens, parents;
};

class TopKParents : public testing::TestWithParam<Parents> {};

TEST_P(TopKParents, AreExact) { EXPECT_EQ(GetParam().topk.parents(GetParam().tokens), GetParam().parents); }

const Parents kTopKParentsCases[] = {
    {"number", TopK::count(7), 3, 7},
    {"default_share", TopK::share(1, 64), 32768, 512},
    {"rounded_down", TopK::share(1, 64), 127, 1},
    {"at_least_one", TopK::share(1, 64), 63, 1},
    {"all", TopK::share(1, 1), 12345, 12345},
    {"all_of_one", TopK::share(65536, 65536), 1, 1},
    {"29_hundredths_of_100", TopK::share(29, 100), 100, 29},
    {"two_thirds", TopK::share(2, 3), 1000001, 666667},
    {"almost_all", TopK::share(65535, 65536), 65536, 65535},
    {"beyond_64_bits_when_multiplied", TopK::share(65535, 65536), int64_t{1} << 50,
     (int64_t{1} << 50) - (int64_t{1} << 34)},
};

INSTANTIATE_TEST_SUITE_P(Cases, TopKParents, testing::ValuesIn(kTopKParentsCases), case_name);

struct Length : Named {
  int64_t tokens;
  std::vector<int64_t> windows;
  TopK topk;
  int64_t length;
  double kept_tokens;
};

class PlanLength : public testing::TestWithParam<Length> {};

TEST_P(PlanLength, IsTheFormula) {
  const Length& c = GetParam();
  for (const bool cover_start : {true, false}) {
    const Sequences sequences = sequences_of(3, c.tokens, pyramid(c.windows), c.topk, cover_start);
    EXPECT_EQ(sequences.entries, c.length);
    EXPECT_EQ(sequences.tokens, c.tokens);
    EXPECT_EQ(sequences.rows, 3);
    EXPECT_EQ(sequences.count(), 3);
    EXPECT_EQ(sequences.method.cover_start, cover_start);
    EXPECT_DOUBLE_EQ(sequences.kept_share(), c.kept_tokens / static_cast<double>(c.tokens));
  }
}

// Where N divides and budgets are met: S = N/w_{L-1} + sum of (w_{l+1}/w_l) * k. The others are counted by hand.
const Length kPlanLengthCases[] = {
    {"paper_98304", 98304, {1, 4, 16}, TopK::share(1, 64), 98304 / 16 + 2 * 4 * 1536, 4 * 1536},
    {"paper_4_levels", 32768, {1, 2, 4, 8}, TopK::count(1024), 32768 / 8 + 3 * 2 * 1024, 2 * 1024},
    {"one_level", 100, {1}, TopK::count(5), 100, 100},
    {"one_token", 1, {1, 4, 16}, TopK::count(1), 1, 1},
    {"shorter_than_a_window", 15, {1, 4, 16}, TopK::count(1), 15, 15},
    {"exactly_a_window", 16, {1, 4, 16}, TopK::count(1), 1 + 4 + 4, 4},
    {"one_past_a_window", 17, {1, 4, 16}, TopK::count(1), 1 + 4 + 4 + 1, 5},
    {"everything_chosen", 64, {1, 4, 16}, TopK::share(1, 1), 4 + 16 + 64, 64},
    {"everything_and_a_tail", 70, {1, 4, 16}, TopK::count(1000), 4 + 16 + 64 + 6, 70},
    {"two_uneven_strata", 16 * 5, {1, 16}, TopK::count(129), 5 + 80, 80},
    {"two_strata_of_more_than_their_budget", 16 * 401, {1, 16}, TopK::count(129), 401 + 16 * 129, 16 * 129},
    {"more_strata_than_entries", 12, {1, 4}, TopK::count(1280), 3 + 12, 12},
    {"endless_parents", 12, {1, 4}, TopK::count(int64_t{1} << 40), 3 + 12, 12},
    {"a_billion_tokens",
     int64_t{1} << 30,
     {1, 16, 256},
     TopK::share(1, 4096),
     (1 << 22) + 2 * 16 * (1 << 18),
     16 * (1 << 18)},
};

INSTANTIATE_TEST_SUITE_P(Cases, PlanLength, testing::ValuesIn(kPlanLengthCases), case_name);

TEST(PlanPrints, ItsSettingsReadably) {
  const std::string text = sequences_of(2, 4096, pyramid({1, 4, 16}), TopK::share(1, 64)).str();
  for (const char* word : {"4096", "1, 4, 16", "1/64", "64"}) {
    EXPECT_NE(text.find(word), std::string::npos) << text;
  }
  EXPECT_EQ(pyramid({1, 3, 9}).str(), "1, 3, 9");
  EXPECT_EQ(pyramid({1, 3, 9}).coarsest(), 9);
  EXPECT_EQ(TopK::count(12).str(), "12");
}

TEST(Sequences, AreTheRows) {
  const Sequences sequences = sequences_of(3, 40, pyramid({1, 4}), TopK::count(2));
  for (int64_t i = 0; i < 3; ++i) {
    const Sequence sequence = sequences.at(i);
    EXPECT_EQ(sequence.row, i);
    EXPECT_EQ(sequence.token_offset, 0);
    EXPECT_EQ(sequence.tokens, 40);
    EXPECT_EQ(sequence.entry_offset, 0);
    EXPECT_EQ(sequence.entries, sequences.entries);
  }
}

TEST(Sequences, ArePiecedOneAfterAnother) {
  const Sequences sequences = sequences_of(3, 40, pyramid({1, 4}), TopK::count(2));
  const Pieces pieces = sequences.pieces([&](int64_t index) { return sequences.at(index).tokens / 8; });
  EXPECT_EQ(pieces.total(), 15);
  EXPECT_EQ(pieces.most(), 5);
  int64_t number = 0;
  for (int64_t index = 0; index < sequences.count(); ++index) {
    EXPECT_EQ(pieces.before(index), number);
    for (int64_t piece = 0; piece < pieces.of(index); ++piece, ++number) {
      EXPECT_EQ(pieces.at(number).sequence, index);
      EXPECT_EQ(pieces.at(number).piece, piece);
    }
  }
}

TEST(DTypes, HaveNamesAndSizes) {
  EXPECT_STREQ(lighthouse::name(DType::bfloat16), "bfloat16");
  EXPECT_STREQ(lighthouse::name(DType::float16), "float16");
  EXPECT_EQ(size_of(DType::float64), 8);
  EXPECT_EQ(size_of(DType::float32), 4);
  EXPECT_EQ(size_of(DType::bfloat16), 2);
  EXPECT_EQ(contiguous_strides({2, 3, 5, 7}), (Sizes{105, 35, 7, 1}));
}

}  // namespace
}  // namespace lighthouse::test
