// A whole MixLoRA block from the kernels, forward and backward with dropout, against fp64: routing,
// rows by expert, each expert's low-rank terms, SwiGLU, and the sum before the down projection.
// Frozen products stand in for a library's.
#include "mixture_reference.h"

namespace {
using namespace graft::cuda;
using namespace graft::cuda::testing;
using namespace graft::cuda::testing::mixture;

constexpr auto kRankByColumns = FactorLayout::rank_by_columns,
               kColumnsByRank = FactorLayout::columns_by_rank;

// a b (+ before) as a matrix library leaves it; b is in double.
template <class T>
std::vector<T> library_product(const std::vector<T>& a, int64_t rows, const Dense& b,
                               const std::vector<T>& before = {}) {
  Dense left(rows, b.rows);
  left.v = doubles(a);
  const Dense c = product(left, b);
  std::vector<T> stored;
  for (size_t i = 0; i < c.v.size(); ++i)
    stored.push_back(from_double<T>(c.v[i] + (before.empty() ? 0.0 : to_double(before[i]))));
  return stored;
}

// The block's kernels over one plan.
template <class T>
class Run {
 public:
  explicit Run(const Block<T>& block)
      : block_(block),
        n_(block.sizes),
        x_(block.x.stored),
        ids_(slots()),
        positions_(slots()),
        sources_(slots()),
        offsets_(size(n_.experts + 1)),
        weights_(slots()),
        rows_{element_type<T>(), n_.tokens, 0, n_.top_k, positions_.data()} {}

  Results run() {
    route();
    const Forward gate = project(block_.gate), up = project(block_.up);
    DeviceArray<T> h1(gate.out), h3(up.out), act(gate.out.size());
    const Swiglu swiglu = {element_type<T>(), h1.data(), h3.data(), n_.slots(), n_.inner, n_.inner};
    check(launch_swiglu_forward(swiglu, act.data(), nullptr));

    // y = (sum_m w_m act_m) W2^T + sum_m w_m s S2_m B2^T
    DeviceArray<T> S2(hidden_size()), terms(slots() * size(n_.width));
    shrink(block_.down, act.data(), S2);
    expand(block_.down, S2, nullptr, terms.data());
    const auto sum = combined(act, n_.inner), term = combined(terms, n_.width);
    Results results;
    results.y = doubles(library_product(sum, n_.tokens, transpose(block_.down.W), term));

    const Doubles d_weights = down_backward(act, S2, terms, results);  // act becomes its gradient
    check(launch_swiglu_backward(swiglu, act.data(), h1.data(), h3.data(), nullptr));
    DeviceArray<T> dx_rows(slots() * size(n_.width));
    const auto dx1 = backward(block_.gate, gate, h1, nullptr, dx_rows, results.gate);
    const auto dx3 = backward(block_.up, up, h3, dx_rows.data(), dx_rows, results.up);
    const auto through = library_product(dx3, n_.tokens, block_.up.W, combined_plain(dx_rows));
    results.dx = doubles(library_product(dx1, n_.tokens, block_.gate.W, through));
    route_backward(d_weights, results);
    return results;
  }

 private:
  struct Forward {
    std::vector<T> out, hidden;
  };

  static void check(cudaError_t error) { REQUIRE(error == cudaSuccess); }
  static size_t size(int64_t n) { return static_cast<size_t>(n); }
  size_t slots() const { return size(n_.slots()); }
  size_t hidden_size() const { return slots() * size(padded_rank(n_.rank)); }

  void route() {
    DeviceArray<float> logits(block_.logits.stored);
    const Routing routing = {n_.tokens, n_.experts, n_.top_k, ids_.data(), weights_.data()};
    DeviceArray<int> workspace(router_order_workspace(routing));
    check(launch_router_forward(routing, logits.data(), nullptr));
    check(launch_router_order(routing, positions_.data(), sources_.data(), offsets_.data(),
                              workspace.data(), nullptr));
  }

  void route_backward(const Doubles& d_weights, Results& results) {
    DeviceArray<float> dw(std::vector<float>(d_weights.begin(), d_weights.end())),
        d_logits(block_.logits.stored.size());
    const Routing routing = {n_.tokens, n_.experts, n_.top_k, ids_.data(), weights_.data()};
    check(launch_router_backward(routing, dw.data(), d_logits.data(), nullptr));
    results.d_logits = d_logits.doubles();
  }

  ExpertRows rows_of(int64_t columns) const {
    ExpertRows rows = rows_;
    rows.columns = columns;
    return rows;
  }

  // The rows of a matrix of tokens, by expert.
  void dispatch(const T* tokens, int64_t columns, T* rows) {
    check(launch_dispatch_forward(rows_of(columns), tokens, sources_.data(), rows, n_.slots(),
                                  nullptr));
  }
  std::vector<T> combined(DeviceArray<T>& rows, int64_t columns) {
    DeviceArray<T> out(size(n_.tokens * columns));
    check(launch_combine_forward(rows_of(columns), rows.data(), weights_.data(), out.data(),
                                 nullptr));
    return out.get();
  }
  std::vector<T> combined_plain(DeviceArray<T>& rows) {
    const auto columns = static_cast<int64_t>(rows.get().size()) / n_.slots();
    DeviceArray<T> out(size(n_.tokens * columns));
    check(launch_combine_forward(rows_of(columns), rows.data(), nullptr, out.data(), nullptr));
    return out.get();
  }

  // A row's mask is that of its slot, wherever the row lies.
  DropoutMask mask(const Projection<T>& p) {
    DropoutMask mask = p.mask;
    mask.rows = sources_.data();
    return mask;
  }
  ExpertRanges experts() { return {offsets_.data(), n_.experts}; }

  // S = scale drop(rows) V_e^T row by row: V = A, or (`tall`) B without dropout.
  void shrink(const Projection<T>& p, const T* rows, DeviceArray<T>& S, bool tall = false) {
    const int64_t columns = tall ? p.outputs : p.inputs;
    DeviceArray<T> factor(tall ? p.B.stored : p.A.stored);
    DeviceArray<float> workspace(lora_shrink_workspace(n_.slots(), columns, n_.rank));
    check(launch_lora_shrink({.type = element_type<T>(),
                              .x = rows,
                              .factor = factor.data(),
                              .layout = tall ? kColumnsByRank : kRankByColumns,
                              .rows = n_.slots(),
                              .columns = columns,
                              .rank = n_.rank,
                              .scale = tall ? block_.scale : 1.0f,
                              .dropout = tall ? DropoutMask{} : mask(p),
                              .experts = experts(),
                              .out = S.data(),
                              .workspace = workspace.data()},
                             nullptr));
  }
  // out = base + s S B_e^T, or (`back`) base + mask(S A_e)
  void expand(const Projection<T>& p, DeviceArray<T>& S, const T* base, T* out, bool back = false) {
    DeviceArray<T> factor(back ? p.A.stored : p.B.stored);
    check(launch_lora_expand({.type = element_type<T>(),
                              .hidden = S.data(),
                              .factor = factor.data(),
                              .layout = back ? kRankByColumns : kColumnsByRank,
                              .rows = n_.slots(),
                              .columns = back ? p.inputs : p.outputs,
                              .rank = n_.rank,
                              .scale = back ? 1.0f : block_.scale,
                              .dropout = back ? mask(p) : DropoutMask{},
                              .experts = experts(),
                              .base = base,
                              .out = out},
                             nullptr));
  }
  // dA_e = U_e^T drop(rows), or (`tall`) dB_e = s rows^T U_e
  Doubles outer(const Projection<T>& p, DeviceArray<T>& U, const T* rows, bool tall) {
    const int64_t columns = tall ? p.outputs : p.inputs;
    DeviceArray<float> out(size(n_.experts * n_.rank * columns));
    DeviceArray<float> workspace(lora_outer_workspace(n_.slots(), columns, n_.rank, n_.experts));
    check(launch_lora_outer({.type = element_type<T>(),
                             .hidden = U.data(),
                             .x = rows,
                             .layout = tall ? kColumnsByRank : kRankByColumns,
                             .rows = n_.slots(),
                             .columns = columns,
                             .rank = n_.rank,
                             .scale = tall ? block_.scale : 1.0f,
                             .dropout = tall ? DropoutMask{} : mask(p),
                             .experts = experts(),
                             .out = out.data(),
                             .workspace = workspace.data()},
                            nullptr));
    return out.doubles();
  }

  // (x W^T)_t(m) + s S_m B_e^T, row by row.
  Forward project(const Projection<T>& p) {
    DeviceArray<T> base(library_product(block_.x.stored, n_.tokens, transpose(p.W)));
    DeviceArray<T> in(slots() * size(p.inputs)), out(slots() * size(p.outputs)), S(hidden_size());
    dispatch(x_.data(), p.inputs, in.data());
    dispatch(base.data(), p.outputs, out.data());
    shrink(p, in.data(), S);
    expand(p, S, out.data(), out.data());
    return {out.get(), S.get()};
  }

  // dA, dB, and dx = base + mask(dS A_e) row by row.
  void rows_backward(const Projection<T>& p, const T* dy, DeviceArray<T>& S, const T* in,
                     const T* base, T* dx, Gradients& g) {
    DeviceArray<T> dS(hidden_size());
    shrink(p, dy, dS, /*tall=*/true);
    g.B = outer(p, S, dy, /*tall=*/true);
    g.A = outer(p, dS, in, /*tall=*/false);
    expand(p, dS, base, dx, /*back=*/true);
  }

  // The gradients of the down projection's factors and of the slots' weights; `act` becomes d act.
  Doubles down_backward(DeviceArray<T>& act, DeviceArray<T>& S2, DeviceArray<T>& terms,
                        Results& results) {
    DeviceArray<T> dY(block_.dY.stored),
        v(library_product(block_.dY.stored, n_.tokens, Dense(block_.down.W)));
    DeviceArray<T> d_terms(slots() * size(n_.width)), d_act(slots() * size(n_.inner));
    DeviceArray<float> dw_terms(slots()), dw_act(slots());
    check(launch_combine_backward(rows_of(n_.width), terms.data(), weights_.data(), dY.data(),
                                  d_terms.data(), dw_terms.data(), nullptr));
    check(launch_combine_backward(rows_of(n_.inner), act.data(), weights_.data(), v.data(),
                                  d_act.data(), dw_act.data(), nullptr));
    rows_backward(block_.down, d_terms.data(), S2, act.data(), d_act.data(), d_act.data(),
                  results.down);
    act.put(d_act.get());
    Doubles sum = dw_terms.doubles();
    const Doubles other = dw_act.doubles();
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += other[i];
    return sum;
  }

  // The gradients of the factors, of the rows (base + ..., in dx_rows), and of the frozen product.
  std::vector<T> backward(const Projection<T>& p, const Forward& forward, DeviceArray<T>& dh,
                          const T* base, DeviceArray<T>& dx_rows, Gradients& g) {
    DeviceArray<T> S(forward.hidden), in(slots() * size(p.inputs));
    dispatch(x_.data(), p.inputs, in.data());
    rows_backward(p, dh.data(), S, in.data(), base, dx_rows.data(), g);
    return combined_plain(dh);
  }

  const Block<T>& block_;
  const Sizes n_;
  DeviceArray<T> x_;
  DeviceArray<int> ids_, positions_, sources_, offsets_;
  DeviceArray<float> weights_;
  ExpertRows rows_;
};

template <class T>
void check_block(Sizes sizes) {
  CAPTURE(sizes.tokens, sizes.width, sizes.inner, sizes.experts, sizes.top_k, sizes.rank);
  const Block<T> block(sizes);
  Results got;
  in_every_order([&] {
    got = Run<T>(block).run();
    return got.all();
  });
  const Results wanted = reference(block);
  // Hidden rows, their gradients and sums are each rounded to T on the way.
  const double bound = std::is_same_v<T, float> ? 4e-6 : std::is_same_v<T, bf16> ? 1e-2 : 1.5e-3;
  CHECK(relative_error(got.y, wanted.y) < bound);
  CHECK(relative_error(got.dx, wanted.dx) < bound);
  CHECK(relative_error(got.d_logits, wanted.d_logits) < bound);
  for (auto [g, w] : {std::pair{&got.gate, &wanted.gate}, std::pair{&got.up, &wanted.up},
                      std::pair{&got.down, &wanted.down}}) {
    CHECK(relative_error(g->A, w->A) < bound);
    CHECK(relative_error(g->B, w->B) < bound);
  }
}
}  // namespace

TEST_CASE("a MixLoRA block of kernels", "[mixture][layer]") {
  check_block<float>({13, 24, 40, 4, 2, 4});
  check_block<bf16>({21, 40, 72, 5, 2, 8});
  check_block<fp16>({9, 21, 35, 3, 3, 5});   // rows that are no whole vectors
  check_block<float>({5, 16, 24, 7, 1, 3});  // experts without rows
}
