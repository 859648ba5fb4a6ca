// The `personalize` command: one subcommand a folder.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <new>
#include <string>

#include "command/command.hpp"
#include "convert/convert.hpp"
#include "evaluate/evaluate.hpp"
#include "inspect/inspect.hpp"
#include "personalize_runtime.hpp"
#include "recommend/recommend.hpp"
#include "simulate/simulate.hpp"
#ifdef PERSONALIZE_TRAINER
#include "train/train.hpp"
#endif

namespace {

int fail(const CLI::App& app, int status, const std::string& text) {
  const auto chosen = app.get_subcommands();
  const std::string command =
      chosen.empty() ? "personalize" : "personalize " + chosen[0]->get_name();
  const std::string line = text.substr(0, text.find('\n'));
  std::fprintf(stderr, "%s: %s%s\n", command.c_str(), line.c_str(),
               status == 2 ? (" (see " + command + " --help)").c_str() : "");
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace personalize::tools;
  CLI::App app{"Train, measure and inspect recommendation models for personalize_runtime.hpp",
               "personalize"};
  app.set_version_flag("--version", "personalize " + std::to_string(PERSONALIZE_VERSION_MAJOR) +
                                        "." + std::to_string(PERSONALIZE_VERSION_MINOR) + "." +
                                        std::to_string(PERSONALIZE_VERSION_PATCH));
  app.require_subcommand(1);
  try {
#ifdef PERSONALIZE_TRAINER
    add_train(app);
#endif
    add_evaluate(app);
    add_recommend(app);
    add_inspect(app);
    add_convert(app);
    add_simulate(app);
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::Success& help) {  // --help, --version
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    return fail(app, 2, error.what());
  } catch (const Usage& error) {
    return fail(app, 2, error.what());
  } catch (const std::bad_alloc&) {
    return fail(app, 1, "out of memory");
  } catch (const std::exception& error) {
    return fail(app, 1, error.what());
  }
}
