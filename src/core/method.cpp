// The rules that the settings keep, and k of a length, exact: no float takes part in it.

#include "lighthouse/method.h"

#include <algorithm>

#include "core/require.h"

namespace lighthouse {

Pyramid Pyramid::from_windows(std::span<const int64_t> windows) {
  require(!windows.empty(), "windows is empty: the first level is the sequence itself, windows[0]=1");
  require(windows.size() <= kMaxLevels, "windows has ", windows.size(), " levels: at most ", kMaxLevels);
  require(windows[0] == 1, "windows[0]=", windows[0], ": the first level is the sequence itself, a window of 1");
  Pyramid pyramid;
  pyramid.levels = static_cast<int>(windows.size());
  for (size_t level = 0; level < windows.size(); ++level) {
    if (level > 0) {
      const int64_t finer = windows[level - 1];
      require(windows[level] > finer && windows[level] % finer == 0, "windows[", level, "]=", windows[level],
              ": a multiple of the window before it and larger is needed, that is ", finer);
    }
    require(windows[level] <= kMaxCount, "windows[", level, "]=", windows[level], ": at most 2^40");
    pyramid.windows[level] = windows[level];
  }
  return pyramid;
}

std::string Pyramid::str() const {
  std::string text;
  for (int level = 0; level < levels; ++level) {
    if (level > 0) text += ", ";
    text += std::to_string(windows[static_cast<size_t>(level)]);
  }
  return text;
}

TopK TopK::count(int64_t parents) {
  require(parents >= 0, "select_topk=", parents, ": zero or more parents per level are needed");
  require(parents <= kMaxCount, "select_topk=", parents, ": at most 2^40");
  return {parents, 0};
}

TopK TopK::share(int64_t numerator, int64_t denominator) {
  require(0 < denominator && denominator <= kMaxDenominator, "select_topk=", numerator, "/", denominator,
          ": the denominator must be 1 to ", kMaxDenominator);
  require(0 < numerator && numerator <= denominator, "select_topk=", numerator, "/", denominator,
          ": a share must be above 0 and at most 1");
  return {numerator, denominator};
}

int64_t TopK::parents(int64_t tokens) const {
  if (denominator == 0) return numerator;
  // Split so that the product stays in 64 bits for any number of tokens.
  const int64_t whole = tokens / denominator * numerator;
  return std::max<int64_t>(1, whole + tokens % denominator * numerator / denominator);
}

std::string TopK::str() const {
  return denominator == 0 ? std::to_string(numerator) : std::to_string(numerator) + "/" + std::to_string(denominator);
}

Method Method::checked() const {
  require(0 <= local_window && local_window <= kMaxLocalWindow, "local_window=", local_window,
          ": 0 (none) to 2^31 tokens are needed");
  require(topk.chooses() || local_window > 0,
          "select_topk=0 chooses nothing, and local_window=0 attends to nothing: a local_window above 0 is needed");
  return {Pyramid::from_windows({pyramid.windows.data(), static_cast<size_t>(std::max(0, pyramid.levels))}),
          topk.denominator == 0 ? TopK::count(topk.numerator) : TopK::share(topk.numerator, topk.denominator),
          cover_start, local_window};
}

std::string Method::str() const {
  return "windows=[" + pyramid.str() + "], select_topk=" + topk.str() +
         ", cover_start=" + (cover_start ? "true" : "false") + ", local_window=" + std::to_string(local_window);
}

}  // namespace lighthouse
