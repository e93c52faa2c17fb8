// The choice (METHOD 3): one thread block per stratum, row and key-value head. A stratum's place in the sub-sequence
// follows from lengths alone, so blocks need nothing of one another.
// Parents are found by a search for the score that exactly enough candidates reach, bit by bit: counts only, no sort.

#include "core/check.h"
#include "cuda/device.cuh"
#include "lighthouse/cuda.h"
#include "rules/order.h"
#include "rules/picking.h"
#include "rules/strata.h"

namespace lighthouse::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int64_t kSharedCandidates = 2048;  // more than that are kept in the workspace
constexpr int64_t kBytesPerCandidate = 12;   // two keys and a flag, and the next block's keys aligned
constexpr int64_t kSharedTokens = 16384;     // whose mask is made in shared memory; of more, where it is returned
constexpr int kTokensPerThread = 8;          // whose places are counted together

struct Launch {
  Layout layout;
  rules::Strata strata;
  int64_t filled;  // strata that hold anything; one more block lays out the tail
  int64_t kv_heads;
  bool cover_start;
  const float* query_score;
  const float* key_score;
  uint8_t* mask;
  int32_t* prefix;
  uint8_t* workspace;  // null: candidates are in shared memory
  int64_t capacity;    // candidates of one block
  int64_t mask_bytes;  // of shared memory; 0: the mask is made where it is returned
};

// Sums over the block. Two sets of slots take turns, so that one barrier per sum is enough.
class Counter {
 public:
  __device__ explicit Counter(int* slots) : slots_(slots) {}

  __device__ int sum(int own) {
    int total[1] = {own};
    sums(total);
    return total[0];
  }

  // Several sums at once, in place.
  template <int kCount>
  __device__ void sums(int (&values)[kCount]) {
    static_assert(kCount <= kSums);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = __reduce_add_sync(kAllLanes, values[i]);
      if (lane == 0) slots_[i * kWarps + threadIdx.x / 32] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      values[i] = __reduce_add_sync(kAllLanes, lane < kWarps ? slots_[i * kWarps + lane] : 0);
    turn();
  }

  // The sum of the threads before this one; `total` is everyone's.
  __device__ int before(int own, int* total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int inclusive = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, inclusive, distance);
      if (lane >= distance) inclusive += other;
    }
    if (lane == 31) slots_[warp] = inclusive;
    __syncthreads();
    const int of_warp = lane < kWarps ? slots_[lane] : 0;
    *total = __reduce_add_sync(kAllLanes, of_warp);
    const int earlier = __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0);
    turn();
    return earlier + inclusive - own;
  }

  // The bits in which the block's values differ, of those threads that have one; `common`: of all values' ones.
  __device__ uint32_t differing(uint32_t all_of, uint32_t any_of, uint32_t* common) {
    all_of = __reduce_and_sync(kAllLanes, all_of);
    any_of = __reduce_or_sync(kAllLanes, any_of);
    if (threadIdx.x % 32 == 0) {
      slots_[threadIdx.x / 32] = static_cast<int>(all_of);
      slots_[threadIdx.x / 32 + kWarps] = static_cast<int>(any_of);
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
    *common = __reduce_and_sync(kAllLanes, lane < kWarps ? static_cast<uint32_t>(slots_[lane]) : ~0u);
    any_of = __reduce_or_sync(kAllLanes, lane < kWarps ? static_cast<uint32_t>(slots_[lane + kWarps]) : 0u);
    turn();
    return any_of ^ *common;
  }

  static constexpr int kSums = 3;
  static constexpr int kSlots = 2 * kSums * kWarps;

 private:
  __device__ void turn() {
    slots_ += second_ ? -kSums * kWarps : kSums * kWarps;
    second_ = !second_;
  }

  int* slots_;
  bool second_ = false;
};

struct Candidates {
  uint32_t* query_keys;
  uint32_t* key_keys;
  uint8_t* taken;
  int count;
};

// Takes the first `wanted` of the candidates not taken yet, in picking order.
__device__ void pick(const uint32_t* keys, const Candidates& candidates, int wanted, Counter& counter) {
  if (wanted == 0) return;
  // Most often a thread has one candidate, and keeps it.
  const int mine = static_cast<int>(threadIdx.x);
  const bool open = mine < candidates.count && !candidates.taken[mine];
  const uint32_t own = open ? keys[mine] : 0;
  const auto for_each_open = [&](auto&& function) {
    if (open) function(own);
    for (int i = mine + kThreads; i < candidates.count; i += kThreads) {
      if (!candidates.taken[i]) function(keys[i]);
    }
  };

  // The highest threshold that enough candidates reach, two bits at a time. Scores are near one another: the bits that
  // all share are not searched.
  uint32_t all_of = ~0u, any_of = 0, common;
  for_each_open([&](uint32_t key) {
    all_of &= key;
    any_of |= key;
  });
  const uint32_t differing = counter.differing(all_of, any_of, &common);
  int bits = 32 - __clz(static_cast<int>(differing));
  bits += bits % 2;
  uint32_t threshold = bits == 32 ? 0 : common & ~((1u << bits) - 1u);
  for (int shift = bits - 2; shift >= 0; shift -= 2) {
    int reached[3] = {};
    for_each_open([&](uint32_t key) {
#pragma unroll
      for (uint32_t i = 0; i < 3; ++i) reached[i] += key >= threshold + ((i + 1) << shift);
    });
    counter.sums(reached);
    // Fewer reach a higher one.
    const int step = (reached[0] >= wanted) + (reached[1] >= wanted) + (reached[2] >= wanted);
    threshold += static_cast<uint32_t>(step) << shift;
    if ((step == 1 ? reached[0] : step == 2 ? reached[1] : reached[2]) == wanted) break;
  }

  // All above it, and of those that equal it the first ones.
  int above = 0;
  for_each_open([&](uint32_t key) { above += key > threshold; });
  int equal_wanted = wanted - counter.sum(above);
  for (int first = 0; first < candidates.count; first += kThreads) {
    const int i = first + mine;
    const bool still_open = i < candidates.count && !candidates.taken[i];
    const bool equal = still_open && keys[i] == threshold;
    int equals;
    const int before = counter.before(equal, &equals);
    if ((still_open && keys[i] > threshold) || (equal && before < equal_wanted)) candidates.taken[i] = 1;
    equal_wanted -= equals;
  }
  __syncthreads();
}

// The largest score keys over a window of both kinds of scores.
struct WindowKeys {
  rules::ScoreKey query = 0, key = 0;

  __device__ void take(float query_score, float key_score) {
    query = max(query, rules::score_key(query_score));
    key = max(key, rules::score_key(key_score));
  }
};

// In accesses of four scores where `by_four`: windows begin at multiples of 16 bytes.
__device__ WindowKeys window_keys(const float* query_score, const float* key_score, int64_t window, bool by_four) {
  WindowKeys largest;
  if (by_four) {
#pragma unroll 4
    for (int64_t i = 0; i < window; i += 4) {
      const float4 queries = __ldg(reinterpret_cast<const float4*>(query_score + i));
      const float4 keys = __ldg(reinterpret_cast<const float4*>(key_score + i));
      largest.take(queries.x, keys.x);
      largest.take(queries.y, keys.y);
      largest.take(queries.z, keys.z);
      largest.take(queries.w, keys.w);
    }
  } else {
#pragma unroll 4
    for (int64_t i = 0; i < window; ++i) largest.take(__ldg(query_score + i), __ldg(key_score + i));
  }
  return largest;
}

__device__ bool is_multiple(const void* pointer, unsigned bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Places of tokens [0, tokens) from `made`, their masks, which begins at a multiple of 8 bytes or is `mask` itself.
__device__ void number_places(const uint8_t* made, uint8_t* mask, int32_t* prefix, int64_t tokens, int64_t place,
                              Counter& counter) {
  const bool whole = is_multiple(made, 8) && is_multiple(mask, 8) && is_multiple(prefix, 16);
  for (int64_t first = 0; first < tokens; first += kThreads * kTokensPerThread) {
    const int64_t mine = first + int64_t{threadIdx.x} * kTokensPerThread;
    const bool all = whole && mine + kTokensPerThread <= tokens;
    uint8_t bytes[kTokensPerThread] = {};
    if (all) {
      const uint2 raw = *reinterpret_cast<const uint2*>(made + mine);
      memcpy(bytes, &raw, sizeof raw);
    } else {
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) bytes[i] = mine + i < tokens ? made[mine + i] : uint8_t{0};
    }
    int own = 0;
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) own += rules::bits_set(bytes[i]);
    int total;
    int64_t at = place + counter.before(own, &total);
    place += total;
    int32_t places[kTokensPerThread];
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      places[i] = static_cast<int32_t>(at);
      at += rules::bits_set(bytes[i]);
    }
    if (all) {
      uint2 raw;
      memcpy(&raw, bytes, sizeof raw);
      if (made != mask) *reinterpret_cast<uint2*>(mask + mine) = raw;
      reinterpret_cast<int4*>(prefix + mine)[0] = make_int4(places[0], places[1], places[2], places[3]);
      reinterpret_cast<int4*>(prefix + mine)[1] = make_int4(places[4], places[5], places[6], places[7]);
    } else {
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        if (mine + i >= tokens) break;
        if (made != mask) mask[mine + i] = bytes[i];
        prefix[mine + i] = places[i];
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) select_stratum(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(16) uint8_t shared_memory[];  // the mask, then the candidates
  __shared__ int slots[Counter::kSlots];
  __shared__ int64_t parent_lists[2][rules::kParentsPerStratum];  // of the level above, and of this one
  Counter counter(slots);

  const int64_t piece = int64_t{blockIdx.x} % (launch.filled + 1);
  const int64_t row_and_head = int64_t{blockIdx.x} / (launch.filled + 1);
  const Sequence sequence = launch.layout.sequence(row_and_head / launch.kv_heads);
  const int64_t head = row_and_head % launch.kv_heads;
  const int64_t start = (sequence.row * launch.kv_heads + head) * launch.layout.tokens + sequence.token_offset;
  const Pyramid& pyramid = launch.layout.pyramid;

  if (piece == launch.filled) {
    const int64_t at = start + sequence.tokens - launch.strata.tail;
    const int64_t place = sequence.entry_offset + launch.strata.tail_place();
    for (int64_t i = threadIdx.x; i < launch.strata.tail; i += kThreads) {
      launch.mask[at + i] = 1;
      launch.prefix[at + i] = static_cast<int32_t>(place + i);
    }
    return;
  }

  const rules::Stratum stratum = launch.strata.at(piece);
  const int64_t tokens = stratum.entries * pyramid.windows[pyramid.levels - 1];
  const int64_t at = start + stratum.first_entry * pyramid.windows[pyramid.levels - 1];
  const float* const query_score = launch.query_score + at;
  const float* const key_score = launch.key_score + at;
  uint8_t* const mask = launch.mask_bytes > 0 ? shared_memory : launch.mask + at;
  const bool by_four = is_multiple(query_score, 16) && is_multiple(key_score, 16);

  uint8_t* memory = shared_memory + launch.mask_bytes;
  if (launch.workspace != nullptr)
    memory = launch.workspace + int64_t{blockIdx.x} * launch.capacity * kBytesPerCandidate;
  Candidates candidates{reinterpret_cast<uint32_t*>(memory), reinterpret_cast<uint32_t*>(memory) + launch.capacity,
                        memory + launch.capacity * 8, static_cast<int>(stratum.entries)};

  for (int64_t i = threadIdx.x; i < tokens; i += kThreads) mask[i] = 0;
  __syncthreads();

  // Of each level: all candidates are in, then the parents are found among them.
  const int64_t* parents = parent_lists[0];
  int ratio = 0;  // children per parent; 0: the candidates are all entries of the coarsest level
  for (int level = pyramid.levels - 1;; --level) {
    const int64_t window = pyramid.windows[level];
    const auto index_of = [&](int i) { return ratio == 0 ? i : parents[i / ratio] * ratio + i % ratio; };
    const int wanted = static_cast<int>(rules::smaller(stratum.budget, candidates.count));
    const bool choose = level > 0 && wanted < candidates.count;
    for (int i = threadIdx.x; i < candidates.count; i += kThreads) {
      const int64_t index = index_of(i);
      uint8_t& byte = mask[rules::last_token(window, index)];
      byte = static_cast<uint8_t>(byte | 1u << level);
      if (choose) {
        WindowKeys keys =
            window_keys(query_score + index * window, key_score + index * window, window, by_four && window % 4 == 0);
        if (launch.cover_start && stratum.first_entry == 0 && index == 0)
          keys = {rules::kInfinityKey, rules::kInfinityKey};
        candidates.query_keys[i] = rules::pick_key(keys.query);
        candidates.key_keys[i] = rules::pick_key(keys.key);
        candidates.taken[i] = 0;
      }
    }
    __syncthreads();
    if (level == 0) break;
    if (choose) {
      const int by_query = static_cast<int>(rules::parents_by_query(wanted));
      pick(candidates.query_keys, candidates, by_query, counter);
      pick(candidates.key_keys, candidates, wanted - by_query, counter);
    }
    // The parents, in order of their index.
    int64_t* next = parents == parent_lists[0] ? parent_lists[1] : parent_lists[0];
    int found = 0;
    for (int first = 0; first < candidates.count; first += kThreads) {
      const int i = first + static_cast<int>(threadIdx.x);
      const bool parent = i < candidates.count && (!choose || candidates.taken[i]);
      int total;
      const int before = counter.before(parent, &total);
      if (parent) next[found + before] = index_of(i);
      found += total;
    }
    __syncthreads();
    parents = next;
    ratio = static_cast<int>(window / pyramid.windows[level - 1]);
    candidates.count = wanted * ratio;
  }
  number_places(mask, launch.mask + at, launch.prefix + at, tokens, sequence.entry_offset + stratum.place, counter);
}

// The most candidates that any stratum has at any level where parents are chosen.
int64_t most_candidates(const Plan& plan, const rules::Strata& strata) {
  const Pyramid& pyramid = plan.layout.pyramid;
  int64_t most = 1;
  for (const auto& kind : strata.kinds) {
    if (kind.count == 0) continue;
    for (int level = 0; level < pyramid.levels; ++level) {
      const int64_t chosen = rules::chosen_at_level(pyramid, kind.entries, kind.budget, level);
      require(chosen <= 0x7FFFFFFF - kThreads, "a stratum of ", kind.entries,
              " entries: choose more parents, select_topk is too small");
      if (level > 0) most = std::max(most, chosen);
    }
  }
  return rules::ceil_div(most, 4) * 4;
}

struct Shape {
  rules::Strata strata;
  int64_t filled, blocks, capacity;
  bool fits;           // the candidates in shared memory
  int64_t mask_bytes;  // of shared memory
};

Shape shape_of(const Plan& plan, int64_t kv_heads) {
  const Layout& layout = plan.layout;
  Shape shape{};
  shape.strata = rules::make_strata(layout.pyramid, layout.tokens, plan.topk.parents(layout.tokens));
  shape.filled = std::min(shape.strata.count, layout.tokens / layout.pyramid.coarsest());
  shape.blocks = layout.sequences() * kv_heads * (shape.filled + 1);
  shape.capacity = most_candidates(plan, shape.strata);
  shape.fits = shape.capacity <= kSharedCandidates;
  int64_t tokens = 0;
  for (const auto& kind : shape.strata.kinds) {
    if (kind.count > 0) tokens = std::max(tokens, kind.entries * layout.pyramid.coarsest());
  }
  shape.mask_bytes = tokens <= kSharedTokens ? rules::ceil_div(tokens, 16) * 16 : 0;
  return shape;
}

int64_t workspace_of(const Shape& shape) { return shape.fits ? 0 : shape.blocks * shape.capacity * kBytesPerCandidate; }

}  // namespace

int64_t select_workspace(const Plan& plan, int64_t kv_heads) { return workspace_of(shape_of(plan, kv_heads)); }

void select(const Plan& plan, const float* query_score, const float* key_score, const Selection& selection,
            const Workspace& workspace, Stream stream) {
  require(selection.kv_heads >= 1, "kv_heads=", selection.kv_heads, ": at least one is needed");
  require(query_score != nullptr && key_score != nullptr, "scores have no data");
  require(selection.mask != nullptr && selection.prefix != nullptr, "selection has no data");
  const Shape shape = shape_of(plan, selection.kv_heads);
  require(shape.blocks <= 0x7FFFFFFF, "select_topk makes ", shape.blocks, " strata: more than one launch can take");
  const int64_t needed = workspace_of(shape);
  require(workspace.bytes >= needed, "workspace of ", workspace.bytes, " bytes: ", needed, " are needed");
  const Launch launch{.layout = plan.layout,
                      .strata = shape.strata,
                      .filled = shape.filled,
                      .kv_heads = selection.kv_heads,
                      .cover_start = plan.cover_start,
                      .query_score = query_score,
                      .key_score = key_score,
                      .mask = selection.mask,
                      .prefix = selection.prefix,
                      .workspace = shape.fits ? nullptr : static_cast<uint8_t*>(workspace.data),
                      .capacity = shape.capacity,
                      .mask_bytes = shape.mask_bytes};
  const auto shared_bytes =
      static_cast<unsigned>(shape.mask_bytes + (shape.fits ? shape.capacity * kBytesPerCandidate : 0));
  select_stratum<<<static_cast<unsigned>(shape.blocks), kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      launch);
  check_launch("select");
}

}  // namespace lighthouse::cuda
