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
constexpr int64_t kBytesPerCandidate = 12;   // two ranks and a flag, and the next block's ranks aligned
constexpr int64_t kSharedTokens = 16384;     // whose mask is made in shared memory; larger strata make it in the output
constexpr int kTokensPerThread = 8;          // whose places are counted together

// What a launch needs besides its arguments.
struct Sizing {
  Pieces pieces;       // a block each: for each head of a sequence the strata that hold anything, and the tail
  int64_t capacity;    // candidates of one block
  bool fits;           // the candidates in shared memory
  int64_t mask_bytes;  // of shared memory; 0: the mask is made in the output
  int64_t workspace_bytes() const { return fits ? 0 : pieces.total() * capacity * kBytesPerCandidate; }
};

struct SelectLaunch {
  SelectArgs args;
  Sizing sizing;
  uint8_t* workspace;
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
  uint32_t* query_ranks;
  uint32_t* key_ranks;
  uint8_t* taken;
  int count;
};

// Takes the first `wanted` of the candidates not taken yet, in picking order.
__device__ void pick(const uint32_t* ranks, const Candidates& candidates, int wanted, Counter& counter) {
  if (wanted == 0) return;
  // Most often a thread has one candidate, and keeps it.
  const int mine = static_cast<int>(threadIdx.x);
  const bool open = mine < candidates.count && !candidates.taken[mine];
  const uint32_t own = open ? ranks[mine] : 0;
  const auto for_each_open = [&](auto&& function) {
    if (open) function(own);
    for (int i = mine + kThreads; i < candidates.count; i += kThreads) {
      if (!candidates.taken[i]) function(ranks[i]);
    }
  };

  // The highest threshold that enough candidates reach, two bits at a time. Scores are near one another: the bits that
  // all share are not searched.
  uint32_t all_of = ~0u, any_of = 0, common;
  for_each_open([&](uint32_t rank) {
    all_of &= rank;
    any_of |= rank;
  });
  const uint32_t differing = counter.differing(all_of, any_of, &common);
  int bits = 32 - __clz(static_cast<int>(differing));
  bits += bits % 2;
  uint32_t threshold = bits == 32 ? 0 : common & ~((1u << bits) - 1u);
  for (int shift = bits - 2; shift >= 0; shift -= 2) {
    int reached[3] = {};
    for_each_open([&](uint32_t rank) {
#pragma unroll
      for (uint32_t i = 0; i < 3; ++i) reached[i] += rank >= threshold + ((i + 1) << shift);
    });
    counter.sums(reached);
    // Fewer reach a higher one.
    const int step = (reached[0] >= wanted) + (reached[1] >= wanted) + (reached[2] >= wanted);
    threshold += static_cast<uint32_t>(step) << shift;
    if ((step == 1 ? reached[0] : step == 2 ? reached[1] : reached[2]) == wanted) break;
  }

  // All above it, and of those that equal it the first ones.
  int above = 0;
  for_each_open([&](uint32_t rank) { above += rank > threshold; });
  int equal_wanted = wanted - counter.sum(above);
  for (int first = 0; first < candidates.count; first += kThreads) {
    const int i = first + mine;
    const bool still_open = i < candidates.count && !candidates.taken[i];
    const bool equal = still_open && ranks[i] == threshold;
    int equals;
    const int before = counter.before(equal, &equals);
    if ((still_open && ranks[i] > threshold) || (equal && before < equal_wanted)) candidates.taken[i] = 1;
    equal_wanted -= equals;
  }
  __syncthreads();
}

// The largest ranks over a window of both kinds of scores.
struct WindowRanks {
  rules::Rank query = 0, key = 0;

  __device__ void take(float query_score, float key_score) {
    query = max(query, rules::rank_of(query_score));
    key = max(key, rules::rank_of(key_score));
  }
};

// In accesses of four scores where `by_four`: windows begin at multiples of 16 bytes.
__device__ WindowRanks window_ranks(const float* query_score, const float* key_score, int64_t window, bool by_four) {
  WindowRanks largest;
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

__global__ void __launch_bounds__(kThreads) select_stratum(const __grid_constant__ SelectLaunch launch) {
  extern __shared__ __align__(16) uint8_t shared_memory[];  // the mask, then the candidates
  __shared__ int slots[Counter::kSlots];
  __shared__ int64_t parent_lists[2][rules::kParentsPerStratum];  // of the level above, and of this one
  Counter counter(slots);

  const Selection& selection = launch.args.selection;
  const Method& method = selection.sequences.method;
  const Pyramid& pyramid = method.pyramid;
  const auto [index, piece] = launch.sizing.pieces.at(blockIdx.x);
  const Sequence sequence = selection.sequences.at(index);
  const Strata& strata = selection.sequences.strata(index);
  const int64_t head = piece / (strata.filled + 1);
  const int64_t which = piece - head * (strata.filled + 1);
  const int64_t start = selection.start(sequence, head);

  if (which == strata.filled) {
    const int64_t at = start + sequence.tokens - strata.tail;
    const int64_t place = sequence.entry_offset + rules::tail_place(strata);
    for (int64_t i = threadIdx.x; i < strata.tail; i += kThreads) {
      selection.mask[at + i] = 1;
      selection.prefix[at + i] = static_cast<int32_t>(place + i);
    }
    return;
  }

  const rules::Stratum stratum = rules::stratum_at(strata, which);
  const int64_t tokens = stratum.entries * pyramid.windows[pyramid.levels - 1];
  const int64_t at = start + stratum.first_entry * pyramid.windows[pyramid.levels - 1];
  const float* const query_score = launch.args.query_score + at;
  const float* const key_score = launch.args.key_score + at;
  uint8_t* const mask = launch.sizing.mask_bytes > 0 ? shared_memory : selection.mask + at;
  const bool by_four = is_multiple(query_score, 16) && is_multiple(key_score, 16);

  uint8_t* memory = shared_memory + launch.sizing.mask_bytes;
  if (!launch.sizing.fits)
    memory = launch.workspace + int64_t{blockIdx.x} * launch.sizing.capacity * kBytesPerCandidate;
  Candidates candidates{reinterpret_cast<uint32_t*>(memory),
                        reinterpret_cast<uint32_t*>(memory) + launch.sizing.capacity,
                        memory + launch.sizing.capacity * 8, static_cast<int>(stratum.entries)};

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
        WindowRanks ranks =
            window_ranks(query_score + index * window, key_score + index * window, window, by_four && window % 4 == 0);
        if (method.cover_start && stratum.first_entry == 0 && index == 0)
          ranks = {rules::kInfinityRank, rules::kInfinityRank};
        candidates.query_ranks[i] = rules::pick_rank(ranks.query);
        candidates.key_ranks[i] = rules::pick_rank(ranks.key);
        candidates.taken[i] = 0;
      }
    }
    __syncthreads();
    if (level == 0) break;
    if (choose) {
      const int by_query = static_cast<int>(rules::parents_by_query(wanted));
      pick(candidates.query_ranks, candidates, by_query, counter);
      pick(candidates.key_ranks, candidates, wanted - by_query, counter);
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
  number_places(mask, selection.mask + at, selection.prefix + at, tokens, sequence.entry_offset + stratum.place,
                counter);
}

Sizing sizing_of(const Selection& selection) {
  require_alike(selection.sequences);
  const Pyramid& pyramid = selection.sequences.method.pyramid;
  int64_t candidates = 1;  // the most that any stratum has at any level where parents are chosen
  int64_t tokens = 0;      // of the largest stratum
  const Pieces pieces = selection.sequences.pieces([&](int64_t index) {
    const Strata& strata = selection.sequences.strata(index);
    for (const auto& kind : strata.kinds) {
      if (kind.count == 0) continue;
      tokens = std::max(tokens, kind.entries * pyramid.coarsest());
      for (int level = 0; level < pyramid.levels; ++level) {
        const int64_t chosen = rules::chosen_at_level(pyramid, kind.entries, kind.budget, level);
        require(chosen <= 0x7FFFFFFF - kThreads, "a stratum of ", kind.entries,
                " entries: choose more parents, select_topk is too small");
        if (level > 0) candidates = std::max(candidates, chosen);
      }
    }
    return selection.kv_heads * (strata.filled + 1);
  });
  const int64_t capacity = rules::ceil_div(candidates, 4) * 4;
  return {.pieces = pieces,
          .capacity = capacity,
          .fits = capacity <= kSharedCandidates,
          .mask_bytes = tokens <= kSharedTokens ? rules::ceil_div(tokens, 16) * 16 : 0};
}

}  // namespace

int64_t workspace_bytes(const SelectArgs& args) { return sizing_of(args.selection).workspace_bytes(); }

void run(const SelectArgs& args, const Workspace& workspace, Stream stream) {
  check(args);
  const Sizing sizing = sizing_of(args.selection);
  const int64_t blocks = sizing.pieces.total(), needed = sizing.workspace_bytes();
  require(blocks <= 0x7FFFFFFF, "select_topk makes ", blocks, " strata: more than one launch can take");
  require(workspace.bytes >= needed, "workspace of ", workspace.bytes, " bytes: ", needed, " are needed");
  const SelectLaunch launch{args, sizing, static_cast<uint8_t*>(workspace.data)};
  const int64_t shared_bytes = sizing.mask_bytes + (sizing.fits ? sizing.capacity * kBytesPerCandidate : 0);
  select_stratum<<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(shared_bytes),
                   static_cast<cudaStream_t>(stream)>>>(launch);
  check_launch("select");
}

}  // namespace lighthouse::cuda
