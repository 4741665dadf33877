/* Drives the library's own thread pool from several threads at once, for ThreadSanitizer: every call must give what the
   same call gave alone. The numbers themselves are the business of tests/test_native.py.

     pool_test [rounds] */

#include <stdio.h>
#include <stdlib.h>

#include <thread>
#include <vector>

#include "longshort.h"

namespace {

using Floats = std::vector<float>;

Floats draw(size_t n, unsigned seed) {
  Floats values(n);
  for (float& v : values) {
    seed = seed * 1664525u + 1013904223u;
    v = float(int(seed >> 9) % 2001 - 1000) * 3e-4f;
  }
  return values;
}

/* A layer with its input; what its forward and backward pass give. */
struct Call {
  int64_t T, B, I, H, gates;
  ls_shape shape;
  std::vector<int64_t> counts; /* rows of each step; empty: all */
  Floats x, weight_ih, weight_hh, bias, dy;

  Call(int32_t cell, int64_t T, int64_t B, int64_t I, int64_t H, bool ragged = false)
      : T(T), B(B), I(I), H(H), gates((cell == LS_LSTM ? 4 : cell == LS_GRU ? 3 : 1) * H), shape() {
    shape.T = T, shape.B = B, shape.I = I, shape.H = H;
    shape.cell = cell;
    shape.target = -1;
    for (int64_t t = 0; ragged && t < T; ++t) counts.push_back(B - B * t / (2 * T));
    x = draw(size_t(T * B * I), 1);
    weight_ih = draw(size_t(gates * I), 2);
    weight_hh = draw(size_t(gates * H), 3);
    bias = draw(size_t(gates), 4);
    dy = draw(size_t(T * B * H), 5);
  }

  /* y, or y and the gradients of x and the weights one after the other; empty where a call failed. */
  Floats run(int num_threads, bool backward) const {
    Floats y(size_t(T * B * H)), saved;
    ls_forward_args f = {};
    f.shape = shape;
    f.shape.num_threads = num_threads;
    f.shape.counts = counts.empty() ? nullptr : counts.data();
    f.x = x.data(), f.x_step = B * I, f.x_row = I;
    f.weight_ih = weight_ih.data(), f.weight_hh = weight_hh.data();
    f.bias_ih = f.bias_hh = bias.data();
    f.y = y.data(), f.y_step = B * H, f.y_row = H;
    if (backward) {
      saved.resize(size_t(ls_saved_floats(&f.shape, 0)));
      f.saved = saved.data();
    }
    if (ls_forward(&f, 1) != LS_OK) return {};
    if (!backward) return y;
    Floats dx(x.size()), dweight_ih(weight_ih.size()), dweight_hh(weight_hh.size()), dbias(bias.size());
    ls_backward_args b = {};
    b.shape = f.shape;
    b.x = f.x, b.x_step = f.x_step, b.x_row = f.x_row;
    b.weight_ih = f.weight_ih, b.weight_hh = f.weight_hh;
    b.y = f.y, b.y_step = f.y_step, b.y_row = f.y_row;
    b.saved = saved.data();
    b.dy = dy.data(), b.dy_step = B * H, b.dy_row = H;
    b.dx = dx.data(), b.dx_step = f.x_step, b.dx_row = f.x_row;
    b.dweight_ih = dweight_ih.data(), b.dweight_hh = dweight_hh.data(), b.dbias_ih = dbias.data();
    if (ls_backward(&b, 1) != LS_OK) return {};
    for (const Floats* part : {&dx, &dweight_ih, &dweight_hh, &dbias}) y.insert(y.end(), part->begin(), part->end());
    return y;
  }
};

/* Gradients are sums whose order may depend on the number of threads. */
bool near(const Floats& a, const Floats& b, float tolerance) {
  if (a.size() != b.size()) return false;
  float largest = 0, error = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    float d = a[i] > b[i] ? a[i] - b[i] : b[i] - a[i], size = b[i] < 0 ? -b[i] : b[i];
    if (d != d) return false;
    error = d > error ? d : error;
    largest = size > largest ? size : largest;
  }
  return error <= tolerance * largest;
}

}  // namespace

int main(int count, char** arguments) {
  int rounds = count > 1 ? atoi(arguments[1]) : 20;
  if (ls_threading() != 0) return puts("the own pool is not in use"), 1;
  /* Threads divide rows, also of several lengths, or units, or teams rows and their threads units. */
  const Call calls[] = {{LS_LSTM, 4, 24, 48, 64}, {LS_GRU, 6, 3, 64, 160}, {LS_RNN_TANH, 5, 40, 96, 96}, {LS_LSTM, 3, 1, 8, 200},
                        {LS_LSTM, 16, 24, 64, 192}, {LS_GRU, 16, 24, 40, 64, true}};
  constexpr int kCalls = sizeof calls / sizeof calls[0];
  Floats forward[kCalls], both[kCalls];
  for (int i = 0; i < kCalls; ++i) {
    forward[i] = calls[i].run(1, false);
    both[i] = calls[i].run(1, true);
    if (forward[i].empty() || both[i].empty()) return puts("a call failed"), 1;
  }
  int wrong = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < kCalls; ++i)
    threads.emplace_back([&, i] {
      for (int round = 0; round < rounds; ++round) {
        int num_threads = 2 + (i + round) % 3;
        if (!near(calls[i].run(num_threads, false), forward[i], 0.0f)) __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
        if (!near(calls[i].run(num_threads, true), both[i], 1e-5f)) __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
        if (round % 5 == i) ls_trim();
        if (ls_handover() < 0) __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
      }
    });
  for (std::thread& thread : threads) thread.join();
  printf("%d calls, %d wrong\n", 2 * kCalls * rounds, wrong);
  return wrong != 0;
}
