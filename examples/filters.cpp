// Business rules: what may stand in a slate is a bit an item. Masks are made once, kept up to date,
// and combined for a request.
// usage: filters MODEL.pzm ITEMS.tsv USER GENRE
// ITEMS.tsv has a line an item: its id, its genres with | between them, how many are in stock.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <span>
#include <sstream>
#include <string>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const std::string& message) {
  std::fprintf(stderr, "filters: %s\n", message.c_str());
  return 1;
}

static pz::ItemMask both(const pz::ItemMask& a, const pz::ItemMask& b) {
  pz::ItemMask mask(a.size());
  for (std::uint32_t item = 0; item < a.size(); ++item)
    if (a.test(item) && b.test(item)) mask.set(item);
  return mask;
}

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fputs("usage: filters MODEL.pzm ITEMS.tsv USER GENRE\n", stderr);
    return 2;
  }
  const std::span arguments(argv, static_cast<std::size_t>(argc));
  const std::string user = arguments[3], genre = arguments[4];
  auto model = pz::Model::load(arguments[1]);
  if (!model) return fail(model.error().message);
  auto recommender = pz::Recommender::create(*model);
  if (!recommender) return fail(recommender.error().message);

  // A new mask has no item; what is put into the catalogue later is not in it either, until the
  // mask is resized to item_count() and the item set.
  const pz::ItemMask none(recommender->item_count());
  pz::ItemMask in_stock = none;
  std::map<std::string, pz::ItemMask> genres;
  std::ifstream file(arguments[2]);
  std::size_t unknown = 0;
  for (std::string line, id, listed, one; std::getline(file, line);) {
    std::istringstream fields(line);
    int stock = 0;
    if (!std::getline(fields, id, '\t') || !std::getline(fields, listed, '\t') ||
        !(fields >> stock))
      return fail(std::string(arguments[2]) + ": this is not id, genres, stock: " + line);
    const auto item = recommender->find_item(id);
    unknown += item ? 0 : 1;
    if (!item) continue;
    if (stock > 0) in_stock.set(*item);
    for (std::istringstream names(listed); std::getline(names, one, '|');)
      genres.try_emplace(one, none).first->second.set(*item);
  }
  if (!file.eof()) return fail(std::string(arguments[2]) + ": cannot read");
  std::fprintf(stderr, "%zu items in stock, %zu lines are of items that the model does not have\n",
               in_stock.count(), unknown);
  const auto found = genres.find(genre);
  if (found == genres.end()) return fail("no item has the genre " + genre);

  // Exact: the best of what is eligible, and as many as there are.
  for (const char* title : {"first", "sold out meanwhile"}) {
    const pz::ItemMask eligible = both(in_stock, found->second);
    auto slate = recommender->recommend({.user = user, .count = 5, .eligible = &eligible});
    if (!slate) return fail(slate.error().message);
    std::printf("%s:", title);
    for (const pz::Pick& pick : slate->items) std::printf(" %s", std::string(pick.item).c_str());
    std::printf(" (of %zu)\n", eligible.count());
    if (slate->items.empty()) break;
    if (const auto best = recommender->find_item(slate->items.front().item)) in_stock.reset(*best);
  }
  return 0;
}
