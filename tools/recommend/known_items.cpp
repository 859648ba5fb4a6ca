#include "recommend/known_items.hpp"

#include <string_view>

#include "command/command.hpp"

namespace personalize::tools {
namespace known_items_report {

// "0 of 40 items of log.csv are in the model"
std::string counts(const KnownItems& known, const std::string& path) {
  return std::to_string(known.known_items) + " of " + std::to_string(known.items) + " items of " +
         path + " are in the model";
}

// "; there '0', in the model 'i0'", of an item that the model does not know.
std::string example(const Dataset& data, const Model& model) {
  for (std::size_t item = 0; item < data.item_ids.size(); ++item)
    if (!model.find_item(data.item_ids[item]))
      return "; there '" + std::string(data.item_ids[item]) + "', in the model '" +
             std::string(model.item_id(0)) + "'";
  return "";
}

}  // namespace known_items_report

KnownItems known_items(const Dataset& data, std::span<const std::vector<Event>> histories,
                       const Model& model) {
  std::vector<std::uint64_t> interactions(data.item_ids.size());
  for (const std::vector<Event>& history : histories)
    for (const Event& event : history) ++interactions[event.item];
  KnownItems known;
  for (std::size_t item = 0; item < interactions.size(); ++item) {
    if (interactions[item] == 0) continue;
    const bool found = model.find_item(data.item_ids[item]).has_value();
    known.items += 1;
    known.interactions += interactions[item];
    known.known_items += found ? 1 : 0;
    known.known_interactions += found ? interactions[item] : 0;
  }
  return known;
}

std::optional<std::string> report_known(const Dataset& data, const KnownItems& known,
                                        const Model& model, const std::string& interactions_path,
                                        const std::string& consequence) {
  using namespace known_items_report;
  const std::string text = counts(known, interactions_path);
  if (known.items > 0 && known.known_items == 0)
    throw Failure(text + example(data, model) + "; name the interactions of the model's own items");
  if (known.known_items == known.items) return std::nullopt;
  const bool few = known.known_items * 2 < known.items;
  return (few ? "warning: only " : "") + text + (few ? example(data, model) : "") + "; " +
         std::to_string(known.interactions - known.known_interactions) + " of " +
         std::to_string(known.interactions) + " interactions are with others and " + consequence;
}

}  // namespace personalize::tools
