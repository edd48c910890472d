// Named tensors of a checkpoint, whatever its format. Thread-safe once read.
// Readers treat files as hostile: every offset, count and shape is checked against the file before
// a view exists, so a view never points outside its file.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tensor/tensor_view.h"

namespace lorikeet {

class MappedFile;  // engine/tensor/mapped_file.h

class TensorFile {
 public:
  TensorFile() = default;
  TensorFile(std::vector<std::shared_ptr<const MappedFile>> files,
             std::map<std::string, TensorView, std::less<>> tensors)
      : files_(std::move(files)), tensors_(std::move(tensors)) {}

  // nullptr when there is no such tensor.
  const TensorView* Find(std::string_view name) const {
    auto it = tensors_.find(name);
    return it == tensors_.end() ? nullptr : &it->second;
  }
  const std::map<std::string, TensorView, std::less<>>& tensors() const { return tensors_; }

  // For who reads several tensors as one, before others see the file. The bytes of `view` are the
  // caller's to keep.
  void Put(std::string_view name, TensorView view) {
    tensors_.insert_or_assign(std::string(name), std::move(view));
  }
  void Erase(std::string_view name) {
    if (auto it = tensors_.find(name); it != tensors_.end()) tensors_.erase(it);
  }

 private:
  std::vector<std::shared_ptr<const MappedFile>> files_;  // keep the views alive
  std::map<std::string, TensorView, std::less<>> tensors_;
};

}  // namespace lorikeet
