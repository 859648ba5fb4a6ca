#include "recommend/recommend.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <unordered_map>
#include <vector>

#include "command/command.hpp"
#include "command/json.hpp"
#include "command/output.hpp"
#include "data/csv.hpp"
#include "data/dataset.hpp"
#include "data/fields.hpp"
#include "personalize_runtime.hpp"

namespace personalize::tools {
namespace recommend_command {

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
  // Titles are only for display; the data set's reader has already judged the file's rows.
  BadRows ignored{.skip = true};
  for_each_row(reader, ignored, [&] { titles.emplace(reader.field(id), reader.field(*title)); });
  return titles;
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
    out["slate"].push_back({{"item", printable(pick.item)},
                            {"title", title(pick.item)},
                            {"score", pick.score},
                            {"reason", std::string(name(pick.reason))}});
  if (options.json) {
    print_json(out);
    return;
  }
  const std::string shown = printable(options.user);
  if (!user)
    std::printf("user %s has no interactions: popular items\n", shown.c_str());
  else
    std::printf("user %s, last %zu interactions:\n", shown.c_str(), out["recent"].size());
  for (const auto& event : out["recent"])
    std::printf("  %lld  %s  %s\n", event["timestamp"].get<long long>(),
                event["item"].get<std::string>().c_str(),
                printable(event["title"].get<std::string>()).c_str());
  std::printf("slate:\n");
  for (std::size_t i = 0; i < slate.items.size(); ++i) {
    const Pick& pick = slate.items[i];
    std::printf("  %2zu. %-12s %9.4f  %-10s %s\n", i + 1, printable(pick.item).c_str(),
                static_cast<double>(pick.score), std::string(name(pick.reason)).c_str(),
                printable(title(pick.item)).c_str());
  }
}

void write_all(Recommender& recommender, const Dataset& data, const Options& options) {
  OutputFile out(options.output);
  Progress progress("recommending");
  out.append("USER_ID,RANK,ITEM_ID,SCORE,REASON\n");
  std::string lines;
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
      for (std::size_t i = 0; i < slate.items.size(); ++i) {
        detail::append_csv_field(data.user_ids[user], lines);
        lines += ',' + std::to_string(i + 1) + ',';
        detail::append_csv_field(slate.items[i].item, lines);
        lines += ',' + number_text(double{slate.items[i].score}) + ',';
        lines += name(slate.items[i].reason);
        lines += '\n';
      }
      recommender.forget(data.user_ids[user]);
    }
    out.append(lines);
    lines.clear();
    progress.update(static_cast<double>(end) / static_cast<double>(data.user_ids.size()),
                    std::to_string(end) + " users");
  }
  out.commit();
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
  data.bad_rows.report("recommend");
  if (options.all_users)
    write_all(*recommender, data, options);
  else
    print_user(*recommender, data, options);
}

}  // namespace recommend_command

void add_recommend(CLI::App& app) {
  using namespace recommend_command;
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("recommend", "Slates for a user, or for every user as CSV");
  command->add_option("--model,-m", options->model, "Model file (.pzm)")->required();
  command->add_option("--interactions,-i", options->interactions, "Interactions CSV (or .csv.zst)")
      ->required();
  auto* all = command->add_flag("--all-users", options->all_users,
                                "Every user of the interactions, as CSV");
  auto* user =
      command->add_option("--user,-u", options->user, "USER_ID to recommend to")->excludes(all);
  auto* items =
      command->add_option("--items", options->items, "Items CSV, for titles (with --user)")
          ->excludes(all);
  command->add_option("--title-column", options->title_column, "Column of --items to show")
      ->capture_default_str()
      ->needs(items);
  command
      ->add_option("--output,-o", options->output, "CSV of --all-users (default: standard output)")
      ->excludes(user);
  command->add_option("--count,-n", options->count, "Items a slate, 1 to 10000")
      ->check(CLI::Range(1u, 10'000u))
      ->capture_default_str();
  command->add_option("--recent", options->recent, "Interactions of the user to show (with --user)")
      ->capture_default_str()
      ->excludes(all);
  command->add_flag("--include-interacted", options->include_interacted,
                    "Also recommend items of the user's last " +
                        std::to_string(RecommenderOptions{}.history_length) + " interactions");
  command->add_flag("--skip-bad-rows", options->skip_bad_rows, "Leave out malformed rows");
  command->add_flag("--json", options->json, "Print JSON (with --user)")->excludes(all);
  command->callback([options] { run(*options); });
}

}  // namespace personalize::tools
