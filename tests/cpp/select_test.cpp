// The choice (METHOD 3 and 4): equal to the oracle's, entry by entry, on odd lengths, odd settings and odd scores, and
// keeping what METHOD promises.
#include "device.h"

namespace lighthouse::test {
namespace {

struct Selected {
  std::vector<uint8_t> mask;
  std::vector<int32_t> prefix;
};

Selected run_select(const Sequences& sequences, int64_t kv_heads, const std::vector<float>& query_score,
                    const std::vector<float>& key_score, const Device& device) {
  const size_t size = query_score.size();
  Selected result{std::vector<uint8_t>(size, 0xff), std::vector<int32_t>(size, -1)};  // poison
  device.run(SelectArgs{
      query_score.data(), key_score.data(), {sequences, kv_heads, result.mask.data(), result.prefix.data()}});
  return result;
}

// Puts each entry that the mask has where mask and prefix say; every place must be taken once.
std::vector<Entry> entries_by_place(const Sequences& sequences, const uint8_t* mask, const int32_t* prefix) {
  std::vector<Entry> entries(static_cast<size_t>(sequences.entries), Entry{-1, -1});
  for (int64_t t = 0; t < sequences.tokens; ++t) {
    for (int level = 0; level < 8; ++level) {
      if ((mask[t] >> level & 1) == 0) {
        continue;
      }
      const int64_t place = prefix[t] + std::popcount(static_cast<unsigned>(mask[t]) & ((1U << level) - 1U));
      if (level >= sequences.method.pyramid.levels || place < 0 || place >= sequences.entries ||
          entries[static_cast<size_t>(place)].level >= 0) {
        ADD_FAILURE() << "token " << t << ", level " << level << ": place " << place;
        return entries;
      }
      const int64_t width = sequences.method.pyramid.windows[static_cast<size_t>(level)];
      EXPECT_EQ((t + 1) % width, 0) << "no window of level " << level << " ends at token " << t;
      entries[static_cast<size_t>(place)] = {level, (t + 1) / width - 1};
    }
  }
  return entries;
}

void expect_promises(const Sequences& sequences, const std::vector<Entry>& entries, const uint8_t* mask,
                     const int32_t* prefix) {
  ASSERT_EQ(static_cast<int64_t>(entries.size()), sequences.entries);
  // Places strictly increase with (last token, level), and so no entry sees a later token than those after it.
  for (size_t i = 1; i < entries.size(); ++i) {
    ASSERT_LT(std::pair(last_token(sequences, entries[i - 1]), entries[i - 1].level),
              std::pair(last_token(sequences, entries[i]), entries[i].level))
        << "place " << i;
  }
  int64_t sum = 0;
  for (int64_t t = 0; t < sequences.tokens; ++t) {
    ASSERT_EQ(prefix[t], sum) << "token " << t;
    sum += std::popcount(static_cast<unsigned>(mask[t]));
  }
  if (sequences.method.cover_start) {
    std::vector<bool> covered(static_cast<size_t>(sequences.tokens), false);
    for (const Entry& entry : entries) {
      const int64_t last = last_token(sequences, entry);
      for (int64_t t = last; t < std::min(last + window(sequences, entry), sequences.tokens); ++t) {
        covered[static_cast<size_t>(t)] = true;
      }
    }
    EXPECT_EQ(std::count(covered.begin(), covered.end(), false), 0);
  }
}

void expect_oracle(const Sequences& sequences, int64_t kv_heads, const std::vector<float>& query_score,
                   const std::vector<float>& key_score, const Device& device) {
  const Selected selected = run_select(sequences, kv_heads, query_score, key_score, device);
  each_sequence_and_head(sequences, kv_heads, [&](const Sequence& sequence, int64_t head) {
    SCOPED_TRACE("row " + std::to_string(sequence.row) + ", head " + std::to_string(head));
    const int64_t start = start_of(sequences, sequence, kv_heads, head);
    const std::vector<Entry> oracle =
        reference::select(sequences.method, sequence, query_score.data() + start, key_score.data() + start);
    const std::vector<Entry> ours =
        entries_by_place(sequences, selected.mask.data() + start, selected.prefix.data() + start);
    for (size_t i = 0; i < std::min(oracle.size(), ours.size()); ++i) {
      ASSERT_TRUE(oracle[i] == ours[i]) << "place " << i << ": level " << ours[i].level << " index " << ours[i].index
                                        << ", not level " << oracle[i].level << " index " << oracle[i].index;
    }
    expect_promises(sequences, oracle, selected.mask.data() + start, selected.prefix.data() + start);
  });
}

struct Case : Named {
  int64_t tokens;
  std::vector<int64_t> windows;
  TopK topk;
  int64_t rows = 1;
  int64_t kv_heads = 1;
};

class Select : public DeviceTable<Case> {};

TEST_P(Select, EqualsTheOracleForAllKindsOfScores) {
  const Case& c = row();
  Random random(3);
  for (const bool cover_start : {true, false}) {
    const Sequences sequences = sequences_of(c.rows, c.tokens, pyramid(c.windows), c.topk, cover_start);
    for (const ScoreKind kind : kScoreKinds) {
      SCOPED_TRACE(std::string(name(kind)) + (cover_start ? ", start covered" : ", start open"));
      const int64_t count = c.rows * c.kv_heads * c.tokens;
      const std::vector<float> query_score = make_scores(kind, count, random);
      const std::vector<float> key_score = make_scores(kind, count, random);
      expect_oracle(sequences, c.kv_heads, query_score, key_score, device());
    }
  }
}

const Case kSelectCases[] = {
    {"one_token", 1, {1, 4, 16}, TopK::count(1)},
    {"one_token_and_level", 1, {1}, TopK::count(1)},
    {"one_level", 77, {1}, TopK::count(5), 2, 2},
    {"shorter_than_a_window", 15, {1, 4, 16}, TopK::count(3)},
    {"exactly_a_window", 16, {1, 4, 16}, TopK::count(1)},
    {"one_token_past_a_window", 4097, {1, 4, 16}, TopK::count(64)},
    {"one_token_short_of_a_window", 4095, {1, 4, 16}, TopK::count(64)},
    {"defaults", 4096, {1, 4, 16}, TopK::share(1, 64), 2, 3},
    {"rows_and_heads_of_odd_length", 203, {1, 4, 16}, TopK::count(3), 3, 5},
    {"one_parent", 1000, {1, 4, 16}, TopK::count(1)},
    {"two_parents", 1000, {1, 4, 16}, TopK::count(2)},
    {"odd_parents", 1000, {1, 2, 4, 8}, TopK::count(7)},
    {"two_levels", 999, {1, 8}, TopK::count(11)},
    {"five_levels", 1500, {1, 2, 4, 8, 32}, TopK::count(9)},
    {"six_levels", 1500, {1, 2, 4, 8, 16, 32}, TopK::count(9)},
    {"seven_levels", 1500, {1, 2, 4, 8, 16, 32, 64}, TopK::count(4)},
    {"eight_levels", 3000, {1, 2, 4, 8, 16, 32, 64, 128}, TopK::count(5)},
    {"eight_levels_all_chosen", 1000, {1, 2, 4, 8, 16, 32, 64, 128}, TopK::share(1, 1)},
    {"windows_of_three", 1234, {1, 3, 9}, TopK::count(10)},
    {"windows_of_sixty", 2222, {1, 5, 15, 60}, TopK::count(6)},
    {"wide_window", 5000, {1, 1000}, TopK::count(2)},
    {"window_longer_than_the_sequence", 50, {1, 4, int64_t{1} << 40}, TopK::count(2)},
    {"more_budget_than_entries", 100, {1, 2, 4}, TopK::count(4096)},
    {"endless_budget", 100, {1, 2, 4}, TopK::count(int64_t{1} << 40)},
    {"budget_of_all_entries", 512, {1, 4, 16}, TopK::count(32)},
    {"budget_of_all_but_one", 512, {1, 4, 16}, TopK::count(31)},
    {"one_full_stratum", 4096, {1, 2, 8}, TopK::count(128)},
    {"two_strata_by_one", 4096, {1, 2, 8}, TopK::count(129)},
    {"entries_uneven_over_strata", 8 * 401, {1, 2, 8}, TopK::count(256)},
    {"entries_uneven_more_often_than_budget", 4 * 1204, {1, 4}, TopK::count(513)},
    {"budget_uneven_more_often_than_entries", 4 * 1201, {1, 4}, TopK::count(518)},
    {"both_uneven_alike", 4 * 1202, {1, 4}, TopK::count(517)},
    {"strata_smaller_than_their_budget", 4 * 150, {1, 2, 4}, TopK::count(300)},
    {"some_strata_smaller_than_their_budget", 3 * 255, {1, 3}, TopK::count(254)},
    {"more_strata_than_entries", 16 * 3 + 5, {1, 4, 16}, TopK::count(1300)},
    {"as_many_strata_as_entries", 16 * 4, {1, 4, 16}, TopK::count(512)},
    {"three_hundred_of_many", 16384, {1, 4, 16}, TopK::count(300)},
    {"share_of_a_tenth", 3001, {1, 2, 4}, TopK::share(1, 10)},
    {"share_29_hundredths", 700, {1, 2, 4}, TopK::share(29, 100)},
    {"share_of_all", 1001, {1, 4, 16}, TopK::share(1, 1)},
    {"share_too_small_for_one", 200, {1, 4, 16}, TopK::share(1, 65536)},
};

INSTANTIATE_TEST_SUITE_P(Cases, Select, on_each(devices(), kSelectCases), on_device_name);

class SelectOnDevice : public DeviceTest {};
INSTANTIATE_TEST_SUITE_P(Devices, SelectOnDevice, testing::ValuesIn(devices()), device_name);

// Many small settings at random: what no table thinks of.
TEST_P(SelectOnDevice, EqualsTheOracleAtRandom) {
  Random random(4);
  for (int round = 0; round < 1500; ++round) {
    std::vector<int64_t> windows{1};
    const int64_t levels = 1 + random.below(8);
    while (static_cast<int64_t>(windows.size()) < levels && windows.back() < 500) {
      windows.push_back(windows.back() * (2 + random.below(4)));
    }
    const int64_t tokens = 1 + random.below(random.below(8) == 0 ? 3000 : 300);
    const TopK topk = random.below(3) == 0 ? TopK::share(1 + random.below(20), 20 + random.below(200))
                                           : TopK::count(1 + random.below(random.below(2) == 0 ? 8 : 700));
    const int64_t rows = 1 + random.below(2);
    const int64_t kv_heads = 1 + random.below(2);
    const Sequences sequences = sequences_of(rows, tokens, pyramid(windows), topk, random.below(2) == 0);
    const auto kind = [&] { return kScoreKinds[static_cast<size_t>(random.below(std::size(kScoreKinds)))]; };
    const std::vector<float> query_score = make_scores(kind(), rows * kv_heads * tokens, random);
    const std::vector<float> key_score = make_scores(kind(), rows * kv_heads * tokens, random);
    SCOPED_TRACE(sequences.str());
    expect_oracle(sequences, kv_heads, query_score, key_score, device());
    if (testing::Test::HasFailure()) {
      break;
    }
  }
}

TEST(SelectThreads, HaveTheSameBits) {
  Random random(5);
  const Sequences sequences = sequences_of(2, 5003, pyramid({1, 4, 16}), TopK::count(300));
  const std::vector<float> query_score = make_scores(ScoreKind::few_values, int64_t{2} * 3 * 5003, random);
  const std::vector<float> key_score = make_scores(ScoreKind::random, int64_t{2} * 3 * 5003, random);
  const Selected one = run_select(sequences, 3, query_score, key_score, CpuDevice(ThreadExecutor(1)));
  for (const auto& [name, executor] : executors()) {
    const Selected other = run_select(sequences, 3, query_score, key_score, CpuDevice(*executor));
    EXPECT_EQ(one.mask, other.mask) << name;
    EXPECT_EQ(one.prefix, other.prefix) << name;
  }
}

// A token's choice depends on nothing but its own row and head.
TEST_P(SelectOnDevice, KeepsRowsAndHeadsIndependent) {
  Random random(6);
  const Sequences sequences = sequences_of(2, 500, pyramid({1, 4, 16}), TopK::count(5));
  const std::vector<float> query_score = make_scores(ScoreKind::random, 2 * 2 * 500, random);
  std::vector<float> key_score = make_scores(ScoreKind::random, 2 * 2 * 500, random);
  const Selected before = run_select(sequences, 2, query_score, key_score, device());
  for (size_t i = 1000; i < 1500; ++i) {
    key_score[i] = -key_score[i];  // row 1, head 0
  }
  const Selected after = run_select(sequences, 2, query_score, key_score, device());
  for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, 1000}, {1500, 2000}}) {
    EXPECT_TRUE(std::equal(before.mask.begin() + first, before.mask.begin() + last, after.mask.begin() + first));
  }
  EXPECT_FALSE(std::equal(before.mask.begin() + 1000, before.mask.begin() + 1500, after.mask.begin() + 1000));
}

class CheckSelection : public testing::Test {
 protected:
  const ThreadExecutor executor{2};
  const Sequences sequences = sequences_of(2, 203, pyramid({1, 4, 16}), TopK::count(3));
  Random random{7};
  Choice choice = oracle_choice(sequences, 2, make_scores(ScoreKind::random, 2 * 2 * 203, random),
                                make_scores(ScoreKind::random, 2 * 2 * 203, random));
  void expect_refused() const { EXPECT_THROW(cpu::check_selection(choice, executor), std::invalid_argument); }
};

TEST_F(CheckSelection, TakesTheOraclesChoice) { EXPECT_NO_THROW(cpu::check_selection(choice, executor)); }

TEST_F(CheckSelection, RefusesAnEntryTooFew) {
  choice.mask[202] = 0;
  expect_refused();
}

TEST_F(CheckSelection, RefusesALevelThatThePyramidHasNot) {
  choice.mask[403] = static_cast<uint8_t>(choice.mask[403] | 8);
  expect_refused();
}

TEST_F(CheckSelection, RefusesAWindowThatDoesNotEndThere) {
  // Token 201 is in the tail: level 0 alone. A level 1 window ends at 199.
  choice.mask[201] = 2;
  expect_refused();
}

TEST_F(CheckSelection, RefusesAPrefixThatIsNotTheRunningSum) {
  ++choice.prefix[300];
  expect_refused();
}

TEST_F(CheckSelection, RefusesAPrefixOutOfRange) {
  choice.prefix[811] = 1 << 30;
  expect_refused();
}

TEST_F(CheckSelection, RefusesNoArrays) {
  EXPECT_THROW(cpu::check_selection(ConstSelection(sequences, 2, nullptr, choice.prefix.data()), executor),
               std::invalid_argument);
  EXPECT_THROW(cpu::check_selection(ConstSelection(sequences, 2, choice.mask.data(), nullptr), executor),
               std::invalid_argument);
  EXPECT_THROW(cpu::check_selection(ConstSelection(sequences, 0, choice.mask.data(), choice.prefix.data()), executor),
               std::invalid_argument);
}

}  // namespace
}  // namespace lighthouse::test
