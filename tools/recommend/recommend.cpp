#include "recommend/recommend.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <unordered_map>
#include <vector>

#include "command/command.hpp"
#include "data/csv.hpp"
#include "data/dataset.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace {

struct Options {
  std::string model, interactions, items, title_column = "TITLE", user, output;
  std::uint32_t count = 25;
  std::uint32_t recent = 10;
  bool all_users = false, include_interacted = false, json = false, skip_bad_rows = false;
};

std::unordered_map<std::string, std::string> read_titles(const Options& options) {
  std::unordered_map<std::string, std::string> titles;
  if (options.items.empty()) return titles;
  CsvReader reader(options.items);
  const std::size_t id = reader.require("ITEM_ID");
  const auto title = reader.column(options.title_column);
  if (!title) return titles;
  while (true) {
    try {
      if (!reader.next()) return titles;
      titles.emplace(reader.field(id), reader.field(*title));
    } catch (const BadRow& row) {
      // Titles are only for display; the data set's reader has already judged the file's rows.
      (void)row;
    }
  }
}

std::string quoted(std::string_view text) {
  if (text.find_first_of(",\"\r\n") == std::string_view::npos) return std::string(text);
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"') out += '"';
    out += c;
  }
  return out + '"';
}

void record_history(Recommender& recommender, const Dataset& data, std::size_t user) {
  for (const Event& event : data.histories[user]) {
    const auto recorded = recommender.record(
        {.user = data.user_ids[user],
         .item = data.item_ids[event.item],
         .event_type =
             data.event_types.size() == 0 ? std::string_view{} : data.event_types[event.event_type],
         .timestamp = event.timestamp});
    if (!recorded) throw Failure(recorded.error().message);
  }
}

void slate_for(Recommender& recommender, const Options& options, std::string_view user,
               Slate& slate) {
  const auto done = recommender.recommend(
      {.user = user, .count = options.count, .exclude_interacted = !options.include_interacted},
      slate);
  if (!done) throw Failure(done.error().message);
}

void print_user(Recommender& recommender, const Dataset& data, const Options& options) {
  const auto titles = read_titles(options);
  const auto title = [&](std::string_view item) {
    const auto found = titles.find(std::string(item));
    return found == titles.end() ? std::string() : found->second;
  };
  const auto user = data.user_ids.find(options.user);
  nlohmann::json out{{"user", options.user},
                     {"recent", nlohmann::json::array()},
                     {"slate", nlohmann::json::array()}};
  if (user) {
    record_history(recommender, data, *user);
    const auto& history = data.histories[*user];
    const std::size_t shown = std::min<std::size_t>(options.recent, history.size());
    for (std::size_t e = history.size() - shown; e < history.size(); ++e)
      out["recent"].push_back({{"timestamp", history[e].timestamp},
                               {"item", data.item_ids[history[e].item]},
                               {"title", title(data.item_ids[history[e].item])}});
  }
  Slate slate;
  slate_for(recommender, options, options.user, slate);
  for (const Pick& pick : slate.items)
    out["slate"].push_back({{"item", std::string(pick.item)},
                            {"title", title(pick.item)},
                            {"score", pick.score},
                            {"reason", std::string(name(pick.reason))}});
  if (options.json) {
    std::cout << out.dump(2) << '\n';
    return;
  }
  if (!user)
    std::cout << "user " << options.user << " has no interactions: popular items\n";
  else
    std::cout << "user " << options.user << ", last " << out["recent"].size() << " interactions:\n";
  for (const auto& event : out["recent"])
    std::cout << "  " << event["timestamp"] << "  " << event["item"].get<std::string>() << "  "
              << event["title"].get<std::string>() << '\n';
  std::cout << "slate:\n";
  for (std::size_t i = 0; i < slate.items.size(); ++i) {
    const Pick& pick = slate.items[i];
    std::printf("  %2zu. %-12.*s %9.4f  %-10.*s %s\n", i + 1, static_cast<int>(pick.item.size()),
                pick.item.data(), static_cast<double>(pick.score),
                static_cast<int>(name(pick.reason).size()), name(pick.reason).data(),
                title(pick.item).c_str());
  }
  std::fflush(stdout);
}

void write_all(Recommender& recommender, const Dataset& data, const Options& options) {
  std::ofstream file;
  if (!options.output.empty()) {
    file.open(options.output, std::ios::binary);
    if (!file) throw Failure(options.output + ": cannot create");
  }
  std::ostream& out = options.output.empty() ? std::cout : file;
  Progress progress("recommending");
  out << "USER_ID,RANK,ITEM_ID,SCORE,REASON\n";
  // Users together share a pass over the catalogue.
  constexpr std::size_t together = 256;
  std::vector<Slate> slates(together);
  std::vector<Request> requests;
  for (std::size_t begin = 0; begin < data.user_ids.size(); begin += together) {
    const std::size_t end = std::min(begin + together, data.user_ids.size());
    requests.clear();
    for (std::size_t user = begin; user < end; ++user) {
      record_history(recommender, data, user);
      requests.push_back({.user = data.user_ids[user],
                          .count = options.count,
                          .exclude_interacted = !options.include_interacted});
    }
    const auto done = recommender.recommend(requests, slates);
    if (!done) throw Failure(done.error().message);
    for (std::size_t user = begin; user < end; ++user) {
      const Slate& slate = slates[user - begin];
      for (std::size_t i = 0; i < slate.items.size(); ++i)
        out << quoted(data.user_ids[user]) << ',' << i + 1 << ',' << quoted(slate.items[i].item)
            << ',' << slate.items[i].score << ',' << name(slate.items[i].reason) << '\n';
      recommender.forget(data.user_ids[user]);
    }
    progress.update(static_cast<double>(end) / static_cast<double>(data.user_ids.size()),
                    std::to_string(end) + " users");
  }
  out.flush();
  if (!out)
    throw Failure((options.output.empty() ? "standard output" : options.output) +
                  std::string(": cannot write; is the disk full?"));
  progress.finish(std::to_string(data.user_ids.size()) + " slates written");
}

void run(const Options& options) {
  if (options.all_users != options.user.empty())
    throw Usage("give either --user ID or --all-users");
  auto model = Model::load(options.model);
  if (!model) throw Failure(model.error().message);
  auto recommender = Recommender::create(*model, {.exploration_weight = 0, .feedback = false});
  if (!recommender) throw Failure(recommender.error().message);
  DatasetOptions files;
  files.interactions = options.interactions;
  files.skip_bad_rows = options.skip_bad_rows;
  const Dataset data = read_dataset(files);
  report_skipped_rows(data, "recommend");
  if (options.all_users)
    write_all(*recommender, data, options);
  else
    print_user(*recommender, data, options);
}

}  // namespace

void add_recommend(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("recommend", "Slates for a user, or for every user as CSV");
  command->add_option("--model,-m", options->model, "Model file (.pzm)")->required();
  command->add_option("--interactions,-i", options->interactions, "Interactions CSV (or .csv.zst)")
      ->required();
  command->add_option("--items", options->items, "Items CSV, for titles");
  command->add_option("--title-column", options->title_column, "Column of --items to show")
      ->capture_default_str();
  command->add_option("--user,-u", options->user, "USER_ID to recommend to");
  command->add_flag("--all-users", options->all_users, "Every user of the interactions, as CSV");
  command->add_option("--output,-o", options->output,
                      "CSV of --all-users (default: standard output)");
  command->add_option("--count,-n", options->count, "Items a slate, 1 to 10000")
      ->check(CLI::Range(1u, 10'000u))
      ->capture_default_str();
  command->add_option("--recent", options->recent, "Interactions of the user to show")
      ->capture_default_str();
  command->add_flag("--include-interacted", options->include_interacted,
                    "Also recommend items of the user's last 200 interactions");
  command->add_flag("--skip-bad-rows", options->skip_bad_rows, "Leave out malformed rows");
  command->add_flag("--json", options->json, "Print JSON (with --user)");
  command->callback([options] { run(*options); });
}

}  // namespace personalize::tools
