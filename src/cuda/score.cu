// Scores of tokens: the largest query norm of the group, the key's norm (METHOD 2).
// A power of two of lanes holds one row at a time and several rows of following tokens in flight; every row is read
// once.

#include <array>

#include "core/check.h"
#include "cuda/device.cuh"
#include "lighthouse/cuda.h"
#include "rules/picking.h"

namespace lighthouse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 4;  // per thread, their loads in flight together

template <class T>
constexpr int kColumn = 16 / sizeof(T);  // numbers of a row that a lane takes at once

struct ScoreLaunch {
  ScoreArgs args;
  int64_t rows, kv_heads, tokens;
  int group, columns;
};

// Numbers are added in the same order whether or not rows are aligned: a norm does not depend on where it lies.
template <class T, bool kAligned>
__device__ Column<T, kColumn<T>> load_column(const T* first) {
  if constexpr (kAligned) {
    return load<T, kColumn<T>>(first);
  } else {
    Column<T, kColumn<T>> column;
#pragma unroll
    for (int i = 0; i < kColumn<T>; ++i) column.numbers[i] = first[i];
    return column;
  }
}

// The norms of kTokens rows, `step` elements apart, of which the first `count` exist.
template <class T, bool kAligned>
__device__ void norms(const T* first, int64_t step, int count, int columns, float (&result)[kTokens]) {
  float sums[kTokens] = {};
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    Column<T, kColumn<T>> numbers[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      numbers[i] =
          i < count ? load_column<T, kAligned>(first + i * step + column * kColumn<T>) : no_column<T, kColumn<T>>();
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const Sum<kColumn<T>> wide = widened(numbers[i]);
#pragma unroll
      for (int j = 0; j < kColumn<T>; ++j) sums[i] = fmaf(wide.numbers[j], wide.numbers[j], sums[i]);
    }
  }
  for (int distance = blockDim.x / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], distance);
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) result[i] = sqrtf(sums[i]);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) score_rows(const __grid_constant__ ScoreLaunch launch) {
  const int64_t head = blockIdx.x;
  const int64_t tokens_per_block = int64_t{blockDim.y} * kTokens;
  for (int64_t row = blockIdx.z; row < launch.rows; row += gridDim.z) {
    for (int64_t begin = blockIdx.y * tokens_per_block; begin < launch.tokens; begin += gridDim.y * tokens_per_block) {
      // All threads of a warp go on together: the sums are exchanged.
      const int64_t token = begin + threadIdx.y * kTokens;
      const int count = static_cast<int>(rules::larger(0, rules::smaller(kTokens, launch.tokens - token)));
      const ConstView &query_view = launch.args.query, &key_view = launch.args.key;
      const T* key = key_view.row<T>(row, head, token);
      const T* query = query_view.row<T>(row, head * launch.group, token);
      float key_norms[kTokens], query_norms[kTokens];
      norms<T, kAligned>(key, key_view.strides[2], count, launch.columns, key_norms);
      norms<T, kAligned>(query, query_view.strides[2], count, launch.columns, query_norms);
      for (int member = 1; member < launch.group; ++member) {
        float more[kTokens];
        norms<T, kAligned>(query + member * query_view.strides[1], query_view.strides[2], count, launch.columns, more);
#pragma unroll
        for (int i = 0; i < kTokens; ++i) query_norms[i] = rules::larger_score(query_norms[i], more[i]);
      }
      const int64_t out = (row * launch.kv_heads + head) * launch.tokens + token;
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (i < count && threadIdx.x == i % blockDim.x) {
          launch.args.query_score[out + i] = query_norms[i];
          launch.args.key_score[out + i] = key_norms[i];
        }
      }
    }
  }
}

}  // namespace

void run(const ScoreArgs& args, const Workspace&, Stream stream) {
  check(args);
  const ConstView &query = args.query, &key = args.key;
  with_column(std::array{query, key}, [&]<class T, int kWidth>(T*, std::integral_constant<int, kWidth>) {
    const ScoreLaunch launch{.args = args,
                             .rows = key.batch(),
                             .kv_heads = key.heads(),
                             .tokens = key.tokens(),
                             .group = static_cast<int>(query.heads() / key.heads()),
                             .columns = static_cast<int>(key.head_dim() / kColumn<T>)};
    constexpr bool kAligned = kWidth > 1;
    unsigned lanes = 1;
    while (lanes < 32 && static_cast<int>(lanes) < launch.columns) lanes *= 2;
    const dim3 threads(lanes, kThreads / lanes);
    const dim3 grid =
        grid_over(launch.kv_heads, rules::ceil_div(launch.tokens, int64_t{threads.y} * kTokens), launch.rows);
    score_rows<T, kAligned><<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  });
  check_launch("score");
}

}  // namespace lighthouse::cuda
