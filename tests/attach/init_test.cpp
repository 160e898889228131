// Initialisers through attach: their data are gathered, the model is left alone, files reproduce.
#include <graft/adapters/dora.h>
#include <graft/adapters/lora.h>
#include <graft/adapters/lora_xs.h>
#include <graft/attach/attach.h>
#include <graft/io/adapter_config.h>

#include <algorithm>
#include <cmath>

#include "tests/io/file_helpers.h"
#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::attach;
using graft::attach_from;
using graft::AttachedAdapter;
using graft::AttachOptions;
using graft::adapters::DoraOptions;
using graft::adapters::LoraImpl;
using graft::adapters::LoraOptions;
using graft::adapters::LoraXsImpl;
using graft::adapters::LoraXsOptions;
using graft::nn::Selector;
using graft::testing::contains;
using graft::testing::copy_parameters;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::testing::holds_exactly;
using graft::testing::randomise;
using graft::testing::snapshot;
using graft::testing::some_tokens;
using graft::testing::TempFolder;
using graft::testing::TorchDecoder;

// Batches of tokens, each of its own.
at::Tensor batch_tokens(int64_t batch) {
  return at::arange(40, at::kLong).mul(7 + 2 * batch).add(batch).remainder(11).view({4, 10});
}

template <class Model>
at::Tensor loss_of(Model& model, const at::Tensor& tokens) {
  const at::Tensor logits = model.forward(tokens);
  return at::cross_entropy_loss(logits.flatten(0, 1), tokens.roll(1, 1).flatten());
}

template <class Model>
AttachOptions with_data(Model& model, int64_t batches = 3) {
  AttachOptions options;
  options.targets = Selector({"q_proj", "v_proj", "o_proj"});
  options.init_data.batches = batches;
  options.init_data.loss = [&model](int64_t i) { return loss_of(model, batch_tokens(i)); };
  return options;
}

// The reference: ordinary autograd on the weights, the mean over the batches.
template <class Model>
std::map<std::string, at::Tensor> gradients_of(Model& model, int64_t batches) {
  std::map<std::string, at::Tensor> gradients;
  for (const auto& item : model.named_parameters()) item.value().set_requires_grad(true);
  for (int64_t i = 0; i < batches; ++i)
    (loss_of(model, batch_tokens(i)) / static_cast<double>(batches)).backward();
  for (const auto& item : model.named_parameters())
    gradients[item.key()] = item.value().grad().clone();
  for (auto& parameter : model.parameters()) parameter.mutable_grad() = at::Tensor();
  return gradients;
}

LoraImpl& lora_of(const AttachedAdapter& adapter, size_t layer) {
  return dynamic_cast<LoraImpl&>(*adapter.layers()[layer].adapter);
}

const std::vector<std::string> kSubtracting = {"pissa",   "pissa_niter_4", "olora",
                                               "nystrom", "lora_ga",       "corda"};

}  // namespace

TEST_CASE("a start from the weight leaves the model's output and its weights", "[attach][init]") {
  for (const auto& init : kSubtracting) {
    INFO(init);
    GraftDecoder model;
    const auto before = snapshot(model);
    const at::Tensor y = model.forward(some_tokens());
    auto adapter =
        attach(model, LoraOptions{.rank = 3, .rslora = true, .init = init}, with_data(model));
    for (size_t i = 0; i < adapter.layers().size(); ++i) {
      CHECK(lora_of(adapter, i).lora_A.abs().sum().item<double>() > 0);
      CHECK(lora_of(adapter, i).lora_B.abs().sum().item<double>() > 0);
    }
    CHECK(at::equal(model.forward(some_tokens()), y));
    randomise(adapter.parameters());
    const at::Tensor trained = model.forward(some_tokens());
    CHECK(distance(trained, y) > 1e-3);
    adapter.merge();
    CHECK(distance(model.forward(some_tokens()), trained) < 1e-5);
    adapter.unmerge();
    adapter.detach();
    CHECK(holds_exactly(model, before));
    CHECK(at::equal(model.forward(some_tokens()), y));
  }
}

TEST_CASE("a bf16 model starts where it was", "[attach][init]") {
  GraftDecoder model;
  model.to(at::kBFloat16);
  const at::Tensor y = model.forward(some_tokens());
  auto adapter = attach(model, LoraOptions{.rank = 3, .init = "pissa"}, with_data(model));
  CHECK(at::equal(model.forward(some_tokens()), y));
}

TEST_CASE("a small change since a start is not lost beside the start", "[attach][init]") {
  // fp32 rounds what is 1e-7 of A and B away; the update must not be a difference of their
  // products.
  GraftDecoder model;
  auto adapter = attach(model, LoraOptions{.rank = 3, .init = "olora"}, with_data(model));
  const auto& lora = lora_of(adapter, 0);
  const at::NoGradGuard no_grad;
  at::Tensor(lora.lora_A).add_(lora.start_A, 3e-6);
  const at::Tensor dA = lora.lora_A.to(at::kDouble) - lora.start_A.to(at::kDouble);
  const at::Tensor exact = lora.lora_B.to(at::kDouble).mm(dA) * lora.scale;
  CHECK(distance(lora.delta().to(at::kDouble), exact) < 1e-6 * exact.abs().max().item<double>());
}

TEST_CASE("what is saved is plain LoRA of twice the rank and reproduces the model",
          "[attach][init]") {
  for (const auto& init : kSubtracting) {
    INFO(init);
    TempFolder folder;
    GraftDecoder model;
    AttachOptions options = with_data(model);
    options.rank_pattern = {{"v_proj", 2}};
    options.alpha_pattern = {{"layers.0.o_proj", 5.0}};
    auto adapter =
        attach(model, LoraOptions{.rank = 3, .alpha = 6, .rslora = true, .init = init}, options);
    randomise(adapter.parameters());
    const at::Tensor y = model.forward(some_tokens());
    adapter.save(folder.path());

    GraftDecoder fresh;  // the same seed: the same untouched base
    auto plain = attach_from(fresh, folder.path());
    // The file's factors are those that the adapter itself multiplies by; nothing cancels.
    CHECK(distance(fresh.forward(some_tokens()), y) < 1e-9);
    CHECK(plain.recipe().start_plan().kind.name == "kaiming");
    for (size_t i = 0; i < plain.layers().size(); ++i) {
      const auto& saved = lora_of(adapter, i);
      CHECK(lora_of(plain, i).lora_A.size(0) == 2 * saved.lora_A.size(0));
      CHECK(std::abs(lora_of(plain, i).scale - saved.scale) < 1e-12);
    }

    // Back into an adapter of the same kind, as a resumed run does it: nothing is found again.
    GraftDecoder resumed;
    AttachOptions empty = options;
    empty.initialise = false;
    auto again =
        attach(resumed, LoraOptions{.rank = 3, .alpha = 6, .rslora = true, .init = init}, empty);
    again.load(folder.path());
    CHECK(distance(resumed.forward(some_tokens()), y) < 3e-6);
    for (size_t i = 0; i < again.layers().size(); ++i) {
      CHECK(distance(lora_of(again, i).lora_A, lora_of(adapter, i).lora_A) < 1e-6);
      CHECK(distance(lora_of(again, i).start_B, lora_of(adapter, i).start_B) < 1e-6);
      CHECK(at::equal(lora_of(again, i).start_A, lora_of(adapter, i).start_A));
      CHECK(at::equal(lora_of(again, i).lora_B, lora_of(adapter, i).lora_B));
      // What a checkpoint holds besides.
      const at::NoGradGuard no_grad;
      const auto from = adapter.layers()[i].adapter->state_tensors(),
                 to = again.layers()[i].adapter->state_tensors();
      for (size_t k = 0; k < from.size(); ++k) at::Tensor(to[k].tensor).copy_(from[k].tensor);
    }
    CHECK(at::equal(resumed.forward(some_tokens()), y));
    empty.name = "other";
    auto other =
        attach(resumed, LoraOptions{.rank = 3, .alpha = 7, .rslora = true, .init = init}, empty);
    CHECK(contains(error_of([&] { other.load(folder.path()); }), "a folder's scale must be"));
  }
}

TEST_CASE("LoRA-GA is handed the loss's gradient, averaged over the batches", "[attach][init]") {
  TorchDecoder model;
  model.to(at::kDouble);
  const auto expected = gradients_of(model, 3);
  const int64_t rank = 2;
  auto adapter = attach(model, LoraOptions{.rank = rank, .init = "lora_ga"}, with_data(model));
  for (const auto& layer : adapter.layers()) {
    const auto& lora = dynamic_cast<const LoraImpl&>(*layer.adapter);
    const at::Tensor& G = expected.at(layer.name + ".weight");
    const auto [U, S, Vt] = at::linalg_svd(G, false);
    // The paper's first step: along -eta s^2 c^2 [G]_2r (any exact step of gradient descent).
    const double c2 = std::sqrt(static_cast<double>(G.size(0))) / 16.0, eta = 1e-7, s = lora.scale;
    const at::Tensor A1 = lora.start_A - eta * s * lora.start_B.t().mm(G),
                     B1 = lora.start_B - eta * s * G.mm(lora.start_A.t());
    const at::Tensor moved = s * (B1.mm(A1) - lora.start_B.mm(lora.start_A));
    const at::Tensor best = U.narrow(1, 0, 2 * rank)
                                .mul(S.narrow(0, 0, 2 * rank))
                                .mm(Vt.narrow(0, 0, 2 * rank))
                                .mul(-eta * s * s * c2);
    INFO(layer.name);
    CHECK((moved - best).norm().item<double>() < 1e-4 * best.norm().item<double>());
  }
  for (const auto& item : model.named_parameters())
    if (!contains(item.key(), "adapters")) CHECK_FALSE(item.value().grad().defined());
}

TEST_CASE("LoRA-SB starts after the best rank-r part of Adam's first step, and resumes there",
          "[attach][init]") {
  TorchDecoder model;
  model.to(at::kDouble);
  const auto expected = gradients_of(model, 3);
  const auto before = snapshot(model);
  const int64_t rank = 3;
  const double step = 0.01;
  const LoraXsOptions options{.rank = rank, .alpha = 6, .init = "lora_sb", .sb_step = step};
  auto adapter = attach(model, options, with_data(model));
  CHECK(adapter.parameter_count() == 6 * rank * rank);
  CHECK(adapter.start_reports().size() == adapter.layers().size());
  for (const auto& layer : adapter.layers()) {
    INFO(layer.name);
    const auto& xs = dynamic_cast<const LoraXsImpl&>(*layer.adapter);
    const auto [U, S, Vt] =
        at::linalg_svd(-step * expected.at(layer.name + ".weight").sign(), false);
    const at::Tensor best =
        U.narrow(1, 0, rank).mul(S.narrow(0, 0, rank)).mm(Vt.narrow(0, 0, rank));
    const at::Tensor update = 2.0 * xs.lora_B.mm(xs.lora_R).mm(xs.lora_A);
    CHECK(distance(update, best) < 1e-12);
    CHECK(distance(xs.lora_B.t().mm(xs.lora_B), at::eye(rank, at::kDouble)) < 1e-12);
    CHECK(distance(xs.lora_A.mm(xs.lora_A.t()), at::eye(rank, at::kDouble)) < 1e-12);
  }
  const at::Tensor tokens = some_tokens();
  const auto output = [&](TorchDecoder& of, const AttachedAdapter& active) {
    const auto scope = active.activate();
    return of.forward(tokens).detach();
  };
  CHECK(distance(output(model, adapter), model.forward(tokens)) > 1e-4);

  const TempFolder folder;
  randomise(adapter.parameters());
  adapter.save(folder.path());
  AttachOptions empty;
  empty.targets = Selector({"q_proj", "v_proj", "o_proj"});
  empty.initialise = false;  // no data either
  TorchDecoder fresh;
  fresh.to(at::kDouble);
  auto resumed = attach(fresh, options, empty);
  resumed.load(folder.path());
  CHECK(at::equal(output(fresh, resumed), output(model, adapter)));
  TorchDecoder opened;
  opened.to(at::kDouble);
  const auto from_file = attach_from(opened, folder.path());
  CHECK(at::equal(output(opened, from_file), output(model, adapter)));
  adapter.detach();
  CHECK(holds_exactly(model, before));
}

TEST_CASE("EVA starts with the inputs' principal directions and shares out the ranks",
          "[attach][init]") {
  GraftDecoder model;
  {  // inputs of few directions in the first block, so that ranks move
    const at::NoGradGuard no_grad;
    model.embed->weight.narrow(1, 1, 7).mul_(0.05);
  }
  model.to(at::kDouble);
  const at::Tensor y = model.forward(some_tokens());
  AttachOptions options = with_data(model, 6);
  auto adapter = attach(model, LoraOptions{.rank = 2, .alpha = 6, .init = "eva"}, options);
  CHECK(at::equal(model.forward(some_tokens()), y));
  int64_t total = 0;
  for (const auto& layer : adapter.layers()) {
    const auto& lora = dynamic_cast<const LoraImpl&>(*layer.adapter);
    const int64_t rank = lora.lora_A.size(0);
    total += rank;
    CHECK(rank <= 4);
    CHECK(std::abs(lora.scale - 3.0) < 1e-12);
    CHECK(distance(lora.lora_A.mm(lora.lora_A.t()), at::eye(rank, at::kDouble)) < 1e-9);
  }
  CHECK(total == 2 * 6);
  CHECK(std::any_of(adapter.layers().begin(), adapter.layers().end(), [](const auto& layer) {
    return dynamic_cast<const LoraImpl&>(*layer.adapter).lora_A.size(0) != 2;
  }));
  CHECK(adapter.start_reports().size() == adapter.layers().size());

  TempFolder folder;
  randomise(adapter.parameters());
  const at::Tensor trained = model.forward(some_tokens());
  adapter.save(folder.path());
  GraftDecoder fresh;
  fresh.to(at::kDouble);
  copy_parameters(model, fresh);
  auto again = attach_from(fresh, folder.path());
  CHECK(at::equal(fresh.forward(some_tokens()), trained));
  CHECK(again.layers().size() == adapter.layers().size());
}

TEST_CASE("EVA's directions are the leading ones of the inputs' covariance", "[attach][init]") {
  GraftDecoder model;
  model.to(at::kDouble);
  AttachOptions options = with_data(model, 3);
  options.targets = Selector::regex("model\\.layers\\.0\\.q_proj");
  LoraOptions lora{.rank = 4, .init = "eva"};
  lora.start.eva.rho = 2.0;  // all eight directions: then batch by batch is exact
  lora.start.eva.tau = 0.999999999;
  auto adapter = attach(model, lora, options);
  std::vector<at::Tensor> inputs;
  for (int64_t i = 0; i < 3; ++i)
    inputs.push_back(model.embed->forward(batch_tokens(i)).flatten(0, 1));
  const at::Tensor X = at::cat(inputs, 0).detach(), centred = X - X.mean(0);
  const auto [values, vectors] = at::linalg_eigh(centred.t().mm(centred));
  const at::Tensor V = vectors.narrow(1, 4, 4);
  const at::Tensor& A = lora_of(adapter, 0).lora_A;
  CHECK(distance(A.t().mm(A), V.mm(V.t())) < 1e-8);
}

TEST_CASE("the pass leaves no trace, whether it succeeds or not", "[attach][init]") {
  TorchDecoder model;
  auto other = attach(model, LoraOptions{.rank = 2}, {.targets = {"q_proj"}, .name = "other"});
  randomise(other.parameters());
  model.train();
  model.blocks[0]->eval();
  model.lm_head->weight.set_requires_grad(true);
  const auto before = snapshot(model);

  AttachOptions options = with_data(model, 2);
  options.name = "new";
  bool ran_alone = false;
  const at::Tensor plain = [&] {
    TorchDecoder untouched;
    return untouched.forward(some_tokens());
  }();
  options.init_data.loss = [&](int64_t i) {
    ran_alone = at::equal(model.forward(some_tokens()), plain) && !model.is_training();
    if (i == 1) throw std::runtime_error("no second batch");
    return loss_of(model, batch_tokens(i));
  };
  CHECK_THROWS_AS(attach(model, LoraOptions{.rank = 2, .init = "lora_ga"}, options),
                  std::runtime_error);
  CHECK(ran_alone);
  CHECK(holds_exactly(model, before));
  CHECK(model.is_training());
  CHECK_FALSE(model.blocks[0]->is_training());
  CHECK(model.lm_head->weight.requires_grad());
  CHECK(other.is_active());
  CHECK(other.named_parameters().size() == 4);
}

TEST_CASE("masked tokens do not count as inputs", "[attach][init]") {
  GraftDecoder model;
  model.to(at::kDouble);
  AttachOptions options = with_data(model, 1), masked = options;
  options.targets = masked.targets = Selector({"q_proj"});
  // The same tokens once more, masked out, and others in their place.
  const at::Tensor tokens = batch_tokens(0), twice = at::cat({tokens, batch_tokens(5)}, 0);
  const at::Tensor mask = at::cat({at::ones({40}, at::kBool), at::zeros({40}, at::kBool)});
  masked.init_data.loss = [&](int64_t) { return loss_of(model, twice); };
  masked.init_data.mask = [&](int64_t) { return mask; };
  options.name = "a";
  masked.name = "b";
  const LoraOptions lora{.rank = 3, .init = "eva"};
  const auto a = attach(model, lora, options), b = attach(model, lora, masked);
  for (size_t i = 0; i < a.layers().size(); ++i)
    CHECK(distance(lora_of(a, i).lora_A, lora_of(b, i).lora_A) < 1e-12);
}

TEST_CASE("initialisers refuse what they cannot do, in words", "[attach][init]") {
  GraftDecoder model;
  const auto before = snapshot(model);
  const auto refusal = [&](const LoraOptions& lora, const AttachOptions& options) {
    return error_of([&] { attach(model, lora, options); });
  };
  const AttachOptions data = with_data(model);
  CHECK(contains(refusal({.rank = 2, .init = "lora_ga"}, {.targets = {"q_proj"}}),
                 "lora_ga reads batches of the training data"));
  CHECK(contains(refusal({.rank = 2, .dropout = 0.1, .init = "pissa"}, data), "got dropout=0.1"));
  CHECK(contains(refusal({.rank = 2, .bias = true, .init = "olora"}, data), "takes no lora bias"));
  AttachOptions embedding = data;
  embedding.targets = Selector({"embed"});
  CHECK(contains(refusal({.rank = 2, .init = "lora_ga"}, embedding),
                 "lora_ga fits Linear layers; got Embedding (layer 'model.embed')"));
  AttachOptions nan = data;
  nan.init_data.loss = [](int64_t) { return at::tensor(NAN); };
  CHECK(contains(refusal({.rank = 2, .init = "corda"}, nan), "must be one finite number; got nan"));
  AttachOptions silent = data;
  silent.init_data.loss = [](int64_t) { return at::ones({}, at::kFloat).set_requires_grad(true); };
  CHECK(contains(refusal({.rank = 2, .init = "lora_ga"}, silent), "every adapted layer must run"));
  CHECK(contains(refusal({.rank = 2, .init = "eva"}, silent), "every adapted layer must run"));
  CHECK(contains(error_of([&] { attach(model, DoraOptions{.rank = 2, .init = "pissa"}, data); }),
                 "use it with lora"));
  CHECK(contains(refusal({.rank = 2, .init = "lora_sb"}, data), "use it with lora-xs"));
  CHECK(contains(error_of([&] { attach(model, DoraOptions{.rank = 2, .init = "svd"}, data); }),
                 "use it with lora-xs"));
  const LoraXsOptions sb{.rank = 2, .init = "lora_sb"};
  CHECK(contains(error_of([&] { attach(model, sb, {.targets = {"q_proj"}}); }),
                 "lora_sb reads batches of the training data"));
  CHECK(contains(error_of([&] { attach(model, sb, embedding); }),
                 "lora_sb fits Linear layers; got Embedding (layer 'model.embed')"));
  LoraOptions wrong{.rank = 2, .init = "lora_ga"};
  wrong.start.lora_ga.direction = "sideways";
  CHECK(contains(refusal(wrong, data), "must be one of ArBr, A2rBr, ArB2r, random"));
  CHECK(holds_exactly(model, before));
}
