// Writes what outlives a process, small: what the fuzzers of state files, journals and users begin
// with.
// usage: seed_states FOLDER: into its fuzz_state, fuzz_journal and fuzz_user
#include <fstream>
#include <iterator>
#include <string>

#include "small_shop.hpp"

namespace fs = std::filesystem;
namespace pz = personalize;
using promises::require;

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const std::string to = argv[1];
  const small_shop::Folder folder;
  {
    auto shop = pz::Recommender::open(folder.path(), small_shop::model(), small_shop::options());
    require(shop.has_value(), "a new folder opens");
    require(shop->save(to + "/fuzz_state/empty.pzs").has_value(), "a state is saved");
    small_shop::fill(*shop);
    require(shop->save(to + "/fuzz_state/full.pzs").has_value(), "a state is saved");
    small_shop::fill(*shop);
    for (const char* user : {"u0", "u1", "u2", "s"}) {
      const bool session = user[0] == 's';
      const auto blob = shop->export_user(session ? "" : user, session ? user : "");
      require(blob.has_value(), "a user is exported");
      std::ofstream(to + "/fuzz_user/" + user, std::ios::binary)
          .write(reinterpret_cast<const char*>(blob->data()),
                 static_cast<std::streamsize>(blob->size()));
    }
    require(shop->swap(small_model::model({.items = 12, .dimension = 4, .hidden = 3, .seed = 2}))
                .has_value(),
            "another model comes");
    require(shop->save(to + "/fuzz_state/other_model.pzs").has_value(), "a state is saved");
  }
  const auto records_of = [](const small_shop::Folder& of, int journals) {  // without headers
    std::string all;
    for (int n = 1; n <= journals; ++n) {
      std::ifstream in(of.path() + "/journal-00000000000" + std::to_string(n) + ".pzj",
                       std::ios::binary);
      const std::string bytes{std::istreambuf_iterator<char>(in), {}};
      require(bytes.size() > 64, "a journal is there");
      all += bytes.substr(64);
    }
    return all;
  };
  // Folders of their own: a swap makes a new journal.
  for (const bool swaps : {false, true}) {
    const small_shop::Folder journals;
    {
      auto shop =
          pz::Recommender::open(journals.path(), small_shop::model(), small_shop::options());
      require(shop.has_value(), "a new folder opens");
      small_shop::fill(*shop);
      if (swaps) {
        // Where a folder stands no state can be put: the old one and both journals stay.
        fs::create_directory(journals.path() + "/state-000000000002.pzs");
        const auto swapped =
            shop->swap(small_model::model({.items = 14, .dimension = 4, .hidden = 3, .seed = 2}));
        require(swapped.has_value() && swapped->save_error, "a swap is not saved");
        small_shop::fill(*shop);
      }
    }
    std::ofstream(to + (swaps ? "/fuzz_journal/swapped" : "/fuzz_journal/all"), std::ios::binary)
        << records_of(journals, swaps ? 2 : 1);
  }
  return 0;
}
