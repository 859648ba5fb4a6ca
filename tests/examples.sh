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
for subcommand in train evaluate recommend convert inspect simulate; do
  "$personalize" "$subcommand" --help
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
"$examples/restart" model.pzm journal.tsv u2 i4 >second
"$examples/restart" model.pzm journal.tsv u1 i2 nothing i1 >first
says '^nothing: unknown item$' first
(($(wc -l <journal.tsv) == 4)) || fail "the journal has $(cat journal.tsv)"
cp journal.tsv played.tsv
again() {  # again: started once more, with the slate of before
  "$examples/restart" model.pzm journal.tsv u1 >second 2>err
  says '^2 users came back; 0 events' second
  cmp <(tail -n 10 first) <(tail -n 10 second) || fail "another slate after a restart: $(cat second)"
}
again
printf 'u1\ti3\t17' >>journal.tsv
again
says 'torn' err
printf 'u1\ti3\t17' >>journal.tsv
"$examples/restart" model.pzm journal.tsv u1 i5 >first 2>err
again
(($(wc -l <journal.tsv) == 5)) || fail "the journal has $(cat journal.tsv)"
# The command reads it, too, and takes the same from the times of long ago.
awk -F'\t' 'BEGIN {OFS = "\t"} NR > 1 {$3 = 1700000000 + 90000 * NR} {print}' journal.tsv >old.tsv
"$examples/restart" model.pzm old.tsv u1 >second
"$personalize" recommend -m model.pzm -i old.tsv --all-users -n 10 2>err | sed -n 's/^u1,[0-9]*,\([^,]*\),.*/\1/p' |
  cmp <(tail -n 10 second | cut -d ' ' -f 1) - || fail "the journal tells the command something else"
"$examples/restart" model.pzm empty.tsv u1 >second
! cmp -s <(tail -n 10 first) <(tail -n 10 second) || fail "the journal makes no difference"
cp data/items.csv items.csv
refuses 1 'this is no journal' "$examples/restart" model.pzm items.csv u1
cmp items.csv data/items.csv || fail "what is no journal was changed"
printf 'u1\ti1\tlater\tclick\n' >>journal.tsv
refuses 1 'byte [0-9]* of the journal begins no event' "$examples/restart" model.pzm journal.tsv u1

# All that came before, while and after the model changed is known to the new one.
"$examples/new_model" model.pzm typed.pzm >changed
python3 - <<'CHECK' || fail "the new model lost users: $(cat changed)"
import re
lines = open("changed").read().splitlines()
events, failed, users = map(int, re.findall(r"\d+", lines[0]))
assert events >= 250 and failed == 0 and users == events, lines[0]
assert len(lines) == 11 and all(line.endswith(" relevance") for line in lines[1:]), lines
CHECK

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
"$examples/restart" tonight.pzm played.tsv u1 >second
says '^1 users came back; 2 events are on items that the model does not have$' second
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
server = subprocess.Popen([sys.argv[1], "model.pzm"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
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
assert ask("forget", "zoë") == ["ok"] and ask("event", "zoë", items[2], "play", slate) == ["ok", "expired slate"]
server.stdin.close()
assert server.wait() == 0
CHECK
echo "ok"
