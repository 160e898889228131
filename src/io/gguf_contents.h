// An open GGUF file: what GgufFile's two halves (metadata, tensors) share.
#pragma once

#include <graft/io/gguf.h>
#include <graft/io/mapped_file.h>

#include <unordered_map>

#include "gguf_header.h"

namespace graft::io {

struct GgufFile::Contents {
  struct Tensor {
    TensorInfo info;
    const GgufType* type;
    size_t offset;  // from the start of the file
  };

  /// Throws for an unknown name.
  const Tensor& tensor(const std::string& name) const;
  /// Throws for an unknown key.
  const GgufValue& value(const std::string& key) const;
  /// "('path')" with a blank before it, for errors.
  std::string place() const;

  std::shared_ptr<const MappedFile> file;
  std::vector<std::string> keys;
  std::unordered_map<std::string, GgufValue> values;
  std::vector<std::string> names;
  std::unordered_map<std::string, Tensor> tensors;
};

}  // namespace graft::io
