#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/nn/batch_rows.h>
#include <graft/ops/split_rows.h>

#include <set>
#include <utility>

namespace graft::nn {
namespace {

thread_local std::shared_ptr<const BatchParts> in_force;

void check(const BatchParts& parts) {
  GRAFT_CHECK(!parts.empty(), "batch", "a batch must have a part; got none");
  std::set<std::string> seen;
  for (const auto& [adapter, sequences] : parts) {
    GRAFT_CHECK(sequences >= 1, "batch", "every part must have a sequence; got ", sequences,
                " for '", adapter, "'");
    GRAFT_CHECK(adapter.empty() || seen.insert(adapter).second, "batch",
                "an adapter's sequences must be one part; got two of '", adapter, "'");
  }
}

std::shared_ptr<const BatchParts> checked(BatchParts parts) {
  check(parts);
  return std::make_shared<const BatchParts>(std::move(parts));
}

std::string describe(const BatchParts& parts) {
  std::string text;
  for (const auto& [adapter, sequences] : parts)
    text += concat(text.empty() ? "" : " + ", sequences, " of '", adapter, "'");
  return text;
}

}  // namespace

BatchRows::BatchRows(std::shared_ptr<const BatchParts> parts)
    : previous_(std::exchange(in_force, std::move(parts))) {}

BatchRows::BatchRows(BatchParts parts) : BatchRows(checked(std::move(parts))) {}

BatchRows::~BatchRows() {
  in_force = std::move(previous_);
}

const std::shared_ptr<const BatchParts>& BatchRows::current() {
  return in_force;
}

at::Tensor run_parts(
    const BatchParts& parts, const at::Tensor& x,
    const std::function<at::Tensor(const BatchPart& part, const at::Tensor& rows)>& run) {
  std::vector<int64_t> counts;
  int64_t sum = 0;
  for (const auto& part : parts) sum += counts.emplace_back(part.sequences);
  GRAFT_CHECK(x.dim() >= 1 && x.size(0) == sum, "batch",
              "a layer's input must be [sequences, ...] with the parts' ", sum, " sequences (",
              describe(parts), "); got ", x.sizes());
  if (parts.size() == 1) return run(parts.front(), x);
  const auto rows = ops::split_rows(x, counts);
  std::vector<at::Tensor> outputs;
  for (size_t i = 0; i < parts.size(); ++i) outputs.push_back(run(parts[i], rows[i]));
  return at::cat(outputs, 0);
}

}  // namespace graft::nn
