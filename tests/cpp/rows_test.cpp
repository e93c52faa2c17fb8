// The inner loops of every instruction set that this machine has: exact conversions, and the same bits from all.
#include "support.h"

#include "cpu/rows.h"

namespace lighthouse::test {
namespace {

using cpu::BFloat16;
using cpu::Half;
using cpu::RowTable;

class Rows : public testing::TestWithParam<const RowTable*> {};

template <class T>
constexpr DType dtype_of = std::is_same_v<T, float>      ? DType::float32
                           : std::is_same_v<T, double>   ? DType::float64
                           : std::is_same_v<T, BFloat16> ? DType::bfloat16
                                                         : DType::float16;

template <class T>
void expect_exact_widening(const RowTable& table) {
  std::vector<T> all(65536);
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].bits = static_cast<uint16_t>(i);
  }
  std::vector<float> wide(all.size(), -0.0F);  // what added to leaves every number, its sign too
  table.of<T>().add_rows(wide.data(), all.data(), 0, 1, std::ssize(all));
  for (size_t i = 0; i < all.size(); ++i) {
    const double expected = load(dtype_of<T>, reinterpret_cast<const std::byte*>(&all[i]));
    ASSERT_TRUE(std::isnan(expected) ? std::isnan(wide[i])
                                     : wide[i] == expected && std::signbit(wide[i]) == std::signbit(expected))
        << std::hex << i;
  }
}

TEST_P(Rows, WidenEveryHalf) {
  expect_exact_widening<BFloat16>(*GetParam());
  expect_exact_widening<Half>(*GetParam());
}

// Around every number of 16 bits: itself, the middle to the next one, and a little to both sides of the middle.
template <class T>
void expect_exact_narrowing(const RowTable& table) {
  std::vector<float> numbers;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits), next = static_cast<uint16_t>(bits + 1);
    const double a = load(dtype_of<T>, reinterpret_cast<const std::byte*>(&half));
    const double b = load(dtype_of<T>, reinterpret_cast<const std::byte*>(&next));
    const auto middle = static_cast<float>((a + b) / 2);
    for (const float number : {static_cast<float>(a), middle, std::nextafter(middle, 0.0F),
                               std::nextafter(middle, middle < 0 ? -1e38F : 1e38F)}) {
      numbers.push_back(number);
    }
  }
  for (const float number :
       {65519.996F, 65520.0F, 65536.0F, 1e30F, 3.4e38F, 3.3961e38F, 1e-8F, 1e-45F, 5.9604645e-8F}) {
    numbers.insert(numbers.end(), {number, -number});
  }
  std::vector<T> narrow(numbers.size());
  table.of<T>().store_quotient(narrow.data(), numbers.data(), 1.0F, std::ssize(numbers));
  for (size_t i = 0; i < numbers.size(); ++i) {
    const double ours = load(dtype_of<T>, reinterpret_cast<const std::byte*>(&narrow[i]));
    const double expected = rounded(dtype_of<T>, static_cast<double>(numbers[i]));
    ASSERT_TRUE(std::isnan(expected) ? std::isnan(ours)
                                     : ours == expected && std::signbit(ours) == std::signbit(expected))
        << numbers[i] << " became " << ours << ", not " << expected;
  }
}

TEST_P(Rows, NarrowToTheNearestEven) {
  expect_exact_narrowing<BFloat16>(*GetParam());
  expect_exact_narrowing<Half>(*GetParam());
}

// All six functions on rows of every length up to two chunks, beginning at odd addresses.
template <class T>
std::vector<std::byte> run_all(const RowTable& table) {
  using A = cpu::AccumulatorOf<T>;
  const auto& f = table.of<T>();
  Random random(31);
  std::vector<std::byte> bits;
  const auto keep = [&](const auto* data, int64_t n) {
    const auto* bytes = reinterpret_cast<const std::byte*>(data);
    bits.insert(bits.end(), bytes, bytes + n * static_cast<int64_t>(sizeof *data));
  };
  for (int64_t n = 1; n <= 140; ++n) {
    const int64_t stride = n + 3;
    std::vector<T> rows(static_cast<size_t>(3 * stride + 1)), row(static_cast<size_t>(n));
    std::vector<A> sum(static_cast<size_t>(n)), other(static_cast<size_t>(n));
    for (T& number : rows) {
      store(dtype_of<T>, reinterpret_cast<std::byte*>(&number), random.normal());
    }
    for (A& number : sum) {
      number = static_cast<A>(random.normal());
    }
    const T* first = rows.data() + 1;
    const float norm = f.norm(first, n);
    keep(&norm, 1);
    f.add_rows(sum.data(), first, stride, 3, n);
    keep(sum.data(), n);
    f.add_quotient(other.data(), sum.data(), first, A{7}, n);
    keep(other.data(), n);
    f.add(sum.data(), other.data(), n);
    keep(sum.data(), n);
    f.store_quotient(row.data(), sum.data(), A{3}, n);
    keep(row.data(), n);
    f.store_sum(row.data(), sum.data(), first, n);
    keep(row.data(), n);
  }
  return bits;
}

TEST_P(Rows, HaveTheBaseCodesBits) {
  EXPECT_EQ(run_all<float>(*GetParam()), run_all<float>(cpu::kRowsBase));
  EXPECT_EQ(run_all<double>(*GetParam()), run_all<double>(cpu::kRowsBase));
  EXPECT_EQ(run_all<BFloat16>(*GetParam()), run_all<BFloat16>(cpu::kRowsBase));
  EXPECT_EQ(run_all<Half>(*GetParam()), run_all<Half>(cpu::kRowsBase));
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, Rows, testing::ValuesIn(cpu::available_rows()), [](const auto& test) {
  std::string name = test.param->instruction_set;
  std::erase_if(name, [](char c) { return std::isalnum(static_cast<unsigned char>(c)) == 0; });
  return name;
});

}  // namespace
}  // namespace lighthouse::test
