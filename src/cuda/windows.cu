// Tokens to chosen entries and back. A thread holds one column (16 bytes of a row) of one unit of tokens and walks
// through it once: columns need nothing of one another, so there is nothing to exchange and nothing to wait for.
// Counted in u = token + reach, units begin at multiples of their length, and every window either lies in one unit or
// is made of whole ones.

#include "cuda/windows.cuh"

#include <vector>

namespace lighthouse::cuda {
namespace {

// Threads of a block: at least the columns of the longest row, 256 where a column is one number.
constexpr int threads_of(int width) { return width == 1 ? 256 : 128; }
constexpr int kTokensHeld = 512;        // by a block at most: their choice is in shared memory
constexpr int kRowsAhead = 4;           // loads in flight per thread
constexpr int64_t kLongestSpread = 16;  // tokens that one thread writes
static_assert(rules::kLongestPiece <= kTokensHeld && rules::kLongestSum <= kTokensHeld, "a block holds a unit");

// Minimum resident blocks of 128 threads per multiprocessor, which limits a thread's registers: every level's open sum
// takes some, and so do rows to add.
constexpr int blocks_that_sum(int levels) { return levels <= 2 ? 7 : levels == 3 ? 6 : 4; }
constexpr int blocks_that_spread(int levels, bool adds) { return levels <= 1 && !adds ? 8 : levels <= 2 ? 6 : 4; }

template <class T>
struct WindowsLaunch {
  Pair pairs[kMaxPairs];
  int heads[kMaxPairs];   // of each pair
  int groups[kMaxPairs];  // of its heads, so many share a choice
  int all_heads;
  rules::Reach reach;
  Divisor divisors[kMaxLevels];
  Pieces units;
  int unit;  // tokens
  int units_per_block;
  int inner;                // levels 1 to this one have windows that lie in one unit
  int windows[kMaxLevels];  // of the levels up to `inner`
  float* sums;  // of each unit, [sequence, head, unit, head_dim]; null where no window is longer than a unit
  ConstSelection selection;
};

// What a block needs to know of one of its tokens.
struct Token {
  int32_t prefix;
  uint8_t mask;   // 0 outside of the sequence
  uint8_t edges;  // levels 1 to this one have a window that begins (to spread) or ends (to sum) here
};

template <class T>
struct Block {
  const WindowsLaunch<T>& launch;
  Pair pair;
  int head;           // of the pair
  int64_t first_sum;  // of its sequence and head
  Sequence sequence;
  const uint8_t* mask;
  const int32_t* prefix;

  __device__ Block(const WindowsLaunch<T>& all, int64_t index)
      : launch(all), sequence(all.selection.sequences.at(index)) {
    int which = 0;
    head = static_cast<int>(blockIdx.x);
    while (head >= all.heads[which]) head -= all.heads[which++];
    pair = all.pairs[which];
    first_sum = all.units.before(index) * all.all_heads + blockIdx.x * all.units.of(index);
    const int64_t start = all.selection.start(sequence, head / all.groups[which]);
    mask = all.selection.mask + start;
    prefix = all.selection.prefix + start;
  }

  // This thread's column of the first token, or of the first entry, of the row.
  template <int kWidth>
  __device__ const T* source(int64_t token_offset) const {
    return pair.source.row<T>(sequence.row, head, token_offset) + threadIdx.x * kWidth;
  }
  template <int kWidth>
  __device__ const T* added(int64_t token_offset) const {
    return pair.added.row<T>(sequence.row, head, token_offset) + threadIdx.x * kWidth;
  }
  template <int kWidth>
  __device__ T* target(int64_t token_offset) const {
    return pair.target.row<T>(sequence.row, head, token_offset) + threadIdx.x * kWidth;
  }

  // The place of any entry, or -1 where it is not chosen.
  __device__ int64_t place(int level, int64_t index) const {
    if (index < 0) return -1;
    const int64_t last = rules::last_token(launch.selection.sequences.method.pyramid.windows[level], index);
    if (last >= sequence.tokens) return -1;
    const uint8_t bits = __ldg(mask + last);
    return rules::is_chosen(bits, level) ? rules::place(bits, __ldg(prefix + last), level) : -1;
  }

  // Reads the choice of the tokens from `first` on. `edges_of(position, token)` counts levels.
  template <class Edges>
  __device__ void read_choice(Token* tokens, int64_t first, const Edges& edges_of) const {
    __syncthreads();
    const int count = launch.units_per_block * launch.unit;
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count; i += blockDim.x * blockDim.y) {
      const int64_t token = first + i;
      const bool inside = 0 <= token && token < sequence.tokens;
      tokens[i] = {inside ? __ldg(prefix + token) : 0, inside ? __ldg(mask + token) : uint8_t{0},
                   static_cast<uint8_t>(edges_of(i, token))};
    }
    __syncthreads();
  }
};

// kLevels: at least launch.inner.
template <class T, int kWidth, int kLevels>
__global__ void __launch_bounds__(threads_of(kWidth), blocks_that_sum(kLevels) * 128 / threads_of(kWidth))
    sum_units(const __grid_constant__ WindowsLaunch<T> launch) {
  __shared__ Token tokens[kTokensHeld];
  const int shift = static_cast<int>(launch.reach);
  const bool at_end = launch.reach == rules::Reach::pooled;  // which token of a window holds its entry's choice
  const int own = threadIdx.y * launch.unit;                 // this thread's first token, among the block's
  for (int64_t index = blockIdx.z; index < launch.selection.sequences.count(); index += gridDim.z) {
    const Block<T> block(launch, index);
    T* const target = block.template target<kWidth>(0);
    for (int64_t unit = int64_t{blockIdx.y} * launch.units_per_block; unit < launch.units.of(index);
         unit += int64_t{gridDim.y} * launch.units_per_block) {
      const int64_t first = unit * launch.unit - shift;
      block.read_choice(tokens, first, [&](int i, int64_t token) {
        if (token >= block.sequence.tokens) return 0;
        if (!at_end && token == block.sequence.tokens - 1) return launch.inner;  // windows that the sequence cuts
        int edges = 0;
        while (edges < launch.inner && (i + 1) % launch.windows[edges + 1] == 0) ++edges;
        return edges;
      });
      if (unit + threadIdx.y >= launch.units.of(index)) continue;

      Sum<kWidth> open[kLevels + 1];  // of each level's window, as far as it has been read
      const auto close = [&](int level, int i) {
        const Token choice = tokens[at_end ? i : i - (i - own) % launch.windows[level]];
        if (rules::is_chosen(choice.mask, level)) {
          store<T, kWidth>(target + rules::place(choice.mask, choice.prefix, level) * block.pair.target.strides[2],
                           narrowed<T>(open[level] / launch.divisors[level]));
        }
      };
      const int begin = rules::larger(own, -first);
      const int end = rules::smaller(own + launch.unit, block.sequence.tokens - first);
      const T* row = block.template source<kWidth>(block.sequence.token_offset + first + own);
      for (int start = own; start < end; start += kRowsAhead) {
        Column<T, kWidth> rows[kRowsAhead];
        Token batch[kRowsAhead];
#pragma unroll
        for (int j = 0; j < kRowsAhead; ++j) {
          if (start + j < end) batch[j] = tokens[start + j];
          rows[j] = begin <= start + j && start + j < end ? load<T, kWidth>(row) : no_column<T, kWidth>();
          row += block.pair.source.strides[2];
        }
#pragma unroll
        for (int j = 0; j < kRowsAhead; ++j) {
          if (start + j >= end) break;
          const Token token = batch[j];
          add(open[1], widened(rows[j]));
          if (rules::is_chosen(token.mask, 0)) {
            store<T, kWidth>(target + rules::place(token.mask, token.prefix, 0) * block.pair.target.strides[2],
                             rows[j]);
          }
          if (token.edges == 0) continue;
#pragma unroll
          for (int level = 1; level <= kLevels; ++level) {
            if (level > token.edges) break;
            close(level, start + j);
            if (level < kLevels && level < launch.inner) {
              add(open[level < kLevels ? level + 1 : level], open[level]);
              open[level] = {};
            }
          }
        }
      }
      if (launch.sums != nullptr) {
        float* const sums = launch.sums + ((block.first_sum + unit + threadIdx.y) * blockDim.x + threadIdx.x) * kWidth;
#pragma unroll
        for (int level = 1; level <= kLevels; ++level) {
          if (level == rules::larger(1, launch.inner)) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) sums[i] = open[level].numbers[i];
          }
        }
      }
    }
  }
}

// A level with windows longer than a unit: each is the sum of those one level below, kept where its first unit was.
template <class T, int kWidth>
__global__ void __launch_bounds__(threads_of(kWidth))
    sum_level(const __grid_constant__ WindowsLaunch<T> launch, int level, int64_t units_per_child, int64_t children,
              const __grid_constant__ Pieces windows) {
  for (int64_t index = blockIdx.z; index < launch.selection.sequences.count(); index += gridDim.z) {
    const Block<T> block(launch, index);
    for (int64_t window = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; window < windows.of(index);
         window += int64_t{gridDim.y} * blockDim.y) {
      const int64_t first = window * children * units_per_child;
      float* const sums = launch.sums + (block.first_sum * blockDim.x + threadIdx.x) * kWidth;
      Sum<kWidth> sum;
      for (int64_t child = 0; child < children; ++child) {
        const int64_t unit = first + child * units_per_child;
        if (unit >= launch.units.of(index)) break;
        Sum<kWidth> part;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) part.numbers[i] = sums[unit * blockDim.x * kWidth + i];
        add(sum, part);
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[first * blockDim.x * kWidth + i] = sum.numbers[i];
      const int64_t place = block.place(level, window - static_cast<int>(launch.reach));
      if (place >= 0) {
        store<T, kWidth>(block.template target<kWidth>(0) + place * block.pair.target.strides[2],
                         narrowed<T>(sum / launch.divisors[level]));
      }
    }
  }
}

// kLevels: at least launch.inner.
template <class T, int kWidth, int kLevels, bool kAdds>
__global__ void __launch_bounds__(threads_of(kWidth), blocks_that_spread(kLevels, kAdds) * 128 / threads_of(kWidth))
    spread_units(const __grid_constant__ WindowsLaunch<T> launch) {
  __shared__ Token tokens[kTokensHeld];
  const int shift = static_cast<int>(launch.reach);
  const bool at_end = launch.reach == rules::Reach::pooled;
  const int own = threadIdx.y * launch.unit;
  const Pyramid& pyramid = launch.selection.sequences.method.pyramid;
  for (int64_t index = blockIdx.z; index < launch.selection.sequences.count(); index += gridDim.z) {
    const Block<T> block(launch, index);
    const T* const source = block.template source<kWidth>(0);
    for (int64_t unit = int64_t{blockIdx.y} * launch.units_per_block; unit < launch.units.of(index);
         unit += int64_t{gridDim.y} * launch.units_per_block) {
      const int64_t first = unit * launch.unit - shift;
      block.read_choice(tokens, first, [&](int i, int64_t) {
        int edges = 0;
        while (edges < launch.inner && i % launch.windows[edges + 1] == 0) ++edges;
        return edges;
      });
      if (unit + threadIdx.y >= launch.units.of(index)) continue;

      const auto entry = [&](const Token& choice, int level) {
        return load<T, kWidth>(source + rules::place(choice.mask, choice.prefix, level) * block.pair.source.strides[2]);
      };
      const int begin = rules::larger(own, -first);
      const int end = rules::smaller(own + launch.unit, block.sequence.tokens - first);

      Sum<kWidth> above[kLevels + 2];  // of the entries of this level and all coarser ones that reach the token
      for (int level = pyramid.levels - 1; level > launch.inner; --level) {
        const int64_t at =
            block.place(level, rules::entry_reaching(launch.reach, pyramid.windows[level], first + begin));
        if (at >= 0) {
          add(above[kLevels + 1],
              widened(load<T, kWidth>(source + at * block.pair.source.strides[2])) / launch.divisors[level]);
        }
      }
#pragma unroll
      for (int level = kLevels; level >= 1; --level) above[level] = above[level + 1];
      Column<T, kWidth> coarse = narrowed<T>(above[1]);  // what a token gets that is not chosen itself

      T* row = block.template target<kWidth>(block.sequence.token_offset + first + own);
      const T* added_row = kAdds ? block.template added<kWidth>(block.sequence.token_offset + first + own) : nullptr;
      for (int start = own; start < end; start += kRowsAhead) {
        Column<T, kWidth> rows[kRowsAhead];
        Column<T, kWidth> added[kAdds ? kRowsAhead : 1];
        Token batch[kRowsAhead];
#pragma unroll
        for (int j = 0; j < kRowsAhead; ++j) {
          if (start + j >= end) break;
          batch[j] = tokens[start + j];
          if (rules::is_chosen(batch[j].mask, 0)) rows[j] = entry(batch[j], 0);
          if constexpr (kAdds) {
            if (begin <= start + j) added[j] = load<T, kWidth>(added_row + j * block.pair.added.strides[2]);
          }
        }
#pragma unroll
        for (int j = 0; j < kRowsAhead; ++j) {
          if (start + j >= end) break;
          const Token token = batch[j];
          if (token.edges > 0) {
            Column<T, kWidth> entries[kLevels + 1];
            bool chosen[kLevels + 1];
#pragma unroll
            for (int level = kLevels; level >= 1; --level) {
              if (level > token.edges) continue;
              const Token holder = tokens[at_end ? start + j + launch.windows[level] - 1 : start + j];
              chosen[level] = rules::is_chosen(holder.mask, level);
              if (chosen[level]) entries[level] = entry(holder, level);
            }
#pragma unroll
            for (int level = kLevels; level >= 1; --level) {
              if (level > token.edges) continue;
              above[level] = above[level + 1];
              if (chosen[level]) add(above[level], widened(entries[level]) / launch.divisors[level]);
            }
            coarse = narrowed<T>(above[1]);
          }
          if constexpr (kAdds) {
            Sum<kWidth> sum = above[1];
            if (rules::is_chosen(token.mask, 0)) add(sum, widened(rows[j]));
            if (begin <= start + j) {
              add(sum, widened(added[j]));
              store<T, kWidth>(row, narrowed<T>(sum));
            }
          } else if (rules::is_chosen(token.mask, 0)) {
            Sum<kWidth> sum = above[1];
            add(sum, widened(rows[j]));
            store<T, kWidth>(row, narrowed<T>(sum));
          } else if (begin <= start + j) {
            store<T, kWidth>(row, coarse);
          }
          row += block.pair.target.strides[2];
        }
        if constexpr (kAdds) added_row += kRowsAhead * block.pair.added.strides[2];
      }
    }
  }
}

// How a sequence is cut into units of at most `longest` tokens.
struct Cut {
  int64_t unit;  // tokens
  int inner;     // levels 1 to this one have windows that lie in one unit
};

Cut cut_into_units(const Pyramid& pyramid, int64_t longest) {
  int inner = 0;
  while (inner + 1 < pyramid.levels && pyramid.windows[static_cast<size_t>(inner + 1)] <= longest) ++inner;
  if (inner > 0) return {pyramid.windows[static_cast<size_t>(inner)], inner};
  if (pyramid.levels == 1) return {longest, 0};
  const int64_t unit = rules::piece_length(pyramid.windows[1], longest);
  return {unit, unit == pyramid.windows[1] ? 1 : 0};
}

Pieces cut_by(const Sequences& sequences, rules::Reach reach, int64_t length) {
  require_alike(sequences);
  return sequences.pieces([&](int64_t index) { return rules::pieces_of(sequences.at(index).tokens, reach, length); });
}

template <class T, int kWidth>
WindowsLaunch<T> make_launch(std::span<const Pair> pairs, const ConstSelection& selection, rules::WindowRule rule,
                             const Cut& cut) {
  const int64_t columns = pairs[0].source.head_dim() / kWidth;
  const Pyramid& pyramid = selection.sequences.method.pyramid;
  WindowsLaunch<T> launch{};
  launch.selection = selection;
  launch.reach = rule.reach;
  launch.unit = static_cast<int>(cut.unit);
  launch.units = cut_by(selection.sequences, rule.reach, cut.unit);
  launch.units_per_block = static_cast<int>(std::min(threads_of(kWidth) / columns, kTokensHeld / cut.unit));
  launch.inner = cut.inner;
  for (int level = 0; level < pyramid.levels; ++level) {
    const int64_t window = pyramid.windows[static_cast<size_t>(level)];
    if (level <= cut.inner) launch.windows[level] = static_cast<int>(window);
    if (rule.mean) launch.divisors[level] = divisor_of(window);
  }
  for (size_t i = 0; i < pairs.size(); ++i) {
    launch.pairs[i] = pairs[i];
    launch.heads[i] = static_cast<int>(pairs[i].source.heads());
    launch.groups[i] = static_cast<int>(pairs[i].source.heads() / selection.kv_heads);
    launch.all_heads += launch.heads[i];
  }
  return launch;
}

template <class T>
dim3 grid_of(const WindowsLaunch<T>& launch, const Pieces& pieces, int64_t pieces_per_block) {
  return grid_over(launch.all_heads, rules::ceil_div(pieces.most(), pieces_per_block),
                   launch.selection.sequences.count());
}

// Calls function with the smallest of the compiled numbers of levels that holds `levels`. Each window is at least twice
// the finer one, so within a unit of `kLongest` tokens there are at most the last number's.
template <int64_t kLongest, int kLevels, int... kMore, class Function>
void with_levels(int levels, const Function& function) {
  if constexpr (sizeof...(kMore) > 0) {
    if (levels > kLevels) return with_levels<kLongest, kMore...>(levels, function);
  } else {
    static_assert(kLongest < int64_t{2} << kLevels, "units of this length can have more levels");
  }
  function(std::integral_constant<int, kLevels>());
}

std::vector<ConstView> views_of(std::span<const Pair> pairs) {
  std::vector<ConstView> views;
  for (const Pair& pair : pairs) {
    views.insert(views.end(), {pair.source, pair.target});
    if (pair.added.data != nullptr) views.push_back(pair.added);
  }
  return views;
}

}  // namespace

int64_t sum_workspace(std::span<const Pair> pairs, const Sequences& sequences, rules::WindowRule rule) {
  const Cut cut = cut_into_units(sequences.method.pyramid, rules::kLongestSum);
  if (cut.inner + 1 >= sequences.method.pyramid.levels) return 0;
  int64_t heads = 0;
  for (const Pair& pair : pairs) heads += pair.source.heads();
  const int64_t units = cut_by(sequences, rule.reach, cut.unit).total();
  return units * heads * pairs[0].source.head_dim() * static_cast<int64_t>(sizeof(float));
}

void sum_windows(std::span<const Pair> pairs, const ConstSelection& selection, rules::WindowRule rule,
                 const Workspace& workspace, Stream stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const Pyramid& pyramid = selection.sequences.method.pyramid;
  const Cut cut = cut_into_units(pyramid, rules::kLongestSum);
  with_column(views_of(pairs), [&]<class T, int kWidth>(T*, std::integral_constant<int, kWidth>) {
    const int64_t head_dim = pairs[0].source.head_dim();
    auto launch = make_launch<T, kWidth>(pairs, selection, rule, cut);
    if (const int64_t needed = sum_workspace(pairs, selection.sequences, rule); needed > 0) {
      require(workspace.bytes >= needed, "workspace of ", workspace.bytes, " bytes: ", needed, " are needed");
      launch.sums = static_cast<float*>(workspace.data);
    }
    const dim3 threads(static_cast<unsigned>(head_dim / kWidth), static_cast<unsigned>(launch.units_per_block));
    const dim3 grid = grid_of(launch, launch.units, launch.units_per_block);
    with_levels<rules::kLongestSum, 1, 2, 3, 6>(cut.inner, [&]<int kLevels>(std::integral_constant<int, kLevels>) {
      sum_units<T, kWidth, kLevels><<<grid, threads, 0, queue>>>(launch);
    });
    check_launch("sum_units");
    int64_t finer = cut.unit;
    for (int level = cut.inner + 1; level < pyramid.levels; ++level) {
      const int64_t window = pyramid.windows[static_cast<size_t>(level)];
      const Pieces windows = cut_by(selection.sequences, rule.reach, window);
      sum_level<T, kWidth><<<grid_of(launch, windows, threads.y), threads, 0, queue>>>(launch, level, finer / cut.unit,
                                                                                       window / finer, windows);
      check_launch("sum_level");
      finer = window;
    }
  });
}

void spread_windows(std::span<const Pair> pairs, const ConstSelection& selection, rules::WindowRule rule,
                    Stream stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const Cut cut = cut_into_units(selection.sequences.method.pyramid, kLongestSpread);
  with_column(views_of(pairs), [&]<class T, int kWidth>(T*, std::integral_constant<int, kWidth>) {
    const int64_t columns = pairs[0].source.head_dim() / kWidth;
    const auto launch = make_launch<T, kWidth>(pairs, selection, rule, cut);
    const dim3 threads(static_cast<unsigned>(columns), static_cast<unsigned>(launch.units_per_block));
    const dim3 grid = grid_of(launch, launch.units, launch.units_per_block);
    with_levels<kLongestSpread, 1, 2, 4>(cut.inner, [&]<int kLevels>(std::integral_constant<int, kLevels>) {
      if (pairs[0].added.data != nullptr) {
        spread_units<T, kWidth, kLevels, true><<<grid, threads, 0, queue>>>(launch);
      } else {
        spread_units<T, kWidth, kLevels, false><<<grid, threads, 0, queue>>>(launch);
      }
    });
    check_launch("spread_units");
  });
}

}  // namespace lighthouse::cuda
