#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/init/initialiser.h>

#include <cctype>
#include <charconv>
#include <cmath>
#include <optional>

namespace graft::init {
namespace {

// "LoRA-GA" and "lora_ga" are the same name.
std::string canonical(std::string_view name) {
  std::string text(name);
  for (char& c : text)
    c = c == '-' ? '_' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

// The N of "pissa_niter_N", or nothing.
std::optional<int64_t> iterations_of(const std::string& name) {
  constexpr std::string_view kFamily = "pissa_niter_";
  if (!name.starts_with(kFamily)) return std::nullopt;
  const char *first = name.data() + kFamily.size(), *last = name.data() + name.size();
  int64_t count = 0;
  const auto [end, error] = std::from_chars(first, last, count);
  if (error != std::errc() || end != last || count < 0 || count > 1000) return std::nullopt;
  return count;
}

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> known = {{"kaiming"},
                                          {"gaussian"},
                                          {"orthogonal"},
                                          {"random"},
                                          {"pissa", Needs::weight, true},
                                          {"olora", Needs::weight, true},
                                          {"nystrom", Needs::weight, true},
                                          {"lora_ga", Needs::gradient, true},
                                          {"corda", Needs::inputs, true},
                                          {"eva", Needs::inputs},
                                          {"svd", Needs::weight},
                                          {"lora_sb", Needs::gradient}};
  return known;
}

void need_nothing(std::string_view name) {
  GRAFT_CHECK(find_kind(name).needs == Needs::nothing, "init",
              "this place takes kaiming, gaussian, orthogonal or random; got '", name, "'");
}

// A's and B's rank directions are orthogonal to each other, so that B A vanishes.
void orthogonal(Factors factors, at::Generator generator) {
  const int64_t rank = factors.A.size(0);
  GRAFT_CHECK(rank % 2 == 0, "init", "orthogonal needs an even rank; got ", rank);
  const auto options = factors.A.options().dtype(at::kDouble).device(at::kCPU);
  const at::Tensor X = at::randn({rank, rank}, generator, options);
  const at::Tensor Q = std::get<0>(at::linalg_qr(X));
  const at::Tensor odd = Q.slice(0, 0, rank, 2), even = Q.slice(0, 1, rank, 2);
  const int64_t in = factors.A.numel() / rank, out = factors.B.numel() / rank;
  const at::Tensor A = at::randn({in, rank / 2}, generator, options).mm(odd).t() / 10.0;
  const at::Tensor B = at::randn({rank / 2, out}, generator, options).t().mm(even) / 10.0;
  factors.A.copy_(A.reshape(factors.A.sizes()));
  factors.B.copy_(B.reshape(factors.B.sizes()));
}

}  // namespace

Kind find_kind(std::string_view name) {
  const std::string text = canonical(name);
  for (const Kind& kind : kinds())
    if (kind.name == text) return kind;
  if (const auto count = iterations_of(text)) return {text, Needs::weight, true, *count};
  std::string known;
  for (const auto& n : names()) known += (known.empty() ? "" : ", ") + n;
  fail("init", concat("initialiser must be one of ", known, "; got '", name, "'"));
}

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = [] {
    std::vector<std::string> list;
    for (const Kind& kind : kinds()) list.push_back(kind.name);
    list.insert(list.begin() + 5, "pissa_niter_N");
    return list;
  }();
  return all;
}

void initialise(std::string_view name, Factors factors, at::Generator generator) {
  need_nothing(name);
  const at::NoGradGuard no_grad;
  const int64_t rank = factors.A.size(0);
  factors.B.zero_();
  const auto fan_in_uniform = [&](at::Tensor& factor) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(factor.numel() / factor.size(0)));
    factor.uniform_(-bound, bound, generator);
  };
  if (name == "kaiming" || name == "random") {
    fan_in_uniform(factors.A);
    if (name == "random") fan_in_uniform(factors.B);
  } else if (name == "gaussian") {
    factors.A.normal_(0.0, 1.0 / static_cast<double>(rank), generator);
  } else {
    orthogonal(factors, generator);
  }
}

void initialise_embedding(std::string_view name, Factors factors, at::Generator generator) {
  need_nothing(name);
  const at::NoGradGuard no_grad;
  if (name == "random")
    factors.A.normal_(0.0, 1.0, generator);
  else
    factors.A.zero_();
  factors.B.normal_(0.0, 1.0, generator);
}

}  // namespace graft::init
