// The `personalize` command: one subcommand a folder. Built twice: libtorch takes half a second and
// 100 MB to load, so what needs it is in personalize-train, which `personalize train` becomes.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <new>
#include <string>
#include <string_view>

#include "command/command.hpp"
#include "convert/convert.hpp"
#include "evaluate/evaluate.hpp"
#include "inspect/inspect.hpp"
#include "personalize_runtime.hpp"
#include "recommend/recommend.hpp"
#include "simulate/simulate.hpp"
#include "train/train.hpp"

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

#ifdef PERSONALIZE_TRAINER_PROGRAM
// Goes on as the program that can train; it lies beside this one.
void become_trainer(char** argv) {
  const std::filesystem::path self = std::filesystem::canonical("/proc/self/exe");
  const std::string trainer = self.parent_path() / PERSONALIZE_TRAINER_PROGRAM;
  ::execv(trainer.c_str(), argv);
  throw personalize::tools::Failure(trainer + ": cannot run: " + std::strerror(errno));
}
#endif

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
#else
#ifdef PERSONALIZE_TRAINER_PROGRAM
    app.add_subcommand("train", train_description);
    if (argc > 1 && std::string_view(argv[1]) == "train") become_trainer(argv);
#endif
    add_evaluate(app);
    add_recommend(app);
    add_inspect(app);
    add_convert(app);
    add_simulate(app);
#endif
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
