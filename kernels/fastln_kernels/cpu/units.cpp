// Measures the rates at which one thread multiplies blocks in each dtype. `units.py` chooses by them.

#include <chrono>

#include "parallel.h"
#include "products.h"

namespace fastln {
namespace {

constexpr int64_t M = 128, N = 64, K = 768;  // rows of activations, a panel of a weight, a usual width
constexpr double OPERATIONS = 2.0 * M * N * K;
constexpr int ROUNDS = 24;
constexpr double ROUND = 0.5e-3;  // seconds; short, so that some rounds are not interrupted by other processes

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Measures operations per second in one round.
template <class Multiply>
double round_of(const Multiply& multiply, bool paired) {
  multiply();  // the operands enter the cache, and the unit wakes up
  const double start = now();
  double seconds = 0;
  int64_t count = 0;
  for (; seconds < ROUND; seconds = now() - start, count++) multiply();
  products.release(paired);
  return count * OPERATIONS / seconds;
}

}  // namespace
}  // namespace fastln

using namespace fastln;

// Writes the operations per second for FLOAT32, BFLOAT16 and INT8 to `rates[dtype]`; 0 if the product does not work.
// The best of some rounds counts. The dtypes take turns, so that a change of the clock rate meets all.
extern "C" void fastln_unit_rates(double* rates) {
  Buffer<uint8_t> a_buffer, b_buffer;
  Buffer<float> c_buffer;
  uint8_t* a = a_buffer.at_least(M * K * sizeof(float));
  uint8_t* b = b_buffer.at_least(K * N * sizeof(float));
  float* c = c_buffer.at_least(M * N);
  std::memset(a, 0x11, M * K * sizeof(float));  // a small number in each dtype
  std::memset(b, 0x11, K * N * sizeof(float));
  const auto keep_best = [&](Dtype dtype, bool works, bool paired, const auto& multiply) {
    if (works) rates[dtype] = std::max(rates[dtype], round_of(multiply, paired));
  };
  rates[FLOAT32] = rates[BFLOAT16] = rates[INT8] = 0;
  for (int round = 0; round < ROUNDS; round++) {
    keep_best(FLOAT32, products.float32, false,
              [&] { products.float32(M, N, K, K, N, N, false, a, b, c, false); });
    keep_best(BFLOAT16, products.bfloat16, true,
              [&] { products.bfloat16(M, N, K, K, N, N, false, a, b, c, true); });
    keep_best(INT8, products.int8, true, [&] {
      products.int8(M, N, K, K, N, N, false, a, reinterpret_cast<int8_t*>(b), reinterpret_cast<int32_t*>(c), true);
    });
  }
}
