// What becomes of a folder where any one call of the system fails, the disk is full, memory runs
// out, or the process ends in the middle of things. A program of its own: it stands between the
// library and the system's files, and replaces operator new.
#include <dlfcn.h>
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "small_model.hpp"
#include "temporary_folder.hpp"

namespace fs = std::filesystem;
namespace pz = personalize;

namespace {

// ---- what fails: of the calls that this thread makes while it is armed

enum class Kind { input, output, remove };
thread_local bool armed = false;
thread_local int calls = 0, fail_at = 0;  // the how-manieth fails; 0: none
thread_local bool full = false;           // and from then on all that take space do
thread_local int fault = EIO;
thread_local bool halves = false;  // the write before was taken in part
thread_local std::string* first_failed = nullptr;
thread_local std::vector<const char*>* called = nullptr;  // all that were made
thread_local std::function<void()>* at_call = nullptr;
thread_local std::int64_t allocations = 0, fail_allocation_at = 0;

bool fails(const char* name, Kind kind) {
  if (!armed) return false;
  ++calls;
  if (called) {
    armed = false;
    called->push_back(name);
    armed = true;
  }
  if (at_call) {
    armed = false;
    (*at_call)();
    armed = true;
  }
  const bool takes_space = kind == Kind::output;
  if (fail_at == 0 || calls < fail_at || (full ? !takes_space : calls != fail_at)) return false;
  if (first_failed && first_failed->empty()) {
    armed = false;
    *first_failed = name;
    armed = true;
  }
  errno = fault;
  return true;
}

template <class Function>
Function next_of(Function, const char* name) {
  return reinterpret_cast<Function>(::dlsym(RTLD_NEXT, name));
}
#define NEXT(name)                                    \
  (*[] {                                              \
    static const auto next = next_of(&::name, #name); \
    return next;                                      \
  }())

bool is_file(int descriptor) {
  struct stat status {};
  return descriptor > 2 && ::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
}

}  // namespace

extern "C" {
int open(const char* path, int flags, ...) {
  std::va_list rest;
  va_start(rest, flags);
  const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  if (fails("open", (flags & O_CREAT) != 0 ? Kind::output : Kind::input)) return -1;
  return static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}
ssize_t write(int descriptor, const void* bytes, std::size_t size) {
  if (armed && is_file(descriptor)) {
    // A part of what it is given, then the error.
    const bool fail = halves || fails("write", Kind::output);
    if (fail && !halves && size > 1) {
      halves = true;
      return ::syscall(SYS_write, descriptor, bytes, size / 2);
    }
    halves = false;
    if (fail) {
      errno = fault;
      return -1;
    }
  }
  return ::syscall(SYS_write, descriptor, bytes, size);
}
// Nothing here ends with a power cut.
int fsync(int) { return fails("fsync", Kind::output) ? -1 : 0; }
int fdatasync(int) { return fails("fdatasync", Kind::output) ? -1 : 0; }
int ftruncate(int descriptor, off_t size) noexcept {
  if (fails("ftruncate", Kind::input)) return -1;
  return static_cast<int>(::syscall(SYS_ftruncate, descriptor, size));
}
int flock(int descriptor, int operation) noexcept {
  if (fails("flock", Kind::input)) return -1;
  return static_cast<int>(::syscall(SYS_flock, descriptor, operation));
}
int mkdir(const char* path, mode_t mode) noexcept {
  if (fails("mkdir", Kind::output)) return -1;
  return static_cast<int>(::syscall(SYS_mkdirat, AT_FDCWD, path, mode));
}
int rename(const char* from, const char* to) noexcept {
  if (fails("rename", Kind::output)) return -1;
  return NEXT(rename)(from, to);
}
int remove(const char* path) noexcept {
  if (fails("remove", Kind::remove)) return -1;
  return NEXT(remove)(path);
}
FILE* fopen(const char* path, const char* mode) {
  if (fails("fopen", Kind::input)) return nullptr;
  return NEXT(fopen)(path, mode);
}
FILE* fdopen(int descriptor, const char* mode) noexcept {
  if (fails("fdopen", Kind::input)) return nullptr;
  return NEXT(fdopen)(descriptor, mode);
}
std::size_t fread(void* bytes, std::size_t size, std::size_t count, FILE* file) {
  if (fails("fread", Kind::input)) {
    file->_flags |= 0x20;  // what glibc's ferror() looks at
    return 0;
  }
  return NEXT(fread)(bytes, size, count, file);
}
std::size_t fwrite(const void* bytes, std::size_t size, std::size_t count, FILE* file) {
  if (armed && fails("fwrite", Kind::output)) return NEXT(fwrite)(bytes, size, count / 2, file);
  return NEXT(fwrite)(bytes, size, count, file);
}
int fflush(FILE* file) {
  if (armed && fails("fflush", Kind::output)) return EOF;
  return NEXT(fflush)(file);
}
int fseeko(FILE* file, off_t offset, int from) {
  if (fails("fseeko", Kind::input)) return -1;
  return NEXT(fseeko)(file, offset, from);
}
int fclose(FILE* file) {
  const bool fail = fails("fclose", Kind::output);
  const int closed = NEXT(fclose)(file);
  if (!fail) return closed;
  errno = fault;
  return EOF;
}
}

// ---- memory

namespace {
void* allocate(std::size_t size, std::size_t alignment) {
  if (armed && ++allocations == fail_allocation_at) throw std::bad_alloc();
  void* const p = std::aligned_alloc(alignment, (size + alignment) / alignment * alignment);
  if (!p) throw std::bad_alloc();
  return p;
}
}  // namespace

void* operator new(std::size_t size) { return allocate(size, 16); }
void* operator new[](std::size_t size) { return allocate(size, 16); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
// The library asks this way only where it can do without (std::stable_sort).
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  const bool was = std::exchange(armed, false);
  void* const p = operator new(size);
  armed = was;
  return p;
}
// Not inlined: g++ would take free() for the wrong way to give back what operator new returned.
#define GIVES_BACK [[gnu::noinline]] void
GIVES_BACK operator delete(void* p) noexcept { std::free(p); }
GIVES_BACK operator delete[](void* p) noexcept { std::free(p); }
GIVES_BACK operator delete(void* p, std::size_t) noexcept { std::free(p); }
GIVES_BACK operator delete[](void* p, std::size_t) noexcept { std::free(p); }
GIVES_BACK operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
GIVES_BACK operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
GIVES_BACK operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
GIVES_BACK operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace {

// ---- what is tried

constexpr std::int64_t now = 1'700'000'000;

const std::shared_ptr<const pz::Model>& model() {
  static const auto made = small_model::model({.items = 6, .dimension = 3, .hidden = 2});
  return made;
}
const std::shared_ptr<const pz::Model>& other_model() {
  static const auto made = small_model::model({.items = 7, .dimension = 3, .hidden = 2, .seed = 2});
  return made;
}

pz::RecommenderOptions options() {
  pz::RecommenderOptions options;
  options.clock = [] { return now; };
  options.updates = pz::Updates::by_caller;
  options.recommendation_key = {{1, 2}};
  options.slate_log_bytes = options.context_bytes = 1 << 16;
  options.remembered_slates = 8;
  options.remembered_event_ids = 4096;
  options.journal_bytes = 1 << 16;
  options.durability = pz::Durability::each_call;
  return options;
}

using Shop = std::unique_ptr<pz::Recommender>;

Shop open(const std::string& folder, const std::shared_ptr<const pz::Model>& of = model()) {
  auto shop = pz::Recommender::open(folder, of, options());
  REQUIRE_MESSAGE(shop, (shop ? "" : shop.error().message));
  return std::make_unique<pz::Recommender>(std::move(*shop));
}

using Image = std::map<std::string, std::string>;
Image image_of(const std::string& folder) {
  Image image;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().filename() != "lock")
      image[entry.path().filename().string()] = bytes_of(entry.path().string());
  return image;
}
void lay_down(const Image& image, const std::string& folder) {
  fs::remove_all(folder);
  fs::create_directory(folder);
  for (const auto& [name, bytes] : image)
    std::ofstream(folder + "/" + name, std::ios::binary) << bytes;
}

// What is known of all users and items, bit for bit.
std::string contents_of(pz::Recommender& shop) {
  std::string text =
      std::to_string(shop.user_count()) + " " + std::to_string(shop.item_count()) + "\n";
  const auto add = [&](auto value) {
    text.append(reinterpret_cast<const char*>(&value), sizeof value);
  };
  for (const char* user : {"u0", "u1", "u2", "guest"})
    for (const char* item : {"i0", "i2", "i4", "new"}) {
      const auto parts = shop.explain({.user = user}, item);
      if (!parts) {
        text += parts.error().message;
        continue;
      }
      for (const float part : {parts->score, parts->relevance, parts->quality, parts->taste,
                               parts->discount, parts->uncertainty})
        add(part);
      add(parts->positive);
      add(parts->expected);
    }
  return text;
}

struct Done {
  std::optional<pz::Error> error;
  bool durable = true;  // where it worked: what it did is to be there after a crash
};
template <class T>
Done done(const pz::Result<T>& result) {
  return result ? Done{} : Done{result.error()};
}

struct Operation {
  const char* name;
  std::function<Done(pz::Recommender&)> act;
  bool grown = false;  // begins with a journal that is to be compacted
  std::shared_ptr<const pz::Model> after = {};
};

const std::vector<Operation>& operations() {
  static std::vector<std::byte> guest = [] {
    auto shop = pz::Recommender::create(model(), options());
    if (!shop || !shop->record({.user = "guest", .item = "i1"})) std::abort();
    return *shop->export_user("guest");
  }();
  static const std::vector<Operation> all{
      {"an event",
       [](pz::Recommender& shop) {
         return done(shop.record({.user = "u1", .item = "i2", .event_id = "later"}));
       }},
      {"a slate",
       [](pz::Recommender& shop) {
         const auto slate = shop.recommend({.user = "u1", .count = 3});
         if (!slate) return done(slate);
         return Done{{}, !slate->id.empty()};  // one without an id need not be known
       }},
      {"a session that becomes a user's",
       [](pz::Recommender& shop) { return done(shop.merge_session("visitor", "u1")); }},
      {"a user who is forgotten",
       [](pz::Recommender& shop) {
         return Done{{}, shop.forget("u2")};
       }},
      {"an item that is put",
       [](pz::Recommender& shop) {
         static const pz::NewItem item{.item = "new", .fields = {{"GENRE", "bow"}}};
         return done(shop.put_item(item));
       }},
      {"an item that is removed",
       [](pz::Recommender& shop) { return done(shop.remove_item("i4")); }},
      {"a user who comes in", [](pz::Recommender& shop) { return done(shop.import_user(guest)); }},
      {"an update",
       [](pz::Recommender& shop) {
         auto updated = done(shop.update());
         updated.durable = false;  // it has no acknowledgement: another one follows
         return updated;
       }},
      {"a save", [](pz::Recommender& shop) { return done(shop.save()); }},
      {"an update that compacts the journal",
       [](pz::Recommender& shop) {
         auto updated = done(shop.update());
         updated.durable = false;
         return updated;
       },
       true},
      {"a swap",
       [](pz::Recommender& shop) {
         const auto swapped = shop.swap(other_model());
         if (!swapped) return done(swapped);
         return Done{{}, !swapped->save_error};
       },
       false, other_model()},
  };
  return all;
}

// A folder with a state and a journal; what is acknowledged in it has these event ids.
constexpr std::array<const char*, 3> acknowledged{"first", "second", "third"};
Image begin(const std::string& folder, bool grown) {
  auto shop = open(folder);
  REQUIRE(shop->record({.user = "u0", .item = "i1", .event_id = "first"}));
  REQUIRE(shop->recommend({.user = "u0", .count = 3}));
  REQUIRE(shop->save());
  REQUIRE(shop->record({.user = "u1", .item = "i1", .event_id = "second"}));
  REQUIRE(shop->record({.session = "visitor", .item = "i5"}));
  REQUIRE(shop->record({.user = "u2", .item = "i0", .event_id = "third"}));
  const std::string long_id(256, 'x');
  for (int n = 0; grown && n < 200; ++n)
    REQUIRE(shop->record({.user = "u2", .session = long_id, .item = "i3"}));
  return image_of(folder);
}

bool is_known(pz::Recommender& shop, const pz::Interaction& event) {
  const auto again = shop.record(event);
  return again && *again == pz::Recorded::duplicate;
}
std::string knows(pz::Recommender& shop, std::string_view event_id) {
  const std::string_view user = event_id == "first" ? "u0" : event_id == "third" ? "u2" : "u1";
  return is_known(shop, {.user = user, .item = "i1", .event_id = event_id})
             ? ""
             : std::string(event_id) + " is not known";
}

void disarm() {
  armed = full = halves = false;
  fail_at = calls = 0;
  fail_allocation_at = allocations = 0;
  at_call = nullptr;
  called = nullptr;
  fault = EIO;
}
struct Armed {
  explicit Armed(std::string* failed = nullptr) {
    calls = 0;
    allocations = 0;
    first_failed = failed;
    armed = true;
  }
  ~Armed() { armed = false; }
};

// A copy of the folder, opened: none where that fails, which is told.
Shop opened_copy(const Image& image, const std::string& folder,
                 const std::shared_ptr<const pz::Model>& of) {
  lay_down(image, folder);
  auto shop = pz::Recommender::open(folder, of, options());
  CHECK_MESSAGE(shop, (shop ? "" : shop.error().message));
  return shop ? std::make_unique<pz::Recommender>(std::move(*shop)) : nullptr;
}

enum class Fault { once, full_disk, memory };

// Whether the n-th call was reached.
bool try_operation(const Operation& operation, const Image& image, Fault kind, int n,
                   const TemporaryFolder& folder) {
  const std::string live = folder.file("live"), copy = folder.file("copy");
  lay_down(image, live);
  auto shop = open(live);
  const std::string before = contents_of(*shop);
  std::string failed;
  Done outcome;
  fault = kind == Fault::full_disk ? ENOSPC : EIO;
  full = kind == Fault::full_disk;
  if (kind == Fault::memory)
    fail_allocation_at = n;
  else
    fail_at = n;
  {
    const Armed arm{&failed};
    outcome = operation.act(*shop);
  }
  const bool reached = kind == Fault::memory ? allocations >= n : calls >= n && !failed.empty();
  if (!failed.empty()) INFO(failed << " fails");
  if (outcome.error) {
    CHECK(outcome.error->code == (kind == Fault::memory ? pz::Errc::out_of_memory : pz::Errc::io));
    if (kind != Fault::memory) {
      CHECK_MESSAGE(outcome.error->message.find(live) == 0, outcome.error->message);
      CHECK_MESSAGE(outcome.error->message.find(std::strerror(fault)) != std::string::npos,
                    outcome.error->message);
    }
  }
  // It goes on serving while the fault lasts, and learns in memory.
  std::optional<pz::Recorded> learned;
  bool refused = false;
  {
    const Image left = image_of(live);
    fail_allocation_at = 0;
    if (full)
      fail_at = 1;
    else
      fail_at = 0;
    const Armed arm{nullptr};
    const auto slate = shop->recommend({.user = "u0", .count = 3});
    const auto recorded = shop->record({.user = "u0", .item = "i3", .event_id = "meanwhile"});
    armed = false;
    REQUIRE(slate);
    CHECK(slate->items.size() == 3);
    if (recorded) learned = *recorded;
    refused = !recorded;
    if (full) CHECK(refused);
    // The folder as it lay then can be opened by either model, and has all that was acknowledged.
    std::vector<std::shared_ptr<const pz::Model>> models{model()};
    if (operation.after) models.push_back(operation.after);
    for (const auto& of : models)
      if (auto again = opened_copy(left, copy, of)) {
        for (const char* id : acknowledged) CHECK(knows(*again, id) == "");
        if (!outcome.error && outcome.durable && operation.name == std::string_view("an event"))
          CHECK(knows(*again, "later") == "");
      }
  }
  disarm();
  // The fault is over. An event that comes now is durable, unless the journal is broken; then a
  // save mends it.
  const auto recorded = shop->record({.user = "u0", .item = "i4", .event_id = "afterwards"});
  if (!recorded || refused) {
    const auto saved = shop->save();
    REQUIRE_MESSAGE(saved, (saved ? "" : saved.error().message));
  }
  CHECK(is_known(*shop, {.user = "u0", .item = "i4", .event_id = "afterwards"}));
  CHECK(shop->persistence().durable);
  const std::string after = contents_of(*shop);
  const auto served = shop->model();
  const bool is_other = operation.after && shop->find_item("i6");
  if (auto again = opened_copy(image_of(live), copy, is_other ? operation.after : model())) {
    if (!is_other || !again->recovery().other_model) CHECK(contents_of(*again) == after);
    for (const char* id : acknowledged) CHECK(knows(*again, id) == "");
    for (const char* id : {"meanwhile", "afterwards"})
      CHECK(is_known(*again, {.user = "u0", .item = "i4", .event_id = id}));
  }
  // And with a save there is nothing left of the fault.
  const auto saved = shop->save();
  REQUIRE_MESSAGE(saved, (saved ? "" : saved.error().message));
  CHECK(shop->persistence().durable);
  CHECK_FALSE(shop->persistence().error);
  CHECK(image_of(live).size() == 2);
  shop.reset();
  CHECK(contents_of(*open(live, is_other ? operation.after : model())) == after);
  return reached;
}

// Whether all are tried; else of rows of calls that are alike, and of allocations, some.
bool tries_all() { return std::getenv("PERSONALIZE_EVERY_FAULT") != nullptr; }

// The calls or allocations to be tried of an operation.
std::vector<int> places(const Operation& operation, const Image& image, Fault kind,
                        const TemporaryFolder& folder) {
  const std::string live = folder.file("live");
  lay_down(image, live);
  auto shop = open(live);
  std::vector<const char*> names;
  called = &names;
  {
    const Armed arm;
    REQUIRE_FALSE(operation.act(*shop).error);
  }
  const auto allocated = static_cast<int>(allocations);
  disarm();
  std::vector<int> chosen;
  const int count = kind == Fault::memory ? allocated : static_cast<int>(names.size());
  std::map<std::string_view, int> of_name, before;
  for (const char* name : names) ++of_name[name];
  for (int n = 1; n <= count + 1; ++n) {
    bool alike = n > 20 && n < count && n % 7 != 0;
    if (kind != Fault::memory && n <= count) {
      const char* const name = names[static_cast<std::size_t>(n) - 1];
      const int of_these = ++before[name];
      alike = of_these > 12 && of_these < of_name[name] - 4 && of_these % 31 != 0;
    }
    if (tries_all() || !alike) chosen.push_back(n);
  }
  return chosen;
}

void try_all(Fault kind) {
  for (const Operation& operation : operations()) {
    CAPTURE(std::string(operation.name));
    disarm();
    const TemporaryFolder folder;
    const Image image = begin(folder.file("first"), operation.grown);
    const std::vector<int> all = places(operation, image, kind, folder);
    int reached = 0;
    for (const int n : all) {
      CAPTURE(n);
      reached += try_operation(operation, image, kind, n, folder);
    }
    // The last one lies behind the last call. Some fail only where they are reached.
    CHECK(reached > 0);
    if (operation.name == std::string_view("a save")) CHECK(reached > 10);
  }
}

}  // namespace

TEST_CASE("any one call of the system may fail: nothing acknowledged is lost, service goes on") {
  try_all(Fault::once);
}

TEST_CASE("the disk may be full from any call on: nothing acknowledged is lost, service goes on") {
  try_all(Fault::full_disk);
}

TEST_CASE("any one allocation may fail: nothing acknowledged is lost, service goes on") {
  try_all(Fault::memory);
}

// The other model has an item of its own, whose number is that of one that was put.
TEST_CASE("events are on their items where a disk fails while another model opens the folder") {
  disarm();
  const TemporaryFolder folder;
  const std::string live = folder.file("live"), copy = folder.file("copy");
  lay_down(begin(folder.file("first"), false), live);
  {
    auto shop = open(live);
    for (const char* item : {"new", "newer"}) REQUIRE(shop->put_item({.item = item}));
    REQUIRE(shop->update());
    REQUIRE(shop->record({.user = "u1", .item = "newer", .timestamp = now - 9}));
  }
  const Image image = image_of(live);
  const auto users_of = [](const pz::Recommender& shop) {
    std::string text;
    for (const char* user : {"u0", "u1", "u2"}) {
      const auto blob = shop.export_user(user);
      REQUIRE(blob);
      text.append(reinterpret_cast<const char*>(blob->data()), blob->size());
    }
    return text;
  };
  int opened = 0, unsaved = 0;
  for (const int errors : {ENOSPC, EIO})
    for (int n = 1;; n += tries_all() || n < 100 ? 1 : 23) {
      CAPTURE(errors);
      CAPTURE(n);
      lay_down(image, live);
      fault = errors;
      full = errors == ENOSPC;
      fail_at = n;
      std::string failed;
      Shop shop;
      {
        const Armed arm{&failed};
        auto result = pz::Recommender::open(live, other_model(), options());
        armed = false;
        if (result) shop = std::make_unique<pz::Recommender>(std::move(*result));
      }
      disarm();
      if (!shop) {
        CHECK(!failed.empty());
        shop = open(live, other_model());
      } else {
        ++opened;
        unsaved += shop->persistence().saves == 0;
      }
      for (const char* item : {"new", "newer", "i6", "i5"})
        REQUIRE(shop->record({.user = "u2", .item = item, .timestamp = now - 5}));
      REQUIRE(shop->put_item({.item = "newest"}));
      REQUIRE(shop->update());
      REQUIRE(shop->record({.user = "u2", .item = "newest", .timestamp = now - 4}));
      const auto again = opened_copy(image_of(live), copy, other_model());
      REQUIRE(again);
      CHECK(users_of(*again) == users_of(*shop));
      CHECK(opened_copy(image_of(live), copy, model()));
      if (failed.empty()) break;
    }
  CHECK(opened > 20);
  CHECK(unsaved > 10);
}

TEST_CASE("a process that ends at any call of the system leaves a folder that has all of before") {
  for (const Operation& operation : operations()) {
    CAPTURE(std::string(operation.name));
    disarm();
    const TemporaryFolder folder;
    const std::string live = folder.file("live"), copy = folder.file("copy");
    lay_down(begin(folder.file("first"), operation.grown), live);
    auto shop = open(live);
    const std::string before = contents_of(*shop);
    std::vector<Image> images;
    std::function<void()> look = [&] {
      if (images.empty() || images.back() != image_of(live)) images.push_back(image_of(live));
    };
    at_call = &look;
    {
      const Armed arm;
      REQUIRE_FALSE(operation.act(*shop).error);
    }
    disarm();
    images.push_back(image_of(live));
    const std::string after = contents_of(*shop);
    for (std::size_t i = 0; i < images.size(); ++i) {
      CAPTURE(i);
      const bool last = i + 1 == images.size();
      std::vector<std::shared_ptr<const pz::Model>> models{model()};
      if (operation.after) models.push_back(operation.after);
      for (const auto& of : models)
        if (auto again = opened_copy(images[i], copy, of)) {
          if (!operation.after) {
            const std::string contents = contents_of(*again);
            CHECK((contents == before || contents == after));
            if (last) CHECK(contents == after);
          }
          for (const char* id : acknowledged) CHECK(knows(*again, id) == "");
        }
    }
  }
}

TEST_CASE(
    "where any one call or allocation of opening fails, it says so, and the next time opens") {
  for (const Fault kind : {Fault::once, Fault::full_disk, Fault::memory})
    for (const bool empty : {false, true}) {
      CAPTURE(static_cast<int>(kind));
      CAPTURE(empty);
      disarm();
      const TemporaryFolder folder;
      const std::string live = folder.file("live");
      const Image image = empty ? Image{} : begin(folder.file("first"), false);
      lay_down(image, live);
      const std::string contents = contents_of(*open(live));
      int n = 1;
      for (bool reached = true; reached; n += tries_all() || n < 20 ? 1 : 3) {
        CAPTURE(n);
        lay_down(image, live);
        std::string failed;
        fault = kind == Fault::full_disk ? ENOSPC : EIO;
        full = kind == Fault::full_disk;
        if (kind == Fault::memory)
          fail_allocation_at = n;
        else
          fail_at = n;
        std::optional<pz::Result<pz::Recommender>> shop;
        {
          const pz::RecommenderOptions chosen = options();
          const Armed arm{&failed};
          shop.emplace(pz::Recommender::open(live, model(), chosen));
        }
        reached = kind == Fault::memory ? allocations >= n : !failed.empty();
        disarm();
        INFO(failed);
        if (*shop) {
          CHECK(contents_of(**shop) == contents);
          CHECK((*shop)->save());
        } else if (kind == Fault::memory) {
          CHECK(shop->error().code == pz::Errc::out_of_memory);
        } else {
          CHECK_MESSAGE(shop->error().code == pz::Errc::io, shop->error().message);
          const bool named = shop->error().message.find(live) == 0 ||
                             shop->error().message == "the system gives no random bytes";
          CHECK_MESSAGE(named, shop->error().message);
        }
        shop.reset();
        auto again = open(live);
        CHECK(contents_of(*again) == contents);
        REQUIRE(n < 20'000);
      }
    }
}

TEST_CASE("where any one call or allocation of restoring fails, it says so") {
  disarm();
  const TemporaryFolder folder;
  const std::string path = folder.file("state");
  {
    auto shop = open(folder.file("live"));
    REQUIRE(shop->record({.user = "u0", .item = "i1"}));
    REQUIRE(shop->save(path));
  }
  const pz::RecommenderOptions chosen = options();
  for (const Fault kind : {Fault::once, Fault::memory})
    for (int n = 1;; ++n) {
      CAPTURE(n);
      std::string failed;
      if (kind == Fault::memory)
        fail_allocation_at = n;
      else
        fail_at = n;
      std::optional<pz::Result<pz::Recommender>> shop;
      {
        const Armed arm{&failed};
        shop.emplace(pz::Recommender::restore(path, model(), chosen));
      }
      const bool reached = kind == Fault::memory ? allocations >= n : !failed.empty();
      disarm();
      if (!reached) {
        REQUIRE(*shop);
        CHECK(n > 10);
        break;
      }
      if (*shop) continue;  // memory without which it can do
      CHECK(shop->error().code == (kind == Fault::memory ? pz::Errc::out_of_memory : pz::Errc::io));
      if (kind == Fault::once) CHECK(shop->error().message.find(path) == 0);
    }
}

TEST_CASE("a full disk that has space again, and a broken journal, are mended by an update") {
  const TemporaryFolder folder;
  for (const int error : {ENOSPC, EIO}) {
    disarm();
    const std::string live = folder.file("live");
    lay_down({}, live);
    auto shop = open(live);
    REQUIRE(shop->record({.user = "u0", .item = "i1", .event_id = "first"}));
    fault = error;
    full = true;
    fail_at = 1;
    {
      const Armed arm;
      for (int n = 0; n < 20; ++n) {
        const auto recorded =
            shop->record({.user = "u1", .item = "i2", .event_id = "e" + std::to_string(n)});
        armed = false;
        CHECK_FALSE(recorded);
        CHECK_FALSE(shop->persistence().durable);
        CHECK(shop->persistence().error);
        armed = true;
        calls = 0;
      }
    }
    disarm();
    std::this_thread::sleep_for(std::chrono::milliseconds{1100});
    REQUIRE(shop->update());
    REQUIRE(shop->record({.user = "u1", .item = "i2", .event_id = "last"}));
    CHECK(shop->persistence().durable);
    CHECK_FALSE(shop->persistence().error);
    auto again = opened_copy(image_of(live), folder.file("copy"), model());
    REQUIRE(again);
    for (int n = 0; n < 20; ++n) CHECK(knows(*again, "e" + std::to_string(n)) == "");
  }
}

TEST_CASE("an event that is told to be there already is as durable as one that is new") {
  disarm();
  const TemporaryFolder folder;
  auto shop = open(folder.file("live"));
  const pz::Interaction event{.user = "u0", .item = "i1", .event_id = "e"};
  fault = ENOSPC;
  full = true;
  fail_at = 1;
  pz::Result<pz::Recorded> first = pz::Recorded::learned, second = first;
  {
    const Armed arm;
    first = shop->record(event);
    second = shop->record(event);
  }
  disarm();
  CHECK_FALSE(first);
  // Whoever tries again is not told that all is well.
  CHECK_FALSE(second);
  CHECK(is_known(*shop, event));
  auto again = opened_copy(image_of(folder.file("live")), folder.file("copy"), model());
  REQUIRE(again);
  CHECK(is_known(*again, event));
}

#ifdef __linux__
TEST_CASE("a disk that is really full costs no more than durability, until there is space again") {
  disarm();
  const TemporaryFolder folder;
  const std::string small = folder.file("small"), live = small + "/live";
  fs::create_directory(small);
  if (::mount("tmpfs", small.c_str(), "tmpfs", 0, "size=256k") != 0) {
    MESSAGE("SKIPPED: a full disk, which takes the right to mount one");
    return;
  }
  {
    auto shop = open(live);
    const std::string long_id(256, 'x');
    int taken = 0, more = 0;
    const auto record = [&](int n) {
      return shop->record(
          {.user = "u1", .session = long_id, .item = "i2", .event_id = "e" + std::to_string(n)});
    };
    auto last = record(0);
    while (last && taken < 10'000) last = record(++taken);
    REQUIRE_FALSE(last);
    CHECK(taken > 100);
    CHECK(last.error().message.find(live) == 0);
    CHECK(last.error().message.find("No space left on device") != std::string::npos);
    const auto saved = shop->save();
    REQUIRE_FALSE(saved);
    CHECK(saved.error().message.find("No space left on device") != std::string::npos);
    for (; more < 500; ++more) CHECK_FALSE(record(taken + more));
    CHECK(shop->recommend({.user = "u1", .count = 3}));
    CHECK_FALSE(shop->persistence().durable);
    {
      auto again = opened_copy(image_of(live), folder.file("copy"), model());
      REQUIRE(again);
      for (int n = 0; n < taken; ++n)
        CHECK(is_known(*again, {.user = "u1", .item = "i2", .event_id = "e" + std::to_string(n)}));
    }
    REQUIRE(::mount("tmpfs", small.c_str(), "tmpfs", MS_REMOUNT, "size=4m") == 0);
    CHECK(record(taken + more));
    CHECK(shop->persistence().durable);
    auto again = opened_copy(image_of(live), folder.file("copy"), model());
    REQUIRE(again);
    for (int n = 0; n <= taken + more; ++n)
      CHECK(is_known(*again, {.user = "u1", .item = "i2", .event_id = "e" + std::to_string(n)}));
    CHECK(shop->save());
    CHECK_FALSE(shop->persistence().error);
  }
  CHECK(::umount2(small.c_str(), MNT_DETACH) == 0);
}
#endif

TEST_CASE("a file that may not grow any more takes whole records, and goes on when it may") {
  disarm();
  const TemporaryFolder folder;
  const std::string live = folder.file("live");
  auto shop = open(live);
  const std::string long_id(256, 'x');
  const auto record = [&](int n) {
    return shop->record(
        {.user = "u1", .session = long_id, .item = "i2", .event_id = "e" + std::to_string(n)});
  };
  struct rlimit before {
  }, less{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  less = before;
  less.rlim_cur = 50'001;
  const auto old = std::signal(SIGXFSZ, SIG_IGN);
  int taken = 0, more = 0;
  std::string message;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &less) == 0);
  for (bool takes = true; takes && taken < 1'000; taken += takes) takes = record(taken).has_value();
  for (; more < 10; ++more)
    if (const auto refused = record(taken + more); !refused) message = refused.error().message;
  const Image left = image_of(live);
  (void)::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, old);
  CHECK(message.find("File too large") != std::string::npos);
  CHECK(taken > 100);
  auto again = opened_copy(left, folder.file("copy"), model());
  REQUIRE(again);
  for (int n = 0; n < taken; ++n) CHECK(knows(*again, "e" + std::to_string(n)) == "");
  again.reset();
  CHECK(record(taken + more));
  CHECK(shop->persistence().durable);
  again = opened_copy(image_of(live), folder.file("copy"), model());
  REQUIRE(again);
  for (int n = 0; n <= taken + more; ++n) CHECK(knows(*again, "e" + std::to_string(n)) == "");
}
