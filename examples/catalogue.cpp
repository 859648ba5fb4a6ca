// The shop's catalogue comes every night as a whole: what it names is put, what it does not name is
// removed, and the model is saved with what came in, for the next start.
//
// usage: catalogue MODEL.pzm FEED.tsv OUT.pzm
// FEED.tsv has a line an item: its id and its fields as NAME=VALUE, with tabs between them.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const std::string& message) {
  std::fprintf(stderr, "catalogue: %s\n", message.c_str());
  return 1;
}

// Errors that concern one item are told and leave it as it was; the others go on.
static pz::Result<bool> put(pz::Recommender& recommender, std::string_view line,
                            std::unordered_set<std::string>& named) {
  const std::string_view id = line.substr(0, line.find('\t'));
  pz::NewItem item{.item = id};
  for (line.remove_prefix(id.size()); !line.empty();) {
    line.remove_prefix(1);
    const std::string_view field = line.substr(0, line.find('\t'));
    line.remove_prefix(field.size());
    const std::size_t sign = std::min(field.find('='), field.size());
    item.fields.emplace_back(field.substr(0, sign), field.substr(std::min(sign + 1, field.size())));
  }
  named.emplace(id);
  auto done = recommender.put_item(item);
  // What waits has filled its budget: an update takes it in.
  if (!done && done.error().code == pz::Errc::limit) {
    if (auto updated = recommender.update(); !updated) return updated.error();
    done = recommender.put_item(item);
  }
  if (!done) std::printf("%s: %s\n", std::string(id).c_str(), done.error().message.c_str());
  return bool(done);
}

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fputs("usage: catalogue MODEL.pzm FEED.tsv OUT.pzm\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error().message);
  auto recommender = pz::Recommender::create(*model, {.updates = pz::Updates::by_caller});
  if (!recommender) return fail(recommender.error().message);

  std::unordered_set<std::string> named;
  std::size_t refused = 0;
  std::ifstream feed(arguments[2]);
  for (std::string line; std::getline(feed, line);) {
    auto done = put(*recommender, line, named);
    if (!done) return fail(done.error().message);
    refused += *done ? 0 : 1;
  }
  if (!feed.eof()) return fail(std::string(arguments[2]) + ": cannot read");
  std::vector<std::string> gone;
  for (std::uint32_t item = 0; item < (*model)->item_count(); ++item)
    if (std::string id((*model)->item_id(item)); !named.count(id)) gone.push_back(std::move(id));
  // Half a feed must not empty the catalogue.
  if (gone.size() > (*model)->item_count() / 2)
    return fail(std::string(arguments[2]) + ": names fewer than half of the items");
  for (const std::string& id : gone)
    if (auto removed = recommender->remove_item(id); !removed) return fail(removed.error().message);
  if (auto updated = recommender->update(); !updated) return fail(updated.error().message);

  const pz::UpdateReport report = recommender->update_report();
  std::printf("%zu added, %zu changed, %zu removed, %zu refused, %zu values unknown\n",
              report.items_added, report.items_changed, report.items_removed,
              refused + report.items_refused, report.values_unknown);
  for (const auto& [id, error] : report.refused)
    std::printf("%s: %s\n", id.c_str(), error.message.c_str());
  const auto whole = recommender->model();
  if (!whole) return fail("no item is left, or no memory");
  // In the precision that it came in.
  const pz::WriteOptions precision{.element_type = whole->parts().item_vectors.type()};
  if (auto saved = pz::save_model(whole->parts(), arguments[3], precision); !saved)
    return fail(saved.error().message);
  return 0;
}
