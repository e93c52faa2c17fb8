// The settings of the method: the pyramid's windows, the number of parents per level, the covered start, the local
// window (METHOD 1, 3 and 5a).
// Plain data: checked when made by the functions here, and once more where sequences are described by it.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>

namespace lighthouse {

inline constexpr int kMaxLevels = 8;                    // a level is one bit of a token's mask byte
inline constexpr int64_t kMaxCount = int64_t{1} << 40;  // of tokens and parents: keeps every product in 64 bits
inline constexpr int64_t kMaxDenominator = 65536;       // of a share of the tokens
inline constexpr int64_t kMaxLocalWindow = int64_t{1} << 31;

// Window lengths in tokens, finest first: windows[0] == 1, each a larger multiple of the one before.
struct Pyramid {
  std::array<int64_t, kMaxLevels> windows{1};
  int levels = 1;

  // Throws std::invalid_argument naming the rule that `windows` breaks.
  static Pyramid from_windows(std::span<const int64_t> windows);

  int64_t coarsest() const { return windows[static_cast<size_t>(levels - 1)]; }
  std::string str() const;  // "1, 4, 16"
};

// Parents chosen per level: a number, or a share of the tokens as an exact fraction.
struct TopK {
  int64_t numerator = 1;
  int64_t denominator = 64;  // 0: `numerator` is the number itself

  static TopK count(int64_t parents);                         // 0 chooses nothing: the local window alone
  static TopK share(int64_t numerator, int64_t denominator);  // 0 < numerator <= denominator <= 65,536

  bool chooses() const { return numerator > 0; }
  // k of a sequence of `tokens`: the number, or max(1, floor(tokens * share)).
  int64_t parents(int64_t tokens) const;
  std::string str() const;
};

struct Method {
  Pyramid pyramid;
  TopK topk;
  bool cover_start = true;   // entry 0 of every level above 0 is always a parent
  int64_t local_window = 0;  // tokens that each token attends to exactly, itself among them; 0: no local window

  Method checked() const;   // itself; throws std::invalid_argument naming the setting, the rule and the value
  std::string str() const;  // "windows=[1, 4, 16], select_topk=1/64, cover_start=true, local_window=0"
};

}  // namespace lighthouse
