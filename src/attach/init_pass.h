// What an initialiser has to know of a model's layers, gathered over some batches; private to the
// attach folder.
#pragma once

#include <graft/adapters/attach_options.h>
#include <graft/adapters/recipe.h>
#include <graft/init/named_start.h>
#include <graft/nn/selector.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace graft {

struct ModelAdapters;

struct InitFindings {
  std::map<std::string, std::shared_ptr<init::LayerFacts>> facts;  // by layer
  // EVA gives every layer a rank of its own; without any the layer is not adapted. Empty: as asked.
  std::map<std::string, int64_t> ranks;
};

// Runs the batches over the model with a recorder on every chosen layer and takes the recorders out
// again, whatever happens. Memory beside the model's own: one matrix of a layer's weight's size for
// each layer (lora_ga), of [in, in] for each distinct input (corda), or a few rows of [in] (eva).
InitFindings run_init_pass(torch::nn::Module& model, const std::vector<nn::SelectedLayer>& layers,
                           const adapters::StartPlan& plan, const AttachOptions& options,
                           ModelAdapters& shared);

// Hands what is free inside the heap back to the system, where the C library can: large tensors
// come and go between small ones that stay, so that it would grow by what is gathered a second
// time.
void return_free_memory();

}  // namespace graft
