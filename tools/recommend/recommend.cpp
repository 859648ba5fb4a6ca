#include "recommend/recommend.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "command/command.hpp"
#include "command/json.hpp"
#include "command/options.hpp"
#include "command/output.hpp"
#include "data/csv.hpp"
#include "data/dataset.hpp"
#include "data/fields.hpp"
#include "personalize_runtime.hpp"
#include "recommend/known_items.hpp"

namespace personalize::tools {
namespace recommend_command {

struct Options {
  DatasetOptions data;
  std::string model, items, output;
  std::optional<std::string> user, title_column;
  std::uint32_t count = 25;
  std::uint32_t recent = 10;
  bool all_users = false, include_interacted = false, json = false;
};

constexpr std::string_view usual_title_column = "TITLE";

using Titles = std::unordered_map<std::string, std::string>;  // by ITEM_ID

// A column that was asked for must be there; without the usual one there are no titles.
std::optional<Titles> read_titles(const Options& options) {
  if (options.items.empty()) return std::nullopt;
  CsvReader reader(options.items);
  const std::size_t id = reader.require("ITEM_ID");
  const std::string wanted = options.title_column.value_or(std::string(usual_title_column));
  const auto title = reader.column(wanted);
  if (!title) {
    std::string text = options.items + ": no column " + wanted +
                       " to take titles from; --title-column takes one of ";
    for (const std::string& column : reader.columns())
      text += (&column == reader.columns().data() ? "" : ", ") + column;
    if (options.title_column) throw Failure(text);
    note("recommend", text);
    return std::nullopt;
  }
  Titles titles;
  BadRows bad{.skip = options.data.skip_bad_rows};
  for_each_row(reader, bad, [&] { titles.emplace(id_field(reader, id), reader.field(*title)); });
  bad.report("recommend");
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

void print_text(const nlohmann::ordered_json& out) {
  const auto text = [](const nlohmann::ordered_json& value) {
    return printable(value.get<std::string>());
  };
  const auto count = [&](const char* key) { return out[key].get<unsigned long long>(); };
  if (count("interactions") > 0)
    std::printf("user %s, last %zu of %llu interactions, %llu of %llu items known to the model:\n",
                text(out["user"]).c_str(), out["recent"].size(), count("interactions"),
                count("known_items"), count("items"));
  else
    std::printf("user %s has no interactions%s state in the model\n", text(out["user"]).c_str(),
                out["state_in_model"].get<bool>() ? ", but a" : " and no");
  for (const auto& event : out["recent"])
    std::printf("  %lld  %s  %s\n", event["timestamp"].get<long long>(),
                text(event["item"]).c_str(), text(event["title"]).c_str());
  const bool popular = !out["slate"].empty() && out["slate"][0]["reason"] == name(Reason::popular);
  std::printf(popular ? "slate of popular items:\n" : "slate:\n");
  std::size_t place = 0;
  for (const auto& pick : out["slate"])
    std::printf("  %2zu. %-12s %9.4f  %-10s %s\n", ++place, text(pick["item"]).c_str(),
                pick["score"].get<double>(), text(pick["reason"]).c_str(),
                text(pick["title"]).c_str());
}

void print_user(Recommender& recommender, const Model& model, const Dataset& data,
                const Options& options) {
  const auto titles = read_titles(options);
  const auto title = [&](std::string_view item) {
    if (!titles) return std::string();
    const auto found = titles->find(std::string(item));
    return found == titles->end() ? std::string() : found->second;
  };
  const auto user = data.user_ids.find(*options.user);
  std::span<const std::vector<Event>> histories;
  if (user) histories = std::span(data.histories).subspan(*user, 1);
  const KnownItems known = known_items(data, histories, model);
  nlohmann::ordered_json out{
      {"user", *options.user},
      {"interactions", known.interactions},
      {"items", known.items},
      {"known_items", known.known_items},
      {"state_in_model", model.parts().user_ids.find(*options.user).has_value()},
      {"recent", nlohmann::ordered_json::array()},
      {"slate", nlohmann::ordered_json::array()}};
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
  slate_for(recommender, options, *options.user, slate);
  for (const Pick& pick : slate.items)
    out["slate"].push_back({{"item", printable(pick.item)},
                            {"title", title(pick.item)},
                            {"score", pick.score},
                            {"reason", name(pick.reason)}});
  const auto untitled = std::count_if(
      slate.items.begin(), slate.items.end(),
      [&](const Pick& pick) { return titles && !titles->contains(std::string(pick.item)); });
  if (untitled > 0)
    note("recommend", std::to_string(untitled) + " of the " + std::to_string(slate.items.size()) +
                          " items of the slate are not in " + options.items);
  if (options.json)
    print_json(out);
  else
    print_text(out);
}

void write_all(Recommender& recommender, const Dataset& data, const Options& options) {
  OutputFile out(options.output);
  Progress progress("recommend");
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

void run(Options& options) {
  if (options.data.interactions.empty() && !options.user)
    throw Usage(options.all_users ? "--all-users needs --interactions"
                                  : "give --user ID or --interactions");
  auto model = Model::load(options.model);
  if (!model) throw Failure(model.error().message);
  auto recommender = Recommender::create(*model, {.exploration_weight = 0, .feedback = false});
  if (!recommender) throw Failure(recommender.error().message);
  Dataset data;
  if (!options.data.interactions.empty()) {
    options.data.may_be_empty = true;  // a user without a history is a user, too
    data = read_dataset(options.data);
    report(data, "recommend");
    const auto known = known_items(data, data.histories, **model);
    if (const auto left_out =
            report_known(data, known, **model, options.data.interactions, "were left out"))
      note("recommend", *left_out);
  }
  if (!options.user && data.user_ids.size() == 0)
    throw Failure(options.data.interactions + ": holds no interactions" + data.bad_rows.reason());
  if (!options.all_users && !options.user) options.user = data.user_ids[0];
  if (options.all_users)
    write_all(*recommender, data, options);
  else
    print_user(*recommender, **model, data, options);
}

}  // namespace recommend_command

void add_recommend(CLI::App& app) {
  using namespace recommend_command;
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("recommend", "Slates for a user, or for every user as CSV");
  add_model(*command, options->model)->required();
  add_interactions(
      *command, options->data.interactions,
      "CSV with the histories of users; without it, of --user only what the model holds");
  auto* all = command->add_flag("--all-users", options->all_users,
                                "Every user of the interactions, as CSV");
  auto* user = command->add_option("--user,-u", options->user, "USER_ID to recommend to")
                   ->default_str("the first in time")
                   ->excludes(all);
  auto* items = command->add_option("--items", options->items, "CSV with titles (with --user)")
                    ->excludes(all);
  command->add_option("--title-column", options->title_column, "Column of --items to show")
      ->default_str(std::string(usual_title_column))
      ->needs(items);
  add_output(*command, options->output, "CSV of --all-users")
      ->default_str("standard output")
      ->excludes(user);
  add_number(*command, "--count,-n", options->count, "Items a slate", 1, 10'000);
  add_number(*command, "--recent", options->recent,
             "Interactions of the user to show (with --user)", 0, 1'000'000)
      ->excludes(all);
  command->add_flag("--include-interacted", options->include_interacted,
                    "Also recommend items of the user's last " +
                        std::to_string(RecommenderOptions{}.history_length) + " interactions");
  add_event_options(*command, options->data);
  add_skip_bad_rows(*command, options->data.skip_bad_rows);
  add_json(*command, options->json)->excludes(all);
  command->callback([options] { run(*options); });
}

}  // namespace personalize::tools
