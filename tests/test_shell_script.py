"""Shell scripts are read as a shell would run them: bash itself is the oracle."""

import contextlib
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launch.arguments.shell import read_script
from launch.arguments.shell_variables import LONGEST, Variables
from launch.arguments.shell_words import tokens

FUNCTION = "train() { printf '%s\\0' \"$@\" >&3; printf '\\n' >&3; }\n"
"""The training that bash starts: it prints its words, wherever its output goes."""

SCRIPTS = {
    "quotes": """train a'b c'd "e $HOME_OF" 'f $x' g\\ h "" ''""",
    "defaults": """A=${A:-1}; B=""
train ${A} ${B:-two} ${B-three} ${C:-"four five"} ${C:=six} $C "${A:+7}" x${D:+y}""",
    "arrays": """
ARGS=(
    --one 1 # a comment
    "--two 2"
    --three='x y'
)
ARGS+=(--four)
MORE=("${ARGS[@]}" --five)
NONE=()
train ${ARGS[@]} | cat
train "${ARGS[@]}"
train "${MORE[@]}" "${NONE[@]}" ${NONE[@]} "${#MORE[@]}" ${MORE[1]} "${ARGS[*]}"
""",
    "options in one string": """
OPTIONS=" --num-layers 2 \\
    --split 99,1,0 \\
"
OPTIONS+="--more"
OPTIONS="$OPTIONS $(( 2 + 3 * 4 ))"
train $OPTIONS; train "${OPTIONS}"
""",
    "arithmetic": "G=8; N=2; train $((G*N)) $(($G * ${N})) $(( (G - 3) / 2 )) $((-G / 3)) $((UNSET + 1))",
    "if": """
A=fp8; N=3
if [[ "$A" == "fp8" ]]; then train eight; else train other; fi
if [ "$A" = bf16 ]; then train a; elif [ $N -gt 2 ] && [ -n "$A" ]; then train b; else train c; fi
if [[ "$A" == "x" || -z "$B" ]]; then
    if [ ! -z "$A" ]; then
        train nested
    fi
fi
[ $N -eq 3 ] && train yes
[ $N -eq 4 ] && train no
[[ $A != f* ]] || train or
[[ -n $A && $N -lt 5 ]] && train both
test $N -ge 3 && train test
""",
    "case": """
SIZE=7B
case $SIZE in
    1B|2B) L=1 ;;
    "7B")
        L=32; H=4096 ;;
    *) L=0 ;;
esac
case ${OTHER:-none} in a) train a;; *) train $L $H;; esac
""",
    "cuts": """P=/data/model.tar.gz; train ${P##*/} ${P%.gz} ${P%%.*} ${P#*/} ${P/model/other} ${P//a/A}""",
    "exported": """export A=1 B="2 3"; C=4 train $A "$B" "$C"; readonly D=5; train $D""",
    "redirected": """train a > /dev/null; train b 2>/dev/null; train c 2>&1; cat <<END
train never $A
END
train d 1>&2
wait""",
    "positional": """train "$1" $2 "$#" "$@" ${3:-none} ${4:-"no $1"}; shift; train "$1" """,
    "continued": "train a \\\n  b \\\n  --c=d;train e",
    "eval": """CMD="train --x 'a b'"; eval $CMD; eval "$CMD --y \\"c d\\"" """,
    "comments": "A=1 # B=2\n# train never\ntrain a#b $A # train c\ntrain '#' \"#\"",
    "ends": "train a; exit 0; train b",
    "brackets": "( train a; train b ); { train c; }; train {d}",
}


def of_bash(script: str, arguments: list[str]) -> list[list[str]]:
    """The arguments of each training that bash starts."""
    command = ["bash", "--norc", "-c", f"exec 3>&1 1>&2\n{FUNCTION}{script}", "bash", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, timeout=30)
    return [line.split("\0") for line in done.stdout.split("\0\n") if line]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_starts_what_bash_would_start(name: str) -> None:
    arguments = ["one", "two words", "three"]
    commands = read_script(SCRIPTS[name], arguments, {}).commands
    trainings = [words[1:] for words in commands if words[0] == "train"]
    assert trainings == of_bash(SCRIPTS[name], arguments)
    assert trainings


@given(st.lists(st.text(st.characters(exclude_characters="\0\r", exclude_categories=("Cs",)), max_size=8), max_size=6))
@example(["a$b", "`c`", '"', "'", "\\", "#", "\n", ""])
def test_quoted_words_come_back_as_they_were(words: list[str]) -> None:
    read = tokens(shlex.join(words))
    assert [word for token in read for word in Variables().expand(token.text)] == words


@given(st.text(alphabet="ab$`'\"\\(){}[]<>|&;#= \n-:1", max_size=60))
def test_no_text_leads_to_anything_but_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        read_script(text, ["x"], {})


def test_nothing_is_run_and_no_environment_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "key")
    file = tmp_path / "made"
    script = read_script(
        f"touch {file}; X=$(touch {file}); Y=`touch {file}`; train $SECRET $X; $(touch {file})", [], {}
    )
    assert not file.exists()
    assert not any("key" in word for words in script.commands for word in words)
    assert script.variables.unset == {"SECRET"}
    assert any("is not run" in note for note in script.notes)


def test_what_cannot_be_followed_is_reported_with_its_line() -> None:
    script = read_script(
        "if [ -d /data ]; then\n  A=--x\nfi\nfor i in 1 2; do\n  A=--y\ndone\nsource other.sh\nf() {\n  A=--z\n}\n",
        [],
        {},
    )
    assert [note.partition(":")[0] for note in script.notes] == ["line 1", "line 4", "line 7", "line 8"]
    assert "A" not in script.variables.values


def test_variables_that_are_set_before_the_script_count() -> None:
    assert read_script("train ${A:-1} $B", [], {"A": "2"}).commands == [["train", "2"]]


def test_a_variable_that_doubles_for_ever_is_refused() -> None:
    with pytest.raises(ValueError, match=f"longer than {LONGEST}"):
        read_script("A=xx\n" + "A=$A$A\n" * 40, [], {})


def test_directives_of_slurm_are_words() -> None:
    directives = read_script("#!/bin/bash\n#SBATCH --nodes=4 # four\n#SBATCH -t 1\n", [], {}).directives
    assert directives == ["--nodes=4", "-t", "1"]
