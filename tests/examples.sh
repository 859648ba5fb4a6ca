#!/usr/bin/env bash
# "By hand" of the README as it is written; then each example does what it says, and says what is
# wrong.
# usage: tests/examples.sh PERSONALIZE EXAMPLES_DIR
set -euo pipefail
personalize=$(realpath "$1")
examples=$(realpath "$2")
here=$(cd "$(dirname "$0")" && pwd)
readme=$here/../README.md
. "$here/checks.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# says PATTERN FILE
says() { grep -q -- "$1" "$2" || fail "no '$1' in $2: $(cat "$2")"; }

# It is built, and what builds it stands in lines of its own.
mkdir -p build/release
ln -s "$(dirname "$personalize")" build/release/tools
ln -s "$examples" build/release/examples
sed -n '/^By hand/,/^## /{/^```/,/^```/{/^```/!p}}' "$readme" |
  grep -v '^tools/packaging/install-packages \|^cmake ' >by_hand
(($(wc -l <by_hand) >= 5)) || fail "the README's commands were not found: $(cat by_hand)"
bash -euo pipefail by_hand >by_hand.txt 2>&1 || fail "the README's commands fail: $(cat by_hand by_hand.txt)"
tail -n 1 by_hand.txt | grep -q '^i[0-9]* [-0-9.]*$' || fail "no first slate: $(cat by_hand.txt)"
says 'NDCG' by_hand.txt
head -n 1 data/items.csv | grep -qx 'ITEM_ID,CREATION_TIMESTAMP,GENRES,PRICE,TITLE'

# Its options are the command's.
for subcommand in train evaluate recommend convert inspect simulate state\ {inspect,verify,repair,export}; do
  # shellcheck disable=SC2086
  "$personalize" $subcommand --help
done >help.txt
python3 - "$readme" <<'CHECK' || fail "the README names options that the command does not have"
import re, sys
there = set(re.findall(r"--[a-z][a-z-]*", open("help.txt").read()))
text = open(sys.argv[1], encoding="utf-8").read()
code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^(?:\$P|personalize) .*", text, re.M)
named = {option for part in code if re.match(r"(--|\$P |personalize )", part) for option in re.findall(r"--[a-z][a-z-]*", part)}
assert len(named) > 20 and named <= there, named - there
CHECK

# A model with two event types, in f32; the first has one, and int8.
awk -F, 'BEGIN {OFS = ","} NR > 1 {$4 = NR % 3 ? "view" : "purchase"} {print}' data/interactions.csv >typed.csv
"$personalize" train typed.csv --items data/items.csv -o typed.pzm --epochs 1 --hidden-dimension 32 \
  --element-type f32 >/dev/null 2>&1

# Each example: its usage, and a model that is not there.
for example in "$examples"/*; do
  name=$(basename "$example")
  refuses 2 "^usage: $name MODEL.pzm" "$example"
  read -r -a words <<<"$(sed 's/^usage: [a-z_]* MODEL.pzm//; s/[[>].*//' err)"
  refuses 1 "^$name: missing.pzm: cannot open" "$example" missing.pzm "${words[@]/*/1}"
done

"$examples/first_slate" model.pzm u1 i1 m2 >slate 2>err
(($(wc -l <slate) == 10)) || fail "first_slate printed $(cat slate)"
says '^m2: no such item$' err

"$examples/exploration" model.pzm new_game GENRES Puzzle log.csv >hours.txt
python3 - <<'CHECK' || fail "the new item was not explored, or did not rise: $(cat hours.txt)"
import re
hours = [list(map(int, re.findall(r"in +(\d+) of 100 slates \( *(\d+) explored", l)[0])) for l in open("hours.txt")]
# In the end it stands in most slates by its score, not by exploration.
assert hours[0][1] > 0 and hours[-1][0] - hours[-1][1] > 50 > hours[0][0], hours
CHECK
decisions() {  # decisions LOG: of its slates, as the off-policy evaluation counts them
  "$personalize" evaluate --protocol off-policy --log "$1" --target-weight 0.2 --json |
    python3 -c 'import json, sys; v = json.load(sys.stdin); assert v["doubly_robust"]["low"] < v["doubly_robust"]["mean"] < v["doubly_robust"]["high"]; print(v["decisions"])'
}
(($(decisions log.csv) == 1200)) || fail "the log of exploration has lost slates"

# After a restart the slate is what it was, also where the process died while it wrote.
says_all() { for pattern in "${@:2}"; do says "$pattern" "$1"; done; }
"$examples/restart" model.pzm kept u2 i4 >second
says '^the folder is new$' second
"$examples/restart" model.pzm kept u1 i2 nothing i1 >first
says_all first '^1 users came back, after [0-9]* calls .* ended in peace$' '^nothing: unknown item$'
again() {  # again: started once more, with the slate of before
  "$examples/restart" model.pzm kept u1 >second
  says '^2 users came back' second
  cmp <(tail -n 10 first) <(tail -n 10 second) || fail "another slate after a restart: $(cat second)"
}
again
printf 'torn' >>kept/journal-000000000001.pzj
again
says '^4 bytes of a call' second
"$examples/restart" model.pzm kept u1 i5 >first
again
"$examples/restart" model.pzm empty u1 >second
! cmp -s <(tail -n 10 first) <(tail -n 10 second) || fail "the folder makes no difference"
# The command reads it: what was done is training data, and what is damaged is found.
"$personalize" state export kept -o kept.csv 2>err
says '^personalize state export: 4 events of 2 users' err
"$personalize" recommend -m model.pzm -i kept.csv -u u1 --json >/dev/null 2>err
printf '\x01' | dd of=kept/journal-000000000001.pzj bs=1 seek=90 conv=notrunc 2>/dev/null
refuses 1 'restart: .*damaged at byte 64' "$examples/restart" model.pzm kept u1
"$personalize" state repair kept >repaired
says '^given up: [0-9]* bytes with [0-9]* whole records' repaired
"$examples/restart" model.pzm kept u1 >second
says 'users came back\|the folder is new' second

# All that came before, while and after the model changed is known to the new one.
"$examples/new_model" model.pzm typed.pzm >changed
python3 - <<'CHECK' || fail "the new model lost users: $(cat changed)"
import re
lines = open("changed").read().splitlines()
events, failed, users = map(int, re.findall(r"\d+", lines[0]))
assert events >= 250 and failed == 0 and users == events, lines[0]
assert lines[1].endswith("states are made anew"), lines[1]
assert len(lines) == 12 and all(line.endswith(" relevance") for line in lines[2:]), lines
CHECK

"$examples/move_user" model.pzm model.pzm u1 i2 i3 >moved
[[ $(sed -n 's/^there: //p' moved) == "$(sed -n 's/^here: //p' moved)" ]] || fail "a user who moved gets another slate: $(cat moved)"
says '^u1 moved in [0-9]* bytes: 2 events, 0 on items that are unknown there$' moved
"$examples/move_user" model.pzm typed.pzm u1 i2 i3 >moved
says '^u1 moved in [0-9]* bytes: 2 events, 0 ' moved

if [[ -x $examples/sqlite_users ]]; then
  for start in 1 2; do
    "$examples/sqlite_users" model.pzm evicting users.db >evicted
    python3 - <<'CHECK' || fail "users were lost on the way to SQLite and back: $(cat evicted)"
import re
lines = open("evicted").read().splitlines()
count, memory, left = map(int, re.findall(r"\d+", lines[0]))
known, asked, found = map(int, re.findall(r"\d+", lines[1]))
assert count == 2000 and memory < 1500 and left >= count - memory and found >= count - memory, lines
assert known == asked == count, lines
assert lines[2] == "user0 is forgotten: their slate is of popular items", lines
CHECK
  done
fi

awk -F, 'NR > 1 {print $1 "\t" $3 "\t" NR % 4}' data/items.csv >stock.tsv
printf 'unheard_of\tRacing\t1\n' >>stock.tsv
"$examples/filters" model.pzm stock.tsv u1 Racing >filtered 2>err
says '1 lines are of items that the model does not have' err
python3 - <<'CHECK' || fail "the filter let others through: $(cat filtered)"
import re
eligible = {id for id, genres, stock in (line.rstrip("\n").split("\t") for line in open("stock.tsv"))
            if "Racing" in genres.split("|") and int(stock) > 0 and id != "unheard_of"}
slates = [(line.split(": ")[1].split(" (")[0].split(), int(re.search(r"of (\d+)\)", line)[1])) for line in open("filtered")]
(first, count), (second, fewer) = slates
assert count == len(eligible) and fewer == count - 1 and len(first) == len(second) == 5, slates
assert set(first + second) <= eligible and first[0] not in second and first[1:] == second[:4], slates
CHECK
! "$examples/filters" model.pzm stock.tsv u1 Nothing 2>err || fail "filters took an unknown genre"
says 'no item has the genre Nothing' err

"$examples/event_types" typed.pzm u1 >types
says '^the model knows 2 event types: .*purchase' types
says ' view: chosen 0 times, 0\.[0-9]* expected, discount 0\.[1-9]' types
says ' purchase: chosen 1 times, 0\.[0-9]* expected, discount 0\.00' types
says ' seen: chosen 0 times, 0\.[0-9]* expected, discount 0\.[1-9]' types

"$examples/anonymous" model.pzm u1 i1 i2 >visitor
slate_of() { sed -n "s/^$1: //p" visitor; }
[[ $(slate_of visitor) == "$(slate_of user)" ]] || fail "signing in changed the slate: $(cat visitor)"
[[ $(slate_of user) != "$(slate_of 'user before signing in')" ]] || fail "the session made no difference"
says '^merged: yes, and once more: no$' visitor

"$examples/related_items" model.pzm i7 8 >related
"$personalize" convert --from model.pzm --to safetensors -o model.safetensors >/dev/null
python3 - <<'CHECK' || fail "these are not the nearest of i7: $(cat related)"
import json, math, struct
data = open("model.safetensors", "rb").read()
length = struct.unpack("<Q", data[:8])[0]
header = json.loads(data[8:8 + length])
def tensor(name):
    begin, end = header[name]["data_offsets"]
    return data[8 + length + begin:8 + length + end]
n, d = header["item_vectors"]["shape"]
values = struct.unpack(f"<{n * d}f", tensor("item_vectors"))
rows = [values[i * d:(i + 1) * d] for i in range(n)]
def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
text = tensor("item_ids")  # the lengths of all, then all
lengths = struct.unpack(f"<{n}H", text[:2 * n])
ids = [text[2 * n + sum(lengths[:i]):][:length].decode() for i, length in enumerate(lengths)]
own = rows[ids.index("i7")]
best = sorted(((cosine(own, row), id) for id, row in zip(ids, rows) if id != "i7"), reverse=True)[:8]
got = [line.split() for line in open("related")]
assert len(got) == 8
for (want, id), (item, shown) in zip(best, got):
    assert abs(want - float(shown)) < 1e-3 and abs(want - cosine(own, rows[ids.index(item)])) < 1e-3, (best, got)
CHECK
refuses 1 'i0: no such item' "$examples/related_items" model.pzm i0

# Four threads write one log: no line is lost or torn.
"$examples/metrics" model.pzm metrics.csv >metrics
says '^requests 4000$' metrics
says '^failed 0$' metrics
says '^users 4000$' metrics
says '^memory_bytes{of="all"} [1-9]' metrics
says '^update_items_learnt [1-9]' metrics
awk -F, 'NF != 13 {exit 1}' metrics.csv || fail "torn lines in the log"
(($(wc -l <metrics.csv) == 1 + 4000 * 11)) || fail "the log has $(wc -l <metrics.csv) lines"
(($(decisions metrics.csv) == 4000)) || fail "the log of metrics has lost slates"

awk -F, 'NR > 1 {print $1 "\t" $2 "\t" $3}' data/interactions.csv >events.tsv
"$examples/batch" model.pzm events.tsv >slates.csv 2>err
"$personalize" recommend -m model.pzm -i data/interactions.csv --all-users -n 3 >alone.csv 2>err
cmp <(cut -d, -f1,3 alone.csv) slates.csv || fail "slates for many users differ from those for one"
(($(wc -l <slates.csv) == 901)) || fail "slates.csv has $(wc -l <slates.csv) lines"

"$examples/threads" model.pzm 4 4000 >counted
says '^4000 requests, 40000 picks, 0 failed, 1000 users' counted

"$examples/update_loop" model.pzm new_game GENRES Puzzle >loop
grep -o '^frame [0-9]*: [a-z_]* *[a-z]*' loop | sed 's/ in$//' >steps
printf 'frame 60: updated\nframe 90: new_game was\nframe 120: updated\nframe 180: updated\n' | cmp - steps ||
  fail "updates came at other times: $(cat loop)"
says '^frame 120: .* 1 items added' loop
says '^new_game is in$' loop

awk -F, 'NR > 3 {print $1 "\tGENRES=" $3}' data/items.csv >feed.tsv
printf 'new_a\tGENRES=Puzzle|Unheard\nnew_b\tCOLOUR=red\n' >>feed.tsv
"$examples/catalogue" model.pzm feed.tsv tonight.pzm >fed
says "^new_b: the model has no metadata field 'COLOUR'; it has GENRES" fed
says '^1 added, 118 changed, 2 removed, 1 refused, 1 values unknown$' fed
"$examples/related_items" tonight.pzm new_a 3 >related
(($(wc -l <related) == 3)) || fail "the item that came in is not in the saved model"
refuses 1 'i2: no such item' "$examples/related_items" tonight.pzm i2
"$examples/move_user" model.pzm tonight.pzm u1 i1 i2 i3 >moved
says '^u1 moved in [0-9]* bytes: 1 events, 2 on items' moved
precision() { "$personalize" inspect "$1" | awk '$1 == "IVEC" {print $2}'; }
[[ $(precision model.pzm) == *8 && $(precision typed.pzm) == f32 ]] || fail "the models have other precisions"
for model in model typed; do
  "$examples/catalogue" $model.pzm feed.tsv tonight.pzm >fed
  [[ $(precision tonight.pzm) == "$(precision $model.pzm)" ]] || fail "the catalogue changed the precision"
done
head -n 9 feed.tsv >half.tsv
refuses 1 'names fewer than half of the items' "$examples/catalogue" model.pzm half.tsv half.pzm
[[ ! -e half.pzm ]] || fail "half a feed made a model"

python3 - "$examples/server" <<'CHECK' || fail "the server answered otherwise"
import subprocess, sys
server = subprocess.Popen([sys.argv[1], "model.pzm", "served"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
def ask(*fields):
    server.stdin.write("\t".join(fields) + "\n")
    server.stdin.flush()
    return server.stdout.readline().rstrip("\n").split("\t")
assert ask("event", "zoë", "i1", "play") == ["ok", "learned"]
assert ask("event", "zoë", "nothing", "play") == ["ok", "unknown item"]
ok, slate, *items = ask("slate", "zoë", "7")
assert ok == "ok" and len(slate) == 32 and len(set(items)) == 7, (slate, items)
assert ask("event", "zoë", items[2], "play", slate) == ["ok", "learned"]
assert ask("event", "other", items[2], "play", slate) == ["ok", "unknown slate"]
for wrong in (["slate", "zoë", ""], ["slate", "zoë", "7x"], ["slate", "zoë", "99999"], ["slate", "", "7"],
              ["event", "", "i1"], ["event", "a\x01", "i1"], ["sing"], [""]):
    assert ask(*wrong)[0] == "error", wrong
assert ask("save")[0] == "ok" and ask("model", "missing.pzm")[0] == "error"
assert ask("forget", "zoë") == ["ok"] and ask("event", "zoë", items[2], "play", slate) == ["ok", "expired slate"]
assert ask("event", "ann", "i1", "play") == ["ok", "learned"]
ok, slate, *items = ask("slate", "ann", "7")
second = subprocess.run([sys.argv[1], "model.pzm", "served"], capture_output=True, text=True)
assert second.returncode == 1 and "has it open" in second.stderr, second
server.terminate()
assert server.wait() == 0
# It goes on where it was: slates of before can be answered; another model comes beside requests.
server = subprocess.Popen([sys.argv[1], "model.pzm", "served"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
assert ask("event", "ann", items[2], "play", slate) == ["ok", "learned"]
assert ask("model", "typed.pzm") == ["ok", "0", "0"]
assert ask("event", "ann", items[3], "play", slate) == ["ok", "learned"]
server.kill()
server.wait()
server = subprocess.Popen([sys.argv[1], "typed.pzm", "served"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
assert ask("event", "ann", items[4], "play", slate) == ["ok", "learned"]
server.stdin.close()
assert server.wait() == 0
CHECK
"$personalize" state inspect served | grep -qx 'the process ended in peace' || fail "the server did not end in peace"
"$personalize" state verify served >/dev/null
"$personalize" state export served 2>err >served.csv
(($(grep -c '^ann,' served.csv) == 4)) || fail "the server's events are $(cat served.csv)"
echo "ok"
