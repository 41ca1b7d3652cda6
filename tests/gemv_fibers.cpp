// Runs csrc/gemv.cuh on a CPU, case after case from stdin, outputs to stdout.
//
// A case is 13 int32 (slots, outputs, width, live or the least int, norm, swiglu, bias, residual,
// processors, seed, early copies, weight stride, x stride), a float32 eps, then in bf16 weight, x, norm, bias and residual as far as there are such, and what `out` holds before. The
// answer is `out`, all of its rows.
#include "gemv.cuh"

using namespace s1fast;

namespace {

template <class T>
T read_one() {
  T value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) std::exit(2);
  return value;
}

// 16-byte aligned and not an element longer, so that a sanitizer sees the first one beyond.
struct Array {
  uint16_t* data = nullptr;
  size_t count = 0;

  explicit Array(size_t elements) : count(elements) {
    if (!count) return;
    data = static_cast<uint16_t*>(std::malloc(2 * count));
    if (std::fread(data, 2, count, stdin) != count) std::exit(2);
  }
  ~Array() { std::free(data); }
  Array(const Array&) = delete;
};

template <bool NORM, bool SWIGLU>
void run(const Gemv& g, uint32_t seed) {
  fibers::launch(g.plan.grid, THREADS, sizeof(Shared), seed,
                 [&] { gemv_kernel<NORM, SWIGLU, Bf16Weight>(g); });
}

void one_case(int32_t slots) {
  int32_t v[12];
  for (int32_t& value : v) value = read_one<int32_t>();
  const auto [outputs, width, live_tokens, norm, swiglu, bias, residual, processors, seed, early,
              weight_stride, x_stride] = v;
  const float eps = read_one<float>();
  const int rows = outputs * (swiglu ? 2 : 1);
  const Array weight(size_t(rows - 1) * weight_stride + width);
  const Array x(size_t(slots - 1) * x_stride + width);
  const Array norms(norm ? width : 0), biases(bias ? outputs : 0);
  const Array residuals(residual ? size_t(slots) * outputs : 0);
  const Array out(size_t(slots) * outputs);

  const Plan plan = make_plan(outputs, width, swiglu, processors);
  std::vector<float> partial(2 * size_t(plan.grid) * RECORD);
  std::vector<int> arrivals(plan.grid, 0);

  // Before the wait the tokens are NaN, and more are said to be live than are there.
  const std::vector<uint16_t> tokens(x.data, x.data + x.count);
  int live = 0;
  fibers::before_dependency = [&] {
    std::memset(x.data, 0xff, 2 * x.count);
    live = MAX_TOKENS + 1;
  };
  fibers::on_dependency = [&] {
    std::copy(tokens.begin(), tokens.end(), x.data);
    live = live_tokens;
  };
  fibers::early_copies = early;
  Gemv g{};
  g.weight = weight.data, g.x = x.data, g.norm = norms.data;
  g.bias = biases.data, g.residual = residuals.data, g.out = out.data;
  g.live = live_tokens == INT32_MIN ? nullptr : &live;
  g.partial = partial.data(), g.arrivals = arrivals.data();
  g.weight_stride = weight_stride, g.x_stride = x_stride;
  g.residual_stride = g.out_stride = g.outputs = outputs;
  g.eps = eps, g.slots = slots, g.width = width, g.plan = plan;
  for (int launch = 0; launch < 2; ++launch) {  // the second finds the counters of the first
    std::fill(partial.begin(), partial.end(), NAN);
    const auto kernel = norm ? (swiglu ? run<true, true> : run<true, false>)
                             : (swiglu ? run<false, true> : run<false, false>);
    kernel(g, seed + launch);
    for (int count : arrivals)
      if (count) fibers::fail("arrivals are not 0 after the launch");
  }
  std::fwrite(out.data, 2, out.count, stdout);
}

}  // namespace

int main() {
  for (int32_t slots; std::fread(&slots, sizeof slots, 1, stdin) == 1;) one_case(slots);
}
