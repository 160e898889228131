/// A MixLoRA block in fp64: every expert's whole block on its own rows, then the weighted sum.
/// include/graft/ops/expert_linear.h and expert_mlp.h have the formulas; frozen products and
/// low-rank terms are not shared between experts here.
#pragma once

#include <algorithm>

#include "lora_reference.h"

namespace graft::cuda::testing::mixture {

struct Sizes {
  int64_t tokens, width, inner;
  int experts, top_k, rank;
  int64_t slots() const { return tokens * top_k; }
};

// The factors of all experts on one projection, A [E, r, inputs] and B [E, outputs, r].
template <class T>
struct Projection {
  Projection(const Sizes& s, int64_t inputs_in, int64_t outputs_in, unsigned seed)
      : inputs(inputs_in),
        outputs(outputs_in),
        W(outputs, inputs, seed, 1 / std::sqrt(inputs)),
        A(s.experts * s.rank, inputs, seed + 1, 1 / std::sqrt(inputs)),
        B(s.experts * outputs, s.rank, seed + 2, 0.3),
        mask(mask_of(0.25, seed)) {}
  int64_t inputs, outputs;
  Matrix<T> W, A, B;
  DropoutMask mask;
};

template <class T>
struct Block {
  explicit Block(Sizes s)
      : sizes(s),
        x(s.tokens, s.width, 1),
        dY(s.tokens, s.width, 2),
        logits(s.tokens, s.experts, 3),
        gate(s, s.width, s.inner, 10),
        up(s, s.width, s.inner, 20),
        down(s, s.inner, s.width, 30) {}
  Sizes sizes;
  Matrix<T> x, dY;
  Matrix<float> logits;
  Projection<T> gate, up, down;
  float scale = 1.5f;
};

struct Gradients {
  Doubles A, B;
};
struct Results {
  Doubles y, dx, d_logits;
  Gradients gate, up, down;
  Doubles all() const {
    Doubles list;
    for (const Doubles* part :
         {&y, &dx, &d_logits, &gate.A, &gate.B, &up.A, &up.B, &down.A, &down.B})
      list.insert(list.end(), part->begin(), part->end());
    return list;
  }
};

// ----------

struct Chosen {
  std::vector<int> experts;
  Doubles weights;
};

inline Chosen choose(const Matrix<float>& logits, int64_t t, int top_k) {
  std::vector<int> order(static_cast<size_t>(logits.columns));
  for (size_t e = 0; e < order.size(); ++e) order[e] = static_cast<int>(e);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return logits(t, a) > logits(t, b); });
  order.resize(static_cast<size_t>(top_k));
  Doubles weights;
  double sum = 0;
  for (const int e : order) {
    weights.push_back(std::exp(logits(t, e)));
    sum += weights.back();
  }
  for (double& w : weights) w /= sum;
  return {order, weights};
}

// One projection of one slot: y = W x + s B_e (A_e drop(x)), and its gradients.
template <class T>
struct SlotProjection {
  const Projection<T>& p;
  int64_t slot;
  int expert, rank;
  double scale;
  Doubles x = {}, S = {};

  double dropped(int64_t j) const {
    return x[static_cast<size_t>(j)] * mask_factor(p.mask, slot, j);
  }
  Doubles forward(const Doubles& in) {
    x = in;
    S.assign(static_cast<size_t>(rank), 0.0);
    for (int r = 0; r < rank; ++r)
      for (int64_t j = 0; j < p.inputs; ++j)
        S[static_cast<size_t>(r)] += p.A(expert * rank + r, j) * dropped(j);
    Doubles y;
    for (int64_t i = 0; i < p.outputs; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < p.inputs; ++j) sum += p.W(i, j) * x[static_cast<size_t>(j)];
      for (int r = 0; r < rank; ++r)
        sum += scale * p.B(expert * p.outputs + i, r) * S[static_cast<size_t>(r)];
      y.push_back(sum);
    }
    return y;
  }
  Doubles backward(const Doubles& dy, Gradients& g) const {
    Doubles dS(static_cast<size_t>(rank)), dx(static_cast<size_t>(p.inputs));
    for (int64_t i = 0; i < p.outputs; ++i) {
      const double d = dy[static_cast<size_t>(i)];
      for (int r = 0; r < rank; ++r) {
        const auto at = static_cast<size_t>((expert * p.outputs + i) * rank + r);
        dS[static_cast<size_t>(r)] += scale * p.B.exact[at] * d;
        g.B[at] += scale * d * S[static_cast<size_t>(r)];
      }
      for (int64_t j = 0; j < p.inputs; ++j) dx[static_cast<size_t>(j)] += p.W(i, j) * d;
    }
    for (int r = 0; r < rank; ++r) {
      for (int64_t j = 0; j < p.inputs; ++j) {
        const auto at = static_cast<size_t>((expert * rank + r) * p.inputs + j);
        g.A[at] += dS[static_cast<size_t>(r)] * dropped(j);
        dx[static_cast<size_t>(j)] +=
            dS[static_cast<size_t>(r)] * p.A.exact[at] * mask_factor(p.mask, slot, j);
      }
    }
    return dx;
  }
};

template <class T>
Results reference(const Block<T>& block) {
  const Sizes n = block.sizes;
  Results results;
  results.y.assign(block.x.exact.size(), 0.0);
  results.dx = results.y;
  results.d_logits.assign(block.logits.exact.size(), 0.0);
  for (auto [p, g] : {std::pair{&block.gate, &results.gate}, std::pair{&block.up, &results.up},
                      std::pair{&block.down, &results.down}}) {
    g->A.assign(p->A.exact.size(), 0.0);
    g->B.assign(p->B.exact.size(), 0.0);
  }
  const auto width = static_cast<size_t>(n.width), inner = static_cast<size_t>(n.inner);
  for (int64_t t = 0; t < n.tokens; ++t) {
    const auto row = block.x.exact.begin() + t * n.width,
               d_row = block.dY.exact.begin() + t * n.width;
    const Doubles x(row, row + n.width), dY(d_row, d_row + n.width);
    const Chosen chosen = choose(block.logits, t, n.top_k);
    Doubles dw;
    double mean = 0;
    for (int k = 0; k < n.top_k; ++k) {
      const double w = chosen.weights[static_cast<size_t>(k)];
      const auto slot = [&](const Projection<T>& p) {
        return SlotProjection<T>{p, t * n.top_k + k, chosen.experts[static_cast<size_t>(k)], n.rank,
                                 block.scale};
      };
      SlotProjection<T> gate = slot(block.gate), up = slot(block.up), down = slot(block.down);
      const Doubles h1 = gate.forward(x), h3 = up.forward(x);
      Doubles act(inner), dh1(inner), dh3(inner), weighted = dY;
      for (size_t i = 0; i < inner; ++i) act[i] = h1[i] / (1 + std::exp(-h1[i])) * h3[i];
      const Doubles y = down.forward(act);
      double dot = 0;
      for (size_t j = 0; j < width; ++j) {
        results.y[static_cast<size_t>(t) * width + j] += w * y[j];
        dot += dY[j] * y[j];
        weighted[j] *= w;
      }
      dw.push_back(dot);
      mean += w * dot;
      const Doubles d_act = down.backward(weighted, results.down);
      for (size_t i = 0; i < inner; ++i) {
        const double sigmoid = 1 / (1 + std::exp(-h1[i]));
        dh1[i] = d_act[i] * h3[i] * sigmoid * (1 + h1[i] * (1 - sigmoid));
        dh3[i] = d_act[i] * h1[i] * sigmoid;
      }
      const Doubles from_gate = gate.backward(dh1, results.gate),
                    from_up = up.backward(dh3, results.up);
      for (size_t j = 0; j < width; ++j)
        results.dx[static_cast<size_t>(t) * width + j] += from_gate[j] + from_up[j];
    }
    for (size_t k = 0; k < dw.size(); ++k)
      results.d_logits[static_cast<size_t>(t * n.experts + chosen.experts[k])] +=
          chosen.weights[k] * (dw[k] - mean);
  }
  return results;
}

}  // namespace graft::cuda::testing::mixture
