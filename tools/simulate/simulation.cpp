#include "simulate/simulation.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <locale>
#include <mutex>
#include <numeric>
#include <optional>
#include <sstream>
#include <utility>

#include "command/command.hpp"
#include "command/parallel.hpp"
#include "data/statistics.hpp"

namespace personalize::tools {
namespace {

constexpr std::uint32_t discovered_at = 100;  // impressions

double total(const PolicyRun& run) {
  return std::accumulate(run.reward.begin(), run.reward.end(), 0.0);
}

// Days until half of the good items were found; nullopt where fewer ever were.
std::optional<double> median_days(const std::vector<PolicyRun>& runs) {
  std::vector<double> days;
  std::size_t good = 0;
  for (const PolicyRun& run : runs) {
    days.insert(days.end(), run.days_to_discover.begin(), run.days_to_discover.end());
    good += run.good_items;
  }
  std::sort(days.begin(), days.end());
  if (good == 0 || days.size() * 2 < good) return std::nullopt;
  return days[(good - 1) / 2];
}

double found_share(const std::vector<PolicyRun>& runs) {
  double found = 0, good = 0;
  for (const PolicyRun& run : runs) {
    found += static_cast<double>(run.days_to_discover.size());
    good += static_cast<double>(run.good_items);
  }
  return good > 0 ? found / good : 0;
}

std::vector<double> rewards(const std::vector<PolicyRun>& runs) {
  std::vector<double> values;
  for (const PolicyRun& run : runs) values.push_back(total(run));
  return values;
}

std::vector<double> first_days(const std::vector<PolicyRun>& runs) {
  std::vector<double> values;
  for (const PolicyRun& run : runs) values.push_back(run.reward.front());
  return values;
}

// Seed by seed: the first policy's figure over the other's.
std::vector<double> paired(const std::vector<double>& first, const std::vector<double>& other) {
  std::vector<double> ratios;
  for (std::size_t s = 0; s < first.size(); ++s) ratios.push_back(first[s] / other[s]);
  return ratios;
}

nlohmann::ordered_json to_json(const std::vector<double>& ratios) {
  const Estimate e = estimate(ratios);
  return {{"mean", e.mean},
          {"half_width", e.half_width},
          {"least", *std::min_element(ratios.begin(), ratios.end())},
          {"by_seed", ratios}};
}

// With a decimal point in every locale.
std::string fixed(double value, int digits) {
  std::array<char, 400> text;  // the largest double has 309 digits before the point
  const auto end =
      std::to_chars(text.data(), text.data() + text.size(), value, std::chars_format::fixed, digits)
          .ptr;
  return {text.data(), end};
}

// Of an axis from 0: at most five ticks behind it, at multiples of 1, 2 or 5 times a power of ten
// and so with exact labels.
struct Axis {
  Axis(double wanted_end, double least_step, bool ends_at_tick) {
    const double rough = std::max(wanted_end / 5, least_step);
    const double power = std::pow(10, std::floor(std::log10(rough) + 1e-9));
    for (const double factor : {1.0, 2.0, 5.0, 10.0}) {
      step = factor * power;
      if (step >= rough * (1 - 1e-9)) break;
    }
    ticks = static_cast<int>(ends_at_tick ? std::ceil(wanted_end / step - 1e-9)
                                          : std::floor(wanted_end / step + 1e-9));
    end = ends_at_tick ? ticks * step : wanted_end;
    digits = std::max(0, -static_cast<int>(std::floor(std::log10(step) + 1e-9)));
  }
  std::string label(int tick) const { return fixed(tick * step, digits); }

  double step = 1, end = 1;
  int ticks = 1;  // behind 0
  int digits = 0;
};

// One panel of the plot. Series share the axes; x and y begin at 0.
struct Panel {
  std::string title, x_label, y_label;
  Axis x, y;
  std::vector<std::vector<std::pair<double, double>>> series;
};

constexpr std::array<const char*, 8> colours{"#d62728", "#ff9896", "#7f7f7f", "#1f77b4",
                                             "#17becf", "#bcbd22", "#2ca02c", "#9467bd"};

void draw(std::ostringstream& out, const Panel& panel, double left) {
  constexpr double top = 40, width = 380, height = 300;
  const auto x = [&](double v) { return left + width * v / panel.x.end; };
  const auto y = [&](double v) { return top + height * (1 - v / panel.y.end); };
  out << "<text x='" << left + width / 2 << "' y='24' text-anchor='middle' font-size='15'>"
      << panel.title << "</text>\n";
  for (int tick = 0; tick <= panel.y.ticks; ++tick) {
    const double at = y(tick * panel.y.step);
    out << "<line x1='" << left << "' x2='" << left + width << "' y1='" << at << "' y2='" << at
        << "' stroke='#dddddd'/>\n<text x='" << left - 6 << "' y='" << at + 4
        << "' text-anchor='end'>" << panel.y.label(tick) << "</text>\n";
  }
  for (int tick = 0; tick <= panel.x.ticks; ++tick)
    out << "<text x='" << x(tick * panel.x.step) << "' y='" << top + height + 16
        << "' text-anchor='middle'>" << panel.x.label(tick) << "</text>\n";
  out << "<text x='" << left + width / 2 << "' y='" << top + height + 34
      << "' text-anchor='middle'>" << panel.x_label << "</text>\n<text x='" << left - 48 << "' y='"
      << top + height / 2 << "' text-anchor='middle' transform='rotate(-90 " << left - 48 << ' '
      << top + height / 2 << ")'>" << panel.y_label << "</text>\n";
  for (std::size_t s = 0; s < panel.series.size(); ++s) {
    out << "<polyline fill='none' stroke-width='2' stroke='" << colours[s % colours.size()]
        << "' points='";
    for (const auto& [px, py] : panel.series[s]) out << x(px) << ',' << y(py) << ' ';
    out << "'/>\n";
  }
}

}  // namespace

PolicyRun run_policy(const std::string& name, const WorldOptions& options,
                     const PolicyOptions& policy_options, const Seen& seen,
                     const std::function<void()>& day_done) {
  World world(options);
  const auto policy = make_policy(name, world, policy_options);
  std::vector<std::uint32_t> impressions, slate;
  std::vector<double> found;
  PolicyRun run;
  for (std::uint32_t day = 0; day < options.days; ++day) {
    run.reward.push_back(0);
    for (std::size_t tick = 0; tick < World::ticks; ++tick) {
      for (std::size_t item = world.advance(); item < world.items().size(); ++item)
        policy->add_item(world, static_cast<std::uint32_t>(item));
      policy->update(world.now());
      impressions.resize(world.items().size());
      found.resize(world.items().size(), -1);
      for (const World::Visit& visit : world.visits()) {
        policy->choose(visit, slate);
        const std::vector<bool> clicked = world.show(visit, slate);
        policy->learn(visit, slate, clicked);
        if (seen) seen(world, visit, slate, clicked);
        run.reward.back() += static_cast<double>(std::count(clicked.begin(), clicked.end(), true));
        for (const std::uint32_t item : slate)
          if (++impressions[item] == discovered_at)
            found[item] = static_cast<double>(visit.timestamp - world.items()[item].created) /
                          static_cast<double>(World::day);
      }
    }
    if (day_done) day_done();
  }
  std::vector<std::pair<double, std::size_t>> appeal;
  const std::int64_t last = world.start() + World::day * (options.days - options.days / 3);
  for (std::size_t i = options.items; i < world.items().size(); ++i)
    if (world.items()[i].created < last) appeal.emplace_back(world.appeal(i), i);
  std::sort(appeal.rbegin(), appeal.rend());
  run.good_items = (appeal.size() + 9) / 10;
  for (std::size_t rank = 0; rank < run.good_items; ++rank)
    if (const double days = found[appeal[rank].second]; days >= 0)
      run.days_to_discover.push_back(days);
  std::sort(run.days_to_discover.begin(), run.days_to_discover.end());
  return run;
}

Comparison compare(const std::vector<std::string>& policies, const WorldOptions& options,
                   double weight, std::uint32_t seeds, unsigned threads, Progress* progress) {
  std::vector<std::uint64_t> world_seeds;
  for (std::uint32_t s = 0; s < seeds; ++s) world_seeds.push_back(options.seed + s);
  std::vector<std::vector<PolicyRun>> runs(policies.size(), std::vector<PolicyRun>(seeds));
  const std::size_t all = policies.size() * seeds;
  const double all_days = static_cast<double>(all) * options.days;
  double done = 0;   // days
  std::mutex mutex;  // of done and progress
  for_each_parallel(all, threads, [&] {
    return [&](std::size_t job) {
      const std::size_t s = job / policies.size(), p = job % policies.size();
      WorldOptions world = options;
      world.seed = world_seeds[s];
      runs[p][s] = run_policy(policies[p], world, {.weight = weight, .seed = world.seed}, {}, [&] {
        if (!progress) return;
        const std::lock_guard lock{mutex};
        progress->update(++done / all_days,
                         "seed " + std::to_string(world.seed) + ", " + policies[p]);
      });
    };
  });
  return {options, weight, std::move(world_seeds), policies, std::move(runs)};
}

Estimate estimate(const std::vector<double>& values) {
  Estimate e;
  e.mean = mean_of(values);
  if (values.size() < 2) return e;
  // Student's 97.5 % quantile by its Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).
  const double z = normal_quantile, degrees = static_cast<double>(values.size()) - 1;
  const double z3 = z * z * z, z5 = z3 * z * z;
  const double t =
      z + (z3 + z) / (4 * degrees) + (5 * z5 + 16 * z3 + 3 * z) / (96 * degrees * degrees);
  e.half_width = t * standard_error(values);
  return e;
}

std::optional<std::vector<double>> over_best_other(const Comparison& c) {
  std::vector<double> best(c.seeds.size(), 0);
  for (std::size_t p = 1; p < c.policies.size(); ++p) {
    if (c.policies[p].starts_with("runtime")) continue;
    for (std::size_t s = 0; s < best.size(); ++s) best[s] = std::max(best[s], total(c.runs[p][s]));
  }
  if (best.empty() || best[0] == 0) return std::nullopt;
  return paired(rewards(c.runs[0]), best);
}

nlohmann::ordered_json to_json(const Comparison& c) {
  nlohmann::ordered_json out;
  out["scenario"] = c.world.scenario.name;
  out["users"] = c.world.users;
  out["items"] = c.world.items;
  out["new_items_per_day"] = c.world.scenario.new_items;
  out["days"] = c.world.days;
  out["slates_per_day"] = c.world.slates;
  out["exploration_weight"] = c.weight;
  out["seeds"] = c.seeds;
  if (const auto best = over_best_other(c)) out["first_policy_over_best_other"] = to_json(*best);
  for (std::size_t p = 0; p < c.policies.size(); ++p) {
    const auto& runs = c.runs[p];
    const Estimate reward = estimate(rewards(runs)), first = estimate(first_days(runs));
    nlohmann::ordered_json policy{{"policy", c.policies[p]},
                                  {"reward", reward.mean},
                                  {"reward_half_width", reward.half_width},
                                  {"first_day_reward", first.mean},
                                  {"first_day_reward_half_width", first.half_width},
                                  {"good_items_found", found_share(runs)},
                                  {"reward_by_seed", rewards(runs)},
                                  {"first_day_reward_by_seed", first_days(runs)}};
    const auto median = median_days(runs);
    policy["median_days_to_discover"] =
        median ? nlohmann::ordered_json(*median) : nlohmann::ordered_json();
    if (p > 0) {
      policy["first_policy_over_this"] = to_json(paired(rewards(c.runs[0]), rewards(runs)));
      policy["first_policy_over_this_on_first_day"] =
          to_json(paired(first_days(c.runs[0]), first_days(runs)));
    }
    out["policies"].push_back(std::move(policy));
  }
  return out;
}

void print_text(const Comparison& c) {
  std::printf(
      "%s: %u users, %u items and %u new ones a day, %u days of %u slates of %zu, %zu seeds, "
      "weight %g\n",
      c.world.scenario.name.c_str(), c.world.users, c.world.items, c.world.scenario.new_items,
      c.world.days, c.world.slates, World::slate_length, c.seeds.size(), c.weight);
  std::printf("%-24s %18s %16s %22s %8s %7s\n", "", "reward", "first day",
              (c.policies[0] + " / this").c_str(), "found", "days");
  for (std::size_t p = 0; p < c.policies.size(); ++p) {
    const auto& runs = c.runs[p];
    const Estimate reward = estimate(rewards(runs)), first = estimate(first_days(runs));
    std::printf("%-24s %10.0f +- %4.0f %9.0f +- %3.0f", c.policies[p].c_str(), reward.mean,
                reward.half_width, first.mean, first.half_width);
    if (p > 0) {
      const std::vector<double> ratios = paired(rewards(c.runs[0]), rewards(runs));
      std::printf(" %8.3f (least %5.3f)", estimate(ratios).mean,
                  *std::min_element(ratios.begin(), ratios.end()));
    } else {
      std::printf(" %22s", "");
    }
    const auto median = median_days(runs);
    std::printf(" %6.1f %% %7s\n", 100 * found_share(runs),
                median ? fixed(*median, 2).c_str() : "-");
  }
  if (const auto best = over_best_other(c)) {
    const Estimate ratio = estimate(*best);
    std::printf("%s / best other policy of the same seed: %.3f +- %.3f (least %.3f)\n",
                c.policies[0].c_str(), ratio.mean, ratio.half_width,
                *std::min_element(best->begin(), best->end()));
  }
  std::printf(
      "found: good new items (highest tenth by appeal) with 100 impressions; days: until half of "
      "them were\n");
  std::fflush(stdout);
}

std::string to_svg(const Comparison& c) {
  const double days = c.world.days;
  // No item of the world is older than its days.
  const double oldest = std::min(days, 10.0);
  std::vector<std::vector<std::pair<double, double>>> rewards_by_day, found_by_age;
  double most = 1;
  for (const auto& runs : c.runs) {
    std::vector<std::pair<double, double>> by_day{{0, 0}}, by_age{{0, 0}};
    for (std::uint32_t day = 0; day < c.world.days; ++day) {
      double sum = 0;
      for (const PolicyRun& run : runs) sum += run.reward[day] / static_cast<double>(runs.size());
      by_day.emplace_back(day + 1.0, by_day.back().second + sum);
    }
    double good = 0;
    for (const PolicyRun& run : runs) good += static_cast<double>(run.good_items);
    for (int part = 1; part <= 100; ++part) {
      const double age = oldest * part / 100;
      double found = 0;
      for (const PolicyRun& run : runs)
        found += static_cast<double>(
            std::upper_bound(run.days_to_discover.begin(), run.days_to_discover.end(), age) -
            run.days_to_discover.begin());
      by_age.emplace_back(age, good > 0 ? found / good : 0);
    }
    most = std::max(most, by_day.back().second);
    rewards_by_day.push_back(std::move(by_day));
    found_by_age.push_back(std::move(by_age));
  }
  const Panel reward{
      "Cumulative clicks",      "day", "clicks", Axis(days, 1, false), Axis(most, 1, true),
      std::move(rewards_by_day)};
  const Panel discovery{"Good new items discovered", "days since arrival", "share",
                        Axis(oldest, 0, false),      Axis(1, 0, true),     std::move(found_by_age)};
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out << "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 1150 400' "
         "font-family='sans-serif' font-size='12'>\n<rect width='1150' height='400' "
         "fill='white'/>\n";
  draw(out, reward, 80);
  draw(out, discovery, 540);
  for (std::size_t p = 0; p < c.policies.size(); ++p) {
    const double at = 60 + 20 * static_cast<double>(p);
    out << "<line x1='945' x2='965' y1='" << at - 4 << "' y2='" << at - 4
        << "' stroke-width='3' stroke='" << colours[p % colours.size()] << "'/>\n<text x='970' y='"
        << at << "'>" << c.policies[p] << "</text>\n";
  }
  out << "</svg>\n";
  return out.str();
}

}  // namespace personalize::tools
