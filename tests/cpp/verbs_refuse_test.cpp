// What score, gather, scatter and the gradients refuse, and select: by name, before anything is written or enqueued.
#include "device.h"

namespace lighthouse::test {
namespace {

// Arguments that are right until a case breaks one of them.
struct Call {
  static constexpr DType kDType = DType::float32;
  Sequences sequences = sequences_of(2, 40, pyramid({1, 4, 16}), TopK::count(1));
  Tensor q{kDType, {2, 4, 40, 8}}, k{kDType, {2, 2, 40, 8}}, v{kDType, {2, 2, 40, 8}};
  Tensor q_sub{kDType, {2, 4, sequences.entries, 8}}, k_sub{kDType, {2, 2, sequences.entries, 8}},
      v_sub{kDType, {2, 2, sequences.entries, 8}};
  View query = q, key = k, value = v, query_sub = q_sub, key_sub = k_sub, value_sub = v_sub;
  std::vector<uint8_t> mask = std::vector<uint8_t>(2 * 2 * 40, 1);
  std::vector<int32_t> prefix = std::vector<int32_t>(2 * 2 * 40, 0);
  std::vector<float> query_score = std::vector<float>(2 * 2 * 40, 0), key_score = query_score;
  Tensor a{kDType, {2, 4, 40, 8}}, a_kv{kDType, {2, 2, 40, 8}};
  View added, added_key, added_value;  // of no data: nothing is added
  float* query_scores = query_score.data();
  float* key_scores = key_score.data();
  Selection selection{sequences, 2, mask.data(), prefix.data()};
};

struct RefusedCall : Named {
  std::function<void(Call&)> spoil;
  std::vector<std::string_view> words;
};

void score(const Device& device, const Call& c) { device.run(ScoreArgs{c.query, c.key, c.query_scores, c.key_scores}); }
void gather(const Device& device, const Call& c) {
  device.run(GatherArgs{c.query, c.key, c.value, c.selection, c.query_sub, c.key_sub, c.value_sub});
}
void gather_backward(const Device& device, const Call& c) {
  device.run(GatherBackwardArgs{c.query_sub, c.key_sub, c.value_sub, c.selection, c.query, c.key, c.value, c.added,
                                c.added_key, c.added_value});
}
void scatter(const Device& device, const Call& c) {
  device.run(ScatterArgs{c.query_sub, c.selection, c.query, c.added});
}
void scatter_backward(const Device& device, const Call& c) {
  device.run(ScatterBackwardArgs{c.query, c.selection, c.query_sub});
}

void expect_call_refused(const OnDevice<RefusedCall>& on, void (*verb)(const Device&, const Call&)) {
  Call call;
  on.row.spoil(call);
  expect_refused([&] { verb(*on.device, call); }, on.row.words);
  // Before anything is written.
  for (const Tensor* tensor : {&call.q, &call.k, &call.v, &call.q_sub, &call.k_sub, &call.v_sub}) {
    const std::vector<std::byte> bits = tensor->bits();
    EXPECT_TRUE(std::all_of(bits.begin(), bits.end(), [](std::byte b) { return b == std::byte{0xff}; }));
  }
}

class ScoreRefuses : public DeviceTable<RefusedCall> {};
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

INSTANTIATE_TEST_SUITE_P(Cases, ScoreRefuses, on_each(refusing_devices(), kScoreRefusesCases), on_device_name);

class BothDirectionsRefuse : public DeviceTable<RefusedCall> {};
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

INSTANTIATE_TEST_SUITE_P(Cases, BothDirectionsRefuse, on_each(refusing_devices(), kBothDirectionsRefuseCases),
                         on_device_name);

class WriteBackRefuses : public DeviceTable<RefusedCall> {};
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

INSTANTIATE_TEST_SUITE_P(Cases, WriteBackRefuses, on_each(refusing_devices(), kWriteBackRefusesCases), on_device_name);

class AddedRefuses : public DeviceTable<RefusedCall> {};
TEST_P(AddedRefuses, BadInputToScatter) {
  if (!row().words[0].starts_with("added_")) expect_call_refused(GetParam(), scatter);
}
TEST_P(AddedRefuses, BadInputToGatherBackward) {
  if (row().words[0] != "added") expect_call_refused(GetParam(), gather_backward);
}

void add_all(Call& c) {
  c.added = c.a;
  c.added_key = c.added_value = c.a_kv;
}

const RefusedCall kAddedRefusesCases[] = {
    {"another_dtype", [](Call& c) { (c.added = c.a).dtype = DType::bfloat16; }, {"added", "bfloat16"}},
    {"another_length", [](Call& c) { --(c.added = c.a).sizes[2]; }, {"added", "39", "40"}},
    {"last_stride_of_two", [](Call& c) { (c.added = c.a).strides[3] = 2; }, {"added", "stride 2"}},
    {"a_key_of_another_length",
     [](Call& c) {
       add_all(c);
       --c.added_key.sizes[2];
     },
     {"added_key", "39", "40"}},
    {"a_value_of_more_heads",
     [](Call& c) {
       add_all(c);
       c.added_value = c.a;
     },
     {"added_value", "4", "2"}},
    {"a_query_alone", [](Call& c) { c.added = c.a; }, {"added_key", "all of a call's"}},
    {"all_but_a_query",
     [](Call& c) {
       add_all(c);
       c.added = {};
     },
     {"added_key", "all of a call's"}},
};

INSTANTIATE_TEST_SUITE_P(Cases, AddedRefuses, on_each(refusing_devices(), kAddedRefusesCases), on_device_name);

class SelectRefuses : public DeviceTable<RefusedCall> {};

TEST_P(SelectRefuses, BadInput) {
  Call call;
  row().spoil(call);
  expect_refused([&] { device().run(SelectArgs{call.query_scores, call.key_scores, call.selection}); }, row().words);
}

const RefusedCall kSelectRefusesCases[] = {
    {"no_heads", [](Call& c) { c.selection.kv_heads = 0; }, {"kv_heads=0"}},
    {"no_query_scores", [](Call& c) { c.query_scores = nullptr; }, {"scores", "no data"}},
    {"no_key_scores", [](Call& c) { c.key_scores = nullptr; }, {"scores", "no data"}},
    {"no_mask", [](Call& c) { c.selection.mask = nullptr; }, {"selection", "no data"}},
    {"no_prefix", [](Call& c) { c.selection.prefix = nullptr; }, {"selection", "no data"}},
    {"a_window_alone",
     [](Call& c) { c.selection.sequences = sequences_of(2, 40, pyramid({1, 4, 16}), TopK::count(0), true, 8); },
     {"select_topk=0", "nothing to select"}},
};

INSTANTIATE_TEST_SUITE_P(Cases, SelectRefuses, on_each(refusing_devices(), kSelectRefusesCases), on_device_name);

}  // namespace
}  // namespace lighthouse::test
