// More users than memory has room for: those who leave it are kept in SQLite, and come back with
// the next request. The state file and the journal have the others. usage: sqlite_users MODEL.pzm
// FOLDER USERS.db [COUNT]
#include <sqlite3.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "personalize_runtime.hpp"

namespace pz = personalize;

static int fail(const std::string& message) {
  std::fprintf(stderr, "sqlite_users: %s\n", message.c_str());
  return 1;
}

// Blobs of users and sessions. Called by any thread that has a request to answer.
class Store {
 public:
  explicit Store(const std::string& path) {
    ok_ = sqlite3_open(path.c_str(), &db_) == SQLITE_OK &&
          // A write does not wait for the disk: what a power cut takes, the journal has.
          run("PRAGMA journal_mode=WAL") && run("PRAGMA synchronous=NORMAL") &&
          run("CREATE TABLE IF NOT EXISTS users (user TEXT, session TEXT, blob BLOB, "
              "PRIMARY KEY (user, session))") &&
          prepare("INSERT OR REPLACE INTO users VALUES (?1, ?2, ?3)", put_) &&
          prepare("SELECT blob FROM users WHERE user = ?1 AND session = ?2", get_) &&
          prepare("DELETE FROM users WHERE user = ?1 AND session = ?2", remove_);
  }
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;
  ~Store() {
    for (sqlite3_stmt* statement : {put_, get_, remove_}) sqlite3_finalize(statement);
    sqlite3_close(db_);
  }
  bool ok() const { return ok_; }
  std::string error() const { return sqlite3_errmsg(db_); }

  void put(std::string_view user, std::string_view session, std::span<const std::byte> blob) {
    const std::lock_guard lock{mutex_};
    name(put_, user, session);
    sqlite3_bind_blob64(put_, 3, blob.data(), blob.size(), SQLITE_STATIC);
    ++(sqlite3_step(put_) == SQLITE_DONE ? left : failed);
    sqlite3_reset(put_);
  }
  bool get(std::string_view user, std::string_view session, std::vector<std::byte>& blob) {
    const std::lock_guard lock{mutex_};
    name(get_, user, session);
    const bool there = sqlite3_step(get_) == SQLITE_ROW;
    if (there) {
      const auto* const bytes = static_cast<const std::byte*>(sqlite3_column_blob(get_, 0));
      blob.assign(bytes, bytes + sqlite3_column_bytes(get_, 0));
      ++found;
    }
    sqlite3_reset(get_);
    return there;
  }
  void remove(std::string_view user, std::string_view session) {
    const std::lock_guard lock{mutex_};
    name(remove_, user, session);
    if (sqlite3_step(remove_) != SQLITE_DONE) ++failed;
    sqlite3_reset(remove_);
  }

  std::atomic<int> left{0}, found{0}, failed{0};

 private:
  bool run(const char* text) { return sqlite3_exec(db_, text, nullptr, nullptr, nullptr) == 0; }
  bool prepare(const char* text, sqlite3_stmt*& statement) {
    return sqlite3_prepare_v2(db_, text, -1, &statement, nullptr) == SQLITE_OK;
  }
  static void name(sqlite3_stmt* statement, std::string_view user, std::string_view session) {
    const auto text = [&](int place, std::string_view id) {
      sqlite3_bind_text(statement, place, id.empty() ? "" : id.data(), int(id.size()),
                        SQLITE_STATIC);
    };
    text(1, user);
    text(2, session);
  }

  std::mutex mutex_;
  sqlite3* db_ = nullptr;
  sqlite3_stmt *put_ = nullptr, *get_ = nullptr, *remove_ = nullptr;
  bool ok_ = false;
};

int main(int argc, char** argv) {
  if (argc < 4 || argc > 5) {
    std::fputs("usage: sqlite_users MODEL.pzm FOLDER USERS.db [COUNT]\n", stderr);
    return 2;
  }
  auto model = pz::Model::load(argv[1]);
  if (!model) return fail(model.error().message);
  const int count = argc == 5 ? std::atoi(argv[4]) : 2000;
  Store store(argv[3]);  // outlives the recommender
  if (!store.ok()) return fail(std::string(argv[3]) + ": " + store.error());
  auto recommender = pz::Recommender::open(
      argv[2], *model,
      {.user_bytes = 256 << 10,  // so little that it happens here
       .exploration_weight = 0,
       .on_evict = [&](auto user, auto session, auto blob) { store.put(user, session, blob); },
       .find_user = [&](auto user, auto session,
                        auto& blob) { return store.get(user, session, blob); }});
  if (!recommender) return fail(recommender.error().message);

  for (int u = 0; u < count; ++u) {
    const std::string user = "user" + std::to_string(u);
    const std::string item(
        (*model)->item_id(std::uint32_t(std::size_t(u) % (*model)->item_count())));
    auto recorded = recommender->record({.user = user, .item = item, .event_type = "click"});
    if (!recorded) return fail(recorded.error().message);
  }
  std::printf("%d users clicked: %zu are in memory, %d went to SQLite\n", count,
              recommender->user_count(), store.left.load());

  int known = 0;
  for (int u = 0; u < count; ++u) {
    auto slate = recommender->recommend({.user = "user" + std::to_string(u), .count = 5});
    if (!slate) return fail(slate.error().message);
    known += !slate->items.empty() && slate->items[0].reason == pz::Reason::relevance;
  }
  std::printf("%d of %d slates were made for who asked; %d users came back from SQLite\n", known,
              count, store.found.load());

  // To forget somebody takes both; twice, for who asks in between brings them back.
  recommender->forget("user0");
  store.remove("user0", {});
  recommender->forget("user0");
  auto slate = recommender->recommend({.user = "user0", .count = 5});
  if (!slate) return fail(slate.error().message);
  std::printf("user0 is forgotten: their slate is of %s items\n",
              slate->items.empty() ? "no" : std::string(pz::name(slate->items[0].reason)).c_str());
  return store.failed == 0 ? 0 : fail(std::string(argv[3]) + ": " + store.error());
}
