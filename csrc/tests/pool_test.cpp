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

/* A layer with its input, in one direction or in both with the same weights; what its forward and backward pass give. */
struct Call {
  int64_t T, B, I, H, gates;
  int32_t directions;
  ls_shape shape;
  std::vector<int64_t> counts; /* rows of each step; empty: all */
  Floats x, weight_ih, weight_hh, bias, dy;

  Call(int32_t cell, int64_t T, int64_t B, int64_t I, int64_t H, bool ragged = false, int32_t directions = 1)
      : T(T), B(B), I(I), H(H), gates((cell == LS_LSTM ? 4 : cell == LS_GRU ? 3 : 1) * H), directions(directions), shape() {
    shape.T = T, shape.B = B, shape.I = I, shape.H = H;
    shape.cell = cell;
    shape.target = -1;
    for (int64_t t = 0; ragged && t < T; ++t) counts.push_back(B - B * t / (2 * T));
    x = draw(size_t(T * B * I), 1);
    weight_ih = draw(size_t(gates * I), 2);
    weight_hh = draw(size_t(gates * H), 3);
    bias = draw(size_t(gates), 4);
    dy = draw(size_t(T * B * directions * H), 5);
  }

  /* y, or y and the gradients of x and the weights one after the other; empty where a call failed. */
  Floats run(int num_threads, bool backward) const {
    const int64_t width = directions * H;
    Floats y(size_t(T * B * width)), saved[2];
    ls_forward_args f[2] = {};
    for (int32_t d = 0; d < directions; ++d) {
      f[d].shape = shape;
      f[d].shape.reverse = d;
      f[d].shape.num_threads = num_threads;
      f[d].shape.counts = counts.empty() ? nullptr : counts.data();
      f[d].x = x.data(), f[d].x_step = B * I, f[d].x_row = I;
      f[d].weight_ih = weight_ih.data(), f[d].weight_hh = weight_hh.data();
      f[d].bias_ih = f[d].bias_hh = bias.data();
      f[d].y = y.data() + d * H, f[d].y_step = B * width, f[d].y_row = width;
      if (backward) {
        saved[d].resize(size_t(ls_saved_floats(&f[d].shape, 0)));
        f[d].saved = saved[d].data();
      }
    }
    if (ls_forward(f, directions) != LS_OK) return {};
    if (!backward) return y;
    Floats dx(x.size()), dweights[2][3];
    ls_backward_args b[2] = {};
    for (int32_t d = 0; d < directions; ++d) {
      b[d].shape = f[d].shape;
      b[d].x = f[d].x, b[d].x_step = f[d].x_step, b[d].x_row = f[d].x_row;
      b[d].weight_ih = f[d].weight_ih, b[d].weight_hh = f[d].weight_hh;
      b[d].y = f[d].y, b[d].y_step = f[d].y_step, b[d].y_row = f[d].y_row;
      b[d].saved = saved[d].data();
      b[d].dy = dy.data() + d * H, b[d].dy_step = B * width, b[d].dy_row = width;
      b[d].dx = dx.data(), b[d].dx_step = f[d].x_step, b[d].dx_row = f[d].x_row;
      b[d].accumulate_dx = d;
      Floats* down = dweights[d];
      down[0].resize(weight_ih.size()), down[1].resize(weight_hh.size()), down[2].resize(bias.size());
      b[d].dweight_ih = down[0].data(), b[d].dweight_hh = down[1].data(), b[d].dbias_ih = down[2].data();
    }
    if (ls_backward(b, directions) != LS_OK) return {};
    y.insert(y.end(), dx.begin(), dx.end());
    for (int32_t d = 0; d < directions; ++d)
      for (const Floats& part : dweights[d]) y.insert(y.end(), part.begin(), part.end());
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
  /* Threads divide rows, also of several lengths, or units, or teams rows and their threads units, or directions. */
  const Call calls[] = {{LS_LSTM, 4, 24, 48, 64}, {LS_GRU, 6, 3, 64, 160}, {LS_RNN_TANH, 5, 40, 96, 96}, {LS_LSTM, 3, 1, 8, 200},
                        {LS_LSTM, 16, 24, 64, 192}, {LS_GRU, 16, 24, 40, 64, true}, {LS_LSTM, 40, 3, 24, 48, false, 2},
                        {LS_GRU, 40, 4, 24, 48, true, 2}};
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
