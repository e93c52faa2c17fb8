// Documents of their own lengths in one row (METHOD 7a): each as if it were alone, to the last bit.
#include "device.h"
#include "lighthouse/attention.h"

namespace lighthouse::test {
namespace {

using Length = Documents::Length;
using cpu::attention_backward;
using cpu::attention_forward;
using cpu::causal_attention;

Method method_of(const std::vector<int64_t>& windows, const TopK& topk, int64_t local_window = 0) {
  return {.pyramid = pyramid(windows), .topk = topk, .local_window = local_window};
}

TEST(Documents, LieOneBehindTheOther) {
  const std::vector<Length> lengths{
      {.tokens = 100}, {.tokens = 0}, {.tokens = 7, .padding = true}, {.tokens = 3}, {.tokens = 40}};
  const Documents documents(lengths, method_of({1, 4, 16}, TopK::share(1, 8)));
  const Sequences& all = documents.sequences();
  ASSERT_EQ(all.count(), 4);
  EXPECT_FALSE(all.alike());
  EXPECT_EQ(all.rows, 1);
  EXPECT_EQ(all.tokens, 150);
  EXPECT_EQ(all.longest(), 100);
  int64_t tokens = 0, entries = 0;
  for (int64_t i = 0; i < all.count(); ++i) {
    const Sequence sequence = all.at(i);
    EXPECT_EQ(sequence.row, 0);
    EXPECT_EQ(sequence.token_offset, tokens);
    EXPECT_EQ(sequence.entry_offset, entries);
    EXPECT_EQ(sequence.padding, i == 1);
    tokens += sequence.tokens;
    entries += sequence.entries;
    if (i == 1) {
      EXPECT_EQ(sequence.entries, 0);
      continue;
    }
    const Sequences alone = Sequences::of_rows(1, sequence.tokens, all.method);
    EXPECT_EQ(sequence.entries, alone.entries);
    EXPECT_EQ(sequence.parents, alone.at(0).parents);
  }
  EXPECT_EQ(entries, all.entries);
  EXPECT_NE(all.str().find("documents=4"), std::string::npos) << all.str();
}

TEST(Documents, ShareAWholeNumberOfParentsWithinTheirRowsAsTheyCame) {
  const std::vector<Length> lengths{{.tokens = 60, .row = 0},
                                    {.tokens = 30, .row = 0},
                                    {.tokens = 10, .row = 0, .padding = true},
                                    {.tokens = 1, .row = 0},
                                    {.tokens = 50, .row = 1}};
  const Documents documents(lengths, method_of({1, 4}, TopK::count(9)));
  std::vector<int64_t> parents;
  for (int64_t i = 0; i < documents.sequences().count(); ++i) parents.push_back(documents.sequences().at(i).parents);
  // 9 of 91 tokens, none less than 1; 9 of 50.
  EXPECT_EQ(parents, (std::vector<int64_t>{9 * 60 / 91, 9 * 30 / 91, 0, 1, 9}));
  // Beyond 64 bits when multiplied.
  const std::vector<Length> huge{{.tokens = 1 << 29}, {.tokens = 1 << 28}};
  const Documents all(huge, method_of({1}, TopK::count(int64_t{3} << 38)));
  EXPECT_EQ(all.sequences().at(0).parents, int64_t{2} << 38);
}

TEST(Documents, OfOneDocumentAreARow) {
  for (const TopK& topk : {TopK::count(0), TopK::count(3), TopK::share(1, 16)}) {
    const Method method = method_of({1, 4, 16}, topk, 8);
    const Sequences row = Sequences::of_rows(1, 203, method);
    const std::vector<Length> lengths{{.tokens = 203}};
    const Documents documents(lengths, method);
    const Sequences& one = documents.sequences();
    EXPECT_EQ(one.entries, row.entries);
    EXPECT_EQ(one.at(0).parents, row.at(0).parents);
    EXPECT_EQ(one.at(0).entries, row.at(0).entries);
    EXPECT_DOUBLE_EQ(one.kept_share(), row.kept_share());
  }
}

struct Refused : Named {
  std::vector<Length> lengths;
  std::vector<std::string_view> words;
};

const Refused kRefused[] = {
    {"none", {}, {"no document has a token"}},
    {"only_empty_ones", {{.tokens = 0}, {.tokens = 0}}, {"no document has a token"}},
    {"less_than_none", {{.tokens = -1}}, {"has -1 tokens", "at least 0"}},
    {"too_long", {{.tokens = (int64_t{1} << 40) + 1}}, {"at most 2^40"}},
    {"too_long_together", {{.tokens = int64_t{1} << 40}, {.tokens = 1}}, {"at most 2^40"}},
    {"row_below_none", {{.tokens = 1, .row = -1}}, {"row -1"}},
    {"row_that_is_not_there", {{.tokens = 1, .row = 1}}, {"row 1", "counted from 0"}},
};

class DocumentsRefuse : public testing::TestWithParam<Refused> {};

TEST_P(DocumentsRefuse, WhatIsNoRow) {
  expect_refused([&] { Documents(GetParam().lengths, method_of({1, int64_t{1} << 30}, TopK::count(1))); },
                 GetParam().words);
}

INSTANTIATE_TEST_SUITE_P(Cases, DocumentsRefuse, testing::ValuesIn(kRefused), case_name);

TEST(Pieces, OfDocumentsAreFound) {
  Random random(5);
  for (int round = 0; round < 100; ++round) {
    std::vector<Length> lengths;
    for (int64_t i = random.below(20); i >= 0; --i) lengths.push_back({.tokens = 1 + random.below(40)});
    const Documents documents(lengths, method_of({1, 4}, TopK::count(2)));
    const Sequences& all = documents.sequences();
    const auto pieces = all.pieces([&](int64_t index) { return all.at(index).tokens / 8; });  // of some there are none
    int64_t number = 0, most = 0;
    for (int64_t index = 0; index < all.count(); ++index) {
      EXPECT_EQ(pieces.before(index), number);
      EXPECT_EQ(pieces.of(index), all.at(index).tokens / 8);
      most = std::max(most, pieces.of(index));
      for (int64_t piece = 0; piece < all.at(index).tokens / 8; ++piece, ++number) {
        EXPECT_EQ(pieces.at(number).sequence, index);
        EXPECT_EQ(pieces.at(number).piece, piece);
      }
    }
    EXPECT_EQ(pieces.total(), number);
    EXPECT_EQ(pieces.most(), most);
  }
}

struct Heads {
  int64_t query = 2, kv = 1, dim = 4;
};

// A row of documents as tensors, and what comes of it, forward and backward.
struct Whole {
  Tensor query, key, value, grad_output;
  Tensor output, grad_query, grad_key, grad_value;

  std::array<const Tensor*, 4> results() const { return {&output, &grad_query, &grad_key, &grad_value}; }
};

Whole whole(DType dtype, const Heads& heads, int64_t tokens, Memory memory, const std::array<Values, 4>& numbers) {
  const Sizes q{1, heads.query, tokens, heads.dim}, kv{1, heads.kv, tokens, heads.dim};
  return {{dtype, q, memory, numbers[0]},
          {dtype, kv, memory, numbers[1]},
          {dtype, kv, memory, numbers[2]},
          {dtype, q, memory, numbers[3]},
          {dtype, q, memory},
          {dtype, q, memory},
          {dtype, kv, memory},
          {dtype, kv, memory}};
}

std::array<Values, 4> random_numbers(const Heads& heads, int64_t tokens, Random& random) {
  const auto make = [&](int64_t count) { return random_values(random, {1, count, tokens, heads.dim}); };
  return {make(heads.query), make(heads.kv), make(heads.kv), make(heads.query)};
}

void attend(const Sequences& sequences, Whole& of, const Executor& executor) {
  const auto state =
      attention_forward({sequences, of.query, of.key, of.value, of.output, causal_attention(executor)}, executor);
  attention_backward(*state, {of.grad_output, of.grad_query, of.grad_key, of.grad_value});
}

// Tokens [first, first + count) of every head.
Values tokens_of(const Values& values, int64_t tokens, int64_t dim, int64_t first, int64_t count) {
  Values part;
  const int64_t heads = std::ssize(values) / (tokens * dim);
  for (int64_t head = 0; head < heads; ++head) {
    const auto from = values.begin() + (head * tokens + first) * dim;
    part.insert(part.end(), from, from + count * dim);
  }
  return part;
}

struct Row : Named {
  std::vector<Length> lengths;
  std::vector<int64_t> windows;
  TopK topk;
  int64_t local_window = 0;
};

int64_t tokens_in(const std::vector<Length>& lengths) {
  int64_t tokens = 0;
  for (const Length& length : lengths) tokens += length.tokens;
  return tokens;
}

// The method of a document that is alone: its part of a whole number of parents.
Method alone(const Method& method, const Sequence& sequence) {
  Method own = method;
  if (own.topk.chooses() && own.topk.denominator == 0) own.topk = TopK::count(sequence.parents);
  return own;
}

class DocumentRows : public testing::TestWithParam<Row> {};

TEST_P(DocumentRows, AreTheirDocumentsAlone) {
  const Row& row = GetParam();
  const Heads heads{4, 2, 8};
  const ThreadExecutor executor(2);
  Random random(31);
  const Documents documents(row.lengths, method_of(row.windows, row.topk, row.local_window));
  const Sequences& all = documents.sequences();
  const auto numbers = random_numbers(heads, all.tokens, random);
  for (const DType dtype : kDTypes) {
    SCOPED_TRACE(lighthouse::name(dtype));
    Whole together = whole(dtype, heads, all.tokens, Memory::transposed, numbers);
    attend(all, together, executor);
    for (int64_t i = 0; i < all.count(); ++i) {
      const Sequence sequence = all.at(i);
      const auto own = [&](const Values& values) {
        return tokens_of(values, all.tokens, heads.dim, sequence.token_offset, sequence.tokens);
      };
      Whole apart = whole(dtype, heads, sequence.tokens, Memory::transposed,
                          {own(numbers[0]), own(numbers[1]), own(numbers[2]), own(numbers[3])});
      if (!sequence.padding) {
        attend(Sequences::of_rows(1, sequence.tokens, alone(all.method, sequence)), apart, executor);
      }
      for (size_t which = 0; which < 4; ++which) {
        const Values expected =
            sequence.padding ? Values(apart.results()[which]->values().size(), 0.0) : apart.results()[which]->values();
        ASSERT_EQ(own(together.results()[which]->values()), expected) << "document " << i << ", result " << which;
      }
    }
  }
}

TEST_P(DocumentRows, HaveTheSameBitsUnderEveryExecutor) {
  const Row& row = GetParam();
  const Heads heads{2, 1, 8};
  Random random(32);
  const Documents documents(row.lengths, method_of(row.windows, row.topk, row.local_window));
  const auto numbers = random_numbers(heads, documents.sequences().tokens, random);
  std::vector<std::vector<std::byte>> first;
  for (const auto& [name, executor] : executors()) {
    Whole of = whole(DType::bfloat16, heads, documents.sequences().tokens, Memory::packed, numbers);
    attend(documents.sequences(), of, *executor);
    std::vector<std::vector<std::byte>> bits;
    for (const Tensor* result : of.results()) bits.push_back(result->bits());
    if (first.empty()) first = bits;
    EXPECT_EQ(bits, first) << name;
  }
}

std::vector<Length> many(int64_t count, int64_t tokens) {
  return std::vector<Length>(static_cast<size_t>(count), Length{.tokens = tokens});
}

const Row kRows[] = {
    {"one", {{.tokens = 203}}, {1, 4, 16}, TopK::share(1, 16)},
    {"two", {{.tokens = 120}, {.tokens = 83}}, {1, 4, 16}, TopK::share(1, 16)},
    {"of_one_token", many(40, 1), {1, 4, 16}, TopK::share(1, 16)},
    {"shorter_than_a_window", many(9, 15), {1, 4, 16}, TopK::share(1, 16)},
    {"exactly_a_window", many(9, 16), {1, 4, 16}, TopK::share(1, 16)},
    {"a_number_of_parents", {{.tokens = 90}, {.tokens = 5}, {.tokens = 150}}, {1, 4, 16}, TopK::count(7)},
    {"rows_as_they_came",
     {{.tokens = 90}, {.tokens = 38}, {.tokens = 70, .row = 1}, {.tokens = 58, .row = 1}},
     {1, 4, 16},
     TopK::count(5)},
    {"padding_at_the_end", {{.tokens = 70}, {.tokens = 33}, {.tokens = 25, .padding = true}}, {1, 4}, TopK::count(4)},
    {"padding_at_the_start", {{.tokens = 25, .padding = true}, {.tokens = 70}}, {1, 4}, TopK::count(4)},
    {"padding_between", {{.tokens = 70}, {.tokens = 1, .padding = true}, {.tokens = 33}}, {1, 4}, TopK::count(4)},
    {"padding_alone", {{.tokens = 30, .padding = true}}, {1, 4}, TopK::count(4)},
    {"with_a_window", {{.tokens = 70}, {.tokens = 9, .padding = true}, {.tokens = 44}}, {1, 4}, TopK::count(4), 20},
    {"a_window_alone", {{.tokens = 70}, {.tokens = 9, .padding = true}, {.tokens = 44}}, {1, 4}, TopK::count(0), 20},
    {"several_strata", {{.tokens = 4 * 300}, {.tokens = 4 * 40}}, {1, 4}, TopK::share(1, 4)},
    {"odd_windows", {{.tokens = 131}, {.tokens = 64}, {.tokens = 65}}, {1, 5, 15, 60}, TopK::share(1, 20)},
};

INSTANTIATE_TEST_SUITE_P(Cases, DocumentRows, testing::ValuesIn(kRows), case_name);

TEST(RandomDocuments, AreTheOracles) {
  constexpr int kRounds = 10000;
  const std::vector<int64_t> pyramids[] = {{1}, {1, 2}, {1, 4, 16}, {1, 3, 9}, {1, 2, 4, 8}, {1, 16}};
  const ThreadExecutor executor(1);
  Random random(33);
  const Heads heads{2, 1, 2};
  int compared = 0;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<Length> lengths;
    for (int64_t i = random.below(6); i >= 0; --i) {
      const int64_t most = int64_t{1} << (1 + random.below(6));  // a long tail
      lengths.push_back({.tokens = random.below(most), .padding = random.below(6) == 0});
    }
    if (tokens_in(lengths) == 0) continue;
    const int64_t parents = 1 + random.below(6);
    const TopK topk = random.below(2) == 0 ? TopK::count(parents) : TopK::share(parents, 16);
    const int64_t window = random.below(3) == 0 ? 1 + random.below(20) : 0;
    const Documents documents(lengths, method_of(pyramids[random.below(6)], topk, window));
    const Sequences& all = documents.sequences();
    SCOPED_TRACE(testing::Message() << "round " << round << ": " << all.str());

    const ScoreKind kind = kScoreKinds[random.below(8)];
    const std::vector<float> query_score = make_scores(kind, all.tokens, random);
    const std::vector<float> key_score = make_scores(kind, all.tokens, random);
    const Choice exact = oracle_choice(all, 1, query_score, key_score);
    std::vector<uint8_t> mask(static_cast<size_t>(all.tokens), 99);
    std::vector<int32_t> prefix(static_cast<size_t>(all.tokens), -99);
    const Selection ours{all, 1, mask.data(), prefix.data()};
    cpu::run(SelectArgs{query_score.data(), key_score.data(), ours}, executor);
    ASSERT_EQ(mask, exact.mask);
    ASSERT_EQ(prefix, exact.prefix);
    cpu::check_selection(ours, executor);

    ++compared;
    if (round % 10 != 0) continue;
    const auto numbers = random_numbers(heads, all.tokens, random);
    Whole of = whole(DType::float64, heads, all.tokens, Memory::packed, numbers);
    const auto state = attention_forward({all, of.query, of.key, of.value, of.output, causal_attention(executor),
                                          cpu::Scores{query_score.data(), key_score.data()}},
                                         executor);
    attention_backward(*state, {of.grad_output, of.grad_query, of.grad_key, of.grad_value});
    std::array<Values, 4> oracle{numbers[0], numbers[0], numbers[1], numbers[1]};
    const reference::AttentionArgs args{all,
                                        {heads.query, heads.kv, heads.dim},
                                        numbers[0].data(),
                                        numbers[1].data(),
                                        numbers[2].data(),
                                        query_score.data(),
                                        key_score.data()};
    reference::attention(args, oracle[0].data());
    reference::attention_backward(args, numbers[3].data(), oracle[1].data(), oracle[2].data(), oracle[3].data());
    for (size_t which = 0; which < 4; ++which) {
      expect_close(of.results()[which]->values(), oracle[which], DType::float64);
    }
    if (HasFailure()) return;
  }
  EXPECT_GT(compared, kRounds * 9 / 10);
}

TEST(DocumentsLeak, NothingIntoAnother) {
  const Row& row = kRows[11];  // with a window and padding
  const Heads heads{2, 1, 8};
  const ThreadExecutor executor(2);
  Random random(34);
  const Documents documents(row.lengths, method_of(row.windows, row.topk, row.local_window));
  const Sequences& all = documents.sequences();
  const auto numbers = random_numbers(heads, all.tokens, random);
  Whole before = whole(DType::float32, heads, all.tokens, Memory::packed, numbers);
  attend(all, before, executor);
  for (int64_t changed = 0; changed < all.count(); ++changed) {
    auto other = numbers;
    const Sequence sequence = all.at(changed);
    for (Values& values : other) {
      const int64_t count = std::ssize(values) / (all.tokens * heads.dim);
      for (int64_t head = 0; head < count; ++head) {
        const auto from = values.begin() + (head * all.tokens + sequence.token_offset) * heads.dim;
        std::fill(from, from + sequence.tokens * heads.dim, std::numeric_limits<double>::quiet_NaN());
      }
    }
    Whole after = whole(DType::float32, heads, all.tokens, Memory::packed, other);
    attend(all, after, executor);
    for (int64_t i = 0; i < all.count(); ++i) {
      if (i == changed) continue;
      for (size_t which = 0; which < 4; ++which) {
        const auto own = [&](const Whole& of) {
          return tokens_of(of.results()[which]->values(), all.tokens, heads.dim, all.at(i).token_offset,
                           all.at(i).tokens);
        };
        EXPECT_EQ(own(after), own(before)) << changed << " changed " << i << ", result " << which;
      }
    }
  }
}

#if defined(LIGHTHOUSE_CUDA)
TEST(DocumentsOnCuda, AreRefusedSoFar) {
  const Row& row = kRows[1];
  const Documents documents(row.lengths, method_of(row.windows, row.topk));
  const auto tokens = static_cast<size_t>(documents.sequences().tokens);
  const std::vector<float> scores(tokens);
  std::vector<uint8_t> mask(tokens);
  std::vector<int32_t> prefix(tokens);
  const SelectArgs args{scores.data(), scores.data(), {documents.sequences(), 1, mask.data(), prefix.data()}};
  expect_refused([&] { cuda_calls().run(args); }, {"on the CPU alone"});
}
#endif

}  // namespace
}  // namespace lighthouse::test
