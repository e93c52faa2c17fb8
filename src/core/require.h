// Errors that name the argument, the rule and the value.
#pragma once

#include <sstream>
#include <stdexcept>

namespace lighthouse {

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace lighthouse
