// The router of a mixture of experts, and the way of rows to experts and back.
#include <algorithm>
#include <numeric>

#include "lora_reference.h"

namespace {
using namespace graft::cuda;
using namespace graft::cuda::testing;

size_t count_of(int64_t n) {
  return static_cast<size_t>(n);
}

void check_router(int64_t tokens, int experts, int top_k) {
  CAPTURE(tokens, experts, top_k);
  Matrix<float> logits(tokens, experts, 1);
  const Matrix<float> d_weights(tokens, top_k, 2);
  // Equal logits go to the lower expert.
  if (tokens > 2 && experts > 2) {
    for (const int64_t e : {1, 2}) {
      logits.stored[count_of(2 * experts + e)] = 9;
      logits.exact[count_of(2 * experts + e)] = 9;
    }
  }
  DeviceArray<float> logits_device(logits.stored), d_weights_device(d_weights.stored);
  std::vector<float> weights, d_logits;
  const std::vector<int> ids = in_every_order([&] {
    DeviceArray<int> ids_device(count_of(tokens * top_k));
    DeviceArray<float> weights_device(count_of(tokens * top_k)),
        d_logits_device(logits.stored.size());
    const Routing args = {tokens, experts, top_k, ids_device.data(), weights_device.data()};
    REQUIRE(launch_router_forward(args, logits_device.data(), nullptr) == cudaSuccess);
    REQUIRE(launch_router_backward(args, d_weights_device.data(), d_logits_device.data(),
                                   nullptr) == cudaSuccess);
    weights = weights_device.get();
    d_logits = d_logits_device.get();
    return ids_device.get();
  });
  std::vector<int> wanted_ids;
  Doubles wanted_weights, wanted_d_logits(logits.stored.size());
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<int> order(count_of(experts));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return logits(t, a) > logits(t, b); });
    double sum = 0, mean = 0;
    for (int k = 0; k < top_k; ++k) sum += std::exp(logits(t, order[count_of(k)]));
    for (int k = 0; k < top_k; ++k) {
      wanted_ids.push_back(order[count_of(k)]);
      wanted_weights.push_back(std::exp(logits(t, order[count_of(k)])) / sum);
      mean += wanted_weights.back() * d_weights(t, k);
    }
    for (int k = 0; k < top_k; ++k) {
      const double w = wanted_weights[count_of(t * top_k + k)];
      wanted_d_logits[count_of(t * experts + order[count_of(k)])] = w * (d_weights(t, k) - mean);
    }
  }
  CHECK(ids == wanted_ids);
  CHECK(relative_error(doubles(weights), wanted_weights) < 1e-6);
  CHECK(relative_error(doubles(d_logits), wanted_d_logits) < 3e-6);
}

void check_order(int64_t tokens, int experts, int top_k, bool with_lost_slots) {
  CAPTURE(tokens, experts, top_k, with_lost_slots);
  std::mt19937 bits(1);
  std::vector<int> ids(count_of(tokens * top_k));
  for (int& id : ids)
    id = static_cast<int>(bits() % static_cast<unsigned>(experts + (with_lost_slots ? 1 : 0)));
  const auto lost = static_cast<size_t>(std::count(ids.begin(), ids.end(), experts));
  DeviceArray<int> ids_device(ids);
  const Routing args = {tokens, experts, top_k, ids_device.data(), nullptr};
  std::vector<int> sources, offsets;
  const std::vector<int> positions = in_every_order([&] {
    DeviceArray<int> positions_device(ids.size()), sources_device(ids.size() - lost);
    DeviceArray<int> offsets_device(count_of(experts + 1)), workspace(router_order_workspace(args));
    REQUIRE(launch_router_order(args, positions_device.data(), sources_device.data(),
                                offsets_device.data(), workspace.data(), nullptr) == cudaSuccess);
    sources = sources_device.get();
    offsets = offsets_device.get();
    return positions_device.get();
  });
  std::vector<int> wanted, wanted_positions(ids.size(), -1), wanted_offsets = {0};
  for (int e = 0; e < experts; ++e) {
    for (size_t slot = 0; slot < ids.size(); ++slot) {
      if (ids[slot] != e) continue;
      wanted_positions[slot] = static_cast<int>(wanted.size());
      wanted.push_back(static_cast<int>(slot));
    }
    wanted_offsets.push_back(static_cast<int>(wanted.size()));
  }
  CHECK(sources == wanted);
  CHECK(positions == wanted_positions);
  CHECK(offsets == wanted_offsets);
}

template <class T>
void check_rows(int64_t tokens, int64_t columns, int top_k) {
  CAPTURE(tokens, columns, top_k);
  // Slots in a stride's order; the last slot has no row.
  const int64_t slots = tokens * top_k, count = slots - 1;
  std::vector<int> positions(count_of(slots), -1), sources(count_of(count));
  for (int64_t place = 0; place < count; ++place) {
    const int64_t slot = count - 1 - place;
    sources[count_of(place)] = static_cast<int>(slot);
    positions[count_of(slot)] = static_cast<int>(place);
  }
  const Matrix<T> x(tokens, columns, 1), rows(count, columns, 2), d_out(tokens, columns, 3);
  const Matrix<float> weights(tokens, top_k, 4);
  DeviceArray<int> positions_device(positions), sources_device(sources);
  DeviceArray<T> x_device(x.stored), rows_device(rows.stored), d_out_device(d_out.stored);
  DeviceArray<float> weights_device(weights.stored);
  const ExpertRows args = {element_type<T>(), tokens, columns, top_k, positions_device.data()};
  std::vector<T> sent, out, sum, d_rows;
  const std::vector<float> d_weights = in_every_order([&] {
    DeviceArray<T> sent_device(rows.stored.size()), out_device(x.stored.size()),
        sum_device(x.stored.size());
    DeviceArray<T> d_rows_device(rows.stored.size());
    DeviceArray<float> d_weights_device(weights.stored.size());
    REQUIRE(launch_dispatch_forward(args, x_device.data(), sources_device.data(),
                                    sent_device.data(), count, nullptr) == cudaSuccess);
    REQUIRE(launch_combine_forward(args, rows_device.data(), weights_device.data(),
                                   out_device.data(), nullptr) == cudaSuccess);
    REQUIRE(launch_combine_forward(args, rows_device.data(), nullptr, sum_device.data(), nullptr) ==
            cudaSuccess);
    REQUIRE(launch_combine_backward(args, rows_device.data(), weights_device.data(),
                                    d_out_device.data(), d_rows_device.data(),
                                    d_weights_device.data(), nullptr) == cudaSuccess);
    sent = sent_device.get();
    out = out_device.get();
    sum = sum_device.get();
    d_rows = d_rows_device.get();
    return d_weights_device.get();
  });
  Dense wanted_sent(count, columns), wanted_out(tokens, columns), wanted_sum(tokens, columns),
      wanted_d_rows(count, columns);
  Doubles wanted_d_weights(count_of(slots));
  for (int64_t slot = 0; slot < count; ++slot) {
    const int64_t place = positions[count_of(slot)], token = slot / top_k;
    for (int64_t j = 0; j < columns; ++j) {
      const double w = weights.exact[count_of(slot)];
      wanted_sent(place, j) = x(token, j);
      wanted_out(token, j) += w * rows(place, j);
      wanted_sum(token, j) += rows(place, j);
      wanted_d_rows(place, j) = w * d_out(token, j);
      wanted_d_weights[count_of(slot)] += rows(place, j) * d_out(token, j);
    }
  }
  CHECK(doubles(sent) == wanted_sent.v);
  CHECK(relative_error(doubles(out), wanted_out.v) < tolerance<T>());
  CHECK(relative_error(doubles(sum), wanted_sum.v) < tolerance<T>());
  CHECK(relative_error(doubles(d_rows), wanted_d_rows.v) < tolerance<T>());
  CHECK(relative_error(doubles(d_weights), wanted_d_weights) < 2e-6);
}
}  // namespace

TEST_CASE("the router chooses the largest logits and weighs them", "[router]") {
  check_router(21, 8, 2);
  check_router(9, 8, 1);
  check_router(9, 5, 5);
  check_router(3, 1, 1);
  check_router(9, 70, 3);
  check_router(3, 256, 8);
  check_router(0, 8, 2);
  const Routing bad = {4, 8, 9, nullptr, nullptr}, many = {4, 257, 2, nullptr, nullptr};
  CHECK(launch_router_forward(bad, nullptr, nullptr) == cudaErrorInvalidValue);
  CHECK(launch_router_forward(many, nullptr, nullptr) == cudaErrorInvalidValue);
}

TEST_CASE("slots are sorted by expert, in their order", "[router]") {
  check_order(150, 8, 2, false);  // several blocks
  check_order(300, 3, 1, true);
  check_order(5, 40, 3, true);
  check_order(1, 1, 1, false);
  check_order(0, 8, 2, false);
}

TEST_CASE("rows go to experts and come back weighed", "[router]") {
  check_rows<bf16>(7, 40, 2);
  check_rows<fp16>(5, 13, 3);
  check_rows<float>(3, 2100, 2);
}
