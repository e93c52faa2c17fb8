// The six functions one after another, as a training step calls them but for the inner attention, with all arrays in
// one piece of memory: the host's for the CPU, the device's for CUDA.
// The numbers are small and whole and the windows powers of two: no sum rounds in float32, so both have the same bits,
// and what lies between the arrays stays poison on both.
#pragma once

#include <thread>

#include "cuda_device.h"

namespace lighthouse::test {

class Chain {
 public:
  Chain(const Problem& problem, DType dtype, Memory memory)
      : sequences_(problem.sequences()), dtype_(dtype), memory_(memory) {
    const int64_t choices = problem.rows * problem.kv_heads * problem.tokens;
    kv_heads_ = problem.kv_heads;
    query_ = tensor("query", problem.query_sizes());
    key_ = tensor("key", problem.kv_sizes());
    value_ = tensor("value", problem.kv_sizes());
    input_bytes_ = bytes_;
    query_score_ = array("query_score", choices * 4);
    key_score_ = array("key_score", choices * 4);
    mask_ = array("mask", choices);
    prefix_ = array("prefix", choices * 4);
    query_sub_ = tensor("query_sub", problem.query_sub_sizes());
    key_sub_ = tensor("key_sub", problem.kv_sub_sizes());
    value_sub_ = tensor("value_sub", problem.kv_sub_sizes());
    output_ = tensor("output", problem.query_sizes());
    grad_output_sub_ = tensor("grad_output_sub", problem.query_sub_sizes());
    grad_query_ = tensor("grad_query", problem.query_sizes());
    grad_key_ = tensor("grad_key", problem.kv_sizes());
    grad_value_ = tensor("grad_value", problem.kv_sizes());
  }

  int64_t bytes() const { return bytes_; }
  int64_t input_bytes() const { return input_bytes_; }  // they come first

  int64_t workspace_bytes() const {
    std::byte somewhere{};
    int64_t most = 0;
    each_call(&somewhere, [&](const auto& args) { most = std::max(most, cuda::workspace_bytes(args)); });
    return most;
  }

  // Host memory of inputs: whole numbers from -4 to 4, repeated after a length that no stride is a multiple of.
  void fill(std::byte* inputs, uint64_t seed) const {
    constexpr int64_t kPeriod = 100003;
    Random random(seed);
    std::vector<std::byte> numbers(static_cast<size_t>(kPeriod * size_of(dtype_)));
    for (int64_t i = 0; i < kPeriod; ++i) {
      store(dtype_, numbers.data() + i * size_of(dtype_), static_cast<double>(random.below(9) - 4));
    }
    const int64_t step = std::ssize(numbers);
    for (int64_t at = 0; at < input_bytes_; at += step) {
      std::memcpy(inputs + at, numbers.data(), static_cast<size_t>(std::min(step, input_bytes_ - at)));
    }
  }

  void run(const Device& device, std::byte* memory) const {
    each_call(memory, [&](const auto& args) { device.run(args); });
  }

  // All that the CPU makes of the inputs.
  std::unique_ptr<std::byte[]> run_on_cpu(uint64_t seed) const {
    std::unique_ptr<std::byte[]> memory(new std::byte[static_cast<size_t>(bytes_)]);
    std::memset(memory.get(), 0xff, static_cast<size_t>(bytes_));
    fill(memory.get(), seed);
    const ThreadExecutor executor(std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
    run(CpuDevice(executor), memory.get());
    return memory;
  }

  // The name of the array that a byte is in.
  std::string owner(int64_t offset) const {
    std::string name;
    for (const auto& [first, array] : names_) {
      if (first <= offset) {
        name = array + std::string(" + ") + std::to_string(offset - first) + " bytes";
      }
    }
    return name;
  }

 private:
  struct Piece {
    View view;
    int64_t offset = 0;  // of the first element, in bytes
  };

  template <class Function>
  void each_call(std::byte* memory, const Function& function) const {
    const auto at = [memory](const Piece& piece) {
      View view = piece.view;
      view.data = memory + piece.offset;
      return view;
    };
    auto* const query_score = reinterpret_cast<float*>(memory + query_score_.offset);
    auto* const key_score = reinterpret_cast<float*>(memory + key_score_.offset);
    const Selection selection{sequences_, kv_heads_, reinterpret_cast<uint8_t*>(memory + mask_.offset),
                              reinterpret_cast<int32_t*>(memory + prefix_.offset)};
    function(ScoreArgs{at(query_), at(key_), query_score, key_score});
    function(SelectArgs{query_score, key_score, selection});
    function(GatherArgs{at(query_), at(key_), at(value_), selection, at(query_sub_), at(key_sub_), at(value_sub_)});
    function(ScatterArgs{at(query_sub_), selection, at(output_)});
    function(ScatterBackwardArgs{at(output_), selection, at(grad_output_sub_)});
    function(GatherBackwardArgs{at(query_sub_), at(key_sub_), at(value_sub_), selection, at(grad_query_), at(grad_key_),
                                at(grad_value_)});
  }

  Piece array(const char* name, int64_t bytes) {
    const int64_t offset = bytes_;
    names_.emplace_back(offset, name);
    bytes_ += (bytes + 255) / 256 * 256;
    return {{}, offset};
  }

  Piece tensor(const char* name, const Sizes& sizes) {
    const Placement placement(sizes, memory_);
    Piece piece = array(name, placement.span * size_of(dtype_));
    piece.offset += placement.start * size_of(dtype_);
    piece.view = {nullptr, dtype_, sizes, placement.strides};
    return piece;
  }

  Sequences sequences_;
  DType dtype_;
  Memory memory_;
  int64_t kv_heads_ = 0, bytes_ = 0, input_bytes_ = 0;
  std::vector<std::pair<int64_t, const char*>> names_;
  Piece query_, key_, value_, query_score_, key_score_, mask_, prefix_, query_sub_, key_sub_, value_sub_, output_,
      grad_output_sub_, grad_query_, grad_key_, grad_value_;
};

// A chain's memory on the GPU.
class CudaChain {
 public:
  explicit CudaChain(const Chain& chain) : chain_(chain), memory_(chain.bytes()), workspace_(chain.workspace_bytes()) {}

  // Poison but for new inputs.
  void reset(uint64_t seed) const {
    std::vector<std::byte> inputs(static_cast<size_t>(chain_.input_bytes()));
    chain_.fill(inputs.data(), seed);
    reset(inputs.data());
  }
  void reset(const std::byte* inputs) const {
    memory_.poison();
    workspace_.poison();
    check(cudaMemcpy(memory_.data(), inputs, static_cast<size_t>(chain_.input_bytes()), cudaMemcpyDefault));
    check(cudaDeviceSynchronize());
  }

  void enqueue(cudaStream_t stream) const { chain_.run(CudaCalls(stream, workspace_), memory_.data()); }

  // Waits for everything; compares byte by byte.
  void expect_same(const std::byte* expected) const {
    check(cudaDeviceSynchronize());
    constexpr int64_t kPart = int64_t{64} << 20;
    std::vector<std::byte> part(static_cast<size_t>(std::min(kPart, chain_.bytes())));
    for (int64_t at = 0; at < chain_.bytes(); at += kPart) {
      const auto size = static_cast<size_t>(std::min(kPart, chain_.bytes() - at));
      check(cudaMemcpy(part.data(), memory_.data() + at, size, cudaMemcpyDefault));
      if (std::memcmp(part.data(), expected + at, size) != 0) {
        const auto differing = std::mismatch(part.begin(), part.begin() + static_cast<int64_t>(size), expected + at);
        FAIL() << "differs at " << chain_.owner(at + (differing.first - part.begin()));
      }
    }
    EXPECT_TRUE(memory_.guards_untouched());
    EXPECT_TRUE(workspace_.guards_untouched());
  }

 private:
  const Chain& chain_;
  DeviceMemory memory_, workspace_;
};

}  // namespace lighthouse::test
