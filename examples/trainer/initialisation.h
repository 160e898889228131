/// What `finetune` adds to attach for initialisers that need data.
#pragma once

#include <graft/attach/attach.h>

#include <filesystem>
#include <nlohmann/json_fwd.hpp>

#include "examples/models/decoder.h"
#include "examples/trainer/data.h"

namespace graft::trainer {

/// The batches that training will see first, `batches` of them at most. The model, rows and order
/// must outlive the result.
InitData init_data(models::DecoderImpl& model, const TokenData& rows, RowOrder& order,
                   int64_t batches, bool quiet);

/// The options of a resumed run: the checkpoint holds the start, and the ranks where the
/// initialiser chose them.
AttachOptions resumed(AttachOptions options, const adapters::Recipe& recipe,
                      const std::filesystem::path& checkpoint);

/// How the layers' factors were found: one object a layer with rank, explained share and leading
/// singular values.
nlohmann::ordered_json start_report(const AttachedAdapter& adapter);

}  // namespace graft::trainer
