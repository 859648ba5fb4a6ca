#include "train/checkpoint.hpp"

#include <ATen/ATen.h>
#include <torch/serialize/archive.h>

#include <filesystem>
#include <system_error>

#include "command/command.hpp"

namespace personalize::tools {
namespace {

constexpr std::int64_t checkpoint_version = 1;

// One list of what a checkpoint holds, for writing and for reading.
template <class Archive, class Fields>
void each_field(Archive& archive, Fields& c) {
  archive.list("parameters", c.parameters);
  archive.list("first_moments", c.first_moments);
  archive.list("second_moments", c.second_moments);
  archive.list("best_parameters", c.best_parameters);
  archive.list("state", c.state);
  archive.value("epoch", c.epoch);
  archive.value("chunk", c.chunk);
  archive.value("step", c.step);
  archive.value("epoch_events", c.epoch_events);
  archive.value("best_epoch", c.best_epoch);
  archive.value("stale_epochs", c.stale_epochs);
  archive.value("epoch_loss", c.epoch_loss);
  archive.value("last_loss", c.last_loss);
  archive.value("best_ndcg10", c.best_ndcg10);
  archive.value("best_recall10", c.best_recall10);
  archive.value("elapsed_seconds", c.elapsed_seconds);
  archive.value("fraction", c.fraction);
  archive.value("recipe", c.recipe);
}

struct Writer {
  torch::serialize::OutputArchive archive;
  void list(const std::string& name, const std::vector<at::Tensor>& tensors) {
    archive.write(name + ".size", c10::IValue(static_cast<std::int64_t>(tensors.size())));
    for (std::size_t i = 0; i < tensors.size(); ++i)
      archive.write(name + "." + std::to_string(i), tensors[i].detach());
  }
  template <class T>
  void value(const std::string& name, const T& v) {
    archive.write(name, c10::IValue(v));
  }
};

struct Reader {
  torch::serialize::InputArchive archive;
  c10::IValue read(const std::string& name) {
    c10::IValue v;
    archive.read(name, v);
    return v;
  }
  void list(const std::string& name, std::vector<at::Tensor>& tensors) {
    const std::int64_t n = read(name + ".size").toInt();
    tensors.clear();
    for (std::int64_t i = 0; i < n; ++i) {
      at::Tensor tensor;
      archive.read(name + "." + std::to_string(i), tensor);
      tensors.push_back(tensor);
    }
  }
  void value(const std::string& name, std::int64_t& v) { v = read(name).toInt(); }
  void value(const std::string& name, double& v) { v = read(name).toDouble(); }
  void value(const std::string& name, std::string& v) { v = read(name).toStringRef(); }
};

}  // namespace

void save_checkpoint(const Checkpoint& checkpoint, const std::string& path) {
  const std::string temporary = path + ".partial";
  try {
    Writer writer;
    writer.archive.write("version", c10::IValue(checkpoint_version));
    each_field(writer, checkpoint);
    writer.archive.save_to(temporary);
    std::filesystem::rename(temporary, path);
  } catch (const std::exception&) {
    std::error_code ignored;
    std::filesystem::remove(temporary, ignored);
    throw Failure(
        path + ": cannot write the checkpoint; is there space, and may the folder be written to?");
  }
}

Checkpoint load_checkpoint(const std::string& path) {
  if (!std::filesystem::exists(path))
    throw Failure(path +
                  ": no such checkpoint, nothing to resume (a run that ends by itself removes its "
                  "checkpoint); start without --resume");
  Checkpoint checkpoint;
  bool known = false;
  try {
    Reader reader;
    reader.archive.load_from(path);
    known = reader.read("version").toInt() == checkpoint_version;
    if (known) each_field(reader, checkpoint);
  } catch (const std::exception&) {
    throw Failure(path +
                  ": not a checkpoint, or a damaged one; remove it and start without --resume");
  }
  if (!known)
    throw Failure(path + ": a checkpoint of another version; remove it and start without --resume");
  return checkpoint;
}

}  // namespace personalize::tools
