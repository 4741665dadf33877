/* The cells' equations on vectors of units, once the products are there. Sums become gates in place: a training step saves
   them. */

#ifndef LONGSHORT_EQUATIONS_H
#define LONGSHORT_EQUATIONS_H

#include "activations.h"
#include "layout.h"

namespace ls {
namespace LS_TARGET {

/* c after the step: f c + i g, where i is 1 - f if they are coupled. o is left as it is, since peepholes add the new c to it. */
template <class Cell>
static inline V lstm_c(V* gates, V c) {
  using L = LstmGates<Cell>;
  V f = gates[L::kF] = sigmoid(gates[L::kF]), g = gates[L::kG] = tanh(gates[L::kG]);
  V i = L::kCoupled ? 1.0f - f : gates[0] = sigmoid(gates[0]);
  return f * c + i * g;
}

/* h after the step: (1 - z) n + z h, where n is tanh(its sum + r `hidden`), and `hidden` W_hn h + b_hn. */
static inline V gru_h(V* gates, V hidden, V h) {
  V r = gates[0] = sigmoid(gates[0]), z = gates[1] = sigmoid(gates[1]);
  V n = gates[2] = tanh(gates[2] + r * hidden);
  return n + z * (h - n);
}

template <class Cell>
static inline V rnn_h(V sum) {
  return Cell::kCell == LS_RNN_TANH ? tanh(sum) : relu(sum);
}

}  // namespace LS_TARGET
}  // namespace ls

#endif
